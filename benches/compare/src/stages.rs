//! The stages of the benchmark: who takes part in each, and which rows come of it.
//!
//! Owns the contestants' settings and the bars. Does not own turns (`race`) or single measurements. Every stage starts its own servers and
//! ends them, so that each can be run alone, and none is held up by another's.

use std::{env, net::SocketAddr, process::Command, sync::Arc, time::Duration};

use tidegate::rpc::proto::WriteMode;
use tokio::time::sleep;

use crate::{
    Failure,
    calls::{self, Calls},
    drain::Drain,
    harness::{
        Gateway, SOON, Setup, eventually, postgres,
        process::{Directory, Process},
        redis,
    },
    l1,
    load::{self, Shape},
    peers::{
        etcd::{self, Etcd, Read},
        postgres::Pgbench,
        redis::{Ask, Redis, Rests, Shape as RedisShape},
    },
    race::{Contestant, Driven, Raced, What, race},
    report::{Bar, Report},
    start::start_to_serving,
};

const KEYS: usize = 100_000;
/// Of the large values: as much in all as a tenth of them would be.
const LARGE_KEYS: usize = 10_000;
const VALUE_BYTES: usize = 100;
const LARGE_BYTES: usize = 4096;
const BATCH: usize = 100;
const ZIPF_EXPONENT: f64 = 0.99;
const FEW: Shape = Shape {
    connections: 8,
    streams: 16,
};
const MANY: Shape = Shape {
    connections: 64,
    streams: 16,
};
const IDLE_CONNECTIONS: usize = 1_000;

/// Between two looks at how much is pending.
const LOOK: Duration = Duration::from_secs(1);

pub struct Stages {
    quick: bool,
}

impl Stages {
    pub const ALL: [(&str, &str); 8] = [
        ("reads", "Get from L1 and from Redis, BatchGet"),
        ("writes", "Put behind and through, BatchWrite"),
        ("backlog", "whether the drain keeps up"),
        ("latency", "p99 of Get at half of the peak"),
        ("drain", "the drain alone"),
        ("memory", "what L1 takes, and how often it hits"),
        ("scale", "millions of entries, a thousand connections"),
        ("start", "from exec to serving"),
    ];

    pub fn new(quick: bool) -> Stages {
        Stages { quick }
    }

    pub async fn run(&self, stage: &str, report: &mut Report) -> Result<(), Failure> {
        match stage {
            "reads" => self.reads(report).await,
            "writes" => self.writes(report).await,
            "backlog" => self.backlog(report).await,
            "latency" => self.latency(report).await,
            "drain" => self.drain(report).await,
            "memory" => self.memory(report),
            "scale" => self.scale(report).await,
            "start" => self.start(report).await,
            other => Err(format!("no such stage: {other}").into()),
        }
    }

    fn rounds(&self) -> usize {
        if self.quick { 1 } else { 5 }
    }

    fn turn(&self) -> Duration {
        Duration::from_millis(if self.quick { 700 } else { 1_500 })
    }

    async fn race(&self, contestants: &[Contestant<'_>], report: &mut Report) -> Result<Raced, Failure> {
        let raced = race(contestants, self.rounds(), self.turn()).await?;
        report.raced(&raced);
        Ok(raced)
    }

    async fn reads(&self, report: &mut Report) -> Result<(), Failure> {
        let small = calls::gets(KEYS, VALUE_BYTES)?;
        let large = calls::gets(LARGE_KEYS, LARGE_BYTES)?;
        let zipf = small.by_zipf(ZIPF_EXPONENT)?;
        let batches = calls::batch_gets(KEYS, BATCH, VALUE_BYTES)?;
        let (floor, large_floor) = (Role::floor(VALUE_BYTES).await?, Role::floor(LARGE_BYTES).await?);
        let servers = Servers::start().await;
        let gateway = servers.gateway("").await;
        let no_l1 = servers
            .gateway("[memory]\nbytes_max = 0\n[redis]\nprefix = \"alone:\"")
            .await;
        for one in [&gateway, &no_l1] {
            fill(one, KEYS, VALUE_BYTES).await?;
        }
        let large_gateway = servers.gateway("[redis]\nprefix = \"large:\"").await;
        fill(&large_gateway, LARGE_KEYS, LARGE_BYTES).await?;
        let plain = servers.plain().await?;
        load::each_once(plain.server, &calls::puts(KEYS, VALUE_BYTES, WriteMode::Through)?, FEW).await?;
        let mut etcd = Etcd::start().await?;
        load::each_once(etcd.server, &etcd::puts(KEYS, VALUE_BYTES)?, MANY).await?;
        // What it holds for its writers makes its reads slow for as long as it runs.
        etcd.start_again().await?;
        let ranges = etcd::ranges(KEYS, VALUE_BYTES, Read::Serializable)?;
        let redis = Redis::start(Rests::Memory, KEYS, VALUE_BYTES).await?;
        let raced = self
            .race(
                &[
                    floor.contestant("floor Get", &small, FEW),
                    reading("Get, L1", &gateway, &small, FEW, 1, "l1"),
                    reading("Get, L1, Zipf", &gateway, &zipf, FEW, 1, "l1"),
                    reading("Get, Redis", &no_l1, &small, FEW, 1, "l2"),
                    reading("BatchGet of 100, L1, keys", &gateway, &batches, FEW, BATCH, "l1"),
                    large_floor.contestant("floor Get, 4 KiB", &large, FEW),
                    reading("Get, L1, 4 KiB", &large_gateway, &large, FEW, 1, "l1"),
                    plain.contestant("plain service Get", &small, FEW),
                    driven("etcd Range, serializable", etcd.server, etcd.pid(), &ranges, FEW),
                    asking("redis-benchmark GET", &redis, Ask::Get, RedisShape::APART),
                    asking(
                        "redis-benchmark GET, 16 in a pipeline",
                        &redis,
                        Ask::Get,
                        RedisShape::TOGETHER,
                    ),
                    floor.contestant("floor Get, 64 connections", &small, MANY),
                    reading("Get, L1, 64 connections", &gateway, &small, MANY, 1, "l1"),
                    reading("Get, Redis, 64 connections", &no_l1, &small, MANY, 1, "l2"),
                ],
                report,
            )
            .await?;
        for (row, bar, of, to) in [
            ("Get, L1 hit, to the floor", Bar::AtLeast(0.85), "Get, L1", "floor Get"),
            (
                "the same by Zipf's law",
                Bar::AtLeast(0.85),
                "Get, L1, Zipf",
                "floor Get",
            ),
            (
                "the same with 4 KiB",
                Bar::AtLeast(0.85),
                "Get, L1, 4 KiB",
                "floor Get, 4 KiB",
            ),
            (
                "the same, 64 connections",
                Bar::AtLeast(0.85),
                "Get, L1, 64 connections",
                "floor Get, 64 connections",
            ),
            (
                "Get, L2 hit, to the floor",
                Bar::AtLeast(0.6),
                "Get, Redis",
                "floor Get",
            ),
            (
                "the same, 64 connections",
                Bar::AtLeast(0.6),
                "Get, Redis, 64 connections",
                "floor Get, 64 connections",
            ),
            (
                "Get, L2 hit, to the plain service",
                Bar::Open,
                "Get, Redis",
                "plain service Get",
            ),
            (
                "Get, L1 hit, to etcd Range",
                Bar::Open,
                "Get, L1",
                "etcd Range, serializable",
            ),
            (
                "BatchGet of 100 in keys, to Get",
                Bar::AtLeast(8.0),
                "BatchGet of 100, L1, keys",
                "Get, L1",
            ),
        ] {
            report.row(row, bar, raced.ratios(of, to)?);
        }
        self.cross_check(&floor, &gateway, report).await
    }

    /// One hot key, driven by h2load.
    async fn cross_check(&self, floor: &Role, gateway: &Gateway, report: &mut Report) -> Result<(), Failure> {
        let directory = Directory::new("h2load");
        let body = directory.path().join("get");
        std::fs::write(&body, calls::gets(1, VALUE_BYTES)?.body(0))?;
        let measure = async |server: SocketAddr| -> Result<f64, Failure> {
            let seconds = if self.quick { "2" } else { "4" };
            let output = tokio::process::Command::new("h2load")
                .arg(format!("http://{server}/tidegate.v1.Gateway/Get"))
                .arg("-d")
                .arg(&body)
                .args(["-H", "content-type: application/grpc", "-H", "te: trailers"])
                .args(["-c", "8", "-m", "16", "-t", "1", "-D", seconds])
                .output()
                .await?;
            let told = String::from_utf8_lossy(&output.stdout).into_owned();
            let rate = told
                .lines()
                .find(|line| line.starts_with("finished in"))
                .and_then(|line| line.split(", ").nth(1)?.split(' ').next()?.parse().ok());
            rate.ok_or_else(|| format!("h2load says no rate: {told}").into())
        };
        let mut ratios = Vec::new();
        for _ in 0..self.rounds().div_ceil(2) {
            let floor = measure(floor.server).await?;
            ratios.push(measure(gateway.address).await? / floor);
        }
        report.row("cross-check: one hot key by h2load, to the floor", Bar::Open, ratios);
        Ok(())
    }

    async fn writes(&self, report: &mut Report) -> Result<(), Failure> {
        let behind = calls::puts(KEYS, VALUE_BYTES, WriteMode::Behind)?;
        let large = calls::puts(LARGE_KEYS, LARGE_BYTES, WriteMode::Behind)?;
        let zipf = behind.by_zipf(ZIPF_EXPONENT)?;
        let through = calls::puts(KEYS, VALUE_BYTES, WriteMode::Through)?;
        let batches = calls::batch_writes(KEYS, BATCH, VALUE_BYTES, WriteMode::Behind)?;
        let etcd_puts = etcd::puts(KEYS, VALUE_BYTES)?;
        let floor = Role::floor(VALUE_BYTES).await?;
        let servers = Servers::start().await;
        let gateway = servers.gateway("").await;
        let embedded = Setup::new().start().await;
        for one in [&gateway, &embedded] {
            fill(one, KEYS, VALUE_BYTES).await?;
        }
        let plain = servers.plain().await?;
        let pgbench = Pgbench::prepare(&servers.postgres, KEYS, VALUE_BYTES).await?;
        let etcd = Etcd::start().await?;
        let (memory, disk) = (
            Redis::start(Rests::Memory, KEYS, VALUE_BYTES).await?,
            Redis::start(Rests::Disk, KEYS, VALUE_BYTES).await?,
        );
        let raced = self
            .race(
                &[
                    floor.contestant("floor Put", &behind, FEW),
                    writing("Put, behind", &gateway, &behind, FEW, 1),
                    writing("Put, behind, Zipf", &gateway, &zipf, FEW, 1),
                    writing("Put, behind, 4 KiB", &gateway, &large, FEW, 1),
                    writing("Put, behind, embedded", &embedded, &behind, FEW, 1),
                    writing("BatchWrite of 100, behind, keys", &gateway, &batches, FEW, BATCH),
                    writing("Put, through", &gateway, &through, FEW, 1),
                    plain.contestant("plain service Put", &through, FEW),
                    driven("etcd Put", etcd.server, etcd.pid(), &etcd_puts, FEW),
                    Contestant {
                        name: "pgbench upsert, 128 clients",
                        what: What::Pgbench(&pgbench, FEW.concurrency()),
                    },
                    floor.contestant("floor Put, 64 connections", &behind, MANY),
                    writing("Put, behind, 64 connections", &gateway, &behind, MANY, 1),
                    writing("Put, behind, embedded, 64 connections", &embedded, &behind, MANY, 1),
                    driven("etcd Put, 64 connections", etcd.server, etcd.pid(), &etcd_puts, MANY),
                    asking("redis-benchmark SET, no file", &memory, Ask::Set, RedisShape::APART),
                    asking(
                        "redis-benchmark SET, file always synced",
                        &disk,
                        Ask::Set,
                        RedisShape::APART,
                    ),
                ],
                report,
            )
            .await?;
        let many = "Put, behind, 64 connections";
        for (row, bar, of, to) in [
            (
                "Put, write-behind, to the floor",
                Bar::AtLeast(0.3),
                "Put, behind",
                "floor Put",
            ),
            (
                "the same, 64 connections",
                Bar::AtLeast(0.3),
                many,
                "floor Put, 64 connections",
            ),
            (
                "Put, write-behind, to etcd Put",
                Bar::AtLeast(1.0),
                "Put, behind",
                "etcd Put",
            ),
            (
                "the same, 64 connections",
                Bar::AtLeast(1.0),
                many,
                "etcd Put, 64 connections",
            ),
            (
                "Put, write-behind, to pgbench",
                Bar::AtLeast(3.0),
                "Put, behind",
                "pgbench upsert, 128 clients",
            ),
            (
                "the same, 64 connections",
                Bar::AtLeast(3.0),
                many,
                "pgbench upsert, 128 clients",
            ),
            (
                "Put, write-behind, by Zipf's law, to the floor",
                Bar::Open,
                "Put, behind, Zipf",
                "floor Put",
            ),
            (
                "Put, write-behind, 4 KiB, to 100 bytes",
                Bar::Open,
                "Put, behind, 4 KiB",
                "Put, behind",
            ),
            (
                "Put, write-behind, embedded, to the floor",
                Bar::AtLeast(0.35),
                "Put, behind, embedded",
                "floor Put",
            ),
            (
                "the same, 64 connections",
                Bar::AtLeast(0.35),
                "Put, behind, embedded, 64 connections",
                "floor Put, 64 connections",
            ),
            (
                "BatchWrite of 100 in keys, to Put",
                Bar::AtLeast(3.0),
                "BatchWrite of 100, behind, keys",
                "Put, behind",
            ),
            (
                "Put, write-through, to pgbench",
                Bar::AtLeast(2.0),
                "Put, through",
                "pgbench upsert, 128 clients",
            ),
            (
                "Put, write-through, to the plain service",
                Bar::AtLeast(4.0),
                "Put, through",
                "plain service Put",
            ),
        ] {
            report.row(row, bar, raced.ratios(of, to)?);
        }
        Ok(())
    }

    /// Writes behind for a minute as fast as it goes, and looks each second at what is pending.
    async fn backlog(&self, report: &mut Report) -> Result<(), Failure> {
        let looks = if self.quick { 16 } else { 60 };
        let servers = Servers::start().await;
        let gateway = servers.gateway("").await;
        fill(&gateway, KEYS, VALUE_BYTES).await?;
        let puts = calls::puts(KEYS, VALUE_BYTES, WriteMode::Behind)?;
        let server = gateway.address;
        let load = tokio::spawn(async move { load::closed(server, &puts, FEW, LOOK * looks).await });
        let mut pending = Vec::new();
        for _ in 0..looks {
            sleep(LOOK).await;
            pending.push(gateway.metric("tidegate_queue_pending_entries", &[]).await);
        }
        let throughput = load.await??;
        gateway.drained().await;
        eprintln!(
            "{:.0} puts/s; pending each second: {pending:?}",
            throughput.per_second()
        );
        let quarter = pending.len() / 4;
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        // From the middle of the second quarter to that of the last.
        let growth = mean(&pending[3 * quarter..]) - mean(&pending[quarter..2 * quarter]);
        let written = throughput.per_second() * (2 * quarter) as f64;
        report.row(
            "growth of the backlog over a minute of Put, write-behind, % of what was written",
            Bar::AtMost(0.5),
            vec![growth / written * 100.0],
        );
        report.row(
            "backlog at its largest, writes",
            Bar::Open,
            vec![pending.into_iter().fold(0.0, f64::max)],
        );
        Ok(())
    }

    async fn latency(&self, report: &mut Report) -> Result<(), Failure> {
        let gets = calls::gets(KEYS, VALUE_BYTES)?;
        let floor = Role::floor(VALUE_BYTES).await?;
        let servers = Servers::start().await;
        let gateway = servers.gateway("").await;
        fill(&gateway, KEYS, VALUE_BYTES).await?;
        // Of the slower one, so that it is half of the peak for it, and less for the floor.
        let peak = load::closed(gateway.address, &gets, FEW, self.turn())
            .await?
            .per_second();
        let p99 = async |server| -> Result<f64, Failure> {
            let latencies = load::open(server, &gets, FEW, peak / 2.0, self.turn() * 2).await?;
            Ok(latencies.value_at_quantile(0.99) as f64)
        };
        let (mut ratios, mut floors, mut gateways) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=self.rounds() {
            let (of_floor, of_gateway) = if round % 2 == 0 {
                let of_floor = p99(floor.server).await?;
                (of_floor, p99(gateway.address).await?)
            } else {
                let of_gateway = p99(gateway.address).await?;
                (p99(floor.server).await?, of_gateway)
            };
            if round > 0 {
                ratios.push(of_gateway / of_floor);
                floors.push(of_floor);
                gateways.push(of_gateway);
            }
        }
        report.row(
            "p99 of Get at half of peak load, to the floor's",
            Bar::AtMost(1.5),
            ratios,
        );
        report.row("the floor's, µs", Bar::Open, floors);
        report.row("the gateway's, µs", Bar::Open, gateways);
        Ok(())
    }

    async fn drain(&self, report: &mut Report) -> Result<(), Failure> {
        let drain = Drain::start().await?;
        let (mut new, mut updates) = (Vec::new(), Vec::new());
        for round in 0..=self.rounds().div_ceil(2) {
            let drained = drain.drain().await?;
            let ceiling = drain.ceiling().await?;
            eprintln!("{round} drained {drained:?}, ceiling {ceiling:?}");
            if round > 0 {
                new.push(drained.new / ceiling.new);
                updates.push(drained.updates / ceiling.updates);
            }
        }
        report.row("drain alone, new rows, to INSERT … SELECT", Bar::AtLeast(0.8), new);
        report.row("drain alone, updates, to INSERT … SELECT", Bar::AtLeast(0.8), updates);
        Ok(())
    }

    fn memory(&self, report: &mut Report) -> Result<(), Failure> {
        report.row(
            "L1 memory beyond key and value, bytes an entry",
            Bar::AtMost(120.0),
            vec![l1::overhead_bytes()?],
        );
        let keys = if self.quick { 100_000 } else { 1_000_000 };
        let mut behind = Vec::new();
        for seed in 0..2 {
            let rates = l1::hit_rates(keys, seed)?;
            eprintln!("{rates:?}");
            behind.push((rates.moka - rates.l1) * 100.0);
        }
        report.row("L1 hit rate behind moka's, points", Bar::AtMost(2.0), behind);
        Ok(())
    }

    async fn scale(&self, report: &mut Report) -> Result<(), Failure> {
        let (few, many) = (10_000, if self.quick { 500_000 } else { 5_000_000 });
        let (small, large) = (l1::gateway_with(few).await?, l1::gateway_with(many).await?);
        let (few, many) = (calls::gets(few, VALUE_BYTES)?, calls::gets(many, VALUE_BYTES)?);
        let contestants = [
            reading("Get, L1, of 10,000 entries", &small, &few, FEW, 1, "l1"),
            reading("Get, L1, of 5,000,000 entries", &large, &many, FEW, 1, "l1"),
        ];
        let raced = self.race(&contestants, report).await?;
        let ratios = raced.ratios(contestants[1].name, contestants[0].name)?;
        report.row(
            "throughput with 5 million entries, to 10 thousand",
            Bar::AtLeast(0.85),
            ratios,
        );
        drop(large);
        let busy = Shape {
            connections: 16,
            streams: 16,
        };
        let mut ratios = Vec::new();
        for _ in 0..=self.rounds() {
            let without = load::closed(small.address, &few, busy, self.turn()).await?;
            let idle = load::idle(small.address, IDLE_CONNECTIONS).await?;
            let with = load::closed(small.address, &few, busy, self.turn()).await?;
            drop(idle);
            ratios.push(with.per_second() / without.per_second());
        }
        report.row(
            "throughput with 1,000 idle connections, to none",
            Bar::AtLeast(0.95),
            ratios.split_off(1),
        );
        Ok(())
    }

    async fn start(&self, report: &mut Report) -> Result<(), Failure> {
        let mut millis = Vec::new();
        for _ in 0..=2 * self.rounds() {
            millis.push(start_to_serving().await?.as_secs_f64() * 1e3);
        }
        // The first brings the program into memory.
        report.row(
            "start to serving, embedded, empty, ms",
            Bar::AtMost(200.0),
            millis.split_off(1),
        );
        Ok(())
    }
}

/// What gateways with everything stand on: commits are on disk before they are answered, as in production.
struct Servers {
    postgres: postgres::Server,
    redis: redis::Server,
}

impl Servers {
    async fn start() -> Servers {
        Servers {
            postgres: postgres::Server::start_durable().await,
            redis: redis::start().await,
        }
    }

    async fn gateway(&self, config: &str) -> Gateway {
        let setup = Setup::new().store(&self.postgres.create_database().await);
        setup.redis(&self.redis.url()).config(config).start().await
    }

    async fn plain(&self) -> Result<Role, Failure> {
        let database = self.postgres.create_database().await;
        Role::start("plain", &[&self.redis.url(), &database]).await
    }
}

/// Writes every key, and waits until the store has them.
async fn fill(gateway: &Gateway, keys: usize, value_bytes: usize) -> Result<(), Failure> {
    let puts = calls::puts(keys, value_bytes, WriteMode::Behind)?;
    load::each_once(gateway.address, &puts, FEW).await?;
    gateway.drained().await;
    Ok(())
}

fn driven<'a>(name: &'static str, server: SocketAddr, pid: u32, calls: &Arc<Calls>, shape: Shape) -> Contestant<'a> {
    Contestant {
        name,
        what: What::Grpc(Driven {
            server,
            pid,
            calls: Arc::clone(calls),
            shape,
            keys: 1,
            gateway: None,
            source: None,
        }),
    }
}

fn asking<'a>(name: &'static str, redis: &'a Redis, ask: Ask, shape: RedisShape) -> Contestant<'a> {
    Contestant {
        name,
        what: What::Redis(redis, ask, shape),
    }
}

fn writing<'a>(
    name: &'static str,
    gateway: &'a Gateway,
    calls: &Arc<Calls>,
    shape: Shape,
    keys: usize,
) -> Contestant<'a> {
    Contestant {
        name,
        what: What::Grpc(Driven {
            server: gateway.address,
            pid: gateway.pid(),
            calls: Arc::clone(calls),
            shape,
            keys,
            gateway: Some(gateway),
            source: None,
        }),
    }
}

fn reading<'a>(
    name: &'static str,
    gateway: &'a Gateway,
    calls: &Arc<Calls>,
    shape: Shape,
    keys: usize,
    source: &'static str,
) -> Contestant<'a> {
    Contestant {
        name,
        what: What::Grpc(Driven {
            server: gateway.address,
            pid: gateway.pid(),
            calls: Arc::clone(calls),
            shape,
            keys,
            gateway: Some(gateway),
            source: Some(source),
        }),
    }
}

/// This program in another role, as a process of its own.
struct Role {
    process: Process,
    server: SocketAddr,
    _directory: Directory,
}

impl Role {
    async fn floor(value_bytes: usize) -> Result<Role, Failure> {
        Role::start("floor", &[&value_bytes.to_string()]).await
    }

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

    fn contestant<'a>(&self, name: &'static str, calls: &Arc<Calls>, shape: Shape) -> Contestant<'a> {
        driven(name, self.server, self.process.pid(), calls, shape)
    }
}
