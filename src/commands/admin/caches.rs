//! `tidegate admin warm` and `invalidate`: filling the caches and emptying them.
//!
//! Owns what these print, and the line of progress, which goes to standard error and to a terminal only.

use std::io::{self, IsTerminal, Write};

use clap::Args;
use serde_json::{Value, json};

use super::{Console, Ended, namespace, say};
use crate::{
    commands::exit::Exit,
    rpc::proto::{InvalidateRequest, WarmRequest, WarmResponse},
};

/// Goes to the beginning of a terminal's line and empties it.
const FRESH_LINE: &str = "\r\x1b[K";

/// The arguments of `warm`.
#[derive(Debug, Clone, Args)]
pub(super) struct Warm {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    #[command(flatten)]
    what: WarmWhat,
}

#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
struct WarmWhat {
    /// A key; may be repeated
    #[arg(long = "key", value_name = "KEY")]
    keys: Vec<String>,
    /// All keys that begin so
    #[arg(long)]
    prefix: Option<String>,
    /// The records written last, as many as this: up to 100,000
    #[arg(long, value_name = "RECORDS", value_parser = clap::value_parser!(u32).range(1..))]
    newest: Option<u32>,
}

/// The arguments of `invalidate`.
#[derive(Debug, Clone, Args)]
pub(super) struct Invalidate {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    #[command(flatten)]
    what: InvalidateWhat,
}

#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
struct InvalidateWhat {
    /// A key; may be repeated
    #[arg(long = "key", value_name = "KEY")]
    keys: Vec<String>,
    /// All keys that begin so
    #[arg(long)]
    prefix: Option<String>,
    /// All keys whose record has this tag in the store
    #[arg(long)]
    tag: Option<String>,
    /// All keys
    #[arg(long)]
    all: bool,
}

pub(super) async fn warm(console: &mut Console, options: &Warm) -> Result<Exit, Ended> {
    let WarmWhat { keys, prefix, newest } = options.what.clone();
    let request = WarmRequest {
        namespace: options.namespace.clone(),
        keys,
        prefix: prefix.unwrap_or_default(),
        newest: newest.unwrap_or_default(),
    };
    let mut line = ProgressLine::new();
    let mut progress = console.client.warm(request).await?;
    let mut last = WarmResponse::default();
    loop {
        match progress.next().await {
            Ok(Some(told)) => {
                last = told;
                line.show(&to_text(&last));
            }
            Ok(None) => break,
            Err(error) => {
                line.clear();
                say(&format!("broke off: {}", to_text(&last)));
                return Err(error.into());
            }
        }
    }
    line.clear();
    console.show(|| to_json(&last), || format!("{}\n", to_text(&last)))?;
    if last.limit_reached {
        say("the prefix may have more keys than were loaded");
    }
    Ok(if last.failed > 0 { Exit::Partly } else { Exit::Done })
}

fn to_text(told: &WarmResponse) -> String {
    let total = told.total.map(|total| format!(" of {total}")).unwrap_or_default();
    let failed = if told.failed > 0 {
        format!(", {} could not be loaded", told.failed)
    } else {
        String::new()
    };
    format!("{}{total} keys are cached{failed}", told.done)
}

fn to_json(told: &WarmResponse) -> Value {
    json!({
        "done": told.done,
        "total": told.total,
        "failed": told.failed,
        "limit_reached": told.limit_reached,
    })
}

/// One line at a terminal that is written again and again; nothing elsewhere.
struct ProgressLine {
    is_shown: bool,
}

impl ProgressLine {
    fn new() -> ProgressLine {
        ProgressLine {
            is_shown: io::stderr().is_terminal(),
        }
    }

    fn show(&mut self, text: &str) {
        self.write(text);
    }

    fn clear(&mut self) {
        self.write("");
    }

    fn write(&mut self, text: &str) {
        if self.is_shown {
            let mut terminal = io::stderr().lock();
            let written = write!(terminal, "{FRESH_LINE}{text}").and_then(|()| terminal.flush());
            self.is_shown = written.is_ok();
        }
    }
}

pub(super) async fn invalidate(console: &mut Console, options: &Invalidate) -> Result<Exit, Ended> {
    let InvalidateWhat { keys, prefix, tag, all } = options.what.clone();
    let request = InvalidateRequest {
        namespace: options.namespace.clone(),
        keys,
        prefix: prefix.unwrap_or_default(),
        tag: tag.unwrap_or_default(),
        whole_namespace: all,
    };
    let answer = console.client.invalidate(request).await?;
    console.show(
        || json!({"keys": answer.keys, "memory_copies": answer.memory_copies}),
        || {
            let (keys, copies) = (answer.keys, answer.memory_copies);
            format!("invalidated: {keys} keys by name, {copies} copies in this gateway's memory\n")
        },
    )?;
    Ok(Exit::Done)
}
