//! Requests: calls that are one write.
//!
//! Owns what the calls of one request come to together, and that all their answers are one. A call that was refused, since what stood did
//! not fit to it, is a call of its own: it says what stood, and nothing of the others.

use std::collections::BTreeMap;

use super::{Rule, Verdict};
use crate::history::{Act, Change, Nanos, Op, Outcome, Version};

/// The calls of a key, in their order, those of one request made one: it lasts from the first of them to the first that was answered with OK.
pub(super) fn merge(key: usize, calls: &[&Op], verdict: &mut Verdict) -> Vec<Op> {
    let mut ops: Vec<Op> = Vec::with_capacity(calls.len());
    let mut requests: BTreeMap<u64, Vec<&Op>> = BTreeMap::new();
    for call in calls {
        match call.act {
            Act::Write {
                request: Some(request), ..
            } => requests.entry(request).or_default().push(call),
            Act::Write { .. } | Act::Read { .. } => ops.push((*call).clone()),
        }
    }
    for (request, calls) in requests {
        judge(key, request, &calls, verdict);
        let (refused, others): (Vec<&Op>, Vec<&Op>) = calls
            .into_iter()
            .partition(|call| matches!(outcome(call), Some(Outcome::Refused(_))));
        ops.extend(refused.into_iter().cloned());
        ops.extend(one(&others));
    }
    ops.sort_by_key(|op| op.call);
    ops
}

/// Whether the answers of a request agree.
fn judge(key: usize, request: u64, calls: &[&Op], verdict: &mut Verdict) {
    let mut first: Option<(&Op, Version)> = None;
    for call in answered(calls) {
        let Some(Outcome::Ok(version)) = outcome(call) else {
            continue;
        };
        let Some((answered, known)) = first else {
            first = Some((call, version));
            continue;
        };
        verdict.judged.requests += 1;
        if known != version || change(answered) != change(call) {
            let what = format!(
                "request {request} was answered at {} with version {known} of {:?}, and at {} with version {version} of {:?}",
                answered.ret,
                change(answered),
                call.ret,
                change(call)
            );
            verdict.complain(Rule::TwoAnswers, key, call.call, what);
        }
    }
    for call in calls {
        let Some((answered, version)) = first.filter(|(answered, _)| answered.ret < call.call) else {
            continue;
        };
        if let Some(Outcome::Refused(standing)) = outcome(call) {
            let what = format!(
                "request {request} was answered at {} with version {version}, and refused at {} for {standing:?}",
                answered.ret, call.call
            );
            verdict.complain(Rule::TwoAnswers, key, call.call, what);
        }
    }
}

/// What the calls come to together. One that was not applied has no part in it, unless they all were not.
fn one(calls: &[&Op]) -> Option<Op> {
    let mut effective = calls.to_vec();
    effective.retain(|call| outcome(call) != Some(Outcome::NotApplied));
    let answered = answered(&effective);
    let mut op = (*answered.first().or(effective.last()).or(calls.last())?).clone();
    if answered.is_empty() {
        op.ret = effective.iter().map(|call| call.ret).max().unwrap_or(op.ret);
    }
    op.call = effective.iter().map(|call| call.call).min().unwrap_or(op.call);
    Some(op)
}

/// The calls that were answered with OK, the first to be answered first.
fn answered<'a>(calls: &[&'a Op]) -> Vec<&'a Op> {
    let mut answered: Vec<&Op> = calls.to_vec();
    answered.retain(|call| matches!(outcome(call), Some(Outcome::Ok(_))));
    answered.sort_by_key(|call| -> Nanos { call.ret });
    answered
}

fn outcome(op: &Op) -> Option<Outcome> {
    match op.act {
        Act::Write { outcome, .. } => Some(outcome),
        Act::Read { .. } => None,
    }
}

fn change(op: &Op) -> Option<Change> {
    match op.act {
        Act::Write { change, .. } => Some(change),
        Act::Read { .. } => None,
    }
}
