//! Proves that what is written is read: in both modes, from both stores, from every tier, until it is deleted or expires.

use std::time::{Duration, SystemTime};

use tidegate::rpc::proto::{Durability, ReadConsistency, Source};
use tokio::time::{Instant, sleep};

use crate::harness::{
    Client, Database, Gateway, Mode, SOON, Setup, client::seen, database::Row, eventually, expect, redis,
};

const CONSISTENCIES: [ReadConsistency; 3] = [ReadConsistency::Cached, ReadConsistency::Shared, ReadConsistency::Store];

/// A ttl that a busy machine does not exceed between two calls, and that a test can wait for.
const BRIEF: Duration = Duration::from_secs(3);

/// Makes each test twice: over SQLite alone, and over PostgreSQL with Redis.
macro_rules! on_both_stores {
    ($($test:ident),+ $(,)?) => {
        mod embedded {
            $(
                #[tokio::test]
                async fn $test() {
                    let database = super::Database::sqlite();
                    let gateway = super::setup().store(database.url()).start().await;
                    super::$test(&gateway, &database).await;
                }
            )+
        }
        mod postgres_and_redis {
            $(
                #[tokio::test]
                async fn $test() {
                    let (database, redis) = (super::Database::postgres().await, super::redis::start().await);
                    let gateway = super::setup().store(database.url()).redis(&redis.url()).start().await;
                    super::$test(&gateway, &database).await;
                }
            )+
        }
    };
}

on_both_stores!(
    a_write_through_is_in_the_store_when_it_is_answered,
    a_write_behind_is_read_at_once_and_stored_soon,
    a_delete_leaves_a_tombstone,
    absence_is_no_error,
    a_record_expires_everywhere,
    a_put_without_ttl_removes_the_expiry,
    a_pending_record_expires_too,
    namespaces_are_apart,
    values_and_keys_come_back_byte_for_byte,
    a_namespace_chooses_its_mode,
    every_write_is_seen_by_the_next_read,
    store_reads_see_what_somebody_else_wrote,
);

fn setup() -> Setup {
    Setup::new().config(
        "[namespaces.behind]\nwrite_mode = \"behind\"\n\
         [namespaces.slow]\nwrite_delay = \"1h\"\n\
         [namespaces.uncached]\nabsence_lifetime = \"0s\"",
    )
}

async fn a_write_through_is_in_the_store_when_it_is_answered(gateway: &Gateway, database: &Database) {
    let client = &gateway.client;
    let answer = client.put("key", b"value", Mode::Through).await.unwrap();
    assert_eq!(answer.durability(), Durability::Store);
    assert!(answer.version > 0);
    let row = Row {
        version: answer.version,
        value: Some(b"value".to_vec()),
    };
    assert_eq!(database.row("orders", "key").await, Some(row));
    for consistency in CONSISTENCIES {
        let read = client.get("key", consistency).await.unwrap();
        let entry = read.entry.expect("the key is present");
        assert_eq!((entry.value.as_ref(), entry.version), (&b"value"[..], answer.version));
        assert_eq!(entry.expire_time, None);
    }
}

async fn a_write_behind_is_read_at_once_and_stored_soon(gateway: &Gateway, database: &Database) {
    let client = &gateway.client;
    let answer = client.put("key", b"value", Mode::Behind).await.unwrap();
    assert_eq!(answer.durability(), Durability::Journal);
    for consistency in CONSISTENCIES {
        assert_eq!(client.value("key", consistency).await.as_deref(), Some(&b"value"[..]));
    }
    database.await_value("orders", "key", b"value").await;
    let row = database.row("orders", "key").await.expect("it was there");
    assert_eq!(row.version, answer.version);
    gateway.drained().await;
}

async fn a_delete_leaves_a_tombstone(gateway: &Gateway, database: &Database) {
    let client = &gateway.client;
    for mode in [Mode::Through, Mode::Behind] {
        client.put("key", b"value", mode).await.unwrap();
        let deleted = client.delete("key", mode).await.unwrap();
        for consistency in CONSISTENCIES {
            assert_eq!(client.value("key", consistency).await, None, "{mode:?} {consistency:?}");
        }
        gateway.drained().await;
        let tombstone = Row {
            version: deleted.version,
            value: None,
        };
        assert_eq!(database.row("orders", "key").await, Some(tombstone), "{mode:?}");
        assert_eq!(database.records("orders").await, Vec::<String>::new());
    }
    client.put("key", b"again", Mode::Through).await.unwrap();
    assert_eq!(
        client.value("key", ReadConsistency::Store).await.as_deref(),
        Some(&b"again"[..])
    );
}

async fn absence_is_no_error(gateway: &Gateway, database: &Database) {
    let client = &gateway.client;
    assert_eq!(seen(&client.read("never").await), (None, Source::Store));
    assert_eq!(
        seen(&client.read("never").await),
        (None, Source::L1),
        "absence is cached"
    );
    let uncached = client.namespace("uncached");
    for _ in 0..2 {
        assert_eq!(seen(&uncached.read("never").await), (None, Source::Store));
    }
    for mode in [Mode::Through, Mode::Behind] {
        let deleted = client
            .delete("never", mode)
            .await
            .expect("deleting what is absent is OK");
        assert!(deleted.version > 0);
    }
    client.put("never", b"now", Mode::Through).await.unwrap();
    assert_eq!(
        client.value("never", ReadConsistency::Cached).await.as_deref(),
        Some(&b"now"[..])
    );
    assert_eq!(database.records("orders").await, ["never"]);
}

/// Waits until a key is absent for every reader, and checks that it was not absent before its time.
async fn await_expiry(client: &Client, key: &str) {
    for consistency in CONSISTENCIES {
        eventually(&format!("{key} expires for {consistency:?}"), SOON, async || {
            let asked = SystemTime::now();
            let read = client.get(key, consistency).await.unwrap();
            let Some(entry) = read.entry else { return Ok(()) };
            let expiry = SystemTime::try_from(entry.expire_time.expect("it has an expiry")).unwrap();
            // A clock that never steps back within the gateway may differ a little from the system's.
            let late = asked.duration_since(expiry).unwrap_or_default();
            assert!(
                late < Duration::from_secs(1),
                "{key} outlives its expiry by {late:?} for {consistency:?}"
            );
            Err(format!("{:?}", read.source))
        })
        .await;
    }
}

async fn a_record_expires_everywhere(gateway: &Gateway, database: &Database) {
    let client = &gateway.client;
    let before = SystemTime::now();
    for (key, mode) in [("through", Mode::Through), ("behind", Mode::Behind)] {
        client.put_for(key, b"value", mode, BRIEF).await.unwrap();
        for consistency in CONSISTENCIES {
            let entry = client
                .get(key, consistency)
                .await
                .unwrap()
                .entry
                .expect("not expired yet");
            let expiry = SystemTime::try_from(entry.expire_time.expect("it has an expiry")).unwrap();
            let ahead = expiry.duration_since(before).unwrap();
            assert!(
                ahead + Duration::from_secs(1) > BRIEF && ahead < BRIEF + SOON,
                "{ahead:?}"
            );
        }
    }
    gateway.drained().await;
    for key in ["through", "behind"] {
        await_expiry(client, key).await;
        let row = database
            .row("orders", key)
            .await
            .expect("collected only after the retention");
        assert_eq!(
            row.value.as_deref(),
            Some(&b"value"[..]),
            "the row of {key} stays as a tombstone of its version"
        );
    }
    eventually("the view shows no expired record", SOON, async || {
        let records = database.records("orders").await;
        expect(records.is_empty(), records)
    })
    .await;
    assert_eq!(client.value("through", ReadConsistency::Cached).await, None);
}

async fn a_put_without_ttl_removes_the_expiry(gateway: &Gateway, database: &Database) {
    let client = &gateway.client;
    for (key, mode) in [("through", Mode::Through), ("behind", Mode::Behind)] {
        client.put_for(key, b"brief", mode, BRIEF).await.unwrap();
        client.put(key, b"lasting", mode).await.unwrap();
    }
    // The tested property is that time passes and nothing happens.
    sleep(BRIEF + Duration::from_millis(500)).await;
    gateway.drained().await;
    for key in ["through", "behind"] {
        for consistency in CONSISTENCIES {
            let entry = client
                .get(key, consistency)
                .await
                .unwrap()
                .entry
                .expect("the later put has no expiry");
            assert_eq!((entry.value.as_ref(), entry.expire_time), (&b"lasting"[..], None));
        }
    }
    assert_eq!(database.records("orders").await, ["behind", "through"]);
}

async fn a_pending_record_expires_too(gateway: &Gateway, database: &Database) {
    let client = gateway.client.namespace("slow");
    client.put_for("key", b"value", Mode::Behind, BRIEF).await.unwrap();
    await_expiry(&client, "key").await;
    assert_eq!(gateway.metric("tidegate_queue_pending_entries", &[]).await, 1.0);
    assert_eq!(database.row("slow", "key").await, None);
}

async fn namespaces_are_apart(gateway: &Gateway, database: &Database) {
    let (one, other) = (gateway.client.namespace("one"), gateway.client.namespace("other"));
    one.put("key", b"1", Mode::Through).await.unwrap();
    other.put("key", b"2", Mode::Behind).await.unwrap();
    // Neither of these names is a path into another namespace.
    gateway
        .client
        .namespace("one.k")
        .put("ey", b"3", Mode::Through)
        .await
        .unwrap();
    one.delete("missing", Mode::Through).await.unwrap();
    gateway.drained().await;
    for consistency in CONSISTENCIES {
        assert_eq!(one.value("key", consistency).await.as_deref(), Some(&b"1"[..]));
        assert_eq!(other.value("key", consistency).await.as_deref(), Some(&b"2"[..]));
    }
    other.delete("key", Mode::Through).await.unwrap();
    assert_eq!(
        one.value("key", ReadConsistency::Cached).await.as_deref(),
        Some(&b"1"[..])
    );
    assert_eq!(database.records("one").await, ["key"]);
}

async fn values_and_keys_come_back_byte_for_byte(gateway: &Gateway, database: &Database) {
    let client = &gateway.client;
    let every_byte: Vec<u8> = (0..=255).collect();
    let largest = vec![b'x'; 1024 * 1024];
    let longest = "k".repeat(1024);
    let cases: [(&str, &[u8]); 8] = [
        ("empty", b""),
        ("every byte", &every_byte),
        ("largest", &largest),
        (&longest, b"longest key"),
        ("a:b/c%20'\";--\\", b"no syntax of anybody's"),
        ("ключ 键 🔑 é", b"any script"),
        ("trailing ", b"with a space"),
        ("trailing", b"without"),
    ];
    for mode in [Mode::Through, Mode::Behind] {
        for (key, value) in cases {
            client.put(key, value, mode).await.unwrap();
        }
        for (key, value) in cases {
            for consistency in CONSISTENCIES {
                let read = client.value(key, consistency).await;
                assert!(read.as_deref() == Some(value), "{key:?} {mode:?} {consistency:?}");
            }
        }
        gateway.drained().await;
        for (key, value) in cases {
            assert!(
                database.value("orders", key).await.as_deref() == Some(value),
                "{key:?} {mode:?}"
            );
        }
    }
}

async fn a_namespace_chooses_its_mode(gateway: &Gateway, _: &Database) {
    let (plain, behind) = (&gateway.client, gateway.client.namespace("behind"));
    let durability = async |client: &Client, mode| client.put("key", b"v", mode).await.unwrap().durability();
    assert_eq!(durability(plain, Mode::Default).await, Durability::Store);
    assert_eq!(durability(&behind, Mode::Default).await, Durability::Journal);
    assert_eq!(durability(&behind, Mode::Through).await, Durability::Store);
    assert_eq!(
        behind.delete("key", Mode::Default).await.unwrap().durability(),
        Durability::Journal
    );
}

async fn every_write_is_seen_by_the_next_read(gateway: &Gateway, database: &Database) {
    let client = &gateway.client;
    let mut last = 0;
    for round in 0..60 {
        let mode = if round % 3 == 0 { Mode::Through } else { Mode::Behind };
        let value = (round % 4 != 3).then(|| format!("value {round}").into_bytes());
        let version = match &value {
            Some(value) => client.put("key", value, mode).await.unwrap().version,
            None => client.delete("key", mode).await.unwrap().version,
        };
        assert!(version > last, "versions rise: {version} after {last}");
        last = version;
        for consistency in CONSISTENCIES {
            let read = client.value("key", consistency).await;
            assert_eq!(
                read.as_deref(),
                value.as_deref(),
                "round {round}, {mode:?}, {consistency:?}"
            );
        }
    }
    gateway.drained().await;
    let row = database.row("orders", "key").await.expect("a write has a row");
    assert_eq!(
        row,
        Row {
            version: last,
            value: None
        },
        "the sixtieth was a delete"
    );
}

async fn store_reads_see_what_somebody_else_wrote(gateway: &Gateway, database: &Database) {
    let client = &gateway.client;
    client.put("key", b"ours", Mode::Through).await.unwrap();
    database.write_past("orders", "key", b"theirs").await;
    let written = Instant::now();
    assert_eq!(
        client.value("key", ReadConsistency::Cached).await.as_deref(),
        Some(&b"ours"[..])
    );
    let read = client.get("key", ReadConsistency::Store).await.unwrap();
    assert_eq!(seen(&read), (Some(&b"theirs"[..]), Source::Store));
    let age = Duration::try_from(read.age.unwrap()).unwrap();
    assert!(age <= written.elapsed(), "the store was asked after their write");
    // A write of ours is newer than what stands in the store, whoever wrote that.
    client.put("key", b"ours again", Mode::Through).await.unwrap();
    assert_eq!(
        database.value("orders", "key").await.as_deref(),
        Some(&b"ours again"[..])
    );
}

#[tokio::test]
async fn every_tier_answers_in_turn() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = setup().store(database.url()).redis(&redis.url());
    let one = setup.clone().start().await;
    database.write_past("orders", "key", b"value").await;

    let read = async |gateway: &Gateway, consistency| {
        let read = gateway.client.get("key", consistency).await.unwrap();
        assert_eq!(
            read.entry.as_ref().map(|entry| entry.value.as_ref()),
            Some(&b"value"[..])
        );
        read.source()
    };
    let in_redis = async |gateway: &Gateway| {
        // A load fills Redis beside its answer, not before it.
        eventually("Redis has a copy", SOON, async || {
            let source = read(gateway, ReadConsistency::Shared).await;
            expect(source == Source::L2, source)
        })
        .await;
    };
    assert_eq!(read(&one, ReadConsistency::Cached).await, Source::Store);
    assert_eq!(read(&one, ReadConsistency::Cached).await, Source::L1);
    in_redis(&one).await;
    assert_eq!(read(&one, ReadConsistency::Store).await, Source::Store);

    // A gateway with an empty memory finds the copy in Redis.
    let other = setup.clone().start().await;
    assert_eq!(read(&other, ReadConsistency::Cached).await, Source::L2);
    assert_eq!(read(&other, ReadConsistency::Cached).await, Source::L1);
    for tier in ["l1", "l2"] {
        let reads = other
            .metric("tidegate_reads_total", &[&format!("source=\"{tier}\"")])
            .await;
        assert_eq!(reads, 1.0, "reads answered by {tier}");
    }

    // And in the store where Redis has forgotten it.
    let _: () = ::redis::cmd("FLUSHALL")
        .query_async(&mut redis.connect().await)
        .await
        .unwrap();
    assert_eq!(read(&other, ReadConsistency::Shared).await, Source::Store);
    let third = setup.start().await;
    assert_eq!(read(&third, ReadConsistency::Cached).await, Source::Store);
    in_redis(&other).await;
}

#[tokio::test]
async fn a_pending_write_answers_before_the_store() {
    let database = Database::postgres().await;
    let gateway = setup().store(database.url()).start().await;
    let client = gateway.client.namespace("slow");
    client.put("key", b"value", Mode::Behind).await.unwrap();
    for consistency in [ReadConsistency::Shared, ReadConsistency::Store] {
        let read = client.get("key", consistency).await.unwrap();
        assert_eq!(seen(&read), (Some(&b"value"[..]), Source::Pending), "{consistency:?}");
    }
    assert_eq!(database.row("slow", "key").await, None);
    client.put("key", b"newer", Mode::Through).await.unwrap();
    let read = client.get("key", ReadConsistency::Store).await.unwrap();
    assert_eq!(
        seen(&read),
        (Some(&b"newer"[..]), Source::Store),
        "a write-through overtakes what is pending"
    );
    gateway.drained().await;
    assert_eq!(database.value("slow", "key").await.as_deref(), Some(&b"newer"[..]));
}

#[tokio::test]
async fn a_copy_says_its_age() {
    // The gateway counts in whole milliseconds.
    const ROUNDING: Duration = Duration::from_millis(2);
    let gateway = setup().start().await;
    let sent = Instant::now();
    gateway.client.put("key", b"value", Mode::Through).await.unwrap();
    let answered = Instant::now();
    eventually("the copy ages", SOON, async || {
        let at_least = answered.elapsed();
        let read = gateway.client.read("key").await;
        let at_most = sent.elapsed();
        assert_eq!(read.source(), Source::L1);
        let age = Duration::try_from(read.age.expect("every answer has an age")).unwrap();
        assert!(
            at_least <= age + ROUNDING && age <= at_most + ROUNDING,
            "{age:?} is not within {at_least:?} and {at_most:?}"
        );
        expect(age >= Duration::from_millis(300), age)
    })
    .await;
}

#[tokio::test]
async fn the_embedded_gateway_keeps_its_records_when_it_starts_again() {
    let mut gateway = setup().start().await;
    gateway.client.put("through", b"1", Mode::Through).await.unwrap();
    let before = gateway.client.put("behind", b"2", Mode::Behind).await.unwrap();
    gateway.terminate();
    assert_eq!(gateway.wait_exit(SOON).await.code, Some(0));
    let gateway = gateway.start_again().await;
    assert_eq!(
        seen(&gateway.client.read("through").await),
        (Some(&b"1"[..]), Source::Store)
    );
    assert_eq!(
        seen(&gateway.client.read("behind").await),
        (Some(&b"2"[..]), Source::Store)
    );
    let after = gateway.client.put("behind", b"3", Mode::Through).await.unwrap();
    assert!(after.version > before.version);
}

/// Writes through, ends the gateway as a crash would, and expects everything that was answered after the next start.
async fn what_is_written_through_survives_a_crash(database: Database) {
    let mut gateway = setup().store(database.url()).start().await;
    let mut versions = Vec::new();
    for key in 0..20 {
        let put = gateway
            .client
            .put(&key.to_string(), b"value", Mode::Through)
            .await
            .unwrap();
        versions.push(put.version);
    }
    gateway.client.delete("0", Mode::Through).await.unwrap();
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    assert_eq!(seen(&gateway.client.read("0").await), (None, Source::Store));
    for (key, version) in versions.iter().enumerate().skip(1) {
        let entry = gateway
            .client
            .read(&key.to_string())
            .await
            .entry
            .expect("it was answered");
        assert_eq!((entry.value.as_ref(), entry.version), (&b"value"[..], *version));
        let after = gateway
            .client
            .put(&key.to_string(), b"newer", Mode::Through)
            .await
            .unwrap();
        assert!(after.version > *version);
    }
}

#[tokio::test]
async fn what_is_written_through_to_sqlite_survives_a_crash() {
    what_is_written_through_survives_a_crash(Database::sqlite()).await;
}

#[tokio::test]
async fn what_is_written_through_to_postgres_survives_a_crash() {
    what_is_written_through_survives_a_crash(Database::postgres().await).await;
}

#[tokio::test]
async fn two_gateways_do_not_share_an_embedded_store() {
    let database = Database::sqlite();
    let _first = setup().store(database.url()).start().await;
    // It waits for the other one to end, as for any store that is not there yet.
    let brief = "[store]\nconnect_wait = \"1s\"";
    let second = setup().store(database.url()).config(brief).run_to_end().await;
    assert_eq!(second.code, Some(69), "{second:?}");
    assert!(second.log.contains("another gateway"), "{second:?}");
}
