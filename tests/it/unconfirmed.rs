//! Proves that what a restart finds in its journal is old news until the store has taken it: it never hides what was written meanwhile, it
//! is not shared before it is confirmed, and it brings nothing back that was deleted.

use redis::cmd;
use tidegate::rpc::proto::{ReadConsistency, Source};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{
    Database, Mode, SOON, Setup,
    client::{EVERY, assert_come_back, seen},
    database::DeadLetter,
    eventually, expect,
    postgres::{Server, Stop},
    redis as redis_server,
};

/// The version of the copy that Redis holds at a place.
async fn shared_version(place: &str, redis: &redis_server::Server) -> Option<i64> {
    let mut connection = redis.connect().await;
    let copy: Option<Vec<u8>> = cmd("GET").arg(place).query_async(&mut connection).await.unwrap();
    // A floor is the version of what has gone.
    let copy = copy.filter(|copy| copy[9] != 8)?;
    let version = copy.first_chunk().copied().expect("a copy begins with its version");
    Some(i64::from_be_bytes(version))
}

async fn flush(redis: &redis_server::Server) {
    cmd("FLUSHALL").exec_async(&mut redis.connect().await).await.unwrap();
}

/// What another replica wrote after the first one was killed, and how.
const SUPERSEDED: [(&str, Option<&str>, Mode); 4] = [
    ("put", Some("newer"), Mode::Through),
    ("deleted", None, Mode::Through),
    ("put behind", Some("newer"), Mode::Behind),
    ("deleted behind", None, Mode::Behind),
];

async fn superseded_meanwhile(redis: Option<redis_server::Server>, keeps_redis: bool) {
    let database = Database::postgres().await;
    let setup = match &redis {
        Some(redis) => Setup::new().redis(&redis.url()),
        None => Setup::new(),
    };
    let setup = setup.store(database.url());
    let other = setup.clone().start().await;
    let delayed = setup.config("[namespace_defaults]\nwrite_delay = \"1h\"");
    let mut gateway = delayed.start().await;
    for (key, ..) in SUPERSEDED {
        gateway.client.put(key, b"older", Mode::Behind).await.unwrap();
        gateway.client.assert_everywhere(key, Some(b"older")).await;
    }
    gateway.client.put("unrelated", b"older", Mode::Behind).await.unwrap();
    gateway.kill().await;
    for (key, value, mode) in SUPERSEDED {
        match value {
            Some(value) => other.client.put(key, value.as_bytes(), mode).await.map(drop),
            None => other.client.delete(key, mode).await.map(drop),
        }
        .unwrap();
    }
    other.drained().await;
    if let Some(redis) = redis.as_ref().filter(|_| !keeps_redis) {
        flush(redis).await;
    }
    // So that the recovered writes stay what they are while they are read.
    let hold = database.hold_writes().await;
    let mut gateway = gateway.start_again().await;
    for _ in 0..3 {
        for (key, value, _) in SUPERSEDED {
            gateway.client.assert_everywhere(key, value.map(str::as_bytes)).await;
            other.client.assert_everywhere(key, value.map(str::as_bytes)).await;
        }
        gateway.client.assert_everywhere("unrelated", Some(b"older")).await;
    }
    hold.release().await;
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    for (key, value, _) in SUPERSEDED {
        let row = database.row("orders", key).await.expect("it was written");
        assert_eq!(row.value.as_deref(), value.map(str::as_bytes), "{key}");
        other.client.assert_everywhere(key, value.map(str::as_bytes)).await;
        if let Some(redis) = &redis {
            let shared = shared_version(&database.place(key).await, redis).await;
            assert!(shared.is_none_or(|version| version == row.version), "{key}");
        }
    }
    assert_eq!(
        database.value("orders", "unrelated").await.as_deref(),
        Some(&b"older"[..])
    );
    assert_eq!(database.dead_letters().await, []);
}

#[tokio::test]
async fn what_another_replica_wrote_meanwhile_is_not_hidden() {
    superseded_meanwhile(Some(redis_server::start().await), true).await;
}

#[tokio::test]
async fn what_another_replica_wrote_meanwhile_is_not_hidden_where_redis_has_forgotten_it() {
    superseded_meanwhile(Some(redis_server::start().await), false).await;
}

#[tokio::test]
async fn what_another_replica_wrote_meanwhile_is_not_hidden_without_redis() {
    superseded_meanwhile(None, false).await;
}

#[tokio::test]
async fn what_the_store_cannot_confirm_is_served_as_stale_and_not_shared() {
    let (mut postgres, redis) = (Server::start().await, redis_server::start().await);
    let database = Database::at(&postgres.create_database().await);
    let mut gateway = Setup::new().store(database.url()).redis(&redis.url()).start().await;
    for key in ["covered", "read"] {
        gateway.client.put(key, b"stored", Mode::Through).await.unwrap();
    }
    gateway.client.put("deleted", b"stored", Mode::Through).await.unwrap();
    let _hold = database.hold_writes().await;
    let mut expected = Vec::new();
    for key in ["read", "covered", "new"] {
        let put = gateway.client.put(key, b"value", Mode::Behind).await.unwrap();
        expected.push((key, Some(&b"value"[..]), put.version));
    }
    let deleted = gateway.client.delete("deleted", Mode::Behind).await.unwrap();
    expected.push(("deleted", None, deleted.version));
    gateway.kill().await;
    flush(&redis).await;
    let gateway = gateway.start_again().await;
    let place = database.place("").await;
    // While the store answers it is no news that could be stale; but the store has not taken it, so it is not shared.
    let (key, value, _) = expected.remove(0);
    for consistency in [ReadConsistency::Store, ReadConsistency::Shared, ReadConsistency::Cached] {
        let read = gateway.client.get(key, consistency).await.unwrap();
        assert_eq!((seen(&read).0, read.stale), (value, false), "{key} for {consistency:?}");
    }
    assert_none_is_shared(&place, &redis, &expected).await;

    postgres.stop(Stop::Immediate).await;
    gateway.await_health("tidegate.store", ServingStatus::NotServing).await;
    for (key, value, _) in &expected {
        for consistency in [
            ReadConsistency::Cached,
            ReadConsistency::Shared,
            ReadConsistency::Cached,
        ] {
            let read = gateway.client.get(key, consistency).await.unwrap();
            let (seen, stale) = (seen(&read), read.stale);
            assert_eq!(
                (seen, stale),
                ((*value, Source::Pending), true),
                "{key} for {consistency:?}"
            );
        }
        let refused = gateway.client.get(key, ReadConsistency::Store).await;
        assert_come_back(&refused.expect_err("it asks for the store"), Code::Unavailable);
    }
    assert_none_is_shared(&place, &redis, &expected).await;
    // One that is written now needs nobody's word: nothing newer can stand anywhere that this gateway could know of.
    gateway.client.put("covered", b"newer", Mode::Behind).await.unwrap();
    let read = gateway.client.read("covered").await;
    assert_eq!((seen(&read).0, read.stale), (Some(&b"newer"[..]), false));

    postgres.start_again().await;
    gateway.drained().await;
    assert_eq!(
        database.value("orders", "covered").await.as_deref(),
        Some(&b"newer"[..])
    );
    for (key, value, version) in &expected[1..] {
        assert_eq!(database.value("orders", key).await.as_deref(), *value);
        gateway.client.assert_everywhere(key, *value).await;
        // What nothing stood for in Redis gets there with the first read.
        eventually(&format!("{key} is shared"), SOON, async || {
            let read = gateway.client.get(key, ReadConsistency::Shared).await.unwrap();
            assert!(!read.stale, "{read:?}");
            expect(read.source() == Source::L2, read)
        })
        .await;
        let shared = shared_version(&format!("{place}{key}"), &redis).await;
        assert_eq!(shared, Some(*version), "{key} is shared");
    }
}

async fn assert_none_is_shared(place: &str, redis: &redis_server::Server, writes: &[(&str, Option<&[u8]>, i64)]) {
    for (key, _, version) in writes {
        let shared = shared_version(&format!("{place}{key}"), redis).await;
        assert!(shared < Some(*version), "{key}");
    }
}

/// Redis is away while the store takes what is recovered, and comes back with an older copy, as after a failover.
#[tokio::test]
async fn what_cannot_be_shared_when_it_is_confirmed_is_not_hidden_by_what_redis_holds() {
    let (database, mut redis) = (Database::postgres().await, redis_server::start().await);
    let mut gateway = Setup::new().store(database.url()).redis(&redis.url()).start().await;
    gateway.client.put("k", b"older", Mode::Through).await.unwrap();
    let place = database.place("k").await;
    let older: Vec<u8> = cmd("GET")
        .arg(&place)
        .query_async(&mut redis.connect().await)
        .await
        .unwrap();
    let hold = database.hold_writes().await;
    gateway.client.put("k", b"newer", Mode::Behind).await.unwrap();
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    redis.stop().await;
    hold.release().await;
    gateway.drained().await;
    redis.start_again().await;
    cmd("SET")
        .arg(place)
        .arg(&older)
        .exec_async(&mut redis.connect().await)
        .await
        .unwrap();
    gateway.client.assert_everywhere("k", Some(b"newer")).await;
    eventually("Redis answers this gateway again", SOON, async || {
        let read = gateway.client.get("probe", ReadConsistency::Shared).await.unwrap();
        expect(read.source() == Source::L2, read)
    })
    .await;
    gateway.client.assert_everywhere("k", Some(b"newer")).await;
}

/// A write is recovered that is older than a delete whose tombstone has been collected since: nobody but the horizon knows.
#[tokio::test]
async fn what_was_deleted_and_collected_meanwhile_does_not_come_back() {
    let database = Database::postgres().await;
    let hasty = "[store]\ncall_timeout = '1s'\ntombstone_retention = '1500ms'\ncollect_interval = '200ms'";
    let near = Setup::new().store(database.url()).config(hasty).start().await;
    let mut gateway = Setup::new().store(database.url()).start().await;
    near.client.put("kept", b"before", Mode::Through).await.unwrap();
    let hold = database.hold_writes().await;
    gateway.client.put("gone", b"late", Mode::Behind).await.unwrap();
    gateway.client.put("kept", b"after", Mode::Behind).await.unwrap();
    gateway.kill().await;
    hold.release().await;
    near.client.delete("gone", Mode::Through).await.unwrap();
    eventually("the row is collected", SOON, async || {
        let row = database.row("orders", "gone").await;
        expect(row.is_none(), row)
    })
    .await;

    let hold = database.hold_writes().await;
    let gateway = gateway.start_again().await;
    // Before the store has judged it, it may show, and so get into a cache.
    for consistency in EVERY {
        gateway.client.get("gone", consistency).await.unwrap();
    }
    gateway.client.assert_everywhere("kept", Some(b"after")).await;
    hold.release().await;
    gateway.drained().await;
    let set_aside = DeadLetter {
        key: "gone".to_owned(),
        code: Some("TG001".to_owned()),
        value: Some(b"late".to_vec()),
    };
    assert_eq!(database.dead_letters().await, [set_aside]);
    assert_eq!(database.row("orders", "gone").await, None);
    assert_eq!(database.value("orders", "kept").await.as_deref(), Some(&b"after"[..]));
    for gateway in [&gateway, &near] {
        for consistency in EVERY {
            eventually("no cache shows what was deleted", SOON, async || {
                let read = gateway.client.value("gone", consistency).await;
                expect(read.is_none(), read)
            })
            .await;
        }
    }
}
