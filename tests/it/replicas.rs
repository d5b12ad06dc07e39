//! Proves that two gateways on one Redis and one PostgreSQL converge: whatever they wrote, at the end everybody reads the same, and
//! the row says so too.

use std::time::Duration;

use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::task::JoinSet;

use crate::harness::{Client, Database, Gateway, Mode, SOON, Setup, client::seen, eventually, expect, redis};

struct Pair {
    database: Database,
    _redis: redis::Server,
    gateways: [Gateway; 2],
}

async fn pair() -> Pair {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    // Within its lifetime a copy in memory may be older than another replica's write.
    let setup = Setup::new()
        .store(database.url())
        .redis(&redis.url())
        .config("[namespace_defaults]\ncache_lifetime = \"2s\"\nabsence_lifetime = \"2s\"");
    let gateways = [setup.clone().start().await, setup.start().await];
    Pair {
        database,
        _redis: redis,
        gateways,
    }
}

impl Pair {
    /// Checks that both gateways read of a key what its row says: at once from what they share, and from their own memory once the
    /// lifetime of an older copy has ended. The value.
    async fn agreed(&self, key: &str) -> Option<Vec<u8>> {
        let row = self.database.row("orders", key).await;
        let row = row.unwrap_or_else(|| panic!("{key} was written and has no row"));
        let stored = row.value.clone().map(|value| (row.version, value));
        for (index, gateway) in self.gateways.iter().enumerate() {
            let read = async |consistency| {
                let read = gateway.client.get(key, consistency).await.unwrap();
                let source = read.source();
                (read.entry.map(|entry| (entry.version, entry.value.to_vec())), source)
            };
            for consistency in [ReadConsistency::Shared, ReadConsistency::Store] {
                let (seen, source) = read(consistency).await;
                assert_eq!(
                    seen, stored,
                    "gateway {index} reads {key} from {source:?} for {consistency:?}"
                );
            }
            eventually(&format!("gateway {index} agrees from memory"), SOON, async || {
                let (seen, source) = read(ReadConsistency::Cached).await;
                expect(seen == stored, (key, seen, source))
            })
            .await;
        }
        row.value
    }

    async fn drained(&self) {
        for gateway in &self.gateways {
            gateway.drained().await;
        }
    }
}

#[tokio::test]
async fn a_write_through_one_is_read_through_the_other() {
    let pair = pair().await;
    let mut last = 0;
    for round in 0..40_u32 {
        let (writer, reader) = (
            &pair.gateways[round as usize % 2].client,
            &pair.gateways[(round as usize + 1) % 2].client,
        );
        let value = (round % 4 != 3).then(|| round.to_string().into_bytes());
        let version = match &value {
            Some(value) => writer.put("key", value, Mode::Through).await.unwrap().version,
            None => writer.delete("key", Mode::Through).await.unwrap().version,
        };
        assert!(version > last, "each write is above the other gateway's before it");
        last = version;
        for consistency in [ReadConsistency::Shared, ReadConsistency::Store] {
            let read = reader.value("key", consistency).await;
            assert_eq!(read.as_deref(), value.as_deref(), "round {round} for {consistency:?}");
        }
    }
    assert_eq!(pair.agreed("key").await, None);
}

#[tokio::test]
async fn writes_behind_in_turn_end_with_the_last() {
    let pair = pair().await;
    for round in 0..40_u32 {
        let writer = &pair.gateways[round as usize % 2].client;
        writer
            .put("key", round.to_string().as_bytes(), Mode::Behind)
            .await
            .unwrap();
    }
    pair.drained().await;
    assert_eq!(pair.agreed("key").await.as_deref(), Some(&b"39"[..]));
}

async fn storm(client: Client, writer: u32, modes: &'static [Mode]) {
    for round in 0..150_u32 {
        let key = format!("key{}", (writer * 7 + round * 3) % 5);
        let mode = modes[(round / 2) as usize % modes.len()];
        if round % 6 == 5 {
            client.delete(&key, mode).await.unwrap();
        } else {
            client
                .put(&key, format!("{writer} at {round}").as_bytes(), mode)
                .await
                .unwrap();
        }
    }
}

async fn a_storm_converges(modes: &'static [Mode]) {
    let pair = pair().await;
    let mut writers = JoinSet::new();
    for writer in 0..8 {
        writers.spawn(storm(pair.gateways[writer as usize % 2].client.clone(), writer, modes));
    }
    while let Some(writer) = writers.join_next().await {
        writer.expect("every write is OK");
    }
    pair.drained().await;
    for key in 0..5 {
        pair.agreed(&format!("key{key}")).await;
    }
    assert_eq!(pair.database.dead_letters().await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writes_through_converge() {
    a_storm_converges(&[Mode::Through]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writes_behind_converge() {
    a_storm_converges(&[Mode::Behind]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writes_of_both_modes_converge() {
    a_storm_converges(&[Mode::Through, Mode::Behind]).await;
}

#[tokio::test]
async fn replicas_stamp_under_nodes_of_their_own() {
    let pair = pair().await;
    let mut nodes = Vec::new();
    for gateway in &pair.gateways {
        let version = gateway
            .client
            .put("key", b"value", Mode::Through)
            .await
            .unwrap()
            .version;
        nodes.push(version & 0x3ff);
    }
    assert_ne!(nodes[0], nodes[1]);
}

/// The writer tells the reader before the reader loads, and the drain tells nobody.
#[tokio::test]
async fn what_is_loaded_while_redis_cannot_be_asked_does_not_outlive_a_pending_write() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new()
        .store(database.url())
        .redis(&redis.url())
        .config("[namespaces.orders]\nwrite_delay = \"1s\"");
    let (writer, reader) = (setup.clone().start().await, setup.start().await);
    for round in 0..5 {
        let key = format!("key{round}");
        writer.client.put(&key, b"old", Mode::Through).await.unwrap();
        // Adopting another epoch, a gateway asks no Redis for some seconds.
        database
            .execute("update tidegate_control set epoch = epoch + 1, moved_at = clock_timestamp()")
            .await;
        eventually("the reader has adopted it", SOON, async || {
            let read = reader.client.get(&key, ReadConsistency::Shared).await.unwrap();
            expect(read.source() == Source::Store, read.source())
        })
        .await;
        writer.client.put(&key, b"new", Mode::Behind).await.unwrap();
        let loaded = reader.client.read(&key).await;
        if seen(&loaded) != (Some(&b"old"[..]), Source::Store) {
            // Too late: it asks Redis again.
            continue;
        }
        let end = Duration::from_secs(10);
        return eventually("the reader shows what was pending", end, async || {
            let read = reader.client.read(&key).await;
            expect(seen(&read).0 == Some(&b"new"[..]), read.source())
        })
        .await;
    }
    panic!("the reader was never early enough to load what the store held");
}
