//! The store's breaker: whether the store is held to be down.
//!
//! Owns one bit and the rule that moves it. Open: callers that wait for the store fail at once instead. It is closed by any call
//! that the store answers: the pings of [`crate::store::watch`], which go on while it is open, and the drain's tries.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tokio::sync::Notify;

use crate::store::StoreErrorKind;

/// Failures in a row, other than a refused connection, after which the store is held to be down.
const FAILURES_MAX: u32 = 5;

/// One store's breaker, shared by its sessions.
#[derive(Debug, Default)]
pub struct Breaker {
    open: AtomicBool,
    failures: AtomicU32,
    tripped: Notify,
}

impl Breaker {
    /// Whether the store is held to be down.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Returns once the store is held to be down: at once if it is. Cancel-safe.
    pub async fn opened(&self) {
        // Listening begins before the look, so that a trip between the two is heard.
        let tripped = self.tripped.notified();
        if !self.is_open() {
            tripped.await;
        }
    }

    /// The store answered.
    pub fn succeeded(&self) {
        self.failures.store(0, Ordering::Relaxed);
        if self.open.swap(false, Ordering::Relaxed) {
            tracing::info!("the store answers again");
        }
    }

    /// A call failed. No connection opens the breaker at once; a store that answers with errors, or not in time, gets a few tries,
    /// for one killed backend is no outage. A rejected row is an answer.
    pub fn failed(&self, kind: StoreErrorKind) {
        let trip = match kind {
            // An answer all the same: what it refuses now, it may not refuse to others, and reads least of all.
            StoreErrorKind::Rejected | StoreErrorKind::Transient => return self.succeeded(),
            StoreErrorKind::Unreachable => true,
            StoreErrorKind::Unknown => self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES_MAX,
        };
        if trip && !self.open.swap(true, Ordering::Relaxed) {
            tracing::warn!(?kind, "the store does not answer");
            self.tripped.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_connection_opens_at_once_and_an_answer_closes() {
        let breaker = Breaker::default();
        breaker.failed(StoreErrorKind::Unreachable);
        assert!(breaker.is_open());
        breaker.succeeded();
        assert!(!breaker.is_open());
    }

    #[tokio::test]
    async fn who_waits_for_it_to_open_hears_of_it() {
        let breaker = Breaker::default();
        let ((), ()) = tokio::join!(breaker.opened(), async { breaker.failed(StoreErrorKind::Unreachable) });
        breaker.opened().await;
    }

    #[test]
    fn lost_answers_open_after_a_few_in_a_row() {
        let breaker = Breaker::default();
        for _ in 1..FAILURES_MAX {
            breaker.failed(StoreErrorKind::Unknown);
        }
        breaker.failed(StoreErrorKind::Rejected);
        for _ in 1..FAILURES_MAX {
            breaker.failed(StoreErrorKind::Unknown);
        }
        assert!(!breaker.is_open());
        breaker.failed(StoreErrorKind::Unknown);
        assert!(breaker.is_open());
    }

    #[test]
    fn a_store_that_refuses_is_there() {
        let breaker = Breaker::default();
        for _ in 0..FAILURES_MAX * 2 {
            breaker.failed(StoreErrorKind::Transient);
        }
        assert!(!breaker.is_open());
    }
}
