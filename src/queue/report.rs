//! What operators are told of the queue: its bounds, what its workers are doing, and which keys are pending longest.
//!
//! Owns the words for that, and who writes them: each worker its own, at every turn. Does not own what a worker does (`drain`). Invariants: no value
//! is told, and of a failure of the store only what quotes no row.

use parking_lot::Mutex;

use super::{PendingKey, Queue};
use crate::{model::Timestamp, store::StoreError};

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// It waits for something to be due.
    Idle,
    /// It gathers its next batch.
    Gathering,
    /// It has a statement under way.
    Writing,
    /// It waits until it tries again.
    BackingOff,
}

/// A failure of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// When.
    pub at: Timestamp,
    /// The store's code for it.
    pub code: Option<String>,
    /// The store's message.
    pub message: String,
}

/// What is told of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerReport {
    /// What it is doing.
    pub doing: Doing,
    /// Since when.
    pub since: Timestamp,
    /// How often in a row the store has failed it.
    pub failures: u32,
    /// How it did last, however long ago.
    pub last_failure: Option<Failure>,
    /// The writes that are pending with it.
    pub entries: usize,
    /// The bytes that they are charged.
    pub bytes: usize,
}

/// What is told of the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// How many writes may be pending.
    pub entries_max: usize,
    /// How many bytes they may be charged.
    pub bytes_max: usize,
    /// By number.
    pub workers: Vec<WorkerReport>,
    /// The keys that are pending longest, the oldest first.
    pub oldest: Vec<PendingKey>,
}

/// Where a worker tells.
#[derive(Debug)]
pub(super) struct Board(Mutex<Told>);

#[derive(Debug)]
struct Told {
    doing: Doing,
    since: Timestamp,
    failures: u32,
    last_failure: Option<Failure>,
}

impl Board {
    pub(super) fn new(now: Timestamp) -> Board {
        Board(Mutex::new(Told {
            doing: Doing::Idle,
            since: now,
            failures: 0,
            last_failure: None,
        }))
    }

    /// Tells what the worker does from now on.
    pub(super) fn does(&self, doing: Doing, now: Timestamp) {
        let mut told = self.0.lock();
        if told.doing != doing {
            (told.doing, told.since) = (doing, now);
        }
    }

    /// The store has failed it.
    pub(super) fn failed(&self, error: &StoreError, now: Timestamp) {
        let mut told = self.0.lock();
        told.failures = told.failures.saturating_add(1);
        told.last_failure = Some(Failure {
            at: now,
            code: error.code.clone(),
            message: error.message.clone(),
        });
    }

    /// The store has not failed it.
    pub(super) fn succeeded(&self) {
        self.0.lock().failures = 0;
    }
}

impl Queue {
    /// What the queue tells of itself, with up to `oldest` of the keys that are pending longest, of a namespace or of all. Holds each shard's
    /// lock for as long as it takes to look at its writes, where keys are asked for.
    pub fn report(&self, namespace: Option<&str>, oldest: usize) -> Report {
        let shared = &self.shared;
        let (entries_max, bytes_max) = shared.budget.bounds();
        let mut keys = Vec::new();
        let mut workers = Vec::new();
        for shard in &shared.shards {
            let (entries, bytes) = {
                let pending = shard.pending.lock();
                if oldest > 0 {
                    keys.extend(pending.oldest_keys(namespace, oldest));
                }
                (pending.entries(), pending.bytes())
            };
            let told = shard.board.0.lock();
            workers.push(WorkerReport {
                doing: told.doing,
                since: told.since,
                failures: told.failures,
                last_failure: told.last_failure.clone(),
                entries,
                bytes,
            });
        }
        keys.sort_unstable_by(|a, b| (a.accepted_at, &a.key).cmp(&(b.accepted_at, &b.key)));
        keys.truncate(oldest);
        Report {
            entries_max,
            bytes_max,
            workers,
            oldest: keys,
        }
    }
}
