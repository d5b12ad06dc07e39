//! Proves that what a gateway counts of each namespace is what its callers did, adds up, and is what `tidegate admin stats` shows.

use std::fs;

use serde_json::Value;
use tidegate::rpc::proto::{GetRequest, NamespaceStats, ReadConsistency, StatsRequest, StatsResponse};
use tonic::Code;

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup, client, eventually, expect,
    gateway::{command, run_command},
    process::{Directory, Process, free_port, shell},
    redis,
    wire::{self, Wire},
};

async fn all(gateway: &Gateway) -> StatsResponse {
    let answer = gateway.admin().await.stats(StatsRequest::default()).await;
    answer.expect("stats are told").into_inner()
}

/// Hits, misses and absences of each tier: L1, pending, Redis, the store.
fn tiers(stats: &NamespaceStats) -> [Option<(u64, u64, u64)>; 4] {
    [stats.l1, stats.pending, stats.l2, stats.store]
        .map(|tier| tier.map(|tier| (tier.hits, tier.misses, tier.negative_hits)))
}

/// What must hold of any figures of a gateway at rest.
fn assert_consistent(stats: &NamespaceStats) {
    let answered = stats.hits + stats.misses + stats.store_reads;
    let tiers = [stats.l1, stats.pending, stats.l2, stats.store].map(Option::unwrap_or_default);
    assert_eq!(tiers.iter().map(|tier| tier.hits).sum::<u64>(), answered, "{stats:?}");
    let reads = stats.read_latency.unwrap();
    let writes = stats.write_latency.unwrap();
    assert_eq!(reads.count, answered + stats.read_failures, "{stats:?}");
    assert_eq!(writes.count, stats.writes + stats.write_failures, "{stats:?}");
    for latency in [reads, writes] {
        let figures = [latency.p50, latency.p90, latency.p99].map(|time| time.map(|time| (time.seconds, time.nanos)));
        assert!(figures.is_sorted(), "{latency:?}");
        assert!(
            figures.iter().all(|figure| figure.is_some() == (latency.count > 0)),
            "{latency:?}"
        );
        assert_eq!(latency.average.is_some(), latency.count > 0);
    }
    let rate = (stats.hits + stats.misses > 0).then(|| stats.hits as f64 / (stats.hits + stats.misses) as f64);
    assert_eq!(stats.hit_rate, rate, "{stats:?}");
}

/// Makes a call whose time runs out at the gateway. (A generated client gives up by itself, and takes its call back.)
async fn time_out(gateway: &Gateway, method: &str, request: &impl prost::Message) {
    let path = format!("/tidegate.v1.Gateway/{method}");
    let wire = Wire::connect(gateway.address).await;
    let answer = wire
        .call(&path, &[("grpc-timeout", "200m")], wire::message(request))
        .await;
    assert_eq!(answer.code(), Some(Code::DeadlineExceeded), "{answer:?}");
}

#[tokio::test]
async fn every_read_and_write_is_counted_where_it_was_answered() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url());
    // No absence must end while this test looks at it.
    let setup = setup.config("[namespace_defaults]\nabsence_lifetime = \"1h\"");
    let gateway = setup.start().await;
    let client = &gateway.client;
    use ReadConsistency::{Cached, Shared, Store};
    let read = async |key: &str, consistency| client.get(key, consistency).await.unwrap();

    for key in ["a", "b"] {
        client.put(key, b"value", Mode::Through).await.unwrap();
    }
    for _ in 0..3 {
        read("a", Cached).await;
    }
    read("a", Shared).await;
    read("a", Store).await;
    for _ in 0..2 {
        read("absent", Cached).await;
    }
    client.delete("b", Mode::Through).await.unwrap();
    read("b", Cached).await;
    client
        .put("", b"value", Mode::Through)
        .await
        .expect_err("is no write at all");

    let hold = database.hold_writes().await;
    client.put("late", b"value", Mode::Behind).await.unwrap();
    read("late", Shared).await;
    read("late", Store).await;
    let through = client.put_request("d", b"value", Mode::Through);
    time_out(&gateway, "Put", &through).await;

    let stats = gateway.stats("orders").await;
    assert_consistent(&stats);
    assert_eq!(
        tiers(&stats),
        [
            // Three of `a`, `b` that is a tombstone, and the second of the absent one.
            Some((5, 1, 2)),
            // Overlays the store, too.
            Some((2, 3, 0)),
            // A read of Redis that a pending write answers is neither.
            Some((1, 1, 0)),
            Some((2, 0, 1)),
        ],
        "{stats:?}"
    );
    assert_eq!(
        (stats.hits, stats.misses, stats.store_reads, stats.read_failures),
        (7, 1, 2, 0)
    );
    assert_eq!(
        (stats.negative_hits, stats.loads, stats.refreshes, stats.evictions),
        (2, 3, 0, 0)
    );
    assert_eq!((stats.writes, stats.write_failures), (4, 1));
    let pending = stats.pending_writes.unwrap();
    assert_eq!(pending.entries, 1);
    assert!(pending.bytes > 0 && pending.oldest_age.is_some(), "{pending:?}");

    assert_eq!(tiers(&gateway.stats("nobody").await)[0], Some((0, 0, 0)));

    hold.release().await;
    gateway.drained().await;
    let pending = gateway.stats("orders").await.pending_writes.unwrap();
    assert_eq!((pending.entries, pending.bytes, pending.oldest_age), (0, 0, None));
}

#[tokio::test]
async fn namespaces_add_up_to_the_total() {
    let gateway = Setup::new().start().await;
    for (namespace, keys) in [("sessions", 1), ("orders", 3)] {
        let client = gateway.client.namespace(namespace);
        for key in 0..keys {
            client.put(&key.to_string(), b"value", Mode::Through).await.unwrap();
            client.read(&key.to_string()).await;
        }
        client.read("absent").await;
    }
    let stats = all(&gateway).await;
    let counts = |stats: &NamespaceStats| (stats.namespace.clone(), stats.hits, stats.misses, stats.writes);
    let namespaces: Vec<_> = stats.namespaces.iter().map(counts).collect();
    assert_eq!(
        namespaces,
        [("orders".to_owned(), 3, 1, 3), ("sessions".to_owned(), 1, 1, 1)]
    );
    let total = stats.total.clone().unwrap();
    assert_eq!(counts(&total), (String::new(), 4, 2, 4));
    stats.namespaces.iter().chain([&total]).for_each(assert_consistent);
    // The absences, too.
    assert_eq!(stats.memory_entries, 6, "{stats:?}");
    assert!(stats.memory_bytes > 0 && stats.start_time.is_some(), "{stats:?}");
}

#[tokio::test]
async fn without_redis_there_is_no_second_tier_and_failed_reads_are_counted() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    let hold = database.hold_all().await;
    let read = GetRequest {
        namespace: "orders".to_owned(),
        key: "a".to_owned(),
        ..GetRequest::default()
    };
    time_out(&gateway, "Get", &read).await;
    hold.release().await;
    eventually("the load ends", SOON, async || {
        let answer = gateway.client.read("a").await;
        expect(client::seen(&answer).0.is_none(), answer)
    })
    .await;
    let stats = gateway.stats("orders").await;
    assert_consistent(&stats);
    assert_eq!((stats.l2, stats.read_failures), (None, 1), "{stats:?}");
}

#[tokio::test]
async fn copies_that_leave_memory_to_make_room_are_counted() {
    let gateway = Setup::new().config("[memory]\nbytes_max = 100_000").start().await;
    let value = [7; 5_000];
    for number in 0..100 {
        gateway
            .client
            .put(&format!("k{number}"), &value, Mode::Through)
            .await
            .unwrap();
    }
    let stats = all(&gateway).await;
    let evictions = gateway.stats("orders").await.evictions;
    assert!(evictions >= 80, "{stats:?}");
    assert_eq!(evictions + stats.memory_entries, 100, "{stats:?}");
    assert!((1..=100_000).contains(&stats.memory_bytes), "{stats:?}");
}

#[tokio::test]
async fn renewals_are_counted_and_are_loads() {
    let setup = Setup::new().config("[namespaces.orders]\ncache_lifetime = \"1s\"\nrefresh_threshold = 0.9");
    let gateway = setup.start().await;
    gateway.client.put("a", b"value", Mode::Through).await.unwrap();
    eventually("the copy is renewed", SOON, async || {
        gateway.client.read("a").await;
        let stats = gateway.stats("orders").await;
        expect(stats.refreshes > 0 && stats.loads >= stats.refreshes, stats)
    })
    .await;
}

/// A directory with a configuration that names the gateway's operators' port.
fn configured(gateway: &Gateway) -> Directory {
    let directory = Directory::new("stats");
    let file = format!("[admin]\nlisten = \"{}\"", gateway.admin);
    fs::write(directory.path().join("tidegate.toml"), file).unwrap();
    directory
}

#[tokio::test]
async fn the_command_shows_the_figures_as_tables_and_as_json() {
    let gateway = Setup::new().start().await;
    gateway
        .client
        .put("secret-key", b"secret-value", Mode::Through)
        .await
        .unwrap();
    gateway.client.read("secret-key").await;
    gateway.client.namespace("sessions").read("absent").await;
    let run = async |arguments: &[&str]| {
        // What it prints is appended to what the last one in the same directory did.
        let directory = configured(&gateway);
        run_command(&[&["admin", "stats"], arguments].concat(), &[], directory.path()).await
    };

    let tables = run(&["--config", "tidegate.toml"]).await;
    assert_eq!((tables.code, tables.stderr.as_str()), (Some(0), ""), "{tables:?}");
    let row = |table: &str, name: &str| -> Vec<String> {
        let rows = tables.stdout.lines().skip_while(|line| !line.starts_with(table));
        let row = rows
            .take_while(|line| !line.is_empty())
            .find(|line| line.starts_with(name));
        let row = row.unwrap_or_else(|| panic!("no {name} under {table} in\n{}", tables.stdout));
        row.split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(row("reads", "orders ")[1..6], ["1", "100.0", "%", "1", "0"]);
    assert_eq!(row("reads", "sessions ")[1..6], ["1", "0.0", "%", "0", "1"]);
    assert_eq!(row("reads", "(total) ")[1..6], ["2", "50.0", "%", "1", "1"]);
    assert_eq!(row("tiers", "orders ")[1..6], ["l1", "100.0", "%", "1", "0"]);
    assert_eq!(row("writes", "orders ")[1..3], ["1", "0"]);
    assert!(!tables.stdout.contains("secret"), "{}", tables.stdout);

    let address = gateway.admin.to_string();
    let json = run(&["--address", &address, "--json"]).await;
    assert_eq!((json.code, json.stderr.as_str()), (Some(0), ""), "{json:?}");
    let json: Value = serde_json::from_str(&json.stdout).expect("one object");
    let namespace = &json["namespaces"][0];
    assert_eq!(
        (&namespace["namespace"], &namespace["hits"]),
        (&"orders".into(), &1.into()),
        "{json}"
    );
    assert_eq!(namespace["tiers"]["l1"]["hits"], 1, "{json}");
    assert!(
        namespace["read_latency"]["p99_seconds"]
            .as_f64()
            .is_some_and(|p99| p99 > 0.0),
        "{json}"
    );
    assert_eq!(
        (&json["total"]["writes"], &json["total"]["hit_rate"]),
        (&1.into(), &0.5.into()),
        "{json}"
    );
    let one = run(&["--address", &address, "--namespace", "sessions"]).await;
    assert!(
        one.stdout.contains("sessions") && !one.stdout.contains("orders"),
        "{one:?}"
    );
}

#[tokio::test]
async fn the_command_says_what_is_wrong() {
    let nobody = format!("127.0.0.1:{}", free_port());
    let directory = Directory::new("stats");
    for (arguments, code, said) in [
        (&["--address", &nobody][..], 69, "no gateway answers at"),
        (&["--address", "nowhere"], 64, "--address"),
        (&["--watch", "0"], 64, "--watch"),
        (&["--namespace", "Orders"], 64, "lower-case"),
    ] {
        let output = run_command(&[&["admin", "stats"], arguments].concat(), &[], directory.path()).await;
        assert_eq!(output.code, Some(code), "{output:?}");
        assert!(output.stderr.contains(said) && output.stdout.is_empty(), "{output:?}");
    }
}

#[tokio::test]
async fn the_command_follows_a_gateway_until_the_user_has_enough() {
    let gateway = Setup::new().start().await;
    let directory = configured(&gateway);
    let mut watch = command();
    watch
        .args(["admin", "stats", "--config", "tidegate.toml", "--watch", "1", "--json"])
        .current_dir(directory.path());
    let mut process = Process::start("the command", &watch, "KILL", directory.path(), "watch");
    let reads = || -> Vec<u64> {
        let text = fs::read_to_string(directory.path().join("watch.out")).unwrap_or_default();
        let whole = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        whole
            .map(|stats| stats["total"]["hits"].as_u64().unwrap() + stats["total"]["misses"].as_u64().unwrap())
            .collect()
    };
    eventually("it shows something", SOON, async || {
        expect(!reads().is_empty(), process.stderr())
    })
    .await;
    gateway.client.read("a").await;
    eventually("it shows what has happened since", SOON, async || {
        let reads = reads();
        expect(reads.first() == Some(&0) && reads.last() == Some(&1), reads)
    })
    .await;
    process.signal("INT");
    assert_eq!(process.wait(SOON).await.code(), Some(0), "{}", process.stderr());
}

#[tokio::test]
async fn a_reader_that_goes_away_is_no_error() {
    let gateway = Setup::new().start().await;
    let directory = configured(&gateway);
    // What `head` leaves unread breaks the pipe of the next look.
    let script = "{ \"$1\" admin stats --config tidegate.toml --watch 1; echo $? >status; } | head -n 1";
    let mut pipeline = shell(script);
    pipeline.arg(command().get_program()).current_dir(directory.path());
    let mut process = Process::start("the pipeline", &pipeline, "KILL", directory.path(), "pipeline");
    process.wait(SOON).await;
    let status = fs::read_to_string(directory.path().join("status")).expect("the command ended");
    assert_eq!(status.trim(), "0", "{}", process.stderr());
}
