//! Commits on the store in memory, in paused time: each row of the table in the module's head, and all at once under random faults.

use std::time::Duration;

use bytes::Bytes;
use prometheus_client::registry::Registry;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{sleep, timeout};

use super::*;
use crate::{
    clock::Clock,
    model::{Entry, Key, Tags},
    store::{
        StoreErrorKind,
        fake::{Call, FakeBackend, Fault, eventually},
        gather::RETRY_AFTER,
        load::GroupLoad,
        tries::TRIES_MAX,
        watch,
    },
    telemetry::CommitLabels,
};

/// The bound on a call of the fake store's sessions.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

struct Rig {
    fake: FakeBackend,
    store: Store,
    commits: GroupCommit,
    metrics: StoreMetrics,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

/// A path of so many connections: with one, what waits is what one statement takes.
fn rig(connections: usize) -> Rig {
    let fake = FakeBackend::new();
    rig_over(fake.clone(), fake.store(), connections)
}

fn rig_over(fake: FakeBackend, store: Store, connections: usize) -> Rig {
    let config = Config {
        commit_connections: connections.try_into().expect("not zero"),
        ..Config::default()
    };
    let metrics = StoreMetrics::register(&mut Registry::default());
    let commits = GroupCommit::new(store.clone(), &config, metrics.clone());
    let stop = CancellationToken::new();
    let tasks = commits.start(&stop);
    Rig {
        fake,
        store,
        commits,
        metrics,
        stop,
        tasks,
    }
}

fn key(name: &str) -> Key {
    Key::new("orders", name).expect("valid")
}

fn version(number: i64) -> Version {
    Version::new(number).expect("positive")
}

fn write(name: &str, number: i64) -> Write {
    Write {
        key: key(name),
        entry: Entry {
            version: version(number),
            value: Some(Bytes::from(format!("{name}{number}"))),
            expires_at: None,
        },
        tags: Tags::default(),
        requests: Vec::new(),
    }
}

type Outcomes = JoinHandle<Result<Committed, Error>>;

/// What a caller is told, as the tests compare it.
type Told = Result<Committed, (ErrorKind, Outcome)>;

const NOT_THERE: Told = Err((ErrorKind::Unavailable, Outcome::NotApplied));

impl Rig {
    fn commit(&self, name: &str, number: i64) -> Outcomes {
        self.commit_within(name, number, Duration::from_secs(5))
    }

    fn commit_within(&self, name: &str, number: i64, time: Duration) -> Outcomes {
        let commits = self.commits.clone();
        let (write, deadline) = (write(name, number), Instant::now() + time);
        tokio::spawn(async move { commits.commit(write, deadline).await })
    }

    /// Commits several writes in one statement, the first of which goes wrong as the faults say.
    async fn together(&self, writes: &[(&str, i64)], faults: impl IntoIterator<Item = Fault>) -> Vec<Outcomes> {
        let (hang, release) = Fault::hang();
        self.fake.inject(Call::Commit, hang);
        let before = self.fake.calls(Call::Commit);
        let first = self.commit("before", 1_000 + i64::try_from(before).expect("few"));
        eventually(|| self.fake.calls(Call::Commit) > before).await;
        for fault in faults {
            self.fake.inject(Call::Commit, fault);
        }
        let waiting = writes.iter().map(|(name, number)| self.commit(name, *number)).collect();
        tokio::task::yield_now().await;
        release.notify_one();
        assert_eq!(told(first).await, Ok(Committed::Applied));
        waiting
    }

    fn sizes(&self) -> Vec<usize> {
        self.fake.commits().iter().map(|batch| batch.writes.len()).collect()
    }
}

async fn told(outcome: Outcomes) -> Told {
    let result = outcome.await.expect("no panic");
    result.map_err(|error| (error.kind(), error.outcome()))
}

async fn all_told(outcomes: Vec<Outcomes>) -> Vec<Told> {
    let mut all = Vec::new();
    for outcome in outcomes {
        all.push(told(outcome).await);
    }
    all
}

#[tokio::test(start_paused = true)]
async fn whoever_arrives_while_a_commit_runs_shares_the_next() {
    let rig = rig(1);
    let names: Vec<String> = (0..100).map(|number| format!("{:02}", (number * 37) % 100)).collect();
    let writes: Vec<(&str, i64)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    let outcomes = rig.together(&writes, []).await;
    assert!(
        all_told(outcomes)
            .await
            .iter()
            .all(|told| *told == Ok(Committed::Applied))
    );
    assert_eq!(rig.sizes(), [1, 100]);
    assert_eq!(rig.fake.rows(), 101);
}

#[tokio::test(start_paused = true)]
async fn of_one_key_the_highest_is_written_and_the_lower_share_its_fate() {
    let rig = rig(1);
    let outcomes = rig.together(&[("a", 3), ("a", 7), ("b", 1), ("a", 5)], []).await;
    assert_eq!(all_told(outcomes).await, [Ok(Committed::Applied); 4]);
    assert_eq!(rig.fake.history(&key("a")), [version(7)]);

    rig.fake.put(write("a", 20));
    let outcomes = rig.together(&[("a", 8), ("a", 9)], []).await;
    let superseded = Ok(Committed::Superseded { standing: version(20) });
    assert_eq!(all_told(outcomes).await, [superseded; 2]);
    assert_eq!(rig.fake.history(&key("a")), [version(7), version(20)]);
}

#[tokio::test(start_paused = true)]
async fn a_poison_row_fails_its_caller_alone_and_frees_its_riders() {
    let rig = rig(1);
    rig.fake
        .reject(|write| write.entry.value.as_deref() == Some(b"05".as_slice()) || write.entry.version.get() == 666);
    let names: Vec<String> = (0..64).map(|number| format!("{number:02}")).collect();
    let mut writes: Vec<(&str, i64)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    writes.extend([("05", 666), ("40", 666)]);
    let outcomes = rig.together(&writes, []).await;
    let told = all_told(outcomes).await;
    assert_eq!(told[..64], [Ok(Committed::Applied); 64]);
    assert_eq!(told[64..], [Err((ErrorKind::Rejected, Outcome::NotApplied)); 2]);
    assert_eq!(rig.fake.entry(&key("05")).map(|entry| entry.version), Some(version(1)));
    assert!(rig.sizes().len() < 30, "bisected, not one by one: {:?}", rig.sizes());
    assert_eq!(rig.fake.calls(Call::Probe), 2);
}

#[tokio::test(start_paused = true)]
async fn a_table_that_refuses_every_row_makes_no_row_poison() {
    let rig = rig(1);
    rig.fake.reject(|_| true);
    rig.fake.inject(Call::Probe, Fault::fail(StoreErrorKind::Rejected));
    assert_eq!(told(rig.commit("a", 1)).await, NOT_THERE);
}

#[tokio::test(start_paused = true)]
async fn an_unreachable_store_is_told_at_once_to_all() {
    let rig = rig(1);
    let begun = Instant::now();
    rig.fake.down(true);
    assert_eq!(told(rig.commit("a", 1)).await, NOT_THERE);
    assert!(rig.store.breaker().is_open());
    let failed = rig.commit("a", 1).await.expect("no panic").expect_err("down");
    assert_eq!(failed.retry_delay(), Some(RETRY_AFTER));
    assert_eq!(rig.fake.calls(Call::Commit), 1, "the breaker is open for the second");
    assert!(begun.elapsed() < Duration::from_millis(10));
    assert_eq!(rig.fake.rows(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_waits_while_every_connection_hangs_is_told_when_the_breaker_opens() {
    let rig = rig(1);
    rig.fake.inject(Call::Commit, Fault::hang().0);
    let runs = rig.commit("a", 1);
    eventually(|| rig.fake.calls(Call::Commit) == 1).await;
    let waits = rig.commit("b", 1);
    tokio::task::yield_now().await;
    let begun = Instant::now();
    rig.store.breaker().failed(StoreErrorKind::Unreachable);
    assert_eq!(told(waits).await, NOT_THERE);
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(told(runs).await, Err((ErrorKind::Timeout, Outcome::Unknown)));
}

#[tokio::test(start_paused = true)]
async fn a_passing_refusal_is_tried_again_a_few_times() {
    let rig = rig(1);
    for _ in 0..TRIES_MAX - 1 {
        rig.fake.inject(Call::Commit, Fault::fail(StoreErrorKind::Transient));
    }
    assert_eq!(told(rig.commit("a", 1)).await, Ok(Committed::Applied));

    rig.fake.script(|_| Some(Fault::fail(StoreErrorKind::Transient)));
    let begun = Instant::now();
    assert_eq!(told(rig.commit("a", 2)).await, NOT_THERE);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    rig.store.breaker().succeeded();
    // No try fits before the deadline: told before it, while "not applied" is certain.
    let begun = Instant::now();
    assert_eq!(
        told(rig.commit_within("a", 3, Duration::from_millis(4))).await,
        NOT_THERE
    );
    assert!(begun.elapsed() < Duration::from_millis(4));
    assert_eq!(rig.fake.history(&key("a")), [version(1)]);
}

#[tokio::test(start_paused = true)]
async fn after_a_lost_reply_the_same_version_is_tried_again() {
    let rig = rig(1);
    let faults = [
        Fault::lose_reply(),
        Fault::fail(StoreErrorKind::Unknown),
        Fault::lose_reply(),
    ];
    let outcomes = rig.together(&[("a", 5), ("a", 4), ("b", 9)], faults).await;
    assert_eq!(all_told(outcomes).await, [Ok(Committed::Applied); 3]);
    assert_eq!(rig.fake.history(&key("a")), [version(5)]);
    let tries = rig.fake.commits();
    assert_eq!(tries.len(), 5);
    for one in &tries[1..] {
        assert_eq!(one.writes, [(key("a"), version(5)), (key("b"), version(9))]);
    }
    let label = CommitLabels {
        path: CommitPath::Through,
    };
    assert_eq!(rig.metrics.retries.get_or_create(&label).get(), 3);
}

/// The higher one was in doubt and is left in doubt; the lower one was never sent, so its caller learns of a definite refusal.
#[tokio::test(start_paused = true)]
async fn a_newer_write_met_after_a_lost_reply_leaves_only_what_was_sent_unknown() {
    let rig = rig(1);
    let outcomes = rig.together(&[("a", 5), ("a", 4)], [Fault::lose_reply()]).await;
    eventually(|| rig.fake.commits().len() == 2).await;
    rig.fake.put(write("a", 8));
    let superseded = Ok(Committed::Superseded { standing: version(8) });
    let unknown = Err((ErrorKind::Unavailable, Outcome::Unknown));
    assert_eq!(all_told(outcomes).await, [unknown, superseded]);
    assert_eq!(rig.fake.history(&key("a")), [version(5), version(8)]);
}

#[tokio::test(start_paused = true)]
async fn the_horizon_stands_where_nothing_else_does() {
    let rig = rig(1);
    rig.fake.raise_horizon(version(8));
    let outcomes = rig.together(&[("a", 8), ("a", 7), ("b", 9)], []).await;
    let superseded = Ok(Committed::Superseded { standing: version(8) });
    assert_eq!(
        all_told(outcomes).await,
        [superseded, superseded, Ok(Committed::Applied)]
    );
    assert_eq!(told(rig.commit("a", 9)).await, Ok(Committed::Applied));
}

/// It may have been taken, then deleted and collected, for all that anybody can tell.
#[tokio::test(start_paused = true)]
async fn a_write_in_doubt_that_is_below_the_horizon_is_left_unknown() {
    let rig = rig(1);
    let fault = Fault::fail(StoreErrorKind::Unknown).after(Duration::from_millis(100));
    let outcomes = rig.together(&[("a", 5)], [fault]).await;
    eventually(|| rig.fake.calls(Call::Commit) == 2).await;
    rig.fake.raise_horizon(version(8));
    let unknown = Err((ErrorKind::Unavailable, Outcome::Unknown));
    assert_eq!(all_told(outcomes).await, [unknown]);
    assert!(rig.fake.entry(&key("a")).is_none());
}

#[tokio::test(start_paused = true)]
async fn what_is_in_doubt_waits_for_the_store_to_return_and_its_riders_do_not() {
    let rig = rig(1);
    let watch = watch::start(rig.store.clone(), &rig.stop);
    let outcomes = rig.together(&[("a", 5), ("a", 4)], [Fault::land_later()]).await;
    eventually(|| rig.fake.commits().len() == 2).await;
    rig.fake.down(true);
    let mut outcomes = outcomes.into_iter();
    let (sent, rider) = (outcomes.next().expect("two"), outcomes.next().expect("two"));
    assert_eq!(told(rider).await, NOT_THERE);
    sleep(Duration::from_secs(2)).await;
    assert!(!sent.is_finished());
    rig.fake.down(false);
    assert_eq!(told(sent).await, Ok(Committed::Applied));
    rig.fake.land();
    assert_eq!(rig.fake.history(&key("a")), [version(5)]);
    rig.stop.cancel();
    watch.await.expect("no panic");
}

#[tokio::test(start_paused = true)]
async fn a_deadline_says_whether_the_write_was_ever_sent() {
    let rig = rig(1);
    rig.fake.inject(Call::Commit, Fault::hang().0);
    let sent = rig.commit("a", 1);
    eventually(|| rig.fake.calls(Call::Commit) == 1).await;
    let waits = rig.commit("b", 1);
    let begun = Instant::now();
    assert_eq!(told(waits).await, Err((ErrorKind::Timeout, Outcome::NotApplied)));
    assert!(begun.elapsed() <= Duration::from_secs(5), "at its deadline");
    assert_eq!(told(sent).await, Err((ErrorKind::Timeout, Outcome::Unknown)));
    assert!(
        begun.elapsed() <= CALL_TIMEOUT + Duration::from_secs(1),
        "when the time of the call is up"
    );
    // The connection is good again, and neither is tried any more.
    assert_eq!(
        told(rig.commit_within("c", 1, Duration::from_secs(10))).await,
        Ok(Committed::Applied)
    );
    assert_eq!(rig.fake.rows(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_write_goes_on_when_its_caller_hangs_up() {
    let rig = rig(1);
    let mut outcomes = rig
        .together(&[("a", 1)], [Fault::delay(Duration::from_millis(50))])
        .await;
    let outcome = outcomes.pop().expect("one");
    outcome.abort();
    assert!(outcome.await.expect_err("aborted").is_cancelled());
    eventually(|| rig.fake.entry(&key("a")).is_some()).await;
}

#[tokio::test(start_paused = true)]
async fn as_many_connections_as_the_store_can_use() {
    let fake = FakeBackend::new();
    fake.set_writers_max(1);
    let metrics = StoreMetrics::register(&mut Registry::default());
    let commits = GroupCommit::new(fake.store(), &Config::default(), metrics);
    assert_eq!(commits.start(&CancellationToken::new()).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_shutdown_finishes_what_runs_and_answers_what_waits() {
    let rig = rig(1);
    rig.fake.inject(Call::Commit, Fault::delay(Duration::from_millis(100)));
    let runs = rig.commit("a", 1);
    eventually(|| rig.fake.calls(Call::Commit) == 1).await;
    let waits = rig.commit("b", 1);
    tokio::task::yield_now().await;
    rig.stop.cancel();
    assert_eq!(told(runs).await, Ok(Committed::Applied));
    assert_eq!(told(waits).await, NOT_THERE);
    for task in rig.tasks {
        timeout(Duration::from_secs(1), task)
            .await
            .expect("ends")
            .expect("no panic");
    }
}

#[tokio::test(start_paused = true)]
async fn the_shutdown_leaves_what_is_in_doubt_unknown() {
    let rig = rig(1);
    rig.fake
        .script(|call| (call == Call::Commit).then(|| Fault::fail(StoreErrorKind::Unknown)));
    let outcome = rig.commit("a", 1);
    eventually(|| rig.fake.calls(Call::Commit) == 2).await;
    rig.stop.cancel();
    assert_eq!(told(outcome).await, Err((ErrorKind::Unavailable, Outcome::Unknown)));
}

/// In real time, as in the gateway: the callers' runtimes are not the connections'. A wake-up that got lost would end in a timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_on_other_runtimes_are_all_answered() {
    let rig = rig(4);
    let callers: Vec<_> = ["a", "b"]
        .map(|thread| {
            let commits = rig.commits.clone();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_time()
                    .build()
                    .expect("a runtime");
                runtime.block_on(async {
                    let tasks: Vec<_> = (0..64)
                        .map(|caller| (commits.clone(), format!("{thread}{caller}")))
                        .map(|(commits, name)| {
                            tokio::spawn(async move {
                                for number in 1..=50 {
                                    let deadline = Instant::now() + Duration::from_secs(20);
                                    let committed = commits.commit(write(&name, number), deadline).await;
                                    assert_eq!(committed.expect("an answer"), Committed::Applied);
                                }
                            })
                        })
                        .collect();
                    for task in tasks {
                        task.await.expect("no panic");
                    }
                });
            })
        })
        .into();
    for caller in callers {
        let joined = tokio::task::spawn_blocking(|| caller.join()).await.expect("no panic");
        assert!(joined.is_ok());
    }
    assert_eq!(rig.fake.rows(), 128);
    assert!(rig.sizes().len() < 6_400, "some commits were shared");
}

/// Many callers on few keys while everything goes wrong at random. Whatever a caller is told has to be true of the store's history,
/// also after every statement that was cut off has landed.
#[tokio::test(start_paused = true)]
async fn what_callers_are_told_is_true_under_random_faults() {
    let (mut applied, mut absent, mut unknown) = (0, 0, 0);
    for seed in 0..100 {
        let tally = storm(seed).await;
        applied += tally.applied;
        absent += tally.absent.len();
        unknown += tally.unknown;
    }
    // It is no storm where nothing comes through, or everything.
    assert!(
        applied > 10_000 && absent > 10_000 && unknown > 1_000,
        "{applied} applied, {absent} absent, {unknown} unknown"
    );
}

const KEYS: [&str; 5] = ["a", "b", "c", "d", "e"];
const POISON: &[u8] = b"poison";

async fn storm(seed: u64) -> Tally {
    let fake = FakeBackend::new();
    let store = Store::new(Arc::new(fake.clone()), Arc::default(), Duration::from_millis(200));
    let rig = rig_over(fake, store, 3);
    let watch = watch::start(rig.store.clone(), &rig.stop);
    let loads = GroupLoad::new(rig.store.clone(), &Config::default(), rig.metrics.clone());
    let loaders = loads.start(&rig.stop);
    rig.fake.reject(|write| write.entry.value.as_deref() == Some(POISON));
    let mut rng = StdRng::seed_from_u64(seed);
    rig.fake.script(move |call| random_fault(call, &mut rng));

    let clock = Arc::new(Clock::new(1, None));
    let callers: Vec<_> = (0..40)
        .map(|caller| {
            let caller = Caller {
                rng: StdRng::seed_from_u64(seed << 32 | caller),
                rig: (rig.fake.clone(), rig.commits.clone(), loads.clone()),
                clock: Arc::clone(&clock),
            };
            tokio::spawn(caller.run())
        })
        .collect();
    let weather = {
        let fake = rig.fake.clone();
        let mut rng = StdRng::seed_from_u64(!seed);
        tokio::spawn(async move {
            loop {
                sleep(Duration::from_millis(rng.random_range(1..200))).await;
                fake.land();
                fake.down(rng.random_bool(0.03));
            }
        })
    };
    let mut tally = Tally::default();
    for caller in callers {
        let told = caller.await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        tally.applied += told.applied;
        tally.unknown += told.unknown;
        tally.absent.extend(told.absent);
    }
    weather.abort();
    rig.fake.land();
    rig.stop.cancel();
    for task in rig.tasks.into_iter().chain(loaders).chain([watch]) {
        task.await.expect("no panic");
    }
    for (key, version) in &tally.absent {
        assert!(
            !rig.fake.history(key).contains(version),
            "seed {seed}: told absent, yet it stood"
        );
    }
    for key in KEYS.map(key) {
        assert!(rig.fake.history(&key).is_sorted(), "seed {seed}");
    }
    tally
}

fn random_fault(call: Call, rng: &mut StdRng) -> Option<Fault> {
    let fault = match rng.random_range(0..100) {
        0..60 => Fault::default(),
        60..72 => Fault::fail(StoreErrorKind::Transient),
        72..73 => Fault::fail(StoreErrorKind::Unreachable),
        73..80 => Fault::fail(StoreErrorKind::Unknown),
        80..90 => Fault::lose_reply(),
        90..98 => Fault::land_later(),
        98 if call == Call::Probe => Fault::fail(StoreErrorKind::Rejected),
        _ => Fault::hang().0,
    };
    Some(fault.after(Duration::from_millis(rng.random_range(0..20))))
}

struct Caller {
    rng: StdRng,
    rig: (FakeBackend, GroupCommit, GroupLoad),
    clock: Arc<Clock>,
}

/// What callers were told.
#[derive(Default)]
struct Tally {
    applied: usize,
    unknown: usize,
    /// The writes that are not in the store and never will be.
    absent: Vec<(Key, Version)>,
}

impl Caller {
    /// Writes at random.
    async fn run(mut self) -> Tally {
        let (fake, commits, loads) = self.rig;
        let mut tally = Tally::default();
        for _ in 0..20 {
            sleep(Duration::from_millis(self.rng.random_range(0..30))).await;
            let key = key(KEYS[self.rng.random_range(0..KEYS.len())]);
            let version = self.clock.stamp(None).expect("leased");
            let poison = self.rng.random_bool(0.05);
            let value =
                (!self.rng.random_bool(0.1)).then(|| Bytes::from_static(if poison { POISON } else { b"value" }));
            let entry = Entry {
                version,
                value,
                expires_at: None,
            };
            // A stamp ages on its way to the line, so that later ones overtake it.
            sleep(Duration::from_millis(self.rng.random_range(0..10))).await;
            let time = Duration::from_millis(self.rng.random_range(1..1_500));
            let (begun, deadline) = (Instant::now(), Instant::now() + time);
            let write = Write {
                key: key.clone(),
                entry,
                tags: Tags::default(),
                requests: Vec::new(),
            };
            let patience = Duration::from_millis(self.rng.random_range(1..3_000));
            let Ok(result) = timeout(patience, commits.commit(write, deadline)).await else {
                continue;
            };
            assert!(
                begun.elapsed() <= time + CALL_TIMEOUT + Duration::from_secs(1),
                "late: {:?} of {time:?}",
                begun.elapsed()
            );
            if result.is_err() {
                sleep(Duration::from_millis(self.rng.random_range(0..500))).await;
            }
            match result {
                Ok(Committed::Applied) => {
                    tally.applied += 1;
                    let standing = fake.entry(&key).map(|entry| entry.version);
                    assert!(
                        standing >= Some(version),
                        "applied, yet {standing:?} stands below {version:?}"
                    );
                    let deadline = Instant::now() + Duration::from_secs(1);
                    if let Ok(entry) = loads.load(&key, deadline).await {
                        assert!(
                            entry.map(|entry| entry.version) >= Some(version),
                            "a later load must see it"
                        );
                    }
                }
                Ok(Committed::BelowHorizon { .. } | Committed::Skipped) => panic!("callers are told otherwise"),
                Ok(Committed::Superseded { standing }) => {
                    assert!(standing > version);
                    tally.absent.push((key, version));
                }
                Err(error) if error.outcome() == Outcome::NotApplied => tally.absent.push((key, version)),
                Err(error) => {
                    assert_ne!(error.kind(), ErrorKind::Internal);
                    tally.unknown += 1;
                }
            }
        }
        tally
    }
}
