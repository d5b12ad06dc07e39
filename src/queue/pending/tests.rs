//! The pending table: what each step makes of it; in [`model`] the proof that it does as a naive one does.

mod model;

use std::{cell::Cell, mem};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::model::Tags;

/// Of equal length, so that a write weighs the same in either.
fn namespace(number: u8) -> &'static str {
    if number.is_multiple_of(2) { "even" } else { "odds" }
}

fn key(number: u8) -> Key {
    Key::new(namespace(number), &format!("k{number}")).expect("valid")
}

fn write(number: u8, version: i64) -> Write {
    Write {
        key: key(number),
        entry: Entry {
            version: self::version(version),
            // Sizes that differ from version to version, and now and then a tombstone.
            value: (version % 3 != 0).then(|| Bytes::from(vec![0; (version % 7) as usize * 10])),
            expires_at: None,
        },
        tags: Tags::default(),
        requests: Vec::new(),
    }
}

fn version(number: i64) -> Version {
    Version::new(number).expect("positive")
}

/// What the table tells, with the payload that it gives back, if any.
fn settle<P: Payload>(pending: &mut Pending<P>, number: u8, version: i64) -> (Settled, Option<P>) {
    let mut left = Vec::new();
    let settled = pending.settle(&key(number), self::version(version), &mut left);
    assert!(left.len() <= 1, "no id is owed here");
    (settled, left.pop())
}

/// A permit that tells when it is freed.
#[derive(Debug)]
struct Counted<'a>(&'a Cell<usize>);

impl Payload for () {
    fn inherit(&mut self, (): &mut ()) {}
}

impl Payload for Counted<'_> {
    fn inherit(&mut self, _: &mut Self) {}
}

impl<'a> Counted<'a> {
    fn new(held: &'a Cell<usize>) -> Counted<'a> {
        held.set(held.get() + 1);
        Counted(held)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

fn offer(pending: &mut Pending<()>, number: u8, version: i64, now: i64) {
    let _ = pending.offer(write(number, version), (), Timestamp(now), Duration::ZERO);
}

fn shown<P: Payload>(pending: &Pending<P>, number: u8) -> Option<Entry> {
    pending.get(&key(number)).map(|pending| pending.entry)
}

fn take(pending: &mut Pending<()>, now: i64) -> Vec<(Key, i64)> {
    pending
        .take(Timestamp(now), usize::MAX, usize::MAX, false)
        .into_iter()
        .map(|write| (write.key, write.entry.version.get()))
        .collect()
}

#[test]
fn a_newer_write_survives_the_settling_of_the_older_one_in_flight() {
    let mut pending = Pending::new();
    offer(&mut pending, 1, 1, 0);
    assert_eq!(take(&mut pending, 0), [(key(1), 1)]);
    offer(&mut pending, 1, 2, 5);
    assert!(take(&mut pending, 9).is_empty(), "one version of a key at a time");
    assert_eq!(settle(&mut pending, 1, 1), (Settled::Left, None));
    assert_eq!(pending.oldest(), Some(Timestamp(5)));
    assert_eq!(take(&mut pending, 9), [(key(1), 2)]);
    assert_eq!(settle(&mut pending, 1, 2), (Settled::Left, Some(())));
    assert_eq!((pending.entries(), pending.bytes(), pending.oldest()), (0, 0, None));
}

#[test]
fn a_hot_key_keeps_its_place() {
    let mut pending = Pending::new();
    offer(&mut pending, 1, 1, 0);
    offer(&mut pending, 2, 1, 1);
    offer(&mut pending, 1, 2, 2);
    assert_eq!(take(&mut pending, 2), [(key(1), 2), (key(2), 1)]);
    // Nor does a failed try cost it its place or its age.
    offer(&mut pending, 3, 1, 3);
    offer(&mut pending, 1, 3, 4);
    pending.release(&key(1), version(2));
    pending.release(&key(2), version(1));
    assert_eq!(pending.oldest(), Some(Timestamp(0)));
    assert_eq!(take(&mut pending, 4), [(key(1), 3), (key(2), 1), (key(3), 1)]);
}

#[test]
fn a_delay_counts_from_the_oldest_write_and_pressure_ends_it() {
    let mut pending = Pending::new();
    let delay = Duration::from_millis(10);
    let _ = pending.offer(write(1, 1), (), Timestamp(0), delay);
    let _ = pending.offer(write(1, 2), (), Timestamp(9), delay);
    assert_eq!(pending.next_due(), Some(Timestamp(10)));
    assert!(take(&mut pending, 9).is_empty());
    assert_eq!(pending.take(Timestamp(9), 1, 1, true).len(), 1);
}

#[test]
fn what_was_overtaken_in_flight_disturbs_nothing_later() {
    let mut pending = Pending::new();
    offer(&mut pending, 1, 1, 0);
    take(&mut pending, 0);
    let mut left = Vec::new();
    pending.overtake(&key(1), version(5), &mut left);
    assert_eq!(left, [()]);
    offer(&mut pending, 1, 6, 1);
    pending.release(&key(1), version(1));
    assert_eq!(take(&mut pending, 1), [(key(1), 6)]);
    assert_eq!(settle(&mut pending, 1, 1), (Settled::Left, None));
    assert_eq!(shown(&pending, 1).map(|entry| entry.version), Some(version(6)));
    assert!(take(&mut pending, 1).is_empty(), "still in flight");
}

#[test]
fn what_comes_while_an_older_write_is_in_flight_is_due_at_its_own_time() {
    let mut pending = Pending::new();
    let _ = pending.offer(write(2, 1), (), Timestamp(0), Duration::from_millis(10));
    assert_eq!(pending.take(Timestamp(0), 1, 1, true).len(), 1);
    offer(&mut pending, 2, 2, 0);
    assert_eq!(settle(&mut pending, 2, 1), (Settled::Left, None));
    assert_eq!(pending.next_due(), Some(Timestamp(0)));
}

#[test]
fn a_batch_ends_at_either_bound() {
    let mut pending = Pending::new();
    for number in 0..10 {
        offer(&mut pending, number, 1, 0);
    }
    let weight = write(0, 1).weight();
    assert_eq!(pending.take(Timestamp(0), 3, usize::MAX, false).len(), 3);
    assert_eq!(pending.take(Timestamp(0), 10, weight + 1, false).len(), 2);
    assert_eq!(pending.take(Timestamp(0), 10, 0, false).len(), 0);
}

/// Distinct versions of one key in two orders, some of them lost in the first; and before which of them a batch is taken.
fn deliveries() -> impl Strategy<Value = (Vec<i64>, Vec<i64>, Vec<bool>)> {
    let versions = proptest::collection::btree_set(1..1_000i64, 1..12).prop_map(Vec::from_iter);
    versions.prop_flat_map(|all| {
        let some = proptest::sample::subsequence(all.clone(), 0..=all.len()).prop_shuffle();
        let takes = proptest::collection::vec(any::<bool>(), 2 * all.len());
        (some, Just(all).prop_shuffle(), takes)
    })
}

proptest! {
    /// The one rule: any order, repetition and late redelivery leaves the highest version, whether or not a try is under way, and that
    /// version is what the store is given last.
    #[test]
    fn any_order_repetition_and_late_redelivery_end_at_the_highest_version((first, second, takes) in deliveries()) {
        let held = Cell::new(0);
        let mut pending = Pending::new();
        let mut tried = Vec::new();
        for (number, takes) in first.iter().chain(&second).zip(takes) {
            drop(pending.offer(write(1, *number), Counted::new(&held), Timestamp(0), Duration::ZERO));
            if takes {
                tried.extend(pending.take(Timestamp(0), 1, usize::MAX, false));
            }
        }
        let highest = second.iter().copied().max().map(|number| write(1, number).entry);
        prop_assert_eq!(shown(&pending, 1), highest.clone());
        prop_assert_eq!((pending.entries(), held.get()), (1, 1));
        // Each try succeeds in turn; what is newer than it goes next.
        while pending.entries() > 0 {
            let last = tried.last().cloned();
            if let Some(Write { key, entry, .. }) = last {
                let _ = pending.settle(&key, entry.version, &mut Vec::new());
            }
            tried.extend(pending.take(Timestamp(0), 1, usize::MAX, false));
        }
        prop_assert_eq!(tried.last().map(|write| write.entry.clone()), highest);
        prop_assert!(tried.windows(2).all(|pair| pair[0].entry.version < pair[1].entry.version));
        prop_assert_eq!((pending.get(&key(1)), held.get()), (None, 0));
    }
}
