//! Which rows of a rejected batch are to blame.
//!
//! Owns the halving and the verdicts; the drain commits the part that this names, and tells it how that fared. Does no I/O and
//! retries nothing. Invariants: every row is in exactly one place: committed, condemned, suspected or in a part still to be tried. A row
//! is condemned only when it was rejected alone, then the table took another row, and then it was rejected alone again: what refuses
//! every row is an outage, and no row's fault, also when it ends between a rejection and the look at what the table takes.

use std::{
    collections::{BTreeSet, VecDeque},
    mem,
    ops::Range,
};

use crate::{model::Write, store::StoreError};

/// How many rows may be rejected alone, with nothing that shows that the table takes any, before the table is held to refuse every
/// row: the rest of the batch is not tried on it then.
const SUSPECTS_MAX: usize = 8;

/// A batch on its way into the store: in one part, unless it was rejected.
#[derive(Debug)]
pub(super) struct Bisection {
    rows: Vec<Write>,
    /// What is still to be tried, in this order; none is empty.
    parts: VecDeque<Range<usize>>,
    /// Rejected alone, and nothing shows since that the table takes any row.
    suspects: Vec<(usize, StoreError)>,
    /// Rejected alone, and then the table took another row: to be tried once more.
    doubted: BTreeSet<usize>,
    condemned: Vec<(usize, StoreError)>,
}

impl Bisection {
    /// A batch that was not tried.
    pub(super) fn new(rows: Vec<Write>) -> Bisection {
        let whole = 0..rows.len();
        Bisection {
            rows,
            parts: VecDeque::from_iter((!whole.is_empty()).then_some(whole)),
            suspects: Vec::new(),
            doubted: BTreeSet::new(),
            condemned: Vec::new(),
        }
    }

    /// The rows to commit next, together.
    pub(super) fn part(&self) -> Option<&[Write]> {
        self.parts.front().map(|part| &self.rows[part.clone()])
    }

    /// That part is in the store, but for the rows at these places of it, which were skipped: each is next, alone. `wrote`: the table
    /// took at least one of them.
    pub(super) fn committed(&mut self, wrote: bool, skipped: impl DoubleEndedIterator<Item = usize>) {
        if let Some(part) = self.parts.pop_front() {
            for place in skipped.rev() {
                self.parts.push_front(part.start + place..part.start + place + 1);
            }
        }
        if wrote {
            self.took();
        }
    }

    /// The table took a row, of this batch or a harmless one: rows that it rejected before are tried once more, next.
    pub(super) fn took(&mut self) {
        for (row, _) in self.suspects.drain(..).rev() {
            self.doubted.insert(row);
            self.parts.push_front(row..row + 1);
        }
    }

    /// That part was rejected, and is more than one row: its halves are next.
    pub(super) fn halve(&mut self) {
        if let Some(part) = self.parts.pop_front() {
            let middle = part.start + part.len() / 2;
            self.parts.push_front(middle..part.end);
            self.parts.push_front(part.start..middle);
        }
    }

    /// That part is one row, and was rejected. Whether it is only suspected: then what the table does with a harmless row matters.
    pub(super) fn rejected(&mut self, error: StoreError) -> bool {
        let Some(part) = self.parts.pop_front() else {
            return false;
        };
        let row = part.start;
        let suspected = !self.doubted.remove(&row);
        let verdicts = if suspected {
            &mut self.suspects
        } else {
            &mut self.condemned
        };
        verdicts.push((row, error));
        suspected
    }

    /// That part was rejected: all of it is to blame.
    #[cfg(feature = "planted-faults")]
    pub(super) fn condemn(&mut self, error: &StoreError) {
        let part = self.parts.pop_front().unwrap_or_default();
        self.condemned.extend(part.map(|row| (row, error.clone())));
    }

    /// The error of a suspect, where the table is held to refuse every row.
    pub(super) fn table_refusal(&self) -> Option<StoreError> {
        let enough = self.parts.is_empty() || self.suspects.len() >= SUSPECTS_MAX;
        let (_, last) = self.suspects.last().filter(|_| enough)?;
        Some(last.clone())
    }

    /// An outage came in between. Whatever the table does afterwards proves nothing about a row that it rejected before: suspects
    /// are tried again, as if for the first time. A row that is doubted stays so: the table took another one since.
    pub(super) fn interrupted(&mut self) {
        let suspects = mem::take(&mut self.suspects);
        self.parts.extend(suspects.into_iter().map(|(row, _)| row..row + 1));
    }

    /// Whether a part of it was rejected.
    pub(super) fn is_split(&self) -> bool {
        self.parts.front().is_none_or(|part| part.len() < self.rows.len())
    }

    /// The rows condemned since this was last asked, with their errors.
    pub(super) fn take_condemned(&mut self) -> Vec<(Write, StoreError)> {
        let condemned = mem::take(&mut self.condemned).into_iter();
        condemned.map(|(row, error)| (self.rows[row].clone(), error)).collect()
    }

    /// The rows that are neither committed nor condemned.
    pub(super) fn undecided(&self) -> impl Iterator<Item = &Write> {
        let suspects = self.suspects.iter().map(|(row, _)| *row);
        let rows = self.parts.iter().cloned().flatten().chain(suspects);
        rows.map(|row| &self.rows[row])
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, iter};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        model::{Entry, Key, Tags, Version},
        store::StoreErrorKind,
    };

    fn rows(count: usize) -> Vec<Write> {
        let row = |number: usize| Write {
            key: Key::new("test", &format!("k{number:04}")).expect("valid"),
            entry: Entry {
                version: Version::new(number as i64 + 1).expect("positive"),
                value: None,
                expires_at: None,
            },
            tags: Tags::default(),
            requests: Vec::new(),
        };
        (0..count).map(row).collect()
    }

    fn number(write: &Write) -> usize {
        write.entry.version.get() as usize - 1
    }

    fn refused() -> StoreError {
        StoreError::new(StoreErrorKind::Rejected, "refused")
    }

    fn condemned(bisection: &mut Bisection) -> Vec<usize> {
        let condemned = bisection.take_condemned();
        condemned.iter().map(|(write, _)| number(write)).collect()
    }

    fn undecided(bisection: &Bisection) -> Vec<usize> {
        let mut undecided: Vec<usize> = bisection.undecided().map(number).collect();
        undecided.sort_unstable();
        undecided
    }

    /// Bisects a batch against a table that refuses `poison`, until the end or a refusal of the table. The rows of every commit that it
    /// tried.
    fn bisect(bisection: &mut Bisection, poison: &BTreeSet<usize>, probe_ok: bool) -> Vec<Vec<usize>> {
        let mut tried = Vec::new();
        while let Some(part) = bisection.part()
            && bisection.table_refusal().is_none()
        {
            let part: Vec<usize> = part.iter().map(number).collect();
            match part.iter().filter(|row| poison.contains(row)).count() {
                0 => bisection.committed(true, iter::empty()),
                _ if part.len() > 1 => bisection.halve(),
                _ => {
                    if bisection.rejected(refused()) && probe_ok {
                        bisection.took();
                    }
                }
            }
            tried.push(part);
        }
        tried
    }

    proptest! {
        #[test]
        fn condemns_exactly_the_poison(count in 1..300usize, poison in proptest::collection::btree_set(0..300usize, 0..20)) {
            let poison: BTreeSet<usize> = poison.into_iter().filter(|row| *row < count).collect();
            let mut bisection = Bisection::new(rows(count));
            let tried = bisect(&mut bisection, &poison, true);
            let clean = tried.into_iter().filter(|part| part.iter().all(|row| !poison.contains(row)));
            let mut all: Vec<usize> = clean.flatten().chain(condemned(&mut bisection)).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..count).collect::<Vec<_>>(), "each row committed or condemned, once");
            prop_assert!(undecided(&bisection).is_empty() && bisection.table_refusal().is_none());
        }
    }

    #[test]
    fn a_table_that_refuses_every_row_condemns_none_and_is_found_out_soon() {
        let mut bisection = Bisection::new(rows(1000));
        let tried = bisect(&mut bisection, &(0..1000).collect(), false);
        assert!(tried.len() < 30, "{} commits", tried.len());
        assert!(bisection.table_refusal().is_some());
        assert!(condemned(&mut bisection).is_empty());
        assert_eq!(undecided(&bisection).len(), 1000);
    }

    #[test]
    fn without_a_probe_only_a_row_taken_afterwards_condemns() {
        let mut bisection = Bisection::new(rows(8));
        bisect(&mut bisection, &BTreeSet::from([0, 7]), false);
        assert_eq!((condemned(&mut bisection), undecided(&bisection)), (vec![0], vec![7]));
        assert!(bisection.table_refusal().is_some());
    }

    #[test]
    fn an_outage_clears_suspects_and_keeps_the_parts() {
        let mut bisection = Bisection::new(rows(4));
        assert!(!bisection.is_split());
        bisection.halve();
        bisection.halve();
        assert!(bisection.rejected(refused()));
        bisection.interrupted();
        assert!(bisection.is_split());
        // Rows 1, 2 and 3 are taken; row 0 turns out to be harmless.
        bisect(&mut bisection, &BTreeSet::new(), true);
        assert!(condemned(&mut bisection).is_empty() && undecided(&bisection).is_empty());
    }

    #[test]
    fn a_table_that_recovers_between_a_rejection_and_the_probe_condemns_none() {
        let mut bisection = Bisection::new(rows(2));
        bisection.halve();
        assert!(bisection.rejected(refused()), "rejected with the whole table");
        // The table is mended here: the probe, and everything after it, succeeds.
        bisection.took();
        bisect(&mut bisection, &BTreeSet::new(), true);
        assert!(condemned(&mut bisection).is_empty() && undecided(&bisection).is_empty());
    }

    #[test]
    fn a_skipped_row_is_tried_alone_and_holds_nobody_up() {
        let mut bisection = Bisection::new(rows(5));
        bisection.committed(true, [1, 3].into_iter());
        assert_eq!(undecided(&bisection), [1, 3]);
        assert_eq!(bisection.part().map(<[Write]>::len), Some(1));
    }

    #[test]
    fn one_poison_row_costs_two_commits_a_halving() {
        let mut bisection = Bisection::new(rows(1024));
        let tried = bisect(&mut bisection, &BTreeSet::from([700]), true);
        assert_eq!(tried.len(), 1 + 2 * 10 + 1, "and one more to be sure");
    }
}
