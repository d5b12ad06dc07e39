//! How stale the reads of a key are that is written only through.
//!
//! Owns the measure: for how long, when a read was called, a newer write than the one that it shows had been acknowledged. A read that says of
//! itself that it may be outdated is not judged. The bound for calm times holds from the writes of a replica that nothing was between and
//! Redis, from the write to the read.

use super::{Bounds, Known, Rule, Verdict, is_of_store};
use crate::history::{Act, History, Nanos, Op, Outcome, Version};

/// An acknowledged write.
#[derive(Debug, Clone, Copy)]
struct Acknowledged {
    version: Version,
    replica: usize,
    call: Nanos,
    ret: Nanos,
}

pub(super) fn judge(known: &Known<'_>, ops: &[&Op], history: &History, bounds: Bounds, verdict: &mut Verdict) {
    let mut writes: Vec<Acknowledged> = ops.iter().filter_map(|op| acknowledged(op)).collect();
    let calm = Calm::sort(&mut writes, history);
    writes.sort_unstable_by_key(|write| write.version);
    // Of each write and those above it, the first to be acknowledged.
    let mut first = writes.clone();
    for place in (1..first.len()).rev() {
        if first[place].ret < first[place - 1].ret {
            first[place - 1] = first[place];
        }
    }
    for op in ops {
        let Act::Read {
            consistency,
            found,
            stale: false,
            source,
            ..
        } = &op.act
        else {
            continue;
        };
        if is_of_store(*consistency) {
            continue;
        }
        let shown = found.map_or_else(|| known.latest_absence(op.ret), |(version, _)| version);
        let above = writes.partition_point(|write| write.version <= shown);
        let missed = first.get(above);
        let staleness = missed.map_or(0, |missed| op.call.saturating_sub(missed.ret));
        verdict.staleness.push(staleness);
        verdict.judged.staleness += 1;
        let complain = |missed: Acknowledged, bound: Nanos, verdict: &mut Verdict| {
            let what = format!(
                "a {consistency:?} read of replica {} at {} shows {found:?} from {source}; version {} was acknowledged by replica {} at {}: {} ms before, and {} ms is the bound",
                op.replica.number,
                op.call,
                missed.version,
                missed.replica,
                missed.ret,
                op.call.saturating_sub(missed.ret) / 1_000_000,
                bound / 1_000_000,
            );
            let rule = known.blame(Rule::TooStale, missed.version, found.is_some());
            verdict.complain(rule, known.key, op.call, what);
        };
        let calmed = calm.newest(op.call, bounds.calm);
        verdict.judged.calm += u64::from(calmed.is_some());
        if let Some(missed) = missed.filter(|_| staleness > bounds.ever) {
            complain(*missed, bounds.ever, verdict);
        } else if let Some(missed) = calmed.filter(|newest| newest.version > shown) {
            complain(missed, bounds.calm, verdict);
        }
    }
}

fn acknowledged(op: &Op) -> Option<Acknowledged> {
    match op.act {
        Act::Write {
            outcome: Outcome::Ok(version),
            ..
        } => Some(Acknowledged {
            version,
            replica: op.replica.number,
            call: op.call,
            ret: op.ret,
        }),
        Act::Write { .. } | Act::Read { .. } => None,
    }
}

/// The writes of the calm times.
struct Calm {
    spans: Vec<Span>,
}

/// One calm time of one replica.
struct Span {
    start: Nanos,
    end: Nanos,
    /// Its writes by when they were acknowledged, each replaced by the highest up to there, with that instant.
    writes: Vec<(Nanos, Acknowledged)>,
}

impl Calm {
    fn sort(writes: &mut [Acknowledged], history: &History) -> Calm {
        writes.sort_unstable_by_key(|write| write.ret);
        let mut spans = Vec::new();
        for (replica, times) in history.calm.iter().enumerate() {
            for time in times {
                let mut highest: Option<Acknowledged> = None;
                let in_span = |write: &&Acknowledged| {
                    write.replica == replica && time.contains(&write.call) && time.contains(&write.ret)
                };
                let writes = writes.iter().filter(in_span).map(|write| {
                    let newest = highest
                        .filter(|highest| highest.version > write.version)
                        .unwrap_or(*write);
                    highest = Some(newest);
                    (write.ret, newest)
                });
                spans.push(Span {
                    writes: writes.collect(),
                    start: time.start,
                    end: time.end,
                });
            }
        }
        Calm { spans }
    }

    /// The newest of the writes that a read called then has to show, or something newer.
    fn newest(&self, call: Nanos, bound: Nanos) -> Option<Acknowledged> {
        let around = self.spans.iter().filter(|span| (span.start..span.end).contains(&call));
        around
            .filter_map(|span| {
                let count = span.writes.partition_point(|(ret, _)| ret.saturating_add(bound) < call);
                count.checked_sub(1).map(|last| span.writes[last].1)
            })
            .max_by_key(|write| write.version)
    }
}
