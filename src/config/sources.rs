//! Where settings come from, and where each stands.
//!
//! Owns reading the file and laying single settings over it, so that whatever is refused is refused with its place. Knows nothing of
//! what a setting means.

use std::{
    fs,
    path::{Path, PathBuf},
};

use toml::{Table, Value, de::DeTable};

use super::{Config, ConfigError};

/// A configuration file and its text, to say where something stands.
pub(super) struct File {
    path: PathBuf,
    text: String,
}

impl File {
    pub(super) fn read(path: &Path) -> Result<File, ConfigError> {
        let text = fs::read_to_string(path).map_err(|error| ConfigError {
            place: path.display().to_string(),
            reason: error.to_string(),
        })?;
        Ok(File {
            path: path.to_owned(),
            text,
        })
    }

    /// The settings, each of them known and of its type.
    pub(super) fn parse(&self) -> Result<Table, ConfigError> {
        let located = |error: toml::de::Error| ConfigError {
            place: self.at(error.span().map_or(0, |span| span.start)),
            reason: reason(&error),
        };
        // As the typed configuration first, whose errors know their place.
        toml::from_str::<Config>(&self.text).map_err(located)?;
        self.text.parse().map_err(located)
    }

    /// Where a setting stands in the file, or the nearest section around it, and which it is.
    pub(super) fn place(&self, path: &str) -> Option<String> {
        Some(format!("{} ({path})", self.position(path)?))
    }

    /// Where it stands.
    pub(super) fn position(&self, path: &str) -> Option<String> {
        let document = DeTable::parse(&self.text).ok()?;
        let mut table = document.get_ref();
        let mut offset = None;
        let mut rest = path;
        while !rest.is_empty() {
            // A namespace's name may hold dots itself.
            let named = |name: &str| rest == name || rest.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
            let Some((key, value)) = table.iter().find(|(key, _)| named(key.get_ref())) else {
                break;
            };
            offset = Some(key.span().start);
            rest = rest[key.get_ref().len()..].trim_start_matches('.');
            let Some(section) = value.get_ref().as_table() else {
                break;
            };
            table = section;
        }
        Some(self.at(offset?))
    }

    fn at(&self, offset: usize) -> String {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
        format!("{}:{line}:{column}", self.path.display())
    }
}

/// The settings of namespaces, and of their defaults, that stand somewhere: their paths, joined by dots.
pub(super) fn namespace_paths(settings: &Table) -> Vec<String> {
    let section = |path: String, section: Option<&Value>| -> Vec<String> {
        let names = section.and_then(Value::as_table).into_iter().flat_map(Table::keys);
        names.map(|name| format!("{path}.{name}")).collect()
    };
    let mut paths = section("namespace_defaults".to_owned(), settings.get("namespace_defaults"));
    let namespaces = settings.get("namespaces").and_then(Value::as_table);
    for (name, own) in namespaces.into_iter().flatten() {
        paths.extend(section(format!("namespaces.{name}"), Some(own)));
    }
    paths
}

/// Sets one value, given as text, and blames it when the settings do not hold any longer. `path` is joined by two underscores.
///
/// Text is TOML where that holds (a number, a truth), and text otherwise.
pub(super) fn overlay(settings: &mut Table, place: &str, path: &str, text: &str) -> Result<(), ConfigError> {
    let refuse = |reason: String| ConfigError {
        place: place.to_owned(),
        reason,
    };
    let parsed = format!("value = {text}").parse::<Table>().ok();
    let typed = parsed.and_then(|mut table| if table.len() == 1 { table.remove("value") } else { None });
    let mut refusal = None;
    for value in typed.into_iter().chain([Value::String(text.to_owned())]) {
        let mut changed = settings.clone();
        insert(&mut changed, path, value).map_err(&refuse)?;
        match assemble(&changed) {
            Ok(_) => {
                *settings = changed;
                return Ok(());
            }
            Err(reason) => refusal = refusal.or(Some(reason)),
        }
    }
    Err(refuse(refusal.unwrap_or_default()))
}

fn insert(settings: &mut Table, path: &str, value: Value) -> Result<(), String> {
    let mut table = settings;
    let mut parts = path.split("__").peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            table.insert(part.to_owned(), value);
            break;
        }
        let entry = table.entry(part).or_insert_with(|| Value::Table(Table::new()));
        table = entry.as_table_mut().ok_or_else(|| format!("`{part}` is no section"))?;
    }
    Ok(())
}

/// The settings as a configuration, each namespace's over the defaults.
pub(super) fn assemble(settings: &Table) -> Result<Config, String> {
    let mut settings = settings.clone();
    let defaults = settings
        .get("namespace_defaults")
        .and_then(Value::as_table)
        .cloned()
        .unwrap_or_default();
    if let Some(namespaces) = settings.get_mut("namespaces").and_then(Value::as_table_mut) {
        for (_, namespace) in namespaces.iter_mut() {
            if let Some(own) = namespace.as_table() {
                let mut inherited = defaults.clone();
                inherited.extend(own.clone());
                *namespace = Value::Table(inherited);
            }
        }
    }
    settings.try_into().map_err(|error: toml::de::Error| reason(&error))
}

/// Why a value is refused; without it, where it may be a URL that stands in the wrong place, with its password.
fn reason(error: &toml::de::Error) -> String {
    const QUOTES: [char; 2] = ['"', '`'];
    let text = error.message();
    let shown = match (text.find(QUOTES), text.rfind(QUOTES)) {
        // All that is quoted: a password may hold quotes itself.
        (Some(first), Some(last)) if text.contains("://") => format!("{}…{}", &text[..first], &text[last + 1..]),
        _ => text.to_owned(),
    };
    shown
        .replace("struct Config", "a section")
        .replace("struct NamespaceSettings", "a section")
}
