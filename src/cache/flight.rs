//! Single flight: one load per key in the process at a time, whose answer all who miss meanwhile share.
//!
//! Owns which loads run, and who may join one. Does not own the load itself (the gateway runs it, in a task of its own, so that a caller
//! that hangs up does not end it for the others), nor whether what one found may land in L1 (its token there says). Invariants: who comes
//! after a write does not join a load from before it, for a writer makes its write visible in the slower tiers, and then detaches the
//! key's flight, before it answers; the number of flights is bounded.

use std::{
    collections::{HashMap, hash_map},
    hash::BuildHasher,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{cache::Loaded, error::Error, model::Key, telemetry::CacheMetrics};

/// How many flights a gateway lets run at once.
pub const FLIGHTS_MAX: usize = 16_384;

/// A power of two: enough that serving threads seldom meet.
const SHARDS: usize = 64;

/// How a load ended.
pub type LoadResult = Result<Loaded, Error>;

type Shard = Mutex<HashMap<Key, Arc<Flight>, RandomState>>;

/// The loads that run.
#[derive(Debug)]
pub struct Flights {
    shards: Box<[Shard]>,
    hasher: RandomState,
    /// Flights whose leader is alive, the detached ones included.
    running: AtomicUsize,
    flights_max: usize,
    metrics: CacheMetrics,
}

/// What a reader that missed is to do.
#[derive(Debug)]
pub enum Ticket {
    /// Load, and tell those who join.
    Lead(Lead),
    /// Wait for the load that runs.
    Join(Join),
    /// Fail: as many flights run as may, none of them for this key.
    Full,
}

/// One load.
#[derive(Debug, Default)]
struct Flight {
    /// How it ended; `None` inside: its leader was dropped.
    outcome: OnceLock<Option<LoadResult>>,
    ended: Notify,
}

impl Flights {
    /// None yet, and at most `flights_max` at a time.
    pub fn new(flights_max: usize, metrics: CacheMetrics) -> Arc<Flights> {
        Arc::new(Flights {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            hasher: RandomState::default(),
            running: AtomicUsize::new(0),
            flights_max,
            metrics,
        })
    }

    /// Joins the key's flight, or registers a new one.
    pub fn join_or_lead(self: &Arc<Self>, key: &Key) -> Ticket {
        match self.shard(key).lock().entry(key.clone()) {
            hash_map::Entry::Occupied(running) => {
                self.metrics.loads_joined.inc();
                Ticket::Join(Join {
                    flight: Arc::clone(running.get()),
                })
            }
            hash_map::Entry::Vacant(slot) => self.lead(slot).map_or(Ticket::Full, Ticket::Lead),
        }
    }

    /// Registers a flight, as for a refresh; `None` if the key has one already, or as many run as may.
    pub fn try_lead(self: &Arc<Self>, key: &Key) -> Option<Lead> {
        match self.shard(key).lock().entry(key.clone()) {
            hash_map::Entry::Occupied(_) => None,
            hash_map::Entry::Vacant(slot) => self.lead(slot),
        }
    }

    /// A flight that nobody can join: who could be joined may have begun before something that nobody told of.
    pub fn lead_alone(self: &Arc<Self>, key: &Key) -> Ticket {
        match self.take_off(key) {
            Some(lead) => Ticket::Lead(lead),
            None => Ticket::Full,
        }
    }

    /// Ends the registration of the key's flight. Those who joined still get its answer, for they asked before the write was answered;
    /// later readers start a new one.
    pub fn detach(&self, key: &Key) {
        self.shard(key).lock().remove(key);
    }

    /// The same of the flight of every key that matches.
    pub fn detach_where(&self, matches: impl Fn(&Key) -> bool) {
        for shard in &self.shards {
            shard.lock().retain(|key, _| !matches(key));
        }
    }

    /// The same of every flight.
    pub fn detach_all(&self) {
        self.detach_where(|_| true);
    }

    /// How many flights run, the detached ones included.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    fn lead(self: &Arc<Self>, slot: hash_map::VacantEntry<'_, Key, Arc<Flight>>) -> Option<Lead> {
        let lead = self.take_off(slot.key())?;
        slot.insert(Arc::clone(&lead.flight));
        Some(lead)
    }

    /// Counts a flight in, unless as many run as may.
    fn take_off(self: &Arc<Self>, key: &Key) -> Option<Lead> {
        self.running
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |running| {
                (running < self.flights_max).then_some(running + 1)
            })
            .ok()?;
        Some(Lead {
            flights: Arc::clone(self),
            key: key.clone(),
            flight: Arc::default(),
        })
    }

    fn shard(&self, key: &Key) -> &Shard {
        // The upper bits: the maps within use the lower ones of a hash of the same kind.
        let index = self.hasher.hash_one(key) >> (u64::BITS - SHARDS.ilog2());
        &self.shards[index as usize]
    }
}

/// The duty to load a key for all who join.
///
/// Dropped without an end (its task was cancelled, or panicked), it ends the flight without an answer: those who joined are
/// woken to board again, and one of them leads.
#[derive(Debug)]
#[must_use = "a flight without a leader makes its joiners start over"]
pub struct Lead {
    flights: Arc<Flights>,
    key: Key,
    flight: Arc<Flight>,
}

impl Lead {
    /// The key to load.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Ends the flight with an answer for those who joined. Whatever is to land in L1 has landed: later readers find it there.
    pub fn end(self, outcome: LoadResult) {
        self.end_with(Some(outcome));
    }

    fn end_with(&self, outcome: Option<LoadResult>) {
        let mut shard = self.flights.shard(&self.key).lock();
        if let hash_map::Entry::Occupied(registered) = shard.entry(self.key.clone())
            // A detached one has no registration to end, and the key may have another's.
            && Arc::ptr_eq(registered.get(), &self.flight)
        {
            registered.remove();
        }
        drop(shard);
        if self.flight.outcome.set(outcome).is_ok() {
            self.flight.ended.notify_waiters();
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if self.flight.outcome.get().is_none() {
            self.end_with(None);
        }
        self.flights.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place among those who wait for a flight.
#[derive(Debug)]
pub struct Join {
    flight: Arc<Flight>,
}

impl Join {
    /// Waits for the flight's end. `None`: its leader was dropped without an answer; board again.
    ///
    /// Cancel-safe: dropping it ends this wait and nothing else.
    pub async fn outcome(self) -> Option<LoadResult> {
        // Made before the look, so that an end between the two is not missed.
        let ended = self.flight.ended.notified();
        if let Some(outcome) = self.flight.outcome.get() {
            return outcome.clone();
        }
        ended.await;
        self.flight.outcome.get().cloned().flatten()
    }
}

#[cfg(test)]
mod tests;
