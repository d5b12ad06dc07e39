//! Who waits for writes to leave the table.
//!
//! Owns the waits and how each ends; each is answered once, over a channel of its own, and wakes nobody else. Does not own when what happens
//! (the table tells), nor deadlines: whoever gives up takes the wait back. Invariant: a wait that is neither answered nor taken back has something
//! here to wait for.

use std::collections::{HashMap, hash_map::Entry};

use foldhash::fast::RandomState;
use tokio::sync::oneshot;

use crate::model::{Key, Version};

/// How the wait for a write ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Nothing of it is pending here: only the store can tell.
    Unknown,
    /// The store has this version, which is the awaited one or higher.
    Stored(Version),
    /// The store refuses it for good, or a newer one that stood for it; the dead-letter table has that.
    DeadLettered,
}

/// A wait: its number, by which it is taken back, and where its end is told.
#[derive(Debug)]
pub(in crate::queue) struct Watch<T> {
    pub(in crate::queue) number: u64,
    pub(in crate::queue) end: oneshot::Receiver<T>,
}

#[derive(Debug)]
struct Waiter<W, T> {
    number: u64,
    what: W,
    tell: oneshot::Sender<T>,
}

/// What the wait is for that nothing older of a key is pending.
#[derive(Debug, Clone, Copy)]
pub(super) struct Below {
    /// No write below this is.
    pub(super) version: Version,
    /// Nor is any on its way that came up to this number.
    pub(super) passage: u64,
}

/// What the wait for the whole table is for.
#[derive(Debug)]
struct Places {
    /// Those with numbers up to this are to leave.
    up_to: u64,
    /// How many of them have not.
    left: usize,
    /// Only those of this namespace.
    namespace: Option<Box<str>>,
}

type ByKey<W, T> = HashMap<Key, Vec<Waiter<W, T>>, RandomState>;

/// All waits of a table.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    stored: ByKey<Version, Fate>,
    settled: ByKey<Below, ()>,
    all: Vec<Waiter<Places, ()>>,
    /// Waits so far.
    waits: u64,
}

impl Watchers {
    /// Waits until the store has `version` of a key, or refuses it.
    pub(super) fn stored(&mut self, key: &Key, version: Version) -> Watch<Fate> {
        let (waiter, watch) = self.waiter(version);
        self.stored.entry(key.clone()).or_default().push(waiter);
        watch
    }

    /// Waits until nothing older of a key is pending.
    pub(super) fn settled(&mut self, key: &Key, below: Below) -> Watch<()> {
        let (waiter, watch) = self.waiter(below);
        self.settled.entry(key.clone()).or_default().push(waiter);
        watch
    }

    /// Waits until the `left` places with numbers up to `up_to` have left, of a namespace or of all.
    pub(super) fn all(&mut self, up_to: u64, left: usize, namespace: Option<&str>) -> Watch<()> {
        let namespace = namespace.map(Box::from);
        let (waiter, watch) = self.waiter(Places { up_to, left, namespace });
        self.all.push(waiter);
        watch
    }

    fn waiter<W, T>(&mut self, what: W) -> (Waiter<W, T>, Watch<T>) {
        self.waits += 1;
        let (tell, end) = oneshot::channel();
        let number = self.waits;
        (Waiter { number, what, tell }, Watch { number, end })
    }

    /// Takes a wait back, if it is still there: one of a key, or of the whole table.
    pub(super) fn take_back(&mut self, key: Option<&Key>, number: u64) {
        match key {
            Some(key) => {
                drop(end(&mut self.stored, key, |waiter| waiter.number == number));
                drop(end(&mut self.settled, key, |waiter| waiter.number == number));
            }
            None => self.all.retain(|waiter| waiter.number != number),
        }
    }

    /// Whether anybody waits for anything.
    pub(super) fn is_empty(&self) -> bool {
        self.stored.is_empty() && self.settled.is_empty() && self.all.is_empty()
    }

    /// Whether somebody waits for a key, so that nothing of it is to be delayed.
    pub(super) fn is_watched(&self, key: &Key) -> bool {
        // Nearly always nobody does.
        (!self.stored.is_empty() && self.stored.contains_key(key))
            || (!self.settled.is_empty() && self.settled.contains_key(key))
    }

    /// The store holds `version` of a key, or something newer.
    pub(super) fn note_stored(&mut self, key: &Key, version: Version) {
        for waiter in end(&mut self.stored, key, |waiter| waiter.what <= version) {
            // Who has given up is about to take the wait back.
            let _given_up = waiter.tell.send(Fate::Stored(version));
        }
    }

    /// A write that stood for all from `lowest` on is among the dead letters.
    pub(super) fn note_buried(&mut self, key: &Key, lowest: Version, version: Version) {
        for waiter in end(&mut self.stored, key, |waiter| {
            (lowest..=version).contains(&waiter.what)
        }) {
            let _given_up = waiter.tell.send(Fate::DeadLettered);
        }
    }

    /// What is left of a key: the lowest version that is pending, and the number of the first that is on its way.
    pub(super) fn note_left(&mut self, key: &Key, lowest: Option<Version>, first: Option<u64>) {
        for waiter in end(&mut self.settled, key, |waiter| waiter.what.holds(lowest, first)) {
            let _given_up = waiter.tell.send(());
        }
    }

    /// Whether anybody waits until nothing older of a key is pending.
    pub(super) fn is_settling(&self) -> bool {
        !self.settled.is_empty()
    }

    /// A place of a key has left, or is merged into an older one.
    pub(super) fn note_gone(&mut self, key: &Key, place: u64) {
        for waiter in &mut self.all {
            let namespace = waiter.what.namespace.as_deref();
            if place <= waiter.what.up_to && namespace.is_none_or(|namespace| namespace == key.namespace()) {
                waiter.what.left -= 1;
            }
        }
        for waiter in self.all.extract_if(.., |waiter| waiter.what.left == 0) {
            let _given_up = waiter.tell.send(());
        }
    }
}

impl Below {
    /// Whether it is so, given the lowest version of the key that is pending, and the first that is on its way.
    pub(super) fn holds(self, lowest: Option<Version>, first: Option<u64>) -> bool {
        lowest.is_none_or(|lowest| lowest >= self.version) && first.is_none_or(|first| first > self.passage)
    }
}

/// Takes out the waiters of a key whose wait is over.
fn end<W, T>(by_key: &mut ByKey<W, T>, key: &Key, mut is_over: impl FnMut(&Waiter<W, T>) -> bool) -> Vec<Waiter<W, T>> {
    if by_key.is_empty() {
        return Vec::new();
    }
    let Entry::Occupied(mut of_key) = by_key.entry(key.clone()) else {
        return Vec::new();
    };
    let over = of_key.get_mut().extract_if(.., |waiter| is_over(waiter)).collect();
    if of_key.get().is_empty() {
        of_key.remove();
    }
    over
}
