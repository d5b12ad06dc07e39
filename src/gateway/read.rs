//! Reading: down the tiers until one knows.
//!
//! Owns which tiers a consistency may ask and in which order. Does not own loads and their landing (`load`), what is asked of Redis
//! (`shared`), nor the time limits of a call ([`Gateway::get`] bounds it). Safe to drop at any await.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Gateway,
    freshness::{Demand, is_kept_for_outages},
};
use crate::{
    cache::{
        Copy, Loaded,
        flight::{FLIGHTS_MAX, Join, LoadResult, Ticket},
    },
    error::{Error, ErrorKind},
    model::{Entry, Key, Source, Timestamp},
    queue::PendingEntry,
};

impl Gateway {
    pub(super) async fn get_cached(&self, key: &Key, demand: Demand, deadline: Instant) -> Result<Loaded, Error> {
        if let Some(loaded) = self.get_from_memory(key, demand) {
            return Ok(loaded);
        }
        loop {
            match self.board(key) {
                Ticket::Lead(lead) => {
                    return self.load_leading(lead, demand, deadline).await;
                }
                Ticket::Join(join) => {
                    if let Some(outcome) = self.arrive(join, demand, deadline).await {
                        return outcome;
                    }
                }
                Ticket::Full => return Err(too_many_loads()),
            }
        }
    }

    /// What L1 answers, and has renewed if that is due.
    pub(super) fn get_from_memory(&self, key: &Key, demand: Demand) -> Option<Loaded> {
        let now = demand.since;
        let loaded = self.look_in_memory(key, now)?;
        if !demand.met_by(&loaded, now) {
            return None;
        }
        self.refresh_if_due(key, &loaded.copy, now);
        Some(loaded)
    }

    /// A place in a flight for a key.
    pub(super) fn board(&self, key: &Key) -> Ticket {
        let (now, flights) = (self.parts().clock.now(), &self.parts().flights);
        if self.parts().memory.is_on(now) {
            flights.join_or_lead(key)
        } else {
            // A flight's answer is as old as the flight: it may miss what this replica was not told of meanwhile.
            flights.lead_alone(key)
        }
    }

    /// Waits for the end of another's flight. `None`: it answers nothing to this caller, who is to board anew.
    pub(super) async fn arrive(&self, join: Join, demand: Demand, deadline: Instant) -> Option<LoadResult> {
        match join.outcome().await {
            // Its leader died, or had less time than this caller: somebody has to lead anew.
            None => None,
            Some(Err(error)) if error.kind() == ErrorKind::Timeout && Instant::now() < deadline => None,
            // Older than what this caller asks for, by a look that began before it came.
            Some(Ok(loaded)) if !demand.settled_by(&loaded, self.parts().clock.now()) => None,
            Some(outcome) => Some(outcome),
        }
    }

    pub(super) async fn get_shared(&self, key: &Key, demand: Demand, deadline: Instant) -> Result<Loaded, Error> {
        let above = self.look_above_store(key).await;
        let above = Above::judge(above, demand, self.parts().clock.now());
        self.go_below(key, above, demand, deadline).await
    }

    /// What a look above the store came to, or what the store has to say then.
    pub(super) async fn go_below(
        &self,
        key: &Key,
        above: Above,
        demand: Demand,
        deadline: Instant,
    ) -> Result<Loaded, Error> {
        match above {
            Above::Answer(loaded) => Ok(loaded),
            Above::Unconfirmed(unconfirmed) => {
                let confirmed = self.get_stored(key, Some(unconfirmed.clone()), deadline).await;
                confirmed.or(Ok(unconfirmed))
            }
            Above::Reload(above) => {
                let wanted = |found: &Loaded, now| demand.met_by_fresh(found, now);
                self.reload(key, above, wanted, deadline).await
            }
        }
    }

    /// The store's copy, overlaid with what is pending, which is looked up first (what drains in between is then in both), and with
    /// what a tier above the store was found to hold.
    pub(super) async fn get_stored(
        &self,
        key: &Key,
        above: Option<Loaded>,
        deadline: Instant,
    ) -> Result<Loaded, Error> {
        let pending = self.look_in_pending(key);
        let stored = self.load(key, deadline).await?;
        Ok(self.overlay(key, stored, pending, above))
    }

    /// What the store said, overlaid with what was pending before it was asked, and with what a tier above it was found to hold.
    pub(super) fn overlay(&self, key: &Key, stored: Loaded, pending: Option<Loaded>, above: Option<Loaded>) -> Loaded {
        let asked_at = stored.copy.loaded_at;
        let above = above.filter(|above| above.source != Source::L2 || !is_kept_for_outages(&above.copy, asked_at));
        let mut found = [pending, above].into_iter().flatten().fold(stored, newest);
        // The store was asked: nothing newer stands there.
        found.stale = false;
        // Confirmed just now: the store knows nothing newer.
        if found.copy.is_fresh(asked_at) {
            found.copy.loaded_at = found.copy.loaded_at.max(asked_at);
        } else {
            found.copy = self.copy_of(key, found.copy.entry, asked_at);
        }
        found
    }

    pub(super) fn look_in_memory(&self, key: &Key, now: Timestamp) -> Option<Loaded> {
        let copy = self.parts().memory.get(key, now)?;
        Some(Loaded {
            copy,
            source: Source::L1,
            stale: false,
        })
    }

    pub(super) fn look_in_pending(&self, key: &Key) -> Option<Loaded> {
        let PendingEntry { entry, unconfirmed } = self.parts().queue.pending(key)?;
        let copy = if unconfirmed {
            // Current when it was stamped, for all that is known; and not to answer from L1.
            let stamped_at = entry.version.stamped_at();
            Copy::new(Some(entry), stamped_at, Duration::ZERO)
        } else {
            // Nothing on this replica is more current, however long ago it was accepted.
            self.copy_of(key, Some(entry), self.parts().clock.now())
        };
        Some(Loaded {
            copy,
            source: Source::Pending,
            stale: unconfirmed,
        })
    }

    pub(super) async fn load(&self, key: &Key, deadline: Instant) -> Result<Loaded, Error> {
        // From before the query was sent: the copy is at least as new.
        let asked_at = self.parts().clock.now();
        self.inner.counters.namespaces.load(key.namespace());
        let entry = self.parts().loads.load(key, deadline).await?;
        Ok(self.stored(key, entry, asked_at))
    }

    /// What the store said when it was asked at `asked_at`, or a moment later.
    pub(super) fn stored(&self, key: &Key, entry: Option<Entry>, asked_at: Timestamp) -> Loaded {
        let copy = self.copy_of(key, entry, asked_at);
        self.observe(Some(&copy));
        Loaded {
            copy,
            source: Source::Store,
            stale: false,
        }
    }

    pub(super) fn observe(&self, copy: Option<&Copy>) {
        if let Some(version) = copy.and_then(Copy::version) {
            self.parts().clock.observe(version);
        }
    }
}

/// What a look at the tiers above the store comes to.
pub(super) enum Above {
    /// It answers.
    Answer(Loaded),
    /// It answers if the store cannot: durable, and the newest that is known here; better than no answer, and the caller is told.
    Unconfirmed(Loaded),
    /// The store is to be asked. A copy past its lifetime, or less than was asked for, does not answer by itself, but an older row does not
    /// answer over it either.
    Reload(Option<Loaded>),
}

impl Above {
    pub(super) fn judge(above: Option<Loaded>, demand: Demand, now: Timestamp) -> Above {
        match above {
            Some(loaded)
                if !loaded.stale
                    && (loaded.source == Source::Pending || loaded.copy.is_fresh(now))
                    && demand.met_by(&loaded, now) =>
            {
                Above::Answer(loaded)
            }
            Some(unconfirmed) if unconfirmed.stale && demand.met_by(&unconfirmed, now) => {
                Above::Unconfirmed(unconfirmed)
            }
            above => Above::Reload(above),
        }
    }
}

/// As many keys are being loaded as may be.
pub(super) fn too_many_loads() -> Error {
    let message = format!("{FLIGHTS_MAX} keys are being loaded, as many as may be at a time");
    Error::new(ErrorKind::Overloaded, message)
}

/// The overlay of two tiers: the higher version. An entry is newer than an absence.
fn newest(a: Loaded, b: Loaded) -> Loaded {
    if b.copy.version() > a.copy.version() { b } else { a }
}

/// The same of tiers that may know nothing.
pub(super) fn newest_of(a: Option<Loaded>, b: Option<Loaded>) -> Option<Loaded> {
    match (a, b) {
        (Some(a), Some(b)) => Some(newest(a, b)),
        (a, b) => a.or(b),
    }
}
