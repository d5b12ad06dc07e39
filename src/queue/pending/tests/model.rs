//! Whatever happens in whatever order, the table shows, takes, counts and holds as a naive one does: lists of slots and of request ids in the
//! order of nothing. Each id is let go of once, and never before a batch that it was in, or it by itself, was told to the store; whoever waits is told
//! in the end, and not before what is waited for has left.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
};

use super::*;
use crate::model::{Answer, Answered, Fingerprint, Request, RequestId};

const KEYS: u8 = 6;

/// Which writes hold their payload, by the step that offered them.
type Alive = RefCell<BTreeSet<usize>>;

/// A payload that tells when it is freed.
#[derive(Debug)]
struct Tracked<'a>(usize, &'a Alive);

impl<'a> Tracked<'a> {
    fn new(step: usize, alive: &'a Alive) -> Tracked<'a> {
        alive.borrow_mut().insert(step);
        Tracked(step, alive)
    }
}

impl Payload for Tracked<'_> {
    fn inherit(&mut self, _: &mut Self) {}
}

impl Drop for Tracked<'_> {
    fn drop(&mut self) {
        assert!(self.1.borrow_mut().remove(&self.0), "freed twice");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Offer(u8, i64, u64, bool),
    Take(usize, usize, bool),
    Settle(u8, Option<i64>),
    Release(u8, Option<i64>),
    Overtake(u8, i64),
    TakeLoose(usize),
    Remembered(bool),
    AwaitStored(u8, i64),
    AwaitSettled(u8, i64),
    /// Of a namespace, or of all.
    AwaitAll(Option<u8>),
    Pause(u8),
    Resume(u8),
    GiveUp(usize),
    Wait(i64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // A try that ends is mostly of the version in flight (`None`), and now and then of one long gone.
    let tried = || prop_oneof![4 => Just(None), 1 => (1..30i64).prop_map(Some)];
    let step = prop_oneof![
        9 => (0..KEYS, 1..30i64, 0..3u64, any::<bool>()).prop_map(|(k, v, d, id)| Step::Offer(k, v, d * 10, id)),
        4 => (0..5usize, 0..1_500usize, any::<bool>()).prop_map(|(n, b, h)| Step::Take(n, b, h)),
        4 => (0..KEYS, tried()).prop_map(|(k, v)| Step::Settle(k, v)),
        3 => (0..KEYS, tried()).prop_map(|(k, v)| Step::Release(k, v)),
        2 => (0..KEYS, 1..30i64).prop_map(|(k, v)| Step::Overtake(k, v)),
        2 => (0..4usize).prop_map(Step::TakeLoose),
        2 => any::<bool>().prop_map(Step::Remembered),
        2 => (0..KEYS, 1..30i64).prop_map(|(k, v)| Step::AwaitStored(k, v)),
        2 => (0..KEYS, 1..30i64).prop_map(|(k, v)| Step::AwaitSettled(k, v)),
        2 => proptest::option::of(0..2u8).prop_map(Step::AwaitAll),
        1 => (0..2u8).prop_map(Step::Pause),
        1 => (0..2u8).prop_map(Step::Resume),
        1 => (0..4usize).prop_map(Step::GiveUp),
        3 => (1..15i64).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..160)
}

/// A write, with the step's number as its id if it is to have one.
fn write_of(number: u8, version: i64, id: Option<usize>) -> Write {
    let write = write(number, version);
    let requests = id.map(|id| Answered {
        request: Request {
            id: RequestId::new(&format!("{id:03}")).expect("valid"),
            fingerprint: Fingerprint([7; 16]),
            ends_at: Timestamp(9),
        },
        answer: Answer {
            version: write.entry.version,
            counter: None,
            expires_at: None,
        },
    });
    Write {
        requests: requests.into_iter().collect(),
        ..write
    }
}

fn step_of(answered: &Answered) -> usize {
    answered.request.id.as_str().parse().expect("a step")
}

/// Acceptance, delay and step of the oldest write that a place stands for.
type Seat = (i64, u64, usize);

#[derive(Debug, Clone)]
struct ModelSlot {
    key: u8,
    newest: i64,
    /// The step that offered it, and whether it has an id.
    step: usize,
    has_id: bool,
    /// Of the oldest write that is in no batch.
    waiting: Option<Seat>,
    flight: Option<(i64, Seat)>,
}

impl ModelSlot {
    fn place(&self) -> Seat {
        self.flight
            .map(|(_, place)| place)
            .or(self.waiting)
            .expect("one of them")
    }

    fn due(&self) -> (i64, usize) {
        let (admitted, delay, step) = self.place();
        (admitted + delay as i64, step)
    }

    fn weight(&self) -> usize {
        write_of(self.key, self.newest, self.has_id.then_some(self.step)).weight()
    }

    /// When what its entry stands for was accepted.
    fn admitted(&self) -> i64 {
        let in_flight = self.flight.filter(|(version, _)| *version == self.newest);
        in_flight
            .map(|(_, place)| place)
            .or(self.waiting)
            .expect("one of them")
            .0
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Waiting,
    With(i64),
    Alone,
}

#[derive(Debug)]
struct ModelId {
    key: u8,
    version: i64,
    step: usize,
    /// As old as this, once it is not its slot's own.
    admitted: i64,
    loose: bool,
    state: State,
}

/// The table, naively.
#[derive(Debug, Default)]
struct Model {
    slots: Vec<ModelSlot>,
    /// The ids that are owed, those of the slots' own writes included.
    ids: Vec<ModelId>,
    /// The highest version that the store is known to have, by key.
    stored: BTreeMap<u8, i64>,
    /// Every write that was accepted.
    accepted: Vec<(u8, i64)>,
    /// The namespaces of which nothing is taken.
    paused: BTreeSet<&'static str>,
}

impl Model {
    fn slot(&mut self, key: u8) -> Option<&mut ModelSlot> {
        self.slots.iter_mut().find(|slot| slot.key == key)
    }

    fn flying(&mut self, key: u8) -> i64 {
        self.slot(key)
            .and_then(|slot| slot.flight)
            .map_or(1, |(version, _)| version)
    }

    fn offer(&mut self, (key, version): (u8, i64), seat: Seat, has_id: bool) {
        let (admitted, _, step) = seat;
        self.accepted.push((key, version));
        if has_id {
            self.ids.push(ModelId {
                key,
                version,
                step,
                admitted,
                loose: false,
                state: State::Waiting,
            });
        }
        let Some(slot) = self.slot(key) else {
            return self.slots.push(ModelSlot {
                key,
                newest: version,
                step,
                has_id,
                waiting: Some(seat),
                flight: None,
            });
        };
        if version > slot.newest {
            let (older, since) = (slot.step, slot.admitted());
            (slot.newest, slot.step, slot.has_id) = (version, step, has_id);
            slot.waiting = match slot.flight {
                None => slot.waiting,
                Some(_) => slot.waiting.or(Some(seat)),
            };
            self.age(older, since);
        }
    }

    fn age(&mut self, step: usize, admitted: i64) {
        let id = self.ids.iter_mut().find(|id| id.step == step);
        id.into_iter().for_each(|id| id.admitted = admitted);
    }

    /// Key, version and ids of each write.
    fn take(
        &mut self,
        now: i64,
        entries_max: usize,
        bytes_max: usize,
        hurried: bool,
    ) -> Vec<(Key, i64, BTreeSet<usize>)> {
        let mut taken = Vec::new();
        let (mut entries, mut bytes) = (0, 0);
        self.slots.sort_by_key(ModelSlot::due);
        let paused = &self.paused;
        let may_fly = |slot: &&mut ModelSlot| slot.flight.is_none() && !paused.contains(namespace(slot.key));
        for slot in self.slots.iter_mut().filter(may_fly) {
            if entries < entries_max && bytes < bytes_max && (hurried || slot.due().0 <= now) {
                slot.flight = slot.waiting.take().map(|place| (slot.newest, place));
                let mut with = BTreeSet::new();
                bytes += write(slot.key, slot.newest).weight();
                for id in &mut self.ids {
                    if id.key == slot.key && !id.loose && id.state == State::Waiting {
                        id.state = State::With(slot.newest);
                        bytes += write_of(0, 1, Some(id.step)).requests[0].request.bytes();
                        with.insert(id.step);
                    }
                }
                entries += 1 + with.len();
                taken.push((key(slot.key), slot.newest, with));
            }
        }
        taken
    }

    fn settle(&mut self, key: u8, tried: i64) {
        self.ids.retain(|id| id.key != key || id.state != State::With(tried));
        self.overtake(key, tried);
        if let Some(slot) = self.slot(key) {
            slot.flight.take_if(|(version, _)| *version == tried);
        }
    }

    fn release(&mut self, key: u8, tried: i64) {
        for id in self
            .ids
            .iter_mut()
            .filter(|id| id.key == key && id.state == State::With(tried))
        {
            id.state = State::Waiting;
        }
        if let Some(slot) = self.slot(key)
            && let Some((_, place)) = slot.flight.take_if(|(version, _)| *version == tried)
        {
            slot.waiting = Some(place);
        }
    }

    fn overtake(&mut self, key: u8, version: i64) {
        let stored = self.stored.entry(key).or_default();
        *stored = version.max(*stored);
        if let Some(at) = self
            .slots
            .iter()
            .position(|slot| slot.key == key && slot.newest <= version)
        {
            let slot = self.slots.remove(at);
            self.age(slot.step, slot.admitted());
            self.ids
                .iter_mut()
                .filter(|id| id.key == key)
                .for_each(|id| id.loose = true);
        }
    }

    fn is_own(&self, id: &ModelId) -> bool {
        self.slots.iter().any(|slot| slot.step == id.step)
    }

    /// Key, weight and age of everything that holds a payload, and who it is.
    fn holders(&self) -> Vec<(u8, usize, i64, usize)> {
        let slots = self
            .slots
            .iter()
            .map(|slot| (slot.key, slot.weight(), slot.place().0, slot.step));
        let owed = self.ids.iter().filter(|id| !self.is_own(id));
        let owed = owed.map(|id| {
            let weight = write_of(id.key, id.version, Some(id.step)).weight();
            (id.key, weight, id.admitted, id.step)
        });
        slots.chain(owed).collect()
    }

    /// Whether the store has what was accepted: nothing of it needs to be waited for any more.
    fn has(&self, accepted: &[(u8, i64)]) -> bool {
        accepted
            .iter()
            .all(|(key, version)| self.stored.get(key).is_some_and(|stored| stored >= version))
    }
}

/// A wait, and what must be in the store before it ends.
struct Awaited {
    key: Option<u8>,
    number: u64,
    end: End,
    before: Vec<(u8, i64)>,
}

enum End {
    Stored(tokio::sync::oneshot::Receiver<Fate>, i64),
    Left(tokio::sync::oneshot::Receiver<()>),
}

impl Awaited {
    /// Whether it has ended; if so, whether rightly.
    fn ended(&mut self, model: &Model) -> Option<bool> {
        match &mut self.end {
            End::Stored(end, version) => end.try_recv().ok().map(|fate| {
                let known = self.key.and_then(|key| model.stored.get(&key));
                matches!(fate, Fate::Stored(stored) if stored.get() >= *version && Some(&stored.get()) <= known)
            }),
            End::Left(end) => end.try_recv().ok().map(|()| model.has(&self.before)),
        }
    }
}

/// The table and its model, side by side.
struct Both<'a> {
    pending: Pending<Tracked<'a>>,
    model: Model,
    alive: &'a Alive,
    now: i64,
    alone: Vec<KeyedAnswer>,
    waits: Vec<Awaited>,
}

impl<'a> Both<'a> {
    fn take(&mut self, entries_max: usize, bytes_max: usize, hurried: bool) -> Result<bool, TestCaseError> {
        let taken = self.pending.take(Timestamp(self.now), entries_max, bytes_max, hurried);
        let any = !taken.is_empty();
        let with = |write: &Write| write.requests.iter().map(step_of).collect();
        let taken: Vec<_> = taken
            .into_iter()
            .map(|write| (write.key.clone(), write.entry.version.get(), with(&write)))
            .collect();
        prop_assert_eq!(taken, self.model.take(self.now, entries_max, bytes_max, hurried));
        Ok(any)
    }

    fn settle(&mut self, k: u8, v: i64) {
        let mut left = Vec::new();
        let _ = self.pending.settle(&key(k), version(v), &mut left);
        self.model.settle(k, v);
    }

    fn take_loose(&mut self, limit: usize) -> Result<(), TestCaseError> {
        if self.alone.is_empty() {
            let waiting = |id: &&mut ModelId| id.loose && id.state == State::Waiting;
            let expected = self.model.ids.iter_mut().filter(waiting).count().min(limit);
            self.alone = self.pending.take_loose(limit);
            prop_assert_eq!(self.alone.len(), expected);
            for KeyedAnswer { key: name, answered } in &self.alone {
                let id = self
                    .model
                    .ids
                    .iter_mut()
                    .find(|id| id.step == step_of(answered))
                    .expect("known");
                prop_assert!(id.loose && id.state == State::Waiting && *name == key(id.key));
                prop_assert_eq!(answered.answer.version.get(), id.version);
                id.state = State::Alone;
            }
        }
        Ok(())
    }

    fn remembered(&mut self, told: bool) {
        let alone = mem::take(&mut self.alone);
        if told {
            self.pending.remembered(&alone, &mut Vec::new());
            self.model.ids.retain(|id| id.state != State::Alone);
        } else {
            self.pending.not_remembered(&alone);
            for id in self.model.ids.iter_mut().filter(|id| id.state == State::Alone) {
                id.state = State::Waiting;
            }
        }
    }

    fn step(&mut self, number: usize, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Offer(k, v, delay, has_id) => {
                // Nothing is delayed that somebody waits for.
                let is_watched = self.pending.watchers.is_watched(&key(k));
                let delay = if is_watched { 0 } else { delay };
                let write = write_of(k, v, has_id.then_some(number));
                let payload = Tracked::new(number, self.alive);
                drop(
                    self.pending
                        .offer(write, payload, Timestamp(self.now), Duration::from_millis(delay)),
                );
                self.model.offer((k, v), (self.now, delay, number), has_id);
            }
            Step::Take(entries_max, bytes_max, hurried) => {
                self.take(entries_max, bytes_max, hurried)?;
            }
            Step::Settle(k, v) => {
                let v = v.unwrap_or_else(|| self.model.flying(k));
                self.settle(k, v);
            }
            Step::Release(k, v) => {
                let v = v.unwrap_or_else(|| self.model.flying(k));
                self.pending.release(&key(k), version(v));
                self.model.release(k, v);
            }
            Step::Overtake(k, v) => {
                self.pending.overtake(&key(k), version(v), &mut Vec::new());
                self.model.overtake(k, v);
            }
            Step::TakeLoose(limit) => self.take_loose(limit)?,
            Step::Remembered(told) => self.remembered(told),
            Step::AwaitStored(k, v) => {
                let watch = self.pending.await_stored(&key(k), version(v), Timestamp(self.now));
                self.hastened(k, watch.is_some());
                self.waits.extend(watch.map(|watch| Awaited {
                    key: Some(k),
                    number: watch.number,
                    end: End::Stored(watch.end, v),
                    before: Vec::new(),
                }));
            }
            Step::AwaitSettled(k, v) => {
                let below = |accepted: &&(u8, i64)| accepted.0 == k && accepted.1 < v;
                let before: Vec<_> = self.model.accepted.iter().filter(below).copied().collect();
                let watch = self.pending.await_settled(&key(k), version(v), Timestamp(self.now));
                self.hastened(k, watch.is_some());
                prop_assert!(watch.is_some() || self.model.has(&before), "not so yet");
                self.wait_for(Some(k), watch, before);
            }
            Step::AwaitAll(of) => self.await_all(of)?,
            Step::Pause(of) => {
                self.pending.pause(namespace(of));
                self.model.paused.insert(namespace(of));
            }
            Step::Resume(of) => self.resume(of),
            Step::GiveUp(at) => {
                if at < self.waits.len() {
                    let Awaited { key: k, number, .. } = self.waits.remove(at);
                    self.pending.take_back(k.map(key).as_ref(), number);
                }
            }
            Step::Wait(millis) => self.now += millis,
        }
        Ok(())
    }

    fn await_all(&mut self, of: Option<u8>) -> Result<(), TestCaseError> {
        let is_meant = |k: u8| of.is_none_or(|of| namespace(of) == namespace(k));
        let before = self.model.accepted.iter().filter(|(k, _)| is_meant(*k));
        let before: Vec<_> = before.copied().collect();
        let slots = self.model.slots.iter().filter(|slot| is_meant(slot.key));
        let places = slots.map(|slot| usize::from(slot.flight.is_some()) + usize::from(slot.waiting.is_some()));
        let expected = Some(places.sum::<usize>()).filter(|places| *places > 0);
        let (watch, left) = self.pending.await_all(of.map(namespace)).unzip();
        prop_assert_eq!(left, expected);
        prop_assert!(watch.is_some() || self.model.has(&before), "not so yet");
        self.wait_for(None, watch, before);
        Ok(())
    }

    fn resume(&mut self, of: u8) {
        self.pending.resume(namespace(of));
        self.model.paused.remove(namespace(of));
    }

    fn wait_for(&mut self, key: Option<u8>, watch: Option<Watch<()>>, before: Vec<(u8, i64)>) {
        self.waits.extend(watch.map(|Watch { number, end }| Awaited {
            key,
            number,
            end: End::Left(end),
            before,
        }));
    }

    /// What is waited for is due.
    fn hastened(&mut self, k: u8, hastened: bool) {
        let now = self.now;
        let Some(slot) = self.model.slot(k).filter(|_| hastened) else {
            return;
        };
        let in_flight = slot.flight.as_mut().map(|(_, place)| place);
        for (admitted, delay, _) in in_flight.into_iter().chain(&mut slot.waiting) {
            *delay = (*delay).min(u64::try_from(now - *admitted).expect("accepted before"));
        }
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        let (pending, model) = (&self.pending, &mut self.model);
        for k in 0..KEYS {
            let expected = model.slot(k).map(|slot| write(k, slot.newest).entry);
            prop_assert_eq!(shown(pending, k), expected);
        }
        let holders = model.holders();
        prop_assert_eq!(pending.entries(), holders.len());
        prop_assert_eq!(
            pending.bytes(),
            holders.iter().map(|(_, weight, ..)| *weight).sum::<usize>()
        );
        let held: BTreeSet<usize> = holders.iter().map(|(.., step)| *step).collect();
        prop_assert_eq!(&*self.alive.borrow(), &held);
        let waiting = model.slots.iter();
        let waiting = waiting.filter(|slot| slot.flight.is_none() && !model.paused.contains(namespace(slot.key)));
        let next_due = waiting.map(|slot| slot.due().0).min();
        prop_assert_eq!(pending.next_due().map(|at| at.0), next_due);
        let is_loose = model.ids.iter().any(|id| id.loose && id.state == State::Waiting);
        prop_assert_eq!(pending.loose() > 0, is_loose);
        let oldest = holders.iter().map(|(_, _, admitted, _)| *admitted).min();
        prop_assert_eq!(pending.oldest().map(|at| at.0), oldest);
        let told = |(name, share): (&str, &Share)| {
            let oldest = share.oldest().map(|at| at.0);
            (name.to_owned(), share.entries(), share.bytes, oldest)
        };
        let mut told: Vec<_> = pending.shares().map(told).collect();
        told.sort();
        let counted = ["even", "odds"].into_iter().filter_map(|name| {
            let of: Vec<_> = holders.iter().filter(|(k, ..)| namespace(*k) == name).collect();
            let bytes = of.iter().map(|(_, weight, ..)| *weight).sum::<usize>();
            let oldest = of.iter().map(|(_, _, admitted, _)| *admitted).min();
            (!of.is_empty()).then(|| (name.to_owned(), of.len(), bytes, oldest))
        });
        prop_assert_eq!(told, counted.collect::<Vec<_>>());
        for name in ["even", "odds"] {
            let range: Vec<Key> = pending.range(name, "k", None).map(|(key, ..)| key).collect();
            let slots = model.slots.iter().filter(|slot| namespace(slot.key) == name);
            let expected: BTreeSet<Key> = slots.map(|slot| key(slot.key)).collect();
            prop_assert_eq!(range, expected.into_iter().collect::<Vec<_>>());
            let slots = model.slots.iter().filter(|slot| namespace(slot.key) == name);
            let mut oldest: Vec<i64> = slots.map(|slot| slot.place().0).collect();
            oldest.sort_unstable();
            oldest.truncate(2);
            let told = pending.oldest_keys(Some(name), 2);
            let mut told: Vec<i64> = told.iter().map(|told| told.accepted_at.0).collect();
            told.sort_unstable();
            prop_assert_eq!(told, oldest);
        }
        let ended: Vec<Option<bool>> = self.waits.iter_mut().map(|wait| wait.ended(model)).collect();
        prop_assert!(!ended.contains(&Some(false)), "a wait ended before what it was for");
        let mut ended = ended.into_iter();
        self.waits.retain(|_| ended.next() == Some(None));
        Ok(())
    }

    /// Everything succeeds from now on: all of it leaves, each id once, and nobody waits any more.
    fn finish(&mut self) -> Result<(), TestCaseError> {
        self.remembered(true);
        (0..2).for_each(|of| self.resume(of));
        while self.take(2, usize::MAX, true)? || !self.model.slots.is_empty() || !self.model.ids.is_empty() {
            let mut tried: BTreeSet<(u8, i64)> = BTreeSet::new();
            let flights = self
                .model
                .slots
                .iter()
                .filter_map(|slot| Some((slot.key, slot.flight?.0)));
            tried.extend(flights);
            tried.extend(self.model.ids.iter().filter_map(|id| match id.state {
                State::With(version) => Some((id.key, version)),
                _ => None,
            }));
            for (k, v) in tried {
                self.settle(k, v);
            }
            self.take_loose(1)?;
            self.remembered(true);
            self.check()?;
        }
        prop_assert_eq!(
            (self.pending.entries(), self.pending.bytes(), self.pending.loose()),
            (0, 0, 0)
        );
        prop_assert!(self.waits.is_empty(), "somebody waits for nothing");
        prop_assert!((0..KEYS).all(|k| !self.pending.watchers.is_watched(&key(k))));
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn does_as_the_naive_table(steps in steps()) {
        let alive = Alive::default();
        let mut both = Both {
            pending: Pending::new(),
            model: Model::default(),
            alive: &alive,
            now: 0,
            alone: Vec::new(),
            waits: Vec::new(),
        };
        for (number, step) in steps.into_iter().enumerate() {
            both.step(number, step)?;
            both.check()?;
        }
        both.finish()?;
        prop_assert!(alive.borrow().is_empty());
    }
}
