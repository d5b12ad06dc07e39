//! What is known of a run: what every client asked and was answered, what became of the rows of the store, and what stood in the end.
//!
//! Owns the vocabulary of the checker. Pure: no server, no clock. Times are those of one clock, that of the process that records.

use std::{collections::BTreeMap, ops::Range};

/// Nanoseconds since the run began.
pub type Nanos = u64;

/// A version, as the gateway returns it.
pub type Version = i64;

/// What tells one value from every other: a hash of its bytes, or of a counter what it says. No value is put twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub u64);

/// How a key is written, which decides what is promised of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Only through: linearizable for reads of the store.
    Through,
    /// Only behind.
    Behind,
    /// Either way.
    Mixed,
    /// Only added to, which is through; and only ever something above nothing.
    Counter,
}

impl Class {
    /// Whether what an answer says of its keys is committed in the store, and linearizable.
    pub fn is_through(self) -> bool {
        matches!(self, Class::Through | Class::Counter)
    }
}

/// Which copies may answer a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Consistency {
    Cached,
    Shared,
    Store,
}

/// A gateway, and which of its starts it was. The life is `None` where the call outlived one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Replica {
    pub number: usize,
    pub life: Option<u32>,
}

/// What became of a write, as far as its caller was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok(Version),
    /// What it asks for does not fit to what stood: the version of the live record, if there was one.
    Refused(Option<Version>),
    NotApplied,
    /// It may have taken effect, or may yet.
    Unknown,
}

/// What a write makes of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Put(Value),
    Delete,
    /// The value stays, under another version. There must be one.
    Touch,
    /// A counter becomes so much more: what, if its caller was told.
    Add {
        delta: u64,
        made: Option<Value>,
    },
}

impl Change {
    /// The value that it leaves, as far as that is known.
    pub fn value(self) -> Option<Value> {
        match self {
            Change::Put(value) => Some(value),
            Change::Add { made, .. } => made,
            Change::Delete | Change::Touch => None,
        }
    }
}

/// What must stand for a write to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    Absent,
    Present,
    Version(Version),
}

/// What a read was answered, or what stands in a row: the version, and its value; no value is a tombstone. A read of an absent key is told
/// no version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    pub version: Version,
    pub value: Option<Value>,
}

/// What a call asked, and was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    Write {
        /// Answered once committed.
        through: bool,
        change: Change,
        condition: Option<Condition>,
        /// What it is the same write by, however often it is sent; each time is a call.
        request: Option<u64>,
        outcome: Outcome,
    },
    Read {
        consistency: Consistency,
        /// The `min_version` that it carried.
        at_least: Option<Version>,
        /// `None`: the key is absent.
        found: Option<(Version, Value)>,
        /// What the answer says of itself: that it may be outdated, ...
        stale: bool,
        /// ... and where it comes from, for people.
        source: &'static str,
    },
}

/// A call. Reads that failed are none: they promise nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Op {
    pub key: usize,
    /// The calls of a session come one after the other.
    pub session: u32,
    pub replica: Replica,
    pub call: Nanos,
    pub ret: Nanos,
    pub act: Act,
}

impl Op {
    /// Whether it is a write that the store decided, as it stood there, and not by its version alone.
    pub fn is_decided(&self) -> bool {
        match self.act {
            Act::Write {
                through,
                change,
                condition,
                request,
                ..
            } => {
                condition.is_some()
                    || matches!(change, Change::Touch | Change::Add { .. })
                    || through && request.is_some()
            }
            Act::Read { .. } => false,
        }
    }
}

/// A read after everything was healed and drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    pub key: usize,
    pub replica: usize,
    pub consistency: Consistency,
    pub found: Option<(Version, Value)>,
}

/// A run.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Of each key, by its number.
    pub classes: Vec<Class>,
    /// In any order.
    pub ops: Vec<Op>,
    /// What each row of the store became, in the order in which it did.
    pub applied: BTreeMap<usize, Vec<Record>>,
    /// What stands in the store in the end.
    pub rows: BTreeMap<usize, Record>,
    pub settled: Vec<Settled>,
    /// Of each replica, the times at which nothing was between it and Redis, and nothing the matter with either, since long enough.
    pub calm: Vec<Vec<Range<Nanos>>>,
}
