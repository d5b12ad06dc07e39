//! The pending table of one shard: the newest accepted write of each key, which of them are in flight, and the order of draining.
//!
//! Owns the queue's state and every decision about it. Pure: no lock (the shard's), no clock (times are given), no I/O (the
//! drain's), no counting against bounds (the budget's) and no disk (the journal's): what a write holds of either rides along as a
//! [`Payload`] and is handed back when its write leaves, so that it is freed outside of the shard's lock. Invariants: a key has one slot
//! and the slot only moves forward; at most one version of a key is in flight; a slot's place in the order is the one of its
//! oldest write that has not left, so a hot key is neither starved nor younger than it looks; a write with a request id holds its
//! payload until the store has the id, whatever became of its slot (`owed`).
//!
//! In reading order: this file, `slot` (one key), `order` (what may be drained), `owed` (request ids), `passing` (who is on the way), `watch` (who
//! waits), `range`, `shares` and `oldest` (what is told of all of them).

mod oldest;
mod order;
mod owed;
mod passing;
mod range;
mod shares;
mod slot;
mod watch;

use std::{collections::HashMap, time::Duration};

use foldhash::fast::RandomState;

pub use self::{oldest::PendingKey, watch::Fate};
pub(super) use self::{shares::Share, watch::Watch};

use self::{
    order::Order,
    owed::{Loose, Owed, Tried},
    passing::Passages,
    range::Ordered,
    shares::Shares,
    slot::{Course, Newest, Place, Slot},
    watch::{Below, Watchers},
};
use crate::model::{Entry, Key, KeyedAnswer, Tags, Timestamp, Version, Write};

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
    /// It replaced an older write of its key, whose payload this is, unless its request id is owed.
    Coalesced(Option<P>),
    /// A write at least as new stands here, or in the store by now; this is the payload of the one that was offered, unless its request id
    /// is owed.
    Refused(Option<P>),
}

/// What becomes of a write that the store has taken.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "says who has it leave"]
pub(super) enum Settled {
    /// It has left.
    Left,
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

/// The pending writes of one shard.
#[derive(Debug)]
pub(super) struct Pending<P> {
    slots: HashMap<Key, Slot<P>, RandomState>,
    /// The keys of every waiting slot, by due time and number.
    order: Order,
    /// How many of those a worker wants that gathers a batch.
    wanted: Option<usize>,
    /// The keys of every slot, in order.
    ordered: Ordered,
    /// The request ids whose key has no slot to go with.
    loose: Loose<P>,
    /// What each namespace has here, in flight or not: what the age of the oldest is read from.
    shares: Shares,
    /// How many writes hold a payload: one for each slot, and one for each id that is owed.
    entries: usize,
    /// Their weight.
    bytes: usize,
    /// How often the shared caches have lost everything, or may have.
    generation: u64,
    /// Places given out so far.
    places: u64,
    /// How many slots have a place for what came while they are in flight.
    nexts: usize,
    /// Writes that are stamped and not yet offered.
    passages: Passages,
    /// Who waits for writes to leave.
    watchers: Watchers,
}

impl<P: Payload> Pending<P> {
    /// An empty table.
    pub(super) fn new() -> Pending<P> {
        Pending {
            slots: HashMap::default(),
            order: Order::default(),
            wanted: None,
            ordered: Ordered::default(),
            loose: Loose::new(),
            shares: Shares::default(),
            entries: 0,
            bytes: 0,
            generation: 0,
            places: 0,
            nexts: 0,
            passages: Passages::default(),
            watchers: Watchers::default(),
        }
    }

    /// A write of a key is about to be stamped. Until it leaves, by the number that it gets, what the store holds of the key is remembered.
    pub(super) fn enter(&mut self, key: &Key) -> u64 {
        self.passages.enter(key)
    }

    /// A write that entered has been offered, or given up.
    pub(super) fn leave(&mut self, key: &Key, number: u64) {
        self.passages.leave(key, number);
        self.tell_left(key);
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
        payload: P,
        now: Timestamp,
        write_delay: Duration,
        unconfirmed: bool,
    ) -> Offered<P> {
        let weight = write.weight();
        let Write {
            key,
            entry,
            tags,
            requests,
        } = write;
        let version = entry.version;
        let offered = Newest {
            entry,
            tags,
            request: requests.into_iter().next().map(|answered| Box::new(answered.request)),
            weight,
            payload,
            unconfirmed,
            published: Some(self.generation),
        };
        if self.passages.stored(&key).is_some_and(|stored| version <= stored) {
            return Offered::Refused(self.owe(&key, offered, now, Tried::No));
        }
        // Nothing is delayed that somebody waits for.
        let delay = if self.watchers.is_watched(&key) {
            Duration::ZERO
        } else {
            write_delay
        };
        let fresh = self.place(now, delay, version);
        let Some(slot) = self.slots.get_mut(&key) else {
            self.count(&key, weight, &fresh);
            self.ordered.add(&key);
            self.order.insert(fresh.due, fresh.number, key.clone());
            let slot = Slot {
                newest: offered,
                course: Course::Waiting(fresh),
                owed: Vec::new(),
            };
            self.slots.insert(key, slot);
            return Offered::Added;
        };
        if version <= slot.newest.entry.version {
            slot.stand_for(version);
            let payload = self.owe(&key, offered, now, Tried::No);
            return Offered::Refused(self.bequeath(&key, payload));
        }
        let (tried, admitted) = (slot.tried(), slot.place().admitted);
        let (older, is_next) = slot.replace(offered, fresh);
        self.nexts += usize::from(is_next);
        self.bytes = self.bytes - older.weight + weight;
        self.shares.reweigh(&key, older.weight, weight);
        let payload = self.owe(&key, older, admitted, tried);
        Offered::Coalesced(self.bequeath(&key, payload))
    }

    /// A write does not stand, or no longer: if it has an id that is owed from now on, and else this is its payload.
    fn owe(&mut self, key: &Key, write: Newest<P>, admitted: Timestamp, tried: Tried) -> Option<P> {
        #[cfg(feature = "planted-faults")]
        if crate::planted::is(crate::planted::Fault::RequestForgotten) {
            return Some(write.payload);
        }
        let place = self.place(admitted, Duration::ZERO, write.entry.version);
        let owed = match write.into_owed(place, tried) {
            Ok(owed) => owed,
            Err(payload) => return Some(payload),
        };
        self.count(key, owed.weight, &owed.place);
        match self.slots.get_mut(key) {
            Some(slot) => slot.owed.push(owed),
            None => self.loose.add(key, vec![owed]),
        }
        None
    }

    /// Leaves to the write that stands what must outlive one that does not.
    fn bequeath(&mut self, key: &Key, payload: Option<P>) -> Option<P> {
        let (mut payload, slot) = (payload?, self.slots.get_mut(key));
        slot.into_iter()
            .for_each(|slot| slot.newest.payload.inherit(&mut payload));
        Some(payload)
    }

    /// Takes what is due at `now` into flight, first due first; when `hurried`, also what is not due. Stops once it has
    /// `entries_max` writes and request ids or `bytes_max` bytes, so it goes beyond either by less than its last write has. No key twice.
    pub(super) fn take(&mut self, now: Timestamp, entries_max: usize, bytes_max: usize, hurried: bool) -> Vec<Write> {
        let mut taken = Vec::new();
        let (mut entries, mut bytes) = (0, 0);
        while entries < entries_max && bytes < bytes_max {
            let Some(key) = self.order.take(now, hurried) else {
                break;
            };
            // Every key of the order has a waiting slot.
            let Some(slot) = self.slots.get_mut(&key) else { continue };
            let Course::Waiting(place) = slot.course else { continue };
            let write = slot.take(key);
            slot.course = Course::InFlight {
                version: write.entry.version,
                place,
                next: None,
            };
            entries += entries_of(&write);
            bytes += write.weight();
            taken.push(write);
        }
        taken
    }

    /// The try of `version` is over: the store has taken it, and the ids that went with it. A newer write of the key stays and can be taken
    /// from now on. Harmless for a version that is not pending. What has left gives its payload to `left`.
    pub(super) fn settle(&mut self, key: &Key, version: Version, left: &mut Vec<P>) -> Settled {
        self.stored(key, version);
        if let Some(slot) = self.slots.get_mut(key)
            && slot.newest.unconfirmed
            && slot.newest.entry.version == version
        {
            if slot.tried() == Tried::With(version) {
                slot.newest.request = None;
            }
            self.told(key, version, left);
            return Settled::ToPublish;
        }
        self.end(key, version, left);
        Settled::Left
    }

    /// The same of a write that lost to `standing` in the store.
    pub(super) fn lose(&mut self, key: &Key, version: Version, standing: Version, left: &mut Vec<P>) {
        self.stored(key, standing);
        self.end(key, version, left);
    }

    /// The same of a write that left for the dead letters: the store need not hold anything of its key.
    pub(super) fn bury(&mut self, key: &Key, version: Version, left: &mut Vec<P>) {
        if let Some(slot) = self.slots.get(key)
            && let Course::InFlight {
                version: tried, place, ..
            } = slot.course
            && tried == version
        {
            self.watchers.note_buried(key, place.lowest, version);
        }
        self.end(key, version, left);
    }

    /// The same of a write that was told to be [`Settled::ToPublish`] and is published.
    pub(super) fn published(&mut self, key: &Key, version: Version, left: &mut Vec<P>) {
        self.stored(key, version);
        self.end(key, version, left);
    }

    fn end(&mut self, key: &Key, version: Version, left: &mut Vec<P>) {
        self.told(key, version, left);
        let Some(slot) = self.slots.get_mut(key) else { return };
        if slot.newest.entry.version <= version {
            self.remove(key, Some(version), left);
        } else if let Course::InFlight {
            version: tried,
            place,
            next: Some(next),
        } = slot.course
            && tried == version
        {
            self.shares.replace(key, &place, &next);
            self.order.insert(next.due, next.number, key.clone());
            slot.course = Course::Waiting(next);
            self.nexts -= 1;
            self.watchers.note_gone(key, place.number);
        }
        self.tell_left(key);
    }

    /// The try of `version` failed: its key can be taken again, at its old place, with what was accepted since; and so can the ids that went
    /// with it. Harmless for a version that is not in flight.
    pub(super) fn release(&mut self, key: &Key, version: Version) {
        let with = Tried::With(version);
        self.loose.release(key, with);
        let Some(slot) = self.slots.get_mut(key) else { return };
        owed::release(&mut slot.owed, with);
        if let Course::InFlight {
            version: tried,
            mut place,
            next,
        } = slot.course
            && tried == version
        {
            if let Some(next) = next {
                place.lowest = place.lowest.min(next.lowest);
                self.nexts -= 1;
                self.watchers.note_gone(key, next.number);
            }
            self.order.insert(place.due, place.number, key.clone());
            slot.course = Course::Waiting(place);
        }
    }

    /// The store is known to hold `version` or newer by another way: a pending write at or below it has nothing left to do, in
    /// flight or not. Its id, and those that it stood for, are owed all the same.
    pub(super) fn overtake(&mut self, key: &Key, version: Version, left: &mut Vec<P>) {
        self.stored(key, version);
        if self
            .slots
            .get(key)
            .is_some_and(|slot| slot.newest.entry.version <= version)
        {
            self.remove(key, None, left);
            self.tell_left(key);
        }
    }

    /// Up to `limit` request ids that no write of their key can take along: they are to be remembered by themselves.
    pub(super) fn take_loose(&mut self, limit: usize) -> Vec<KeyedAnswer> {
        self.loose.take(limit)
    }

    /// The store remembers these ids.
    pub(super) fn remembered(&mut self, answers: &[KeyedAnswer], left: &mut Vec<P>) {
        for KeyedAnswer { key, .. } in answers {
            for owed in self.loose.told(key, Tried::Alone) {
                self.forget(key, owed, left);
            }
        }
    }

    /// It could not be told of these.
    pub(super) fn not_remembered(&mut self, answers: &[KeyedAnswer]) {
        for KeyedAnswer { key, .. } in answers {
            self.loose.release(key, Tried::Alone);
        }
    }

    /// How many keys have an id for [`Pending::take_loose`].
    pub(super) fn loose(&self) -> usize {
        self.loose.waiting()
    }

    /// Notes whether the shared caches hold `version` of a key, if that is what stands.
    pub(super) fn note_published(&mut self, key: &Key, version: Version, published: bool) {
        if let Some(slot) = self.slots.get_mut(key)
            && slot.newest.entry.version == version
        {
            slot.newest.published = published.then_some(self.generation);
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
                slot.newest.published = None;
            }
        }
    }

    /// Whether the write that stands for a key, `version` or one that has covered it, is nowhere in the shared caches, for all that is known.
    pub(super) fn is_unpublished(&self, key: &Key, version: Version) -> bool {
        let standing = self.slots.get(key).filter(|slot| slot.newest.entry.version >= version);
        standing.is_some_and(|slot| slot.newest.published != Some(self.generation))
    }

    /// The newest accepted write of a key.
    pub(super) fn get(&self, key: &Key) -> Option<PendingEntry> {
        self.slots.get(key).map(|slot| PendingEntry {
            entry: slot.newest.entry.clone(),
            unconfirmed: slot.newest.unconfirmed,
        })
    }

    /// The version of a key's newest pending write.
    pub(super) fn version(&self, key: &Key) -> Option<Version> {
        self.slots.get(key).map(|slot| slot.newest.entry.version)
    }

    /// The keys of writes that this process accepted before `then`, the recovered ones excepted.
    pub(super) fn accepted_before(&self, then: Timestamp) -> impl Iterator<Item = &Key> {
        let accepted = |slot: &Slot<P>| match slot.course {
            Course::Waiting(place) | Course::InFlight { place, .. } => place.admitted,
        };
        let old = self
            .slots
            .iter()
            .filter(move |(_, slot)| !slot.newest.unconfirmed && accepted(slot) <= then);
        old.map(|(key, _)| key)
    }

    /// The version of each write that holds something, and what it holds.
    pub(super) fn payloads(&self) -> impl Iterator<Item = (Version, &P)> {
        let newest = self.slots.values().map(|slot| &slot.newest);
        let owed = self.slots.values().flat_map(|slot| &slot.owed).chain(self.loose.iter());
        let newest = newest.map(|newest| (newest.entry.version, &newest.payload));
        newest.chain(owed.map(|owed| (owed.answered.answer.version, &owed.payload)))
    }

    /// What the pending write of a key holds, and the older ones whose ids go with it.
    pub(super) fn payloads_of(&self, key: &Key) -> impl Iterator<Item = &P> {
        let slot = self.slots.get(key);
        let owed = slot.into_iter().flat_map(|slot| &slot.owed);
        slot.map(|slot| &slot.newest.payload)
            .into_iter()
            .chain(owed.map(|owed| &owed.payload))
    }

    /// The same to change it, if this version is the newest of its key.
    #[cfg(feature = "planted-faults")]
    pub(super) fn payload_of(&mut self, key: &Key, version: Version) -> Option<&mut P> {
        let newest = self
            .slots
            .get_mut(key)
            .filter(|slot| slot.newest.entry.version == version);
        newest.map(|slot| &mut slot.newest.payload)
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
        self.order.next_due()
    }

    /// Takes nothing of a namespace from now on. What is in flight ends.
    pub(super) fn pause(&mut self, namespace: &str) {
        self.order.pause(namespace);
    }

    /// Takes it again.
    pub(super) fn resume(&mut self, namespace: &str) {
        self.order.resume(namespace);
    }

    /// Whether so many writes are due at `now`, or writes of so many bytes. Where not, [`Pending::is_gathered`] says so once as many more wait as
    /// were lacking.
    pub(super) fn gather(&mut self, now: Timestamp, writes: usize, bytes: usize) -> bool {
        let (mut due, mut sum) = (0, 0);
        for key in self.order.due(now) {
            due += 1;
            sum += self.slots.get(key).map_or(0, |slot| slot.newest.weight);
            if due >= writes || sum >= bytes {
                self.wanted = None;
                return true;
            }
        }
        self.wanted = Some(self.order.len() + writes - due);
        false
    }

    /// Whether as many writes wait as were wanted, if any were: due or not.
    pub(super) fn is_gathered(&self) -> bool {
        self.wanted.is_some_and(|wanted| self.order.len() >= wanted)
    }

    /// How many writes are pending: the newest of each key, and the older ones whose request ids are owed.
    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    /// Their weight.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Waits until the store has `version` of a key, or refuses it; `None`: nothing here is, or stands for, that write. What is waited for
    /// is due at `now`.
    pub(super) fn await_stored(&mut self, key: &Key, version: Version, now: Timestamp) -> Option<Watch<Fate>> {
        if !self.slots.get(key)?.covers(version) {
            return None;
        }
        self.hasten(key, now);
        Some(self.watchers.stored(key, version))
    }

    /// Waits until nothing of a key is pending that is older than `version`, nor on its way by now; `None`: so it is. The same.
    pub(super) fn await_settled(&mut self, key: &Key, version: Version, now: Timestamp) -> Option<Watch<()>> {
        let below = Below {
            version,
            passage: self.passages.last(),
        };
        if below.holds(self.slots.get(key).map(Slot::lowest), self.passages.first(key)) {
            return None;
        }
        self.hasten(key, now);
        Some(self.watchers.settled(key, below))
    }

    /// Waits until all that is pending by now has left, of a namespace or of all: with how much that is; `None`: nothing is. Looks at every
    /// slot of the namespace.
    pub(super) fn await_all(&mut self, namespace: Option<&str>) -> Option<(Watch<()>, usize)> {
        let left = match namespace {
            None => self.slots.len() + self.nexts,
            Some(namespace) => {
                let slots = self.ordered.below(namespace, "", None);
                let slots = slots.filter_map(|key| self.slots.get(key));
                slots.map(|slot| 1 + usize::from(slot.has_next())).sum()
            }
        };
        (left > 0).then(|| (self.watchers.all(self.places, left, namespace), left))
    }

    /// Nobody waits any more for what was waited for under this number.
    pub(super) fn take_back(&mut self, key: Option<&Key>, number: u64) {
        self.watchers.take_back(key, number);
    }

    /// Whether somebody waits for writes to leave.
    pub(super) fn is_awaited(&self) -> bool {
        !self.watchers.is_empty()
    }

    /// Whether anybody waits for a key.
    #[cfg(test)]
    pub(super) fn is_watched(&self, key: &Key) -> bool {
        self.watchers.is_watched(key)
    }

    /// Makes the write of a key due.
    fn hasten(&mut self, key: &Key, now: Timestamp) {
        let Some(slot) = self.slots.get_mut(key) else { return };
        match &mut slot.course {
            Course::Waiting(place) if place.due > now => {
                self.order.remove(place.due, place.number, key);
                place.due = now;
                self.order.insert(now, place.number, key.clone());
            }
            Course::InFlight { place, next, .. } => {
                place.due = place.due.min(now);
                next.iter_mut().for_each(|next| next.due = next.due.min(now));
            }
            Course::Waiting(_) => {}
        }
    }

    /// The pending entries of a namespace whose keys begin with `prefix`, with their tags, in order, from the first one after `after`.
    pub(super) fn range(
        &self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
    ) -> impl Iterator<Item = (Key, PendingEntry, Tags)> {
        let keys = self.ordered.below(namespace, prefix, after);
        keys.filter_map(|key| Some((key.clone(), self.get(key)?, self.slots.get(key)?.newest.tags.clone())))
    }

    /// The store holds `version` of a key, or something newer.
    fn stored(&mut self, key: &Key, version: Version) {
        self.passages.note_stored(key, version);
        self.watchers.note_stored(key, version);
    }

    /// The store was told of the ids that went with a version.
    fn told(&mut self, key: &Key, version: Version, left: &mut Vec<P>) {
        let with = Tried::With(version);
        let of_slot = (self.slots.get_mut(key)).map(|slot| owed::told(&mut slot.owed, with));
        let loose = self.loose.told(key, with);
        for owed in of_slot.into_iter().flatten().chain(loose) {
            self.forget(key, owed, left);
        }
    }

    /// Lets go of an id.
    fn forget(&mut self, key: &Key, owed: Owed<P>, left: &mut Vec<P>) {
        self.discount(key, owed.weight, &owed.place);
        left.push(owed.payload);
    }

    /// Removes a slot whose write, and what it stood for, has nothing left to do. `told`: with this version the store was told of the ids.
    fn remove(&mut self, key: &Key, told: Option<Version>, left: &mut Vec<P>) {
        let Some(slot) = self.slots.remove(key) else { return };
        self.ordered.remove(key);
        let (admitted, tried) = (slot.place().admitted, slot.tried());
        let place = match slot.course {
            Course::Waiting(place) => {
                self.order.remove(place.due, place.number, key);
                place
            }
            Course::InFlight { place, next, .. } => {
                if let Some(next) = next {
                    self.nexts -= 1;
                    self.watchers.note_gone(key, next.number);
                }
                place
            }
        };
        self.watchers.note_gone(key, place.number);
        self.discount(key, slot.newest.weight, &place);
        self.loose.add(key, slot.owed);
        if told.is_some_and(|version| tried == Tried::With(version)) {
            left.push(slot.newest.payload);
        } else {
            left.extend(self.owe(key, slot.newest, admitted, tried));
        }
    }

    /// Tells those who wait until nothing older of a key is pending.
    fn tell_left(&mut self, key: &Key) {
        if self.watchers.is_settling() {
            let lowest = self.slots.get(key).map(Slot::lowest);
            self.watchers.note_left(key, lowest, self.passages.first(key));
        }
    }

    /// Counts a write that holds a payload.
    fn count(&mut self, key: &Key, weight: usize, place: &Place) {
        self.shares.add(key, weight, place);
        self.entries += 1;
        self.bytes += weight;
    }

    /// Counts it no longer.
    fn discount(&mut self, key: &Key, weight: usize, place: &Place) {
        self.shares.remove(key, weight, place);
        self.entries -= 1;
        self.bytes -= weight;
    }

    /// A new place.
    fn place(&mut self, now: Timestamp, write_delay: Duration, lowest: Version) -> Place {
        self.places += 1;
        Place {
            admitted: now,
            due: now.after(write_delay),
            number: self.places,
            lowest,
        }
    }
}

/// What a write counts for where entries are bounded: itself, and its request ids.
pub(super) fn entries_of(write: &Write) -> usize {
    1 + write.requests.len()
}

#[cfg(test)]
mod tests;
