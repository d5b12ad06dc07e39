//! Proves that a record which the store refuses for good stops nothing but itself, and that only such a record is set aside.

use tidegate::rpc::proto::ReadConsistency;
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::{assert_do_not_come_back, outcome},
    database::DeadLetter,
    eventually, expect, postgres, until,
};

const POISON: &[u8] = b"poison";

/// check_violation.
const SQLSTATE: &str = "23514";

/// Asserts that nothing quotes the value, neither as it is nor as PostgreSQL shows bytes.
#[track_caller]
fn assert_unsaid(text: &str) {
    // The name of the constraint is no value.
    let text = text.replace("no_poison", "");
    assert!(!text.contains("poison") && !text.contains("706f69736f6e"), "{text}");
}

/// A gateway over a table that refuses poison, as a constraint of the table's owners would.
async fn picky() -> (Gateway, Database) {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    database
        .execute("alter table tidegate_entries add constraint no_poison check (value is distinct from 'poison'::bytea)")
        .await;
    (gateway, database)
}

#[tokio::test]
async fn exactly_the_poison_rows_become_dead_letters() {
    let (gateway, database) = picky().await;
    let hold = database.hold_writes().await;
    let is_poison = |index: u32| index % 37 == 5;
    let value = |index: u32| format!("value {index}").into_bytes();
    for index in 0..300 {
        let value = if is_poison(index) {
            POISON.to_vec()
        } else {
            value(index)
        };
        gateway
            .client
            .put(&format!("{index:03}"), &value, Mode::Behind)
            .await
            .expect("accepted");
    }
    hold.release().await;
    gateway.drained().await;

    let poison: Vec<u32> = (0..300).filter(|index| is_poison(*index)).collect();
    let expected: Vec<DeadLetter> = poison
        .iter()
        .map(|index| DeadLetter {
            key: format!("{index:03}"),
            code: Some(SQLSTATE.to_owned()),
            value: Some(POISON.to_vec()),
        })
        .collect();
    assert_eq!(database.dead_letters().await, expected, "the poison rows and no others");
    assert_eq!(
        gateway.metric("tidegate_store_dead_letters_total", &[]).await,
        poison.len() as f64
    );
    for index in (0..300).filter(|index| !is_poison(*index)) {
        let stored = database.value("orders", &format!("{index:03}")).await;
        assert_eq!(stored, Some(value(index)), "key {index}");
    }
    for index in poison {
        let key = format!("{index:03}");
        assert_eq!(database.row("orders", &key).await, None);
        eventually("no cache shows a write that was set aside", SOON, async || {
            let read = gateway.client.read(&key).await;
            expect(read.entry.is_none(), read)
        })
        .await;
        assert_eq!(gateway.client.value(&key, ReadConsistency::Shared).await, None);
    }
    assert_unsaid(&gateway.log());
}

#[tokio::test]
async fn a_key_recovers_from_its_poison() {
    let (gateway, database) = picky().await;
    gateway.client.put("key", b"before", Mode::Behind).await.unwrap();
    gateway.drained().await;
    gateway.client.put("key", POISON, Mode::Behind).await.unwrap();
    gateway.drained().await;
    assert_eq!(database.value("orders", "key").await.as_deref(), Some(&b"before"[..]));
    eventually("the record from before is read again", SOON, async || {
        let read = gateway.client.value("key", ReadConsistency::Cached).await;
        expect(read.as_deref() == Some(&b"before"[..]), read)
    })
    .await;
    gateway.client.put("key", b"after", Mode::Behind).await.unwrap();
    gateway.drained().await;
    assert_eq!(database.value("orders", "key").await.as_deref(), Some(&b"after"[..]));
    assert_eq!(database.dead_letters().await.len(), 1);
}

#[tokio::test]
async fn poison_written_through_fails_its_caller_alone() {
    let (gateway, database) = picky().await;
    // Held for a moment, so that they share commits with what is good.
    let hold = database.hold_writes().await;
    let mut writes = JoinSet::new();
    for index in 0..40 {
        let client = gateway.client.clone();
        writes.spawn(async move {
            let value = if index % 8 == 3 { POISON } else { b"good" };
            (index, client.put(&format!("{index:02}"), value, Mode::Through).await)
        });
    }
    let arrived = async || gateway.metric("tidegate_calls_running", &[]).await == 40.0;
    until("all of them are under way", arrived).await;
    database.await_waiting(1).await;
    hold.release().await;
    while let Some(write) = writes.join_next().await {
        let (index, result) = write.unwrap();
        let key = format!("{index:02}");
        let stored = database.value("orders", &key).await;
        if index % 8 == 3 {
            let refused = result.expect_err("the store refuses it");
            assert_do_not_come_back(&refused, Code::FailedPrecondition, "REJECTED");
            assert_eq!(outcome(&refused), "not_applied");
            assert_unsaid(&format!("{refused:?} {}", String::from_utf8_lossy(refused.details())));
            assert_eq!(stored, None);
            assert_eq!(gateway.client.value(&key, ReadConsistency::Cached).await, None);
        } else {
            result.unwrap_or_else(|status| panic!("key {index}: {status:?}"));
            assert_eq!(stored.as_deref(), Some(&b"good"[..]));
        }
    }
    assert_eq!(database.dead_letters().await, [], "their callers know");
    assert_unsaid(&gateway.log());
    let labels = ["path=\"through\""];
    let writes = gateway.metric("tidegate_store_commit_batch_writes_sum", &labels).await;
    let commits = gateway
        .metric("tidegate_store_commit_batch_writes_count", &labels)
        .await;
    assert!(commits < writes, "they did share: {writes} in {commits}");
}

/// Writes behind while the table takes nothing, and expects all of it to be there after the repair and nothing set aside.
async fn nothing_is_set_aside(gateway: &Gateway, database: &Database, break_it: &str, repair: &str) {
    gateway.client.put("before", b"value", Mode::Through).await.unwrap();
    database.execute(break_it).await;
    for index in 0..50 {
        gateway
            .client
            .put(&format!("{index:02}"), b"value", Mode::Behind)
            .await
            .expect("accepted");
    }
    eventually("the drain has tried several times", SOON, async || {
        let retries = gateway
            .metric("tidegate_store_commit_retries_total", &["path=\"behind\""])
            .await;
        expect(retries >= 3.0, retries)
    })
    .await;
    assert_eq!(gateway.metric("tidegate_queue_pending_entries", &[]).await, 50.0);
    assert_eq!(database.dead_letters().await, []);
    database.execute(repair).await;
    gateway.drained().await;
    assert_eq!(database.records("orders").await.len(), 51);
    assert_eq!(database.dead_letters().await, []);
}

#[tokio::test]
async fn a_missing_table_is_an_outage() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    nothing_is_set_aside(
        &gateway,
        &database,
        "alter table tidegate_entries rename to elsewhere",
        "alter table elsewhere rename to tidegate_entries",
    )
    .await;
}

#[tokio::test]
async fn a_revoked_right_is_an_outage() {
    let (plain, superuser) = postgres::database_of_plain_role().await;
    let database = Database::at(&superuser);
    let gateway = Setup::new().store(&plain).start().await;
    let role = plain.rsplit('/').next().expect("the role has the name of its database");
    nothing_is_set_aside(
        &gateway,
        &database,
        &format!("revoke insert, update on tidegate_entries from {role}"),
        &format!("grant insert, update on tidegate_entries to {role}"),
    )
    .await;
}

#[tokio::test]
async fn a_table_that_refuses_every_row_is_an_outage() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    nothing_is_set_aside(
        &gateway,
        &database,
        "alter table tidegate_entries add constraint nothing check (version < 0) not valid",
        "alter table tidegate_entries drop constraint nothing",
    )
    .await;
}
