//! Proves that a read gets an answer as fresh as it asks for, on any replica, or is told why not; and that copies outlive an outage of the
//! store where a namespace says so, marked, and for no longer than it says.

use std::time::Duration;

use tidegate::rpc::proto::{GetResponse, ReadConsistency, Source};
use tokio::{task::JoinSet, time::Instant};
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt;

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::{EVERY, assert_come_back, assert_do_not_come_back, outcome, seen},
    eventually, expect,
    postgres::{Server, Stop},
    redis,
};

use ReadConsistency::{Cached, Shared, Store};

/// Copies that no test outlives, and that nobody renews.
const LONG: &str = "[namespace_defaults]\ncache_lifetime = '1h'\nabsence_lifetime = '1h'\nrefresh_threshold = 0.0";

/// A second of a version.
const SECOND: i64 = 1_000 << 21;

async fn pair(setup: Setup) -> [Gateway; 2] {
    [setup.clone().start().await, setup.start().await]
}

fn version(answer: &GetResponse) -> Option<i64> {
    answer.entry.as_ref().map(|entry| entry.version)
}

fn age(answer: &GetResponse) -> Duration {
    let age = answer.age.expect("every answer has an age");
    age.try_into().expect("it is not negative")
}

fn assert_not_visible(status: &Status) {
    assert_come_back(status, Code::Unavailable);
    let info = status.get_details_error_info().expect("there is an ErrorInfo");
    assert_eq!(info.reason, "NOT_VISIBLE", "{status:?}");
    assert!(status.message().contains("min_version"), "{status:?}");
}

async fn what_is_written_on_one_replica_is_read_on_the_other(setup: Setup) {
    let [writer, reader] = pair(setup).await;
    let mut round = 0;
    for mode in [Mode::Through, Mode::Behind] {
        for consistency in EVERY {
            for _ in 0..8 {
                round += 1;
                // The reader has an older copy in its memory, or an absence.
                reader.client.read("key").await;
                let value = format!("{round}").into_bytes();
                let written = writer.client.put("key", &value, mode).await.unwrap().version;
                let read = reader.client.get_at_least("key", consistency, written).await.unwrap();
                assert_eq!(seen(&read).0, Some(&value[..]), "{mode:?} for {consistency:?}");
                assert_eq!(version(&read), Some(written));
            }
            reader.client.read("key").await;
            let deleted = writer.client.delete("key", mode).await.unwrap().version;
            let read = reader.client.get_at_least("key", consistency, deleted).await.unwrap();
            assert_eq!(version(&read), None, "{mode:?} for {consistency:?}");
        }
    }
}

#[tokio::test]
async fn a_version_is_read_on_another_replica_over_its_older_copy() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url()).config(LONG);
    what_is_written_on_one_replica_is_read_on_the_other(setup).await;
}

#[tokio::test]
async fn a_version_is_read_on_another_replica_that_shares_nothing_but_the_store() {
    let database = Database::postgres().await;
    let setup = Setup::new().store(database.url()).config(LONG);
    what_is_written_on_one_replica_is_read_on_the_other(setup).await;
}

#[tokio::test]
async fn a_version_that_is_pending_elsewhere_is_waited_for() {
    let (database, mut redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new()
        .store(database.url())
        .redis(&redis.url())
        .config(LONG)
        .config("[rpc]\ndeadline_default = '30s'");
    let [writer, reader] = pair(setup).await;
    writer.client.put("key", b"old", Mode::Through).await.unwrap();
    reader.client.assert_everywhere("key", Some(b"old")).await;
    redis.stop().await;
    let hold = database.hold_writes().await;
    let written = writer.client.put("key", b"new", Mode::Behind).await.unwrap().version;
    // The drain has it, and cannot commit it.
    database.await_waiting(1).await;
    let mut reads = JoinSet::new();
    for consistency in EVERY {
        let client = reader.client.clone();
        reads.spawn(async move { client.get_at_least("key", consistency, written).await });
    }
    // Long enough for an answer that did not wait; one that takes longer fails below, by what it says.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(reads.try_join_next().is_none(), "nobody here can know that version");
    hold.release().await;
    while let Some(read) = reads.join_next().await {
        let read = read.unwrap().expect("it becomes visible in time");
        assert_eq!(seen(&read).0, Some(&b"new"[..]));
    }
    assert_eq!(
        seen(&reader.client.read("key").await).0,
        Some(&b"new"[..]),
        "it has landed over the older copy"
    );
}

#[tokio::test]
async fn a_version_that_redis_holds_needs_no_store() {
    let mut postgres = Server::start().await;
    let (database, redis) = (Database::at(&postgres.create_database().await), redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url()).config(LONG);
    let [writer, reader] = pair(setup).await;
    writer.client.put("key", b"old", Mode::Through).await.unwrap();
    reader.client.read("key").await;
    postgres.stop(Stop::Fast).await;
    for gateway in [&writer, &reader] {
        gateway.await_health("tidegate.store", ServingStatus::NotServing).await;
    }
    let written = writer.client.put("key", b"new", Mode::Behind).await.unwrap().version;
    for consistency in [Cached, Shared] {
        let read = reader.client.get_at_least("key", consistency, written).await.unwrap();
        assert_eq!(
            (seen(&read).0, read.stale),
            (Some(&b"new"[..]), false),
            "{consistency:?}"
        );
    }
    let refused = reader.client.get_at_least("key", Store, written).await;
    assert_come_back(&refused.expect_err("asked for the store"), Code::Unavailable);
}

#[tokio::test]
async fn a_version_that_does_not_come_is_told_apart_from_one_that_cannot() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let gateway = Setup::new()
        .store(database.url())
        .redis(&redis.url())
        .config(LONG)
        .config("[rpc]\ndeadline_default = '500ms'")
        .start()
        .await;
    let client = &gateway.client;
    let written = client.put("key", b"value", Mode::Through).await.unwrap().version;
    for consistency in EVERY {
        for key in ["key", "absent"] {
            let waited = client.get_at_least(key, consistency, written + 10 * SECOND).await;
            assert_not_visible(&waited.expect_err("nobody writes it"));
        }
        for ahead in [written + 3600 * SECOND, i64::MAX] {
            let refused = client.get_at_least("key", consistency, ahead).await;
            let status = refused.expect_err("nobody can have stamped it");
            assert_do_not_come_back(&status, Code::FailedPrecondition, "TOO_NEW");
            assert_eq!(outcome(&status), "not_applied");
            let failure = status.get_details_precondition_failure().expect("there are details");
            assert_eq!(failure.violations[0].subject, "min_version", "{status:?}");
        }
        let read = client.get_at_least("key", consistency, written).await.unwrap();
        assert_eq!(version(&read), Some(written), "{consistency:?}");
    }
    let next = client.put("key", b"value", Mode::Through).await.unwrap().version;
    assert!(next < written + 10 * SECOND, "no clock was moved");
}

#[tokio::test]
async fn a_copy_older_than_asked_for_is_loaded_anew() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url()).config(LONG);
    let [one, other] = pair(setup).await;
    let (hour, brief) = (Duration::from_secs(3600), Duration::from_millis(50));
    one.client.put("key", b"0", Mode::Through).await.unwrap();
    for (round, consistency) in EVERY.into_iter().enumerate() {
        let (before, after) = (format!("{round}").into_bytes(), format!("{}", round + 1).into_bytes());
        database.write_past("orders", "key", &after).await;
        // Nothing tells the gateway.
        let read = one.client.get_within("key", Cached, hour).await.unwrap();
        assert_eq!(seen(&read), (Some(&before[..]), Source::L1));
        eventually(&format!("{consistency:?} reloads what is too old"), SOON, async || {
            let read = one.client.get_within("key", consistency, brief).await.unwrap();
            expect(seen(&read) == (Some(&after[..]), Source::Store), read)
        })
        .await;
        // A read that is not cached may leave L1 as it was.
        eventually("a cached read lands what it reloads", SOON, async || {
            let read = one.client.get_within("key", Cached, brief).await.unwrap();
            expect(seen(&read).0 == Some(&after[..]), read)
        })
        .await;
        let read = one.client.read("key").await;
        assert_eq!(seen(&read), (Some(&after[..]), Source::L1));
        eventually("it is in Redis for the other", SOON, async || {
            let read = other.client.get("key", Shared).await.unwrap();
            expect(seen(&read) == (Some(&after[..]), Source::L2), read)
        })
        .await;
    }
}

/// A store that is down, and two gateways that had copies past their lifetime soon after: a second of it. Only the first has them in its
/// memory.
struct Outage {
    postgres: Server,
    _redis: redis::Server,
    gateways: [Gateway; 2],
    /// The version of `key`.
    written: i64,
}

async fn outage() -> Outage {
    let mut postgres = Server::start().await;
    let (database, redis) = (Database::at(&postgres.create_database().await), redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url()).config(
        "[namespace_defaults]\ncache_lifetime = '1s'\nabsence_lifetime = '1s'\nrefresh_threshold = 0.0\n\
         [namespaces.orders]\nstale_if_error = '1h'\n\
         [namespaces.short]\nstale_if_error = '5s'",
    );
    let gateways = pair(setup).await;
    let client = &gateways[0].client;
    let written = client.put("key", b"value", Mode::Through).await.unwrap().version;
    let ttl = Duration::from_secs(4);
    client.put_for("brief", b"value", Mode::Through, ttl).await.unwrap();
    client.put("deleted", b"value", Mode::Through).await.unwrap();
    client.delete("deleted", Mode::Through).await.unwrap();
    assert_eq!(client.value("absent", Cached).await, None);
    for namespace in ["short", "strict"] {
        let client = client.namespace(namespace);
        client.put("key", b"value", Mode::Through).await.unwrap();
    }
    postgres.stop(Stop::Fast).await;
    for gateway in &gateways {
        gateway.await_health("tidegate.store", ServingStatus::NotServing).await;
    }
    Outage {
        postgres,
        _redis: redis,
        gateways,
        written,
    }
}

/// Waits until a cached read of a key is refused.
async fn await_refusal(gateway: &Gateway, namespace: &str, key: &str) {
    let client = gateway.client.namespace(namespace);
    let what = format!("{key} of {namespace} is not to be had any more");
    let status = eventually(&what, SOON, async || match client.get(key, Cached).await {
        Ok(read) => Err(format!("{read:?}")),
        Err(status) => Ok(status),
    })
    .await;
    assert_come_back(&status, Code::Unavailable);
}

/// Waits until the copy of `key` is past its lifetime, and checks that its age is true and grows.
async fn await_stale(gateway: &Gateway, consistency: ReadConsistency, source: Source, written: i64) {
    let read = async || {
        let read = gateway.client.get("key", consistency).await;
        let read = read.expect("a copy is known");
        assert_eq!(version(&read), Some(written));
        read
    };
    let first = eventually("the copy is past its lifetime", SOON, async || {
        let read = read().await;
        if read.stale { Ok(read) } else { Err(format!("{read:?}")) }
    })
    .await;
    assert_eq!(first.source(), source, "{consistency:?}");
    // Give or take a tenth.
    assert!(age(&first) >= Duration::from_millis(900), "{first:?}");
    eventually("its age grows", SOON, async || {
        let read = read().await;
        assert!(read.stale && age(&read) >= age(&first), "{read:?}");
        expect(age(&read) > age(&first), read)
    })
    .await;
}

#[tokio::test]
async fn an_expired_copy_outlives_an_outage_as_far_as_the_namespace_lets_it() {
    let Outage {
        mut postgres,
        _redis,
        gateways,
        written,
    } = outage().await;
    let hour = Duration::from_secs(3600);
    for (gateway, source) in gateways.iter().zip([Source::L1, Source::L2]) {
        let client = &gateway.client;
        for consistency in [Cached, Shared] {
            await_stale(gateway, consistency, source, written).await;
        }
        // Whoever asks for more than what was known is told that nobody can answer.
        for refused in [
            client.get("key", Store).await,
            client.get_at_least("key", Cached, written).await,
            client.get_at_least("key", Shared, written).await,
            client.get_within("key", Cached, hour).await,
            client.get_within("key", Shared, hour).await,
        ] {
            assert_come_back(&refused.expect_err("only the store could answer"), Code::Unavailable);
        }
        await_refusal(gateway, "strict", "key").await;
        await_refusal(gateway, "short", "key").await;
        for key in ["brief", "deleted", "absent"] {
            await_refusal(gateway, "orders", key).await;
        }
        assert!(client.read("key").await.stale, "its grace is not over");
    }
    let answers = gateways[0].metric("tidegate_cache_stale_answers_total", &[]).await;
    assert!(answers >= 2.0, "{answers}");

    postgres.start_again().await;
    for gateway in &gateways {
        eventually("the store answers again", SOON, async || {
            let read = gateway.client.read("key").await;
            expect(!read.stale, read)
        })
        .await;
    }
}

#[tokio::test]
async fn during_an_outage_nobody_waits_for_the_load_of_another() {
    let mut postgres = Server::start().await;
    let (database, redis) = (Database::at(&postgres.create_database().await), redis::start().await);
    // So long that a read which waited is told from one that a busy machine delayed.
    let gateway = Setup::new()
        .store(database.url())
        .redis(&redis.url())
        .config("[redis]\nload_wait = '20s'\n[rpc]\ndeadline_default = '30s'")
        .config("[namespace_defaults]\ncache_lifetime = '100ms'\nrefresh_threshold = 0.0\nstale_if_error = '1h'")
        .start()
        .await;
    eventually("the copy is in Redis", SOON, async || {
        gateway.client.put("key", b"value", Mode::Through).await.unwrap();
        let read = gateway.client.get("key", Shared).await.unwrap();
        expect(read.source() == Source::L2, read)
    })
    .await;
    postgres.stop(Stop::Fast).await;
    gateway.await_health("tidegate.store", ServingStatus::NotServing).await;
    // The token of a load that never ends, where the layout has it.
    let mut connection = redis.connect().await;
    let slots: Vec<String> = ::redis::cmd("KEYS")
        .arg("*:orders:key")
        .query_async(&mut connection)
        .await
        .unwrap();
    let token = [&[7_u8; 8][..], &i64::MAX.to_be_bytes()].concat();
    let set: i64 = ::redis::cmd("SETRANGE")
        .arg(&slots[0])
        .arg(34)
        .arg(token)
        .query_async(&mut connection)
        .await
        .unwrap();
    assert!(slots.len() == 1 && set > 50, "{slots:?} {set}");
    for consistency in [Cached, Shared] {
        let begun = Instant::now();
        eventually("the copy is past its lifetime", SOON, async || {
            let read = gateway.client.get("key", consistency).await.expect("a copy is known");
            expect(read.stale, read)
        })
        .await;
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(15), "{consistency:?}: {took:?}");
    }
}
