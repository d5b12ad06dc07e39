//! The order in which the slots that wait are drained, and those that are kept out of it by a pause.
//!
//! Owns which slots a worker may take. Does not own what a slot holds, nor who pauses what. Pure, as the table that it belongs to. Invariants: every
//! slot that waits is in exactly one place here, by its due time and number; a namespace is paused from [`Order::pause`] to [`Order::resume`],
//! whether it has anything here or not. Where nothing is paused, that costs a look at an empty map.

use std::collections::BTreeMap;

use crate::model::{Key, Timestamp};

/// Keys by due time and number of their places.
type Line = BTreeMap<(Timestamp, u64), Key>;

/// All slots that wait.
#[derive(Debug, Default)]
pub(super) struct Order {
    line: Line,
    /// Those of the namespaces that are paused.
    aside: BTreeMap<Box<str>, Line>,
}

impl Order {
    /// A slot waits from now on.
    pub(super) fn insert(&mut self, due: Timestamp, number: u64, key: Key) {
        self.line_of(&key).insert((due, number), key);
    }

    /// A slot does not wait any more.
    pub(super) fn remove(&mut self, due: Timestamp, number: u64, key: &Key) {
        self.line_of(key).remove(&(due, number));
    }

    /// Takes the first slot that is due at `now`, or due or not.
    pub(super) fn take(&mut self, now: Timestamp, hurried: bool) -> Option<Key> {
        let first = self.line.first_entry()?;
        (hurried || first.key().0 <= now).then(|| first.remove())
    }

    /// When the first is due.
    pub(super) fn next_due(&self) -> Option<Timestamp> {
        self.line.first_key_value().map(|((due, _), _)| *due)
    }

    /// Those that are due at `now`.
    pub(super) fn due(&self, now: Timestamp) -> impl Iterator<Item = &Key> {
        self.line.range(..=(now, u64::MAX)).map(|(_, key)| key)
    }

    /// How many may be taken.
    pub(super) fn len(&self) -> usize {
        self.line.len()
    }

    /// Keeps the slots of a namespace out of the line, those to come, too. Looks at all that are in it.
    pub(super) fn pause(&mut self, namespace: &str) {
        let aside = self.aside.entry(namespace.into()).or_default();
        aside.extend(self.line.extract_if(.., |_, key| key.namespace() == namespace));
    }

    /// Lets them into it again, each to its place.
    pub(super) fn resume(&mut self, namespace: &str) {
        if let Some(mut aside) = self.aside.remove(namespace) {
            self.line.append(&mut aside);
        }
    }

    fn line_of(&mut self, key: &Key) -> &mut Line {
        if self.aside.is_empty() {
            return &mut self.line;
        }
        self.aside.get_mut(key.namespace()).unwrap_or(&mut self.line)
    }
}
