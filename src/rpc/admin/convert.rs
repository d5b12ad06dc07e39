//! Proto to model and back, for operators: all validation of what they send, and their answers.
//!
//! Owns which field breaks which rule. Decides nothing else. Invariant: what leaves here towards the gateway is valid.

use std::time::Duration;

use crate::{
    error::{Error, FieldViolation},
    gateway::stats::{NamespaceStats, QueueStats, Stats, TierStats},
    model::{Source, Timestamp, check_namespace},
    rpc::{convert::timestamp, proto},
    telemetry::namespaces::{Latency, OTHERS},
};

/// The namespace that is asked for; `None`: all.
pub(super) fn stats(request: &proto::StatsRequest) -> Result<Option<&str>, Error> {
    if request.namespace.is_empty() {
        return Ok(None);
    }
    match check_namespace(&request.namespace) {
        Ok(()) => Ok(Some(&request.namespace)),
        Err(description) => Err(Error::invalid(vec![FieldViolation {
            field: "namespace",
            description: description.into(),
        }])),
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
        pending_writes: Some(pending_stats(stats.pending)),
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

fn pending_stats(pending: QueueStats) -> proto::PendingStats {
    proto::PendingStats {
        entries: pending.entries as u64,
        bytes: pending.bytes as u64,
        oldest_age: (pending.entries > 0).then_some(pending.oldest_age).and_then(duration),
    }
}

/// All of ours are far below the range of a proto Duration.
fn duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}
