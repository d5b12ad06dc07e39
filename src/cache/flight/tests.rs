//! One load per key, shared by all who miss; and nothing that a load found lands over, or after, a newer write.

use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicI64},
    },
    thread,
    time::Duration,
};

use tokio::task;

use super::*;
use crate::{
    cache::{Copy, memory},
    error::ErrorKind,
    model::{Entry, Timestamp, Version},
};

const NOW: Timestamp = Timestamp(1_000_000);
const MINUTE: Duration = Duration::from_secs(60);

fn key(name: impl ToString) -> Key {
    Key::new("test", &name.to_string()).unwrap()
}

/// A tombstone of a version: what the value is does not matter here.
fn copy(number: i64) -> Copy {
    let entry = Version::new(number).map(|version| Entry {
        version,
        value: None,
        expires_at: None,
    });
    Copy::new(entry, NOW, MINUTE)
}

fn found(number: i64) -> LoadResult {
    Ok(Loaded {
        copy: copy(number),
        source: Source::Store,
        stale: false,
    })
}

fn version_of(outcome: LoadResult) -> i64 {
    outcome.expect("found").copy.version().map_or(0, Version::get)
}

fn standing(memory: &Memory, key: &Key) -> Option<i64> {
    memory.get(key, NOW).map(|copy| copy.version().map_or(0, Version::get))
}

struct World {
    memory: Memory,
    flights: Arc<Flights>,
    metrics: CacheMetrics,
}

fn world(flights_max: usize) -> World {
    let metrics = CacheMetrics::default();
    World {
        memory: Memory::new(&memory::Config::default()),
        flights: Flights::new(flights_max, metrics.clone()),
        metrics,
    }
}

impl World {
    fn lead(&self, key: &Key) -> Lead {
        match self.flights.join_or_lead(key) {
            Ticket::Lead(lead) => lead,
            other => panic!("expected to lead: {other:?}"),
        }
    }

    fn join(&self, key: &Key) -> Join {
        match self.flights.join_or_lead(key) {
            Ticket::Join(join) => join,
            other => panic!("expected to join: {other:?}"),
        }
    }
}

#[tokio::test]
async fn all_who_miss_share_one_load() {
    let world = world(8);
    let key = key("k");
    let lead = world.lead(&key);
    let before: Vec<_> = (0..10).map(|_| task::spawn(world.join(&key).outcome())).collect();
    task::yield_now().await;
    let unpolled = world.join(&key);
    assert_eq!(world.metrics.loads_joined.get(), 11);
    assert!(world.flights.try_lead(&key).is_none());
    assert_eq!(version_of(lead.land(&world.memory, found(5), Timestamp(0))), 5);
    for join in before {
        assert_eq!(version_of(join.await.unwrap().expect("an answer")), 5);
    }
    assert_eq!(version_of(unpolled.outcome().await.expect("an answer")), 5);
    assert_eq!(standing(&world.memory, &key), Some(5));
    assert_eq!(world.flights.running(), 0);
    assert!(world.flights.try_lead(&key).is_some());
}

#[tokio::test]
async fn a_failed_load_fails_all_who_joined_and_lands_nothing() {
    let world = world(8);
    let key = key("k");
    let lead = world.lead(&key);
    let join = world.join(&key);
    let failed = Err(Error::new(ErrorKind::Unavailable, "the store is down"));
    assert!(lead.land(&world.memory, failed, Timestamp(0)).is_err());
    let error = join.outcome().await.expect("an answer").expect_err("a failure");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(standing(&world.memory, &key), None);
}

#[tokio::test]
async fn a_write_detaches_the_load_which_answers_those_who_joined_but_does_not_land() {
    let world = world(8);
    let key = key("k");
    let old = world.lead(&key);
    let joined_before = world.join(&key);
    world.flights.detach(&key);
    let new = world.lead(&key);
    let joined_after = world.join(&key);
    assert_eq!(world.flights.running(), 2);
    // The detached one must not land, nor take the registration of the one that runs now.
    assert_eq!(version_of(old.land(&world.memory, found(1), Timestamp(0))), 1);
    assert_eq!(standing(&world.memory, &key), None);
    assert!(world.flights.try_lead(&key).is_none());
    assert_eq!(version_of(joined_before.outcome().await.expect("an answer")), 1);
    assert_eq!(version_of(new.land(&world.memory, found(2), Timestamp(0))), 2);
    assert_eq!(version_of(joined_after.outcome().await.expect("an answer")), 2);
    assert_eq!(standing(&world.memory, &key), Some(2));
}

#[tokio::test]
async fn a_leader_that_is_gone_wakes_those_who_joined_to_board_again() {
    let world = world(8);
    let key = key("k");
    let lead = world.lead(&key);
    let load = task::spawn(async move {
        std::future::pending::<()>().await;
        drop(lead);
    });
    let joins: Vec<_> = (0..3).map(|_| task::spawn(world.join(&key).outcome())).collect();
    task::yield_now().await;
    load.abort();
    for join in joins {
        assert!(join.await.unwrap().is_none());
    }
    assert_eq!(world.flights.running(), 0);
    drop(world.lead(&key));
}

#[tokio::test]
async fn a_gone_leader_that_was_detached_leaves_the_next_flight_alone() {
    let world = world(8);
    let key = key("k");
    let old = world.lead(&key);
    world.flights.detach(&key);
    let new = world.lead(&key);
    drop(old);
    assert_eq!(version_of(new.land(&world.memory, found(2), Timestamp(0))), 2);
    assert_eq!(standing(&world.memory, &key), Some(2));
}

#[test]
fn a_standing_load_lands_an_absence_over_an_entry_but_no_lower_version() {
    let world = world(8);
    let key = key("k");
    world.memory.land(&key, copy(5));
    let newer_known = world
        .lead(&key)
        .land(&world.memory, found(3), Timestamp(0))
        .expect("found");
    assert_eq!(newer_known.copy, copy(5), "the answer is the newer of the two");
    assert_eq!(newer_known.source, Source::L1);
    assert_eq!(standing(&world.memory, &key), Some(5));
    assert_eq!(
        version_of(world.lead(&key).land(&world.memory, found(0), Timestamp(0))),
        0
    );
    assert_eq!(standing(&world.memory, &key), Some(0), "a known absence");
}

#[test]
fn a_copy_past_its_lifetime_is_not_answered_for_the_load() {
    let world = world(8);
    let key = key("k");
    world
        .memory
        .land(&key, Copy::new(copy(5).entry, Timestamp(0), Duration::ZERO));
    let loaded = world
        .lead(&key)
        .land(&world.memory, found(3), Timestamp(0))
        .expect("found");
    assert_eq!((loaded.copy, loaded.source), (copy(3), Source::Store));
}

#[test]
fn flights_are_bounded_and_the_detached_count() {
    let world = world(2);
    let first = world.lead(&key(1));
    let second = world.lead(&key(2));
    assert!(matches!(world.flights.join_or_lead(&key(3)), Ticket::Full));
    assert!(matches!(world.flights.join_or_lead(&key(1)), Ticket::Join(_)));
    world.flights.detach(&key(1));
    assert!(matches!(world.flights.join_or_lead(&key(1)), Ticket::Full));
    assert!(world.flights.try_lead(&key(3)).is_none());
    drop(first);
    assert!(world.flights.try_lead(&key(3)).is_some());
    drop(second);
    assert_eq!(world.flights.running(), 0);
}

/// One writer, readers that load, and an evictor that empties the slot whenever it can. Once a write is answered, no copy that is
/// older may be seen: comparing versions alone would not do, for the evictor makes L1 forget what a late load is to lose to.
#[test]
fn after_a_write_is_answered_no_load_brings_back_what_was_before() {
    const WRITES: i64 = 200_000;
    let world = world(64);
    let key = key("k");
    let (store, answered, done) = (AtomicI64::new(0), AtomicI64::new(0), AtomicBool::new(false));
    let reader = || {
        while !done.load(Ordering::Relaxed) {
            let at_least = answered.load(Ordering::SeqCst);
            if let Some(seen) = standing(&world.memory, &key) {
                assert!(seen >= at_least, "saw {seen} after {at_least} was answered");
            }
            if let Ticket::Lead(lead) = world.flights.join_or_lead(&key) {
                let loaded = found(store.load(Ordering::SeqCst));
                thread::yield_now();
                let _ = lead.land(&world.memory, loaded, Timestamp(0));
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(reader);
        scope.spawn(reader);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if let Some(version) = world.memory.get(&key, NOW).and_then(|copy| copy.version()) {
                    world.memory.drop_version(&key, version);
                }
            }
        });
        for number in 1..=WRITES {
            store.store(number, Ordering::SeqCst);
            world.flights.detach(&key);
            world.memory.land(&key, copy(number));
            answered.store(number, Ordering::SeqCst);
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// The first write of a key against the load that finds the key absent: the absence must not end up over the write.
#[test]
fn an_absence_that_was_loaded_before_a_write_does_not_land_after_it() {
    const ROUNDS: usize = 20_000;
    let world = world(64);
    let stores: Vec<AtomicI64> = (0..ROUNDS).map(|_| AtomicI64::new(0)).collect();
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            for (round, store) in stores.iter().enumerate() {
                barrier.wait();
                let lead = world.lead(&key(round));
                let loaded = found(store.load(Ordering::SeqCst));
                let _ = lead.land(&world.memory, loaded, Timestamp(0));
            }
        });
        for (round, store) in stores.iter().enumerate() {
            barrier.wait();
            store.store(1, Ordering::SeqCst);
            world.flights.detach(&key(round));
            world.memory.land(&key(round), copy(1));
        }
    });
    for round in 0..ROUNDS {
        assert_eq!(standing(&world.memory, &key(round)), Some(1), "round {round}");
    }
}
