//! Proves that promises hold through rare orders of events: clocks that are ahead, restarts, late landings, refusals.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redis::cmd;
use tidegate::rpc::proto::{ReadConsistency, Source};

use crate::harness::{Client, Database, Gateway, Mode, SOON, Setup, eventually, expect, redis as redis_server};

/// Where versions begin: 2024, in milliseconds since the Unix epoch.
const EPOCH: i64 = 1_704_067_200_000;

/// As far ahead as another replica's clock may be and still move ours.
const LITTLE: Duration = Duration::from_secs(18);

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64
}

fn version(ahead: Duration, node: i64) -> i64 {
    ((now() + ahead.as_millis() as i64 - EPOCH) << 21) | node
}

/// What a replica leaves in Redis.
fn copy(version: i64, fresh_for: Duration, value: &[u8]) -> Vec<u8> {
    let mut bytes = version.to_be_bytes().to_vec();
    bytes.extend([0xD2, 0]);
    bytes.extend(now().to_be_bytes());
    bytes.extend((now() + fresh_for.as_millis() as i64).to_be_bytes());
    bytes.extend([0; 24]);
    bytes.extend(value);
    bytes
}

async fn plant(database: &Database, server: &redis_server::Server, key: &str, copy: Vec<u8>) {
    let mut set = cmd("SET");
    set.arg(database.place(key).await).arg(copy);
    set.exec_async(&mut server.connect().await).await.unwrap();
}

/// A gateway that has seen a version a little ahead of its clock, stamped by another node.
async fn led_ahead(database: &Database, server: &redis_server::Server) -> Gateway {
    let gateway = Setup::new().store(database.url()).redis(&server.url()).start().await;
    plant(database, server, "scout", copy(version(LITTLE, 9), SOON, b"x")).await;
    answered_by_redis(&gateway.client, "scout").await;
    gateway
}

async fn answered_by_redis(client: &Client, key: &str) {
    eventually("Redis answers", SOON, async || {
        let read = client.get(key, ReadConsistency::Shared).await.unwrap();
        expect(read.source() == Source::L2, read)
    })
    .await;
}

async fn stored(database: &Database, key: &str) -> Option<String> {
    let value = database.value("orders", key).await;
    value.map(|value| String::from_utf8(value).unwrap())
}

#[tokio::test]
async fn a_restart_never_stamps_a_version_twice() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let mut gateway = led_ahead(&database, &server).await;
    let first = gateway.client.put("key", b"first", Mode::Through).await.unwrap();
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    let second = gateway.client.put("key", b"second", Mode::Through).await.unwrap();
    assert!(second.version > first.version);
    assert_eq!(stored(&database, "key").await.as_deref(), Some("second"));
}

/// What stands in Redis under this node's id is not concurrent: it is from before the restart.
#[tokio::test]
async fn a_write_behind_after_a_restart_is_not_lost_beside_redis() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let mut gateway = led_ahead(&database, &server).await;
    gateway.client.put("key", b"first", Mode::Behind).await.unwrap();
    gateway.drained().await;
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    answered_by_redis(&gateway.client, "key").await;
    gateway.client.put("key", b"second", Mode::Behind).await.unwrap();
    gateway.drained().await;
    assert_eq!(stored(&database, "key").await.as_deref(), Some("second"));
}

#[tokio::test]
async fn a_write_behind_after_a_restart_is_not_lost_without_redis() {
    let database = Database::sqlite();
    let mut gateway = Setup::new().store(database.url()).start().await;
    let ahead = version(LITTLE, 0);
    let scout = format!(
        "insert into tidegate_entries (namespace, key, version, value) values ('orders', 'scout', {ahead}, x'00')"
    );
    database.execute(&scout).await;
    assert!(gateway.client.value("scout", ReadConsistency::Store).await.is_some());
    gateway.client.put("key", b"first", Mode::Behind).await.unwrap();
    gateway.drained().await;
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    gateway.client.put("key", b"second", Mode::Behind).await.unwrap();
    gateway.drained().await;
    assert_eq!(stored(&database, "key").await.as_deref(), Some("second"));
}

/// One process, no restart: an own stamp far ahead stands in Redis, and L1 does not have the key.
#[tokio::test]
async fn an_own_stamp_far_ahead_is_not_taken_for_concurrent() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let setup = Setup::new().store(database.url()).redis(&server.url());
    let gateway = setup.config("[memory]\nbytes_max = 0").start().await;
    let theirs = copy(version(Duration::from_secs(3600), 9), SOON, b"theirs");
    plant(&database, &server, "key", theirs).await;
    answered_by_redis(&gateway.client, "key").await;
    for value in [&b"one"[..], b"two"] {
        gateway.client.put("key", value, Mode::Behind).await.unwrap();
        gateway.drained().await;
    }
    assert_eq!(stored(&database, "key").await.as_deref(), Some("two"));
}

/// The publish of a delete fails, and L1 does not have the tombstone, as after its eviction.
#[tokio::test]
async fn a_deleted_record_stays_deleted_on_its_own_replica() {
    let (database, server) = (Database::sqlite(), redis_server::start().await);
    let setup = Setup::new().store(database.url()).redis(&server.url());
    let gateway = setup.config("[memory]\nbytes_max = 0").start().await;
    gateway.client.put("key", b"value", Mode::Through).await.unwrap();
    answered_by_redis(&gateway.client, "key").await;
    let mut connection = server.connect().await;
    let mut limit = async |bytes: &str| {
        let mut set = cmd("CONFIG");
        set.arg(&["SET", "maxmemory", bytes]);
        set.exec_async(&mut connection).await.unwrap();
    };
    limit("1").await;
    gateway.client.delete("key", Mode::Through).await.unwrap();
    limit("0").await;
    for consistency in [ReadConsistency::Shared, ReadConsistency::Cached] {
        assert_eq!(gateway.client.value("key", consistency).await, None, "{consistency:?}");
    }
}

/// What became a dead letter leaves the caches, however busily it is read.
#[tokio::test]
async fn a_dead_letter_is_not_brought_back_by_its_readers() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let setup = Setup::new().store(database.url()).redis(&server.url());
    // A busy machine is no Redis that has failed, of which nothing is promised here.
    let gateway = setup.config("[redis]\ntimeout = \"20s\"").start().await;
    database
        .execute("alter table tidegate_entries add constraint no_poison check (value is distinct from 'poison'::bytea)")
        .await;
    let keys: Vec<String> = (0..8).map(|key| key.to_string()).collect();
    let readers: Vec<_> = (0..16)
        .map(|reader| {
            let (client, keys) = (gateway.client.clone(), keys.clone());
            tokio::spawn(async move {
                for key in keys.iter().cycle().skip(reader) {
                    let _ = client.get(key, ReadConsistency::Cached).await;
                }
            })
        })
        .collect();
    for _ in 0..6 {
        for key in &keys {
            gateway.client.put(key, b"poison", Mode::Behind).await.unwrap();
        }
        gateway.drained().await;
        for key in &keys {
            // A copy that a reader brought back would stay for five minutes.
            eventually("the caches have let go of it", SOON, async || {
                let read = gateway.client.get(key, ReadConsistency::Cached).await.unwrap();
                expect(read.entry.is_none(), read)
            })
            .await;
        }
    }
    for reader in readers {
        reader.abort();
    }
}

/// A row that a trigger skips in silence stops nothing but itself, and ends in the dead letters.
#[tokio::test]
async fn a_row_that_a_trigger_skips_does_not_stall_the_others() {
    let database = Database::postgres().await;
    let setup = Setup::new().store(database.url());
    let gateway = setup.config("[queue]\ndrain_workers = 1").start().await;
    database
        .execute(
            "create function skip() returns trigger language plpgsql as
             'begin if new.key = ''skip'' then return null; end if; return new; end';
             create trigger skip before insert on tidegate_entries for each row execute function skip()",
        )
        .await;
    gateway.client.put("skip", b"value", Mode::Behind).await.unwrap();
    for key in 0..20 {
        gateway
            .client
            .put(&key.to_string(), b"value", Mode::Behind)
            .await
            .unwrap();
    }
    gateway.drained().await;
    assert_eq!(database.records("orders").await.len(), 20);
    let dead: Vec<String> = database
        .dead_letters()
        .await
        .into_iter()
        .map(|letter| letter.key)
        .collect();
    assert_eq!(dead, ["skip"]);
}

/// The staleness of a CACHED read is bounded by the cache lifetime, whatever another replica's clock says.
#[tokio::test]
async fn a_copy_from_redis_answers_no_longer_than_the_lifetime() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let setup = Setup::new().store(database.url()).redis(&server.url());
    let lifetime = "[namespace_defaults]\ncache_lifetime = \"1s\"\nrefresh_threshold = 0.0";
    let gateway = setup.config(lifetime).start().await;
    database.write_past("orders", "key", b"old").await;
    // As a replica whose clock is a day ahead fills it.
    let day = Duration::from_secs(86_400);
    plant(&database, &server, "key", copy(1, day, b"old")).await;
    answered_by_redis(&gateway.client, "key").await;
    gateway.client.read("key").await;
    database.write_past("orders", "key", b"new").await;
    // Redis forgets it, as by its own expiry.
    cmd("FLUSHALL").exec_async(&mut server.connect().await).await.unwrap();
    eventually("the lifetime ends", SOON, async || {
        let read = gateway.client.value("key", ReadConsistency::Cached).await;
        expect(read.as_deref() == Some(b"new"), read)
    })
    .await;
}

/// A store that takes no writes, as with a full disk, still answers reads.
#[tokio::test]
async fn refused_writes_do_not_refuse_reads() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    gateway.client.put("key", b"value", Mode::Through).await.unwrap();
    database
        .execute(
            "create function no_room() returns trigger language plpgsql as
             'begin raise exception using errcode = ''53100''; end';
             create trigger no_room before insert or update on tidegate_entries for each row execute function no_room()",
        )
        .await;
    let writers: Vec<_> = (0..16)
        .map(|writer| {
            let client = gateway.client.clone();
            tokio::spawn(async move {
                loop {
                    let _ = client.put(&format!("w{writer}"), b"x", Mode::Through).await;
                }
            })
        })
        .collect();
    let retries = ["path=\"through\""];
    eventually("writes have been refused many times", SOON, async || {
        let read = gateway.client.get("key", ReadConsistency::Store).await;
        assert!(read.is_ok(), "a read that PostgreSQL could answer: {read:?}");
        let tried = gateway.metric("tidegate_store_commit_retries_total", &retries).await;
        expect(tried > 50.0, tried)
    })
    .await;
    for writer in writers {
        writer.abort();
    }
}
