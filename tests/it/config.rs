//! Proves that the configuration is taken from the file, the environment and the flags in this order, is shown without secrets, and is
//! refused with its place and the reason when it is bad.

use std::fs;

use toml::Table;

use crate::harness::{
    Setup,
    gateway::{Output, run_command},
    process::Directory,
};

/// EX_USAGE.
const REFUSED: Option<i32> = Some(64);

/// Runs `tidegate config` over a file.
async fn config(file: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let directory = Directory::new("config");
    fs::write(directory.path().join("tidegate.toml"), file).unwrap();
    let arguments = [&["config", "--config", "tidegate.toml"], arguments].concat();
    run_command(&arguments, variables, directory.path()).await
}

async fn effective(file: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Table {
    let output = config(file, arguments, variables).await;
    assert_eq!(output.code, Some(0), "{output:?}");
    output
        .stdout
        .parse()
        .unwrap_or_else(|error| panic!("{error} in:\n{}", output.stdout))
}

#[tokio::test]
async fn the_defaults_are_shown() {
    let shown = effective("", &[], &[]).await;
    assert_eq!(shown["listen"].as_str(), Some("127.0.0.1:50051"));
    assert_eq!(shown["insecure"].as_bool(), Some(false));
    assert_eq!(shown["queue"]["entries_max"].as_integer(), Some(100_000));
    assert_eq!(shown["namespace_defaults"]["write_mode"].as_str(), Some("through"));
    assert_eq!(shown["namespace_defaults"]["queue_full"].as_str(), Some("wait"));
}

#[tokio::test]
async fn flags_go_over_the_environment_and_the_environment_over_the_file() {
    let file = "listen = \"127.0.0.1:1\"\ndata_dir = \"file\"\n[queue]\nentries_max = 1\n[namespaces.orders]\nwrite_delay = \"1s\"";
    let variables = [
        ("TIDEGATE_LISTEN", "127.0.0.1:2"),
        ("TIDEGATE_DATA_DIR", "environment"),
        ("TIDEGATE_QUEUE__ENTRIES_MAX", "2"),
    ];
    let shown = effective(file, &["--listen", "127.0.0.1:3"], &variables).await;
    assert_eq!(shown["listen"].as_str(), Some("127.0.0.1:3"));
    assert_eq!(shown["data_dir"].as_str(), Some("environment"));
    assert_eq!(shown["queue"]["entries_max"].as_integer(), Some(2));
    assert_eq!(shown["namespaces"]["orders"]["write_delay"].as_str(), Some("1s"));
}

#[tokio::test]
async fn what_is_shown_can_be_read_again() {
    let file = "[namespace_defaults]\ncache_lifetime = \"90s\"\n[namespaces.orders]\nwrite_mode = \"behind\"\nrefresh_threshold = 0.5";
    let first = config(file, &[], &[]).await;
    assert_eq!(first.code, Some(0), "{first:?}");
    let second = config(&first.stdout, &[], &[]).await;
    assert_eq!(second.stdout, first.stdout);
    let shown: Table = first.stdout.parse().unwrap();
    let orders = &shown["namespaces"]["orders"];
    assert_eq!(
        orders["cache_lifetime"].as_str(),
        shown["namespace_defaults"]["cache_lifetime"].as_str()
    );
}

#[tokio::test]
async fn secrets_are_not_shown() {
    const SECRET: &str = "hunter2";
    let urls = [
        (
            "postgres://app:hunter2@db.example/orders",
            "redis://:hunter2@cache.example",
        ),
        (
            "postgres://app@db.example/orders?password=hunter2",
            "rediss://app:hunter2@cache.example:6380/1",
        ),
    ];
    for (store, redis) in urls {
        let output = config("", &["--store-url", store], &[("TIDEGATE_REDIS_URL", redis)]).await;
        assert_eq!(output.code, Some(0), "{output:?}");
        assert!(!format!("{output:?}").contains(SECRET), "{output:?}");
        assert!(
            output.stdout.contains("db.example") && output.stdout.contains("cache.example"),
            "{output:?}"
        );
    }
    let bad = config("store_url = \"mysql://app:hunter2@db.example\"", &[], &[]).await;
    assert_eq!(bad.code, REFUSED, "{bad:?}");
    assert!(!format!("{bad:?}").contains(SECRET), "{bad:?}");
}

#[tokio::test]
async fn bad_settings_are_refused_with_their_line_and_the_reason() {
    let cases = [
        ("\n[queue]\nentries_max = \"many\"", 3, "nonzero"),
        ("\n[queue]\nentries_max = 0", 3, "nonzero"),
        ("[queue]\nentires_max = 5", 2, "entires_max"),
        ("[cellar]\nbottles = 5", 1, "cellar"),
        ("listen = \"nowhere\"", 1, "socket address"),
        ("data_dir = \"x\"\nlisten = 5", 2, "socket address"),
        ("[namespaces.orders]\nqueue_full = \"drop\"", 2, "drop"),
        ("\n\n[namespaces.orders\n", 3, ""),
        ("[namespaces.orders]\nwrite_delay = \"soon\"", 2, "duration"),
        ("[rpc]\n\nvalue_bytes_max = 99999999999", 3, "value_bytes_max"),
    ];
    for (file, line, reason) in cases {
        let output = config(file, &[], &[]).await;
        assert_eq!(output.code, REFUSED, "{file:?}: {output:?}");
        assert_eq!(output.stdout, "", "{file:?}");
        assert!(
            output.stderr.contains(&format!("tidegate.toml:{line}:")),
            "{file:?}: {output:?}"
        );
        assert!(output.stderr.contains(reason), "{file:?}: {output:?}");
    }
}

#[tokio::test]
async fn bad_variables_and_flags_are_named() {
    let output = config("", &[], &[("TIDEGATE_QUEUE__ENTRIES_MAX", "many")]).await;
    assert_eq!(output.code, REFUSED, "{output:?}");
    assert!(output.stderr.contains("TIDEGATE_QUEUE__ENTRIES_MAX"), "{output:?}");
    let output = config("", &["--listen", "nowhere"], &[]).await;
    assert_eq!(output.code, REFUSED, "{output:?}");
    assert!(output.stderr.contains("--listen"), "{output:?}");
    let output = config("", &["--nonsense"], &[]).await;
    assert_eq!(output.code, REFUSED, "{output:?}");
    let directory = Directory::new("config");
    let output = run_command(&["config", "--config", "missing.toml"], &[], directory.path()).await;
    assert_eq!(output.code, REFUSED, "{output:?}");
    assert!(output.stderr.contains("missing.toml"), "{output:?}");
}

#[tokio::test]
async fn other_machines_are_served_only_when_told_so() {
    for address in ["0.0.0.0:0", "[::]:0"] {
        let exit = Setup::new().argument("--listen").argument(address).run_to_end().await;
        assert_eq!(exit.code, REFUSED, "{exit:?}");
        assert!(exit.log.contains("--insecure"), "{exit:?}");
    }
    let gateway = Setup::new()
        .argument("--listen")
        .argument("0.0.0.0:0")
        .argument("--insecure")
        .start()
        .await;
    assert!(gateway.address.ip().is_unspecified());
}

#[tokio::test]
async fn serving_refuses_what_config_refuses() {
    let exit = Setup::new().config("[queue]\nentires_max = 5").run_to_end().await;
    assert_eq!(exit.code, REFUSED, "{exit:?}");
    assert!(exit.log.contains("entires_max"), "{exit:?}");
}

#[tokio::test]
async fn the_first_line_says_where_it_serves_and_what_it_stores_where() {
    let gateway = Setup::new().start().await;
    let serving = gateway.said("\"serving\"");
    assert_eq!(serving.len(), 1, "{serving:?}");
    assert!(serving[0].contains(&gateway.address.to_string()), "{serving:?}");
    assert!(
        serving[0].contains("sqlite") && serving[0].contains("data"),
        "{serving:?}"
    );
}
