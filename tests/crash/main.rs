//! The crash test: the real binary under load, killed for real, started again on what it left, and judged.
//!
//! `KILLS` says how many kills must count (100), `SEED` repeats the choices of an earlier run. One line at the end says how it went; the exit
//! code is 1 when an acknowledged write was lost or a rule was broken, and when so many kills left a kill point out. A kill leaves the page
//! cache whole: what a loss of power does to the journal is proved by its own tests, on a simulated disk.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub,
    missing_docs,
    reason = "a test binary: it may fail loudly, and nobody is outside to reach or read it"
)]

#[allow(
    dead_code,
    unused_imports,
    reason = "shared with the integration tests, which use more of it"
)]
#[path = "../it/harness/mod.rs"]
mod harness;

mod counters;
mod ledger;
mod load;
mod plan;
mod rounds;
mod store;

use std::{env, process::ExitCode};

use plan::KILL_POINTS;
use rounds::Run;

#[tokio::main]
async fn main() -> ExitCode {
    let kills = number("KILLS").unwrap_or(100) as u32;
    let seed = number("SEED").unwrap_or_else(|| u64::from(rand::random::<u32>()));
    // At once: a run that panics has no last line.
    eprintln!("crash: seed={seed}");
    let mut run = Run::start(rand::random()).await;
    let ended = run.kill(kills, seed).await;
    if let Err(broken) = ended {
        eprintln!("crash: {}", broken.0);
        run.ledger.lock().violations += 1;
    }
    let explained = run.explain().await;
    if !explained.is_empty() {
        eprintln!("crash: {explained}");
    }
    let ledger = run.ledger.lock();
    let counters = run.counters.lock();
    let tally = &run.tally;
    println!(
        "crash: kills={} acknowledged={} lost={} violations={} seed={seed} counted={} of_them_doubted={} and_found={} sent_again={} repeated={} rounds={} with_postgres_stopped={} at_kill_points={} of_them={}/{} stops={} checks={}",
        tally.kills,
        ledger.acknowledged,
        ledger.lost,
        ledger.violations,
        counters.counted,
        counters.doubted,
        counters.found,
        ledger.sent_again,
        ledger.repeated,
        tally.rounds,
        tally.outages,
        tally.at_kill_points,
        tally.reached.len(),
        KILL_POINTS.len(),
        tally.stops,
        tally.checks,
    );
    let missed = run.missed();
    if !missed.is_empty() {
        eprintln!(
            "crash: so many kills, and none at {}: nothing is broken, and that much is not proved",
            missed.join(", ")
        );
    }
    if ledger.lost + ledger.violations > 0 || !missed.is_empty() {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var_os(variable)?;
    let number = text.to_str().and_then(|text| text.parse().ok());
    Some(number.unwrap_or_else(|| panic!("{variable} must be a number")))
}
