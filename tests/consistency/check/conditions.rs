//! Writes that depend on what stands, of a key that is written only through.
//!
//! Owns the rule that such a write has right below its version what it asked for: what its row became before it, or what the store decided
//! in the same transaction. And the rule that one which was refused says why as it may be. When what it was refused for stood is judged
//! where the order is (`order`). A write that the store decided and of which nobody was told, in the midst of a transaction, is seen by nobody but
//! the next one there: so one that may have been under way excuses what follows it.

use std::collections::BTreeMap;

use super::{Bounds, Known, Rule, Verdict};
use crate::history::{Act, Change, Condition, History, Op, Outcome, Value, Version};

/// What stood: live with a value, as far as that is known, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stood {
    Live(Option<Value>),
    Dead,
}

pub(super) fn judge(known: &Known<'_>, ops: &[&Op], history: &History, bounds: Bounds, verdict: &mut Verdict) {
    let line = line(known, ops, history);
    for op in ops {
        let Act::Write {
            change,
            condition,
            outcome,
            ..
        } = &op.act
        else {
            continue;
        };
        if let Outcome::Refused(standing) = outcome {
            verdict.judged.refusals += 1;
            judge_refusal(known, op, *change, *condition, *standing, verdict);
            continue;
        }
        let wanted = match (change, condition) {
            (_, Some(condition)) => *condition,
            (Change::Touch, None) => Condition::Present,
            (Change::Put(_) | Change::Delete | Change::Add { .. }, None) => continue,
        };
        let Some(version) = known.version(op) else {
            continue;
        };
        verdict.judged.conditions += 1;
        let open = |delete| has_open(known, ops, op, bounds, delete);
        let below = line.range(..version).next_back();
        let holds = match (wanted, below) {
            (Condition::Absent, None | Some((_, Stood::Dead))) => true,
            (Condition::Absent, Some((_, Stood::Live(_)))) => open(true),
            (Condition::Present, Some((_, Stood::Live(_)))) => true,
            (Condition::Present, None | Some((_, Stood::Dead))) => open(false),
            (Condition::Version(wanted), below) => {
                below.is_some_and(|(stood, what)| *stood == wanted && matches!(what, Stood::Live(_)))
            }
        };
        if !holds {
            let what = format!(
                "{change:?} at {} became version {version} on the condition {wanted:?}, and {below:?} is right below it",
                op.call
            );
            verdict.complain(Rule::ConditionBroken, known.key, op.call, what);
        }
        if let (Change::Touch, Some((stood, Stood::Live(Some(kept)))), Some(Stood::Live(Some(has)))) =
            (change, below, line.get(&version))
            && kept != has
            && !open(false)
        {
            let what = format!(
                "a touch at {} became version {version} with {has:?}, and version {stood} right below it has {kept:?}",
                op.call
            );
            verdict.complain(Rule::ConditionBroken, known.key, op.call, what);
        }
    }
}

/// What stood one after the other: what the row became, and what the store decided and answered, though it may have gone on in the same transaction.
fn line(known: &Known<'_>, ops: &[&Op], history: &History) -> BTreeMap<Version, Stood> {
    let mut line = BTreeMap::new();
    for op in ops.iter().filter(|op| op.is_decided()) {
        if let Act::Write { change, .. } = op.act
            && let Some(version) = known.version(op)
        {
            let stood = match change {
                Change::Delete => Stood::Dead,
                Change::Put(_) | Change::Touch | Change::Add { .. } => Stood::Live(change.value()),
            };
            line.insert(version, stood);
        }
    }
    for record in history.applied.get(&known.key).into_iter().flatten() {
        let stood = record.value.map_or(Stood::Dead, |value| Stood::Live(Some(value)));
        line.insert(record.version, stood);
    }
    line
}

/// Whether a write of which nobody was told may have been decided in the same transaction, just before: a delete, or anything else.
fn has_open(known: &Known<'_>, ops: &[&Op], op: &Op, bounds: Bounds, delete: bool) -> bool {
    ops.iter().any(|other| {
        let Act::Write {
            change,
            outcome: Outcome::Unknown,
            ..
        } = other.act
        else {
            return false;
        };
        let concurrent = other.call < op.ret && other.call.saturating_add(bounds.open) > op.call;
        let fits = (change == Change::Delete) == delete;
        concurrent && fits && other.is_decided() && known.version(other).is_none()
    })
}

fn judge_refusal(
    known: &Known<'_>,
    op: &Op,
    change: Change,
    condition: Option<Condition>,
    standing: Option<Version>,
    verdict: &mut Verdict,
) {
    let may_be = match (condition, standing) {
        (Some(Condition::Absent), Some(_)) => true,
        (Some(Condition::Present), None) => true,
        (Some(Condition::Version(wanted)), standing) => standing != Some(wanted),
        (None, None) => change == Change::Touch,
        (Some(Condition::Absent), None) | (Some(Condition::Present), Some(_)) | (None, Some(_)) => false,
    };
    if !may_be || standing.is_some_and(|standing| known.is_tombstone(standing)) {
        let what = format!(
            "{change:?} at {} was refused on the condition {condition:?}, since {standing:?} stood",
            op.call
        );
        verdict.complain(Rule::ConditionBroken, known.key, op.call, what);
    }
}
