//! Where in L1 a key has its slot.
//!
//! Owns the hash of a key, which is made once for the copy and the token, and is all that the tables keep of the key: its text lies with the
//! copy. Two keys may have one place, as good as never: they share a slot then, and the one that lands takes it from the other. Whoever looks
//! at a slot asks whose copy it holds. Invariant: the hash is keyed anew in each process, so nobody outside knows which keys would share.

use std::hash::{BuildHasher, BuildHasherDefault, Hasher};

use foldhash::fast::RandomState;

use crate::model::Key;

/// The place of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place(pub(super) u64);

/// Finds the places of keys.
#[derive(Debug, Default)]
pub(super) struct Places(RandomState);

impl Places {
    pub(super) fn of(&self, key: &Key) -> Place {
        Place(self.0.hash_one(key))
    }
}

/// For tables of places, which are hashes already.
pub(super) type AsItIs = BuildHasherDefault<Unhashed>;

/// Gives out the number that it was given.
#[derive(Debug, Clone, Default)]
pub(super) struct Unhashed(u64);

impl Hasher for Unhashed {
    fn write(&mut self, bytes: &[u8]) {
        // Never of a place, which is one number.
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
