//! What the gateway tells about itself: every metric, by name; and its [`log`].
//!
//! Owns the metrics' names, help and labels, and their encoding for Prometheus. Does not decide anything. Invariants: no value, no key
//! and no credential becomes a label or a log field; labels are bounded sets. Hot counters are in [`calls`] and, by
//! namespace, in [`namespaces`], the journal's in [`journal`], those of watches in [`watch`].

pub mod calls;
pub mod journal;
pub mod log;
pub mod namespaces;
pub mod watch;

use std::fmt::Write as _;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{
        MetricType,
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::telemetry::{calls::CallMetrics, journal::JournalMetrics, watch::WatchMetrics};

/// Every metric of the process.
#[derive(Debug)]
pub struct Metrics {
    /// What is scraped.
    pub registry: Registry,
    /// What the serving threads count.
    pub calls: CallMetrics,
    /// What the caches count.
    pub cache: CacheMetrics,
    /// What the queue counts.
    pub queue: QueueMetrics,
    /// What the journal counts.
    pub journal: JournalMetrics,
    /// What the store's users count.
    pub store: StoreMetrics,
    /// What watches count.
    pub watch: WatchMetrics,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut registry = Registry::with_prefix("tidegate");
        let calls = CallMetrics::default();
        registry.register_collector(Box::new(calls.clone()));
        Metrics {
            calls,
            cache: CacheMetrics::register(&mut registry),
            queue: QueueMetrics::register(&mut registry),
            journal: JournalMetrics::register(&mut registry),
            store: StoreMetrics::register(&mut registry),
            watch: WatchMetrics::register(&mut registry),
            registry,
        }
    }
}

impl Metrics {
    /// Adds a metric that is read when it is scraped.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, read: impl Fn() -> f64 + Send + Sync + 'static) {
        self.registry.register_collector(Box::new(ReadGauge {
            name,
            help,
            read: Box::new(read),
        }));
    }
}

/// A gauge whose value is somebody else's state.
struct ReadGauge {
    name: &'static str,
    help: &'static str,
    read: Box<dyn Fn() -> f64 + Send + Sync>,
}

impl std::fmt::Debug for ReadGauge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl Collector for ReadGauge {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder
            .encode_descriptor(self.name, self.help, None, MetricType::Gauge)?
            .encode_gauge(&(self.read)())
    }
}

/// Which way a batch of writes came to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CommitPath {
    /// Callers wait for it.
    Through,
    /// The drain of the queue.
    Behind,
    /// The store decides.
    Decided,
}

impl EncodeLabelValue for CommitPath {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(match self {
            CommitPath::Through => "through",
            CommitPath::Behind => "behind",
            CommitPath::Decided => "decided",
        })
    }
}

/// The label of metrics by [`CommitPath`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CommitLabels {
    /// Which way.
    pub path: CommitPath,
}

/// What the store's users count.
#[derive(Debug, Clone)]
pub struct StoreMetrics {
    /// How long each commit took.
    pub commit_duration: Family<CommitLabels, Histogram>,
    /// How many writes each commit held.
    pub commit_batch: Family<CommitLabels, Histogram>,
    /// How long each load query took.
    pub load_duration: Histogram,
    /// How many keys each load query held.
    pub load_batch: Histogram,
    /// Tries of a commit after a failed one.
    pub retries: Family<CommitLabels, Counter>,
    /// Writes that lost to a newer version in the store.
    pub superseded: Family<CommitLabels, Counter>,
    /// Writes put in the dead-letter table.
    pub dead_letters: Counter,
    /// Tombstones and expired rows collected.
    pub collected: Counter,
}

impl StoreMetrics {
    /// Registers every metric.
    pub fn register(registry: &mut Registry) -> StoreMetrics {
        let durations = || Histogram::new(exponential_buckets(0.000_25, 2.0, 17));
        let sizes = || Histogram::new(exponential_buckets(1.0, 2.0, 14));
        let metrics = StoreMetrics {
            commit_duration: Family::new_with_constructor(durations),
            commit_batch: Family::new_with_constructor(sizes),
            load_duration: durations(),
            load_batch: sizes(),
            retries: Family::default(),
            superseded: Family::default(),
            dead_letters: Counter::default(),
            collected: Counter::default(),
        };
        registry.register_with_unit(
            "store_commit_duration",
            "Time of a commit in the store, by the way its writes came",
            Unit::Seconds,
            metrics.commit_duration.clone(),
        );
        registry.register(
            "store_commit_batch_writes",
            "Writes of a commit in the store",
            metrics.commit_batch.clone(),
        );
        registry.register_with_unit(
            "store_load_duration",
            "Time of a load query",
            Unit::Seconds,
            metrics.load_duration.clone(),
        );
        registry.register(
            "store_load_batch_keys",
            "Keys of a load query",
            metrics.load_batch.clone(),
        );
        registry.register(
            "store_commit_retries",
            "Commits tried again after a failure",
            metrics.retries.clone(),
        );
        registry.register(
            "store_superseded_writes",
            "Writes that lost to a newer version in the store",
            metrics.superseded.clone(),
        );
        registry.register(
            "store_dead_letters",
            "Writes that the store refuses for good, put in the dead-letter table",
            metrics.dead_letters.clone(),
        );
        registry.register(
            "store_collected_rows",
            "Tombstones and expired rows deleted after their retention",
            metrics.collected.clone(),
        );
        metrics
    }
}

/// What the queue counts.
#[derive(Debug, Clone, Default)]
pub struct QueueMetrics {
    /// Writes accepted into the queue.
    pub accepted: Counter,
    /// Accepted writes that replaced an older pending write of their key.
    pub coalesced: Counter,
    /// Writes that found the queue full.
    pub full: Counter,
}

impl QueueMetrics {
    /// Registers every metric.
    pub fn register(registry: &mut Registry) -> QueueMetrics {
        let metrics = QueueMetrics::default();
        registry.register(
            "queue_accepted_writes",
            "Writes accepted into the queue",
            metrics.accepted.clone(),
        );
        registry.register(
            "queue_coalesced_writes",
            "Accepted writes that replaced an older pending write of their key",
            metrics.coalesced.clone(),
        );
        registry.register(
            "queue_full_writes",
            "Writes that found the queue or the journal full",
            metrics.full.clone(),
        );
        metrics
    }
}

/// What the caches count off the hot path. Hits and misses are counted per serving thread.
#[derive(Debug, Clone, Default)]
pub struct CacheMetrics {
    /// Refreshes started before a copy's lifetime ended.
    pub refreshes: Counter,
    /// Refreshes not started because as many were running as may.
    pub refreshes_skipped: Counter,
    /// Loads that callers shared instead of starting their own.
    pub loads_joined: Counter,
    /// Reads answered from a copy past its lifetime, because the store did not answer.
    pub stale_answers: Counter,
    /// Calls to Redis that failed, and so were misses.
    pub redis_errors: Counter,
    /// Writes of which Redis could not be told, so that something older may stand there until it is repaired.
    pub redis_unpublished: Counter,
    /// Epochs of the shared copies that this replica has begun.
    pub epochs_moved: Counter,
    /// Whether Redis is held to be down, per connection: 1 while it is.
    pub redis_down: Gauge,
    /// Whether this process is subscribed to what other gateways write: 1 while it is.
    pub channel_up: Gauge,
    /// Subscriptions that were lost.
    pub channel_losses: Counter,
    /// Messages of other gateways.
    pub messages_heard: Counter,
    /// Messages of other gateways that were heeded.
    pub messages_heeded: Counter,
    /// Messages that no gateway of this format sends.
    pub messages_foreign: Counter,
}

impl CacheMetrics {
    /// Registers every metric.
    pub fn register(registry: &mut Registry) -> CacheMetrics {
        let metrics = CacheMetrics::default();
        registry.register(
            "cache_refreshes",
            "Copies renewed in the background before their lifetime ended",
            metrics.refreshes.clone(),
        );
        registry.register(
            "cache_refreshes_skipped",
            "Copies not renewed because as many renewals were running as may",
            metrics.refreshes_skipped.clone(),
        );
        registry.register(
            "cache_loads_joined",
            "Reads that shared another read's load",
            metrics.loads_joined.clone(),
        );
        registry.register(
            "cache_stale_answers",
            "Reads answered from a copy past its lifetime because the store did not answer",
            metrics.stale_answers.clone(),
        );
        registry.register(
            "redis_errors",
            "Calls to Redis that failed and so were misses",
            metrics.redis_errors.clone(),
        );
        registry.register(
            "redis_unpublished",
            "Writes of which Redis could not be told, and which are remembered until it was",
            metrics.redis_unpublished.clone(),
        );
        registry.register(
            "cache_epochs_moved",
            "Epochs of the shared copies that this replica has begun, because what is in Redis could not be trusted",
            metrics.epochs_moved.clone(),
        );
        registry.register(
            "redis_connections_down",
            "Connections to Redis that are held to be down",
            metrics.redis_down.clone(),
        );
        metrics.register_channel(registry);
        metrics
    }

    fn register_channel(&self, registry: &mut Registry) {
        registry.register(
            "invalidation_channel_up",
            "Whether this gateway is subscribed to what others write: 1 while it is",
            self.channel_up.clone(),
        );
        registry.register(
            "invalidation_channel_losses",
            "Subscriptions to what others write that were lost",
            self.channel_losses.clone(),
        );
        registry.register(
            "invalidation_messages_heard",
            "Messages of other gateways",
            self.messages_heard.clone(),
        );
        registry.register(
            "invalidation_messages_heeded",
            "Messages of other gateways that were heeded",
            self.messages_heeded.clone(),
        );
        registry.register(
            "invalidation_messages_foreign",
            "Messages that no gateway of this version sends, each of which costs the subscription",
            self.messages_foreign.clone(),
        );
    }
}
