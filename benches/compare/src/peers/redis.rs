//! Redis itself, measured by `redis-benchmark`: no gRPC, and no store behind it.
//!
//! Owns the server, its records, and what the program says. Invariants: every GET finds its key, and nothing is answered with an error, by the
//! server's own counters.

use std::time::Duration;

use ::redis::{aio::MultiplexedConnection, cmd, pipe};
use tokio::process::Command;

use super::output;
use crate::{Failure, calls, harness::redis};

/// How many requests find out how many make up a turn: the program takes a number, no duration.
const TRIAL_REQUESTS: u64 = 10_000;

/// Records that are written with one round trip.
const FILL_RECORDS: usize = 1_000;

/// What a SET rests on when it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rests {
    /// On the memory of the server: no append-only file.
    Memory,
    /// On the disk: an append-only file, synced before each answer (`appendfsync always`).
    Disk,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Get,
    Set,
}

/// How the program asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub connections: usize,
    /// Requests that are sent together on a connection, and waited for together.
    pub pipeline: usize,
}

impl Shape {
    /// As many requests under way as 8 connections with 16 streams have, one on each connection.
    pub const APART: Shape = Shape {
        connections: 128,
        pipeline: 1,
    };
    /// As many, on 8 connections.
    pub const TOGETHER: Shape = Shape {
        connections: 8,
        pipeline: 16,
    };
}

/// A server that holds records. Dropping it stops it.
pub struct Redis {
    server: redis::Server,
    keys: usize,
    value_bytes: usize,
}

impl Redis {
    /// Starts a server and fills it with so many records.
    pub async fn start(rests: Rests, keys: usize, value_bytes: usize) -> Result<Redis, Failure> {
        let server = match rests {
            Rests::Memory => redis::start().await,
            Rests::Disk => redis::start_durable().await,
        };
        let redis = Redis {
            server,
            keys,
            value_bytes,
        };
        redis.fill().await?;
        Ok(redis)
    }

    /// Writes the records under the names that the program gives them.
    async fn fill(&self) -> Result<(), Failure> {
        let mut connection = self.server.connect().await;
        let value = calls::value(self.value_bytes);
        for first in (0..self.keys).step_by(FILL_RECORDS) {
            let mut records = pipe();
            for index in first..self.keys.min(first + FILL_RECORDS) {
                records.set(format!("key:{index:012}"), value.as_ref()).ignore();
            }
            let () = records.query_async(&mut connection).await?;
        }
        Ok(())
    }

    /// Requests per second, over about so long.
    pub async fn measure(&self, ask: Ask, shape: Shape, how_long: Duration) -> Result<f64, Failure> {
        // One connection for both looks: what it says of itself as it opens is refused by a Redis that is older than 7.2.
        let mut connection = self.server.connect().await;
        let before = Counters::read(&mut connection).await?;
        let trial = self.run(ask, shape, TRIAL_REQUESTS, how_long).await?;
        let requests = (trial * how_long.as_secs_f64()) as u64;
        let per_second = self.run(ask, shape, requests.max(1), how_long).await?;
        let after = Counters::read(&mut connection).await?;
        let [errors, misses, processed] = [
            after.errors - before.errors,
            after.misses - before.misses,
            after.processed - before.processed,
        ];
        if errors > 0 || misses > 0 || processed < TRIAL_REQUESTS + requests {
            let told = format!("{errors} errors, {misses} keys not found, {processed} commands");
            return Err(format!("{requests} requests of redis-benchmark: the server counted {told}").into());
        }
        Ok(per_second)
    }

    async fn run(&self, ask: Ask, shape: Shape, requests: u64, how_long: Duration) -> Result<f64, Failure> {
        let (name, test) = match ask {
            Ask::Get => ("GET", "get"),
            Ask::Set => ("SET", "set"),
        };
        let url = self.server.url();
        let (_, port) = url.rsplit_once(':').ok_or("a URL without a port")?;
        let mut command = Command::new("redis-benchmark");
        command
            .args(["-h", "127.0.0.1", "-p", port, "-t", test, "--csv"])
            .args(["-d", &self.value_bytes.to_string(), "-r", &self.keys.to_string()])
            .args(["-c", &shape.connections.to_string(), "-P", &shape.pipeline.to_string()])
            .args(["-n", &requests.to_string()]);
        let said = output(&mut command, how_long).await?;
        rate(&said, name).ok_or_else(|| format!("redis-benchmark does not tell the rate of {name}: {said}").into())
    }
}

/// What a server has counted since it was started.
struct Counters {
    errors: u64,
    misses: u64,
    processed: u64,
}

impl Counters {
    async fn read(connection: &mut MultiplexedConnection) -> Result<Counters, Failure> {
        let info: String = cmd("INFO").arg("stats").query_async(connection).await?;
        let counter = |name: &str| -> Result<u64, Failure> {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            Ok(line.ok_or_else(|| format!("Redis counts no {name}"))?.trim().parse()?)
        };
        Ok(Counters {
            errors: counter("total_error_replies")?,
            misses: counter("keyspace_misses")?,
            processed: counter("total_commands_processed")?,
        })
    }
}

/// The rate of a test in what the program says: a line of `"NAME","RATE",...`.
fn rate(said: &str, name: &str) -> Option<f64> {
    let fields = said
        .lines()
        .map(|line| line.split(',').map(|field| field.trim_matches('"')));
    let mut found = fields
        .into_iter()
        .find_map(|mut fields| (fields.next()? == name).then_some(fields))?;
    found.next()?.parse().ok()
}
