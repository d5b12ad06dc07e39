//! `tidegate put`, `tidegate delete` and `tidegate incr`.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::{
    client::{
        Error, new_request_id,
        proto::{Condition, DeleteRequest, Durability, Existence, IncrementRequest, PutRequest, WriteMode},
    },
    commands::{
        exit::Exit,
        output::print,
        read::{short_name, to_proto},
        record::json_line,
        records::{Ended, namespace},
        target::{Target, duration},
    },
};

/// How long a write may take unless asked otherwise.
const DEADLINE: Duration = Duration::from_secs(10);

/// The largest value that is read from a file: far more than a gateway takes.
const VALUE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// When a write is answered.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    /// Once committed in the store
    Through,
    /// Once accepted by the gateway; the store is written afterwards
    Behind,
}

/// What `put` and `delete` have in common.
#[derive(Debug, Clone, Args)]
struct Writing {
    /// When to answer [default: as the namespace is configured]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Answer a write-behind write only once the store has it
    #[arg(long)]
    await_persisted: bool,
    /// Only if there is a record [exit code 4 if not]
    #[arg(long, group = "condition")]
    if_present: bool,
    /// Only if there is a record, and of this version [exit code 4 if not]
    #[arg(long, value_name = "VERSION", group = "condition", value_parser = clap::value_parser!(i64).range(1..))]
    if_version: Option<i64>,
    /// Names the write, so that it is written once however often it is sent [default: a new name]
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    request_id: String,
    /// The answer as a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

impl Writing {
    fn write_mode(&self) -> i32 {
        (match self.mode {
            None => WriteMode::Unspecified,
            Some(Mode::Through) => WriteMode::Through,
            Some(Mode::Behind) => WriteMode::Behind,
        }) as i32
    }

    fn condition(&self, if_absent: bool) -> Option<Condition> {
        let existence = match (if_absent, self.if_present) {
            (true, _) => Existence::Absent,
            (_, true) => Existence::Present,
            (false, false) => Existence::Unspecified,
        };
        let condition = Condition {
            existence: existence as i32,
            version: self.if_version.unwrap_or_default(),
        };
        (condition != Condition::default()).then_some(condition)
    }

    fn answer(&self, version: i64, durability: i32, deduplicated: bool) -> Result<Exit, Ended> {
        let durability = Durability::try_from(durability).unwrap_or_default();
        let durability = short_name(durability.as_str_name(), "DURABILITY_");
        let text = if self.json {
            json_line(&json!({ "version": version, "durability": durability, "deduplicated": deduplicated }))
        } else {
            let earlier = if deduplicated { ", by an earlier call" } else { "" };
            format!("version {version}, durability {durability}{earlier}\n").into_bytes()
        };
        print(&text)?;
        Ok(Exit::Done)
    }
}

/// The id of a write: the one that was given, or a new one, made up here so that it can be told.
fn named(given: &str) -> String {
    if given.is_empty() {
        new_request_id()
    } else {
        given.to_owned()
    }
}

/// What a write that failed ends with: where it may have been applied, with the id under which it can be repeated.
fn ended(error: Error, request_id: &str) -> Ended {
    let may_be_applied = error.may_be_applied();
    let mut ended = Ended::from(error);
    if let Some(message) = ended.message.as_mut().filter(|_| may_be_applied) {
        message.push_str("; to repeat it as the same write, give --request-id ");
        message.push_str(request_id);
    }
    ended
}

/// The arguments of `put`.
#[derive(Debug, Clone, Args)]
pub struct Put {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    /// The key
    key: String,
    /// The value; read from --file or standard input where it is left out
    #[arg(allow_negative_numbers = true)]
    value: Option<String>,
    /// Read the value from this file, byte for byte; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "value")]
    file: Option<PathBuf>,
    /// How long the record exists, as 90s or 30days [default: for ever]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    ttl: Option<Duration>,
    /// What the record is tagged with; may be given several times
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// Only if there is no record [exit code 4 if there is]
    #[arg(long, group = "condition")]
    if_absent: bool,
    #[command(flatten)]
    writing: Writing,
}

impl Put {
    pub(super) async fn run(&self) -> Result<Exit, Ended> {
        let value = match (&self.value, &self.file) {
            (Some(value), _) => Bytes::from(value.clone()),
            (None, Some(path)) if path.as_os_str() != "-" => from_file(path)?,
            (None, _) => read(io::stdin().lock(), "standard input")?,
        };
        let request_id = named(&self.writing.request_id);
        let request = PutRequest {
            namespace: self.namespace.clone(),
            key: self.key.clone(),
            value,
            write_mode: self.writing.write_mode(),
            ttl: self.ttl.map(to_proto).transpose()?,
            tags: self.tag.clone(),
            condition: self.writing.condition(self.if_absent),
            request_id: request_id.clone(),
            await_persisted: self.writing.await_persisted,
        };
        let answer = self.writing.target.client(DEADLINE)?.put(request).await;
        let answer = answer.map_err(|error| ended(error, &request_id))?;
        self.writing
            .answer(answer.version, answer.durability, answer.deduplicated)
    }
}

fn from_file(path: &Path) -> Result<Bytes, Ended> {
    let what = path.display().to_string();
    let file = File::open(path).map_err(|error| Ended::of_file(&what, &error))?;
    read(file, &what)
}

fn read(from: impl Read, what: &str) -> Result<Bytes, Ended> {
    let mut value = Vec::new();
    let read = from.take(VALUE_BYTES_MAX + 1).read_to_end(&mut value);
    read.map_err(|error| Ended::of_file(what, &error))?;
    if value.len() as u64 > VALUE_BYTES_MAX {
        let message = format!("{what} holds more than {VALUE_BYTES_MAX} bytes: no gateway takes such a value");
        return Err(Ended::new(Exit::Usage, message));
    }
    Ok(Bytes::from(value))
}

/// The arguments of `delete`.
#[derive(Debug, Clone, Args)]
pub struct Delete {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    /// The key
    key: String,
    #[command(flatten)]
    writing: Writing,
}

impl Delete {
    pub(super) async fn run(&self) -> Result<Exit, Ended> {
        let request_id = named(&self.writing.request_id);
        let request = DeleteRequest {
            namespace: self.namespace.clone(),
            key: self.key.clone(),
            write_mode: self.writing.write_mode(),
            condition: self.writing.condition(false),
            request_id: request_id.clone(),
            await_persisted: self.writing.await_persisted,
        };
        let answer = self.writing.target.client(DEADLINE)?.delete(request).await;
        let answer = answer.map_err(|error| ended(error, &request_id))?;
        self.writing
            .answer(answer.version, answer.durability, answer.deduplicated)
    }
}

/// The arguments of `incr`.
#[derive(Debug, Clone, Args)]
pub struct Incr {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    /// The key
    key: String,
    /// What is added
    #[arg(default_value_t = 1, allow_negative_numbers = true)]
    delta: i64,
    /// How long a counter that is created exists, as 90s or 30days [default: for ever]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    ttl: Option<Duration>,
    /// Names the call, so that it counts once however often it is sent [default: a new name]
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    request_id: String,
    /// The answer as a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

impl Incr {
    pub(super) async fn run(&self) -> Result<Exit, Ended> {
        let request_id = named(&self.request_id);
        let request = IncrementRequest {
            namespace: self.namespace.clone(),
            key: self.key.clone(),
            delta: Some(self.delta),
            ttl: self.ttl.map(to_proto).transpose()?,
            request_id: request_id.clone(),
        };
        let answer = self.target.client(DEADLINE)?.increment(request).await;
        let answer = answer.map_err(|error| ended(error, &request_id))?;
        let text = if self.json {
            json_line(&json!({
                "value": answer.value,
                "version": answer.version,
                "expire_time": answer.expire_time.as_ref().map(ToString::to_string),
                "deduplicated": answer.deduplicated,
            }))
        } else {
            format!("{}\n", answer.value).into_bytes()
        };
        print(&text)?;
        Ok(Exit::Done)
    }
}
