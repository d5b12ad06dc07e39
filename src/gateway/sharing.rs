//! What this process knows of what it shares with the other replicas, for all of its threads.
//!
//! Owns whether copies in Redis may be trusted: the epochs that hold, when the control row last said so, and what Redis has yet to be told.
//! Does not own the copies, nor who looks at the control row. Invariant: copies are read and filled only where everybody has
//! adopted the epoch, and this replica has nothing left to repair.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};
use std::time::Duration;

use tokio::sync::Notify;

use super::repairs::Repairs;
use crate::{
    cache::{epochs::Epochs, message::Origin},
    model::{Key, Timestamp, Version},
};

/// For how long after its move nobody reads or fills copies of an epoch: by then every replica that reaches the store goes by it, and no
/// write is published under the old one alone.
pub(super) const SETTLING: Duration = Duration::from_secs(3);

/// For how long copies are trusted after the last look at the control row, while the store is not held to be down: longer than it takes to
/// notice that it is, so that caches answer through all of its outage.
const CURRENT: Duration = Duration::from_secs(10);

/// For how long a look at the control row answers for the epoch: less than what passes between an epoch's moving and its first fill.
const EPOCH_KNOWN: Duration = Duration::from_secs(2);

/// What the gateways of all threads know.
#[derive(Debug)]
pub struct Sharing {
    /// Who this process is to the others.
    pub origin: Origin,
    /// The epochs that hold.
    pub epochs: Arc<Epochs>,
    /// Wakes who looks at the control row: it has changed.
    pub control_changed: Arc<Notify>,
    /// Up to which version rows without a trace may have been collected, as a number; 0 as long as that is not known.
    pub horizon: AtomicI64,
    /// When the control row was last asked.
    asked_at: AtomicI64,
    pub(super) repairs: Repairs,
    /// Wakes who publishes pending writes again.
    pub(super) renewal: Notify,
}

impl Sharing {
    /// The horizon of the collection, as far as it is known: of a key that the store has no row of, what is at or below it may have been collected.
    pub(super) fn known_horizon(&self) -> Option<Version> {
        Version::new(self.horizon.load(Ordering::Relaxed))
    }

    /// Nothing known, of a process that tells others apart by `prefix`.
    pub fn new(prefix: &str) -> Sharing {
        Sharing {
            origin: Origin::random(),
            epochs: Arc::new(Epochs::new(prefix)),
            control_changed: Arc::default(),
            horizon: AtomicI64::new(0),
            asked_at: AtomicI64::new(i64::MIN),
            repairs: Repairs::default(),
            renewal: Notify::new(),
        }
    }

    /// Whether the control row was looked at so lately that the epoch which this replica goes by may be taken to hold.
    pub(super) fn is_current(&self, now: Timestamp) -> bool {
        now.since(self.known_at()) <= CURRENT
    }

    /// Whether copies of a namespace in Redis may be read and filled, as far as its epoch goes.
    pub(super) fn is_readable(&self, namespace: &str, now: Timestamp) -> bool {
        self.repairs.is_empty()
            && self
                .epochs
                .adopted()
                .is_some_and(|adopted| adopted.is_readable(namespace, now))
    }

    /// The control row was asked at `now`, and what it said is adopted.
    pub(super) fn asked(&self, now: Timestamp) {
        self.asked_at.fetch_max(now.0, Ordering::AcqRel);
    }

    /// Whether this replica goes by what the control row said after `then`.
    pub(super) fn was_asked_after(&self, then: Timestamp) -> bool {
        self.asked_at.load(Ordering::Acquire) > then.0
    }

    /// A write was published at `now`. If the epoch may have moved since anybody looked, others may be filling an empty place by now, and
    /// are to be told there, too.
    pub(super) fn published(&self, key: &Key, version: Version, now: Timestamp) {
        if !self.is_known(now) {
            self.repairs.recheck(key, version, now);
        }
    }

    /// Up to when what is known of the epoch is known to hold.
    pub(super) fn known_at(&self) -> Timestamp {
        Timestamp(self.asked_at.load(Ordering::Acquire))
    }

    /// Whether the control row was looked at so lately that the epoch which this replica goes by is filled by nobody's old knowledge.
    pub(super) fn is_known(&self, now: Timestamp) -> bool {
        now.since(self.known_at()) <= EPOCH_KNOWN
    }
}
