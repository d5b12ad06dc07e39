//! What each namespace has pending in one shard: entries, bytes, and since when.
//!
//! Owns sums that are kept up to date with every change, so that whoever asks holds the shard's lock no longer than there are namespaces.
//! Pure, as the table that it belongs to. Invariant: a namespace without a pending write has no share, so there are no more shares than
//! writes.

use std::collections::{BTreeSet, HashMap};

use foldhash::fast::RandomState;

use super::Place;
use crate::model::{Key, Timestamp};

/// The shares of all namespaces.
#[derive(Debug, Default)]
pub(super) struct Shares {
    by_namespace: HashMap<Box<str>, Share, RandomState>,
}

/// What one namespace has pending.
#[derive(Debug, Default)]
pub(in crate::queue) struct Share {
    /// The weight of its writes.
    pub(in crate::queue) bytes: usize,
    /// Admission time and number of the place of each of its slots, in flight or not.
    admissions: BTreeSet<(Timestamp, u64)>,
}

impl Share {
    /// How many writes are pending: the newest of each key, and the older ones whose request ids are owed.
    pub(in crate::queue) fn entries(&self) -> usize {
        self.admissions.len()
    }

    /// When the oldest of them was accepted.
    pub(in crate::queue) fn oldest(&self) -> Option<Timestamp> {
        self.admissions.first().map(|(admitted, _)| *admitted)
    }
}

impl Shares {
    /// A key has got a slot.
    pub(super) fn add(&mut self, key: &Key, weight: usize, place: &Place) {
        let share = match self.by_namespace.get_mut(key.namespace()) {
            Some(share) => share,
            None => self.by_namespace.entry(key.namespace().into()).or_default(),
        };
        share.bytes += weight;
        share.admissions.insert((place.admitted, place.number));
    }

    /// The slot of a key has got a write of another weight.
    pub(super) fn reweigh(&mut self, key: &Key, from: usize, to: usize) {
        if let Some(share) = self.by_namespace.get_mut(key.namespace()) {
            share.bytes = share.bytes - from + to;
        }
    }

    /// The slot of a key has got another place.
    pub(super) fn replace(&mut self, key: &Key, from: &Place, to: &Place) {
        if let Some(share) = self.by_namespace.get_mut(key.namespace()) {
            share.admissions.remove(&(from.admitted, from.number));
            share.admissions.insert((to.admitted, to.number));
        }
    }

    /// The slot of a key is gone.
    pub(super) fn remove(&mut self, key: &Key, weight: usize, place: &Place) {
        let Some(share) = self.by_namespace.get_mut(key.namespace()) else {
            return;
        };
        share.bytes -= weight;
        share.admissions.remove(&(place.admitted, place.number));
        if share.admissions.is_empty() {
            self.by_namespace.remove(key.namespace());
        }
    }

    /// When the oldest write of all was accepted.
    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.by_namespace.values().filter_map(Share::oldest).min()
    }

    /// The share of each namespace.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Share)> {
        self.by_namespace.iter().map(|(namespace, share)| (&**namespace, share))
    }
}
