//! `tidegate watch`: the changes of a prefix, as they become visible.
//!
//! Owns how each is shown. What it promises, and what a rescan asks of whoever reads it, is said in `gateway.proto`.

use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::{
    client::proto::{WatchChange, WatchRequest, WatchResponse, watch_response::Event},
    commands::{
        exit::Exit,
        output::{print, say},
        read::{preview, short_name},
        record::{Value, json_line},
        records::{Ended, namespace},
        table::printable,
        target::Target,
    },
};

/// How long a watch may take to begin unless asked otherwise.
const DEADLINE: Duration = Duration::from_secs(10);

/// The arguments of `watch`.
#[derive(Debug, Clone, Args)]
pub struct Watch {
    /// The namespace
    #[arg(value_parser = namespace)]
    namespace: String,
    /// What the keys begin with; all of them where it is left out
    #[arg(default_value = "")]
    prefix: String,
    /// With the values of what was put
    #[arg(long)]
    values: bool,
    /// Go on behind this token, as --json prints it
    #[arg(long, value_name = "TOKEN", default_value = "", hide_default_value = true)]
    token: String,
    /// End after so many changes [default: at Ctrl-C]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Every message as a line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// What `watch --json` prints.
#[derive(Serialize)]
struct Message<'a> {
    event: &'static str,
    #[serde(flatten)]
    change: Option<Change<'a>>,
    /// Why there is a rescan.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Whose writes are told from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resumed: Option<bool>,
    token: &'a str,
}

#[derive(Serialize)]
struct Change<'a> {
    kind: String,
    key: &'a str,
    version: i64,
    #[serde(flatten)]
    value: Value<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expire_time: Option<String>,
}

impl Watch {
    pub(super) async fn run(&self) -> Result<Exit, Ended> {
        let watching = self.watch();
        tokio::select! {
            ended = watching => ended,
            // Whoever watches until Ctrl-C has what was asked for.
            _ = tokio::signal::ctrl_c() => Ok(Exit::Done),
        }
    }

    async fn watch(&self) -> Result<Exit, Ended> {
        let mut watch = self.target.client(DEADLINE)?.watch(WatchRequest {
            namespace: self.namespace.clone(),
            prefix: self.prefix.clone(),
            resume_token: self.token.clone(),
            with_values: self.values,
        });
        let mut left = self.count;
        while left != Some(0) {
            let message = watch.next().await?;
            if self.json {
                print(&json_line(&shown(&message)))?;
            } else {
                self.tell(&message)?;
            }
            if matches!(message.event, Some(Event::Change(_))) {
                left = left.map(|left| left - 1);
            }
        }
        Ok(Exit::Done)
    }

    /// Changes are the output; the rest is about them.
    fn tell(&self, message: &WatchResponse) -> Result<(), Ended> {
        let shown = shown(message);
        match (&shown.change, &message.event) {
            (Some(change), Some(Event::Change(told))) => {
                let value = told.entry.as_ref().map(|entry| printable(&preview(&entry.value)));
                let line = format!(
                    "{:<10}  {}  {}  {}",
                    change.kind,
                    change.version,
                    printable(change.key),
                    value.unwrap_or_default()
                );
                print((line.trim_end().to_owned() + "\n").as_bytes())
            }
            (_, Some(Event::Started(_) | Event::Rescan(_))) => {
                let reason = shown
                    .reason
                    .map_or(String::new(), |reason| format!(", for {reason}: read it all anew"));
                let scope = shown.scope.unwrap_or_default().replace('_', " ");
                say(&format!("{}{reason}; whose writes are told: {scope}", shown.event));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn shown(message: &WatchResponse) -> Message<'_> {
    let mut shown = Message {
        event: "unknown",
        change: None,
        reason: None,
        scope: None,
        resumed: None,
        token: &message.resume_token,
    };
    match &message.event {
        Some(Event::Started(started)) => {
            shown.event = "started";
            shown.scope = Some(short_name(started.scope().as_str_name(), "WATCH_SCOPE_"));
            shown.resumed = Some(started.resumed);
        }
        Some(Event::Change(change)) => {
            shown.event = "change";
            shown.change = Some(of_change(change));
        }
        Some(Event::Rescan(rescan)) => {
            shown.event = "rescan";
            shown.reason = Some(short_name(rescan.reason().as_str_name(), "RESCAN_REASON_"));
            shown.scope = Some(short_name(rescan.scope().as_str_name(), "WATCH_SCOPE_"));
        }
        Some(Event::Progress(_)) => shown.event = "progress",
        // A later gateway tells more.
        None => {}
    }
    shown
}

fn of_change(change: &WatchChange) -> Change<'_> {
    let entry = change.entry.as_ref();
    Change {
        kind: short_name(change.kind().as_str_name(), "CHANGE_KIND_"),
        key: &change.key,
        version: change.version,
        value: entry.map(|entry| Value::of(&entry.value)).unwrap_or_default(),
        expire_time: entry.and_then(|entry| entry.expire_time.as_ref().map(ToString::to_string)),
    }
}
