//! The gathering of batches: what may wait for company, and what may not.

use super::*;

const INTERVAL: Duration = Duration::from_millis(100);

/// A queue that gathers, and has just committed its first batch.
async fn gathering(change: impl FnOnce(&mut Config)) -> Rig {
    let rig = rig(|config| {
        config.drain_interval = INTERVAL;
        change(config);
    });
    let started = Instant::now();
    rig.put("first", 1);
    rig.empty().await;
    assert!(started.elapsed() < INTERVAL / 2, "nothing to gather for");
    rig
}

#[tokio::test(start_paused = true)]
async fn what_comes_soon_after_a_batch_goes_in_one() {
    let rig = gathering(|_| ()).await;
    let (commits, started) = (rig.backend.calls(Call::Commit), Instant::now());
    for number in 0..20 {
        rig.put(&format!("k{number}"), 1);
        sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(rig.backend.calls(Call::Commit), commits);
    rig.empty().await;
    assert_eq!(rig.backend.calls(Call::Commit), commits + 1);
    assert!(started.elapsed() <= INTERVAL + Duration::from_millis(50));
    // And after a pause nothing waits.
    sleep(INTERVAL).await;
    let started = Instant::now();
    rig.put("late", 1);
    rig.empty().await;
    assert!(started.elapsed() < INTERVAL / 2);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_has_become_whole_waits_for_nothing() {
    let rig = gathering(|config| config.drain_batch_writes_max = bound(10)).await;
    // What is not due makes no batch whole.
    for number in 0..25 {
        rig.put_after(&format!("delayed{number}"), 1, LONG);
    }
    let (commits, started) = (rig.backend.calls(Call::Commit), Instant::now());
    for number in 0..30 {
        assert!(rig.backend.calls(Call::Commit) <= commits + number / 10);
        rig.put(&format!("k{number}"), 1);
        sleep(Duration::from_millis(1)).await;
    }
    eventually(|| rig.standing("k29").is_some()).await;
    assert_eq!(rig.backend.calls(Call::Commit), commits + 3);
    assert!(started.elapsed() < INTERVAL);
    assert_eq!(rig.queue.stats().entries, 25);
}

#[tokio::test(start_paused = true)]
async fn a_failed_commit_is_tried_again_when_its_backoff_says() {
    let rig = gathering(|config| config.drain_interval = Duration::from_secs(10)).await;
    sleep(Duration::from_secs(10)).await;
    rig.backend.inject(Call::Commit, Fault::fail(StoreErrorKind::Transient));
    let started = Instant::now();
    rig.put("k", 1);
    rig.empty().await;
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn pressure_ends_the_gathering_of_all() {
    let rig = gathering(|config| config.entries_max = bound(10)).await;
    let started = Instant::now();
    for number in 0..5 {
        rig.put(&format!("k{number}"), 1);
        sleep(Duration::from_millis(1)).await;
    }
    rig.empty().await;
    assert!(started.elapsed() < INTERVAL / 2);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_gathered_while_somebody_waits() {
    let rig = gathering(|_| ()).await;
    let started = Instant::now();
    rig.put("k", 1);
    let deadline = Instant::now() + LONG;
    let fate = rig.queue.persisted(&key("k"), version(1), deadline).await;
    assert_eq!(fate.expect("in time"), Fate::Stored(version(1)));
    rig.put("other", 1);
    rig.queue.all_persisted(deadline).await.expect("in time");
    assert!(started.elapsed() < INTERVAL / 2);
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_closes_gathers_nothing() {
    let rig = gathering(|_| ()).await;
    let started = Instant::now();
    rig.put("k", 1);
    rig.queue.close();
    let left = rig.queue.drained(Instant::now() + LONG).await;
    assert_eq!(left.entries, 0);
    assert!(started.elapsed() < INTERVAL / 2);
}
