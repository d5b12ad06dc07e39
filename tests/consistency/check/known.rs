//! Who wrote what of one key: each version, and each absence.
//!
//! Owns telling writes by their values and versions, and the complaints where that fails. An absence is told no version, so it has to be
//! excused by a delete that it may have seen. A touch shows the value of another write; that of a counter whose caller was not told shows
//! any.

use std::collections::{BTreeMap, HashMap};

use super::{Rule, Verdict};
use crate::history::{Act, Change, Class, History, Nanos, Op, Outcome, Record, Value, Version};

/// How long after its call a delete of unknown outcome and unknown version may have been stamped, as the stamps of other replicas count time:
/// deadlines, pauses and the clocks' distance are less.
const OPEN_DELETE_LASTS: Nanos = 20_000_000_000;

/// A write, and what is known of it.
#[derive(Debug, Clone, Copy)]
struct Author {
    wrote: Wrote,
    call: Nanos,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrote {
    Value(Value),
    Tombstone,
    /// What stood before.
    Touch,
}

/// Calls whose callers were not told, less those that were seen.
#[derive(Debug, Default)]
struct Untold {
    deletes: Vec<Nanos>,
    touches: Vec<Nanos>,
    adds: Vec<Nanos>,
}

impl Untold {
    /// Takes the first of these calls, if it is before an instant: it is what was seen then.
    fn take(calls: &mut Vec<Nanos>, seen_by: Nanos) -> Option<Nanos> {
        let first = calls.first().copied().filter(|call| *call < seen_by)?;
        calls.remove(0);
        Some(first)
    }
}

/// See the module.
pub struct Known<'a> {
    pub key: usize,
    class: Class,
    by_value: HashMap<Value, &'a Op>,
    untold: Untold,
    /// Of the puts whose version is known, by their values.
    versions: HashMap<Value, Version>,
    authors: BTreeMap<Version, Author>,
    /// What came into the row, by version, each with the call of its write.
    applied: Vec<(Version, Nanos)>,
    /// Tombstones that somebody may have seen by version, each with the call of its delete.
    tombstones: Vec<(Version, Nanos)>,
    /// The same by call, each with the highest version up to there.
    highest_tombstones: Vec<(Nanos, Version)>,
    /// Calls of deletes that may have been seen and whose version nobody knows.
    open_deletes: Vec<Nanos>,
}

impl<'a> Known<'a> {
    /// Finds out who wrote what was seen, and complains of what nobody can have written.
    pub fn learn(history: &History, key: usize, class: Class, ops: &[&'a Op], verdict: &mut Verdict) -> Known<'a> {
        let mut known = Known {
            key,
            class,
            by_value: HashMap::new(),
            untold: Untold::default(),
            versions: HashMap::new(),
            authors: BTreeMap::new(),
            applied: Vec::new(),
            tombstones: Vec::new(),
            highest_tombstones: Vec::new(),
            open_deletes: Vec::new(),
        };
        let mut untold: Vec<Nanos> = Vec::new();
        for op in ops {
            let Act::Write { change, outcome, .. } = &op.act else {
                continue;
            };
            match change.value() {
                // What was refused may have been written by another call of its request.
                Some(value) if matches!(outcome, Outcome::Refused(_)) => {
                    known.by_value.entry(value).or_insert(op);
                }
                Some(value) => {
                    known.by_value.insert(value, op);
                }
                None => {}
            }
            match (outcome, change) {
                (Outcome::Unknown, Change::Delete) => untold.push(op.call),
                (Outcome::Unknown, Change::Touch) => known.untold.touches.push(op.call),
                (Outcome::Unknown, Change::Add { .. }) => known.untold.adds.push(op.call),
                (Outcome::Ok(version), _) => known.acknowledge(*version, *change, op, verdict),
                _ => {}
            }
        }
        let end = ops.iter().map(|op| op.ret).max().unwrap_or(0);
        let tombs = known.learn_rows(history, end, &untold, verdict);
        for op in ops {
            if let Act::Read {
                found: Some((version, value)),
                source,
                ..
            } = &op.act
            {
                known.recognise((*version, *value), op.ret, op.call, source, verdict);
            }
        }
        let applied = history.applied.get(&key).into_iter().flatten();
        let call = |record: &Record| known.authors.get(&record.version).map_or(0, |author| author.call);
        known.applied = applied.map(|record| (record.version, call(record))).collect();
        known.applied.sort_unstable();
        known.tombstones.sort_unstable();
        let mut by_call: Vec<_> = known
            .tombstones
            .iter()
            .map(|(version, call)| (*call, *version))
            .collect();
        by_call.sort_unstable();
        let mut highest = 0;
        for (_, version) in &mut by_call {
            highest = highest.max(*version);
            *version = highest;
        }
        known.highest_tombstones = by_call;
        known.untold.deletes = untold[tombs.min(untold.len())..].to_vec();
        // Of a key written only through, whatever anybody saw is in the rows.
        if !class.is_through() && tombs < untold.len() {
            known.open_deletes = untold;
        }
        known
    }

    fn acknowledge(&mut self, version: Version, change: Change, op: &Op, verdict: &mut Verdict) {
        let wrote = match (change, change.value()) {
            (_, Some(value)) => Wrote::Value(value),
            (Change::Touch, None) => Wrote::Touch,
            (_, None) => Wrote::Tombstone,
        };
        if let Some(other) = self.authors.insert(version, Author { wrote, call: op.call }) {
            let what = format!(
                "version {version} was acknowledged for two writes, {wrote:?} and {:?}",
                other.wrote
            );
            verdict.complain(Rule::TwoVersions, self.key, op.call, what);
        }
        match wrote {
            Wrote::Value(value) => {
                if let Some(other) = self.versions.insert(value, version) {
                    let what = format!("{value:?} was acknowledged as version {other}, and as {version}");
                    verdict.complain(Rule::TwoVersions, self.key, op.call, what);
                }
            }
            Wrote::Tombstone => self.tombstones.push((version, op.call)),
            Wrote::Touch => {}
        }
    }

    /// Learns from the rows. How many tombstones of writers that were not told they had.
    fn learn_rows(&mut self, history: &History, end: Nanos, untold: &[Nanos], verdict: &mut Verdict) -> usize {
        let key = self.key;
        let mut stands = None;
        let mut tombs = 0;
        let applied = history.applied.get(&key).map_or(&[][..], Vec::as_slice);
        for Record { version, value } in applied {
            if stands.is_some_and(|stands| stands >= *version) {
                let what = format!("its row went from version {stands:?} to {version}");
                verdict.complain(Rule::StoreWentBack, key, end, what);
            }
            stands = Some(*version);
            match value {
                Some(value) => self.recognise((*version, *value), end, end, "the audit", verdict),
                None => tombs += usize::from(self.recognise_tombstone(*version, untold, verdict, end)),
            }
        }
        if tombs > untold.len() {
            let what = format!(
                "{tombs} tombstones stood in its row whose writers were not told so, and {} deletes can be that",
                untold.len()
            );
            verdict.complain(Rule::NeverWritten, key, end, what);
        }
        let row = history.rows.get(&key).map(|row| row.version);
        if row != stands {
            let what = format!("version {row:?} stands in its row, and {stands:?} was the last that came there");
            verdict.complain(Rule::StoreWentBack, key, end, what);
        }
        tombs
    }

    /// Whether this tombstone is of a delete whose caller was not told.
    fn recognise_tombstone(&mut self, version: Version, untold: &[Nanos], verdict: &mut Verdict, end: Nanos) -> bool {
        match self.authors.get(&version).map(|author| author.wrote) {
            Some(Wrote::Tombstone) => false,
            Some(wrote) => {
                let what = format!("version {version} is a tombstone in its row, and was {wrote:?}");
                verdict.complain(Rule::TwoVersions, self.key, end, what);
                false
            }
            None => {
                let call = untold.iter().min().copied().unwrap_or(0);
                let wrote = Wrote::Tombstone;
                self.authors.insert(version, Author { wrote, call });
                self.tombstones.push((version, call));
                true
            }
        }
    }

    /// Finds the write whose value was seen, by `seen_by`.
    fn recognise(
        &mut self,
        (version, value): (Version, Value),
        seen_by: Nanos,
        at: Nanos,
        place: &str,
        verdict: &mut Verdict,
    ) {
        let key = self.key;
        let author = self.authors.get(&version).map(|author| author.wrote);
        let Some(op) = self.by_value.get(&value).copied() else {
            // Nobody knows what an add has made of which nobody was told.
            if author == Some(Wrote::Value(value)) {
                return;
            }
            if author.is_none()
                && self.class == Class::Counter
                && let Some(call) = Untold::take(&mut self.untold.adds, seen_by)
            {
                let wrote = Wrote::Value(value);
                self.authors.insert(version, Author { wrote, call });
                return;
            }
            let what = format!("{place} shows {value:?}, which was never written to it, as version {version}");
            return verdict.complain(Rule::NeverWritten, key, at, what);
        };
        if op.call >= seen_by {
            let what = format!(
                "{place} shows version {version} at {seen_by}, and it was written at {}",
                op.call
            );
            verdict.complain(Rule::FromTheFuture, key, at, what);
        }
        if let Act::Write {
            outcome: Outcome::NotApplied | Outcome::Refused(_),
            ..
        } = op.act
        {
            let what = format!("{place} shows version {version}, a write that was refused");
            verdict.complain(Rule::WasRefused, key, at, what);
        }
        let before = self.versions.get(&value).copied();
        match (author, before) {
            (Some(Wrote::Touch), _) => return,
            (Some(Wrote::Value(wrote)), Some(before)) if wrote == value && before == version => return,
            (None, None) => {
                self.versions.insert(value, version);
                let wrote = Wrote::Value(value);
                self.authors.insert(version, Author { wrote, call: op.call });
                return;
            }
            (None, Some(_)) => {
                if let Some(call) = Untold::take(&mut self.untold.touches, seen_by) {
                    let wrote = Wrote::Touch;
                    self.authors.insert(version, Author { wrote, call });
                    return;
                }
            }
            _ => {}
        }
        let what = format!(
            "{place} shows version {version} with {value:?}, which was version {before:?}; that version was {author:?}"
        );
        verdict.complain(Rule::TwoVersions, key, at, what);
    }

    /// The version of a write, where anybody was told or shown it.
    pub fn version(&self, op: &Op) -> Option<Version> {
        match &op.act {
            Act::Write {
                outcome: Outcome::Ok(version),
                ..
            } => Some(*version),
            Act::Write { change, .. } => self.versions.get(&change.value()?).copied(),
            Act::Read { .. } => None,
        }
    }

    /// The lowest version, at or above `floor`, that an absence seen by `seen_by` can be: 0 where nothing need have been written. In the store
    /// itself nobody sees a delete that a higher write of its commit superseded; a cache may have been told of both.
    pub fn absence(&self, floor: Version, seen_by: Nanos, of_store: bool) -> Option<Version> {
        if floor <= 0 {
            return Some(0);
        }
        let committed = of_store && self.class.is_through();
        let first = self.tombstones.partition_point(|(version, _)| *version < floor);
        let above = self.tombstones[first..].iter();
        called_before(above, seen_by, |version| !committed || self.is_applied(version))
            .or_else(|| self.is_open_above(floor, seen_by).then_some(floor))
    }

    /// Whether a version is known to be a tombstone.
    pub fn is_tombstone(&self, version: Version) -> bool {
        let author = self.authors.get(&version);
        author.is_some_and(|author| author.wrote == Wrote::Tombstone)
    }

    /// Whether somebody may have deleted it by an instant of whom nobody knows when.
    pub fn has_untold_delete(&self, by: Nanos) -> bool {
        self.untold.deletes.first().is_some_and(|call| *call < by)
    }

    /// Whether a version came into the row.
    pub fn is_applied(&self, version: Version) -> bool {
        self.applied
            .binary_search_by_key(&version, |(version, _)| *version)
            .is_ok()
    }

    /// The lowest version above another one that came into the row and was called before an instant.
    pub fn applied_above(&self, version: Version, before: Nanos) -> Option<Version> {
        let first = self.applied.partition_point(|(applied, _)| *applied <= version);
        called_before(self.applied[first..].iter(), before, |_| true)
    }

    /// The highest version that an absence seen by `seen_by` can be.
    pub fn latest_absence(&self, seen_by: Nanos) -> Version {
        let before = self.highest_tombstones.partition_point(|(call, _)| *call < seen_by);
        before.checked_sub(1).map_or(0, |last| self.highest_tombstones[last].1)
    }

    /// Whether there may have been a delete above a version that nobody was told of.
    fn is_open_above(&self, floor: Version, seen_by: Nanos) -> bool {
        let written = self.authors.get(&floor).map_or(0, |author| author.call);
        let first = self
            .open_deletes
            .partition_point(|call| call.saturating_add(OPEN_DELETE_LASTS) < written);
        self.open_deletes.get(first).is_some_and(|call| *call < seen_by)
    }

    /// The rule that is broken by missing a version: if that is a delete, and a value is shown for it, what was deleted is back.
    pub fn blame(&self, rule: Rule, missed: Version, shows_value: bool) -> Rule {
        match self.authors.get(&missed) {
            Some(author) if shows_value && author.wrote == Wrote::Tombstone => Rule::Resurrected,
            Some(_) | None => rule,
        }
    }
}

/// The first of these versions that `fits` and was called before an instant.
fn called_before<'a>(
    versions: impl Iterator<Item = &'a (Version, Nanos)>,
    instant: Nanos,
    fits: impl Fn(Version) -> bool,
) -> Option<Version> {
    versions
        // Calls rise about as versions do.
        .take_while(|(_, call)| *call < instant.saturating_add(3 * OPEN_DELETE_LASTS))
        .find(|(version, call)| *call < instant && fits(*version))
        .map(|(version, _)| *version)
}
