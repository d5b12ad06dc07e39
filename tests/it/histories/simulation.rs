//! A register that is right: clients call it at random times, and it shows them as little as it may.

use std::collections::{BTreeMap, HashMap};

use rand::{RngExt, rngs::StdRng, seq::IndexedRandom};

use crate::{
    check::{Bounds, ONCE},
    history::{
        Act, Change, Class, Condition, Consistency, History, Nanos, Op, Outcome, Record, Replica, Settled, Value,
        Version,
    },
};

pub const BOUNDS: Bounds = Bounds {
    ever: 300_000,
    calm: 80_000,
    open: 100_000,
};

const CLASSES: [Class; 4] = [Class::Through, Class::Behind, Class::Mixed, Class::Counter];
const REPLICAS: usize = 3;
const SESSIONS: u32 = 8;
const CALLS_OF_SESSION: u32 = 90;

/// How long a replica lives.
const LIFE: Nanos = 400_000;

/// When there is calm: every other such time.
const CALM: Nanos = 500_000;

/// A call, before it is known what it sees.
struct Draft {
    op: Op,
    /// When it takes effect; `None` if it never does.
    effect: Option<Nanos>,
}

/// What a key became, and when.
type Timeline = Vec<(Nanos, Record)>;

/// A run of the register.
pub fn simulate(rng: &mut StdRng) -> History {
    let mut drafts: Vec<Draft> = (0..SESSIONS).flat_map(|session| calls_of(session, rng)).collect();
    drafts.sort_by_key(|draft| draft.effect);
    let mut timelines: Vec<Timeline> = vec![Vec::new(); CLASSES.len()];
    take_effect(&mut drafts, &mut timelines, rng);
    let end = drafts.iter().map(|draft| draft.op.ret).max().unwrap_or(0);
    let calm: Vec<_> = (0..end / CALM).step_by(2).map(|n| n * CALM..(n + 1) * CALM).collect();
    // In the order of calls: what a session saw before binds it.
    drafts.sort_by_key(|draft| draft.op.call);
    for place in 0..drafts.len() {
        let (before, rest) = drafts.split_at_mut(place);
        show(&mut rest[0], before, &timelines, &calm, rng);
    }
    let rows: BTreeMap<usize, Record> = timelines
        .iter()
        .enumerate()
        .filter_map(|(key, timeline)| Some((key, timeline.last()?.1)))
        .collect();
    let settled = (0..CLASSES.len()).flat_map(|key| {
        let found = rows.get(&key).and_then(|row| Some((row.version, row.value?)));
        (0..REPLICAS).map(move |replica| Settled {
            key,
            replica,
            consistency: Consistency::Cached,
            found,
        })
    });
    History {
        classes: CLASSES.to_vec(),
        settled: settled.collect(),
        ops: drafts.into_iter().map(|draft| draft.op).collect(),
        applied: timelines
            .into_iter()
            .map(|timeline| timeline.into_iter().map(|(_, record)| record).collect())
            .enumerate()
            .collect(),
        rows,
        calm: vec![calm; REPLICAS],
    }
}

/// Lets the writes take effect, each at its instant, if what stands then is as it asks for; those of one request once.
fn take_effect(drafts: &mut [Draft], timelines: &mut [Timeline], rng: &mut StdRng) {
    let mut next: Version = 1;
    let mut answers: HashMap<u64, (Version, Option<Value>)> = HashMap::new();
    let mut conditions: HashMap<u64, Option<Condition>> = HashMap::new();
    for draft in drafts {
        let timeline = &mut timelines[draft.op.key];
        let stands = timeline.last().map(|(_, record)| *record);
        let (
            Act::Write {
                change,
                condition,
                request,
                outcome,
                ..
            },
            effect,
        ) = (&mut draft.op.act, draft.effect)
        else {
            continue;
        };
        // Versions are known only now: the one that stands, or another one.
        if let Some(Condition::Version(version)) = condition {
            let older = timeline.first().map_or(1, |(_, record)| record.version);
            let stood = stands.map_or(1, |record| record.version);
            *version = if rng.random_bool(0.7) { stood } else { older };
        }
        if let Some(request) = request {
            *condition = *conditions.entry(*request).or_insert(*condition);
        }
        let Some(effect) = effect else { continue };
        let answer = request.and_then(|request| answers.get(&request).copied());
        let (version, made) = match answer {
            Some(answer) => answer,
            None => {
                let live = stands.filter(|record| record.value.is_some());
                let wanted = condition.or((*change == Change::Touch).then_some(Condition::Present));
                let holds = match wanted {
                    None => true,
                    Some(Condition::Absent) => live.is_none(),
                    Some(Condition::Present) => live.is_some(),
                    Some(Condition::Version(version)) => live.is_some_and(|record| record.version == version),
                };
                if !holds {
                    if let Outcome::Ok(_) = outcome {
                        *outcome = Outcome::Refused(live.map(|record| record.version));
                    }
                    continue;
                }
                next += rng.random_range(1..1000);
                let value = match change {
                    Change::Put(value) => Some(*value),
                    Change::Delete => None,
                    Change::Touch => live.and_then(|record| record.value),
                    Change::Add { delta, .. } => {
                        let before = live.and_then(|record| record.value);
                        Some(Value(before.map_or(0, |Value(value)| value) + *delta))
                    }
                };
                timeline.push((effect, Record { version: next, value }));
                if let Some(request) = request {
                    answers.insert(*request, (next, value));
                }
                (next, value)
            }
        };
        if let Outcome::Ok(known) = outcome {
            *known = version;
            if let Change::Add { made: told, .. } = change {
                *told = made;
            }
        }
    }
}

fn calls_of(session: u32, rng: &mut StdRng) -> Vec<Draft> {
    let mut drafts: Vec<Draft> = Vec::new();
    let mut now = rng.random_range(1..20_000);
    // Half of the sessions carry versions, half of them stay with a replica.
    let (carries, stays) = (session.is_multiple_of(2), session.is_multiple_of(4));
    for number in 0..CALLS_OF_SESSION {
        let call = now + rng.random_range(1..10_000);
        let ret = call + rng.random_range(2..20_000);
        now = ret;
        let replica = if stays {
            session as usize
        } else {
            rng.random_range(0..REPLICAS)
        } % REPLICAS;
        let mut key = rng.random_range(0..CLASSES.len());
        let mut effect = Some(rng.random_range(call + 1..ret));
        let act = if rng.random_range(0..10) < 4 {
            let number = u64::from(session * CALLS_OF_SESSION + number);
            let again = drafts.choose(rng).filter(|_| rng.random_bool(0.3)).and_then(again);
            let (same, (change, condition, request, through)) =
                again.unwrap_or_else(|| (key, new_write(key, number, rng)));
            key = same;
            let outcome = outcome(&mut effect, call, rng);
            Act::Write {
                through,
                change,
                condition,
                request,
                outcome,
            }
        } else {
            Act::Read {
                consistency: match rng.random_range(0..4) {
                    0 | 1 => Consistency::Cached,
                    2 => Consistency::Shared,
                    _ => Consistency::Store,
                },
                // That it does is marked so; with which, is known later.
                at_least: carries.then_some(0),
                found: None,
                stale: false,
                source: "the register",
            }
        };
        drafts.push(Draft {
            op: Op {
                key,
                session,
                replica: Replica {
                    number: replica,
                    life: (call / LIFE == ret / LIFE).then_some((call / LIFE) as u32),
                },
                call,
                ret,
                act,
            },
            effect,
        });
    }
    drafts
}

/// What the caller of a write is told, if it is as the write asks for; and so when it takes effect.
fn outcome(effect: &mut Option<Nanos>, call: Nanos, rng: &mut StdRng) -> Outcome {
    match rng.random_range(0..10) {
        0 => {
            *effect = None;
            Outcome::NotApplied
        }
        1 => {
            *effect = rng.random_bool(0.6).then(|| call + rng.random_range(1..BOUNDS.open));
            Outcome::Unknown
        }
        _ => Outcome::Ok(0),
    }
}

/// What a write asks for: the condition, the request, and whether it is answered once committed.
type Asked = (Change, Option<Condition>, Option<u64>, bool);

/// The key of a write that has a name, and the write as it is sent again.
fn again(draft: &Draft) -> Option<(usize, Asked)> {
    match draft.op.act {
        Act::Write {
            change,
            condition,
            request: Some(request),
            through,
            ..
        } => Some((draft.op.key, (change, condition, Some(request), through))),
        Act::Write { .. } | Act::Read { .. } => None,
    }
}

/// A write that was not sent before.
fn new_write(key: usize, number: u64, rng: &mut StdRng) -> Asked {
    let through = match CLASSES[key] {
        Class::Behind => false,
        Class::Mixed => rng.random(),
        Class::Through | Class::Counter => true,
    };
    let named = rng.random::<bool>();
    let request = named.then_some(number);
    if CLASSES[key] == Class::Counter {
        let delta = if named { rng.random_range(1..10) } else { ONCE };
        return (Change::Add { delta, made: None }, None, request, through);
    }
    let put = Change::Put(Value(number));
    let (change, condition) = match rng.random_range(0..if through { 16 } else { 10 }) {
        0..7 => (put, None),
        7..10 => (Change::Delete, None),
        10 => (put, Some(Condition::Absent)),
        11 => (put, Some(Condition::Present)),
        12 => (put, Some(Condition::Version(0))),
        13 => (Change::Delete, Some(Condition::Version(0))),
        14 => (Change::Delete, Some(Condition::Present)),
        _ => (Change::Touch, None),
    };
    (change, condition, request, through)
}

/// Answers a read with anything that it may see.
fn show(
    draft: &mut Draft,
    before: &[Draft],
    timelines: &[Timeline],
    calm: &[std::ops::Range<Nanos>],
    rng: &mut StdRng,
) {
    let op = &mut draft.op;
    let timeline = &timelines[op.key];
    let Act::Read {
        consistency,
        at_least,
        found,
        ..
    } = &mut op.act
    else {
        return;
    };
    let effect = draft.effect.expect("a read has its instant");
    let mut earliest = 0;
    let mut floor = 0;
    if CLASSES[op.key].is_through() {
        let bound = if calm.iter().any(|time| time.contains(&op.call)) {
            BOUNDS.calm
        } else {
            BOUNDS.ever
        };
        earliest = match consistency {
            Consistency::Store => effect,
            Consistency::Cached | Consistency::Shared => op.call.saturating_sub(bound),
        };
    }
    for other in before.iter().map(|draft| &draft.op).filter(|other| other.key == op.key) {
        let same_session = other.session == op.session;
        match other.act {
            Act::Write {
                outcome: Outcome::Ok(version),
                ..
            } => {
                let lives_on = *consistency == Consistency::Store || other.replica.life == op.replica.life;
                let own = other.replica.number == op.replica.number
                    && other.ret < op.call
                    && *consistency != Consistency::Shared
                    && lives_on;
                if own || same_session && at_least.is_some() {
                    floor = floor.max(version);
                }
                if same_session {
                    *at_least = at_least.map(|at_least| at_least.max(version));
                }
            }
            Act::Read {
                found: Some((version, _)),
                ..
            } if same_session && at_least.is_some() => {
                floor = floor.max(version);
                *at_least = at_least.map(|at_least| at_least.max(version));
            }
            Act::Write { .. } | Act::Read { .. } => {}
        }
    }
    let reached = timeline.iter().find(|(_, record)| record.version >= floor);
    let earliest = earliest.max(if floor > 0 {
        reached.expect("it was written").0
    } else {
        0
    });
    let instant = rng.random_range(earliest.min(effect)..=effect);
    let seen = timeline.iter().rev().find(|(at, _)| *at <= instant);
    *found = seen.and_then(|(_, record)| Some((record.version, record.value?)));
}
