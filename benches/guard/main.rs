//! How many instructions a call costs the gateway, against the committed figures: `make bench-guard`.
//!
//! Owns the calls that are counted, how often, and what is printed. Does not own the counting (`callgrind`), the calls' way to the gateway
//! (`caller`) nor the committed figures (`figures`). The gateway is the binary that ships, embedded, with one serving thread; calls come one at
//! a time over one connection, so that each meets the gateway in the same state. Invariant: only the threads that a caller waits
//! for are counted, and nothing drains meanwhile: what runs on timers, and batches whose size depends on how long something took,
//! would count differently each time.
//!
//! `--write` commits what is counted now. `CARGO_PROFILE_RELEASE_DEBUG=line-tables-only` gives the dumps their lines.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub,
    missing_docs,
    reason = "a benchmark: it may fail loudly, and nobody is outside to reach or read it"
)]

#[allow(
    dead_code,
    unused_imports,
    reason = "shared with the integration tests, which use more of it"
)]
#[path = "../../tests/it/harness/mod.rs"]
mod harness;

mod caller;
mod callgrind;
mod figures;

use std::{env, error::Error, ops::Range, path::PathBuf, process::ExitCode};

use bytes::Bytes;
use caller::Caller;
use callgrind::Counted;
use figures::{Figures, Verdict};
use harness::wire::message;
use prost::Message;
use tidegate::rpc::proto::{
    BatchWriteRequest, BatchWriteResponse, Durability, GetRequest, GetResponse, PutRequest, PutResponse, Source,
    WriteItem, WriteMode, WriteResult, write_item, write_result,
};

const NAMESPACE: &str = "guard";
const VALUE_BYTES: usize = 100;
/// Of a round, each with a key of its own.
const CALLS: usize = 1_000;
/// Those before, which are not counted: the first on a connection cost more.
const WARMING: usize = 100;
/// The median counts.
const ROUNDS: usize = 5;
const BATCH_KEYS: usize = 100;

/// Whatever ends the run.
type Failure = Box<dyn Error + Send + Sync>;

/// A call that is counted.
struct Counting {
    /// As the committed figures name it.
    name: &'static str,
    path: &'static str,
    body: fn(usize) -> Bytes,
    /// Whether an answer is what this call is about.
    fits: fn(&[u8]) -> bool,
    /// The threads that the caller waits for.
    threads: &'static [&'static str],
}

const COUNTED: [Counting; 2] = [
    Counting {
        name: "get_l1_hit",
        path: "/tidegate.v1.Gateway/Get",
        body: get,
        fits: |answer| GetResponse::decode(answer).is_ok_and(|answer| answer.source() == Source::L1),
        threads: &["serve-0"],
    },
    Counting {
        name: "put_journal",
        path: "/tidegate.v1.Gateway/Put",
        body: |number| message(&put(number, WriteMode::Behind)),
        fits: |answer| PutResponse::decode(answer).is_ok_and(|answer| answer.durability() == Durability::Journal),
        threads: &["serve-0", "journal"],
    },
];

fn key(number: usize) -> String {
    format!("key:{number:08}")
}

fn get(number: usize) -> Bytes {
    message(&GetRequest {
        namespace: NAMESPACE.to_owned(),
        key: key(number),
        ..GetRequest::default()
    })
}

fn put(number: usize, mode: WriteMode) -> PutRequest {
    PutRequest {
        namespace: NAMESPACE.to_owned(),
        key: key(number),
        value: vec![b'x'; VALUE_BYTES].into(),
        write_mode: mode.into(),
        ..PutRequest::default()
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Failure> {
    let gateway = env::var_os("GATEWAY").map(PathBuf::from);
    let gateway = gateway.ok_or("GATEWAY names no binary to count: run ci/bench-guard")?;
    let mut counted = Counted::start(&gateway, NAMESPACE).await?;
    let mut measured = Figures::none()?;
    for call in &COUNTED {
        let figure = count(call, &mut counted).await?;
        measured.instructions.insert(call.name.to_owned(), figure);
    }
    if env::args().any(|argument| argument == "--write") {
        measured.commit()?;
        println!("committed: {}", Figures::path().display());
        return Ok(ExitCode::SUCCESS);
    }
    judge(&measured, &Figures::committed()?, &counted)
}

/// Instructions of one call: the median of the rounds.
async fn count(call: &Counting, counted: &mut Counted) -> Result<u64, Failure> {
    let mut rounds = Vec::new();
    // To the end: that of a connection is not to be counted with the calls on the next.
    let mut callers = Vec::new();
    for _ in 0..ROUNDS {
        // A new one each time: what both ends remember of earlier headers grows with time.
        let caller = Caller::connect(counted.address()).await?;
        fill(&caller).await?;
        make(call, &caller, 0..WARMING).await?;
        counted.forget().await?;
        make(call, &caller, WARMING..WARMING + CALLS).await?;
        rounds.push(counted.instructions(call.threads).await? / CALLS as u64);
        callers.push(caller);
    }
    println!("{}: rounds {rounds:?}", call.name);
    rounds.sort_unstable();
    Ok(rounds[rounds.len() / 2])
}

/// Brings every key to the store and into L1, and takes it from the queue.
async fn fill(caller: &Caller) -> Result<(), Failure> {
    let numbers: Vec<usize> = (0..WARMING + CALLS).collect();
    for some in numbers.chunks(BATCH_KEYS) {
        let items = some.iter().map(|&number| WriteItem {
            operation: Some(write_item::Operation::Put(put(number, WriteMode::Through))),
        });
        let request = BatchWriteRequest { items: items.collect() };
        let answer = caller
            .call("/tidegate.v1.Gateway/BatchWrite", message(&request))
            .await?;
        let answer = BatchWriteResponse::decode(answer)?;
        let written = |result: &WriteResult| matches!(result.outcome, Some(write_result::Outcome::Written(_)));
        if let Some(result) = answer.results.iter().find(|result| !written(result)) {
            return Err(format!("not all were written: {result:?}").into());
        }
    }
    Ok(())
}

/// Makes the calls, one after the other.
async fn make(call: &Counting, caller: &Caller, numbers: Range<usize>) -> Result<(), Failure> {
    for number in numbers {
        let answer = caller.call(call.path, (call.body)(number)).await?;
        if !(call.fits)(&answer) {
            return Err(format!("{}: the answer is of another kind: {answer:?}", call.name).into());
        }
    }
    Ok(())
}

fn judge(measured: &Figures, committed: &Figures, counted: &Counted) -> Result<ExitCode, Failure> {
    println!("{:<12} {:>10} {:>10} {:>7}", "call", "committed", "measured", "");
    let mut code = ExitCode::SUCCESS;
    for (name, &now) in &measured.instructions {
        let Some(&was) = committed.instructions.get(name) else {
            return Err(format!("no figure of {name} is committed: run ci/bench-guard --write").into());
        };
        let verdict = Verdict::of(was, now);
        println!("{name:<12} {was:>10} {now:>10} {:>+6.1}% {verdict}", verdict.percent);
        if !verdict.stands() {
            code = ExitCode::FAILURE;
        }
    }
    if let Some(difference) = measured.made_otherwise(committed) {
        println!("the committed figures were made with {difference}");
    }
    if code != ExitCode::SUCCESS {
        println!(
            "see where they go: callgrind_annotate on the dumps in {}\nif it is worth it, commit what is counted now: ci/bench-guard --write",
            counted.dumps().display()
        );
    }
    Ok(code)
}
