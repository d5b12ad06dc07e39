//! What watches count: what watchers are told, and how often they are sent to look anew.
//!
//! Owns the metrics' names and help. Invariant: labels are of a bounded set, which the gateway owns.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// The label of rescans.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RescanLabels {
    /// Why.
    pub reason: &'static str,
}

/// What watches count.
#[derive(Debug, Clone, Default)]
pub struct WatchMetrics {
    /// Changes told, to each watcher.
    pub changes_told: Counter,
    /// Watchers told that changes may have been missed, by why.
    pub rescans: Family<RescanLabels, Counter>,
}

impl WatchMetrics {
    /// Registers every metric.
    pub fn register(registry: &mut Registry) -> WatchMetrics {
        let metrics = WatchMetrics::default();
        registry.register(
            "watch_changes_told",
            "Changes told to watchers, counted for each of them",
            metrics.changes_told.clone(),
        );
        registry.register(
            "watch_rescans",
            "Times a watcher was told that changes may have been missed, by why",
            metrics.rescans.clone(),
        );
        metrics
    }
}
