//! Proves that old news cannot bring back what was deleted: a write that reaches the store after the tombstone it lost to was collected is
//! set aside, and forgotten by every cache; what is not too late is none the worse for it.

use sqlx::Row as _;
use tidegate::rpc::proto::ReadConsistency;

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup, client::EVERY, database::DeadLetter, eventually, expect, postgres,
    proxy::Proxy, redis,
};

/// Calls end, and deleted records go, as soon as they may.
const HASTY: &str = "[store]\ncall_timeout = '1s'\ntombstone_retention = '1500ms'\ncollect_interval = '200ms'";

/// A gateway whose way to the store can be cut, and one beside it.
struct Pair {
    database: Database,
    network: Proxy,
    far: Gateway,
    near: Gateway,
}

async fn pair(redis: Option<&redis::Server>) -> Pair {
    let database = Database::postgres().await;
    let (before, name) = database.url().rsplit_once('/').expect("a URL has a path");
    let (user, server) = before.rsplit_once('@').expect("a URL has a user");
    let network = Proxy::start(server).await;
    let detour = format!("{user}@{}/{name}", network.address());
    let setup = match redis {
        Some(redis) => Setup::new().redis(&redis.url()),
        None => Setup::new(),
    };
    // The far one collects nothing: what it has to say is late, not wrong.
    let far = setup.clone().store(&detour).config("[store]\ncall_timeout = '1s'");
    let near = setup.store(database.url()).config(HASTY);
    Pair {
        far: far.start().await,
        near: near.start().await,
        database,
        network,
    }
}

/// Waits until a key has no row.
async fn collected(database: &Database, key: &str) {
    eventually(&format!("the row of {key} is collected"), SOON, async || {
        let row = database.row("orders", key).await;
        expect(row.is_none(), row)
    })
    .await;
}

async fn horizon(database: &Database) -> i64 {
    let mut connection = postgres::connect(database.url()).await;
    let row = sqlx::query("select gc_horizon from tidegate_control").fetch_one(&mut connection);
    row.await.expect("there is a control row").get(0)
}

async fn a_gateway_that_was_cut_off_brings_nothing_back(redis: Option<redis::Server>) {
    let Pair {
        database,
        network,
        far,
        near,
    } = pair(redis.as_ref()).await;
    near.client.put("kept", b"before", Mode::Through).await.unwrap();
    network.cut();
    let put = far.client.put("gone", b"late", Mode::Behind).await.unwrap();
    far.client.put("kept", b"after", Mode::Behind).await.unwrap();
    assert_eq!(
        far.client.value("gone", ReadConsistency::Cached).await.as_deref(),
        Some(&b"late"[..])
    );
    let deleted = near.client.delete("gone", Mode::Through).await.unwrap();
    assert!(deleted.version > put.version);
    collected(&database, "gone").await;
    assert!(horizon(&database).await >= deleted.version);
    assert_eq!(far.metric("tidegate_queue_pending_entries", &[]).await, 2.0);

    network.restore();
    far.drained().await;
    let set_aside = DeadLetter {
        key: "gone".to_owned(),
        code: Some("TG001".to_owned()),
        value: Some(b"late".to_vec()),
    };
    assert_eq!(database.dead_letters().await, [set_aside]);
    assert_eq!(database.row("orders", "gone").await, None);
    for gateway in [&far, &near] {
        for consistency in EVERY {
            eventually("no cache shows what was deleted", SOON, async || {
                let read = gateway.client.value("gone", consistency).await;
                expect(read.is_none(), read)
            })
            .await;
        }
    }
    // As old as the other, and its key has a row: the version decides.
    assert_eq!(database.value("orders", "kept").await.as_deref(), Some(&b"after"[..]));

    let mut connection = postgres::connect(database.url()).await;
    let reason: String = sqlx::query_scalar("select reason from tidegate_dead_letters")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert!(reason.contains("retention"), "{reason}");
    assert!(!far.log().contains("late\""), "no value is logged");

    // The gateway is as good as any other again.
    far.client.put("gone", b"new", Mode::Behind).await.unwrap();
    far.drained().await;
    assert_eq!(database.value("orders", "gone").await.as_deref(), Some(&b"new"[..]));
    assert_eq!(database.dead_letters().await.len(), 1);
}

#[tokio::test]
async fn a_gateway_that_was_cut_off_brings_nothing_back_without_redis() {
    a_gateway_that_was_cut_off_brings_nothing_back(None).await;
}

#[tokio::test]
async fn a_gateway_that_was_cut_off_brings_nothing_back_through_redis() {
    a_gateway_that_was_cut_off_brings_nothing_back(Some(redis::start().await)).await;
}

#[tokio::test]
async fn what_is_written_on_time_is_never_too_late() {
    let pair = pair(None).await;
    for round in 0..40_u32 {
        let gateway = if round % 2 == 0 { &pair.far } else { &pair.near };
        let mode = if round % 4 < 2 { Mode::Behind } else { Mode::Through };
        gateway
            .client
            .put(&format!("new{round}"), b"value", mode)
            .await
            .unwrap();
        // Deleted, collected and written again, while the horizon follows closely.
        let key = format!("again{}", round % 3);
        gateway.client.delete(&key, mode).await.unwrap();
        gateway.drained().await;
        if round % 8 == 0 {
            collected(&pair.database, &key).await;
        }
        gateway.client.put(&key, b"value", mode).await.unwrap();
        gateway.drained().await;
        assert_eq!(
            pair.database.value("orders", &key).await.as_deref(),
            Some(&b"value"[..])
        );
    }
    assert_eq!(pair.database.dead_letters().await, []);
    assert_eq!(pair.database.records("orders").await.len(), 43);
    assert!(horizon(&pair.database).await > 0, "something was collected");
}

/// A horizon ahead of the gateway's clock, as it looks to one whose clock is far behind.
#[tokio::test]
async fn a_write_through_is_stamped_above_the_horizon() {
    for database in [Database::postgres().await, Database::sqlite()] {
        let gateway = Setup::new().store(database.url()).start().await;
        let stamped = gateway.client.put("before", b"value", Mode::Through).await.unwrap();
        for ahead_seconds in [30, 3_600] {
            let horizon = stamped.version + ((ahead_seconds * 1_000) << 21);
            database
                .execute(&format!("update tidegate_control set gc_horizon = {horizon}"))
                .await;
            let key = format!("{ahead_seconds}");
            let put = gateway.client.put(&key, b"value", Mode::Through).await.unwrap();
            assert!(put.version > horizon);
            assert_eq!(
                database.row("orders", &key).await.map(|row| row.version),
                Some(put.version)
            );
        }
        assert_eq!(database.dead_letters().await, []);
    }
}
