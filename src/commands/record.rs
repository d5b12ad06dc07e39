//! A record as a line of JSON: what `export` writes and `import` reads, and the commands show with `--json`.
//!
//! Owns the form: `key`; `value` as text, or `value_base64` where the value is no UTF-8; `version`; `expire_time` or `ttl`; `tags`. Invariant: what
//! is written is read back as the same record.

use std::time::{Duration, SystemTime};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::client::proto::ScanRecord;

/// What the contract allows.
const TTL_MAX: Duration = Duration::from_secs(36_525 * 24 * 60 * 60);

/// A record as it is written.
#[derive(Debug, Serialize)]
pub(super) struct Written<'a> {
    key: &'a str,
    #[serde(flatten)]
    value: Value<'a>,
    version: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    expire_time: Option<String>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    tags: &'a [String],
}

/// A value as text where it is some, else as base64; neither where there is none.
#[derive(Debug, Default, Serialize)]
pub(super) struct Value<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
}

impl<'a> Value<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Value<'a> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Value {
                value: Some(text),
                value_base64: None,
            },
            Err(_) => Value {
                value: None,
                value_base64: Some(STANDARD.encode(bytes)),
            },
        }
    }
}

impl<'a> Written<'a> {
    /// A record of a page, with its tags if they were asked for.
    pub(super) fn of(record: &'a ScanRecord, with_value: bool) -> Option<Written<'a>> {
        let entry = record.entry.as_ref()?;
        Some(Written {
            key: &record.key,
            value: if with_value {
                Value::of(&entry.value)
            } else {
                Value::default()
            },
            version: entry.version,
            expire_time: entry.expire_time.as_ref().map(ToString::to_string),
            tags: &record.tags,
        })
    }

    /// The line, with its end.
    pub(super) fn line(&self) -> Vec<u8> {
        json_line(self)
    }
}

/// Something as a line of JSON, with its end.
pub(super) fn json_line(shown: &impl Serialize) -> Vec<u8> {
    // Ours have text for keys, and numbers that JSON knows.
    let mut line = serde_json::to_vec(shown).unwrap_or_default();
    line.push(b'\n');
    line
}

/// A record as it is read.
#[derive(Debug, PartialEq)]
pub(super) struct Read {
    pub(super) key: String,
    pub(super) value: Bytes,
    pub(super) lifetime: Lifetime,
    pub(super) tags: Vec<String>,
}

/// How long a record exists.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Lifetime {
    /// For ever.
    Endless,
    /// From when it is written.
    For(Duration),
    /// Until then.
    Until(SystemTime),
}

/// As it is in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    key: String,
    value: Option<String>,
    value_base64: Option<String>,
    ttl: Option<Ttl>,
    expire_time: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
    /// What it had where it came from: a write has a version of its own.
    #[serde(rename = "version")]
    _version: Option<i64>,
}

/// `"10m"`, or a number of seconds.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ttl {
    Seconds(f64),
    Text(String),
}

/// Why a line is no record.
#[derive(Debug, PartialEq)]
pub(super) struct Malformed {
    /// The record's key, where that much could be read.
    pub(super) key: Option<String>,
    pub(super) reason: String,
}

impl Read {
    /// Reads a line.
    pub(super) fn from_line(line: &[u8]) -> Result<Read, Malformed> {
        let line: Line = serde_json::from_slice(line).map_err(|error| Malformed {
            key: None,
            reason: unreadable(&error),
        })?;
        let Line {
            key,
            value,
            value_base64,
            ttl,
            expire_time,
            tags,
            ..
        } = line;
        let fields = || -> Result<(Bytes, Lifetime), String> {
            let value = match (value, value_base64) {
                (Some(text), None) => Bytes::from(text),
                (None, Some(text)) => {
                    let decoded = STANDARD.decode(text);
                    Bytes::from(decoded.map_err(|_| "value_base64 is no base64".to_owned())?)
                }
                (None, None) => return Err("there is no value: either value or value_base64 must be there".to_owned()),
                (Some(_), Some(_)) => return Err("there are two values: value and value_base64".to_owned()),
            };
            Ok((value, lifetime(ttl, expire_time.as_deref())?))
        };
        match fields() {
            Ok((value, lifetime)) => Ok(Read {
                key,
                value,
                lifetime,
                tags,
            }),
            Err(reason) => Err(Malformed { key: Some(key), reason }),
        }
    }
}

/// What serde says without the place in "line 1", which is another line than the file's, and without what it quotes of the line: that may be a
/// value, and as long as one.
fn unreadable(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let said = text.strip_suffix(&place).unwrap_or(&text);
    let reason = if !error.is_data() || said.starts_with("missing field") || said.starts_with("duplicate field") {
        said.to_owned()
    } else if let Some((found, expected)) = said.rsplit_once(", expected ") {
        let what = if found.starts_with("unknown field") {
            "unknown field"
        } else {
            "something else"
        };
        format!("{what}, expected {expected}")
    } else {
        "a field has not the form that it must have".to_owned()
    };
    format!("{reason}, at column {}", error.column())
}

fn lifetime(ttl: Option<Ttl>, expire_time: Option<&str>) -> Result<Lifetime, String> {
    let lifetime = match (ttl, expire_time) {
        (None, None) => return Ok(Lifetime::Endless),
        (Some(_), Some(_)) => return Err("there are two lifetimes: ttl and expire_time".to_owned()),
        (Some(Ttl::Text(text)), None) => {
            let duration = humantime::parse_duration(&text);
            Lifetime::For(duration.map_err(|_| "ttl is no duration as \"10m\"".to_owned())?)
        }
        (Some(Ttl::Seconds(seconds)), None) => {
            let duration = Duration::try_from_secs_f64(seconds);
            Lifetime::For(duration.map_err(|_| "ttl is no number of seconds that a record can exist".to_owned())?)
        }
        (None, Some(text)) => {
            let time: Result<prost_types::Timestamp, _> = text.parse();
            let time = time.ok().and_then(|time| SystemTime::try_from(time).ok());
            Lifetime::Until(time.ok_or("expire_time is no time as \"2030-01-31T12:00:00Z\"")?)
        }
    };
    if let Lifetime::For(duration) = lifetime
        && (duration.is_zero() || duration > TTL_MAX)
    {
        return Err("ttl must be more than zero and at most 36,525 days".to_owned());
    }
    Ok(lifetime)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::proto::Entry;

    fn read(line: &str) -> Result<Read, Malformed> {
        Read::from_line(line.as_bytes())
    }

    #[test]
    fn what_is_written_is_read_back() {
        for value in [&b"text \"\n\xc3\xa9\0"[..], b"\xff\x00\xfe", b""] {
            let entry = Entry {
                value: Bytes::copy_from_slice(value),
                version: 7,
                expire_time: Some(prost_types::Timestamp {
                    seconds: 1_900_000_000,
                    nanos: 123_000_000,
                }),
            };
            let record = ScanRecord {
                key: "a\"b\n".to_owned(),
                entry: Some(entry.clone()),
                tags: vec!["a".to_owned(), "\"b".to_owned()],
            };
            let line = Written::of(&record, true).expect("it has an entry").line();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "one line");
            let expiry = SystemTime::UNIX_EPOCH + Duration::from_millis(1_900_000_000_123);
            let expected = Read {
                key: "a\"b\n".to_owned(),
                value: entry.value.clone(),
                lifetime: Lifetime::Until(expiry),
                tags: record.tags,
            };
            assert_eq!(Read::from_line(&line), Ok(expected));
        }
    }

    #[test]
    fn a_lifetime_is_a_duration_a_number_of_seconds_or_a_time() {
        let lifetime = |fields: &str| {
            let line = format!("{{\"key\":\"k\",\"value\":\"\",{fields}}}");
            read(&line).map(|read| read.lifetime).map_err(|error| error.reason)
        };
        assert_eq!(lifetime("\"ttl\":\"1m\""), Ok(Lifetime::For(Duration::from_secs(60))));
        assert_eq!(lifetime("\"ttl\":1.5"), Ok(Lifetime::For(Duration::from_millis(1500))));
        assert_eq!(lifetime("\"tags\":[\"t\"]"), Ok(Lifetime::Endless));
        for wrong in [
            "\"ttl\":0",
            "\"ttl\":\"101years\"",
            "\"ttl\":-1",
            "\"ttl\":\"soon\"",
            "\"expire_time\":\"tomorrow\"",
            "\"ttl\":1,\"expire_time\":\"2030-01-01T00:00:00Z\"",
        ] {
            assert!(lifetime(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_record_says_why_and_of_which_key_as_far_as_that_goes() {
        for (line, key, part) in [
            ("", None, "EOF"),
            ("[]", None, ""),
            ("{\"value\":\"v\"}", None, "missing field `key`"),
            ("{\"key\":\"k\"}", Some("k"), "no value"),
            (
                "{\"key\":\"k\",\"value\":\"a\",\"value_base64\":\"YQ==\"}",
                Some("k"),
                "two values",
            ),
            ("{\"key\":\"k\",\"value_base64\":\"*\"}", Some("k"), "no base64"),
            (
                "{\"key\":\"k\",\"value\":\"a\",\"vaule\":\"b\"}",
                None,
                "unknown field, expected one of `key`",
            ),
            ("{\"key\":\"k\",\"value\":\"a\"} x", None, "at column"),
        ] {
            let error = read(line).expect_err(line);
            assert_eq!(error.key.as_deref(), key, "{line}");
            assert!(error.reason.contains(part), "{line}: {}", error.reason);
            assert!(!error.reason.contains("line 1"), "{}", error.reason);
        }
        for line in [
            "{\"key\":\"k\",\"value\":\"a\",\"tags\":\"secret\"}",
            "{\"key\":\"k\",\"value\":\"a\",\"ttl\":\"1secret\"}",
            "{\"key\":\"k\",\"value\":\"a\",\"secret\":1}",
            "\"secret\"",
        ] {
            let error = read(line).expect_err(line);
            assert!(!error.reason.contains("secret"), "{}", error.reason);
        }
    }
}
