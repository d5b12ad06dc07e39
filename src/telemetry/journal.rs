//! What the journal tells about itself.
//!
//! Owns the metrics' names and help. Does not own what is counted (`queue/journal`).

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// What the journal counts.
#[derive(Debug, Clone)]
pub struct JournalMetrics {
    /// The length of its files.
    pub bytes: Gauge,
    /// What its live records take of them.
    pub live_bytes: Gauge,
    /// Segments that hold records.
    pub segments: Gauge,
    /// Syncs of groups.
    pub syncs: Counter,
    /// How long each of them took.
    pub sync_duration: Histogram,
    /// Records of each group.
    pub group_records: Histogram,
    /// Bytes of each group.
    pub group_bytes: Histogram,
    /// Records copied out of the oldest segment, so that it can be freed.
    pub moved: Counter,
    /// Whether appends wait for space: 1 while they do.
    pub stalled: Gauge,
    /// Whether it has failed for good: 1 once it has.
    pub poisoned: Gauge,
    /// How long its recovery took at the start.
    pub recovery_duration: Gauge<f64, AtomicU64>,
}

impl Default for JournalMetrics {
    fn default() -> JournalMetrics {
        JournalMetrics {
            bytes: Gauge::default(),
            live_bytes: Gauge::default(),
            segments: Gauge::default(),
            syncs: Counter::default(),
            sync_duration: Histogram::new(exponential_buckets(0.000_03, 2.0, 20)),
            group_records: Histogram::new(exponential_buckets(1.0, 2.0, 14)),
            group_bytes: Histogram::new(exponential_buckets(64.0, 4.0, 10)),
            moved: Counter::default(),
            stalled: Gauge::default(),
            poisoned: Gauge::default(),
            recovery_duration: Gauge::default(),
        }
    }
}

impl JournalMetrics {
    /// Registers every metric.
    pub fn register(registry: &mut Registry) -> JournalMetrics {
        let metrics = JournalMetrics::default();
        registry.register_with_unit(
            "journal_files",
            "Length of the journal's files",
            Unit::Bytes,
            metrics.bytes.clone(),
        );
        registry.register_with_unit(
            "journal_live",
            "Bytes of the journal's records that the store is not known to have",
            Unit::Bytes,
            metrics.live_bytes.clone(),
        );
        registry.register(
            "journal_segments",
            "Segments of the journal that hold records",
            metrics.segments.clone(),
        );
        registry.register(
            "journal_syncs",
            "Syncs of a group of the journal",
            metrics.syncs.clone(),
        );
        registry.register_with_unit(
            "journal_sync_duration",
            "Time of a sync of a group of the journal",
            Unit::Seconds,
            metrics.sync_duration.clone(),
        );
        registry.register(
            "journal_group_records",
            "Records of a group of the journal",
            metrics.group_records.clone(),
        );
        registry.register(
            "journal_group_bytes",
            "Bytes of a group of the journal",
            metrics.group_bytes.clone(),
        );
        registry.register(
            "journal_moved_records",
            "Records copied out of the journal's oldest segment so that it can be freed",
            metrics.moved.clone(),
        );
        registry.register(
            "journal_stalled",
            "Whether writes wait for space in the journal",
            metrics.stalled.clone(),
        );
        registry.register(
            "journal_poisoned",
            "Whether the journal has failed, so that it takes no more writes until a restart",
            metrics.poisoned.clone(),
        );
        registry.register_with_unit(
            "journal_recovery_duration",
            "Time that reading the journal took at the start",
            Unit::Seconds,
            metrics.recovery_duration.clone(),
        );
        metrics
    }
}
