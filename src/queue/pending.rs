//! The pending table of one shard: the newest accepted write of each key, which of them are in flight, and the order of draining.
//!
//! Owns the queue's state and every decision about it. Pure: no lock (the shard's), no clock (times are given), no I/O (the
//! drain's), no counting against bounds (the budget's) and no disk (the journal's): what a write holds of either rides along as a
//! [`Payload`] and is handed back when its write leaves, so that it is freed outside of the shard's lock. Invariants: a key has one slot
//! and the slot only moves forward; at most one version of a key is in flight; a slot's place in the order is the one of its
//! oldest write that has not left, so a hot key is neither starved nor younger than it looks.

mod shares;

use std::{
    collections::{BTreeMap, HashMap, hash_map},
    mem,
    time::Duration,
};

use foldhash::fast::RandomState;

pub(super) use self::shares::Share;

use self::shares::Shares;
use crate::model::{Entry, Key, Tags, Timestamp, Version, Write};

/// What a write holds for as long as it is pending.
pub(super) trait Payload {
    /// Takes from another write of the same key, which leaves, what must outlive it; leaves there what need not.
    fn inherit(&mut self, from: &mut Self);
}

/// What became of a write that was offered.
#[derive(Debug)]
#[must_use = "holds a payload to be freed"]
pub(super) enum Offered<P> {
    /// Its key had nothing pending.
    Added,
    /// It replaced an older write of its key, whose payload this is.
    Coalesced(P),
    /// A write at least as new stands here, or in the store by now; this is the payload of the one that was offered.
    Refused(P),
}

/// What becomes of a write that the store has taken.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "holds a payload to be freed"]
pub(super) enum Settled<P> {
    /// It has left; its payload, if it was still here.
    Left(Option<P>),
    /// It was recovered, and stays in flight until it is published: only then may readers be sent to the caches.
    ToPublish,
}

/// A pending write, as readers see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingEntry {
    /// The entry.
    pub entry: Entry,
    /// Whether an earlier process accepted it, and the store has not been heard since: something newer may stand elsewhere.
    pub unconfirmed: bool,
}

/// Where a slot stands in the order of draining.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// When the oldest write that it stands for was accepted.
    admitted: Timestamp,
    /// From when on it may be drained without pressure.
    due: Timestamp,
    /// Tells places of the same millisecond apart, first come first.
    number: u64,
}

/// Whether a batch has taken a slot's write.
#[derive(Debug)]
enum Course {
    /// No batch has: the slot is in the order, and all that was accepted since is coalesced into its entry.
    Waiting(Place),
    /// A batch has `version`; `place` is its place, to which it returns when the try fails. `next` is the place of the oldest
    /// write accepted since, there exactly when the slot's entry is newer than `version`.
    InFlight {
        version: Version,
        place: Place,
        next: Option<Place>,
    },
}

#[derive(Debug)]
struct Slot<P> {
    entry: Entry,
    tags: Tags,
    /// [`Write::weight`] of the entry under its key.
    weight: usize,
    payload: P,
    /// See [`PendingEntry`].
    unconfirmed: bool,
    /// In which generation of the shared caches this entry got there, if it did.
    published: Option<u64>,
    course: Course,
}

/// The pending writes of one shard.
#[derive(Debug)]
pub(super) struct Pending<P> {
    slots: HashMap<Key, Slot<P>, RandomState>,
    /// The keys of every waiting slot, by due time and number.
    order: BTreeMap<(Timestamp, u64), Key>,
    /// What each namespace has here, in flight or not: what the age of the oldest is read from.
    shares: Shares,
    /// The weight of every slot's write.
    bytes: usize,
    /// How often the shared caches have lost everything, or may have.
    generation: u64,
    /// Places given out so far.
    places: u64,
    /// The keys of writes that are stamped and not yet offered.
    passing: HashMap<Key, Passing, RandomState>,
}

/// Writes of a key that are on their way here: what is known to have left meanwhile, they must not follow into the empty slot.
#[derive(Debug, Default)]
struct Passing {
    writes: usize,
    /// The highest version that the store is known to hold since the first of them came.
    stored: Option<Version>,
}

impl<P: Payload> Pending<P> {
    /// An empty table.
    pub(super) fn new() -> Pending<P> {
        Pending {
            slots: HashMap::default(),
            order: BTreeMap::new(),
            shares: Shares::default(),
            bytes: 0,
            generation: 0,
            places: 0,
            passing: HashMap::default(),
        }
    }

    /// A write of a key is about to be stamped. Until it leaves, what the store holds of the key is remembered.
    pub(super) fn enter(&mut self, key: &Key) {
        self.passing.entry(key.clone()).or_default().writes += 1;
    }

    /// A write that entered has been offered, or given up.
    pub(super) fn leave(&mut self, key: &Key) {
        if let Some(passing) = self.passing.get_mut(key) {
            passing.writes -= 1;
            if passing.writes == 0 {
                self.passing.remove(key);
            }
        }
    }

    /// The store holds `version` of a key, or something newer.
    fn stored(&mut self, key: &Key, version: Version) {
        if let Some(passing) = self.passing.get_mut(key) {
            passing.stored = passing.stored.max(Some(version));
        }
    }

    /// Offers a write accepted at `now`, to be drained no sooner than `write_delay` after the oldest that it is coalesced with.
    pub(super) fn offer(&mut self, write: Write, payload: P, now: Timestamp, write_delay: Duration) -> Offered<P> {
        self.offer_as(write, payload, now, write_delay, false)
    }

    /// Offers a write that an earlier process accepted, as unconfirmed, and to be drained at once. It is as old as its stamp.
    pub(super) fn restore(&mut self, write: Write, payload: P, now: Timestamp) -> Offered<P> {
        // A stamp may be ahead of the clock.
        let admitted = write.entry.version.stamped_at().min(now);
        self.offer_as(write, payload, admitted, Duration::ZERO, true)
    }

    fn offer_as(
        &mut self,
        write: Write,
        mut payload: P,
        now: Timestamp,
        write_delay: Duration,
        unconfirmed: bool,
    ) -> Offered<P> {
        let weight = write.weight();
        let Write { key, entry, tags } = write;
        let stored = self.passing.get(&key).and_then(|passing| passing.stored);
        if stored.is_some_and(|stored| entry.version <= stored) {
            return Offered::Refused(payload);
        }
        match self.slots.entry(key) {
            hash_map::Entry::Vacant(vacant) => {
                let place = place(&mut self.places, now, write_delay);
                self.shares.add(vacant.key(), weight, &place);
                self.order.insert((place.due, place.number), vacant.key().clone());
                self.bytes += weight;
                vacant.insert(Slot {
                    entry,
                    tags,
                    weight,
                    payload,
                    unconfirmed,
                    published: Some(self.generation),
                    course: Course::Waiting(place),
                });
                Offered::Added
            }
            hash_map::Entry::Occupied(mut occupied) => {
                let key = occupied.key().clone();
                let slot = occupied.get_mut();
                if entry.version <= slot.entry.version {
                    slot.payload.inherit(&mut payload);
                    return Offered::Refused(payload);
                }
                self.bytes = self.bytes - slot.weight + weight;
                self.shares.reweigh(&key, slot.weight, weight);
                slot.entry = entry;
                slot.tags = tags;
                slot.weight = weight;
                slot.unconfirmed = unconfirmed;
                slot.published = Some(self.generation);
                if let Course::InFlight { next, .. } = &mut slot.course
                    && next.is_none()
                {
                    *next = Some(place(&mut self.places, now, write_delay));
                }
                payload.inherit(&mut slot.payload);
                Offered::Coalesced(mem::replace(&mut slot.payload, payload))
            }
        }
    }

    /// Takes what is due at `now` into flight, first due first; when `hurried`, also what is not due. Stops once it has
    /// `entries_max` writes or `bytes_max` bytes, so it goes beyond `bytes_max` by less than its last write. No key twice.
    pub(super) fn take(&mut self, now: Timestamp, entries_max: usize, bytes_max: usize, hurried: bool) -> Vec<Write> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        while taken.len() < entries_max && bytes < bytes_max {
            let Some(first) = self.order.first_entry() else { break };
            if !hurried && first.key().0 > now {
                break;
            }
            let key = first.remove();
            // Every key of the order has a waiting slot.
            let Some(slot) = self.slots.get_mut(&key) else { continue };
            let Course::Waiting(place) = slot.course else { continue };
            slot.course = Course::InFlight {
                version: slot.entry.version,
                place,
                next: None,
            };
            let write = Write {
                key,
                entry: slot.entry.clone(),
                tags: slot.tags.clone(),
            };
            bytes += slot.weight;
            taken.push(write);
        }
        taken
    }

    /// The try of `version` is over: the store has taken it. A newer write of the key stays and can be taken from now on. Harmless
    /// for a version that is not pending.
    pub(super) fn settle(&mut self, key: &Key, version: Version) -> Settled<P> {
        self.stored(key, version);
        let standing = self.slots.get(key);
        if standing.is_some_and(|slot| slot.unconfirmed && slot.entry.version == version) {
            return Settled::ToPublish;
        }
        Settled::Left(self.end(key, version))
    }

    /// The same of a write that lost to something newer in the store.
    #[must_use = "holds a payload to be freed"]
    pub(super) fn lose(&mut self, key: &Key, version: Version) -> Option<P> {
        self.stored(key, version);
        self.end(key, version)
    }

    /// The same of a write that was told to be [`Settled::ToPublish`] and is published, and of one that left for the dead letters:
    /// the store need not hold anything of its key.
    #[must_use = "holds a payload to be freed"]
    pub(super) fn end(&mut self, key: &Key, version: Version) -> Option<P> {
        let slot = self.slots.get_mut(key)?;
        if slot.entry.version <= version {
            return self.remove(key);
        }
        if let Course::InFlight {
            version: tried,
            place,
            next,
        } = slot.course
            && tried == version
        {
            let next = next.unwrap_or(place);
            self.shares.replace(key, &place, &next);
            self.order.insert((next.due, next.number), key.clone());
            slot.course = Course::Waiting(next);
        }
        None
    }

    /// The try of `version` failed: its key can be taken again, at its old place, with what was accepted since. Harmless for a
    /// version that is not in flight.
    pub(super) fn release(&mut self, key: &Key, version: Version) {
        let Some(slot) = self.slots.get_mut(key) else { return };
        if let Course::InFlight {
            version: tried, place, ..
        } = slot.course
            && tried == version
        {
            self.order.insert((place.due, place.number), key.clone());
            slot.course = Course::Waiting(place);
        }
    }

    /// The store is known to hold `version` or newer by another way: a pending write at or below it has nothing left to do, in
    /// flight or not.
    #[must_use = "holds a payload to be freed"]
    pub(super) fn overtake(&mut self, key: &Key, version: Version) -> Option<P> {
        self.stored(key, version);
        let slot = self.slots.get(key)?;
        if slot.entry.version <= version {
            self.remove(key)
        } else {
            None
        }
    }

    /// Notes whether the shared caches hold `version` of a key, if that is what stands.
    pub(super) fn note_published(&mut self, key: &Key, version: Version, published: bool) {
        if let Some(slot) = self.slots.get_mut(key)
            && slot.entry.version == version
        {
            slot.published = published.then_some(self.generation);
        }
    }

    /// Notes that the shared caches have lost everything.
    pub(super) fn note_all_lost(&mut self) {
        self.generation += 1;
    }

    /// Notes that the shared caches have lost what matches. Looks at every slot.
    pub(super) fn note_lost(&mut self, matches: impl Fn(&Key) -> bool) {
        for (key, slot) in &mut self.slots {
            if matches(key) {
                slot.published = None;
            }
        }
    }

    /// Whether the write that stands for a key, `version` or one that has covered it, is nowhere in the shared caches, for all that is known.
    pub(super) fn is_unpublished(&self, key: &Key, version: Version) -> bool {
        let standing = self.slots.get(key).filter(|slot| slot.entry.version >= version);
        standing.is_some_and(|slot| slot.published != Some(self.generation))
    }

    /// The newest accepted write of a key.
    pub(super) fn get(&self, key: &Key) -> Option<PendingEntry> {
        self.slots.get(key).map(|slot| PendingEntry {
            entry: slot.entry.clone(),
            unconfirmed: slot.unconfirmed,
        })
    }

    /// The keys of writes that this process accepted before `then`, the recovered ones excepted.
    pub(super) fn accepted_before(&self, then: Timestamp) -> impl Iterator<Item = &Key> {
        let accepted = |slot: &Slot<P>| match slot.course {
            Course::Waiting(place) | Course::InFlight { place, .. } => place.admitted,
        };
        let old = self
            .slots
            .iter()
            .filter(move |(_, slot)| !slot.unconfirmed && accepted(slot) <= then);
        old.map(|(key, _)| key)
    }

    /// The version of each pending write, and what it holds.
    pub(super) fn payloads(&self) -> impl Iterator<Item = (Version, &P)> {
        self.slots.values().map(|slot| (slot.entry.version, &slot.payload))
    }

    /// What the pending write of a key holds.
    pub(super) fn payload(&self, key: &Key) -> Option<&P> {
        self.slots.get(key).map(|slot| &slot.payload)
    }

    /// The same to change it, if this version is the newest of its key.
    #[cfg(feature = "planted-faults")]
    pub(super) fn payload_of(&mut self, key: &Key, version: Version) -> Option<&mut P> {
        let newest = self.slots.get_mut(key).filter(|slot| slot.entry.version == version);
        newest.map(|slot| &mut slot.payload)
    }

    /// When the oldest write that is here, in flight or not, was accepted.
    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.shares.oldest()
    }

    /// What each namespace has here.
    pub(super) fn shares(&self) -> impl Iterator<Item = (&str, &Share)> {
        self.shares.iter()
    }

    /// When the next write that is not in flight is due.
    pub(super) fn next_due(&self) -> Option<Timestamp> {
        self.order.first_key_value().map(|((due, _), _)| *due)
    }

    /// How many keys have a pending write.
    pub(super) fn entries(&self) -> usize {
        self.slots.len()
    }

    /// The weight of the pending writes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn remove(&mut self, key: &Key) -> Option<P> {
        let slot = self.slots.remove(key)?;
        self.bytes -= slot.weight;
        let place = match slot.course {
            Course::Waiting(place) => {
                self.order.remove(&(place.due, place.number));
                place
            }
            Course::InFlight { place, .. } => place,
        };
        self.shares.remove(key, slot.weight, &place);
        Some(slot.payload)
    }
}

fn place(places: &mut u64, now: Timestamp, write_delay: Duration) -> Place {
    *places += 1;
    Place {
        admitted: now,
        due: now.after(write_delay),
        number: *places,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    /// Of equal length, so that a write weighs the same in either.
    fn namespace(number: u8) -> &'static str {
        if number.is_multiple_of(2) { "even" } else { "odds" }
    }

    fn key(number: u8) -> Key {
        Key::new(namespace(number), &format!("k{number}")).expect("valid")
    }

    fn write(number: u8, version: i64) -> Write {
        Write {
            key: key(number),
            entry: Entry {
                version: self::version(version),
                // Sizes that differ from version to version, and now and then a tombstone.
                value: (version % 3 != 0).then(|| Bytes::from(vec![0; (version % 7) as usize * 10])),
                expires_at: None,
            },
            tags: Tags::default(),
        }
    }

    fn version(number: i64) -> Version {
        Version::new(number).expect("positive")
    }

    /// A permit that tells when it is freed.
    #[derive(Debug)]
    struct Counted<'a>(&'a Cell<usize>);

    impl Payload for () {
        fn inherit(&mut self, (): &mut ()) {}
    }

    impl Payload for Counted<'_> {
        fn inherit(&mut self, _: &mut Self) {}
    }

    impl<'a> Counted<'a> {
        fn new(held: &'a Cell<usize>) -> Counted<'a> {
            held.set(held.get() + 1);
            Counted(held)
        }
    }

    impl Drop for Counted<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() - 1);
        }
    }

    fn offer(pending: &mut Pending<()>, number: u8, version: i64, now: i64) {
        let _ = pending.offer(write(number, version), (), Timestamp(now), Duration::ZERO);
    }

    fn shown<P: Payload>(pending: &Pending<P>, number: u8) -> Option<Entry> {
        pending.get(&key(number)).map(|pending| pending.entry)
    }

    fn take(pending: &mut Pending<()>, now: i64) -> Vec<(Key, i64)> {
        pending
            .take(Timestamp(now), usize::MAX, usize::MAX, false)
            .into_iter()
            .map(|write| (write.key, write.entry.version.get()))
            .collect()
    }

    #[test]
    fn a_newer_write_survives_the_settling_of_the_older_one_in_flight() {
        let mut pending = Pending::new();
        offer(&mut pending, 1, 1, 0);
        assert_eq!(take(&mut pending, 0), [(key(1), 1)]);
        offer(&mut pending, 1, 2, 5);
        assert!(take(&mut pending, 9).is_empty(), "one version of a key at a time");
        assert_eq!(pending.settle(&key(1), version(1)), Settled::Left(None));
        assert_eq!(pending.oldest(), Some(Timestamp(5)));
        assert_eq!(take(&mut pending, 9), [(key(1), 2)]);
        assert_eq!(pending.settle(&key(1), version(2)), Settled::Left(Some(())));
        assert_eq!((pending.entries(), pending.bytes(), pending.oldest()), (0, 0, None));
    }

    #[test]
    fn a_hot_key_keeps_its_place() {
        let mut pending = Pending::new();
        offer(&mut pending, 1, 1, 0);
        offer(&mut pending, 2, 1, 1);
        offer(&mut pending, 1, 2, 2);
        assert_eq!(take(&mut pending, 2), [(key(1), 2), (key(2), 1)]);
        // Nor does a failed try cost it its place or its age.
        offer(&mut pending, 3, 1, 3);
        offer(&mut pending, 1, 3, 4);
        pending.release(&key(1), version(2));
        pending.release(&key(2), version(1));
        assert_eq!(pending.oldest(), Some(Timestamp(0)));
        assert_eq!(take(&mut pending, 4), [(key(1), 3), (key(2), 1), (key(3), 1)]);
    }

    #[test]
    fn a_delay_counts_from_the_oldest_write_and_pressure_ends_it() {
        let mut pending = Pending::new();
        let delay = Duration::from_millis(10);
        let _ = pending.offer(write(1, 1), (), Timestamp(0), delay);
        let _ = pending.offer(write(1, 2), (), Timestamp(9), delay);
        assert_eq!(pending.next_due(), Some(Timestamp(10)));
        assert!(take(&mut pending, 9).is_empty());
        assert_eq!(pending.take(Timestamp(9), 1, 1, true).len(), 1);
    }

    #[test]
    fn what_was_overtaken_in_flight_disturbs_nothing_later() {
        let mut pending = Pending::new();
        offer(&mut pending, 1, 1, 0);
        take(&mut pending, 0);
        assert_eq!(pending.overtake(&key(1), version(5)), Some(()));
        offer(&mut pending, 1, 6, 1);
        pending.release(&key(1), version(1));
        assert_eq!(take(&mut pending, 1), [(key(1), 6)]);
        assert_eq!(pending.settle(&key(1), version(1)), Settled::Left(None));
        assert_eq!(shown(&pending, 1).map(|entry| entry.version), Some(version(6)));
        assert!(take(&mut pending, 1).is_empty(), "still in flight");
    }

    #[test]
    fn a_batch_ends_at_either_bound() {
        let mut pending = Pending::new();
        for number in 0..10 {
            offer(&mut pending, number, 1, 0);
        }
        let weight = write(0, 1).weight();
        assert_eq!(pending.take(Timestamp(0), 3, usize::MAX, false).len(), 3);
        assert_eq!(pending.take(Timestamp(0), 10, weight + 1, false).len(), 2);
        assert_eq!(pending.take(Timestamp(0), 10, 0, false).len(), 0);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Offer(u8, i64, u64),
        Take(usize, usize, bool),
        Settle(u8, Option<i64>),
        Release(u8, Option<i64>),
        Overtake(u8, i64),
        Wait(i64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        // A try that ends is mostly of the version in flight (`None`), and now and then of one long gone.
        let tried = || prop_oneof![4 => Just(None), 1 => (1..30i64).prop_map(Some)];
        let step = prop_oneof![
            6 => (0..6u8, 1..30i64, 0..3u64).prop_map(|(k, v, d)| Step::Offer(k, v, d * 10)),
            3 => (0..4usize, 0..600usize, any::<bool>()).prop_map(|(n, b, h)| Step::Take(n, b, h)),
            3 => (0..6u8, tried()).prop_map(|(k, v)| Step::Settle(k, v)),
            2 => (0..6u8, tried()).prop_map(|(k, v)| Step::Release(k, v)),
            1 => (0..6u8, 1..30i64).prop_map(|(k, v)| Step::Overtake(k, v)),
            2 => (1..15i64).prop_map(Step::Wait),
        ];
        proptest::collection::vec(step, 0..120)
    }

    /// The same table, naively: a list of slots in the order of nothing.
    #[derive(Debug, Default)]
    struct Model(Vec<ModelSlot>);

    #[derive(Debug, Clone)]
    struct ModelSlot {
        key: u8,
        newest: i64,
        /// Acceptance, delay and rank of the oldest write that is in no batch.
        waiting: Option<(i64, u64, usize)>,
        flight: Option<(i64, (i64, u64, usize))>,
    }

    impl ModelSlot {
        fn place(&self) -> (i64, u64, usize) {
            self.flight
                .map(|(_, place)| place)
                .or(self.waiting)
                .expect("one of them")
        }

        fn due(&self) -> (i64, usize) {
            let (admitted, delay, rank) = self.place();
            (admitted + delay as i64, rank)
        }
    }

    impl Model {
        fn slot(&mut self, key: u8) -> Option<&mut ModelSlot> {
            self.0.iter_mut().find(|slot| slot.key == key)
        }

        fn offer(&mut self, key: u8, version: i64, now: i64, delay: u64, rank: usize) {
            let Some(slot) = self.slot(key) else {
                let waiting = Some((now, delay, rank));
                return self.0.push(ModelSlot {
                    key,
                    newest: version,
                    waiting,
                    flight: None,
                });
            };
            if version > slot.newest {
                slot.newest = version;
                slot.waiting = slot.waiting.or(Some((now, delay, rank)));
            }
        }

        fn take(&mut self, now: i64, entries_max: usize, bytes_max: usize, hurried: bool) -> Vec<(Key, i64)> {
            let mut taken = Vec::new();
            let mut bytes = 0;
            self.0.sort_by_key(ModelSlot::due);
            for slot in self.0.iter_mut().filter(|slot| slot.flight.is_none()) {
                if taken.len() < entries_max && bytes < bytes_max && (hurried || slot.due().0 <= now) {
                    slot.flight = slot.waiting.take().map(|place| (slot.newest, place));
                    bytes += write(slot.key, slot.newest).weight();
                    taken.push((key(slot.key), slot.newest));
                }
            }
            taken
        }

        fn end(&mut self, key: u8, tried: i64, left: bool) {
            if left {
                self.overtake(key, tried);
            }
            if let Some(slot) = self.slot(key)
                && let Some((_, place)) = slot.flight.take_if(|(version, _)| *version == tried)
                && !left
            {
                slot.waiting = Some(place);
            }
        }

        fn overtake(&mut self, key: u8, version: i64) {
            self.0.retain(|slot| slot.key != key || slot.newest > version);
        }
    }

    /// Distinct versions of one key in two orders, some of them lost in the first; and before which of them a batch is taken.
    fn deliveries() -> impl Strategy<Value = (Vec<i64>, Vec<i64>, Vec<bool>)> {
        let versions = proptest::collection::btree_set(1..1_000i64, 1..12).prop_map(Vec::from_iter);
        versions.prop_flat_map(|all| {
            let some = proptest::sample::subsequence(all.clone(), 0..=all.len()).prop_shuffle();
            let takes = proptest::collection::vec(any::<bool>(), 2 * all.len());
            (some, Just(all).prop_shuffle(), takes)
        })
    }

    proptest! {
        /// The one rule: any order, repetition and late redelivery leaves the highest version, whether or not a try is under way, and that
        /// version is what the store is given last.
        #[test]
        fn any_order_repetition_and_late_redelivery_end_at_the_highest_version((first, second, takes) in deliveries()) {
            let held = Cell::new(0);
            let mut pending = Pending::new();
            let mut tried = Vec::new();
            for (number, takes) in first.iter().chain(&second).zip(takes) {
                drop(pending.offer(write(1, *number), Counted::new(&held), Timestamp(0), Duration::ZERO));
                if takes {
                    tried.extend(pending.take(Timestamp(0), 1, usize::MAX, false));
                }
            }
            let highest = second.iter().copied().max().map(|number| write(1, number).entry);
            prop_assert_eq!(shown(&pending, 1), highest.clone());
            prop_assert_eq!((pending.entries(), held.get()), (1, 1));
            // Each try succeeds in turn; what is newer than it goes next.
            while pending.entries() > 0 {
                let last = tried.last().cloned();
                if let Some(Write { key, entry, .. }) = last {
                    let _ = pending.settle(&key, entry.version);
                }
                tried.extend(pending.take(Timestamp(0), 1, usize::MAX, false));
            }
            prop_assert_eq!(tried.last().map(|write| write.entry.clone()), highest);
            prop_assert!(tried.windows(2).all(|pair| pair[0].entry.version < pair[1].entry.version));
            prop_assert_eq!((pending.get(&key(1)), held.get()), (None, 0));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Whatever happens in whatever order, the table shows, takes and counts as the naive one does, and holds one permit
        /// per slot.
        #[test]
        fn does_as_the_naive_table(steps in steps()) {
            let held = Cell::new(0);
            let mut pending = Pending::new();
            let mut model = Model::default();
            let mut now = 0;
            for (rank, step) in steps.into_iter().enumerate() {
                let flying = |model: &mut Model, key| model.slot(key).and_then(|slot| slot.flight).map_or(1, |(v, _)| v);
                match step {
                    Step::Offer(k, v, delay) => {
                        let permit = Counted::new(&held);
                        drop(pending.offer(write(k, v), permit, Timestamp(now), Duration::from_millis(delay)));
                        model.offer(k, v, now, delay, rank);
                    }
                    Step::Take(entries_max, bytes_max, hurried) => {
                        let taken = pending.take(Timestamp(now), entries_max, bytes_max, hurried);
                        let taken: Vec<_> = taken.into_iter().map(|w| (w.key, w.entry.version.get())).collect();
                        prop_assert_eq!(taken, model.take(now, entries_max, bytes_max, hurried));
                    }
                    Step::Settle(k, v) => {
                        let v = v.unwrap_or_else(|| flying(&mut model, k));
                        let _ = pending.settle(&key(k), version(v));
                        model.end(k, v, true);
                    }
                    Step::Release(k, v) => {
                        let v = v.unwrap_or_else(|| flying(&mut model, k));
                        pending.release(&key(k), version(v));
                        model.end(k, v, false);
                    }
                    Step::Overtake(k, v) => {
                        drop(pending.overtake(&key(k), version(v)));
                        model.overtake(k, v);
                    }
                    Step::Wait(millis) => now += millis,
                }
                for k in 0..6 {
                    let shown = shown(&pending, k);
                    let expected = model.slot(k).map(|slot| write(k, slot.newest).entry);
                    prop_assert_eq!(shown, expected);
                }
                prop_assert_eq!(pending.entries(), model.0.len());
                let weight = model.0.iter().map(|slot| write(slot.key, slot.newest).weight()).sum::<usize>();
                prop_assert_eq!(pending.bytes(), weight);
                prop_assert_eq!(held.get(), model.0.len());
                let waiting = model.0.iter().filter(|slot| slot.flight.is_none());
                prop_assert_eq!(pending.next_due().map(|at| at.0), waiting.map(|slot| slot.due().0).min());
                prop_assert_eq!(pending.oldest().map(|at| at.0), model.0.iter().map(|slot| slot.place().0).min());
                let told = |(name, share): (&str, &Share)| (name.to_owned(), share.entries(), share.bytes, share.oldest().map(|at| at.0));
                let mut told: Vec<_> = pending.shares().map(told).collect();
                told.sort();
                let counted = ["even", "odds"].into_iter().filter_map(|name| {
                    let slots: Vec<_> = model.0.iter().filter(|slot| namespace(slot.key) == name).collect();
                    let bytes = slots.iter().map(|slot| write(slot.key, slot.newest).weight()).sum::<usize>();
                    let oldest = slots.iter().map(|slot| slot.place().0).min();
                    (!slots.is_empty()).then(|| (name.to_owned(), slots.len(), bytes, oldest))
                });
                prop_assert_eq!(told, counted.collect::<Vec<_>>());
            }
        }
    }
}
