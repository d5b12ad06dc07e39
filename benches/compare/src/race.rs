//! Contestants in turn: each is measured once in every round, so that a noisy moment of the machine falls on all of them alike.
//!
//! Owns the turns, what a turn is, and the time of processor that a server took for it. Does not own what the figures mean (`report`). Invariant:
//! a turn begins only when what the turn before has left to do is done.

use std::{fs, net::SocketAddr, sync::Arc, time::Duration};

use crate::{
    Failure,
    calls::Calls,
    harness::Gateway,
    load::{self, Shape},
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
}

pub struct Driven<'a> {
    pub server: SocketAddr,
    /// Whose processor time counts, if it is told.
    pub pid: Option<u32>,
    pub calls: Arc<Calls>,
    pub shape: Shape,
    /// Keys in one call.
    pub keys: usize,
    /// Whose queue has to be empty before the next turn.
    pub gateway: Option<&'a Gateway>,
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
        match &self.what {
            What::Grpc(driven) => driven.turn(how_long).await,
        }
        .map_err(|error| format!("{}: {error}", self.name).into())
    }
}

impl Driven<'_> {
    async fn turn(&self, how_long: Duration) -> Result<Figure, Failure> {
        let before = self.pid.map(processor_us).transpose()?;
        let throughput = load::closed(self.server, &self.calls, self.shape, how_long).await?;
        let after = self.pid.map(processor_us).transpose()?;
        let keys = throughput.calls as f64 * self.keys as f64;
        if let Some(gateway) = self.gateway {
            gateway.drained().await;
        }
        Ok(Figure {
            per_second: throughput.per_second() * self.keys as f64,
            server_us: before.zip(after).map(|(before, after)| (after - before) / keys),
        })
    }
}

/// The processor time that a process has taken so far, of the user and of the kernel, in microseconds.
pub fn processor_us(pid: u32) -> Result<f64, Failure> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold spaces. Behind it the fields begin with the third.
    let (_, fields) = stat.rsplit_once(')').ok_or("no name in stat")?;
    let field = |number: usize| -> Result<f64, Failure> {
        let text = fields.split_whitespace().nth(number - 3).ok_or("a short stat")?;
        Ok(text.parse::<f64>()? * TICK_US)
    };
    Ok(field(14)? + field(15)?)
}

/// Measures every contestant in every round, `how_long` each; the first round warms up and is thrown away. The figures of each contestant, by
/// round. Every other round goes backwards.
pub async fn race(
    contestants: &[Contestant<'_>],
    rounds: usize,
    how_long: Duration,
) -> Result<Vec<Vec<Figure>>, Failure> {
    let mut figures = vec![Vec::new(); contestants.len()];
    for round in 0..=rounds {
        let mut order: Vec<usize> = (0..contestants.len()).collect();
        if round % 2 == 0 {
            order.reverse();
        }
        for index in order {
            let figure = contestants[index].turn(how_long).await?;
            println!(
                "  {} {:>10.0}/s {}",
                contestants[index].name,
                figure.per_second,
                figure.server_us.map_or_else(String::new, |us| format!("{us:.2} us"))
            );
            if round > 0 {
                figures[index].push(figure);
            }
        }
    }
    Ok(figures)
}
