//! The gateway beside its floor and its peers, in one run: `make bench`.
//!
//! Owns the rows, and the order in which their contestants take turns. Does not own the load (`load`), nor who is measured.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub,
    missing_docs,
    reason = "a benchmark: it may fail loudly, and nobody is outside to reach or read it"
)]

mod calls;
mod floor;
#[allow(
    dead_code,
    unused_imports,
    reason = "shared with the integration tests, which use more of it"
)]
#[path = "../../../tests/it/harness/mod.rs"]
mod harness;
mod load;
mod peers;
mod plain;
mod race;

use std::{env, error::Error, net::SocketAddr, process::Command, time::Duration};

use harness::{
    Gateway, SOON, Setup, eventually, postgres,
    process::{Directory, Process},
    redis,
};
use load::Shape;
use race::{Contestant, Driven, What, race};
use tidegate::rpc::proto::WriteMode;

/// Whatever ends the run. Tasks hand it on.
pub type Failure = Box<dyn Error + Send + Sync>;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const KEYS: usize = 100_000;
const VALUE_BYTES: usize = 100;
const SHAPE: Shape = Shape {
    connections: 8,
    streams: 16,
};

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("floor") => floor::serve(arguments[1].parse()?),
        Some("plain") => tokio::runtime::Runtime::new()?.block_on(plain::serve(&arguments[1], &arguments[2])),
        _ => tokio::runtime::Runtime::new()?.block_on(probe(&arguments)),
    }
}

/// A role of this binary, as a process of its own.
struct Role {
    process: Process,
    server: SocketAddr,
    _directory: Directory,
}

impl Role {
    async fn start(role: &str, arguments: &[&str]) -> Result<Role, Failure> {
        let directory = Directory::new(role);
        let mut command = Command::new(env::current_exe()?);
        command.arg(role).args(arguments);
        let process = Process::start(role, &command, "KILL", directory.path(), role);
        let server = eventually("the role serves", SOON, async || {
            let said = process.stderr();
            let address = said.lines().find_map(|line| line.strip_prefix("serving "));
            address.and_then(|address| address.parse().ok()).ok_or(said.clone())
        })
        .await;
        Ok(Role {
            process,
            server,
            _directory: directory,
        })
    }
}

async fn probe(arguments: &[String]) -> Result<(), Failure> {
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let floor = Role::start("floor", &["100"]).await?;
    let gets = calls::gets(KEYS, VALUE_BYTES)?;
    let behind = calls::puts(KEYS, VALUE_BYTES, WriteMode::Behind)?;
    let through = calls::puts(KEYS, VALUE_BYTES, WriteMode::Through)?;
    let redis = redis::start().await;
    let database = postgres::database().await;
    let full = Setup::new().store(&database).redis(&redis.url()).start().await;
    let no_l1 = Setup::new()
        .store(&postgres::database().await)
        .redis(&redis.url())
        .config("[memory]\nbytes_max = 0\n[redis]\nprefix = \"nol1:\"")
        .start()
        .await;
    let embedded = Setup::new().start().await;
    load::each_once(full.address, &behind, SHAPE).await?;
    load::each_once(no_l1.address, &behind, SHAPE).await?;
    full.drained().await;
    no_l1.drained().await;
    let grpc = |name, server, pid, calls: &std::sync::Arc<calls::Calls>, gateway| Contestant {
        name,
        what: What::Grpc(Driven {
            server,
            pid: Some(pid),
            calls: std::sync::Arc::clone(calls),
            shape: SHAPE,
            keys: 1,
            gateway,
        }),
    };
    let floor_pid = floor.process.pid();
    let mut contestants = vec![];
    if has("get") {
        contestants.push(grpc("floor get", floor.server, floor_pid, &gets, None));
        contestants.push(grpc("L1 get", full.address, full.pid(), &gets, None));
    }
    if has("l2") {
        contestants.push(grpc("L2 get", no_l1.address, no_l1.pid(), &gets, None));
    }
    if has("put") {
        contestants.push(grpc("floor put", floor.server, floor_pid, &behind, None));
        contestants.push(grpc("behind", full.address, full.pid(), &behind, Some(&full)));
        contestants.push(grpc(
            "embedded",
            embedded.address,
            embedded.pid(),
            &behind,
            Some(&embedded),
        ));
    }
    if has("through") {
        contestants.push(grpc("through", full.address, full.pid(), &through, None));
    }
    race(&contestants, 3, Duration::from_secs(3)).await?;
    Ok(())
}
