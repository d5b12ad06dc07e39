//! Refresh-ahead with two gateways: who reads steadily never waits for the store, the store is asked by one of them, and what is renewed
//! never covers what was written meanwhile.

use std::time::Duration;

use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::time::{Instant, sleep};

use super::{
    World,
    ledger::{KEYS, Ledger, read},
    pass,
};
use crate::harness::{Mode, SOON, eventually, expect};

#[tokio::test]
async fn what_is_read_steadily_on_both_is_loaded_by_one_of_them_and_waited_for_by_nobody() {
    const LIFETIME: Duration = Duration::from_secs(3);
    let config = "[namespace_defaults]\ncache_lifetime = \"3s\"\nrefresh_threshold = 0.5";
    let (_world, replicas) = World::pair(config).await;
    let ledger = Ledger::default();
    ledger.write_each(replicas[0].client(), Mode::Through).await;
    let loads =
        async || replicas[0].gateway.stats("orders").await.loads + replicas[1].gateway.stats("orders").await.loads;
    let readings = [&replicas[0], &replicas[1]].map(|replica| replica.read(ReadConsistency::Cached));
    for reading in &readings {
        reading.until("it is in L1", |read| read.source == Source::L1).await;
    }
    let (loaded_before, begun) = (loads().await, Instant::now());
    pass(begun, 3 * LIFETIME).await;
    let (loaded, elapsed) = (loads().await - loaded_before, begun.elapsed());
    for (reading, name) in readings.into_iter().zip(["first", "second"]) {
        let reads = reading.finish().await.since(begun);
        let near = reads.around_renewals(Duration::from_millis(100));
        let (all, near) = (reads.latencies(), near.latencies());
        eprintln!("reads on the {name} gateway: {all}; within 100 ms of a renewal: {near}");
        let waited = reads.share(Source::Store);
        assert!(waited == 0.0, "{waited} of the reads waited for the store");
    }
    // A copy is renewed with half of its lifetime left, which is up to a tenth shorter or longer.
    let share = elapsed.as_secs_f64() / LIFETIME.as_secs_f64();
    let (least, most) = (KEYS as f64 * (share / 0.6 - 1.0), KEYS as f64 * (share / 0.4 + 1.0));
    eprintln!(
        "{loaded} loads of {KEYS} keys in {share:.1} lifetimes, between {least:.0} and {most:.0} if one gateway asks for both"
    );
    assert!(
        (least..=most).contains(&(loaded as f64)),
        "{loaded} loads, not {least} to {most}"
    );
}

/// A renewal on one gateway has its answer, and gets it only after a write on the other.
async fn a_late_renewal_does_not_cover_a_write(mode: Mode) {
    const LATE: Duration = Duration::from_millis(1_500);
    // Due for renewal within two seconds, and answering for eight more.
    let config = "[namespace_defaults]\ncache_lifetime = \"10s\"\nrefresh_threshold = 0.9\nwrite_delay = \"1h\"";
    let (_world, [a, b]) = World::pair(config).await;
    let ledger = Ledger::default();
    ledger.write_each(a.client(), Mode::Through).await;
    // A gateway that has just adopted an epoch tells of its pending writes again, which would hide what this is about.
    pass(Instant::now(), Duration::from_secs(3)).await;
    // Each connection that loads has done so, and asks in one message.
    for _ in 0..20 {
        let load = async |number| read(b.client(), number, ReadConsistency::Store).await;
        tokio::join!(load(0), load(1), load(2));
    }
    b.store.delay(Duration::ZERO, LATE);
    let reading = b.read(ReadConsistency::Cached);
    eventually("renewals begin", SOON, async || {
        let begun = b.gateway.metric("tidegate_cache_refreshes_total", &[]).await;
        expect(begun > 0.0, begun)
    })
    .await;
    // Nobody reads from now on: what is late finds L1 empty.
    reading.finish().await;
    // For the query to reach the store before the write does; otherwise this proves less.
    sleep(LATE / 10).await;
    ledger.write_each(a.client(), mode).await;
    pass(Instant::now(), LATE).await;
    let readings = [ReadConsistency::Cached, ReadConsistency::Shared].map(|consistency| b.read(consistency));
    pass(Instant::now(), LATE).await;
    for (reading, what) in readings.into_iter().zip(["CACHED", "SHARED"]) {
        let what = format!("{what} after a late renewal, {mode:?}");
        reading.finish().await.assert_ages(&what, &ledger, Duration::ZERO);
    }
}

#[tokio::test]
async fn a_late_renewal_does_not_cover_a_write_through_or_behind() {
    tokio::join!(
        a_late_renewal_does_not_cover_a_write(Mode::Through),
        a_late_renewal_does_not_cover_a_write(Mode::Behind),
    );
}
