//! The gateway beside its floor and its peers, in one run: `make bench`.
//!
//! Owns the arguments, the roles in which this program is also run as a process of its own, and the order of the stages. Does not own the
//! stages (`stages`), nor who is measured how. Invariant: what is printed at the end was measured in this run.
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
mod drain;
mod floor;
#[allow(
    dead_code,
    unused_imports,
    reason = "shared with the integration tests, which use more of it"
)]
#[path = "../../../tests/it/harness/mod.rs"]
mod harness;
mod l1;
mod load;
mod peers;
mod plain;
mod race;
mod report;
mod stages;
mod start;

use std::{env, error::Error, fs, path::PathBuf, thread};

use serde_json::json;
use tokio::time::Instant;

use crate::{report::Report, stages::Stages};

/// Whatever ends the run. Tasks hand it on.
pub type Failure = Box<dyn Error + Send + Sync>;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let runtime = || tokio::runtime::Runtime::new();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["floor", value_bytes] => floor::serve(value_bytes.parse()?),
        ["plain", redis, postgres] => runtime()?.block_on(plain::serve(redis, postgres)),
        [l1::MEMORY_ROLE] => {
            println!("{}", l1::overhead_bytes_here()?);
            Ok(())
        }
        stages => runtime()?.block_on(run(stages)),
    }
}

/// Runs the stages that are named, or all of them.
async fn run(named: &[&str]) -> Result<(), Failure> {
    let began = Instant::now();
    let quick = env::var_os("QUICK").is_some();
    let stages = Stages::new(quick);
    let mut report = Report::default();
    for (name, what) in Stages::ALL {
        if !named.is_empty() && !named.contains(&name) {
            continue;
        }
        eprintln!("== {name}: {what}");
        stages.run(name, &mut report).await?;
    }
    let about = json!({
        "quick": quick,
        "stages": named,
        "seconds": began.elapsed().as_secs(),
        "cores": thread::available_parallelism()?.get(),
        "processor": processor(),
    });
    println!("{}", report.write(&target(), &about)?);
    Ok(())
}

/// Where the results go: beside what was built.
fn target() -> PathBuf {
    let binary = env::current_exe().unwrap_or_default();
    binary
        .ancestors()
        .nth(2)
        .map_or_else(PathBuf::new, |target| target.join("bench"))
}

fn processor() -> Option<String> {
    let told = fs::read_to_string("/proc/cpuinfo").ok()?;
    let name = told.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(name.trim_start_matches([' ', '\t', ':']).to_owned())
}
