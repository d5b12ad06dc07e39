//! The queue over the store in memory: every promise of the handle and of the drain, under scripted faults and paused time. What rests on
//! the journal is in [`durable`], how batches are gathered in [`gathering`] (elsewhere they are not), request ids in [`ids`], who waits in [`waits`].

mod durable;
mod gathering;
mod ids;
mod waits;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    num::NonZeroUsize,
    sync::atomic::{AtomicBool, AtomicI64},
};

use bytes::Bytes;
use prometheus_client::registry::Registry;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

use super::*;
use crate::{
    error::Outcome,
    model::{Entry, Tags},
    queue::journal::sim,
    store::{
        StoreErrorKind,
        fake::{Call, FakeBackend, Fault, eventually},
    },
    telemetry::{CommitLabels, CommitPath},
};

/// Longer than anything takes that happens at all, in paused time.
const LONG: Duration = Duration::from_secs(3600);

/// The label of the drain's metrics.
const BEHIND: CommitLabels = CommitLabels {
    path: CommitPath::Behind,
};

struct Rig {
    backend: FakeBackend,
    queue: Queue,
    notices: mpsc::Receiver<Notice>,
    metrics: (QueueMetrics, StoreMetrics),
    workers: Vec<JoinHandle<()>>,
}

/// A queue with one worker over an empty store, changed as a test needs it.
fn rig(change: impl FnOnce(&mut Config)) -> Rig {
    rig_on(FakeBackend::new(), (sim::journal(), Vec::new()), change)
}

/// The same over what an earlier process left.
fn rig_on(
    backend: FakeBackend,
    (journal, recovered): (Journal, Vec<(Write, Record)>),
    change: impl FnOnce(&mut Config),
) -> Rig {
    let mut config = Config {
        drain_workers: bound(1),
        drain_interval: Duration::ZERO,
        ..Config::default()
    };
    change(&mut config);
    config.validate().expect("valid");
    let metrics = (
        QueueMetrics::default(),
        StoreMetrics::register(&mut Registry::default()),
    );
    let parts = Parts {
        store: backend.store(),
        clock: Arc::new(Clock::new(1, None)),
        journal,
        recovered,
        metrics: metrics.0.clone(),
        store_metrics: metrics.1.clone(),
    };
    let Started {
        queue,
        notices,
        workers,
    } = Queue::start(&config, parts, &CancellationToken::new());
    Rig {
        backend,
        queue,
        notices,
        metrics,
        workers,
    }
}

/// Asks for room for a write that is to rest on memory.
async fn admit(queue: &Queue, write: &Write, full: QueueFull, deadline: Instant) -> Result<Admission, Error> {
    let admission = queue.admit(
        &write.key,
        write.content_bytes(),
        BehindDurability::Memory,
        full,
        deadline,
    );
    admission.await
}

impl Rig {
    /// Puts, if there is room.
    fn put(&self, name: &str, version: i64) {
        self.put_after(name, version, Duration::ZERO);
    }

    fn put_after(&self, name: &str, version: i64, write_delay: Duration) {
        let write = write(name, version);
        let passage = self.queue.enter(&write.key);
        let held = self.held(&write);
        self.queue.accept(write, held, passage, write_delay);
    }

    /// The next write that did not make it into the store.
    fn dropped(&mut self) -> Option<Dropped> {
        match self.notices.try_recv() {
            Ok(Notice::Dropped(dropped)) => Some(dropped),
            Ok(other) => panic!("nothing was recovered, and all is published: {other:?}"),
            Err(_) => None,
        }
    }

    /// Room for a write that rests on memory.
    fn held(&self, write: &Write) -> Held {
        let permit = self.queue.shared.budget.try_admit(write.weight()).expect("room");
        Held { permit, record: None }
    }

    fn standing(&self, name: &str) -> Option<i64> {
        self.backend.entry(&key(name)).map(|entry| entry.version.get())
    }

    fn history(&self, name: &str) -> Vec<i64> {
        let history = self.backend.history(&key(name));
        history.into_iter().map(Version::get).collect()
    }

    fn pending(&self, name: &str) -> Option<i64> {
        self.queue
            .pending(&key(name))
            .map(|pending| pending.entry.version.get())
    }

    /// The keys in the dead-letter table.
    fn dead(&self) -> BTreeSet<String> {
        let letters = self.backend.dead_letters();
        letters
            .into_iter()
            .map(|letter| letter.write.key.key().to_owned())
            .collect()
    }

    /// Has the next commit hang; returns once it does, with what releases it.
    async fn hang_commit(&self) -> Arc<Notify> {
        let (fault, release) = Fault::hang();
        let before = self.backend.calls(Call::Commit);
        self.backend.inject(Call::Commit, fault);
        self.put("hanging", 1);
        eventually(|| self.backend.calls(Call::Commit) > before).await;
        release
    }

    async fn empty(&self) {
        eventually(|| self.queue.stats().entries == 0).await;
        assert_eq!(
            self.queue.shared.budget.claimed(),
            (0, 0),
            "an empty queue holds no permit"
        );
    }
}

fn bound(number: usize) -> NonZeroUsize {
    NonZeroUsize::new(number).expect("at least one")
}

fn key(name: &str) -> Key {
    Key::new("test", name).expect("valid")
}

fn version(number: i64) -> Version {
    Version::new(number).expect("positive")
}

fn write(name: &str, number: i64) -> Write {
    Write {
        key: key(name),
        entry: Entry {
            version: version(number),
            value: Some(Bytes::from(number.to_be_bytes().to_vec())),
            expires_at: None,
        },
        tags: Tags::default(),
        requests: Vec::new(),
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_accepted_is_visible_at_once_and_then_in_the_store() {
    let rig = rig(|_| ());
    rig.put("k", 7);
    assert_eq!(rig.pending("k"), Some(7));
    let stats = rig.queue.stats();
    assert_eq!((stats.entries, stats.bytes), (1, write("k", 7).weight()));
    rig.empty().await;
    assert_eq!((rig.standing("k"), rig.pending("k")), (Some(7), None));
    assert_eq!(rig.metrics.0.accepted.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_newer_write_survives_the_settling_of_the_older_one_in_flight() {
    let rig = rig(|_| ());
    rig.put("k", 1);
    let (fault, release) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    eventually(|| rig.backend.calls(Call::Commit) == 1).await;
    rig.put("k", 3);
    rig.put("k", 2);
    assert_eq!(rig.pending("k"), Some(3), "the older one was refused");
    release.notify_one();
    rig.empty().await;
    assert_eq!(rig.history("k"), [1, 3]);
    assert_eq!(rig.metrics.0.coalesced.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_delete_after_a_put_in_one_batch_leaves_the_delete() {
    let rig = rig(|_| ());
    let release = rig.hang_commit().await;
    rig.put("k", 1);
    let mut tombstone = write("k", 2);
    tombstone.entry.value = None;
    let passage = rig.queue.enter(&tombstone.key);
    let held = rig.held(&tombstone);
    rig.queue.accept(tombstone.clone(), held, passage, Duration::ZERO);
    release.notify_one();
    rig.empty().await;
    assert_eq!(rig.backend.entry(&key("k")), Some(tombstone.entry));
    assert_eq!(rig.history("k"), [2], "only the newest was sent");
}

#[tokio::test(start_paused = true)]
async fn a_batch_holds_all_that_came_while_the_one_before_ran_sorted_by_key() {
    let rig = rig(|_| ());
    let release = rig.hang_commit().await;
    for name in ["c", "a", "d", "b"] {
        rig.put(name, 1);
    }
    release.notify_one();
    rig.empty().await;
    let commits = rig.backend.commits();
    let names: Vec<&str> = commits[1].writes.iter().map(|(key, _)| key.key()).collect();
    assert_eq!((commits.len(), names), (2, vec!["a", "b", "c", "d"]));
}

#[tokio::test(start_paused = true)]
async fn batches_keep_to_their_bounds() {
    let weight = write("k000", 1).weight();
    let rig = rig(|config| {
        config.drain_batch_writes_max = bound(300);
        config.drain_batch_bytes_max = bound(200 * weight);
    });
    let release = rig.hang_commit().await;
    for number in 0..500 {
        rig.put(&format!("k{number:03}"), 1);
    }
    release.notify_one();
    rig.empty().await;
    let sizes: Vec<usize> = rig.backend.commits().iter().map(|batch| batch.writes.len()).collect();
    assert_eq!(sizes, [1, 200, 200, 100]);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_outcome_is_tried_again_and_nothing_is_lost_or_doubled() {
    let rig = rig(|_| ());
    rig.backend.inject(Call::Commit, Fault::lose_reply());
    rig.backend.inject(Call::Commit, Fault::fail(StoreErrorKind::Unknown));
    rig.put("k", 1);
    rig.empty().await;
    assert_eq!(rig.history("k"), [1]);
    assert_eq!(rig.backend.commits().len(), 3);
    assert_eq!(rig.metrics.1.retries.get_or_create(&BEHIND).get(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_lands_late_does_not_undo_what_came_since() {
    let mut rig = rig(|_| ());
    rig.backend.inject(Call::Commit, Fault::land_later());
    rig.put("k", 1);
    eventually(|| rig.backend.commits().len() == 1).await;
    rig.put("k", 2);
    rig.empty().await;
    rig.backend.land();
    assert_eq!(rig.history("k"), [2]);
    assert!(rig.notices.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_hangs_is_cut_off_and_tried_again() {
    let rig = rig(|_| ());
    let (fault, _never) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    rig.put("k", 1);
    rig.empty().await;
    assert_eq!(rig.standing("k"), Some(1));
}

#[tokio::test(start_paused = true)]
async fn an_outage_loses_nothing_coalesces_and_is_not_hammered() {
    let rig = rig(|config| config.drain_workers = bound(3));
    rig.backend.down(true);
    for number in 0..5_000 {
        rig.put(&format!("k{number}"), 1);
    }
    sleep(Duration::from_secs(600)).await;
    for number in 0..5_000 {
        rig.put(&format!("k{number}"), 2);
    }
    let stats = rig.queue.stats();
    assert_eq!(stats.entries, 5_000);
    assert!(
        stats.oldest_age >= Duration::from_secs(600),
        "the age is that of the first write"
    );
    // Half of 10 s is the shortest wait once the backoff is at its bound.
    let tries = rig.backend.calls(Call::Commit);
    assert!((100..=3 * 140).contains(&tries), "{tries} tries in ten minutes");
    rig.backend.down(false);
    rig.empty().await;
    for number in 0..5_000 {
        assert_eq!(rig.history(&format!("k{number}")), [2]);
    }
}

#[tokio::test(start_paused = true)]
async fn exactly_the_poison_rows_are_buried_and_the_others_committed() {
    let mut rig = rig(|_| ());
    let poison: BTreeSet<String> = [0, 1, 77, 500, 998, 999].map(|number| format!("k{number:03}")).into();
    let refused = poison.clone();
    rig.backend.reject(move |write| refused.contains(write.key.key()));
    let release = rig.hang_commit().await;
    for number in 0..1_000 {
        rig.put(&format!("k{number:03}"), 1);
    }
    release.notify_one();
    rig.empty().await;
    assert_eq!(rig.dead(), poison);
    assert_eq!(rig.backend.rows(), 1 + 1_000 - poison.len());
    assert_eq!(rig.metrics.1.dead_letters.get(), 6);
    let mut told = BTreeSet::new();
    while let Some(dropped) = rig.dropped() {
        assert_eq!((dropped.version, dropped.why), (version(1), DropReason::DeadLettered));
        told.insert(dropped.key.key().to_owned());
    }
    assert_eq!(told, poison);
    let letter = &rig.backend.dead_letters()[0];
    assert_eq!(
        (letter.write.entry.version, letter.reason.as_str()),
        (version(1), "scripted refusal")
    );
}

#[tokio::test(start_paused = true)]
async fn a_lone_poison_row_is_buried_once_a_probe_succeeds() {
    let rig = rig(|_| ());
    rig.backend.reject(|_| true);
    rig.put("k", 1);
    rig.empty().await;
    assert_eq!((rig.dead().len(), rig.backend.calls(Call::Probe)), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_table_that_refuses_every_row_buries_none() {
    let rig = rig(|_| ());
    rig.backend.reject(|_| true);
    rig.backend
        .script(|call| (call == Call::Probe).then(|| Fault::fail(StoreErrorKind::Rejected)));
    for number in 0..100 {
        rig.put(&format!("k{number}"), 1);
    }
    eventually(|| rig.backend.calls(Call::Probe) > 20).await;
    assert_eq!((rig.queue.stats().entries, rig.backend.calls(Call::Bury)), (100, 0));
    rig.put("k0", 2);
    rig.backend.reject(|_| false);
    rig.empty().await;
    assert_eq!(
        rig.history("k0"),
        [2],
        "what was refused is joined with what came since"
    );
    assert_eq!((rig.backend.rows(), rig.dead().len()), (100, 0));
}

#[tokio::test(start_paused = true)]
async fn an_outage_in_the_middle_of_a_bisection_loses_nothing() {
    let rig = rig(|_| ());
    rig.backend.reject(|write| write.key.key() == "k13");
    let calls = AtomicI64::new(0);
    // Every third call fails, each time in another way.
    rig.backend
        .script(move |_| match calls.fetch_add(1, Ordering::Relaxed) % 9 {
            2 => Some(Fault::fail(StoreErrorKind::Transient)),
            5 => Some(Fault::lose_reply()),
            8 => Some(Fault::fail(StoreErrorKind::Unreachable)),
            _ => None,
        });
    for number in 0..64 {
        rig.put(&format!("k{number}"), 1);
    }
    rig.empty().await;
    assert_eq!(rig.backend.rows(), 63);
    assert_eq!(rig.dead(), BTreeSet::from(["k13".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn a_burial_is_tried_until_it_is_kept_and_holds_nobody_up() {
    let rig = rig(|_| ());
    rig.backend
        .reject(|write| write.key.key() == "poison" && write.entry.version == version(1));
    let broken = Arc::new(AtomicBool::new(true));
    let refuses = Arc::clone(&broken);
    rig.backend.script(move |call| {
        let fails = call == Call::Bury && refuses.load(Ordering::Relaxed);
        fails.then(|| Fault::fail(StoreErrorKind::Transient))
    });
    rig.put("poison", 1);
    eventually(|| rig.backend.calls(Call::Bury) > 0).await;
    let started = Instant::now();
    rig.put("good", 1);
    eventually(|| rig.standing("good") == Some(1)).await;
    assert!(started.elapsed() < Duration::from_millis(50));
    eventually(|| rig.backend.calls(Call::Bury) > 5).await;
    assert_eq!(rig.pending("poison"), Some(1), "kept until it is buried");
    rig.put("poison", 2);
    broken.store(false, Ordering::Relaxed);
    rig.empty().await;
    assert_eq!(rig.dead().len(), 1);
    assert_eq!(rig.history("poison"), [2], "a later good write proceeds");
}

#[tokio::test(start_paused = true)]
async fn a_write_that_lost_in_the_store_is_reported_with_what_stands() {
    let mut rig = rig(|_| ());
    rig.backend.put(write("k", 9));
    rig.put("k", 5);
    let dropped = timeout(LONG, rig.notices.recv())
        .await
        .expect("reported")
        .expect("open");
    let why = DropReason::Superseded { standing: version(9) };
    assert_eq!(
        dropped,
        Notice::Dropped(Dropped {
            key: key("k"),
            version: version(5),
            why
        })
    );
    rig.empty().await;
    assert_eq!(rig.history("k"), [9]);
    assert_eq!(rig.metrics.1.superseded.get_or_create(&BEHIND).get(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_comes_too_late_is_buried_alone_and_reported() {
    let mut rig = rig(|_| {});
    rig.backend.put(write("known", 3));
    rig.backend.raise_horizon(version(10));
    rig.backend.inject(Call::Bury, Fault::fail(StoreErrorKind::Transient));
    let release = rig.hang_commit().await;
    for (name, version) in [("fresh", 11), ("known", 4), ("late", 10)] {
        rig.put(name, version);
    }
    // A delete that finds nothing has nothing to do, however late it is.
    let mut deleted = write("deleted", 9);
    deleted.entry.value = None;
    let (passage, held) = (rig.queue.enter(&deleted.key), rig.held(&deleted));
    rig.queue.accept(deleted, held, passage, Duration::ZERO);
    release.notify_one();
    rig.empty().await;
    assert_eq!(rig.dead(), BTreeSet::from(["hanging".to_owned(), "late".to_owned()]));
    for letter in rig.backend.dead_letters() {
        assert_eq!(letter.code.as_deref(), Some("TG001"));
        assert!(letter.reason.contains("horizon 10"), "{}", letter.reason);
    }
    let standing = ["fresh", "known", "late"].map(|name| rig.standing(name));
    assert_eq!(standing, [Some(11), Some(4), None]);
    let mut reported = BTreeMap::new();
    while let Some(Dropped { key, version, why }) = rig.dropped() {
        assert_eq!(why, DropReason::DeadLettered);
        reported.insert(key.key().to_owned(), version.get());
    }
    assert_eq!(
        reported,
        BTreeMap::from([("hanging".to_owned(), 1), ("late".to_owned(), 10)])
    );
    // A newer write of the same key is none of that.
    rig.put("late", 12);
    rig.empty().await;
    assert_eq!(rig.standing("late"), Some(12));
    assert_eq!(rig.backend.dead_letters().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_drain_waits_for_a_slow_reader_of_what_was_dropped_and_not_for_one_who_left() {
    let mut rig = rig(|_| ());
    let many = NOTICES_MAX * 3;
    for number in 0..many {
        rig.backend.put(write(&format!("k{number}"), 9));
        rig.put(&format!("k{number}"), 5);
    }
    eventually(|| rig.notices.len() == NOTICES_MAX).await;
    sleep(Duration::from_secs(60)).await;
    assert!(rig.queue.stats().entries > 0, "the drain waits for the reader");
    let mut told = HashSet::new();
    for _ in 0..NOTICES_MAX {
        told.insert(rig.dropped().expect("there is one more").key);
    }
    assert_eq!(told.len(), NOTICES_MAX);
    rig.notices.close();
    while rig.notices.recv().await.is_some() {}
    rig.empty().await;
}

#[tokio::test(start_paused = true)]
async fn what_a_write_through_overtook_in_flight_is_gone_and_stays_gone() {
    let mut rig = rig(|_| ());
    rig.put("k", 1);
    let (fault, release) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    eventually(|| rig.backend.calls(Call::Commit) == 1).await;
    rig.backend.put(write("k", 5));
    rig.queue.overtake(&key("k"), version(5));
    assert_eq!((rig.pending("k"), rig.queue.stats().entries), (None, 0));
    rig.put("k", 8);
    release.notify_one();
    rig.empty().await;
    assert_eq!(rig.history("k"), [5, 8]);
    let dropped = rig.dropped().expect("the one in flight lost");
    assert_eq!(dropped.version, version(1));
}

#[tokio::test(start_paused = true)]
async fn overtaking_leaves_a_newer_pending_write() {
    let rig = rig(|_| ());
    let release = rig.hang_commit().await;
    rig.put("k", 5);
    rig.queue.overtake(&key("k"), version(4));
    assert_eq!(rig.pending("k"), Some(5));
    rig.queue.overtake(&key("k"), version(5));
    assert_eq!(rig.pending("k"), None);
    release.notify_one();
    rig.empty().await;
    assert_eq!(rig.history("k"), Vec::<i64>::new());
}

#[tokio::test(start_paused = true)]
async fn a_delay_joins_the_writes_of_a_key_and_counts_from_the_first() {
    let rig = rig(|_| ());
    let delay = Duration::from_secs(10);
    let started = Instant::now();
    for number in 1..=100 {
        rig.put_after("k", number, delay);
        sleep(Duration::from_millis(90)).await;
    }
    rig.put("prompt", 1);
    eventually(|| rig.standing("prompt") == Some(1)).await;
    assert_eq!(rig.standing("k"), None);
    rig.empty().await;
    let took = started.elapsed();
    assert_eq!(rig.history("k"), [100]);
    assert!((delay..delay + Duration::from_millis(20)).contains(&took), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn pressure_ends_every_delay() {
    let rig = rig(|config| config.entries_max = bound(10));
    let started = Instant::now();
    for number in 0..4 {
        rig.put_after(&format!("k{number}"), 1, LONG);
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(rig.backend.rows(), 0);
    rig.put_after("k4", 1, LONG);
    rig.empty().await;
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_room_ends_every_delay() {
    // The first write leaves the queue below its threshold, and yet without room for the second.
    let (light, heavy) = (write("light", 1), write("heavy", 1));
    let rig = rig(|config| {
        config.bytes_max = bound(light.weight() + heavy.weight() - 1);
        config.pressure = 1.0;
    });
    rig.put_after("light", 1, LONG);
    // The worker sees it, and goes to sleep on it.
    sleep(Duration::from_secs(1)).await;
    let deadline = Instant::now() + Duration::from_secs(1);
    let admission = admit(&rig.queue, &heavy, QueueFull::Wait, deadline).await;
    assert!(matches!(admission, Ok(Admission::Granted(_))));
    assert_eq!(rig.standing("light"), Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_does_what_the_namespace_says() {
    let rig = rig(|config| config.entries_max = bound(1));
    let release = rig.hang_commit().await;
    let deadline = Instant::now() + Duration::from_secs(1);
    let any = write("any", 1);
    let admit = |full| admit(&rig.queue, &any, full, deadline);

    let started = Instant::now();
    assert!(matches!(
        admit(QueueFull::WriteThrough).await,
        Ok(Admission::WriteThrough)
    ));
    let refused = admit(QueueFull::Reject).await.expect_err("full");
    assert_eq!(
        (refused.kind(), refused.retry_delay()),
        (ErrorKind::Overloaded, Some(RETRY_AFTER))
    );
    assert_eq!(started.elapsed(), Duration::ZERO, "neither waits");

    let late = admit(QueueFull::Wait).await.expect_err("full");
    assert_eq!((late.kind(), late.outcome()), (ErrorKind::Timeout, Outcome::NotApplied));
    assert_eq!(Instant::now(), deadline);

    let waiting = {
        let queue = rig.queue.clone();
        tokio::spawn(async move { self::admit(&queue, &write("any", 1), QueueFull::Wait, deadline + LONG).await })
    };
    eventually(|| rig.queue.shared.budget.is_pressed()).await;
    release.notify_one();
    assert!(matches!(waiting.await.expect("no panic"), Ok(Admission::Granted(_))));
    assert_eq!(rig.metrics.0.full.get(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_while_the_store_is_down_says_to_come_back_later() {
    let rig = rig(|config| config.entries_max = bound(1));
    rig.backend.down(true);
    rig.put("k", 1);
    eventually(|| rig.backend.calls(Call::Commit) > 0).await;
    let refused = admit(&rig.queue, &write("any", 1), QueueFull::Reject, Instant::now())
        .await
        .expect_err("full");
    assert_eq!(refused.retry_delay(), Some(Config::default().retry_backoff_max));
}

#[tokio::test(start_paused = true)]
async fn a_closed_queue_admits_nothing_takes_what_it_admitted_and_drains_without_delay() {
    let rig = rig(|_| ());
    let started = Instant::now();
    rig.put_after("waits", 1, LONG);
    let admitted = rig.held(&write("admitted", 1));
    rig.queue.close();
    for full in [QueueFull::Wait, QueueFull::Reject, QueueFull::WriteThrough] {
        let refused = admit(&rig.queue, &write("any", 1), full, Instant::now() + LONG).await;
        let refused = refused.expect_err("closed");
        assert_eq!(refused.kind(), ErrorKind::Unavailable);
    }
    let left = rig.queue.drained(Instant::now() + Duration::from_secs(1)).await;
    assert_eq!(left.entries, 1, "the admitted one is still to come");
    let passage = rig.queue.enter(&key("admitted"));
    rig.queue.accept(write("admitted", 1), admitted, passage, LONG);
    let left = rig.queue.drained(Instant::now() + Duration::from_secs(1)).await;
    assert_eq!(
        left,
        Left {
            entries: 0,
            bytes: 0,
            lost: 0
        }
    );
    assert_eq!((rig.standing("waits"), rig.standing("admitted")), (Some(1), Some(1)));
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn closing_fails_who_waits_for_room() {
    let rig = rig(|config| config.entries_max = bound(1));
    let _release = rig.hang_commit().await;
    let waiting = {
        let queue = rig.queue.clone();
        tokio::spawn(async move { admit(&queue, &write("any", 1), QueueFull::Wait, Instant::now() + LONG).await })
    };
    eventually(|| rig.metrics.0.full.get() == 1).await;
    rig.queue.close();
    let refused = waiting.await.expect("no panic").expect_err("closed");
    assert_eq!(refused.kind(), ErrorKind::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_drained_until_the_deadline_is_counted() {
    let rig = rig(|_| ());
    rig.backend.down(true);
    for number in 0..3 {
        rig.put(&format!("k{number}"), 1);
    }
    rig.queue.close();
    let deadline = Instant::now() + Duration::from_secs(5);
    let left = rig.queue.drained(deadline).await;
    let bytes = 3 * write("k0", 1).weight();
    assert_eq!(
        (left, Instant::now()),
        (
            Left {
                entries: 3,
                bytes,
                lost: 3
            },
            deadline
        )
    );
}

#[tokio::test(start_paused = true)]
async fn a_closing_queue_notices_the_stores_return_within_a_second() {
    let rig = rig(|_| ());
    rig.backend.down(true);
    rig.put("k", 1);
    sleep(Duration::from_secs(300)).await;
    rig.backend.down(false);
    rig.queue.close();
    let left = rig.queue.drained(Instant::now() + Duration::from_millis(1_100)).await;
    assert_eq!(left.entries, 0);
}

#[tokio::test(start_paused = true)]
async fn an_idle_queue_asks_the_store_nothing() {
    let rig = rig(|_| ());
    rig.put("k", 1);
    rig.empty().await;
    sleep(LONG).await;
    assert_eq!(rig.backend.calls(Call::Commit), 1);
}

#[tokio::test(start_paused = true)]
async fn a_store_with_one_writer_gets_one() {
    let backend = FakeBackend::new();
    backend.set_writers_max(1);
    let rig = rig_on(backend, (sim::journal(), Vec::new()), |config| {
        config.drain_workers = bound(4)
    });
    assert_eq!(rig.workers.len(), 1);
}

/// Seeded: callers of every policy against small bounds and a faulty store. The bounds hold at every look, what was accepted ends
/// in the store, and nothing waits for ever.
#[tokio::test(start_paused = true)]
async fn bounds_hold_in_a_storm() {
    for seed in 0..20 {
        let rig = rig(|config| {
            config.entries_max = bound(50);
            config.bytes_max = bound(6_000);
            config.drain_workers = bound(3);
            config.drain_batch_writes_max = bound(8);
        });
        rig.backend.script(faults(seed));
        let accepted: Arc<Mutex<BTreeMap<Key, Version>>> = Arc::default();
        let mut callers = JoinSet::new();
        for caller in 0..40 {
            let queue = rig.queue.clone();
            let accepted = Arc::clone(&accepted);
            let mut random = StdRng::seed_from_u64(seed * 1_000 + caller);
            callers.spawn(async move {
                for round in 0..30_u64 {
                    let name = format!("k{}", random.random_range(0..60));
                    let mut write = write(&name, (round * 40 + caller + 1) as i64);
                    // Now and then one that is heavier than the whole bound.
                    let size = [10, 500, 20_000][[0, 0, 0, 0, 1, 1, 1, 1, 2][random.random_range(0..9)]];
                    write.entry.value = Some(Bytes::from(vec![0; size]));
                    let full = [QueueFull::Wait, QueueFull::Reject, QueueFull::WriteThrough][random.random_range(0..3)];
                    let delay = Duration::from_millis(random.random_range(0..200));
                    let deadline = Instant::now() + Duration::from_millis(random.random_range(0..2_000));
                    if let Ok(Admission::Granted(Claim { permit, .. })) = admit(&queue, &write, full, deadline).await {
                        sleep(Duration::from_millis(random.random_range(0..5))).await;
                        let (key, version) = (write.key.clone(), write.entry.version);
                        let passage = queue.enter(&write.key);
                        queue.accept(write, Held { permit, record: None }, passage, delay);
                        let mut accepted = accepted.lock();
                        let newest = accepted.entry(key).or_insert(version);
                        *newest = version.max(*newest);
                    }
                    let stats = queue.stats();
                    assert!(stats.entries <= 50, "seed {seed}: {stats:?}");
                    assert!(stats.bytes <= 6_000 || stats.entries == 1, "seed {seed}: {stats:?}");
                }
            });
        }
        while let Some(ended) = callers.join_next().await {
            ended.expect("no panic");
        }
        rig.queue.close();
        let left = rig.queue.drained(Instant::now() + LONG).await;
        assert_eq!(left.entries, 0, "seed {seed}");
        let accepted = accepted.lock();
        assert!(accepted.len() > 30, "seed {seed}: hardly anything was accepted");
        for (key, version) in accepted.iter() {
            let stands = rig.backend.entry(key).map(|entry| entry.version);
            assert_eq!(stands, Some(*version), "seed {seed}");
        }
    }
}

/// A script of random faults in a third of all calls.
fn faults(seed: u64) -> impl FnMut(Call) -> Option<Fault> + Send {
    let mut random = StdRng::seed_from_u64(seed);
    move |_| match random.random_range(0..18) {
        0 => Some(Fault::fail(StoreErrorKind::Transient)),
        1 => Some(Fault::fail(StoreErrorKind::Unknown)),
        2 => Some(Fault::fail(StoreErrorKind::Unreachable)),
        3 | 4 => Some(Fault::lose_reply()),
        5 => Some(Fault::delay(Duration::from_millis(2))),
        _ => None,
    }
}

/// In real time and on real threads: many write few keys and overtake some while workers drain with faults. Each thread reads what it
/// wrote, or newer; at the end the store holds the highest version of each key, and none ever stepped back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_highest_version_stands_whatever_the_threads_do() {
    const THREADS: u64 = 8;
    const WRITES: u64 = 3_000;
    const KEYS: usize = 5;
    let rig = rig(|config| {
        config.drain_workers = bound(3);
        config.drain_batch_writes_max = bound(3);
        config.retry_backoff_min = Duration::from_micros(100);
        config.retry_backoff_max = Duration::from_millis(1);
    });
    rig.backend.script(faults(1));
    let next = Arc::new(AtomicI64::new(1));
    let highest: Arc<Mutex<BTreeMap<Key, Version>>> = Arc::default();
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (queue, backend) = (rig.queue.clone(), rig.backend.clone());
            let (next, highest) = (Arc::clone(&next), Arc::clone(&highest));
            std::thread::spawn(move || {
                let mut random = StdRng::seed_from_u64(thread);
                for _ in 0..WRITES {
                    let name = format!("k{}", random.random_range(0..KEYS));
                    let write = write(&name, next.fetch_add(1, Ordering::Relaxed));
                    let (key, version) = (write.key.clone(), write.entry.version);
                    if random.random_range(0..20) == 0 {
                        backend.put(write);
                        queue.overtake(&key, version);
                    } else {
                        let permit = queue.shared.budget.try_admit(write.weight()).expect("room");
                        let passage = queue.enter(&write.key);
                        queue.accept(write, Held { permit, record: None }, passage, Duration::ZERO);
                    }
                    // In this order: what left the table meanwhile is in the store by then.
                    let pending = queue.pending(&key).map(|pending| pending.entry);
                    let read = [pending, backend.entry(&key)]
                        .into_iter()
                        .flatten()
                        .max_by_key(|entry| entry.version);
                    assert!(
                        read.is_some_and(|entry| entry.version >= version),
                        "a write was not read back"
                    );
                    let mut highest = highest.lock();
                    let newest = highest.entry(key).or_insert(version);
                    *newest = version.max(*newest);
                }
            })
        })
        .collect();
    let mut dropped = rig.notices;
    let reader = tokio::spawn(async move { while dropped.recv().await.is_some() {} });
    tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| thread.join().expect("no panic")))
        .await
        .expect("no panic");
    rig.queue.close();
    let left = rig.queue.drained(Instant::now() + Duration::from_secs(60)).await;
    assert_eq!(left.entries, 0);
    let highest = highest.lock().clone();
    assert_eq!(highest.len(), KEYS);
    for (key, version) in highest {
        assert_eq!(rig.backend.entry(&key).map(|entry| entry.version), Some(version));
        assert!(rig.backend.history(&key).is_sorted());
    }
    reader.abort();
}
