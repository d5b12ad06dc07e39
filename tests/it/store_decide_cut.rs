//! Proves that a decision is made once when the way to PostgreSQL breaks in the middle of it: an operation that is sent again waits for its earlier
//! try, and finds what became of that.

use sqlx::{Connection as _, PgConnection};
use tidegate::{
    model::Timestamp,
    store::{
        Backend, StoreErrorKind,
        operation::{Change, Decided, Operation, Refusal},
        postgres::{Postgres, Tables},
    },
};

use crate::{
    harness::proxy::Proxy,
    store_contract::{CALL_TIMEOUT, Fixture, commit, entry, key, kind, load, now, version, write},
    store_decide::{add, answer, decide, decide_patiently, named, operation, put},
};

/// A database with a way to it that can be cut, and commits that can be held: those that write a key that begins with `held`.
struct Rig {
    fixture: Fixture,
    proxy: Proxy,
    behind_proxy: Postgres,
}

impl Rig {
    async fn start() -> Rig {
        let fixture = Fixture::postgres().await;
        let (proxy, url) = Proxy::before(fixture.database.url()).await;
        let behind_proxy = Postgres::new(&url, CALL_TIMEOUT, Tables::Check).expect("a valid URL");
        behind_proxy.prepare().await.expect("it is ready");
        Rig {
            fixture,
            proxy,
            behind_proxy,
        }
    }

    /// Holds commits, at the commit itself, until the returned session ends.
    async fn hold_commits(&self) -> PgConnection {
        let hold = "create function hold() returns trigger language plpgsql as
             'begin perform pg_advisory_xact_lock_shared(1); return null; end';
             create constraint trigger hold after insert or update on tidegate_entries
             deferrable initially deferred for each row when (new.key like 'held%') execute function hold()";
        self.fixture.execute(hold, "").await;
        let mut holder = PgConnection::connect(self.fixture.database.url())
            .await
            .expect("connects");
        sqlx::raw_sql("select pg_advisory_lock(1)")
            .execute(&mut holder)
            .await
            .expect("locked");
        holder
    }

    /// Sends operations, and loses the connection while the server commits. The commit goes on, or is rolled back once `killed`.
    async fn lose_at_commit(&self, operations: Vec<Operation>) {
        let mut connection = self.behind_proxy.connection();
        let lost = tokio::spawn(async move { connection.decide(&operations, Timestamp(now())).await });
        self.fixture.database.await_waiting(1).await;
        self.proxy.cut();
        assert_eq!(kind(lost.await.expect("ran")), StoreErrorKind::Unknown);
        self.proxy.restore();
    }
}

/// What is sent first, and what of it is sent again, alone.
struct Case {
    before: Option<&'static str>,
    first: Vec<Operation>,
    again: Operation,
    known: Decided,
    rolled_back: Decided,
}

fn applied(number: i64, value: &str, counter: Option<i64>) -> Decided {
    Decided::Applied {
        entry: entry(number, Some(value)),
        answer: answer(number, counter),
    }
}

fn cases() -> Vec<Case> {
    let counter = named("counter", add("held", 5, 1));
    let touch = Change::Touch { expires_at: None };
    let touch = named("touch", operation("held", 6, touch));
    vec![
        Case {
            before: None,
            first: vec![counter.clone()],
            again: counter.clone(),
            known: Decided::Repeated(answer(5, Some(1))),
            rolled_back: applied(5, "1", Some(1)),
        },
        Case {
            before: Some("7"),
            first: vec![counter.clone()],
            again: counter,
            known: Decided::Repeated(answer(5, Some(8))),
            rolled_back: applied(5, "8", Some(8)),
        },
        // What made its record is not sent again, and without that it can do nothing.
        Case {
            before: None,
            first: vec![put("held", 5, "v", None), touch.clone()],
            again: touch,
            known: Decided::Repeated(answer(6, None)),
            rolled_back: Decided::Refused(Refusal::Absent),
        },
    ]
}

async fn an_earlier_try_is_waited_for(case: Case, killed: bool) {
    let rig = Rig::start().await;
    let mut connection = rig.fixture.connection();
    if let Some(value) = case.before {
        commit(&mut *connection, vec![write("held", 1, Some(value))]).await;
    }
    let holder = rig.hold_commits().await;
    rig.lose_at_commit(case.first).await;
    let again = tokio::spawn(async move { decide(&mut *connection, case.again).await });
    rig.fixture.database.await_waiting(2).await;
    if killed {
        let kill = "select pg_terminate_backend(pid, 5000) from pg_stat_activity
             where datname = current_database() and query ilike 'commit%' and wait_event = 'advisory'";
        rig.fixture.execute(kill, "").await;
    }
    holder.close().await.expect("the session ends");
    let wanted = if killed { case.rolled_back } else { case.known };
    assert_eq!(again.await.expect("ran"), wanted);
}

#[tokio::test]
async fn an_earlier_try_that_is_still_under_way_is_waited_for_and_found() {
    for case in cases() {
        an_earlier_try_is_waited_for(case, false).await;
    }
}

#[tokio::test]
async fn an_earlier_try_that_comes_to_nothing_is_waited_for_and_made_good() {
    for case in cases() {
        an_earlier_try_is_waited_for(case, true).await;
    }
}

#[tokio::test]
async fn what_was_claimed_to_wait_leaves_nothing() {
    let fixture = Fixture::postgres().await;
    let connection = &mut *fixture.connection();
    let touch = |name| operation(name, 6, Change::Touch { expires_at: None });
    // Alone, and beside what is applied.
    let decided = connection
        .decide(&[touch("a")], Timestamp(now()))
        .await
        .expect("decided");
    assert_eq!(decided, [Decided::Refused(Refusal::Absent)]);
    let (touch, put) = (touch("a"), put("b", 5, "v", None));
    let decided = connection
        .decide(&[touch, put.clone()], Timestamp(now()))
        .await
        .expect("decided");
    assert_eq!(decided, [Decided::Refused(Refusal::Absent), applied(5, "v", None)]);
    let remembered = fixture.texts("select request_id from tidegate_requests").await;
    assert_eq!(remembered, [put.request.id.as_str()]);
}

#[tokio::test]
async fn what_is_lost_before_the_commit_is_not_applied_and_known_not_to_be() {
    let rig = Rig::start().await;
    let connection = &mut *rig.fixture.connection();
    commit(connection, vec![write("one", 1, Some("7"))]).await;
    let mut holder = PgConnection::connect(rig.fixture.database.url())
        .await
        .expect("connects");
    let mut held = holder.begin().await.expect("begins");
    sqlx::raw_sql("select from tidegate_entries for update")
        .execute(&mut *held)
        .await
        .expect("locked");
    let counter = add("one", 5, 1);
    let (mut cut_off, operation) = (rig.behind_proxy.connection(), counter.clone());
    let lost = tokio::spawn(async move { decide_patiently(&mut *cut_off, &[operation]).await });
    rig.fixture.database.await_waiting(1).await;
    rig.proxy.cut();
    assert_eq!(kind(lost.await.expect("ran")), StoreErrorKind::Unreachable);
    held.rollback().await.expect("released");
    assert_eq!(decide(connection, counter).await, applied(5, "8", Some(8)));
}

#[tokio::test]
async fn a_session_that_ended_while_it_was_idle_fails_no_decision() {
    let fixture = Fixture::postgres().await;
    let connection = &mut *fixture.connection();
    for number in 1..4 {
        let counted = applied(number, &number.to_string(), Some(number));
        assert_eq!(decide(connection, add("one", number, 1)).await, counted);
        fixture
            .execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity
                  where application_name = 'tidegate' and datname = current_database()",
                "",
            )
            .await;
    }
}

#[tokio::test]
async fn what_is_refused_at_the_commit_itself_is_refused() {
    let fixture = Fixture::postgres().await;
    fixture
        .execute(
            "create function refuse() returns trigger language plpgsql as
             $$ begin if new.value = 'poison' then raise 'late'; end if; return null; end $$;
             create constraint trigger late after insert or update on tidegate_entries
             deferrable initially deferred for each row execute function refuse()",
            "",
        )
        .await;
    let connection = &mut *fixture.connection();
    let batch = [put("a", 1, "fine", None), put("b", 1, "poison", None)];
    let refused = connection.decide(&batch, Timestamp(now())).await.expect_err("refused");
    assert_eq!(
        (refused.kind, refused.code.as_deref()),
        (StoreErrorKind::Rejected, Some("P0001"))
    );
    assert_eq!(load(connection, &key("orders", "a")).await, None);
    assert_eq!(decide(connection, batch[0].clone()).await, applied(1, "fine", None));
}

#[tokio::test]
async fn tags_that_no_gateway_wrote_keep_a_record_from_being_touched_and_no_other_write() {
    let fixture = Fixture::postgres().await;
    let connection = &mut *fixture.connection();
    commit(connection, vec![write("one", 1, Some("1"))]).await;
    fixture
        .execute("update tidegate_entries set tags = array['']", "")
        .await;
    let mended = connection
        .decide(&[add("one", 5, 1)], Timestamp(now()))
        .await
        .expect_err("bad tags");
    assert_eq!(mended.kind, StoreErrorKind::Transient);
    assert!(mended.message.contains("mend the row"), "{mended}");
    assert_eq!(
        decide(connection, put("one", 5, "v", None)).await,
        applied(5, "v", None)
    );
    assert_eq!(
        load(connection, &key("orders", "one")).await.map(|entry| entry.version),
        Some(version(5))
    );
}
