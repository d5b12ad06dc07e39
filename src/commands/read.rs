//! `tidegate get` and `tidegate scan`.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::{
    client::proto::{GetRequest, GetResponse, ReadConsistency, ScanRecord, ScanRequest},
    commands::{
        exit::Exit,
        output::{print, print_last, say},
        record::{Value, Written, json_line},
        records::{Ended, namespace},
        table::{Table, printable},
        target::{Target, duration},
    },
};

/// How long a read may take unless asked otherwise.
const DEADLINE: Duration = Duration::from_secs(10);

/// The most records of a page: what the contract allows.
const PAGE_RECORDS_MAX: u64 = 1_000;

/// What is shown of a value in a table, in characters.
const PREVIEW: usize = 40;

/// Which copies may answer.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Consistency {
    /// Any, this gateway's memory first
    Cached,
    /// Redis, or the store
    Shared,
    /// The store
    Store,
}

/// The arguments of `get`.
#[derive(Debug, Clone, Args)]
pub struct Get {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    /// The key
    key: String,
    /// Which copies may answer
    #[arg(long, value_enum, default_value_t = Consistency::Cached)]
    consistency: Consistency,
    /// How old a copy may be, as 500ms or 10s
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    max_staleness: Option<Duration>,
    /// The version that the answer must have reached, as a write printed it
    #[arg(long, value_name = "VERSION", default_value_t = 0)]
    min_version: i64,
    /// Also say, on standard error, which version it is, when it expires, and where it came from
    #[arg(long, short)]
    verbose: bool,
    /// The record as a JSON object, instead of the bytes of its value
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// What `get --json` prints.
#[derive(Serialize)]
struct Got<'a> {
    namespace: &'a str,
    key: &'a str,
    found: bool,
    #[serde(flatten)]
    value: Value<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expire_time: Option<String>,
    source: String,
    age_seconds: f64,
    stale: bool,
}

impl Get {
    pub(super) async fn run(&self) -> Result<Exit, Ended> {
        let consistency = match self.consistency {
            Consistency::Cached => ReadConsistency::Cached,
            Consistency::Shared => ReadConsistency::Shared,
            Consistency::Store => ReadConsistency::Store,
        };
        let request = GetRequest {
            namespace: self.namespace.clone(),
            key: self.key.clone(),
            consistency: consistency as i32,
            max_staleness: self.max_staleness.map(to_proto).transpose()?,
            min_version: self.min_version,
        };
        let answer = self.target.client(DEADLINE)?.get(request).await?;
        if self.json {
            let exit = if answer.entry.is_some() {
                Exit::Done
            } else {
                Exit::NotFound
            };
            return print_last(&json_line(&self.shown(&answer)), exit);
        }
        if let Some(entry) = &answer.entry {
            // To a file or a program go the bytes as they are.
            let mut bytes = entry.value.to_vec();
            if io::stdout().is_terminal() && !bytes.ends_with(b"\n") {
                bytes.push(b'\n');
            }
            print(&bytes)?;
        }
        if self.verbose {
            say(about(&self.shown(&answer)).trim_end());
        }
        if answer.entry.is_none() {
            say(&format!("tidegate: there is no record {:?}", self.key));
            return Ok(Exit::NotFound);
        }
        Ok(Exit::Done)
    }

    fn shown<'a>(&'a self, answer: &'a GetResponse) -> Got<'a> {
        let entry = answer.entry.as_ref();
        Got {
            namespace: &self.namespace,
            key: &self.key,
            found: entry.is_some(),
            value: entry.map(|entry| Value::of(&entry.value)).unwrap_or_default(),
            version: entry.map(|entry| entry.version),
            expire_time: entry.and_then(|entry| entry.expire_time.as_ref().map(ToString::to_string)),
            source: short_name(answer.source().as_str_name(), "SOURCE_"),
            age_seconds: answer
                .age
                .map_or(0.0, |age| age.seconds as f64 + f64::from(age.nanos) / 1e9),
            stale: answer.stale,
        }
    }
}

/// What is known of a record beside its value, as a table of names and values.
fn about(got: &Got<'_>) -> String {
    let mut table = Table::new(2, &["key", &printable(got.key)]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    if let Some(version) = got.version {
        row("version", version.to_string());
        row("expires", got.expire_time.clone().unwrap_or_else(|| "never".to_owned()));
    }
    row("source", got.source.clone());
    row("age", format!("{:.3} s", got.age_seconds));
    row("stale", got.stale.to_string());
    table.render()
}

/// The arguments of `scan`.
#[derive(Debug, Clone, Args)]
pub struct Scan {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    /// What the keys begin with; all of them where it is left out
    #[arg(default_value = "")]
    prefix: String,
    /// The most records [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// The keys alone, one on each line
    #[arg(long)]
    keys_only: bool,
    /// Each record as a line of JSON, as `export` writes it
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

impl Scan {
    pub(super) async fn run(&self) -> Result<Exit, Ended> {
        let mut left = self.limit.unwrap_or(u64::MAX);
        let request = ScanRequest {
            namespace: self.namespace.clone(),
            prefix: self.prefix.clone(),
            // At most a thousand.
            page_size: i32::try_from(left.min(PAGE_RECORDS_MAX)).unwrap_or(0),
            keys_only: self.keys_only,
            with_tags: self.json,
            ..ScanRequest::default()
        };
        let mut pages = self.target.client(DEADLINE)?.pages(request);
        let mut is_first = true;
        while left > 0
            && let Some(mut records) = pages.next().await?
        {
            records.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= records.len() as u64;
            print(&self.page(&records, is_first))?;
            is_first &= records.is_empty();
        }
        Ok(Exit::Done)
    }

    fn page(&self, records: &[ScanRecord], is_first: bool) -> Vec<u8> {
        if self.json {
            let line = |record| Some(Written::of(record, !self.keys_only)?.line());
            return records.iter().filter_map(line).flatten().collect();
        }
        if self.keys_only {
            let line = |record: &ScanRecord| printable(&record.key) + "\n";
            return records.iter().map(line).collect::<String>().into_bytes();
        }
        let mut table = Table::new(2, &["key", "value", "bytes", "version", "expires"]);
        for record in records {
            let Some(entry) = &record.entry else { continue };
            table.row([
                record.key.clone(),
                preview(&entry.value),
                entry.value.len().to_string(),
                entry.version.to_string(),
                entry
                    .expire_time
                    .map_or_else(|| "-".to_owned(), |time| time.to_string()),
            ]);
        }
        let text = table.render();
        match text.split_once('\n') {
            // The head once, and none where there is nothing.
            _ if records.is_empty() => Vec::new(),
            Some((_, rows)) if !is_first => rows.into(),
            _ => text.into(),
        }
    }
}

/// The beginning of a value.
pub(super) fn preview(value: &[u8]) -> String {
    let Ok(text) = std::str::from_utf8(value) else {
        return "(binary)".to_owned();
    };
    let mut preview: String = text.chars().take(PREVIEW).collect();
    if preview.len() < text.len() {
        preview.push('…');
    }
    preview
}

/// `SOURCE_L1` as `l1`.
pub(super) fn short_name(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase()
}

/// A time as the contract has it.
pub(super) fn to_proto(duration: Duration) -> Result<prost_types::Duration, Ended> {
    let proto = duration.try_into();
    proto.map_err(|_| {
        Ended::new(
            Exit::Usage,
            format!("{} is too long", humantime::format_duration(duration)),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preview_is_short_and_whole_characters() {
        assert_eq!(preview(b"short"), "short");
        assert_eq!(preview("é".repeat(50).as_bytes()), "é".repeat(40) + "…");
        assert_eq!(preview(b"\xff"), "(binary)");
    }
}
