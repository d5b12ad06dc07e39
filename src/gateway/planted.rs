//! What the planted faults of the gateway do.
//!
//! Owns nothing but harm. Each does nothing unless it is the chosen one.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::Gateway;
use crate::{
    cache::{Loaded, epochs::Adopted, memory::Token, redis::Hold},
    error::Error,
    model::{Key, Version, Write},
    planted::{self, Fault},
};

/// The epochs to adopt, after which ones; or with [`Fault::EpochNotChecked`] ones that are readable as the first, after none that would have to
/// go.
pub(super) fn or_unmoved(next: Adopted, current: Option<Arc<Adopted>>) -> (Adopted, Option<Arc<Adopted>>) {
    match &current {
        Some(first) if planted::is(Fault::EpochNotChecked) => {
            let unmoved = Adopted {
                readable_from: first.readable_from,
                namespaces: first.namespaces.clone(),
                ..next
            };
            (unmoved, None)
        }
        Some(_) | None => (next, current),
    }
}

/// What a refresh is to land, or with [`Fault::RefreshOverPending`] what the store alone holds, with a token that nothing can refuse.
pub(super) async fn or_stored(
    gateway: &Gateway,
    key: &Key,
    token: Token,
    outcome: Result<Loaded, Error>,
    deadline: Instant,
) -> (Token, Result<Loaded, Error>) {
    if !planted::is(Fault::RefreshOverPending) {
        return (token, outcome);
    }
    let stored = gateway.load(key, deadline).await;
    gateway.parts().memory.invalidate_key(key);
    (gateway.parts().memory.leave_token(key), stored)
}

/// With [`Fault::PublishBeforeCommit`] the others see a write that the store was not asked to take yet.
pub(super) async fn publish(gateway: &Gateway, write: &Write) {
    if planted::is(Fault::PublishBeforeCommit) {
        let copy = gateway.copy_of(&write.key, Some(write.entry.clone()), gateway.parts().clock.now());
        let _ = gateway.publish(write, &copy, Hold::Fresh).await;
    }
}

/// What Redis shows of a key, or with [`Fault::DecidedBeforePending`] nothing.
pub(super) fn or_unseen(shown: Option<Version>) -> Option<Version> {
    shown.filter(|_| !planted::is(Fault::DecidedBeforePending))
}

/// With [`Fault::RepeatNotTold`] what is older than a repeated answer goes on answering.
pub(super) fn keeps_outdated() -> bool {
    planted::is(Fault::RepeatNotTold)
}

/// With [`Fault::KeepMemoryOnLostChannel`] L1 goes on to answer although messages were missed.
pub(super) fn keeps_memory(gateway: &Gateway) -> bool {
    let keeps = planted::is(Fault::KeepMemoryOnLostChannel);
    if keeps {
        let parts = gateway.parts();
        parts
            .memory
            .trust_until(parts.clock.now().after(Duration::from_secs(3600)));
    }
    keeps
}
