//! Proves what a watch promises on one gateway: each acknowledged write is told, in order, with its value where that is asked for; a watch goes on
//! where it was left; who reads too slowly is told so, who reads nothing is cut off, who hangs up is forgotten, and none of them holds up a shutdown.

use std::time::Duration;

use tidegate::rpc::proto::{ChangeKind, RescanReason, WatchRequest, WatchScope, watch_response::Event};
use tonic::{Code, Request, transport::Endpoint};
use tonic_types::StatusExt;

use crate::harness::{
    Client, Gateway, Mode, SOON, Setup,
    client::{assert_come_back, assert_do_not_come_back, outcome},
    stage::{Stage, on_every_stage},
    until,
    watch::{Watch, said},
};

on_every_stage! {
    each_write_is_told_when_it_is_answered
    values_are_told_on_request
}

/// What a gateway of its own tells of.
fn scope(stage: &Stage) -> WatchScope {
    if stage.is_shared() {
        WatchScope::AllGateways
    } else {
        WatchScope::ThisGateway
    }
}

async fn each_write_is_told_when_it_is_answered(stage: Stage) {
    let gateways = stage.start_all().await;
    let gateway = &gateways[0];
    let client = &gateway.client;
    client.put("k0", b"before", Mode::Through).await.unwrap();
    let (mut watch, told) = client.watch("k").await;
    assert_eq!(told, scope(&stage));
    let mut expected = Vec::new();
    for mode in [Mode::Through, Mode::Behind] {
        let put = client.put("k1", b"v", mode).await.unwrap().version;
        expected.push(("k1", put, ChangeKind::Put));
        client.put("another", b"v", mode).await.unwrap();
        client.namespace("others").put("k1", b"v", mode).await.unwrap();
        let deleted = client.delete("k1", mode).await.unwrap().version;
        expected.push(("k1", deleted, ChangeKind::Delete));
    }
    let counted = client.increment("k2", 5).await.unwrap().version;
    expected.push(("k2", counted, ChangeKind::Put));
    for expected in expected {
        assert_eq!(said(&watch.change().await), expected);
    }
}

async fn values_are_told_on_request(stage: Stage) {
    let gateways = stage.start_all().await;
    let gateway = &gateways[0];
    let client = &gateway.client;
    let request = WatchRequest {
        with_values: true,
        ..client.watch_request("")
    };
    let mut watch = client.send_watch(request).await.unwrap();
    assert!(matches!(watch.next().await, Ok(Event::Started(_))));
    for (key, mode, value) in [
        ("k0", Mode::Through, "one"),
        ("k1", Mode::Behind, "two"),
        ("k2", Mode::Through, ""),
    ] {
        let put = client.put(key, value.as_bytes(), mode).await.unwrap().version;
        let change = watch.change().await;
        assert_eq!(said(&change), (key, put, ChangeKind::Put));
        let entry = change.entry.expect("it was asked for");
        assert_eq!((&*entry.value, entry.version), (value.as_bytes(), put));
    }
    let deleted = client.delete("k0", Mode::Through).await.unwrap().version;
    let change = watch.change().await;
    assert_eq!(
        (said(&change), change.entry.is_none()),
        (("k0", deleted, ChangeKind::Delete), true)
    );
}

#[tokio::test]
async fn a_request_that_is_none_is_blamed_by_its_fields() {
    let gateway = Setup::new().start().await;
    let client = &gateway.client;
    let (watch, _) = client.watch("k").await;
    let request = |namespace: &str, prefix: &str, token: &str| WatchRequest {
        namespace: namespace.to_owned(),
        prefix: prefix.to_owned(),
        resume_token: token.to_owned(),
        with_values: false,
    };
    let long = "k".repeat(1_025);
    for (request, fields) in [
        (request("", "", ""), vec!["namespace"]),
        (request("No", "nul\0", ""), vec!["namespace", "prefix"]),
        (request("orders", &long, ""), vec!["prefix"]),
        (request("orders", "k", "nonsense"), vec!["resume_token"]),
        (request("orders", "k", &"A".repeat(100_000)), vec!["resume_token"]),
        (request("orders", "", &watch.token), vec!["resume_token"]),
        (request("others", "k", &watch.token), vec!["resume_token"]),
    ] {
        let refused = client.send_watch(request).await.err().expect("it is invalid");
        assert_do_not_come_back(&refused, Code::InvalidArgument, "INVALID");
        let blamed = refused.get_details_bad_request().expect("fields are named");
        let blamed: Vec<_> = blamed
            .field_violations
            .iter()
            .map(|blamed| blamed.field.as_str())
            .collect();
        assert_eq!(blamed, fields);
    }
    assert_eq!(gateway.metric("tidegate_watchers", &[]).await, 1.0);
}

/// The message that says where a watch began, and that it had to begin anew.
async fn assert_begins_anew(client: &Client, token: &str) {
    let request = WatchRequest {
        resume_token: token.to_owned(),
        ..client.watch_request("")
    };
    let mut watch = client.send_watch(request).await.expect("the token is well made");
    match watch.next().await {
        Ok(Event::Started(started)) => assert!(!started.resumed),
        event => panic!("{event:?}"),
    }
    match watch.next().await {
        Ok(Event::Rescan(rescan)) => assert_eq!(rescan.reason(), RescanReason::TokenExpired),
        event => panic!("{event:?}"),
    }
    let version = client.put("anew", b"v", Mode::Through).await.unwrap().version;
    assert_eq!(said(&watch.change().await), ("anew", version, ChangeKind::Put));
}

#[tokio::test]
async fn a_token_from_elsewhere_or_from_before_a_restart_begins_anew() {
    let (mut gateway, other) = tokio::join!(Setup::new().start(), Setup::new().start());
    let (theirs, _) = other.client.watch("").await;
    assert_begins_anew(&gateway.client, &theirs.token).await;
    let (ours, _) = gateway.client.watch("").await;
    let token = ours.token.clone();
    drop(ours);
    gateway.terminate();
    gateway.wait_exit(SOON).await;
    let gateway = gateway.start_again().await;
    assert_begins_anew(&gateway.client, &token).await;
}

/// A client of its own connection, which gives a watch little room, as one that buffers little.
async fn narrow(gateway: &Gateway) -> Client {
    let endpoint = Endpoint::from_shared(format!("http://{}", gateway.address)).expect("an address");
    let endpoint = endpoint
        .initial_stream_window_size(65_535)
        .initial_connection_window_size(65_535);
    Client::new(endpoint.connect().await.expect("it accepts"))
}

/// More, in long keys, than a narrow client and the log hold.
async fn pour(client: &Client, count: usize) {
    let long = "k".repeat(1_000);
    for number in 0..count {
        let key = format!("{number}{long}");
        client.put(&key, b"v", Mode::Behind).await.unwrap();
    }
}

const SMALL_LOG: &str = "[watch]\nlog_entries_max = 50\n";

#[tokio::test]
async fn who_does_not_read_falls_behind_is_told_so_and_goes_on() {
    let gateway = Setup::new().config(SMALL_LOG).start().await;
    let (mut watch, _) = narrow(&gateway).await.watch("").await;
    pour(&gateway.client, 500).await;
    for number in 0.. {
        match watch.next().await.unwrap() {
            Event::Change(change) => assert!(change.key.starts_with(&format!("{number}k")), "in order: {number}"),
            Event::Rescan(rescan) => {
                assert_eq!(rescan.reason(), RescanReason::FellBehind);
                assert!(number > 0, "what there was room for was told");
                break;
            }
            event => panic!("{event:?}"),
        }
    }
    let version = gateway.client.put("k", b"v", Mode::Through).await.unwrap().version;
    assert_eq!(said(&watch.change().await), ("k", version, ChangeKind::Put));
    let rescans = gateway
        .metric("tidegate_watch_rescans_total", &["reason=\"fell_behind\""])
        .await;
    assert_eq!(rescans, 1.0);
}

#[tokio::test]
async fn who_takes_nothing_for_too_long_is_cut_off() {
    let config = format!("{SMALL_LOG}unread_max = \"1s\"\n");
    let gateway = Setup::new().config(&config).start().await;
    let (mut watch, _) = narrow(&gateway).await.watch("").await;
    // Who has nothing to take is not.
    let (mut quiet, _) = gateway.client.watch("quiet").await;
    pour(&gateway.client, 500).await;
    until("the one who takes nothing does not watch any more", async || {
        gateway.metric("tidegate_watchers", &[]).await == 1.0
    })
    .await;
    let end = loop {
        if let Err(end) = watch.next().await {
            break end;
        }
    };
    assert!(!gateway.said("its client takes nothing of it").is_empty(), "{end:?}");
    let version = gateway.client.put("quiet", b"v", Mode::Through).await.unwrap().version;
    assert_eq!(said(&quiet.change().await), ("quiet", version, ChangeKind::Put));
}

#[tokio::test]
async fn who_hangs_up_is_forgotten_and_makes_room() {
    let gateway = Setup::new().config("[watch]\nwatchers_max = 2").start().await;
    let (first, _) = gateway.client.watch("").await;
    let (_second, _) = gateway.client.watch("").await;
    let client = &gateway.client;
    let refused = client
        .send_watch(client.watch_request(""))
        .await
        .err()
        .expect("as many as may");
    assert_come_back(&refused, Code::ResourceExhausted);
    drop(first);
    until("there is room", async || {
        gateway.metric("tidegate_watchers", &[]).await == 1.0
    })
    .await;
    // A whole connection, with all that watches over it.
    let apart = narrow(&gateway).await;
    let (third, _) = apart.watch("").await;
    drop((third, apart));
    until("there is room again", async || {
        gateway.metric("tidegate_watchers", &[]).await == 1.0
    })
    .await;
    client.watch("").await;
}

#[tokio::test]
async fn a_quiet_watch_has_progress_whose_token_is_good() {
    let gateway = Setup::new()
        .config("[watch]\nprogress_interval = \"200ms\"")
        .start()
        .await;
    let (mut watch, _) = gateway.client.watch("k").await;
    let began = watch.token.clone();
    gateway.client.put("another", b"v", Mode::Through).await.unwrap();
    for _ in 0..3 {
        assert!(matches!(watch.next().await, Ok(Event::Progress(_))));
    }
    assert_ne!(watch.token, began, "it is younger than what others wrote");
    let token = watch.token.clone();
    drop(watch);
    let version = gateway.client.put("k", b"v", Mode::Behind).await.unwrap().version;
    let request = WatchRequest {
        resume_token: token,
        ..gateway.client.watch_request("k")
    };
    let mut watch = gateway.client.send_watch(request).await.unwrap();
    assert!(matches!(watch.next().await, Ok(Event::Started(started)) if started.resumed));
    assert_eq!(said(&watch.change().await), ("k", version, ChangeKind::Put));
}

#[tokio::test]
async fn a_watch_lasts_until_its_deadline() {
    let gateway = Setup::new()
        .config("[rpc]\ndeadline_max = \"1s\"\ndeadline_default = \"1s\"")
        .start()
        .await;
    let watch = async |time: Duration| {
        let mut request = Request::new(gateway.client.watch_request(""));
        request
            .metadata_mut()
            .insert("grpc-timeout", format!("{}m", time.as_millis()).parse().unwrap());
        let mut told = gateway.client.stub().watch(request).await.unwrap().into_inner();
        assert!(told.message().await.unwrap().is_some(), "it begins");
        told
    };
    // Longer than any other call may take.
    let mut long = watch(Duration::from_secs(3_600)).await;
    let ended = watch(Duration::from_millis(1_500)).await.message().await;
    assert_eq!(ended.expect_err("it is over").code(), Code::DeadlineExceeded);
    gateway.client.put("k", b"v", Mode::Through).await.unwrap();
    assert!(long.message().await.unwrap().is_some());
}

#[tokio::test]
async fn watches_end_with_the_gateway_and_hold_nothing_up() {
    let mut gateway = Setup::new().config("[shutdown]\ncalls_wait = \"30s\"").start().await;
    let apart = narrow(&gateway).await;
    let (mut reads, _) = apart.watch("").await;
    let (_unread, _): (Watch, _) = narrow(&gateway).await.watch("").await;
    pour(&gateway.client, 300).await;
    gateway.terminate();
    let end = loop {
        if let Err(end) = reads.next().await {
            break end;
        }
    };
    assert_come_back(&end, Code::Unavailable);
    assert_eq!(outcome(&end), "not_applied");
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    let stopped = exit
        .log
        .lines()
        .find(|line| line.contains("stopped: every call answered"));
    let stopped: serde_json::Value = serde_json::from_str(stopped.expect("it says so")).expect("JSON");
    let seconds = stopped["seconds"].as_f64().expect("it says how long it took");
    assert!(seconds < 20.0, "nobody waited for who does not read: {seconds}");
}
