//! A Redis that answers with what is old: started again from an older file, or another server that had not got everything; and copies that
//! an epoch has left behind.

use std::time::Duration;

use redis::AsyncCommands;
use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::time::Instant;

use super::{
    READER_CUT_OFF, Replica, World, await_agreement,
    ledger::{Ledger, Reading, Writing},
    pass,
};
use crate::harness::{Mode, SOON, eventually, expect};

const EVERY: [ReadConsistency; 2] = [ReadConsistency::Cached, ReadConsistency::Shared];

/// Reads on both gateways, while what Redis held three seconds before takes the place of what it holds.
async fn old_content_comes_back(how: &str, replace: impl AsyncFn(&mut World, &[Replica; 2])) {
    let (mut world, replicas) = World::pair("").await;
    let ledger = Ledger::default();
    let writing = Writing::start(replicas[0].client(), Mode::Through, &ledger);
    let readings: Vec<(Reading, String)> = (0..4)
        .map(|number| {
            let (replica, consistency) = (&replicas[number / 2], EVERY[number % 2]);
            (
                replica.read(consistency),
                format!("{how}: {consistency:?} on gateway {}", number / 2),
            )
        })
        .collect();
    for (reading, _) in &readings {
        reading
            .until("a cache answers", |read| read.source != Source::Store)
            .await;
    }
    world.redis.save().await;
    pass(Instant::now(), 2 * READER_CUT_OFF).await;
    // What is old then is not covered by another write.
    writing.finish().await;
    let replaced = Instant::now();
    replace(&mut world, &replicas).await;
    for (reading, _) in &readings {
        reading
            .until("a cache answers again", |read| read.source != Source::Store)
            .await;
    }
    pass(Instant::now(), Duration::from_secs(1)).await;
    let moved = replicas[0].epochs_moved().await + replicas[1].epochs_moved().await;
    assert!(moved > 0.0, "nobody noticed");
    for (reading, what) in readings {
        let reads = reading.finish().await;
        reads.assert_ages(&what, &ledger, READER_CUT_OFF);
        reads.since(replaced).assert_never_backwards(&what);
    }
    await_agreement(&replicas, &ledger).await;
}

#[tokio::test]
async fn nothing_old_is_read_where_old_content_takes_the_place_of_newer() {
    let from_an_older_file = async |world: &mut World, _: &[Replica; 2]| {
        world.redis.kill();
        world.redis.start_again().await;
    };
    let from_another_server = async |world: &mut World, replicas: &[Replica; 2]| {
        let other = world.redis.start_another().await;
        for replica in replicas {
            replica.redis.lead_to(other.url().trim_start_matches("redis://"));
        }
        // The one before stays alive until then: nobody is told of anything by its end.
        world.redis = other;
    };
    tokio::join!(
        old_content_comes_back("started again", from_an_older_file),
        old_content_comes_back("another server", from_another_server),
    );
}

#[tokio::test]
async fn what_an_epoch_has_left_behind_is_read_by_nobody() {
    let (world, replicas) = World::pair("").await;
    let mut connection = world.redis.connect().await;
    let key = "key0";
    let value = async |replica: &Replica, consistency| {
        let value = replica
            .client()
            .value(key, consistency)
            .await
            .expect("there is a record");
        String::from_utf8_lossy(&value).into_owned()
    };
    replicas[0]
        .client()
        .put(key, b"true", Mode::Through)
        .await
        .expect("a write succeeds");
    // A slot is a header, and then the value.
    let mut lie: Vec<u8> = connection
        .get(world.database.place(key).await)
        .await
        .expect("Redis answers");
    let header = lie.len() - 4;
    lie.splice(header.., *b"lies");
    for replica in &replicas {
        let _: () = connection
            .set(world.database.place(key).await, &lie)
            .await
            .expect("Redis answers");
        assert_eq!(
            value(replica, ReadConsistency::Shared).await,
            "lies",
            "where it is read, it is believed"
        );
    }
    let old_epoch = world.remove_sentinel().await;
    for replica in &replicas {
        eventually("both caches hold the truth", SOON, async || {
            let shared = replica
                .client()
                .get(key, ReadConsistency::Shared)
                .await
                .expect("a read succeeds");
            // Who has not heard yet that the epoch has moved reads the lie there.
            let is_true = shared.entry.as_ref().is_some_and(|entry| entry.value[..] == *b"true");
            expect(is_true && shared.source() == Source::L2, shared)
        })
        .await;
    }
    for _ in 0..50 {
        let _: () = connection
            .set(format!("{old_epoch}{key}"), &lie)
            .await
            .expect("Redis answers");
        for replica in &replicas {
            for consistency in EVERY {
                assert_eq!(value(replica, consistency).await, "true");
            }
        }
    }
}
