//! Writes that Redis was not told of: what may be older there than what is durable.
//!
//! Owns which those are and since when. Pure but for its lock. Does not own how they are mended, nor what follows when they are not (`mend`
//! does). Invariants: a key is here once, with the highest version that it was added with; there are never more than a bound, and more
//! than that is not forgotten but said.

use std::{
    collections::{HashMap, hash_map},
    sync::atomic::{AtomicBool, Ordering},
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use crate::model::{Key, Timestamp, Version};

/// How many keys are remembered. With more, a new epoch is the cheaper repair.
const REPAIRS_MAX: usize = 10_000;

/// What is to be repaired.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    waiting: Mutex<Waiting>,
    /// Whether anything is: read by every read, and so beside the lock.
    any: AtomicBool,
}

#[derive(Debug, Default)]
struct Waiting {
    keys: HashMap<Key, Repair, RandomState>,
    /// Since when more than can be remembered was to be.
    overflowed: Option<Timestamp>,
}

#[derive(Debug, Clone, Copy)]
struct Repair {
    /// What is older than this must go.
    version: Version,
    since: Timestamp,
}

impl Repairs {
    /// What is older than `version` may stand in Redis, since `now`.
    pub(super) fn add(&self, key: &Key, version: Version, now: Timestamp) {
        let mut waiting = self.waiting.lock();
        let full = waiting.keys.len() >= REPAIRS_MAX;
        match waiting.keys.entry(key.clone()) {
            hash_map::Entry::Occupied(mut known) => {
                let known = known.get_mut();
                known.version = known.version.max(version);
            }
            hash_map::Entry::Vacant(slot) if !full => {
                slot.insert(Repair { version, since: now });
            }
            hash_map::Entry::Vacant(_) => {
                waiting.overflowed.get_or_insert(now);
            }
        }
        self.any.store(true, Ordering::Release);
    }

    /// Whether there is nothing to repair.
    pub(super) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// Some of what is to be repaired, at most `limit`.
    pub(super) fn some(&self, limit: usize) -> Vec<(Key, Version)> {
        let waiting = self.waiting.lock();
        let some = waiting.keys.iter().take(limit);
        some.map(|(key, repair)| (key.clone(), repair.version)).collect()
    }

    /// What is older than `version` is gone.
    pub(super) fn done(&self, key: &Key, version: Version) {
        let mut waiting = self.waiting.lock();
        if let hash_map::Entry::Occupied(known) = waiting.keys.entry(key.clone())
            && known.get().version <= version
        {
            known.remove();
        }
        self.note(&waiting);
    }

    /// Nobody reads any more what was to be repaired.
    pub(super) fn forget(&self) {
        let mut waiting = self.waiting.lock();
        *waiting = Waiting::default();
        self.note(&waiting);
    }

    /// Since when the oldest waits; and whether more waited than can be remembered.
    pub(super) fn since(&self) -> Option<(Timestamp, bool)> {
        if self.is_empty() {
            return None;
        }
        let waiting = self.waiting.lock();
        let oldest = waiting.keys.values().map(|repair| repair.since);
        let oldest = oldest.chain(waiting.overflowed).min()?;
        Some((oldest, waiting.overflowed.is_some()))
    }

    /// Under the lock, so that an addition meanwhile is not unsaid.
    fn note(&self, waiting: &Waiting) {
        let any = !waiting.keys.is_empty() || waiting.overflowed.is_some();
        self.any.store(any, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> Key {
        Key::new("test", &number.to_string()).expect("valid")
    }

    fn version(number: i64) -> Version {
        Version::new(number).expect("positive")
    }

    #[test]
    fn a_key_is_repaired_up_to_its_highest_version() {
        let repairs = Repairs::default();
        assert!(repairs.is_empty() && repairs.since().is_none());
        repairs.add(&key(1), version(5), Timestamp(10));
        repairs.add(&key(1), version(9), Timestamp(20));
        repairs.add(&key(1), version(7), Timestamp(30));
        assert_eq!(repairs.some(10), [(key(1), version(9))]);
        assert_eq!(repairs.since(), Some((Timestamp(10), false)));
        repairs.done(&key(1), version(5));
        assert!(
            !repairs.is_empty(),
            "the later failure is not repaired by an earlier repair"
        );
        repairs.done(&key(1), version(9));
        assert!(repairs.is_empty());
    }

    #[test]
    fn too_many_are_said_and_nothing_is_forgotten_by_itself() {
        let repairs = Repairs::default();
        for number in 0..REPAIRS_MAX {
            repairs.add(&key(number), version(1), Timestamp(50));
        }
        assert_eq!(repairs.since(), Some((Timestamp(50), false)));
        repairs.add(&key(REPAIRS_MAX), version(1), Timestamp(60));
        assert_eq!(repairs.since(), Some((Timestamp(50), true)));
        for (key, version) in repairs.some(usize::MAX) {
            repairs.done(&key, version);
        }
        assert!(!repairs.is_empty(), "what was not remembered is not repaired");
        assert_eq!(repairs.since(), Some((Timestamp(60), true)));
        repairs.forget();
        assert!(repairs.is_empty());
    }
}
