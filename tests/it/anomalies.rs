//! Rare orders of events that a promise has to hold through: clocks ahead, restarts, late landings, refusals. Each names its own.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redis::cmd;
use tidegate::rpc::proto::ReadConsistency;
use tokio::time::sleep;

use crate::harness::{Database, Mode, SOON, Setup, eventually, expect, redis as redis_server};

const EPOCH: i64 = 1_704_067_200_000;

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64
}

fn version(ahead: Duration, node: i64) -> i64 {
    ((now() + ahead.as_millis() as i64 - EPOCH) << 21) | node
}

fn copy(version: i64, fresh_for: Duration, value: &[u8]) -> Vec<u8> {
    let mut bytes = version.to_be_bytes().to_vec();
    bytes.extend([0xD1, 0]);
    bytes.extend(now().to_be_bytes());
    bytes.extend((now() + fresh_for.as_millis() as i64).to_be_bytes());
    bytes.extend([0; 16]);
    bytes.extend(value);
    bytes
}

async fn plant(server: &redis_server::Server, key: &str, copy: Vec<u8>) {
    let mut connection = server.connect().await;
    let key = format!("tidegate:orders:{key}");
    let () = cmd("SET")
        .arg(key)
        .arg(copy)
        .query_async(&mut connection)
        .await
        .unwrap();
}

/// Another replica's clock is 18 s ahead, which still moves ours. kill -9, quick restart.
#[tokio::test]
async fn a_restart_never_stamps_a_version_twice() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let mut gateway = Setup::new().store(database.url()).redis(&server.url()).start().await;
    plant(
        &server,
        "scout",
        copy(version(Duration::from_secs(18), 9), Duration::from_secs(300), b"x"),
    )
    .await;
    eventually("the scout is seen", SOON, async || {
        let seen = gateway.client.value("scout", ReadConsistency::Shared).await;
        expect(seen.is_some(), seen)
    })
    .await;
    sleep(Duration::from_millis(11_500)).await; // one renewal reports the high-water mark
    let first = gateway.client.put("key", b"first", Mode::Through).await.unwrap();
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    let second = gateway.client.put("key", b"second", Mode::Through).await.unwrap();
    let stored = database.value("orders", "key").await;
    assert!(
        second.version > first.version && stored.as_deref() == Some(b"second"),
        "first {} second {} stored {:?}; STORE reads {:?}",
        first.version,
        second.version,
        stored.map(|v| String::from_utf8(v).unwrap()),
        gateway.client.value("key", ReadConsistency::Store).await
    );
}

/// The same with write-behind: what stands in Redis under this node's id is not concurrent, it is from before the restart.
#[tokio::test]
async fn a_write_behind_after_a_restart_is_not_lost_redis() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let mut gateway = Setup::new().store(database.url()).redis(&server.url()).start().await;
    plant(
        &server,
        "scout",
        copy(version(Duration::from_secs(18), 9), Duration::from_secs(300), b"x"),
    )
    .await;
    eventually("the scout is seen", SOON, async || {
        let seen = gateway.client.value("scout", ReadConsistency::Shared).await;
        expect(seen.is_some(), seen)
    })
    .await;
    gateway.client.put("key", b"first", Mode::Behind).await.unwrap();
    gateway.drained().await;
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    eventually("Redis is up", SOON, async || {
        gateway.client.put("other", b"x", Mode::Through).await.unwrap();
        let page = gateway.client.get("other", ReadConsistency::Shared).await.unwrap();
        expect(page.source() == tidegate::rpc::proto::Source::L2, page)
    })
    .await;
    gateway.client.put("key", b"second", Mode::Behind).await.unwrap();
    gateway.drained().await;
    let stored = database
        .value("orders", "key")
        .await
        .map(|v| String::from_utf8(v).unwrap());
    assert_eq!(stored.as_deref(), Some("second"));
}

/// Embedded, no Redis: the machine's clock stepped back between two starts (here: a version 50 s ahead was observed).
#[tokio::test]
async fn a_write_behind_after_a_restart_is_not_lost_embedded() {
    let database = Database::sqlite();
    let mut gateway = Setup::new().store(database.url()).start().await;
    let ahead = version(Duration::from_secs(18), 0);
    database
        .execute(&format!(
            "insert into tidegate_entries (namespace, key, version, value) values ('orders', 'scout', {ahead}, x'00')"
        ))
        .await;
    assert!(gateway.client.value("scout", ReadConsistency::Store).await.is_some());
    gateway.client.put("key", b"first", Mode::Behind).await.unwrap();
    gateway.drained().await;
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    gateway.client.put("key", b"second", Mode::Behind).await.unwrap();
    gateway.drained().await;
    let stored = database
        .value("orders", "key")
        .await
        .map(|v| String::from_utf8(v).unwrap());
    assert_eq!(stored.as_deref(), Some("second"));
}

/// One process, no restart: an own stamp far ahead stands, and L1 no longer has the key.
#[tokio::test]
async fn an_own_stamp_far_ahead_is_not_taken_for_concurrent() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let gateway = Setup::new()
        .store(database.url())
        .redis(&server.url())
        .config("[memory]\nbytes_max = 0")
        .start()
        .await;
    plant(
        &server,
        "key",
        copy(
            version(Duration::from_secs(3600), 9),
            Duration::from_secs(300),
            b"theirs",
        ),
    )
    .await;
    eventually("Redis is up", SOON, async || {
        let seen = gateway.client.value("key", ReadConsistency::Shared).await;
        expect(seen.is_some(), seen)
    })
    .await;
    let one = gateway.client.put("key", b"one", Mode::Behind).await.unwrap();
    gateway.drained().await;
    let two = gateway.client.put("key", b"two", Mode::Behind).await.unwrap();
    gateway.drained().await;
    let stored = database
        .value("orders", "key")
        .await
        .map(|v| String::from_utf8(v).unwrap());
    assert_eq!(
        stored.as_deref(),
        Some("two"),
        "one {} two {}",
        one.version,
        two.version
    );
}

/// One failed publish of a delete, and the same replica reads the record again.
#[tokio::test]
async fn a_deleted_record_stays_deleted_on_its_own_replica() {
    let (database, server) = (Database::sqlite(), redis_server::start().await);
    let gateway = Setup::new()
        .store(database.url())
        .redis(&server.url())
        // As when L1 has evicted the tombstone, or after a restart.
        .config("[memory]\nbytes_max = 0")
        .start()
        .await;
    eventually("Redis has the record", SOON, async || {
        gateway.client.put("key", b"value", Mode::Through).await.unwrap();
        let seen = gateway.client.get("key", ReadConsistency::Shared).await.unwrap();
        expect(seen.source() == tidegate::rpc::proto::Source::L2, seen)
    })
    .await;
    let mut connection = server.connect().await;
    let () = cmd("CONFIG")
        .arg(&["SET", "maxmemory", "1"])
        .query_async(&mut connection)
        .await
        .unwrap();
    gateway.client.delete("key", Mode::Through).await.unwrap();
    let () = cmd("CONFIG")
        .arg(&["SET", "maxmemory", "0"])
        .query_async(&mut connection)
        .await
        .unwrap();
    let shared = gateway.client.get("key", ReadConsistency::Shared).await.unwrap();
    let cached = gateway.client.get("key", ReadConsistency::Cached).await.unwrap();
    assert!(
        cached.entry.is_none() && shared.entry.is_none(),
        "cached {cached:?}\nshared {shared:?}"
    );
}

/// What became a dead letter leaves the caches, however busily it is read.
#[tokio::test]
async fn a_dead_letter_is_not_brought_back_by_its_readers() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let gateway = Setup::new().store(database.url()).redis(&server.url()).start().await;
    database
        .execute("alter table tidegate_entries add constraint no_poison check (value is distinct from 'poison'::bytea)")
        .await;
    let readers: Vec<_> = (0..16)
        .map(|reader| {
            let client = gateway.client.clone();
            tokio::spawn(async move {
                for turn in 0.. {
                    let _ = client
                        .get(&format!("{}", (turn + reader) % 8), ReadConsistency::Cached)
                        .await;
                }
            })
        })
        .collect();
    let mut left = Vec::new();
    for round in 0..6 {
        for key in 0..8 {
            gateway
                .client
                .put(&format!("{key}"), b"poison", Mode::Behind)
                .await
                .unwrap();
        }
        gateway.drained().await;
        sleep(Duration::from_millis(700)).await;
        for key in 0..8 {
            let read = gateway
                .client
                .get(&format!("{key}"), ReadConsistency::Cached)
                .await
                .unwrap();
            if read.entry.is_some() {
                left.push((round, key, read.source()));
            }
        }
    }
    for reader in readers {
        reader.abort();
    }
    assert!(
        left.is_empty(),
        "still served, until its lifetime (5 min) ends: {left:?}"
    );
}

/// A row that a trigger skips in silence stops nothing but itself.
#[tokio::test]
async fn a_row_that_a_trigger_skips_does_not_stall_the_others() {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config("[queue]\ndrain_workers = 1")
        .start()
        .await;
    for sql in [
        "create function skip() returns trigger language plpgsql as 'begin if new.key = ''skip'' then return null; end if; return new; end'",
        "create trigger skip before insert on tidegate_entries for each row execute function skip()",
    ] {
        database.execute(sql).await;
    }
    gateway.client.put("skip", b"value", Mode::Behind).await.unwrap();
    for key in 0..20 {
        gateway
            .client
            .put(&format!("{key}"), b"value", Mode::Behind)
            .await
            .unwrap();
    }
    sleep(Duration::from_secs(8)).await;
    let mut refused = 0;
    for key in 0..200 {
        let read = gateway
            .client
            .get(&format!("unknown{key}"), ReadConsistency::Store)
            .await;
        refused += u32::from(read.is_err());
        sleep(Duration::from_millis(10)).await;
    }
    let pending = gateway.metric("tidegate_queue_pending_entries", &[]).await;
    assert!(
        pending <= 1.0,
        "{pending} entries are pending; {refused} of 200 unrelated reads failed"
    );
}

/// The staleness of a CACHED read is bounded by the cache lifetime, whatever another replica's clock says.
#[tokio::test]
async fn a_copy_from_redis_answers_no_longer_than_the_lifetime() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let gateway = Setup::new()
        .store(database.url())
        .redis(&server.url())
        .config("[namespace_defaults]\ncache_lifetime = \"1s\"")
        .start()
        .await;
    database.write_past("orders", "key", b"old").await;
    // As a replica whose clock is a day ahead fills it.
    plant(&server, "key", copy(1, Duration::from_secs(86_400), b"old")).await;
    eventually("Redis answers", SOON, async || {
        let seen = gateway.client.get("key", ReadConsistency::Shared).await.unwrap();
        expect(seen.source() == tidegate::rpc::proto::Source::L2, seen)
    })
    .await;
    gateway.client.read("key").await;
    database.write_past("orders", "key", b"new").await;
    let mut connection = server.connect().await;
    let () = cmd("FLUSHALL").query_async(&mut connection).await.unwrap(); // Redis forgets it, as by its own expiry
    sleep(Duration::from_secs(3)).await;
    assert_eq!(
        gateway.client.value("key", ReadConsistency::Cached).await.as_deref(),
        Some(&b"new"[..])
    );
}

/// A store that takes no writes (disk full) still answers reads.
#[tokio::test]
async fn refused_writes_do_not_refuse_reads() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    gateway.client.put("key", b"value", Mode::Through).await.unwrap();
    for sql in [
        "create function full() returns trigger language plpgsql as 'begin raise exception using errcode = ''53100''; end'"
            .replace("full()", "no_room()"),
        "create trigger no_room before insert or update on tidegate_entries for each row execute function no_room()".into(),
    ] {
        database.execute(&sql).await;
    }
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
    let mut failed = 0;
    for _ in 0..200 {
        failed += u32::from(gateway.client.get("key", ReadConsistency::Store).await.is_err());
        sleep(Duration::from_millis(20)).await;
    }
    for writer in writers {
        writer.abort();
    }
    assert_eq!(failed, 0, "of 200 reads that PostgreSQL could answer");
}
