//! The algorithm over the store in memory, in paused time: which tier answers, what each outcome leaves behind, and who may come late.
//!
//! Owns the rig: a whole gateway without Redis over scripted faults, which other modules' tests may use. The storm, in which all of it
//! happens at once, is [`storm`]; what rests on the journal, in real time, is in [`durable`]; how fresh an answer is, in [`freshness`]; what
//! watchers are told, in [`watching`].

mod batch_read;
mod clock;
mod coherence;
mod decide;
mod durable;
mod freshness;
mod scan;
mod storm;
mod watching;

use std::num::NonZeroUsize;

use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    cache::memory,
    error::Outcome,
    model::{NODE_BITS, Tags, VERSION_EPOCH_MILLIS, Write},
    namespace::{BehindDurability, NamespaceSettings, QueueFull},
    queue::{
        self,
        journal::{self, Journal, Record, sim},
    },
    store::{
        self, Store,
        fake::{Call, FakeBackend, Fault, eventually},
        watch,
    },
    telemetry::{QueueMetrics, StoreMetrics, watch::WatchMetrics},
};

use ReadConsistency::{Cached, Shared};
use WriteMode::{Behind, Through};

/// More than any call here takes that is answered at all.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a gateway under test is made of, where it differs from the defaults.
pub(crate) struct Setup {
    pub(crate) namespace: NamespaceSettings,
    pub(crate) queue: queue::Config,
    pub(crate) memory_bytes: usize,
    pub(crate) flights_max: usize,
    pub(crate) refreshes_max: usize,
    pub(crate) journal: Journal,
    pub(crate) recovered: Vec<(Write, Record)>,
    pub(crate) requests: requests::Config,
    pub(crate) watch: super::watch::Config,
}

/// A gateway, and the tiers around it.
pub(crate) struct Rig {
    pub(crate) gateway: Gateway,
    pub(crate) store: Store,
    fake: FakeBackend,
    queue_metrics: QueueMetrics,
    _tasks: Vec<JoinHandle<()>>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            // In paused time nothing can wait for the journal's thread.
            namespace: NamespaceSettings {
                durability: BehindDurability::Memory,
                ..NamespaceSettings::default()
            },
            // What two rigs have lived through ends alike.
            queue: queue::Config {
                drain_interval: Duration::ZERO,
                ..queue::Config::default()
            },
            memory_bytes: 1 << 20,
            flights_max: 100,
            refreshes_max: REFRESHES_MAX,
            journal: sim::journal(),
            recovered: Vec::new(),
            requests: requests::Config::default(),
            watch: super::watch::Config::default(),
        }
    }
}

/// A gateway over an empty store, changed as a test needs it.
pub(crate) fn rig(change: impl FnOnce(&mut Setup)) -> Rig {
    let mut setup = Setup::default();
    change(&mut setup);
    setup.namespace.validate().expect("valid");
    setup.queue.validate().expect("valid");
    let fake = FakeBackend::new();
    let store = fake.store();
    let clock = Arc::new(Clock::new(1, None));
    clock.reserve(clock.reservation());
    let (cache_metrics, queue_metrics) = (CacheMetrics::default(), QueueMetrics::default());
    let store_metrics = StoreMetrics::register(&mut Registry::default());
    let stop = CancellationToken::new();
    // Its pings tell the breaker that the store is back.
    let mut tasks = vec![watch::start(store.clone(), &stop)];
    let (commits, decisions, loads, ranges) = paths(&store, &clock, &store_metrics, &stop, &mut tasks);
    let queue = queue::Parts {
        store: store.clone(),
        clock: Arc::clone(&clock),
        journal: setup.journal.clone(),
        recovered: setup.recovered,
        metrics: queue_metrics.clone(),
        store_metrics,
    };
    let mut started = Queue::start(&setup.queue, queue, &stop);
    tasks.extend(started.workers);
    let parts = GatewayParts {
        requests: Arc::new(Requests::new(&setup.requests, PATIENCE, clock.now())),
        clock,
        namespaces: Arc::new(Namespaces::new(setup.namespace, [])),
        memory: Arc::new(Memory::new(&memory::Config {
            bytes_max: setup.memory_bytes,
        })),
        flights: Flights::new(setup.flights_max, cache_metrics.clone()),
        queue: started.queue,
        commits,
        decisions,
        loads,
        ranges,
        redis: None,
        store: store.clone(),
        sharing: Arc::new(Sharing::new("")),
        watches: Arc::new(Watches::new(&setup.watch, WatchMetrics::default())),
        metrics: cache_metrics,
        refreshes: Refreshes(Arc::new(Semaphore::new(setup.refreshes_max))),
        load_wait: PATIENCE,
    };
    let gateway = Gateway::on_this_thread(&parts, Arc::default());
    let heeding = gateway.clone();
    tasks.push(tokio::spawn(async move {
        while let Some(notice) = started.notices.recv().await {
            heeding.heed(notice).await;
        }
    }));
    Rig {
        gateway,
        store,
        fake,
        queue_metrics,
        _tasks: tasks,
    }
}

/// The ways to the store, with what runs behind them.
fn paths(
    store: &Store,
    clock: &Arc<Clock>,
    metrics: &StoreMetrics,
    stop: &CancellationToken,
    tasks: &mut Vec<JoinHandle<()>>,
) -> (GroupCommit, GroupDecide, GroupLoad, Ranges) {
    let config = store::Config::default();
    let commits = GroupCommit::new(store.clone(), &config, metrics.clone());
    let decisions = GroupDecide::new(store.clone(), &config, Arc::clone(clock), metrics.clone());
    let loads = GroupLoad::new(store.clone(), &config, metrics.clone());
    let ranges = Ranges::new(store.clone(), &config);
    tasks.extend(commits.start(stop));
    tasks.extend(decisions.start(stop));
    tasks.extend(loads.start(stop));
    tasks.extend(ranges.start(stop));
    (commits, decisions, loads, ranges)
}

impl Rig {
    fn queue(&self) -> &Queue {
        &self.parts().queue
    }

    pub(crate) fn clock(&self) -> &Arc<Clock> {
        &self.parts().clock
    }

    fn parts(&self) -> &GatewayParts {
        self.gateway.parts()
    }

    /// Reads in a task of its own.
    fn reading(&self, name: &'static str) -> JoinHandle<Result<Found, Error>> {
        let (gateway, deadline) = (self.gateway.clone(), Instant::now() + PATIENCE);
        tokio::spawn(async move { gateway.get(&key(name), Cached, deadline).await })
    }

    /// Puts in a task of its own.
    fn putting(&self, name: &str, value: &str, mode: WriteMode) -> JoinHandle<Result<Written, Error>> {
        self.putting_within(name, value, mode, PATIENCE)
    }

    fn putting_within(
        &self,
        name: &str,
        value: &str,
        mode: WriteMode,
        time: Duration,
    ) -> JoinHandle<Result<Written, Error>> {
        let (gateway, request, deadline) = (self.gateway.clone(), put(name, value, mode), Instant::now() + time);
        tokio::spawn(async move { gateway.write(request, deadline).await })
    }

    async fn put(&self, name: &str, value: &str, mode: WriteMode) -> Version {
        let written = self.putting(name, value, mode).await.expect("no panic");
        written.expect("it is written").version
    }

    async fn get(&self, name: &str, options: impl Into<ReadOptions>) -> Result<Found, Error> {
        self.gateway.get(&key(name), options, Instant::now() + PATIENCE).await
    }

    /// What a read sees, and where it came from.
    async fn read(&self, name: &str, consistency: ReadConsistency) -> (Option<String>, Source) {
        let found = self.get(name, consistency).await.expect("a tier answers");
        let value = found.entry.and_then(|entry| entry.value);
        (value.map(|value| text(&value)), found.source)
    }

    /// The value in the store.
    fn stored(&self, name: &str) -> Option<String> {
        let value = self.fake.entry(&key(name)).and_then(|entry| entry.value);
        value.map(|value| text(&value))
    }

    async fn drained(&self) {
        eventually(|| self.parts().queue.stats().entries == 0).await;
    }

    /// Has the next call of a kind hang; what releases it.
    fn hang(&self, call: Call) -> Arc<tokio::sync::Notify> {
        let (fault, release) = Fault::hang();
        self.fake.inject(call, fault);
        release
    }

    /// Waits for so many calls of a kind since the start.
    async fn called(&self, call: Call, times: usize) {
        eventually(|| self.fake.calls(call) == times).await;
    }

    /// Takes a key out of L1, as an eviction would.
    fn evict(&self, name: &str) {
        let memory = &self.parts().memory;
        let version = memory.version(&key(name)).expect("there is a copy");
        assert!(memory.drop_version(&key(name), version));
    }

    /// A version of another node, so far ahead of our clock.
    fn ahead(&self, by: Duration) -> Version {
        let millis = self.clock().now().after(by).0 - VERSION_EPOCH_MILLIS;
        Version::new((millis << 11 << NODE_BITS) | 9).expect("positive")
    }

    /// Writes as another gateway would, past this one.
    fn put_past(&self, name: &str, value: &str, version: Version) {
        self.fake.put(Write {
            key: key(name),
            entry: Entry {
                version,
                value: Some(Bytes::copy_from_slice(value.as_bytes())),
                expires_at: None,
            },
            tags: Tags::default(),
            requests: Vec::new(),
        });
    }
}

fn key(name: &str) -> Key {
    Key::new("test", name).expect("valid")
}

fn put(name: &str, value: &str, mode: WriteMode) -> WriteRequest {
    WriteRequest {
        key: key(name),
        value: Some(Bytes::copy_from_slice(value.as_bytes())),
        ttl: None,
        mode: Some(mode),
        tags: Tags::default(),
        condition: None,
        request: None,
        await_persisted: false,
    }
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).into_owned()
}

fn some(value: &str) -> Option<String> {
    Some(value.to_owned())
}

fn one() -> NonZeroUsize {
    NonZeroUsize::MIN
}

// Stamps.

#[tokio::test(start_paused = true)]
async fn a_write_through_that_loses_is_stamped_anew_above_the_winner() {
    // Near enough to move the clock, and too far ahead to.
    for by in [Duration::from_secs(10), Duration::from_secs(3600)] {
        let rig = rig(|_| ());
        let theirs = rig.ahead(by);
        rig.put_past("k", "theirs", theirs);
        let ours = rig.put("k", "ours", Through).await;
        assert!(ours > theirs);
        assert_eq!(rig.fake.history(&key("k")), [theirs, ours]);
        assert_eq!(rig.fake.commits().len(), 2, "the first lost");
        assert_eq!(rig.read("k", Cached).await, (some("ours"), Source::L1));
        assert_eq!(rig.read("k", ReadConsistency::Store).await.0, some("ours"));
        let next = rig.put("another", "ours", Through).await;
        assert_eq!(
            next > theirs,
            by < Duration::from_secs(60),
            "only what is near moves the clock"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_behind_passes_what_was_read() {
    let rig = rig(|_| ());
    let theirs = rig.ahead(Duration::from_secs(3600));
    rig.put_past("k", "theirs", theirs);
    assert_eq!(rig.read("k", Cached).await, (some("theirs"), Source::Store));
    let ours = rig.put("k", "ours", Behind).await;
    assert!(ours > theirs);
    rig.drained().await;
    assert_eq!(rig.fake.history(&key("k")), [theirs, ours]);
}

#[tokio::test(start_paused = true)]
async fn a_write_behind_that_lost_in_the_store_is_taken_out_of_the_caches() {
    let rig = rig(|_| ());
    let theirs = rig.ahead(Duration::from_secs(3600));
    rig.put_past("k", "theirs", theirs);
    assert!(
        rig.put("k", "ours", Behind).await < theirs,
        "nobody here knew of theirs"
    );
    rig.drained().await;
    eventually(|| rig.parts().memory.version(&key("k")).is_none()).await;
    assert_eq!(rig.read("k", Cached).await, (some("theirs"), Source::Store));
}

#[tokio::test(start_paused = true)]
async fn without_a_lease_nothing_is_written() {
    let rig = rig(|_| ());
    rig.clock().lease_until(rig.clock().now());
    for mode in [Through, Behind] {
        let refused = rig.putting("k", "value", mode).await.expect("no panic");
        let refused = refused.expect_err("no version can be stamped");
        assert_eq!(
            (refused.kind(), refused.outcome()),
            (ErrorKind::Unavailable, Outcome::NotApplied)
        );
    }
    assert_eq!(rig.read("k", Cached).await, (None, Source::Store));
    assert_eq!(rig.parts().queue.stats().entries, 0);
}

#[tokio::test(start_paused = true)]
async fn after_an_unknown_outcome_the_same_version_is_tried_again() {
    use store::StoreErrorKind::Unknown;

    for fault in [Fault::lose_reply(), Fault::fail(Unknown), Fault::land_later()] {
        let rig = rig(|_| ());
        rig.fake.inject(Call::Commit, fault);
        let version = rig.put("k", "value", Through).await;
        let tried: Vec<_> = rig.fake.commits().into_iter().flat_map(|batch| batch.writes).collect();
        assert_eq!(tried, [(key("k"), version), (key("k"), version)]);
        rig.fake.land();
        assert_eq!(rig.fake.history(&key("k")), [version], "written once");
    }
}

#[tokio::test(start_paused = true)]
async fn an_outcome_that_stays_unknown_is_told_so_and_not_shown() {
    let rig = rig(|_| ());
    let before = rig.put("k", "before", Through).await;
    rig.fake.script(|call| (call == Call::Commit).then(Fault::land_later));
    let second = Duration::from_secs(1);
    let lost = rig
        .putting_within("k", "after", Through, second)
        .await
        .expect("no panic");
    let lost = lost.expect_err("no reply ever comes");
    assert_eq!((lost.kind(), lost.outcome()), (ErrorKind::Timeout, Outcome::Unknown));
    // Once the write itself knows no more than its caller, what is older answers only where the store confirms it.
    if let Ok(found) = rig.get("k", Cached).await {
        let value = found.entry.and_then(|entry| entry.value);
        assert_eq!(value.map(|value| text(&value)), some("before"));
    }
    // And then it takes effect after all, as one write.
    rig.fake.script(|_| None);
    rig.fake.land();
    eventually(|| !rig.store.breaker().is_open()).await;
    // A try that hung until now may yet tell that the store is away.
    while rig.get("k", ReadConsistency::Store).await.is_err() {
        tokio::time::sleep(second).await;
    }
    assert_eq!(
        rig.read("k", ReadConsistency::Store).await,
        (some("after"), Source::Store)
    );
    let history = rig.fake.history(&key("k"));
    assert_eq!((history.len(), history[0]), (2, before));
}

// Who goes away.

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_leaves_its_write_through_to_end() {
    let rig = rig(|_| ());
    let release = rig.hang(Call::Commit);
    let writing = rig.putting("k", "value", Through);
    rig.called(Call::Commit, 1).await;
    writing.abort();
    assert!(writing.await.is_err_and(|error| error.is_cancelled()));
    release.notify_one();
    eventually(|| rig.parts().memory.version(&key("k")).is_some()).await;
    assert_eq!(rig.stored("k"), some("value"));
    assert_eq!(rig.read("k", Cached).await, (some("value"), Source::L1));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_before_admission_has_written_nothing() {
    let rig = rig(|setup| setup.queue.entries_max = one());
    let release = rig.hang(Call::Commit);
    rig.put("first", "value", Behind).await;
    let waiting = rig.putting("second", "value", Behind);
    eventually(|| rig.queue_metrics.full.get() == 1).await;
    waiting.abort();
    assert!(waiting.await.is_err_and(|error| error.is_cancelled()));
    release.notify_one();
    rig.drained().await;
    // The room is free: nobody who left holds it.
    rig.put("third", "value", Behind).await;
    rig.drained().await;
    assert_eq!(rig.read("second", Cached).await, (None, Source::Store));
    assert_eq!(rig.fake.rows(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_goes_away_leaves_its_load_to_those_who_joined() {
    let rig = rig(|_| ());
    let version = rig.ahead(Duration::ZERO);
    rig.put_past("k", "value", version);
    let release = rig.hang(Call::Load);
    let first = rig.reading("k");
    rig.called(Call::Load, 1).await;
    let others: Vec<_> = (0..10).map(|_| rig.reading("k")).collect();
    eventually(|| rig.parts().metrics.loads_joined.get() == 10).await;
    first.abort();
    release.notify_one();
    for other in others {
        let found = other.await.expect("no panic").expect("the store answers");
        assert_eq!(found.entry.map(|entry| entry.version), Some(version));
    }
    assert_eq!(rig.fake.calls(Call::Load), 1);
}

// Pending writes.

#[tokio::test(start_paused = true)]
async fn a_write_through_overtakes_what_is_pending() {
    let rig = rig(|setup| setup.namespace.write_delay = Duration::from_secs(3600));
    let pending = rig.put("k", "pending", Behind).await;
    let through = rig.put("k", "through", Through).await;
    assert!(through > pending);
    assert_eq!(rig.parts().queue.pending(&key("k")), None, "nothing is left to do");
    for consistency in [Cached, Shared, ReadConsistency::Store] {
        assert_eq!(rig.read("k", consistency).await.0, some("through"), "{consistency:?}");
    }
    rig.parts().queue.close();
    rig.drained().await;
    assert_eq!(rig.fake.history(&key("k")), [through]);
}

#[tokio::test(start_paused = true)]
async fn a_read_of_the_store_sees_what_is_pending() {
    let rig = rig(|setup| setup.namespace.write_delay = Duration::from_secs(3600));
    rig.put("k", "stored", Through).await;
    rig.put("k", "pending", Behind).await;
    let read = rig.read("k", ReadConsistency::Store).await;
    assert_eq!(read, (some("pending"), Source::Pending));
    assert_eq!(rig.stored("k"), some("stored"));
    // A pending write that somebody else has passed does not hide the store's.
    rig.put_past("k", "theirs", rig.ahead(Duration::from_secs(30)));
    let read = rig.read("k", ReadConsistency::Store).await;
    assert_eq!(read, (some("theirs"), Source::Store));
}

#[tokio::test(start_paused = true)]
async fn what_was_written_is_read_wherever_it_is_when_l1_has_lost_it() {
    let minute = Duration::from_secs(60);
    let rig = rig(|setup| setup.namespace.write_delay = minute);
    rig.put("k", "behind", Behind).await;
    assert_eq!(rig.read("k", Cached).await, (some("behind"), Source::L1));
    rig.evict("k");
    assert_eq!(rig.read("k", Cached).await, (some("behind"), Source::Pending));
    rig.evict("k");
    tokio::time::advance(minute).await;
    rig.drained().await;
    assert_eq!(rig.read("k", Cached).await, (some("behind"), Source::Store));
    rig.put("k", "through", Through).await;
    rig.evict("k");
    assert_eq!(rig.read("k", Cached).await, (some("through"), Source::Store));
}

#[tokio::test(start_paused = true)]
async fn a_pending_write_does_not_live_beyond_its_ttl() {
    let rig = rig(|setup| setup.namespace.write_delay = Duration::from_secs(3600));
    rig.put("k", "before", Through).await;
    let brief = WriteRequest {
        ttl: Some(Duration::from_secs(10)),
        ..put("k", "brief", Behind)
    };
    let written = rig.gateway.write(brief, Instant::now() + PATIENCE).await;
    written.expect("it is accepted");
    for (wait, seen) in [(9, some("brief")), (1, None)] {
        tokio::time::advance(Duration::from_secs(wait)).await;
        for consistency in [Cached, Shared, ReadConsistency::Store] {
            assert_eq!(rig.read("k", consistency).await.0, seen, "{consistency:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_l1_every_read_still_sees_the_writes_before_it() {
    let rig = rig(|setup| setup.memory_bytes = 0);
    for round in 0..20 {
        let (value, mode) = (round.to_string(), if round % 3 == 0 { Through } else { Behind });
        rig.put("k", &value, mode).await;
        let (seen, source) = rig.read("k", Cached).await;
        assert_eq!(seen, Some(value));
        assert_ne!(source, Source::L1);
    }
}

// The queue is full.

/// A gateway whose queue holds one write, that one not to be drained before it is released.
async fn full(policy: QueueFull) -> (Rig, Arc<tokio::sync::Notify>) {
    let rig = rig(|setup| {
        setup.queue.entries_max = one();
        setup.namespace.queue_full = policy;
    });
    let release = rig.hang(Call::Commit);
    rig.put("first", "value", Behind).await;
    rig.called(Call::Commit, 1).await;
    (rig, release)
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_with_the_time_to_come_back() {
    let (rig, release) = full(QueueFull::Reject).await;
    let refused = rig.putting("k", "value", Behind).await.expect("no panic");
    let refused = refused.expect_err("there is no room");
    assert_eq!(
        (refused.kind(), refused.outcome()),
        (ErrorKind::Overloaded, Outcome::NotApplied)
    );
    assert!(refused.retry_delay().is_some_and(|delay| !delay.is_zero()));
    release.notify_one();
    rig.drained().await;
    assert_eq!(rig.read("k", Cached).await, (None, Source::Store));
    rig.put("k", "value", Behind).await;
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_writes_through() {
    let (rig, release) = full(QueueFull::WriteThrough).await;
    let written = rig.putting("k", "value", Behind).await.expect("no panic");
    assert_eq!(written.expect("committed").durability, Durability::Store);
    assert_eq!(rig.stored("k"), some("value"));
    assert_eq!(rig.stored("first"), None, "the queue is as full as it was");
    release.notify_one();
    rig.drained().await;
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_is_waited_for_until_the_deadline() {
    let (rig, release) = full(QueueFull::Wait).await;
    let (second, begun) = (Duration::from_secs(1), Instant::now());
    let late = rig
        .putting_within("late", "value", Behind, second)
        .await
        .expect("no panic");
    let late = late.expect_err("there is no room in time");
    assert_eq!((late.kind(), late.outcome()), (ErrorKind::Timeout, Outcome::NotApplied));
    assert!(begun.elapsed() >= second);

    let patient = rig.putting("patient", "value", Behind);
    eventually(|| rig.queue_metrics.full.get() == 2).await;
    assert!(!patient.is_finished());
    release.notify_one();
    let written = patient.await.expect("no panic").expect("there is room now");
    assert_eq!(written.durability, Durability::Memory);
    rig.drained().await;
    assert_eq!((rig.stored("patient"), rig.stored("late")), (some("value"), None));
}

// Loads and their landing.

#[tokio::test(start_paused = true)]
async fn an_absence_is_known_briefly() {
    let rig = rig(|setup| {
        setup.namespace.absence_lifetime = Duration::from_secs(5);
        setup.namespace.refresh_threshold = 0.0;
    });
    assert_eq!(rig.read("k", Cached).await, (None, Source::Store));
    tokio::time::advance(Duration::from_secs(4)).await;
    assert_eq!(rig.read("k", Cached).await, (None, Source::L1));
    // Give or take a tenth.
    tokio::time::advance(Duration::from_secs(2)).await;
    rig.put_past("k", "theirs", rig.ahead(Duration::ZERO));
    assert_eq!(rig.read("k", Cached).await, (some("theirs"), Source::Store));
}

#[tokio::test(start_paused = true)]
async fn no_more_keys_are_loaded_at_a_time_than_may_be() {
    let rig = rig(|setup| setup.flights_max = 1);
    let release = rig.hang(Call::Load);
    let first = rig.reading("a");
    rig.called(Call::Load, 1).await;
    let refused = rig.get("b", Cached).await.expect_err("there is a load already");
    assert_eq!(
        (refused.kind(), refused.outcome()),
        (ErrorKind::Overloaded, Outcome::NotApplied)
    );
    release.notify_one();
    first.await.expect("no panic").expect("the store answers");
    assert_eq!(rig.read("b", Cached).await, (None, Source::Store));
}

#[tokio::test(start_paused = true)]
async fn a_load_that_began_before_a_write_does_not_land_after_it() {
    for mode in [Through, Behind] {
        let rig = rig(|setup| setup.namespace.write_delay = Duration::from_secs(3600));
        rig.put_past("k", "old", rig.ahead(Duration::ZERO));
        let (late, release) = Fault::late_reply();
        rig.fake.inject(Call::Load, late);
        let reading = rig.reading("k");
        rig.called(Call::Load, 1).await;
        tokio::time::advance(Duration::from_millis(1)).await;
        rig.put("k", "new", mode).await;
        release.notify_one();
        let found = reading.await.expect("no panic").expect("the store has answered");
        let value = found.entry.and_then(|entry| entry.value);
        assert_eq!(value.as_deref(), Some(&b"new"[..]), "it came late, and was told so");
        assert_eq!(rig.read("k", Cached).await, (some("new"), Source::L1), "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_load_does_not_land_after_a_write_that_was_evicted_since() {
    for mode in [Through, Behind] {
        let rig = rig(|setup| setup.namespace.write_delay = Duration::from_secs(3600));
        rig.put_past("k", "old", rig.ahead(Duration::ZERO));
        let (late, release) = Fault::late_reply();
        rig.fake.inject(Call::Load, late);
        let reading = rig.reading("k");
        rig.called(Call::Load, 1).await;
        tokio::time::advance(Duration::from_millis(1)).await;
        rig.put("k", "new", mode).await;
        rig.evict("k");
        // Who comes after the write does not join the load from before it.
        assert_eq!(rig.read("k", Cached).await.0, some("new"), "{mode:?}");
        rig.evict("k");
        release.notify_one();
        reading.await.expect("no panic").expect("the store has answered");
        assert_eq!(rig.parts().memory.version(&key("k")), None, "{mode:?}");
        assert_eq!(rig.read("k", Cached).await.0, some("new"), "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_through_does_not_land_after_a_newer_one_that_was_evicted_since() {
    let rig = rig(|_| ());
    let (late, release) = Fault::late_reply();
    rig.fake.inject(Call::Commit, late);
    let writing = rig.putting("k", "ours", Through);
    rig.called(Call::Commit, 1).await;
    rig.put_past("k", "theirs", rig.ahead(Duration::from_secs(1)));
    assert_eq!(rig.read("k", Cached).await.0, some("theirs"));
    rig.evict("k");
    release.notify_one();
    writing.await.expect("no panic").expect("it was committed");
    assert_eq!(rig.parts().memory.version(&key("k")), None);
    assert_eq!(rig.read("k", Cached).await, (some("theirs"), Source::Store));
}

/// A gateway with a copy of `k` in L1 that the next read renews.
async fn due_for_a_refresh(refreshes_max: usize) -> Rig {
    let rig = rig(|setup| {
        setup.namespace.cache_lifetime = Duration::from_secs(100);
        setup.namespace.refresh_threshold = 0.5;
        setup.namespace.write_delay = Duration::from_secs(3600);
        setup.refreshes_max = refreshes_max;
    });
    rig.put("k", "old", Through).await;
    rig.put("l", "old", Through).await;
    tokio::time::advance(Duration::from_secs(80)).await;
    rig
}

#[tokio::test(start_paused = true)]
async fn a_refresh_puts_nothing_older_over_a_write() {
    for mode in [Through, Behind] {
        let rig = due_for_a_refresh(1).await;
        let (late, release) = Fault::late_reply();
        rig.fake.inject(Call::Load, late);
        assert_eq!(rig.read("k", Cached).await, (some("old"), Source::L1), "nobody waits");
        rig.called(Call::Load, 1).await;
        let new = rig.put("k", "new", mode).await;
        release.notify_one();
        eventually(|| rig.parts().flights.running() == 0).await;
        assert_eq!(rig.parts().memory.version(&key("k")), Some(new), "{mode:?}");
        assert_eq!(rig.read("k", Cached).await, (some("new"), Source::L1), "{mode:?}");
        assert_eq!(rig.parts().metrics.refreshes.get(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refresh_does_not_land_after_a_write_that_was_evicted_since() {
    for mode in [Through, Behind] {
        let rig = due_for_a_refresh(1).await;
        let (late, release) = Fault::late_reply();
        rig.fake.inject(Call::Load, late);
        assert_eq!(rig.read("k", Cached).await, (some("old"), Source::L1), "nobody waits");
        rig.called(Call::Load, 1).await;
        rig.put("k", "new", mode).await;
        rig.evict("k");
        release.notify_one();
        eventually(|| rig.parts().refreshes.0.available_permits() == 1).await;
        assert_eq!(rig.parts().memory.version(&key("k")), None, "{mode:?}");
        assert_eq!(rig.read("k", Cached).await.0, some("new"), "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refresh_takes_what_is_pending_over_what_is_stored() {
    let rig = due_for_a_refresh(1).await;
    let pending = rig.put("k", "pending", Behind).await;
    tokio::time::advance(Duration::from_secs(80)).await;
    assert_eq!(rig.read("k", Cached).await, (some("pending"), Source::L1));
    rig.called(Call::Load, 1).await;
    eventually(|| rig.parts().flights.running() == 0).await;
    tokio::time::advance(Duration::from_secs(40)).await;
    assert_eq!(rig.parts().memory.version(&key("k")), Some(pending));
    assert_eq!(
        rig.read("k", Cached).await,
        (some("pending"), Source::L1),
        "it was renewed"
    );
    assert_eq!(rig.stored("k"), some("old"));
}

#[tokio::test(start_paused = true)]
async fn a_refresh_that_fails_leaves_the_copy_and_the_next_read_tries_again() {
    let rig = due_for_a_refresh(1).await;
    let failure = Fault::fail(store::StoreErrorKind::Rejected);
    rig.fake.inject(Call::Load, failure);
    assert_eq!(rig.read("k", Cached).await, (some("old"), Source::L1));
    rig.called(Call::Load, 1).await;
    eventually(|| rig.parts().flights.running() == 0).await;
    assert_eq!(rig.read("k", Cached).await, (some("old"), Source::L1));
    rig.called(Call::Load, 2).await;
    assert_eq!(rig.parts().metrics.refreshes.get(), 2);
}

#[tokio::test(start_paused = true)]
async fn refreshes_beyond_their_bound_are_skipped_and_counted() {
    let rig = due_for_a_refresh(1).await;
    let release = rig.hang(Call::Load);
    for (name, skipped) in [("k", 0), ("k", 0), ("l", 1), ("l", 2)] {
        assert_eq!(rig.read(name, Cached).await, (some("old"), Source::L1));
        assert_eq!(rig.parts().metrics.refreshes_skipped.get(), skipped, "{name}");
    }
    rig.called(Call::Load, 1).await;
    assert_eq!(rig.parts().metrics.refreshes.get(), 1, "once for its two readers");
    release.notify_one();
    eventually(|| rig.parts().flights.running() == 0).await;
    // What was skipped left nothing behind that would hinder the next.
    rig.read("l", Cached).await;
    rig.called(Call::Load, 2).await;
    assert_eq!(rig.parts().metrics.refreshes.get(), 2);
}
