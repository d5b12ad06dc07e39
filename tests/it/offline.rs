//! Proves that a gateway starts while its PostgreSQL is away if it has a lease that lasts, and only then: it serves what it can, stamps no
//! version twice, and hands over what it has once the store is shown to be its own.

use std::{fs, net::TcpListener, path::Path};

use tidegate::{
    model::Version,
    rpc::proto::{ReadConsistency, Source},
};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{
    Client, Database, Gateway, Mode, SOON, Setup,
    client::{assert_come_back, seen},
    eventually, expect,
    gateway::data_dir,
    postgres::{Server, Stop},
    process::Directory,
    proxy::Proxy,
    redis,
};

/// What a start says that goes on without the store.
const OFFLINE: &str = "starting without the store";

/// For starts that are expected to give up.
const IMPATIENT: &str = "[store]\nconnect_wait = \"1s\"";

async fn put(client: &Client, key: &str, mode: Mode) -> Version {
    let answer = client.put(key, key.as_bytes(), mode).await.expect("the write is taken");
    Version::new(answer.version).expect("a version is positive")
}

/// What a gateway does without its store, right after it has started.
async fn assert_offline(gateway: &Gateway) {
    assert_eq!(gateway.said(OFFLINE).len(), 1, "{}", gateway.log());
    let readiness = gateway.await_readiness("store: down").await;
    assert_eq!(
        readiness.status, 200,
        "caches and write-behind can serve: {readiness:?}"
    );
    let refused = gateway.client.put("through", b"value", Mode::Through).await;
    assert_come_back(&refused.expect_err("no store"), Code::Unavailable);
    let refused = gateway.client.get("unknown", ReadConsistency::Cached).await;
    assert_come_back(&refused.expect_err("only the store knows"), Code::Unavailable);
}

async fn await_lease(gateway: &Gateway) {
    eventually("the lease is renewed", SOON, async || {
        let said = gateway.said("is renewed again").len();
        expect(said > 0, gateway.log())
    })
    .await;
}

/// A store that can be hidden from its gateway, and looked into meanwhile.
struct Hidden {
    proxy: Proxy,
    database: Database,
    url: String,
}

impl Hidden {
    async fn new() -> Hidden {
        let database = Database::postgres().await;
        let (scheme, rest) = database.url().split_once("//").expect("a URL");
        let (user, rest) = rest.split_once('@').expect("a user");
        let (server, name) = rest.split_once('/').expect("a path");
        let proxy = Proxy::start(server).await;
        let url = format!("{scheme}//{user}@{}/{name}", proxy.address());
        Hidden { proxy, database, url }
    }

    /// A gateway that has used the store, was killed, and started again without it.
    async fn gateway(&self) -> Gateway {
        // What is accepted without the store is not waited for.
        let setup = Setup::new().store(&self.url).config("[shutdown]\ndrain_wait = \"1s\"");
        let mut gateway = setup.start().await;
        put(&gateway.client, "stored", Mode::Through).await;
        gateway.kill().await;
        self.proxy.cut();
        let gateway = gateway.start_again().await;
        assert_offline(&gateway).await;
        gateway
    }

    async fn drop_database(&self) {
        self.on_the_server("drop database", "with (force)").await;
    }

    /// Puts an empty database in the place of one that was dropped.
    async fn create_database(&self, options: &str) {
        self.on_the_server("create database", options).await;
    }

    async fn on_the_server(&self, statement: &str, options: &str) {
        let (server, name) = self.database.url().rsplit_once('/').expect("a path");
        let admin = Database::at(&format!("{server}/postgres"));
        admin.execute(&format!("{statement} {name} {options}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_killed_in_an_outage_comes_back_and_serves() {
    let mut postgres = Server::start().await;
    let database = Database::at(&postgres.create_database().await);
    let redis = redis::start().await;
    let mut gateway = Setup::new().store(database.url()).redis(&redis.url()).start().await;
    let mut versions = vec![put(&gateway.client, "stored", Mode::Through).await];
    put(&gateway.client, "again", Mode::Behind).await;
    gateway.drained().await;
    postgres.stop(Stop::Fast).await;
    gateway.await_health("tidegate.store", ServingStatus::NotServing).await;
    versions.push(put(&gateway.client, "again", Mode::Behind).await);
    versions.push(put(&gateway.client, "accepted 0", Mode::Behind).await);
    for round in 1..4 {
        gateway.kill().await;
        gateway = gateway.start_again().await;
        assert_offline(&gateway).await;
        let read = gateway.client.read("stored").await;
        assert_eq!(seen(&read), (Some(&b"stored"[..]), Source::L2));
        let recovered = format!("accepted {}", round - 1);
        let read = gateway.client.value(&recovered, ReadConsistency::Cached).await;
        assert_eq!(read.as_deref(), Some(recovered.as_bytes()));
        versions.push(put(&gateway.client, "again", Mode::Behind).await);
        versions.push(put(&gateway.client, &format!("accepted {round}"), Mode::Behind).await);
    }
    postgres.start_again().await;
    gateway.await_health("tidegate.store", ServingStatus::Serving).await;
    await_lease(&gateway).await;
    gateway.drained().await;
    versions.push(put(&gateway.client, "through", Mode::Through).await);
    assert!(versions.is_sorted_by(|a, b| a < b), "{versions:?}");
    assert!(
        versions.iter().all(|version| version.node() == versions[0].node()),
        "{versions:?}"
    );
    let mut keys = database.records("orders").await;
    keys.retain(|key| key != "again");
    assert_eq!(
        keys,
        [
            "accepted 0",
            "accepted 1",
            "accepted 2",
            "accepted 3",
            "stored",
            "through"
        ]
    );
    let row = database.row("orders", "again").await.expect("it is stored");
    assert_eq!(Version::new(row.version), Some(versions[versions.len() - 3]));
    assert_eq!(database.dead_letters().await, []);
}

#[tokio::test]
async fn a_gateway_that_is_stopped_in_order_in_an_outage_comes_back_too() {
    let hidden = Hidden::new().await;
    let mut gateway = hidden.gateway().await;
    put(&gateway.client, "accepted", Mode::Behind).await;
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(75), "{exit:?}");
    let gateway = gateway.start_again().await;
    assert_offline(&gateway).await;
    assert_eq!(seen(&gateway.client.read("accepted").await).0, Some(&b"accepted"[..]));
    hidden.proxy.restore();
    await_lease(&gateway).await;
    gateway.drained().await;
    assert_eq!(hidden.database.records("orders").await, ["accepted", "stored"]);
}

#[tokio::test]
async fn without_a_lease_that_lasts_no_gateway_starts_without_its_store() {
    let hidden = Hidden::new().await;
    let setup = Setup::new().store(&hidden.url).config(IMPATIENT);
    let refused = async |setup: &Setup, directory: &Directory, why: &str| {
        let exit = setup.run_to_end_in(directory).await;
        assert_eq!(exit.code, Some(69), "{exit:?}");
        assert!(exit.log.contains(why) && !exit.log.contains(OFFLINE), "{why}: {exit:?}");
    };
    hidden.proxy.cut();
    refused(&setup, &Directory::new("gateway"), "cannot be used").await;

    hidden.proxy.restore();
    let mut gateway = setup.clone().start().await;
    let node = put(&gateway.client, "stored", Mode::Through).await.node();
    gateway.kill().await;
    let directory = gateway.leave();
    hidden.proxy.cut();

    let other = Setup::new().store(&format!("{}_other", hidden.url)).config(IMPATIENT);
    refused(&other, &directory, "of another store").await;

    let copy = Directory::new("copy");
    copy_files(&data_dir(&directory), &data_dir(&copy));
    refused(&setup, &copy, "of which this one is a copy").await;

    let lease = data_dir(&directory).join("lease");
    let whole = fs::read(&lease).expect("a lease is saved");
    for damaged in [&b""[..], &whole[..whole.len() / 2], b"tidegate-lease 2 00000000\n"] {
        fs::write(&lease, damaged).expect("the directory is ours");
        refused(&setup, &directory, "damaged").await;
    }
    fs::write(&lease, &whole).expect("the directory is ours");
    let mut gateway = setup.clone().start_in(directory).await;
    assert_offline(&gateway).await;
    gateway.kill().await;

    // Nor does what is broken hinder a start with the store.
    let directory = gateway.leave();
    fs::write(&lease, b"").expect("the directory is ours");
    hidden.proxy.restore();
    let gateway = setup.start_in(directory).await;
    assert_eq!(put(&gateway.client, "stored", Mode::Through).await.node(), node);
}

fn copy_files(from: &Path, to: &Path) {
    fs::create_dir(to).expect("the directory is ours");
    for file in fs::read_dir(from).expect("a gateway has run there") {
        let file = file.expect("it can be listed");
        if file.file_type().expect("it is there").is_file() {
            fs::copy(file.path(), to.join(file.file_name())).expect("it can be copied");
        }
    }
}

#[tokio::test]
async fn a_gateway_that_was_given_up_meanwhile_stops_and_loses_nothing() {
    let hidden = Hidden::new().await;
    let mut gateway = hidden.gateway().await;
    let accepted = put(&gateway.client, "accepted", Mode::Behind).await;
    hidden
        .database
        .execute("update tidegate_nodes set directory = 'of another gateway'")
        .await;
    hidden.proxy.restore();
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(70), "{exit:?}");
    assert!(
        exit.log.contains("another process has this gateway's node id"),
        "{exit:?}"
    );
    // Nor does it come back as before if the store is away again.
    hidden.proxy.cut();
    let directory = gateway.leave();
    let setup = Setup::new().store(&hidden.url).config(IMPATIENT);
    let exit = setup.run_to_end_in(&directory).await;
    assert_eq!(exit.code, Some(69), "{exit:?}");

    hidden.proxy.restore();
    let gateway = setup.start_in(directory).await;
    let through = put(&gateway.client, "through", Mode::Through).await;
    assert!(
        through.node() != accepted.node() && through > accepted,
        "{through:?} {accepted:?}"
    );
    gateway.drained().await;
    assert_eq!(
        hidden.database.records("orders").await,
        ["accepted", "stored", "through"]
    );
}

#[tokio::test]
async fn tables_that_are_not_the_gateways_are_left_alone_and_said() {
    let hidden = Hidden::new().await;
    let gateway = hidden.gateway().await;
    hidden.drop_database().await;
    hidden.create_database("").await;
    let foreign = "create table tidegate_entries (namespace text, key text, version bigint, value bytea, mine integer)";
    hidden.database.execute(foreign).await;
    put(&gateway.client, "accepted", Mode::Behind).await;
    hidden.proxy.restore();
    let refusals = async || {
        gateway
            .said("what answers in the store's place is not fit for use")
            .len()
    };
    eventually("it is said", SOON, async || expect(refusals().await > 0, gateway.log())).await;
    eventually("the drain tries again", SOON, async || {
        let retries = gateway.metric("tidegate_store_commit_retries_total", &[]).await;
        expect(retries >= 3.0, retries)
    })
    .await;
    assert_eq!(refusals().await, 1, "once: {}", gateway.log());
    let readiness = gateway.await_readiness("store: down").await;
    assert_eq!(readiness.status, 200, "{readiness:?}");
    put(&gateway.client, "accepted too", Mode::Behind).await;
    let tables = "select tablename::text from pg_tables where schemaname = 'public' order by 1";
    let left = hidden.database.texts(tables).await;
    assert_eq!(left, ["tidegate_entries", "tidegate_migrations"], "no table of ours");
    assert_eq!(
        hidden.database.texts("select key from tidegate_entries").await,
        Vec::<String>::new()
    );

    hidden.database.execute("drop table tidegate_entries").await;
    await_lease(&gateway).await;
    gateway.drained().await;
    assert_eq!(hidden.database.records("orders").await, ["accepted", "accepted too"]);
    assert_eq!(hidden.database.dead_letters().await, []);
}

#[tokio::test]
async fn tables_of_a_newer_gateway_are_taken() {
    let hidden = Hidden::new().await;
    let gateway = hidden.gateway().await;
    put(&gateway.client, "accepted", Mode::Behind).await;
    hidden
        .database
        .execute(
            "alter table tidegate_entries add column newer integer;
             insert into tidegate_migrations (version, description, success, checksum, execution_time)
             values (9999, 'newer', true, '', 0)",
        )
        .await;
    hidden.proxy.restore();
    await_lease(&gateway).await;
    gateway.drained().await;
    assert_eq!(hidden.database.records("orders").await, ["accepted", "stored"]);
}

#[tokio::test]
async fn a_store_that_refuses_ends_the_start_whatever_is_saved() {
    let hidden = Hidden::new().await;
    let mut gateway = hidden.gateway().await;
    gateway.kill().await;
    hidden.proxy.restore();
    let directory = gateway.leave();
    let setup = Setup::new().store(&hidden.url).config(IMPATIENT);
    let refused = async |why: &str| {
        let exit = setup.run_to_end_in(&directory).await;
        assert_eq!(exit.code, Some(69), "{exit:?}");
        assert!(exit.log.contains(why) && !exit.log.contains(OFFLINE), "{why}: {exit:?}");
    };
    // What somebody has to mend is waited for as ever, and no outage.
    hidden.drop_database().await;
    refused("3D000").await;
    hidden
        .create_database("encoding 'LATIN1' locale 'C' template template0")
        .await;
    refused("LATIN1").await;
}

#[tokio::test]
async fn a_server_that_accepts_and_never_answers_is_no_store_either() {
    let mut postgres = Server::start().await;
    let database = Database::at(&postgres.create_database().await);
    let setup = Setup::new()
        .store(database.url())
        .config("[store]\ncall_timeout = \"3s\"");
    let mut gateway = setup.start().await;
    gateway.kill().await;
    postgres.stop(Stop::Fast).await;
    let (_, server) = database.url().rsplit_once('@').expect("a user");
    let (address, _) = server.split_once('/').expect("a path");
    let silent = TcpListener::bind(address).expect("the server's port is free");
    let gateway = gateway.start_again().await;
    assert_eq!(gateway.said(OFFLINE).len(), 1, "{}", gateway.log());
    put(&gateway.client, "accepted", Mode::Behind).await;
    drop(silent);
    postgres.start_again().await;
    await_lease(&gateway).await;
    gateway.drained().await;
    assert_eq!(database.records("orders").await, ["accepted"]);
}
