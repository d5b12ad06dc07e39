//! Loads on the store in memory, in paused time.

use bytes::Bytes;
use prometheus_client::registry::Registry;
use tokio::time::timeout;

use super::*;
use crate::{
    model::{Tags, Version, Write},
    store::fake::{Call, FakeBackend, Fault, eventually},
};

struct Rig {
    fake: FakeBackend,
    store: Store,
    loads: GroupLoad,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

/// A path of one connection, so that what waits is what one query takes.
fn rig() -> Rig {
    let fake = FakeBackend::new();
    let store = fake.store();
    let config = Config {
        load_connections: 1.try_into().expect("not zero"),
        ..Config::default()
    };
    let loads = GroupLoad::new(store.clone(), &config, StoreMetrics::register(&mut Registry::default()));
    let stop = CancellationToken::new();
    let tasks = loads.start(&stop);
    Rig {
        fake,
        store,
        loads,
        stop,
        tasks,
    }
}

fn key(name: &str) -> Key {
    Key::new("orders", name).expect("valid")
}

fn write(name: &str, version: i64) -> Write {
    Write {
        key: key(name),
        entry: Entry {
            version: Version::new(version).expect("positive"),
            value: Some(Bytes::from(format!("{name}{version}"))),
            expires_at: None,
        },
        tags: Tags::default(),
        requests: Vec::new(),
    }
}

type Loaded = JoinHandle<Result<Option<Entry>, Error>>;

impl Rig {
    fn load(&self, name: &str) -> Loaded {
        self.load_within(name, Duration::from_secs(5))
    }

    fn load_within(&self, name: &str, time: Duration) -> Loaded {
        let (loads, key) = (self.loads.clone(), key(name));
        let deadline = Instant::now() + time;
        tokio::spawn(async move { loads.load(&key, deadline).await })
    }
}

async fn version(loaded: Loaded) -> Option<i64> {
    let entry = loaded.await.expect("no panic").expect("an answer");
    entry.map(|entry| entry.version.get())
}

async fn error(loaded: Loaded) -> ErrorKind {
    loaded.await.expect("no panic").expect_err("an error").kind()
}

#[tokio::test(start_paused = true)]
async fn misses_that_wait_share_one_query_and_each_gets_its_own_row() {
    let rig = rig();
    for (name, version) in [("a", 1), ("b", 2), ("d", 4)] {
        rig.fake.put(write(name, version));
    }
    let (hang, release) = Fault::hang();
    rig.fake.inject(Call::Load, hang);
    let first = rig.load("a");
    eventually(|| rig.fake.calls(Call::Load) == 1).await;
    let others: Vec<_> = ["d", "b", "c", "b", "d", "a"]
        .into_iter()
        .map(|name| rig.load(name))
        .collect();
    tokio::task::yield_now().await;
    release.notify_one();

    assert_eq!(version(first).await, Some(1));
    let mut versions = Vec::new();
    for other in others {
        versions.push(version(other).await);
    }
    assert_eq!(versions, [Some(4), Some(2), None, Some(2), Some(4), Some(1)]);
    assert_eq!(
        rig.fake.loads(),
        [vec![key("a")], vec![key("a"), key("b"), key("c"), key("d")]]
    );
}

/// What reads from the store are linearizable by: a load never joins a query that was sent before it asked.
#[tokio::test(start_paused = true)]
async fn the_query_that_answers_was_sent_after_the_caller_asked() {
    let rig = rig();
    rig.fake.put(write("a", 1));
    // The row is read, and then the answer takes long.
    let (hang, release) = Fault::hang();
    rig.fake.inject(Call::Load, hang);
    let early = rig.load("a");
    eventually(|| rig.fake.calls(Call::Load) == 1).await;
    let late = rig.load("a");
    tokio::task::yield_now().await;
    release.notify_one();
    version(early).await;
    version(late).await;
    assert_eq!(rig.fake.calls(Call::Load), 2);
}

#[tokio::test(start_paused = true)]
async fn passing_failures_are_tried_again_within_the_deadline_and_not_for_ever() {
    let rig = rig();
    rig.fake.put(write("a", 1));
    rig.fake.inject(Call::Load, Fault::fail(StoreErrorKind::Transient));
    rig.fake.inject(Call::Load, Fault::lose_reply());
    assert_eq!(version(rig.load("a")).await, Some(1));

    rig.fake.script(|_| Some(Fault::fail(StoreErrorKind::Transient)));
    let begun = Instant::now();
    assert_eq!(error(rig.load("a")).await, ErrorKind::Unavailable);
    assert!(begun.elapsed() < Duration::from_secs(1));
    let begun = Instant::now();
    assert_eq!(
        error(rig.load_within("a", Duration::from_millis(1))).await,
        ErrorKind::Unavailable
    );
    assert!(begun.elapsed() <= Duration::from_millis(1));
}

#[tokio::test(start_paused = true)]
async fn an_unreachable_store_is_told_at_once() {
    let rig = rig();
    rig.fake.down(true);
    let begun = Instant::now();
    for _ in 0..2 {
        let failed = rig.load("a").await.expect("no panic").expect_err("down");
        assert_eq!(failed.kind(), ErrorKind::Unavailable);
        assert_eq!(failed.retry_delay(), Some(RETRY_AFTER));
    }
    assert_eq!(rig.fake.calls(Call::Load), 1, "the breaker is open for the second");
    assert!(begun.elapsed() < Duration::from_millis(10));
    assert!(rig.store.breaker().is_open());
}

#[tokio::test(start_paused = true)]
async fn a_key_that_the_store_rejects_fails_alone() {
    let rig = rig();
    for name in ["a", "b", "c", "d"] {
        rig.fake.put(write(name, 1));
    }
    let (hang, release) = Fault::hang();
    rig.fake.inject(Call::Load, hang);
    let first = rig.load("z");
    eventually(|| rig.fake.calls(Call::Load) == 1).await;
    // Of the whole, of its first half, and of the half's second key.
    for fault in [
        Fault::fail(StoreErrorKind::Rejected),
        Fault::fail(StoreErrorKind::Rejected),
        Fault::default(),
        Fault::fail(StoreErrorKind::Rejected),
    ] {
        rig.fake.inject(Call::Load, fault);
    }
    let others: Vec<_> = ["a", "b", "b", "c", "d"]
        .into_iter()
        .map(|name| rig.load(name))
        .collect();
    tokio::task::yield_now().await;
    release.notify_one();
    assert_eq!(version(first).await, None);
    let mut kinds = Vec::new();
    for other in others {
        kinds.push(other.await.expect("no panic").map(|_| ()).map_err(|error| error.kind()));
    }
    let bad = Err(ErrorKind::Internal);
    assert_eq!(kinds, [Ok(()), bad, bad, Ok(()), Ok(())]);
}

#[tokio::test(start_paused = true)]
async fn a_load_that_nobody_waits_for_is_skipped() {
    let rig = rig();
    let (hang, release) = Fault::hang();
    rig.fake.inject(Call::Load, hang);
    let first = rig.load("a");
    eventually(|| rig.fake.calls(Call::Load) == 1).await;
    let gone = rig.load("b");
    let stays = rig.load("c");
    tokio::task::yield_now().await;
    gone.abort();
    assert!(gone.await.expect_err("aborted").is_cancelled());
    release.notify_one();
    version(first).await;
    version(stays).await;
    assert_eq!(rig.fake.loads().last(), Some(&vec![key("c")]));
}

#[tokio::test(start_paused = true)]
async fn the_shutdown_answers_what_waits_and_ends_the_tasks() {
    let rig = rig();
    rig.fake.inject(Call::Load, Fault::delay(Duration::from_millis(100)));
    let runs = rig.load("a");
    eventually(|| rig.fake.calls(Call::Load) == 1).await;
    let waits = rig.load("b");
    tokio::task::yield_now().await;
    rig.stop.cancel();
    assert_eq!(version(runs).await, None);
    assert_eq!(error(waits).await, ErrorKind::Unavailable);
    for task in rig.tasks {
        timeout(Duration::from_secs(1), task)
            .await
            .expect("ends")
            .expect("no panic");
    }
}
