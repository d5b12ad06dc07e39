//! The checker: whether what the clients saw can have come from the gateway that is promised.
//!
//! Owns the rules, one file for each kind. Pure, and no search: every answer carries the version that it shows, so each rule is a sort and a
//! sweep, O(n log n) in the calls of a key. Invariants: what it complains about is a broken promise (a delete of unknown outcome may be
//! the reason of any absence that it could be); of a write whose outcome is unknown nothing is assumed but what somebody saw.
//!
//! The rules:
//! - whatever is read, or stands in a row, was written to that key, not refused, and not only later; one write is one version;
//! - a row of the store only moves forward;
//! - a request has one answer, however often it is sent, and one effect;
//! - of keys written only through: what a conditional write depends on is what stands right below its version; what it was refused for stood;
//! - a counter becomes in the order of versions what was added to it, each answered add once, and any of which nobody was told at most once;
//! - keys written only through, with reads of the store, are linearizable in the order of versions; and what any read showed is committed;
//! - a read that carries a version shows that or a newer one, and no session goes back that asks so;
//! - a replica shows what was acknowledged by it before;
//! - no read of a key written only through is staler than the bound;
//! - in the end every replica and the store hold the same, and nothing that was acknowledged or shown is lost;
//! - what was deleted does not come back: each of these, where the newer write that is missed is a delete.

mod conditions;
mod counters;
mod known;
mod order;
mod own;
mod requests;
mod staleness;

use std::fmt::{self, Write as _};

pub use self::counters::ONCE;
use self::known::Known;
use crate::history::{Act, Class, Consistency, History, Nanos, Op, Outcome, Record};

/// The most complaints that are kept, but for the first of each rule and key; the rest is counted.
const COMPLAINTS_MAX: usize = 20;

/// How stale a read may be, and how long a write may take.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Whatever breaks.
    pub ever: Nanos,
    /// While nothing is between the writer and Redis.
    pub calm: Nanos,
    /// How long after its call a write of unknown outcome may be decided.
    pub open: Nanos,
}

/// What was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    NeverWritten,
    WasRefused,
    TwoVersions,
    FromTheFuture,
    StoreWentBack,
    TwoAnswers,
    ConditionBroken,
    Miscounted,
    OutOfOrder,
    SessionWentBack,
    OwnWriteMissed,
    TooStale,
    Resurrected,
    Lost,
    NotConverged,
}

/// A broken promise.
#[derive(Debug, Clone)]
pub struct Complaint {
    pub rule: Rule,
    pub key: usize,
    /// When it was seen: the call of the read that shows it; the end, for what stands then.
    pub at: Nanos,
    pub what: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.what)
    }
}

/// How many answers each rule had to judge: a rule that judged nothing proves nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Judged {
    pub ordered: u64,
    pub sessions: u64,
    pub own: u64,
    pub staleness: u64,
    pub calm: u64,
    pub requests: u64,
    pub conditions: u64,
    pub refusals: u64,
    pub counted: u64,
}

/// What the checker found.
#[derive(Debug, Default)]
pub struct Verdict {
    /// How many promises were broken.
    pub violations: u64,
    /// The first of them.
    pub complaints: Vec<Complaint>,
    pub judged: Judged,
    /// How stale each cached read of a key written only through was, in order.
    pub staleness: Vec<Nanos>,
}

impl Verdict {
    fn complain(&mut self, rule: Rule, key: usize, at: Nanos, what: String) {
        self.violations += 1;
        let is_new = |other: &Complaint| other.rule != rule || other.key != key;
        if self.complaints.len() < COMPLAINTS_MAX || self.complaints.iter().all(is_new) {
            self.complaints.push(Complaint { rule, key, at, what });
        }
    }

    /// The staleness that so many thousandths of the reads do not exceed.
    pub fn staleness_at(&self, permille: usize) -> Nanos {
        let last = self.staleness.len().saturating_sub(1);
        self.staleness.get(last * permille / 1000).copied().unwrap_or(0)
    }
}

/// Judges a run.
pub fn judge(history: &History, bounds: Bounds) -> Verdict {
    let mut verdict = Verdict::default();
    let mut ops: Vec<Vec<&Op>> = vec![Vec::new(); history.classes.len()];
    for op in &history.ops {
        ops[op.key].push(op);
    }
    for (key, (class, mut calls)) in history.classes.iter().zip(ops).enumerate() {
        calls.sort_by_key(|op| op.call);
        let merged = requests::merge(key, &calls, &mut verdict);
        let ops: Vec<&Op> = merged.iter().collect();
        let known = Known::learn(history, key, *class, &ops, &mut verdict);
        if *class == Class::Counter {
            counters::judge(key, &ops, history, &mut verdict);
        }
        if class.is_through() {
            order::judge(&known, &ops, &mut verdict);
            staleness::judge(&known, &ops, history, bounds, &mut verdict);
            conditions::judge(&known, &ops, history, bounds, &mut verdict);
        }
        own::judge_sessions(&known, &calls, &mut verdict);
        own::judge_replicas(&known, &calls, &mut verdict);
        judge_end(&known, &ops, history, &mut verdict);
    }
    verdict.staleness.sort_unstable();
    verdict
}

/// What stands in the end is what was acknowledged and shown, or newer; and everybody agrees.
fn judge_end(known: &Known<'_>, ops: &[&Op], history: &History, verdict: &mut Verdict) {
    let key = known.key;
    let row = history.rows.get(&key).copied();
    let stands = row.map_or(0, |row| row.version);
    let at = ops.iter().map(|op| op.ret).max().unwrap_or(0);
    let vouched = |op: &&&Op| match &op.act {
        Act::Write {
            outcome: Outcome::Ok(version),
            ..
        }
        | Act::Write {
            outcome: Outcome::Refused(Some(version)),
            ..
        }
        | Act::Read {
            found: Some((version, _)),
            ..
        } => Some(*version),
        Act::Write { .. } | Act::Read { .. } => None,
    };
    let highest = ops
        .iter()
        .filter_map(|op| Some((vouched(&op)?, *op)))
        .max_by_key(|(version, _)| *version);
    if let Some((version, op)) = highest
        && version > stands
    {
        let rule = known.blame(Rule::Lost, version, row.is_some_and(|row| row.value.is_some()));
        let how = match op.act {
            Act::Write {
                outcome: Outcome::Ok(_),
                ..
            } => "acknowledged",
            Act::Write { .. } | Act::Read { .. } => "shown to a caller",
        };
        let what = format!("version {version} was {how} and is lost: {stands} stands in the store");
        verdict.complain(rule, key, at, what);
    }
    let stored = row.and_then(|Record { version, value }| Some((version, value?)));
    for settled in history.settled.iter().filter(|settled| settled.key == key) {
        if settled.found != stored {
            let rule = known.blame(Rule::NotConverged, stands, settled.found.is_some());
            let mut what = String::new();
            let _ = write!(
                what,
                "replica {} answers {:?} for {:?}, and {row:?} stands in the store",
                settled.replica, settled.found, settled.consistency
            );
            verdict.complain(rule, key, at, what);
        }
    }
}

/// Whether a read may be judged as one of the store.
fn is_of_store(consistency: Consistency) -> bool {
    consistency == Consistency::Store
}
