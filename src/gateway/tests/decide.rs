//! What the store decides and what is written once, over scripted faults: what is waited for, what a lost answer does, and who leads when a call
//! goes away.

use super::*;
use crate::{
    model::{Answer, Answered, KeyedAnswer, Request, RequestId},
    store::StoreErrorKind,
};

/// Adds to a counter in a task of its own.
fn counting(rig: &Rig, name: &str, id: Option<&str>) -> JoinHandle<Result<Counted, Error>> {
    let (gateway, deadline) = (rig.gateway.clone(), Instant::now() + PATIENCE);
    let request = IncrementRequest {
        key: key(name),
        delta: 1,
        ttl: None,
        request: id.map(|id| RequestId::new(id).expect("valid")),
    };
    tokio::spawn(async move { gateway.increment(request, deadline).await })
}

async fn count(rig: &Rig, name: &str, id: Option<&str>) -> Counted {
    counting(rig, name, id).await.expect("no panic").expect("counted")
}

fn named(name: &str, value: &str, mode: WriteMode, id: &str) -> WriteRequest {
    WriteRequest {
        request: Some(RequestId::new(id).expect("valid")),
        ..put(name, value, mode)
    }
}

async fn write(rig: &Rig, request: WriteRequest) -> Result<Written, Error> {
    rig.gateway.write(request, Instant::now() + PATIENCE).await
}

/// Puts under an id in a task of its own.
fn writing(rig: &Rig, request: WriteRequest) -> JoinHandle<Result<Written, Error>> {
    let gateway = rig.gateway.clone();
    tokio::spawn(async move { gateway.write(request, Instant::now() + PATIENCE).await })
}

/// The store remembers a request as a drain or a decision left it.
async fn remembered(rig: &Rig, request: Request, version: Version) {
    let answer = KeyedAnswer {
        key: key("k"),
        answered: Answered {
            request,
            answer: Answer {
                version,
                counter: None,
                expires_at: None,
            },
        },
    };
    rig.store.session().remember(&[answer]).await.expect("it is up");
}

#[tokio::test(start_paused = true)]
async fn what_is_pending_is_drained_before_the_store_decides() {
    let rig = rig(|setup| setup.namespace.write_delay = Duration::from_secs(3600));
    let begun = Instant::now();
    rig.put("n", "41", Behind).await;
    assert_eq!(rig.stored("n"), None, "it waits for others of its key");
    assert_eq!(count(&rig, "n", None).await.value, 42);
    assert!(begun.elapsed() < Duration::from_secs(1), "it was drained at once");
    assert_eq!((rig.stored("n"), rig.queue().stats().entries), (some("42"), 0));
    assert_eq!(rig.read("n", Cached).await, (some("42"), Source::L1));
}

#[tokio::test(start_paused = true)]
async fn what_is_pending_and_cannot_be_drained_refuses_the_decision() {
    let rig = rig(|_| ());
    rig.fake
        .script(|call| (call == Call::Commit).then(|| Fault::fail(StoreErrorKind::Transient)));
    rig.put("n", "41", Behind).await;
    let refused = counting(&rig, "n", None).await.expect("no panic").expect_err("pending");
    assert_eq!(
        (refused.kind(), refused.outcome()),
        (ErrorKind::Unavailable, Outcome::NotApplied)
    );
    assert_eq!(rig.fake.calls(Call::Decide), 0);
}

#[tokio::test(start_paused = true)]
async fn an_increment_whose_answer_was_lost_counts_once_and_is_its_own() {
    let rig = rig(|_| ());
    for id in [None, Some("once")] {
        let before = count(&rig, "n", None).await.value;
        rig.fake.inject(Call::Decide, Fault::lose_reply());
        let counted = count(&rig, "n", id).await;
        assert_eq!((counted.value, counted.deduplicated), (before + 1, false));
        assert_eq!(count(&rig, "n", None).await.value, before + 2);
    }
    let repeated = count(&rig, "n", Some("once")).await;
    assert_eq!((repeated.value, repeated.deduplicated), (5, true));
    assert_eq!(rig.stored("n"), some("6"));
}

#[tokio::test(start_paused = true)]
async fn a_condition_lost_to_what_l1_does_not_know_makes_l1_forget() {
    let rig = rig(|_| ());
    let first = rig.put("k", "first", Through).await;
    let theirs = rig.ahead(Duration::from_secs(1));
    rig.put_past("k", "theirs", theirs);
    assert_eq!(rig.read("k", Cached).await, (some("first"), Source::L1));
    let compared = WriteRequest {
        condition: Some(Condition::Version(first)),
        mode: None,
        ..put("k", "second", Through)
    };
    let refused = write(&rig, compared).await.expect_err("it is another");
    assert_eq!(
        (refused.kind(), refused.standing_version()),
        (ErrorKind::Conflict, Some(theirs))
    );
    assert_eq!(rig.read("k", Cached).await.0, some("theirs"));
}

#[tokio::test(start_paused = true)]
async fn calls_with_one_id_at_the_same_time_write_once() {
    let rig = rig(|_| ());
    let release = rig.hang(Call::Decide);
    let calls: Vec<_> = (0..5).map(|_| writing(&rig, named("k", "v", Through, "one"))).collect();
    rig.called(Call::Decide, 1).await;
    release.notify_one();
    let mut written = Vec::new();
    for call in calls {
        written.push(call.await.expect("no panic").expect("written"));
    }
    assert!(written.iter().all(|one| one.version == written[0].version));
    assert_eq!(written.iter().filter(|one| !one.deduplicated).count(), 1);
    assert_eq!(rig.fake.history(&key("k")), [written[0].version]);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_goes_away_before_it_is_admitted_leaves_its_id_to_the_next() {
    let (rig, stuck) = full(QueueFull::Wait).await;
    let waits = writing(&rig, named("k", "v", Behind, "one"));
    let joins = writing(&rig, named("k", "v", Behind, "one"));
    tokio::task::yield_now().await;
    waits.abort();
    assert!(waits.await.expect_err("it was aborted").is_cancelled());
    stuck.notify_one();
    let written = joins.await.expect("no panic").expect("it leads now");
    assert!(!written.deduplicated);
    rig.drained().await;
    assert_eq!(rig.fake.history(&key("k")), [written.version]);
    let known = rig.fake.answer_of("test", &RequestId::new("one").expect("valid"));
    assert_eq!(known.map(|known| known.answer.version), Some(written.version));
}

#[tokio::test(start_paused = true)]
async fn a_young_process_asks_the_store_what_an_earlier_one_answered() {
    let rig = rig(|_| ());
    let theirs = rig.ahead(Duration::from_millis(1));
    let print = requests::fingerprint_of_write(&named("k", "v", Behind, "one"));
    let request = Request {
        id: RequestId::new("one").expect("valid"),
        fingerprint: print,
        ends_at: rig.clock().now().after(Duration::from_secs(300)),
    };
    remembered(&rig, request, theirs).await;
    let repeated = write(&rig, named("k", "v", Behind, "one")).await.expect("known");
    assert!(repeated.deduplicated && repeated.version == theirs && repeated.durability == Durability::Store);
    let reused = write(&rig, named("k", "other", Behind, "one"))
        .await
        .expect_err("another content");
    assert_eq!(reused.kind(), ErrorKind::Invalid);

    rig.fake.down(true);
    let refused = write(&rig, named("k", "v", Behind, "two"))
        .await
        .expect_err("the store cannot say");
    assert_eq!(
        (refused.kind(), refused.outcome()),
        (ErrorKind::Unavailable, Outcome::NotApplied)
    );
    // Once it is older than the window nothing is left of an earlier one.
    tokio::time::advance(Duration::from_secs(601)).await;
    assert!(write(&rig, named("k", "v", Behind, "two")).await.is_ok());
    assert_eq!(
        rig.fake.calls(Call::Answers),
        3,
        "once for each call of a young process"
    );
}

#[tokio::test(start_paused = true)]
async fn a_write_behind_that_is_awaited_says_that_the_store_has_it() {
    let rig = rig(|setup| setup.namespace.write_delay = Duration::from_secs(3600));
    let awaited = WriteRequest {
        await_persisted: true,
        ..put("k", "v", Behind)
    };
    let written = write(&rig, awaited).await.expect("it is up");
    assert_eq!((written.durability, rig.stored("k")), (Durability::Store, some("v")));

    rig.fake.reject(|write| write.key == key("bad"));
    let refused = WriteRequest {
        await_persisted: true,
        ..put("bad", "v", Behind)
    };
    let refused = write(&rig, refused).await.expect_err("the store rejects it");
    assert_eq!(refused.kind(), ErrorKind::DeadLettered);
    let deadline = Instant::now() + Duration::from_secs(1);
    let version = written.version;
    let persisted = rig.gateway.await_persisted(&key("k"), version, deadline).await;
    assert_eq!(persisted.expect("it is there"), Some(version));
    let never = rig
        .gateway
        .await_persisted(&key("k"), rig.ahead(Duration::from_secs(5)), deadline)
        .await;
    assert_eq!(never.expect_err("nobody wrote it").kind(), ErrorKind::NotPersisted);
    let never = rig
        .gateway
        .await_persisted(&key("k"), rig.ahead(Duration::from_secs(3600)), deadline)
        .await;
    assert_eq!(never.expect_err("nobody can have").kind(), ErrorKind::TooNew);
}

#[tokio::test(start_paused = true)]
async fn a_write_behind_passes_what_a_decision_or_a_wait_has_told_of() {
    let rig = rig(|_| ());
    let first = rig.put("refused", "ours", Through).await;
    for name in ["refused", "awaited", "touched"] {
        let theirs = rig.ahead(Duration::from_secs(8));
        rig.put_past(name, "theirs", theirs);
        let deadline = Instant::now() + PATIENCE;
        match name {
            "refused" => {
                let compared = WriteRequest {
                    condition: Some(Condition::Version(first)),
                    mode: None,
                    ..put(name, "second", Through)
                };
                assert_eq!(
                    write(&rig, compared).await.expect_err("it is another").kind(),
                    ErrorKind::Conflict
                );
            }
            "awaited" => {
                let awaited = rig.gateway.await_persisted(&key(name), theirs, deadline).await;
                assert_eq!(awaited.expect("it is there"), Some(theirs));
            }
            _ => {
                let request = TouchRequest {
                    key: key(name),
                    ttl: Some(Duration::from_secs(60)),
                    request: None,
                };
                assert!(rig.gateway.touch(request, deadline).await.expect("it is there").version > theirs);
            }
        }
        let ours = rig.put(name, "ours", Behind).await;
        assert!(ours > theirs, "{name}");
        rig.drained().await;
        assert_eq!(rig.stored(name), some("ours"), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_try_that_fell_through_and_is_in_doubt_is_not_written_behind_again() {
    let (rig, stuck) = full(QueueFull::WriteThrough).await;
    tokio::time::advance(Duration::from_secs(601)).await;
    // Every answer is lost, until its caller has given up.
    rig.fake.script(|call| (call == Call::Decide).then(Fault::lose_reply));
    let lost = write(&rig, named("k", "old", Behind, "one"))
        .await
        .expect_err("nobody knows");
    assert_eq!(lost.outcome(), Outcome::Unknown);
    rig.fake.script(|_| None);
    assert_eq!(rig.stored("k"), some("old"), "it was applied");
    stuck.notify_one();
    rig.drained().await;
    rig.put("k", "new", Through).await;
    let repeated = write(&rig, named("k", "old", Behind, "one"))
        .await
        .expect("the store knows");
    assert!(repeated.deduplicated && repeated.durability == Durability::Store);
    assert_eq!(
        (rig.stored("k"), rig.read("k", Cached).await.0),
        (some("new"), some("new"))
    );
}

#[tokio::test(start_paused = true)]
async fn a_repeat_says_what_its_write_rests_on_by_now() {
    let rig = rig(|_| ());
    let stuck = rig.hang(Call::Commit);
    let first = write(&rig, named("k", "v", Behind, "one")).await.expect("accepted");
    let repeated = write(&rig, named("k", "v", Behind, "one")).await.expect("known");
    assert_eq!(
        (repeated.version, repeated.durability),
        (first.version, Durability::Memory),
        "it is pending"
    );
    stuck.notify_one();
    rig.drained().await;
    let repeated = write(&rig, named("k", "v", Through, "one")).await.expect("known");
    assert_eq!(
        (repeated.version, repeated.durability),
        (first.version, Durability::Store)
    );

    rig.fake.reject(|write| write.key == key("bad"));
    let first = write(&rig, named("bad", "v", Behind, "two")).await.expect("accepted");
    rig.drained().await;
    rig.fake.reject(|_| false);
    let again = write(&rig, named("bad", "v", Behind, "two")).await.expect("accepted");
    assert!(
        !again.deduplicated && again.version > first.version,
        "it was not written after all"
    );
    rig.drained().await;
    assert_eq!(rig.stored("bad"), some("v"));
}

#[tokio::test(start_paused = true)]
async fn a_repeat_of_what_is_not_in_the_store_yet_is_of_unknown_outcome() {
    let rig = rig(|_| ());
    let theirs = rig.ahead(Duration::from_millis(1));
    let request = Request {
        id: RequestId::new("one").expect("valid"),
        fingerprint: requests::fingerprint_of_write(&named("k", "v", Through, "one")),
        ends_at: rig.clock().now().after(Duration::from_secs(300)),
    };
    remembered(&rig, request, theirs).await;
    let refused = write(&rig, named("k", "v", Through, "one"))
        .await
        .expect_err("it is not there");
    assert_eq!(
        (refused.kind(), refused.outcome()),
        (ErrorKind::Unavailable, Outcome::Unknown)
    );
    rig.put_past("k", "v", theirs);
    let repeated = write(&rig, named("k", "v", Through, "one")).await.expect("it is there");
    assert!(repeated.deduplicated && repeated.version == theirs);
}

#[tokio::test(start_paused = true)]
async fn ids_that_the_store_knows_leave_room_for_those_that_it_does_not() {
    let rig = rig(|setup| setup.requests.remembered_max = one());
    for id in ["a", "b", "c"] {
        assert!(write(&rig, named(id, "v", Through, id)).await.is_ok());
    }
    assert!(write(&rig, named("k", "v", Behind, "d")).await.is_ok());
    let refused = write(&rig, named("l", "v", Behind, "e"))
        .await
        .expect_err("one is remembered");
    assert_eq!(refused.kind(), ErrorKind::Overloaded);
    assert!(write(&rig, named("l", "v", Through, "e")).await.is_ok());
}
