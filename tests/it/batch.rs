//! Proves that a batch is as many calls at once: each key and each item gets the answer that it would have got by itself.

use std::{collections::BTreeSet, time::Duration};

use tidegate::rpc::proto::{
    BatchGetRequest, BatchWriteRequest, Durability, PutRequest, ReadConsistency, Source, WriteItem, WriteResult,
    batch_get_result, write_item,
};
use tonic::Code;

use crate::harness::{
    Mode, SOON,
    calls::{ABSENT, PRESENT, assert_invalid, delete_item, found, put_item, unread, unwritten, version, written},
    client::{EVERY, seen},
    eventually, expect,
    stage::{Stage, on_every_stage},
};

/// Writes wait longer than any test for others to join them.
const LONG_DELAYS: &str = "[namespace_defaults]\nwrite_delay = \"1h\"";

/// The most keys and items.
const BATCH_MAX: usize = 1_000;

/// The most bytes of values in an answer.
const ANSWER_BYTES_MAX: usize = 3 << 20;

on_every_stage! {
    every_key_is_answered_as_by_itself
    a_batch_fills_the_caches
    an_answer_is_bounded
    every_item_is_answered_as_by_itself
    an_item_that_is_sent_again_is_written_once
    the_later_item_of_a_key_wins
    a_thousand_items_are_written_and_read
    what_is_too_much_is_refused_whole
}

async fn every_key_is_answered_as_by_itself(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    let client = &gateway.client;
    client.put("stored", b"stored", Mode::Through).await.unwrap();
    client
        .put_for("expires", b"some day", Mode::Through, SOON * 100)
        .await
        .unwrap();
    client.put("empty", b"", Mode::Through).await.unwrap();
    client.put("deleted", b"value", Mode::Through).await.unwrap();
    client.delete("deleted", Mode::Through).await.unwrap();
    client.put("pending", b"stored", Mode::Through).await.unwrap();
    client.put("pending", b"pending", Mode::Behind).await.unwrap();
    client.put("going", b"stored", Mode::Through).await.unwrap();
    client.delete("going", Mode::Behind).await.unwrap();
    client
        .namespace("carts")
        .put("foreign", b"value", Mode::Through)
        .await
        .unwrap();
    let brief = Duration::from_millis(100);
    client.put_for("expired", b"value", Mode::Through, brief).await.unwrap();
    eventually("it expires", SOON, async || {
        let read = client.read("expired").await.entry;
        expect(read.is_none(), read)
    })
    .await;
    let keys = [
        "stored",
        "never",
        "expires",
        "empty",
        "stored",
        "deleted",
        "pending",
        "going",
        "foreign",
        "expired",
        "ключ 🔑",
    ];
    for consistency in EVERY {
        let results = client.batch_get(keys, consistency).await;
        for (key, result) in keys.iter().zip(&results) {
            let (alone, result) = (client.get(key, consistency).await.unwrap(), found(result));
            assert_eq!(result.entry, alone.entry, "{key} for {consistency:?}");
            assert!(result.age.is_some() && !result.stale, "{result:?}");
            assert_ne!(result.source(), Source::Unspecified);
        }
        let entry = |index: usize| found(&results[index]).entry.as_ref();
        assert_eq!(entry(0).map(|entry| &entry.value[..]), Some(&b"stored"[..]));
        assert_eq!(entry(6).map(|entry| &entry.value[..]), Some(&b"pending"[..]));
        assert_eq!(entry(7), None);
        if consistency == ReadConsistency::Store {
            assert_eq!(found(&results[0]).source(), Source::Store);
        }
    }
}

async fn a_batch_fills_the_caches(stage: Stage) {
    // No absence must end while this test looks at it.
    let stage = stage.config("[namespace_defaults]\nabsence_lifetime = \"1h\"");
    let gateways = stage.start_all().await;
    let reader = gateways.last().unwrap();
    let keys: Vec<String> = (0..100).map(|index| format!("key{index}")).collect();
    for key in &keys[..50] {
        gateways[0]
            .client
            .put(key, key.as_bytes(), Mode::Through)
            .await
            .unwrap();
    }
    let value = |index: usize| (index < 50).then(|| keys[index].as_bytes());
    // What it hears of the last writes may still end a load of them.
    eventually("all of it, the absences too, is in memory", SOON, async || {
        let results = reader.client.batch_get(&keys, ReadConsistency::Cached).await;
        let mut sources = Vec::new();
        for (index, result) in results.iter().enumerate() {
            let (seen, source) = seen(found(result));
            assert_eq!(seen, value(index), "{index}");
            sources.push(source);
        }
        expect(sources.iter().all(|source| *source == Source::L1), sources)
    })
    .await;
    for (index, key) in keys.iter().enumerate() {
        let read = reader.client.read(key).await;
        assert_eq!(seen(&read), (value(index), Source::L1), "{key}");
    }
    if stage.is_shared() {
        let results = reader.client.batch_get(&keys, ReadConsistency::Shared).await;
        for (index, result) in results.iter().enumerate() {
            assert_eq!(seen(found(result)), (value(index), Source::L2), "{index}");
        }
    }
}

async fn an_answer_is_bounded(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let value = vec![b'x'; 1 << 20];
    let mut asked: Vec<String> = (0..7).map(|index| format!("large{index}")).collect();
    for key in &asked {
        client.put(key, &value, Mode::Through).await.unwrap();
    }
    client.put("small", b"value", Mode::Through).await.unwrap();
    asked.push("small".to_owned());
    let all = asked.len();
    let mut answered = BTreeSet::new();
    for consistency in [ReadConsistency::Cached, ReadConsistency::Store].into_iter().cycle() {
        let results = client.batch_get(&asked, consistency).await;
        let (mut left, mut bytes) = (Vec::new(), 0);
        for (key, result) in asked.iter().zip(&results) {
            if matches!(result.outcome, Some(batch_get_result::Outcome::Found(_))) {
                let entry = found(result).entry.as_ref().expect("it is there");
                bytes += entry.value.len();
                answered.insert(key.clone());
            } else {
                let failure = unread(result);
                assert_eq!(failure.code, Code::ResourceExhausted as i32);
                assert_eq!((failure.reason.as_str(), &failure.retry_delay), ("TOO_LARGE", &None));
                left.push(key.clone());
            }
        }
        assert!(bytes <= ANSWER_BYTES_MAX, "{bytes}");
        assert!(left.len() < asked.len(), "it gets on");
        asked = left;
        if asked.is_empty() {
            break;
        }
    }
    assert_eq!(answered.len(), all);
}

/// Asserts how the items that cannot be written fail.
#[track_caller]
fn assert_failures(results: &[WriteResult], standing: i64) {
    for (index, code, reason, version) in [
        (4, Code::Aborted, "CONFLICT", standing),
        (5, Code::FailedPrecondition, "ABSENT", 0),
        (7, Code::InvalidArgument, "INVALID", 0),
        (8, Code::InvalidArgument, "INVALID", 0),
        (11, Code::Aborted, "CONFLICT", 0),
    ] {
        let failure = unwritten(&results[index]);
        assert_eq!(
            (failure.code, failure.reason.as_str()),
            (code as i32, reason),
            "item {index}"
        );
        assert_eq!(failure.standing_version, version, "item {index}");
        assert!(!failure.unknown && failure.retry_delay.is_none(), "{failure:?}");
        assert_eq!(
            failure.violations.is_empty(),
            code != Code::InvalidArgument,
            "{failure:?}"
        );
        assert!(!failure.message.is_empty(), "item {index}");
    }
}

async fn every_item_is_answered_as_by_itself(stage: Stage) {
    let stage = stage
        .config(LONG_DELAYS)
        .config("[namespaces.behind]\nwrite_mode = \"behind\"");
    let gateway = stage.start().await;
    let client = &gateway.client;
    let behind = client.namespace("behind");
    let standing = client.put("standing", b"value", Mode::Through).await.unwrap();
    client.put("goes", b"value", Mode::Through).await.unwrap();
    let put = |key: &str, mode| client.put_request(key, key.as_bytes(), mode);
    let put_if = |key: &str, condition| PutRequest {
        condition: Some(condition),
        ..put(key, Mode::Default)
    };
    let items = vec![
        put_item(put("through", Mode::Through)),
        put_item(put("behind", Mode::Behind)),
        put_item(behind.put_request("default", b"default", Mode::Default)),
        put_item(put_if("created", ABSENT)),
        put_item(put_if("standing", ABSENT)),
        put_item(put_if("nothing", PRESENT)),
        delete_item(client.delete_request("goes", Mode::Through)),
        put_item(put("", Mode::Through)),
        WriteItem { operation: None },
        put_item(PutRequest {
            await_persisted: true,
            ..put("awaited", Mode::Behind)
        }),
        put_item(PutRequest {
            ttl: Some(SOON.try_into().unwrap()),
            tags: vec!["red".to_owned()],
            ..put("all kinds", Mode::Through)
        }),
        put_item(put_if("changed", version(7))),
    ];
    let results = client.batch_write(items).await;
    for (index, durability) in [
        (0, Durability::Store),
        (1, Durability::Journal),
        (2, Durability::Journal),
        (3, Durability::Store),
        (6, Durability::Store),
        (9, Durability::Store),
        (10, Durability::Store),
    ] {
        let written = written(&results[index]);
        assert_eq!(written.durability(), durability, "item {index}");
        assert!(
            written.version > standing.version && !written.deduplicated,
            "{written:?}"
        );
    }
    assert_failures(&results, standing.version);
    for key in ["through", "behind", "created", "awaited", "all kinds"] {
        client.assert_everywhere(key, Some(key.as_bytes())).await;
        let entry = client.read(key).await.entry.unwrap();
        assert_eq!(entry.expire_time.is_some(), key == "all kinds");
    }
    behind.assert_everywhere("default", Some(b"default")).await;
    client.assert_everywhere("standing", Some(b"value")).await;
    for key in ["nothing", "goes", "changed"] {
        client.assert_everywhere(key, None).await;
    }
    assert_eq!(stage.database.row("orders", "behind").await, None, "it is pending");
}

async fn an_item_that_is_sent_again_is_written_once(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let named = |key: &str, mode| {
        put_item(PutRequest {
            request_id: key.to_owned(),
            ..client.put_request(key, key.as_bytes(), mode)
        })
    };
    let created = PutRequest {
        condition: Some(ABSENT),
        ..client.put_request("created", b"created", Mode::Default)
    };
    let items = vec![
        named("through", Mode::Through),
        named("behind", Mode::Behind),
        put_item(client.put_request("plain", b"plain", Mode::Through)),
        put_item(created),
    ];
    let first = client.batch_write(items.clone()).await;
    let again = client.batch_write(items).await;
    for index in [0, 1] {
        let (first, again) = (written(&first[index]), written(&again[index]));
        assert_eq!((first.deduplicated, again.deduplicated), (false, true), "item {index}");
        assert_eq!(again.version, first.version, "item {index}");
    }
    assert!(written(&again[2]).version > written(&first[2]).version);
    let conflict = unwritten(&again[3]);
    assert_eq!(conflict.standing_version, written(&first[3]).version);
    // By itself an item is the same call.
    let alone = client
        .put_named("through", b"through", Mode::Through, "through")
        .await
        .unwrap();
    assert_eq!((alone.version, alone.deduplicated), (written(&first[0]).version, true));
}

async fn the_later_item_of_a_key_wins(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    for mode in [Mode::Through, Mode::Behind] {
        let key = format!("{mode:?}");
        let put = |value: &[u8]| put_item(client.put_request(&key, value, mode));
        let delete = || delete_item(client.delete_request(&key, mode));
        let carts = put_item(client.namespace("carts").put_request(&key, b"other", mode));
        for (items, last, value) in [
            (vec![put(b"1"), put(b"2"), carts.clone(), put(b"3")], 3, Some(&b"3"[..])),
            (vec![put(b"4"), carts.clone(), put(b"5"), delete()], 3, None),
            (vec![delete(), carts, put(b"6")], 2, Some(&b"6"[..])),
        ] {
            let results = client.batch_write(items.clone()).await;
            for (index, (item, result)) in items.iter().zip(&results).enumerate() {
                let other =
                    matches!(&item.operation, Some(write_item::Operation::Put(put)) if put.namespace == "carts");
                if index == last || other {
                    written(result);
                } else {
                    let failure = unwritten(result);
                    assert_eq!(
                        (failure.code, failure.reason.as_str()),
                        (Code::Aborted as i32, "SUPERSEDED")
                    );
                    assert!(!failure.unknown && failure.retry_delay.is_none(), "{failure:?}");
                }
            }
            client.assert_everywhere(&key, value).await;
            let stored = written(&results[last]).version;
            client.await_persisted(&key, stored).await.expect("the store takes it");
            let row = stage.database.row("orders", &key).await.expect("it was written");
            assert_eq!((row.version, row.value.as_deref()), (stored, value));
        }
    }
}

async fn a_thousand_items_are_written_and_read(stage: Stage) {
    // A debug build on a busy machine.
    let stage = stage.config("[rpc]\ndeadline_default = \"30s\"");
    let gateways = stage.start_all().await;
    let client = &gateways[0].client;
    let keys: Vec<String> = (0..BATCH_MAX).map(|index| format!("key{index:03}")).collect();
    for (mode, round) in [(Mode::Through, "first"), (Mode::Behind, "second")] {
        let value = |key: &str| format!("{round} {key}").into_bytes();
        let items = keys
            .iter()
            .map(|key| put_item(client.put_request(key, &value(key), mode)));
        let results = client.batch_write(items.collect()).await;
        let versions: BTreeSet<i64> = results.iter().map(|result| written(result).version).collect();
        assert_eq!(versions.len(), BATCH_MAX, "each has its own");
        let results = client.batch_get(&keys, ReadConsistency::Cached).await;
        for (key, result) in keys.iter().zip(&results) {
            assert_eq!(seen(found(result)).0, Some(&value(key)[..]), "{key}");
        }
        client.await_all_persisted().await.expect("the store takes it");
        for gateway in &gateways {
            let results = gateway.client.batch_get(&keys, ReadConsistency::Store).await;
            for (key, result) in keys.iter().zip(&results) {
                assert_eq!(seen(found(result)).0, Some(&value(key)[..]), "{key}");
            }
        }
        if stage.is_shared() {
            let results = gateways[1].client.batch_get(&keys, ReadConsistency::Shared).await;
            for (key, result) in keys.iter().zip(&results) {
                assert_eq!(seen(found(result)), (Some(&value(key)[..]), Source::L2), "{key}");
            }
        }
    }
    let through = gateways[0].metric("tidegate_store_commit_batch_writes_count", &["path=\"through\""]);
    let commits = through.await;
    assert!(commits <= BATCH_MAX as f64 / 4.0, "they share commits: {commits}");
    assert_eq!(stage.database.entries().await, BATCH_MAX as i64);
}

async fn what_is_too_much_is_refused_whole(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    for count in [0, BATCH_MAX + 1] {
        let keys = vec!["key".to_owned(); count];
        let request = BatchGetRequest {
            namespace: "orders".to_owned(),
            keys,
            ..BatchGetRequest::default()
        };
        let refused = client.stub().batch_get(request).await.expect_err("it is no batch");
        assert_invalid(&refused, "keys");
        let items = (0..count).map(|index| put_item(client.put_request(&format!("key{index}"), b"no", Mode::Through)));
        let request = BatchWriteRequest { items: items.collect() };
        let refused = client.stub().batch_write(request).await.expect_err("it is no batch");
        assert_invalid(&refused, "items");
    }
    assert_eq!(stage.database.entries().await, 0);
}
