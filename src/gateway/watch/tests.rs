//! The log against one that forgets nothing, and the switch under a model checker, which tries every interleaving.

use std::{collections::BTreeMap, time::Duration};

use proptest::{collection::vec, prelude::*};
use tokio::time::Instant;

use super::{
    Change, Gap, Recorded, RescanReason, Scope,
    log::{Bounds, Filter, Log, Read},
};
use crate::model::{ChangeKind, Key, Version};

/// The switch over the checker's primitives, under the names of the real ones.
mod sync {
    pub(super) use loom::sync::atomic::{AtomicBool, Ordering, fence};
}

#[expect(clippy::duplicate_mod, reason = "over other primitives")]
#[path = "switch.rs"]
mod switch;

#[test]
fn whoever_turns_it_on_finds_each_write_or_is_told_of_it() {
    use loom::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread,
    };

    loom::model(|| {
        let switch = Arc::new(switch::Switch::off());
        // Somebody has watched before.
        switch.turn_on();
        switch.turn_off();
        let (written, recorded) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let writer = thread::spawn({
            let (switch, written, recorded) = (Arc::clone(&switch), Arc::clone(&written), Arc::clone(&recorded));
            move || {
                written.store(true, Ordering::Relaxed);
                if switch.is_on() {
                    recorded.store(true, Ordering::Relaxed);
                }
            }
        });
        switch.turn_on();
        let found = written.load(Ordering::Relaxed);
        writer.join().expect("no panic");
        assert!(found || recorded.load(Ordering::Relaxed));
    });
}

const ENTRIES_MAX: usize = 6;
const BYTES_MAX: usize = 5 * 132;
const WINDOW: Duration = Duration::from_secs(10);
const WATCHERS_MAX: usize = 3;

#[derive(Debug, Clone)]
enum Act {
    Change { namespace: u8, key: u8 },
    Gap { below: Option<(u8, u8)> },
    Enter { watcher: u8, filter: (u8, u8) },
    Resume { watcher: u8, token: prop::sample::Index },
    Leave { watcher: u8 },
    Read { watcher: u8, limit: usize },
    Wait { seconds: u64 },
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => (0..2_u8, 0..4_u8).prop_map(|(namespace, key)| Act::Change { namespace, key }),
        1 => prop::option::of((0..2_u8, 0..3_u8)).prop_map(|below| Act::Gap { below }),
        2 => (0..4_u8, (0..2_u8, 0..3_u8)).prop_map(|(watcher, filter)| Act::Enter { watcher, filter }),
        2 => (0..4_u8, any::<prop::sample::Index>()).prop_map(|(watcher, token)| Act::Resume { watcher, token }),
        2 => (0..4_u8).prop_map(|watcher| Act::Leave { watcher }),
        6 => (0..4_u8, 1..4_usize).prop_map(|(watcher, limit)| Act::Read { watcher, limit }),
        1 => (1..12_u64).prop_map(|seconds| Act::Wait { seconds }),
    ]
}

fn filter((namespace, prefix): (u8, u8)) -> Filter {
    Filter {
        namespace: ["one", "two"][usize::from(namespace)].to_owned(),
        prefix: ["", "a", "ab"][usize::from(prefix)].to_owned(),
    }
}

fn name(key: u8) -> &'static str {
    ["a", "ab", "abc", "b"][usize::from(key)]
}

/// Everything that was ever recorded, by its position.
type Whole = BTreeMap<u64, Recorded>;

fn concerns(filter: &Filter, recorded: &Recorded) -> bool {
    let overlap = |a: &str, b: &str| a.starts_with(b) || b.starts_with(a);
    match recorded {
        Recorded::Change(change) => {
            change.key.namespace() == filter.namespace && change.key.key().starts_with(&filter.prefix)
        }
        Recorded::Gap(gap) => gap
            .below
            .as_ref()
            .is_none_or(|below| below.namespace == filter.namespace && overlap(&below.prefix, &filter.prefix)),
    }
}

struct Watcher {
    filter: Filter,
    position: u64,
}

/// A position that somebody was given, and of which life of the log it is.
struct Given {
    filter: Filter,
    position: u64,
    life: u32,
}

struct Model {
    log: Log,
    whole: Whole,
    now: Instant,
    watchers: BTreeMap<u8, Watcher>,
    given: Vec<Given>,
    life: u32,
}

impl Model {
    fn new() -> Model {
        let bounds = Bounds {
            entries_max: ENTRIES_MAX,
            bytes_max: BYTES_MAX,
            watchers_max: WATCHERS_MAX,
            resume_window: WINDOW,
        };
        Model {
            log: Log::new(bounds),
            whole: Whole::new(),
            now: Instant::now(),
            watchers: BTreeMap::new(),
            given: Vec::new(),
            life: 0,
        }
    }

    fn record(&mut self, recorded: Recorded, was_on: &mut bool) {
        let before = self.log.head();
        let records = self.log.record(recorded.clone(), self.now);
        if records {
            assert_eq!(self.log.head(), before + 1);
            assert!(
                self.whole.insert(before, recorded).is_none(),
                "a position is taken once"
            );
        } else if std::mem::replace(was_on, false) {
            assert!(self.log.head() > before, "no position of this life is one of the next");
            self.life += 1;
        }
        assert!(
            records || self.watchers.is_empty(),
            "nothing is passed over that somebody watches"
        );
        *was_on = records;
    }

    fn enter(&mut self, watcher: u8, filter: Filter, resume: Option<&Given>) -> Result<(), TestCaseError> {
        if self.watchers.contains_key(&watcher) {
            return Ok(());
        }
        let (asked, life) = (resume.map(|given| given.position), resume.map(|given| given.life));
        let Some(beginning) = self.log.enter(asked) else {
            prop_assert_eq!(self.watchers.len(), WATCHERS_MAX);
            return Ok(());
        };
        if beginning.resumed {
            prop_assert_eq!((Some(beginning.position), Some(self.life)), (asked, life));
        } else {
            prop_assert_eq!(beginning.position, self.log.head());
            if let Some(given) = resume {
                prop_assert!(given.life != self.life || self.is_past_bounds(given.position));
            }
        }
        let position = beginning.position;
        self.watchers.insert(watcher, Watcher { filter, position });
        Ok(())
    }

    /// Whether not all can be kept that was recorded from a position on.
    fn is_past_bounds(&self, position: u64) -> bool {
        let later = self.whole.range(position..);
        let (entries, bytes) = later.fold((0, 0), |(entries, bytes), (_, recorded)| {
            let names = match recorded {
                Recorded::Change(change) => change.key.bytes(),
                Recorded::Gap(gap) => gap
                    .below
                    .as_ref()
                    .map_or(0, |below| below.namespace.len() + below.prefix.len()),
            };
            (entries + 1, bytes + names + 128)
        });
        entries > ENTRIES_MAX || bytes > BYTES_MAX
    }

    fn read(&mut self, watcher: u8, limit: usize) -> Result<(), TestCaseError> {
        let head = self.log.head();
        let Some(Watcher { filter, position }) = self.watchers.get(&watcher) else {
            return Ok(());
        };
        let (filter, from) = (filter.clone(), *position);
        let to = match self.log.read(from, &filter, limit) {
            Read::Behind { position, .. } => {
                prop_assert_eq!(position, head);
                prop_assert!(self.is_past_bounds(from), "it was kept as long as there was room");
                position
            }
            Read::Found { found, position } => {
                prop_assert_eq!(position, head.min(from + limit as u64));
                let wanted = self.whole.range(from..position);
                let wanted: Vec<_> = wanted
                    .filter(|(_, recorded)| concerns(&filter, recorded))
                    .map(|(at, recorded)| (at + 1, recorded.clone()))
                    .collect();
                prop_assert_eq!(found, wanted);
                position
            }
        };
        self.given.push(Given {
            filter: filter.clone(),
            position: to,
            life: self.life,
        });
        self.watchers.insert(watcher, Watcher { filter, position: to });
        Ok(())
    }
}

proptest! {
    #[test]
    fn nothing_is_passed_over_nor_told_twice_and_the_discarded_past_is_none(acts in vec(act(), 1..120)) {
        let mut model = Model::new();
        let mut is_on = false;
        for (number, act) in acts.into_iter().enumerate() {
            match act {
                Act::Change { namespace, key } => {
                    let change = Change {
                        key: Key::new(["one", "two"][usize::from(namespace)], name(key)).expect("valid"),
                        version: Version::new(number as i64 + 1),
                        kind: ChangeKind::Put,
                    };
                    model.record(Recorded::Change(change), &mut is_on);
                }
                Act::Gap { below } => {
                    let gap = Gap {
                        reason: RescanReason::Invalidated,
                        below: below.map(filter).map(Box::new),
                        scope: Scope::ThisGateway,
                    };
                    model.record(Recorded::Gap(gap), &mut is_on);
                }
                Act::Enter { watcher, filter: of } => {
                    model.enter(watcher, filter(of), None)?;
                    is_on |= !model.watchers.is_empty();
                }
                Act::Resume { watcher, token } if !model.given.is_empty() => {
                    let place = token.index(model.given.len());
                    let Given { filter, position, life } = &model.given[place];
                    let given = Given { filter: filter.clone(), position: *position, life: *life };
                    model.enter(watcher, given.filter.clone(), Some(&given))?;
                    is_on |= !model.watchers.is_empty();
                }
                Act::Leave { watcher } => {
                    if model.watchers.remove(&watcher).is_some() {
                        model.log.leave(model.now);
                    }
                }
                Act::Read { watcher, limit } => model.read(watcher, limit)?,
                Act::Wait { seconds } => model.now += Duration::from_secs(seconds),
                Act::Resume { .. } => {}
            }
        }
    }
}
