//! Proves that whoever waits for a write to be in the store is told when it is, and never before; and what became of one that cannot be.

use std::time::Duration;

use tidegate::rpc::proto::{AwaitPersistedRequest, DeleteRequest, Durability, PutRequest};
use tokio::time::timeout;
use tonic::Code;
use tonic_types::StatusExt;

use crate::harness::{
    Client, Gateway, Mode, SOON,
    calls::{assert_invalid, assert_refused},
    client::{assert_come_back, assert_do_not_come_back, outcome},
    eventually, expect,
    proxy::Passage,
    stage::{Stage, on_every_stage},
    until,
};

/// Writes wait longer than any test for others to join them.
const LONG_DELAYS: &str = "[namespace_defaults]\nwrite_delay = \"1h\"";

/// How long something must not happen to be taken for held.
const A_WHILE: Duration = Duration::from_millis(300);

const POISON: &[u8] = b"poison";

on_every_stage! {
    what_is_awaited_is_drained_at_once
    what_is_stored_need_not_be_awaited
    everything_can_be_awaited
    a_write_can_wait_for_itself
    a_version_that_nobody_can_have_stamped_is_not_awaited
    a_write_is_named_wholly_or_not_at_all
}

async fn what_is_awaited_is_drained_at_once(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    let client = &gateway.client;
    let put = client.put("key", b"value", Mode::Behind).await.unwrap();
    assert_eq!(stage.database.row("orders", "key").await, None);
    let answer = client
        .await_persisted("key", put.version)
        .await
        .expect("the store takes it");
    assert_eq!(answer.version, put.version);
    assert_eq!(
        stage.database.value("orders", "key").await.as_deref(),
        Some(&b"value"[..])
    );
    let deleted = client.delete("key", Mode::Behind).await.unwrap();
    let answer = client
        .await_persisted("key", deleted.version)
        .await
        .expect("the store takes it");
    assert_eq!(answer.version, deleted.version);
    assert_eq!(stage.database.value("orders", "key").await, None);
    // One that another joined is in the store with it.
    let first = client.put("key", b"first", Mode::Behind).await.unwrap();
    let second = client.put("key", b"second", Mode::Behind).await.unwrap();
    let answer = client
        .await_persisted("key", first.version)
        .await
        .expect("the store takes it");
    assert_eq!(answer.version, second.version);
    assert_eq!(
        stage.database.value("orders", "key").await.as_deref(),
        Some(&b"second"[..])
    );
}

async fn what_is_stored_need_not_be_awaited(stage: Stage) {
    let gateways = stage.start_all().await;
    let first = gateways[0].client.put("key", b"first", Mode::Through).await.unwrap();
    for gateway in &gateways {
        let answer = gateway.client.await_persisted("key", first.version).await.unwrap();
        assert_eq!(answer.version, first.version);
    }
    let deleted = gateways[0].client.delete("key", Mode::Through).await.unwrap();
    for gateway in &gateways {
        let answer = gateway.client.await_persisted("key", first.version).await.unwrap();
        assert_eq!(answer.version, deleted.version, "a higher one");
    }
}

async fn everything_can_be_awaited(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    for index in 0..50 {
        for namespace in ["orders", "carts"] {
            let client = gateway.client.namespace(namespace);
            client
                .put(&format!("key{index:02}"), b"value", Mode::Behind)
                .await
                .unwrap();
        }
    }
    assert_eq!(stage.database.entries().await, 0);
    let answer = gateway.client.await_all_persisted().await.expect("the store takes it");
    assert_eq!((answer.version, answer.dead_lettered), (0, 0));
    assert_eq!(stage.database.entries().await, 100);
    // With nothing to wait for, too; and what comes later takes its time again.
    gateway.client.await_all_persisted().await.expect("there is nothing");
    gateway.client.put("later", b"value", Mode::Behind).await.unwrap();
    assert_eq!(stage.database.row("orders", "later").await, None);
}

/// A Put that waits for the store.
fn waiting(client: &Client, key: &str, value: &[u8], mode: Mode) -> PutRequest {
    PutRequest {
        await_persisted: true,
        ..client.put_request(key, value, mode)
    }
}

async fn a_write_can_wait_for_itself(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    let client = &gateway.client;
    for mode in [Mode::Behind, Mode::Through] {
        let put = client.send_put(waiting(client, "key", b"value", mode)).await.unwrap();
        assert_eq!(put.durability(), Durability::Store);
        let row = stage.database.row("orders", "key").await.expect("it is in the store");
        assert_eq!((row.version, row.value.as_deref()), (put.version, Some(&b"value"[..])));
        let request = DeleteRequest {
            await_persisted: true,
            ..client.delete_request("key", mode)
        };
        let deleted = client.send_delete(request).await.unwrap();
        assert_eq!(deleted.durability(), Durability::Store);
        let row = stage.database.row("orders", "key").await.expect("it is in the store");
        assert_eq!((row.version, row.value), (deleted.version, None));
    }
}

async fn a_version_that_nobody_can_have_stamped_is_not_awaited(stage: Stage) {
    let stage = stage.config("[rpc]\ndeadline_default = \"1s\"");
    let gateway = stage.start().await;
    let client = &gateway.client;
    let refused = client
        .await_persisted("key", i64::MAX)
        .await
        .expect_err("it is far ahead");
    assert_refused(&refused, Code::FailedPrecondition, "TOO_NEW");
    // One that may come is waited for.
    let put = client.put("key", b"value", Mode::Through).await.unwrap();
    let refused = client
        .await_persisted("key", put.version + 1)
        .await
        .expect_err("nobody wrote it");
    assert_come_back(&refused, Code::Unavailable);
    assert_eq!(refused.get_details_error_info().unwrap().reason, "NOT_PERSISTED");
}

async fn a_write_is_named_wholly_or_not_at_all(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let named = |namespace: &str, key: &str, version| AwaitPersistedRequest {
        namespace: namespace.to_owned(),
        key: key.to_owned(),
        version,
    };
    for (request, field) in [
        (named("", "key", 1), "namespace"),
        (named("orders", "", 1), "key"),
        (named("orders", "key", 0), "version"),
        (named("orders", "key", -1), "version"),
    ] {
        let refused = client.stub().await_persisted(request).await;
        assert_invalid(&refused.expect_err("it is incomplete"), field);
    }
}

/// A gateway whose calls have so long.
async fn with_deadline(stage: Stage, deadline: &str) -> (Gateway, Stage) {
    let stage = stage.config(&format!("[rpc]\ndeadline_default = \"{deadline}\""));
    (stage.start().await, stage)
}

#[tokio::test]
async fn nobody_is_told_before_the_store_has_it() {
    let stage = Stage::postgres_and_redis().await;
    let gateway = stage.start().await;
    let client = &gateway.client;
    let hold = stage.database.hold_writes().await;
    let put = client.put("key", b"value", Mode::Behind).await.unwrap();
    {
        let one = client.await_persisted("key", put.version);
        let all = client.await_all_persisted();
        let inline = client.send_put(waiting(client, "inline", b"value", Mode::Behind));
        tokio::pin!(one, all, inline);
        let any = async {
            tokio::select! {
                answer = &mut one => format!("{answer:?}"),
                answer = &mut all => format!("{answer:?}"),
                answer = &mut inline => format!("{answer:?}"),
            }
        };
        let early = timeout(A_WHILE, any).await;
        assert!(early.is_err(), "{early:?}");
        // Only the answers wait.
        client.assert_everywhere("key", Some(b"value")).await;
        hold.release().await;
        assert_eq!(one.await.unwrap().version, put.version);
        all.await.expect("the store has it");
        assert_eq!(inline.await.unwrap().durability(), Durability::Store);
    }
    assert_eq!(stage.database.records("orders").await, ["inline", "key"]);
}

#[tokio::test]
async fn a_write_of_another_gateway_can_be_awaited() {
    for stage in [Stage::postgres().await, Stage::postgres_and_redis().await] {
        let ((writer, network), other) = (stage.start_far().await, stage.start().await);
        network.set(Passage::Held);
        let put = writer.client.put("key", b"value", Mode::Behind).await.unwrap();
        let awaited = other.client.await_persisted("key", put.version);
        tokio::pin!(awaited);
        let early = timeout(A_WHILE, &mut awaited).await;
        assert!(early.is_err(), "{early:?}");
        network.restore();
        // A busy machine: the writer needs a moment to find its store again.
        if let Err(refused) = awaited.await {
            assert_come_back(&refused, Code::Unavailable);
            writer.drained().await;
        }
        let answer = other.client.await_persisted("key", put.version).await.unwrap();
        assert_eq!(answer.version, put.version);
        assert_eq!(
            stage.database.value("orders", "key").await.as_deref(),
            Some(&b"value"[..])
        );
        // Everything is what this gateway took itself.
        other.client.await_all_persisted().await.expect("there is nothing");
    }
}

#[tokio::test]
async fn whoever_waited_in_vain_is_told_so() {
    let (gateway, stage) = with_deadline(Stage::postgres_and_redis().await, "1s").await;
    let client = &gateway.client;
    let hold = stage.database.hold_writes().await;
    let put = client.put("key", b"value", Mode::Behind).await.unwrap();
    let (one, all, inline) = tokio::join!(
        client.await_persisted("key", put.version),
        client.await_all_persisted(),
        client.send_put(waiting(client, "inline", b"value", Mode::Behind)),
    );
    for refused in [one.expect_err("it is held"), all.expect_err("it is held")] {
        assert_come_back(&refused, Code::Unavailable);
        let reason = refused.get_details_error_info().unwrap().reason;
        assert_eq!(reason, "NOT_PERSISTED", "{refused:?}");
    }
    // The write goes on.
    let inline = inline.expect_err("it is held");
    assert_do_not_come_back(&inline, Code::DeadlineExceeded, "TIMEOUT");
    assert_eq!(outcome(&inline), "unknown");
    client.assert_everywhere("inline", Some(b"value")).await;
    hold.release().await;
    gateway.drained().await;
    assert_eq!(stage.database.records("orders").await, ["inline", "key"]);
    client
        .await_persisted("key", put.version)
        .await
        .expect("the store has it");
}

/// Asserts that the store has rejected what was awaited.
#[track_caller]
fn assert_dead_lettered(refused: &tonic::Status) {
    assert_do_not_come_back(refused, Code::FailedPrecondition, "DEAD_LETTERED");
}

#[tokio::test]
async fn what_the_store_rejects_is_told_to_who_waits() {
    let stage = Stage::postgres_and_redis().await;
    let gateways = stage.start_all().await;
    let client = &gateways[0].client;
    client.put("key", b"before", Mode::Through).await.unwrap();
    stage
        .database
        .execute("alter table tidegate_entries add constraint no_poison check (value is distinct from 'poison'::bytea)")
        .await;
    let hold = stage.database.hold_writes().await;
    let put = client.put("key", POISON, Mode::Behind).await.unwrap();
    let (one, all, inline, other, ()) = tokio::join!(
        client.await_persisted("key", put.version),
        client.await_all_persisted(),
        client.send_put(waiting(client, "inline", POISON, Mode::Behind)),
        gateways[1].client.await_persisted("key", put.version),
        async {
            until("all of them wait", async || {
                let [first, second] =
                    [&gateways[0], &gateways[1]].map(|gateway| gateway.metric("tidegate_calls_running", &[]));
                first.await == 3.0 && second.await == 1.0
            })
            .await;
            hold.release().await;
        },
    );
    assert_dead_lettered(&one.expect_err("it is rejected"));
    assert_dead_lettered(&all.expect_err("one of them is rejected"));
    assert_dead_lettered(&inline.expect_err("it is rejected"));
    assert_dead_lettered(&other.expect_err("it is rejected"));
    gateways[0].drained().await;
    // Also afterwards, on any gateway.
    for gateway in &gateways {
        let refused = gateway.client.await_persisted("key", put.version).await;
        assert_dead_lettered(&refused.expect_err("it was rejected"));
    }
    assert_eq!(stage.database.dead_letters().await.len(), 2);
    let answer = client
        .await_all_persisted()
        .await
        .expect("nothing is rejected meanwhile");
    assert_eq!(answer.dead_lettered, 2);
    // What is written later is awaited as ever, and counts for what came before it.
    let later = client
        .send_put(waiting(client, "key", b"later", Mode::Behind))
        .await
        .unwrap();
    let answer = client
        .await_persisted("key", put.version)
        .await
        .expect("a higher one is stored");
    assert_eq!(answer.version, later.version);
    eventually("every gateway shows it", SOON, async || {
        let read = gateways[1].client.read("key").await;
        let value = read.entry.as_ref().map(|entry| &entry.value[..]);
        expect(value == Some(b"later"), read)
    })
    .await;
}
