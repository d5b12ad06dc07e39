//! Proto to model and back, for operators: all validation of what they send, and their answers.
//!
//! Owns which field breaks which rule. Decides nothing else. What concerns the queue and settings is in `steer`, dead letters are in [`letters`].
//! Invariant: what leaves here towards the gateway is valid.

pub(super) mod letters;
mod steer;

pub(super) use self::steer::{log_level, log_level_response, namespaces_response, pending_of, queue, queue_response};

use std::time::Duration;

use crate::{
    error::{Error, FieldViolation},
    gateway::{
        invalidate::{Invalidated, Target},
        stats::{NamespaceStats, QueueStats, Stats, TierStats},
        warm::{Progress, Wanted},
    },
    model::{Key, Source, Timestamp, check_namespace, check_tag},
    namespace::WARM_RECORDS_MAX,
    rpc::{
        convert::{timestamp, violate},
        proto,
    },
    telemetry::namespaces::{Latency, OTHERS},
};

/// How many keys a request may name.
const KEYS_MAX: usize = 1_000;

/// The namespace that is asked for; `None`: all.
pub(super) fn namespace(namespace: &str) -> Result<Option<&str>, Error> {
    if namespace.is_empty() {
        return Ok(None);
    }
    check_one_namespace(namespace)?;
    Ok(Some(namespace))
}

/// Checks the namespace that is meant, where one has to be.
pub(super) fn check_one_namespace(namespace: &str) -> Result<(), Error> {
    check_namespace(namespace).map_err(|rule| {
        let mut violations = Vec::new();
        violate(&mut violations, "namespace", rule);
        Error::invalid(violations)
    })
}

pub(super) fn invalidate(request: proto::InvalidateRequest) -> Result<Target, Error> {
    let mut violations = Vec::new();
    check_namespace(&request.namespace).unwrap_or_else(|rule| violate(&mut violations, "namespace", rule));
    let chosen = chosen(
        &[
            ("keys", !request.keys.is_empty()),
            ("prefix", !request.prefix.is_empty()),
            ("tag", !request.tag.is_empty()),
            ("whole_namespace", request.whole_namespace),
        ],
        &mut violations,
    );
    let keys = keys(&request.namespace, &request.keys, &mut violations);
    check_prefix(&request.prefix, &mut violations);
    if !request.tag.is_empty() {
        check_tag(&request.tag).unwrap_or_else(|rule| violate(&mut violations, "tag", rule));
    }
    if !violations.is_empty() {
        return Err(Error::invalid(violations));
    }
    let namespace = request.namespace;
    Ok(match chosen {
        Some("keys") => Target::Keys(keys),
        Some("prefix") => Target::Prefix {
            namespace,
            prefix: request.prefix,
        },
        Some("tag") => Target::Tag {
            namespace,
            tag: request.tag,
        },
        _ => Target::Namespace(namespace),
    })
}

pub(super) fn invalidate_response(invalidated: Invalidated) -> proto::InvalidateResponse {
    proto::InvalidateResponse {
        keys: invalidated.keys,
        memory_copies: invalidated.memory_copies,
    }
}

pub(super) fn warm(request: proto::WarmRequest) -> Result<Wanted, Error> {
    let mut violations = Vec::new();
    check_namespace(&request.namespace).unwrap_or_else(|rule| violate(&mut violations, "namespace", rule));
    let chosen = chosen(
        &[
            ("keys", !request.keys.is_empty()),
            ("prefix", !request.prefix.is_empty()),
            ("newest", request.newest > 0),
        ],
        &mut violations,
    );
    let keys = keys(&request.namespace, &request.keys, &mut violations);
    check_prefix(&request.prefix, &mut violations);
    if request.newest > WARM_RECORDS_MAX {
        violate(&mut violations, "newest", format!("must be at most {WARM_RECORDS_MAX}"));
    }
    if !violations.is_empty() {
        return Err(Error::invalid(violations));
    }
    let namespace = request.namespace;
    Ok(match chosen {
        Some("keys") => Wanted::Keys(keys),
        Some("prefix") => Wanted::Prefix {
            namespace,
            prefix: request.prefix,
        },
        _ => Wanted::Newest {
            namespace,
            records: request.newest,
        },
    })
}

pub(super) fn warm_response(progress: Progress) -> proto::WarmResponse {
    proto::WarmResponse {
        done: progress.done,
        total: progress.total,
        failed: progress.failed,
        limit_reached: progress.limit_reached,
    }
}

/// The one field that is given of those of which exactly one must be. An empty text is not given.
fn chosen(fields: &[(&'static str, bool)], violations: &mut Vec<FieldViolation>) -> Option<&'static str> {
    let mut given = fields.iter().filter(|(_, given)| *given).map(|(field, _)| *field);
    let Some(first) = given.next() else {
        if let [(field, _), others @ ..] = fields {
            let others: Vec<&str> = others.iter().map(|(field, _)| *field).collect();
            violate(
                violations,
                *field,
                format!("or {} must be given, and not empty", others.join(" or ")),
            );
        }
        return None;
    };
    for field in given {
        violate(violations, field, format!("must not be given together with {first}"));
    }
    Some(first)
}

/// The keys. Of those that break a rule, the first is told by its number: there may be a thousand.
fn keys(namespace: &str, keys: &[String], violations: &mut Vec<FieldViolation>) -> Vec<Key> {
    if keys.len() > KEYS_MAX {
        let description = format!("must be at most {KEYS_MAX}, are {}", keys.len());
        violate(violations, "keys", description);
        return Vec::new();
    }
    let mut valid = Vec::with_capacity(keys.len());
    for (index, key) in keys.iter().enumerate() {
        match Key::new(namespace, key) {
            Ok(key) => valid.push(key),
            Err(invalid) => {
                if let Some(rule) = invalid.key {
                    violate(
                        violations,
                        "keys",
                        format!("must be keys, and number {} {rule}", index + 1),
                    );
                    break;
                }
            }
        }
    }
    valid
}

/// A prefix, unless it is not given, has to follow the rules of a key.
fn check_prefix(prefix: &str, violations: &mut Vec<FieldViolation>) {
    if prefix.is_empty() {
        return;
    }
    // Of a namespace that is valid.
    if let Err(invalid) = Key::new("n", prefix)
        && let Some(rule) = invalid.key
    {
        violate(violations, "prefix", rule);
    }
}

pub(super) fn stats_response(mut stats: Stats, started: Timestamp) -> proto::StatsResponse {
    let others = stats.namespaces.remove_entry(OTHERS);
    let namespaces = stats
        .namespaces
        .iter()
        .chain(others.as_ref().map(|(name, stats)| (name, stats)));
    proto::StatsResponse {
        start_time: Some(timestamp(started)),
        namespaces: namespaces
            .map(|(name, namespace)| namespace_stats(name, namespace, stats.has_redis))
            .collect(),
        total: Some(namespace_stats("", &stats.total, stats.has_redis)),
        memory_entries: stats.memory_entries as u64,
        memory_bytes: stats.memory_bytes,
    }
}

fn namespace_stats(name: &str, stats: &NamespaceStats, has_redis: bool) -> proto::NamespaceStats {
    let counted = &stats.counted;
    proto::NamespaceStats {
        namespace: name.to_owned(),
        l1: Some(tier_stats(stats.tier(Source::L1))),
        pending: Some(tier_stats(stats.tier(Source::Pending))),
        l2: has_redis.then(|| tier_stats(stats.tier(Source::L2))),
        store: Some(tier_stats(stats.tier(Source::Store))),
        hits: stats.hits(),
        misses: stats.misses(),
        store_reads: stats.store_reads(),
        read_failures: counted.read_failures(),
        hit_rate: rate(stats.hits(), stats.misses()),
        negative_hits: stats.negative_hits(),
        loads: counted.loads(),
        refreshes: counted.refreshes(),
        evictions: stats.evictions,
        read_latency: Some(latency_stats(counted.read_latency())),
        writes: counted.writes(),
        write_failures: counted.write_failures(),
        write_latency: Some(latency_stats(counted.write_latency())),
        pending_writes: Some(pending_stats(stats.pending, stats.paused_since)),
    }
}

fn tier_stats(stats: TierStats) -> proto::TierStats {
    proto::TierStats {
        hits: stats.hits,
        misses: stats.misses,
        hit_rate: rate(stats.hits, stats.misses),
        negative_hits: stats.negative_hits,
    }
}

fn rate(hits: u64, misses: u64) -> Option<f64> {
    (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64)
}

fn latency_stats(latency: Latency<'_>) -> proto::LatencyStats {
    let percentile = |percent| latency.percentile(percent).and_then(duration);
    proto::LatencyStats {
        count: latency.count(),
        average: latency.average().and_then(duration),
        p50: percentile(50),
        p90: percentile(90),
        p99: percentile(99),
    }
}

fn pending_stats(pending: QueueStats, paused_since: Option<Timestamp>) -> proto::PendingStats {
    proto::PendingStats {
        entries: pending.entries as u64,
        bytes: pending.bytes as u64,
        oldest_age: (pending.entries > 0).then_some(pending.oldest_age).and_then(duration),
        paused_since: paused_since.map(timestamp),
    }
}

/// All of ours are far below the range of a proto Duration.
fn duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields<T: std::fmt::Debug>(outcome: Result<T, Error>) -> Vec<String> {
        let error = outcome.expect_err("refused");
        error
            .violations()
            .iter()
            .map(|violation| violation.field.to_string())
            .collect()
    }

    fn invalidation() -> proto::InvalidateRequest {
        proto::InvalidateRequest {
            namespace: "orders".to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn exactly_one_thing_is_invalidated() {
        let keys = proto::InvalidateRequest {
            keys: vec!["a".to_owned(), "b".to_owned()],
            ..invalidation()
        };
        let expected = ["a", "b"].map(|key| Key::new("orders", key).expect("valid"));
        assert_eq!(invalidate(keys.clone()).expect("valid"), Target::Keys(expected.into()));
        let whole = proto::InvalidateRequest {
            whole_namespace: true,
            ..invalidation()
        };
        assert_eq!(
            invalidate(whole).expect("valid"),
            Target::Namespace("orders".to_owned())
        );
        assert_eq!(fields(invalidate(invalidation())), ["keys"]);
        let all = proto::InvalidateRequest {
            prefix: "a".to_owned(),
            tag: "t".to_owned(),
            whole_namespace: true,
            ..keys
        };
        assert_eq!(fields(invalidate(all)), ["prefix", "tag", "whole_namespace"]);
    }

    #[test]
    fn every_field_at_fault_is_named_once() {
        let bad = proto::InvalidateRequest {
            namespace: "Orders".to_owned(),
            keys: vec!["a".to_owned(), String::new(), "b\0".to_owned()],
            prefix: "\0".to_owned(),
            tag: "t".repeat(129),
            whole_namespace: false,
        };
        assert_eq!(
            fields(invalidate(bad)),
            ["namespace", "prefix", "tag", "keys", "prefix", "tag"]
        );
        let error = invalidate(proto::InvalidateRequest {
            keys: vec!["a".to_owned(); KEYS_MAX + 1],
            ..invalidation()
        });
        assert_eq!(fields(error), ["keys"]);
        let bad = proto::WarmRequest {
            namespace: "orders".to_owned(),
            newest: WARM_RECORDS_MAX + 1,
            ..Default::default()
        };
        assert_eq!(fields(warm(bad)), ["newest"]);
        assert_eq!(fields(warm(proto::WarmRequest::default())), ["namespace", "keys"]);
    }
}
