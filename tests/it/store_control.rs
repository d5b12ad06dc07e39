//! What every store must do about the control row, run against the real PostgreSQL and the real SQLite.
//!
//! Owns the contract of `Connection::control` and of the calls that move epochs, and that tables of an earlier gateway are brought up to date with
//! what is in them. Does not own who moves an epoch and when.

use std::{collections::HashMap, path::Path};

use sqlx::{Connection as _, PgConnection, SqliteConnection, migrate::Migrator};
use tidegate::{
    model::Epoch,
    store::{
        Connection, Control, NAMESPACE_EPOCHS_MAX, StoreErrorKind,
        postgres::{Postgres, Tables},
    },
};

use crate::{
    harness::Database,
    store_contract::{CALL_TIMEOUT, Fixture, commit, contract, entry, key, load, now, version, write},
};

async fn control(connection: &mut dyn Connection) -> Control {
    connection.control().await.expect("the control row is read")
}

async fn namespaces(connection: &mut dyn Connection) -> Vec<(String, i64)> {
    let mut namespaces: Vec<_> = control(connection)
        .await
        .namespaces
        .into_iter()
        .map(|(namespace, epoch)| (namespace, epoch.epoch.0))
        .collect();
    namespaces.sort();
    namespaces
}

async fn a_new_store_has_an_epoch_of_its_own(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let before = now();
    let first = control(connection).await;
    let after = now();
    assert!(first.epoch.0 > 1, "{:?}: by chance once in 10^15", first.epoch);
    assert_eq!((first.cache_server, first.namespaces), (None, HashMap::new()));
    assert_eq!(first.gc_horizon, None);
    // The same machine's clock: to the millisecond, but for rounding.
    assert!((before - 1..=after + 1).contains(&first.now.0));
    assert_eq!(control(connection).await.epoch, first.epoch, "it stays");
    let restore = "delete from tidegate_control; insert into tidegate_control (gc_horizon) values (5)";
    fixture.execute(restore, restore).await;
    let restored = control(connection).await;
    assert_ne!(
        restored.epoch, first.epoch,
        "a row that was lost comes back with another"
    );
    assert_eq!(restored.gc_horizon, Some(version(5)));
}

async fn without_its_row_there_is_nothing_to_read(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let lose = "delete from tidegate_control";
    fixture.execute(lose, lose).await;
    let error = connection.control().await.expect_err("there is none");
    assert_eq!(error.kind, StoreErrorKind::Transient);
    assert!(error.message.contains("tidegate_control"), "{error}");
    let moved = connection.move_epoch(Epoch(1), Epoch(2), None).await.expect("answers");
    assert!(!moved);
}

async fn an_epoch_moves_only_from_the_one_that_stands(fixture: Fixture) {
    let (mut here, mut there) = (fixture.connection(), fixture.connection());
    let first = control(&mut *here).await.epoch;
    let moved = here.move_epoch(first, Epoch(7), Some("a")).await.expect("answers");
    assert!(moved);
    let late = there.move_epoch(first, Epoch(8), Some("b")).await.expect("answers");
    assert!(!late, "somebody was there before");
    let seen = control(&mut *there).await;
    assert_eq!((seen.epoch, seen.cache_server.as_deref()), (Epoch(7), Some("a")));
    // Without a server it stays the one that it was.
    assert!(there.move_epoch(Epoch(7), Epoch(9), None).await.expect("answers"));
    let seen = control(&mut *here).await;
    assert_eq!((seen.epoch, seen.cache_server.as_deref()), (Epoch(9), Some("a")));
}

async fn of_moves_at_once_one_is_made(fixture: Fixture) {
    let first = control(&mut *fixture.connection()).await.epoch;
    let moves: Vec<_> = (1..=8)
        .map(|number| {
            let mut connection = fixture.connection();
            tokio::spawn(async move {
                let moved = connection.move_epoch(first, Epoch(number), Some("server")).await;
                (Epoch(number), moved.expect("answers"))
            })
        })
        .collect();
    let mut made = Vec::new();
    for task in moves {
        let (to, moved) = task.await.expect("ran");
        made.extend(moved.then_some(to));
    }
    assert_eq!(made, [control(&mut *fixture.connection()).await.epoch]);
}

async fn a_namespace_has_an_epoch_until_that_of_all_moves(fixture: Fixture) {
    let (mut here, mut there) = (fixture.connection(), fixture.connection());
    for (namespace, to) in [("orders", 3), ("carts", 4), ("orders", 5)] {
        here.move_namespace_epoch(namespace, Epoch(to)).await.expect("moved");
    }
    let both = [("carts".to_owned(), 4), ("orders".to_owned(), 5)];
    assert_eq!(namespaces(&mut *there).await, both);
    let first = control(&mut *there).await.epoch;
    assert!(!there.move_epoch(Epoch(1), Epoch(2), None).await.expect("answers"));
    assert_eq!(namespaces(&mut *here).await, both, "what did not move ends nothing");
    assert!(there.move_epoch(first, Epoch(2), None).await.expect("answers"));
    assert_eq!(namespaces(&mut *here).await, []);
    here.move_namespace_epoch("orders", Epoch(6)).await.expect("moved");
    assert_eq!(namespaces(&mut *there).await, [("orders".to_owned(), 6)]);
}

async fn one_namespace_too_many_moves_the_epoch_of_all(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    fixture
        .execute(
            &format!(
                "insert into tidegate_namespace_epochs
                 select 'n' || n, n, now() from generate_series(1, {NAMESPACE_EPOCHS_MAX}) as n"
            ),
            &format!(
                "with recursive numbers (n) as (select 1 union all select n + 1 from numbers where n < {NAMESPACE_EPOCHS_MAX})
                 insert into tidegate_namespace_epochs select 'n' || n, n, 0 from numbers"
            ),
        )
        .await;
    let first = control(connection).await.epoch;
    // One that has an epoch finds room for another.
    connection
        .move_namespace_epoch("n7", Epoch(5_000))
        .await
        .expect("moved");
    let seen = control(connection).await;
    assert_eq!(
        (seen.epoch, seen.namespaces.len()),
        (first, NAMESPACE_EPOCHS_MAX as usize)
    );
    assert_eq!(seen.namespaces.get("n7").map(|moved| moved.epoch), Some(Epoch(5_000)));
    connection
        .move_namespace_epoch("more", Epoch(6_000))
        .await
        .expect("moved");
    let seen = control(connection).await;
    assert_eq!((seen.epoch, seen.namespaces.len()), (Epoch(6_000), 0));
}

contract! {
    a_new_store_has_an_epoch_of_its_own,
    without_its_row_there_is_nothing_to_read,
    an_epoch_moves_only_from_the_one_that_stands,
    of_moves_at_once_one_is_made,
    a_namespace_has_an_epoch_until_that_of_all_moves,
    one_namespace_too_many_moves_the_epoch_of_all,
}

// Tables that an earlier gateway has made.

/// The first two migrations, as an earlier gateway had them, in a directory of their own.
async fn first_migrations(kind: &str) -> Migrator {
    let directory = tempfile::tempdir().expect("a directory");
    let migrations = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(kind);
    for file in ["0001_entries.sql", "0002_control.sql"] {
        std::fs::copy(migrations.join(file), directory.path().join(file)).expect("copied");
    }
    let mut migrator = Migrator::new(directory.path()).await.expect("migrations");
    migrator.dangerous_set_table_name("tidegate_migrations");
    migrator
}

const EARLIER_ROWS: &str =
    "insert into tidegate_entries (namespace, key, version, value) values ('orders', 'one', 9, 'value');
     insert into tidegate_entries (namespace, key, version) values ('orders', 'gone', 8);
     update tidegate_control set gc_horizon = 7";

async fn what_an_earlier_gateway_left_is_there(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let seen = control(connection).await;
    assert_eq!(seen.gc_horizon, Some(version(7)));
    assert!(seen.epoch.0 > 1);
    assert_eq!(
        load(connection, &key("orders", "one")).await,
        Some(entry(9, Some("value")))
    );
    assert_eq!(load(connection, &key("orders", "gone")).await, Some(entry(8, None)));
    commit(connection, vec![write("one", 10, Some("newer"))]).await;
    assert!(
        connection
            .move_epoch(seen.epoch, Epoch(2), None)
            .await
            .expect("answers")
    );
}

#[tokio::test]
async fn the_tables_of_an_earlier_gateway_are_brought_up_to_date_in_postgres() {
    let database = Database::postgres().await;
    let mut session = PgConnection::connect(database.url()).await.expect("connects");
    let migrator = first_migrations("postgres").await;
    migrator.run_direct(None, &mut session, false).await.expect("migrated");
    database.execute(EARLIER_ROWS).await;
    what_an_earlier_gateway_left_is_there(Fixture::postgres_at(database).await).await;
}

#[tokio::test]
async fn the_tables_of_an_earlier_gateway_do_not_pass_for_ours() {
    let database = Database::postgres().await;
    let mut session = PgConnection::connect(database.url()).await.expect("connects");
    let migrator = first_migrations("postgres").await;
    migrator.run_direct(None, &mut session, false).await.expect("migrated");
    let backend = Postgres::new(database.url(), CALL_TIMEOUT, Tables::Check).expect("valid");
    let missing = backend.prepare().await.expect_err("they lack what is used");
    assert_eq!(missing.kind, StoreErrorKind::Transient);
}

#[tokio::test]
async fn the_tables_of_an_earlier_gateway_are_brought_up_to_date_in_sqlite() {
    let database = Database::sqlite();
    let new_file = format!("{}?mode=rwc", database.url());
    let mut session = SqliteConnection::connect(&new_file).await.expect("opens");
    let migrator = first_migrations("sqlite").await;
    migrator.run_direct(None, &mut session, false).await.expect("migrated");
    session.close().await.expect("closes");
    database
        .execute(&EARLIER_ROWS.replace("'value')", "cast('value' as blob))"))
        .await;
    what_an_earlier_gateway_left_is_there(Fixture::sqlite_at(database).await).await;
}
