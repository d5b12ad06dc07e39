//! Proves that the gateway stops in order: calls are finished, the backlog is drained, and what it could not do it says.

use std::time::Duration;

use tidegate::rpc::proto::{AwaitPersistedRequest, GetRequest, PutRequest, ReadConsistency};
use tokio::time::{Instant, timeout};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::outcome,
    eventually, expect,
    gateway::line,
    postgres::{Server, Stop},
    wire::Wire,
};

/// What a drain that cannot succeed may take, and what a busy machine may add to it.
const DEADLINE: Duration = Duration::from_secs(3);
const ALLOWANCE: Duration = Duration::from_secs(10);

const BACKLOG: usize = 500;

/// A gateway with a backlog that waits for its delay.
async fn with_backlog(database: &Database) -> Gateway {
    let gateway = Setup::new()
        .store(database.url())
        .config(
            "[shutdown]\ndrain_wait = \"3s\"\n\
             [namespaces.slow]\nwrite_delay = \"1h\"",
        )
        .start()
        .await;
    let client = gateway.client.namespace("slow");
    for index in 0..BACKLOG {
        client
            .put(&index.to_string(), index.to_string().as_bytes(), Mode::Behind)
            .await
            .unwrap();
    }
    assert_eq!(
        gateway.metric("tidegate_queue_pending_entries", &[]).await,
        BACKLOG as f64
    );
    gateway
}

async fn the_backlog_is_drained(database: Database) {
    let mut gateway = with_backlog(&database).await;
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    for index in 0..BACKLOG {
        let value = database.value("slow", &index.to_string()).await;
        assert_eq!(value, Some(index.to_string().into_bytes()));
    }
}

#[tokio::test]
async fn a_backlog_is_drained_into_postgres() {
    the_backlog_is_drained(Database::postgres().await).await;
}

#[tokio::test]
async fn a_backlog_is_drained_into_sqlite() {
    the_backlog_is_drained(Database::sqlite()).await;
}

#[tokio::test]
async fn what_cannot_be_drained_is_told() {
    let mut postgres = Server::start().await;
    let database = Database::at(&postgres.create_database().await);
    let mut gateway = with_backlog(&database).await;
    postgres.stop(Stop::Fast).await;
    let start = Instant::now();
    gateway.terminate();
    let exit = gateway.wait_exit(DEADLINE + ALLOWANCE).await;
    assert!(
        start.elapsed() >= DEADLINE,
        "it tries until the deadline, not {:?}",
        start.elapsed()
    );
    assert_eq!(exit.code, Some(75), "{}", exit.log);
    let last = line(&exit.log, "stopped; the store did not take")
        .unwrap_or_else(|| panic!("it says how it ended: {}", exit.log));
    assert_eq!(last["entries"], BACKLOG, "how much is left: {last}");
    assert_eq!(last["calls_finished"], true, "{last}");
}

#[tokio::test]
async fn the_drain_goes_on_when_postgres_comes_back_in_time() {
    let mut postgres = Server::start().await;
    let database = Database::at(&postgres.create_database().await);
    let gateway = Setup::new()
        .store(database.url())
        .config("[shutdown]\ndrain_wait = \"60s\"\n[namespaces.slow]\nwrite_delay = \"1h\"");
    let mut gateway = gateway.start().await;
    gateway
        .client
        .namespace("slow")
        .put("key", b"value", Mode::Behind)
        .await
        .unwrap();
    postgres.stop(Stop::Immediate).await;
    gateway.terminate();
    postgres.start_again().await;
    let exit = gateway.wait_exit(Duration::from_secs(60)).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert_eq!(database.value("slow", "key").await.as_deref(), Some(&b"value"[..]));
}

#[tokio::test]
async fn a_second_signal_stops_at_once() {
    let database = Database::postgres().await;
    let mut gateway = Setup::new()
        .store(database.url())
        .config("[shutdown]\ndrain_wait = \"10m\"")
        .start()
        .await;
    let hold = database.hold_writes().await;
    gateway.client.put("key", b"value", Mode::Behind).await.unwrap();
    gateway.terminate();
    assert_refuses_connections(&gateway).await;
    assert!(gateway.runs(), "it drains");
    // One that follows the first at once is the same one, said twice; so until it is taken for a second.
    eventually("it has ended", SOON, async || {
        gateway.terminate();
        expect(!gateway.runs(), "it runs")
    })
    .await;
    let exit = gateway.wait_exit(ALLOWANCE).await;
    assert_eq!(exit.code, Some(130), "{exit:?}");
    hold.release().await;
}

async fn assert_refuses_connections(gateway: &Gateway) {
    eventually("no connection is accepted any longer", SOON, async || {
        let connection = tokio::net::TcpStream::connect(gateway.address).await;
        expect(connection.is_err(), connection)
    })
    .await;
}

#[tokio::test]
async fn idle_connections_do_not_hold_it() {
    let mut gateway = Setup::new()
        .config("[shutdown]\ncalls_wait = \"10m\"\ndrain_wait = \"10m\"")
        .start()
        .await;
    let mut idle = Vec::new();
    for _ in 0..20 {
        idle.push(Wire::connect(gateway.address).await);
    }
    // And one that never said a word.
    let silent = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
    gateway.terminate();
    let exit = gateway.wait_exit(ALLOWANCE).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    drop((idle, silent));
}

#[tokio::test]
async fn a_watch_of_health_does_not_hold_it() {
    let mut gateway = Setup::new()
        .config("[shutdown]\ncalls_wait = \"10m\"\ndrain_wait = \"10m\"")
        .start()
        .await;
    let mut watches = Vec::new();
    for service in ["", "tidegate.v1.Gateway", "tidegate.store"] {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let watch = HealthClient::new(gateway.channel()).watch(request).await.unwrap();
        watches.push(watch.into_inner());
    }
    for watch in &mut watches {
        let first = watch.message().await.unwrap().expect("a first answer");
        assert_eq!(first.status(), ServingStatus::Serving);
    }
    gateway.terminate();
    let exit = gateway.wait_exit(ALLOWANCE).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    drop(watches);
}

#[tokio::test]
async fn a_gateway_that_lost_its_node_drains_and_says_so() {
    let database = Database::postgres().await;
    let mut gateway = with_backlog(&database).await;
    // As a second process on a copy of the data directory would. It is noticed when the lease is next renewed.
    database.execute("update tidegate_nodes set start = 'another'").await;
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(70), "{}", exit.log);
    for message in [
        "another process has this gateway's node id",
        "a background task ended",
        "stopped: every call answered, every accepted write in the store",
    ] {
        assert!(line(&exit.log, message).is_some(), "{message}: {}", exit.log);
    }
    assert_eq!(database.records("slow").await.len(), BACKLOG);
}

#[tokio::test]
async fn a_call_under_way_is_finished() {
    let database = Database::postgres().await;
    let mut gateway = Setup::new().store(database.url()).start().await;
    let hold = database.hold_writes().await;
    let client = gateway.client.clone();
    let writing = tokio::spawn(async move { client.put("key", b"value", Mode::Through).await });
    database.await_waiting(1).await;
    gateway.terminate();
    assert_refuses_connections(&gateway).await;
    hold.release().await;
    let answer = timeout(SOON, writing).await.expect("the put is answered").unwrap();
    answer.expect("a call that was accepted is finished");
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert_eq!(database.value("orders", "key").await.as_deref(), Some(&b"value"[..]));
}

#[tokio::test]
async fn health_is_the_first_to_know() {
    let database = Database::postgres().await;
    let mut gateway = Setup::new().store(database.url()).start().await;
    let hold = database.hold_writes().await;
    let mut watch = HealthClient::new(gateway.channel())
        .watch(HealthCheckRequest { service: String::new() })
        .await
        .unwrap()
        .into_inner();
    let first = watch.message().await.unwrap().expect("a first answer");
    assert_eq!(first.status(), ServingStatus::Serving);
    let silence = timeout(Duration::from_secs(1), watch.message()).await;
    assert!(silence.is_err(), "watchers are told of changes alone, not {silence:?}");
    let client = gateway.client.clone();
    let writing = tokio::spawn(async move { client.put("key", b"value", Mode::Through).await });
    database.await_waiting(1).await;
    gateway.terminate();
    let next = timeout(SOON, watch.message())
        .await
        .expect("the watcher is told")
        .unwrap();
    assert_eq!(
        next.expect("before the stream ends").status(),
        ServingStatus::NotServing
    );
    assert!(!writing.is_finished(), "while calls are still being finished");
    hold.release().await;
    writing.await.unwrap().expect("the call under way is finished");
    assert_eq!(gateway.wait_exit(SOON).await.code, Some(0));
}

#[tokio::test]
async fn nothing_is_accepted_that_could_not_be_drained() {
    let database = Database::postgres().await;
    let mut gateway = Setup::new().store(database.url()).start().await;
    let client = gateway.client.clone();
    let writing = tokio::spawn(async move {
        let mut accepted = 0_u32;
        loop {
            match client.put(&accepted.to_string(), b"value", Mode::Behind).await {
                Ok(_) => accepted += 1,
                Err(status) => return (accepted, status),
            }
        }
    });
    eventually("writes are accepted", SOON, async || {
        let accepted = gateway.metric("tidegate_queue_accepted_writes_total", &[]).await;
        expect(accepted >= 100.0, accepted)
    })
    .await;
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    let (accepted, status) = writing.await.unwrap();
    assert!(
        matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled),
        "{status:?}"
    );
    for index in 0..accepted {
        let value = database.value("orders", &index.to_string()).await;
        assert_eq!(
            value.as_deref(),
            Some(&b"value"[..]),
            "{index} of {accepted} was accepted"
        );
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_cancels_its_wait_and_not_its_write() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    let hold = database.hold_writes().await;
    let client = gateway.client.clone();
    let writing = tokio::spawn(async move { client.put("key", b"value", Mode::Through).await });
    database.await_waiting(1).await;
    writing.abort();
    hold.release().await;
    database.await_value("orders", "key", b"value").await;
    eventually("readers see it too", SOON, async || {
        let read = gateway.client.value("key", ReadConsistency::Cached).await;
        expect(read.as_deref() == Some(&b"value"[..]), read)
    })
    .await;
}

/// A call that would wait for longer than the test.
fn patient<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(Duration::from_secs(60));
    request
}

#[tokio::test]
async fn a_wait_for_what_never_comes_does_not_hold_it() {
    let database = Database::postgres().await;
    let mut gateway = Setup::new()
        .store(database.url())
        .config("[shutdown]\ncalls_wait = \"10m\"\ndrain_wait = \"10m\"\n[namespaces.slow]\nwrite_delay = \"1h\"")
        .start()
        .await;
    let written = gateway.client.put("key", b"value", Mode::Through).await.unwrap();
    // Soon to be written, and by nobody.
    let version = written.version + 1_000;
    let hold = database.hold_writes().await;
    // That all is persisted has to wait for something.
    let slow = gateway.client.namespace("slow");
    slow.put("key", b"value", Mode::Behind).await.unwrap();
    let get = GetRequest {
        min_version: version,
        ..gateway.client.get_request("key", ReadConsistency::Cached)
    };
    let one = AwaitPersistedRequest {
        namespace: "orders".to_owned(),
        key: "key".to_owned(),
        version,
    };
    let put = PutRequest {
        await_persisted: true,
        ..gateway.client.put_request("inline", b"value", Mode::Behind)
    };
    let stub = || gateway.client.stub();
    let (mut reader, mut waiter, mut all, mut writer) = (stub(), stub(), stub(), stub());
    let waits = [
        tokio::spawn(async move { reader.get(patient(get)).await.err() }),
        tokio::spawn(async move { waiter.await_persisted(patient(one)).await.err() }),
        tokio::spawn(async move {
            all.await_persisted(patient(AwaitPersistedRequest::default()))
                .await
                .err()
        }),
        tokio::spawn(async move { writer.put(patient(put)).await.err() }),
    ];
    eventually("all wait", SOON, async || {
        let running = gateway.metric("tidegate_calls_running", &[]).await;
        expect(running == 4.0, running)
    })
    .await;
    gateway.terminate();
    for (wait, expected) in waits
        .into_iter()
        .zip(["not_applied", "not_applied", "not_applied", "unknown"])
    {
        let status = timeout(SOON, wait).await.expect("it is answered").unwrap();
        let status = status.expect("it did not come");
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains("shutting down"), "{status:?}");
        assert_eq!(outcome(&status), expected, "{status:?}");
    }
    hold.release().await;
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert_eq!(database.value("orders", "inline").await.as_deref(), Some(&b"value"[..]));
}
