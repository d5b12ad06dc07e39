//! What a gateway tells of itself by namespace: what its threads have counted, what L1 has evicted, what is pending.
//!
//! Owns the bringing together of those three, and what is a hit. Does not own the counting ([`crate::telemetry::namespaces`]). Invariant:
//! hits, misses and reads of the store are all the reads that were answered, each one of the three.

pub use crate::queue::QueueStats;

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::{Found, Gateway, ReadConsistency};
use crate::{
    error::Error,
    model::{Key, Source, Timestamp},
    telemetry::{
        calls::CallMetrics,
        namespaces::{Answered, Counted, First, NAMESPACES_MAX, OTHERS},
    },
};

/// What is known of one namespace, or of several together.
#[derive(Debug, Clone, Default)]
pub struct NamespaceStats {
    /// What the threads have counted.
    pub counted: Counted,
    /// Copies that left L1 to make room.
    pub evictions: u64,
    /// What is pending.
    pub pending: QueueStats,
    /// Since when the drain is paused; `None` of several together.
    pub paused_since: Option<Timestamp>,
}

/// How one tier answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Reads that it answered.
    pub hits: u64,
    /// Reads that asked it, and then a slower tier that answered.
    pub misses: u64,
    /// Hits that said that the key is absent.
    pub negative_hits: u64,
}

/// What is told of a gateway.
#[derive(Debug)]
pub struct Stats {
    /// By name; those least used together as [`OTHERS`], beyond [`NAMESPACES_MAX`].
    pub namespaces: BTreeMap<String, NamespaceStats>,
    /// All of them together.
    pub total: NamespaceStats,
    /// Whether there is an L2: where there is none, no read asked it.
    pub has_redis: bool,
    /// The copies in L1.
    pub memory_entries: usize,
    /// What they weigh, in bytes.
    pub memory_bytes: u64,
}

impl NamespaceStats {
    /// How a tier answered.
    pub fn tier(&self, tier: Source) -> TierStats {
        let hits = self.answers(|answered| answered.source == tier);
        let misses = self.answers(|answered| asked(answered, tier) && answered.source != tier);
        let negative_hits = self.answers(|answered| answered.source == tier && answered.absent);
        TierStats {
            hits,
            misses,
            negative_hits,
        }
    }

    /// Reads that a cache, or a pending write, could answer and did.
    pub fn hits(&self) -> u64 {
        self.answers(is_hit)
    }

    /// Reads that a cache could answer and did not.
    pub fn misses(&self) -> u64 {
        self.answers(|answered| answered.first != First::Store && answered.source == Source::Store)
    }

    /// Reads that asked for the store.
    pub fn store_reads(&self) -> u64 {
        self.answers(|answered| answered.first == First::Store)
    }

    /// Hits that said that the key is absent.
    pub fn negative_hits(&self) -> u64 {
        self.answers(|answered| is_hit(answered) && answered.absent)
    }

    fn answers(&self, wanted: impl Fn(Answered) -> bool) -> u64 {
        Answered::all()
            .filter(|answered| wanted(*answered))
            .map(|answered| self.counted.answered(answered))
            .sum()
    }

    fn add(&mut self, other: &NamespaceStats) {
        self.counted.add(&other.counted);
        self.evictions += other.evictions;
        self.pending.entries += other.pending.entries;
        self.pending.bytes += other.pending.bytes;
        self.pending.oldest_age = self.pending.oldest_age.max(other.pending.oldest_age);
    }
}

fn is_hit(answered: Answered) -> bool {
    answered.first != First::Store && answered.source != Source::Store
}

/// Whether a read that was answered so had asked a tier. What is pending and Redis are asked together, and a pending answer says nothing
/// of Redis; a read of the store is overlaid with what is pending, and asks no cache.
fn asked(Answered { first, source, .. }: Answered, tier: Source) -> bool {
    match tier {
        Source::L1 => first == First::L1,
        Source::Pending => source != Source::L1,
        Source::L2 => first != First::Store && matches!(source, Source::L2 | Source::Store),
        Source::Store => source == Source::Store,
    }
}

impl Gateway {
    /// What this gateway can tell, given what its threads have counted; of one namespace if it is named.
    pub fn stats(&self, calls: &CallMetrics, namespace: Option<&str>) -> Stats {
        let mut all = BTreeMap::<String, NamespaceStats>::new();
        for (name, counted) in calls.namespaces() {
            all.entry(name).or_default().counted = counted;
        }
        for (name, evictions) in self.parts().memory.evictions() {
            all.entry(name).or_default().evictions = evictions;
        }
        for (name, pending) in self.parts().queue.stats_by_namespace() {
            all.entry(name).or_default().pending = pending;
        }
        for (name, since) in self.paused() {
            all.entry(name).or_default().paused_since = Some(since);
        }
        if let Some(namespace) = namespace {
            all.retain(|name, _| name == namespace);
        }
        let mut total = NamespaceStats::default();
        all.values().for_each(|stats| total.add(stats));
        Stats {
            namespaces: bounded(all),
            total,
            has_redis: self.inner.redis.is_some(),
            memory_entries: self.parts().memory.len(),
            memory_bytes: self.parts().memory.bytes(),
        }
    }

    pub(super) fn count_read(
        &self,
        key: &Key,
        consistency: ReadConsistency,
        found: &Result<Found, Error>,
        started: Instant,
    ) {
        let first = match consistency {
            ReadConsistency::Cached => First::L1,
            ReadConsistency::Shared => First::Shared,
            ReadConsistency::Store => First::Store,
        };
        let answered = found.as_ref().ok().map(|found| Answered {
            first,
            source: found.source,
            absent: found.entry.is_none(),
        });
        let counters = &self.inner.counters;
        if let Some(Answered { source, .. }) = answered {
            counters.answered(source);
        }
        counters.namespaces.read(key.namespace(), answered, started.elapsed());
    }
}

/// The namespaces most used; the others together. Each thread has its own bound, and what is pending none but the queue's.
fn bounded(mut all: BTreeMap<String, NamespaceStats>) -> BTreeMap<String, NamespaceStats> {
    if all.len() <= NAMESPACES_MAX {
        return all;
    }
    let mut others = all.remove(OTHERS).unwrap_or_default();
    let use_of = |stats: &NamespaceStats| (stats.counted.calls(), stats.pending.entries);
    let mut by_use: Vec<_> = all.iter().map(|(name, stats)| (use_of(stats), name.clone())).collect();
    by_use.sort_unstable();
    let beyond = by_use.len().saturating_sub(NAMESPACES_MAX);
    for (_, name) in &by_use[..beyond] {
        others.add(&all.remove(name).unwrap_or_default());
    }
    all.insert(OTHERS.to_owned(), others);
    all
}
