//! Waiting for writes to leave, and looking at a range of what has not: who waits is told the truth, in time, and leaves nothing behind.

use super::*;

/// A deadline that does not matter.
fn late() -> Instant {
    Instant::now() + LONG
}

impl Rig {
    /// A wait in a task of its own, which has begun.
    async fn waiting<T: Send + 'static>(
        &self,
        wait: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> JoinHandle<Result<T, Error>> {
        let waiting = tokio::spawn(wait);
        sleep(Duration::from_millis(1)).await;
        waiting
    }

    fn persisted(&self, name: &str, number: i64) -> impl Future<Output = Result<Fate, Error>> + Send + 'static {
        let (queue, name) = (self.queue.clone(), name.to_owned());
        async move { queue.persisted(&key(&name), version(number), late()).await }
    }

    fn settled_below(&self, name: &str, number: i64) -> impl Future<Output = Result<(), Error>> + Send + 'static {
        let (queue, name) = (self.queue.clone(), name.to_owned());
        async move { queue.settled_below(&key(&name), version(number), late()).await }
    }

    fn is_watched(&self, name: &str) -> bool {
        let key = key(name);
        self.queue.shared.shard(&key).pending.lock().is_watched(&key)
    }
}

#[tokio::test(start_paused = true)]
async fn an_awaited_write_is_drained_at_once_and_told_to_be_stored() {
    let rig = rig(|_| ());
    assert_eq!(rig.persisted("k", 1).await.expect("at once"), Fate::Unknown);
    rig.put_after("k", 1, LONG);
    rig.put_after("other", 1, LONG);
    sleep(Duration::from_secs(1)).await;
    let started = Instant::now();
    assert_eq!(rig.persisted("k", 1).await.expect("in time"), Fate::Stored(version(1)));
    assert!(started.elapsed() < Duration::from_millis(50));
    assert_eq!((rig.standing("k"), rig.standing("other")), (Some(1), None));
    assert_eq!(rig.persisted("k", 1).await.expect("at once"), Fate::Unknown);
}

#[tokio::test(start_paused = true)]
async fn whoever_awaits_a_write_is_told_of_the_one_that_stands_for_it() {
    let rig = rig(|_| ());
    let release = rig.hang_commit().await;
    rig.put("k", 2);
    assert_eq!(
        rig.persisted("k", 3).await.expect("at once"),
        Fate::Unknown,
        "it is not here"
    );
    assert_eq!(
        rig.persisted("k", 1).await.expect("at once"),
        Fate::Unknown,
        "it is not here"
    );
    rig.put("k", 9);
    let waiting = rig.waiting(rig.persisted("k", 2)).await;
    let overtaken = {
        rig.put("l", 4);
        rig.waiting(rig.persisted("l", 4)).await
    };
    rig.queue.overtake(&key("l"), version(6));
    assert_eq!(
        overtaken.await.expect("no panic").expect("told"),
        Fate::Stored(version(6))
    );
    assert!(!waiting.is_finished());
    release.notify_one();
    assert_eq!(
        waiting.await.expect("no panic").expect("told"),
        Fate::Stored(version(9))
    );
}

#[tokio::test(start_paused = true)]
async fn whoever_awaits_one_in_flight_does_not_wait_for_what_comes_after() {
    let rig = rig(|_| ());
    let (fault, release) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    rig.put("k", 1);
    eventually(|| rig.backend.calls(Call::Commit) == 1).await;
    rig.put("k", 2);
    let waiting = rig.waiting(rig.persisted("k", 1)).await;
    let (fault, _never) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    release.notify_one();
    assert_eq!(
        waiting.await.expect("no panic").expect("told"),
        Fate::Stored(version(1))
    );
    assert_eq!(rig.pending("k"), Some(2));
}

#[tokio::test(start_paused = true)]
async fn whoever_awaits_a_write_that_lost_is_told_what_stands() {
    let rig = rig(|_| ());
    let release = rig.hang_commit().await;
    rig.backend.put(write("k", 9));
    rig.put("k", 5);
    let waiting = rig.waiting(rig.persisted("k", 5)).await;
    release.notify_one();
    assert_eq!(
        waiting.await.expect("no panic").expect("told"),
        Fate::Stored(version(9))
    );
}

#[tokio::test(start_paused = true)]
async fn whoever_awaits_a_dead_letter_or_what_it_stood_for_is_told_so() {
    let rig = rig(|_| ());
    rig.backend.reject(|write| write.key.key() == "poison");
    let release = rig.hang_commit().await;
    rig.put("poison", 1);
    rig.put("poison", 2);
    let waiting = [
        rig.waiting(rig.persisted("poison", 1)).await,
        rig.waiting(rig.persisted("poison", 2)).await,
    ];
    assert_eq!(rig.queue.dead_lettered(), 0);
    release.notify_one();
    for waiting in waiting {
        assert_eq!(waiting.await.expect("no panic").expect("told"), Fate::DeadLettered);
        assert_eq!(rig.queue.dead_lettered(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_is_over_or_given_up_leaves_nothing_behind() {
    let rig = rig(|_| ());
    rig.backend.down(true);
    rig.put("k", 1);
    let soon = || Instant::now() + Duration::from_secs(1);
    let (key, one, two) = (key("k"), version(1), version(2));
    let timed_out = [
        rig.queue.persisted(&key, one, soon()).await.map(|_| ()),
        rig.queue.settled_below(&key, two, soon()).await,
        rig.queue.all_persisted(soon()).await,
    ];
    for result in timed_out {
        assert_eq!(result.expect_err("the store is down").kind(), ErrorKind::Timeout);
    }
    let given_up = rig.waiting(rig.persisted("k", 1)).await;
    assert!(rig.is_watched("k"));
    given_up.abort();
    assert!(given_up.await.is_err());
    assert!(!rig.is_watched("k"));
    assert_eq!(rig.queue.shared.emptying.load(Ordering::Relaxed), 0);
    rig.backend.down(false);
    rig.empty().await;
}

#[tokio::test(start_paused = true)]
async fn below_a_version_everything_has_left_and_newer_writes_do_not_matter() {
    let rig = rig(|_| ());
    rig.settled_below("k", 5).await.expect("at once");
    rig.put_after("k", 7, LONG);
    rig.settled_below("k", 5).await.expect("at once");
    assert_eq!(rig.standing("k"), None, "it waits for nothing, and hurries nothing");

    let (fault, release) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    rig.put("l", 1);
    eventually(|| rig.backend.calls(Call::Commit) == 1).await;
    let waiting = rig.waiting(rig.settled_below("l", 5)).await;
    // A stream of newer ones, and a store that takes nothing of them.
    rig.backend
        .script(|call| (call == Call::Commit).then(|| Fault::fail(StoreErrorKind::Transient)));
    for number in 10..20 {
        rig.put("l", number);
        assert!(!waiting.is_finished());
    }
    release.notify_one();
    waiting.await.expect("no panic").expect("told");
    assert_eq!((rig.standing("l"), rig.pending("l")), (Some(1), Some(19)));
}

#[tokio::test(start_paused = true)]
async fn a_newer_write_that_stands_for_an_older_one_is_waited_for() {
    let rig = rig(|_| ());
    rig.put_after("k", 1, LONG);
    rig.put_after("k", 9, LONG);
    let started = Instant::now();
    rig.settled_below("k", 5).await.expect("in time");
    assert_eq!(rig.standing("k"), Some(9));
    assert!(started.elapsed() < Duration::from_millis(50));
    // The same of an older one that came after it.
    rig.put_after("l", 9, LONG);
    rig.put_after("l", 1, LONG);
    rig.settled_below("l", 5).await.expect("in time");
    assert_eq!(rig.standing("l"), Some(9));
}

#[tokio::test(start_paused = true)]
async fn a_write_that_is_on_its_way_is_waited_for_and_one_that_sets_out_later_is_not() {
    let rig = rig(|_| ());
    let before = rig.queue.enter(&key("k"));
    let waiting = rig.waiting(rig.settled_below("k", 5)).await;
    let given_up = rig.queue.enter(&key("l"));
    let other = rig.waiting(rig.settled_below("l", 5)).await;
    let _after = [rig.queue.enter(&key("k")), rig.queue.enter(&key("l"))];
    assert!(!waiting.is_finished() && !other.is_finished());
    drop(given_up);
    other.await.expect("no panic").expect("told");
    let write = write("k", 3);
    let held = rig.held(&write);
    let (fault, release) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    // Nobody else's delay holds up who waits.
    rig.queue.accept(write, held, before, LONG);
    eventually(|| rig.backend.calls(Call::Commit) == 1).await;
    assert!(!waiting.is_finished());
    release.notify_one();
    waiting.await.expect("no panic").expect("told");
    assert_eq!(rig.standing("k"), Some(3));
}

#[tokio::test(start_paused = true)]
async fn everything_that_was_accepted_before_leaves_at_once_and_the_rest_is_not_waited_for() {
    let rig = rig(|config| config.drain_workers = bound(3));
    rig.queue.all_persisted(late()).await.expect("at once");
    for number in 0..50 {
        rig.put_after(&format!("k{number}"), 1, LONG);
    }
    sleep(Duration::from_secs(1)).await;
    assert_eq!(rig.backend.rows(), 0);
    let started = Instant::now();
    rig.queue.all_persisted(late()).await.expect("in time");
    assert!(started.elapsed() < Duration::from_millis(50));
    assert_eq!(rig.backend.rows(), 50);

    // One is in flight, with a newer one of its key behind it; what comes after the call has a commit of its own, which hangs.
    let (fault, release) = Fault::hang();
    rig.backend.inject(Call::Commit, fault);
    rig.put("k0", 2);
    eventually(|| rig.pending("k0") == Some(2) && rig.backend.calls(Call::Commit) > 3).await;
    rig.put_after("k0", 3, LONG);
    let waiting = {
        let queue = rig.queue.clone();
        rig.waiting(async move { queue.all_persisted(late()).await }).await
    };
    assert!(!waiting.is_finished());
    release.notify_one();
    waiting.await.expect("no panic").expect("told");
    assert_eq!(rig.standing("k0"), Some(3));
    rig.put_after("k1", 2, LONG);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(rig.standing("k1"), Some(1), "delays count again");
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_writes_does_not_keep_who_waits_for_everything() {
    let rig = rig(|config| config.drain_batch_writes_max = bound(2));
    rig.backend
        .script(|call| (call == Call::Commit).then(|| Fault::delay(Duration::from_millis(5))));
    for number in 0..4 {
        rig.put(&format!("k{number}"), 1);
    }
    let queue = rig.queue.clone();
    let waiting = rig.waiting(async move { queue.all_persisted(late()).await }).await;
    let mut version = 2;
    while !waiting.is_finished() {
        for number in 0..8 {
            rig.put(&format!("k{number}"), version);
        }
        version += 1;
        assert!(version < 100, "it never ends");
        sleep(Duration::from_millis(1)).await;
    }
    waiting.await.expect("no panic").expect("told");
    assert!((0..4).all(|number| rig.standing(&format!("k{number}")).is_some()));
}

#[tokio::test(start_paused = true)]
async fn a_range_is_in_order_over_all_shards_and_shows_the_newest() {
    let rig = rig(|config| config.drain_workers = bound(4));
    rig.backend.down(true);
    for number in 0..100 {
        rig.put(&format!("a{number:02}"), 1);
    }
    for name in ["b", "é", "a"] {
        rig.put(name, 1);
    }
    rig.put("a50", 2);
    rig.queue.overtake(&key("a51"), version(1));
    let names = |prefix: &str, after: Option<&str>, limit| {
        let found = rig.queue.pending_range("test", prefix, after, limit);
        let named = found
            .into_iter()
            .map(|(key, pending, _)| (key.key().to_owned(), pending.entry.version.get()));
        named.collect::<Vec<_>>()
    };
    let one = |name: &str| (name.to_owned(), 1);
    assert_eq!(names("a", None, 3), [one("a"), one("a00"), one("a01")]);
    assert_eq!(names("a", Some("a49"), 2), [("a50".to_owned(), 2), one("a52")]);
    assert_eq!(
        names("a9", Some("a"), 1),
        [one("a90")],
        "a prefix begins after where it was to go on"
    );
    assert_eq!(names("", Some("a99"), 9), [one("b"), one("é")]);
    assert_eq!(names("a", None, 1_000).len(), 100);
    assert!(names("c", None, 9).is_empty() && rig.queue.pending_range("tes", "", None, 9).is_empty());
}
