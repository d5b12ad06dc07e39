//! Reading: down the tiers until one knows.
//!
//! Owns which tiers a consistency may ask and in which order, loads and their landing, and refresh-ahead. Does not own time limits
//! of a call ([`Gateway::get`] bounds it) nor the rule of landing ([`memory`](crate::cache::memory)). Safe to drop at any await.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinHandle, time::Instant};

use super::{Gateway, died};
use crate::{
    cache::{
        Copy, Loaded,
        flight::{FLIGHTS_MAX, Lead, Ticket},
        memory::{Landing, Token},
        needs_refresh,
    },
    error::{Error, ErrorKind},
    model::{Key, Source, Timestamp},
    queue::PendingEntry,
};

impl Gateway {
    pub(super) async fn get_cached(&self, key: &Key, deadline: Instant) -> Result<Loaded, Error> {
        let now = self.parts().clock.now();
        if let Some(loaded) = self.look_in_memory(key, now) {
            self.refresh_if_due(key, &loaded.copy, now);
            return Ok(loaded);
        }
        loop {
            match self.parts().flights.join_or_lead(key) {
                Ticket::Lead(lead) => {
                    return self.spawn_load(lead, deadline).await.map_err(died)?;
                }
                Ticket::Join(join) => {
                    match join.outcome().await {
                        // Its leader died, or had less time than this caller: somebody has to lead anew.
                        None => {}
                        Some(Err(error)) if error.kind() == ErrorKind::Timeout && Instant::now() < deadline => {}
                        Some(outcome) => return outcome,
                    }
                }
                Ticket::Full => {
                    let message = format!("{FLIGHTS_MAX} keys are being loaded, as many as may be at a time");
                    return Err(Error::new(ErrorKind::Overloaded, message));
                }
            }
        }
    }

    pub(super) async fn get_shared(&self, key: &Key, deadline: Instant) -> Result<Loaded, Error> {
        let above = self.look_above_store(key).await;
        let now = self.parts().clock.now();
        match above {
            Some(loaded) if !loaded.stale && (loaded.source == Source::Pending || loaded.copy.is_fresh(now)) => {
                Ok(loaded)
            }
            // Durable, and the newest that is known here: better than no answer, and the caller is told.
            Some(unconfirmed) if unconfirmed.stale => {
                let confirmed = self.get_stored(key, Some(unconfirmed.clone()), deadline).await;
                confirmed.or(Ok(unconfirmed))
            }
            // A copy past its lifetime does not answer by itself, but an older row does not answer over it either.
            above => self.get_stored(key, above, deadline).await,
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
        let asked_at = stored.copy.loaded_at;
        let mut found = [pending, above].into_iter().flatten().fold(stored, newest);
        // The store was asked: nothing newer stands there.
        found.stale = false;
        if !found.copy.is_fresh(asked_at) {
            // Confirmed just now: the store knows nothing newer.
            found.copy = self.copy_of(key, found.copy.entry, asked_at);
        }
        Ok(found)
    }

    fn look_in_memory(&self, key: &Key, now: Timestamp) -> Option<Loaded> {
        let copy = self.parts().memory.get(key, now)?;
        Some(Loaded {
            copy,
            source: Source::L1,
            stale: false,
        })
    }

    fn look_in_pending(&self, key: &Key) -> Option<Loaded> {
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

    /// The newer of what is pending and what Redis holds, which may be past its lifetime.
    async fn look_above_store(&self, key: &Key) -> Option<Loaded> {
        let pending = self.look_in_pending(key);
        let shared = match &self.inner.redis {
            // A failure is a miss; the link has counted it.
            Some(redis) => redis.get(key).await.ok().flatten(),
            None => None,
        };
        self.observe(shared.as_ref());
        let shared = shared.and_then(|copy| self.trusted(key, copy));
        match (pending, shared) {
            (Some(pending), Some(shared)) => Some(newest(pending, shared)),
            (pending, shared) => pending.or(shared),
        }
    }

    /// A copy from Redis as far as this replica can trust it: not below what L1 knows to stand, however old that knowledge is (a publish
    /// of this replica may have failed); and not for longer than a copy made now, for another replica's clock set its end.
    fn trusted(&self, key: &Key, mut copy: Copy) -> Option<Loaded> {
        if copy.version() < self.parts().memory.version(key) {
            return None;
        }
        let now = self.parts().clock.now();
        let most = self.copy_of(key, copy.entry.clone(), now).fresh_until;
        copy.fresh_until = copy.fresh_until.min(most);
        Some(Loaded {
            copy,
            source: Source::L2,
            stale: false,
        })
    }

    async fn load(&self, key: &Key, deadline: Instant) -> Result<Loaded, Error> {
        // From before the query was sent: the copy is at least as new.
        let asked_at = self.parts().clock.now();
        let entry = self.parts().loads.load(key, deadline).await?;
        let copy = self.copy_of(key, entry, asked_at);
        self.observe(Some(&copy));
        Ok(Loaded {
            copy,
            source: Source::Store,
            stale: false,
        })
    }

    /// Loads in a task of its own: those who join do not lose the answer when the caller that leads goes away.
    fn spawn_load(&self, lead: Lead, deadline: Instant) -> JoinHandle<Result<Loaded, Error>> {
        let gateway = self.clone();
        self.inner.tasks.spawn(async move {
            let deadline = deadline.max(Instant::now() + gateway.parts().load_wait);
            let key = lead.key().clone();
            let token = gateway.parts().memory.leave_token(&key);
            // An earlier flight may have landed between this caller's look and its lead.
            if let Some(loaded) = gateway.look_in_memory(&key, gateway.parts().clock.now()) {
                lead.end(Ok(loaded.clone()));
                return Ok(loaded);
            }
            let outcome = gateway.get_shared(&key, deadline).await;
            gateway.land(lead, token, outcome)
        })
    }

    /// Renews a copy in the background when little of its lifetime is left: once, and only so many at a time.
    fn refresh_if_due(&self, key: &Key, copy: &Copy, now: Timestamp) {
        let parts = self.parts();
        let settings = parts.namespaces.get(key.namespace());
        let whole = settings.lifetime_of(copy.entry.as_ref().is_some_and(|entry| entry.is_live(now)));
        if !needs_refresh(copy, now, whole, settings.refresh_threshold) {
            return;
        }
        let Some(lead) = parts.flights.try_lead(key) else {
            return;
        };
        let Ok(permit) = Arc::clone(&parts.refreshes.0).try_acquire_owned() else {
            parts.metrics.refreshes_skipped.inc();
            return;
        };
        parts.metrics.refreshes.inc();
        let token = parts.memory.leave_token(key);
        let gateway = self.clone();
        self.inner.tasks.spawn(async move {
            let deadline = Instant::now() + gateway.parts().load_wait;
            // Redis may hold a copy as old as ours: only the store makes it new.
            let outcome = gateway.get_stored(lead.key(), None, deadline).await;
            // A failure leaves the copy as it was, and the next read tries again; whoever joined is told.
            let _ = gateway.land(lead, token, outcome);
            drop(permit);
        });
    }

    /// Ends a load: L1 gets the copy unless a write came since, those who joined get the answer, and Redis what the store gave.
    fn land(&self, lead: Lead, token: Token, outcome: Result<Loaded, Error>) -> Result<Loaded, Error> {
        let key = lead.key().clone();
        let now = self.parts().clock.now();
        let outcome = outcome.map(|loaded| land_in_memory(token, loaded, now));
        lead.end(outcome.clone());
        if let Ok(Loaded {
            copy,
            source: Source::Store,
            stale: false,
        }) = &outcome
            && let Some(entry) = copy.entry.clone()
            && self.inner.redis.is_some()
        {
            let (gateway, loaded_at, lifetime) = (self.clone(), copy.loaded_at, copy.lifetime());
            self.inner.tasks.spawn(async move {
                if let Some(redis) = &gateway.inner.redis {
                    // A failure leaves Redis without the copy; the link has counted it.
                    let _ = redis.land(&key, &entry, loaded_at, lifetime).await;
                }
            });
        }
        outcome
    }

    fn observe(&self, copy: Option<&Copy>) {
        if let Some(version) = copy.and_then(Copy::version) {
            self.parts().clock.observe(version);
        }
    }
}

/// Offers what was found to L1. The answer: that, or what L1 keeps instead, if it may still answer.
fn land_in_memory(token: Token, loaded: Loaded, now: Timestamp) -> Loaded {
    match token.land_load(loaded.copy.clone()) {
        Landing::Refused {
            standing: Some(standing),
        } if standing.is_fresh(now) => Loaded {
            copy: standing,
            source: Source::L1,
            stale: false,
        },
        Landing::Landed | Landing::Renewed | Landing::Refused { .. } => loaded,
    }
}

/// The overlay of two tiers: the higher version. An entry is newer than an absence.
fn newest(a: Loaded, b: Loaded) -> Loaded {
    if b.copy.version() > a.copy.version() { b } else { a }
}
