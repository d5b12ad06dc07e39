//! Proves that outages of PostgreSQL and of Redis cost no acknowledged write, and that callers are told at once what cannot be done.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::{task::JoinSet, time::timeout};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{
    Client, Database, Gateway, Mode, SOON, Setup,
    client::{assert_come_back, seen},
    eventually, expect,
    postgres::{Server, Stop},
    redis,
};

/// Each writer has keys of its own, so that what it was told last is what must be there.
const WRITERS: usize = 6;
const KEYS_PER_WRITER: usize = 8;

/// What was acknowledged: the last value of each key; `None` is a delete.
type Acknowledged = BTreeMap<String, Option<Vec<u8>>>;

/// Callers that go on until told to stop, or until one of them meets an error.
struct Load {
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicU64>,
    writers: JoinSet<Result<Acknowledged, String>>,
}

impl Load {
    /// Starts writers, each with puts, deletes and reads in turn. `mode` picks the mode of each write by its number.
    fn start(client: &Client, mode: fn(u64) -> Mode) -> Load {
        let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            let (client, stop, calls) = (client.clone(), Arc::clone(&stop), Arc::clone(&calls));
            writers.spawn(async move {
                let mut acknowledged = Acknowledged::new();
                for number in 0_u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let key = format!("writer{writer}.{}", number as usize % KEYS_PER_WRITER);
                    let value = (number % 5 != 4).then(|| format!("{key} at {number}").into_bytes());
                    if let Err(error) = write_and_read(&client, &key, value.as_deref(), mode(number)).await {
                        stop.store(true, Ordering::Relaxed);
                        return Err(format!("{key}, write {number}: {error}"));
                    }
                    acknowledged.insert(key, value);
                    calls.fetch_add(1, Ordering::Relaxed);
                }
                Ok(acknowledged)
            });
        }
        Load { stop, calls, writers }
    }

    /// Waits for so many more writes.
    async fn writes(&self, more: u64) {
        let goal = self.calls.load(Ordering::Relaxed) + more;
        eventually("the writers go on", SOON, async || {
            let calls = self.calls.load(Ordering::Relaxed);
            // The error of one that stopped is for `finish` to tell.
            expect(
                calls >= goal || self.stop.load(Ordering::Relaxed),
                format!("{calls} of {goal} writes"),
            )
        })
        .await;
    }

    /// Ends the writers. What they were told.
    ///
    /// # Panics
    /// If one of them met an error.
    async fn finish(mut self) -> Acknowledged {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Acknowledged::new();
        while let Some(writer) = self.writers.join_next().await {
            all.extend(
                writer
                    .expect("no writer panics")
                    .unwrap_or_else(|error| panic!("{error}")),
            );
        }
        assert_eq!(all.len(), WRITERS * KEYS_PER_WRITER, "the load has touched every key");
        all
    }
}

async fn write_and_read(client: &Client, key: &str, value: Option<&[u8]>, mode: Mode) -> Result<(), String> {
    match value {
        Some(value) => client.put(key, value, mode).await.map(drop),
        None => client.delete(key, mode).await.map(drop),
    }
    .map_err(|status| format!("{mode:?}: {status:?}"))?;
    let read = client
        .get(key, ReadConsistency::Cached)
        .await
        .map_err(|status| format!("{status:?}"))?;
    let (seen, source) = seen(&read);
    expect(
        seen == value,
        format!("{source:?} answers {seen:?} right after {value:?}"),
    )
}

async fn assert_stored(gateway: &Gateway, database: &Database, acknowledged: &Acknowledged) {
    gateway.drained().await;
    for (key, value) in acknowledged {
        let row = database
            .row("orders", key)
            .await
            .unwrap_or_else(|| panic!("{key} has no row"));
        assert_eq!(row.value, *value, "the row of {key}");
        for consistency in [ReadConsistency::Cached, ReadConsistency::Shared, ReadConsistency::Store] {
            let read = gateway.client.value(key, consistency).await;
            assert_eq!(read.as_deref(), value.as_deref(), "{key} for {consistency:?}");
        }
    }
    assert_eq!(database.dead_letters().await, []);
}

async fn writes_behind_outlive_an_outage(stop: Stop) {
    let mut postgres = Server::start().await;
    let database = Database::at(&postgres.create_database().await);
    let redis = redis::start().await;
    let gateway = Setup::new().store(database.url()).redis(&redis.url()).start().await;
    let load = Load::start(&gateway.client, |_| Mode::Behind);
    for _ in 0..2 {
        load.writes(200).await;
        postgres.stop(stop).await;
        load.writes(400).await;
        gateway.await_health("tidegate.store", ServingStatus::NotServing).await;
        postgres.start_again().await;
        gateway.await_health("tidegate.store", ServingStatus::Serving).await;
    }
    load.writes(100).await;
    let acknowledged = load.finish().await;
    assert_stored(&gateway, &database, &acknowledged).await;
    assert!(gateway.metric("tidegate_store_commit_retries_total", &[]).await > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_behind_outlive_an_orderly_restart_of_postgres() {
    writes_behind_outlive_an_outage(Stop::Fast).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_behind_outlive_a_crash_of_postgres() {
    writes_behind_outlive_an_outage(Stop::Immediate).await;
}

#[tokio::test]
async fn what_only_postgres_could_do_is_refused_at_once() {
    let mut postgres = Server::start().await;
    let database = Database::at(&postgres.create_database().await);
    let gateway = Setup::new().store(database.url()).start().await;
    let client = &gateway.client;
    client.put("known", b"value", Mode::Through).await.unwrap();
    client.put("stored", b"value", Mode::Through).await.unwrap();
    postgres.stop(Stop::Fast).await;
    gateway.await_health("tidegate.store", ServingStatus::NotServing).await;

    // UNAVAILABLE and not DEADLINE_EXCEEDED: nobody waited for the store.
    let refused = client
        .put("known", b"newer", Mode::Through)
        .await
        .expect_err("no store");
    assert_come_back(&refused, Code::Unavailable);
    let refused = client.delete("known", Mode::Through).await.expect_err("no store");
    assert_come_back(&refused, Code::Unavailable);
    let refused = client
        .get("unknown", ReadConsistency::Cached)
        .await
        .expect_err("only the store knows");
    assert_come_back(&refused, Code::Unavailable);
    let refused = client
        .get("known", ReadConsistency::Store)
        .await
        .expect_err("asked for the store");
    assert_come_back(&refused, Code::Unavailable);

    let read = client.read("known").await;
    assert_eq!(
        seen(&read),
        (Some(&b"value"[..]), Source::L1),
        "what was refused was never visible"
    );
    client
        .put("known", b"behind", Mode::Behind)
        .await
        .expect("write-behind goes on");
    assert_eq!(
        client.value("known", ReadConsistency::Cached).await.as_deref(),
        Some(&b"behind"[..])
    );
    assert_eq!(
        client.value("known", ReadConsistency::Shared).await.as_deref(),
        Some(&b"behind"[..])
    );
    let readiness = gateway.page("/readyz").await;
    assert_eq!(
        readiness.status, 200,
        "caches and write-behind can serve: {readiness:?}"
    );

    postgres.start_again().await;
    gateway.await_health("tidegate.store", ServingStatus::Serving).await;
    client
        .put("known", b"newest", Mode::Through)
        .await
        .expect("the store is back");
    assert_eq!(client.value("unknown", ReadConsistency::Cached).await, None);
    gateway.drained().await;
    assert_eq!(database.value("orders", "known").await.as_deref(), Some(&b"newest"[..]));
}

#[tokio::test]
async fn a_killed_session_is_no_outage() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    gateway.client.put("key", b"1", Mode::Through).await.unwrap();
    gateway.client.get("key", ReadConsistency::Store).await.unwrap();
    for round in 0..5 {
        database
            .execute(
                "select pg_terminate_backend(pid) from pg_stat_activity \
                 where datname = current_database() and pid <> pg_backend_pid()",
            )
            .await;
        let value = format!("round {round}").into_bytes();
        gateway
            .client
            .put("key", &value, Mode::Through)
            .await
            .expect("another try is made");
        let read = gateway.client.value("key", ReadConsistency::Store).await;
        assert_eq!(read.as_deref(), Some(value.as_slice()));
    }
}

#[tokio::test]
async fn a_gateway_waits_for_a_postgres_that_starts_after_it() {
    let mut postgres = Server::start().await;
    let database = Database::at(&postgres.create_database().await);
    postgres.stop(Stop::Fast).await;
    let mut starting = pin!(Setup::new().store(database.url()).start());
    let early = timeout(Duration::from_secs(1), &mut starting).await;
    assert!(early.is_err(), "there is nothing to serve from");
    postgres.start_again().await;
    let gateway = starting.await;
    gateway.client.put("key", b"value", Mode::Through).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_comes_and_goes_unnoticed() {
    let database = Database::postgres().await;
    let mut redis = redis::start().await;
    let gateway = Setup::new().store(database.url()).redis(&redis.url()).start().await;
    let mixed = |number| if number % 2 == 0 { Mode::Through } else { Mode::Behind };
    let load = Load::start(&gateway.client, mixed);
    for _ in 0..2 {
        load.writes(100).await;
        redis.kill();
        load.writes(100).await;
        gateway.await_health("tidegate.cache", ServingStatus::NotServing).await;
        assert_eq!(gateway.health("").await.unwrap(), ServingStatus::Serving);
        redis.start_again().await;
        gateway.await_health("tidegate.cache", ServingStatus::Serving).await;
    }
    load.writes(100).await;
    let acknowledged = load.finish().await;
    assert_stored(&gateway, &database, &acknowledged).await;
}

#[tokio::test]
async fn a_gateway_starts_without_its_redis_and_finds_it_later() {
    let (database, mut redis) = (Database::postgres().await, redis::start().await);
    redis.stop().await;
    let gateway = Setup::new()
        .store(database.url())
        .argument("--redis-url")
        .argument(&redis.url())
        .start()
        .await;
    gateway.client.put("key", b"value", Mode::Through).await.unwrap();
    let read = gateway.client.get("key", ReadConsistency::Shared).await.unwrap();
    assert_eq!(seen(&read), (Some(&b"value"[..]), Source::Store));
    redis.start_again().await;
    eventually("what is written is read from Redis", SOON, async || {
        gateway.client.put("key", b"value", Mode::Through).await.unwrap();
        let read = gateway.client.get("key", ReadConsistency::Shared).await.unwrap();
        expect(read.source() == Source::L2, read)
    })
    .await;
}

#[tokio::test]
async fn a_frozen_redis_delays_few_calls() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    // So long that a call which waited for Redis is told from one that a busy machine delayed.
    let gateway = Setup::new()
        .store(database.url())
        .redis(&redis.url())
        .config("[redis]\ntimeout = \"5s\"\n[rpc]\ndeadline_default = \"30s\"")
        .start()
        .await;
    gateway.client.put("key", b"value", Mode::Through).await.unwrap();
    redis.freeze();
    for _ in 0..100 {
        let read = gateway
            .client
            .get("key", ReadConsistency::Shared)
            .await
            .expect("a miss, no error");
        assert_eq!(seen(&read).0, Some(&b"value"[..]));
    }
    // The serving thread of this connection finds out once.
    let gets = async |name: &str, bound: &str| {
        let name = format!("tidegate_call_duration_seconds_{name}");
        gateway.metric(&name, &["method=\"Get\"", bound]).await
    };
    let waited = gets("count", "").await - gets("bucket", "le=\"4.194304\"").await;
    assert!(waited <= 1.0, "{waited} calls waited for the limit of a Redis call");
    redis.thaw();
    gateway.await_health("tidegate.cache", ServingStatus::Serving).await;
}
