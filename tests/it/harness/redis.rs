//! Redis for the tests: a server of each test's own (it starts in a moment), to look into, stop and start again.
//!
//! It keeps nothing on disk unless told to: started again it is empty, as a cache may be.

use std::{fs, path::Path, process::Command};

use redis::{aio::MultiplexedConnection, cmd};

use super::{
    SOON, eventually,
    process::{Directory, Process, free_port},
};

/// What is saved, in a server's directory.
const DUMP: &str = "dump.rdb";

/// A server. Dropping it stops it.
pub struct Server {
    process: Option<Process>,
    port: u16,
    directory: Directory,
    log: Log,
}

/// Whether a server keeps what it is told.
#[derive(Debug, Clone, Copy)]
enum Log {
    Off,
    /// Each write is on the disk when it is answered (`appendfsync always`).
    Synced,
}

/// Starts an empty server and waits until it answers.
pub async fn start() -> Server {
    start_in(Directory::new("redis"), Log::Off).await
}

/// Starts an empty server that keeps every write that it has answered.
pub async fn start_durable() -> Server {
    start_in(Directory::new("redis"), Log::Synced).await
}

async fn start_in(directory: Directory, log: Log) -> Server {
    for _ in 0..20 {
        let port = free_port();
        if let Some(process) = run(&directory, port, log).await {
            return Server {
                process: Some(process),
                port,
                directory,
                log,
            };
        }
    }
    panic!("redis-server finds no free port, or is missing: run ci/deps");
}

impl Server {
    /// Its URL.
    pub fn url(&self) -> String {
        url(self.port)
    }

    /// A connection for looking and meddling.
    pub async fn connect(&self) -> MultiplexedConnection {
        connect(self.port).await.expect("Redis can be reached")
    }

    /// Ends the server as a crash would, and waits for its end. Its port stays.
    pub fn kill(&mut self) {
        drop(self.process.take().expect("the server runs"));
    }

    /// Ends the server in order, and waits for its end. Its port stays.
    pub async fn stop(&mut self) {
        let mut process = self.process.take().expect("the server runs");
        process.signal("TERM");
        process.wait(SOON).await;
    }

    /// Keeps what it holds now: the next start, and no later one, finds that.
    pub async fn save(&self) {
        let saved = cmd("SAVE").query_async(&mut self.connect().await).await;
        let () = saved.expect("the directory is ours");
    }

    /// Starts another server, elsewhere, that holds what this one saved, and waits until it answers. No later start finds that.
    pub async fn start_another(&self) -> Server {
        let directory = Directory::new("redis");
        let [from, to] = [&self.directory, &directory].map(|directory| directory.path().join(DUMP));
        fs::rename(from, to).expect("it was saved");
        start_in(directory, self.log).await
    }

    /// How many bytes of memory it has in use.
    pub async fn used_bytes(&self) -> u64 {
        let info: String = cmd("INFO")
            .arg("memory")
            .query_async(&mut self.connect().await)
            .await
            .expect("Redis answers");
        let used = info.lines().find_map(|line| line.strip_prefix("used_memory:"));
        used.and_then(|used| used.trim().parse().ok()).expect("it says so")
    }

    /// Starts the stopped server, empty unless something was saved, on its port, and waits until it answers.
    pub async fn start_again(&mut self) {
        assert!(self.process.is_none(), "the server runs already");
        self.process = run(&self.directory, self.port, self.log).await;
        assert!(
            self.process.is_some(),
            "Redis does not start again on port {}",
            self.port
        );
        // There is one only if it was saved.
        let _ = fs::remove_file(self.directory.path().join(DUMP));
    }

    /// Freezes the server: connections stay, nothing is answered.
    pub fn freeze(&self) {
        self.process.as_ref().expect("the server runs").signal("STOP");
    }

    /// Lets a frozen server go on.
    pub fn thaw(&self) {
        self.process.as_ref().expect("the server runs").signal("CONT");
    }
}

fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}")
}

async fn connect(port: u16) -> redis::RedisResult<MultiplexedConnection> {
    redis::Client::open(url(port))?.get_multiplexed_async_connection().await
}

/// Runs a server and waits until it answers. `None` if it ends first, as when the port is taken, or if another one answers.
async fn run(directory: &Directory, port: u16, log: Log) -> Option<Process> {
    let mut command = Command::new("redis-server");
    command
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
        .args(["--save", "", "--dir"])
        .arg(directory.path())
        .args(match log {
            Log::Off => ["--appendonly", "no"].as_slice(),
            Log::Synced => &["--appendonly", "yes", "--appendfsync", "always"],
        });
    let mut process = Process::start("Redis", &command, "KILL", directory.path(), "redis");
    let ours = eventually("Redis answers", SOON, async || {
        if process.ended().is_some() {
            return Ok(false);
        }
        let mut connection = connect(port).await.map_err(|error| error.to_string())?;
        let (_, files): (String, String) = cmd("CONFIG")
            .arg(&["GET", "dir"])
            .query_async(&mut connection)
            .await
            .map_err(|error| error.to_string())?;
        Ok(directory.path() == Path::new(&files))
    })
    .await;
    ours.then_some(process)
}
