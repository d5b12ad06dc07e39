//! Copies for reading: what makes most reads end before the store.
//!
//! Owns what a copy is and how long it may answer. [`memory`] is L1, in this process; [`redis`] is L2, shared by the replicas, its
//! values laid out by `layout`; [`message`] is what replicas tell each other; [`flight`] lets one load per missing key run at a time.
//! Does not own the order in which tiers are asked, nor writes that are not in the store yet (the gateway and the queue do). Invariants: every tier here is a
//! max-register per key; a copy may be lost at any time and nothing is lost with it; a tier that fails is a miss.

pub mod epochs;
pub mod flight;
mod layout;
pub mod memory;
pub mod message;
pub mod redis;

use std::time::Duration;

use crate::model::{Entry, Source, Timestamp, Version};

/// What a cache knows about a key, since when, and until when it may answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// The entry; `None` is a known absence: the store was asked and has no row. A tombstone, and a record past its expiry, are
    /// entries, and mean absent too.
    pub entry: Option<Entry>,
    /// When this was known to be current: when the store was asked, or the write was answered.
    pub loaded_at: Timestamp,
    /// From when on the copy may not answer any more. It still says which version stood.
    pub fresh_until: Timestamp,
}

impl Copy {
    /// A copy that may answer for `lifetime` from `loaded_at` on.
    pub fn new(entry: Option<Entry>, loaded_at: Timestamp, lifetime: Duration) -> Copy {
        Copy {
            entry,
            loaded_at,
            fresh_until: loaded_at.after(lifetime),
        }
    }

    /// The version that stands; `None` of a known absence.
    pub fn version(&self) -> Option<Version> {
        self.entry.as_ref().map(|entry| entry.version)
    }

    /// How long it may answer from `loaded_at` on.
    pub fn lifetime(&self) -> Duration {
        self.fresh_until.since(self.loaded_at)
    }

    /// Whether the copy may answer at `now`.
    pub fn is_fresh(&self, now: Timestamp) -> bool {
        now < self.fresh_until
    }
}

/// What a load found, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// What is known of the key.
    pub copy: Copy,
    /// The tier that knew.
    pub source: Source,
    /// Whether something newer may stand in the store, which could not be asked.
    pub stale: bool,
}

/// A lifetime for one copy: `base`, give or take a tenth, so that copies made together do not end together.
pub fn lifetime(base: Duration) -> Duration {
    let tenth = base / 10;
    (base - tenth).saturating_add(tenth.mul_f64(rand::random_range(0.0..=2.0)))
}

/// Whether a read of `copy` at `now` should renew it in the background: less than the share `threshold` of `lifetime`, or of its own where
/// that is shorter, is left. A threshold of 0 never does.
pub fn needs_refresh(copy: &Copy, now: Timestamp, lifetime: Duration, threshold: f64) -> bool {
    copy.fresh_until.since(now).as_secs_f64() < lifetime.min(copy.lifetime()).as_secs_f64() * threshold
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_is_its_base_give_or_take_a_tenth() {
        let base = Duration::from_secs(100);
        let drawn: Vec<Duration> = (0..1000).map(|_| lifetime(base)).collect();
        assert!(drawn.iter().all(|d| (90.0..=110.0).contains(&d.as_secs_f64())));
        assert!(drawn.iter().any(|d| *d < base - Duration::from_secs(5)));
        assert!(drawn.iter().any(|d| *d > base + Duration::from_secs(5)));
        assert_eq!(lifetime(Duration::ZERO), Duration::ZERO);
        assert!(lifetime(Duration::MAX) > Duration::MAX / 2, "no overflow");
    }

    #[test]
    fn a_copy_is_renewed_when_little_of_its_lifetime_is_left() {
        let whole = Duration::from_secs(100);
        let copy = Copy::new(None, Timestamp(0), whole);
        assert!(!needs_refresh(&copy, Timestamp(80_000), whole, 0.2));
        assert!(needs_refresh(&copy, Timestamp(80_001), whole, 0.2));
        assert!(needs_refresh(&copy, Timestamp(200_000), whole, 0.2));
        let short = Copy::new(None, Timestamp(0), whole / 10);
        assert!(
            !needs_refresh(&short, Timestamp(8_000), whole, 0.2),
            "not at every read"
        );
        assert!(needs_refresh(&short, Timestamp(8_001), whole, 0.2));
        for off in [0.0, -1.0, f64::NAN] {
            assert!(!needs_refresh(&copy, Timestamp(200_000), whole, off));
        }
    }

    #[test]
    fn a_copy_answers_until_its_lifetime_ends() {
        let copy = Copy::new(None, Timestamp(1_000), Duration::from_secs(5));
        assert!(copy.is_fresh(Timestamp(5_999)));
        assert!(!copy.is_fresh(Timestamp(6_000)));
    }
}
