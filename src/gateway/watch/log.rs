//! The log of changes: what became visible on this gateway, in that order, for all who watch it.
//!
//! Owns which positions there are, what is kept, and what a watcher at a position is given. Pure: no lock, no clock, no I/O. Does not own who
//! records nor how a watcher waits (`super`). Limits: entries and bytes; the oldest go first. Invariants: positions only rise, and what was
//! recorded at one is never recorded at another; whoever reads from a position is given everything recorded there and later that
//! concerns him, or is told that he is behind; a position from before the log was last turned off is one of the discarded past.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use super::{Gap, Recorded, Scope};

/// What an entry takes beyond its key.
const ENTRY_OVERHEAD_BYTES: usize = 128;

/// What is kept of the past, at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) entries_max: usize,
    pub(super) bytes_max: usize,
    pub(super) watchers_max: usize,
    /// For how long it goes on when nobody watches any more.
    pub(super) resume_window: Duration,
}

/// The keys of a namespace that begin with a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Filter {
    pub(super) namespace: String,
    pub(super) prefix: String,
}

impl Filter {
    fn concerns(&self, recorded: &Recorded) -> bool {
        match recorded {
            Recorded::Change(change) => {
                change.key.namespace() == self.namespace && change.key.key().starts_with(&self.prefix)
            }
            Recorded::Gap(gap) => match &gap.below {
                None => true,
                Some(below) => {
                    below.namespace == self.namespace
                        && (below.prefix.starts_with(&self.prefix) || self.prefix.starts_with(&below.prefix))
                }
            },
        }
    }
}

/// Where a watch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Beginning {
    /// What it is given first.
    pub(super) position: u64,
    /// Whether that is where it asked to begin.
    pub(super) resumed: bool,
    pub(super) scope: Scope,
}

/// What a watcher is given.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// What concerns him, each with the position behind it.
    Found {
        found: Vec<(u64, Recorded)>,
        /// Up to where was looked.
        position: u64,
    },
    /// What he had not read yet is gone. He may go on from here.
    Behind { position: u64, scope: Scope },
}

/// The log of one process.
#[derive(Debug)]
pub(super) struct Log {
    bounds: Bounds,
    entries: VecDeque<Recorded>,
    /// The position of the first of them.
    tail: u64,
    bytes: usize,
    watchers: usize,
    /// When the last watcher left, while there is none.
    left_at: Option<Instant>,
    /// Whether what happens is recorded.
    recording: bool,
    scope: Scope,
}

impl Log {
    pub(super) fn new(bounds: Bounds) -> Log {
        Log {
            bounds,
            entries: VecDeque::new(),
            tail: 0,
            bytes: 0,
            watchers: 0,
            left_at: None,
            recording: false,
            scope: Scope::ThisGateway,
        }
    }

    /// The position of what is recorded next.
    pub(super) fn head(&self) -> u64 {
        self.tail + self.entries.len() as u64
    }

    pub(super) fn watchers(&self) -> usize {
        self.watchers
    }

    pub(super) fn scope(&self) -> Scope {
        self.scope
    }

    /// One more watcher, from now on or from a position of this log's. `None`: there are as many as may be. From when this returns on
    /// everything is to be recorded.
    pub(super) fn enter(&mut self, resume: Option<u64>) -> Option<Beginning> {
        if self.watchers >= self.bounds.watchers_max {
            return None;
        }
        let kept = self.tail..=self.head();
        let resumed = resume.filter(|position| self.recording && kept.contains(position));
        self.watchers += 1;
        self.left_at = None;
        self.recording = true;
        Some(Beginning {
            position: resumed.unwrap_or_else(|| self.head()),
            resumed: resumed.is_some(),
            scope: self.scope,
        })
    }

    /// One watcher less.
    pub(super) fn leave(&mut self, now: Instant) {
        self.watchers -= 1;
        if self.watchers == 0 {
            self.left_at = Some(now);
        }
    }

    /// Records what happened. Whether anything is to be recorded after it: for long enough nobody watches.
    pub(super) fn record(&mut self, recorded: Recorded, now: Instant) -> bool {
        let window = self.bounds.resume_window;
        if self.recording && self.left_at.is_some_and(|left_at| now >= left_at + window) {
            self.stop();
        }
        if self.recording {
            self.bytes += bytes(&recorded);
            self.entries.push_back(recorded);
            while self.entries.len() > self.bounds.entries_max || self.bytes > self.bounds.bytes_max {
                let Some(oldest) = self.entries.pop_front() else { break };
                self.bytes -= bytes(&oldest);
                self.tail += 1;
            }
        }
        self.recording
    }

    /// Changes whose writes are heard of, and records why those who watch are to look anew.
    pub(super) fn rescope(&mut self, scope: Scope, gap: Gap, now: Instant) -> bool {
        self.scope = scope;
        self.record(Recorded::Gap(gap), now)
    }

    /// What concerns a watcher from a position on, among the next `limit` entries.
    pub(super) fn read(&self, position: u64, filter: &Filter, limit: usize) -> Read {
        let Some(skipped) = position.checked_sub(self.tail) else {
            return Read::Behind {
                position: self.head(),
                scope: self.scope,
            };
        };
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX).min(self.entries.len());
        let looked_at = self.entries.range(skipped..).take(limit);
        let numbered = (position + 1..).zip(looked_at);
        let mut end = position;
        let found = numbered
            .inspect(|(behind, _)| end = *behind)
            .filter(|(_, recorded)| filter.concerns(recorded))
            .map(|(behind, recorded)| (behind, recorded.clone()))
            .collect();
        Read::Found { found, position: end }
    }

    /// Forgets everything: no position from before is one of this log's any more.
    fn stop(&mut self) {
        self.tail = self.head() + 1;
        self.entries = VecDeque::new();
        self.bytes = 0;
        self.left_at = None;
        self.recording = false;
    }
}

fn bytes(recorded: &Recorded) -> usize {
    let names = match recorded {
        Recorded::Change(change) => change.key.bytes(),
        Recorded::Gap(gap) => gap
            .below
            .as_ref()
            .map_or(0, |below| below.namespace.len() + below.prefix.len()),
    };
    names + ENTRY_OVERHEAD_BYTES
}
