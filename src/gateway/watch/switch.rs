//! Whether changes are recorded: what a write pays for watches while nobody watches.
//!
//! Owns one flag, and that nothing falls between it and the tiers: a writer looks at it after its write can be read, and whoever turns it on reads
//! after that; so either the writer finds it on, or the reader finds the write. Does not own what is recorded. Built a second time over the
//! primitives of a model checker, which tries every interleaving.

use super::sync::{AtomicBool, Ordering, fence};

/// The flag.
#[derive(Debug)]
pub(super) struct Switch {
    on: AtomicBool,
}

impl Switch {
    pub(super) fn off() -> Switch {
        Switch {
            on: AtomicBool::new(false),
        }
    }

    /// Whether it is on: asked by a writer whose write can be read.
    pub(super) fn is_on(&self) -> bool {
        // Between the write and this look, as the other one is between the flag and the first read: one of the two sees the other.
        fence(Ordering::SeqCst);
        self.on.load(Ordering::Relaxed)
    }

    /// Turns it on: every write whose writer found it off can be read from now on.
    pub(super) fn turn_on(&self) {
        self.on.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub(super) fn turn_off(&self) {
        self.on.store(false, Ordering::Relaxed);
    }
}
