//! Contestants in turn: each is measured once in every round, so that a noisy moment of the machine falls on all of them alike.
//!
//! Owns the turns, what a turn is, and the time of processor that a server took for it. Does not own what the figures mean (`report`).
//! Invariants: a turn begins only when what the turn before has left to do is done; a gateway's turn counts only where the gateway itself has
//! counted as many calls as OK.

use std::{fs, net::SocketAddr, sync::Arc, time::Duration};

use crate::{
    Failure,
    calls::Calls,
    harness::Gateway,
    load::{self, Shape},
    peers::{
        postgres::Pgbench,
        redis::{self, Ask, Redis},
    },
};

/// The kernel's unit of processor time, in microseconds: USER_HZ is 100 on Linux.
const TICK_US: f64 = 10_000.0;

/// One who is measured.
pub struct Contestant<'a> {
    pub name: &'static str,
    pub what: What<'a>,
}

pub enum What<'a> {
    /// A gRPC server under the common load.
    Grpc(Driven<'a>),
    /// With so many clients.
    Pgbench(&'a Pgbench, usize),
    Redis(&'a Redis, Ask, redis::Shape),
}

pub struct Driven<'a> {
    pub server: SocketAddr,
    /// Whose processor time counts.
    pub pid: u32,
    pub calls: Arc<Calls>,
    pub shape: Shape,
    /// Keys in one call.
    pub keys: usize,
    /// Which gateway it is, if it is one: its counters are compared, and its queue has to be empty before the next turn.
    pub gateway: Option<&'a Gateway>,
    /// The tier that has to answer all reads.
    pub source: Option<&'static str>,
}

/// What one turn measured.
#[derive(Debug, Clone, Copy)]
pub struct Figure {
    /// Calls, or keys of batches.
    pub per_second: f64,
    /// Processor time of the server for each of those, where it is one process of ours.
    pub server_us: Option<f64>,
}

impl Contestant<'_> {
    async fn turn(&self, how_long: Duration) -> Result<Figure, Failure> {
        let figure = match &self.what {
            What::Grpc(driven) => driven.turn(how_long).await,
            What::Pgbench(pgbench, clients) => pgbench.measure(*clients, how_long).await.map(alone),
            What::Redis(redis, ask, shape) => redis.measure(*ask, *shape, how_long).await.map(alone),
        };
        figure.map_err(|error| format!("{}: {error}", self.name).into())
    }
}

fn alone(per_second: f64) -> Figure {
    Figure {
        per_second,
        server_us: None,
    }
}

impl Driven<'_> {
    async fn turn(&self, how_long: Duration) -> Result<Figure, Failure> {
        let counted_before = self.counted().await;
        let before = processor_us(self.pid)?;
        let throughput = load::closed(self.server, &self.calls, self.shape, how_long).await?;
        let took_us = processor_us(self.pid)? - before;
        let keys = throughput.calls as f64 * self.keys as f64;
        let counted = self.counted().await;
        if let Some(((calls, reads), (calls_before, reads_before))) = counted.zip(counted_before) {
            let (calls, reads) = (calls - calls_before, reads - reads_before);
            if calls != throughput.calls as f64 {
                return Err(format!("{calls} calls were OK, and {} answers came", throughput.calls).into());
            }
            if self.source.is_some() && reads != keys {
                return Err(format!("{reads} of {keys} reads were answered by {:?}", self.source).into());
            }
        }
        if let Some(gateway) = self.gateway {
            gateway.drained().await;
        }
        Ok(Figure {
            per_second: throughput.per_second() * self.keys as f64,
            server_us: Some(took_us / keys),
        })
    }

    /// How many calls of the method the gateway has answered with OK, and how many reads from the tier.
    async fn counted(&self) -> Option<(f64, f64)> {
        let gateway = self.gateway?;
        let method = self.calls.uri.path().rsplit('/').next().unwrap_or_default();
        let calls = gateway
            .metric(
                "tidegate_calls_total",
                &[&format!("method=\"{method}\""), "code=\"OK\""],
            )
            .await;
        let source = format!("source=\"{}\"", self.source.unwrap_or_default());
        Some((calls, gateway.metric("tidegate_reads_total", &[&source]).await))
    }
}

/// The processor time that a process has taken so far, of the user and of the kernel, in microseconds.
fn processor_us(pid: u32) -> Result<f64, Failure> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold spaces. Behind it the fields begin with the third.
    let (_, fields) = stat.rsplit_once(')').ok_or("no name in stat")?;
    let field = |number: usize| -> Result<f64, Failure> {
        let text = fields.split_whitespace().nth(number - 3).ok_or("a short stat")?;
        Ok(text.parse::<f64>()? * TICK_US)
    };
    Ok(field(14)? + field(15)?)
}

/// What a race has measured: of each contestant, in their order, the figure of each round.
pub struct Raced {
    pub names: Vec<&'static str>,
    pub figures: Vec<Vec<Figure>>,
}

impl Raced {
    /// How many times as fast one was as another, round by round.
    pub fn ratios(&self, of: &str, to: &str) -> Result<Vec<f64>, Failure> {
        let (of, to) = (self.of(of)?, self.of(to)?);
        Ok(of
            .iter()
            .zip(to)
            .map(|(of, to)| of.per_second / to.per_second)
            .collect())
    }

    fn of(&self, name: &str) -> Result<&[Figure], Failure> {
        let place = self.names.iter().position(|known| *known == name);
        Ok(&self.figures[place.ok_or_else(|| format!("nobody is called {name}"))?])
    }
}

/// Measures every contestant in every round, `how_long` each; one round before warms up and is thrown away. Every other round goes backwards.
pub async fn race(contestants: &[Contestant<'_>], rounds: usize, how_long: Duration) -> Result<Raced, Failure> {
    let mut figures = vec![Vec::new(); contestants.len()];
    for round in 0..=rounds {
        let mut order: Vec<usize> = (0..contestants.len()).collect();
        if round % 2 == 0 {
            order.reverse();
        }
        for index in order {
            let Contestant { name, .. } = contestants[index];
            let figure = contestants[index].turn(how_long).await?;
            let us = figure.server_us.map_or_else(String::new, |us| format!("{us:.1} us"));
            eprintln!("{round} {name:<40} {:>9.0}/s {us:>9}", figure.per_second);
            if round > 0 {
                figures[index].push(figure);
            }
        }
    }
    Ok(Raced {
        names: contestants.iter().map(|contestant| contestant.name).collect(),
        figures,
    })
}
