//! What is pending over what is stored, key by key.
//!
//! Owns the overlay of two ordered lists, either of which may have been cut off, and how far what they say together goes. Pure: no clock and no
//! I/O. Invariant: of a key that is in both the higher version stands, tombstones included; nothing is said of keys beyond a cut.

use std::cmp::Ordering;

use crate::{
    model::{Entry, Key, Tags},
    queue::PendingEntry,
    store::operation::RangeRow,
};

/// The newest of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Newest {
    /// It is pending, with these tags.
    Pending(Key, Entry, Tags),
    /// It is in the store, which has its value.
    Stored(RangeRow),
}

impl Newest {
    pub(super) fn key(&self) -> &Key {
        match self {
            Newest::Pending(key, ..) => key,
            Newest::Stored(row) => &row.key,
        }
    }

    pub(super) fn tags(&self) -> &Tags {
        match self {
            Newest::Pending(.., tags) => tags,
            Newest::Stored(row) => &row.tags,
        }
    }
}

/// Part of a range.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    /// The newest of each key, dead ones included, in the order of their keys.
    pub(super) newest: Vec<Newest>,
    /// The key that it goes up to; `None`: there are no more.
    pub(super) end: Option<Key>,
}

/// Overlays them. Both are in order, and one that has as many as `limit` may have been cut off there.
pub(super) fn merge(pending: Vec<(Key, PendingEntry, Tags)>, rows: Vec<RangeRow>, limit: usize) -> Stretch {
    let cut = |len: usize, last: Option<&Key>| last.filter(|_| len >= limit).cloned();
    let ends = [
        cut(pending.len(), pending.last().map(|(key, ..)| key)),
        cut(rows.len(), rows.last().map(|row| &row.key)),
    ];
    let end = ends.into_iter().flatten().min();
    let within = |key: &Key| end.as_ref().is_none_or(|end| key <= end);
    let mut newest = Vec::with_capacity(pending.len().max(rows.len()));
    let mut pending = pending.into_iter().filter(|(key, ..)| within(key)).peekable();
    let mut rows = rows.into_iter().filter(|row| within(&row.key)).peekable();
    loop {
        let order = match (pending.peek(), rows.peek()) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((key, ..)), Some(row)) => key.cmp(&row.key),
        };
        let pending = if order.is_le() { pending.next() } else { None };
        let row = if order.is_ge() { rows.next() } else { None };
        newest.extend(match (pending, row) {
            // Of equal versions the pending one has its value at hand.
            (Some((_, pending, _)), Some(row)) if pending.entry.version < row.version => Some(Newest::Stored(row)),
            (Some((key, pending, tags)), _) => Some(Newest::Pending(key, pending.entry, tags)),
            (None, row) => row.map(Newest::Stored),
        });
    }
    drop((pending, rows));
    Stretch { newest, end }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;
    use proptest::{collection::btree_map, option, prelude::*};

    use super::*;
    use crate::model::Version;

    fn key(number: u8) -> Key {
        Key::new("orders", &format!("k{number:03}")).expect("valid")
    }

    fn version(number: i64) -> Version {
        Version::new(number).expect("positive")
    }

    type Table = BTreeMap<u8, (i64, Option<u8>)>;

    fn tables() -> impl Strategy<Value = Table> {
        btree_map(0..40_u8, (1..20_i64, option::of(0..9_u8)), 0..30)
    }

    fn pending(table: &Table, after: Option<u8>, limit: usize) -> Vec<(Key, PendingEntry, Tags)> {
        let beyond = table
            .iter()
            .filter(|(number, _)| after.is_none_or(|after| **number > after));
        let entry = |(number, (of, value)): (&u8, &(i64, Option<u8>))| {
            let entry = Entry {
                version: version(*of),
                value: value.map(|bytes| Bytes::from(vec![0; usize::from(bytes)])),
                expires_at: None,
            };
            let pending = PendingEntry {
                entry,
                unconfirmed: false,
            };
            (key(*number), pending, Tags::default())
        };
        beyond.take(limit).map(entry).collect()
    }

    fn rows(table: &Table, after: Option<u8>, limit: usize) -> Vec<RangeRow> {
        let rows = pending(table, after, limit).into_iter();
        rows.map(|(key, pending, tags)| RangeRow {
            key,
            version: pending.entry.version,
            expires_at: None,
            value_bytes: pending.entry.value.map(|value| value.len()),
            tags,
        })
        .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        /// Stretch after stretch, each beginning where the one before ended, is the overlay of the whole tables.
        #[test]
        fn stretches_together_are_the_maximum_of_both(accepted in tables(), stored in tables(), limit in 1..12_usize) {
            let mut wanted: BTreeMap<u8, i64> = BTreeMap::new();
            for (number, (version, _)) in accepted.iter().chain(&stored) {
                let highest = wanted.entry(*number).or_default();
                *highest = (*highest).max(*version);
            }
            let (mut seen, mut after) = (Vec::new(), None);
            loop {
                let stretch = merge(pending(&accepted, after, limit), rows(&stored, after, limit), limit);
                prop_assert!(stretch.newest.len() <= 2 * limit);
                for newest in &stretch.newest {
                    let version = match newest {
                        Newest::Pending(_, entry, _) => entry.version,
                        Newest::Stored(row) => row.version,
                    };
                    seen.push((newest.key().key().to_owned(), version.get()));
                }
                let Some(end) = stretch.end else { break };
                let end = end.key()[1..].parse().expect("a number");
                prop_assert!(after < Some(end), "each goes further");
                after = Some(end);
            }
            let wanted: Vec<_> = wanted.into_iter().map(|(number, version)| (key(number).key().to_owned(), version)).collect();
            prop_assert_eq!(seen, wanted);
        }
    }
}
