//! The algorithm: get and write, in plain steps. The only module that knows both the caches and the queue.
//!
//! Owns the order in which tiers are asked (`read`, `load`) and told (`write`), what is shared with other replicas (`shared`, `sharing`,
//! `coherence`, `epoch`, `mend`), and stamping. Does not own how a tier works: each refuses what is
//! not newer, so every overlay of two tiers here is a maximum by version and nothing else orders anything.
//!
//! Invariants, which make a late landing of an older copy impossible within the process:
//! - a reader leaves its token in L1 before it looks at the slower tiers, a writer before it stamps; a writer makes its write visible in the
//!   slower tiers (the store or pending, and Redis) before it detaches the key's flight and lands in L1, which clears every token;
//! - pending is read before the store, so an entry that drains in between is found in one of them.
//!
//! Cancellation: a read's future may be dropped at any await; what it asks the store goes on in a task of its own. A write's future may
//! be dropped until it is admitted (nothing happened); from then on it goes on in a task of its own, and only the answer is lost.

mod batch;
mod batch_read;
mod coherence;
mod decide;
mod epoch;
mod freshness;
pub mod invalidate;
pub mod letters;
mod load;
mod mend;
mod outlive;
mod persisted;
#[cfg(feature = "planted-faults")]
mod planted;
mod read;
mod repairs;
pub mod requests;
pub mod scan;
mod shared;
mod sharing;
pub mod stats;
pub mod steer;
#[cfg(test)]
pub(crate) mod tests;
pub mod warm;
pub mod watch;
mod write;

pub use self::{
    freshness::{Freshness, ReadOptions},
    requests::Requests,
    sharing::Sharing,
    watch::Watches,
};
pub use crate::queue::journal::State as JournalState;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::Semaphore,
    task::JoinError,
    time::{Instant, timeout_at},
};
use tokio_util::task::TaskTracker;

use crate::{
    cache::{
        Copy, Loaded,
        flight::Flights,
        lifetime,
        memory::Memory,
        redis::{self, Hold, RedisCache},
    },
    clock::Clock,
    error::{Error, ErrorKind},
    model::{ChangeKind, Condition, Entry, Key, RequestId, Source, Tags, Timestamp, Version, Write},
    namespace::{Namespaces, WriteMode},
    queue::{DropReason, Dropped, Notice, Queue, journal::Lane},
    store::{Store, commit::GroupCommit, decisions::GroupDecide, load::GroupLoad, ranges::Ranges},
    telemetry::{CacheMetrics, calls::ThreadCounters},
};

/// How many background renewals of cached copies may run at a time: more would compete with the reads that wait.
const REFRESHES_MAX: usize = 64;

/// Which copies may answer a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadConsistency {
    /// Any tier.
    Cached,
    /// Every tier but L1.
    Shared,
    /// The store, overlaid with this replica's pending writes.
    Store,
}

/// What a write rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Committed in the store.
    Store,
    /// On disk, in this gateway's journal.
    Journal,
    /// In this process's memory.
    Memory,
}

/// A read's answer.
#[derive(Debug, Clone)]
pub struct Found {
    /// The entry, if there is a live record.
    pub entry: Option<Entry>,
    /// Who knew.
    pub source: Source,
    /// How long ago the copy was known to be current.
    pub age: Duration,
    /// Whether something newer may stand in the store, which could not be asked.
    pub stale: bool,
}

/// A checked write.
#[derive(Debug)]
pub struct WriteRequest {
    /// What is written.
    pub key: Key,
    /// The value; `None` deletes.
    pub value: Option<Bytes>,
    /// What the record is tagged with; none for a delete.
    pub tags: Tags,
    /// How long the record exists.
    pub ttl: Option<Duration>,
    /// When to answer; `None`: as the namespace is configured.
    pub mode: Option<WriteMode>,
    /// What must hold of what stands. Then the store decides, and `mode` is not [`WriteMode::Behind`].
    pub condition: Option<Condition>,
    /// The id under which it is written once.
    pub request: Option<RequestId>,
    /// Whether a write-behind write is answered only once the store has it.
    pub await_persisted: bool,
}

/// A checked change of a record's expiry.
#[derive(Debug)]
pub struct TouchRequest {
    /// Whose.
    pub key: Key,
    /// How long the record exists from now on; `None`: for ever.
    pub ttl: Option<Duration>,
    /// The id under which it is done once.
    pub request: Option<RequestId>,
}

/// A checked increment.
#[derive(Debug)]
pub struct IncrementRequest {
    /// The counter.
    pub key: Key,
    /// What is added: not 0.
    pub delta: i64,
    /// How long a counter that is created exists.
    pub ttl: Option<Duration>,
    /// The id under which it is counted once; `None`: one is made up.
    pub request: Option<RequestId>,
}

/// The answer to a touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touched {
    /// The version that it got.
    pub version: Version,
    /// When the record ceases to exist.
    pub expires_at: Option<Timestamp>,
    /// Whether an earlier call did it.
    pub deduplicated: bool,
}

/// The answer to an increment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// What the counter was then.
    pub value: i64,
    /// The version that it got.
    pub version: Version,
    /// When the counter ceases to exist.
    pub expires_at: Option<Timestamp>,
    /// Whether an earlier call did it.
    pub deduplicated: bool,
}

/// A write's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// The version that it got.
    pub version: Version,
    /// What it rests on.
    pub durability: Durability,
    /// Whether an earlier call with the same request id wrote it.
    pub deduplicated: bool,
}

/// Permits of background renewals of cached copies.
#[derive(Debug, Clone)]
pub struct Refreshes(Arc<Semaphore>);

impl Default for Refreshes {
    fn default() -> Refreshes {
        Refreshes(Arc::new(Semaphore::new(REFRESHES_MAX)))
    }
}

/// What the gateways of all serving threads share.
#[derive(Clone)]
pub struct GatewayParts {
    /// Time and stamps.
    pub clock: Arc<Clock>,
    /// The settings of namespaces.
    pub namespaces: Arc<Namespaces>,
    /// L1.
    pub memory: Arc<Memory>,
    /// The loads under way.
    pub flights: Arc<Flights>,
    /// Write-behind.
    pub queue: Queue,
    /// Write-through.
    pub commits: GroupCommit,
    /// What the store decides.
    pub decisions: GroupDecide,
    /// Which request ids are known.
    pub requests: Arc<Requests>,
    /// Misses.
    pub loads: GroupLoad,
    /// Scans.
    pub ranges: Ranges,
    /// What operators ask for.
    pub store: Store,
    /// L2, if there is one: its settings, and where it is.
    pub redis: Option<(redis::Config, redis::Server)>,
    /// What is known of what the replicas share.
    pub sharing: Arc<Sharing>,
    /// What changes, for those who watch.
    pub watches: Arc<Watches>,
    /// What the caches count.
    pub metrics: CacheMetrics,
    /// Permits of background renewals.
    pub refreshes: Refreshes,
    /// How long a load that a read leads may take: it serves those who join it, so it does not end with its first caller.
    pub load_wait: Duration,
}

/// The gateway of one thread: a cheap handle.
#[derive(Clone)]
pub struct Gateway {
    inner: Arc<Inner>,
}

struct Inner {
    parts: GatewayParts,
    /// This thread's own connection.
    redis: Option<RedisCache>,
    /// This thread's own place in the journal's wake-ups.
    lane: Lane,
    counters: Arc<ThreadCounters>,
    /// Loads and admitted writes, which outlive their calls.
    tasks: TaskTracker,
}

impl Gateway {
    /// A gateway whose tasks and Redis connection live on the current runtime.
    pub fn on_this_thread(parts: &GatewayParts, counters: Arc<ThreadCounters>) -> Gateway {
        let redis = parts.redis.as_ref();
        let redis = redis.map(|(config, server)| {
            let (epochs, origin) = (Arc::clone(&parts.sharing.epochs), parts.sharing.origin);
            RedisCache::start(config, server, epochs, origin, parts.metrics.clone())
        });
        Gateway {
            inner: Arc::new(Inner {
                parts: parts.clone(),
                redis,
                lane: parts.queue.lane(),
                counters,
                tasks: TaskTracker::new(),
            }),
        }
    }

    /// Reads a key.
    ///
    /// # Errors
    /// `Unavailable` when only the store could answer and cannot, `NotVisible` when the version asked for was waited for in vain,
    /// `TooNew` when no gateway can have stamped it, `Overloaded` when too many loads wait, `Timeout`.
    pub async fn get(&self, key: &Key, options: impl Into<ReadOptions>, deadline: Instant) -> Result<Found, Error> {
        let (options, started) = (options.into(), Instant::now());
        let found = match self.find_at_once(key, options) {
            Some(found) => Ok(found),
            // In a place of its own: the state of everything that a look further down may wait for is large, and moved with the call.
            None => Box::pin(self.find(key, options, deadline)).await,
        };
        self.count_read(key, options.consistency, &found, started);
        found
    }

    /// What L1 answers, where it may.
    fn find_at_once(&self, key: &Key, options: ReadOptions) -> Option<Found> {
        if options.consistency != ReadConsistency::Cached {
            return None;
        }
        let demand = self.demand(options.freshness);
        let loaded = self.get_from_memory(key, demand)?;
        Some(found_at(loaded, demand.since))
    }

    async fn find(&self, key: &Key, options: ReadOptions, deadline: Instant) -> Result<Found, Error> {
        let answer = timeout_at(deadline, self.answer(key, options, deadline)).await;
        answer
            .unwrap_or_else(|_| Err(no_tier_answered()))
            .map(|loaded| self.found(loaded))
    }

    /// What a caller is told of what was found.
    fn found(&self, loaded: Loaded) -> Found {
        found_at(loaded, self.parts().clock.now())
    }

    /// Does in the caches what a write that leaves the queue asks for.
    pub async fn heed(&self, notice: Notice) {
        match notice {
            Notice::Dropped(Dropped { key, version, why }) => {
                self.forget(&key, version).await;
                self.note_dropped(&key, version, why);
            }
            Notice::Confirmed(write) => self.publish_recovered(&write).await,
            Notice::Unpublished(writes) => self.tell_of(writes).await,
        }
    }

    /// Removes a version from the caches, where it still stands: the store did not take it. From the slower tier to the faster, as a
    /// write lands: a load that has found it loses its token, and one that begins after the detachment no longer finds it.
    async fn forget(&self, key: &Key, version: Version) {
        self.withdraw(key, version).await;
        self.parts().flights.detach(key);
        self.parts().memory.drop_version(key, version);
    }

    /// Tells watchers of a write that the store did not take; of one that lost to a newer write it is that one, for whoever wrote that may not
    /// have come to tell. That L1 knows of it says nothing: a read may have put it there.
    fn note_dropped(&self, key: &Key, version: Version, why: DropReason) {
        let doubtful = match why {
            DropReason::Superseded { standing } => standing,
            DropReason::DeadLettered => version,
        };
        self.parts().watches.note(key, doubtful, ChangeKind::Invalidate);
    }

    /// Offers a write that an earlier process had accepted to Redis, now that the store has it; then it leaves the queue. Until then this
    /// replica's reads see it there, and not what is older in Redis; and afterwards, where Redis could not be told, by what L1 knows.
    async fn publish_recovered(&self, write: &Write) {
        let (key, version) = (&write.key, write.entry.version);
        let token = self.parts().memory.leave_token(key);
        let copy = self.copy_of(key, Some(write.entry.clone()), self.parts().clock.now());
        match self.publish(write, &copy, Hold::Nothing).await {
            Some(_) => self.told(key, version),
            None => {
                self.parts().flights.detach(key);
                token.land_write(copy);
            }
        }
        self.parts().queue.published(key, version);
    }

    /// Waits until the tasks that outlive their calls have ended. No call may begin any more.
    pub async fn finish(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// A copy of an entry, current at `loaded_at`. That of a record that expires soon says so only for as long as an absence is cached.
    fn copy_of(&self, key: &Key, entry: Option<Entry>, loaded_at: Timestamp) -> Copy {
        let settings = self.parts().namespaces.get(key.namespace());
        let live = entry
            .as_ref()
            .is_some_and(|entry| entry.is_live(self.parts().clock.now()));
        let expires_at = entry.as_ref().and_then(|entry| entry.expires_at).filter(|_| live);
        let mut copy = Copy::new(entry, loaded_at, lifetime(settings.lifetime_of(live)));
        if let Some(expires_at) = expires_at {
            copy.fresh_until = copy.fresh_until.min(expires_at.after(settings.absence_lifetime));
        }
        copy
    }

    /// Whether this thread's connection to Redis is up; `None` where no Redis is configured.
    pub fn redis_is_up(&self) -> Option<bool> {
        self.inner.redis.as_ref().map(RedisCache::is_up)
    }

    /// What the journal can do.
    pub fn journal_state(&self) -> JournalState {
        self.parts().queue.journal_state()
    }

    fn parts(&self) -> &GatewayParts {
        &self.inner.parts
    }
}

fn found_at(loaded: Loaded, now: Timestamp) -> Found {
    let Loaded { copy, source, stale } = loaded;
    Found {
        entry: copy.entry.filter(|entry| entry.is_live(now)),
        source,
        age: now.since(copy.loaded_at),
        stale,
    }
}

fn no_tier_answered() -> Error {
    Error::new(ErrorKind::Timeout, "the deadline passed before a tier answered")
}

fn stopped() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "the gateway was stopped in the middle of the call",
    )
}

fn died(error: JoinError) -> Error {
    if error.is_cancelled() {
        return stopped();
    }
    failed().because(error)
}

fn failed() -> Error {
    Error::new(ErrorKind::Internal, "the gateway failed in the middle of the call")
}
