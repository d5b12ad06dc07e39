//! `tidegate admin namespaces` and `log-level`: the settings that hold, and the one that can be changed while a gateway runs.
//!
//! Owns what these print.

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::{
    Console, Ended, namespace, say,
    table::{Table, moment, plain, yes},
};
use crate::{
    commands::exit::Exit,
    rpc::proto::{
        LogLevel as ProtoLevel, LogLevelRequest, LogLevelResponse, NamespaceSettings, NamespacesRequest,
        NamespacesResponse, Setting, SettingSource,
    },
};

/// The arguments of `namespaces`.
#[derive(Debug, Clone, Args)]
pub(super) struct Namespaces {
    /// Only this namespace, known or not, with all of its settings [default: all that the gateway knows]
    #[arg(value_parser = namespace)]
    namespace: Option<String>,
}

/// The arguments of `log-level`.
#[derive(Debug, Clone, Args)]
pub(super) struct LogLevel {
    /// Log this much from now on, until the gateway restarts [default: only show]
    level: Option<Level>,
    /// Only of this part, as the command without arguments lists them
    #[arg(long, requires = "level")]
    target: Option<String>,
    /// Log what is configured again
    #[arg(long, conflicts_with = "level")]
    reset: bool,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Level {
    /// What failed and needs somebody
    Error,
    /// And what may
    Warn,
    /// And what the gateway does
    Info,
    /// And how: not in builds for release
    Debug,
    /// And every step: not in builds for release
    Trace,
}

pub(super) async fn namespaces(console: &mut Console, options: &Namespaces) -> Result<Exit, Ended> {
    let request = NamespacesRequest {
        namespace: options.namespace.clone().unwrap_or_default(),
    };
    let answer = console.client.namespaces(request).await?;
    if answer.more {
        say("there are more namespaces than are told: name one");
    }
    console.show(
        || to_json(&answer),
        || match (&options.namespace, &answer.namespaces[..]) {
            (Some(_), [one]) => one_to_text(one),
            _ => all_to_text(&answer),
        },
    )?;
    Ok(Exit::Done)
}

fn one_to_text(namespace: &NamespaceSettings) -> String {
    let mut text = format!(
        "{}: {}, {}, {}\n\n",
        namespace.namespace,
        if namespace.configured {
            "configured"
        } else {
            "not configured"
        },
        if namespace.used {
            "used"
        } else {
            "not used since the start"
        },
        match &namespace.paused_since {
            Some(since) => format!("its drain is paused since {since}"),
            None => "its drain is running".to_owned(),
        },
    );
    text.push_str(&settings(&namespace.settings).render());
    text
}

fn settings(settings: &[Setting]) -> Table {
    let mut table = Table::new(4, &["setting", "value", "from", "place"]);
    for setting in settings {
        table.row(vec![
            setting.name.clone(),
            plain(&setting.value),
            source(setting).replace('_', " "),
            plain(&setting.place),
        ]);
    }
    table
}

/// The namespaces, with what differs from the defaults; then those.
fn all_to_text(answer: &NamespacesResponse) -> String {
    let mut table = Table::new(
        5,
        &["namespace", "configured", "used", "paused since", "configured for it"],
    );
    for namespace in &answer.namespaces {
        let own = namespace.settings.iter();
        let own = own.filter(|setting| setting.source() == SettingSource::Namespace);
        let own: Vec<String> = own.map(|own| format!("{} = {}", own.name, plain(&own.value))).collect();
        table.row(vec![
            namespace.namespace.clone(),
            yes(namespace.configured),
            yes(namespace.used),
            moment(namespace.paused_since.as_ref()),
            own.join(", "),
        ]);
    }
    format!(
        "{}\nof all others:\n{}",
        table.render(),
        settings(&answer.defaults).render()
    )
}

fn source(setting: &Setting) -> &'static str {
    match setting.source() {
        SettingSource::Unspecified => "unknown",
        SettingSource::BuiltIn => "built_in",
        SettingSource::NamespaceDefaults => "namespace_defaults",
        SettingSource::Namespace => "namespace",
    }
}

fn to_json(answer: &NamespacesResponse) -> Value {
    let namespaces = answer.namespaces.iter().map(|namespace| {
        json!({
            "namespace": namespace.namespace,
            "configured": namespace.configured,
            "used": namespace.used,
            "paused_since": namespace.paused_since.as_ref().map(ToString::to_string),
            "settings": settings_to_json(&namespace.settings),
        })
    });
    json!({
        "namespaces": namespaces.collect::<Vec<_>>(),
        "more": answer.more,
        "defaults": settings_to_json(&answer.defaults),
    })
}

fn settings_to_json(settings: &[Setting]) -> Value {
    let settings = settings.iter().map(|setting| {
        let place = (!setting.place.is_empty()).then_some(&setting.place);
        let told = json!({"value": setting.value, "source": source(setting), "place": place});
        (setting.name.clone(), told)
    });
    Value::Object(settings.collect::<Map<String, Value>>())
}

pub(super) async fn log_level(console: &mut Console, options: &LogLevel) -> Result<Exit, Ended> {
    let level = match options.level {
        None => ProtoLevel::Unspecified,
        Some(Level::Error) => ProtoLevel::Error,
        Some(Level::Warn) => ProtoLevel::Warn,
        Some(Level::Info) => ProtoLevel::Info,
        Some(Level::Debug) => ProtoLevel::Debug,
        Some(Level::Trace) => ProtoLevel::Trace,
    };
    let request = LogLevelRequest {
        level: level.into(),
        target: options.target.clone().unwrap_or_default(),
        reset: options.reset,
    };
    let answer = console.client.log_level(request).await?;
    console.show(
        || json!({"filter": answer.filter, "most": name(answer.most()), "targets": answer.targets}),
        || log_to_text(&answer),
    )?;
    Ok(Exit::Done)
}

fn log_to_text(answer: &LogLevelResponse) -> String {
    format!(
        "logged: {}\nthe most that this build can: {}\ntargets: {}\n",
        plain(&answer.filter),
        name(answer.most()),
        answer.targets.join(", "),
    )
}

fn name(level: ProtoLevel) -> &'static str {
    match level {
        ProtoLevel::Unspecified => "unknown",
        ProtoLevel::Error => "error",
        ProtoLevel::Warn => "warn",
        ProtoLevel::Info => "info",
        ProtoLevel::Debug => "debug",
        ProtoLevel::Trace => "trace",
    }
}
