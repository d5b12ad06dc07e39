//! Writes that are pending on one gateway while Redis has no copy of them, so that another one can fill the caches with what is older: once the
//! store has them, everybody sees them, although the drain itself tells nobody.

use std::time::Duration;

use redis::{AsyncCommands, cmd, pipe};
use tidegate::rpc::proto::ReadConsistency;
use tokio::time::{Instant, sleep};

use super::{Replica, World, pass};
use crate::harness::{Mode, SOON, client::seen, eventually, expect, proxy::Passage};

/// How long after its drain a write that was not published may be missing elsewhere: it is told at once.
const TOLD: Duration = Duration::from_secs(2);

/// Waits until the row has the value, and then checks that the other gateway shows it, from whatever tier.
async fn assert_told(world: &World, other: &Replica, value: &[u8]) {
    eventually("it is in the store", SOON, async || {
        let stored = world.database.value("orders", "key").await;
        expect(stored.as_deref() == Some(value), stored)
    })
    .await;
    for consistency in [ReadConsistency::Cached, ReadConsistency::Shared] {
        eventually(&format!("{consistency:?} shows it"), TOLD, async || {
            let read = other.client().get("key", consistency).await;
            let read = read.map_err(|status| format!("{status:?}"))?;
            expect(seen(&read).0 == Some(value), read)
        })
        .await;
    }
}

#[tokio::test]
async fn a_write_whose_copy_was_evicted_while_it_was_pending_is_told_when_it_is_stored() {
    let (world, replicas) = World::pair("[namespaces.orders]\nwrite_delay = \"4s\"").await;
    let [a, b] = &replicas;
    let mut connection = world.redis.connect().await;
    a.client().put("key", b"old", Mode::Through).await.unwrap();
    a.client().put("key", b"new", Mode::Behind).await.unwrap();
    let place = world.database.place("key").await;
    let used = world.redis.used_bytes().await;
    for (name, value) in [
        ("maxmemory-policy", "allkeys-lru".to_owned()),
        ("maxmemory", (used + (300 << 10)).to_string()),
    ] {
        let mut config = cmd("CONFIG");
        config.arg("SET").arg(name).arg(value);
        config.exec_async(&mut connection).await.expect("Redis obeys");
    }
    let filler = vec![b'x'; 20_000];
    let mut round = 0;
    while connection.exists::<_, bool>(&place).await.expect("Redis answers") {
        let mut fill = pipe();
        for number in 0..10 {
            fill.set(format!("filler {round} {number}"), &filler).ignore();
        }
        fill.exec_async(&mut connection).await.expect("there is room");
        round += 1;
    }
    // The caches are filled with what the store has, and no message comes.
    let read = b.client().read("key").await;
    assert_eq!(seen(&read).0, Some(&b"old"[..]), "{read:?}");
    assert_told(&world, b, b"new").await;
}

#[tokio::test]
async fn a_write_that_was_accepted_while_redis_was_away_is_told_when_it_is_stored() {
    let (world, replicas) = World::pair("[namespaces.orders]\nwrite_delay = \"12s\"").await;
    let [a, b] = &replicas;
    a.client().put("key", b"old", Mode::Through).await.unwrap();
    a.redis.set(Passage::Cut);
    let cut = Instant::now();
    a.client().put("key", b"new", Mode::Behind).await.unwrap();
    // The other goes on filling, under the epoch that began because nothing could be published.
    while cut.elapsed() < Duration::from_secs(9) {
        b.client().read("key").await;
        sleep(Duration::from_millis(50)).await;
    }
    assert!(a.epochs_moved().await > 0.0, "it is the one that could not publish");
    a.redis.set(Passage::Open);
    // What is pending is published as soon as Redis can be reached.
    eventually("the other sees what is pending", Duration::from_secs(5), async || {
        let read = b.client().read("key").await;
        expect(seen(&read).0 == Some(&b"new"[..]), read)
    })
    .await;
    pass(cut, Duration::from_secs(12)).await;
    assert_told(&world, b, b"new").await;
}
