//! Single flight: one load per key in the process at a time, whose answer all who miss meanwhile share.
//!
//! Owns which loads run, and whether what one found may still land in L1. Does not own the load itself (the gateway runs it, in a
//! task of its own, so that a caller that hangs up does not end it for the others). Invariants: a load lands only while its
//! flight is registered, checked and done under one lock; the number of flights is bounded.
//!
//! A registered flight is a lease on the key. The order that makes it one:
//! - a reader registers **before** it looks at pending, Redis or the store, and looks at L1 once more after it was made the
//!   leader, for an earlier flight may have landed since its first look;
//! - a writer makes its write visible in the slower tier (pending or the store) **before** it detaches the flight, and leaves
//!   nothing older in L1 **after**: its own copy lands then, or was there already and what is older is dropped.
//!
//! So a load that began before a write was visible can land only before the writer detaches it, and does not outlast that. A load
//! that registers after the detachment sees the write.

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

use crate::{
    cache::{
        Loaded,
        memory::{Landing, Memory},
    },
    error::Error,
    model::{Key, Source, Timestamp},
    telemetry::CacheMetrics,
};

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
    /// Load, and land what it finds.
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

    /// Ends the registration of the key's flight: what it finds will not land. Those who joined still get its answer, for they
    /// asked before the write was answered; later readers start a new one.
    pub fn detach(&self, key: &Key) {
        self.shard(key).lock().remove(key);
    }

    /// How many flights run, the detached ones included.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    fn lead(self: &Arc<Self>, slot: hash_map::VacantEntry<'_, Key, Arc<Flight>>) -> Option<Lead> {
        self.running
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |running| {
                (running < self.flights_max).then_some(running + 1)
            })
            .ok()?;
        let key = slot.key().clone();
        let flight = Arc::clone(slot.insert(Arc::default()));
        Some(Lead {
            flights: Arc::clone(self),
            key,
            flight,
        })
    }

    fn shard(&self, key: &Key) -> &Shard {
        // The upper bits: the maps within use the lower ones of a hash of the same kind.
        let index = self.hasher.hash_one(key) >> (u64::BITS - SHARDS.ilog2());
        &self.shards[index as usize]
    }
}

/// The duty to load a key, and the right to land what was found.
///
/// Dropped without landing (its task was cancelled, or panicked), it ends the flight without an answer: those who joined are
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

    /// Ends the flight. What was found lands in L1 if the flight still stands: an entry unless L1 has a newer one, an absence
    /// over anything. The answer, for the leader as for those who joined: what was found, or the newer copy that L1 holds, if it
    /// may still answer.
    pub fn land(self, memory: &Memory, outcome: LoadResult, now: Timestamp) -> LoadResult {
        let outcome = {
            let mut shard = self.flights.shard(&self.key).lock();
            if self.unregister(&mut shard) {
                outcome.map(|loaded| land_in(memory, &self.key, loaded, now))
            } else {
                outcome
            }
        };
        self.end(Some(outcome.clone()));
        outcome
    }

    /// Takes the registration, if it still stands. Whether it did.
    fn unregister(&self, shard: &mut HashMap<Key, Arc<Flight>, RandomState>) -> bool {
        let stands = shard
            .get(&self.key)
            .is_some_and(|flight| Arc::ptr_eq(flight, &self.flight));
        if stands {
            shard.remove(&self.key);
        }
        stands
    }

    fn end(&self, outcome: Option<LoadResult>) {
        if self.flight.outcome.set(outcome).is_ok() {
            self.flight.ended.notify_waiters();
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if self.flight.outcome.get().is_none() {
            self.unregister(&mut self.flights.shard(&self.key).lock());
            self.end(None);
        }
        self.flights.running.fetch_sub(1, Ordering::Relaxed);
    }
}

fn land_in(memory: &Memory, key: &Key, loaded: Loaded, now: Timestamp) -> Loaded {
    match memory.land_load(key, loaded.copy.clone()) {
        Landing::Refused { standing } if standing.is_fresh(now) => Loaded {
            copy: standing,
            source: Source::L1,
            stale: false,
        },
        Landing::Landed | Landing::Renewed | Landing::Refused { .. } => loaded,
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
