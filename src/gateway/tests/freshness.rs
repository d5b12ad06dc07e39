//! How fresh an answer is, over the store in memory and in paused time: ages, versions that are waited for, and copies that outlive an outage.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

const EVERY: [ReadConsistency; 3] = [Cached, Shared, ReadConsistency::Store];

fn within(max: Duration) -> ReadOptions {
    within_as(Cached, max)
}

fn within_as(consistency: ReadConsistency, max: Duration) -> ReadOptions {
    let max_staleness = Some(max);
    ReadOptions {
        consistency,
        freshness: Freshness {
            max_staleness,
            ..Freshness::default()
        },
    }
}

fn at_least(consistency: ReadConsistency, version: Version) -> ReadOptions {
    let min_version = Some(version);
    ReadOptions {
        consistency,
        freshness: Freshness {
            min_version,
            ..Freshness::default()
        },
    }
}

impl Rig {
    fn reading_as(&self, name: &'static str, options: ReadOptions, time: Duration) -> JoinHandle<Result<Found, Error>> {
        let (gateway, deadline) = (self.gateway.clone(), Instant::now() + time);
        tokio::spawn(async move { gateway.get(&key(name), options, deadline).await })
    }

    async fn seen(&self, name: &str, options: impl Into<ReadOptions>) -> (Option<String>, Source) {
        seen(self.get(name, options).await.expect("a tier answers"))
    }

    async fn failure(&self, name: &str, options: impl Into<ReadOptions>) -> ErrorKind {
        self.get(name, options).await.expect_err("nobody can answer").kind()
    }
}

fn seen(found: Found) -> (Option<String>, Source) {
    let value = found.entry.and_then(|entry| entry.value);
    (value.map(|value| text(&value)), found.source)
}

// Ages.

#[tokio::test(start_paused = true)]
async fn a_copy_older_than_asked_for_is_loaded_anew_for_all() {
    let rig = rig(|_| ());
    rig.put_past("k", "old", rig.ahead(Duration::ZERO));
    assert_eq!(rig.seen("k", within(SECOND)).await, (some("old"), Source::Store));
    tokio::time::advance(10 * SECOND).await;
    rig.put_past("k", "new", rig.ahead(Duration::ZERO));
    assert_eq!(rig.seen("k", within(10 * SECOND)).await, (some("old"), Source::L1));
    assert_eq!(rig.seen("k", within(9 * SECOND)).await, (some("new"), Source::Store));
    assert_eq!(rig.seen("k", Cached).await, (some("new"), Source::L1), "it has landed");
    // An absence has an age, too.
    assert_eq!(rig.seen("none", Cached).await, (None, Source::Store));
    tokio::time::advance(2 * SECOND).await;
    assert_eq!(rig.seen("none", within(SECOND)).await, (None, Source::Store));
    assert_eq!(rig.seen("none", within(SECOND)).await, (None, Source::L1));
}

#[tokio::test(start_paused = true)]
async fn what_is_pending_is_current_however_old_its_copy_in_l1() {
    let rig = rig(|setup| setup.namespace.write_delay = 3600 * SECOND);
    rig.put("k", "pending", Behind).await;
    tokio::time::advance(60 * SECOND).await;
    for consistency in [Cached, Shared] {
        let found = rig.get("k", within_as(consistency, Duration::from_millis(1))).await;
        let found = found.expect("it is known here");
        assert!(found.age <= Duration::from_millis(1), "{:?}", found.age);
        let source = found.source;
        assert_eq!(
            seen(found),
            (some("pending"), Source::Pending),
            "{consistency:?}: {source:?}"
        );
        tokio::time::advance(SECOND).await;
    }
    assert_eq!(rig.fake.calls(Call::Load), 0);
}

#[tokio::test(start_paused = true)]
async fn who_joins_a_load_is_given_nothing_older_than_asked_for() {
    let rig = rig(|_| ());
    rig.put_past("k", "old", rig.ahead(Duration::ZERO));
    let (late, release) = Fault::late_reply();
    rig.fake.inject(Call::Load, late);
    let first = rig.reading("k");
    rig.called(Call::Load, 1).await;
    rig.put_past("k", "new", rig.ahead(SECOND));
    tokio::time::advance(SECOND).await;
    let content = rig.reading_as("k", within(5 * SECOND), PATIENCE);
    let demanding = rig.reading_as("k", within(Duration::from_millis(100)), PATIENCE);
    eventually(|| rig.parts().metrics.loads_joined.get() == 2).await;
    release.notify_one();
    for (reading, value) in [(first, "old"), (content, "old"), (demanding, "new")] {
        let found = reading.await.expect("no panic").expect("the store answers");
        assert_eq!(seen(found).0, some(value));
    }
    assert_eq!(rig.fake.calls(Call::Load), 2);
}

#[tokio::test(start_paused = true)]
async fn what_l1_knows_above_the_store_is_as_current_as_the_look_that_confirms_it() {
    let rig = rig(|_| ());
    rig.put_past("k", "stored", rig.ahead(Duration::ZERO));
    // As of a write that is pending on another replica.
    let entry = Entry {
        version: rig.ahead(SECOND),
        value: Some(Bytes::from_static(b"known")),
        expires_at: None,
    };
    let copy = Copy::new(Some(entry), rig.clock().now(), 3600 * SECOND);
    rig.parts().memory.leave_token(&key("k")).land_write(copy);
    tokio::time::advance(10 * SECOND).await;
    let found = rig.get("k", within(SECOND)).await.expect("the store answers");
    assert_eq!(rig.fake.calls(Call::Load), 1);
    assert!(found.age <= SECOND, "{:?}", found.age);
    assert_eq!(seen(found).0, some("known"), "no read goes backwards");
}

// Versions.

#[tokio::test(start_paused = true)]
async fn copies_below_the_version_are_passed_by() {
    for consistency in EVERY {
        let rig = rig(|_| ());
        let old = rig.put("k", "old", Through).await;
        let new = rig.ahead(SECOND);
        rig.put_past("k", "new", new);
        assert_eq!(rig.seen("k", at_least(Cached, old)).await, (some("old"), Source::L1));
        let read = rig.seen("k", at_least(consistency, new)).await;
        assert_eq!(read, (some("new"), Source::Store), "{consistency:?}");
        let kept = if consistency == Cached { "new" } else { "old" };
        assert_eq!(rig.seen("k", Cached).await, (some(kept), Source::L1), "{consistency:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_version_is_waited_for_without_haste() {
    for consistency in EVERY {
        let rig = rig(|_| ());
        rig.put("k", "old", Through).await;
        let version = rig.ahead(SECOND);
        let reading = rig.reading_as("k", at_least(consistency, version), PATIENCE);
        tokio::time::sleep(2 * SECOND).await;
        assert!(!reading.is_finished());
        let loads = rig.fake.calls(Call::Load);
        assert!((2..=12).contains(&loads), "{loads} loads in two seconds");
        rig.put_past("k", "new", version);
        let written = Instant::now();
        let found = reading.await.expect("no panic").expect("it is there");
        assert_eq!(seen(found).0, some("new"), "{consistency:?}");
        let waited = written.elapsed();
        assert!(waited <= Duration::from_millis(500), "{consistency:?}: {waited:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_version_that_becomes_pending_here_is_seen_at_once() {
    for consistency in EVERY {
        let rig = rig(|setup| setup.namespace.write_delay = 3600 * SECOND);
        // Its load hangs: what is pending is looked at meanwhile.
        let _release = rig.hang(Call::Load);
        let version = rig.ahead(Duration::ZERO);
        let reading = rig.reading_as("k", at_least(consistency, version), PATIENCE);
        rig.called(Call::Load, 1).await;
        tokio::time::advance(SECOND).await;
        let ours = rig.put("k", "ours", Behind).await;
        assert!(ours >= version);
        let written = Instant::now();
        let found = reading.await.expect("no panic").expect("it is there");
        assert_eq!(seen(found).0, some("ours"), "{consistency:?}");
        assert!(written.elapsed() <= Duration::from_millis(200), "{consistency:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_vain_hears_so_before_the_deadline() {
    for consistency in EVERY {
        for hangs in [false, true] {
            let rig = rig(|_| ());
            rig.put("k", "old", Through).await;
            if hangs {
                rig.fake.script(|call| (call == Call::Load).then(|| Fault::hang().0));
            }
            let (begun, version) = (Instant::now(), rig.ahead(SECOND));
            let reading = rig.reading_as("k", at_least(consistency, version), SECOND);
            let error = reading.await.expect("no panic").expect_err("nobody writes it");
            let waited = begun.elapsed();
            assert_eq!(error.kind(), ErrorKind::NotVisible, "{consistency:?} {hangs}");
            assert!(error.retry_delay().is_some_and(|delay| !delay.is_zero()));
            let margin = SECOND - waited;
            assert!(
                (Duration::from_millis(25)..=Duration::from_millis(45)).contains(&margin),
                "{margin:?}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_for_a_version_share_their_loads() {
    let rig = rig(|_| ());
    rig.put("k", "old", Through).await;
    let version = rig.ahead(SECOND);
    let waiting: Vec<_> = (0..50)
        .map(|_| rig.reading_as("k", at_least(Cached, version), PATIENCE))
        .collect();
    tokio::time::sleep(SECOND).await;
    let loads = rig.fake.calls(Call::Load);
    assert!(loads <= 20, "{loads} loads of 50 readers in a second");
    rig.put_past("k", "new", version);
    for reading in waiting {
        let found = reading.await.expect("no panic").expect("it is there");
        assert_eq!(seen(found).0, some("new"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_version_far_ahead_is_refused_at_once_unless_it_stands_and_moves_no_clock() {
    for consistency in EVERY {
        let rig = rig(|_| ());
        rig.put("k", "value", Through).await;
        let begun = Instant::now();
        let far = rig.ahead(3600 * SECOND);
        assert_eq!(rig.failure("k", at_least(consistency, far)).await, ErrorKind::TooNew);
        let highest = Version::new(i64::MAX).expect("positive");
        assert_eq!(
            rig.failure("k", at_least(consistency, highest)).await,
            ErrorKind::TooNew
        );
        assert!(begun.elapsed() < Duration::from_millis(100));
        assert!(rig.put("k", "value", Through).await < far, "no clock was moved");
        rig.put_past("k", "theirs", far);
        assert_eq!(rig.seen("k", at_least(consistency, far)).await.0, some("theirs"));
        // So near that what a gateway stamped would move the clock.
        let near = rig.ahead(10 * SECOND);
        let vain = rig.reading_as("other", at_least(consistency, near), SECOND);
        let vain = vain.await.expect("no panic").expect_err("nobody writes it");
        assert_eq!(vain.kind(), ErrorKind::NotVisible);
        assert!(rig.put("other", "value", Through).await < near, "no clock was moved");
    }
}

#[tokio::test(start_paused = true)]
async fn an_absence_answers_for_a_version_only_with_proof() {
    for consistency in EVERY {
        let rig = rig(|_| ());
        // A tombstone, and a record past its expiry.
        rig.put("k", "value", Through).await;
        let delete = WriteRequest {
            value: None,
            ..put("k", "", Through)
        };
        let deleted = rig
            .gateway
            .write(delete, Instant::now() + PATIENCE)
            .await
            .expect("deleted");
        assert_eq!(rig.seen("k", at_least(consistency, deleted.version)).await.0, None);
        let brief = WriteRequest {
            ttl: Some(SECOND),
            ..put("brief", "value", Through)
        };
        let brief = rig
            .gateway
            .write(brief, Instant::now() + PATIENCE)
            .await
            .expect("written");
        tokio::time::advance(2 * SECOND).await;
        assert_eq!(rig.seen("brief", at_least(consistency, brief.version)).await.0, None);

        // A row that was collected: only the horizon says so.
        assert_eq!(rig.seen("gone", Cached).await.0, None);
        let vain = rig.reading_as("gone", at_least(consistency, brief.version), SECOND);
        let vain = vain.await.expect("no panic").expect_err("it may be on its way");
        assert_eq!(vain.kind(), ErrorKind::NotVisible, "{consistency:?}");
        rig.parts()
            .sharing
            .horizon
            .store(brief.version.get(), std::sync::atomic::Ordering::Relaxed);
        assert_eq!(
            rig.seen("gone", Cached).await.1,
            Source::L1,
            "it is cached, and proves nothing"
        );
        let read = rig.seen("gone", at_least(consistency, brief.version)).await;
        assert_eq!(read, (None, Source::Store), "{consistency:?}");
        let above = rig.ahead(Duration::ZERO);
        let vain = rig.reading_as("gone", at_least(consistency, above), SECOND);
        let vain = vain.await.expect("no panic").expect_err("above the horizon");
        assert_eq!(vain.kind(), ErrorKind::NotVisible, "{consistency:?}");
    }
}

// Outages.

/// A gateway with copies past their lifetime of ten seconds, give or take one, within their grace of a minute; the store is down.
async fn outage() -> (Rig, Version) {
    let rig = rig(|setup| {
        setup.namespace.cache_lifetime = 10 * SECOND;
        setup.namespace.stale_if_error = 60 * SECOND;
        setup.namespace.refresh_threshold = 0.0;
    });
    let version = rig.put("k", "value", Through).await;
    for (name, ttl) in [("brief", 15), ("long", 45)] {
        let request = WriteRequest {
            ttl: Some(ttl * SECOND),
            ..put(name, "value", Through)
        };
        rig.gateway
            .write(request, Instant::now() + PATIENCE)
            .await
            .expect("written");
    }
    rig.put("deleted", "value", Through).await;
    let delete = WriteRequest {
        value: None,
        ..put("deleted", "", Through)
    };
    rig.gateway
        .write(delete, Instant::now() + PATIENCE)
        .await
        .expect("deleted");
    assert_eq!(rig.seen("none", Cached).await.0, None);
    tokio::time::advance(20 * SECOND).await;
    rig.fake.down(true);
    eventually(|| rig.store.breaker().is_open()).await;
    (rig, version)
}

#[tokio::test(start_paused = true)]
async fn an_expired_copy_answers_while_the_store_is_down_and_says_so() {
    let (rig, version) = outage().await;
    let mut last = Duration::ZERO;
    for _ in 0..3 {
        for consistency in [Cached, Shared] {
            let begun = Instant::now();
            let found = rig.get("k", consistency).await.expect("a copy is known");
            assert!(
                begun.elapsed() < Duration::from_millis(5),
                "nobody waits for a store that is down"
            );
            assert!(found.stale && found.age >= 20 * SECOND && found.age > last, "{found:?}");
            last = found.age;
            assert_eq!(seen(found), (some("value"), Source::L1), "{consistency:?}");
            tokio::time::advance(SECOND).await;
        }
    }
    assert_eq!(rig.parts().metrics.stale_answers.get(), 6);
    // Not to those who asked for more.
    let refused = [
        ReadConsistency::Store.into(),
        within(3600 * SECOND),
        within_as(Shared, 3600 * SECOND),
        at_least(Cached, version),
        at_least(Shared, version),
    ];
    for options in refused {
        assert_eq!(rig.failure("k", options).await, ErrorKind::Unavailable, "{options:?}");
    }
    // Not of what is no live record.
    for name in ["brief", "deleted", "none", "unknown"] {
        assert_eq!(rig.failure(name, Cached).await, ErrorKind::Unavailable, "{name}");
    }
    rig.get("long", Cached).await.expect("it lives");
    tokio::time::advance(25 * SECOND).await;
    assert_eq!(
        rig.failure("long", Cached).await,
        ErrorKind::Unavailable,
        "it has expired"
    );
    assert!(rig.get("k", Cached).await.expect("in grace").stale);
    tokio::time::advance(25 * SECOND).await;
    assert_eq!(
        rig.failure("k", Cached).await,
        ErrorKind::Unavailable,
        "the grace is over"
    );
}

#[tokio::test(start_paused = true)]
async fn a_stale_answer_is_not_taken_for_a_fresh_one_when_the_store_is_back() {
    let (rig, _) = outage().await;
    assert!(rig.get("k", Cached).await.expect("in grace").stale);
    rig.put_past("k", "new", rig.ahead(Duration::ZERO));
    rig.fake.down(false);
    eventually(|| !rig.store.breaker().is_open()).await;
    let found = rig.get("k", Cached).await.expect("the store is back");
    assert!(!found.stale);
    assert_eq!(seen(found), (some("new"), Source::Store));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_is_given_up_for_a_copy_just_before_the_deadline() {
    let rig = rig(|setup| {
        setup.namespace.cache_lifetime = 10 * SECOND;
        setup.namespace.stale_if_error = 60 * SECOND;
    });
    rig.put("k", "value", Through).await;
    tokio::time::advance(20 * SECOND).await;
    rig.fake.script(|call| (call == Call::Load).then(|| Fault::hang().0));
    let begun = Instant::now();
    let reading = rig.reading_as("k", Cached.into(), SECOND);
    let found = reading.await.expect("no panic").expect("a copy is known");
    assert!(found.stale && begun.elapsed() < SECOND);
    // Nothing is known of this one, so the deadline is used to its end.
    let (begun, reading) = (Instant::now(), rig.reading_as("unknown", Cached.into(), SECOND));
    let error = reading.await.expect("no panic").expect_err("nobody knows");
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(begun.elapsed() >= SECOND);
}

#[tokio::test(start_paused = true)]
async fn an_overload_is_no_outage() {
    let rig = rig(|setup| {
        setup.flights_max = 1;
        setup.namespace.cache_lifetime = 10 * SECOND;
        setup.namespace.stale_if_error = 60 * SECOND;
    });
    rig.put("k", "value", Through).await;
    tokio::time::advance(20 * SECOND).await;
    let _release = rig.hang(Call::Load);
    let _loading = rig.reading("other");
    rig.called(Call::Load, 1).await;
    assert_eq!(rig.failure("k", Cached).await, ErrorKind::Overloaded);
}

#[tokio::test(start_paused = true)]
async fn without_a_grace_no_copy_outlives_its_lifetime() {
    let rig = rig(|setup| setup.namespace.cache_lifetime = 10 * SECOND);
    rig.put("k", "value", Through).await;
    tokio::time::advance(20 * SECOND).await;
    rig.fake.down(true);
    eventually(|| rig.store.breaker().is_open()).await;
    assert_eq!(rig.failure("k", Cached).await, ErrorKind::Unavailable);
}
