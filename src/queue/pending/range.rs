//! The pending keys in order.
//!
//! Owns an index beside the slots, so that whoever asks for a range holds the shard's lock no longer than the answer is long. Pure, as the
//! table that it belongs to. Invariant: it has exactly the keys that have a slot.

use std::{borrow::Borrow, collections::BTreeSet, ops::Bound};

use crate::model::Key;

/// A key that is found by its text.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ByText(Key);

impl Borrow<str> for ByText {
    fn borrow(&self) -> &str {
        self.0.text()
    }
}

/// The keys.
#[derive(Debug, Default)]
pub(super) struct Ordered {
    keys: BTreeSet<ByText>,
}

impl Ordered {
    pub(super) fn add(&mut self, key: &Key) {
        self.keys.insert(ByText(key.clone()));
    }

    pub(super) fn remove(&mut self, key: &Key) {
        self.keys.remove(key.text());
    }

    /// The keys of a namespace that begin with `prefix`, in order, from the first one after `after`.
    pub(super) fn below(&self, namespace: &str, prefix: &str, after: Option<&str>) -> impl Iterator<Item = &Key> {
        let text = |key: &str| format!("{namespace}\0{key}");
        let below = text(prefix);
        let from = match after.filter(|after| *after >= prefix) {
            Some(after) => Bound::Excluded(text(after)),
            None => Bound::Included(below.clone()),
        };
        let from = from.as_ref().map(String::as_str);
        let keys = self
            .keys
            .range::<str, _>((from, Bound::Unbounded))
            .map(|ByText(key)| key);
        keys.take_while(move |key| key.text().starts_with(&below))
    }
}
