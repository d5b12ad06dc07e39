//! The lease against the store in memory, and the file in a temporary directory.

use std::{fs, path::Path};

use tokio::time::advance;

use super::*;
use crate::{
    model::{COUNTER_BITS, NODE_BITS, VERSION_EPOCH_MILLIS},
    store::fake::{Call, FakeBackend, Fault, eventually},
};

fn claimant(directory: &str, start: &str) -> Claimant {
    Claimant {
        directory: directory.to_owned(),
        start: start.to_owned(),
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

async fn taken(fake: &FakeBackend, who: Claimant) -> (Arc<Clock>, CancellationToken, JoinHandle<()>) {
    let taken = NodeLease::take(&fake.store(), who, None, soon()).await;
    started(taken.expect("a free id")).await
}

async fn started(mut lease: NodeLease) -> (Arc<Clock>, CancellationToken, JoinHandle<()>) {
    let clock = Arc::new(lease.clock(None));
    lease.reserve(&clock, soon()).await.expect("reserved");
    let stop = CancellationToken::new();
    let task = lease.start(Arc::clone(&clock), &stop);
    (clock, stop, task)
}

#[tokio::test(start_paused = true)]
async fn the_start_waits_for_the_store_and_a_restart_gets_its_node_and_mark_back() {
    let fake = FakeBackend::new();
    fake.inject(Call::LeaseNode, Fault::fail(StoreErrorKind::Unreachable));
    fake.inject(Call::LeaseNode, Fault::lose_reply());
    let (clock, stop, task) = taken(&fake, claimant("a", "1")).await;
    let (other, ..) = taken(&fake, claimant("b", "1")).await;
    assert_ne!(clock.node(), other.node());

    let last = clock.stamp(None).expect("leased");
    stop.cancel();
    task.await.expect("no panic");
    assert!(clock.stamp(None).is_err(), "nothing is stamped after the final mark");
    let reserved = fake.node_high_water(clock.node());
    assert!(reserved > Some(last));
    assert!(!fake.node_is_leased(clock.node()));

    let (again, ..) = taken(&fake, claimant("a", "2")).await;
    assert_eq!(again.node(), clock.node());
    assert!(again.stamp(None).ok() > reserved);
}

#[tokio::test(start_paused = true)]
async fn the_start_fails_when_no_id_is_free_and_when_the_store_stays_away() {
    let fake = FakeBackend::new();
    fake.set_nodes_max(1);
    let begun = Instant::now();
    let (_clock, ..) = taken(&fake, claimant("a", "1")).await;
    let refused = NodeLease::take(&fake.store(), claimant("b", "1"), None, soon()).await;
    assert!(refused.is_err_and(|error| error.message().contains("no node id is free")));
    assert_eq!(begun.elapsed(), Duration::ZERO, "waiting would not help");

    fake.down(true);
    let refused = NodeLease::take(&fake.store(), claimant("b", "1"), None, soon()).await;
    assert!(refused.is_err_and(|error| error.kind() == ErrorKind::Unavailable));
    assert!(begun.elapsed() > Duration::from_secs(25) && begun.elapsed() <= Duration::from_secs(30));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_another_start_took_ends_stamping() {
    let fake = FakeBackend::new();
    let (clock, _stop, task) = taken(&fake, claimant("a", "1")).await;
    let (copy, ..) = taken(&fake, claimant("a", "2")).await;
    assert_eq!(copy.node(), clock.node());
    task.await.expect("no panic");
    assert!(clock.stamp(None).is_err());
    assert!(copy.stamp(None).is_ok(), "the later start keeps it");
    assert!(fake.node_is_leased(copy.node()));
}

#[tokio::test(start_paused = true)]
async fn without_renewal_stamping_ends_after_twelve_hours_and_resumes_with_it() {
    let fake = FakeBackend::new();
    let (clock, ..) = taken(&fake, claimant("a", "1")).await;
    eventually(|| fake.calls(Call::RenewNode) > 0).await;
    fake.down(true);
    advance(STAMP_LEASE - Duration::from_secs(60)).await;
    assert!(clock.stamp(None).is_ok());
    advance(Duration::from_secs(70)).await;
    assert!(clock.stamp(None).is_err());

    fake.down(false);
    eventually(|| clock.stamp(None).is_ok()).await;
    let reported = fake.node_high_water(clock.node());
    assert!(
        reported > clock.high_water(),
        "what it may stamp until the next renewal"
    );
}

/// A directory of a gateway, in which each start opens the file anew.
fn file(directory: &Path) -> LeaseFile {
    LeaseFile::open(directory.join("lease"), "here", "store")
}

/// A start that reached the store, on a directory; it dies when the test drops its task.
async fn taken_on(
    fake: &FakeBackend,
    directory: &Path,
    start: &str,
) -> (Arc<Clock>, CancellationToken, JoinHandle<()>) {
    let taken = NodeLease::take(&fake.store(), claimant("a", start), Some(file(directory)), soon()).await;
    started(taken.expect("a free id")).await
}

/// A start without the store, on a directory.
async fn resumed_on(
    fake: &FakeBackend,
    directory: &Path,
    start: &str,
) -> (Arc<Clock>, CancellationToken, JoinHandle<()>) {
    let resumed = NodeLease::resume(&fake.store(), claimant("a", start), Some(file(directory)));
    started(resumed.expect("a lease is saved")).await
}

/// A version so far ahead of the wall clock as an observation may move a clock.
fn ahead(clock: &Clock) -> Version {
    let millis = clock.now().after(Duration::from_secs(15)).0 - VERSION_EPOCH_MILLIS;
    Version::new(millis << (COUNTER_BITS + NODE_BITS)).expect("positive")
}

#[tokio::test(start_paused = true)]
async fn starts_without_the_store_go_on_with_the_node_and_stamp_no_version_again() {
    let fake = FakeBackend::new();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (clock, _, task) = taken_on(&fake, directory.path(), "1").await;
    let node = clock.node();
    let seen = ahead(&clock);
    clock.observe(seen);
    let mut last = clock.stamp(None).expect("leased");
    assert!(last > seen, "the clock was moved");
    task.abort();

    fake.down(true);
    for start in ["2", "3", "4"] {
        let (clock, _, task) = resumed_on(&fake, directory.path(), start).await;
        assert_eq!(clock.node(), node);
        let next = clock.stamp(None).expect("leased");
        assert!(next > last);
        // Further ahead each time, which only the directory knows of.
        last = next;
        task.abort();
    }
    assert!(Some(last) > fake.node_high_water(node), "the store knows of less");
    fake.down(false);
    let (clock, ..) = taken_on(&fake, directory.path(), "5").await;
    assert_eq!(clock.node(), node);
    assert!(clock.stamp(None).expect("leased") > last);
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_the_store_moves_the_reservation_of_the_directory() {
    let fake = FakeBackend::new();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (clock, _stop, _task) = taken_on(&fake, directory.path(), "1").await;
    let before = file(directory.path()).found().expect("saved");
    assert_eq!(fake.node_high_water(clock.node()), Some(before.reserved));
    fake.down(true);
    advance(Duration::from_secs(60)).await;
    eventually(|| file(directory.path()).found().expect("saved").reserved > before.reserved).await;
    let after = file(directory.path()).found().expect("saved");
    assert_eq!(after.confirmed_at, before.confirmed_at, "the store confirmed nothing");
    let seen = ahead(&clock);
    clock.observe(seen);
    assert!(clock.stamp(None).expect("leased") > seen);
}

#[tokio::test(start_paused = true)]
async fn a_start_without_the_store_takes_the_lease_when_it_answers() {
    let fake = FakeBackend::new();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (clock, _, task) = taken_on(&fake, directory.path(), "1").await;
    task.abort();
    fake.down(true);
    let (resumed, stop, task) = resumed_on(&fake, directory.path(), "2").await;
    advance(STAMP_LEASE + Duration::from_secs(1)).await;
    assert!(resumed.stamp(None).is_err(), "counted from when the store confirmed it");
    fake.down(false);
    eventually(|| resumed.stamp(None).is_ok()).await;
    assert_eq!(resumed.node(), clock.node());
    assert!(fake.node_high_water(resumed.node()) > resumed.high_water());
    stop.cancel();
    task.await.expect("no panic");
    assert!(!fake.node_is_leased(resumed.node()), "given back as this start's own");
}

#[tokio::test(start_paused = true)]
async fn a_start_without_the_store_ends_where_somebody_else_has_the_node() {
    let fake = FakeBackend::new();
    let directory = tempfile::tempdir().expect("a temporary directory");
    // Another node is left for it, or none.
    for nodes_max in [2, 1] {
        let (_, _, task) = taken_on(&fake, directory.path(), "1").await;
        task.abort();
        let other = FakeBackend::new();
        other.set_nodes_max(nodes_max);
        let _other = taken(&other, claimant("b", "1")).await;
        other.down(true);
        let (clock, _stop, task) = resumed_on(&other, directory.path(), "2").await;
        assert!(clock.stamp(None).is_ok());
        other.down(false);
        task.await.expect("it ends by itself");
        assert!(clock.stamp(None).is_err());
        let resumed = NodeLease::resume(&other.store(), claimant("a", "3"), Some(file(directory.path())));
        assert!(resumed.is_err(), "nor does a later start stamp on it");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_given_back_is_not_resumed_and_one_that_cannot_be_is() {
    let fake = FakeBackend::new();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (clock, stop, task) = taken_on(&fake, directory.path(), "1").await;
    fake.down(true);
    clock.stamp(None).expect("leased");
    stop.cancel();
    task.await.expect("no panic");
    assert!(fake.node_is_leased(clock.node()));
    let (clock, stop, task) = resumed_on(&fake, directory.path(), "2").await;
    fake.down(false);
    eventually(|| fake.calls(Call::RenewNode) > 1).await;
    let last = clock.stamp(None).expect("leased");
    stop.cancel();
    task.await.expect("no panic");
    assert!(!fake.node_is_leased(clock.node()));
    let left = file(directory.path());
    assert!(left.found().expect("kept").reserved >= last);
    assert!(NodeLease::resume(&fake.store(), claimant("a", "3"), Some(left)).is_err());
}

#[tokio::test(start_paused = true)]
async fn where_the_lease_cannot_be_saved_no_start_without_the_store_is_possible() {
    let fake = FakeBackend::new();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (_, _, task) = taken_on(&fake, directory.path(), "1").await;
    task.abort();
    let saved = file(directory.path());
    // The new file cannot be written, as on a full disk.
    fs::create_dir(directory.path().join("lease.new")).expect("made");
    fake.down(true);
    let mut resumed = NodeLease::resume(&fake.store(), claimant("a", "2"), Some(saved)).expect("saved");
    let clock = resumed.clock(None);
    assert!(resumed.reserve(&clock, soon()).await.is_err());
    fake.down(false);
    let (clock, ..) = taken_on(&fake, directory.path(), "3").await;
    let seen = ahead(&clock);
    clock.observe(seen);
    assert!(clock.stamp(None).expect("leased") > seen, "the store knows of it");
    assert_eq!(file(directory.path()).found(), None, "and no start goes on without it");
}
