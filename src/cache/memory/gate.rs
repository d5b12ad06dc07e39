//! Whether L1 may answer, and be filled.
//!
//! Owns the state and its changes. Does not own the copies, nor who says until when they can be trusted. The gate is *open for ever* (nobody
//! else writes, or nobody could tell), *trusted until* a time, past which L1 does not answer until it is trusted for longer, or *off*: nothing
//! is in L1 and nothing lands. Invariants: trust ends by itself, as time passes; reading the state takes no lock; it changes under one.

use std::sync::atomic::{AtomicI64, Ordering};

use parking_lot::{Mutex, MutexGuard};

use crate::model::Timestamp;

const OFF: i64 = i64::MIN;
const FOR_EVER: i64 = i64::MAX;

#[derive(Debug)]
pub(super) struct Gate {
    /// A time in milliseconds since the Unix epoch, [`OFF`] or [`FOR_EVER`].
    trusted_until: AtomicI64,
    /// Held while the state changes, and as long as L1 is off to be cleared.
    turning: Mutex<()>,
}

impl Gate {
    /// Open for ever.
    pub(super) fn new() -> Gate {
        Gate {
            trusted_until: AtomicI64::new(FOR_EVER),
            turning: Mutex::default(),
        }
    }

    /// Whether L1 may answer at `now`.
    pub(super) fn is_open(&self, now: Timestamp) -> bool {
        now.0 < self.trusted_until.load(Ordering::Acquire)
    }

    /// Whether nothing may land. Where trust has merely ended, copies still land: what else changes them is still heard of, in order.
    pub(super) fn is_off(&self) -> bool {
        self.trusted_until.load(Ordering::Acquire) == OFF
    }

    /// Off, until it is trusted.
    pub(super) fn shut(&self) {
        let _turning = self.turning.lock();
        self.trusted_until.store(OFF, Ordering::Release);
    }

    /// Trusted until `until`, if that is later. Not while L1 is being cleared, and nothing where it is open for ever.
    pub(super) fn trust_until(&self, until: Timestamp) {
        let Some(_turning) = self.turning.try_lock() else {
            return;
        };
        if self.trusted_until.load(Ordering::Acquire) != FOR_EVER {
            let until = until.0.clamp(OFF + 1, FOR_EVER - 1);
            self.trusted_until.fetch_max(until, Ordering::Release);
        }
    }

    /// Off until the interval is dropped; then as it was before.
    pub(super) fn interval(&self) -> Interval<'_> {
        let turning = self.turning.lock();
        Interval {
            gate: self,
            before: self.trusted_until.swap(OFF, Ordering::AcqRel),
            _turning: turning,
        }
    }
}

/// A time in which L1 is off.
pub(super) struct Interval<'a> {
    gate: &'a Gate,
    before: i64,
    _turning: MutexGuard<'a, ()>,
}

impl Drop for Interval<'_> {
    fn drop(&mut self) {
        self.gate.trusted_until.store(self.before, Ordering::Release);
    }
}
