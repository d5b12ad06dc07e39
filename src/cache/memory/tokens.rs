//! The tokens that stand in one shard of L1.
//!
//! Owns which token stands at a key and for how many holders. Does not own when one is cleared, nor the lock (the shard's). Invariants: a
//! token stands from when it was left until it is cleared for the first time, and never again; at least one of its holders has not given
//! it back, so there are never more tokens than holders, and those are bounded: loads by the flights, writes by the calls.

use std::collections::{HashMap, hash_map};

use foldhash::fast::RandomState;

use crate::model::Key;

/// Tells a token from all that were ever left in its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number(u64);

impl Number {
    /// That of no token.
    pub(super) const NONE: Number = Number(0);
}

#[derive(Debug)]
struct Standing {
    number: Number,
    holders: usize,
}

/// The tokens of one shard.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    standing: HashMap<Key, Standing, RandomState>,
    /// How many were left so far.
    left: u64,
}

impl Tokens {
    /// Leaves a token at a key for one more holder. Where one stands it is shared: nothing has come between since it was left.
    pub(super) fn leave(&mut self, key: &Key) -> Number {
        match self.standing.entry(key.clone()) {
            hash_map::Entry::Occupied(mut standing) => {
                let standing = standing.get_mut();
                standing.holders += 1;
                standing.number
            }
            hash_map::Entry::Vacant(slot) => {
                self.left += 1;
                let number = Number(self.left);
                slot.insert(Standing { number, holders: 1 });
                number
            }
        }
    }

    /// Takes a key's token away from all of its holders. Which one stood.
    pub(super) fn clear(&mut self, key: &Key) -> Option<Number> {
        self.standing.remove(key).map(|standing| standing.number)
    }

    /// The same at every key that matches.
    pub(super) fn clear_where(&mut self, matches: impl Fn(&Key) -> bool) {
        self.standing.retain(|key, _| !matches(key));
    }

    /// One holder will not land any more.
    pub(super) fn give_back(&mut self, key: &Key, number: Number) {
        if let hash_map::Entry::Occupied(mut standing) = self.standing.entry(key.clone())
            && standing.get().number == number
        {
            standing.get_mut().holders -= 1;
            if standing.get().holders == 0 {
                standing.remove();
            }
        }
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.standing.is_empty()
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.standing.len()
    }
}
