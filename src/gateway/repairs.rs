//! Writes that Redis was not told of: what may be older there than what is durable.
//!
//! Owns which those are and since when. Pure but for its lock. Does not own how they are mended, nor what follows when they are not (`mend`
//! does). Invariants: a key is here once, with the highest version that it was added with; there are never more than a bound, and more
//! than that is not forgotten but said.

use std::{
    collections::{HashMap, hash_map},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use crate::model::{Key, Timestamp, Version};

/// For how long after a failure something older may still get into Redis: a publish that was given up is under way for no longer, or comes too
/// late to enter an empty slot; and so long may the store take over a commit of which nobody knows.
const UNSURE: Duration = Duration::from_secs(12);

/// How many keys are remembered. With more, a new epoch is the cheaper repair.
const REPAIRS_MAX: usize = 10_000;

/// The same with those that are repaired provisionally.
const KEYS_MAX: usize = 100_000;

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
    /// How many of them are not provisional.
    open: usize,
    /// Since when more than can be remembered was to be, and when that was so last.
    overflowed: Option<(Timestamp, Timestamp)>,
}

#[derive(Debug, Clone, Copy)]
struct Repair {
    /// What is older than this must go.
    version: Version,
    since: Timestamp,
    /// When Redis was last not told of it.
    latest: Timestamp,
    /// It went, for now: it is not known yet whether the epoch still held under which it did, and something may come late.
    provisional: bool,
    /// Until when something may come late.
    unsure_until: Timestamp,
}

impl Waiting {
    fn overflow(&mut self, now: Timestamp) {
        let since = self.overflowed.map_or(now, |(since, _)| since);
        self.overflowed = Some((since, now));
    }
}

impl Repair {
    /// Whether a repair that is made at `now`, under the epoch that is known to hold at `known_at`, is the last that is needed.
    fn is_sure(&self, now: Timestamp, known_at: Timestamp) -> bool {
        self.latest <= known_at && self.unsure_until < now
    }
}

impl Repairs {
    /// What is older than `version` may stand in Redis, since `now`.
    pub(super) fn add(&self, key: &Key, version: Version, now: Timestamp) {
        let mut waiting = self.waiting.lock();
        let waiting = &mut *waiting;
        let full = waiting.open >= REPAIRS_MAX || waiting.keys.len() >= KEYS_MAX;
        let unsure_until = now.after(UNSURE);
        match waiting.keys.entry(key.clone()) {
            hash_map::Entry::Occupied(mut known) => {
                let known = known.get_mut();
                known.latest = now;
                known.unsure_until = unsure_until;
                if known.provisional {
                    known.since = now;
                    known.provisional = false;
                    waiting.open += 1;
                }
                known.version = known.version.max(version);
            }
            hash_map::Entry::Vacant(slot) if !full => {
                slot.insert(Repair {
                    version,
                    since: now,
                    latest: now,
                    provisional: false,
                    unsure_until,
                });
                waiting.open += 1;
            }
            hash_map::Entry::Vacant(_) => waiting.overflow(now),
        }
        self.note(waiting);
    }

    /// Redis was told of `version` at `now`, under an epoch that may have been over: it is to be told once more when that is known.
    pub(super) fn recheck(&self, key: &Key, version: Version, now: Timestamp) {
        let mut waiting = self.waiting.lock();
        let waiting = &mut *waiting;
        let full = waiting.keys.len() >= KEYS_MAX;
        match waiting.keys.entry(key.clone()) {
            hash_map::Entry::Occupied(mut known) => {
                let known = known.get_mut();
                known.latest = now;
                known.version = known.version.max(version);
            }
            hash_map::Entry::Vacant(slot) if !full => {
                slot.insert(Repair {
                    version,
                    since: now,
                    latest: now,
                    provisional: true,
                    unsure_until: Timestamp(0),
                });
            }
            hash_map::Entry::Vacant(_) => waiting.overflow(now),
        }
        self.note(waiting);
    }

    /// Whether nothing older stands under the epoch that is gone by.
    pub(super) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// Whether there is nothing to do at all.
    pub(super) fn is_settled(&self) -> bool {
        self.is_empty() && self.waiting.lock().keys.is_empty()
    }

    /// Some of what is to be repaired at `now`, at most `limit`, where the epoch that is gone by is known to hold at `known_at`.
    pub(super) fn some(&self, limit: usize, now: Timestamp, known_at: Timestamp) -> Vec<(Key, Version)> {
        let waiting = self.waiting.lock();
        let due = |repair: &Repair| !repair.provisional || repair.is_sure(now, known_at);
        let some = waiting.keys.iter().filter(|(_, repair)| due(repair)).take(limit);
        some.map(|(key, repair)| (key.clone(), repair.version)).collect()
    }

    /// What is older than `version` is gone at `now`, under the epoch that is known to hold at `known_at`: for good, if both are long enough
    /// after the failure.
    pub(super) fn done(&self, key: &Key, version: Version, now: Timestamp, known_at: Timestamp) {
        let mut waiting = self.waiting.lock();
        let waiting = &mut *waiting;
        if let hash_map::Entry::Occupied(mut known) = waiting.keys.entry(key.clone())
            && known.get().version <= version
        {
            if !known.get().provisional {
                waiting.open -= 1;
            }
            if known.get().is_sure(now, known_at) {
                known.remove();
            } else {
                known.get_mut().provisional = true;
            }
        }
        self.note(waiting);
    }

    /// A new epoch is gone by at `now`, which was moved to at `moved_at` or later: copies of the time before are left behind everywhere, L1s
    /// included. Other replicas may have gone by it sooner than this one, and have kept in L1 since then what a later failure did not take
    /// from them: that is to be told still.
    pub(super) fn forget_before(&self, moved_at: Timestamp, now: Timestamp) {
        let mut waiting = self.waiting.lock();
        waiting.keys.retain(|_, repair| repair.latest >= moved_at);
        for repair in waiting.keys.values_mut() {
            // It has its time anew: under this epoch nothing was tried yet.
            repair.since = now;
            repair.provisional = false;
        }
        waiting.open = waiting.keys.len();
        let overflowed = waiting.overflowed.filter(|(_, latest)| *latest >= moved_at);
        waiting.overflowed = overflowed.map(|(_, latest)| (now, latest));
        self.note(&waiting);
    }

    /// Since when the oldest waits.
    pub(super) fn since(&self) -> Option<Timestamp> {
        if self.is_empty() {
            return None;
        }
        let waiting = self.waiting.lock();
        let open = waiting.keys.values().filter(|repair| !repair.provisional);
        let overflowed = waiting.overflowed.map(|(since, _)| since);
        open.map(|repair| repair.since).chain(overflowed).min()
    }

    /// Under the lock, so that an addition meanwhile is not unsaid.
    fn note(&self, waiting: &Waiting) {
        let any = waiting.overflowed.is_some() || waiting.open > 0;
        self.any.store(any, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When all is sure.
    const LATER: Timestamp = Timestamp(1_000_000);

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
        assert_eq!(repairs.some(10, LATER, LATER), [(key(1), version(9))]);
        assert_eq!(repairs.since(), Some(Timestamp(10)));
        repairs.done(&key(1), version(5), LATER, LATER);
        assert!(
            !repairs.is_empty(),
            "the later failure is not repaired by an earlier repair"
        );
        repairs.done(&key(1), version(9), LATER, LATER);
        assert!(repairs.is_settled());
    }

    #[test]
    fn a_repair_under_an_epoch_that_may_have_been_over_is_made_once_more() {
        let repairs = Repairs::default();
        repairs.add(&key(1), version(5), Timestamp(10));
        repairs.done(&key(1), version(5), LATER, Timestamp(9));
        assert!(repairs.is_empty() && !repairs.is_settled() && repairs.since().is_none());
        assert_eq!(repairs.some(10, LATER, Timestamp(9)), [], "nothing new is known");
        assert_eq!(repairs.some(10, LATER, Timestamp(10)), [(key(1), version(5))]);
        // It fails again meanwhile.
        repairs.add(&key(1), version(6), Timestamp(20));
        assert_eq!(repairs.since(), Some(Timestamp(20)));
        repairs.done(&key(1), version(6), Timestamp(20), LATER);
        assert!(!repairs.is_settled(), "something may come late");
        repairs.done(&key(1), version(6), LATER, LATER);
        assert!(repairs.is_settled());
    }

    #[test]
    fn a_new_epoch_makes_good_what_failed_before_it_was_moved_to() {
        let repairs = Repairs::default();
        for number in 1..=3 {
            repairs.add(&key(number), version(5), Timestamp(10));
        }
        // One failed again since, and one is repaired under the epoch before.
        repairs.add(&key(2), version(6), Timestamp(20));
        repairs.add(&key(3), version(6), Timestamp(20));
        repairs.done(&key(3), version(6), LATER, Timestamp(9));
        repairs.forget_before(Timestamp(20), Timestamp(30));
        let mut left = repairs.some(10, LATER, Timestamp(9));
        left.sort_by_key(|(key, _)| key.key().to_owned());
        assert_eq!(left, [(key(2), version(6)), (key(3), version(6))]);
        assert_eq!(repairs.since(), Some(Timestamp(30)), "with its time anew");
        repairs.forget_before(Timestamp(30), Timestamp(40));
        assert!(repairs.is_settled());
    }

    #[test]
    fn what_was_told_under_an_epoch_that_may_be_over_is_told_once_more_and_hinders_nobody() {
        let repairs = Repairs::default();
        repairs.recheck(&key(1), version(5), Timestamp(10));
        assert!(repairs.is_empty() && !repairs.is_settled() && repairs.since().is_none());
        assert_eq!(repairs.some(10, Timestamp(11), Timestamp(9)), []);
        assert_eq!(repairs.some(10, Timestamp(11), Timestamp(10)), [(key(1), version(5))]);
        repairs.done(&key(1), version(5), Timestamp(11), Timestamp(10));
        assert!(repairs.is_settled());
    }

    #[test]
    fn too_many_are_said_and_nothing_is_forgotten_by_itself() {
        let repairs = Repairs::default();
        for number in 0..REPAIRS_MAX {
            repairs.add(&key(number), version(1), Timestamp(50));
        }
        assert_eq!(repairs.since(), Some(Timestamp(50)));
        repairs.add(&key(REPAIRS_MAX), version(1), Timestamp(60));
        repairs.add(&key(REPAIRS_MAX), version(1), Timestamp(70));
        for (key, version) in repairs.some(usize::MAX, LATER, LATER) {
            repairs.done(&key, version, LATER, LATER);
        }
        assert!(!repairs.is_empty(), "what was not remembered is not repaired");
        assert_eq!(repairs.since(), Some(Timestamp(60)));
        repairs.forget_before(Timestamp(70), Timestamp(80));
        assert_eq!(repairs.since(), Some(Timestamp(80)), "it has its time anew");
        repairs.forget_before(LATER, LATER);
        assert!(repairs.is_settled());
    }
}
