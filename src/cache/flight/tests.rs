//! One load per key, shared by all who miss, and by nobody who comes after a write.

use std::time::Duration;

use tokio::task;

use super::*;
use crate::{
    cache::Copy,
    error::ErrorKind,
    model::{Entry, Source, Timestamp, Version},
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

struct World {
    flights: Arc<Flights>,
    metrics: CacheMetrics,
}

fn world(flights_max: usize) -> World {
    let metrics = CacheMetrics::default();
    World {
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
    lead.end(found(5));
    for join in before {
        assert_eq!(version_of(join.await.unwrap().expect("an answer")), 5);
    }
    assert_eq!(version_of(unpolled.outcome().await.expect("an answer")), 5);
    assert_eq!(world.flights.running(), 0);
    assert!(world.flights.try_lead(&key).is_some());
}

#[tokio::test]
async fn a_failed_load_fails_all_who_joined() {
    let world = world(8);
    let key = key("k");
    let lead = world.lead(&key);
    let join = world.join(&key);
    let failed = Err(Error::new(ErrorKind::Unavailable, "the store is down"));
    lead.end(failed);
    let error = join.outcome().await.expect("an answer").expect_err("a failure");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_write_detaches_the_load_which_answers_only_those_who_had_joined() {
    let world = world(8);
    let key = key("k");
    let old = world.lead(&key);
    let joined_before = world.join(&key);
    world.flights.detach(&key);
    let new = world.lead(&key);
    let joined_after = world.join(&key);
    assert_eq!(world.flights.running(), 2);
    // The detached one must not take the registration of the one that runs now.
    old.end(found(1));
    assert!(world.flights.try_lead(&key).is_none());
    assert_eq!(version_of(joined_before.outcome().await.expect("an answer")), 1);
    new.end(found(2));
    assert_eq!(version_of(joined_after.outcome().await.expect("an answer")), 2);
    assert!(world.flights.try_lead(&key).is_some());
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
    assert!(world.flights.try_lead(&key).is_none());
    let join = world.join(&key);
    new.end(found(2));
    assert_eq!(version_of(join.outcome().await.expect("an answer")), 2);
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

#[tokio::test]
async fn what_is_detached_together_is_joined_no_more() {
    let world = world(8);
    let (kept, gone) = (key("kept"), key("gone"));
    let leads = [world.lead(&kept), world.lead(&gone)];
    let before = world.join(&gone);
    world.flights.detach_where(|key| key.key() == "gone");
    let _joined = world.join(&kept);
    let later = world.lead(&gone);
    world.flights.detach_all();
    let newer = [world.lead(&kept), world.lead(&gone)];
    let [_kept, first] = leads;
    first.end(found(1));
    assert_eq!(
        before.outcome().await.map(version_of),
        Some(1),
        "who joined still gets its answer"
    );
    later.end(found(2));
    let joined = world.join(&gone);
    let [_, newest] = newer;
    newest.end(found(3));
    assert_eq!(
        joined.outcome().await.map(version_of),
        Some(3),
        "an older one's end ends no newer one"
    );
}

#[tokio::test]
async fn nobody_joins_who_leads_alone_and_it_counts() {
    let world = world(2);
    let key = key("k");
    let Ticket::Lead(alone) = world.flights.lead_alone(&key) else {
        panic!("there is room");
    };
    let lead = world.lead(&key);
    assert!(matches!(world.flights.lead_alone(&key), Ticket::Full));
    alone.end(found(1));
    let joined = world.join(&key);
    lead.end(found(2));
    assert_eq!(joined.outcome().await.map(version_of), Some(2));
    assert_eq!(world.flights.running(), 0);
}
