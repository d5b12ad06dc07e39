//! Writes that the store decides: those with a condition, touches, increments, and all that are written through under a request id.
//!
//! Owns what such an operation waits for before it goes to the store, how often it is stamped anew, and which tiers are told of what came of
//! it. Does not own what is decided (`store::decide`) nor that it is decided once (the store keeps the ids, in the transaction of the write).
//!
//! What has been acknowledged before is seen: a write-behind write of the key that is pending here, or on its way there, under a stamp below
//! the operation's, is drained first; one that is pending on another gateway shows in Redis, and until the store has come up to that the
//! operation waits. A write-behind write that begins later gets a higher stamp here, and is after it. One that another gateway takes at the same
//! time, or while Redis has no copy of it, may be covered by an operation that has not seen it.
//!
//! Runs to its end once begun, as any write: a client that hangs up loses the answer.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{
    Counted, Durability, Gateway, IncrementRequest, TouchRequest, Touched,
    freshness::last_word_at,
    requests::{Done, Lead, Turned, fingerprint_of_increment, fingerprint_of_touch, reused},
    write::not_stamped,
};
use crate::{
    error::{Error, ErrorKind},
    model::{Answer, ChangeKind, Condition, Fingerprint, Key, Request, RequestId, Tags, Version, Write},
    store::operation::{Change, Decided, Operation, Refusal},
};

/// Between two looks at whether the store has come up to what another gateway holds: at first, and at most.
const PAUSE_FIRST: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// When to come back after that.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// An operation that has no version yet.
#[derive(Debug)]
pub(super) struct Undecided {
    pub(super) key: Key,
    pub(super) condition: Option<Condition>,
    pub(super) change: Change,
    pub(super) request: Request,
    pub(super) deadline: Instant,
}

impl Gateway {
    /// Changes when a record expires.
    ///
    /// # Errors
    /// `Absent`, and as [`Gateway::write`].
    pub async fn touch(&self, request: TouchRequest, deadline: Instant) -> Result<Touched, Error> {
        let (started, key) = (Instant::now(), request.key.clone());
        let print = fingerprint_of_touch(&request);
        let expires_at = request.ttl.map(|ttl| self.parts().clock.now().after(ttl));
        let change = Change::Touch { expires_at };
        let touched = self.decide_once(request.key, change, (request.request, print), deadline);
        let touched = touched.await;
        self.count_write(&key, &touched, started);
        let Done {
            answer, deduplicated, ..
        } = touched?;
        Ok(Touched {
            version: answer.version,
            expires_at: answer.expires_at,
            deduplicated,
        })
    }

    /// Adds to a counter.
    ///
    /// # Errors
    /// `NotACounter`, `OutOfRange`, and as [`Gateway::write`].
    pub async fn increment(&self, request: IncrementRequest, deadline: Instant) -> Result<Counted, Error> {
        let (started, key) = (Instant::now(), request.key.clone());
        let print = fingerprint_of_increment(&request);
        let change = Change::Add {
            delta: request.delta,
            expires_at: request.ttl.map(|ttl| self.parts().clock.now().after(ttl)),
        };
        let counted = self.decide_once(request.key, change, (request.request, print), deadline);
        let counted = counted.await;
        self.count_write(&key, &counted, started);
        let Done {
            answer, deduplicated, ..
        } = counted?;
        let value = answer.counter.ok_or_else(|| {
            // The fingerprint says that it was an increment.
            Error::new(
                ErrorKind::Internal,
                "the answer that is remembered of this increment has no value",
            )
        })?;
        Ok(Counted {
            value,
            version: answer.version,
            expires_at: answer.expires_at,
            deduplicated,
        })
    }

    async fn decide_once(
        &self,
        key: Key,
        change: Change,
        (id, print): (Option<RequestId>, Fingerprint),
        deadline: Instant,
    ) -> Result<Done, Error> {
        self.parts().clock.can_stamp().map_err(not_stamped)?;
        let undecided = |request| Undecided {
            key: key.clone(),
            condition: None,
            change,
            request,
            deadline,
        };
        let Some(id) = id else {
            let request = self.parts().requests.made_up(print, self.parts().clock.now());
            return self.decide_as(undecided(request), None).await;
        };
        match self.turn(&key, id, print, deadline).await? {
            Turned::Answered(done) => Ok(done),
            Turned::Lead(lead) => self.decide_as(undecided(lead.request().clone()), Some(lead)).await,
        }
    }

    /// Decides, whether anybody waits or not, and tells those who joined.
    pub(super) async fn decide_as(&self, undecided: Undecided, lead: Option<Lead>) -> Result<Done, Error> {
        let (gateway, deadline) = (self.clone(), undecided.deadline);
        let deciding = Box::pin(async move {
            let outcome = gateway.decide(undecided).await;
            if let Some(lead) = lead {
                lead.end(&outcome);
            }
            outcome
        });
        self.to_its_end(deadline, deciding).await
    }

    /// Has the store decide, once it has all that was acknowledged before; then tells the tiers above it.
    async fn decide(&self, undecided: Undecided) -> Result<Done, Error> {
        let (key, deadline) = (&undecided.key, undecided.deadline);
        let mut pause = PAUSE_FIRST;
        loop {
            // Before the stamp: what lands from now on may be newer, even if it is gone when this lands.
            let token = self.parts().memory.leave_token(key);
            let entered = self.enter_shared(key).await;
            let shown = entered.and_then(|entered| entered.standing);
            let (decided, version) = match self.decide_above(&undecided, shown).await {
                Ok(decided) => decided,
                Err((error, tried)) => {
                    self.not_committed(key, entered, &error, tried).await;
                    return Err(error);
                }
            };
            let Decided::Applied { entry, answer } = decided else {
                if let Some(entered) = entered {
                    self.release(key, entered.token).await;
                }
                let is_known = matches!(decided, Decided::Repeated(_));
                if let Some(ended) = self.not_applied(&undecided, version, decided).await {
                    return ended;
                }
                if Instant::now() + pause >= last_word_at(deadline) {
                    // What was answered before may yet get there.
                    return Err(if is_known { behind().unknown() } else { behind() });
                }
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
                continue;
            };
            kill_point!(DecisionCommitted);
            let write = Write {
                key: key.clone(),
                entry,
                // Both are the store's alone.
                tags: Tags::default(),
                requests: Vec::new(),
            };
            self.land_through(write, token, entered).await;
            return Ok(done(answer, false));
        }
    }

    /// What an operation that was not applied now is answered with, once the tiers above the store know what stands there. `None`: the store
    /// cannot decide yet.
    async fn not_applied(
        &self,
        undecided: &Undecided,
        version: Version,
        decided: Decided,
    ) -> Option<Result<Done, Error>> {
        let (key, deadline) = (&undecided.key, undecided.deadline);
        match decided {
            Decided::Repeated(answer) => match self.outdate(key, deadline).await {
                // Or it was this very call, whose first try had lost its answer.
                Ok(standing) if standing >= Some(answer.version) => Some(Ok(done(answer, answer.version != version))),
                // It was accepted elsewhere, and the store is told of it before it has it; or somebody has removed the row.
                Ok(_) => None,
                Err(error) => Some(Err(error.unknown())),
            },
            Decided::Refused(refusal) => {
                // Or the caller might read again what it has just decided upon. That it failed does not change the answer.
                let _ = self.outdate(key, deadline).await;
                Some(Err(refused(refusal)))
            }
            Decided::Reused => Some(Err(reused())),
            Decided::Behind | Decided::Outdated { .. } | Decided::Applied { .. } => None,
        }
    }

    /// Has the store decide under a stamp above all that is known to stand, or turns out to. What was decided, of which version; or why
    /// nothing was, and the version that was tried last.
    async fn decide_above(
        &self,
        undecided: &Undecided,
        shown: Option<Version>,
    ) -> Result<(Decided, Version), (Error, Option<Version>)> {
        let (parts, key, deadline) = (self.parts(), &undecided.key, undecided.deadline);
        let (mut tried, mut standing) = (None, shown);
        #[cfg(feature = "planted-faults")]
        let shown = super::planted::or_unseen(shown);
        loop {
            let version = self.stamp(key, standing).map_err(|error| (error, tried))?;
            let settled = parts.queue.settled_below(key, version, last_word_at(deadline));
            settled.await.map_err(|error| (undrained(error), tried))?;
            let operation = Operation {
                key: key.clone(),
                version,
                condition: undecided.condition,
                change: undecided.change.clone(),
                request: undecided.request.clone(),
                asked_at: parts.clock.now(),
                acknowledged: shown,
            };
            tried = Some(version);
            let decided = parts.decisions.decide(operation, deadline).await;
            match decided.map_err(|error| (error, tried))? {
                Decided::Outdated { standing: higher } => standing = Some(higher),
                decided => return Ok((decided, version)),
            }
        }
    }

    /// Has every tier above the store forget what is older than what the store holds of a key, for whoever wrote that may not have come to tell; and
    /// this replica's clock stamp above it. The version: that of a tombstone or of an expired record, too, or the horizon where there is no row.
    async fn outdate(&self, key: &Key, deadline: Instant) -> Result<Option<Version>, Error> {
        let parts = self.parts();
        let stored = parts.loads.load(key, deadline).await?;
        let has_row = stored.is_some();
        let standing = stored.map(|entry| entry.version).or(parts.sharing.known_horizon());
        #[cfg(feature = "planted-faults")]
        if super::planted::keeps_outdated() {
            return Ok(standing);
        }
        if let Some(standing) = standing {
            parts.clock.observe(standing);
            if has_row {
                parts.queue.overtake(key, standing);
            }
            parts.flights.detach(key);
            parts.memory.invalidate(key, standing);
            if has_row {
                parts.watches.note(key, standing, ChangeKind::Invalidate);
            }
            if let Some(redis) = &self.inner.redis
                && redis.purge(key, standing).await.is_err()
            {
                self.remember(key, standing);
            }
        }
        Ok(standing)
    }
}

fn done(answer: Answer, deduplicated: bool) -> Done {
    Done {
        answer,
        durability: Durability::Store,
        deduplicated,
    }
}

fn refused(refusal: Refusal) -> Error {
    match refusal {
        Refusal::Conflict { standing } => {
            let message = "the condition does not hold of what stands: read the key, and decide anew";
            Error::new(ErrorKind::Conflict, message).standing(standing)
        }
        Refusal::Absent => Error::new(ErrorKind::Absent, "there is no such record: create it first"),
        Refusal::NotACounter => {
            let message = "the record is no counter: its value is not the decimal text of a 64-bit integer";
            Error::new(ErrorKind::NotACounter, message)
        }
        Refusal::OutOfRange => Error::new(
            ErrorKind::OutOfRange,
            "the counter would leave the range of 64-bit integers",
        ),
    }
}

fn behind() -> Error {
    let message = "a newer write of the key is acknowledged by another gateway and not in the store yet: try again, or allow more time; if \
                   the record was changed past the gateways, invalidate the key";
    Error::new(ErrorKind::Unavailable, message).retry_after(RETRY_AFTER)
}

/// An earlier write of the key, pending here, did not get to the store in time.
fn undrained(error: Error) -> Error {
    if error.kind() != ErrorKind::Timeout {
        return error;
    }
    let message =
        "an earlier write of the key is pending, and the store did not take it in time: try again, or allow more time";
    Error::new(ErrorKind::Unavailable, message).retry_after(RETRY_AFTER)
}
