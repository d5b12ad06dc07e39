//! Servers that accept and never answer: who reads does not wait for them again and again.

use std::time::Duration;

use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::time::{Instant, sleep};
use tonic::{Code, transport::Endpoint};

use super::{
    World, await_agreement,
    ledger::{Figures, KEYS, Ledger, Read, read},
    pass,
};
use crate::harness::{Client, Mode, SOON, eventually, expect, proxy::Passage, until};

/// Reads without end, over a connection of its own, until `end`.
async fn read_until(gateway: std::net::SocketAddr, first: usize, end: Instant) -> Vec<Read> {
    let endpoint = Endpoint::from_shared(format!("http://{gateway}")).expect("an address makes a URL");
    let client = Client::new(endpoint.connect().await.expect("the gateway accepts"));
    let mut reads = Vec::new();
    let mut number = first;
    while Instant::now() < end {
        reads.push(read(&client, number % KEYS, ReadConsistency::Cached).await);
        number += 1;
        sleep(Duration::from_millis(25)).await;
    }
    reads
}

#[tokio::test]
async fn reads_wait_for_a_redis_that_is_a_black_hole_once_and_not_again() {
    /// What README states: twice as long as a call waits for Redis.
    const STATED: Duration = Duration::from_millis(500);
    /// A call waits for Redis for a quarter of a second.
    const FIRST: Duration = Duration::from_millis(300);
    const LATER: Duration = Duration::from_millis(50);
    let (_world, replicas) = World::pair("").await;
    let replica = &replicas[0];
    let ledger = Ledger::default();
    ledger.write_each(replica.client(), Mode::Through).await;
    let begun = Instant::now();
    let end = begun + Duration::from_secs(6);
    let readers: Vec<_> = (0..16)
        .map(|reader| tokio::spawn(read_until(replica.gateway.address, reader, end)))
        .collect();
    pass(begun, Duration::from_secs(1)).await;
    let holed = Instant::now();
    replica.redis.set(Passage::Hole);
    until("the connections are held to be down", async || {
        replica.redis_is_down().await
    })
    .await;
    eprintln!("held to be down after {:.1?}", holed.elapsed());
    let mut reads = Vec::new();
    for reader in readers {
        reads.extend(reader.await.expect("every read succeeds"));
    }
    assert!(replica.redis_is_down().await, "as long as it does not answer");
    let latencies = |from: Instant| Figures::of(reads.iter().filter(|read| read.sent >= from).map(|read| read.took));
    let (all, later) = (latencies(holed), latencies(end - Duration::from_secs(3)));
    eprintln!("reads beside a black hole: {all}; in its last three seconds: {later}");
    assert!(all.permille(990) <= STATED, "{all}");
    // Of ten reads nine, and not ninety-nine of a hundred: one stall of a busy machine is a read of every client, and more than a hundredth. Who
    // waited for Redis again would do so all the time.
    assert!(all.permille(900) <= FIRST, "{all}");
    assert!(later.permille(900) <= LATER, "{later}");
    replica.redis.restore();
    until("Redis is back", async || !replica.redis_is_down().await).await;
    await_agreement(&replicas, &ledger).await;
}

#[tokio::test]
async fn a_store_that_is_a_black_hole_costs_cached_reads_nothing_and_the_others_little_once_the_breaker_is_open() {
    /// Five calls in a row without an answer, of the two that go on all the time: each takes two seconds.
    const OPEN: Duration = Duration::from_secs(9);
    /// A refusal that waits for nothing, and then some for the machine.
    const AT_ONCE: Duration = Duration::from_millis(100);
    let (_world, replicas) = World::pair("").await;
    let replica = &replicas[0];
    let ledger = Ledger::default();
    ledger.write_each(replica.client(), Mode::Through).await;
    let cached = replica.read(ReadConsistency::Cached);
    cached.until("L1 answers", |read| read.source == Source::L1).await;
    let is_open = async || replica.gateway.metric("tidegate_store_breaker_open", &[]).await == 1.0;
    assert!(!is_open().await);
    let holed = Instant::now();
    replica.store.set(Passage::Hole);
    let opened = until("the breaker opens", is_open);
    // Of one that waits for the store meanwhile, it is the end.
    let waiting = replica.client().get("missing", ReadConsistency::Store);
    let ((), waited) = tokio::join!(opened, waiting);
    let (opened, refused) = (holed.elapsed(), waited.expect_err("the store cannot be asked"));
    eprintln!("the breaker opened after {opened:.1?}");
    assert!(opened <= OPEN, "{opened:?}");
    assert!(
        matches!(refused.code(), Code::Unavailable | Code::DeadlineExceeded),
        "{refused:?}"
    );
    let mut refusals = Vec::new();
    for number in 0..200 {
        let (sent, missing) = (Instant::now(), format!("missing{number}"));
        let refused = replica.client().get(&missing, ReadConsistency::Cached).await;
        assert_eq!(
            refused.expect_err("the store cannot be asked").code(),
            Code::Unavailable
        );
        refusals.push(sent.elapsed());
    }
    let refusals = Figures::of(refusals.into_iter());
    eprintln!("refusals with the breaker open: {refusals}");
    assert!(refusals.permille(900) <= AT_ONCE, "{refusals}");
    assert!(is_open().await);
    let reads = cached.finish().await.since(holed);
    eprintln!("cached reads beside a black hole: {}", reads.latencies());
    assert!(reads.share(Source::L1) > 0.99, "{}", reads.share(Source::L1));
    assert!(reads.latencies().permille(900) <= AT_ONCE);
    replica.store.restore();
    eventually("the store is asked again", SOON, async || {
        let read = replica.client().get("missing", ReadConsistency::Cached).await;
        expect(read.is_ok(), read)
    })
    .await;
    assert!(!is_open().await);
    await_agreement(&replicas, &ledger).await;
}
