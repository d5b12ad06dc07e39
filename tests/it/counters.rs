//! Proves that a counter counts every increment once: whatever it started from, whoever else counts, and whatever is sent twice.

use std::{collections::BTreeSet, time::Duration};

use tidegate::rpc::proto::{Entry, IncrementRequest, IncrementResponse, ReadConsistency};
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::{
    Client, Mode, SOON,
    calls::{assert_invalid, assert_refused},
    eventually, expect,
    stage::{Stage, clients, on_every_stage},
    until,
};

const HOUR: Duration = Duration::from_secs(3_600);

on_every_stage! {
    a_counter_is_a_record_that_is_added_to
    what_was_put_is_counted_from
    what_is_no_counter_is_left_alone
    a_counter_stays_in_its_range
    a_counter_lives_from_its_creation
    what_has_ended_is_counted_anew
    an_increment_sent_again_counts_once
    concurrent_sums_are_exact
}

async fn entry(client: &Client, key: &str) -> Entry {
    let read = client.get(key, ReadConsistency::Store).await.unwrap();
    read.entry.expect("it is there")
}

/// Increments a counter that lives for so long if this creates it.
async fn count_for(client: &Client, key: &str, ttl: Duration) -> IncrementResponse {
    let request = IncrementRequest {
        ttl: Some(ttl.try_into().unwrap()),
        ..client.increment_request(key, 1)
    };
    client.send_increment(request).await.expect("it is counted")
}

async fn a_counter_is_a_record_that_is_added_to(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let unset = IncrementRequest {
        delta: None,
        ..client.increment_request("key", 0)
    };
    let mut last = client.send_increment(unset).await.expect("an absent one counts as 0");
    assert_eq!((last.value, last.expire_time, last.deduplicated), (1, None, false));
    for (delta, sum) in [(41, 42), (-50, -8), (8, 0), (1 << 40, 1 << 40), (-1, (1 << 40) - 1)] {
        let counted = client.increment("key", delta).await.expect("it is counted");
        assert_eq!(counted.value, sum);
        assert!(counted.version > last.version);
        client.assert_everywhere("key", Some(sum.to_string().as_bytes())).await;
        assert_eq!(entry(client, "key").await.version, counted.version);
        last = counted;
    }
    let row = stage.database.row("orders", "key").await.expect("it is in the store");
    assert_eq!(row.version, last.version);
    assert_eq!(row.value, Some(last.value.to_string().into_bytes()));
    // It is what others say, too.
    assert_eq!(client.namespace("others").increment("key", 5).await.unwrap().value, 5);
    let zero = client.increment("key", 0).await.expect_err("it would count nothing");
    assert_invalid(&zero, "delta");
}

async fn what_was_put_is_counted_from(stage: Stage) {
    let stage = stage.config("[namespace_defaults]\nwrite_delay = \"1h\"");
    let gateway = stage.start().await;
    let client = &gateway.client;
    client.put("through", b"10", Mode::Through).await.unwrap();
    assert_eq!(client.increment("through", 5).await.unwrap().value, 15);
    client.put("through", b"-3", Mode::Through).await.unwrap();
    assert_eq!(client.increment("through", 5).await.unwrap().value, 2);
    // Pending writes are counted from, and deletes that are pending, too.
    client.put("behind", b"100", Mode::Behind).await.unwrap();
    assert_eq!(client.increment("behind", 1).await.unwrap().value, 101);
    client.put("through", b"1000", Mode::Behind).await.unwrap();
    assert_eq!(client.increment("through", 1).await.unwrap().value, 1_001);
    client.delete("through", Mode::Behind).await.unwrap();
    assert_eq!(client.increment("through", 1).await.unwrap().value, 1);
    // What comes later stands.
    client.put("through", b"7", Mode::Behind).await.unwrap();
    client.await_all_persisted().await.expect("the store takes it");
    client.assert_everywhere("through", Some(b"7")).await;
    client.assert_everywhere("behind", Some(b"101")).await;
}

async fn what_is_no_counter_is_left_alone(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let others: [&[u8]; 13] = [
        b"",
        b"x",
        b"+1",
        b"01",
        b"-0",
        b"1.0",
        b" 1",
        b"1 ",
        b"0x1",
        b"--1",
        b"9223372036854775808",
        b"\xff",
        b"1\0",
    ];
    for (index, value) in others.into_iter().enumerate() {
        let key = format!("key{index}");
        let put = client.put(&key, value, Mode::Through).await.unwrap();
        let refused = client.increment(&key, 1).await.expect_err("it is no counter");
        assert_refused(&refused, Code::FailedPrecondition, "NOT_A_COUNTER");
        assert_eq!(entry(client, &key).await.version, put.version);
        client.assert_everywhere(&key, Some(value)).await;
    }
}

async fn a_counter_stays_in_its_range(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    for (edge, back) in [(i64::MAX, -1), (i64::MIN, 1)] {
        assert_eq!(client.increment("key", edge).await.unwrap().value, edge);
        for delta in [-back, edge] {
            let refused = client
                .increment("key", delta)
                .await
                .expect_err("it would leave its range");
            assert_refused(&refused, Code::OutOfRange, "OUT_OF_RANGE");
        }
        client.assert_everywhere("key", Some(edge.to_string().as_bytes())).await;
        assert_eq!(client.increment("key", back).await.unwrap().value, edge + back);
        client.delete("key", Mode::Through).await.unwrap();
    }
}

async fn a_counter_lives_from_its_creation(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let created = count_for(client, "key", HOUR).await;
    assert!(created.expire_time.is_some());
    let counted = count_for(client, "key", 48 * HOUR).await;
    assert_eq!((counted.value, counted.expire_time), (2, created.expire_time));
    let counted = client.increment("key", 1).await.unwrap();
    assert_eq!((counted.value, counted.expire_time), (3, created.expire_time));
    assert_eq!(entry(client, "key").await.expire_time, created.expire_time);

    let touched = client.touch("key", Some(2 * HOUR)).await.unwrap();
    let (before, after) = (created.expire_time.unwrap(), touched.expire_time.unwrap());
    assert!(after.seconds > before.seconds + 3_000, "{before:?} {after:?}");
    let counted = count_for(client, "key", HOUR).await;
    assert_eq!((counted.value, counted.expire_time), (4, touched.expire_time));
    client.touch("key", None).await.unwrap();
    let counted = count_for(client, "key", HOUR).await;
    assert_eq!((counted.value, counted.expire_time), (5, None));
    // One that was put lives as that said.
    client.put_for("put", b"1", Mode::Through, HOUR).await.unwrap();
    let counted = client.increment("put", 1).await.unwrap();
    assert_eq!(counted.expire_time, entry(client, "put").await.expire_time);
    assert!(counted.expire_time.is_some());
}

async fn what_has_ended_is_counted_anew(stage: Stage) {
    let gateway = stage.start().await;
    let client = &gateway.client;
    let first = count_for(client, "key", Duration::from_millis(200)).await;
    eventually("it expires", SOON, async || {
        let read = client.read("key").await.entry;
        expect(read.is_none(), read)
    })
    .await;
    let anew = count_for(client, "key", HOUR).await;
    assert_eq!(anew.value, 1);
    assert!(anew.version > first.version);
    assert!(anew.expire_time.unwrap().seconds > first.expire_time.unwrap().seconds + 3_000);
    let deleted = client.delete("key", Mode::Through).await.unwrap();
    let anew = client.increment("key", 3).await.unwrap();
    assert_eq!((anew.value, anew.expire_time), (3, None));
    assert!(anew.version > deleted.version);
    client.assert_everywhere("key", Some(b"3")).await;
}

async fn an_increment_sent_again_counts_once(stage: Stage) {
    let gateways = stage.start_all().await;
    let client = &gateways[0].client;
    let first = client.increment_named("key", 5, "one").await.unwrap();
    assert_eq!((first.value, first.deduplicated), (5, false));
    client.increment("key", 100).await.unwrap();
    for gateway in &gateways {
        let again = gateway.client.increment_named("key", 5, "one").await.unwrap();
        let expected = IncrementResponse {
            deduplicated: true,
            ..first
        };
        assert_eq!(again, expected, "the first answer, not today's");
        let other = gateway.client.increment_named("key", 6, "one").await;
        assert_invalid(&other.expect_err("it is another increment"), "request_id");
        let other = gateway.client.increment_named("other", 5, "one").await;
        assert_invalid(&other.expect_err("it is another key"), "request_id");
    }
    // Not remembered: what counted nothing.
    client.put("late", b"x", Mode::Through).await.unwrap();
    let refused = client.increment_named("late", 1, "two").await;
    assert_refused(
        &refused.expect_err("it is no counter"),
        Code::FailedPrecondition,
        "NOT_A_COUNTER",
    );
    client.put("late", b"1", Mode::Through).await.unwrap();
    let counted = client.increment_named("late", 1, "two").await.unwrap();
    assert_eq!((counted.value, counted.deduplicated), (2, false));
    client.assert_everywhere("key", Some(b"105")).await;
    assert_eq!(stage.database.row("orders", "other").await, None);
}

async fn concurrent_sums_are_exact(stage: Stage) {
    const CLIENTS: i64 = 12;
    const COUNTS: i64 = 20;
    let gateways = stage.start_all().await;
    let mut counters = JoinSet::new();
    for (index, client) in clients(&gateways, CLIENTS as usize).into_iter().enumerate() {
        counters.spawn(async move {
            let mut seen = Vec::new();
            for count in 0..COUNTS {
                // Some of them twice, at the same time.
                let id = format!("{index} {count}");
                let answers = if count % 4 == 0 {
                    let twice = tokio::join!(
                        client.increment_named("sum", 1, &id),
                        client.increment_named("sum", 1, &id)
                    );
                    [twice.0.unwrap(), twice.1.unwrap()]
                } else {
                    [client.increment("sum", 1).await.unwrap(); 2]
                };
                assert_eq!(
                    (answers[0].value, answers[0].version),
                    (answers[1].value, answers[1].version)
                );
                seen.push((answers[0].value, answers[0].version));
            }
            assert!(seen.is_sorted(), "each is above the one before: {seen:?}");
            seen
        });
    }
    let seen: Vec<(i64, i64)> = counters.join_all().await.concat();
    // In the order of their versions, every sum from the first on, each once.
    let by_version: BTreeSet<(i64, i64)> = seen.iter().map(|&(value, version)| (version, value)).collect();
    let sums: Vec<i64> = by_version.iter().map(|&(_, value)| value).collect();
    assert_eq!(sums, (1..=CLIENTS * COUNTS).collect::<Vec<_>>());
    let sum = (CLIENTS * COUNTS).to_string();
    assert_eq!(
        stage.database.value("orders", "sum").await,
        Some(sum.clone().into_bytes())
    );
    for gateway in &gateways {
        let read = gateway.client.value("sum", ReadConsistency::Store).await;
        assert_eq!(read.as_deref(), Some(sum.as_bytes()));
    }
}

#[tokio::test]
async fn concurrent_increments_of_one_key_share_updates_of_its_row() {
    // Fewer than one connection carries at a time.
    const CALLS: usize = 90;
    let stage = Stage::postgres_and_redis().await;
    let stage = stage.config("[rpc]\ndeadline_default = \"30s\"");
    let gateway = stage.start().await;
    gateway.client.increment("key", 1).await.unwrap();
    stage
        .database
        .execute(
            "create table updates (of_row text); \
             create function count_update() returns trigger language plpgsql as \
                 'begin insert into updates values (new.key); return new; end'; \
             create trigger count_update after update on tidegate_entries for each row execute function count_update()",
        )
        .await;
    let hold = stage.database.hold_writes().await;
    let mut calls = JoinSet::new();
    for _ in 0..CALLS {
        let client = gateway.client.clone();
        calls.spawn(async move { client.increment("key", 1).await.unwrap().value });
    }
    until("all of them are under way", async || {
        gateway.metric("tidegate_calls_running", &[]).await == CALLS as f64
    })
    .await;
    stage.database.await_waiting(1).await;
    hold.release().await;
    let sums: BTreeSet<i64> = calls.join_all().await.into_iter().collect();
    assert_eq!(sums, (2..=CALLS as i64 + 1).collect());
    let updates = stage.database.texts("select of_row from updates").await;
    // One for what was under way when the store was held, on each of its connections, and few for all the rest.
    assert!(updates.len() <= 10, "{CALLS} calls took {} updates", updates.len());
}
