//! Writes accepted and not yet in the store: the write-behind queue.
//!
//! Limits first: entries and bytes over the whole queue (`budget`), one pending write per key (`pending`), one batch in flight
//! per worker (`drain`), so that much beyond the bytes bound is in memory at most. Then the way of a write: [`Queue::admit`]
//! claims room and may wait; [`Queue::accept`] makes it visible and cannot fail; between the two its caller makes it as durable as
//! it must be, for what is visible may not vanish. A worker commits it and forgets it. Owns all of that; does not own stamping,
//! caches or what a caller is told (the gateway), nor the meaning of a store's errors (the store). Invariants: an accepted write
//! leaves only when the store holds it or something newer, or when it is a dead letter; the higher version always stands.
//!
//! Nothing points up: what did not make it into the store comes out of a channel, as [`Dropped`].

mod bisect;
mod budget;
mod config;
mod drain;
pub mod journal;
mod pending;
#[cfg(test)]
mod tests;

pub use self::{budget::Permit, config::Config};

use std::{
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use self::{
    budget::{Budget, NoPermit},
    drain::Worker,
    pending::{Offered, Pending},
};
use crate::{
    clock::Clock,
    error::{Error, ErrorKind},
    model::{Entry, Key, Timestamp, Version, Write},
    namespace::QueueFull,
    store::Store,
    telemetry::{QueueMetrics, StoreMetrics},
};

/// How many [`Dropped`] may wait for the gateway before the drain waits for it.
const DROPPED_MAX: usize = 1024;

/// When to come back to a full queue whose store takes writes: the next commit makes room.
const RETRY_AFTER: Duration = Duration::from_millis(250);

/// The answer to a write that asks for room.
#[derive(Debug)]
#[must_use = "a permit that is dropped gives its room back"]
pub enum Admission {
    /// There is room, and it is claimed.
    Granted(Permit),
    /// There is none, and the namespace wants the write to go through to the store.
    WriteThrough,
}

/// An accepted write that did not make it into the store. Copies of this version are to be removed from the caches, where they still
/// stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// Its key.
    pub key: Key,
    /// Its version.
    pub version: Version,
    /// What became of it.
    pub why: DropReason,
}

/// What became of a write that did not make it into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// The store holds something newer.
    Superseded {
        /// The version that stands there.
        standing: Version,
    },
    /// The store refuses it for good; the dead-letter table has it.
    DeadLettered,
}

/// How full the queue is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStats {
    /// Pending writes.
    pub entries: usize,
    /// The bytes that they are charged.
    pub bytes: usize,
    /// How long the oldest of them has been pending; zero when there is none.
    pub oldest_age: Duration,
}

/// What a closed queue has not drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// Writes admitted that are not in the store.
    pub entries: usize,
    /// The bytes that they are charged.
    pub bytes: usize,
}

/// A queue that runs.
pub struct Started {
    /// Its handle.
    pub queue: Queue,
    /// What did not make it into the store. The drain waits for whoever reads this; it goes on without when the receiver is dropped.
    pub dropped: mpsc::Receiver<Dropped>,
    /// The drain workers. None ends before it is told to; one that does is a fault of the gateway.
    pub workers: Vec<JoinHandle<()>>,
}

/// A write's way into the queue, from before its stamp until it is accepted or given up.
#[must_use = "dropping it before the write is accepted lets an older write in after a newer one"]
pub struct Passage {
    shared: Arc<Shared>,
    key: Key,
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.shared.shard(&self.key).pending.lock().leave(&self.key);
    }
}

/// A handle on the queue. Cheap to clone; usable from any thread.
#[derive(Clone)]
pub struct Queue {
    shared: Arc<Shared>,
}

/// What the handles and the drain workers share.
struct Shared {
    /// One per worker.
    shards: Box<[Shard]>,
    hasher: RandomState,
    budget: Arc<Budget>,
    clock: Arc<Clock>,
    metrics: QueueMetrics,
    /// Cancelled when the queue is closed: ends the waits of the workers.
    closing: CancellationToken,
    /// How many workers have the store refuse or not answer.
    failing: AtomicUsize,
    retry_backoff_max: Duration,
}

struct Shard {
    pending: Mutex<Pending<Permit>>,
    /// Told when its worker may have something to do sooner than it thinks.
    changed: Notify,
}

impl Queue {
    /// Starts a queue with its drain workers on the current runtime. They end when `stop` is cancelled, at once: a commit under way is
    /// cut off, and what is pending then is lost to this process. So first [`Queue::close`] and await [`Queue::drained`].
    pub fn start(
        config: &Config,
        store: &Store,
        clock: Arc<Clock>,
        metrics: QueueMetrics,
        store_metrics: &StoreMetrics,
        stop: &CancellationToken,
    ) -> Started {
        let workers = config.drain_workers.get().min(store.writers_max()).max(1);
        let shared = Arc::new(Shared {
            shards: (0..workers).map(|_| Shard::new()).collect(),
            hasher: RandomState::default(),
            budget: Arc::new(Budget::new(
                config.entries_max.get(),
                config.bytes_max.get(),
                config.pressure,
            )),
            clock,
            metrics,
            closing: CancellationToken::new(),
            failing: AtomicUsize::new(0),
            retry_backoff_max: config.retry_backoff_max,
        });
        let (sender, dropped) = mpsc::channel(DROPPED_MAX);
        let mut tasks = Vec::new();
        for index in 0..workers {
            let worker = Worker::new(
                Arc::clone(&shared),
                index,
                store.session(),
                sender.clone(),
                config,
                store_metrics,
            );
            let stop = stop.clone();
            tasks.push(tokio::spawn(async move {
                stop.run_until_cancelled(worker.run()).await;
            }));
        }
        Started {
            queue: Queue { shared },
            dropped,
            workers: tasks,
        }
    }

    /// Claims room for a write of `weight` bytes ([`Write::weight`]). Where there is none, does as `full` says. Cancel-safe: who stops
    /// waiting has claimed nothing.
    ///
    /// # Errors
    /// All of them say that nothing was applied. [`ErrorKind::Overloaded`]: full, and `full` says to refuse.
    /// [`ErrorKind::Timeout`]: full until `deadline`. [`ErrorKind::Unavailable`]: closed.
    pub async fn admit(&self, weight: usize, full: QueueFull, deadline: Instant) -> Result<Admission, Error> {
        match self.shared.budget.try_admit(weight) {
            Ok(permit) => return Ok(Admission::Granted(permit)),
            Err(NoPermit::Closed) => return Err(closed()),
            Err(NoPermit::Full) => self.shared.metrics.full.inc(),
        };
        match full {
            QueueFull::WriteThrough => Ok(Admission::WriteThrough),
            QueueFull::Reject => Err(
                Error::new(ErrorKind::Overloaded, "the queue of write-behind writes is full")
                    .retry_after(self.retry_after()),
            ),
            QueueFull::Wait => {
                let waiting = self.shared.budget.line_up();
                self.shared.wake_all();
                match timeout_at(deadline, waiting.admit(weight)).await {
                    Ok(Ok(permit)) => Ok(Admission::Granted(permit)),
                    Ok(Err(_)) => Err(closed()),
                    Err(_) => Err(Error::new(
                        ErrorKind::Timeout,
                        "the queue of write-behind writes stayed full until the deadline",
                    )),
                }
            }
        }
    }

    /// A passage for a write of `key`, which must be had before the write is stamped: from now on a version that the store comes to
    /// hold keeps older ones out of the queue, so that a write that is slow on its way cannot be shown after a newer one has left.
    pub fn enter(&self, key: &Key) -> Passage {
        self.shared.shard(key).pending.lock().enter(key);
        Passage {
            shared: Arc::clone(&self.shared),
            key: key.clone(),
        }
    }

    /// Accepts an admitted write: visible to [`Queue::pending`] when this returns, and on its way to the store, once `write_delay`
    /// has passed. `false`: superseded at once, for a write at least as new is pending, or was stored since the passage was had.
    pub fn accept(&self, write: Write, permit: Permit, passage: Passage, write_delay: Duration) -> bool {
        debug_assert!(write.key == passage.key, "a passage is for one key");
        let shared = &self.shared;
        let shard = shared.shard(&write.key);
        let now = shared.clock.now();
        let offered = shared.change(shard, |pending| pending.offer(write, permit, now, write_delay));
        if shared.is_hurried() {
            shard.changed.notify_one();
        }
        shared.metrics.accepted.inc();
        if let Offered::Coalesced(_) = offered {
            shared.metrics.coalesced.inc();
        }
        !matches!(offered, Offered::Refused(_))
    }

    /// The newest accepted write of a key that the store is not known to have.
    pub fn pending(&self, key: &Key) -> Option<Entry> {
        self.shared.shard(key).pending.lock().get(key)
    }

    /// Tells that the store holds `version` of a key, or something newer: a pending write at or below it has nothing left to do.
    pub fn overtake(&self, key: &Key, version: Version) {
        let shared = &self.shared;
        drop(shared.change(shared.shard(key), |pending| pending.overtake(key, version)));
    }

    /// How full the queue is.
    pub fn stats(&self) -> QueueStats {
        let mut stats = QueueStats {
            entries: 0,
            bytes: 0,
            oldest_age: Duration::ZERO,
        };
        let mut oldest: Option<Timestamp> = None;
        for shard in &self.shared.shards {
            let pending = shard.pending.lock();
            stats.entries += pending.entries();
            stats.bytes += pending.bytes();
            oldest = oldest.into_iter().chain(pending.oldest()).min();
        }
        if let Some(oldest) = oldest {
            stats.oldest_age = self.shared.clock.now().since(oldest);
        }
        stats
    }

    /// Ends admission, for waiters too, and hurries the drain. A write that was admitted may still be accepted.
    pub fn close(&self) {
        self.shared.budget.close();
        self.shared.closing.cancel();
    }

    /// Waits, once closed, until everything that was admitted has left the queue, or until `deadline`; says what is left. Cancel-safe.
    pub async fn drained(&self, deadline: Instant) -> Left {
        // What is left says whether it was in time.
        let _in_time = timeout_at(deadline, self.shared.budget.emptied()).await;
        let (entries, bytes) = self.shared.budget.claimed();
        Left { entries, bytes }
    }

    /// When to come back to a full queue: room comes with the next commit.
    fn retry_after(&self) -> Duration {
        if self.shared.failing.load(Ordering::Relaxed) == 0 {
            RETRY_AFTER
        } else {
            self.shared.retry_backoff_max
        }
    }
}

impl Shared {
    fn shard(&self, key: &Key) -> &Shard {
        // Below the number of shards, so it fits.
        let index = self.hasher.hash_one(key) % self.shards.len() as u64;
        &self.shards[index as usize]
    }

    /// Changes a shard under its lock, and wakes its worker when something is due sooner than it was.
    fn change<R>(&self, shard: &Shard, change: impl FnOnce(&mut Pending<Permit>) -> R) -> R {
        let (before, result, after) = {
            let mut pending = shard.pending.lock();
            let before = pending.next_due();
            let result = change(&mut pending);
            (before, result, pending.next_due())
        };
        if after.is_some_and(|due| before.is_none_or(|before| due < before)) {
            shard.changed.notify_one();
        }
        result
    }

    /// Whether delays are ignored.
    fn is_hurried(&self) -> bool {
        self.budget.is_closed() || self.budget.is_pressed()
    }

    fn wake_all(&self) {
        for shard in &self.shards {
            shard.changed.notify_one();
        }
    }
}

impl Shard {
    fn new() -> Shard {
        Shard {
            pending: Mutex::new(Pending::new()),
            changed: Notify::new(),
        }
    }
}

fn closed() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "the gateway is shutting down and takes no write-behind writes",
    )
}
