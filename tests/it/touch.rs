//! Proves that Touch changes when a record expires, and nothing else of it.

use std::time::Duration;

use tidegate::rpc::proto::{Entry, PutRequest, ReadConsistency, TouchRequest};
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::{
    Client, Mode, SOON,
    calls::{assert_invalid, assert_refused, version},
    client::EVERY,
    eventually, expect,
    stage::{Stage, clients, on_every_stage},
};

const HOUR: Duration = Duration::from_secs(3_600);

on_every_stage! {
    a_touch_changes_the_expiry_alone
    what_is_not_there_cannot_be_touched
    a_pending_write_is_touched
    a_touch_sent_again_is_written_once
    a_touch_never_brings_an_older_value_back
}

/// The entry that a read of every consistency shows.
async fn entry(client: &Client, key: &str) -> Entry {
    let mut entries = Vec::new();
    for consistency in EVERY {
        let read = client.get(key, consistency).await.expect("a read succeeds");
        entries.push(
            read.entry
                .unwrap_or_else(|| panic!("{key} is absent for {consistency:?}")),
        );
    }
    entries.dedup();
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries.remove(0)
}

/// The tags of a key's row, in order.
async fn tags(stage: &Stage, key: &str) -> Vec<String> {
    let sql = if stage.is_postgres() {
        format!("select unnest(tags) from tidegate_entries where key = '{key}' order by 1")
    } else {
        format!("select tag from tidegate_tags where key = '{key}' order by tag")
    };
    stage.database.texts(&sql).await
}

async fn a_touch_changes_the_expiry_alone(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let request = PutRequest {
        tags: vec!["red".to_owned(), "blue".to_owned()],
        ttl: Some(HOUR.try_into().unwrap()),
        ..client.put_request("key", b"value", Mode::Through)
    };
    client.send_put(request).await.unwrap();
    let put = entry(client, "key").await;
    let mut last = put.clone();
    for ttl in [Some(100 * HOUR), None, Some(10 * HOUR)] {
        let touched = client.touch("key", ttl).await.expect("it is there");
        assert!(touched.version > last.version);
        let expected = Entry {
            version: touched.version,
            expire_time: touched.expire_time,
            ..put.clone()
        };
        assert_eq!(entry(client, "key").await, expected);
        assert_eq!(tags(&stage, "key").await, ["blue", "red"]);
        assert_eq!(touched.expire_time.is_some(), ttl.is_some());
        if let (Some(time), Some(ttl)) = (touched.expire_time, ttl) {
            // From the touch on, not from the Put.
            let from_put = put.expire_time.unwrap().seconds + ttl.as_secs() as i64 - HOUR.as_secs() as i64;
            assert!((from_put..from_put + 60).contains(&time.seconds), "{time:?}");
        }
        last = expected;
    }
    // It is a write: conditions see its version.
    client
        .put_if("key", b"no", version(put.version))
        .await
        .expect_err("another stands");
    client.touch("key", Some(Duration::from_millis(1))).await.unwrap();
    eventually("it expires", SOON, async || {
        let read = client.read("key").await.entry;
        expect(read.is_none(), read)
    })
    .await;
    client.assert_everywhere("key", None).await;
}

async fn what_is_not_there_cannot_be_touched(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    client.put("deleted", b"value", Mode::Through).await.unwrap();
    client.delete("deleted", Mode::Through).await.unwrap();
    let brief = Duration::from_millis(50);
    client.put_for("expired", b"value", Mode::Through, brief).await.unwrap();
    eventually("it expires", SOON, async || {
        let read = client.read("expired").await.entry;
        expect(read.is_none(), read)
    })
    .await;
    for key in ["never", "deleted", "expired"] {
        for ttl in [None, Some(HOUR)] {
            let refused = client.touch(key, ttl).await.expect_err("it is not there");
            assert_refused(&refused, Code::FailedPrecondition, "ABSENT");
        }
        client.assert_everywhere(key, None).await;
    }
    assert_eq!(stage.database.row("orders", "never").await, None);
}

async fn a_pending_write_is_touched(stage: Stage) {
    let stage = stage.config("[namespace_defaults]\nwrite_delay = \"1h\"");
    let gateway = stage.start().await;
    let client = &gateway.client;
    let pending = client.put("key", b"pending", Mode::Behind).await.unwrap();
    let touched = client.touch("key", Some(HOUR)).await.expect("it is pending");
    assert!(touched.version > pending.version);
    let expected = Entry {
        value: "pending".into(),
        version: touched.version,
        expire_time: touched.expire_time,
    };
    assert_eq!(entry(client, "key").await, expected);
    client.delete("key", Mode::Behind).await.unwrap();
    let refused = client
        .touch("key", Some(HOUR))
        .await
        .expect_err("its delete is pending");
    assert_refused(&refused, Code::FailedPrecondition, "ABSENT");
    client.await_all_persisted().await.expect("the store takes it");
    client.assert_everywhere("key", None).await;
}

async fn a_touch_sent_again_is_written_once(stage: Stage) {
    let gateways = stage.start_all().await;
    let client = &gateways[0].client;
    client.put("key", b"value", Mode::Through).await.unwrap();
    let named = |ttl| TouchRequest {
        request_id: "one".to_owned(),
        ..client.touch_request("key", ttl)
    };
    let first = client.send_touch(named(Some(HOUR))).await.unwrap();
    assert!(!first.deduplicated);
    let put = client.put("key", b"later", Mode::Through).await.unwrap();
    for gateway in &gateways {
        let again = gateway.client.send_touch(named(Some(HOUR))).await.unwrap();
        assert!(again.deduplicated);
        assert_eq!((again.version, again.expire_time), (first.version, first.expire_time));
        let other = gateway.client.send_touch(named(None)).await;
        assert_invalid(&other.expect_err("it is another touch"), "request_id");
    }
    let read = client.get("key", ReadConsistency::Store).await.unwrap();
    let entry = read.entry.expect("it is there");
    assert_eq!((entry.version, entry.expire_time), (put.version, None));
}

async fn a_touch_never_brings_an_older_value_back(stage: Stage) {
    let gateways = stage.start_all().await;
    gateways[0].client.put("key", b"0", Mode::Through).await.unwrap();
    let mut tasks = JoinSet::new();
    for client in clients(&gateways, 4) {
        tasks.spawn(async move {
            for _ in 0..20 {
                client.touch("key", Some(HOUR)).await.expect("it is there");
            }
        });
    }
    let client = gateways[0].client.clone();
    tasks.spawn(async move {
        for value in 1..=40_u32 {
            let value = value.to_string();
            client.put("key", value.as_bytes(), Mode::Through).await.unwrap();
            let read = client.value("key", ReadConsistency::Store).await;
            assert_eq!(read.as_deref(), Some(value.as_bytes()), "there is one writer");
        }
    });
    tasks.join_all().await;
    for gateway in &gateways {
        let read = gateway.client.value("key", ReadConsistency::Store).await;
        assert_eq!(read.as_deref(), Some(&b"40"[..]));
    }
}
