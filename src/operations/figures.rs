//! The numbers of the live page: one small JSON object, made from what `/metrics` and `tidegate stats` are made from.
//!
//! Owns which numbers the page has, and how often they are read. Owns no counter: everything is what somebody else counts, since the
//! start, and rates are the reader's to make from two readings. Keeps no history: each browser keeps its own, so that a gateway at which
//! nobody looks does nothing for the page and holds nothing for it; what must outlast a browser's tab is for Prometheus. Invariants:
//! however many look, the numbers are read at most once a second; an answer is shorter than [`BYTES_MAX`]; no key, no value and no
//! address is in it, and names of namespaces are the only words that callers choose.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Serialize;
use tokio::{sync::Mutex, time::Instant};

use crate::{
    gateway::{
        Gateway,
        stats::{NamespaceStats, QueueStats, Stats},
    },
    health::{Health, PartState},
    model::Source,
    telemetry::{
        CacheMetrics, Metrics, QueueMetrics, StoreMetrics,
        calls::{BUCKETS, CallMetrics, MethodCalls, bounds_micros},
    },
};

/// How old numbers may be that are told again instead of being read.
const EVERY: Duration = Duration::from_secs(1);

/// How many namespaces are told apart: those most used, and those with something pending before others as much used.
const NAMESPACES_MAX: usize = 20;

/// What an answer is shorter than.
pub const BYTES_MAX: usize = 32 << 10;

/// Where the numbers of one gateway are read.
pub struct Figures {
    gateway: Gateway,
    health: Health,
    calls: CallMetrics,
    cache: CacheMetrics,
    queue: QueueMetrics,
    store: StoreMetrics,
    started: Instant,
    /// Tells this process from the one before it, at the same address: what it has counted began anew.
    started_at: u64,
    /// What was pending when this began, less what it had counted of that by then.
    found_pending: i64,
    /// Held while the numbers are read, so that they are read once for all who ask meanwhile.
    last: Mutex<Option<Last>>,
}

/// What was read last.
struct Last {
    read: Instant,
    drained: u64,
    json: Bytes,
}

#[derive(Serialize)]
struct Reading<'a> {
    gateway: &'static str,
    started_unix_ms: u64,
    uptime_seconds: f64,
    ready: bool,
    parts: Vec<Part>,
    redis_connections_down: i64,
    calls_running: u64,
    /// Where the latency buckets of `calls` end; the last of them has no end.
    latency_bounds_micros: [u64; BUCKETS - 1],
    calls: Vec<Calls>,
    tiers: Vec<Tier>,
    pending: Pending,
    accepted: u64,
    refused: u64,
    drained: u64,
    dead_letters: u64,
    memory_entries: usize,
    memory_bytes: u64,
    namespaces: Vec<Namespace<'a>>,
    /// Those that are not in `namespaces`.
    namespaces_more: usize,
}

#[derive(Serialize)]
struct Part {
    part: &'static str,
    state: String,
    good: bool,
}

#[derive(Serialize)]
struct Calls {
    method: &'static str,
    ok: u64,
    failed: u64,
    latency: [u64; BUCKETS],
}

#[derive(Serialize)]
struct Tier {
    tier: &'static str,
    hits: u64,
    misses: u64,
}

#[derive(Serialize)]
struct Pending {
    entries: usize,
    bytes: usize,
    oldest_age_seconds: f64,
}

#[derive(Serialize)]
struct Namespace<'a> {
    name: &'a str,
    hits: u64,
    misses: u64,
    store_reads: u64,
    writes: u64,
    failed: u64,
    pending: Pending,
}

impl Figures {
    /// The numbers of a gateway from now on.
    pub fn new(gateway: Gateway, health: Health, metrics: &Metrics) -> Figures {
        let pending = gateway.stats(&metrics.calls, None).total.pending;
        // A clock before 1970 leaves two starts looking like one: the page then shows one odd point.
        let started_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Figures {
            found_pending: pending.entries as i64 - entered(&metrics.queue),
            gateway,
            health,
            calls: metrics.calls.clone(),
            cache: metrics.cache.clone(),
            queue: metrics.queue.clone(),
            store: metrics.store.clone(),
            started: Instant::now(),
            started_at: started_at.as_millis() as u64,
            last: Mutex::new(None),
        }
    }

    /// Whose numbers they are.
    pub(super) fn health(&self) -> &Health {
        &self.health
    }

    /// The numbers, at most [`EVERY`] old.
    ///
    /// # Errors
    /// They cannot be written as JSON, which does not happen.
    pub(super) async fn json(&self) -> Result<Bytes, serde_json::Error> {
        let mut last = self.last.lock().await;
        let now = Instant::now();
        if let Some(last) = last.as_ref().filter(|last| now - last.read < EVERY) {
            return Ok(last.json.clone());
        }
        let stats = self.gateway.stats(&self.calls, None);
        let drained = self.drained(&stats).max(last.as_ref().map_or(0, |last| last.drained));
        let json = Bytes::from(serde_json::to_vec(&self.read(&stats, now, drained))?);
        debug_assert!(json.len() < BYTES_MAX, "{} bytes", json.len());
        *last = Some(Last {
            read: now,
            drained,
            json: json.clone(),
        });
        Ok(json)
    }

    /// How many writes have left the queue: those that came less those that are there. The three are not counted at the same moment, so
    /// it may be a few off, and fall by as many.
    fn drained(&self, stats: &Stats) -> u64 {
        let left = self.found_pending + entered(&self.queue) - stats.total.pending.entries as i64;
        u64::try_from(left).unwrap_or(0)
    }

    fn read<'a>(&self, stats: &'a Stats, now: Instant, drained: u64) -> Reading<'a> {
        let readiness = self.health.readiness();
        let namespaces = most_used(stats);
        Reading {
            gateway: env!("CARGO_PKG_VERSION"),
            started_unix_ms: self.started_at,
            uptime_seconds: (now - self.started).as_secs_f64(),
            ready: readiness.ready,
            parts: readiness.parts().map(Part::from).into(),
            redis_connections_down: self.cache.redis_down.get(),
            calls_running: self.calls.running(),
            latency_bounds_micros: bounds_micros(),
            calls: self.calls.by_method().into_iter().map(Calls::from).collect(),
            tiers: tiers(stats),
            pending: Pending::from(&stats.total.pending),
            accepted: self.queue.accepted.get(),
            refused: self.queue.full.get(),
            drained,
            dead_letters: self.store.dead_letters.get(),
            memory_entries: stats.memory_entries,
            memory_bytes: stats.memory_bytes,
            namespaces_more: stats.namespaces.len() - namespaces.len(),
            namespaces,
        }
    }
}

/// Entries that came into the queue, those of an earlier process apart.
fn entered(queue: &QueueMetrics) -> i64 {
    queue.accepted.get() as i64 - queue.coalesced.get() as i64
}

fn tiers(stats: &Stats) -> Vec<Tier> {
    let tier = |tier, source| {
        let answered = stats.total.tier(source);
        Tier {
            tier,
            hits: answered.hits,
            misses: answered.misses,
        }
    };
    let mut tiers = vec![tier("l1", Source::L1), tier("pending", Source::Pending)];
    if stats.has_redis {
        tiers.push(tier("l2", Source::L2));
    }
    tiers.push(tier("store", Source::Store));
    tiers
}

fn most_used(stats: &Stats) -> Vec<Namespace<'_>> {
    let mut all: Vec<(&String, &NamespaceStats)> = stats.namespaces.iter().collect();
    // Stable: those used as much stand by name.
    all.sort_by_key(|(_, stats)| std::cmp::Reverse((stats.counted.calls(), stats.pending.entries)));
    all.truncate(NAMESPACES_MAX);
    all.into_iter()
        .map(|(name, stats)| Namespace {
            name,
            hits: stats.hits(),
            misses: stats.misses(),
            store_reads: stats.store_reads(),
            writes: stats.counted.writes(),
            failed: stats.counted.read_failures() + stats.counted.write_failures(),
            pending: Pending::from(&stats.pending),
        })
        .collect()
}

impl From<PartState> for Part {
    fn from(PartState { part, state, good }: PartState) -> Part {
        Part {
            part,
            state: state.into_owned(),
            good,
        }
    }
}

impl From<MethodCalls> for Calls {
    fn from(calls: MethodCalls) -> Calls {
        let MethodCalls {
            method,
            ok,
            failed,
            latency,
        } = calls;
        Calls {
            method,
            ok,
            failed,
            latency,
        }
    }
}

impl From<&QueueStats> for Pending {
    fn from(pending: &QueueStats) -> Pending {
        Pending {
            entries: pending.entries,
            bytes: pending.bytes,
            oldest_age_seconds: pending.oldest_age.as_secs_f64(),
        }
    }
}
