//! Get, BatchGet and Scan: what they ask for, and how they are answered.

use crate::{
    error::{Error, ErrorKind, FieldViolation},
    gateway::{
        Found, Freshness, ReadConsistency, ReadOptions,
        scan::{Page, ScanRequest},
    },
    model::{Entry, Key, Source, Version},
    rpc::{proto, status::to_failure},
};

use super::{ANSWER_BYTES_MAX, BATCH_MAX, BLAMED_MAX, duration, key, namespace, prefix, timestamp, violate};

/// The records of a page, unless the caller says how many.
const PAGE_SIZE_DEFAULT: i32 = 100;
const PAGE_SIZE_MAX: i32 = 1_000;

/// The bytes of a page, unless the caller says how many.
const PAGE_BYTES_DEFAULT: i32 = 1024 * 1024;
const PAGE_BYTES_MAX: i32 = 3 * 1024 * 1024;

/// The longest page token: ours hold a key at most, and what frames it.
const PAGE_TOKEN_BYTES_MAX: usize = 4 * 1024;

pub(crate) fn get(request: &proto::GetRequest) -> Result<(Key, ReadOptions), Error> {
    let mut violations = Vec::new();
    let key = key(&request.namespace, &request.key, &mut violations);
    let mut options = options(request.consistency, request.max_staleness, &mut violations);
    options.freshness.min_version = min_version(request.min_version, &mut violations);
    match key {
        Some(key) if violations.is_empty() => Ok((key, options)),
        _ => Err(Error::invalid(violations)),
    }
}

pub(crate) fn batch_get(request: &proto::BatchGetRequest) -> Result<(Vec<Key>, ReadOptions), Error> {
    let mut violations = Vec::new();
    namespace(&request.namespace, &mut violations);
    let keys = keys(&request.namespace, &request.keys, &mut violations);
    let options = options(request.consistency, request.max_staleness, &mut violations);
    if violations.is_empty() {
        Ok((keys, options))
    } else {
        Err(Error::invalid(violations))
    }
}

/// A page's request. What its token says the gateway judges: it alone makes them.
pub(crate) fn scan(request: proto::ScanRequest) -> Result<ScanRequest, Error> {
    let mut violations = Vec::new();
    namespace(&request.namespace, &mut violations);
    prefix(&request.prefix, &mut violations);
    let records_max = bounded(
        "page_size",
        request.page_size,
        PAGE_SIZE_DEFAULT,
        PAGE_SIZE_MAX,
        &mut violations,
    );
    let bytes_max = bounded(
        "page_bytes",
        request.page_bytes,
        PAGE_BYTES_DEFAULT,
        PAGE_BYTES_MAX,
        &mut violations,
    );
    if request.page_token.len() > PAGE_TOKEN_BYTES_MAX {
        let description = "must be the next_page_token of an earlier page; leave it out to begin anew";
        violate(&mut violations, "page_token", description);
    }
    if !violations.is_empty() {
        return Err(Error::invalid(violations));
    }
    Ok(ScanRequest {
        namespace: request.namespace,
        prefix: request.prefix,
        records_max,
        bytes_max,
        page_token: Some(request.page_token).filter(|token| !token.is_empty()),
        keys_only: request.keys_only,
        with_tags: request.with_tags,
    })
}

pub(crate) fn get_response(found: Found) -> proto::GetResponse {
    let source = match found.source {
        Source::L1 => proto::Source::L1,
        Source::Pending => proto::Source::Pending,
        Source::L2 => proto::Source::L2,
        Source::Store => proto::Source::Store,
    };
    proto::GetResponse {
        entry: found.entry.filter(|entry| entry.value.is_some()).map(entry),
        source: source.into(),
        // A copy's age is far below the range of a proto Duration.
        age: prost_types::Duration::try_from(found.age).ok(),
        stale: found.stale,
    }
}

/// The answers in their order, of which the values that no longer fit are left out, but for the first answer's.
pub(crate) fn batch_get_response(answers: Vec<Result<Found, Error>>) -> proto::BatchGetResponse {
    use proto::batch_get_result::Outcome;

    let mut room = ANSWER_BYTES_MAX;
    let answer = |(index, answer): (usize, Result<Found, Error>)| {
        let found = answer.and_then(|found| {
            let value = found.entry.as_ref().and_then(|entry| entry.value.as_ref());
            let bytes = value.map_or(0, bytes::Bytes::len);
            if bytes > room && index > 0 {
                let message =
                    format!("the answer holds {ANSWER_BYTES_MAX} bytes of values at most: ask for this key again");
                return Err(Error::new(ErrorKind::TooLarge, message));
            }
            room = room.saturating_sub(bytes);
            Ok(found)
        });
        proto::BatchGetResult {
            outcome: Some(match found {
                Ok(found) => Outcome::Found(get_response(found)),
                Err(error) => Outcome::Failure(to_failure(error)),
            }),
        }
    };
    proto::BatchGetResponse {
        results: answers.into_iter().enumerate().map(answer).collect(),
    }
}

pub(crate) fn scan_response(page: Page) -> proto::ScanResponse {
    // None where none were asked for.
    let mut tags = page.tags.into_iter();
    let record = |(key, found): (Key, Entry)| proto::ScanRecord {
        key: key.key().to_owned(),
        entry: Some(entry(found)),
        tags: tags.next().unwrap_or_default().iter().map(str::to_owned).collect(),
    };
    proto::ScanResponse {
        records: page.records.into_iter().map(record).collect(),
        next_page_token: page.next_page_token.unwrap_or_default(),
    }
}

/// An entry; one whose value was left out has an empty one.
pub(super) fn entry(entry: Entry) -> proto::Entry {
    proto::Entry {
        value: entry.value.unwrap_or_default(),
        version: entry.version.get(),
        expire_time: entry.expires_at.map(timestamp),
    }
}

/// The keys of a namespace that is valid; those of one that is not are judged all the same.
fn keys(namespace: &str, keys: &[String], violations: &mut Vec<FieldViolation>) -> Vec<Key> {
    if keys.is_empty() || keys.len() > BATCH_MAX {
        violate(
            violations,
            "keys",
            format!("must be 1 to {BATCH_MAX}, are {}", keys.len()),
        );
        return Vec::new();
    }
    let mut valid = Vec::with_capacity(keys.len());
    let mut broken = 0;
    for (index, key) in keys.iter().enumerate() {
        match Key::new(namespace, key) {
            Ok(key) => valid.push(key),
            Err(invalid) => {
                if let Some(rule) = invalid.key.filter(|_| broken < BLAMED_MAX) {
                    broken += 1;
                    violate(violations, format!("keys[{index}]"), rule);
                }
            }
        }
    }
    valid
}

fn options(
    number: i32,
    max_staleness: Option<prost_types::Duration>,
    violations: &mut Vec<FieldViolation>,
) -> ReadOptions {
    let consistency = consistency(number, violations);
    let max_staleness = max_staleness.and_then(|max| {
        let unset = "leave it out to take any age that the consistency allows";
        duration("max_staleness", max, unset, violations)
    });
    let freshness = Freshness {
        max_staleness,
        min_version: None,
    };
    ReadOptions { consistency, freshness }
}

fn consistency(number: i32, violations: &mut Vec<FieldViolation>) -> ReadConsistency {
    match proto::ReadConsistency::try_from(number) {
        Ok(proto::ReadConsistency::Unspecified | proto::ReadConsistency::Cached) => ReadConsistency::Cached,
        Ok(proto::ReadConsistency::Shared) => ReadConsistency::Shared,
        Ok(proto::ReadConsistency::Store) => ReadConsistency::Store,
        Err(_) => {
            violate(violations, "consistency", format!("has no value {number}"));
            ReadConsistency::Cached
        }
    }
}

fn min_version(number: i64, violations: &mut Vec<FieldViolation>) -> Option<Version> {
    if number < 0 {
        let description = "must be a version that a write returned; leave it out, or 0, to ask for none";
        violate(violations, "min_version", description);
    }
    Version::new(number)
}

/// A number from 1 to `max`; 0 stands for `default`.
fn bounded(field: &'static str, number: i32, default: i32, max: i32, violations: &mut Vec<FieldViolation>) -> usize {
    if !(0..=max).contains(&number) {
        violate(violations, field, format!("must be 1 to {max}, or 0 for {default}"));
    }
    let number = if number == 0 { default } else { number };
    usize::try_from(number).unwrap_or_default()
}
