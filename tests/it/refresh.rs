//! Proves refresh-ahead: what is read steadily is renewed in the background before its lifetime ends, so that nobody waits for the store,
//! and never over something newer.

use tidegate::rpc::proto::{ReadConsistency, Source};

use crate::harness::{Database, Gateway, Mode, SOON, Setup, client::seen, eventually, expect, redis};

/// Copies are renewed from their second second on, and nobody has to wait for the store before the eighteenth.
fn setup(database: &Database) -> Setup {
    Setup::new().store(database.url()).config(
        "[namespace_defaults]\ncache_lifetime = \"20s\"\nrefresh_threshold = 0.9\n\
         [namespaces.never]\ncache_lifetime = \"2s\"\nrefresh_threshold = 0.0\n\
         [namespaces.slow]\ncache_lifetime = \"100ms\"\nwrite_delay = \"1h\"",
    )
}

async fn refreshes(gateway: &Gateway) -> f64 {
    gateway.metric("tidegate_cache_refreshes_total", &[]).await
}

/// Reads a key until it has `value`, and checks that no read waited for the store.
async fn await_without_waiting(gateway: &Gateway, key: &str, value: &[u8]) {
    eventually(&format!("{key} is renewed"), SOON, async || {
        let read = gateway.client.read(key).await;
        assert_ne!(read.source(), Source::Store, "a reader had to wait for the store");
        expect(seen(&read).0 == Some(value), read)
    })
    .await;
}

async fn steady_reads_see_a_change_without_waiting(gateway: &Gateway, database: &Database) {
    database.write_past("orders", "key", b"0").await;
    assert_eq!(
        seen(&gateway.client.read("key").await),
        (Some(&b"0"[..]), Source::Store)
    );
    for round in 1..=3_u32 {
        let value = round.to_string().into_bytes();
        database.write_past("orders", "key", &value).await;
        await_without_waiting(gateway, "key", &value).await;
    }
    let refreshes = refreshes(gateway).await;
    assert!(refreshes >= 3.0, "{refreshes}");
}

#[tokio::test]
async fn steady_reads_see_a_change_without_waiting_for_postgres() {
    let database = Database::postgres().await;
    let gateway = setup(&database).start().await;
    steady_reads_see_a_change_without_waiting(&gateway, &database).await;
}

#[tokio::test]
async fn steady_reads_see_a_change_without_waiting_where_redis_has_an_older_copy() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let gateway = setup(&database).redis(&redis.url()).start().await;
    steady_reads_see_a_change_without_waiting(&gateway, &database).await;
    // The renewed copy is in Redis as well.
    let read = gateway.client.get("key", ReadConsistency::Shared).await.unwrap();
    assert_eq!(seen(&read), (Some(&b"3"[..]), Source::L2));
}

#[tokio::test]
async fn a_copy_is_renewed_once_for_many_readers() {
    let database = Database::postgres().await;
    let gateway = setup(&database)
        .config("[rpc]\ndeadline_default = \"1m\"\n[store]\ncall_timeout = \"2m\"")
        .start()
        .await;
    gateway.client.put("key", b"old", Mode::Through).await.unwrap();
    database.write_past("orders", "key", b"new").await;
    // The renewal takes as long as we like.
    let hold = database.hold_all().await;
    let read_old = async || {
        let read = gateway.client.read("key").await;
        assert_eq!(seen(&read), (Some(&b"old"[..]), Source::L1), "nobody waits for it");
    };
    eventually("a renewal begins", SOON, async || {
        read_old().await;
        let refreshes = refreshes(&gateway).await;
        expect(refreshes > 0.0, refreshes)
    })
    .await;
    database.await_waiting(1).await;
    let readers = (0..8).map(|_| {
        let client = gateway.client.clone();
        tokio::spawn(async move {
            for _ in 0..50 {
                client.read("key").await;
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    assert_eq!(refreshes(&gateway).await, 1.0, "however many read");
    read_old().await;
    hold.release().await;
    await_without_waiting(&gateway, "key", b"new").await;
}

#[tokio::test]
async fn a_deleted_row_is_noticed_as_absent() {
    let database = Database::postgres().await;
    let gateway = setup(&database).start().await;
    gateway.client.put("key", b"value", Mode::Through).await.unwrap();
    database.execute("delete from tidegate_entries").await;
    eventually("the absence is seen", SOON, async || {
        let read = gateway.client.read("key").await;
        expect(read.entry.is_none(), read)
    })
    .await;
}

#[tokio::test]
async fn a_threshold_of_zero_renews_nothing() {
    let database = Database::postgres().await;
    let gateway = setup(&database).start().await;
    let client = gateway.client.namespace("never");
    client.put("key", b"value", Mode::Through).await.unwrap();
    eventually("the copy ends, and a read waits for the store", SOON, async || {
        let read = client.read("key").await;
        expect(read.source() == Source::Store, read)
    })
    .await;
    assert_eq!(refreshes(&gateway).await, 0.0);
}

#[tokio::test]
async fn a_pending_write_is_not_undone_by_a_refresh() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let gateway = setup(&database).redis(&redis.url()).start().await;
    let client = gateway.client.namespace("slow");
    client.put("key", b"stored", Mode::Through).await.unwrap();
    client.put("key", b"pending", Mode::Behind).await.unwrap();
    eventually("it was renewed several times", SOON, async || {
        for consistency in [ReadConsistency::Cached, ReadConsistency::Shared, ReadConsistency::Store] {
            let read = client.value("key", consistency).await;
            assert_eq!(read.as_deref(), Some(&b"pending"[..]), "{consistency:?}");
        }
        let refreshes = refreshes(&gateway).await;
        expect(refreshes >= 5.0, refreshes)
    })
    .await;
    assert_eq!(database.value("slow", "key").await.as_deref(), Some(&b"stored"[..]));
}

#[tokio::test]
async fn writes_are_not_undone_by_refreshes_that_run_beside_them() {
    let database = Database::postgres().await;
    let gateway = setup(&database)
        .config("[namespaces.hot]\ncache_lifetime = \"20ms\"\nrefresh_threshold = 0.9")
        .start()
        .await;
    let client = gateway.client.namespace("hot");
    let reader = {
        let client = client.clone();
        tokio::spawn(async move {
            loop {
                client.read("key").await;
            }
        })
    };
    for round in 0..400_u32 {
        let mode = if round % 2 == 0 { Mode::Through } else { Mode::Behind };
        let value = round.to_string().into_bytes();
        client.put("key", &value, mode).await.unwrap();
        for _ in 0..3 {
            let read = client.value("key", ReadConsistency::Cached).await;
            assert_eq!(read.as_deref(), Some(value.as_slice()), "round {round}");
        }
    }
    reader.abort();
    assert!(refreshes(&gateway).await > 0.0, "they did run beside each other");
}
