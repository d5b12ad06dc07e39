//! Proves what a disk that fails or is slow does to writes behind: nothing is shown before it is on disk; a sync that failed ends them, with
//! their outcome told, and ends nothing else; and a restart has everything that was answered.

use std::time::Duration;

use tidegate::rpc::proto::ReadConsistency;
use tokio::{task::JoinSet, time::Instant};
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{
    Client, Database, Gateway, Mode, SOON, Setup,
    client::{EVERY, outcome},
    database::Hold,
    disk::Syncs,
    eventually, expect, redis,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_visible_before_it_is_on_disk() {
    const DELAY: Duration = Duration::from_millis(1_500);
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new()
        .store(database.url())
        .redis(&redis.url())
        .config("[rpc]\ndeadline_default = \"30s\"");
    let (writer, other) = (setup.clone().start().await, setup.start().await);
    for key in ["covered", "deleted"] {
        writer.client.put(key, b"before", Mode::Through).await.unwrap();
    }
    let expected = [
        ("new", None),
        ("covered", Some(&b"before"[..])),
        ("deleted", Some(b"before")),
    ];
    let syncs = Syncs::delay(writer.pid(), DELAY).await;
    let sent = Instant::now();
    let client = writer.client.clone();
    let writing = tokio::spawn(async move {
        tokio::join!(
            client.put("new", b"after", Mode::Behind),
            client.put("covered", b"after", Mode::Behind),
            client.delete("deleted", Mode::Behind),
        )
    });
    let mut rounds = 0;
    'reading: loop {
        for gateway in [&writer, &other] {
            for (key, value) in expected {
                for consistency in EVERY {
                    let read = gateway.client.value(key, consistency).await;
                    // A sync that began after the write was sent has not ended before.
                    if sent.elapsed() >= DELAY {
                        break 'reading;
                    }
                    assert_eq!(
                        read.as_deref(),
                        value,
                        "{key} for {consistency:?} {:?} after",
                        sent.elapsed()
                    );
                }
            }
        }
        rounds += 1;
    }
    assert!(rounds > 0, "every reader has looked in time");
    let (new, covered, deleted) = writing.await.unwrap();
    assert!(syncs.count() > 0, "they waited for the disk");
    for version in [new.unwrap().version, covered.unwrap().version, deleted.unwrap().version] {
        assert!(version > 0);
    }
    for (key, value) in [
        ("new", Some(&b"after"[..])),
        ("covered", Some(b"after")),
        ("deleted", None),
    ] {
        writer.client.assert_everywhere(key, value).await;
        let shared = other.client.value(key, ReadConsistency::Shared).await;
        assert_eq!(shared.as_deref(), value, "{key} is shared once it is answered");
    }
}

/// A gateway, and three kinds of writes that were answered before its disk fails: stored (`orders`), waiting for their delay (`slow`), and
/// held by the store (`held`).
async fn with_answered_writes(database: &Database) -> (Gateway, Hold) {
    let gateway = Setup::new()
        .store(database.url())
        // Nothing but a write is to meet the disk.
        .config("[journal]\nidle_sync = \"1h\"\n[store]\ncall_timeout = \"60s\"")
        .config("[namespaces.slow]\nwrite_delay = \"1h\"")
        .start()
        .await;
    let hold = database.hold_namespace("held").await;
    for (namespace, mode) in [
        ("orders", Mode::Through),
        ("slow", Mode::Behind),
        ("held", Mode::Behind),
    ] {
        let client = gateway.client.namespace(namespace);
        for key in ["1", "2", "3"] {
            client.put(key, b"value", mode).await.unwrap();
        }
    }
    (gateway, hold)
}

#[track_caller]
fn assert_refused(status: &Status) {
    let told = (status.code(), outcome(status));
    assert_eq!(told, (Code::Unavailable, "not_applied".to_owned()), "{status:?}");
}

#[tokio::test]
async fn a_failed_sync_ends_writes_behind_and_nothing_else() {
    let database = Database::postgres().await;
    let (mut gateway, hold) = with_answered_writes(&database).await;
    let syncs = Syncs::fail(gateway.pid()).await;

    let client = gateway.client.clone();
    let not_applied = assert_all_fail(&client).await;
    for _ in 0..3 {
        let refused = client.put("refused", b"value", Mode::Behind).await;
        assert_refused(&refused.expect_err("it is over"));
        let refused = client.delete("1", Mode::Behind).await;
        assert_refused(&refused.expect_err("it is over"));
    }
    assert_eq!(syncs.count(), 1, "a sync that failed is not tried again");
    assert_not_ready(&gateway).await;

    client.assert_everywhere("1", Some(b"value")).await;
    for key in 0..16 {
        client.assert_everywhere(&format!("unsure{key}"), None).await;
    }
    client.assert_everywhere("refused", None).await;
    let slow = client.namespace("slow");
    slow.assert_everywhere("1", Some(b"value")).await;
    for write_through in [
        client.put("2", b"newer", Mode::Through).await,
        slow.put("2", b"newer", Mode::Through).await,
    ] {
        write_through.expect("write-through goes on, over what is pending, too");
    }
    client.delete("3", Mode::Through).await.expect("write-through goes on");
    hold.release().await;
    eventually("what is pending drains", SOON, async || {
        let records = database.records("held").await;
        expect(records == ["1", "2", "3"], records)
    })
    .await;

    gateway.kill().await;
    drop(syncs);
    let gateway = gateway.start_again().await;
    assert_all_answered(&gateway).await;
    for key in not_applied {
        let told = format!("{key}: it was told that nothing was applied");
        assert_eq!(gateway.client.value(&key, ReadConsistency::Store).await, None, "{told}");
    }
}

/// Puts at the same time, none of which can reach the disk. The keys of those that were told so: all of them, where a sync of the idle journal
/// for itself has met the disk first; of the others it is not known.
async fn assert_all_fail(client: &Client) -> Vec<String> {
    let mut puts = JoinSet::new();
    for key in 0..16 {
        let (client, key) = (client.clone(), format!("unsure{key}"));
        puts.spawn(async move { (client.put(&key, b"value", Mode::Behind).await, key) });
    }
    let mut not_applied = Vec::new();
    for (put, key) in puts.join_all().await {
        let failed = put.expect_err("it is not on disk");
        assert_eq!(failed.code(), Code::Unavailable, "{failed:?}");
        if outcome(&failed) == "not_applied" {
            not_applied.push(key);
        }
    }
    not_applied
}

async fn assert_not_ready(gateway: &Gateway) {
    let readiness = gateway.await_readiness("journal: failed").await;
    assert_eq!(readiness.status, 503, "{readiness:?}");
    for service in ["", "tidegate.v1.Gateway", "tidegate.journal"] {
        gateway.await_health(service, ServingStatus::NotServing).await;
    }
    assert_eq!(gateway.metric("tidegate_journal_poisoned", &[]).await, 1.0);
}

/// Asserts that a gateway on the data of the one whose disk failed has all that was answered, and works.
async fn assert_all_answered(gateway: &Gateway) {
    gateway.await_readiness("journal: up").await;
    for (namespace, key, value) in [
        ("orders", "1", Some("value")),
        ("orders", "2", Some("newer")),
        ("orders", "3", None),
        ("orders", "refused", None),
        ("slow", "1", Some("value")),
        ("slow", "2", Some("newer")),
        ("slow", "3", Some("value")),
        ("held", "1", Some("value")),
    ] {
        let client = gateway.client.namespace(namespace);
        client.assert_everywhere(key, value.map(str::as_bytes)).await;
    }
    let after = gateway.client.put("after", b"value", Mode::Behind).await;
    after.expect("the disk works again");
}
