//! Proves that a full queue does what the namespace says: wait, refuse with the time to come back, or write through. Nothing is dropped.

use std::time::Duration;

use tidegate::rpc::proto::{Durability, ReadConsistency};
use tokio::time::timeout;
use tonic::Code;

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::{assert_come_back, outcome},
    database::Hold,
    eventually, expect,
    wire::{Wire, message},
};

const ENTRIES_MAX: usize = 4;

/// How long something must not happen to be taken for held.
const A_WHILE: Duration = Duration::from_millis(300);

/// A gateway whose queue is full of keys `0..ENTRIES_MAX` in namespace `waits`, and which cannot drain.
async fn full() -> (Gateway, Database, Hold) {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config(&format!(
            "[queue]\nentries_max = {ENTRIES_MAX}\n\
             [namespaces.waits]\nqueue_full = \"wait\"\n\
             [namespaces.rejects]\nqueue_full = \"reject\"\n\
             [namespaces.through]\nqueue_full = \"write_through\"\n"
        ))
        .start()
        .await;
    let hold = database.hold_writes().await;
    let client = gateway.client.namespace("waits");
    for index in 0..ENTRIES_MAX {
        client
            .put(&index.to_string(), b"first", Mode::Behind)
            .await
            .expect("there is room");
    }
    (gateway, database, hold)
}

async fn assert_all_stored(gateway: &Gateway, database: &Database) {
    gateway.drained().await;
    for index in 0..ENTRIES_MAX {
        let value = database.value("waits", &index.to_string()).await;
        assert_eq!(value.as_deref(), Some(&b"first"[..]), "key {index}");
    }
    assert_eq!(database.dead_letters().await, []);
}

#[tokio::test]
async fn a_namespace_that_rejects_says_when_to_come_back() {
    let (gateway, database, hold) = full().await;
    let client = gateway.client.namespace("rejects");
    let refused = client
        .put("key", b"value", Mode::Behind)
        .await
        .expect_err("the queue is full");
    assert_come_back(&refused, Code::ResourceExhausted);
    let refused = client
        .delete("key", Mode::Behind)
        .await
        .expect_err("a delete is a write");
    assert_come_back(&refused, Code::ResourceExhausted);
    for consistency in [ReadConsistency::Cached, ReadConsistency::Shared, ReadConsistency::Store] {
        assert_eq!(
            client.value("key", consistency).await,
            None,
            "what was refused was never visible"
        );
    }
    assert!(gateway.metric("tidegate_queue_full_writes_total", &[]).await >= 2.0);
    hold.release().await;
    assert_all_stored(&gateway, &database).await;
    assert_eq!(database.row("rejects", "key").await, None);
    client
        .put("key", b"value", Mode::Behind)
        .await
        .expect("there is room again");
}

#[tokio::test]
async fn a_namespace_that_waits_is_answered_when_there_is_room() {
    let (gateway, database, hold) = full().await;
    let client = gateway.client.namespace("waits");
    let waiting = tokio::spawn(async move {
        let mut request = tonic::Request::new(client.put_request("late", b"value", Mode::Behind));
        request.set_timeout(SOON);
        client.stub().put(request).await
    });
    eventually("the put waits", SOON, async || {
        let full = gateway.metric("tidegate_queue_full_writes_total", &[]).await;
        expect(full >= 1.0, full)
    })
    .await;
    assert!(!waiting.is_finished());
    assert_eq!(
        gateway
            .client
            .namespace("waits")
            .value("late", ReadConsistency::Cached)
            .await,
        None
    );
    hold.release().await;
    let answer = timeout(SOON, waiting)
        .await
        .expect("the put is answered")
        .unwrap()
        .unwrap();
    assert_eq!(answer.get_ref().durability(), Durability::Journal);
    assert_all_stored(&gateway, &database).await;
    assert_eq!(database.value("waits", "late").await.as_deref(), Some(&b"value"[..]));
}

#[tokio::test]
async fn a_namespace_that_waits_gives_up_at_the_deadline() {
    let (gateway, database, hold) = full().await;
    // Over the bare wire: the generated client gives up by itself at the same moment, and the answer would not be seen.
    let wire = Wire::connect(gateway.address).await;
    let request = gateway
        .client
        .namespace("waits")
        .put_request("late", b"value", Mode::Behind);
    let answer = wire
        .call(
            "/tidegate.v1.Gateway/Put",
            &[("grpc-timeout", "300m")],
            message(&request),
        )
        .await;
    let status = answer.status.expect("a status");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert_eq!(outcome(&status), "not_applied");
    hold.release().await;
    assert_all_stored(&gateway, &database).await;
    assert_eq!(
        database.row("waits", "late").await,
        None,
        "it promised not to be applied"
    );
}

#[tokio::test]
async fn a_namespace_that_writes_through_waits_for_the_commit() {
    let (gateway, database, hold) = full().await;
    let client = gateway.client.namespace("through");
    let mut writing = tokio::spawn(async move { client.put("key", b"value", Mode::Behind).await });
    assert!(
        timeout(A_WHILE, &mut writing).await.is_err(),
        "nothing can be committed yet"
    );
    assert_eq!(
        gateway
            .client
            .namespace("through")
            .value("key", ReadConsistency::Cached)
            .await,
        None,
        "not durable, so not visible"
    );
    hold.release().await;
    let answer = timeout(SOON, writing)
        .await
        .expect("the put is answered")
        .unwrap()
        .unwrap();
    assert_eq!(answer.durability(), Durability::Store);
    assert_eq!(database.value("through", "key").await.as_deref(), Some(&b"value"[..]));
    assert_all_stored(&gateway, &database).await;
}

#[tokio::test]
async fn bytes_fill_the_queue_too() {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config(
            "[rpc]\nvalue_bytes_max = 10000\n[queue]\nbytes_max = 21000\n\
             [namespaces.orders]\nqueue_full = \"reject\"",
        )
        .start()
        .await;
    let hold = database.hold_writes().await;
    let value = [b'x'; 6000];
    for key in ["1", "2", "3"] {
        gateway
            .client
            .put(key, &value, Mode::Behind)
            .await
            .expect("18,000 bytes and their overhead fit");
    }
    let refused = gateway
        .client
        .put("4", &value, Mode::Behind)
        .await
        .expect_err("24,000 do not");
    assert_come_back(&refused, Code::ResourceExhausted);
    gateway
        .client
        .put("5", b"small", Mode::Behind)
        .await
        .expect("a little fits");
    hold.release().await;
    gateway.drained().await;
    assert_eq!(database.records("orders").await, ["1", "2", "3", "5"]);
}
