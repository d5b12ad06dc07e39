//! `tidegate admin dead-letters`: the writes that the store refused for good.
//!
//! Owns what these print, and when a list or a retry is whole. Values are printed by `export` alone, which is what it is for. Invariant: nothing is
//! discarded that was not named, or seen: `--up-to` takes the last id of a list.

use std::collections::BTreeSet;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::{
    Console, Ended, HELP, namespace, say,
    table::{Table, bytes, moment, plain},
    write_out,
};
use crate::{
    commands::exit::Exit,
    rpc::proto::{
        DeadLetter, DiscardDeadLettersRequest, ExportDeadLettersRequest, ExportDeadLettersResponse,
        ListDeadLettersRequest, RetryDeadLettersRequest, RetryDeadLettersResponse, RetryOutcome,
    },
};

/// How many letters are listed when that is not said.
const LIMIT_DEFAULT: &str = "100";

/// How many of them are asked for at a time.
const PAGE_LETTERS: u32 = 1_000;

/// What is done about dead letters.
#[derive(Debug, Clone, Subcommand)]
pub(super) enum Command {
    /// Show them, oldest first: why each was refused, how often, and when
    #[command(after_help = HELP)]
    List(List),
    /// Offer them to the store again, each under its own version: a newer write of its key stands
    #[command(after_help = HELP)]
    Retry(Retry),
    /// Delete them: their writes are lost
    #[command(after_help = HELP)]
    Discard(Discard),
    /// Print them with their values, as one JSON object on each line
    #[command(after_help = HELP)]
    Export(Export),
}

/// The arguments of `list`.
#[derive(Debug, Clone, Args)]
pub(super) struct List {
    /// Only those of this namespace
    #[arg(long, value_name = "NAME", value_parser = namespace)]
    namespace: Option<String>,
    /// Only those after this id
    #[arg(long, value_name = "ID", default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
    after: i64,
    /// How many at most
    #[arg(long, value_name = "LETTERS", default_value = LIMIT_DEFAULT, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
}

/// The arguments of `retry`.
#[derive(Debug, Clone, Args)]
#[group(skip)]
pub(super) struct Retry {
    /// These, by their ids
    #[arg(value_name = "ID", required_unless_present = "all", value_parser = clap::value_parser!(i64).range(1..))]
    ids: Vec<i64>,
    /// All of them
    #[arg(long, conflicts_with = "ids")]
    all: bool,
    /// All of this namespace
    #[arg(long, value_name = "NAME", requires = "all", value_parser = namespace)]
    namespace: Option<String>,
}

/// The arguments of `discard`.
#[derive(Debug, Clone, Args)]
#[group(skip)]
pub(super) struct Discard {
    /// These, by their ids
    #[arg(value_name = "ID", required_unless_present = "up_to", value_parser = clap::value_parser!(i64).range(1..))]
    ids: Vec<i64>,
    /// All with ids up to this, such as the last one of a list
    #[arg(long, value_name = "ID", conflicts_with = "ids", value_parser = clap::value_parser!(i64).range(1..))]
    up_to: Option<i64>,
    /// Of those, only the ones of this namespace
    #[arg(long, value_name = "NAME", requires = "up_to", value_parser = namespace)]
    namespace: Option<String>,
}

/// The arguments of `export`.
#[derive(Debug, Clone, Args)]
pub(super) struct Export {
    /// Only those of this namespace
    #[arg(long, value_name = "NAME", value_parser = namespace)]
    namespace: Option<String>,
    /// Only those after this id
    #[arg(long, value_name = "ID", default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
    after: i64,
}

pub(super) async fn run(console: &mut Console, command: &Command) -> Result<Exit, Ended> {
    match command {
        Command::List(options) => list(console, options).await,
        Command::Retry(options) => {
            let untold = "nobody reads the outcomes any more: whatever was not told of may have been tried, or not";
            partly_if_unread(retry(console, options).await, untold)
        }
        Command::Discard(options) => discard(console, options).await,
        Command::Export(options) => {
            let untold = "nobody reads the letters any more: there may be others";
            partly_if_unread(export(console, options).await, untold)
        }
    }
}

/// What tells of many letters and loses its reader on the way has not told of them all.
fn partly_if_unread(ended: Result<Exit, Ended>, untold: &str) -> Result<Exit, Ended> {
    if matches!(ended, Err(Ended::Unread)) {
        say(untold);
        return Ok(Exit::Partly);
    }
    ended
}

async fn list(console: &mut Console, options: &List) -> Result<Exit, Ended> {
    let mut letters: Vec<DeadLetter> = Vec::new();
    let mut after = options.after;
    let more = loop {
        // Below the limit, so it fits.
        let left = options.limit - letters.len() as u32;
        let request = ListDeadLettersRequest {
            namespace: options.namespace.clone().unwrap_or_default(),
            after_id: after,
            page_size: left.min(PAGE_LETTERS),
        };
        let page = console.client.list_dead_letters(request).await?;
        after = page.last_id;
        letters.extend(page.letters);
        if !page.more || letters.len() >= options.limit as usize {
            break page.more;
        }
    };
    if console.json {
        for letter in &letters {
            write_out(&format!("{}\n", letter_to_json(letter)))?;
        }
    } else if letters.is_empty() {
        write_out("there are no dead letters\n")?;
    } else {
        write_out(&letters_to_text(&letters))?;
    }
    if more {
        say(&format!("there are more: go on with --after {after}"));
    }
    Ok(Exit::Done)
}

fn letters_to_text(letters: &[DeadLetter]) -> String {
    let head = [
        "id",
        "namespace",
        "key",
        "kind",
        "code",
        "refused",
        "last",
        "version",
        "bytes",
        "reason",
    ];
    let mut table = Table::new(head.len(), &head);
    for letter in letters {
        let last = letter.retry_time.as_ref().or(letter.bury_time.as_ref());
        table.row(vec![
            letter.id.to_string(),
            letter.namespace.clone(),
            plain(&letter.key),
            kind(letter).to_owned(),
            letter.code.clone(),
            times(letter.attempts),
            moment(last),
            letter.version.to_string(),
            bytes(letter.value_bytes),
            plain(&letter.reason),
        ]);
    }
    table.render()
}

fn times(attempts: u32) -> String {
    match attempts {
        1 => "once".to_owned(),
        attempts => format!("{attempts} times"),
    }
}

fn kind(letter: &DeadLetter) -> &'static str {
    if letter.deletes { "delete" } else { "put" }
}

fn letter_to_json(letter: &DeadLetter) -> Value {
    json!({
        "id": letter.id,
        "namespace": letter.namespace,
        "key": letter.key,
        "version": letter.version,
        "deletes": letter.deletes,
        "value_bytes": letter.value_bytes,
        "expire_time": letter.expire_time.as_ref().map(ToString::to_string),
        "tags": letter.tags,
        "code": letter.code,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "bury_time": letter.bury_time.as_ref().map(ToString::to_string),
        "retry_time": letter.retry_time.as_ref().map(ToString::to_string),
    })
}

/// How many letters had which outcome.
#[derive(Default)]
struct Outcomes {
    stored: u64,
    superseded: u64,
    refused: u64,
    gone: u64,
}

impl Outcomes {
    fn count(&mut self, outcome: RetryOutcome) {
        match outcome {
            RetryOutcome::Stored => self.stored += 1,
            RetryOutcome::Superseded => self.superseded += 1,
            RetryOutcome::Refused | RetryOutcome::Unspecified => self.refused += 1,
            RetryOutcome::Gone => self.gone += 1,
        }
    }

    fn exit(&self) -> Exit {
        let done = self.stored + self.superseded;
        match (done, self.refused, self.gone) {
            (_, 0, 0) => Exit::Done,
            (0, 0, _) => Exit::NotFound,
            (0, _, 0) => Exit::Failed,
            _ => Exit::Partly,
        }
    }
}

async fn retry(console: &mut Console, options: &Retry) -> Result<Exit, Ended> {
    let request = RetryDeadLettersRequest {
        namespace: options.namespace.clone().unwrap_or_default(),
        ids: options.ids.clone(),
        up_to_id: if options.all { i64::MAX } else { 0 },
    };
    let mut retried = console.client.retry_dead_letters(request).await?;
    let mut outcomes = Outcomes::default();
    while let Some(told) = retried.next().await? {
        outcomes.count(told.outcome());
        console.show(|| retried_to_json(&told), || retried_to_text(&told))?;
    }
    if !console.json {
        let Outcomes {
            stored,
            superseded,
            refused,
            gone,
        } = outcomes;
        let sum = format!("{stored} stored, {superseded} superseded, {refused} refused again, {gone} not there\n");
        write_out(&sum)?;
    }
    Ok(outcomes.exit())
}

fn outcome(told: &RetryDeadLettersResponse) -> &'static str {
    match told.outcome() {
        RetryOutcome::Unspecified => "unknown",
        RetryOutcome::Stored => "stored",
        RetryOutcome::Superseded => "superseded",
        RetryOutcome::Refused => "refused",
        RetryOutcome::Gone => "gone",
    }
}

fn retried_to_text(told: &RetryDeadLettersResponse) -> String {
    let letter = told.letter.clone().unwrap_or_default();
    let DeadLetter { id, namespace, key, .. } = &letter;
    let name = format!("{id} {namespace} {}", plain(key));
    match told.outcome() {
        RetryOutcome::Gone => format!("{id}: there is no such dead letter\n"),
        RetryOutcome::Superseded if told.standing_version > 0 => {
            format!("{name}: superseded by version {}\n", told.standing_version)
        }
        RetryOutcome::Refused => {
            let code = if letter.code.is_empty() { "" } else { " " };
            let (times, reason) = (times(letter.attempts), plain(&letter.reason));
            format!("{name}: refused again, {times} by now:{code}{} {reason}\n", letter.code)
        }
        _ => format!("{name}: {}\n", outcome(told)),
    }
}

fn retried_to_json(told: &RetryDeadLettersResponse) -> Value {
    let standing = (told.standing_version > 0).then_some(told.standing_version);
    json!({
        "outcome": outcome(told),
        "standing_version": standing,
        "letter": told.letter.as_ref().map(letter_to_json),
    })
}

async fn discard(console: &mut Console, options: &Discard) -> Result<Exit, Ended> {
    let request = DiscardDeadLettersRequest {
        namespace: options.namespace.clone().unwrap_or_default(),
        ids: options.ids.clone(),
        up_to_id: options.up_to.unwrap_or_default(),
    };
    let answer = console.client.discard_dead_letters(request).await?;
    console.show(
        || json!({"discarded": answer.discarded}),
        || format!("{} dead letters discarded\n", answer.discarded),
    )?;
    // Of those up to an id none is missing.
    let named: BTreeSet<i64> = options.ids.iter().copied().collect();
    let exit = match (answer.discarded, named.len() as u64) {
        (0, 1..) => Exit::NotFound,
        (discarded, named) if discarded < named => {
            say(&format!("{} of them are not there", named - discarded));
            Exit::Partly
        }
        _ => Exit::Done,
    };
    Ok(exit)
}

async fn export(console: &mut Console, options: &Export) -> Result<Exit, Ended> {
    let request = ExportDeadLettersRequest {
        namespace: options.namespace.clone().unwrap_or_default(),
        after_id: options.after,
    };
    let mut exported = console.client.export_dead_letters(request).await?;
    while let Some(told) = exported.next().await? {
        write_out(&format!("{}\n", exported_to_json(told)))?;
    }
    Ok(Exit::Done)
}

/// A letter with its value: as text where it is text, else in base64.
fn exported_to_json(told: ExportDeadLettersResponse) -> Value {
    let letter = told.letter.unwrap_or_default();
    let Value::Object(mut fields) = letter_to_json(&letter) else {
        return Value::Object(Map::new());
    };
    if !letter.deletes {
        let (name, value) = match std::str::from_utf8(&told.value) {
            Ok(text) => ("value", text.to_owned()),
            Err(_) => ("value_base64", STANDARD.encode(&told.value)),
        };
        fields.insert(name.to_owned(), Value::String(value));
    }
    Value::Object(fields)
}
