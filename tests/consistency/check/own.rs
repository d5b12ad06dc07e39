//! What is promised to one session, and by one replica: that nobody is shown less than they know.
//!
//! Owns the sweeps over a session's calls, and over what a replica acknowledged. What the store decided for a call saw that too, also where it was
//! pending.

use std::collections::HashMap;

use super::{Known, Rule, Verdict, is_of_store};
use crate::history::{Act, Condition, Consistency, Nanos, Op, Outcome, Replica, Version};

/// A read that carries a version shows at least that, and at least what its session wrote or was shown before.
pub(super) fn judge_sessions(known: &Known<'_>, ops: &[&Op], verdict: &mut Verdict) {
    let mut floors: HashMap<u32, Version> = HashMap::new();
    for op in ops {
        let floor = floors.entry(op.session).or_default();
        match &op.act {
            Act::Write {
                outcome: Outcome::Ok(version),
                ..
            } => *floor = (*floor).max(*version),
            Act::Write { .. } => {}
            Act::Read {
                at_least: None, found, ..
            } => *floor = (*floor).max(found.map_or(0, |(version, _)| version)),
            Act::Read {
                consistency,
                at_least: Some(at_least),
                found,
                ..
            } => {
                verdict.judged.sessions += 1;
                let asked = (*floor).max(*at_least);
                let shown = match found {
                    Some((version, _)) => Some(*version),
                    None => known.absence(asked, op.ret, is_of_store(*consistency)),
                };
                if shown.is_none_or(|shown| shown < asked) {
                    let what = format!(
                        "session {} asked at {} for version {asked} or a newer one, and was answered {found:?}",
                        op.session, op.call
                    );
                    let rule = known.blame(Rule::SessionWentBack, asked, found.is_some());
                    verdict.complain(rule, known.key, op.call, what);
                }
                // An absence has told the session no version that it could carry on.
                *floor = asked.max(found.map_or(0, |(version, _)| version));
            }
        }
    }
}

/// A replica shows what it acknowledged: while it lives from its memory too, and ever after from the store.
pub(super) fn judge_replicas(known: &Known<'_>, ops: &[&Op], verdict: &mut Verdict) {
    let mut lives: HashMap<Replica, Acknowledged> = HashMap::new();
    for op in ops {
        let Act::Write {
            outcome: Outcome::Ok(version),
            ..
        } = op.act
        else {
            continue;
        };
        let number = op.replica.number;
        let every = Replica { number, life: None };
        lives.entry(every).or_default().0.push((op.ret, version));
        if op.replica.life.is_some() {
            lives.entry(op.replica).or_default().0.push((op.ret, version));
        }
    }
    lives.values_mut().for_each(Acknowledged::sort);
    for op in ops {
        let Some((consistency, found, source)) = shown(op) else {
            continue;
        };
        let replica = match consistency {
            _ if is_of_store(consistency) => Replica {
                life: None,
                ..op.replica
            },
            Consistency::Cached if op.replica.life.is_some() => op.replica,
            Consistency::Cached | Consistency::Shared | Consistency::Store => continue,
        };
        let Some(floor) = lives.get(&replica).and_then(|writes| writes.before(op.call)) else {
            continue;
        };
        verdict.judged.own += 1;
        let shown = match found {
            Some(version) => Some(version),
            None => known.absence(
                floor,
                op.ret,
                is_of_store(consistency) && matches!(op.act, Act::Read { .. }),
            ),
        };
        let excused = matches!(op.act, Act::Write { .. }) && known.has_untold_delete(op.ret);
        if shown.is_none_or(|shown| shown < floor) && !(shown.is_none() && excused) {
            let what = format!(
                "a {consistency:?} read of replica {} at {} shows {found:?} from {source}, and it acknowledged version {floor} before",
                op.replica.number, op.call
            );
            let rule = known.blame(Rule::OwnWriteMissed, floor, found.is_some());
            verdict.complain(rule, known.key, op.call, what);
        }
    }
}

/// What a call shows of its key, and of which copies, and from where. A write that the store decided saw what stood there.
fn shown(op: &Op) -> Option<(Consistency, Option<Version>, &'static str)> {
    let decided = (Consistency::Store, "what was decided");
    match op.act {
        Act::Read {
            consistency,
            found,
            stale: false,
            source,
            ..
        } => Some((consistency, found.map(|(version, _)| version), source)),
        Act::Write {
            outcome: Outcome::Refused(standing),
            ..
        } => Some((decided.0, standing, decided.1)),
        // The same request may have been decided long before.
        Act::Write {
            condition: Some(condition),
            request: None,
            outcome: Outcome::Ok(_),
            ..
        } => match condition {
            Condition::Absent => Some((decided.0, None, decided.1)),
            Condition::Version(version) => Some((decided.0, Some(version), decided.1)),
            Condition::Present => None,
        },
        Act::Read { .. } | Act::Write { .. } => None,
    }
}

/// What was acknowledged, by when: the highest version up to there.
#[derive(Default)]
struct Acknowledged(Vec<(Nanos, Version)>);

impl Acknowledged {
    fn sort(&mut self) {
        self.0.sort_unstable();
        let mut highest = 0;
        for (_, version) in &mut self.0 {
            highest = highest.max(*version);
            *version = highest;
        }
    }

    fn before(&self, call: Nanos) -> Option<Version> {
        let count = self.0.partition_point(|(ret, _)| *ret < call);
        count.checked_sub(1).map(|last| self.0[last].1)
    }
}
