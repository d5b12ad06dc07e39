//! The ways in which a gateway can be wrong, each done to the history of one that was right.

use std::collections::BTreeMap;

use rand::{
    RngExt,
    rngs::StdRng,
    seq::{IndexedRandom, IteratorRandom},
};

use super::simulation::BOUNDS;
use crate::{
    check::Rule,
    history::{Act, Class, Consistency, History, Nanos, Op, Outcome, Record, Value, Version},
};

/// Makes a history wrong, and says of which key; `None` if it cannot be made wrong so.
type Mutate = fn(&mut History, &mut StdRng) -> Option<usize>;

/// Each with the rules of which one has to be complained about.
pub const MUTATIONS: [(&str, Mutate, &[Rule]); 17] = [
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
    ("a value of nobody", never_written, &[Rule::NeverWritten]),
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
];

/// The acknowledged writes of a key.
fn acknowledged(history: &History, key: usize) -> Vec<(Version, Op)> {
    let of_key = history.ops.iter().filter(|op| op.key == key);
    of_key
        .filter_map(|op| match op.act {
            Act::Write {
                outcome: Outcome::Ok(version),
                ..
            } => Some((version, op.clone())),
            Act::Write { .. } | Act::Read { .. } => None,
        })
        .collect()
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
    history.classes[op.key] == Class::Through
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
    let is_delete = |op: &Op| op.key == key && matches!(op.act, Act::Write { value: None, .. });
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
        let is_delete = matches!(write.act, Act::Write { value: None, .. });
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
    let pairs = history.ops.iter().enumerate().flat_map(|(place, read)| {
        let writes = acknowledged(history, read.key).into_iter();
        writes.filter_map(move |(version, write)| match write.act {
            Act::Write { value: Some(value), .. } if write.call > read.ret => Some((place, version, value)),
            Act::Write { .. } | Act::Read { .. } => None,
        })
    });
    let (place, version, value) = pairs
        .filter(|(place, ..)| matches!(history.ops[*place].act, Act::Read { .. }))
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
                value: Some(value),
                outcome: Outcome::NotApplied,
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
                value: None,
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
    let key = rng.random_range(0..history.classes.len());
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
