//! Proves that the commands that read and write records do to a live gateway what they say, for people and for programs, and end with the exit
//! codes of `docs/cli.md`.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tidegate::rpc::proto::ReadConsistency;

use crate::harness::{
    Gateway, Mode, Setup,
    gateway::{Output, command, run_command},
    process::{Directory, free_port, shell},
};

/// Runs commands against one gateway.
pub struct Commands {
    pub gateway: Gateway,
    pub directory: Directory,
}

impl Commands {
    pub async fn start() -> Commands {
        Commands::of(Setup::new().start().await)
    }

    pub fn of(gateway: Gateway) -> Commands {
        Commands {
            gateway,
            directory: Directory::new("commands"),
        }
    }

    /// Runs `tidegate ARGUMENTS --address …` to its end.
    pub async fn run(&self, arguments: &[&str]) -> Output {
        let address = self.gateway.address.to_string();
        // What an earlier command said is not this one's.
        for name in ["command.out", "command.err"] {
            let _ = std::fs::remove_file(self.directory.path().join(name));
        }
        let arguments = [arguments, &["--address", &address]].concat();
        run_command(&arguments, &[], self.directory.path()).await
    }

    /// The same of one that is expected to end with a code. Its standard output.
    pub async fn expect(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        assert_eq!(output.code, Some(code), "{arguments:?}: {output:?}");
        if code == 0 {
            assert!(!output.stderr.contains("tidegate:"), "{arguments:?}: {output:?}");
        }
        output.stdout
    }

    pub async fn json(&self, code: i32, arguments: &[&str]) -> Value {
        let text = self.expect(code, arguments).await;
        assert_eq!(text.lines().count(), 1, "one line: {text}");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The same with bytes for standard input, and bytes of standard output.
    pub async fn piped(&self, arguments: &[&str], input: &[u8]) -> (Option<i32>, Vec<u8>) {
        let address = self.gateway.address.to_string();
        let mut command = command();
        command
            .env_clear()
            .current_dir(self.directory.path())
            .args(arguments)
            .args(["--address", &address])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let input = input.to_vec();
        let ended = tokio::task::spawn_blocking(move || run_piped(command, &input));
        ended.await.unwrap()
    }

    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }
}

fn run_piped(mut command: Command, input: &[u8]) -> (Option<i32>, Vec<u8>) {
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code(), output.stdout)
}

async fn value(commands: &Commands, key: &str) -> Option<Vec<u8>> {
    let value = commands.gateway.client.value(key, ReadConsistency::Store).await;
    value.map(|value| value.to_vec())
}

#[tokio::test]
async fn a_value_comes_from_an_argument_a_file_or_standard_input_and_comes_back_byte_for_byte() {
    let commands = Commands::start().await;
    let binary = b"\x00\xff\xfe\nno text\n".to_vec();
    let file = commands.directory.path().join("value.bin");
    std::fs::write(&file, &binary).unwrap();

    let said = commands.expect(0, &["put", "orders", "a", "text"]).await;
    assert!(
        said.starts_with("version ") && said.ends_with(", durability store\n"),
        "{said}"
    );
    commands
        .expect(0, &["put", "orders", "b", "--file", &commands.path("value.bin")])
        .await;
    assert_eq!(commands.piped(&["put", "orders", "c"], &binary).await.0, Some(0));
    assert_eq!(
        commands.piped(&["put", "orders", "d", "--file", "-"], b"").await.0,
        Some(0)
    );
    commands.expect(0, &["put", "orders", "e", "-5"]).await;
    for (key, expected) in [
        ("a", &b"text"[..]),
        ("b", &binary),
        ("c", &binary),
        ("d", b""),
        ("e", b"-5"),
    ] {
        assert_eq!(value(&commands, key).await.as_deref(), Some(expected), "{key}");
        let (code, got) = commands.piped(&["get", "orders", key], b"").await;
        assert_eq!((code, got.as_slice()), (Some(0), expected), "{key}");
    }

    let got = commands
        .json(0, &["get", "orders", "a", "--json", "--consistency", "store"])
        .await;
    assert_eq!(
        (&got["found"], &got["value"], &got["source"]),
        (&json!(true), &json!("text"), &json!("store"))
    );
    assert!(
        got["version"].as_i64().unwrap() > 0 && got.get("value_base64").is_none(),
        "{got}"
    );
    let got = commands.json(0, &["get", "orders", "b", "--json"]).await;
    assert_eq!(got["value_base64"], json!("AP/+Cm5vIHRleHQK"));

    let verbose = commands.run(&["get", "orders", "a", "--verbose"]).await;
    assert_eq!(verbose.stdout, "text");
    assert!(
        verbose.stderr.contains("version  ") && verbose.stderr.contains("expires  never"),
        "{verbose:?}"
    );

    let missing = commands.run(&["get", "orders", "nobody"]).await;
    assert_eq!((missing.code, missing.stdout.as_str()), (Some(3), ""));
    assert!(missing.stderr.contains("no record \"nobody\""), "{missing:?}");
    let missing = commands.json(3, &["get", "orders", "nobody", "--json"]).await;
    assert_eq!(missing["found"], json!(false));
    assert_eq!(
        commands.run(&["put", "orders", "f", "--file", "nowhere"]).await.code,
        Some(1)
    );
}

#[tokio::test]
async fn conditions_hold_or_end_with_a_code_of_their_own() {
    let commands = Commands::start().await;
    commands.expect(4, &["put", "orders", "k", "v", "--if-present"]).await;
    let first = commands
        .json(0, &["put", "orders", "k", "one", "--if-absent", "--json"])
        .await;
    let version = first["version"].to_string();
    assert_eq!(
        (&first["durability"], &first["deduplicated"]),
        (&json!("store"), &json!(false))
    );
    let refused = commands.run(&["put", "orders", "k", "two", "--if-absent"]).await;
    assert_eq!(refused.code, Some(4), "{refused:?}");
    assert!(refused.stderr.contains("CONFLICT"), "{refused:?}");
    commands
        .expect(0, &["put", "orders", "k", "two", "--if-version", &version])
        .await;
    commands
        .expect(4, &["delete", "orders", "k", "--if-version", &version])
        .await;
    assert_eq!(value(&commands, "k").await.as_deref(), Some(&b"two"[..]));
    commands.expect(0, &["delete", "orders", "k", "--if-present"]).await;
    commands.expect(4, &["delete", "orders", "k", "--if-present"]).await;
    assert_eq!(value(&commands, "k").await, None);
    let deleted = commands.json(0, &["delete", "orders", "k", "--json"]).await;
    assert!(deleted["version"].as_i64() > first["version"].as_i64());
}

#[tokio::test]
async fn a_write_takes_a_lifetime_tags_a_mode_and_a_request_id() {
    let commands = Commands::start().await;
    let put = ["put", "orders", "k", "v", "--ttl", "1h", "--tag", "a", "--tag", "b"];
    commands.expect(0, &put).await;
    let got = commands.json(0, &["get", "orders", "k", "--json"]).await;
    assert!(got["expire_time"].as_str().unwrap().ends_with('Z'), "{got}");

    let behind = ["put", "orders", "k", "w", "--mode", "behind", "--json"];
    assert_eq!(commands.json(0, &behind).await["durability"], json!("journal"));
    let awaited = [&behind[..], &["--await-persisted"]].concat();
    assert_eq!(commands.json(0, &awaited).await["durability"], json!("store"));

    let named = ["put", "orders", "n", "v", "--request-id", "once", "--json"];
    let first = commands.json(0, &named).await;
    let again = commands.json(0, &named).await;
    assert_eq!(
        (&again["version"], &again["deduplicated"]),
        (&first["version"], &json!(true))
    );
    // The same name for something else is a wrong argument.
    commands
        .expect(64, &["put", "orders", "n", "other", "--request-id", "once"])
        .await;
}

#[tokio::test]
async fn a_counter_counts_once_under_one_name() {
    let commands = Commands::start().await;
    assert_eq!(commands.expect(0, &["incr", "orders", "n"]).await, "1\n");
    assert_eq!(commands.expect(0, &["incr", "orders", "n", "41"]).await, "42\n");
    assert_eq!(commands.expect(0, &["incr", "orders", "n", "-2"]).await, "40\n");
    let named = ["incr", "orders", "n", "5", "--request-id", "once", "--json"];
    assert_eq!(commands.json(0, &named).await["value"], json!(45));
    let again = commands.json(0, &named).await;
    assert_eq!((&again["value"], &again["deduplicated"]), (&json!(45), &json!(true)));
    commands.expect(0, &["put", "orders", "text", "v"]).await;
    let refused = commands.run(&["incr", "orders", "text"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("NOT_A_COUNTER"), "{refused:?}");
}

#[tokio::test]
async fn a_scan_is_a_table_for_people_and_lines_of_json_for_programs() {
    let commands = Commands::start().await;
    for (key, value) in [("a:1", "one"), ("a:2", "two\x1b[2J"), ("b:1", "three")] {
        commands
            .gateway
            .client
            .put(key, value.as_bytes(), Mode::Through)
            .await
            .unwrap();
    }
    let table = commands.expect(0, &["scan", "orders", "a:"]).await;
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert_eq!(
        lines[0].split_whitespace().collect::<Vec<_>>(),
        ["key", "value", "bytes", "version", "expires"]
    );
    assert!(lines[1].starts_with("a:1  one "), "{table}");
    assert!(
        lines[2].starts_with("a:2  two\\u{1b}[2J "),
        "no value steers the terminal: {table}"
    );

    let json = commands.expect(0, &["scan", "orders", "--json"]).await;
    let records: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let keys: Vec<_> = records.iter().map(|record| record["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["a:1", "a:2", "b:1"]);
    assert_eq!(records[2]["value"], json!("three"));

    assert_eq!(
        commands.expect(0, &["scan", "orders", "--keys-only"]).await,
        "a:1\na:2\nb:1\n"
    );
    assert_eq!(
        commands
            .expect(0, &["scan", "orders", "--keys-only", "--limit", "2"])
            .await,
        "a:1\na:2\n"
    );
    assert_eq!(commands.expect(0, &["scan", "orders", "nothing"]).await, "");
}

#[tokio::test]
async fn wrong_arguments_and_a_gateway_that_is_not_there_have_their_codes() {
    let commands = Commands::start().await;
    for wrong in [
        &["get", "Orders", "k"][..],
        &["get", "orders"],
        &["get", "orders", ""],
        &["put", "orders", "k", "v", "--ttl", "soon"],
        &["put", "orders", "k", "v", "--if-absent", "--if-present"],
        &["put", "orders", "k", "v", "--file", "f"],
        &["put", "orders", "k", "v", "--mode", "behind", "--if-absent"],
        &["scan", "orders", "--limit", "0"],
        &["import", "orders", "f", "--in-flight", "0"],
        &["export", "orders", "--state", "s"],
    ] {
        let output = commands.run(wrong).await;
        assert_eq!(output.code, Some(64), "{wrong:?}: {output:?}");
        assert!(
            !output.stderr.is_empty() && output.stdout.is_empty(),
            "{wrong:?}: {output:?}"
        );
    }
    let nobody = format!("127.0.0.1:{}", free_port());
    let directory = commands.directory.path();
    let ask = async |arguments: &[&str]| run_command(arguments, &[], directory).await.code;
    assert_eq!(
        ask(&["get", "orders", "k", "--address", &nobody, "--deadline", "300ms"]).await,
        Some(69)
    );
    // Nothing was sent, so nothing can have been written.
    assert_eq!(
        ask(&["put", "orders", "k", "v", "--address", &nobody, "--deadline", "300ms"]).await,
        Some(69)
    );
    assert_eq!(
        ask(&["get", "orders", "k", "--address", "https://example.org:1"]).await,
        Some(64)
    );
    assert_eq!(ask(&["get", "orders", "k", "--config", "nowhere.toml"]).await, Some(64));
    let listen = [("TIDEGATE_LISTEN", &*commands.gateway.address.to_string())];
    let configured = run_command(&["scan", "orders"], &listen, directory).await;
    assert_eq!(configured.code, Some(0), "{configured:?}");
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_a_command_quietly() {
    let commands = Commands::start().await;
    let client = &commands.gateway.client;
    for n in 0..200 {
        client
            .put(&format!("k{n:03}"), &[b'x'; 4096], Mode::Through)
            .await
            .unwrap();
    }
    let address = commands.gateway.address.to_string();
    for name in ["scan", "export"] {
        // The pipe holds less than there is to write, so the command meets its end.
        let script = format!("{{ \"$1\" {name} orders --address \"$2\"; echo \"ended with $?\" >&2; }} | head -c 1");
        let mut piped = shell(&script);
        piped.arg(command().get_program()).arg(&address);
        let ended = tokio::task::spawn_blocking(move || piped.output())
            .await
            .unwrap()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(said, "ended with 0\n", "{name}");
    }
    let mut full = shell("\"$1\" export orders --address \"$2\" >/dev/full");
    full.arg(command().get_program()).arg(&address);
    let ended = tokio::task::spawn_blocking(move || full.output())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(ended.status.code(), Some(1), "a full disk is no success: {ended:?}");
}

#[tokio::test]
async fn shells_complete_the_commands() {
    let directory = Directory::new("commands");
    for (shell, part) in [
        ("bash", "complete -F _tidegate"),
        ("zsh", "#compdef tidegate"),
        ("fish", "complete -c tidegate"),
    ] {
        let output = run_command(&["completions", shell], &[], directory.path()).await;
        assert_eq!(output.code, Some(0), "{output:?}");
        assert!(
            output.stdout.contains(part) && output.stdout.contains("import"),
            "{shell}"
        );
        std::fs::remove_file(directory.path().join("command.out")).unwrap();
    }
    assert_eq!(
        run_command(&["completions", "cmd"], &[], directory.path()).await.code,
        Some(64)
    );
}
