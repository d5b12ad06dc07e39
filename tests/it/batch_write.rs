//! Proves that a batch of writes is so many writes, each with its own outcome, whatever becomes of the others.

use bytes::Bytes;
use tidegate::rpc::proto::{
    BatchWriteRequest, DeleteRequest, Durability, Failure, PutRequest, WriteItem, Written, write_item::Operation,
    write_result::Outcome,
};
use tonic::{Code, Status};

use crate::harness::{
    Client, Database, Mode, Setup,
    client::{assert_do_not_come_back, outcome},
    redis,
};

const POISON: &[u8] = b"poison";

pub fn put(request: PutRequest) -> WriteItem {
    WriteItem {
        operation: Some(Operation::Put(request)),
    }
}

pub fn delete(key: &str, mode: Mode) -> WriteItem {
    WriteItem {
        operation: Some(Operation::Delete(DeleteRequest {
            namespace: "orders".into(),
            key: key.into(),
            write_mode: mode.number(),
            ..DeleteRequest::default()
        })),
    }
}

/// What came of each item.
async fn write(client: &Client, items: Vec<WriteItem>) -> Result<Vec<Result<Written, Failure>>, Status> {
    let request = BatchWriteRequest { items };
    let answer = client.stub().batch_write(request).await?.into_inner();
    let outcome = |outcome| match outcome {
        Some(Outcome::Written(written)) => Ok(written),
        Some(Outcome::Failure(failure)) => Err(failure),
        None => panic!("an item without an outcome"),
    };
    Ok(answer
        .results
        .into_iter()
        .map(|result| outcome(result.outcome))
        .collect())
}

#[track_caller]
fn assert_written(outcomes: &[Result<Written, Failure>]) {
    for (index, outcome) in outcomes.iter().enumerate() {
        let written = outcome
            .as_ref()
            .unwrap_or_else(|failure| panic!("item {index}: {failure:?}"));
        assert!(written.version > 0 && !written.deduplicated);
    }
}

async fn each_item_is_a_write_of_its_own(setup: Setup, database: &Database) {
    let gateway = setup.start().await;
    let client = &gateway.client;
    client.put("gone", b"value", Mode::Through).await.unwrap();
    let elsewhere = client
        .namespace("other")
        .put_request("key", b"elsewhere", Mode::Through);
    let brief = PutRequest {
        ttl: Some(prost_types::Duration {
            seconds: 3600,
            nanos: 0,
        }),
        ..client.put_request("brief", b"brief", Mode::Behind)
    };
    let items = vec![
        put(client.put_request("through", b"through", Mode::Through)),
        delete("gone", Mode::Through),
        put(client.put_request("behind", b"behind", Mode::Behind)),
        put(elsewhere),
        put(brief),
        delete("never", Mode::Behind),
    ];
    let outcomes = write(client, items).await.expect("a batch is OK");
    assert_written(&outcomes);
    let rests_on: Vec<Durability> = outcomes.iter().flatten().map(Written::durability).collect();
    let (store, journal) = (Durability::Store, Durability::Journal);
    assert_eq!(rests_on, [store, store, journal, store, journal, journal]);
    client.assert_everywhere("through", Some(b"through")).await;
    client.assert_everywhere("behind", Some(b"behind")).await;
    client.assert_everywhere("gone", None).await;
    client.assert_everywhere("never", None).await;
    client
        .namespace("other")
        .assert_everywhere("key", Some(b"elsewhere"))
        .await;
    let entry = client.read("brief").await.entry.expect("it is there");
    assert!(entry.expire_time.is_some());
    gateway.drained().await;
    assert_eq!(database.records("orders").await, ["behind", "brief", "through"]);
    assert_eq!(database.records("other").await, ["key"]);
}

#[tokio::test]
async fn each_item_is_a_write_of_its_own_embedded() {
    let database = Database::sqlite();
    each_item_is_a_write_of_its_own(Setup::new().store(database.url()), &database).await;
}

#[tokio::test]
async fn each_item_is_a_write_of_its_own_in_postgres_and_redis() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url());
    each_item_is_a_write_of_its_own(setup, &database).await;
}

#[tokio::test]
async fn of_several_items_of_a_key_the_last_is_written() {
    let database = Database::sqlite();
    let gateway = Setup::new().store(database.url()).start().await;
    let client = &gateway.client;
    let value = |key: &str, value: &str, mode| put(client.put_request(key, value.as_bytes(), mode));
    let mut items = vec![
        value("a", "first", Mode::Through),
        value("b", "first", Mode::Behind),
        delete("a", Mode::Behind),
        value("c", "only", Mode::Through),
        value("a", "last", Mode::Through),
        delete("b", Mode::Through),
    ];
    // The same key elsewhere is another.
    items.push(put(client.namespace("other").put_request(
        "a",
        b"elsewhere",
        Mode::Through,
    )));
    let outcomes = write(client, items).await.expect("a batch is OK");
    let superseded: Vec<bool> = outcomes.iter().map(Result::is_err).collect();
    assert_eq!(superseded, [true, true, true, false, false, false, false]);
    for failure in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        assert_eq!(
            (failure.code, failure.reason.as_str()),
            (Code::Aborted as i32, "SUPERSEDED")
        );
        assert!(!failure.unknown && failure.retry_delay.is_none());
    }
    client.assert_everywhere("a", Some(b"last")).await;
    client.assert_everywhere("b", None).await;
    client.assert_everywhere("c", Some(b"only")).await;
    client
        .namespace("other")
        .assert_everywhere("a", Some(b"elsewhere"))
        .await;
}

#[tokio::test]
async fn an_item_that_is_invalid_or_rejected_fails_alone() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    database
        .execute("alter table tidegate_entries add constraint no_poison check (value is distinct from 'poison'::bytea)")
        .await;
    let client = &gateway.client;
    let bad = PutRequest {
        key: String::new(),
        write_mode: 9,
        ..client.put_request("bad", b"bad", Mode::Through)
    };
    let items = vec![
        put(client.put_request("good", b"good", Mode::Through)),
        put(bad),
        WriteItem::default(),
        put(client.put_request("poison", POISON, Mode::Through)),
        put(client.put_request("fine", b"fine", Mode::Behind)),
    ];
    let outcomes = write(client, items).await.expect("a batch is OK");
    assert!(outcomes[0].is_ok() && outcomes[4].is_ok(), "{outcomes:?}");
    let failure = |index: usize| outcomes[index].as_ref().expect_err("it is at fault");
    let named = |index: usize| -> Vec<&str> {
        let violations = &failure(index).violations;
        violations.iter().map(|violation| violation.field.as_str()).collect()
    };
    assert_eq!(
        (failure(1).code, failure(1).reason.as_str()),
        (Code::InvalidArgument as i32, "INVALID")
    );
    assert_eq!(named(1), ["key", "write_mode"]);
    assert_eq!(named(2), [""]);
    let message = &failure(2).message;
    assert!(
        message.ends_with(": exactly one of put and delete must be given"),
        "{message}"
    );
    assert_eq!(failure(3).reason, "REJECTED");
    for index in 1..=3 {
        assert!(!failure(index).unknown && failure(index).retry_delay.is_none());
    }
    gateway.drained().await;
    assert_eq!(database.records("orders").await, ["fine", "good"]);
}

#[tokio::test]
async fn an_item_that_runs_out_of_time_says_so_and_the_others_are_written() {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config("[store]\ncall_timeout = \"2m\"\n[rpc]\ndeadline_default = \"4s\"")
        .start()
        .await;
    let hold = database.hold_writes().await;
    let client = &gateway.client;
    let items = vec![
        put(client.put_request("through", b"through", Mode::Through)),
        put(client.put_request("behind", b"behind", Mode::Behind)),
    ];
    let outcomes = write(client, items).await.expect("a batch is OK");
    let failure = outcomes[0].as_ref().expect_err("the store is held");
    assert_eq!(failure.code, Code::DeadlineExceeded as i32);
    assert!(failure.unknown, "it may still be written: {failure:?}");
    assert!(outcomes[1].is_ok(), "{outcomes:?}");
    hold.release().await;
    database.await_value("orders", "through", b"through").await;
    database.await_value("orders", "behind", b"behind").await;
}

#[tokio::test]
async fn a_batch_has_from_one_item_to_a_thousand() {
    let database = Database::sqlite();
    let gateway = Setup::new().store(database.url()).start().await;
    let client = &gateway.client;
    let items = |count: u32| -> Vec<WriteItem> {
        let mode = |index| if index % 2 == 0 { Mode::Behind } else { Mode::Through };
        let item = |index: u32| put(client.put_request(&index.to_string(), b"value", mode(index)));
        (0..count).map(item).collect()
    };
    for count in [0, 1_001] {
        let status = write(client, items(count)).await.expect_err("not so many");
        assert_do_not_come_back(&status, Code::InvalidArgument, "INVALID");
        assert_eq!(outcome(&status), "not_applied");
        assert!(status.message().contains("items"), "{status:?}");
    }
    assert_eq!(gateway.metric("tidegate_queue_accepted_writes_total", &[]).await, 0.0);
    assert_eq!(database.entries().await, 0);
    let outcomes = write(client, items(1_000)).await.expect("as many as may be");
    assert_eq!(outcomes.len(), 1_000);
    assert_written(&outcomes);
    gateway.drained().await;
    assert_eq!(database.entries().await, 1_000);
}

#[tokio::test]
async fn a_batch_has_its_bound_in_bytes_whatever_that_of_values() {
    let database = Database::sqlite();
    let gateway = Setup::new()
        .store(database.url())
        .config("[rpc]\nvalue_bytes_max = 50_000")
        .start()
        .await;
    let client = &gateway.client;
    let items = |count: u32| -> Vec<WriteItem> {
        let value = Bytes::from(vec![b'x'; 50_000]);
        let item = |index: u32| {
            put(PutRequest {
                value: value.clone(),
                ..client.put_request(&index.to_string(), b"", Mode::Behind)
            })
        };
        (0..count).map(item).collect()
    };
    let status = write(client, items(90)).await.expect_err("more than 4 MiB");
    assert_do_not_come_back(&status, Code::ResourceExhausted, "TOO_LARGE");
    assert!(status.message().contains("4194304"), "{status:?}");
    assert_eq!(gateway.metric("tidegate_queue_accepted_writes_total", &[]).await, 0.0);
    assert_written(&write(client, items(80)).await.expect("4 MB"));
    // A single write keeps the bound of one value.
    let large = client.put("large", &vec![0; 1024 * 1024], Mode::Behind).await;
    let status = large.expect_err("more than one value");
    assert_do_not_come_back(&status, Code::ResourceExhausted, "TOO_LARGE");
}
