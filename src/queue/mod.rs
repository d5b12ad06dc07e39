//! Writes accepted and not yet in the store: the write-behind queue.
//!
//! Limits first: entries and bytes over the whole queue (`budget`), room in the [`journal`], one pending write per key (`pending`), one
//! batch in flight per worker (`drain`), so that much beyond the bytes bound is in memory at most. Then the way of a write:
//! [`Queue::admit`] claims room and may wait; [`Queue::append`] makes it durable; [`Queue::accept`] makes it visible and cannot fail.
//! A worker commits it and forgets it, and its record in the journal is released. What an earlier process had accepted is pending from the
//! start. Whoever must know when a write has left waits for it (`persisted`); operators pause the drain (`pause`) and look into it (`report`). Owns all of that; does not own stamping, caches or what a caller is told (the gateway), nor the meaning of a store's errors
//! (the store). Invariants: an accepted write leaves only when the store holds it or something newer, or when it is a dead letter; until
//! then its record is held, or that of a newer one of its key; the higher version always stands; a write with a request id leaves only when
//! the store has the id, too, and until then its own record is held.
//!
//! Nothing points up: what the caches must hear of comes out of a channel, as [`Notice`].

mod admission;
mod bisect;
mod budget;
mod config;
mod drain;
pub mod journal;
mod pause;
mod pending;
mod persisted;
#[cfg(feature = "planted-faults")]
mod planted;
mod report;
#[cfg(test)]
mod tests;

pub use self::{
    admission::{Admission, Claim, Held},
    config::Config,
    pending::{Fate, PendingEntry, PendingKey},
    report::{Doing, Failure, Report, WorkerReport},
};

use std::{
    collections::BTreeMap,
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use self::{
    budget::{Budget, NoPermit},
    drain::Worker,
    journal::{Journal, Lane, Record, State},
    pending::{Offered, Pending},
    report::Board,
};
use crate::{
    clock::Clock,
    error::{Error, ErrorKind},
    model::{Key, Timestamp, Version, Write, weight},
    namespace::{BehindDurability, QueueFull},
    store::Store,
    telemetry::{QueueMetrics, StoreMetrics},
};

/// How many [`Notice`]s may wait for the gateway before the drain waits for it.
const NOTICES_MAX: usize = 1024;

/// When to come back to a full queue whose store takes writes: the next commit makes room.
const RETRY_AFTER: Duration = Duration::from_millis(250);

/// Word of a write that leaves, for the caches' sake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// It did not make it into the store.
    Dropped(Dropped),
    /// It is one that an earlier process had accepted, and is in the store now: it may be published, and then is to be told
    /// to [`Queue::published`]. Until then it is pending.
    Confirmed(Write),
    /// The store has these versions, and the shared caches had no copies of them while they were pending: what is older may have got there
    /// meanwhile.
    Unpublished(Vec<(Key, Version)>),
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Pending writes, with those that a newer one of their key stands for, but whose request id the store does not have.
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
    /// How many of them rest on memory alone, and are lost with the process. The others are in the journal.
    pub lost: usize,
}

/// What a queue is made of.
pub struct Parts {
    /// Where writes go.
    pub store: Store,
    /// The time.
    pub clock: Arc<Clock>,
    /// What accepted writes rest on.
    pub journal: Journal,
    /// What an earlier process had accepted: of each key the newest, and older ones with a request id.
    pub recovered: Vec<(Write, Record)>,
    /// What is counted.
    pub metrics: QueueMetrics,
    /// What is counted about commits.
    pub store_metrics: StoreMetrics,
}

/// A queue that runs.
pub struct Started {
    /// Its handle.
    pub queue: Queue,
    /// What the caches must hear of. The drain waits for whoever reads this; it goes on without when the receiver is dropped.
    pub notices: mpsc::Receiver<Notice>,
    /// The drain workers. None ends before it is told to; one that does is a fault of the gateway.
    pub workers: Vec<JoinHandle<()>>,
}

/// A write's way into the queue, from before its stamp until it is accepted or given up.
#[must_use = "dropping it before the write is accepted lets an older write in after a newer one"]
pub struct Passage {
    shared: Arc<Shared>,
    key: Key,
    /// Its place among all passages of the key's shard.
    number: u64,
    published: bool,
}

impl Passage {
    /// The write will be accepted without a copy of it in the shared caches.
    pub fn unpublished(&mut self) {
        self.published = false;
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        let mut pending = self.shared.shard(&self.key).pending.lock();
        pending.leave(&self.key, self.number);
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
    journal: Journal,
    clock: Arc<Clock>,
    metrics: QueueMetrics,
    /// Cancelled when the queue is closed: ends the waits of the workers.
    closing: CancellationToken,
    /// How many workers have the store refuse or not answer.
    failing: AtomicUsize,
    /// How many writes have gone to the dead letters.
    dead_lettered: AtomicU64,
    /// How many wait for everything to leave.
    emptying: AtomicUsize,
    /// The namespaces whose drain is paused, and since when.
    paused: watch::Sender<BTreeMap<String, Timestamp>>,
    /// Held while that changes.
    steering: Mutex<()>,
    retry_backoff_max: Duration,
}

struct Shard {
    pending: Mutex<Pending<Held>>,
    /// Told when its worker may have something to do sooner than it thinks.
    changed: Notify,
    /// What its worker tells.
    board: Board,
}

impl Queue {
    /// Starts a queue with its drain workers on the current runtime. They end when `stop` is cancelled, at once: a commit under way is
    /// cut off. So first [`Queue::close`] and await [`Queue::drained`], and afterwards [`Queue::close_journal`].
    pub fn start(config: &Config, parts: Parts, stop: &CancellationToken) -> Started {
        let workers = config.drain_workers.get().min(parts.store.writers_max()).max(1);
        let now = parts.clock.now();
        let shared = Arc::new(Shared {
            shards: (0..workers).map(|_| Shard::new(now)).collect(),
            hasher: RandomState::default(),
            budget: Arc::new(Budget::new(
                config.entries_max.get(),
                config.bytes_max.get(),
                config.pressure,
            )),
            journal: parts.journal,
            clock: parts.clock,
            metrics: parts.metrics,
            closing: CancellationToken::new(),
            failing: AtomicUsize::new(0),
            dead_lettered: AtomicU64::new(0),
            emptying: AtomicUsize::new(0),
            paused: watch::Sender::default(),
            steering: Mutex::new(()),
            retry_backoff_max: config.retry_backoff_max,
        });
        for (write, record) in parts.recovered {
            shared.restore(write, record);
        }
        let (sender, notices) = mpsc::channel(NOTICES_MAX);
        let mut tasks = Vec::new();
        for index in 0..workers {
            let worker = Worker::new(
                Arc::clone(&shared),
                index,
                parts.store.session(),
                sender.clone(),
                config,
                &parts.store_metrics,
            );
            let stop = stop.clone();
            tasks.push(tokio::spawn(async move {
                stop.run_until_cancelled(worker.run()).await;
            }));
        }
        Started {
            queue: Queue { shared },
            notices,
            workers: tasks,
        }
    }

    /// A lane for the current thread, which is to append over it. Its task is spawned on the current runtime: call this there.
    pub fn lane(&self) -> Lane {
        self.shared.journal.lane()
    }

    /// Claims room for a write of a key with so many [`Write::content_bytes`]: in the queue, and in the journal if it is to rest on that. Where
    /// there is none, does as `full` says. Cancel-safe: who stops waiting has claimed nothing.
    ///
    /// A write that is to rest on memory rests on the journal where one that does is pending: a crash must not uncover that one.
    ///
    /// # Errors
    /// All of them say that nothing was applied. [`ErrorKind::Overloaded`]: full, and `full` says to refuse.
    /// [`ErrorKind::Timeout`]: full until `deadline`. [`ErrorKind::Unavailable`]: closed, or the journal has failed.
    /// [`ErrorKind::Rejected`]: larger than the journal takes.
    pub async fn admit(
        &self,
        key: &Key,
        content_bytes: usize,
        durability: BehindDurability,
        full: QueueFull,
        deadline: Instant,
    ) -> Result<Admission, Error> {
        let weight = weight(key, content_bytes);
        let journaled = durability == BehindDurability::Journal || self.is_journaled(key);
        let record_bytes = journaled.then(|| key.bytes() + content_bytes);
        match self.claim_at_once(weight, record_bytes) {
            Some(claim) => Ok(Admission::Granted(claim)),
            None => Box::pin(self.admit_or_wait(weight, record_bytes, full, deadline)).await,
        }
    }

    async fn admit_or_wait(
        &self,
        weight: usize,
        record_bytes: Option<usize>,
        full: QueueFull,
        deadline: Instant,
    ) -> Result<Admission, Error> {
        let shared = &self.shared;
        let message = match self.claim_unless_full(weight, record_bytes, deadline).await? {
            Ok(claim) => return Ok(Admission::Granted(claim)),
            Err(message) => message,
        };
        shared.metrics.full.inc();
        // Nothing is delayed, nor gathered, while somebody wants room.
        shared.wake_all();
        match full {
            QueueFull::WriteThrough => Ok(Admission::WriteThrough),
            QueueFull::Reject => Err(Error::new(ErrorKind::Overloaded, message).retry_after(self.retry_after())),
            QueueFull::Wait => {
                let line = shared.budget.line_up();
                // Once more, for only now the workers see that somebody waits.
                shared.wake_all();
                let permit = match timeout_at(deadline, line.admit(weight)).await {
                    Ok(Ok(permit)) => permit,
                    Ok(Err(_)) => return Err(closed()),
                    Err(_) => {
                        return Err(Error::new(
                            ErrorKind::Timeout,
                            "the queue of write-behind writes stayed full until the deadline",
                        ));
                    }
                };
                let room = match record_bytes {
                    Some(bytes) => Some(shared.journal.room(bytes, deadline).await?),
                    None => None,
                };
                Ok(Admission::Granted(Claim { permit, room }))
            }
        }
    }

    /// Room, if there is some now and nobody waits for it.
    fn claim_at_once(&self, weight: usize, record_bytes: Option<usize>) -> Option<Claim> {
        let Shared { budget, journal, .. } = &*self.shared;
        let permit = budget.try_admit(weight).ok()?;
        let room = match record_bytes {
            None => None,
            Some(bytes) => Some(journal.room_at_once(bytes)?),
        };
        Some(Claim { permit, room })
    }

    /// Room, if nothing is full; or what is.
    async fn claim_unless_full(
        &self,
        weight: usize,
        record_bytes: Option<usize>,
        deadline: Instant,
    ) -> Result<Result<Claim, &'static str>, Error> {
        let Shared { budget, journal, .. } = &*self.shared;
        let permit = match budget.try_admit(weight) {
            Ok(permit) => permit,
            Err(NoPermit::Closed) => return Err(closed()),
            Err(NoPermit::Full) => return Ok(Err("the queue of write-behind writes is full")),
        };
        let room = match record_bytes {
            None => None,
            Some(bytes) => match journal.room_unless_full(bytes, deadline).await? {
                Some(room) => Some(room),
                None if journal.state() == State::DiskFull => return Ok(Err("the journal's disk is full")),
                None => return Ok(Err("the journal is full")),
            },
        };
        Ok(Ok(Claim { permit, room }))
    }

    /// Makes an admitted write as durable as it was admitted to be. Not cancel-safe: run it in a task of its own.
    ///
    /// # Errors
    /// As [`Journal::append`]; the claim is given back.
    pub async fn append(&self, lane: &Lane, claim: Claim, write: &Write, deadline: Instant) -> Result<Held, Error> {
        let Claim { permit, room } = claim;
        let record = match room {
            Some(room) => {
                let record = self.shared.journal.append(lane, room, write, deadline).await?;
                Some((write.entry.version, record))
            }
            None => None,
        };
        Ok(Held { permit, record })
    }

    /// The same for a write that nobody has seen and that has got a new stamp since: its record is replaced.
    ///
    /// # Errors
    /// As [`Queue::append`], and [`ErrorKind::Timeout`] where there was no room until `deadline`. What they say is of this try: a restart
    /// may yet find the first record.
    pub async fn append_anew(&self, lane: &Lane, held: Held, write: &Write, deadline: Instant) -> Result<Held, Error> {
        let Held { permit, record } = held;
        // First, or those who wait for room could all hold what the others wait for.
        let Some((_, record)) = record else {
            return Ok(Held { permit, record });
        };
        record.release();
        let bytes = write.key.bytes() + write.content_bytes();
        if self.shared.is_hurried() {
            self.shared.wake_all();
        }
        let room = Some(self.shared.journal.room(bytes, deadline).await?);
        self.append(lane, Claim { permit, room }, write, deadline).await
    }

    /// A passage for a write of `key`, which must be had before the write is stamped: from now on a version that the store comes to
    /// hold keeps older ones out of the queue, so that a write that is slow on its way cannot be shown after a newer one has left.
    pub fn enter(&self, key: &Key) -> Passage {
        let number = self.shared.shard(key).pending.lock().enter(key);
        Passage {
            shared: Arc::clone(&self.shared),
            key: key.clone(),
            number,
            published: true,
        }
    }

    /// Accepts an admitted write: visible to [`Queue::pending`] when this returns, and on its way to the store, once `write_delay`
    /// has passed. `false`: superseded at once, for a write at least as new is pending, or was stored since the passage was had.
    pub fn accept(&self, write: Write, held: Held, passage: Passage, write_delay: Duration) -> bool {
        debug_assert!(write.key == passage.key, "a passage is for one key");
        let shared = &self.shared;
        let shard = shared.shard(&write.key);
        let now = shared.clock.now();
        let version = write.entry.version;
        let offered = shared.change(shard, |pending| {
            let offered = pending.offer(write, held, now, write_delay);
            if !passage.published {
                pending.note_published(&passage.key, version, false);
            }
            offered
        });
        if shared.is_hurried() {
            shard.changed.notify_one();
        }
        shared.metrics.accepted.inc();
        match offered {
            Offered::Added => true,
            Offered::Coalesced(older) => {
                older.into_iter().for_each(Held::release);
                shared.metrics.coalesced.inc();
                true
            }
            Offered::Refused(offered) => {
                offered.into_iter().for_each(Held::release);
                false
            }
        }
    }

    /// The newest accepted write of a key that the store is not known to have.
    pub fn pending(&self, key: &Key) -> Option<PendingEntry> {
        self.shared.shard(key).pending.lock().get(key)
    }

    /// Its version.
    pub fn pending_version(&self, key: &Key) -> Option<Version> {
        self.shared.shard(key).pending.lock().version(key)
    }

    /// Tells that the shared caches hold `version` of a key.
    pub fn note_published(&self, key: &Key, version: Version) {
        let mut pending = self.shared.shard(key).pending.lock();
        pending.note_published(key, version, true);
    }

    /// Tells that the shared caches have lost their copy of a key.
    pub fn note_lost_key(&self, key: &Key) {
        let mut pending = self.shared.shard(key).pending.lock();
        if let Some(PendingEntry { entry, .. }) = pending.get(key) {
            pending.note_published(key, entry.version, false);
        }
    }

    /// Tells that the shared caches have lost everything, or may have; as [`Queue::note_lost`].
    pub fn note_all_lost(&self) {
        for shard in &self.shared.shards {
            shard.pending.lock().note_all_lost();
        }
    }

    /// Tells that the shared caches have lost what matches, or may have: of what is not published again by then the gateway hears when the
    /// store has it.
    pub fn note_lost(&self, matches: impl Fn(&Key) -> bool) {
        for shard in &self.shared.shards {
            shard.pending.lock().note_lost(&matches);
        }
    }

    /// Keys of writes that have been pending for `long`, at most `limit`; those of an earlier process excepted, which are not published.
    pub fn pending_for(&self, long: Duration, limit: usize) -> Vec<Key> {
        let long = i64::try_from(long.as_millis()).unwrap_or(i64::MAX);
        let then = Timestamp(self.shared.clock.now().0.saturating_sub(long));
        let mut keys = Vec::new();
        for shard in &self.shared.shards {
            let pending = shard.pending.lock();
            let room = limit - keys.len();
            keys.extend(pending.accepted_before(then).take(room).cloned());
        }
        keys
    }

    fn is_journaled(&self, key: &Key) -> bool {
        let pending = self.shared.shard(key).pending.lock();
        pending.payloads_of(key).any(Held::is_journaled)
    }

    /// Tells that a write of [`Notice::Confirmed`] is published: it leaves.
    pub fn published(&self, key: &Key, version: Version) {
        let shared = &self.shared;
        shared.leave(shared.shard(key), |pending, left| pending.published(key, version, left));
    }

    /// Tells that the store holds `version` of a key, or something newer: a pending write at or below it has nothing left to do.
    pub fn overtake(&self, key: &Key, version: Version) {
        let shared = &self.shared;
        shared.leave(shared.shard(key), |pending, left| pending.overtake(key, version, left));
    }

    /// How full the queue is.
    pub fn stats(&self) -> QueueStats {
        let mut stats = QueueStats::default();
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

    /// How full it is of each namespace. Holds each shard's lock for as long as it takes to look at its namespaces, not at its writes.
    pub fn stats_by_namespace(&self) -> BTreeMap<String, QueueStats> {
        let now = self.shared.clock.now();
        let mut stats = BTreeMap::<String, QueueStats>::new();
        for shard in &self.shared.shards {
            for (namespace, share) in shard.pending.lock().shares() {
                let age = share.oldest().map_or(Duration::ZERO, |oldest| now.since(oldest));
                let sum = stats.entry(namespace.to_owned()).or_default();
                sum.entries += share.entries();
                sum.bytes += share.bytes;
                sum.oldest_age = sum.oldest_age.max(age);
            }
        }
        stats
    }

    /// Ends admission, for waiters too, and every pause, and hurries the drain. A write that was admitted may still be accepted.
    pub fn close(&self) {
        self.shared.budget.close();
        self.resume_all();
        self.shared.closing.cancel();
    }

    /// Waits, once closed, until everything that was admitted has left the queue, or until `deadline`; says what is left. Cancel-safe.
    pub async fn drained(&self, deadline: Instant) -> Left {
        // What is left says whether it was in time.
        let _in_time = timeout_at(deadline, self.shared.budget.emptied()).await;
        let (entries, bytes) = self.shared.budget.claimed();
        let in_memory = |shard: &Shard| {
            let pending = shard.pending.lock();
            let payloads = pending.payloads();
            payloads.filter(|(version, held)| !held.has_journaled(*version)).count()
        };
        let lost = self.shared.shards.iter().map(in_memory).sum();
        Left { entries, bytes, lost }
    }

    /// Closes the journal, once nothing is appended any more: what has left the queue is not recovered by the next start, and what has not is.
    ///
    /// # Errors
    /// The journal has failed: what left last may be recovered, which is harmless.
    pub async fn close_journal(&self) -> Result<(), Error> {
        self.shared.journal.close().await
    }

    /// What the journal can do.
    pub fn journal_state(&self) -> State {
        self.shared.journal.state()
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
        &self.shards[self.index(key)]
    }

    /// The number of a key's shard.
    fn index(&self, key: &Key) -> usize {
        // Below the number of shards, so it fits.
        (self.hasher.hash_one(key) % self.shards.len() as u64) as usize
    }

    /// Changes a shard under its lock, and wakes its worker when something is due sooner than it was, when its batch has become whole, or when there
    /// are more ids to remember.
    fn change<R>(&self, shard: &Shard, change: impl FnOnce(&mut Pending<Held>) -> R) -> R {
        let look = |pending: &Pending<Held>| (pending.next_due(), pending.loose(), pending.is_gathered());
        let (before, result, after) = {
            let mut pending = shard.pending.lock();
            let before = look(&pending);
            let result = change(&mut pending);
            (before, result, look(&pending))
        };
        let is_sooner = (after.0).is_some_and(|due| before.0.is_none_or(|before| due < before));
        if is_sooner || after.1 > before.1 || (after.2 && !before.2) {
            shard.changed.notify_one();
        }
        result
    }

    /// The same where writes may leave: what they held is released once the lock is free.
    fn leave<R>(&self, shard: &Shard, change: impl FnOnce(&mut Pending<Held>, &mut Vec<Held>) -> R) -> R {
        let mut left = Vec::new();
        let result = self.change(shard, |pending| change(pending, &mut left));
        left.into_iter().for_each(Held::release);
        result
    }

    /// Whether delays are ignored.
    fn is_hurried(&self) -> bool {
        self.budget.is_closed()
            || self.budget.is_pressed()
            || self.journal.is_pressed()
            || self.emptying.load(Ordering::Relaxed) > 0
    }

    /// Takes in what an earlier process had accepted.
    fn restore(&self, write: Write, record: Record) {
        let held = Held {
            permit: self.budget.overdraw(write.weight()),
            record: Some((write.entry.version, record)),
        };
        let now = self.clock.now();
        // The journal gives the newest write of each key, and of the others those with an id.
        match self.change(self.shard(&write.key), |pending| pending.restore(write, held, now)) {
            Offered::Added => {}
            Offered::Coalesced(payload) | Offered::Refused(payload) => payload.into_iter().for_each(Held::release),
        }
    }

    fn wake_all(&self) {
        for shard in &self.shards {
            shard.changed.notify_one();
        }
    }
}

impl Shard {
    fn new(now: Timestamp) -> Shard {
        Shard {
            pending: Mutex::new(Pending::new()),
            changed: Notify::new(),
            board: Board::new(now),
        }
    }
}

fn closed() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "the gateway is shutting down and takes no write-behind writes",
    )
}
