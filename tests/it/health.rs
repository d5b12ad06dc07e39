//! Proves what orchestrators are told: by `grpc.health.v1`, by the operations HTTP, and in the metrics.

use std::fs;

use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{
    Database, Mode, SOON, Setup, eventually, expect,
    gateway::run_command,
    postgres::{Server, Stop},
    process::{Directory, free_port},
    redis,
};

#[tokio::test]
async fn dependencies_come_and_go_and_the_gateway_stays() {
    let (mut postgres, mut redis) = (Server::start().await, redis::start().await);
    let database = Database::at(&postgres.create_database().await);
    let gateway = Setup::new().store(database.url()).redis(&redis.url()).start().await;
    let healthy = ["", "tidegate.v1.Gateway", "tidegate.store", "tidegate.cache"];
    for service in healthy {
        gateway.await_health(service, ServingStatus::Serving).await;
    }
    assert_eq!(gateway.page("/readyz").await.status, 200);

    postgres.stop(Stop::Fast).await;
    gateway.await_health("tidegate.store", ServingStatus::NotServing).await;
    gateway.await_health("tidegate.cache", ServingStatus::Serving).await;
    redis.kill();
    gateway.await_health("tidegate.cache", ServingStatus::NotServing).await;
    // Write-behind still serves: a dead dependency must not take every replica out of rotation.
    for service in ["", "tidegate.v1.Gateway"] {
        assert_eq!(gateway.health(service).await.unwrap(), ServingStatus::Serving);
    }
    let readiness = gateway.page("/readyz").await;
    assert_eq!(readiness.status, 200);
    assert!(readiness.body.contains("store: down"), "{readiness:?}");
    assert!(readiness.body.contains("cache: down"), "{readiness:?}");
    assert_eq!(gateway.page("/livez").await.status, 200);

    postgres.start_again().await;
    redis.start_again().await;
    for service in healthy {
        gateway.await_health(service, ServingStatus::Serving).await;
    }
}

#[tokio::test]
async fn unknown_services_are_not_found() {
    let gateway = Setup::new().start().await;
    for service in ["tidegate.v2.Gateway", "gateway", "tidegate.v1.Gateway "] {
        let status = gateway.health(service).await.expect_err("there is no such service");
        assert_eq!(status.code(), Code::NotFound, "{service:?}");
    }
    let status = gateway
        .health("tidegate.cache")
        .await
        .expect_err("no Redis is configured");
    assert_eq!(status.code(), Code::NotFound);
    assert_eq!(gateway.health("tidegate.store").await.unwrap(), ServingStatus::Serving);
}

#[tokio::test]
async fn the_health_command_asks_the_gateway_that_its_configuration_names() {
    const VARIABLE: &str = "TIDEGATE_OPERATIONS__LISTEN";
    let database = Database::postgres().await;
    let mut gateway = Setup::new().store(database.url()).start().await;
    let directory = Directory::new("health");
    let ask = async |address: &str| {
        let file = format!("[operations]\nlisten = \"{address}\"");
        fs::write(directory.path().join("tidegate.toml"), file).unwrap();
        let by_file = run_command(&["health", "--config", "tidegate.toml"], &[], directory.path()).await;
        let by_variable = run_command(&["health"], &[(VARIABLE, address)], directory.path()).await;
        assert_eq!(by_file.code, by_variable.code, "{by_file:?} {by_variable:?}");
        by_file
    };
    let serving = gateway.operations.to_string();
    let ready = ask(&serving).await;
    assert_eq!(ready.code, Some(0), "{ready:?}");
    let nobody = ask(&format!("127.0.0.1:{}", free_port())).await;
    assert_eq!(nobody.code, Some(69), "{nobody:?}");
    assert!(nobody.stderr.contains("no answer from 127.0.0.1"), "{nobody:?}");
    let nonsense = ask("nowhere").await;
    assert_eq!(nonsense.code, Some(64), "{nonsense:?}");

    // A gateway that drains is there, and not ready.
    let hold = database.hold_writes().await;
    gateway.client.put("key", b"value", Mode::Behind).await.unwrap();
    gateway.terminate();
    eventually("it is not ready any more", SOON, async || {
        let draining = ask(&serving).await;
        expect(
            draining.code == Some(69) && draining.stderr.contains("is not ready"),
            draining,
        )
    })
    .await;
    hold.release().await;
    assert_eq!(gateway.wait_exit(SOON).await.code, Some(0));
}

#[tokio::test]
async fn other_pages_do_not_exist() {
    let gateway = Setup::new().start().await;
    for path in ["/index.html", "/metrics/", "/figures/", "/admin", "/../etc/passwd"] {
        assert_eq!(gateway.page(path).await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn calls_are_counted_by_method_and_code() {
    let gateway = Setup::new().start().await;
    let client = &gateway.client;
    client.put("key", b"value", Mode::Through).await.unwrap();
    client.read("key").await;
    client.read("key").await;
    client.put("", b"value", Mode::Through).await.expect_err("no key");
    client.delete("key", Mode::Through).await.unwrap();
    for (method, code, count) in [
        ("Get", "OK", 2.0),
        ("Put", "OK", 1.0),
        ("Put", "INVALID_ARGUMENT", 1.0),
        ("Delete", "OK", 1.0),
    ] {
        let labels = [format!("method=\"{method}\""), format!("code=\"{code}\"")];
        let calls = gateway.metric("tidegate_calls_total", &[&labels[0], &labels[1]]).await;
        assert_eq!(calls, count, "{method} {code}");
    }
    let timed = gateway
        .metric("tidegate_call_duration_seconds_count", &["method=\"Get\""])
        .await;
    assert_eq!(timed, 2.0);
}

#[tokio::test]
async fn metrics_have_the_names_that_dashboards_use() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    let gateway = Setup::new().store(database.url()).redis(&redis.url()).start().await;
    gateway.client.put("key", b"secret-value", Mode::Through).await.unwrap();
    gateway.client.put("secret-key", b"value", Mode::Behind).await.unwrap();
    gateway.client.read("absent").await;
    gateway.drained().await;
    let text = gateway.page("/metrics").await.body;
    for name in [
        "tidegate_calls_total",
        "tidegate_call_duration_seconds_bucket",
        "tidegate_reads_total",
        "tidegate_cache_refreshes_total",
        "tidegate_cache_loads_joined_total",
        "tidegate_redis_errors_total",
        "tidegate_redis_connections_down",
        "tidegate_queue_accepted_writes_total",
        "tidegate_queue_coalesced_writes_total",
        "tidegate_queue_full_writes_total",
        "tidegate_queue_pending_entries",
        "tidegate_queue_pending_bytes",
        "tidegate_queue_oldest_pending_age_seconds",
        "tidegate_store_breaker_open",
        "tidegate_store_commit_duration_seconds_bucket",
        "tidegate_store_commit_batch_writes_bucket",
        "tidegate_store_load_duration_seconds_bucket",
        "tidegate_store_load_batch_keys_bucket",
        "tidegate_store_dead_letters_total",
        "tidegate_store_collected_rows_total",
    ] {
        let sample = |line: &str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
        assert!(text.lines().any(sample), "{name} is missing in:\n{text}");
        let family = name.trim_end_matches("_total").trim_end_matches("_bucket");
        assert!(text.contains(&format!("# HELP {family} ")), "{family} is not explained");
    }
    assert!(text.ends_with("# EOF\n"), "the format of OpenMetrics");
    assert!(!text.contains("secret"), "no key and no value becomes a label");
    assert!(!gateway.log().contains("secret"), "nor is it logged");
}

#[tokio::test]
async fn the_age_of_the_oldest_pending_write_rises_until_it_is_stored() {
    const AGE: &str = "tidegate_queue_oldest_pending_age_seconds";
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    assert_eq!(gateway.metric(AGE, &[]).await, 0.0);
    let hold = database.hold_writes().await;
    gateway.client.put("key", b"value", Mode::Behind).await.unwrap();
    eventually("the age rises", SOON, async || {
        // A newer write of the key does not make the oldest younger.
        gateway.client.put("key", b"newer", Mode::Behind).await.unwrap();
        let age = gateway.metric(AGE, &[]).await;
        expect(age >= 0.5, age)
    })
    .await;
    hold.release().await;
    gateway.drained().await;
    assert_eq!(gateway.metric(AGE, &[]).await, 0.0);
}
