//! Proves that `tidegate watch` prints what changes, for people and for programs, and that a watch goes on by itself when its gateway is started again.

use std::fs;

use serde_json::{Value, json};
use tidegate::client::{
    Client, Options, Retry,
    proto::{WatchRequest, watch_response::Event},
};

use crate::{
    commands::Commands,
    harness::{
        Mode, SOON, Setup, eventually, expect,
        gateway::command,
        process::{Process, free_port},
    },
};

/// Starts a watch, and waits until it has begun.
async fn begin(commands: &Commands, name: &str, arguments: &[&str]) -> Process {
    let mut command = command();
    command
        .args(["watch", "orders"])
        .args(arguments)
        .args(["--address", &commands.gateway.address.to_string()]);
    let process = Process::start("the watch", &command, "KILL", commands.directory.path(), name);
    eventually("the watch begins", SOON, async || {
        let said = output(commands, name) + &process.stderr();
        expect(said.contains("started"), said)
    })
    .await;
    process
}

fn output(commands: &Commands, name: &str) -> String {
    fs::read_to_string(commands.path(&format!("{name}.out"))).unwrap_or_default()
}

#[tokio::test]
async fn changes_are_printed_as_they_become_visible() {
    let commands = Commands::start().await;
    let mut watch = begin(&commands, "programs", &["a:", "--json", "--values", "--count", "3"]).await;
    let mut people = begin(&commands, "people", &["a:", "--values", "--count", "3"]).await;
    let client = &commands.gateway.client;
    client.put("a:1", b"one", Mode::Through).await.unwrap();
    client.put("b:1", b"no prefix of ours", Mode::Through).await.unwrap();
    client.put("a:2", b"\xff", Mode::Behind).await.unwrap();
    client.delete("a:1", Mode::Through).await.unwrap();
    for process in [&mut watch, &mut people] {
        assert_eq!(process.wait(SOON).await.code(), Some(0), "{}", process.stderr());
    }

    let messages: Vec<Value> = output(&commands, "programs")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (&messages[0]["event"], &messages[0]["scope"]),
        (&json!("started"), &json!("this_gateway"))
    );
    let changes: Vec<&Value> = messages.iter().filter(|message| message["event"] == "change").collect();
    let seen: Vec<_> = changes
        .iter()
        .map(|change| (change["kind"].as_str().unwrap(), change["key"].as_str().unwrap()))
        .collect();
    assert_eq!(seen[1..], [("put", "a:2"), ("delete", "a:1")], "{changes:?}");
    // Looked up when it was sent, by when it may have been gone again.
    assert_eq!(seen[0].1, "a:1");
    assert_eq!(changes[1]["value_base64"], json!("/w=="));
    assert!(
        changes
            .iter()
            .all(|change| change["token"].as_str().is_some_and(|token| !token.is_empty()))
    );

    let lines = output(&commands, "people");
    let last = lines.lines().last().unwrap();
    assert!(last.starts_with("delete ") && last.ends_with("  a:1"), "{lines}");
    assert!(
        people.stderr().contains("whose writes are told: this gateway"),
        "{}",
        people.stderr()
    );

    // Behind the first change are the two others.
    let token = changes[0]["token"].as_str().unwrap();
    let rest = ["watch", "orders", "a:", "--json", "--count", "2", "--token", token];
    let rest = commands.expect(0, &rest).await;
    let keys: Vec<Value> = rest
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|message| message["event"] == "change")
        .map(|message| message["key"].clone())
        .collect();
    assert_eq!(keys, ["a:2", "a:1"]);
    commands
        .expect(64, &["watch", "orders", "--token", "from elsewhere"])
        .await;
}

#[tokio::test]
async fn a_watch_goes_on_when_its_gateway_is_started_again() {
    let listen = format!("127.0.0.1:{}", free_port());
    let mut gateway = Setup::new().argument("--listen").argument(&listen).start().await;
    let options = Options {
        deadline: SOON,
        retry: Retry {
            tries_max: 1_000,
            ..Retry::default()
        },
        ..Options::default()
    };
    let mut watch = Client::with_options(&[&listen], options).unwrap().watch(WatchRequest {
        namespace: "orders".to_owned(),
        ..WatchRequest::default()
    });
    assert!(matches!(watch.next().await.unwrap().event, Some(Event::Started(_))));
    gateway.client.put("a", b"one", Mode::Through).await.unwrap();
    let told = watch.next().await.unwrap();
    assert!(matches!(told.event, Some(Event::Change(change)) if change.key == "a"));
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    assert!(matches!(watch.next().await.unwrap().event, Some(Event::Started(started)) if !started.resumed));
    assert!(
        matches!(watch.next().await.unwrap().event, Some(Event::Rescan(_))),
        "the token was of another process"
    );
    gateway.client.put("b", b"two", Mode::Through).await.unwrap();
    loop {
        match watch.next().await.unwrap().event {
            Some(Event::Change(change)) if change.key == "b" => break,
            Some(Event::Progress(_) | Event::Rescan(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}
