//! Proves that a write-behind write that was answered outlives the process: killed at any moment, or stopped in order with a store that
//! does not take what is left, the next start reads it back, and it reaches the store. What rests on memory alone is told, and lost.

use std::{collections::BTreeMap, fs, time::Duration};

use tidegate::rpc::proto::{Durability, Entry, Source};
use tokio::{net::TcpListener, time::timeout};
use tonic::Code;

use crate::harness::{
    Client, Database, Gateway, Mode, SOON, Setup,
    client::{EVERY, assert_come_back, seen},
    eventually, expect,
    gateway::{data_dir, line},
    postgres::{Server, Stop},
    process::Directory,
};

/// Writes wait longer than any test for others to join them, so that all of them are pending when the process ends.
const LONG_DELAYS: &str = "[namespace_defaults]\nwrite_delay = \"1h\"";

async fn pending(gateway: &Gateway) -> f64 {
    gateway.metric("tidegate_queue_pending_entries", &[]).await
}

async fn killed_and_started_again(mut gateway: Gateway) -> Gateway {
    gateway.kill().await;
    gateway.start_again().await
}

/// Stops a gateway in order, and expects that its store has everything.
async fn stopped(gateway: &mut Gateway) {
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
}

/// What each key must be, by namespace and key; `None`: absent.
type Expected = BTreeMap<(&'static str, String), Option<Entry>>;

/// Writes that differ in everything that a write can differ in.
async fn write_all_kinds(client: &Client) -> Expected {
    let mut expected = Expected::new();
    for namespace in ["orders", "carts"] {
        let client = client.namespace(namespace);
        let put = async |key: &str, value: &[u8], ttl: Option<Duration>| {
            let answer = match ttl {
                Some(ttl) => client.put_for(key, value, Mode::Behind, ttl).await.unwrap(),
                None => client.put(key, value, Mode::Behind).await.unwrap(),
            };
            assert_eq!(answer.durability(), Durability::Journal, "{key}");
            let entry = client.read(key).await.entry.expect("it was just put");
            assert_eq!(entry.version, answer.version);
            ((namespace, key.to_owned()), Some(entry))
        };
        for index in 0..40 {
            expected.extend([put(&format!("many{index}"), format!("{namespace} {index}").as_bytes(), None).await]);
        }
        expected.extend([
            put("plain", namespace.as_bytes(), None).await,
            put("empty", b"", None).await,
            put("large", &vec![b'x'; 1 << 20], None).await,
            put("expires", b"some day", Some(Duration::from_secs(3_600))).await,
        ]);
        for round in 0..20 {
            expected.extend([put("overwritten", format!("round {round}").as_bytes(), None).await]);
        }
        client.put("stored", b"before", Mode::Through).await.unwrap();
        let deleted = client.delete("stored", Mode::Behind).await.unwrap();
        assert_eq!(deleted.durability(), Durability::Journal);
        expected.insert((namespace, "stored".to_owned()), None);
        client.put("put and deleted", b"1", Mode::Behind).await.unwrap();
        client.delete("put and deleted", Mode::Behind).await.unwrap();
        expected.insert((namespace, "put and deleted".to_owned()), None);
        client.delete("deleted and put", Mode::Behind).await.unwrap();
        expected.extend([put("deleted and put", b"2", None).await]);
        let brief = Duration::from_millis(200);
        client.put_for("expired", b"brief", Mode::Behind, brief).await.unwrap();
        eventually("the brief record expires", SOON, async || {
            let read = client.read("expired").await.entry;
            expect(read.is_none(), read)
        })
        .await;
        expected.insert((namespace, "expired".to_owned()), None);
    }
    expected
}

async fn assert_reads(client: &Client, expected: &Expected) {
    for ((namespace, key), entry) in expected {
        let client = client.namespace(namespace);
        for consistency in EVERY {
            let answer = client.get(key, consistency).await.expect("a read succeeds");
            assert!(
                answer.entry == *entry,
                "{namespace} {key} for {consistency:?}: version {:?} and not {:?}",
                answer.entry.map(|entry| entry.version),
                entry.as_ref().map(|entry| entry.version)
            );
            assert!(!answer.stale, "the store was asked");
        }
    }
}

async fn what_was_answered_survives_a_kill(database: Database) {
    let gateway = Setup::new().store(database.url()).config(LONG_DELAYS).start().await;
    let expected = write_all_kinds(&gateway.client).await;
    let entries = pending(&gateway).await;
    assert_eq!(entries, expected.len() as f64, "every key waits, once");

    // Twice: what a recovery finds the next one finds again, but for what has been drained.
    let gateway = killed_and_started_again(gateway).await;
    let mut gateway = killed_and_started_again(gateway).await;
    assert_reads(&gateway.client, &expected).await;
    let highest = expected.values().flatten().map(|entry| entry.version).max();
    let after = gateway.client.put("after", b"value", Mode::Behind).await.unwrap();
    assert!(Some(after.version) > highest, "the clock goes on above what was read");

    stopped(&mut gateway).await;
    let records = BTreeMap::from([
        ("orders", database.records("orders").await),
        ("carts", database.records("carts").await),
    ]);
    for ((namespace, key), entry) in &expected {
        let row = database.row(namespace, key).await.expect("every key was drained");
        if let Some(entry) = entry {
            assert_eq!(row.version, entry.version, "{namespace} {key}");
            assert!(row.value.as_deref() == Some(&entry.value[..]), "{namespace} {key}");
        } else if key != "expired" {
            assert_eq!(row.value, None, "{namespace} {key}");
        }
        assert_eq!(records[namespace].contains(key), entry.is_some(), "{namespace} {key}");
    }
    assert_eq!(database.dead_letters().await, []);

    let gateway = gateway.start_again().await;
    assert_eq!(pending(&gateway).await, 0.0, "nothing is left to recover");
    assert_reads(&gateway.client, &expected).await;
}

#[tokio::test]
async fn what_was_answered_survives_a_kill_beside_sqlite() {
    what_was_answered_survives_a_kill(Database::sqlite()).await;
}

#[tokio::test]
async fn what_was_answered_survives_a_kill_beside_postgres() {
    what_was_answered_survives_a_kill(Database::postgres().await).await;
}

/// Killed again and again, with some of the writes drained and some not.
#[tokio::test]
async fn what_was_answered_survives_many_kills() {
    let database = Database::sqlite();
    let slow = "[namespaces.slow]\nwrite_delay = \"1h\"";
    let mut gateway = Setup::new().store(database.url()).config(slow).start().await;
    let mut expected = BTreeMap::new();
    for round in 0..5 {
        for namespace in ["slow", "quick"] {
            let client = gateway.client.namespace(namespace);
            for index in 0..20 {
                let key = format!("{}", (index * 7 + round) % 30);
                let value = format!("round {round}").into_bytes();
                client.put(&key, &value, Mode::Behind).await.unwrap();
                expected.insert((namespace, key), Some(value));
                let gone = format!("{}", (index * 11 + round) % 30);
                if index % 5 == 0 {
                    client.delete(&gone, Mode::Behind).await.unwrap();
                    expected.insert((namespace, gone), None);
                }
            }
        }
        gateway = killed_and_started_again(gateway).await;
        for ((namespace, key), value) in &expected {
            let client = gateway.client.namespace(namespace);
            client.assert_everywhere(key, value.as_deref()).await;
        }
    }
    stopped(&mut gateway).await;
    for ((namespace, key), value) in &expected {
        assert_eq!(database.value(namespace, key).await, *value, "{namespace} {key}");
    }
    assert_eq!(database.dead_letters().await, []);
}

/// Every order of a write of one mode and a write of the other, puts and deletes, across a kill and the drain.
#[tokio::test]
async fn both_modes_on_one_key_survive_a_kill() {
    let database = Database::sqlite();
    let mut gateway = Setup::new().store(database.url()).config(LONG_DELAYS).start().await;
    let client = gateway.client.clone();
    let mut expected = BTreeMap::new();
    for (first, second) in [(Mode::Behind, Mode::Through), (Mode::Through, Mode::Behind)] {
        for (before, after) in [
            (Some("1"), Some("2")),
            (Some("1"), None),
            (None, Some("2")),
            (None, None),
        ] {
            let key = format!("{before:?} {first:?} then {after:?} {second:?}");
            let mut last = 0;
            for (value, mode) in [(before, first), (after, second)] {
                let version = match value {
                    Some(value) => client.put(&key, value.as_bytes(), mode).await.unwrap().version,
                    None => client.delete(&key, mode).await.unwrap().version,
                };
                assert!(version > last);
                last = version;
            }
            client.assert_everywhere(&key, after.map(str::as_bytes)).await;
            expected.insert(key, (after, last));
        }
    }
    assert_eq!(
        pending(&gateway).await,
        4.0,
        "a write-through overtakes what is pending"
    );
    gateway = killed_and_started_again(gateway).await;
    for (key, (value, _)) in &expected {
        gateway.client.assert_everywhere(key, value.map(str::as_bytes)).await;
    }
    stopped(&mut gateway).await;
    for (key, (value, version)) in &expected {
        let row = database.row("orders", key).await.expect("it was written");
        assert_eq!(
            (row.version, row.value.as_deref()),
            (*version, value.map(str::as_bytes)),
            "{key}"
        );
    }
    let gateway = gateway.start_again().await;
    for (key, (value, _)) in &expected {
        gateway.client.assert_everywhere(key, value.map(str::as_bytes)).await;
    }
}

#[tokio::test]
async fn what_rests_on_memory_says_so_and_is_lost() {
    let database = Database::sqlite();
    let gateway = Setup::new()
        .store(database.url())
        .config("[namespaces.best]\nwrite_delay = \"1h\"\ndurability = \"memory\"")
        .start()
        .await;
    let client = gateway.client.namespace("best");
    client.put("covered", b"stored", Mode::Through).await.unwrap();
    for key in ["covered", "new"] {
        let put = client.put(key, b"in memory", Mode::Behind).await.unwrap();
        assert_eq!(put.durability(), Durability::Memory);
        client.assert_everywhere(key, Some(b"in memory")).await;
    }
    client.put("deleted", b"stored", Mode::Through).await.unwrap();
    let deleted = client.delete("deleted", Mode::Behind).await.unwrap();
    assert_eq!(deleted.durability(), Durability::Memory);
    client.assert_everywhere("deleted", None).await;
    assert_eq!(gateway.metric("tidegate_journal_group_records_sum", &[]).await, 0.0);

    let gateway = killed_and_started_again(gateway).await;
    let client = gateway.client.namespace("best");
    client.assert_everywhere("covered", Some(b"stored")).await;
    client.assert_everywhere("new", None).await;
    client.assert_everywhere("deleted", Some(b"stored")).await;
    assert_eq!(pending(&gateway).await, 0.0);
}

/// The namespace's durability is lowered while writes of it lie in the journal.
#[tokio::test]
async fn a_memory_write_over_a_journaled_one_is_journaled() {
    let database = Database::postgres().await;
    let setup = Setup::new().store(database.url()).config(LONG_DELAYS);
    let mut gateway = setup.clone().start().await;
    for key in ["put", "deleted", "kept"] {
        gateway.client.put(key, b"journaled", Mode::Behind).await.unwrap();
    }
    gateway.kill().await;
    // What was recovered is drained at once; not here.
    let hold = database.hold_writes().await;
    let mut gateway = gateway.start_again_as(setup.config("durability = \"memory\"")).await;
    let client = &gateway.client;
    let put = client.put("put", b"newer", Mode::Behind).await.unwrap();
    assert_eq!(put.durability(), Durability::Journal);
    let put = client.put("put", b"newest", Mode::Behind).await.unwrap();
    let why = "over one that was journaled for that reason";
    assert_eq!(put.durability(), Durability::Journal, "{why}");
    let deleted = client.delete("deleted", Mode::Behind).await.unwrap();
    assert_eq!(deleted.durability(), Durability::Journal);
    let put = client.put("unrelated", b"in memory", Mode::Behind).await.unwrap();
    assert_eq!(put.durability(), Durability::Memory);

    gateway.kill().await;
    hold.release().await;
    let gateway = gateway.start_again().await;
    for (key, value) in [
        ("put", Some("newest")),
        ("deleted", None),
        ("kept", Some("journaled")),
        ("unrelated", None),
    ] {
        gateway.client.assert_everywhere(key, value.map(str::as_bytes)).await;
    }
    // Once all of it is in the store there is nothing left to cover.
    gateway.drained().await;
    let put = gateway.client.put("put", b"in memory", Mode::Behind).await.unwrap();
    assert_eq!(put.durability(), Durability::Memory);
}

/// Larger than the queue and the journal may be, and longer than a value may be, by the time of the start.
#[tokio::test]
async fn a_backlog_larger_than_the_bounds_is_recovered_whole() {
    const BACKLOG: usize = 60;
    let value = vec![b'x'; 100_000];
    let database = Database::postgres().await;
    let setup = Setup::new()
        .store(database.url())
        .config("[namespaces.rejects]\nqueue_full = \"reject\"\n[namespaces.slow]\nwrite_delay = \"1h\"");
    let mut gateway = setup.clone().start().await;
    let client = gateway.client.namespace("slow");
    for index in 0..BACKLOG {
        client.put(&index.to_string(), &value, Mode::Behind).await.unwrap();
    }
    gateway.kill().await;
    let hold = database.hold_writes().await;
    let lower = "[queue]\nentries_max = 10\nbytes_max = 100000\n[rpc]\nvalue_bytes_max = 1000\n\
                 [journal]\nsegment_bytes = 1048576\nbytes_max = 5242880";
    let gateway = gateway.start_again_as(setup.config(lower)).await;
    assert_eq!(pending(&gateway).await, BACKLOG as f64);
    let client = gateway.client.namespace("slow");
    for index in 0..BACKLOG {
        client.assert_everywhere(&index.to_string(), Some(&value)).await;
    }
    let rejects = gateway.client.namespace("rejects");
    let refused = rejects
        .put("key", b"value", Mode::Behind)
        .await
        .expect_err("it is full");
    assert_come_back(&refused, Code::ResourceExhausted);
    let waiting = tokio::spawn({
        let client = gateway.client.clone();
        async move {
            let mut request = tonic::Request::new(client.put_request("late", b"value", Mode::Behind));
            request.set_timeout(SOON);
            client.stub().put(request).await
        }
    });
    eventually("the put waits", SOON, async || {
        let full = gateway.metric("tidegate_queue_full_writes_total", &[]).await;
        expect(full >= 2.0, full)
    })
    .await;
    assert!(!waiting.is_finished());
    hold.release().await;
    let answer = timeout(SOON, waiting).await.expect("it is answered").unwrap().unwrap();
    assert_eq!(answer.get_ref().durability(), Durability::Journal);
    gateway.drained().await;
    assert_eq!(database.records("slow").await.len(), BACKLOG);
    assert_eq!(database.records("orders").await, ["late"]);
    rejects
        .put("key", b"value", Mode::Behind)
        .await
        .expect("there is room again");
}

#[tokio::test]
async fn what_the_store_does_not_take_at_a_stop_comes_back() {
    const BACKLOG: usize = 50;
    let mut postgres = Server::start().await;
    let database = Database::at(&postgres.create_database().await);
    let gateway = Setup::new().store(database.url()).config(
        "[shutdown]\ndrain_wait = \"1s\"\n[namespace_defaults]\nwrite_delay = \"1h\"\n\
         [namespaces.best]\nwrite_delay = \"1h\"\ndurability = \"memory\"",
    );
    let mut gateway = gateway.start().await;
    for index in 0..BACKLOG {
        gateway
            .client
            .put(&index.to_string(), b"value", Mode::Behind)
            .await
            .unwrap();
    }
    gateway.client.delete("0", Mode::Behind).await.unwrap();
    let best = gateway.client.namespace("best");
    for key in ["lost", "lost too"] {
        best.put(key, b"value", Mode::Behind).await.unwrap();
    }
    postgres.stop(Stop::Fast).await;
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(75), "{}", exit.log);
    let last = line(
        &exit.log,
        "stopped; the store did not take every accepted write in time",
    )
    .unwrap_or_else(|| panic!("it says how it ended: {}", exit.log));
    assert_eq!(
        last["message"],
        "stopped; the store did not take every accepted write in time: what is in the journal comes back with the next start"
    );
    assert_eq!(last["entries"], BACKLOG + 2, "{last}");
    assert_eq!(last["lost"], 2, "{last}");
    assert!(last["bytes"].as_u64() > Some(0), "{last}");
    assert_eq!(last["calls_finished"], true, "{last}");

    postgres.start_again().await;
    let mut gateway = gateway.start_again().await;
    gateway.client.assert_everywhere("0", None).await;
    gateway.client.assert_everywhere("1", Some(b"value")).await;
    gateway.client.namespace("best").assert_everywhere("lost", None).await;
    stopped(&mut gateway).await;
    assert_eq!(database.records("orders").await.len(), BACKLOG - 1);
    assert_eq!(database.records("best").await.len(), 0);
    let gateway = gateway.start_again().await;
    assert_eq!(pending(&gateway).await, 0.0);
}

#[tokio::test]
async fn a_second_signal_leaves_everything_in_the_journal() {
    const BACKLOG: usize = 50;
    let database = Database::postgres().await;
    let mut gateway = Setup::new()
        .store(database.url())
        .config("[shutdown]\ndrain_wait = \"10m\"")
        .start()
        .await;
    let hold = database.hold_writes().await;
    for index in 0..BACKLOG {
        gateway
            .client
            .put(&index.to_string(), b"value", Mode::Behind)
            .await
            .unwrap();
    }
    // One that follows the first at once is the same one, said twice; so until it is taken for a second.
    eventually("it has ended", SOON, async || {
        gateway.terminate();
        expect(!gateway.runs(), "it runs")
    })
    .await;
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(130), "{}", exit.log);
    hold.release().await;
    let gateway = gateway.start_again().await;
    for index in 0..BACKLOG {
        gateway
            .client
            .assert_everywhere(&index.to_string(), Some(b"value"))
            .await;
    }
    gateway.drained().await;
    assert_eq!(database.records("orders").await.len(), BACKLOG);
}

/// A start that fails late, when the journal has been read.
#[tokio::test]
async fn a_start_that_fails_leaves_everything_in_the_journal() {
    const BACKLOG: usize = 50;
    let database = Database::postgres().await;
    let setup = Setup::new().store(database.url());
    let mut gateway = setup.clone().start().await;
    let hold = database.hold_writes().await;
    for index in 0..BACKLOG {
        let put = gateway.client.put(&index.to_string(), b"value", Mode::Behind).await;
        put.unwrap();
    }
    gateway.kill().await;
    let directory = gateway.leave();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for _ in 0..3 {
        let failing = setup.clone().argument("--listen").argument(&address);
        let exit = failing.run_to_end_in(&directory).await;
        assert_eq!(exit.code, Some(69), "{exit:?}");
    }
    let gateway = setup.start_in(directory).await;
    for index in 0..BACKLOG {
        let key = index.to_string();
        gateway.client.assert_everywhere(&key, Some(b"value")).await;
    }
    hold.release().await;
    gateway.drained().await;
    assert_eq!(database.records("orders").await.len(), BACKLOG);
}

#[tokio::test]
async fn a_start_that_is_told_to_stop_says_whether_something_is_left() {
    let mut postgres = Server::start().await;
    let database = Database::at(&postgres.create_database().await);
    let setup = Setup::new().store(database.url());
    let mut gateway = setup.clone().config(LONG_DELAYS).start().await;
    gateway.client.put("key", b"value", Mode::Behind).await.unwrap();
    gateway.kill().await;
    postgres.stop(Stop::Fast).await;
    let left = gateway.leave();
    // Without it, the start waits for the store.
    fs::remove_file(data_dir(&left).join("lease")).unwrap();
    for (directory, code) in [(&left, 75), (&Directory::new("gateway"), 0)] {
        let exit = setup.stop_while_it_starts_in(directory, "waiting for the store").await;
        assert_eq!(exit.code, Some(code), "{}", exit.log);
    }
    postgres.start_again().await;
    let gateway = setup.start_in(left).await;
    gateway.drained().await;
    assert_eq!(database.records("orders").await, ["key"]);
}

/// A recovered write is the source of an answer until the store has it; then it is a copy like any other.
#[tokio::test]
async fn a_recovered_write_is_pending_until_it_is_drained() {
    let database = Database::postgres().await;
    let mut gateway = Setup::new().store(database.url()).start().await;
    let hold = database.hold_writes().await;
    gateway.client.put("key", b"value", Mode::Behind).await.unwrap();
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    for consistency in EVERY {
        let read = gateway.client.get("key", consistency).await.unwrap();
        assert_eq!(seen(&read), (Some(&b"value"[..]), Source::Pending));
    }
    hold.release().await;
    gateway.drained().await;
    database.await_value("orders", "key", b"value").await;
    gateway.client.assert_everywhere("key", Some(b"value")).await;
}
