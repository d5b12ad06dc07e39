//! Gateways that are cut off from Redis, all of them or some, while all of them reach the store.
//!
//! The bounds: a reader that is cut off answers from L1 for a second at most. What a writer that is cut off cannot tell is older than that
//! where others read it, until the epoch moves: six seconds. A writer that comes back sooner tells it then.

use std::time::Duration;

use redis::cmd;
use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::time::Instant;

use super::{
    READER_CUT_OFF, Replica, WRITER_CUT_OFF, World, await_agreement,
    ledger::{Ledger, Writing, read},
    pass,
};
use crate::harness::{Mode, SOON, eventually, expect, proxy::Passage};

/// How old an answer may be while nothing is broken.
const WHOLE: Duration = Duration::from_secs(1);

/// Cuts a reader off for a while, in the way of `part`, and undoes it with `mend`, while another gateway writes.
async fn a_reader_is_cut_off(
    world: World,
    replicas: [Replica; 2],
    how: &str,
    part: impl AsyncFn(&World, &Replica),
    mend: impl AsyncFn(&World, &Replica),
) {
    let [a, b] = &replicas;
    let ledger = Ledger::default();
    let writing = Writing::start(a.client(), Mode::Through, &ledger);
    let reading = b.read(ReadConsistency::Cached);
    reading.until("L1 answers", |read| read.source == Source::L1).await;
    let parted = Instant::now();
    part(&world, b).await;
    pass(parted, Duration::from_secs(4)).await;
    let mended = Instant::now();
    mend(&world, b).await;
    reading
        .until("L1 answers again", |read| read.source == Source::L1)
        .await;
    pass(Instant::now(), Duration::from_secs(1)).await;
    writing.finish().await;
    let reads = reading.finish().await;
    reads.assert_ages(&format!("a reader, {how}"), &ledger, READER_CUT_OFF);
    let from_l1 = reads.between(parted + READER_CUT_OFF, mended).share(Source::L1);
    assert!(
        from_l1 == 0.0,
        "{from_l1} of the answers were from L1 while it missed what others wrote"
    );
    await_agreement(&replicas, &ledger).await;
}

async fn a_reader_whose_network_is(passage: Passage) {
    let (world, replicas) = World::pair("").await;
    let part = async |_: &World, b: &Replica| b.redis.set(passage);
    let mend = async |_: &World, b: &Replica| b.redis.restore();
    a_reader_is_cut_off(world, replicas, &format!("{passage:?}"), part, mend).await;
}

/// Sets what a user of Redis may do.
async fn allow_reader(world: &World, rules: &[&str]) {
    let mut rule = cmd("ACL");
    rule.arg("SETUSER").arg("reader").arg(rules);
    let set = rule.exec_async(&mut world.redis.connect().await).await;
    set.expect("the rules are right");
}

/// Two gateways, of which the second is that user.
async fn pair_with_reader(config: &str) -> (World, [Replica; 2]) {
    let world = World::new(config).await;
    allow_reader(&world, &["on", ">secret", "~*", "+@all", "&*"]).await;
    let url = world.redis.url().replace("redis://", "redis://reader:secret@");
    let replicas = tokio::join!(world.replica(), world.replica_as(&url, Passage::Open));
    (world, replicas.into())
}

async fn a_reader_without_its_subscription() {
    let (world, replicas) = pair_with_reader("").await;
    // It ends the subscriptions that it forbids.
    let part = async |world: &World, _: &Replica| allow_reader(world, &["resetchannels", "&tidegate:beat:*"]).await;
    let mend = async |world: &World, _: &Replica| allow_reader(world, &["allchannels"]).await;
    a_reader_is_cut_off(world, replicas, "no subscription", part, mend).await;
}

/// Of all of Redis in two ways, and of the subscription alone.
#[tokio::test]
async fn a_reader_that_is_cut_off_is_a_second_and_a_half_behind_at_most() {
    tokio::join!(
        a_reader_whose_network_is(Passage::Cut),
        a_reader_whose_network_is(Passage::Hole),
        a_reader_without_its_subscription(),
    );
}

#[tokio::test]
async fn what_is_loaded_past_redis_hides_pending_writes_for_a_second_and_a_half_at_most() {
    let (world, replicas) = pair_with_reader("[namespace_defaults]\nwrite_delay = \"1h\"").await;
    let [a, b] = &replicas;
    let ledger = Ledger::default();
    // A gateway that has just adopted an epoch tells of its pending writes again, which would hide what this is about.
    pass(Instant::now(), Duration::from_secs(3)).await;
    ledger.write_each(a.client(), Mode::Through).await;
    // The store has the older ones.
    ledger.write_each(a.client(), Mode::Behind).await;
    // It is refused what reads need, and hears all the same.
    allow_reader(&world, &["-get", "-mget", "-eval", "-evalsha"]).await;
    let reading = b.read(ReadConsistency::Cached);
    reading
        .until("the older ones are in L1", |read| {
            read.source == Source::L1 && read.number == 1
        })
        .await;
    allow_reader(&world, &["+@all"]).await;
    let allowed = Instant::now();
    pass(allowed, Duration::from_secs(4)).await;
    let reads = reading.finish().await;
    let reads = reads.since(allowed + READER_CUT_OFF);
    reads.assert_ages("once Redis can be asked again", &ledger, Duration::ZERO);
    await_agreement(&replicas, &ledger).await;
}

async fn a_writer_is_cut_off_for_long(passage: Passage) {
    let (_world, replicas) = World::pair("").await;
    let [a, b] = &replicas;
    let ledger = Ledger::default();
    let writing = Writing::start(a.client(), Mode::Through, &ledger);
    let reading = b.read(ReadConsistency::Cached);
    reading.until("L1 answers", |read| read.source == Source::L1).await;
    let parted = Instant::now();
    a.redis.set(passage);
    // Time for the epoch to move, for copies to be made under the new one, and for that one to move.
    pass(parted, Duration::from_secs(11)).await;
    assert!(a.epochs_moved().await > 0.0, "it was not cut off, or nobody noticed");
    a.redis.restore();
    let mended = Instant::now();
    pass(mended, Duration::from_secs(2)).await;
    writing.finish().await;
    let reads = reading.finish().await;
    reads.assert_ages(&format!("beside a writer, {passage:?}"), &ledger, WRITER_CUT_OFF);
    await_agreement(&replicas, &ledger).await;
}

/// Both serve all the same.
async fn a_writer_never_reached_redis() {
    let world = World::new("").await;
    let url = world.redis.url();
    let replicas: [Replica; 2] = tokio::join!(world.replica_as(&url, Passage::Cut), world.replica()).into();
    let [a, b] = &replicas;
    let ledger = Ledger::default();
    let writing = Writing::start(a.client(), Mode::Through, &ledger);
    let reading = b.read(ReadConsistency::Cached);
    pass(Instant::now(), Duration::from_secs(11)).await;
    writing.finish().await;
    reading
        .finish()
        .await
        .assert_ages("beside one that never reached Redis", &ledger, WRITER_CUT_OFF);

    // Without Redis nobody tells it anything, so it asks the store.
    let writing = Writing::start(b.client(), Mode::Through, &ledger);
    let reading = a.read(ReadConsistency::Cached);
    pass(Instant::now(), Duration::from_secs(2)).await;
    writing.finish().await;
    let reads = reading.finish().await;
    reads.assert_ages("one that never reached Redis", &ledger, READER_CUT_OFF);
    assert_eq!(reads.share(Source::Store), 1.0);
    a.redis.restore();
    await_agreement(&replicas, &ledger).await;
}

/// It writes when an epoch has begun of which it does not know yet, and under which the reader has copies that will live for minutes: what
/// it could not tell is not forgotten when it adopts that epoch.
async fn a_writer_is_late_to_know_of_an_epoch() {
    let (world, replicas) = World::pair("").await;
    let [a, b] = &replicas;
    let ledger = Ledger::default();
    ledger.write_each(b.client(), Mode::Through).await;
    let reading = b.read(ReadConsistency::Cached);
    a.redis.cut();
    world.remove_sentinel().await;
    let moved = Instant::now();
    let hold = world.database.hold_epochs().await;
    // Copies are not shared before.
    pass(moved, Duration::from_secs(3)).await;
    eventually("they are shared again", SOON, async || {
        let read = read(b.client(), 0, ReadConsistency::Shared).await;
        expect(read.source == Source::L2, read)
    })
    .await;
    reading.until("L1 answers", |read| read.source == Source::L1).await;
    ledger.write_each(a.client(), Mode::Through).await;
    hold.release().await;
    pass(Instant::now(), WRITER_CUT_OFF + Duration::from_secs(1)).await;
    let reads = reading.finish().await;
    reads.assert_ages("beside a writer that is late to know", &ledger, WRITER_CUT_OFF);
    a.redis.restore();
    await_agreement(&replicas, &ledger).await;
}

#[tokio::test]
async fn what_a_writer_that_is_cut_off_from_redis_wrote_is_seen_within_seven_seconds() {
    tokio::join!(
        a_writer_is_late_to_know_of_an_epoch(),
        a_writer_is_cut_off_for_long(Passage::Cut),
        a_writer_is_cut_off_for_long(Passage::Hole),
        a_writer_never_reached_redis(),
    );
}

#[tokio::test]
async fn a_writer_that_is_cut_off_for_a_second_repairs_what_it_could_not_tell() {
    /// The longest pause between two dials, and then some.
    const REPAIRED: Duration = Duration::from_millis(2_500);
    let (_world, replicas) = World::pair("").await;
    let [a, b] = &replicas;
    let ledger = Ledger::default();
    let writing = Writing::start(a.client(), Mode::Through, &ledger);
    let readings = [ReadConsistency::Cached, ReadConsistency::Shared].map(|consistency| b.read(consistency));
    readings[0].until("L1 answers", |read| read.source == Source::L1).await;
    a.redis.cut();
    pass(Instant::now(), Duration::from_secs(1)).await;
    // What is missed is not written again.
    writing.finish().await;
    a.redis.restore();
    let mended = Instant::now();
    pass(mended, REPAIRED + Duration::from_secs(1)).await;
    for (reading, what) in readings.into_iter().zip(["CACHED", "SHARED"]) {
        let reads = reading.finish().await.since(mended + REPAIRED);
        reads.assert_ages(&format!("{what} after a repair"), &ledger, Duration::ZERO);
    }
    let unpublished = a.gateway.metric("tidegate_redis_unpublished_total", &[]).await;
    assert!(unpublished > 0.0, "it was not cut off");
    assert_eq!((a.epochs_moved().await, b.epochs_moved().await), (0.0, 0.0));
    let writing = Writing::start(a.client(), Mode::Through, &ledger);
    let reading = b.read(ReadConsistency::Cached);
    pass(Instant::now(), Duration::from_secs(1)).await;
    writing.finish().await;
    reading.finish().await.assert_ages("after that", &ledger, WHOLE);
    await_agreement(&replicas, &ledger).await;
}

#[tokio::test]
async fn old_values_that_come_back_with_redis_after_eight_seconds_are_not_read_for_longer_than_the_bound() {
    let (_world, replicas) = World::pair("").await;
    let [a, b] = &replicas;
    let ledger = Ledger::default();
    let writing = Writing::start(a.client(), Mode::Through, &ledger);
    let readings = [a, b].map(|replica| replica.read(ReadConsistency::Cached));
    for reading in &readings {
        reading.until("L1 answers", |read| read.source == Source::L1).await;
    }
    let parted = Instant::now();
    for replica in &replicas {
        replica.redis.cut();
    }
    pass(parted, Duration::from_secs(8)).await;
    for replica in &replicas {
        replica.redis.restore();
    }
    let mended = Instant::now();
    pass(mended, Duration::from_secs(4)).await;
    writing.finish().await;
    for (reading, who) in readings.into_iter().zip(["the writer", "the other"]) {
        let reads = reading.finish().await;
        reads.assert_ages(
            &format!("{who} before and after all were cut off"),
            &ledger,
            WRITER_CUT_OFF,
        );
        let cut_off = reads.between(parted + READER_CUT_OFF, mended);
        cut_off.assert_ages(&format!("{who} while all are cut off"), &ledger, READER_CUT_OFF);
    }
    await_agreement(&replicas, &ledger).await;
}
