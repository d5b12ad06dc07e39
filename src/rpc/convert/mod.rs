//! Proto to model and back: all validation of what callers send.
//!
//! Owns which field breaks which rule, and says all of them at once. Decides nothing else. Here are the rules of fields that several
//! messages have; `read`, `watch` and `write` have the messages. Invariant: what leaves here towards the gateway is valid; a request that is not
//! changes nothing.

mod read;
#[cfg(test)]
mod tests;
mod watch;
mod write;

use std::{borrow::Cow, time::Duration};

use prost_types::Timestamp as ProtoTimestamp;

pub(crate) use self::{
    read::{batch_get, batch_get_response, get, get_response, scan, scan_response},
    watch::{watch, watch_response},
    write::{
        AwaitedWrite, await_persisted, batch_write, delete, delete_response, increment, increment_response, item, put,
        put_response, touch, touch_response, write_result,
    },
};
use crate::{
    error::FieldViolation,
    model::{Key, Timestamp, check_namespace},
};

/// The longest duration of a request: a hundred years of days. A longer one is a mistake of units.
const DURATION_DAYS_MAX: u64 = 36_525;
const DURATION_MAX: Duration = Duration::from_secs(DURATION_DAYS_MAX * 24 * 3600);

/// How many keys a request may name, and how many writes it may hold.
const BATCH_MAX: usize = 1_000;

/// How many keys of one request are blamed by name: the details of a status travel in a header, which clients bound.
const BLAMED_MAX: usize = 10;

/// The most bytes of values in one answer: with all that is beside them, below the 4 MiB that a client of gRPC reads by default.
const ANSWER_BYTES_MAX: usize = 3 * 1024 * 1024;

pub(crate) fn timestamp(time: Timestamp) -> ProtoTimestamp {
    ProtoTimestamp {
        seconds: time.0.div_euclid(1000),
        // Below a thousand million.
        nanos: (time.0.rem_euclid(1000) * 1_000_000) as i32,
    }
}

fn key(namespace: &str, key: &str, violations: &mut Vec<FieldViolation>) -> Option<Key> {
    Key::new(namespace, key)
        .map_err(|invalid| {
            if let Some(description) = invalid.namespace {
                violate(violations, "namespace", description);
            }
            if let Some(description) = invalid.key {
                violate(violations, "key", description);
            }
        })
        .ok()
}

fn namespace(namespace: &str, violations: &mut Vec<FieldViolation>) {
    check_namespace(namespace).unwrap_or_else(|rule| violate(violations, "namespace", rule));
}

/// What keys begin with, of a namespace that is valid. A prefix that is no key is the empty one, or too long, or holds what no key does.
fn prefix(prefix: &str, violations: &mut Vec<FieldViolation>) {
    if let Err(invalid) = Key::new("n", prefix)
        && let Some(rule) = invalid.key.filter(|_| !prefix.is_empty())
    {
        violate(violations, "prefix", rule);
    }
}

/// A ttl, rounded up to a millisecond: a record must not vanish sooner than it was promised.
fn ttl(ttl: Option<prost_types::Duration>, violations: &mut Vec<FieldViolation>) -> Option<Duration> {
    let ttl = duration("ttl", ttl?, "leave it out for a record without expiry", violations)?;
    let millis = ttl.as_nanos().div_ceil(1_000_000);
    Some(Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)))
}

/// A duration of more than zero; `unset` says what to do instead of sending none.
fn duration(
    field: &'static str,
    given: prost_types::Duration,
    unset: &str,
    violations: &mut Vec<FieldViolation>,
) -> Option<Duration> {
    let prost_types::Duration { seconds, nanos } = given;
    let ill_formed =
        !(-999_999_999..=999_999_999).contains(&nanos) || (seconds > 0 && nanos < 0) || (seconds < 0 && nanos > 0);
    if ill_formed {
        let description = "nanos must be within a second and have the sign of seconds";
        violate(violations, field, description);
        return None;
    }
    if seconds < 0 || nanos < 0 || (seconds == 0 && nanos == 0) {
        violate(violations, field, format!("must be more than zero; {unset}"));
        return None;
    }
    let duration = Duration::new(seconds.unsigned_abs(), nanos.unsigned_abs());
    if duration > DURATION_MAX {
        violate(violations, field, format!("must be at most {DURATION_DAYS_MAX} days"));
        return None;
    }
    Some(duration)
}

pub(crate) fn violate(
    violations: &mut Vec<FieldViolation>,
    field: impl Into<Cow<'static, str>>,
    description: impl Into<Cow<'static, str>>,
) {
    violations.push(FieldViolation {
        field: field.into(),
        description: description.into(),
    });
}
