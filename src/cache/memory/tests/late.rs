//! Who comes late, under every order of events: against a naive model that counts what happened to a slot instead of keeping tokens, against
//! a store that tells the truth, and on threads. L1 is so small that copies lose their places all the time.

use std::cell::Cell;

use proptest::{
    sample::Index,
    test_runner::{TestCaseError, TestCaseResult, TestRunner},
};

use super::*;

const KEYS: usize = 3;

/// Room for some copies: one shard, in which the keys looked at and all others compete.
const ROOM: usize = 1_000;

/// One event at one of the keys.
#[derive(Debug, Clone)]
enum Event {
    LeaveToken,
    /// One of those who left a token lands a write, or what a load found: a version, or 0 for an absence.
    Land(Index, By, i64, usize),
    GiveUp(Index),
    Invalidate(i64),
    Drop(i64),
    /// Every copy of the keys below one goes.
    InvalidateBelow(usize),
    /// Another key's copy wants room.
    Crowd(usize),
    /// What others do may have been missed.
    Off,
    /// It is heard again.
    On,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Write,
    Load,
}

fn copy_of(number: i64, value_bytes: usize) -> Copy {
    Copy::new((number > 0).then(|| entry(number, value_bytes)), NOW, MINUTE)
}

fn number_of(copy: Copy) -> i64 {
    copy.version().map_or(0, Version::get)
}

fn check<S: Strategy>(cases: u32, values: S, test: impl Fn(S::Value) -> TestCaseResult) {
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    };
    if let Err(failure) = TestRunner::new(config).run(&values, test) {
        panic!("{failure}");
    }
}

fn event() -> impl Strategy<Value = Event> {
    let by = prop_oneof![Just(By::Write), Just(By::Load)];
    prop_oneof![
        4 => Just(Event::LeaveToken),
        6 => (any::<Index>(), by, 0..8_i64, 0..150_usize).prop_map(|(index, by, number, bytes)| {
            let number = if by == By::Write { number.max(1) } else { number };
            Event::Land(index, by, number, bytes)
        }),
        1 => any::<Index>().prop_map(Event::GiveUp),
        1 => (1..8_i64).prop_map(Event::Invalidate),
        1 => (1..8_i64).prop_map(Event::Drop),
        1 => (0..=KEYS).prop_map(Event::InvalidateBelow),
        1 => Just(Event::Off),
        6 => Just(Event::On),
        4 => (0..600_usize).prop_map(Event::Crowd),
    ]
}

/// The count at which a token is left while L1 is off.
const NEVER: u64 = u64::MAX;

/// A slot as it is meant: what stands, and how often it was changed. A token is the count at which it was left.
#[derive(Debug, Default, Clone)]
struct Slot {
    /// The version that stands, 0 of an absence.
    stands: Option<i64>,
    changes: u64,
}

impl Slot {
    /// Whether what is offered stands afterwards.
    fn land(&mut self, by: By, token: u64, offered: i64) -> bool {
        let unchanged = self.changes == token;
        self.changes += 1;
        let entry = self.stands.filter(|number| *number > 0);
        if offered > 0 && entry >= Some(offered) {
            return entry == Some(offered);
        }
        if unchanged || (by == By::Write && entry.is_some()) {
            self.stands = Some(offered);
            return true;
        }
        if offered > 0 {
            self.stands = None;
        }
        false
    }

    fn remove_if(&mut self, remove: impl FnOnce(i64) -> bool) {
        self.changes += 1;
        self.stands = self.stands.filter(|number| !remove(*number));
    }
}

/// L1, and the model of the keys looked at.
struct Pair {
    memory: Arc<Memory>,
    slots: Vec<Slot>,
    /// Who left a token: at which key, and at which count.
    holders: Vec<(usize, Token, u64)>,
    off: bool,
}

impl Pair {
    fn new() -> Pair {
        Pair {
            memory: memory_of(ROOM),
            slots: vec![Slot::default(); KEYS],
            holders: Vec::new(),
            off: false,
        }
    }

    /// Has an event happen to both, and checks what they answer. How many bytes were wanted.
    fn happen(&mut self, number: usize, at: usize, event: Event) -> Result<usize, TestCaseError> {
        let (memory, slots, name) = (&self.memory, &mut self.slots, key(at));
        match event {
            Event::LeaveToken => {
                let left_at = if self.off { NEVER } else { slots[at].changes };
                self.holders.push((at, memory.leave_token(&name), left_at));
            }
            Event::GiveUp(_) | Event::Land(..) if self.holders.is_empty() => {}
            Event::GiveUp(index) => drop(self.holders.swap_remove(index.index(self.holders.len()))),
            Event::Land(index, by, offered, value_bytes) => return self.land(index, by, offered, value_bytes),
            Event::Invalidate(version) => {
                memory.invalidate(&name, super::version(version));
                slots[at].remove_if(|number| number < version);
            }
            Event::Drop(version) => {
                memory.drop_version(&name, super::version(version));
                slots[at].remove_if(|number| number == version);
            }
            Event::InvalidateBelow(bound) => {
                memory.invalidate_where(|name| (0..bound).any(|at| *name == key(at)));
                slots[..bound].iter_mut().for_each(|slot| slot.remove_if(|_| true));
            }
            Event::Off => {
                self.off = true;
                memory.gate();
                memory.drop_all();
                prop_assert!(memory.is_empty() && tokens(memory) == 0);
                slots.iter_mut().for_each(|slot| slot.remove_if(|_| true));
            }
            Event::On => {
                self.off = false;
                memory.trust_until(NOW);
            }
            Event::Crowd(value_bytes) => {
                crowd(memory, number, value_bytes);
                return Ok(Kept::new(&key(format!("other {number}")), copy_of(1, value_bytes)).weight());
            }
        }
        Ok(0)
    }

    fn land(&mut self, index: Index, by: By, offered: i64, value_bytes: usize) -> Result<usize, TestCaseError> {
        let (at, token, left_at) = self.holders.swap_remove(index.index(self.holders.len()));
        let copy = copy_of(offered, value_bytes);
        let wanted = Kept::new(&key(at), copy.clone()).weight();
        let landing = match by {
            By::Write => token.land_write(copy),
            By::Load => token.land_load(copy),
        };
        let slot = &mut self.slots[at];
        let stands = !self.off && slot.land(by, left_at, offered);
        match landing {
            Landing::Landed | Landing::Renewed => prop_assert!(stands),
            Landing::Refused { standing } => {
                prop_assert!(!stands);
                prop_assert_eq!(standing.map(number_of), slot.stands);
            }
        }
        Ok(wanted)
    }
}

#[test]
fn a_slot_does_what_the_model_does() {
    let (evicted, late) = (Cell::new(0), Cell::new(0));
    check(2_000, vec((0..KEYS, event()), 1..120), |events| {
        let mut pair = Pair::new();
        for (number, (at, event)) in events.into_iter().enumerate() {
            if pair.off && matches!(event, Event::On) {
                late.set(late.get() + pair.holders.len());
            }
            let before = pair.memory.bytes() as usize;
            let wanted = pair.happen(number, at, event)?;
            for (at, slot) in pair.slots.iter_mut().enumerate() {
                let key = key(at);
                let kept = pair.memory.kept(pair.memory.places.of(&key), &key);
                let stands = kept.map(Kept::into_copy).map(number_of);
                prop_assert_eq!(standing(&pair.memory, &key).map(number_of), stands);
                if stands.is_none() && slot.stands.is_some() {
                    prop_assert!(before + wanted > ROOM, "evicted without need");
                    slot.remove_if(|_| true);
                    evicted.set(evicted.get() + 1);
                }
                prop_assert_eq!(stands, slot.stands);
            }
            prop_assert!(pair.memory.bytes() <= ROOM as u64);
        }
        drop(pair.holders);
        prop_assert_eq!(tokens(&pair.memory), 0);
        Ok(())
    });
    let met = [evicted.get(), late.get()];
    assert!(met.iter().all(|count| *count > 1_000), "{met:?}");
}

/// One step of those who write and load one key, over a store that tells the truth.
#[derive(Debug, Clone)]
enum Step {
    BeginWrite,
    BeginLoad,
    /// One of those who began goes on: a write is stamped, committed, landed; a load reads the store, lands.
    GoOn(Index),
    GiveUp(Index),
    /// Another replica writes, and may tell so.
    Elsewhere {
        told: bool,
    },
    Crowd,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::BeginWrite),
        3 => Just(Step::BeginLoad),
        12 => any::<Index>().prop_map(Step::GoOn),
        1 => any::<Index>().prop_map(Step::GiveUp),
        1 => any::<bool>().prop_map(|told| Step::Elsewhere { told }),
        6 => Just(Step::Crowd),
    ]
}

#[derive(Debug)]
enum Course {
    Unstamped,
    Stamped(i64),
    Committed(i64),
    Asking,
    Found(i64),
}

/// What was once readable or answered is a floor for ever: no landing shows less, however late it comes and whatever was evicted.
#[test]
fn nothing_older_shows_than_what_was_readable_or_written_before() {
    let (landed, too_late) = (Cell::new(0), Cell::new(0));
    check(2_000, vec(step(), 1..150), |steps| {
        let (memory, name) = (memory_of(ROOM), key("k"));
        let (mut clock, mut store, mut floor) = (0, 0, 0);
        let mut under_way: Vec<(Token, Course)> = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::BeginWrite => under_way.push((memory.leave_token(&name), Course::Unstamped)),
                Step::BeginLoad => under_way.push((memory.leave_token(&name), Course::Asking)),
                Step::GoOn(_) | Step::GiveUp(_) if under_way.is_empty() => {}
                Step::GiveUp(index) => drop(under_way.swap_remove(index.index(under_way.len()))),
                Step::GoOn(index) => {
                    let (token, course) = under_way.swap_remove(index.index(under_way.len()));
                    match course {
                        Course::Unstamped => {
                            clock += 1;
                            under_way.push((token, Course::Stamped(clock)));
                        }
                        // Superseded: stamped anew.
                        Course::Stamped(version) if version < store => under_way.push((token, Course::Unstamped)),
                        Course::Stamped(version) => {
                            store = version;
                            under_way.push((token, Course::Committed(version)));
                        }
                        Course::Committed(version) => {
                            token.land_write(copy_of(version, 8));
                            floor = floor.max(version);
                            landed.set(landed.get() + 1);
                        }
                        Course::Asking => under_way.push((token, Course::Found(store))),
                        Course::Found(version) => {
                            let empty = memory.version(&name).is_none();
                            let landing = token.land_load(copy_of(version, 8));
                            if empty && version < floor && landing == refused(None) {
                                too_late.set(too_late.get() + 1);
                            }
                        }
                    }
                }
                Step::Elsewhere { told } => {
                    clock += 1;
                    store = clock;
                    if told {
                        memory.invalidate(&name, version(store));
                        floor = store;
                    }
                }
                Step::Crowd => crowd(&memory, number, 200),
            }
            if let Some(stands) = standing(&memory, &name).map(number_of) {
                prop_assert!(stands >= floor, "{} shows after {}", stands, floor);
                floor = stands;
            }
        }
        Ok(())
    });
    let met = [landed.get(), too_late.get()];
    assert!(met.iter().all(|count| *count > 500), "{met:?}");
}

/// One writer, readers that load, and a crowd that takes every place. Once a write is answered, no copy that is older may be seen:
/// comparing versions alone would not do, for evictions make L1 forget what a late load is to lose to.
#[test]
fn after_a_write_is_answered_no_load_brings_back_what_was_before() {
    const WRITES: i64 = 100_000;
    let (memory, name) = (memory_of(ROOM), key("k"));
    let (store, answered, loads) = (AtomicI64::new(0), AtomicI64::new(0), AtomicI64::new(0));
    let done = AtomicBool::new(false);
    let reader = || {
        while !done.load(Ordering::Relaxed) {
            let at_least = answered.load(Ordering::SeqCst);
            match standing(&memory, &name).map(number_of) {
                Some(seen) => assert!(seen >= at_least, "saw {seen} after {at_least} was answered"),
                None => {
                    let token = memory.leave_token(&name);
                    let found = store.load(Ordering::SeqCst);
                    thread::yield_now();
                    if token.land_load(copy_of(found, 8)) == Landing::Landed {
                        loads.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(reader);
        scope.spawn(reader);
        scope.spawn(|| {
            for number in 0.. {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                crowd(&memory, number % 100, 200);
            }
        });
        let mut number = 0;
        // On a busy machine the others may not have had their turn by then.
        while number < WRITES || (loads.load(Ordering::Relaxed) == 0 && number < 100 * WRITES) {
            number += 1;
            let token = memory.leave_token(&name);
            store.store(number, Ordering::SeqCst);
            token.land_write(copy_of(number, 8));
            answered.store(number, Ordering::SeqCst);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(loads.load(Ordering::Relaxed) > 0, "the readers had to load");
}

/// The first write of a key against the load that finds the key absent: the absence must not end up over the write.
#[test]
fn an_absence_that_was_loaded_before_a_write_does_not_land_after_it() {
    const ROUNDS: usize = 20_000;
    let memory = memory();
    let stores: Vec<AtomicI64> = (0..ROUNDS).map(|_| AtomicI64::new(0)).collect();
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            for (round, store) in stores.iter().enumerate() {
                barrier.wait();
                let token = memory.leave_token(&key(round));
                token.land_load(copy_of(store.load(Ordering::SeqCst), 8));
            }
        });
        for (round, store) in stores.iter().enumerate() {
            barrier.wait();
            let token = memory.leave_token(&key(round));
            store.store(1, Ordering::SeqCst);
            token.land_write(copy_of(1, 8));
        }
    });
    for round in 0..ROUNDS {
        // Or nothing, where the absence landed while the write was on its way.
        assert_ne!(standing(&memory, &key(round)).map(number_of), Some(0), "round {round}");
    }
}
