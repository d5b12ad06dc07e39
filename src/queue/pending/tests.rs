//! The pending table: what each step makes of it, and proofs that it does as a naive one does.

use std::cell::Cell;

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

#[derive(Debug, Clone)]
enum Step {
    Offer(u8, i64, u64),
    Take(usize, usize, bool),
    Settle(u8, Option<i64>),
    Release(u8, Option<i64>),
    Overtake(u8, i64),
    Wait(i64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // A try that ends is mostly of the version in flight (`None`), and now and then of one long gone.
    let tried = || prop_oneof![4 => Just(None), 1 => (1..30i64).prop_map(Some)];
    let step = prop_oneof![
        6 => (0..6u8, 1..30i64, 0..3u64).prop_map(|(k, v, d)| Step::Offer(k, v, d * 10)),
        3 => (0..4usize, 0..600usize, any::<bool>()).prop_map(|(n, b, h)| Step::Take(n, b, h)),
        3 => (0..6u8, tried()).prop_map(|(k, v)| Step::Settle(k, v)),
        2 => (0..6u8, tried()).prop_map(|(k, v)| Step::Release(k, v)),
        1 => (0..6u8, 1..30i64).prop_map(|(k, v)| Step::Overtake(k, v)),
        2 => (1..15i64).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..120)
}

/// The same table, naively: a list of slots in the order of nothing.
#[derive(Debug, Default)]
struct Model(Vec<ModelSlot>);

#[derive(Debug, Clone)]
struct ModelSlot {
    key: u8,
    newest: i64,
    /// Acceptance, delay and rank of the oldest write that is in no batch.
    waiting: Option<(i64, u64, usize)>,
    flight: Option<(i64, (i64, u64, usize))>,
}

impl ModelSlot {
    fn place(&self) -> (i64, u64, usize) {
        self.flight
            .map(|(_, place)| place)
            .or(self.waiting)
            .expect("one of them")
    }

    fn due(&self) -> (i64, usize) {
        let (admitted, delay, rank) = self.place();
        (admitted + delay as i64, rank)
    }
}

impl Model {
    fn slot(&mut self, key: u8) -> Option<&mut ModelSlot> {
        self.0.iter_mut().find(|slot| slot.key == key)
    }

    fn offer(&mut self, key: u8, version: i64, now: i64, delay: u64, rank: usize) {
        let Some(slot) = self.slot(key) else {
            let waiting = Some((now, delay, rank));
            return self.0.push(ModelSlot {
                key,
                newest: version,
                waiting,
                flight: None,
            });
        };
        if version > slot.newest {
            slot.newest = version;
            slot.waiting = slot.waiting.or(Some((now, delay, rank)));
        }
    }

    fn take(&mut self, now: i64, entries_max: usize, bytes_max: usize, hurried: bool) -> Vec<(Key, i64)> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        self.0.sort_by_key(ModelSlot::due);
        for slot in self.0.iter_mut().filter(|slot| slot.flight.is_none()) {
            if taken.len() < entries_max && bytes < bytes_max && (hurried || slot.due().0 <= now) {
                slot.flight = slot.waiting.take().map(|place| (slot.newest, place));
                bytes += write(slot.key, slot.newest).weight();
                taken.push((key(slot.key), slot.newest));
            }
        }
        taken
    }

    fn end(&mut self, key: u8, tried: i64, left: bool) {
        if left {
            self.overtake(key, tried);
        }
        if let Some(slot) = self.slot(key)
            && let Some((_, place)) = slot.flight.take_if(|(version, _)| *version == tried)
            && !left
        {
            slot.waiting = Some(place);
        }
    }

    fn overtake(&mut self, key: u8, version: i64) {
        self.0.retain(|slot| slot.key != key || slot.newest > version);
    }
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever happens in whatever order, the table shows, takes and counts as the naive one does, and holds one permit
    /// per slot.
    #[test]
    fn does_as_the_naive_table(steps in steps()) {
        let held = Cell::new(0);
        let mut pending = Pending::new();
        let mut model = Model::default();
        let mut now = 0;
        for (rank, step) in steps.into_iter().enumerate() {
            let flying = |model: &mut Model, key| model.slot(key).and_then(|slot| slot.flight).map_or(1, |(v, _)| v);
            match step {
                Step::Offer(k, v, delay) => {
                    let permit = Counted::new(&held);
                    drop(pending.offer(write(k, v), permit, Timestamp(now), Duration::from_millis(delay)));
                    model.offer(k, v, now, delay, rank);
                }
                Step::Take(entries_max, bytes_max, hurried) => {
                    let taken = pending.take(Timestamp(now), entries_max, bytes_max, hurried);
                    let taken: Vec<_> = taken.into_iter().map(|w| (w.key, w.entry.version.get())).collect();
                    prop_assert_eq!(taken, model.take(now, entries_max, bytes_max, hurried));
                }
                Step::Settle(k, v) => {
                    let v = v.unwrap_or_else(|| flying(&mut model, k));
                    let _ = pending.settle(&key(k), version(v), &mut Vec::new());
                    model.end(k, v, true);
                }
                Step::Release(k, v) => {
                    let v = v.unwrap_or_else(|| flying(&mut model, k));
                    pending.release(&key(k), version(v));
                    model.end(k, v, false);
                }
                Step::Overtake(k, v) => {
                    pending.overtake(&key(k), version(v), &mut Vec::new());
                    model.overtake(k, v);
                }
                Step::Wait(millis) => now += millis,
            }
            for k in 0..6 {
                let shown = shown(&pending, k);
                let expected = model.slot(k).map(|slot| write(k, slot.newest).entry);
                prop_assert_eq!(shown, expected);
            }
            prop_assert_eq!(pending.entries(), model.0.len());
            let weight = model.0.iter().map(|slot| write(slot.key, slot.newest).weight()).sum::<usize>();
            prop_assert_eq!(pending.bytes(), weight);
            prop_assert_eq!(held.get(), model.0.len());
            let waiting = model.0.iter().filter(|slot| slot.flight.is_none());
            prop_assert_eq!(pending.next_due().map(|at| at.0), waiting.map(|slot| slot.due().0).min());
            prop_assert_eq!(pending.oldest().map(|at| at.0), model.0.iter().map(|slot| slot.place().0).min());
            let told = |(name, share): (&str, &Share)| (name.to_owned(), share.entries(), share.bytes, share.oldest().map(|at| at.0));
            let mut told: Vec<_> = pending.shares().map(told).collect();
            told.sort();
            let counted = ["even", "odds"].into_iter().filter_map(|name| {
                let slots: Vec<_> = model.0.iter().filter(|slot| namespace(slot.key) == name).collect();
                let bytes = slots.iter().map(|slot| write(slot.key, slot.newest).weight()).sum::<usize>();
                let oldest = slots.iter().map(|slot| slot.place().0).min();
                (!slots.is_empty()).then(|| (name.to_owned(), slots.len(), bytes, oldest))
            });
            prop_assert_eq!(told, counted.collect::<Vec<_>>());
        }
    }
}
