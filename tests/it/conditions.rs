//! Proves that a write with a condition is written exactly where its condition holds when it takes effect: the store decides it, whoever
//! else writes, and what was acknowledged before is counted in, even while the store does not have it yet.

use std::time::Duration;

use tidegate::rpc::proto::{Condition, Durability, Existence, PutRequest, ReadConsistency, Source};
use tokio::{task::JoinSet, time::timeout};
use tonic::Code;

use crate::harness::{
    Client, Mode, SOON,
    calls::{ABSENT, PRESENT, assert_conflict, assert_invalid, assert_refused, standing_version, version},
    client::{assert_come_back, seen},
    eventually, expect,
    proxy::Passage,
    stage::{Stage, clients, on_every_stage},
};

/// Writes wait longer than any test for others to join them.
const LONG_DELAYS: &str = "[namespace_defaults]\nwrite_delay = \"1h\"";

/// How long something must not happen to be taken for held.
const A_WHILE: Duration = Duration::from_millis(300);

on_every_stage! {
    each_condition_is_decided_by_what_stands
    what_has_expired_is_not_there
    a_condition_takes_its_write_through
    a_pending_write_is_counted_in
    one_of_many_creators_wins
    comparing_and_setting_loses_no_update
}

async fn each_condition_is_decided_by_what_stands(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    // Where there is nothing, and where there is a tombstone.
    client.delete("deleted", Mode::Through).await.unwrap();
    for key in ["new", "deleted"] {
        let refused = client.put_if(key, b"no", PRESENT).await.expect_err("there is none");
        assert_refused(&refused, Code::FailedPrecondition, "ABSENT");
        let refused = client.delete_if(key, PRESENT).await.expect_err("there is none");
        assert_refused(&refused, Code::FailedPrecondition, "ABSENT");
        let refused = client.put_if(key, b"no", version(7)).await.expect_err("there is none");
        assert_conflict(&refused, 0);
        let refused = client.delete_if(key, version(7)).await.expect_err("there is none");
        assert_conflict(&refused, 0);
        client.assert_everywhere(key, None).await;

        let first = client.put_if(key, b"first", ABSENT).await.expect("there is none");
        assert_eq!(first.durability(), Durability::Store);
        client.assert_everywhere(key, Some(b"first")).await;
        let refused = client.put_if(key, b"no", ABSENT).await.expect_err("there is one");
        assert_conflict(&refused, first.version);
        let refused = client.delete_if(key, ABSENT).await.expect_err("there is one");
        assert_conflict(&refused, first.version);

        let second = client.put_if(key, b"second", version(first.version)).await;
        let second = second.expect("it stands").version;
        assert!(second > first.version);
        client.assert_everywhere(key, Some(b"second")).await;
        for other in [first.version, second + 1] {
            let refused = client.put_if(key, b"no", version(other)).await;
            assert_conflict(&refused.expect_err("another stands"), second);
            let refused = client.delete_if(key, version(other)).await;
            assert_conflict(&refused.expect_err("another stands"), second);
        }
        client.assert_everywhere(key, Some(b"second")).await;

        let third = client
            .put_if(key, b"third", PRESENT)
            .await
            .expect("there is one")
            .version;
        assert!(third > second);
        client.assert_everywhere(key, Some(b"third")).await;
        let deleted = client.delete_if(key, version(third)).await.expect("it stands");
        assert_eq!(deleted.durability(), Durability::Store);
        assert!(deleted.version > third);
        client.assert_everywhere(key, None).await;
        let row = stage.database.row("orders", key).await;
        assert_eq!(row.map(|row| (row.version, row.value)), Some((deleted.version, None)));
        // Its tombstone is no record.
        let refused = client.put_if(key, b"no", version(deleted.version)).await;
        assert_conflict(&refused.expect_err("there is none"), 0);
        client.delete_if(key, ABSENT).await.expect("there is none");
        client.put_if(key, b"fourth", ABSENT).await.expect("there is none");
        client.delete_if(key, PRESENT).await.expect("there is one");
        client.assert_everywhere(key, None).await;
    }
    assert_eq!(stage.database.dead_letters().await, []);
}

async fn what_has_expired_is_not_there(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let brief = Duration::from_millis(100);
    let put = client.put_for("key", b"brief", Mode::Through, brief).await.unwrap();
    eventually("it expires", SOON, async || {
        let read = client.read("key").await.entry;
        expect(read.is_none(), read)
    })
    .await;
    let refused = client.put_if("key", b"no", PRESENT).await.expect_err("it has expired");
    assert_refused(&refused, Code::FailedPrecondition, "ABSENT");
    let refused = client.delete_if("key", version(put.version)).await;
    assert_conflict(&refused.expect_err("it has expired"), 0);
    let again = client.put_if("key", b"again", ABSENT).await.expect("it has expired");
    assert!(again.version > put.version);
    client.assert_everywhere("key", Some(b"again")).await;
}

async fn a_condition_takes_its_write_through(stage: Stage) {
    let stage = stage.config("[namespaces.behind]\nwrite_mode = \"behind\"");
    let gateway = stage.start().await;
    let client = gateway.client.namespace("behind");
    let plain = client.put("plain", b"value", Mode::Default).await.unwrap();
    assert_eq!(plain.durability(), Durability::Journal, "the namespace is one of those");
    let put = client.put_if("key", b"value", ABSENT).await.expect("there is none");
    assert_eq!(put.durability(), Durability::Store);
    assert_eq!(
        stage.database.value("behind", "key").await.as_deref(),
        Some(&b"value"[..])
    );

    for condition in [ABSENT, PRESENT, version(put.version)] {
        let request = PutRequest {
            condition: Some(condition),
            ..client.put_request("key", b"no", Mode::Behind)
        };
        let refused = client.send_put(request).await.expect_err("they exclude each other");
        assert_invalid(&refused, "write_mode");
    }
    // A condition says one thing.
    let both = Condition {
        existence: Existence::Present as i32,
        version: put.version,
    };
    for condition in [Condition::default(), both] {
        let refused = client.put_if("key", b"no", condition).await;
        assert_refused(
            &refused.expect_err("it says nothing, or two things"),
            Code::InvalidArgument,
            "INVALID",
        );
    }
    client.assert_everywhere("key", Some(b"value")).await;
    let deleted = client.delete_if("key", version(put.version)).await.expect("it stands");
    assert_eq!(deleted.durability(), Durability::Store);
    assert_eq!(stage.database.value("behind", "key").await, None);
}

async fn a_pending_write_is_counted_in(stage: Stage) {
    let stage = stage.config(LONG_DELAYS);
    let gateway = stage.start().await;
    let client = &gateway.client;
    let pending = client.put("created", b"pending", Mode::Behind).await.unwrap();
    let refused = client.put_if("created", b"no", ABSENT).await;
    assert_conflict(&refused.expect_err("it is pending"), pending.version);
    let pending = client.put("changed", b"pending", Mode::Behind).await.unwrap();
    let changed = client.put_if("changed", b"changed", version(pending.version)).await;
    let changed = changed.expect("it is pending").version;
    assert!(changed > pending.version);
    client.assert_everywhere("changed", Some(b"changed")).await;

    let stored = client.put("deleted", b"stored", Mode::Through).await.unwrap();
    client.delete("deleted", Mode::Behind).await.unwrap();
    let refused = client.put_if("deleted", b"no", version(stored.version)).await;
    assert_conflict(&refused.expect_err("its delete is pending"), 0);
    client.put("deleted", b"back", Mode::Behind).await.unwrap();
    client.delete("deleted", Mode::Behind).await.unwrap();
    client
        .put_if("deleted", b"again", ABSENT)
        .await
        .expect("its delete is pending");
    client.assert_everywhere("deleted", Some(b"again")).await;

    // Nothing else was hurried, and what was pending undoes nothing later.
    client.put("other", b"pending", Mode::Behind).await.unwrap();
    client
        .put_if("created", b"created", PRESENT)
        .await
        .expect("it is there");
    assert_eq!(stage.database.row("orders", "other").await, None);
    client.await_all_persisted().await.expect("the store takes it");
    client.assert_everywhere("created", Some(b"created")).await;
    client.assert_everywhere("changed", Some(b"changed")).await;
    client.assert_everywhere("deleted", Some(b"again")).await;
}

/// Of all who create one record at once. The versions of the answer, and of what the others were told.
async fn create(clients: &[Client], key: &str) -> (i64, Vec<i64>) {
    let mut creators = JoinSet::new();
    for (index, client) in clients.iter().cloned().enumerate() {
        let key = key.to_owned();
        creators.spawn(async move { client.put_if(&key, index.to_string().as_bytes(), ABSENT).await });
    }
    let (mut won, mut lost) = (Vec::new(), Vec::new());
    while let Some(answer) = creators.join_next().await {
        match answer.unwrap() {
            Ok(put) => won.push(put.version),
            Err(status) => {
                assert_eq!(status.code(), Code::Aborted, "{status:?}");
                lost.push(standing_version(&status));
            }
        }
    }
    assert_eq!(won.len(), 1, "{key} was created by {won:?}");
    (won[0], lost)
}

async fn one_of_many_creators_wins(stage: Stage) {
    let gateways = stage.start_all().await;
    let clients = clients(&gateways, 16);
    for round in 0..10 {
        let key = format!("key{round}");
        let (won, lost) = create(&clients, &key).await;
        assert_eq!(lost, [won; 15]);
        let row = stage.database.row("orders", &key).await.expect("it was created");
        assert_eq!(row.version, won);
    }
}

async fn comparing_and_setting_loses_no_update(stage: Stage) {
    const CLIENTS: usize = 8;
    const UPDATES: usize = 12;
    let gateways = stage.start_all().await;
    gateways[0].client.put("sum", b"0", Mode::Through).await.unwrap();
    let mut adders = JoinSet::new();
    for client in clients(&gateways, CLIENTS) {
        adders.spawn(async move {
            let mut lost = 0;
            for _ in 0..UPDATES {
                loop {
                    let read = client.get("sum", ReadConsistency::Store).await.unwrap();
                    let entry = read.entry.expect("it is never deleted");
                    let sum: usize = String::from_utf8(entry.value.to_vec()).unwrap().parse().unwrap();
                    let next = (sum + 1).to_string();
                    match client.put_if("sum", next.as_bytes(), version(entry.version)).await {
                        Ok(_) => break,
                        Err(status) => {
                            assert_eq!(status.code(), Code::Aborted, "{status:?}");
                            assert!(standing_version(&status) > entry.version, "{status:?}");
                            lost += 1;
                        }
                    }
                }
            }
            lost
        });
    }
    let lost: usize = adders.join_all().await.into_iter().sum();
    assert!(lost > 0, "nobody was ever in another's way");
    let sum = (CLIENTS * UPDATES).to_string();
    for gateway in &gateways {
        let read = gateway.client.value("sum", ReadConsistency::Store).await;
        assert_eq!(read.as_deref(), Some(sum.as_bytes()));
    }
}

#[tokio::test]
async fn what_is_pending_behind_a_held_store_is_waited_for() {
    let stage = Stage::postgres_and_redis().await;
    let gateway = stage.start().await;
    let hold = stage.database.hold_writes().await;
    let pending = gateway.client.put("key", b"pending", Mode::Behind).await.unwrap();
    let set = gateway.client.put_if("key", b"set", version(pending.version));
    tokio::pin!(set);
    timeout(A_WHILE, &mut set)
        .await
        .expect_err("the store does not have it yet");
    hold.release().await;
    set.await.expect("it stands");
    gateway.client.assert_everywhere("key", Some(b"set")).await;
}

#[tokio::test]
async fn what_is_pending_on_another_gateway_is_waited_for_and_never_ignored() {
    let stage = Stage::postgres_and_redis().await;
    // The writes of this test end before their callers give up.
    let stage = stage.config("[rpc]\ndeadline_default = \"2s\"");
    let ((writer, network), other) = (stage.start_far().await, stage.start().await);
    writer.client.put("key", b"before", Mode::Through).await.unwrap();
    network.set(Passage::Held);
    let pending = writer.client.put("key", b"pending", Mode::Behind).await.unwrap();
    let created = writer.client.put("created", b"pending", Mode::Behind).await.unwrap();
    let refused = tokio::join!(
        async { other.client.put_if("key", b"no", PRESENT).await.map(drop) },
        async {
            other
                .client
                .put_if("key", b"no", version(pending.version))
                .await
                .map(drop)
        },
        async { other.client.put_if("created", b"no", ABSENT).await.map(drop) },
        async { other.client.increment("created", 1).await.map(drop) },
        async { other.client.touch("created", None).await.map(drop) },
    );
    for refused in <[_; 5]>::from(refused) {
        let refused = refused.expect_err("the store cannot decide");
        // Not applied, and worth another try.
        assert_come_back(&refused, Code::Unavailable);
    }
    assert_eq!(
        stage.database.value("orders", "key").await.as_deref(),
        Some(&b"before"[..])
    );
    assert_eq!(stage.database.row("orders", "created").await, None);

    // It waits, and goes on as soon as the store has what was acknowledged.
    let set = other.client.put_if("key", b"set", version(pending.version));
    let release = async {
        tokio::time::sleep(A_WHILE).await;
        network.restore();
    };
    let (set, ()) = tokio::join!(set, release);
    if let Err(refused) = set {
        // A busy machine: the writer needs a moment to find its store again.
        assert_come_back(&refused, Code::Unavailable);
        writer.drained().await;
        let set = other.client.put_if("key", b"set", version(pending.version)).await;
        set.expect("it stands");
    }
    writer.drained().await;
    let refused = other.client.put_if("created", b"no", ABSENT).await;
    assert_conflict(&refused.expect_err("it is there"), created.version);
    for gateway in [&writer, &other] {
        eventually("both show the outcome", SOON, async || {
            let read = gateway.client.read("key").await;
            expect(seen(&read).0 == Some(&b"set"[..]), read)
        })
        .await;
        let read = gateway.client.value("created", ReadConsistency::Store).await;
        assert_eq!(read.as_deref(), Some(&b"pending"[..]));
    }
}

#[tokio::test]
async fn the_caches_of_every_gateway_show_the_outcome() {
    let stage = Stage::postgres_and_redis().await;
    let gateways = stage.start_all().await;
    let [writer, reader] = &gateways[..] else { panic!("two") };
    let mut standing = writer.client.put("key", b"0", Mode::Through).await.unwrap().version;
    for round in 1..=20 {
        // Both have copies of what stood before.
        for gateway in [writer, reader] {
            gateway.client.read("key").await;
        }
        let value = round.to_string();
        standing = match round % 3 {
            0 => writer.client.put_if("key", value.as_bytes(), PRESENT).await,
            _ => writer.client.put_if("key", value.as_bytes(), version(standing)).await,
        }
        .expect("it stands")
        .version;
        let read = writer.client.read("key").await;
        assert_eq!(seen(&read), (Some(value.as_bytes()), Source::L1), "round {round}");
        let read = reader.client.get("key", ReadConsistency::Shared).await.unwrap();
        assert_eq!(seen(&read), (Some(value.as_bytes()), Source::L2), "round {round}");
        eventually("the other's memory shows it", Duration::from_secs(2), async || {
            let read = reader.client.read("key").await;
            expect(seen(&read).0 == Some(value.as_bytes()), read)
        })
        .await;
        // What was refused leaves no trace.
        let refused = reader.client.put_if("key", b"no", ABSENT).await;
        assert_conflict(&refused.expect_err("it is there"), standing);
        for gateway in [writer, reader] {
            gateway.client.assert_everywhere("key", Some(value.as_bytes())).await;
        }
    }
}
