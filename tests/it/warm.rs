//! Proves that caches can be filled before anybody reads, that this is told while it goes on and stops when nobody listens, and that a
//! start does it.

use tidegate::rpc::proto::{Source, WarmRequest, WarmResponse};
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::{assert_come_back, assert_do_not_come_back, seen},
    eventually, expect,
    gateway::line,
    postgres::{self, Stop},
    redis,
};

fn of(namespace: &str) -> WarmRequest {
    WarmRequest {
        namespace: namespace.to_owned(),
        ..WarmRequest::default()
    }
}

fn keys(keys: &[&str]) -> WarmRequest {
    WarmRequest {
        keys: keys.iter().map(|key| (*key).to_owned()).collect(),
        ..of("orders")
    }
}

fn prefix(prefix: &str) -> WarmRequest {
    WarmRequest {
        prefix: prefix.to_owned(),
        ..of("orders")
    }
}

fn newest(newest: u32) -> WarmRequest {
    WarmRequest { newest, ..of("orders") }
}

async fn warming(gateway: &Gateway, request: WarmRequest) -> Result<Streaming<WarmResponse>, Status> {
    gateway
        .admin()
        .await
        .warm(request)
        .await
        .map(tonic::Response::into_inner)
}

/// All that a warming tells, to its end.
async fn warm(gateway: &Gateway, request: WarmRequest) -> Result<Vec<WarmResponse>, Status> {
    let started = Instant::now();
    let mut stream = warming(gateway, request).await?;
    let mut told = Vec::new();
    while let Some(message) = stream.message().await? {
        told.push(message);
    }
    // Ten times a second at most, and at the end.
    assert!(
        told.len() as u128 <= started.elapsed().as_millis() / 100 + 2,
        "{told:?}"
    );
    assert!(
        told.is_sorted_by_key(|message| message.done + message.failed),
        "{told:?}"
    );
    Ok(told)
}

/// How a warming that ends well ended.
async fn warmed(gateway: &Gateway, request: WarmRequest) -> WarmResponse {
    let told = warm(gateway, request).await.expect("it ends well");
    *told.last().expect("the end is told")
}

fn all(done: u64) -> WarmResponse {
    WarmResponse {
        done,
        total: Some(done),
        failed: 0,
        limit_reached: false,
    }
}

async fn source(gateway: &Gateway, key: &str) -> Source {
    gateway.client.read(key).await.source()
}

#[tokio::test]
async fn keys_are_loaded_from_where_they_are_and_are_in_memory_then() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url());
    let [writer, gateway] = [setup.clone().start().await, setup.start().await];
    writer.client.put("shared", b"value", Mode::Through).await.unwrap();
    database.write_past("orders", "stored", b"value").await;
    let answer = warmed(&gateway, keys(&["shared", "stored", "absent", "stored"])).await;
    assert_eq!(answer, all(3));
    // Redis had one of them; and nobody has read yet.
    let stats = gateway.stats("orders").await;
    assert_eq!((stats.loads, stats.hits, stats.misses), (2, 0, 0), "{stats:?}");
    for key in ["shared", "stored", "absent"] {
        assert_eq!(source(&gateway, key).await, Source::L1, "{key}");
    }
    assert_eq!(seen(&gateway.client.read("stored").await).0, Some(&b"value"[..]));
    // What is there is not loaded again.
    assert_eq!(warmed(&gateway, keys(&["shared", "stored"])).await, all(2));
    assert_eq!(gateway.stats("orders").await.loads, 2);
}

/// A database with so many records `a:1`, `a:2`, … of ascending versions.
async fn filled(records: u32) -> Database {
    let database = Database::postgres().await;
    // The tables are made by the gateway.
    drop(Setup::new().store(database.url()).start().await);
    database
        .execute(&format!(
            "insert into tidegate_entries (namespace, key, version, value) \
             select 'orders', 'a:' || g, g, 'value' from generate_series(1, {records}) g"
        ))
        .await;
    database
}

#[tokio::test]
async fn a_prefix_is_loaded_whole_in_steps() {
    let database = filled(2_500).await;
    database.write_past("orders", "b:1", b"value").await;
    database.write_past("sessions", "a:1", b"value").await;
    let gateway = Setup::new().store(database.url()).start().await;
    let told = warm(&gateway, prefix("a:")).await.expect("it ends well");
    assert_eq!(told.last(), Some(&all(2_500)), "{told:?}");
    for number in [1, 999, 1_000, 1_001, 2_500] {
        assert_eq!(source(&gateway, &format!("a:{number}")).await, Source::L1, "{number}");
    }
    assert_eq!(source(&gateway, "b:1").await, Source::Store);
    let elsewhere = gateway.client.namespace("sessions").read("a:1").await;
    assert_eq!(elsewhere.source(), Source::Store);
    assert_eq!(warmed(&gateway, prefix("nothing")).await, all(0));
}

#[tokio::test]
async fn the_records_written_last_are_loaded() {
    let database = filled(20).await;
    let gateway = Setup::new().store(database.url()).start().await;
    gateway.client.put("latest", b"value", Mode::Through).await.unwrap();
    gateway.client.put("deleted", b"value", Mode::Through).await.unwrap();
    gateway.client.delete("deleted", Mode::Through).await.unwrap();
    assert_eq!(warmed(&gateway, newest(3)).await, all(3));
    for (key, wanted) in [
        ("latest", Source::L1),
        ("a:20", Source::L1),
        ("a:19", Source::L1),
        ("a:18", Source::Store),
    ] {
        assert_eq!(source(&gateway, key).await, wanted, "{key}");
    }
    assert_eq!(warmed(&gateway, newest(100_000)).await, all(21));
}

#[tokio::test]
async fn keys_that_cannot_be_loaded_are_counted_and_hold_up_no_others() {
    let database = filled(3).await;
    let setup = Setup::new().store(database.url());
    // A load is given up after this.
    let gateway = setup.config("[rpc]\ndeadline_default = \"200ms\"").start().await;
    gateway.client.put("cached", b"value", Mode::Through).await.unwrap();
    let hold = database.hold_all().await;
    let answer = warmed(&gateway, keys(&["a:1", "a:2", "a:3", "cached"])).await;
    let expected = WarmResponse {
        done: 1,
        total: Some(4),
        failed: 3,
        limit_reached: false,
    };
    assert_eq!(answer, expected);
    hold.release().await;
}

#[tokio::test]
async fn few_run_at_a_time_and_one_that_nobody_listens_to_ends() {
    let database = filled(1).await;
    let gateway = Setup::new().store(database.url()).start().await;
    let hold = database.hold_all().await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(warming(&gateway, keys(&["a:1"])).await.unwrap());
    }
    let refused = warming(&gateway, keys(&["a:1"])).await.expect_err("four run");
    assert_come_back(&refused, Code::ResourceExhausted);
    drop(streams.pop());
    eventually("one has ended", SOON, async || {
        warming(&gateway, keys(&["a:1"]))
            .await
            .map(drop)
            .map_err(|status| format!("{status:?}"))
    })
    .await;
    hold.release().await;
    for mut stream in streams {
        let mut last = None;
        while let Some(message) = stream.message().await.unwrap() {
            last = Some(message);
        }
        assert!(last.is_some_and(|last| last.done + last.failed == 1), "{last:?}");
    }
}

#[tokio::test]
async fn a_gateway_that_stops_says_so() {
    let database = filled(1).await;
    let mut gateway = Setup::new().store(database.url()).start().await;
    let hold = database.hold_all().await;
    let mut stream = warming(&gateway, keys(&["a:1"])).await.unwrap();
    gateway.terminate();
    let ended = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => break Code::Ok,
            Err(status) => break status.code(),
        }
    };
    assert_eq!(ended, Code::Unavailable);
    hold.release().await;
    assert_eq!(gateway.wait_exit(SOON).await.code, Some(0));
}

#[tokio::test]
async fn a_store_that_does_not_tell_the_keys_is_said() {
    let mut server = postgres::Server::start().await;
    let gateway = Setup::new().store(&server.create_database().await).start().await;
    server.stop(Stop::Fast).await;
    for request in [prefix("a"), newest(5)] {
        let status = warm(&gateway, request).await.expect_err("the store is gone");
        assert_come_back(&status, Code::Unavailable);
    }
}

#[tokio::test]
async fn bad_requests_are_refused() {
    let gateway = Setup::new().start().await;
    let many: Vec<String> = (0..1_001).map(|number| number.to_string()).collect();
    for (request, field) in [
        (
            WarmRequest {
                keys: many,
                ..of("orders")
            },
            "keys",
        ),
        (keys(&[""]), "number 1"),
        (of("orders"), "keys"),
        (prefix(""), "prefix"),
        (newest(100_001), "newest"),
        (
            WarmRequest {
                newest: 1,
                ..prefix("a")
            },
            "together with prefix",
        ),
        (
            WarmRequest {
                newest: 1,
                ..of("Orders")
            },
            "namespace",
        ),
    ] {
        let status = warm(&gateway, request).await.expect_err("refused");
        assert_do_not_come_back(&status, Code::InvalidArgument, "INVALID");
        assert!(status.message().contains(field), "{field}: {status:?}");
    }
}

#[tokio::test]
async fn a_start_loads_what_was_written_last_where_a_namespace_asks_for_it() {
    const WARMED: &str = "loaded the newest records";
    let (database, redis) = (filled(10).await, redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url());
    let gateway = setup.config("[namespaces.orders]\nwarm_at_start = 4").start().await;
    eventually("it is said", SOON, async || {
        expect(!gateway.said(WARMED).is_empty(), gateway.log())
    })
    .await;
    let said = line(&gateway.log(), WARMED).expect("it was said");
    assert_eq!(
        (&said["namespaces"], &said["done"], &said["failed"]),
        (&1.into(), &4.into(), &0.into())
    );
    assert_eq!(source(&gateway, "a:7").await, Source::L1);
    assert_eq!(source(&gateway, "a:6").await, Source::Store);
    let quiet = Setup::new().start().await;
    quiet.client.read("a").await;
    assert_eq!(quiet.said(WARMED).len(), 0);
}

#[tokio::test]
async fn a_start_without_its_store_gives_up_with_one_warning() {
    let mut server = postgres::Server::start().await;
    let setup = Setup::new().store(&server.create_database().await);
    let setup = setup.config("[namespaces.orders]\nwarm_at_start = 4\n[namespaces.sessions]\nwarm_at_start = 4");
    let mut gateway = setup.start().await;
    gateway.kill().await;
    server.stop(Stop::Fast).await;
    let gateway = gateway.start_again().await;
    eventually("it is said", SOON, async || {
        let said = gateway.said("gave up loading");
        expect(said.len() == 1 && said[0].contains("WARN"), gateway.log())
    })
    .await;
    // Reads load as ever.
    server.start_again().await;
    eventually("the store is back", SOON, async || {
        let read = gateway
            .client
            .get("a", tidegate::rpc::proto::ReadConsistency::Cached)
            .await;
        read.map(drop).map_err(|status| format!("{status:?}"))
    })
    .await;
    assert_eq!(gateway.said("gave up loading").len(), 1);
}
