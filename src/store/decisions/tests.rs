//! Decisions on the store in memory, in paused time: each row of the table in the module's head, look-ups, and all at once under random faults.

use std::time::Duration;

use prometheus_client::registry::Registry;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{task::yield_now, time::sleep};

use super::*;
use crate::{
    error::ErrorKind,
    model::{Answer, Entry, Fingerprint, Request, Tags, Timestamp, Write},
    store::{
        DeadLetter, StoreErrorKind,
        fake::{Call, FakeBackend, Fault, eventually},
        operation::{Change, Refusal},
        tries::TRIES_MAX,
        watch,
    },
};

struct Rig {
    fake: FakeBackend,
    store: Store,
    clock: Arc<Clock>,
    decisions: GroupDecide,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

fn rig(connections: usize) -> Rig {
    let fake = FakeBackend::new();
    let store = fake.store();
    rig_over(fake, store, connections)
}

fn rig_over(fake: FakeBackend, store: Store, connections: usize) -> Rig {
    let config = Config {
        decide_connections: connections.try_into().expect("not zero"),
        ..Config::default()
    };
    let metrics = StoreMetrics::register(&mut Registry::default());
    let clock = Arc::new(Clock::new(0, None));
    let decisions = GroupDecide::new(store.clone(), &config, Arc::clone(&clock), metrics);
    let stop = CancellationToken::new();
    let tasks = decisions.start(&stop);
    Rig {
        fake,
        store,
        clock,
        decisions,
        stop,
        tasks,
    }
}

fn version(number: i64) -> Version {
    Version::new(number).expect("positive")
}

fn key(name: &str) -> Key {
    Key::new("orders", name).expect("valid")
}

fn request(id: &str) -> Request {
    Request {
        id: RequestId::new(id).expect("valid"),
        fingerprint: Fingerprint([0; 16]),
        ends_at: Timestamp(i64::MAX),
    }
}

fn change(name: &str, number: i64, change: Change) -> Operation {
    Operation {
        key: key(name),
        version: version(number),
        condition: None,
        change,
        request: request(&format!("{name} {number}")),
        asked_at: Timestamp(0),
        acknowledged: None,
    }
}

fn add(name: &str, number: i64) -> Operation {
    let expires_at = None;
    change(name, number, Change::Add { delta: 1, expires_at })
}

fn write(name: &str, number: i64, expires_at: Option<Timestamp>) -> Write {
    Write {
        key: key(name),
        entry: Entry {
            version: version(number),
            value: Some("1".into()),
            expires_at,
        },
        tags: Tags::default(),
        requests: Vec::new(),
    }
}

fn letter(name: &str, number: i64) -> DeadLetter {
    DeadLetter {
        write: write(name, number, None),
        code: None,
        reason: String::new(),
    }
}

fn applied(number: i64, count: i64) -> Told {
    let entry = Entry {
        version: version(number),
        value: Some(count.to_string().into()),
        expires_at: None,
    };
    let answer = answer(number, count);
    Ok(Decided::Applied { entry, answer })
}

fn answer(number: i64, count: i64) -> Answer {
    Answer {
        version: version(number),
        counter: Some(count),
        expires_at: None,
    }
}

type Told = Result<Decided, (ErrorKind, Outcome)>;

const NOT_THERE: Told = Err((ErrorKind::Unavailable, Outcome::NotApplied));

type Outcomes = JoinHandle<Result<Decided, Error>>;

async fn told(outcome: Outcomes) -> Told {
    let result = outcome.await.expect("no panic");
    result.map_err(|error| (error.kind(), error.outcome()))
}

impl Rig {
    fn decide(&self, operation: Operation) -> Outcomes {
        self.decide_within(operation, Duration::from_secs(5))
    }

    fn decide_within(&self, operation: Operation, time: Duration) -> Outcomes {
        let (decisions, deadline) = (self.decisions.clone(), Instant::now() + time);
        tokio::spawn(async move { decisions.decide(operation, deadline).await })
    }

    /// Decides several operations in one transaction, the first tries of which go wrong as the faults say.
    async fn together(&self, operations: &[Operation], faults: impl IntoIterator<Item = Fault>) -> Vec<Outcomes> {
        let (hang, release) = Fault::hang();
        self.fake.inject(Call::Decide, hang);
        let before = self.fake.calls(Call::Decide);
        let first = self.decide(add("before", 1_000 + i64::try_from(before).expect("few")));
        eventually(|| self.fake.calls(Call::Decide) > before).await;
        for fault in faults {
            self.fake.inject(Call::Decide, fault);
        }
        let waiting = operations.iter().map(|one| self.decide(one.clone())).collect();
        yield_now().await;
        release.notify_one();
        assert!(told(first).await.is_ok());
        waiting
    }
}

#[tokio::test(start_paused = true)]
async fn callers_share_a_transaction_and_a_row() {
    let rig = rig(1);
    let outcomes = rig
        .together(&[add("b", 7), add("a", 3), add("b", 5), add("b", 6)], [])
        .await;
    let mut answers = Vec::new();
    for outcome in outcomes {
        answers.push(told(outcome).await);
    }
    assert_eq!(answers, [applied(7, 3), applied(3, 1), applied(5, 1), applied(6, 2)]);
    let sent = [("a", 3), ("b", 5), ("b", 6), ("b", 7)].map(|(name, number)| (key(name), version(number)));
    assert_eq!(rig.fake.decisions()[1..], [sent.to_vec()]);
    assert_eq!(rig.fake.history(&key("b")), [version(7)], "one row, moved once");
}

#[tokio::test(start_paused = true)]
async fn an_unknown_outcome_is_settled_by_trying_again() {
    let rig = rig(1);
    // It took effect, and only the answer was lost; then the same of the next try.
    rig.fake.inject(Call::Decide, Fault::lose_reply());
    rig.fake.inject(Call::Decide, Fault::lose_reply());
    let outcome = told(rig.decide(add("a", 5))).await;
    assert_eq!(outcome, Ok(Decided::Repeated(answer(5, 1))));
    // It never arrived.
    rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Unknown));
    assert_eq!(told(rig.decide(add("a", 6))).await, applied(6, 2));
    // It never arrived, and somebody else came first: a definite answer all the same.
    let (hang, release) = Fault::hang();
    rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Unknown));
    rig.fake.inject(Call::Decide, hang);
    let outcome = rig.decide(add("a", 7));
    eventually(|| rig.fake.calls(Call::Decide) == 7).await;
    rig.fake.put(write("a", 8, None));
    release.notify_one();
    assert_eq!(told(outcome).await, Ok(Decided::Outdated { standing: version(8) }));
}

#[tokio::test(start_paused = true)]
async fn a_later_try_goes_by_its_own_time_and_still_knows_its_own_id() {
    let rig = rig(1);
    let asked_at = rig.clock.now();
    let soon = asked_at.after(Duration::from_secs(10));
    rig.fake.put(write("record", 5, Some(soon)));
    let touch = Operation {
        asked_at,
        ..change("record", 6, Change::Touch { expires_at: None })
    };
    let mut counted = Operation {
        asked_at,
        ..add("counter", 6)
    };
    counted.request.ends_at = soon;
    for (operation, first_try, wanted) in [
        // It never arrived, and by the next try there is nothing left to touch.
        (
            touch,
            Fault::fail(StoreErrorKind::Unknown),
            Decided::Refused(Refusal::Absent),
        ),
        // It took effect, within a window that is over by the next try.
        (counted, Fault::lose_reply(), Decided::Repeated(answer(6, 1))),
    ] {
        rig.fake.inject(Call::Decide, first_try);
        rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Unreachable));
        let outcome = rig.decide_within(operation, Duration::from_secs(60));
        eventually(|| rig.store.breaker().is_open()).await;
        sleep(Duration::from_secs(20)).await;
        assert!(!outcome.is_finished());
        rig.store.breaker().succeeded();
        assert_eq!(told(outcome).await, Ok(wanted));
    }
}

#[tokio::test(start_paused = true)]
async fn a_poisonous_operation_fails_alone() {
    let rig = rig(1);
    rig.fake.reject(|write| write.key.key() == "poison");
    let operations = ["a", "b", "poison", "q", "z"].map(|name| add(name, 5));
    for (name, outcome) in ["a", "b", "poison", "q", "z"]
        .iter()
        .zip(rig.together(&operations, []).await)
    {
        let wanted = match *name {
            "poison" => Err((ErrorKind::Rejected, Outcome::NotApplied)),
            _ => applied(5, 1),
        };
        assert_eq!(told(outcome).await, wanted, "{name}");
    }
    // One that refuses everything is no fault of the operation's.
    rig.fake.inject(Call::Probe, Fault::fail(StoreErrorKind::Rejected));
    assert_eq!(told(rig.decide(add("poison", 6))).await, NOT_THERE);
    // One that is open, and then rejected, may have been taken by a table that was changed meanwhile.
    rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Unknown));
    let outcome = told(rig.decide(add("poison", 7))).await;
    assert_eq!(outcome, Err((ErrorKind::Rejected, Outcome::Unknown)));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_refuses_for_now_is_tried_a_few_times() {
    let rig = rig(1);
    for _ in 1..TRIES_MAX {
        rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Transient));
    }
    assert_eq!(told(rig.decide(add("a", 5))).await, applied(5, 1));
    for _ in 0..TRIES_MAX {
        rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Transient));
    }
    assert_eq!(told(rig.decide(add("a", 6))).await, NOT_THERE);
    // What is open is tried until its deadline.
    rig.fake.inject(Call::Decide, Fault::lose_reply());
    for _ in 0..TRIES_MAX * 2 {
        rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Transient));
    }
    let outcome = told(rig.decide_within(add("a", 7), Duration::from_secs(60))).await;
    assert_eq!(outcome, Ok(Decided::Repeated(answer(7, 2))));
}

#[tokio::test(start_paused = true)]
async fn who_wants_a_held_record_waits_aside() {
    let rig = rig(1);
    rig.fake.hold(Some(key("held")));
    let operations = [add("a", 5), add("held", 5), add("held", 6), add("q", 5), add("z", 5)];
    let mut outcomes = rig.together(&operations, []).await;
    let late = rig.decide_within(add("held", 7), Duration::from_secs(2));
    for (at, outcome) in [4, 3, 0].map(|at| (at, outcomes.remove(at))) {
        assert_eq!(told(outcome).await, applied(5, 1), "{at}");
    }
    // Nobody else waits meanwhile, and whoever wants the record joins those who wait.
    let begun = Instant::now();
    for number in 6..100 {
        assert_eq!(told(rig.decide(add("a", number))).await, applied(number, number - 4));
    }
    assert!(begun.elapsed() < Duration::from_millis(1), "{:?}", begun.elapsed());
    let before = rig.fake.calls(Call::Decide);
    let shortly = rig.decide_within(add("held", 8), Duration::from_millis(10));
    assert_eq!(told(shortly).await, NOT_THERE);
    assert_eq!(rig.fake.calls(Call::Decide), before);
    // Until the deadline, however many tries that takes; and open is open.
    assert_eq!(told(late).await, NOT_THERE);
    assert!(begun.elapsed() > Duration::from_secs(1) && begun.elapsed() <= Duration::from_secs(2));
    rig.fake.inject(Call::Decide, Fault::lose_reply());
    rig.fake.hold(None);
    for (outcome, wanted) in outcomes.into_iter().zip([answer(5, 1), answer(6, 2)]) {
        assert_eq!(told(outcome).await, Ok(Decided::Repeated(wanted)));
    }
    assert_eq!(rig.fake.history(&key("held")), [version(6)], "one row, moved once");

    rig.fake.hold(Some(key("held")));
    rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Unknown));
    let outcome = told(rig.decide_within(add("held", 9), Duration::from_secs(1))).await;
    assert_eq!(outcome, Err((ErrorKind::Unavailable, Outcome::Unknown)));
    // The shutdown waits for nobody.
    let waits = rig.decide(add("held", 10));
    let before = rig.fake.calls(Call::Decide);
    eventually(|| rig.fake.calls(Call::Decide) > before).await;
    rig.stop.cancel();
    assert_eq!(told(waits).await, NOT_THERE);
    for task in rig.tasks {
        task.await.expect("no panic");
    }
}

#[tokio::test(start_paused = true)]
async fn no_more_wait_aside_than_a_batch_holds() {
    let rig = rig(1);
    rig.fake.hold(Some(key("held")));
    let callers: Vec<_> = (1..=1_500).map(|number| rig.decide(add("held", number))).collect();
    let (mut refused, mut waited) = (0, 0);
    for caller in callers {
        match told(caller).await {
            Err((ErrorKind::Overloaded, Outcome::NotApplied)) => refused += 1,
            Err((ErrorKind::Unavailable, Outcome::NotApplied)) => waited += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((refused, waited), (500, 1_000));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_is_told_at_once_to_all_that_are_not_open() {
    let rig = rig(1);
    rig.fake.down(true);
    let begun = Instant::now();
    assert_eq!(told(rig.decide(add("a", 5))).await, NOT_THERE);
    assert_eq!(told(rig.decide(add("a", 6))).await, NOT_THERE);
    assert!(begun.elapsed() < Duration::from_millis(1), "{:?}", begun.elapsed());
    rig.fake.down(false);
    rig.store.breaker().succeeded();
    // An open one waits for the store to be back.
    rig.fake.inject(Call::Decide, Fault::lose_reply());
    rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Unreachable));
    let outcome = rig.decide(add("a", 7));
    eventually(|| rig.store.breaker().is_open()).await;
    sleep(Duration::from_secs(1)).await;
    assert!(!outcome.is_finished());
    rig.store.breaker().succeeded();
    assert_eq!(told(outcome).await, Ok(Decided::Repeated(answer(7, 1))));
}

#[tokio::test(start_paused = true)]
async fn the_deadline_says_whether_it_may_take_effect() {
    let rig = rig(1);
    let (hang, release) = Fault::hang();
    rig.fake.inject(Call::Decide, hang);
    let first = rig.decide(add("a", 5));
    eventually(|| rig.fake.calls(Call::Decide) == 1).await;
    let waits = rig.decide_within(add("a", 6), Duration::from_secs(1));
    assert_eq!(told(waits).await, Err((ErrorKind::Timeout, Outcome::NotApplied)));
    release.notify_one();
    assert_eq!(told(first).await, applied(5, 1));
    rig.fake.inject(Call::Decide, Fault::lose_reply());
    rig.fake
        .script(|call| (call == Call::Decide).then(|| Fault::fail(StoreErrorKind::Transient)));
    let outcome = told(rig.decide(add("a", 7))).await;
    assert_eq!(outcome, Err((ErrorKind::Timeout, Outcome::Unknown)));
}

#[tokio::test(start_paused = true)]
async fn the_shutdown_ends_the_tasks_and_answers_everyone() {
    let rig = rig(1);
    rig.fake.inject(Call::Decide, Fault::fail(StoreErrorKind::Unknown));
    let (hang, release) = Fault::hang();
    rig.fake.inject(Call::Decide, hang);
    let runs = rig.decide(add("a", 5));
    eventually(|| rig.fake.calls(Call::Decide) == 2).await;
    let waits = rig.decide(add("b", 5));
    yield_now().await;
    rig.stop.cancel();
    release.notify_one();
    assert_eq!(told(runs).await, applied(5, 1));
    assert_eq!(told(waits).await, NOT_THERE);
    for task in rig.tasks {
        task.await.expect("no panic");
    }
    assert_eq!(rig.fake.calls(Call::Decide), 2);
}

#[tokio::test(start_paused = true)]
async fn look_ups_are_answered_and_tried_again() {
    let rig = rig(1);
    told(rig.decide(add("a", 5))).await.expect("decided");
    let deadline = Instant::now() + Duration::from_secs(60);
    let id = request("a 5").id;
    for fault in [
        Fault::default(),
        Fault::fail(StoreErrorKind::Unknown),
        Fault::fail(StoreErrorKind::Transient),
    ] {
        rig.fake.inject(Call::Answers, fault.clone());
        let found = rig.decisions.answer_of("orders", &id, deadline).await.expect("found");
        assert_eq!(found.map(|answered| answered.answer), Some(answer(5, 1)));
        rig.fake.inject(Call::AreBuried, fault);
        let buried = rig.decisions.is_buried(&key("a"), version(5), deadline).await;
        assert!(!buried.expect("looked up"));
    }
    assert_eq!(
        rig.decisions.answer_of("carts", &id, deadline).await.expect("found"),
        None
    );
    rig.store.session().bury(&letter("a", 5)).await.expect("buried");
    // What it covers went there with it.
    for (name, number, wanted) in [("a", 5, true), ("a", 4, true), ("a", 6, false), ("b", 5, false)] {
        let buried = rig.decisions.is_buried(&key(name), version(number), deadline).await;
        assert_eq!(buried.expect("looked up"), wanted, "{name} {number}");
    }
}

#[tokio::test(start_paused = true)]
async fn look_ups_of_a_batch_are_one_query_of_each_kind() {
    let rig = rig(1);
    told(rig.decide(add("a", 5))).await.expect("decided");
    rig.store.session().bury(&letter("a", 5)).await.expect("buried");
    let deadline = Instant::now() + Duration::from_secs(60);
    let (hang, release) = Fault::hang();
    rig.fake.inject(Call::AreBuried, hang);
    let is_buried = |name: &str, number| {
        let (decisions, key) = (rig.decisions.clone(), key(name));
        tokio::spawn(async move { decisions.is_buried(&key, version(number), deadline).await })
    };
    let first = is_buried("a", 5);
    eventually(|| rig.fake.calls(Call::AreBuried) == 1).await;
    let (mut buried, mut answers) = (vec![(first, true)], Vec::new());
    for (name, number, is_there) in [("a", 6, false), ("b", 5, false), ("a", 4, true), ("a", 5, true)] {
        buried.push((is_buried(name, number), is_there));
        let (decisions, id) = (rig.decisions.clone(), request(&format!("{name} {number}")).id);
        let answer = tokio::spawn(async move { decisions.answer_of("orders", &id, deadline).await });
        answers.push((answer, (name, number) == ("a", 5)));
    }
    yield_now().await;
    release.notify_one();
    for (told, wanted) in buried {
        assert_eq!(told.await.expect("no panic").expect("looked up"), wanted);
    }
    for (told, wanted) in answers {
        assert_eq!(told.await.expect("no panic").expect("found").is_some(), wanted);
    }
    assert_eq!(
        [Call::AreBuried, Call::Answers].map(|call| rig.fake.calls(call)),
        [2, 1]
    );
}

#[tokio::test(start_paused = true)]
async fn look_ups_at_once_are_each_told_their_own_and_a_failing_store_ends_none() {
    let rig = rig(1);
    told(rig.decide(add("a", 5))).await.expect("decided");
    let deadline = Instant::now() + Duration::from_secs(60);
    let id = request("a 5").id;
    let (hang, release) = Fault::hang();
    rig.fake.inject(Call::Answers, hang);
    let answers = ["a 5", "b 5", "a 5"].map(|id| {
        let (decisions, id) = (rig.decisions.clone(), request(id).id);
        tokio::spawn(async move { decisions.answer_of("orders", &id, deadline).await })
    });
    release.notify_one();
    for (answered, wanted) in answers.into_iter().zip([true, false, true]) {
        let found = answered.await.expect("no panic").expect("found");
        assert_eq!(found.is_some(), wanted);
    }
    for kind in [
        StoreErrorKind::Transient,
        StoreErrorKind::Unknown,
        StoreErrorKind::Unreachable,
    ] {
        rig.fake.script(move |_| Some(Fault::fail(kind)));
        let error = rig
            .decisions
            .answer_of("orders", &id, deadline)
            .await
            .expect_err("refused");
        assert_eq!(
            (error.kind(), error.outcome()),
            (ErrorKind::Unavailable, Outcome::NotApplied)
        );
        rig.store.breaker().succeeded();
    }
}

fn random_faults(seed: u64) -> impl FnMut(Call) -> Option<Fault> + Send + 'static {
    let mut rng = StdRng::seed_from_u64(seed);
    move |_| match rng.random_range(0..20) {
        0 => Some(Fault::fail(StoreErrorKind::Unknown)),
        1 | 2 => Some(Fault::lose_reply()),
        3 => Some(Fault::fail(StoreErrorKind::Transient)),
        4 => Some(Fault::fail(StoreErrorKind::Unreachable)),
        5 => Some(Fault::delay(Duration::from_millis(rng.random_range(1..400)))),
        6 => Some(Fault::lose_reply().after(Duration::from_millis(rng.random_range(1..300)))),
        _ => None,
    }
}

/// What each caller is told is true, and each addition is counted once, whatever goes wrong.
#[tokio::test(start_paused = true)]
async fn every_addition_is_counted_once_under_random_faults() {
    let (mut counted, mut refused, mut unknown) = (0, 0, 0);
    for seed in 0..30 {
        let fake = FakeBackend::new();
        let store = Store::new(Arc::new(fake.clone()), Arc::default(), Duration::from_millis(200));
        let rig = rig_over(fake, store, 3);
        let watch = watch::start(rig.store.clone(), &rig.stop);
        rig.fake.script(random_faults(seed));
        let callers: Vec<_> = (0..100)
            .map(|number| {
                let mut rng = StdRng::seed_from_u64(seed << 32 | number);
                let decisions = rig.decisions.clone();
                tokio::spawn(async move {
                    sleep(Duration::from_millis(rng.random_range(0..3_000))).await;
                    let number = i64::try_from(number).expect("few") + 1;
                    let mut operation = add(["a", "b"][rng.random_range(0..2)], number);
                    let deadline = Instant::now() + Duration::from_millis(rng.random_range(1..2_000));
                    let told = loop {
                        let told = decisions.decide(operation.clone(), deadline).await;
                        match told {
                            Ok(Decided::Outdated { standing }) => operation.version = version(standing.get() + 1),
                            told => break told,
                        }
                    };
                    (operation, told)
                })
            })
            .collect();
        let mut ended = Vec::new();
        for caller in callers {
            ended.push(caller.await.expect("no panic"));
        }
        // What was cut off has long ended: the store in memory has no transactions that linger.
        let mut sums = [0i64; 2];
        for (operation, told) in ended {
            let remembered = rig.fake.answer_of("orders", &operation.request.id);
            match told {
                Ok(Decided::Applied { answer, .. } | Decided::Repeated(answer)) => {
                    assert_eq!(
                        remembered.as_ref().map(|known| known.answer),
                        Some(answer),
                        "seed {seed}"
                    );
                    counted += 1;
                }
                Ok(other) => panic!("{other:?}"),
                Err(error) if error.outcome() == Outcome::NotApplied => {
                    assert_eq!(remembered, None, "seed {seed}: {error}");
                    refused += 1;
                }
                Err(_) => unknown += 1,
            }
            if remembered.is_some() {
                sums[usize::from(operation.key.key() == "b")] += 1;
            }
        }
        for (name, sum) in ["a", "b"].iter().zip(sums) {
            let value = rig.fake.entry(&key(name)).and_then(|entry| entry.value);
            assert_eq!(value.unwrap_or("0".into()), sum.to_string().as_bytes(), "seed {seed}");
        }
        rig.stop.cancel();
        for task in rig.tasks {
            task.await.expect("no panic");
        }
        watch.await.expect("no panic");
    }
    assert!(
        counted > 100 && refused > 10 && unknown > 10,
        "{counted} {refused} {unknown}"
    );
}
