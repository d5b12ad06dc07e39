//! From what a database says of a batch to what the commit answers.
//!
//! Owns the accounting of one batch: which writes the upsert applied, and what stands where one lost. Owns no SQL: the backends run
//! the upsert, then ask for the standing versions of the losers, and for the horizon if nothing stands. Invariant: a write is `Applied`,
//! `Superseded` or `BelowHorizon` only on evidence; without it, it was skipped, and the others of its batch do not suffer.

use crate::{
    model::{Key, Version, Write},
    store::{Committed, StoreError, StoreErrorKind},
};

/// The accounting of one batch of distinct, sorted writes.
pub(super) struct Verdict<'a> {
    writes: &'a [Write],
    applied: Vec<bool>,
}

impl<'a> Verdict<'a> {
    /// A batch of which nothing is known to be applied.
    pub(super) fn new(writes: &'a [Write]) -> Verdict<'a> {
        debug_assert!(
            writes.is_sorted_by(|a, b| a.key < b.key),
            "writes are distinct and sorted"
        );
        Verdict {
            writes,
            applied: vec![false; writes.len()],
        }
    }

    /// The database applied the write of this key. A key that is not of the batch is ignored: a trigger may have renamed it, and then
    /// nothing is known of the write.
    pub(super) fn applied(&mut self, namespace: &str, key: &str) {
        let sought = (namespace, key);
        let place = self
            .writes
            .binary_search_by(|write| (write.key.namespace(), write.key.key()).cmp(&sought));
        if let Ok(place) = place {
            self.applied[place] = true;
        }
    }

    /// The keys whose writes were not applied, in the order of the writes.
    pub(super) fn losers(&self) -> Vec<&'a Key> {
        self.lost().map(|write| &write.key).collect()
    }

    /// The answer, given what stands on each of the [`Verdict::losers`] in their order, and the horizon, read after that.
    ///
    /// Of a write at or below the horizon whose key has no row it does not matter whether the upsert refused it for that, or the row that
    /// it lost to was collected in between: it is not in the store, and the horizon keeps it out from now on.
    pub(super) fn settle(self, standing: &[Option<Version>], horizon: Option<Version>) -> Vec<Committed> {
        debug_assert_eq!(standing.len(), self.lost().count());
        let mut standing = standing.iter();
        let mut settled = Vec::with_capacity(self.writes.len());
        for (write, applied) in self.writes.iter().zip(&self.applied) {
            let committed = if *applied {
                Committed::Applied
            } else {
                match (standing.next().copied().flatten(), horizon) {
                    (Some(version), _) if version == write.entry.version => Committed::Applied,
                    (Some(version), _) if version > write.entry.version => Committed::Superseded { standing: version },
                    (None, Some(horizon)) if write.entry.version <= horizon => Committed::BelowHorizon { horizon },
                    _ => Committed::Skipped,
                }
            };
            settled.push(committed);
        }
        settled
    }

    fn lost(&self) -> impl Iterator<Item = &'a Write> {
        let writes = self.writes.iter().zip(&self.applied);
        writes.filter(|(_, applied)| !**applied).map(|(write, _)| write)
    }
}

/// The horizon cannot be read. The upsert takes nothing new then, for nobody knows what was collected.
pub(super) fn no_control_row() -> StoreError {
    StoreError::new(
        StoreErrorKind::Transient,
        "tidegate_control has lost its row: insert it again, with a gc_horizon not below any version that was ever collected",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Entry, Tags};

    fn version(number: i64) -> Version {
        Version::new(number).expect("positive")
    }

    fn writes() -> Vec<Write> {
        [("a", "z"), ("a.b", "a"), ("ab", "a"), ("ab", "é")]
            .map(|(namespace, key)| Write {
                key: Key::new(namespace, key).expect("valid"),
                entry: Entry {
                    version: version(5),
                    value: None,
                    expires_at: None,
                },
                tags: Tags::default(),
                requests: Vec::new(),
            })
            .to_vec()
    }

    #[test]
    fn each_write_gets_its_own_verdict() {
        let writes = writes();
        let mut verdict = Verdict::new(&writes);
        verdict.applied("ab", "a");
        verdict.applied("ab", "nobody's");
        let losers: Vec<&str> = verdict.losers().iter().map(|key| key.key()).collect();
        assert_eq!(losers, ["z", "a", "é"]);
        let settled = verdict.settle(
            &[Some(version(5)), Some(version(9)), Some(version(6))],
            Some(version(7)),
        );
        assert_eq!(
            settled,
            [
                Committed::Applied,
                Committed::Superseded { standing: version(9) },
                Committed::Applied,
                Committed::Superseded { standing: version(6) },
            ]
        );
    }

    #[test]
    fn a_loser_without_a_row_is_below_the_horizon_or_skipped() {
        let writes = writes();
        for (horizon, below) in [(5, true), (9, true), (4, false)] {
            let settled = Verdict::new(&writes).settle(&[None; 4], Version::new(horizon));
            let horizon = version(horizon);
            let expected = if below {
                Committed::BelowHorizon { horizon }
            } else {
                Committed::Skipped
            };
            assert_eq!(settled, [expected; 4]);
        }
    }

    #[test]
    fn a_loser_without_a_newer_row_is_skipped_and_the_others_are_not() {
        let writes = writes();
        for (standing, horizon) in [
            (None, None),
            (Some(version(4)), None),
            (Some(version(4)), Some(version(9))),
        ] {
            let mut verdict = Verdict::new(&writes);
            for write in &writes[1..] {
                verdict.applied(write.key.namespace(), write.key.key());
            }
            let settled = verdict.settle(&[standing], horizon);
            assert_eq!(settled[0], Committed::Skipped);
            assert!(settled[1..].iter().all(|one| *one == Committed::Applied));
        }
    }
}
