//! Proves that an export is taken in again by an import as it was, that both go on after an interruption without missing or repeating anything,
//! and that each line that cannot be written is named and harms no other.

use std::{fs, io::Write, time::Duration};

use serde_json::{Value, json};
use tidegate::rpc::proto::{ReadConsistency, ScanRequest};

use crate::{
    commands::Commands,
    harness::{
        Database, Mode, SOON, Setup, eventually, expect,
        gateway::{command, run_command},
        process::{Process, free_port, shell},
        proxy::{Passage, Proxy},
    },
};

fn lines(count: usize) -> String {
    (0..count)
        .map(|n| format!("{{\"key\":\"k{n:05}\",\"value\":\"value {n}\"}}\n"))
        .collect()
}

/// The lines of the file of errors, by their number.
fn errors(commands: &Commands) -> Vec<Value> {
    let text = fs::read_to_string(commands.path("errors")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// How many records there are.
async fn records(commands: &Commands) -> usize {
    let (mut count, mut page_token) = (0, String::new());
    loop {
        let request = ScanRequest {
            namespace: "orders".to_owned(),
            page_size: 1000,
            keys_only: true,
            page_token,
            ..ScanRequest::default()
        };
        let page = commands.gateway.client.stub().scan(request).await.unwrap().into_inner();
        count += page.records.len();
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return count;
        }
    }
}

#[tokio::test]
async fn an_export_is_imported_as_it_was() {
    // What is written behind stays pending for as long as this lasts.
    let setup = Setup::new().config("[namespaces.orders]\nwrite_delay = \"1m\"\n");
    let commands = Commands::of(setup.start().await);
    let client = &commands.gateway.client;
    client.put("text", "é\n\"".as_bytes(), Mode::Through).await.unwrap();
    client.put("empty", b"", Mode::Through).await.unwrap();
    client.put("binary", b"\xff\x00", Mode::Through).await.unwrap();
    commands
        .expect(0, &["put", "orders", "passing", "v", "--ttl", "1h"])
        .await;
    let tagged = ["--tag", "b", "--tag", "a"];
    for (key, mode) in [("stored", "through"), ("pending", "behind")] {
        let put = [&["put", "orders", key, "v", "--mode", mode][..], &tagged].concat();
        commands.expect(0, &put).await;
    }
    commands
        .expect(0, &["export", "orders", "--output", &commands.path("all")])
        .await;
    let exported = fs::read_to_string(commands.path("all")).unwrap();
    assert_eq!(commands.expect(0, &["export", "orders"]).await, exported);
    assert_eq!(exported.lines().count(), 6, "{exported}");
    assert_eq!(exported.matches(r#""tags":["a","b"]"#).count(), 2, "{exported}");
    commands
        .expect(64, &["export", "orders", "--output", &commands.path("all")])
        .await;

    let said = commands.expect(0, &["import", "copies", &commands.path("all")]).await;
    assert_eq!(said, "6 lines: 6 written\n");
    let copied = commands.expect(0, &["export", "copies"]).await;
    let parse = |text: &str| -> Vec<Value> { text.lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    for (mut one, mut other) in parse(&exported).into_iter().zip(parse(&copied)) {
        for record in [&mut one, &mut other] {
            record.as_object_mut().unwrap().remove("version");
        }
        // A lifetime passes on the way by a few milliseconds.
        let expiry = |record: &mut Value| {
            let time = record.as_object_mut().unwrap().remove("expire_time");
            time.map(|time| {
                time.as_str()
                    .unwrap()
                    .parse::<prost_types::Timestamp>()
                    .unwrap()
                    .seconds
            })
        };
        if let (Some(one), Some(other)) = (expiry(&mut one), expiry(&mut other)) {
            assert!((one - other).abs() <= 60, "{one} {other}");
        }
        assert_eq!(one, other);
    }
    // From a pipe, and as JSON.
    let (code, said) = commands
        .piped(&["import", "piped", "--json"], exported.as_bytes())
        .await;
    let said: Value = serde_json::from_slice(&said).unwrap();
    assert_eq!(
        (code, &said["written"], &said["failed"]),
        (Some(0), &json!(6), &json!(0))
    );
}

#[tokio::test]
async fn lines_that_cannot_be_written_are_named_and_harm_no_other() {
    let commands = Commands::start().await;
    let input = [
        r#"{"key":"a","value":"one","tags":["t"],"ttl":"1h"}"#,
        r#"{"key":"","value":"no key"}"#,
        "no json",
        "",
        r#"{"key":"c","value_base64":"!"}"#,
        r#"{"key":"d","value":"past","expire_time":"2020-01-01T00:00:00Z"}"#,
        r#"{"key":"a","value":"two"}"#,
        r#"{"key":"half","value":"wri"#,
    ]
    .join("\n");
    fs::write(commands.path("input"), &input).unwrap();
    let arguments = [
        "import",
        "orders",
        &commands.path("input"),
        "--errors",
        &commands.path("errors"),
    ];
    let output = commands.run(&arguments).await;
    assert_eq!(output.code, Some(5), "{output:?}");
    assert_eq!(
        output.stdout,
        "7 lines: 2 written, 1 passed over, for they have expired, 1 empty, 3 failed\n"
    );
    let named: Vec<(u64, Value)> = errors(&commands)
        .into_iter()
        .map(|error| (error["line"].as_u64().unwrap(), error["key"].clone()))
        .collect();
    let mut sorted = named.clone();
    sorted.sort_by_key(|(line, _)| *line);
    assert_eq!(
        sorted,
        [(2, json!("")), (3, Value::Null), (5, json!("c")), (8, Value::Null)]
    );
    for line in [
        "line 2: key \"\": INVALID",
        "line 3: INVALID",
        "line 5: key \"c\": INVALID",
        "line 8: INVALID: half-written",
    ] {
        assert!(output.stderr.contains(line), "{line}: {output:?}");
    }
    let value = async |key: &str| commands.gateway.client.value(key, ReadConsistency::Store).await;
    assert_eq!(
        value("a").await.as_deref(),
        Some(&b"two"[..]),
        "lines of one key are written in their order"
    );
    assert_eq!((value("half").await, value("d").await), (None, None));
}

#[tokio::test]
async fn a_last_line_that_was_half_written_is_taken_once_it_is_whole() {
    let commands = Commands::start().await;
    let arguments = [
        "import",
        "orders",
        &commands.path("input"),
        "--state",
        &commands.path("state"),
    ];
    fs::write(
        commands.path("input"),
        "{\"key\":\"a\",\"value\":\"1\"}\n{\"key\":\"b\",\"val",
    )
    .unwrap();
    assert_eq!(commands.expect(5, &arguments).await, "1 lines: 1 written\n");
    fs::write(
        commands.path("input"),
        "{\"key\":\"a\",\"value\":\"1\"}\n{\"key\":\"b\",\"value\":\"2\"}",
    )
    .unwrap();
    assert_eq!(commands.expect(0, &arguments).await, "2 lines: 2 written\n");
    // Nothing is left, and nothing is written twice.
    let version = async || commands.gateway.client.read("a").await.entry.unwrap().version;
    let before = version().await;
    assert_eq!(commands.expect(0, &arguments).await, "2 lines: 2 written\n");
    assert_eq!(version().await, before);
    // Another input is not gone on with, nor another namespace.
    fs::write(commands.path("input"), "{\"key\":\"x\",\"value\":\"1\"}\n\n\n").unwrap();
    commands.expect(65, &arguments).await;
    commands
        .expect(
            65,
            &[
                "import",
                "others",
                &commands.path("input"),
                "--state",
                &commands.path("state"),
            ],
        )
        .await;
    fs::write(commands.path("state"), "{}").unwrap();
    commands.expect(65, &arguments).await;
    assert_eq!(
        fs::read_to_string(commands.path("state")).unwrap(),
        "{}",
        "it is left as it is"
    );
    assert_eq!(records(&commands).await, 2);
}

#[tokio::test]
async fn only_what_is_absent_is_written_where_that_is_asked_for() {
    let commands = Commands::start().await;
    commands
        .gateway
        .client
        .put("k00001", b"newer", Mode::Through)
        .await
        .unwrap();
    fs::write(commands.path("input"), lines(3)).unwrap();
    let said = commands
        .expect(0, &["import", "orders", &commands.path("input"), "--if-absent"])
        .await;
    assert_eq!(said, "3 lines: 2 written, 1 passed over, for there is a record\n");
    let value = commands.gateway.client.value("k00001", ReadConsistency::Store).await;
    assert_eq!(value.as_deref(), Some(&b"newer"[..]));
}

/// An import under way, that reads its lines from a pipe, so that it cannot be done before the test wants it to be.
struct Importing {
    process: Process,
    /// Holds the pipe open.
    pipe: fs::File,
}

/// Starts an import that keeps its state, a few writes at a time, of the first lines of the file `input`; waits until some of them are written.
async fn begin(commands: &Commands, first: usize) -> Importing {
    let pipe = commands.path("pipe");
    let made = shell("mkfifo \"$1\"").arg(&pipe).status().unwrap();
    assert!(made.success(), "{made:?}");
    let mut command = command();
    command
        .args(["import", "orders", &pipe, "--in-flight", "4"])
        .args(["--address", &commands.gateway.address.to_string()])
        .args(["--state", &commands.path("state")]);
    let directory = commands.directory.path();
    let process = Process::start("the import", &command, "KILL", directory, "importing");
    // Opens once the import does, and blocks while the pipe is full.
    let writing = tokio::task::spawn_blocking(move || {
        let mut pipe = fs::OpenOptions::new().write(true).open(pipe)?;
        pipe.write_all(lines(first).as_bytes())?;
        std::io::Result::Ok(pipe)
    });
    eventually("some are written", SOON, async || {
        let count = records(commands).await;
        expect(count > 50, format!("{count}: {}", process.stderr()))
    })
    .await;
    let pipe = writing.await.unwrap().unwrap();
    Importing { process, pipe }
}

#[tokio::test]
async fn an_import_that_was_killed_goes_on_and_misses_nothing() {
    const LINES: usize = 1_500;
    let commands = Commands::start().await;
    fs::write(commands.path("input"), lines(LINES)).unwrap();
    let mut importing = begin(&commands, 1_000).await;
    importing.process.signal("KILL");
    importing.process.wait(SOON).await;
    drop(importing.pipe);
    let version = async || commands.gateway.client.read("k00000").await.entry.unwrap().version;
    let before = version().await;
    let arguments = [
        "import",
        "orders",
        &commands.path("input"),
        "--state",
        &commands.path("state"),
    ];
    let said = commands.expect(0, &arguments).await;
    assert!(said.starts_with(&format!("{LINES} lines: {LINES} written")), "{said}");
    assert_eq!(records(&commands).await, LINES);
    // Lines that were written and not yet counted were sent again under their ids: none has a second version.
    assert_eq!(version().await, before);
}

#[tokio::test]
async fn an_interrupted_import_says_how_to_go_on() {
    let commands = Commands::start().await;
    fs::write(commands.path("input"), lines(1_500)).unwrap();
    let mut importing = begin(&commands, 1_000).await;
    importing.process.signal("INT");
    assert_eq!(importing.process.wait(SOON).await.code(), Some(130));
    let said = importing.process.stderr();
    assert!(said.contains("the same command goes on from there"), "{said}");
    let state: Value = serde_json::from_str(&fs::read_to_string(commands.path("state")).unwrap()).unwrap();
    let done = state["counts"]["lines"].as_u64().unwrap();
    // What was under way when it was interrupted was waited for.
    assert_eq!(done, records(&commands).await as u64);
    let after = done.to_string();
    let rest = ["import", "orders", &commands.path("input"), "--after", &after];
    let said = commands.expect(0, &rest).await;
    assert_eq!(said, format!("1500 lines: {} written\n", 1_500 - done));
    assert_eq!(records(&commands).await, 1_500);
}

#[tokio::test]
async fn an_import_lasts_through_a_restart_of_the_gateway() {
    let listen = format!("127.0.0.1:{}", free_port());
    let commands = Commands::of(Setup::new().argument("--listen").argument(&listen).start().await);
    let Importing { mut process, mut pipe } = begin(&commands, 500).await;
    let Commands { mut gateway, directory } = commands;
    gateway.kill().await;
    // There are lines to write while there is no gateway.
    pipe.write_all(&lines(600).as_bytes()[lines(500).len()..]).unwrap();
    drop(pipe);
    let gateway = gateway.start_again().await;
    let commands = Commands { gateway, directory };
    let ended = process.wait(Duration::from_secs(90)).await.code();
    assert_eq!(ended, Some(0), "{}", process.stderr());
    assert_eq!(records(&commands).await, 600);
}

#[tokio::test]
async fn an_import_without_a_gateway_ends_and_can_be_gone_on_with() {
    let commands = Commands::start().await;
    fs::write(commands.path("input"), lines(100)).unwrap();
    let proxy = Proxy::start(&commands.gateway.address.to_string()).await;
    proxy.set(Passage::Cut);
    let address = proxy.address().to_string();
    let arguments = [
        "import",
        "orders",
        &commands.path("input"),
        "--state",
        &commands.path("state"),
    ];
    let lost = [&arguments[..], &["--deadline", "500ms", "--address", &address]].concat();
    let output = run_command(&lost, &[], commands.directory.path()).await;
    assert_eq!(output.code, Some(69), "{output:?}");
    assert!(
        output.stderr.contains("0 lines are done; the same command goes on"),
        "{output:?}"
    );
    assert_eq!(commands.expect(0, &arguments).await, "100 lines: 100 written\n");
}

#[tokio::test]
async fn an_export_that_was_cut_off_goes_on_where_it_was() {
    let database = Database::postgres().await;
    let commands = Commands::of(Setup::new().store(database.url()).start().await);
    fs::write(commands.path("input"), lines(2_500)).unwrap();
    commands.expect(0, &["import", "orders", &commands.path("input")]).await;
    commands
        .expect(0, &["put", "orders", "k00000", "v", "--tag", "\"é,}"])
        .await;
    let whole = commands.expect(0, &["export", "orders"]).await;

    let first: Value = serde_json::from_str(whole.lines().next().unwrap()).unwrap();
    assert_eq!(first["tags"], json!(["\"é,}"]), "{first}");

    let (output, state) = (commands.path("output"), commands.path("state"));
    let arguments = ["export", "orders", "--output", &output, "--state", &state];
    commands.expect(0, &arguments).await;
    assert_eq!(fs::read_to_string(&output).unwrap(), whole);
    commands.expect(0, &arguments).await;
    // Another file is neither cut off nor taken for complete.
    let other = commands.path("other");
    fs::write(&other, "something else").unwrap();
    let elsewhere = ["export", "orders", "--output", &other, "--state", &state];
    commands.expect(65, &elsewhere).await;
    assert_eq!(fs::read_to_string(&other).unwrap(), "something else");
    // As if it had been killed in its second page: the state is of the end of the first, and the file goes on behind it.
    let first: String = whole.split_inclusive('\n').take(1_000).collect();
    let request = ScanRequest {
        namespace: "orders".to_owned(),
        page_size: 1_000,
        ..ScanRequest::default()
    };
    let page = commands.gateway.client.stub().scan(request).await.unwrap().into_inner();
    let kept = json!({
        "export_of": ["orders", ""],
        "output": fs::canonicalize(&output).unwrap(),
        "page_token": page.next_page_token,
        "records": 1_000,
        "bytes": first.len(),
        "is_complete": false,
    });
    fs::write(&state, kept.to_string()).unwrap();
    fs::write(&output, first.clone() + "{\"key\":\"torn").unwrap();
    commands.expect(0, &arguments).await;
    assert_eq!(fs::read_to_string(&output).unwrap(), whole);
    // A file that has lost what the state says it has is not gone on with.
    fs::write(&state, kept.to_string()).unwrap();
    fs::write(&output, "").unwrap();
    commands.expect(65, &arguments).await;
    commands
        .expect(65, &["export", "orders", "a", "--output", &output, "--state", &state])
        .await;
}
