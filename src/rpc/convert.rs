//! Proto to model and back: all validation of what callers send.
//!
//! Owns which field breaks which rule, and says all of them at once. Decides nothing else. Invariant: what leaves here towards the
//! gateway is valid; a request that is not changes nothing.

use std::{borrow::Cow, time::Duration};

use bytes::Bytes;
use prost_types::Timestamp as ProtoTimestamp;

use crate::{
    error::{Error, FieldViolation},
    gateway::{Durability, Found, Freshness, ReadConsistency, ReadOptions, WriteRequest, Written},
    model::{Key, Source, Tags, Timestamp, Version},
    namespace::WriteMode,
    rpc::proto,
};

/// The longest duration of a request: a hundred years of days. A longer one is a mistake of units.
const DURATION_DAYS_MAX: u64 = 36_525;
const DURATION_MAX: Duration = Duration::from_secs(DURATION_DAYS_MAX * 24 * 3600);

/// Values from this size on keep the buffer they were received in: it was grown for them. Smaller ones are copied, for a slice of
/// a shared buffer would keep all of it.
const KEEP_BUFFER_BYTES: usize = 16 * 1024;

pub(crate) fn get(request: &proto::GetRequest) -> Result<(Key, ReadOptions), Error> {
    let mut violations = Vec::new();
    let key = key(&request.namespace, &request.key, &mut violations);
    let consistency = consistency(request.consistency, &mut violations);
    let max_staleness = request.max_staleness.and_then(|max| {
        let unset = "leave it out to take any age that the consistency allows";
        duration("max_staleness", max, unset, &mut violations)
    });
    let min_version = min_version(request.min_version, &mut violations);
    match (key, consistency) {
        (Some(key), Some(consistency)) if violations.is_empty() => {
            let freshness = Freshness {
                max_staleness,
                min_version,
            };
            Ok((key, ReadOptions { consistency, freshness }))
        }
        _ => Err(Error::invalid(violations)),
    }
}

pub(crate) fn put(request: proto::PutRequest, value_bytes_max: usize) -> Result<WriteRequest, Error> {
    let mut violations = Vec::new();
    let key = key(&request.namespace, &request.key, &mut violations);
    if request.value.len() > value_bytes_max {
        let description = format!("must have at most {value_bytes_max} bytes, has {}", request.value.len());
        violate(&mut violations, "value", description);
    }
    let mode = write_mode(request.write_mode, &mut violations);
    let ttl = request.ttl.and_then(|ttl| self::ttl(ttl, &mut violations));
    let tags = tags(&request.tags, &mut violations);
    match key {
        Some(key) if violations.is_empty() => Ok(WriteRequest {
            key,
            value: Some(own(request.value)),
            ttl,
            tags,
            mode,
        }),
        _ => Err(Error::invalid(violations)),
    }
}

pub(crate) fn delete(request: &proto::DeleteRequest) -> Result<WriteRequest, Error> {
    let mut violations = Vec::new();
    let key = key(&request.namespace, &request.key, &mut violations);
    let mode = write_mode(request.write_mode, &mut violations);
    match key {
        Some(key) if violations.is_empty() => Ok(WriteRequest {
            key,
            value: None,
            tags: Tags::default(),
            ttl: None,
            mode,
        }),
        _ => Err(Error::invalid(violations)),
    }
}

pub(crate) fn get_response(found: Found) -> proto::GetResponse {
    let source = match found.source {
        Source::L1 => proto::Source::L1,
        Source::Pending => proto::Source::Pending,
        Source::L2 => proto::Source::L2,
        Source::Store => proto::Source::Store,
    };
    proto::GetResponse {
        entry: found.entry.and_then(|entry| {
            Some(proto::Entry {
                value: entry.value?,
                version: entry.version.get(),
                expire_time: entry.expires_at.map(timestamp),
            })
        }),
        source: source.into(),
        // A copy's age is far below the range of a proto Duration.
        age: prost_types::Duration::try_from(found.age).ok(),
        stale: found.stale,
    }
}

pub(crate) fn put_response(written: Written) -> proto::PutResponse {
    proto::PutResponse {
        version: written.version.get(),
        durability: durability(written.durability).into(),
    }
}

pub(crate) fn delete_response(written: Written) -> proto::DeleteResponse {
    proto::DeleteResponse {
        version: written.version.get(),
        durability: durability(written.durability).into(),
    }
}

fn durability(durability: Durability) -> proto::Durability {
    match durability {
        Durability::Store => proto::Durability::Store,
        Durability::Journal => proto::Durability::Journal,
        Durability::Memory => proto::Durability::Memory,
    }
}

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

fn consistency(number: i32, violations: &mut Vec<FieldViolation>) -> Option<ReadConsistency> {
    match proto::ReadConsistency::try_from(number) {
        Ok(proto::ReadConsistency::Unspecified | proto::ReadConsistency::Cached) => Some(ReadConsistency::Cached),
        Ok(proto::ReadConsistency::Shared) => Some(ReadConsistency::Shared),
        Ok(proto::ReadConsistency::Store) => Some(ReadConsistency::Store),
        Err(_) => {
            violate(violations, "consistency", format!("has no value {number}"));
            None
        }
    }
}

fn write_mode(number: i32, violations: &mut Vec<FieldViolation>) -> Option<WriteMode> {
    match proto::WriteMode::try_from(number) {
        Ok(proto::WriteMode::Unspecified) => None,
        Ok(proto::WriteMode::Through) => Some(WriteMode::Through),
        Ok(proto::WriteMode::Behind) => Some(WriteMode::Behind),
        Err(_) => {
            violate(violations, "write_mode", format!("has no value {number}"));
            None
        }
    }
}

/// A ttl, rounded up to a millisecond: a record must not vanish sooner than it was promised.
fn ttl(ttl: prost_types::Duration, violations: &mut Vec<FieldViolation>) -> Option<Duration> {
    let ttl = duration("ttl", ttl, "leave it out for a record without expiry", violations)?;
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

fn min_version(number: i64, violations: &mut Vec<FieldViolation>) -> Option<Version> {
    if number < 0 {
        let description = "must be a version that a write returned; leave it out, or 0, to ask for none";
        violate(violations, "min_version", description);
    }
    Version::new(number)
}

fn tags(tags: &[String], violations: &mut Vec<FieldViolation>) -> Tags {
    Tags::new(tags).unwrap_or_else(|broken| {
        for description in broken {
            violate(violations, "tags", description);
        }
        Tags::default()
    })
}

fn own(value: Bytes) -> Bytes {
    if value.len() < KEEP_BUFFER_BYTES {
        Bytes::copy_from_slice(&value)
    } else {
        value
    }
}

pub(crate) fn violate(
    violations: &mut Vec<FieldViolation>,
    field: &'static str,
    description: impl Into<Cow<'static, str>>,
) {
    violations.push(FieldViolation {
        field,
        description: description.into(),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put_request() -> proto::PutRequest {
        proto::PutRequest {
            namespace: "orders".into(),
            key: "k".into(),
            value: Bytes::from_static(b"v"),
            ..proto::PutRequest::default()
        }
    }

    fn fields(error: &Error) -> Vec<&'static str> {
        error.violations().iter().map(|violation| violation.field).collect()
    }

    fn ttl(seconds: i64, nanos: i32) -> Result<WriteRequest, Error> {
        let ttl = Some(prost_types::Duration { seconds, nanos });
        put(proto::PutRequest { ttl, ..put_request() }, 10)
    }

    #[test]
    fn every_field_at_fault_is_named_at_once() {
        let request = proto::PutRequest {
            namespace: "Orders".into(),
            key: "a\0b".into(),
            value: Bytes::from_static(b"12345678901"),
            write_mode: 7,
            ttl: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
            tags: vec![String::new(), "fine".into(), "a\0b".into()],
        };
        let error = put(request, 10).expect_err("all wrong");
        let wrong = ["namespace", "key", "value", "write_mode", "ttl", "tags", "tags"];
        assert_eq!(fields(&error), wrong);
    }

    #[test]
    fn tags_are_joined_and_go_with_the_write() {
        let tagged = proto::PutRequest {
            tags: vec!["b".into(), "a".into(), "b".into()],
            ..put_request()
        };
        let write = put(tagged, 10).expect("valid");
        assert_eq!(write.tags.iter().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn a_ttl_is_positive_well_formed_and_within_a_century() {
        for (seconds, nanos) in [
            (0, 0),
            (-1, 0),
            (0, -1),
            (1, -1),
            (1, 1_000_000_000),
            (i64::MAX, 0),
            (i64::MIN, 0),
        ] {
            assert_eq!(
                fields(&ttl(seconds, nanos).expect_err("bad")),
                ["ttl"],
                "{seconds} {nanos}"
            );
        }
        let max = i64::try_from(DURATION_MAX.as_secs()).expect("fits");
        assert!(ttl(max, 0).is_ok() && ttl(max, 1).is_err());
    }

    #[test]
    fn a_read_s_options_are_positive_and_all_named() {
        let request = |max_staleness: Option<(i64, i32)>, min_version| proto::GetRequest {
            namespace: "orders".into(),
            key: "k".into(),
            max_staleness: max_staleness.map(|(seconds, nanos)| prost_types::Duration { seconds, nanos }),
            min_version,
            ..proto::GetRequest::default()
        };
        let (_, options) = get(&request(None, 0)).expect("valid");
        assert_eq!(options, ReadConsistency::Cached.into());
        let (_, options) = get(&request(Some((0, 1)), 7)).expect("valid");
        assert_eq!(options.freshness.max_staleness, Some(Duration::from_nanos(1)));
        assert_eq!(options.freshness.min_version, Version::new(7));
        let seconds_max = i64::try_from(DURATION_MAX.as_secs()).expect("fits");
        assert!(get(&request(Some((seconds_max, 0)), i64::MAX)).is_ok());
        for (seconds, nanos) in [(0, 0), (-1, 0), (0, -1), (1, -1), (seconds_max, 1), (i64::MAX, 0)] {
            let error = get(&request(Some((seconds, nanos)), 0)).expect_err("bad");
            assert_eq!(fields(&error), ["max_staleness"], "{seconds} {nanos}");
        }
        let error = get(&request(Some((-1, 0)), -1)).expect_err("bad");
        assert_eq!(fields(&error), ["max_staleness", "min_version"]);
    }

    #[test]
    fn a_ttl_is_rounded_up_to_a_millisecond() {
        assert_eq!(ttl(0, 1).expect("valid").ttl, Some(Duration::from_millis(1)));
        assert_eq!(
            ttl(1, 1_000_001).expect("valid").ttl,
            Some(Duration::from_millis(1_002))
        );
    }

    #[test]
    fn an_empty_value_is_a_value_and_a_delete_has_none() {
        let empty = proto::PutRequest {
            value: Bytes::new(),
            ..put_request()
        };
        assert_eq!(put(empty, 10).expect("valid").value, Some(Bytes::new()));
        let request = proto::DeleteRequest {
            namespace: "a".into(),
            key: "b".into(),
            write_mode: 2,
        };
        let write = delete(&request).expect("valid");
        assert_eq!((write.value, write.mode), (None, Some(WriteMode::Behind)));
    }

    #[test]
    fn times_before_1970_keep_positive_nanos() {
        assert_eq!(
            timestamp(Timestamp(-1)),
            ProtoTimestamp {
                seconds: -1,
                nanos: 999_000_000
            }
        );
    }
}
