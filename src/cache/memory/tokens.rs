//! The tokens that stand in one shard of L1.
//!
//! Owns which token stands at a key and for how many holders. Does not own when one is cleared, nor the lock (the shard's). Invariants: a
//! token stands from when it was left until it is cleared for the first time, and never again; at least one of its holders has not given
//! it back, so there are never more tokens than holders, and those are bounded: loads by the flights, writes by the calls; of two keys that
//! have one place, the one that came last has the token.

use std::collections::{HashMap, hash_map};

use super::place::{AsItIs, Place};
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
    key: Key,
    number: Number,
    holders: usize,
}

/// The tokens of one shard.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    standing: HashMap<Place, Standing, AsItIs>,
    /// How many were left so far.
    left: u64,
}

impl Tokens {
    /// Leaves a token at a key for one more holder. Where one stands it is shared: nothing has come between since it was left.
    pub(super) fn leave(&mut self, place: Place, key: &Key) -> Number {
        if let Some(standing) = self.standing.get_mut(&place)
            && standing.key == *key
        {
            standing.holders += 1;
            return standing.number;
        }
        self.left += 1;
        let number = Number(self.left);
        let standing = Standing {
            key: key.clone(),
            number,
            holders: 1,
        };
        self.standing.insert(place, standing);
        number
    }

    /// Takes the token at a place away from all of its holders. Which one stood.
    pub(super) fn clear(&mut self, place: Place) -> Option<Number> {
        self.standing.remove(&place).map(|standing| standing.number)
    }

    /// The same at every key that matches.
    pub(super) fn clear_where(&mut self, matches: impl Fn(&Key) -> bool) {
        self.standing.retain(|_, standing| !matches(&standing.key));
    }

    /// One holder will not land any more.
    pub(super) fn give_back(&mut self, place: Place, number: Number) {
        if let hash_map::Entry::Occupied(mut standing) = self.standing.entry(place)
            && standing.get().number == number
        {
            standing.get_mut().holders -= 1;
            if standing.get().holders == 0 {
                standing.remove();
            }
        }
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.standing.len()
    }
}
