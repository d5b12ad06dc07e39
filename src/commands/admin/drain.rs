//! `tidegate admin queue`, `flush`, `pause` and `resume`: what is pending, and when it leaves.
//!
//! Owns what these print. A key is printed, a value never.

use clap::Args;
use serde_json::{Value, json};

use super::{
    Console, Ended, namespace,
    table::{Table, bytes, moment, plain, seconds, time, yes},
};
use crate::{
    commands::exit::Exit,
    rpc::proto::{
        DrainState, DrainWorker, FlushRequest, JournalState, PauseRequest, PendingKey, PendingStats, QueueRequest,
        QueueResponse, ResumeRequest,
    },
};

/// How many of the oldest keys are shown when that is not said.
const OLDEST_DEFAULT: &str = "10";

/// The arguments of `queue`.
#[derive(Debug, Clone, Args)]
pub(super) struct Queue {
    /// Only this namespace [default: all]
    #[arg(value_parser = namespace)]
    namespace: Option<String>,
    /// How many of the keys that are pending longest are shown: up to 100
    #[arg(long, value_name = "KEYS", default_value = OLDEST_DEFAULT, value_parser = clap::value_parser!(u32).range(..=100))]
    oldest: u32,
}

/// The arguments of `flush`.
#[derive(Debug, Clone, Args)]
pub(super) struct Flush {
    /// Only this namespace [default: all]
    #[arg(value_parser = namespace)]
    namespace: Option<String>,
}

/// The arguments of `pause`.
#[derive(Debug, Clone, Args)]
pub(super) struct Pause {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    /// Even if the gateway does not know it yet
    #[arg(long)]
    unused: bool,
}

/// The arguments of `resume`.
#[derive(Debug, Clone, Args)]
pub(super) struct Resume {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
}

pub(super) async fn queue(console: &mut Console, options: &Queue) -> Result<Exit, Ended> {
    let request = QueueRequest {
        namespace: options.namespace.clone().unwrap_or_default(),
        oldest: options.oldest,
    };
    let answer = console.client.queue(request).await?;
    console.show(|| queue_to_json(&answer), || queue_to_text(&answer))?;
    Ok(Exit::Done)
}

pub(super) async fn flush(console: &mut Console, options: &Flush) -> Result<Exit, Ended> {
    let request = FlushRequest {
        namespace: options.namespace.clone().unwrap_or_default(),
    };
    let answer = console.client.flush(request).await?;
    console.show(
        || json!({"waited_for": answer.waited_for, "dead_lettered": answer.dead_lettered}),
        || {
            let waited_for = answer.waited_for;
            let mut text = format!("the store has what was pending: {waited_for} writes\n");
            if answer.dead_lettered > 0 {
                text.push_str(&format!(
                    "but {} went to the dead letters: see tidegate admin dead-letters list\n",
                    answer.dead_lettered
                ));
            }
            text
        },
    )?;
    Ok(if answer.dead_lettered > 0 {
        Exit::Partly
    } else {
        Exit::Done
    })
}

pub(super) async fn pause(console: &mut Console, options: &Pause) -> Result<Exit, Ended> {
    let Pause { namespace, unused } = options.clone();
    let answer = console.client.pause(PauseRequest { namespace, unused }).await?;
    let before = if answer.was_paused { "already " } else { "" };
    let did = format!("{before}paused");
    show_steered(console, &options.namespace, &did, answer.was_paused, answer.pending)
}

pub(super) async fn resume(console: &mut Console, options: &Resume) -> Result<Exit, Ended> {
    let Resume { namespace } = options.clone();
    let answer = console.client.resume(ResumeRequest { namespace }).await?;
    let did = if answer.was_paused { "resumed" } else { "was not paused" };
    show_steered(console, &options.namespace, did, answer.was_paused, answer.pending)
}

fn show_steered(
    console: &Console,
    namespace: &str,
    did: &str,
    was_paused: bool,
    pending: Option<PendingStats>,
) -> Result<Exit, Ended> {
    let pending = pending.unwrap_or_default();
    console.show(
        || json!({"namespace": namespace, "was_paused": was_paused, "pending": pending_to_json(&pending)}),
        || {
            let (entries, size) = (pending.entries, bytes(pending.bytes));
            format!("{namespace}: {did}; {entries} writes pending, {size}\n")
        },
    )?;
    Ok(Exit::Done)
}

fn queue_to_text(queue: &QueueResponse) -> String {
    let pending = queue.pending.unwrap_or_default();
    let mut text = format!(
        "pending: {} of {} writes, {} of {}, the oldest for {}\njournal: {}\ndead letters since the start: {}\n",
        pending.entries,
        queue.entries_max,
        bytes(pending.bytes),
        bytes(queue.bytes_max),
        time(pending.oldest_age),
        journal(queue),
        queue.dead_lettered,
    );
    for table in [namespaces(queue), workers(queue), oldest(queue)] {
        if !table.is_empty() {
            text.push('\n');
            text.push_str(&table.render());
        }
    }
    text
}

fn namespaces(queue: &QueueResponse) -> Table {
    let mut table = Table::new(2, &["namespace", "drain", "writes", "bytes", "oldest"]);
    for namespace in &queue.namespaces {
        let pending = namespace.pending.unwrap_or_default();
        let drain = match &pending.paused_since {
            Some(since) => format!("paused since {since}"),
            None => "running".to_owned(),
        };
        table.row(vec![
            namespace.namespace.clone(),
            drain,
            pending.entries.to_string(),
            bytes(pending.bytes),
            time(pending.oldest_age),
        ]);
    }
    table
}

fn workers(queue: &QueueResponse) -> Table {
    let head = [
        "worker",
        "state",
        "since",
        "last failure",
        "failures",
        "writes",
        "bytes",
    ];
    let mut table = Table::new(4, &head);
    for worker in &queue.workers {
        let failure = worker.last_failure.as_ref().map(|failure| {
            let code = if failure.code.is_empty() { "" } else { " " };
            let message = plain(&failure.message);
            format!("{}{code}{}: {message}", moment(failure.time.as_ref()), failure.code)
        });
        table.row(vec![
            worker.number.to_string(),
            state(worker).replace('_', " "),
            moment(worker.since.as_ref()),
            failure.unwrap_or_else(|| "-".to_owned()),
            worker.failures.to_string(),
            worker.entries.to_string(),
            bytes(worker.bytes),
        ]);
    }
    table
}

fn oldest(queue: &QueueResponse) -> Table {
    let mut table = Table::new(
        4,
        &["oldest", "key", "kind", "with a worker", "age", "bytes", "version"],
    );
    for pending in &queue.oldest {
        table.row(vec![
            pending.namespace.clone(),
            plain(&pending.key),
            kind(pending).to_owned(),
            yes(pending.in_flight),
            time(pending.age),
            bytes(pending.bytes),
            pending.version.to_string(),
        ]);
    }
    table
}

fn kind(pending: &PendingKey) -> &'static str {
    if pending.deletes { "delete" } else { "put" }
}

fn state(worker: &DrainWorker) -> &'static str {
    match worker.state() {
        DrainState::Unspecified => "unknown",
        DrainState::Idle => "idle",
        DrainState::Gathering => "gathering",
        DrainState::Writing => "writing",
        DrainState::BackingOff => "backing_off",
    }
}

fn journal(queue: &QueueResponse) -> &'static str {
    match queue.journal() {
        JournalState::Unspecified => "unknown",
        JournalState::Up => "up",
        JournalState::Full => "full",
        JournalState::DiskFull => "disk full",
        JournalState::Failed => "failed",
    }
}

fn queue_to_json(queue: &QueueResponse) -> Value {
    let namespaces = queue.namespaces.iter().map(|namespace| {
        let pending = namespace.pending.unwrap_or_default();
        json!({"namespace": namespace.namespace, "pending": pending_to_json(&pending)})
    });
    let workers = queue.workers.iter().map(|worker| {
        let failure = worker.last_failure.as_ref().map(|failure| {
            json!({
                "time": failure.time.as_ref().map(ToString::to_string),
                "code": failure.code,
                "message": failure.message,
            })
        });
        json!({
            "number": worker.number,
            "state": state(worker),
            "since": worker.since.as_ref().map(ToString::to_string),
            "entries": worker.entries,
            "bytes": worker.bytes,
            "failures": worker.failures,
            "last_failure": failure,
        })
    });
    let oldest = queue.oldest.iter().map(|pending| {
        json!({
            "namespace": pending.namespace,
            "key": pending.key,
            "version": pending.version,
            "age_seconds": pending.age.map(seconds),
            "bytes": pending.bytes,
            "deletes": pending.deletes,
            "in_flight": pending.in_flight,
        })
    });
    json!({
        "pending": pending_to_json(&queue.pending.unwrap_or_default()),
        "entries_max": queue.entries_max,
        "bytes_max": queue.bytes_max,
        "journal": journal(queue),
        "dead_lettered": queue.dead_lettered,
        "namespaces": namespaces.collect::<Vec<_>>(),
        "workers": workers.collect::<Vec<_>>(),
        "oldest": oldest.collect::<Vec<_>>(),
    })
}

/// What is pending, as every command says it.
pub(super) fn pending_to_json(pending: &PendingStats) -> Value {
    json!({
        "entries": pending.entries,
        "bytes": pending.bytes,
        "oldest_age_seconds": pending.oldest_age.map(seconds),
        "paused_since": pending.paused_since.as_ref().map(ToString::to_string),
    })
}
