//! Proves that a write which is sent again under its request id is written once, and gets its first answer: through on every gateway, behind
//! on the one that took it, whatever happened in between.

use std::time::Duration;

use tidegate::rpc::proto::{Durability, PutRequest, PutResponse, ReadConsistency};
use tonic::{Code, Status};

use crate::harness::{
    Client, Database, Gateway, Mode, SOON,
    calls::{ABSENT, PRESENT, assert_invalid, assert_refused},
    eventually, expect,
    stage::{Stage, on_every_stage},
    until,
};

/// Writes wait longer than any test for others to join them.
const LONG_DELAYS: &str = "[namespace_defaults]\nwrite_delay = \"1h\"";

on_every_stage! {
    a_write_through_is_written_once_on_every_gateway
    a_write_through_is_known_after_a_crash
    a_write_behind_is_written_once
    a_write_behind_is_known_after_a_crash
    a_write_behind_is_known_after_its_drain_and_a_restart
    writes_of_one_key_are_each_known_after_a_crash
    writes_of_one_key_are_each_known_to_the_store
    an_id_stands_for_one_content
    an_id_is_of_its_namespace
    what_was_not_applied_is_not_remembered
    an_id_is_forgotten_after_its_window
    writes_that_are_sent_at_once_are_one
}

/// The answer that a repeated write gets: the first one, marked. What it rests on may have grown.
#[track_caller]
fn assert_repeats(again: Result<PutResponse, Status>, first: &PutResponse) {
    let again = again.expect("it is answered as before");
    assert_eq!((again.version, again.deduplicated), (first.version, true), "{first:?}");
    assert!(
        [first.durability(), Durability::Store].contains(&again.durability()),
        "{again:?}"
    );
}

#[track_caller]
fn first(answer: Result<PutResponse, Status>) -> PutResponse {
    let answer = answer.expect("it is written");
    assert!(!answer.deduplicated, "{answer:?}");
    answer
}

/// Asserts what a key is, everywhere; and, in the store, that a write of this version made it so.
async fn assert_stands(database: &Database, client: &Client, key: &str, value: &[u8], version: i64) {
    client.assert_everywhere(key, Some(value)).await;
    let row = database.row("orders", key).await.map(|row| (row.version, row.value));
    assert_eq!(row, Some((version, Some(value.to_vec()))), "{key}");
}

async fn killed_and_started_again(mut gateway: Gateway) -> Gateway {
    gateway.kill().await;
    gateway.start_again().await
}

/// How many ids the store knows of.
async fn remembered(stage: &Stage) -> usize {
    let ids = stage.database.texts("select request_id from tidegate_requests").await;
    ids.len()
}

async fn a_write_through_is_written_once_on_every_gateway(stage: Stage) {
    let gateways = stage.start_all().await;
    let client = &gateways[0].client;
    let put = first(client.put_named("key", b"one", Mode::Through, "one").await);
    let deleted = client.delete_named("deleted", Mode::Through, "gone").await.unwrap();
    assert!(!deleted.deduplicated);
    for gateway in &gateways {
        assert_repeats(
            gateway.client.put_named("key", b"one", Mode::Through, "one").await,
            &put,
        );
    }
    // Nor does it undo what came later.
    let later = client.put("key", b"later", Mode::Through).await.unwrap();
    client.put("deleted", b"back", Mode::Through).await.unwrap();
    for gateway in &gateways {
        assert_repeats(
            gateway.client.put_named("key", b"one", Mode::Through, "one").await,
            &put,
        );
        let again = gateway.client.delete_named("deleted", Mode::Through, "gone").await;
        let again = again.expect("it is answered as before");
        assert_eq!((again.version, again.deduplicated), (deleted.version, true));
        let read = gateway.client.value("deleted", ReadConsistency::Store).await;
        assert_eq!(read.as_deref(), Some(&b"back"[..]));
    }
    assert_stands(&stage.database, client, "key", b"later", later.version).await;
    assert_eq!(remembered(&stage).await, 2);
}

async fn a_write_through_is_known_after_a_crash(stage: Stage) {
    let gateway = stage.start().await;
    let put = first(gateway.client.put_named("key", b"one", Mode::Through, "one").await);
    let created = PutRequest {
        condition: Some(ABSENT),
        request_id: "two".to_owned(),
        ..gateway.client.put_request("created", b"value", Mode::Default)
    };
    let won = first(gateway.client.send_put(created.clone()).await);
    let gateway = killed_and_started_again(gateway).await;
    let client = &gateway.client;
    assert_repeats(client.put_named("key", b"one", Mode::Through, "one").await, &put);
    // Whoever does not know that it won asks again: and still has.
    assert_repeats(client.send_put(created).await, &won);
    assert_stands(&stage.database, client, "key", b"one", put.version).await;
}

async fn a_write_behind_is_written_once(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    let client = &gateway.client;
    let put = first(client.put_named("key", b"one", Mode::Behind, "one").await);
    assert_eq!(put.durability(), Durability::Journal);
    assert_repeats(client.put_named("key", b"one", Mode::Behind, "one").await, &put);
    let deleted = client.delete_named("deleted", Mode::Behind, "gone").await.unwrap();
    let later = client.put("key", b"later", Mode::Behind).await.unwrap();
    client.put("deleted", b"back", Mode::Behind).await.unwrap();
    assert_repeats(client.put_named("key", b"one", Mode::Behind, "one").await, &put);
    let again = client.delete_named("deleted", Mode::Behind, "gone").await.unwrap();
    assert_eq!((again.version, again.deduplicated), (deleted.version, true));
    client.assert_everywhere("key", Some(b"later")).await;
    client.await_all_persisted().await.expect("the store takes it");
    gateway.drained().await;
    assert_repeats(client.put_named("key", b"one", Mode::Behind, "one").await, &put);
    assert_stands(&stage.database, client, "key", b"later", later.version).await;
    client.assert_everywhere("deleted", Some(b"back")).await;
}

async fn a_write_behind_is_known_after_a_crash(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    let put = first(gateway.client.put_named("key", b"one", Mode::Behind, "one").await);
    let deleted = gateway
        .client
        .delete_named("deleted", Mode::Behind, "gone")
        .await
        .unwrap();
    // Twice: what one recovery finds the next one finds again.
    let gateway = killed_and_started_again(gateway).await;
    assert_repeats(gateway.client.put_named("key", b"one", Mode::Behind, "one").await, &put);
    let gateway = killed_and_started_again(gateway).await;
    let client = &gateway.client;
    assert_repeats(client.put_named("key", b"one", Mode::Behind, "one").await, &put);
    let again = client.delete_named("deleted", Mode::Behind, "gone").await.unwrap();
    assert_eq!((again.version, again.deduplicated), (deleted.version, true));
    let other = client.put_named("key", b"other", Mode::Behind, "one").await;
    assert_invalid(&other.expect_err("it is another write"), "request_id");
    client.await_all_persisted().await.expect("the store takes it");
    assert_stands(&stage.database, client, "key", b"one", put.version).await;
}

async fn a_write_behind_is_known_after_its_drain_and_a_restart(stage: Stage) {
    let mut gateway = stage.start().await;
    let put = first(gateway.client.put_named("key", b"one", Mode::Behind, "one").await);
    gateway.drained().await;
    let later = gateway.client.put("key", b"later", Mode::Behind).await.unwrap();
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert_eq!(remembered(&stage).await, 1);
    let gateway = gateway.start_again().await;
    assert_repeats(gateway.client.put_named("key", b"one", Mode::Behind, "one").await, &put);
    let gateway = killed_and_started_again(gateway).await;
    let client = &gateway.client;
    assert_repeats(client.put_named("key", b"one", Mode::Behind, "one").await, &put);
    let other = client.put_named("key", b"other", Mode::Behind, "one").await;
    assert_invalid(&other.expect_err("it is another write"), "request_id");
    assert_stands(&stage.database, client, "key", b"later", later.version).await;
}

/// Writes one key a few times, each under an id of its own, before any of it is drained.
async fn written_often(gateway: &Gateway) -> Vec<(String, PutResponse)> {
    let mut puts = Vec::new();
    for number in 0..5 {
        let id = format!("id {number}");
        let put = gateway.client.put_named("key", id.as_bytes(), Mode::Behind, &id).await;
        puts.push((id, first(put)));
    }
    puts
}

async fn assert_all_known(gateway: &Gateway, puts: &[(String, PutResponse)]) {
    for (id, put) in puts {
        let again = gateway.client.put_named("key", id.as_bytes(), Mode::Behind, id).await;
        assert_repeats(again, put);
    }
}

async fn writes_of_one_key_are_each_known_after_a_crash(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    let puts = written_often(&gateway).await;
    assert_all_known(&gateway, &puts).await;
    let gateway = killed_and_started_again(gateway).await;
    assert_all_known(&gateway, &puts).await;
    let gateway = killed_and_started_again(gateway).await;
    assert_all_known(&gateway, &puts).await;
    gateway.client.await_all_persisted().await.expect("the store takes it");
    let (last, put) = puts.last().unwrap();
    assert_stands(&stage.database, &gateway.client, "key", last.as_bytes(), put.version).await;
}

async fn writes_of_one_key_are_each_known_to_the_store(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    let puts = written_often(&gateway).await;
    // Overtaken by a write that goes through: their ids are known all the same.
    let through = gateway.client.put("key", b"through", Mode::Through).await.unwrap();
    assert_all_known(&gateway, &puts).await;
    gateway.client.await_all_persisted().await.expect("the store takes it");
    eventually("the store knows all ids", SOON, async || {
        let remembered = remembered(&stage).await;
        expect(remembered == puts.len(), remembered)
    })
    .await;
    gateway.drained().await;
    let gateway = killed_and_started_again(gateway).await;
    assert_all_known(&gateway, &puts).await;
    assert_stands(&stage.database, &gateway.client, "key", b"through", through.version).await;
}

async fn an_id_stands_for_one_content(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    let client = &gateway.client;
    for mode in [Mode::Through, Mode::Behind] {
        let id = format!("id {mode:?}");
        let key = format!("key {mode:?}");
        let named = |key: &str, value: &[u8]| PutRequest {
            request_id: id.clone(),
            ..client.put_request(key, value, mode)
        };
        let put = first(client.send_put(named(&key, b"value")).await);
        let others = [
            ("value", named(&key, b"other")),
            ("key", named("other", b"value")),
            (
                "ttl",
                PutRequest {
                    ttl: Some(Duration::from_secs(60).try_into().unwrap()),
                    ..named(&key, b"value")
                },
            ),
            (
                "tags",
                PutRequest {
                    tags: vec!["red".to_owned()],
                    ..named(&key, b"value")
                },
            ),
            (
                "condition",
                PutRequest {
                    write_mode: Mode::Default.number(),
                    condition: Some(PRESENT),
                    ..named(&key, b"value")
                },
            ),
        ];
        for (what, other) in others {
            let refused = client.send_put(other).await;
            let refused = refused.expect_err(&format!("another {what}"));
            assert_invalid(&refused, "request_id");
        }
        let refused = client.delete_named(&key, mode, &id).await;
        assert_invalid(&refused.expect_err("it is a delete"), "request_id");
        let refused = client.increment_named(&key, 1, &id).await;
        assert_invalid(&refused.expect_err("it is an increment"), "request_id");
        client.assert_everywhere(&key, Some(b"value")).await;
        client.assert_everywhere("other", None).await;

        // When to answer is no content.
        for mode in [Mode::Through, Mode::Behind, Mode::Default] {
            let again = PutRequest {
                write_mode: mode.number(),
                ..named(&key, b"value")
            };
            assert_repeats(client.send_put(again).await, &put);
        }
    }
    client.await_all_persisted().await.expect("the store takes it");
    assert_eq!(stage.database.records("orders").await, ["key Behind", "key Through"]);
}

async fn an_id_is_of_its_namespace(stage: Stage) {
    let gateway = stage.start().await;
    for mode in [Mode::Through, Mode::Behind] {
        let id = format!("{mode:?}");
        let orders = first(gateway.client.put_named("key", b"orders", mode, &id).await);
        let client = gateway.client.namespace("carts");
        let carts = first(client.put_named("key", b"carts", mode, &id).await);
        assert!(carts.version > orders.version);
        assert_repeats(gateway.client.put_named("key", b"orders", mode, &id).await, &orders);
        assert_repeats(client.put_named("key", b"carts", mode, &id).await, &carts);
        client.assert_everywhere("key", Some(b"carts")).await;
    }
}

async fn what_was_not_applied_is_not_remembered(stage: Stage) {
    let gateways = stage.start_all().await;
    let client = &gateways[0].client;
    let named = PutRequest {
        condition: Some(PRESENT),
        request_id: "one".to_owned(),
        ..client.put_request("key", b"named", Mode::Default)
    };
    for gateway in &gateways {
        let refused = gateway.client.send_put(named.clone()).await.expect_err("there is none");
        assert_refused(&refused, Code::FailedPrecondition, "ABSENT");
    }
    client.put("key", b"plain", Mode::Through).await.unwrap();
    let put = first(gateways[0].client.send_put(named.clone()).await);
    client.delete("key", Mode::Through).await.unwrap();
    for gateway in &gateways {
        // It was applied once: its condition is not asked again.
        assert_repeats(gateway.client.send_put(named.clone()).await, &put);
    }
    client.assert_everywhere("key", None).await;
}

async fn an_id_is_forgotten_after_its_window(stage: Stage) {
    let stage = stage.config("[requests]\nwindow = \"1s\"\n[rpc]\ndeadline_default = \"1s\"\ndeadline_max = \"1s\"");
    let gateway = stage.start().await;
    let client = &gateway.client;
    for mode in [Mode::Through, Mode::Behind] {
        let key = format!("{mode:?}");
        let put = first(client.put_named(&key, b"value", mode, &key).await);
        let anew = eventually("the window is over", SOON, async || {
            let again = client.put_named(&key, b"value", mode, &key).await.unwrap();
            if again.deduplicated {
                assert_eq!(again.version, put.version);
                return Err(format!("{again:?}"));
            }
            Ok(again)
        })
        .await;
        assert!(anew.version > put.version);
        // And for another content it may be used again.
        eventually("that window is over, too", SOON, async || {
            let other = client.put_named(&key, b"other", mode, &key).await;
            expect(other.is_ok(), other)
        })
        .await;
        client.assert_everywhere(&key, Some(b"other")).await;
    }
}

async fn writes_that_are_sent_at_once_are_one(stage: Stage) {
    let gateways = stage.start_all().await;
    for round in 0..10 {
        let key = format!("key {round}");
        for mode in [Mode::Through, Mode::Behind] {
            let id = format!("{round} {mode:?}");
            // A write-behind one is known to the gateway that took it.
            let at = |index: usize| match mode {
                Mode::Behind => &gateways[0].client,
                _ => &gateways[index % gateways.len()].client,
            };
            let put = |index: usize| at(index).put_named(&key, b"value", mode, &id);
            let answers = tokio::join!(put(0), put(1), put(2), put(3), put(4), put(5));
            let answers = <[_; 6]>::from(answers).map(|answer| answer.expect("it is written"));
            let versions = answers.map(|answer| answer.version);
            assert_eq!(versions, [versions[0]; 6], "{mode:?}");
            let firsts = answers.iter().filter(|answer| !answer.deduplicated).count();
            assert_eq!(firsts, 1, "{answers:?}");
        }
    }
}

#[tokio::test]
async fn what_the_journal_brings_back_is_known_before_the_store_has_it() {
    for stage in [Stage::postgres().await, Stage::postgres_and_redis().await] {
        let gateway = stage.start().await;
        let hold = stage.database.hold_writes().await;
        let puts = written_often(&gateway).await;
        let gateway = killed_and_started_again(gateway).await;
        assert_all_known(&gateway, &puts).await;
        assert_eq!(remembered(&stage).await, 0, "the store has taken nothing");
        hold.release().await;
        gateway.drained().await;
        assert_all_known(&gateway, &puts).await;
        assert_eq!(remembered(&stage).await, puts.len());
    }
}

/// Two calls of one id while the store takes nothing, with the second sent once the first is under way.
async fn joined(mode: Mode) {
    let stage = Stage::postgres_and_redis().await;
    let gateway = stage.start().await;
    let client = &gateway.client;
    let hold = stage.database.hold_writes().await;
    let call = |value: &'static [u8]| {
        let request = PutRequest {
            request_id: "one".to_owned(),
            await_persisted: true,
            ..client.put_request("key", value, mode)
        };
        let client = client.clone();
        tokio::spawn(async move { client.send_put(request).await })
    };
    let running = async |calls: f64| {
        until("the calls are under way", async || {
            gateway.metric("tidegate_calls_running", &[]).await == calls
        })
        .await;
    };
    let one = call(b"value");
    running(1.0).await;
    stage.database.await_waiting(1).await;
    let two = call(b"value");
    running(2.0).await;
    // Another write under the same id need not wait to be refused, and waits at most for the first.
    let other = call(b"other");
    assert!(!one.is_finished() && !two.is_finished(), "the store has taken nothing");
    hold.release().await;
    let (one, two) = (one.await.unwrap().unwrap(), two.await.unwrap().unwrap());
    assert_eq!((one.version, one.durability()), (two.version, Durability::Store));
    assert_eq!(
        (one.deduplicated, two.deduplicated, two.durability()),
        (false, true, Durability::Store)
    );
    let refused = other.await.unwrap().expect_err("it is another write");
    assert_invalid(&refused, "request_id");
    assert_stands(&stage.database, client, "key", b"value", one.version).await;
    assert_eq!(remembered(&stage).await, 1);
}

#[tokio::test]
async fn a_write_through_under_way_is_joined() {
    joined(Mode::Through).await;
}

#[tokio::test]
async fn a_write_behind_under_way_is_joined() {
    joined(Mode::Behind).await;
}
