//! Counters: what was added to them is what they become.
//!
//! Owns the sweep in the order of versions: each answer is what was there before and what it added, and what lies between two of them that is more
//! was added by callers who were not told. Adds that are sent once add [`ONCE`] each, and all others less, so that the two do not make up for
//! each other.

use super::{Rule, Verdict};
use crate::history::{Act, Change, History, Op, Outcome, Value, Version};

/// What an add adds that is sent once.
pub const ONCE: u64 = 1_000_000;

/// What a counter was: with what an answered add made it more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    version: Version,
    value: u64,
    /// `None`: this is what somebody saw.
    delta: Option<u64>,
}

pub(super) fn judge(key: usize, ops: &[&Op], history: &History, verdict: &mut Verdict) {
    let mut points: Vec<Point> = Vec::new();
    let mut untold = (0, 0);
    for op in ops {
        match op.act {
            Act::Write {
                change: Change::Add { delta, made },
                outcome,
                ..
            } => match (outcome, made) {
                (Outcome::Ok(version), Some(Value(value))) => {
                    verdict.judged.counted += 1;
                    points.push(Point {
                        version,
                        value,
                        delta: Some(delta),
                    });
                }
                (Outcome::Unknown, _) => {
                    untold.0 += delta / ONCE;
                    untold.1 += delta % ONCE;
                }
                _ => {}
            },
            Act::Read {
                found: Some((version, Value(value))),
                ..
            } => points.push(seen(version, value)),
            Act::Write { .. } | Act::Read { .. } => {}
        }
    }
    let applied = history.applied.get(&key).into_iter().flatten();
    points.extend(applied.filter_map(|record| Some(seen(record.version, record.value?.0))));
    // Of one version the answer comes first, and what was seen of it has to be the same.
    points.sort_by_key(|point| (point.version, point.delta.is_none()));
    let end = ops.iter().map(|op| op.ret).max().unwrap_or(0);
    let mut before = seen(0, 0);
    let mut beyond = (0, 0);
    for point in points {
        let added = point.delta.unwrap_or(0);
        let more = point
            .value
            .checked_sub(before.value)
            .and_then(|more| more.checked_sub(added));
        let same = point.version == before.version;
        match more {
            Some(0) if same && point.delta.is_none() => {}
            Some(more) if !same && (more > 0 || added > 0) => {
                beyond.0 += more / ONCE;
                beyond.1 += more % ONCE;
            }
            Some(_) | None => {
                let what = format!("it was {before:?}, and became {point:?}");
                verdict.complain(Rule::Miscounted, key, end, what);
            }
        }
        before = point;
    }
    if beyond.0 > untold.0 || beyond.1 > untold.1 {
        let what = format!(
            "beyond what was answered it has {} times what is added once, and {} more; of that nobody was told {} times, and of {}",
            beyond.0, beyond.1, untold.0, untold.1
        );
        verdict.complain(Rule::Miscounted, key, end, what);
    }
}

fn seen(version: Version, value: u64) -> Point {
    Point {
        version,
        value,
        delta: None,
    }
}
