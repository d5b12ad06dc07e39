//! What a write holds from its admission until it leaves the queue.
//!
//! Owns the two states of it, so that nothing can be accepted that is not as durable as it must be: a [`Claim`] is room, and only
//! becomes a [`Held`] by the journal's word, or for a write that rests on memory. Does not own the room (the budget's and the
//! journal's). Both give back their room when dropped; a record in the journal is released in so many words only, for whatever is dropped
//! because the process gives up must come back with the next start.

use std::mem;

use super::{
    budget::Permit,
    journal::{Record, Room},
    pending::Payload,
};
use crate::model::Version;

/// The answer to a write that asks for room.
#[derive(Debug)]
#[must_use = "a claim that is dropped gives its room back"]
pub enum Admission {
    /// There is room, and it is claimed.
    Granted(Claim),
    /// There is none, and the namespace wants the write to go through to the store.
    WriteThrough,
}

/// Room for one write: in the queue, and in the journal if the write is to rest on that.
#[derive(Debug)]
pub struct Claim {
    pub(super) permit: Permit,
    pub(super) room: Option<Room>,
}

/// What a write that may be accepted holds: its room in the queue, and its record in the journal if it rests on that.
#[derive(Debug)]
#[must_use = "what is not released is recovered by the next start"]
pub struct Held {
    pub(super) permit: Permit,
    /// With the version that it is of: the write's own, or that of the newest one of its key that the write, resting on memory, covers
    /// and must not make vanish.
    pub(super) record: Option<(Version, Record)>,
}

impl Held {
    /// Whether the write is in the journal, or covers one that is.
    pub fn is_journaled(&self) -> bool {
        self.record.is_some()
    }

    /// Whether this version is in the journal.
    pub(super) fn has_journaled(&self, version: Version) -> bool {
        self.record.as_ref().is_some_and(|(journaled, _)| *journaled == version)
    }

    /// Gives all of it back: the write is in the store, or superseded, or was never answered. A restart need not bring it back.
    pub fn release(self) {
        if let Some((_, record)) = self.record {
            record.release();
        }
    }
}

impl Payload for Held {
    /// An acknowledged write that rests on the journal comes back after a crash even where one that rests on memory had covered it: of
    /// all that one did, the newest.
    fn inherit(&mut self, from: &mut Held) {
        let version = |held: &Held| held.record.as_ref().map(|(version, _)| *version);
        if version(self) < version(from) {
            mem::swap(&mut self.record, &mut from.record);
        }
    }
}
