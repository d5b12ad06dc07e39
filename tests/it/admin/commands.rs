//! Proves that every command of `tidegate admin` does what it says against a live gateway, for people and for scripts, and ends with the code
//! that it promises. (`tidegate admin stats` is in `stats.rs`.)

use serde_json::Value;

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup, eventually, expect,
    gateway::{Output, command, run_command},
    process::{Directory, free_port, shell},
};

async fn run_at(address: &str, arguments: &[&str]) -> Output {
    let directory = Directory::new("admin");
    run_command(
        &[&["admin"], arguments, &["--address", address]].concat(),
        &[],
        directory.path(),
    )
    .await
}

async fn run(gateway: &Gateway, arguments: &[&str]) -> Output {
    run_at(&gateway.admin.to_string(), arguments).await
}

/// What a command prints for people that ends well.
async fn text(gateway: &Gateway, arguments: &[&str]) -> String {
    let output = run(gateway, arguments).await;
    assert_eq!(
        (output.code, output.stderr.as_str()),
        (Some(0), ""),
        "{arguments:?}: {output:?}"
    );
    output.stdout
}

/// What it prints for scripts: a line for each thing.
async fn json(gateway: &Gateway, arguments: &[&str]) -> Vec<Value> {
    let text = text(gateway, &[arguments, &["--json"]].concat()).await;
    let objects = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("an object on each line"));
    objects.collect()
}

/// Asserts how a command ends that does not end well, and what it says.
async fn fails(gateway: &Gateway, arguments: &[&str], code: i32, said: &str) {
    let output = run(gateway, arguments).await;
    assert_eq!(output.code, Some(code), "{arguments:?}: {output:?}");
    assert!(output.stderr.contains(said), "{arguments:?}: {output:?}");
}

#[tokio::test]
async fn the_queue_is_shown_paused_resumed_and_flushed() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    gateway.client.put("before", b"value", Mode::Through).await.unwrap();
    let paused = text(&gateway, &["pause", "orders"]).await;
    assert_eq!(paused, "orders: paused; 0 writes pending, 0 B\n");
    gateway.client.put("a\u{1b}[2J", b"secret", Mode::Behind).await.unwrap();
    let paused = json(&gateway, &["pause", "orders"]).await;
    assert_eq!(
        (&paused[0]["was_paused"], &paused[0]["pending"]["entries"]),
        (&true.into(), &1.into())
    );

    let shown = text(&gateway, &["queue"]).await;
    for line in [
        "pending: 1 of 100000 writes",
        "journal: up",
        "orders     paused since",
        "worker  state",
        "a\\u{1b}[2J",
    ] {
        assert!(shown.contains(line), "no {line:?} in\n{shown}");
    }
    assert!(!shown.contains("secret"), "{shown}");
    let shown = json(&gateway, &["queue", "orders", "--oldest", "1"]).await;
    assert_eq!(shown[0]["oldest"][0]["key"], "a\u{1b}[2J");
    assert_eq!(
        (&shown[0]["pending"]["entries"], &shown[0]["workers"][0]["state"]),
        (&1.into(), &"idle".into())
    );

    fails(&gateway, &["flush"], 4, "resume it first").await;
    let resumed = json(&gateway, &["resume", "orders"]).await;
    assert_eq!(resumed[0]["was_paused"], true);
    assert!(
        text(&gateway, &["resume", "orders"])
            .await
            .starts_with("orders: was not paused")
    );
    assert!(
        text(&gateway, &["flush", "orders"])
            .await
            .starts_with("the store has what was pending")
    );
    assert_eq!(json(&gateway, &["flush"]).await[0]["dead_lettered"], 0);
    assert!(database.row("orders", "a\u{1b}[2J").await.is_some());

    let hold = database.hold_writes().await;
    gateway.client.put("late", b"value", Mode::Behind).await.unwrap();
    fails(
        &gateway,
        &["flush", "--timeout", "1"],
        69,
        "the store does not have it yet",
    )
    .await;
    hold.release().await;
    for command in ["pause", "resume", "flush", "queue"] {
        fails(&gateway, &[command, "ordres"], 3, "does not know the namespace").await;
        fails(&gateway, &[command, "Orders"], 64, "lower-case").await;
    }
    text(&gateway, &["pause", "ordres", "--unused"]).await;
}

/// A gateway over a table that refuses two keys, with a dead letter of each: `a` is text, `b` is not. Their ids.
async fn with_letters() -> (Gateway, Database, [String; 2]) {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    assert_eq!(
        text(&gateway, &["dead-letters", "list"]).await,
        "there are no dead letters\n"
    );
    assert_eq!(json(&gateway, &["dead-letters", "list"]).await, [Value::Null; 0]);
    database
        .execute("alter table tidegate_entries add constraint none_now check (key <> 'a' and key <> 'b') not valid")
        .await;
    for (number, (key, value)) in [("a", &b"text"[..]), ("b", b"\xff\x00")].into_iter().enumerate() {
        gateway.client.put(key, value, Mode::Behind).await.unwrap();
        eventually("it is a dead letter", SOON, async || {
            let letters = database.dead_letters().await.len();
            expect(letters == number + 1, letters)
        })
        .await;
    }
    let letters = json(&gateway, &["dead-letters", "list"]).await;
    let ids = [0, 1].map(|at: usize| letters[at]["id"].to_string());
    (gateway, database, ids)
}

#[tokio::test]
async fn dead_letters_are_listed_and_exported() {
    let (gateway, _database, ids) = with_letters().await;
    let shown = text(&gateway, &["dead-letters", "list", "--namespace", "orders"]).await;
    assert!(
        shown.contains("23514") && shown.contains("none_now") && shown.contains("once"),
        "{shown}"
    );
    assert!(!shown.contains("text"), "{shown}");
    let letters = json(&gateway, &["dead-letters", "list"]).await;
    assert_eq!((&letters[0]["key"], &letters[0]["attempts"]), (&"a".into(), &1.into()));
    let page = run(&gateway, &["dead-letters", "list", "--limit", "1"]).await;
    assert!(page.stderr.contains(&format!("--after {}", ids[0])), "{page:?}");
    let rest = json(&gateway, &["dead-letters", "list", "--after", &ids[0]]).await;
    assert_eq!((rest.len(), &rest[0]["key"]), (1, &"b".into()));

    for form in [&[][..], &["--json"]] {
        let exported = run(&gateway, &[&["dead-letters", "export"], form].concat())
            .await
            .stdout;
        let exported: Vec<Value> = exported
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(
            (&exported[0]["value"], &exported[0]["key"]),
            (&"text".into(), &"a".into())
        );
        assert_eq!(
            (&exported[1]["value_base64"], &exported[1]["value"]),
            (&"/wA=".into(), &Value::Null)
        );
    }
    // A full disk is no success, and a reader that has gone has not been told of everything.
    for (name, sink, code) in [
        ("list", "/dev/full", 1),
        ("export", "/dev/full", 1),
        ("export", "closed", 5),
    ] {
        let script = match sink {
            "closed" => {
                "{ trap '' PIPE; while echo 2>/dev/null; do :; done; \"$1\" admin dead-letters \"$2\" --address \"$3\"; echo $? >&2; } | true"
            }
            _ => "\"$1\" admin dead-letters \"$2\" --address \"$3\" >/dev/full; echo $? >&2",
        };
        let mut shell = shell(script);
        shell
            .arg(command().get_program())
            .args([name, &gateway.admin.to_string()]);
        let ended = tokio::task::spawn_blocking(move || shell.output())
            .await
            .unwrap()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(said.lines().count() == 2, "it says so: {name} {sink}: {said}");
        assert!(said.ends_with(&format!("\n{code}\n")), "{name} {sink}: {said}");
    }
}

#[tokio::test]
async fn dead_letters_are_retried_and_discarded() {
    let (gateway, database, ids) = with_letters().await;
    let refused = run(&gateway, &["dead-letters", "retry", "--all"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.stdout.contains("refused again, 2 times by now: 23514"),
        "{refused:?}"
    );
    let sum = "0 stored, 0 superseded, 2 refused again, 0 not there\n";
    assert!(refused.stdout.ends_with(sum), "{refused:?}");
    database
        .execute(
            "alter table tidegate_entries drop constraint none_now; \
             alter table tidegate_entries add constraint no_b check (key <> 'b') not valid",
        )
        .await;
    let all_of_orders = ["dead-letters", "retry", "--all", "--namespace", "orders", "--json"];
    let partly = run(&gateway, &all_of_orders).await;
    assert_eq!(partly.code, Some(5), "{partly:?}");
    let outcomes: Vec<Value> = partly
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (&outcomes[0]["outcome"], &outcomes[1]["outcome"]),
        (&"stored".into(), &"refused".into())
    );
    assert_eq!(outcomes[1]["letter"]["attempts"], 3);
    assert_eq!(database.value("orders", "a").await.as_deref(), Some(&b"text"[..]));
    fails(&gateway, &["dead-letters", "retry", &ids[0]], 3, "").await;

    let discarded = text(&gateway, &["dead-letters", "discard", "--up-to", &ids[0]]).await;
    assert_eq!(discarded, "0 dead letters discarded\n");
    fails(&gateway, &["dead-letters", "discard", &ids[1], &ids[0]], 5, "1 of them").await;
    fails(&gateway, &["dead-letters", "discard", &ids[1]], 3, "").await;
    fails(&gateway, &["dead-letters", "discard"], 64, "ID").await;
    fails(&gateway, &["dead-letters", "retry"], 64, "ID").await;
}

#[tokio::test]
async fn caches_are_warmed_and_invalidated() {
    let gateway = Setup::new().start().await;
    for key in ["a:1", "a:2", "b"] {
        gateway.client.put(key, b"value", Mode::Through).await.unwrap();
    }
    let invalidated = text(&gateway, &["invalidate", "orders", "--prefix", "a:"]).await;
    assert_eq!(
        invalidated,
        "invalidated: 0 keys by name, 2 copies in this gateway's memory\n"
    );
    let invalidated = json(&gateway, &["invalidate", "orders", "--key", "b", "--key", "c"]).await;
    assert_eq!(
        (&invalidated[0]["keys"], &invalidated[0]["memory_copies"]),
        (&2.into(), &1.into())
    );
    let warmed = text(&gateway, &["warm", "orders", "--prefix", "a:"]).await;
    assert_eq!(warmed, "2 of 2 keys are cached\n");
    let warmed = json(&gateway, &["warm", "orders", "--newest", "10"]).await;
    assert_eq!(
        (&warmed[0]["done"], &warmed[0]["total"], &warmed[0]["failed"]),
        (&3.into(), &3.into(), &0.into())
    );
    text(&gateway, &["warm", "orders", "--key", "a:1"]).await;
    text(&gateway, &["invalidate", "orders", "--tag", "red"]).await;
    text(&gateway, &["invalidate", "orders", "--all"]).await;
    assert_eq!(gateway.stats("orders").await.loads, 3, "each was loaded once");
    for command in ["warm", "invalidate"] {
        fails(&gateway, &[command, "orders"], 64, "--prefix").await;
        fails(
            &gateway,
            &[command, "orders", "--key", "a", "--prefix", "b"],
            64,
            "cannot be used with",
        )
        .await;
        fails(&gateway, &[command, "orders", "--key", ""], 64, "keys").await;
    }
}

#[tokio::test]
async fn settings_and_the_log_are_shown_and_the_log_is_changed() {
    let gateway = Setup::new()
        .config("[namespaces.orders]\nwrite_delay = \"2s\"")
        .start()
        .await;
    let all = text(&gateway, &["namespaces"]).await;
    assert!(
        all.contains("write_delay = 2s") && all.contains("of all others:"),
        "{all}"
    );
    let one = text(&gateway, &["namespaces", "orders"]).await;
    assert!(
        one.starts_with("orders: configured, not used since the start, its drain is running\n"),
        "{one}"
    );
    assert!(one.contains("tidegate.toml:") && one.contains("built in"), "{one}");
    let one = json(&gateway, &["namespaces", "orders"]).await;
    let delay = &one[0]["namespaces"][0]["settings"]["write_delay"];
    assert_eq!((&delay["value"], &delay["source"]), (&"2s".into(), &"namespace".into()));

    assert!(text(&gateway, &["log-level"]).await.starts_with("logged: info\n"));
    let changed = json(&gateway, &["log-level", "warn", "--target", "sqlx"]).await;
    assert_eq!(changed[0]["filter"], "info,sqlx=warn");
    assert!(
        text(&gateway, &["log-level", "error"])
            .await
            .starts_with("logged: error\n")
    );
    assert_eq!(json(&gateway, &["log-level", "--reset"]).await[0]["filter"], "info");
    fails(&gateway, &["log-level", "loud"], 64, "possible values").await;
    fails(
        &gateway,
        &["log-level", "warn", "--target", "nobody"],
        64,
        "must be one of",
    )
    .await;
}

#[tokio::test]
async fn a_command_says_when_nobody_is_there_and_what_its_codes_mean() {
    let nobody = format!("127.0.0.1:{}", free_port());
    for arguments in [
        &["stats"][..],
        &["namespaces"],
        &["queue"],
        &["dead-letters", "list"],
        &["dead-letters", "retry", "--all"],
        &["dead-letters", "discard", "1"],
        &["dead-letters", "export"],
        &["warm", "orders", "--newest", "1"],
        &["invalidate", "orders", "--all"],
        &["flush"],
        &["pause", "orders"],
        &["resume", "orders"],
        &["log-level"],
    ] {
        let output = run_at(&nobody, arguments).await;
        assert_eq!(output.code, Some(69), "{arguments:?}: {output:?}");
        assert!(
            output.stderr.contains("no gateway answers at") && output.stdout.is_empty(),
            "{output:?}"
        );
        let help = run_at(&nobody, &[arguments, &["--help"]].concat()).await;
        assert_eq!(help.code, Some(0), "{help:?}");
        assert!(help.stdout.contains("Exit codes: 0 done"), "{help:?}");
    }
}
