//! The keys that are pending longest.
//!
//! Owns the choice, which looks at every slot and keeps no more than are asked for: for operators, who ask seldom. Pure, as the table that it
//! belongs to. No value comes out of here.

use std::{cmp::Ordering, collections::BinaryHeap};

use super::{
    Payload, Pending,
    slot::{Course, Slot},
};
use crate::model::{Key, Timestamp, Version};

/// A pending write, without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingKey {
    /// Its key.
    pub key: Key,
    /// The version of the newest write.
    pub version: Version,
    /// When the oldest write that it stands for was accepted.
    pub accepted_at: Timestamp,
    /// The bytes that it is charged.
    pub bytes: usize,
    /// Whether it deletes the record.
    pub deletes: bool,
    /// Whether a worker has it.
    pub in_flight: bool,
}

/// A slot among others, by how long it is pending.
struct Aged<'a, P> {
    accepted: (Timestamp, u64),
    key: &'a Key,
    slot: &'a Slot<P>,
}

impl<P: Payload> Pending<P> {
    /// The keys that are pending longest, of a namespace or of all, in no order: at most `limit`.
    pub(in crate::queue) fn oldest_keys(&self, namespace: Option<&str>, limit: usize) -> Vec<PendingKey> {
        let mut oldest = BinaryHeap::new();
        let mut look = |key, slot| {
            oldest.push(Aged::new(key, slot));
            if oldest.len() > limit {
                // The youngest.
                oldest.pop();
            }
        };
        match namespace {
            None => self.slots.iter().for_each(|(key, slot)| look(key, slot)),
            Some(namespace) => {
                let keys = self.ordered.below(namespace, "", None);
                let slots = keys.filter_map(|key| self.slots.get_key_value(key));
                slots.for_each(|(key, slot)| look(key, slot));
            }
        }
        oldest.into_iter().map(Aged::told).collect()
    }
}

impl<'a, P> Aged<'a, P> {
    fn new(key: &'a Key, slot: &'a Slot<P>) -> Aged<'a, P> {
        let (Course::Waiting(place) | Course::InFlight { place, .. }) = slot.course;
        Aged {
            accepted: (place.admitted, place.number),
            key,
            slot,
        }
    }

    fn told(self) -> PendingKey {
        let newest = &self.slot.newest;
        PendingKey {
            key: self.key.clone(),
            version: newest.entry.version,
            accepted_at: self.accepted.0,
            bytes: newest.weight,
            deletes: newest.entry.value.is_none(),
            in_flight: matches!(self.slot.course, Course::InFlight { .. }),
        }
    }
}

impl<P> PartialEq for Aged<'_, P> {
    fn eq(&self, other: &Self) -> bool {
        self.accepted == other.accepted
    }
}

impl<P> Eq for Aged<'_, P> {}

impl<P> PartialOrd for Aged<'_, P> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<P> Ord for Aged<'_, P> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.accepted.cmp(&other.accepted)
    }
}
