//! Proves that a call's deadline is the gateway's too: the caller's own, the default, and the longest that is allowed; and that the answer
//! says whether a write may still take effect.
//!
//! Over the bare wire: the generated client gives up by itself at the same moment, and the gateway's answer would not be seen.

use tidegate::rpc::proto::{GetRequest, ReadConsistency};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::{assert_do_not_come_back, outcome},
    wire::{Wire, message},
};

const GET: &str = "/tidegate.v1.Gateway/Get";
const PUT: &str = "/tidegate.v1.Gateway/Put";

/// A gateway whose own limits are all far beyond the deadlines of the callers, but for `config`.
async fn patient(config: &str) -> (Gateway, Database) {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config("[store]\ncall_timeout = \"2m\"\ncommit_connections = 1")
        .config(config)
        .start()
        .await;
    (gateway, database)
}

/// Reads a key from the store.
async fn read(wire: &Wire, headers: &[(&str, &str)]) -> Status {
    let request = GetRequest {
        namespace: "orders".into(),
        key: "key".into(),
        consistency: ReadConsistency::Store as i32,
        ..GetRequest::default()
    };
    let answer = wire.call(GET, headers, message(&request)).await;
    answer.status.expect("a status")
}

async fn put(wire: &Wire, gateway: &Gateway, key: &str, headers: &[(&str, &str)]) -> Status {
    let request = gateway.client.put_request(key, b"value", Mode::Through);
    let answer = wire.call(PUT, headers, message(&request)).await;
    answer.status.expect("a status")
}

#[track_caller]
fn assert_out_of_time(status: &Status, promise: &str) {
    assert_do_not_come_back(status, Code::DeadlineExceeded, "TIMEOUT");
    assert_eq!(outcome(status), promise);
}

#[tokio::test]
async fn a_write_under_way_at_its_deadline_may_still_take_effect() {
    let (gateway, database) = patient("[rpc]\ndeadline_default = \"1m\"").await;
    let hold = database.hold_writes().await;
    let wire = Wire::connect(gateway.address).await;
    let (status, ()) = tokio::join!(
        put(&wire, &gateway, "key", &[("grpc-timeout", "3S")]),
        database.await_waiting(1)
    );
    assert_out_of_time(&status, "unknown");
    hold.release().await;
    // It goes on without its caller.
    database.await_value("orders", "key", b"value").await;
}

#[tokio::test]
async fn a_write_that_still_waits_at_its_deadline_is_never_applied() {
    let (gateway, database) = patient("[rpc]\ndeadline_default = \"1m\"").await;
    let hold = database.hold_writes().await;
    let client = gateway.client.clone();
    let first = tokio::spawn(async move { client.put("first", b"value", Mode::Through).await });
    database.await_waiting(1).await;
    // The one connection that commits is busy with the first.
    let wire = Wire::connect(gateway.address).await;
    let status = put(&wire, &gateway, "key", &[("grpc-timeout", "300m")]).await;
    assert_out_of_time(&status, "not_applied");
    hold.release().await;
    first.await.unwrap().expect("it had the time");
    gateway
        .client
        .put("last", b"value", Mode::Through)
        .await
        .expect("the store is free");
    assert_eq!(database.records("orders").await, ["first", "last"]);
}

#[tokio::test]
async fn a_read_ends_at_its_deadline() {
    let (gateway, database) = patient("[rpc]\ndeadline_default = \"1m\"").await;
    let hold = database.hold_all().await;
    let wire = Wire::connect(gateway.address).await;
    let status = read(&wire, &[("grpc-timeout", "300m")]).await;
    assert_out_of_time(&status, "not_applied");
    hold.release().await;
    let status = read(&wire, &[("grpc-timeout", "30S")]).await;
    assert_eq!(status.code(), Code::Ok, "{status:?}");
}

#[tokio::test]
async fn a_call_without_a_deadline_gets_the_default() {
    let (gateway, database) = patient("[rpc]\ndeadline_default = \"300ms\"").await;
    let hold = database.hold_all().await;
    let wire = Wire::connect(gateway.address).await;
    // The default that is built in is longer than the other call's deadline.
    tokio::select! {
        biased;
        status = read(&wire, &[]) => assert_out_of_time(&status, "not_applied"),
        status = read(&wire, &[("grpc-timeout", "4S")]) => panic!("the default did not come first: {status:?}"),
    }
    hold.release().await;
}

#[tokio::test]
async fn a_deadline_is_cut_to_the_longest() {
    let config = "[rpc]\ndeadline_default = \"200ms\"\ndeadline_max = \"300ms\"";
    let (gateway, database) = patient(config).await;
    let hold = database.hold_all().await;
    let wire = Wire::connect(gateway.address).await;
    for asked in ["1H", "99999999S"] {
        let status = timeout(SOON, read(&wire, &[("grpc-timeout", asked)])).await;
        assert_out_of_time(&status.expect("it is cut"), "not_applied");
    }
    hold.release().await;
}

#[tokio::test]
async fn a_deadline_that_has_passed_writes_nothing_behind_a_full_queue() {
    let (gateway, database) = patient("[queue]\nentries_max = 1").await;
    let hold = database.hold_writes().await;
    gateway.client.put("first", b"value", Mode::Behind).await.unwrap();
    let wire = Wire::connect(gateway.address).await;
    let request = gateway.client.put_request("late", b"value", Mode::Behind);
    let answer = wire.call(PUT, &[("grpc-timeout", "1n")], message(&request)).await;
    assert_out_of_time(&answer.status.expect("a status"), "not_applied");
    hold.release().await;
    gateway.drained().await;
    assert_eq!(database.records("orders").await, ["first"]);
    timeout(SOON, gateway.client.put("late", b"value", Mode::Behind))
        .await
        .expect("there is room")
        .expect("it is taken");
}
