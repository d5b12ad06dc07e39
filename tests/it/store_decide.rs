//! What every store must do about what it decides, and about what it remembers of requests, run against the real PostgreSQL and the real SQLite.
//!
//! Owns the contract of `Connection::decide`, `remember`, `answers`, `forget_requests` and `are_buried`, and of the requests that commits and dead
//! letters carry. What breaks the way to PostgreSQL in the middle of a decision is in `store_decide_cut.rs`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use prometheus_client::registry::Registry;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tidegate::{
    clock::Clock,
    error::{ErrorKind, Outcome},
    model::{
        Answer, Answered, Condition, Entry, Fingerprint, Key, KeyedAnswer, Request, RequestId, Tags, Timestamp, Version,
    },
    store::{
        Committed, Config, Connection, DeadLetter, StoreError, StoreErrorKind,
        decisions::GroupDecide,
        operation::{Change, Decided, Operation, Refusal},
    },
    telemetry::StoreMetrics,
};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::store_contract::{Fixture, commit, contract, entry, key, kind, load, now, take_steps, version, write};

/// How long ids are remembered here.
const WINDOW_MILLIS: i64 = 600_000;

pub fn request(id: &str) -> Request {
    Request {
        id: RequestId::new(id).expect("valid"),
        fingerprint: Fingerprint([7; 16]),
        ends_at: Timestamp(now() + WINDOW_MILLIS),
    }
}

fn made_up() -> Request {
    Request {
        id: RequestId::made_up(),
        ..request("made up")
    }
}

/// An operation under a request id that nobody else has.
pub fn operation(name: &str, number: i64, change: Change) -> Operation {
    Operation {
        key: key("orders", name),
        version: version(number),
        condition: None,
        change,
        request: made_up(),
        asked_at: Timestamp(now()),
        acknowledged: None,
    }
}

pub fn put(name: &str, number: i64, value: &str, condition: Option<Condition>) -> Operation {
    let change = Change::Put {
        value: Bytes::copy_from_slice(value.as_bytes()),
        tags: Tags::default(),
        expires_at: None,
    };
    Operation {
        condition,
        ..operation(name, number, change)
    }
}

pub fn add(name: &str, number: i64, delta: i64) -> Operation {
    let expires_at = None;
    operation(name, number, Change::Add { delta, expires_at })
}

pub fn named(id: &str, operation: Operation) -> Operation {
    Operation {
        request: request(id),
        ..operation
    }
}

pub async fn decide(connection: &mut dyn Connection, operation: Operation) -> Decided {
    let decided = decide_patiently(connection, &[operation])
        .await
        .expect("the store decides");
    decided.into_iter().next().expect("one for each operation")
}

/// Decides, again for as long as somebody else holds what is wanted.
pub async fn decide_patiently(
    connection: &mut dyn Connection,
    operations: &[Operation],
) -> Result<Vec<Decided>, StoreError> {
    loop {
        match connection.decide(operations, Timestamp(now())).await {
            Err(error) if error.code.as_deref() == Some("55P03") => {}
            decided => return decided,
        }
    }
}

/// The same, tried again while the store refuses for a reason that passes: a deadlock, in which this one was the victim.
async fn decide_all(connection: &mut dyn Connection, operations: &[Operation]) -> Vec<Decided> {
    loop {
        match connection.decide(operations, Timestamp(now())).await {
            Ok(decided) => return decided,
            Err(error) => assert_eq!(error.kind, StoreErrorKind::Transient, "{error}"),
        }
    }
}

pub fn answer(number: i64, counter: Option<i64>) -> Answer {
    Answer {
        version: version(number),
        counter,
        expires_at: None,
    }
}

fn applied(entry: Entry, counter: Option<i64>) -> Decided {
    let answer = Answer {
        version: entry.version,
        counter,
        expires_at: entry.expires_at,
    };
    Decided::Applied { entry, answer }
}

fn conflict(standing: Option<i64>) -> Decided {
    let standing = standing.map(version);
    Decided::Refused(Refusal::Conflict { standing })
}

async fn conditions_are_decided_by_what_stands(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let (absent, present) = (Some(Condition::Absent), Some(Condition::Present));
    let equals = |number| Some(Condition::Version(version(number)));
    let mut expired = write("expired", 5, Some("v"));
    expired.entry.expires_at = Some(Timestamp(now() - 1));
    let before = vec![write("live", 5, Some("v")), write("deleted", 5, None), expired];
    commit(connection, before).await;

    for (name, condition, wanted) in [
        ("never", present, Decided::Refused(Refusal::Absent)),
        ("never", equals(5), conflict(None)),
        ("deleted", present, Decided::Refused(Refusal::Absent)),
        ("deleted", equals(5), conflict(None)),
        ("expired", present, Decided::Refused(Refusal::Absent)),
        ("expired", equals(5), conflict(None)),
        ("live", absent, conflict(Some(5))),
        ("live", equals(4), conflict(Some(5))),
        ("live", equals(6), conflict(Some(5))),
    ] {
        let decided = decide(connection, put(name, 9, "other", condition)).await;
        assert_eq!(decided, wanted, "{name} {condition:?}");
    }
    assert_eq!(load(connection, &key("orders", "never")).await, None);
    assert_eq!(
        load(connection, &key("orders", "live")).await,
        Some(entry(5, Some("v")))
    );

    for (name, condition) in [
        ("never", absent),
        ("deleted", absent),
        ("expired", absent),
        ("live", equals(5)),
    ] {
        let decided = decide(connection, put(name, 9, "new", condition)).await;
        assert_eq!(decided, applied(entry(9, Some("new")), None), "{name}");
        assert_eq!(
            load(connection, &key("orders", name)).await,
            Some(entry(9, Some("new")))
        );
    }
    let delete = Operation {
        condition: present,
        ..operation("live", 10, Change::Delete)
    };
    assert_eq!(decide(connection, delete).await, applied(entry(10, None), None));
    // A version that does not rise is refused, whatever stands, and may be stamped anew.
    for (name, number, standing) in [("never", 9, 9), ("never", 8, 9), ("live", 10, 10)] {
        let standing = version(standing);
        let decided = decide(connection, put(name, number, "late", None)).await;
        assert_eq!(decided, Decided::Outdated { standing }, "{name}");
    }
}

async fn a_touch_keeps_the_value_and_the_tags(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let mut before = write("one", 5, Some("value"));
    before.tags = Tags::new(&["a \"b\" \\ c", "{}", "é", "NULL"]).expect("valid");
    commit(connection, vec![before.clone(), write("gone", 5, None)]).await;
    let expires_at = Some(Timestamp(now() + 60_000));
    let touch = |name, number, expires_at| operation(name, number, Change::Touch { expires_at });
    let touched = Entry {
        expires_at,
        ..entry(6, Some("value"))
    };
    let decided = decide(connection, touch("one", 6, expires_at)).await;
    assert_eq!(decided, applied(touched.clone(), None));
    assert_eq!(load(connection, &before.key).await, Some(touched));
    for tag in before.tags.iter() {
        let tagged = connection.tagged("orders", tag, None, 9).await.expect("found");
        assert_eq!(tagged, [before.key.clone()], "{tag}");
    }
    let decided = decide(connection, touch("one", 7, None)).await;
    assert_eq!(decided, applied(entry(7, Some("value")), None));
    for name in ["gone", "never"] {
        let decided = decide(connection, touch(name, 9, None)).await;
        assert_eq!(decided, Decided::Refused(Refusal::Absent), "{name}");
    }
    // What is deleted or put by a decision has no tags of before.
    decide(connection, put("one", 8, "other", None)).await;
    let tagged = connection.tagged("orders", "é", None, 9).await.expect("found");
    assert_eq!(tagged, []);
}

async fn a_counter_counts_and_nothing_else_does(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let expires_at = Some(Timestamp(now() + 60_000));
    let mut tagged = write("tagged", 5, Some("-7"));
    tagged.tags = Tags::new(&["counters"]).expect("valid");
    tagged.entry.expires_at = expires_at;
    commit(connection, vec![tagged.clone()]).await;
    // One that is there keeps its expiry and its tags; one that is created gets the operation's.
    let longer = Some(Timestamp(now() + 600_000));
    let change = |delta| Change::Add {
        delta,
        expires_at: longer,
    };
    let counted = |number, count: i64, expires_at| {
        let entry = Entry {
            expires_at,
            ..entry(number, Some(&count.to_string()))
        };
        applied(entry, Some(count))
    };
    let decided = decide(connection, operation("tagged", 6, change(17))).await;
    assert_eq!(decided, counted(6, 10, expires_at));
    let found = connection.tagged("orders", "counters", None, 9).await.expect("found");
    assert_eq!(found, [tagged.key]);
    let decided = decide(connection, operation("created", 6, change(-3))).await;
    assert_eq!(decided, counted(6, -3, longer));

    let extremes = [("max", i64::MAX, 1), ("min", i64::MIN, -1)];
    for (name, count, beyond) in extremes {
        let decided = decide(connection, add(name, 5, count)).await;
        assert_eq!(decided, counted(5, count, None), "{name}");
        let decided = decide(connection, add(name, 6, beyond)).await;
        assert_eq!(decided, Decided::Refused(Refusal::OutOfRange), "{name}");
    }
    for (n, text) in ["", "+1", "01", " 1", "1.0", "-0", "9223372036854775808", "one"]
        .iter()
        .enumerate()
    {
        let name = format!("text{n}");
        commit(connection, vec![write(&name, 5, Some(text))]).await;
        let decided = decide(connection, add(&name, 6, 1)).await;
        assert_eq!(decided, Decided::Refused(Refusal::NotACounter), "{text}");
        assert_eq!(
            load(connection, &key("orders", &name)).await,
            Some(entry(5, Some(text)))
        );
    }
}

async fn operations_of_one_key_see_each_other_within_a_transaction(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let operations = [
        put("a", 5, "1", Some(Condition::Absent)),
        add("a", 6, 1),
        put("a", 7, "never", Some(Condition::Version(version(5)))),
        add("a", 8, 1),
        add("b", 5, 1),
        operation("b", 6, Change::Delete),
        put("c", 5, "never", Some(Condition::Present)),
    ];
    let decided = connection.decide(&operations, Timestamp(now())).await.expect("decided");
    assert_eq!(
        decided,
        [
            applied(entry(5, Some("1")), None),
            applied(entry(6, Some("2")), Some(2)),
            conflict(Some(6)),
            applied(entry(8, Some("3")), Some(3)),
            applied(entry(5, Some("1")), Some(1)),
            applied(entry(6, None), None),
            Decided::Refused(Refusal::Absent),
        ]
    );
    assert_eq!(load(connection, &key("orders", "a")).await, Some(entry(8, Some("3"))));
    assert_eq!(load(connection, &key("orders", "b")).await, Some(entry(6, None)));
    // The same once more: what was applied is known, and what was not is decided anew.
    let again = connection.decide(&operations, Timestamp(now())).await.expect("decided");
    assert_eq!(
        again,
        [
            Decided::Repeated(answer(5, None)),
            Decided::Repeated(answer(6, Some(2))),
            conflict(Some(8)),
            Decided::Repeated(answer(8, Some(3))),
            Decided::Repeated(answer(5, Some(1))),
            Decided::Repeated(answer(6, None)),
            Decided::Refused(Refusal::Absent),
        ]
    );
    // Large ones are one transaction, too.
    let many: Vec<Operation> = (0..1_000).map(|n| add(&format!("n{n:04}"), 5, n)).collect();
    let decided = connection.decide(&many, Timestamp(now())).await.expect("decided");
    assert!(decided.iter().all(|decided| matches!(decided, Decided::Applied { .. })));
    let decided = connection.decide(&many, Timestamp(now())).await.expect("decided");
    assert!(decided.iter().all(|decided| matches!(decided, Decided::Repeated(_))));
    assert_eq!(
        connection
            .decide(&[], Timestamp(now()))
            .await
            .expect("nothing to decide"),
        []
    );
}

async fn a_request_is_applied_once(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let first = named("id", add("one", 5, 10));
    assert_eq!(
        decide(connection, first.clone()).await,
        applied(entry(5, Some("10")), Some(10))
    );
    decide(connection, add("one", 6, 1)).await;
    // Under another version, as its caller's next try has it, and over whatever stands by now.
    let again = Operation {
        version: version(9),
        ..first.clone()
    };
    assert_eq!(
        decide(connection, again.clone()).await,
        Decided::Repeated(answer(5, Some(10)))
    );
    // Even where nothing could be decided yet.
    let behind = Operation {
        acknowledged: Some(version(100)),
        ..again.clone()
    };
    assert_eq!(decide(connection, behind).await, Decided::Repeated(answer(5, Some(10))));
    let mut other = again.clone();
    other.request.fingerprint = Fingerprint([8; 16]);
    assert_eq!(decide(connection, other).await, Decided::Reused);
    // An id is its namespace's.
    let elsewhere = Operation {
        key: key("carts", "one"),
        ..again.clone()
    };
    assert_eq!(
        decide(connection, elsewhere).await,
        applied(entry(9, Some("10")), Some(10))
    );
    assert_eq!(
        load(connection, &key("orders", "one")).await,
        Some(entry(6, Some("11")))
    );
    // Once its window is over it is as new.
    let mut later = again;
    later.asked_at = Timestamp(first.request.ends_at.0 + 1);
    later.request.ends_at = Timestamp(later.asked_at.0 + WINDOW_MILLIS);
    assert_eq!(
        decide(connection, later.clone()).await,
        applied(entry(9, Some("21")), Some(21))
    );
    assert_eq!(decide(connection, later).await, Decided::Repeated(answer(9, Some(21))));
    // Several of one id at once: by version, the first is applied.
    let mut twice = [named("twice", add("two", 5, 1)), named("twice", add("two", 6, 1))];
    twice[1].request.fingerprint = twice[0].request.fingerprint;
    let decided = connection.decide(&twice, Timestamp(now())).await.expect("decided");
    assert_eq!(
        decided,
        [
            applied(entry(5, Some("1")), Some(1)),
            Decided::Repeated(answer(5, Some(1)))
        ]
    );
}

async fn what_is_not_there_yet_is_waited_for_by_the_caller(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    commit(connection, vec![write("one", 5, Some("1"))]).await;
    for (name, acknowledged, behind) in [("one", 6, true), ("one", 5, false), ("never", 1, true)] {
        let operation = Operation {
            acknowledged: Some(version(acknowledged)),
            ..add(name, 9, 1)
        };
        let decided = decide(connection, operation).await;
        assert_eq!(decided == Decided::Behind, behind, "{name} {acknowledged}: {decided:?}");
    }
    // What was collected has been there.
    fixture
        .execute(
            "update tidegate_control set gc_horizon = 20",
            "update tidegate_control set gc_horizon = 20",
        )
        .await;
    let late = Operation {
        acknowledged: Some(version(20)),
        ..add("never", 20, 1)
    };
    let horizon = Decided::Outdated { standing: version(20) };
    assert_eq!(decide(connection, late.clone()).await, horizon);
    let stamped_anew = Operation {
        version: version(21),
        ..late
    };
    assert_eq!(
        decide(connection, stamped_anew).await,
        applied(entry(21, Some("1")), Some(1))
    );
}

async fn concurrent_additions_add_up(fixture: Fixture) {
    const ROUNDS: i64 = 25;
    let stamps = Arc::new(AtomicI64::new(1));
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (mut connection, stamps) = (fixture.connection(), Arc::clone(&stamps));
            tokio::spawn(async move {
                let mut sum = 0;
                for round in 0..ROUNDS {
                    let mut operation = add("counter", 1, round);
                    loop {
                        operation.version = version(stamps.fetch_add(1, Ordering::Relaxed));
                        match decide(&mut *connection, operation.clone()).await {
                            Decided::Applied { .. } => break,
                            Decided::Outdated { .. } => {}
                            other => panic!("{other:?}"),
                        }
                    }
                    sum += round;
                }
                sum
            })
        })
        .collect();
    let mut sum = 0;
    for task in tasks {
        sum += task.await.expect("no error");
    }
    let standing = load(&mut *fixture.connection(), &key("orders", "counter")).await;
    let value = standing.and_then(|entry| entry.value);
    assert_eq!(value, Some(sum.to_string().into()));
}

async fn of_many_who_want_a_key_to_be_absent_one_wins(fixture: Fixture) {
    const KEYS: usize = 12;
    let tasks: Vec<_> = (1..=6)
        .map(|number| {
            let mut connection = fixture.connection();
            tokio::spawn(async move {
                let mut won = Vec::new();
                for n in 0..KEYS {
                    let name = format!("key{n}");
                    let decided = decide(&mut *connection, put(&name, number, "v", Some(Condition::Absent))).await;
                    match decided {
                        Decided::Applied { .. } => won.push(n),
                        Decided::Refused(Refusal::Conflict { standing: Some(_) }) => {}
                        other => panic!("{other:?}"),
                    }
                }
                won
            })
        })
        .collect();
    let mut winners = Vec::new();
    for task in tasks {
        winners.extend(task.await.expect("no error"));
    }
    winners.sort_unstable();
    assert_eq!(winners, (0..KEYS).collect::<Vec<_>>());
}

/// Between the version that an operation wants to stand and its own, nothing may be written.
async fn a_condition_holds_against_plain_commits(fixture: Fixture) {
    const KEYS: i64 = 12;
    const ROUNDS: usize = 60;
    let stamps = Arc::new(AtomicI64::new(1));
    let committers = (0..3).map(|_| {
        let (mut connection, stamps) = (fixture.connection(), Arc::clone(&stamps));
        tokio::spawn(async move {
            let mut written = Vec::new();
            for round in 0..ROUNDS {
                let name = format!("key{}", round as i64 % KEYS);
                let number = stamps.fetch_add(1, Ordering::Relaxed);
                let value = (round % 7 != 0).then_some("plain");
                if commit(&mut *connection, vec![write(&name, number, value)]).await == [Committed::Applied] {
                    written.push((name, number, None));
                }
            }
            written
        })
    });
    let deciders = (0..3).map(|_| {
        let (mut connection, stamps) = (fixture.connection(), Arc::clone(&stamps));
        tokio::spawn(async move {
            let mut written = Vec::new();
            for round in 0..ROUNDS {
                let name = format!("key{}", round as i64 % KEYS);
                // Until it holds: the others end, so it does at last.
                loop {
                    let seen = load(&mut *connection, &key("orders", &name)).await;
                    let live = seen.filter(|entry| entry.value.is_some()).map(|entry| entry.version);
                    let condition = live.map_or(Condition::Absent, Condition::Version);
                    let number = stamps.fetch_add(1, Ordering::Relaxed);
                    let decided = decide(&mut *connection, put(&name, number, "decided", Some(condition))).await;
                    if matches!(decided, Decided::Applied { .. }) {
                        written.push((name, number, live.map(Version::get)));
                        break;
                    }
                }
            }
            written
        })
    });
    let mut written = Vec::new();
    for task in committers.chain(deciders).collect::<Vec<_>>() {
        written.extend(task.await.expect("no error"));
    }
    for (name, number, seen) in &written {
        let Some(seen) = seen else { continue };
        let between = written
            .iter()
            .find(|(other, version, _)| other == name && (seen + 1..*number).contains(version));
        assert_eq!(between, None, "{number} of {name} was to follow {seen}");
    }
    let highest: BTreeMap<&String, i64> = written.iter().fold(BTreeMap::new(), |mut highest, (name, number, _)| {
        let most = highest.entry(name).or_insert(*number);
        *most = (*most).max(*number);
        highest
    });
    for (name, number) in highest {
        let standing = load(&mut *fixture.connection(), &key("orders", name)).await;
        assert_eq!(standing.map(|entry| entry.version.get()), Some(number), "{name}");
    }
}

async fn transactions_that_overlap_in_every_way_come_to_an_end(fixture: Fixture) {
    const KEYS: i64 = 24;
    const ROUNDS: i64 = 6;
    let tasks: Vec<_> = (0..4)
        .map(|task| {
            let mut connection = fixture.connection();
            tokio::spawn(async move {
                let mut counted = vec![0; KEYS as usize];
                for round in 0..ROUNDS {
                    // New rows and known ones; counters, and records that plain commits write at the same time, new ones too.
                    let number = 10 * round + task + 1;
                    let name = |n: i64| format!("{n:03}");
                    let is_record = |n: &i64| n % 3 == 2;
                    let there = 0..KEYS.min((round + 1) * 6);
                    let mine = there.clone().filter(|n| n % 4 != task);
                    let operations: Vec<Operation> = mine
                        .map(|n| {
                            let operation = if is_record(&n) {
                                put(&name(n), number, "decided", None)
                            } else {
                                add(&name(n), number, 1)
                            };
                            named(&format!("{task} {round} {n}"), operation)
                        })
                        .collect();
                    for (operation, decided) in operations.iter().zip(decide_all(&mut *connection, &operations).await) {
                        let n: usize = operation.key.key().parse().expect("a number");
                        match decided {
                            Decided::Applied { .. } => counted[n] += 1,
                            Decided::Outdated { .. } => {}
                            other => panic!("{other:?}"),
                        }
                    }
                    let records = there.filter(is_record);
                    let plain: Vec<_> = records.map(|n| write(&name(n), number + 4, Some("plain"))).collect();
                    while let Err(error) = connection.commit(&plain).await {
                        assert_eq!(error.kind, StoreErrorKind::Transient, "{error}");
                    }
                }
                counted
            })
        })
        .collect();
    let mut counted = vec![0; KEYS as usize];
    for task in tasks {
        for (sum, count) in counted.iter_mut().zip(task.await.expect("no error")) {
            *sum += count;
        }
    }
    for (n, count) in counted.into_iter().enumerate().filter(|(n, _)| n % 3 != 2) {
        let standing = load(&mut *fixture.connection(), &key("orders", &format!("{n:03}"))).await;
        assert_eq!(
            standing.and_then(|entry| entry.value),
            Some(count.to_string().into()),
            "{n}"
        );
    }
}

async fn a_rejected_operation_takes_its_whole_transaction_along(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    commit(connection, vec![write("b", 1, Some("v"))]).await;
    fixture.refuse_poison().await;
    let batch = [put("a", 5, "fine", None), put("c", 5, "poison", None)];
    assert_eq!(
        kind(connection.decide(&batch, Timestamp(now())).await),
        StoreErrorKind::Rejected
    );
    assert_eq!(load(connection, &key("orders", "a")).await, None);
    assert_eq!(
        decide(connection, batch[0].clone()).await,
        applied(entry(5, Some("fine")), None)
    );
    connection.probe().await.expect("the table takes rows");
}

async fn a_write_that_the_table_swallows_is_rejected(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    commit(connection, vec![write("swallowed", 1, Some("v"))]).await;
    fixture
        .execute(
            "create function swallow() returns trigger language plpgsql as 'begin return null; end';
             create trigger swallow before insert or update on tidegate_entries
                 for each row when (new.key like 'swallowed%') execute function swallow()",
            "create trigger swallow before insert on tidegate_entries when new.key like 'swallowed%'
             begin select raise(ignore); end",
        )
        .await;
    for name in ["swallowed", "swallowed too"] {
        let swallowed = put(name, 5, "v", None);
        assert_eq!(
            kind(
                connection
                    .decide(std::slice::from_ref(&swallowed), Timestamp(now()))
                    .await
            ),
            StoreErrorKind::Rejected
        );
        let remembered = connection.answers(&[("orders", &swallowed.request.id)]).await;
        assert_eq!(remembered.expect("answers"), [None]);
    }
    assert_eq!(
        decide(connection, put("other", 5, "v", None)).await,
        applied(entry(5, Some("v")), None)
    );
}

fn answered(id: &str, number: i64) -> Answered {
    Answered {
        request: request(id),
        answer: answer(number, None),
    }
}

async fn answers(connection: &mut dyn Connection, ids: &[&str]) -> Vec<Option<Answered>> {
    let ids: Vec<RequestId> = ids.iter().map(|id| RequestId::new(id).expect("valid")).collect();
    let names: Vec<(&str, &RequestId)> = ids.iter().map(|id| ("orders", id)).collect();
    connection.answers(&names).await.expect("answers")
}

async fn a_commit_remembers_what_its_writes_answer(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let mut taken = write("a", 5, Some("v"));
    let (own, coalesced) = (answered("own", 5), answered("coalesced", 4));
    taken.requests = vec![own.clone(), coalesced.clone()];
    let mut late = write("b", 5, Some("v"));
    late.requests = vec![answered("late", 5)];
    commit(connection, vec![write("b", 9, None)]).await;
    let committed = commit(connection, vec![taken.clone(), late.clone(), write("c", 5, None)]).await;
    let superseded = Committed::Superseded { standing: version(9) };
    assert_eq!(committed, [Committed::Applied, superseded, Committed::Applied]);
    let found = answers(connection, &["own", "unknown", "late", "coalesced"]).await;
    let wanted = [Some(own.clone()), None, Some(late.requests[0].clone()), Some(coalesced)];
    assert_eq!(found, wanted);
    // Applied once more, and by an operation: what is known stays.
    let mut again = taken.clone();
    again.entry.version = version(6);
    again.requests[0].answer.version = version(6);
    assert_eq!(commit(connection, vec![again.clone()]).await, [Committed::Applied]);
    assert_eq!(answers(connection, &["own"]).await, [Some(own.clone())]);
    let operation = named("own", add("d", 7, 1));
    assert_eq!(decide(connection, operation).await, Decided::Repeated(answer(5, None)));
    // Unless its window is over.
    let mut over = answered("over", 7);
    over.request.ends_at = Timestamp(now() - 1_000);
    for (number, request) in [(7, &over), (8, &answered("over", 8))] {
        let mut write = write("e", number, Some("v"));
        write.requests = vec![request.clone()];
        commit(connection, vec![write]).await;
        assert_eq!(answers(connection, &["over"]).await, [Some(request.clone())]);
    }
    // Twice in one batch, as when an id was taken again after its window, and nothing was drained meanwhile.
    let mut twice = [write("f", 10, Some("v")), write("g", 11, Some("v"))];
    twice[0].requests = vec![answered("twice", 10)];
    twice[1].requests = vec![answered("twice", 11)];
    commit(connection, twice.to_vec()).await;
    assert_eq!(
        answers(connection, &["twice"]).await,
        [Some(twice[1].requests[0].clone())]
    );
    // What is rejected leaves nothing.
    fixture.refuse_poison().await;
    let mut poison = write("h", 1, Some("poison"));
    poison.requests = vec![answered("poison", 1)];
    assert_eq!(kind(connection.commit(&[poison]).await), StoreErrorKind::Rejected);
    assert_eq!(answers(connection, &["poison"]).await, [None]);
}

async fn a_dead_letter_answers_nothing_and_is_found(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let mut write = write("a", 5, Some("v"));
    write.requests = vec![answered("id", 5)];
    let letter = DeadLetter {
        write,
        code: None,
        reason: "no".to_owned(),
    };
    let one = &letter.write.key;
    assert!(!is_buried(connection, one, 5).await);
    for _ in 0..2 {
        connection.bury(&letter).await.expect("buried");
    }
    // What was not written is not remembered.
    assert_eq!(answers(connection, &["id"]).await, [None]);
    for (other, number, buried) in [
        (one.clone(), 5, true),
        // The one that it covers went there with it.
        (one.clone(), 4, true),
        (one.clone(), 6, false),
        (key("orders", "b"), 5, false),
        (key("carts", "a"), 5, false),
    ] {
        assert_eq!(
            is_buried(connection, &other, number).await,
            buried,
            "{other:?} {number}"
        );
    }
    // Many at once, each told its own.
    let keys: Vec<_> = (0..700).map(|n| key("orders", ["a", "b"][n % 2])).collect();
    let writes: Vec<_> = keys.iter().zip((1..7).cycle().map(version)).collect();
    let wanted = writes.iter().map(|(key, number)| *key == one && *number <= version(5));
    let looked = connection.are_buried(&writes).await.expect("looks");
    assert_eq!(looked, wanted.collect::<Vec<_>>());
    assert!(
        connection
            .are_buried(&[])
            .await
            .expect("nothing to look for")
            .is_empty()
    );
}

async fn is_buried(connection: &mut dyn Connection, key: &Key, number: i64) -> bool {
    let buried = connection.are_buried(&[(key, version(number))]).await;
    buried.expect("looks")[0]
}

async fn what_has_expired_is_judged_by_the_time_of_the_try(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let asked_at = now();
    let mut standing = write("one", 5, Some("v"));
    standing.entry.expires_at = Some(Timestamp(asked_at + 10_000));
    commit(connection, vec![standing]).await;
    let mut first = put("one", 6, "new", Some(Condition::Absent));
    first.asked_at = Timestamp(asked_at);
    first.request.ends_at = Timestamp(asked_at + 10_000);
    let try_at = |millis| Timestamp(asked_at + millis);
    let tries = [
        (9_999, conflict(Some(5))),
        (10_000, applied(entry(6, Some("new")), None)),
        // Its id is known to it however late the try is.
        (50_000, Decided::Repeated(answer(6, None))),
    ];
    for (millis, wanted) in tries {
        let decided = connection.decide(std::slice::from_ref(&first), try_at(millis)).await;
        assert_eq!(decided.expect("decided"), [wanted], "{millis}");
    }
    // One that asks after the window is another.
    let second = Operation {
        asked_at: try_at(10_001),
        ..first
    };
    let decided = connection.decide(&[second], try_at(50_000)).await;
    assert_eq!(decided.expect("decided"), [conflict(Some(6))]);
}

async fn what_is_remembered_comes_back_as_it_was(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let keyed = |id: &str, answer: Answer| KeyedAnswer {
        key: key("orders", "any"),
        answered: Answered {
            request: Request {
                fingerprint: Fingerprint([0, 255, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]),
                ..request(id)
            },
            answer,
        },
    };
    let longest = "é".repeat(32);
    let expiring = Answer {
        expires_at: Some(Timestamp(1_700_000_000_123)),
        ..answer(i64::MAX, Some(i64::MIN))
    };
    let remembered = [
        keyed("'; drop table tidegate_requests; --", answer(1, None)),
        keyed("{\"a\",NULL}", expiring),
        keyed(&longest, answer(2, Some(0))),
        keyed("a", answer(3, None)),
        keyed("A", answer(4, None)),
    ];
    connection.remember(&remembered).await.expect("remembered");
    connection.remember(&[]).await.expect("nothing to remember");
    let other = [keyed("a", answer(9, None))];
    connection.remember(&other).await.expect("known already");
    for KeyedAnswer { answered, .. } in &remembered {
        let id = &answered.request.id;
        let found = connection.answers(&[("orders", id), ("carts", id)]).await;
        assert_eq!(found.expect("answers"), [Some(answered.clone()), None]);
    }
    assert_eq!(connection.answers(&[]).await.expect("nothing to answer"), []);
    let many: Vec<KeyedAnswer> = (0..700).map(|n| keyed(&format!("n{n}"), answer(5, None))).collect();
    connection.remember(&many).await.expect("remembered");
    let names: Vec<(&str, &RequestId)> = many
        .iter()
        .map(|keyed| ("orders", &keyed.answered.request.id))
        .collect();
    let found = connection.answers(&names).await.expect("answers");
    assert!(
        found
            .iter()
            .zip(&many)
            .all(|(found, keyed)| found.as_ref() == Some(&keyed.answered))
    );
}

async fn what_is_over_is_forgotten_in_steps(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let keyed = |n: i64, ends_at: i64| {
        let mut answered = answered(&format!("id{n}"), 5);
        answered.request.ends_at = Timestamp(ends_at);
        KeyedAnswer {
            key: key("orders", "any"),
            answered,
        }
    };
    let mut remembered: Vec<KeyedAnswer> = (0..7).map(|n| keyed(n, now() - 120_000)).collect();
    // Not for so long that each gateway's clock would agree.
    remembered.push(keyed(7, now() - 20_000));
    remembered.push(keyed(8, now() + 60_000));
    connection.remember(&remembered).await.expect("remembered");
    for forgotten in [5, 2, 0] {
        assert_eq!(connection.forget_requests(5).await.expect("forgets"), forgotten);
    }
    let left = fixture
        .texts("select request_id from tidegate_requests order by request_id")
        .await;
    assert_eq!(left, ["id7", "id8"]);
}

async fn a_decision_that_is_cut_off_is_made_once(fixture: Fixture) {
    let mut connection = fixture.connection();
    let (mut cut_off, mut ended, mut sum) = (0, 0, 0);
    let deadline = Instant::now() + Duration::from_secs(60);
    for round in 0..600 {
        if cut_off >= 10 && ended >= 10 {
            break;
        }
        let (steps, pause) = (1 << (round / 3 % 10), Duration::from_millis([0, 1, 5][round % 3]));
        let number = round as i64 + 1;
        // A row that is there, and one that is not.
        let operations = [add("counter", number, 1), add(&format!("new{round}"), number, 1)];
        if take_steps(connection.decide(&operations, Timestamp(now())), steps, pause).await {
            ended += 1;
        } else {
            cut_off += 1;
        }
        connection.reset();
        sum += 1;
        // The server may still be about to end the one that was cut off.
        let decided = loop {
            match connection.decide(&operations, Timestamp(now())).await {
                Ok(decided) => break decided,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        let counters: Vec<Option<i64>> = decided
            .iter()
            .map(|decided| match decided {
                Decided::Applied { answer, .. } | Decided::Repeated(answer) => answer.counter,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(counters, [Some(sum), Some(1)]);
    }
    assert!(cut_off >= 10 && ended >= 10, "{cut_off} cut off, {ended} ended");
    let standing = load(&mut *connection, &key("orders", "counter")).await;
    assert_eq!(standing.and_then(|entry| entry.value), Some(sum.to_string().into()));
}

/// The path of operations of a gateway over a PostgreSQL, and another session that holds rows of it.
struct Held {
    fixture: Fixture,
    decisions: GroupDecide,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    holder: PgConnection,
}

impl Held {
    /// Counters at 0, of which some are held.
    async fn start(counters: &[String], held: &str) -> Held {
        let fixture = Fixture::postgres().await;
        let zeroes = counters.iter().map(|name| write(name, 1, Some("0"))).collect();
        commit(&mut *fixture.connection(), zeroes).await;
        let metrics = StoreMetrics::register(&mut Registry::default());
        let clock = Arc::new(Clock::new(1, None));
        let decisions = GroupDecide::new(fixture.store(), &Config::default(), clock, metrics);
        let stop = CancellationToken::new();
        let tasks = decisions.start(&stop);
        let mut holder = PgConnection::connect(fixture.database.url()).await.expect("connects");
        let hold = format!("begin; select from tidegate_entries where key ~ '{held}' for update");
        sqlx::raw_sql(AssertSqlSafe(hold))
            .execute(&mut holder)
            .await
            .expect("locked");
        Held {
            fixture,
            decisions,
            stop,
            tasks,
            holder,
        }
    }

    /// Increments a counter, stamped above whatever stands.
    fn count(&self, name: &str, within: Duration) -> JoinHandle<Result<(), (ErrorKind, Outcome)>> {
        let (decisions, mut operation) = (self.decisions.clone(), add(name, 2, 1));
        let deadline = Instant::now() + within;
        tokio::spawn(async move {
            loop {
                match decisions.decide(operation.clone(), deadline).await {
                    Ok(Decided::Outdated { standing }) => operation.version = version(standing.get() + 1),
                    Ok(Decided::Applied { .. }) => return Ok(()),
                    Ok(other) => panic!("{other:?}"),
                    Err(error) => return Err((error.kind(), error.outcome())),
                }
            }
        })
    }

    async fn assert_counted(&self, name: &str, count: i64) {
        let found = load(&mut *self.fixture.connection(), &key("orders", name)).await;
        let value = found.and_then(|entry| entry.value);
        assert_eq!(value, Some(count.to_string().into()), "{name}");
    }

    async fn end(self) {
        self.stop.cancel();
        for task in self.tasks {
            task.await.expect("no panic");
        }
    }
}

/// Somebody else holds two rows for three seconds: who wants these waits, and nobody else does.
#[tokio::test]
async fn a_row_that_is_held_stops_nobody_who_wants_another() {
    let others: Vec<String> = (0..20).map(|n| format!("other{n:02}")).collect();
    let names: Vec<String> = others.iter().cloned().chain(["held".into(), "z-held".into()]).collect();
    let mut held = Held::start(&names, "held").await;
    let begun = Instant::now();
    let patient = Duration::from_secs(60);
    let waiting: Vec<_> = (0..6).map(|n| held.count(["held", "z-held"][n % 2], patient)).collect();
    let late: Vec<_> = (0..3).map(|_| held.count("held", Duration::from_secs(2))).collect();
    let mut rounds = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        let counts: Vec<_> = others
            .iter()
            .map(|name| held.count(name, Duration::from_secs(2)))
            .collect();
        for (name, count) in others.iter().zip(counts) {
            assert_eq!(count.await.expect("no panic"), Ok(()), "{name} in round {rounds}");
        }
        rounds += 1;
    }
    for count in late {
        let told = count.await.expect("no panic");
        assert_eq!(told, Err((ErrorKind::Unavailable, Outcome::NotApplied)));
    }
    assert!(waiting.iter().all(|count| !count.is_finished()));
    sqlx::raw_sql("rollback")
        .execute(&mut held.holder)
        .await
        .expect("released");
    for count in waiting {
        assert_eq!(count.await.expect("no panic"), Ok(()));
    }
    for name in &others {
        held.assert_counted(name, rounds).await;
    }
    for name in ["held", "z-held"] {
        held.assert_counted(name, 3).await;
    }
    held.end().await;
}

contract! {
    conditions_are_decided_by_what_stands,
    a_touch_keeps_the_value_and_the_tags,
    a_counter_counts_and_nothing_else_does,
    operations_of_one_key_see_each_other_within_a_transaction,
    a_request_is_applied_once,
    what_is_not_there_yet_is_waited_for_by_the_caller,
    concurrent_additions_add_up,
    of_many_who_want_a_key_to_be_absent_one_wins,
    a_condition_holds_against_plain_commits,
    transactions_that_overlap_in_every_way_come_to_an_end,
    what_has_expired_is_judged_by_the_time_of_the_try,
    a_rejected_operation_takes_its_whole_transaction_along,
    a_write_that_the_table_swallows_is_rejected,
    a_commit_remembers_what_its_writes_answer,
    a_dead_letter_answers_nothing_and_is_found,
    what_is_remembered_comes_back_as_it_was,
    what_is_over_is_forgotten_in_steps,
    a_decision_that_is_cut_off_is_made_once,
}
