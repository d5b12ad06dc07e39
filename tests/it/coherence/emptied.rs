//! A Redis that loses what it held, or has no room: flushed, started again empty, full, or evicting.

use std::time::Duration;

use redis::{aio::MultiplexedConnection, cmd, pipe};
use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::time::Instant;

use super::{
    READER_CUT_OFF, WRITER_CUT_OFF, World, await_agreement,
    ledger::{Ledger, Writing},
    pass,
};
use crate::harness::Mode;

/// How old an answer may be while everybody hears everybody.
const WHOLE: Duration = Duration::from_secs(1);

#[tokio::test]
async fn pending_writes_are_seen_again_within_seven_seconds_of_a_flush() {
    let (world, replicas) = World::pair("[namespace_defaults]\nwrite_delay = \"1h\"").await;
    let [a, b] = &replicas;
    let ledger = Ledger::default();
    ledger.write_each(a.client(), Mode::Through).await;
    // The store has the older ones.
    ledger.write_each(a.client(), Mode::Behind).await;
    let own = a.read(ReadConsistency::Cached);
    let readings = [ReadConsistency::Cached, ReadConsistency::Shared].map(|consistency| b.read(consistency));
    readings[0].until("L1 answers", |read| read.source == Source::L1).await;
    let flushed = Instant::now();
    cmd("FLUSHALL")
        .exec_async(&mut world.redis.connect().await)
        .await
        .expect("Redis obeys");
    pass(flushed, WRITER_CUT_OFF + Duration::from_secs(2)).await;
    assert!(a.epochs_moved().await + b.epochs_moved().await > 0.0, "nobody noticed");
    own.finish()
        .await
        .assert_ages("on the gateway where they are pending", &ledger, Duration::ZERO);
    for (reading, what) in readings.into_iter().zip(["CACHED", "SHARED"]) {
        let reads = reading.finish().await;
        reads.between(flushed - WHOLE, flushed).assert_ages(
            &format!("{what} before the flush"),
            &ledger,
            Duration::ZERO,
        );
        let after = reads.since(flushed + WRITER_CUT_OFF);
        after.assert_ages(
            &format!("{what} seven seconds after the flush"),
            &ledger,
            Duration::ZERO,
        );
    }
    await_agreement(&replicas, &ledger).await;
}

#[tokio::test]
async fn nothing_is_older_than_a_second_and_a_half_when_redis_starts_again_empty() {
    let (mut world, replicas) = World::pair("").await;
    let [a, b] = &replicas;
    let ledger = Ledger::default();
    let writing = Writing::start(a.client(), Mode::Through, &ledger);
    let readings = [a, b].map(|replica| replica.read(ReadConsistency::Cached));
    readings[1].until("L1 answers", |read| read.source == Source::L1).await;
    world.redis.kill();
    pass(Instant::now(), Duration::from_secs(1)).await;
    world.redis.start_again().await;
    readings[1]
        .until("L1 answers again", |read| read.source == Source::L1)
        .await;
    pass(Instant::now(), Duration::from_secs(1)).await;
    writing.finish().await;
    for (reading, who) in readings.into_iter().zip(["the writer", "the other"]) {
        let reads = reading.finish().await;
        reads.assert_ages(&format!("{who}, over an empty start"), &ledger, READER_CUT_OFF);
    }
    await_agreement(&replicas, &ledger).await;
}

/// How many keys it has evicted.
async fn evicted(connection: &mut MultiplexedConnection) -> u64 {
    let info: String = cmd("INFO")
        .arg("stats")
        .query_async(connection)
        .await
        .expect("Redis answers");
    let evicted = info.lines().find_map(|line| line.strip_prefix("evicted_keys:"));
    evicted
        .and_then(|evicted| evicted.trim().parse().ok())
        .expect("it says so")
}

async fn set(connection: &mut MultiplexedConnection, name: &str, value: &str) {
    let mut config = cmd("CONFIG");
    config.arg("SET").arg(name).arg(value);
    config.exec_async(connection).await.expect("Redis obeys");
}

async fn redis_has_no_room() {
    let (world, replicas) = World::pair("").await;
    let [a, b] = &replicas;
    let mut connection = world.redis.connect().await;
    let ledger = Ledger::default();
    let writing = Writing::start(a.client(), Mode::Through, &ledger);
    let readings = [ReadConsistency::Cached, ReadConsistency::Shared].map(|consistency| b.read(consistency));
    readings[0].until("L1 answers", |read| read.source == Source::L1).await;
    // Less than it has in use.
    set(&mut connection, "maxmemory", "100kb").await;
    let full = Instant::now();
    pass(full, Duration::from_secs(3)).await;
    let errors = a.gateway.metric("tidegate_redis_errors_total", &[]).await;
    assert!(errors > 0.0, "there was room");
    set(&mut connection, "maxmemory", "0").await;
    pass(Instant::now(), Duration::from_secs(1)).await;
    writing.finish().await;
    for (reading, what) in readings.into_iter().zip(["CACHED", "SHARED"]) {
        reading
            .finish()
            .await
            .assert_ages(&format!("{what} beside a full Redis"), &ledger, WHOLE);
    }
    await_agreement(&replicas, &ledger).await;
}

async fn redis_evicts() {
    let (world, replicas) = World::pair("").await;
    let [a, b] = &replicas;
    let mut connection = world.redis.connect().await;
    let ledger = Ledger::default();
    let writing = Writing::start(a.client(), Mode::Through, &ledger);
    let readings = [ReadConsistency::Cached, ReadConsistency::Shared].map(|consistency| b.read(consistency));
    readings[0].until("L1 answers", |read| read.source == Source::L1).await;
    let used = world.redis.used_bytes().await;
    set(&mut connection, "maxmemory-policy", "allkeys-lru").await;
    set(&mut connection, "maxmemory", &(used + (200 << 10)).to_string()).await;
    let begun = Instant::now();
    let filler = vec![b'x'; 10_000];
    let mut round = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        let mut fill = pipe();
        for number in 0..20 {
            fill.cmd("SET")
                .arg(format!("filler{round}.{number}"))
                .arg(&filler)
                .ignore();
        }
        round += 1;
        fill.exec_async(&mut connection).await.expect("Redis makes room");
        pass(Instant::now(), Duration::from_millis(10)).await;
    }
    let evicted = evicted(&mut connection).await;
    assert!(evicted > 1_000, "{evicted} keys were evicted");
    set(&mut connection, "maxmemory", "0").await;
    writing.finish().await;
    for (reading, what) in readings.into_iter().zip(["CACHED", "SHARED"]) {
        reading
            .finish()
            .await
            .assert_ages(&format!("{what} beside evictions"), &ledger, WHOLE);
    }
    await_agreement(&replicas, &ledger).await;
}

#[tokio::test]
async fn nothing_is_older_than_a_second_while_redis_has_no_room_or_evicts() {
    tokio::join!(redis_has_no_room(), redis_evicts());
}
