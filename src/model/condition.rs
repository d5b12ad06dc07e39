//! Conditions on writes.
//!
//! Owns what a condition means for what stands on a key. The store alone may decide it: what caches know may be old.

use super::{Entry, Timestamp, Version};

/// What must hold of a key for a write to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Condition {
    /// There is no live record.
    Absent,
    /// There is a live record.
    Present,
    /// There is a live record, and of this version.
    Version(Version),
}

impl Condition {
    /// Whether it holds of what stands at `now`.
    pub fn holds(self, standing: Option<&Entry>, now: Timestamp) -> bool {
        let live = standing.filter(|entry| entry.is_live(now));
        match self {
            Condition::Absent => live.is_none(),
            Condition::Present => live.is_some(),
            Condition::Version(version) => live.is_some_and(|entry| entry.version == version),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn only_a_live_record_is_there() {
        let version = |number| Version::new(number).expect("positive");
        let live = Entry {
            version: version(5),
            value: Some(Bytes::new()),
            expires_at: None,
        };
        let now = Timestamp(1_000);
        let expired = Entry {
            expires_at: Some(now),
            ..live.clone()
        };
        let tombstone = Entry {
            value: None,
            ..live.clone()
        };
        for absent in [None, Some(&expired), Some(&tombstone)] {
            assert!(Condition::Absent.holds(absent, now));
            assert!(!Condition::Present.holds(absent, now));
            assert!(!Condition::Version(version(5)).holds(absent, now));
        }
        assert!(!Condition::Absent.holds(Some(&live), now));
        assert!(Condition::Present.holds(Some(&live), now));
        assert!(Condition::Version(version(5)).holds(Some(&live), now));
        assert!(!Condition::Version(version(6)).holds(Some(&live), now));
    }
}
