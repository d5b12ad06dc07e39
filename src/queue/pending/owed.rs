//! Request ids that the store is still to be told of.
//!
//! Owns those whose write has left its slot, or never had one: a newer write of the key stands in its stead. Each keeps what its
//! write held, record and permit, so that neither a crash nor a long outage makes more of them than there is room for. While the key has a
//! slot they go with its next batch. Those of a key whose slot has gone without them are *loose*: they are brought to the store by
//! themselves. Pure, as the table that it belongs to. Invariants: an id is owed until a batch that it was in is in the store, or it was
//! remembered there by itself; it is tried in one way at a time.

use std::collections::{BTreeSet, HashMap, hash_map::Entry};

use foldhash::fast::RandomState;

use super::Place;
use crate::model::{Answered, Key, KeyedAnswer, Version};

/// How the store is being told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tried {
    /// It is not.
    No,
    /// With the write of this version, which a batch has.
    With(Version),
    /// By itself.
    Alone,
}

/// An id that is owed.
#[derive(Debug)]
pub(super) struct Owed<P> {
    pub(super) answered: Answered,
    pub(super) payload: P,
    /// The weight of the write that it came with.
    pub(super) weight: usize,
    /// What it is counted under among the shares; it is in no order.
    pub(super) place: Place,
    pub(super) tried: Tried,
}

/// The ids of keys whose slot has gone without them.
#[derive(Debug)]
pub(super) struct Loose<P> {
    by_key: HashMap<Key, Vec<Owed<P>>, RandomState>,
    /// Keys with an id that is not being tried.
    waiting: BTreeSet<Key>,
}

impl<P> Loose<P> {
    pub(super) fn new() -> Loose<P> {
        Loose {
            by_key: HashMap::default(),
            waiting: BTreeSet::new(),
        }
    }

    /// Takes in what the slot of a key leaves.
    pub(super) fn add(&mut self, key: &Key, owed: Vec<Owed<P>>) {
        if owed.is_empty() {
            return;
        }
        if owed.iter().any(|owed| owed.tried == Tried::No) {
            self.waiting.insert(key.clone());
        }
        self.by_key.entry(key.clone()).or_default().extend(owed);
    }

    /// Up to `limit` ids that are not being tried: they are, from now on, by themselves.
    pub(super) fn take(&mut self, limit: usize) -> Vec<KeyedAnswer> {
        let mut taken = Vec::new();
        while taken.len() < limit {
            let Some(key) = self.waiting.pop_first() else { break };
            let of_key = self.by_key.get_mut(&key).into_iter().flatten();
            let mut waiting = of_key.filter(|owed| owed.tried == Tried::No).peekable();
            while taken.len() < limit
                && let Some(owed) = waiting.next()
            {
                owed.tried = Tried::Alone;
                taken.push(KeyedAnswer {
                    key: key.clone(),
                    answered: owed.answered.clone(),
                });
            }
            if waiting.peek().is_some() {
                self.waiting.insert(key);
            }
        }
        taken
    }

    /// A try of a key is over, and the store was told: these have nothing left to do.
    pub(super) fn told(&mut self, key: &Key, tried: Tried) -> Vec<Owed<P>> {
        if self.by_key.is_empty() {
            return Vec::new();
        }
        let Entry::Occupied(mut of_key) = self.by_key.entry(key.clone()) else {
            return Vec::new();
        };
        let told = told(of_key.get_mut(), tried);
        if of_key.get().is_empty() {
            of_key.remove();
        }
        told
    }

    /// A try of a key failed.
    pub(super) fn release(&mut self, key: &Key, tried: Tried) {
        if self.by_key.is_empty() {
            return;
        }
        if self.by_key.get_mut(key).is_some_and(|of_key| release(of_key, tried)) {
            self.waiting.insert(key.clone());
        }
    }

    /// How many keys have an id that is not being tried.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Owed<P>> {
        self.by_key.values().flatten()
    }
}

/// Takes those out that were tried so.
pub(super) fn told<P>(owed: &mut Vec<Owed<P>>, tried: Tried) -> Vec<Owed<P>> {
    owed.extract_if(.., |owed| owed.tried == tried).collect()
}

/// Has those be tried again that were tried so; whether there are any.
pub(super) fn release<P>(owed: &mut [Owed<P>], tried: Tried) -> bool {
    let mut any = false;
    for owed in owed.iter_mut().filter(|owed| owed.tried == tried) {
        owed.tried = Tried::No;
        any = true;
    }
    any
}
