//! Proves that the harness's servers start, stop, start again and go away: what the other tests take for granted.

use std::{fs, path::Path, process::Command};

use redis::AsyncCommands;
use sqlx::{Connection, Executor};

use crate::harness::{
    SOON, Setup, eventually, expect, postgres,
    process::{Directory, Process},
    redis as redis_server,
};

#[tokio::test]
async fn databases_of_the_shared_postgres_are_apart() {
    let (one, other) = (postgres::database().await, postgres::database().await);
    let mut connection = postgres::connect(&one).await;
    connection.execute("create table only_here (n int)").await.unwrap();
    let mut connection = postgres::connect(&other).await;
    connection.execute("create table only_here (n int)").await.unwrap();
}

#[tokio::test]
async fn a_plain_role_owns_its_database_and_no_more() {
    let (plain, _) = postgres::database_of_plain_role().await;
    let mut connection = postgres::connect(&plain).await;
    connection.execute("create table mine (n int)").await.unwrap();
    assert!(connection.execute("create role another").await.is_err());
}

#[tokio::test]
async fn postgres_stops_and_starts_again_with_its_data() {
    let mut server = postgres::Server::start().await;
    let url = server.create_database().await;
    postgres::connect(&url)
        .await
        .execute("create table kept (n int)")
        .await
        .unwrap();
    for how in [postgres::Stop::Fast, postgres::Stop::Immediate] {
        server.stop(how).await;
        assert!(sqlx::PgConnection::connect(&url).await.is_err());
        server.start_again().await;
        let mut connection = postgres::connect(&url).await;
        connection.execute("insert into kept values (1)").await.unwrap();
    }
}

#[tokio::test]
async fn a_durable_postgres_waits_for_the_disk_also_when_it_is_started_again() {
    let mut server = postgres::Server::start_durable().await;
    let url = server.create_database().await;
    for _ in 0..2 {
        let mut connection = postgres::connect(&url).await;
        for setting in ["fsync", "full_page_writes", "synchronous_commit"] {
            let query = sqlx::query_scalar("select current_setting($1)").bind(setting);
            let value: String = query.fetch_one(&mut connection).await.unwrap();
            assert_eq!(value, "on", "{setting}");
        }
        server.stop(postgres::Stop::Immediate).await;
        server.start_again().await;
    }
}

#[tokio::test]
async fn a_durable_redis_keeps_what_it_was_told() {
    let mut server = redis_server::start_durable().await;
    let config = redis::cmd("CONFIG").arg(&["GET", "appendfsync"]).to_owned();
    let (_, when): (String, String) = config.query_async(&mut server.connect().await).await.unwrap();
    assert_eq!(when, "always");
    let _: () = server.connect().await.set("key", "value").await.unwrap();
    server.kill();
    server.start_again().await;
    let value: String = server.connect().await.get("key").await.unwrap();
    assert_eq!(value, "value");
}

#[tokio::test]
async fn redis_comes_back_once_with_what_was_saved() {
    let mut server = redis_server::start().await;
    let _: () = server.connect().await.set("key", "old").await.unwrap();
    server.save().await;
    let _: () = server.connect().await.set("key", "new").await.unwrap();
    for found in [Some("old"), None] {
        server.kill();
        server.start_again().await;
        let value: Option<String> = server.connect().await.get("key").await.unwrap();
        assert_eq!(value.as_deref(), found);
    }
}

#[tokio::test]
async fn redis_says_how_much_memory_it_uses() {
    let server = redis_server::start().await;
    let empty = server.used_bytes().await;
    let long = vec![0_u8; 1 << 20];
    let _: () = server.connect().await.set("key", long).await.unwrap();
    assert!(server.used_bytes().await > empty + (1 << 20));
}

#[tokio::test]
async fn a_frozen_gateway_answers_when_it_goes_on() {
    let gateway = Setup::new().start().await;
    gateway.freeze();
    let asked = tokio::spawn({
        let client = gateway.client.clone();
        async move { client.read("key").await }
    });
    // Its process is stopped, as its state says.
    eventually("it stands still", SOON, async || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", gateway.pid())).unwrap();
        expect(stat.contains(") T "), stat)
    })
    .await;
    gateway.thaw();
    assert!(asked.await.unwrap().entry.is_none());
}

#[tokio::test]
async fn redis_starts_again_empty_on_its_port() {
    let mut server = redis_server::start().await;
    let url = server.url();
    let _: () = server.connect().await.set("key", "value").await.unwrap();
    server.kill();
    server.start_again().await;
    assert_eq!(server.url(), url);
    let value: Option<String> = server.connect().await.get("key").await.unwrap();
    assert_eq!(value, None);
    server.stop().await;
    server.start_again().await;
}

#[tokio::test]
async fn a_process_ends_with_its_handle_and_its_directory_goes() {
    let directory = Directory::new("kept");
    let path = directory.path().to_owned();
    let process = Process::start("sleep", Command::new("sleep").arg("1000"), "TERM", &path, "sleep");
    let pid = process.pid();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    drop((process, directory));
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(!path.exists());
}

#[tokio::test]
async fn signals_reach_a_process_and_its_end_is_told() {
    let directory = Directory::new("signals");
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "trap 'echo caught >&2; exit 7' TERM; echo ready >&2; while :; do sleep 0.05; done",
    ]);
    let mut process = Process::start("sh", &command, "KILL", directory.path(), "sh");
    eventually("the trap is set", SOON, async || {
        let said = process.stderr();
        expect(said.contains("ready"), said)
    })
    .await;
    process.signal("TERM");
    assert_eq!(process.wait(SOON).await.code(), Some(7));
    let said = fs::read_to_string(directory.path().join("sh.err")).unwrap();
    assert_eq!(said, "ready\ncaught\n");
}
