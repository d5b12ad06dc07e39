//! What every store must do about dead letters, run against the real PostgreSQL and the real SQLite.
//!
//! Owns the contract of `Connection::letters`, `Connection::last_letter`, `Connection::drop_letters` and `Connection::refuse_letter`, and of what
//! a burial keeps. Does not own what becomes of a letter.

use tidegate::{
    model::{Tags, Timestamp, Write},
    store::{
        Connection, DeadLetter, StoreErrorKind,
        letters::{KeptLetter, LetterRange},
    },
};

use crate::{
    harness::{SOON, eventually, expect},
    store_contract::{Fixture, contract, key, kind, now, version, write},
};

fn letter(write: Write) -> DeadLetter {
    DeadLetter {
        write,
        code: Some("23514".to_owned()),
        reason: "no".to_owned(),
    }
}

async fn bury(connection: &mut dyn Connection, write: Write) {
    connection.bury(&letter(write)).await.expect("it is kept");
}

const ALL: LetterRange<'static> = LetterRange {
    namespace: None,
    after: 0,
    up_to: i64::MAX,
    limit: 1_000,
    values: false,
};

async fn letters(connection: &mut dyn Connection, range: LetterRange<'_>) -> Vec<KeptLetter> {
    connection.letters(range).await.expect("they are told")
}

fn names(letters: &[KeptLetter]) -> Vec<&str> {
    letters.iter().map(|letter| letter.key.key()).collect()
}

async fn a_letter_is_kept_whole_and_told_without_its_value_unless_asked(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let before = now();
    let mut put = write("put", 5, Some("value"));
    put.tags = Tags::new(&["red", "a \"b\"\\{,}"]).expect("valid");
    put.entry.expires_at = Some(Timestamp(4_000_000_000_123));
    bury(connection, put.clone()).await;
    bury(connection, write("delete", 6, None)).await;
    bury(connection, write("empty", 7, Some(""))).await;
    // The same write again is there once.
    bury(connection, put.clone()).await;

    let told = letters(connection, ALL).await;
    assert_eq!(names(&told), ["put", "delete", "empty"]);
    let first = &told[0];
    assert_eq!((first.version, first.value_bytes), (version(5), Some(5)));
    assert_eq!(
        (first.value.as_ref(), first.attempts, first.retried_at),
        (None, 1, None)
    );
    assert_eq!((first.code.as_deref(), first.reason.as_str()), (Some("23514"), "no"));
    assert!(first.buried_at.0 >= before - 60_000 && first.buried_at.0 <= now() + 60_000);
    let lengths: Vec<_> = told.iter().map(|letter| letter.value_bytes).collect();
    assert_eq!(lengths, [Some(5), None, Some(0)]);

    let whole = letters(connection, LetterRange { values: true, ..ALL }).await;
    assert_eq!(whole[0].write(), put);
    assert_eq!(whole[1].write(), write("delete", 6, None));
    assert_eq!(whole[2].write(), write("empty", 7, Some("")));
}

async fn letters_come_in_the_order_of_their_ids_in_pages_and_of_a_namespace(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    assert_eq!(connection.last_letter().await.expect("told"), 0);
    for number in 1..=5 {
        let mut write = write(&number.to_string(), number, Some("v"));
        if number % 2 == 0 {
            write.key = key("sessions", &number.to_string());
        }
        bury(connection, write).await;
    }
    let all = letters(connection, ALL).await;
    assert_eq!(names(&all), ["1", "2", "3", "4", "5"]);
    assert!(all.is_sorted_by_key(|letter| letter.id));
    assert_eq!(connection.last_letter().await.expect("told"), all[4].id);
    let of_orders = LetterRange {
        namespace: Some("orders"),
        ..ALL
    };
    assert_eq!(names(&letters(connection, of_orders).await), ["1", "3", "5"]);
    let page = LetterRange {
        after: all[0].id,
        limit: 2,
        ..ALL
    };
    assert_eq!(names(&letters(connection, page).await), ["2", "3"]);
    let page = LetterRange {
        after: all[0].id,
        up_to: all[3].id,
        ..of_orders
    };
    assert_eq!(names(&letters(connection, page).await), ["3"]);
}

async fn a_letter_notes_each_refusal_until_it_is_dropped(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    bury(connection, write("one", 5, Some("v"))).await;
    bury(connection, write("two", 5, Some("v"))).await;
    let ids: Vec<i64> = letters(connection, ALL).await.iter().map(|letter| letter.id).collect();
    for attempts in 2..=3 {
        let refused = connection.refuse_letter(ids[0], None, "still no\0").await;
        let (counted, at) = refused.expect("noted").expect("it is there");
        assert_eq!(counted, attempts);
        let told = letters(connection, ALL).await;
        assert_eq!((told[0].attempts, told[0].retried_at), (attempts, Some(at)));
        assert_eq!((told[0].code.as_deref(), told[0].reason.as_str()), (None, "still no"));
        assert_eq!(
            (told[1].attempts, told[1].reason.as_str()),
            (1, "no"),
            "the other stays"
        );
    }
    let dropped = connection.drop_letters(&[ids[0], ids[1] + 1_000]).await;
    assert_eq!(dropped.expect("dropped"), 1);
    assert_eq!(names(&letters(connection, ALL).await), ["two"]);
    assert_eq!(
        connection.refuse_letter(ids[0], None, "no").await.expect("answered"),
        None
    );
    assert_eq!(connection.drop_letters(&[]).await.expect("answered"), 0);
    let buried = connection.are_buried(&[(&key("orders", "one"), version(5))]).await;
    assert_eq!(buried.expect("told"), [false]);
}

async fn a_row_that_no_gateway_wrote_is_said(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let row = "insert into tidegate_dead_letters (namespace, key, version, reason) values ('orders', '', 1, 'x')";
    fixture.execute(row, row).await;
    assert_eq!(kind(connection.letters(ALL).await), StoreErrorKind::Transient);
}

/// Of PostgreSQL alone: SQLite has one writer.
#[tokio::test]
async fn no_letter_is_seen_while_one_with_a_lower_id_is_yet_to_come() {
    let fixture = Fixture::postgres().await;
    let hold = "create function hold() returns trigger language plpgsql as \
                'begin perform pg_advisory_xact_lock_shared(1); return new; end'; \
                create trigger hold before insert on tidegate_dead_letters \
                for each row when (new.key = 'slow') execute function hold()";
    fixture.database.execute(hold).await;
    let mut holder = crate::harness::postgres::connect(fixture.database.url()).await;
    let lock = sqlx::query("select pg_advisory_lock(1)");
    sqlx::Executor::execute(&mut holder, lock).await.expect("it is free");
    let burial = |name: &'static str, version| {
        let mut connection = fixture.connection();
        tokio::spawn(async move { bury(&mut *connection, write(name, version, Some("v"))).await })
    };
    let slow = burial("slow", 5);
    // It has its id by now.
    fixture.database.await_waiting(1).await;
    let fast = burial("fast", 6);
    let connection = &mut *fixture.connection();
    eventually("the other waits, or is seen", SOON, async || {
        let seen = !fast.is_finished() && fixture.database.texts(WAITING).await != ["2"];
        expect(!seen, "neither")
    })
    .await;
    assert_eq!(names(&letters(connection, ALL).await), [""; 0]);
    sqlx::Connection::close(holder).await.expect("the session ends");
    slow.await.expect("it is buried");
    fast.await.expect("it is buried");
    assert_eq!(names(&letters(connection, ALL).await), ["slow", "fast"]);
}

/// How many sessions wait for a lock.
const WAITING: &str =
    "select count(*)::text from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";

contract! {
    a_letter_is_kept_whole_and_told_without_its_value_unless_asked,
    letters_come_in_the_order_of_their_ids_in_pages_and_of_a_namespace,
    a_letter_notes_each_refusal_until_it_is_dropped,
    a_row_that_no_gateway_wrote_is_said,
}
