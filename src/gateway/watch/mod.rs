//! Watching: who wants to know is told what changes, in the order in which it became visible on this gateway.
//!
//! Owns the log of changes of this process, what is recorded in it, and what a watcher is told. Does not own how a message travels (`rpc::watch`), nor
//! the channel on which other gateways tell what they wrote (`coherence` heeds it, and records it here). Limits: watchers; the entries and bytes of the
//! log, which all of them share; the records that one watcher has looked up at a time, and those that all have beyond the first of each.
//!
//! Invariants:
//! - A write is recorded after it can be read here and before its caller is answered; what another gateway tells, after L1 has heeded it. So who
//!   begins a watch and then reads misses nothing, and no acknowledged write is passed over.
//! - Where something may have been missed the log says so at that place, and every watcher that comes by is told to look anew.
//! - A watcher is a position in the log, and what it has taken to tell next. One that nobody asks costs nothing.
//! - While nobody watches, and nobody did within the resume window, a write pays one look at a flag.

mod log;
mod recall;
mod switch;
#[cfg(test)]
mod tests;
mod token;
mod watcher;

/// The primitives of `switch`, which a model checker has others for.
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering, fence};
}

pub use self::watcher::Watcher;

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, Semaphore},
    time::Instant,
};

use self::{
    log::{Beginning, Bounds, Filter, Log, Read},
    recall::Recalls,
    switch::Switch,
    token::Place,
};
use super::Gateway;
use crate::{
    error::{Error, ErrorKind},
    model::{ChangeKind, Entry, Key, Version},
    settings::{DAY, Unfit, count, within},
    telemetry::watch::{RescanLabels, WatchMetrics},
};

/// How many entries of the log are looked at in one go: so long may a watcher hold up who records.
const LOOKED_AT_MAX: usize = 256;

/// How many records one watcher has looked up at a time, each of which is held until it is told.
const LOOKUPS_MAX: usize = 8;

/// How many all watchers have looked up at a time, beyond the one that each may have in any case.
const LOOKUPS_AHEAD_MAX: usize = 64;

/// How watches are bounded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How many may watch at a time; one more is refused. Default: 1,000. Each looks at each change, so this bounds what a change costs.
    pub watchers_max: NonZeroUsize,
    /// How many changes are kept for those who read more slowly than they come, and for those who come back. Default: 65,536.
    pub log_entries_max: NonZeroUsize,
    /// How many bytes they may take. Default: 16 MiB.
    pub log_bytes_max: NonZeroUsize,
    /// For how long changes are recorded when nobody watches any more, so that a watch can be resumed. Default: 5 min. Until then each write pays for
    /// being recorded.
    #[serde(with = "humantime_serde")]
    pub resume_window: Duration,
    /// After which time without a message a watcher is sent one that brings nothing but a younger token. Default: 10 s.
    #[serde(with = "humantime_serde")]
    pub progress_interval: Duration,
    /// How long a watcher may take nothing of what there is for it before it is cut off. Default: 5 min.
    #[serde(with = "humantime_serde")]
    pub unread_max: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            watchers_max: count::<1_000>(),
            log_entries_max: count::<65_536>(),
            log_bytes_max: count::<{ 16 * 1024 * 1024 }>(),
            resume_window: Duration::from_secs(300),
            progress_interval: Duration::from_secs(10),
            unread_max: Duration::from_secs(300),
        }
    }
}

impl Config {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn validate(&self) -> Result<(), Unfit> {
        within("resume_window", self.resume_window, DAY)?;
        within("progress_interval", self.progress_interval, DAY)?;
        within("unread_max", self.unread_max, DAY)
    }
}

/// A checked request to watch.
#[derive(Debug)]
pub struct WatchRequest {
    /// Whose keys.
    pub namespace: String,
    /// What they begin with; may be empty.
    pub prefix: String,
    /// Where to go on, as the caller sent it.
    pub resume_token: Option<String>,
    /// Whether records are looked up.
    pub with_values: bool,
}

/// Whose writes are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Those of all gateways that share a Redis.
    AllGateways,
    /// Those of this one.
    ThisGateway,
}

/// Why changes may have been missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RescanReason {
    /// The watcher read too slowly.
    FellBehind,
    /// Its token is of another log, or of what was discarded.
    TokenExpired,
    /// Redis was lost.
    RedisLost,
    /// It is back.
    RedisBack,
    /// The copies in the caches were left behind.
    EpochMoved,
    /// So were those of a namespace, or of a prefix.
    Invalidated,
}

impl RescanReason {
    /// Its name as a metric's label.
    fn label(self) -> &'static str {
        match self {
            RescanReason::FellBehind => "fell_behind",
            RescanReason::TokenExpired => "token_expired",
            RescanReason::RedisLost => "redis_lost",
            RescanReason::RedisBack => "redis_back",
            RescanReason::EpochMoved => "epoch_moved",
            RescanReason::Invalidated => "invalidated",
        }
    }
}

/// What a watcher is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Where a watch goes on that is begun again after this.
    pub resume_token: String,
    /// What it is.
    pub event: Event,
}

/// Something to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The watch began.
    Started {
        /// Whose writes are told.
        scope: Scope,
        /// Whether it goes on where its token says.
        resumed: bool,
    },
    /// A key changed.
    Changed {
        /// The key.
        key: Key,
        /// The version in question, if there is one.
        version: Option<Version>,
        /// What became of the key.
        kind: ChangeKind,
        /// The record, if it was asked for and is there.
        entry: Option<Entry>,
    },
    /// Changes may have been missed.
    Rescan {
        /// Why.
        reason: RescanReason,
        /// Whose writes are told from now on.
        scope: Scope,
    },
    /// Nothing but its token.
    Progress,
}

/// What is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Recorded {
    Change(Change),
    Gap(Gap),
}

/// A change of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    key: Key,
    version: Option<Version>,
    kind: ChangeKind,
}

/// Something may have happened that is not recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Gap {
    reason: RescanReason,
    /// To which keys. `None`: to any.
    below: Option<Box<Filter>>,
    /// Whose writes are recorded from here on.
    scope: Scope,
}

/// The log of this process, and who watches it.
#[derive(Debug)]
pub struct Watches {
    config: Config,
    metrics: WatchMetrics,
    /// Which log it is: no other process has the same, but by a chance of one in 2^64.
    identity: u64,
    switch: Switch,
    log: RwLock<Log>,
    /// Wakes those who have read everything.
    grown: Notify,
    /// Room for what is looked up before it can be told.
    looked_up_ahead: Arc<Semaphore>,
    recalls: Recalls,
}

impl Watches {
    /// An empty log that nobody watches.
    pub fn new(config: &Config, metrics: WatchMetrics) -> Watches {
        let bounds = Bounds {
            entries_max: config.log_entries_max.get(),
            bytes_max: config.log_bytes_max.get(),
            watchers_max: config.watchers_max.get(),
            resume_window: config.resume_window,
        };
        Watches {
            config: config.clone(),
            metrics,
            identity: rand::random(),
            switch: Switch::off(),
            log: RwLock::new(Log::new(bounds)),
            grown: Notify::new(),
            looked_up_ahead: Arc::new(Semaphore::new(LOOKUPS_AHEAD_MAX)),
            recalls: Recalls::default(),
        }
    }

    /// How many watch.
    pub fn watching(&self) -> usize {
        self.log.read().watchers()
    }

    /// How long a watcher may take nothing of what there is for it.
    pub fn unread_max(&self) -> Duration {
        self.config.unread_max
    }

    /// A change of a key can be seen here from now on. Of a write: before its caller is answered.
    #[inline]
    pub(super) fn note(&self, key: &Key, version: impl Into<Option<Version>>, kind: ChangeKind) {
        if self.switch.is_on() {
            let (key, version) = (key.clone(), version.into());
            self.record(Recorded::Change(Change { key, version, kind }));
        }
    }

    /// What is known of these keys may not hold any more; `None`: of any.
    pub(super) fn note_gap(&self, reason: RescanReason, below: Option<(&str, &str)>) {
        if !self.switch.is_on() {
            return;
        }
        let filter = |(namespace, prefix): (&str, &str)| Filter {
            namespace: namespace.to_owned(),
            prefix: prefix.to_owned(),
        };
        let below = below.map(filter).map(Box::new);
        self.change(|log| {
            let scope = log.scope();
            let gap = Gap { reason, below, scope };
            log.record(Recorded::Gap(gap), Instant::now())
        });
    }

    /// From here on every message of other gateways is heard; or none may be.
    pub(super) fn hear_all(&self, all: bool) {
        let (scope, reason) = if all {
            (Scope::AllGateways, RescanReason::RedisBack)
        } else {
            (Scope::ThisGateway, RescanReason::RedisLost)
        };
        let gap = Gap {
            reason,
            below: None,
            scope,
        };
        self.change(|log| log.rescope(scope, gap, Instant::now()));
    }

    #[cold]
    fn record(&self, recorded: Recorded) {
        self.change(|log| log.record(recorded, Instant::now()));
    }

    /// Records something, and wakes who waits for it. Nothing else turns the switch off: that is done under the lock, as turning it on is, or
    /// whoever enters in between would watch a log in which nothing is recorded.
    fn change(&self, record: impl FnOnce(&mut Log) -> bool) {
        let mut log = self.log.write();
        let records = record(&mut log);
        if !records {
            self.switch.turn_off();
        }
        // Whoever is woken reads it.
        drop(log);
        if records {
            self.grown.notify_waiters();
        }
    }

    /// One more watcher.
    fn enter(&self, resume: Option<Place>) -> Result<Beginning, Error> {
        let resume = resume.filter(|place| place.log == self.identity);
        let mut log = self.log.write();
        let beginning = log.enter(resume.map(|place| place.position)).ok_or_else(|| {
            let max = self.config.watchers_max;
            let message = format!("{max} watch this gateway, as many as may: come back later, or go to another one");
            Error::new(ErrorKind::Overloaded, message)
        })?;
        self.switch.turn_on();
        Ok(beginning)
    }

    fn leave(&self) {
        self.log.write().leave(Instant::now());
    }

    fn read(&self, position: u64, filter: &Filter) -> Read {
        self.log.read().read(position, filter, LOOKED_AT_MAX)
    }

    fn token(&self, filter: &Filter, position: u64) -> String {
        let place = Place {
            log: self.identity,
            position,
        };
        token::write(filter, place)
    }

    fn count(&self, event: &Event) {
        match event {
            Event::Changed { .. } => drop(self.metrics.changes_told.inc()),
            Event::Rescan { reason, .. } => {
                let labels = RescanLabels { reason: reason.label() };
                self.metrics.rescans.get_or_create(&labels).inc();
            }
            Event::Started { .. } | Event::Progress => {}
        }
    }
}

impl Gateway {
    /// Begins a watch: whatever is acknowledged from now on is told to it. Dropping it ends it.
    ///
    /// # Errors
    /// `Invalid` for a token that is none of this namespace and prefix, `Overloaded` when as many watch as may.
    pub fn watch(&self, request: WatchRequest) -> Result<Watcher, Error> {
        let WatchRequest {
            namespace,
            prefix,
            resume_token,
            with_values,
        } = request;
        let filter = Filter { namespace, prefix };
        let place = resume_token.map(|token| token::read(&filter, &token)).transpose()?;
        let beginning = self.parts().watches.enter(place)?;
        let asked_to_resume = place.is_some();
        Ok(Watcher::new(
            self.clone(),
            filter,
            with_values,
            beginning,
            asked_to_resume,
        ))
    }
}
