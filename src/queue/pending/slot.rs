//! The slot of one key: its newest write, whether a batch has it, and the request ids that go with its next batch.
//!
//! Owns what a newer or an older write of the key does to it. Does not own the order of draining nor the sums (the table), to which it says what
//! changed. Invariants: the entry only moves forward; whatever was accepted since a batch took the slot's write is in none.

use std::mem;

use super::{
    Payload,
    owed::{Owed, Tried},
};
use crate::model::{Answer, Answered, Entry, Key, Request, Tags, Timestamp, Version, Write};

/// Where a slot stands in the order of draining.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// When the oldest write that it stands for was accepted.
    pub(super) admitted: Timestamp,
    /// From when on it may be drained without pressure.
    pub(super) due: Timestamp,
    /// Tells places of the same millisecond apart, first come first.
    pub(super) number: u64,
    /// The lowest version that it stands for.
    pub(super) lowest: Version,
}

/// Whether a batch has taken a slot's write.
#[derive(Debug)]
pub(super) enum Course {
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
pub(super) struct Slot<P> {
    /// The newest write.
    pub(super) newest: Newest<P>,
    pub(super) course: Course,
    /// The ids of older writes of the key, that the newest stands for.
    pub(super) owed: Vec<Owed<P>>,
}

/// What is known of the newest write of a key.
#[derive(Debug)]
pub(super) struct Newest<P> {
    pub(super) entry: Entry,
    pub(super) tags: Tags,
    /// What it came with, unless the store has that already.
    pub(super) request: Option<Box<Request>>,
    /// [`Write::weight`] of the write as it was offered.
    pub(super) weight: usize,
    pub(super) payload: P,
    /// See [`PendingEntry`](super::PendingEntry).
    pub(super) unconfirmed: bool,
    /// In which generation of the shared caches this entry got there, if it did.
    pub(super) published: Option<u64>,
}

impl<P: Payload> Newest<P> {
    /// Its id, with all that it holds, if it has one; else its payload.
    pub(super) fn into_owed(self, place: Place, tried: Tried) -> Result<Owed<P>, P> {
        let Some(answered) = self.answered() else {
            return Err(self.payload);
        };
        Ok(Owed {
            answered,
            payload: self.payload,
            weight: self.weight,
            place,
            tried,
        })
    }

    /// What is to be remembered of its request.
    fn answered(&self) -> Option<Answered> {
        self.request.as_deref().map(|request| Answered {
            request: request.clone(),
            answer: Answer {
                version: self.entry.version,
                counter: None,
                expires_at: self.entry.expires_at,
            },
        })
    }
}

impl<P: Payload> Slot<P> {
    /// The place of its entry: among those that wait, or after the batch that has an older one.
    pub(super) fn place(&self) -> Place {
        match self.course {
            Course::Waiting(place) => place,
            Course::InFlight { place, next, .. } => next.unwrap_or(place),
        }
    }

    /// The lowest version that it stands for, in flight or not.
    pub(super) fn lowest(&self) -> Version {
        match self.course {
            Course::Waiting(place) => place.lowest,
            Course::InFlight { place, next, .. } => next.map_or(place.lowest, |next| next.lowest.min(place.lowest)),
        }
    }

    /// Whether `version` is among those that it stands for, and that the store is not known to have.
    pub(super) fn covers(&self, version: Version) -> bool {
        let waiting = self.place().lowest <= version && version <= self.newest.entry.version;
        match self.course {
            Course::Waiting(_) => waiting,
            Course::InFlight {
                version: tried, place, ..
            } => waiting || (place.lowest <= version && version <= tried),
        }
    }

    /// Whether a write was accepted since a batch took its own.
    pub(super) fn has_next(&self) -> bool {
        matches!(self.course, Course::InFlight { next: Some(_), .. })
    }

    /// How the newest write is being tried.
    pub(super) fn tried(&self) -> Tried {
        match self.course {
            Course::InFlight {
                version, next: None, ..
            } => Tried::With(version),
            Course::InFlight { .. } | Course::Waiting(_) => Tried::No,
        }
    }

    /// A newer write stands from now on: the older one, and whether `fresh` is a place of its own, after the batch in flight.
    pub(super) fn replace(&mut self, newer: Newest<P>, fresh: Place) -> (Newest<P>, bool) {
        let version = newer.entry.version;
        let older = mem::replace(&mut self.newest, newer);
        let is_next = match &mut self.course {
            Course::InFlight { next: next @ None, .. } => {
                *next = Some(fresh);
                true
            }
            Course::InFlight { next: Some(place), .. } | Course::Waiting(place) => {
                // A version that is in flight is higher than what came before it, and one that came late need not be.
                place.lowest = place.lowest.min(version);
                false
            }
        };
        (older, is_next)
    }

    /// A write that is not newer is accepted, and this stands for it.
    pub(super) fn stand_for(&mut self, older: Version) {
        let place = match &mut self.course {
            Course::InFlight {
                version,
                next: Some(next),
                ..
            } if older > *version => next,
            Course::InFlight { place, .. } | Course::Waiting(place) => place,
        };
        place.lowest = place.lowest.min(older);
    }

    /// Its write as a batch takes it, with all ids that are not being tried: they are, from now on, with this.
    pub(super) fn take(&mut self, key: Key) -> Write {
        let Newest { entry, tags, .. } = &self.newest;
        let tried = Tried::With(entry.version);
        let mut requests = Vec::new();
        for owed in self.owed.iter_mut().filter(|owed| owed.tried == Tried::No) {
            owed.tried = tried;
            requests.push(owed.answered.clone());
        }
        requests.extend(self.newest.answered());
        Write {
            key,
            entry: entry.clone(),
            tags: tags.clone(),
            requests,
        }
    }
}
