//! The consistency test: clients on three replicas while networks, Redis, PostgreSQL and the gateways themselves break, and the history of
//! all that they saw judged.
//!
//! `SECONDS_TO_RUN` says for how long (180), `SEED` repeats the choices of an earlier run, `LANE` (`redis`, `others`, `victim`, `old`) breaks only
//! some of what can break. One line at the end says how it went; the exit
//! code is 1 when a promise was broken, and when too little happened for that to mean anything. What was broken is printed, and kept with
//! what surrounds it in a directory that is named.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub,
    missing_docs,
    reason = "a test binary: it may fail loudly, and nobody is outside to reach or read it"
)]

mod check;
#[allow(
    dead_code,
    unused_imports,
    reason = "shared with the integration tests, which use more of it"
)]
#[path = "../it/harness/mod.rs"]
mod harness;
mod history;
mod keys;
mod load;
mod orders;
mod plan;
mod report;
mod run;
mod stage;
mod store;

use std::{env, process::ExitCode, time::Duration};

use report::Report;

#[tokio::main]
async fn main() -> ExitCode {
    let seconds = number("SECONDS_TO_RUN").unwrap_or(180);
    let seed = number("SEED").unwrap_or_else(|| u64::from(rand::random::<u32>()));
    // At once: a run that panics has no last line.
    eprintln!("consistency: seed {seed}");
    let lane = env::var_os("LANE").map(|name| {
        let lane = name.to_str().and_then(plan::lane);
        lane.unwrap_or_else(|| panic!("LANE must be redis, others, victim or old"))
    });
    let ended = run::run(seed, Duration::from_secs(seconds), lane).await;
    let report = Report::of(&ended, seed);
    println!("{}", report.line());
    if report.is_good() {
        return ExitCode::SUCCESS;
    }
    eprintln!("{}", report.explain());
    ExitCode::FAILURE
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var_os(variable)?;
    let number = text.to_str().and_then(|text| text.parse().ok());
    Some(number.unwrap_or_else(|| panic!("{variable} must be a number")))
}
