//! How the store decides: operations of one transaction, in order, over what stands.
//!
//! Owns the decision, which is pure and the same for every backend, and what has to be written for it. Does not own the transaction: the
//! backends lock what stands, read it, and write what comes out, or nothing. Invariants: of one key each operation sees what the one before it
//! left; a version only rises; what is remembered of a request is what its write did, and nothing is remembered of what did nothing.
//!
//! The checks of an operation, the first that speaks decides:
//!
//! 1. Its request id is known, from before or from this transaction, and its window is not over: `Repeated`, or `Reused` where the
//!    fingerprint is another.
//! 2. What stands is below what is known to have been acknowledged: `Behind`. A key without a row holds whatever the horizon covers.
//! 3. Its condition does not hold: `Refused`.
//! 4. Its version is not above what stands, or what once stood: `Outdated`.
//! 5. Its change cannot be made of what stands: `Refused`. Else `Applied`.

use std::{borrow::Cow, collections::BTreeMap};

use bytes::Bytes;

use crate::{
    model::{Answer, Answered, Condition, Entry, Key, KeyedAnswer, RequestId, Tags, Timestamp, Version, Write},
    store::operation::{Change, Decided, Operation, Refusal},
};

/// The row of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing {
    /// What it holds. Where [`Wanted::content`] is not set, a value may be an empty one.
    pub(super) entry: Entry,
    /// Its tags, as far as they are wanted.
    pub(super) tags: Tags,
}

/// A key whose row a transaction has to lock and read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted<'a> {
    /// The key.
    pub(super) key: &'a Key,
    /// Whether its value and its tags matter, beyond whether there is a value.
    pub(super) content: bool,
}

/// A row to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changed {
    /// What the last operation of its key left.
    pub(super) write: Write,
    /// The version of the row that was read; `None`: there was none, and there must be none.
    pub(super) seen: Option<Version>,
}

/// What came of a transaction's operations.
#[derive(Debug)]
pub(super) struct Plan {
    /// Of each operation, in their order.
    pub(super) decided: Vec<Decided>,
    /// The rows to write, sorted by key.
    pub(super) changed: Vec<Changed>,
    /// The requests to remember, sorted by namespace and id, in the place of what is known of them.
    pub(super) remembered: Vec<KeyedAnswer>,
    /// The operations that change nothing of a key that has no row: no lock tells whether an earlier try of theirs is still about to
    /// make one. Their places.
    pub(super) unguarded: Vec<usize>,
}

/// The keys of operations, each once, in order.
pub(super) fn wanted(operations: &[Operation]) -> Vec<Wanted<'_>> {
    let mut wanted: Vec<Wanted<'_>> = Vec::with_capacity(operations.len());
    for Operation { key, change, .. } in operations {
        let content = matches!(change, Change::Touch { .. } | Change::Add { .. });
        match wanted.last_mut() {
            Some(last) if last.key == key => last.content |= content,
            _ => wanted.push(Wanted { key, content }),
        }
    }
    debug_assert!(
        wanted.is_sorted_by(|a, b| a.key < b.key),
        "operations are sorted by key"
    );
    wanted
}

/// Decides operations that are sorted by key, then by version. `rows` are those of [`wanted`], `known` is what is remembered of each
/// operation's request. What has expired at `now` is not there.
pub(super) fn decide(
    operations: &[Operation],
    rows: &[Option<Standing>],
    known: &[Option<Answered>],
    horizon: Option<Version>,
    now: Timestamp,
) -> Plan {
    debug_assert_eq!(operations.len(), known.len());
    let mut plan = Plan {
        decided: Vec::with_capacity(operations.len()),
        changed: Vec::new(),
        remembered: Vec::new(),
        unguarded: Vec::new(),
    };
    let mut remembered: BTreeMap<(&str, &RequestId), KeyedAnswer> = BTreeMap::new();
    let mut left = operations.iter().zip(known).enumerate().peekable();
    for row in rows {
        let Some((_, (Operation { key, .. }, _))) = left.peek().copied() else {
            break;
        };
        let mut state = State {
            row: row.as_ref().map(Cow::Borrowed),
            horizon,
            now,
        };
        let mut idle = Vec::new();
        while let Some((place, (operation, known))) = left.next_if(|(_, (operation, _))| operation.key == *key) {
            let name = (operation.key.namespace(), &operation.request.id);
            let known = remembered.get(&name).map(|keyed| &keyed.answered).or(known.as_ref());
            let decided = state.decide(operation, known);
            match &decided {
                Decided::Applied { answer, .. } => {
                    let answered = Answered {
                        request: operation.request.clone(),
                        answer: *answer,
                    };
                    let key = key.clone();
                    remembered.insert(name, KeyedAnswer { key, answered });
                }
                // What is known is known whatever else is under way.
                Decided::Repeated(_) | Decided::Reused => {}
                Decided::Outdated { .. } | Decided::Behind | Decided::Refused(_) => idle.push(place),
            }
            plan.decided.push(decided);
        }
        match state.row {
            Some(Cow::Owned(Standing { entry, tags })) => plan.changed.push(Changed {
                write: Write {
                    key: key.clone(),
                    entry,
                    tags,
                    requests: Vec::new(),
                },
                seen: row.as_ref().map(|row| row.entry.version),
            }),
            Some(Cow::Borrowed(_)) => {}
            None => plan.unguarded.append(&mut idle),
        }
    }
    plan.remembered = remembered.into_values().collect();
    plan
}

/// One key, between two operations.
struct State<'a> {
    /// What stands: as it was read, or as an operation left it.
    row: Option<Cow<'a, Standing>>,
    horizon: Option<Version>,
    now: Timestamp,
}

impl State<'_> {
    fn decide(&mut self, operation: &Operation, known: Option<&Answered>) -> Decided {
        if let Some(answered) = known.filter(|known| known.request.ends_at >= operation.asked_at) {
            return if answered.request.fingerprint == operation.request.fingerprint {
                Decided::Repeated(answered.answer)
            } else {
                Decided::Reused
            };
        }
        let row = self.row.as_deref();
        // Of a key without a row, whatever is not above the horizon may have been collected.
        let standing = row.map_or(self.horizon, |row| Some(row.entry.version));
        if operation.acknowledged > standing {
            return Decided::Behind;
        }
        if let Some(condition) = operation.condition
            && !condition.holds(row.map(|row| &row.entry), self.now)
        {
            return Decided::Refused(refusal(condition, row, self.now));
        }
        if let Some(standing) = standing.filter(|standing| *standing >= operation.version) {
            return Decided::Outdated { standing };
        }
        match applied(operation, row, self.now) {
            Ok((next, counter)) => {
                let entry = next.entry.clone();
                let answer = Answer {
                    version: operation.version,
                    counter,
                    expires_at: entry.expires_at,
                };
                self.row = Some(Cow::Owned(next));
                Decided::Applied { entry, answer }
            }
            Err(refusal) => Decided::Refused(refusal),
        }
    }
}

/// Why a condition that does not hold refuses.
fn refusal(condition: Condition, row: Option<&Standing>, now: Timestamp) -> Refusal {
    match condition {
        Condition::Present => Refusal::Absent,
        Condition::Absent | Condition::Version(_) => Refusal::Conflict {
            standing: live(row, now).map(|row| row.entry.version),
        },
    }
}

fn live(row: Option<&Standing>, now: Timestamp) -> Option<&Standing> {
    row.filter(|row| row.entry.is_live(now))
}

/// What an operation makes of what stands, and what the counter becomes, if it is one.
fn applied(operation: &Operation, row: Option<&Standing>, now: Timestamp) -> Result<(Standing, Option<i64>), Refusal> {
    let standing = live(row, now);
    let next = |value, expires_at, tags| Standing {
        entry: Entry {
            version: operation.version,
            value,
            expires_at,
        },
        tags,
    };
    match &operation.change {
        Change::Put {
            value,
            tags,
            expires_at,
        } => Ok((next(Some(value.clone()), *expires_at, tags.clone()), None)),
        Change::Delete => Ok((next(None, None, Tags::default()), None)),
        Change::Touch { expires_at } => {
            let Standing { entry, tags } = standing.ok_or(Refusal::Absent)?;
            Ok((next(entry.value.clone(), *expires_at, tags.clone()), None))
        }
        Change::Add { delta, expires_at } => {
            let (count, expires_at, tags) = match standing {
                Some(Standing { entry, tags }) => {
                    let count = entry.value.as_deref().and_then(count).ok_or(Refusal::NotACounter)?;
                    (count, entry.expires_at, tags.clone())
                }
                None => (0, *expires_at, Tags::default()),
            };
            let count = count.checked_add(*delta).ok_or(Refusal::OutOfRange)?;
            let value = Bytes::from(count.to_string());
            Ok((next(Some(value), expires_at, tags), Some(count)))
        }
    }
}

/// The number whose text a value is, exactly as this gateway writes it.
fn count(value: &[u8]) -> Option<i64> {
    let count: i64 = str::from_utf8(value).ok()?.parse().ok()?;
    (count.to_string().as_bytes() == value).then_some(count)
}

#[cfg(test)]
mod tests;
