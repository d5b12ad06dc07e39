//! The ways in which a gateway can be wrong, each done to the history of one that was right.

use std::collections::BTreeMap;

use rand::{
    RngExt,
    rngs::StdRng,
    seq::{IndexedRandom, IteratorRandom},
};

use super::simulation::BOUNDS;
use crate::{
    check::{ONCE, Rule},
    history::{Act, Change, Condition, Consistency, History, Nanos, Op, Outcome, Record, Value, Version},
};

/// The key that is a counter.
const COUNTER: usize = 3;

/// Makes a history wrong, and says of which key; `None` if it cannot be made wrong so.
type Mutate = fn(&mut History, &mut StdRng) -> Option<usize>;

/// Each with the rules of which one has to be complained about.
pub const MUTATIONS: [(&str, Mutate, &[Rule]); 30] = [
    ("two writes swapped", swapped, &[Rule::OutOfOrder]),
    (
        "a stale read of the store",
        stale_read,
        &[Rule::OutOfOrder, Rule::Resurrected],
    ),
    (
        "a read of the store misses what a cache showed",
        uncommitted,
        &[Rule::OutOfOrder, Rule::Resurrected],
    ),
    ("a value vanishes", vanished, &[Rule::OutOfOrder]),
    ("a deleted value comes back", resurrected, &[Rule::Resurrected]),
    (
        "a copy is kept too long",
        too_stale,
        &[Rule::TooStale, Rule::Resurrected],
    ),
    (
        "a copy is kept too long in calm times",
        too_stale_in_calm,
        &[Rule::TooStale, Rule::Resurrected],
    ),
    ("a read from the future", from_the_future, &[Rule::FromTheFuture]),
    ("a refused write is read", refused, &[Rule::WasRefused]),
    (
        "a value of nobody",
        never_written,
        &[Rule::NeverWritten, Rule::Miscounted],
    ),
    ("a tombstone of nobody", never_deleted, &[Rule::NeverWritten]),
    ("one write under two versions", written_twice, &[Rule::TwoVersions]),
    ("a row goes back", row_back, &[Rule::StoreWentBack]),
    ("a write is lost", lost, &[Rule::Lost, Rule::Resurrected]),
    (
        "a replica stays behind",
        not_converged,
        &[Rule::NotConverged, Rule::Resurrected],
    ),
    (
        "a replica misses its own write",
        own_missed,
        &[Rule::OwnWriteMissed, Rule::Resurrected],
    ),
    (
        "a session goes back",
        session_back,
        &[Rule::SessionWentBack, Rule::Resurrected],
    ),
    ("a request is answered anew", answered_anew, &[Rule::TwoAnswers]),
    ("a request is forgotten, and refused", forgotten, &[Rule::TwoAnswers]),
    (
        "a request is written again",
        request_written_again,
        &[Rule::TwoVersions],
    ),
    ("an absent key was there", was_there, &[Rule::ConditionBroken]),
    ("a key that is there was absent", was_absent, &[Rule::ConditionBroken]),
    ("another version stood", other_stood, &[Rule::ConditionBroken]),
    ("an update is lost", update_lost, &[Rule::ConditionBroken]),
    ("a touch changes a value", touch_changes, &[Rule::ConditionBroken]),
    (
        "refused for what stood long before",
        refused_for_old,
        &[Rule::OutOfOrder, Rule::Resurrected],
    ),
    (
        "what is decided misses what is pending",
        misses_pending,
        &[Rule::OwnWriteMissed, Rule::Resurrected],
    ),
    ("refused for nothing", refused_for_nothing, &[Rule::ConditionBroken]),
    ("an add is counted twice", counted_twice, &[Rule::Miscounted]),
    ("an add is not counted", not_counted, &[Rule::Miscounted]),
];

/// The acknowledged writes of a key, each as one call from the first time that it was sent to its first answer.
fn acknowledged(history: &History, key: usize) -> Vec<(Version, Op)> {
    let mut writes: BTreeMap<Version, Op> = BTreeMap::new();
    for op in history.ops.iter().filter(|op| op.key == key) {
        if let Some(version) = answer(op) {
            let write = writes.entry(version).or_insert_with(|| op.clone());
            if op.ret < write.ret {
                *write = op.clone();
            }
        }
    }
    let mut first: BTreeMap<u64, Nanos> = BTreeMap::new();
    for op in history.ops.iter().filter(|op| op.key == key) {
        if let Some(request) = request(op).filter(|_| may_count(op)) {
            let call = first.entry(request).or_insert(op.call);
            *call = op.call.min(*call);
        }
    }
    for write in writes.values_mut() {
        let first = request(write).and_then(|request| first.get(&request));
        write.call = first.copied().unwrap_or(write.call);
    }
    writes.into_iter().collect()
}

/// The version that a write was answered with.
fn answer(op: &Op) -> Option<Version> {
    match op.act {
        Act::Write {
            outcome: Outcome::Ok(version),
            ..
        } => Some(version),
        Act::Write { .. } | Act::Read { .. } => None,
    }
}

fn request(op: &Op) -> Option<u64> {
    match op.act {
        Act::Write { request, .. } => request,
        Act::Read { .. } => None,
    }
}

fn may_count(op: &Op) -> bool {
    matches!(
        op.act,
        Act::Write {
            outcome: Outcome::Ok(_) | Outcome::Unknown,
            ..
        }
    )
}

/// When a write was sent for the first time that can have been the one.
fn first_call(history: &History, write: &Op) -> Nanos {
    let Some(name) = request(write) else {
        return write.call;
    };
    let same = history
        .ops
        .iter()
        .filter(|op| request(op) == Some(name) && may_count(op));
    same.map(|op| op.call).min().unwrap_or(write.call)
}

/// A call that is as wanted, by its place.
fn any(history: &History, rng: &mut StdRng, fits: impl Fn(&Op) -> bool) -> Option<usize> {
    let places = history.ops.iter().enumerate();
    places.filter(|(_, op)| fits(op)).map(|(place, _)| place).choose(rng)
}

/// The puts of a key that came into its row, oldest first.
fn puts(history: &History, key: usize) -> Vec<(Version, Value)> {
    let applied = history.applied.get(&key).map_or(&[][..], Vec::as_slice);
    let put = |record: &Record| Some((record.version, record.value?));
    applied.iter().filter_map(put).collect()
}

/// Makes one of the reads that `fits` show an older put than `missed` says it has to show; `missed` is given the read.
fn age(
    history: &mut History,
    rng: &mut StdRng,
    fits: impl Fn(&History, &Op) -> bool,
    missed: impl Fn(&History, &Op) -> Option<Version>,
) -> Option<usize> {
    let (place, older) = (0..history.ops.len())
        .filter_map(|place| {
            let op = &history.ops[place];
            if !matches!(op.act, Act::Read { .. }) || !fits(history, op) {
                return None;
            }
            let missed = missed(history, op)?;
            let older = puts(history, op.key);
            let older = older.into_iter().rev().find(|(version, _)| *version < missed)?;
            Some((place, older))
        })
        .choose(rng)?;
    let op = &mut history.ops[place];
    let Act::Read { found, .. } = &mut op.act else {
        return None;
    };
    *found = Some(older);
    Some(op.key)
}

fn consistency(op: &Op) -> Option<Consistency> {
    match op.act {
        Act::Read { consistency, .. } => Some(consistency),
        Act::Write { .. } => None,
    }
}

fn is_through(history: &History, op: &Op) -> bool {
    history.classes[op.key].is_through()
}

fn reads_store(history: &History, op: &Op) -> bool {
    is_through(history, op) && consistency(op) == Some(Consistency::Store)
}

fn reads_cache(history: &History, op: &Op) -> bool {
    is_through(history, op) && consistency(op) == Some(Consistency::Cached)
}

/// The newest of the writes that were acknowledged so long before a read was called.
fn complete(history: &History, read: &Op, before: Nanos) -> Option<(Version, Op)> {
    let writes = acknowledged(history, read.key).into_iter();
    writes
        .filter(|(_, write)| write.ret + before < read.call)
        .max_by_key(|(version, _)| *version)
}

fn swapped(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let key = 0;
    let writes = acknowledged(history, key);
    let pairs = writes
        .iter()
        .flat_map(|one| writes.iter().map(move |other| (one, other)));
    let ((one, _), (other, _)) = pairs
        .filter(|((_, first), (_, second))| first.ret < second.call)
        .choose(rng)?;
    let (one, other) = (*one, *other);
    let swap = |version: &mut Version| {
        *version = match *version {
            version if version == one => other,
            version if version == other => one,
            version => version,
        }
    };
    for op in history.ops.iter_mut().filter(|op| op.key == key) {
        match &mut op.act {
            Act::Write {
                outcome: Outcome::Ok(version),
                ..
            }
            | Act::Read {
                found: Some((version, _)),
                ..
            } => swap(version),
            Act::Write { .. } | Act::Read { .. } => {}
        }
    }
    Some(key)
}

fn stale_read(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    age(history, rng, reads_store, |history, read| {
        complete(history, read, 0).map(|(version, _)| version)
    })
}

fn uncommitted(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    age(history, rng, reads_store, |history, read| {
        let shown = history.ops.iter().filter_map(|op| match op.act {
            Act::Read {
                found: Some((version, _)),
                consistency: Consistency::Cached | Consistency::Shared,
                ..
            } if op.key == read.key && op.ret < read.call => Some(version),
            Act::Write { .. } | Act::Read { .. } => None,
        });
        shown.max()
    })
}

fn vanished(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    // Without deletes there is no excuse.
    let key = 0;
    let is_delete = |op: &Op| {
        op.key == key
            && matches!(
                op.act,
                Act::Write {
                    change: Change::Delete,
                    ..
                }
            )
    };
    let after = (history.ops.iter().enumerate())
        .filter(|(_, op)| reads_store(history, op) && complete(history, op, 0).is_some())
        .map(|(place, _)| place)
        .choose(rng)?;
    let Act::Read { found, .. } = &mut history.ops[after].act else {
        return None;
    };
    *found = None;
    history.ops.retain(|op| !is_delete(op));
    history.applied.get_mut(&key)?.retain(|record| record.value.is_some());
    let stands = history.applied[&key].last().copied();
    history.rows = BTreeMap::from_iter(stands.map(|stands| (key, stands)));
    Some(key)
}

fn resurrected(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    age(history, rng, reads_store, |history, read| {
        let (version, write) = complete(history, read, 0)?;
        let is_delete = matches!(
            write.act,
            Act::Write {
                change: Change::Delete,
                ..
            }
        );
        // The highest that is known to be complete: by no other call either.
        let above = history.ops.iter().any(|op| match op.act {
            Act::Read {
                found: Some((shown, _)),
                ..
            } => op.key == read.key && shown > version && op.ret < read.call,
            Act::Write { .. } | Act::Read { .. } => false,
        });
        (is_delete && !above).then_some(version)
    })
}

fn too_stale(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    age(history, rng, reads_cache, |history, read| {
        complete(history, read, BOUNDS.ever).map(|(version, _)| version)
    })
}

fn too_stale_in_calm(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    age(history, rng, reads_cache, |history, read| {
        let calm = (history.calm[0].iter()).find(|time| time.contains(&read.call))?;
        let (version, write) = complete(history, read, BOUNDS.calm)?;
        (calm.contains(&write.call) && calm.contains(&write.ret)).then_some(version)
    })
}

fn from_the_future(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let before = &*history;
    let pairs = before.ops.iter().enumerate().flat_map(|(place, read)| {
        let writes = acknowledged(before, read.key).into_iter();
        writes.filter_map(move |(version, write)| match write.act {
            Act::Write {
                change: Change::Put(value),
                ..
            } if write.call > read.ret => Some((place, version, value)),
            Act::Write { .. } | Act::Read { .. } => None,
        })
    });
    let (place, version, value) = pairs
        .filter(|(place, ..)| matches!(before.ops[*place].act, Act::Read { .. }))
        .choose(rng)?;
    show(history, place, version, value)
}

/// Makes a read show something.
fn show(history: &mut History, place: usize, version: Version, value: Value) -> Option<usize> {
    let op = &mut history.ops[place];
    let Act::Read { found, .. } = &mut op.act else {
        return None;
    };
    *found = Some((version, value));
    Some(op.key)
}

fn refused(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let (key, value, call) = history
        .ops
        .iter()
        .filter_map(|op| match op.act {
            Act::Write {
                change: Change::Put(value),
                request: None,
                outcome: Outcome::NotApplied | Outcome::Refused(_),
                ..
            } => Some((op.key, value, op.call)),
            Act::Write { .. } | Act::Read { .. } => None,
        })
        .choose(rng)?;
    let reads = history.ops.iter().enumerate();
    let (place, _) = reads
        .filter(|(_, op)| op.key == key && op.call > call && consistency(op).is_some())
        .choose(rng)?;
    show(history, place, Version::MAX, value)
}

fn never_written(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let places = (0..history.ops.len()).filter(|place| consistency(&history.ops[*place]).is_some());
    let place = places.choose(rng)?;
    show(history, place, Version::MAX, Value(u64::MAX))
}

fn never_deleted(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let key = rng.random_range(0..history.classes.len());
    history.ops.retain(|op| {
        let untold = matches!(
            op.act,
            Act::Write {
                change: Change::Delete,
                outcome: Outcome::Unknown,
                ..
            }
        );
        op.key != key || !untold
    });
    let applied = history.applied.get_mut(&key)?;
    let record = Record {
        version: applied.last()?.version + 1,
        value: None,
    };
    applied.push(record);
    history.rows.insert(key, record);
    Some(key)
}

fn written_twice(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    // What is put twice may have been touched, and a sum is nobody's alone.
    let key = rng.random_range(0..3);
    history.ops.retain(|op| {
        let untold = matches!(
            op.act,
            Act::Write {
                change: Change::Touch,
                outcome: Outcome::Unknown,
                ..
            }
        );
        op.key != key || !untold
    });
    let (_, value) = *puts(history, key).choose(rng)?;
    let applied = history.applied.get_mut(&key)?;
    let record = Record {
        version: applied.last()?.version + 1,
        value: Some(value),
    };
    applied.push(record);
    history.rows.insert(key, record);
    Some(key)
}

fn row_back(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let key = rng.random_range(0..history.classes.len());
    let applied = history.applied.get_mut(&key)?;
    let place = (1..applied.len()).choose(rng)?;
    applied.swap(place - 1, place);
    Some(key)
}

fn lost(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let key = rng.random_range(0..history.classes.len());
    let highest = acknowledged(history, key)
        .into_iter()
        .map(|(version, _)| version)
        .max()?;
    let applied = history.applied.get_mut(&key)?;
    applied.retain(|record| record.version < highest);
    let stands = applied.last().copied();
    history.rows.remove(&key);
    history.rows.extend(stands.map(|stands| (key, stands)));
    for settled in history.settled.iter_mut().filter(|settled| settled.key == key) {
        settled.found = stands.and_then(|stands| Some((stands.version, stands.value?)));
    }
    Some(key)
}

fn not_converged(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let place = (0..history.settled.len()).choose(rng)?;
    let key = history.settled[place].key;
    let older = puts(history, key);
    let older = older
        .into_iter()
        .rev()
        .find(|put| Some(*put) != history.settled[place].found)?;
    history.settled[place].found = Some(older);
    Some(key)
}

fn own_missed(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let fits = |history: &History, op: &Op| !is_through(history, op) && consistency(op) != Some(Consistency::Shared);
    age(history, rng, fits, |history, read| {
        let writes = acknowledged(history, read.key).into_iter();
        let own = writes.filter(|(_, write)| {
            let lives_on = consistency(read) == Some(Consistency::Store)
                || write.replica.life.is_some() && write.replica.life == read.replica.life;
            write.replica.number == read.replica.number && write.ret < read.call && lives_on
        });
        own.map(|(version, _)| version).max()
    })
}

fn session_back(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let fits = |_: &History, op: &Op| matches!(op.act, Act::Read { at_least: Some(_), .. });
    age(history, rng, fits, |_, read| match read.act {
        Act::Read { at_least, .. } => at_least,
        Act::Write { .. } => None,
    })
}

/// Two answers of one request, the later one after the first.
fn repeated(history: &History, rng: &mut StdRng, fits: impl Fn(&Op) -> bool) -> Option<usize> {
    any(history, rng, |op| {
        let earlier = |first: &&Op| request(first) == request(op) && answer(first).is_some() && first.ret < op.call;
        request(op).is_some() && answer(op).is_some() && fits(op) && history.ops.iter().any(|other| earlier(&other))
    })
}

/// Gives a write another outcome.
fn end_as(history: &mut History, place: usize, so: Outcome) -> Option<usize> {
    let op = &mut history.ops[place];
    let Act::Write { outcome, .. } = &mut op.act else {
        return None;
    };
    *outcome = so;
    Some(op.key)
}

fn answered_anew(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let place = repeated(history, rng, |_| true)?;
    let version = answer(&history.ops[place])?;
    end_as(history, place, Outcome::Ok(version + 1))
}

fn forgotten(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let place = repeated(history, rng, |op| {
        matches!(op.act, Act::Write { condition: Some(_), .. })
    })?;
    end_as(history, place, Outcome::Refused(Some(1)))
}

fn request_written_again(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let is_put = |op: &Op| {
        matches!(
            op.act,
            Act::Write {
                change: Change::Put(_),
                ..
            }
        )
    };
    let place = repeated(history, rng, is_put)?;
    let key = history.ops[place].key;
    let Act::Write {
        change: Change::Put(value),
        ..
    } = history.ops[place].act
    else {
        return None;
    };
    history.ops.retain(|op| {
        let untold = matches!(
            op.act,
            Act::Write {
                change: Change::Touch,
                outcome: Outcome::Unknown,
                ..
            }
        );
        op.key != key || !untold
    });
    let applied = history.applied.get_mut(&key)?;
    let record = Record {
        version: applied.last()?.version + 1,
        value: Some(value),
    };
    applied.push(record);
    history.rows.insert(key, record);
    Some(key)
}

/// Gives a conditional write of a key that is written only through, which was written, another condition; in every call of its request.
fn change_condition(
    history: &mut History,
    rng: &mut StdRng,
    from: fn(Condition) -> bool,
    to: Condition,
) -> Option<usize> {
    let place = any(history, rng, |op| {
        let asked = matches!(op.act, Act::Write { condition: Some(condition), .. } if from(condition));
        asked && answer(op).is_some() && is_through(history, op) && !has_untold(history, op)
    })?;
    let name = request(&history.ops[place]);
    let key = history.ops[place].key;
    for other in 0..history.ops.len() {
        let same = other == place || name.is_some() && request(&history.ops[other]) == name;
        if same && let Act::Write { condition, .. } = &mut history.ops[other].act {
            *condition = Some(to);
        }
    }
    Some(key)
}

/// Whether a write of which nobody was told may have been decided just before.
fn has_untold(history: &History, op: &Op) -> bool {
    let call = first_call(history, op);
    history.ops.iter().any(|other| {
        let untold = matches!(
            other.act,
            Act::Write {
                outcome: Outcome::Unknown,
                ..
            }
        );
        let concurrent = other.call < op.ret && other.call + BOUNDS.open > call;
        untold && other.key == op.key && other.is_decided() && concurrent
    })
}

fn was_there(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    change_condition(history, rng, |from| from != Condition::Absent, Condition::Absent)
}

fn was_absent(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    change_condition(history, rng, |from| from == Condition::Absent, Condition::Present)
}

fn other_stood(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let is_version = |from| matches!(from, Condition::Version(_));
    change_condition(history, rng, is_version, Condition::Version(1))
}

fn update_lost(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let place = any(history, rng, |op| {
        let asked = matches!(
            op.act,
            Act::Write {
                condition: Some(Condition::Version(_)),
                ..
            }
        );
        asked && answer(op).is_some() && is_through(history, op)
    })?;
    let op = &history.ops[place];
    let key = op.key;
    let version = answer(op)?;
    let Act::Write {
        condition: Some(Condition::Version(stood)),
        ..
    } = op.act
    else {
        return None;
    };
    if version - stood < 2 {
        return None;
    }
    let value = Value(u64::MAX - 1);
    let mut other = op.clone();
    other.session = u32::MAX;
    other.act = Act::Write {
        through: true,
        change: Change::Put(value),
        condition: None,
        request: None,
        outcome: Outcome::Ok(version - 1),
    };
    history.ops.push(other);
    let applied = history.applied.get_mut(&key)?;
    let above = applied.partition_point(|record| record.version < version);
    let record = Record {
        version: version - 1,
        value: Some(value),
    };
    applied.insert(above, record);
    Some(key)
}

fn touch_changes(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let place = any(history, rng, |op| {
        let touches = matches!(
            op.act,
            Act::Write {
                change: Change::Touch,
                ..
            }
        );
        touches && answer(op).is_some() && is_through(history, op) && !has_untold(history, op)
    })?;
    let key = history.ops[place].key;
    let version = answer(&history.ops[place])?;
    let kept = history.applied[&key]
        .iter()
        .find(|record| record.version == version)?
        .value;
    let (_, other) = puts(history, key).into_iter().find(|(_, value)| Some(*value) != kept)?;
    let applied = history.applied.get_mut(&key)?;
    applied.iter_mut().find(|record| record.version == version)?.value = Some(other);
    Some(key)
}

fn refused_for_old(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let mut found = Vec::new();
    for (place, op) in history.ops.iter().enumerate() {
        let Act::Write {
            outcome: Outcome::Refused(Some(_)),
            ..
        } = op.act
        else {
            continue;
        };
        let Some((version, _)) = complete(history, op, 0).filter(|_| is_through(history, op)) else {
            continue;
        };
        let older = puts(history, op.key)
            .into_iter()
            .rev()
            .find(|(older, _)| *older < version);
        found.extend(older.map(|(older, _)| (place, older)));
    }
    let (place, older) = found.into_iter().choose(rng)?;
    end_as(history, place, Outcome::Refused(Some(older)))
}

fn misses_pending(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let mut found = Vec::new();
    for (place, op) in history.ops.iter().enumerate() {
        let Act::Write {
            outcome: Outcome::Refused(Some(_)),
            ..
        } = op.act
        else {
            continue;
        };
        if is_through(history, op) {
            continue;
        }
        let own = (history.ops.iter())
            .filter(|write| write.key == op.key && write.replica.number == op.replica.number && write.ret < op.call);
        let Some(newest) = own.filter_map(answer).max() else {
            continue;
        };
        let older = puts(history, op.key)
            .into_iter()
            .rev()
            .find(|(older, _)| *older < newest);
        found.extend(older.map(|(older, _)| (place, older)));
    }
    let (place, older) = found.into_iter().choose(rng)?;
    end_as(history, place, Outcome::Refused(Some(older)))
}

fn refused_for_nothing(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let place = any(history, rng, |op| {
        let asked = matches!(
            op.act,
            Act::Write {
                condition: Some(Condition::Absent),
                outcome: Outcome::Refused(_),
                ..
            }
        );
        asked && is_through(history, op)
    })?;
    end_as(history, place, Outcome::Refused(None))
}

/// The answered adds, each once, that were followed by another one and by nothing else: the version, and what was added.
fn adds(history: &History) -> Vec<(Version, u64)> {
    let adds = acknowledged(history, COUNTER).into_iter();
    let adds: Vec<(Version, u64, u64)> = adds
        .filter_map(|(version, op)| match op.act {
            Act::Write {
                change:
                    Change::Add {
                        delta,
                        made: Some(Value(made)),
                    },
                ..
            } => Some((version, delta, made)),
            Act::Write { .. } | Act::Read { .. } => None,
        })
        .collect();
    let followed = adds.windows(2).filter(|pair| pair[0].2 + pair[1].1 == pair[1].2);
    followed.map(|pair| (pair[0].0, pair[0].1)).collect()
}

/// Makes the counter another one from a version on.
fn shift(history: &mut History, from: Version, by: impl Fn(u64) -> u64) {
    let shift = |version: Version, value: &mut Value| {
        if version >= from {
            value.0 = by(value.0);
        }
    };
    for op in history.ops.iter_mut().filter(|op| op.key == COUNTER) {
        match &mut op.act {
            Act::Write {
                change: Change::Add { made: Some(made), .. },
                outcome: Outcome::Ok(version),
                ..
            } => shift(*version, made),
            Act::Read {
                found: Some((version, value)),
                ..
            } => shift(*version, value),
            Act::Write { .. } | Act::Read { .. } => {}
        }
    }
    for record in history.applied.get_mut(&COUNTER).into_iter().flatten() {
        if let Some(value) = &mut record.value {
            shift(record.version, value);
        }
    }
    if let Some(Record {
        version,
        value: Some(value),
    }) = history.rows.get_mut(&COUNTER)
    {
        shift(*version, value);
    }
    for settled in history.settled.iter_mut().filter(|settled| settled.key == COUNTER) {
        if let Some((version, value)) = &mut settled.found {
            shift(*version, value);
        }
    }
}

fn counted_twice(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    // It may be one of which nobody was told, if there are any.
    history.ops.retain(|op| {
        let untold = matches!(
            op.act,
            Act::Write {
                outcome: Outcome::Unknown,
                ..
            }
        );
        op.key != COUNTER || !untold || request(op).is_none()
    });
    let (version, delta) = adds(history)
        .into_iter()
        .filter(|(_, delta)| *delta < ONCE)
        .choose(rng)?;
    shift(history, version + 1, |value| value + delta);
    Some(COUNTER)
}

fn not_counted(history: &mut History, rng: &mut StdRng) -> Option<usize> {
    let (version, delta) = adds(history).into_iter().choose(rng)?;
    shift(history, version + 1, |value| value - delta);
    Some(COUNTER)
}
