//! Waiting until the store has what was acknowledged before.
//!
//! Owns whom to ask: the queue of this replica first, which tells when a write leaves it; else the store, again and again, for the write may be
//! another replica's. Does not own the queue's word. Safe to drop at any await: waiting changes nothing but that what is awaited here is drained
//! sooner.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::{Durability, Gateway, Written, freshness::last_word_at};
use crate::{
    clock::is_far_ahead,
    error::{Error, ErrorKind},
    model::{Key, Version},
    queue::Fate,
};

/// Between two looks into the store: at first, and at most.
const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(320);

/// When to come back after waiting in vain.
const RETRY_AFTER: Duration = Duration::from_millis(200);

impl Gateway {
    /// Waits until the store has `version` of a key or a higher one: which. `None`: the record was deleted since, and nothing is left of it.
    ///
    /// # Errors
    /// `DeadLettered` when the store rejected it for good, `TooNew` when no gateway can have stamped it, `NotPersisted` shortly before the
    /// deadline, `Unavailable` when only the store can say and it cannot be reached.
    pub async fn await_persisted(
        &self,
        key: &Key,
        version: Version,
        deadline: Instant,
    ) -> Result<Option<Version>, Error> {
        let waiting = async {
            let parts = self.parts();
            let mut pause = PAUSE_FIRST;
            loop {
                match parts.queue.persisted(key, version, deadline).await? {
                    Fate::Stored(stands) => {
                        parts.clock.observe(stands);
                        return Ok(Some(stands));
                    }
                    Fate::DeadLettered => return Err(dead_lettered()),
                    Fate::Unknown => {}
                }
                let horizon = parts.sharing.known_horizon();
                let stored = parts.loads.load(key, deadline).await?;
                // The caller's next write of the key is to be above it.
                stored.iter().for_each(|entry| parts.clock.observe(entry.version));
                match stored {
                    Some(entry) if entry.version >= version => return Ok(Some(entry.version)),
                    // No row can be made any more by what is at or below the horizon.
                    None if horizon >= Some(version) => return Ok(None),
                    _ if is_far_ahead(version, parts.clock.now()) => return Err(too_new()),
                    _ => {}
                }
                if parts.decisions.is_buried(key, version, deadline).await? {
                    return Err(dead_lettered());
                }
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        };
        let ended = timeout_at(last_word_at(deadline), waiting).await;
        ended.unwrap_or_else(|_| Err(not_persisted()))
    }

    /// Waits until the store has all writes that this gateway acknowledged before the call. How many went to the dead letters since the start of
    /// the process.
    ///
    /// # Errors
    /// `DeadLettered` where one went there meanwhile, `NotPersisted` shortly before the deadline.
    pub async fn await_all_persisted(&self, deadline: Instant) -> Result<u64, Error> {
        let queue = &self.parts().queue;
        let before = queue.dead_lettered();
        let persisted = queue.all_persisted(last_word_at(deadline)).await;
        persisted.map_err(|error| match error.kind() {
            ErrorKind::Timeout => not_persisted(),
            _ => error,
        })?;
        let now = queue.dead_lettered();
        if now > before {
            return Err(dead_lettered());
        }
        Ok(now)
    }

    /// Waits until an accepted write is in the store.
    ///
    /// # Errors
    /// `DeadLettered`; `Timeout`, of unknown outcome, at the deadline: the write goes on.
    pub(super) async fn persisted(&self, key: &Key, accepted: Written, deadline: Instant) -> Result<Written, Error> {
        if accepted.durability == Durability::Store {
            return Ok(accepted);
        }
        match self.await_persisted(key, accepted.version, deadline).await {
            Ok(_) => Ok(Written {
                durability: Durability::Store,
                ..accepted
            }),
            Err(error) if error.kind() == ErrorKind::DeadLettered => Err(error),
            Err(_) => {
                let message = "the write is accepted, and goes on; the store did not have it before the deadline";
                Err(Error::new(ErrorKind::Timeout, message).unknown())
            }
        }
    }
}

fn dead_lettered() -> Error {
    let message = "the store rejected the write for good: it is among the dead letters";
    Error::new(ErrorKind::DeadLettered, message)
}

pub(super) fn not_persisted() -> Error {
    let message = "the store does not have it yet: ask again, or allow more time";
    Error::new(ErrorKind::NotPersisted, message).retry_after(RETRY_AFTER)
}

fn too_new() -> Error {
    let message = "the version is more than a minute ahead of this gateway's clock: pass one that a write returned";
    Error::new(ErrorKind::TooNew, message)
}
