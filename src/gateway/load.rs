//! Loads: one for all who miss a key, in the process by its flight and between replicas by the token in Redis; and refresh-ahead.
//!
//! Owns what a load asks, where its outcome lands, and when a copy is renewed before it ends. Does not own who may join a load
//! (`cache::flight`), nor the rule of landing (`cache::memory`, `cache::redis`). Cancellation: who leads looks above the store itself, and one of
//! those who joined leads anew if that caller goes away; the store is asked in a task of its own, which does not end with the caller.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    Gateway, died,
    freshness::Demand,
    read::{Above, newest_of},
    shared::Claim,
};
use crate::{
    cache::{
        Copy, Loaded,
        flight::Lead,
        memory::{Landing, Token},
        needs_refresh,
    },
    error::Error,
    model::{Key, Source, Timestamp},
};

/// How long a copy may answer that was loaded while Redis could not be asked. Another gateway may hold a newer write that the store does not
/// have yet; it told of that before this was loaded, and tells no more when the store has it.
const BLIND_LIFETIME: Duration = Duration::from_secs(1);

impl Gateway {
    /// Loads a key for its caller and for those who join: first from what stands above the store, which takes a moment; and where that does not
    /// answer, in a task of its own, so that they do not lose the answer of the store when the caller that leads goes away.
    pub(super) async fn load_leading(&self, lead: Lead, demand: Demand, deadline: Instant) -> Result<Loaded, Error> {
        let token = self.parts().memory.leave_token(lead.key());
        if let Some(loaded) = self.landed_before(lead.key(), demand) {
            lead.end(Ok(loaded.clone()));
            return Ok(loaded);
        }
        let above = self.look_above_store(lead.key()).await;
        let above = match Above::judge(above, demand, self.parts().clock.now()) {
            Above::Answer(loaded) => return self.land(lead, token, Ok(loaded)),
            above => above,
        };
        let gateway = self.clone();
        let loading = self.inner.tasks.spawn(async move {
            let deadline = deadline.max(Instant::now() + gateway.parts().load_wait);
            let outcome = gateway.go_below(lead.key(), above, demand, deadline).await;
            gateway.land(lead, token, outcome)
        });
        loading.await.map_err(died)?
    }

    /// What an earlier flight has landed between a caller's look and its lead.
    pub(super) fn landed_before(&self, key: &Key, demand: Demand) -> Option<Loaded> {
        let now = self.parts().clock.now();
        let landed = self.look_in_memory(key, now);
        landed.filter(|loaded| demand.met_by(loaded, now))
    }

    /// Renews a copy in the background when little of its lifetime is left: once, and only so many at a time.
    pub(super) fn refresh_if_due(&self, key: &Key, copy: &Copy, now: Timestamp) {
        let parts = self.parts();
        let settings = parts.namespaces.get(key.namespace());
        let whole = settings.lifetime_of(copy.entry.as_ref().is_some_and(|entry| entry.is_live(now)));
        let threshold = settings.refresh_threshold;
        if !needs_refresh(copy, now, whole, threshold) {
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
        self.inner.counters.namespaces.refresh(key.namespace());
        let token = parts.memory.leave_token(key);
        let gateway = self.clone();
        self.inner.tasks.spawn(async move {
            let deadline = Instant::now() + gateway.parts().load_wait;
            // Redis may hold a copy as old as ours: then only the store makes it new.
            let wanted = |found: &Loaded, now| !needs_refresh(&found.copy, now, whole, threshold);
            let outcome = gateway.reload(lead.key(), None, wanted, deadline).await;
            #[cfg(feature = "planted-faults")]
            let (token, outcome) = super::planted::or_stored(&gateway, lead.key(), token, outcome, deadline).await;
            // A failure leaves the copy as it was, and the next read tries again; whoever joined is told.
            let _ = gateway.land(lead, token, outcome);
            drop(permit);
        });
    }

    /// Asks the store for a key, unless another replica does already and its answer, if it is `wanted`, comes in time. Overlaid with what
    /// stands above the store; what the store said lands in Redis.
    pub(super) async fn reload(
        &self,
        key: &Key,
        above: Option<Loaded>,
        wanted: impl Fn(&Loaded, Timestamp) -> bool,
        deadline: Instant,
    ) -> Result<Loaded, Error> {
        let claim = if self.parts().loads.store_is_down() {
            // Nobody's load will land: who reads during an outage waits for none.
            self.unclaimed()
        } else {
            self.claim(key, wanted).await
        };
        let (token, shared, blind) = match claim {
            Claim::Found(found) => return Ok(self.overlay_pending(key, found)),
            Claim::Load { token, above, blind } => (token, above, blind),
            // It was waited for.
            Claim::Wait { above } => (None, above, false),
        };
        let mut loaded = self.get_stored(key, newest_of(above, shared), deadline).await?;
        if blind {
            shorten(&mut loaded.copy);
        }
        if let Some(token) = token {
            token.fill(&loaded);
        }
        Ok(loaded)
    }

    /// What another's load has put into Redis, unless something newer is pending.
    pub(super) fn overlay_pending(&self, key: &Key, found: Loaded) -> Loaded {
        newest_of(self.look_in_pending(key), Some(found.clone())).unwrap_or(found)
    }

    /// Ends a load: L1 gets the copy unless a write came since, and those who joined get the answer.
    pub(super) fn land(&self, lead: Lead, token: Token, outcome: Result<Loaded, Error>) -> Result<Loaded, Error> {
        let now = self.parts().clock.now();
        let outcome = outcome.map(|loaded| land_in_memory(token, loaded, now));
        lead.end(outcome.clone());
        outcome
    }
}

/// Has a copy that was loaded without Redis answer for a moment only.
pub(super) fn shorten(copy: &mut Copy) {
    copy.fresh_until = copy.fresh_until.min(copy.loaded_at.after(BLIND_LIFETIME));
}

/// Offers what was found to L1. The answer: that, or what L1 keeps instead, if it may still answer.
fn land_in_memory(token: Token, loaded: Loaded, now: Timestamp) -> Loaded {
    match token.land_load(loaded.copy.clone()) {
        Landing::Refused {
            standing: Some(standing),
        } if standing.is_fresh(now) => Loaded {
            // Nothing newer was found just now.
            copy: Copy {
                loaded_at: standing.loaded_at.max(loaded.copy.loaded_at),
                ..standing
            },
            source: Source::L1,
            stale: false,
        },
        Landing::Landed | Landing::Renewed | Landing::Refused { .. } => loaded,
    }
}
