//! Proves that the checker of histories accepts what a correct gateway can show, and complains of every way in which one can be wrong.
//!
//! The histories are made by a simulated register: as many as there are seeds, each the same every time.

mod mutations;
mod simulation;

use std::collections::BTreeMap;

use rand::{
    RngExt, SeedableRng,
    rngs::StdRng,
    seq::{IndexedRandom, SliceRandom},
};

use self::{
    mutations::MUTATIONS,
    simulation::{BOUNDS, simulate},
};
use crate::{
    check::{Rule, judge},
    history::{Act, Change, Class, Condition, Consistency, History, Op, Outcome, Record, Replica, Value, Version},
};

const SEEDS: u64 = 40;

#[test]
fn what_a_register_can_show_is_accepted() {
    let mut judged = [0; 9];
    for seed in 0..SEEDS {
        let history = simulate(&mut StdRng::seed_from_u64(seed));
        let verdict = judge(&history, BOUNDS);
        assert_eq!(verdict.violations, 0, "seed {seed}: {:#?}", verdict.complaints);
        assert!(verdict.staleness_at(1000) <= BOUNDS.ever);
        assert!(verdict.staleness_at(500) <= verdict.staleness_at(990));
        let counts = verdict.judged;
        for (sum, count) in judged.iter_mut().zip([
            counts.ordered,
            counts.sessions,
            counts.own,
            counts.staleness,
            counts.calm,
            counts.requests,
            counts.conditions,
            counts.refusals,
            counts.counted,
        ]) {
            *sum += count;
        }
    }
    assert!(judged.iter().all(|count| *count > 300), "{judged:?}");
}

#[test]
fn every_way_to_be_wrong_is_noticed() {
    let mut wrong = [0; MUTATIONS.len()];
    for seed in 0..SEEDS {
        let mut rng = StdRng::seed_from_u64(seed);
        let right = simulate(&mut rng);
        for ((name, mutate, rules), wrong) in MUTATIONS.iter().zip(&mut wrong) {
            let mut history = right.clone();
            let Some(key) = mutate(&mut history, &mut rng) else {
                continue;
            };
            *wrong += 1;
            let verdict = judge(&history, BOUNDS);
            let mut complaints = verdict.complaints.iter();
            assert!(
                complaints.any(|complaint| complaint.key == key && rules.contains(&complaint.rule)),
                "{name}, seed {seed}: key {key}: {:#?}",
                verdict.complaints
            );
        }
    }
    for ((name, ..), wrong) in MUTATIONS.iter().zip(wrong) {
        assert!(wrong >= SEEDS / 5, "{name} was possible {wrong} times only");
    }
}

/// Both writes of one commit are told to the caches, and the lower one never stood in the store.
#[test]
fn a_superseded_delete_may_be_seen_in_a_cache_and_nowhere_else() {
    let op = |session: u32, call, ret, act| Op {
        key: 0,
        session,
        replica: Replica {
            number: 0,
            life: Some(0),
        },
        call,
        ret,
        act,
    };
    let write = |version, value| Act::Write {
        through: true,
        change: change_to(value),
        condition: None,
        request: None,
        outcome: Outcome::Ok(version),
    };
    let rows = [1, 3].map(|version| Record {
        version,
        value: Some(Value(version as u64)),
    });
    for (consistency, violations) in [(Consistency::Cached, 0), (Consistency::Store, 1)] {
        let absent = Act::Read {
            consistency,
            at_least: Some(1),
            found: None,
            stale: false,
            source: "somewhere",
        };
        let history = History {
            classes: vec![Class::Through],
            ops: vec![
                op(1, 10, 20, write(1, Some(Value(1)))),
                op(2, 30, 60, write(2, None)),
                op(3, 31, 61, write(3, Some(Value(3)))),
                op(4, 40, 50, absent),
            ],
            applied: BTreeMap::from([(0, rows.to_vec())]),
            rows: BTreeMap::from([(0, rows[1])]),
            ..History::default()
        };
        let verdict = judge(&history, BOUNDS);
        let rules = [Rule::OutOfOrder, Rule::SessionWentBack, Rule::OwnWriteMissed];
        let wrong = rules.into_iter().filter(|rule| {
            let mut complaints = verdict.complaints.iter();
            complaints.any(|complaint| complaint.rule == *rule)
        });
        assert_eq!(wrong.count(), violations * rules.len(), "{:#?}", verdict.complaints);
    }
}

/// A second opinion, by trying every order: of a few calls that have any versions, most of them impossible.
#[test]
fn the_sweep_agrees_with_a_search_through_all_orders() {
    let mut agreed = [0; 2];
    for seed in 0..5_000 {
        let history = few_calls(&mut StdRng::seed_from_u64(seed));
        let verdict = judge(&history, BOUNDS);
        let broken = [
            Rule::OutOfOrder,
            Rule::Resurrected,
            Rule::FromTheFuture,
            Rule::ConditionBroken,
        ];
        let refused = (verdict.complaints.iter()).any(|complaint| broken.contains(&complaint.rule));
        let possible = has_order(&history, &mut Vec::new());
        assert_eq!(
            possible, !refused,
            "seed {seed}: {:#?} {:#?}",
            history.ops, verdict.complaints
        );
        agreed[usize::from(possible)] += 1;
    }
    assert!(agreed.iter().all(|count| *count > 500), "{agreed:?}");
}

fn change_to(value: Option<Value>) -> Change {
    value.map_or(Change::Delete, Change::Put)
}

/// Up to six calls on one key, all of it by chance. Times are apart, so that their order is no matter of taste.
fn few_calls(rng: &mut StdRng) -> History {
    let count = rng.random_range(2..=6);
    let mut instants: Vec<u64> = (1..=2 * count as u64).collect();
    instants.shuffle(rng);
    let mut versions: Vec<Version> = (1..=count as Version).collect();
    versions.shuffle(rng);
    let mut records = Vec::new();
    let mut ops = Vec::new();
    for number in 0..count {
        let (one, other) = (instants[2 * number], instants[2 * number + 1]);
        ops.push(a_read(number, one.min(other)..one.max(other)));
        if rng.random_range(0..5) < 2 {
            let record = Record {
                version: versions[number],
                value: rng.random_bool(0.7).then_some(Value(number as u64)),
            };
            // One whose caller was not told is seen below, or is nowhere.
            let told = record.value.is_none() || rng.random_bool(0.8);
            records.push((record, told));
            ops[number].act = Act::Write {
                through: true,
                change: change_to(record.value),
                condition: None,
                request: None,
                outcome: if told {
                    Outcome::Ok(record.version)
                } else {
                    Outcome::Unknown
                },
            };
        }
    }
    let mut seen: Vec<Record> = Vec::new();
    for op in &mut ops {
        if let Act::Read { found, .. } = &mut op.act
            && !records.is_empty()
            && rng.random_bool(0.8)
        {
            let record = records[rng.random_range(0..records.len())].0;
            *found = record.value.map(|value| (record.version, value));
            seen.push(record);
        }
    }
    // Of those whose caller was told and that nobody saw, some shared their commit with a higher one; where there are conditions, none.
    let conditional = rng.random_bool(0.5);
    let stood = records
        .iter()
        .filter(|(record, told)| seen.contains(record) || *told && (conditional || rng.random_bool(0.8)));
    let mut applied: Vec<Record> = stood.map(|(record, _)| *record).collect();
    applied.sort_by_key(|record| record.version);
    ops.retain(|op| {
        !matches!(op.act, Act::Write { change: Change::Put(value), outcome: Outcome::Unknown, .. }
        if !applied.iter().any(|record| record.value == Some(value)))
    });
    if conditional {
        set_conditions(&mut ops, &applied, rng);
    }
    History {
        classes: vec![Class::Through],
        ops,
        rows: applied.last().map(|last| (0, *last)).into_iter().collect(),
        applied: BTreeMap::from([(0, applied)]),
        settled: Vec::new(),
        calm: Vec::new(),
    }
}

/// A read of the store that shows nothing.
fn a_read(number: usize, time: std::ops::Range<u64>) -> Op {
    Op {
        key: 0,
        session: number as u32,
        replica: Replica { number, life: Some(0) },
        call: time.start,
        ret: time.end,
        act: Act::Read {
            consistency: Consistency::Store,
            at_least: None,
            found: None,
            stale: false,
            source: "the store",
        },
    }
}

/// Gives some writes conditions, most of which can hold, and makes refusals of some reads.
fn set_conditions(ops: &mut [Op], applied: &[Record], rng: &mut StdRng) {
    let versions: Vec<Option<Version>> = ops
        .iter()
        .map(|op| {
            let mut records = applied.iter();
            match op.act {
                Act::Write {
                    outcome: Outcome::Ok(version),
                    ..
                } => Some(version),
                Act::Write { change, .. } => records
                    .find(|record| record.value == change.value())
                    .map(|record| record.version),
                Act::Read { .. } => None,
            }
        })
        .collect();
    for (op, version) in ops.iter_mut().zip(versions) {
        if rng.random() {
            continue;
        }
        let live = |below: Version| {
            let below = applied.iter().rev().find(|record| record.version < below);
            below.filter(|record| record.value.is_some())
        };
        let other = Condition::Version(rng.random_range(1..7));
        match &mut op.act {
            Act::Write { condition, .. } => {
                let fits = match live(version.unwrap_or(1)) {
                    None => Condition::Absent,
                    Some(record) => *[Condition::Present, Condition::Version(record.version)]
                        .choose(rng)
                        .expect("there are two"),
                };
                let any = [Condition::Absent, Condition::Present, other];
                *condition = Some(if rng.random_bool(0.8) {
                    fits
                } else {
                    *any.choose(rng).expect("there are three")
                });
            }
            act @ Act::Read { .. } => {
                let standing = live(rng.random_range(1..8)).map(|record| record.version);
                let condition = match standing {
                    Some(_) => [Condition::Absent, other],
                    None => [Condition::Present, other],
                };
                *act = Act::Write {
                    through: true,
                    change: Change::Put(Value(1000 + op.call)),
                    condition: condition.choose(rng).copied(),
                    request: None,
                    outcome: Outcome::Refused(standing),
                };
            }
        }
    }
}

/// Whether the calls that are not in `order` can follow it.
fn has_order(history: &History, order: &mut Vec<usize>) -> bool {
    let ops = &history.ops;
    let is_applied = |place: &usize| {
        let version = version(history, &ops[*place]);
        history.applied[&0].iter().any(|record| record.version == version)
    };
    // What stands, and what came after it and nobody may see.
    let mut stands = None;
    let mut hidden = Vec::new();
    for place in order.iter().filter(|place| takes_effect(&ops[**place])) {
        if is_applied(place) {
            stands = Some(&ops[*place]);
            hidden.clear();
        } else {
            hidden.push(&ops[*place]);
        }
    }
    if order.len() == ops.len() {
        return hidden.is_empty();
    }
    for next in 0..ops.len() {
        let op = &ops[next];
        let left = |place: &usize| !order.contains(place);
        let overdue = (0..ops.len()).filter(left).any(|other| over(&ops[other]) < op.call);
        if order.contains(&next) || overdue {
            continue;
        }
        let live = stands.filter(|stands| written(stands).is_some());
        let live = live.map(|live| version(history, live));
        let holds = |condition: &Option<Condition>| match condition {
            None => true,
            Some(Condition::Absent) => live.is_none(),
            Some(Condition::Present) => live.is_some(),
            Some(Condition::Version(version)) => live == Some(*version),
        };
        let fits = match &op.act {
            Act::Write {
                condition,
                outcome: Outcome::Refused(standing),
                ..
            } => hidden.is_empty() && live == *standing && !holds(condition),
            Act::Write { condition, .. } if !holds(condition) => false,
            Act::Write { .. } => {
                let above = |other: &Op| version(history, other) < version(history, op);
                // Nobody is told OK before what takes the place of their write is under way.
                let superseded = |other: &&Op| above(other) && op.call < other.ret;
                !is_applied(&next) || stands.is_none_or(above) && hidden.iter().all(superseded)
            }
            Act::Read { found, .. } => {
                let value = stands.and_then(written);
                hidden.is_empty() && found.map(|(_, value)| value) == value
            }
        };
        if fits {
            order.push(next);
            if has_order(history, order) {
                return true;
            }
            order.pop();
        }
    }
    false
}

fn takes_effect(op: &Op) -> bool {
    let refused = matches!(
        op.act,
        Act::Write {
            outcome: Outcome::Refused(_),
            ..
        }
    );
    matches!(op.act, Act::Write { .. }) && !refused
}

/// The value that a write leaves.
fn written(op: &Op) -> Option<Value> {
    match op.act {
        Act::Write { change, .. } => change.value(),
        Act::Read { .. } => None,
    }
}

fn over(op: &Op) -> u64 {
    let told = !matches!(
        op.act,
        Act::Write {
            outcome: Outcome::Unknown,
            ..
        }
    );
    if told { op.ret } else { u64::MAX }
}

/// The version of a write: as its caller was told, or as it stood.
fn version(history: &History, op: &Op) -> Version {
    match op.act {
        Act::Write {
            outcome: Outcome::Ok(version),
            ..
        } => version,
        Act::Write { change, .. } => {
            let mut applied = history.applied[&0].iter();
            let stood = applied.find(|record| record.value == change.value());
            stood.expect("only what was seen is left").version
        }
        Act::Read { .. } => unreachable!("it is no write"),
    }
}
