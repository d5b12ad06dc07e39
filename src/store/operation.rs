//! What only the store can decide: writes that depend on what stands, and writes that are to be written once.
//!
//! Owns the vocabulary: an [`Operation`] goes down, a [`Decided`] comes back. Does not own how operations are decided (`decide`, which is
//! pure), nor how callers share transactions (`decisions`). Every operation has a request id, so that one whose commit ended without a
//! word can be tried again and is never applied twice.

use bytes::Bytes;

use crate::model::{Answer, Condition, Entry, Key, Request, Tags, Timestamp, Version};

/// What is to become of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It is set.
    Put {
        /// The value.
        value: Bytes,
        /// Its tags.
        tags: Tags,
        /// When it ceases to exist.
        expires_at: Option<Timestamp>,
    },
    /// It is deleted.
    Delete,
    /// Its expiry is set, and its value and tags stay. There must be one.
    Touch {
        /// When it ceases to exist.
        expires_at: Option<Timestamp>,
    },
    /// A counter is added to; an absent one counts as 0 and is created.
    Add {
        /// What is added.
        delta: i64,
        /// When one that is created ceases to exist.
        expires_at: Option<Timestamp>,
    },
}

/// A write that the store decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// What is written.
    pub key: Key,
    /// The version that it gets if it is applied.
    pub version: Version,
    /// What must hold of what stands.
    pub condition: Option<Condition>,
    /// What is to become of it.
    pub change: Change,
    /// Its name: it is applied once.
    pub request: Request,
    /// When its caller asked, by the gateway's clock: whether the window of a known id is over is judged by this, so that however late a try
    /// is it knows what an earlier one has left. What has expired is judged by the time of the try.
    pub asked_at: Timestamp,
    /// A version of the key that is known to have been acknowledged, as by a gateway that has not drained it yet: a store that holds less
    /// cannot decide yet.
    pub acknowledged: Option<Version>,
}

impl Operation {
    /// What it is charged where bytes are bounded.
    pub fn weight(&self) -> usize {
        let content = match &self.change {
            Change::Put { value, tags, .. } => crate::model::content_bytes(Some(value), tags),
            Change::Delete | Change::Touch { .. } | Change::Add { .. } => 0,
        };
        crate::model::weight(&self.key, content)
    }
}

/// What the store made of an operation. Of all but `Applied` and `Repeated` nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decided {
    /// It was applied; this stood right after it.
    Applied {
        /// What the key held then, under the operation's version.
        entry: Entry,
        /// What the caller is told.
        answer: Answer,
    },
    /// It, or an earlier one with its request id and content, was applied before: the answer to that.
    Repeated(Answer),
    /// Its request id was used within its window, for something else.
    Reused,
    /// Its version is not above what stands, or what once stood: it may be stamped anew, above this.
    Outdated {
        /// The version that stands, or the horizon.
        standing: Version,
    },
    /// The store does not hold [`Operation::acknowledged`] yet.
    Behind,
    /// It cannot be applied to what stands.
    Refused(Refusal),
}

/// Why an operation cannot be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its condition does not hold.
    Conflict {
        /// The version of the live record that stands, if there is one.
        standing: Option<Version>,
    },
    /// It wants a record, and there is none.
    Absent,
    /// What stands is no counter.
    NotACounter,
    /// The counter would leave its range.
    OutOfRange,
}

/// A row of a range of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeRow {
    /// Its key.
    pub key: Key,
    /// The version that stands.
    pub version: Version,
    /// When the record ceases to exist, or did.
    pub expires_at: Option<Timestamp>,
    /// The size of its value, in bytes; `None` of a tombstone.
    pub value_bytes: Option<usize>,
    /// Its tags.
    pub tags: Tags,
}

impl RangeRow {
    /// Whether a reader sees a record at `now`.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.value_bytes.is_some() && self.expires_at.is_none_or(|at| now < at)
    }
}
