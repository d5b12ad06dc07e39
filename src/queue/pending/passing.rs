//! Writes that are on their way into the table: stamped, or about to be, and not yet offered.
//!
//! Owns who is on the way, in the order of coming, and what is known to have left the table meanwhile: an older write must not follow into the
//! empty slot. Pure, as the table that it belongs to. Invariant: a key that nobody is on the way to takes no room.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::model::{Key, Version};

/// All that are on their way.
#[derive(Debug, Default)]
pub(super) struct Passages {
    by_key: HashMap<Key, Passing, RandomState>,
    /// How many there ever were: the number of the last one.
    last: u64,
}

/// Those of one key.
#[derive(Debug, Default)]
struct Passing {
    /// Their numbers, in order. Few: they are as many as calls write the key at the same time.
    numbers: Vec<u64>,
    /// The highest version that the store is known to hold since the first of them came.
    stored: Option<Version>,
}

impl Passages {
    /// A write of a key is about to be stamped: its number.
    pub(super) fn enter(&mut self, key: &Key) -> u64 {
        self.last += 1;
        self.by_key.entry(key.clone()).or_default().numbers.push(self.last);
        self.last
    }

    /// A write has been offered, or given up.
    pub(super) fn leave(&mut self, key: &Key, number: u64) {
        if let Some(passing) = self.by_key.get_mut(key) {
            if let Ok(at) = passing.numbers.binary_search(&number) {
                passing.numbers.remove(at);
            }
            if passing.numbers.is_empty() {
                self.by_key.remove(key);
            }
        }
    }

    /// The store holds `version` of a key, or something newer.
    pub(super) fn note_stored(&mut self, key: &Key, version: Version) {
        if let Some(passing) = self.by_key.get_mut(key) {
            passing.stored = passing.stored.max(Some(version));
        }
    }

    /// What the store is known to hold of a key that somebody is on the way to.
    pub(super) fn stored(&self, key: &Key) -> Option<Version> {
        self.by_key.get(key).and_then(|passing| passing.stored)
    }

    /// The number of the last one that came, to any key.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// The number of the first that is on the way to a key.
    pub(super) fn first(&self, key: &Key) -> Option<u64> {
        self.by_key
            .get(key)
            .and_then(|passing| passing.numbers.first().copied())
    }
}
