//! What is said of a run: one line, and where something is wrong, what surrounds it.
//!
//! Owns the bounds that are judged by, what makes a run void, and the files of the report.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    check::{Bounds, Complaint, Verdict, judge},
    history::{Act, Change, Nanos, Op, Outcome},
    keys,
    run::Ended,
};

/// How stale a read may be: whatever breaks, what the documents state and the time of a call; and in calm times. A write is decided
/// within its deadline, and what a pause or a lost connection adds to that.
const BOUNDS: Bounds = Bounds {
    ever: 8_000 * MILLI,
    calm: 1_500 * MILLI,
    open: 20_000 * MILLI,
};

const MILLI: Nanos = 1_000_000;

/// The fewest calls in a second that make a run worth its time.
const CALLS_MIN: u64 = 100;

/// How many kinds of faults there are, and from which length of a run on each has to have come.
const KINDS: usize = 21;
const LENGTH_FOR_ALL: Duration = Duration::from_secs(120);

/// What surrounds a violation: so long before it, and after.
const BEFORE: Nanos = 1_000 * MILLI;
const AFTER: Nanos = 100 * MILLI;

/// How many calls around a violation are printed. The report has more.
const PRINTED_MAX: usize = 25;
const KEPT_MAX: usize = 100_000;

/// See the module.
pub struct Report<'a> {
    ended: &'a Ended,
    verdict: Verdict,
    seed: u64,
    void: Vec<String>,
}

impl<'a> Report<'a> {
    /// Judges a run.
    pub fn of(ended: &'a Ended, seed: u64) -> Report<'a> {
        let verdict = judge(&ended.history, BOUNDS);
        let void = void(ended, &verdict);
        Report {
            ended,
            verdict,
            seed,
            void,
        }
    }

    /// Whether nothing is wrong, and enough happened to say so.
    pub fn is_good(&self) -> bool {
        self.violations() == 0 && self.void.is_empty()
    }

    fn violations(&self) -> u64 {
        self.verdict.violations + self.ended.complaints.len() as u64
    }

    /// How it went.
    pub fn line(&self) -> String {
        let kinds = kinds(self.ended);
        let kinds: Vec<String> = kinds.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let millis = |permille| self.verdict.staleness_at(permille) / MILLI;
        format!(
            "consistency: {} operations, {} faults ({}), staleness p50/p99/max {}/{}/{} ms, {} violations, seed {}",
            self.ended.history.ops.len(),
            self.ended.faults.len(),
            kinds.join(", "),
            millis(500),
            millis(990),
            millis(1000),
            self.violations(),
            self.seed,
        )
    }

    /// What is wrong, and where more of it is kept.
    pub fn explain(&self) -> String {
        let mut text = String::new();
        for what in self.void.iter().chain(&self.ended.complaints) {
            let _ = writeln!(text, "consistency: {what}");
        }
        let _ = writeln!(text, "consistency: judged: {:?}", self.verdict.judged);
        for complaint in self.verdict.complaints.iter().take(5) {
            let _ = writeln!(text, "consistency: {}", self.name(complaint));
            let around: Vec<String> = self.around(complaint, BEFORE, AFTER);
            for line in &around[around.len().saturating_sub(PRINTED_MAX)..] {
                let _ = writeln!(text, "    {line}");
            }
        }
        match self.keep() {
            Ok(directory) => {
                let _ = write!(text, "consistency: the report is in {}", directory.display());
            }
            Err(error) => {
                let _ = write!(text, "consistency: the report cannot be kept: {error}");
            }
        }
        text
    }

    fn name(&self, complaint: &Complaint) -> String {
        let class = self.ended.history.classes[complaint.key];
        format!("{} {}: {complaint}", keys::namespace(class), keys::name(complaint.key))
    }

    /// The calls of its key around a violation, and the faults.
    fn around(&self, complaint: &Complaint, before: Nanos, after: Nanos) -> Vec<String> {
        let time = complaint.at.saturating_sub(before)..complaint.at.saturating_add(after);
        let ops = self.ended.history.ops.iter();
        let near = ops.filter(|op| op.key == complaint.key && op.call < time.end && op.ret >= time.start);
        let mut lines: Vec<(Nanos, String)> = near.map(|op| (op.call, line_of(op))).collect();
        for happened in &self.ended.faults {
            if happened.time.start < time.end && happened.time.end >= time.start {
                lines.push((happened.time.start, format!("{:?}", happened.scene.fault)));
            }
        }
        lines.sort();
        let line = |(at, line): (Nanos, String)| format!("{:>12.3} ms {line}", at as f64 / MILLI as f64);
        lines.into_iter().map(line).collect()
    }

    /// Writes everything that may explain the violations. The directory.
    fn keep(&self) -> std::io::Result<PathBuf> {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("consistency-{}", self.seed));
        fs::create_dir_all(&directory)?;
        for (number, log) in self.ended.logs.iter().enumerate() {
            fs::write(directory.join(format!("gateway-{number}.log")), log)?;
        }
        let faults: Vec<String> = self.ended.faults.iter().map(|fault| format!("{fault:?}")).collect();
        fs::write(directory.join("faults.txt"), faults.join("\n"))?;
        let complaints: Vec<String> = self
            .verdict
            .complaints
            .iter()
            .map(|complaint| self.name(complaint))
            .collect();
        let complaints: Vec<&String> = self
            .void
            .iter()
            .chain(&self.ended.complaints)
            .chain(&complaints)
            .collect();
        let complaints: Vec<&str> = complaints.into_iter().map(String::as_str).collect();
        fs::write(directory.join("complaints.txt"), complaints.join("\n"))?;
        let mut written = Vec::new();
        for complaint in &self.verdict.complaints {
            if !written.contains(&complaint.key) {
                written.push(complaint.key);
                let mut lines = self.around(complaint, Nanos::MAX, Nanos::MAX);
                lines.truncate(KEPT_MAX);
                let applied = self.ended.history.applied.get(&complaint.key);
                lines.extend(
                    applied
                        .into_iter()
                        .flatten()
                        .map(|record| format!("the row became {record:?}")),
                );
                fs::write(
                    directory.join(format!("{}.txt", keys::name(complaint.key))),
                    lines.join("\n"),
                )?;
            }
        }
        Ok(directory)
    }
}

/// How often each kind of fault came.
fn kinds(ended: &Ended) -> BTreeMap<&'static str, usize> {
    let mut kinds = BTreeMap::new();
    for happened in &ended.faults {
        *kinds.entry(happened.scene.fault.kind()).or_default() += 1;
    }
    kinds
}

/// Why a run proves nothing.
fn void(ended: &Ended, verdict: &Verdict) -> Vec<String> {
    let mut void = Vec::new();
    let calls = ended.history.ops.len() as u64;
    let least = CALLS_MIN * ended.length.as_secs();
    if calls < least {
        void.push(format!(
            "void: {calls} calls were answered or had an outcome, and {} reads failed: {least} are the least",
            ended.failed_reads
        ));
    }
    if ended.faults.is_empty() {
        void.push("void: nothing broke".to_owned());
    }
    let kinds = kinds(ended).len();
    if ended.length >= LENGTH_FOR_ALL && kinds < KINDS {
        void.push(format!("void: {kinds} kinds of faults came, of {KINDS}"));
    }
    let judged = verdict.judged;
    for (what, count) in [
        ("the order of calls", judged.ordered),
        ("what sessions carry", judged.sessions),
        ("what replicas acknowledged", judged.own),
        ("staleness", judged.staleness),
        ("staleness in calm times", judged.calm),
        ("repeated answers", judged.requests),
        ("conditions that held", judged.conditions),
        ("conditions that did not", judged.refusals),
        ("what was counted", judged.counted),
    ] {
        if count == 0 {
            void.push(format!("void: nothing was judged by {what}"));
        }
    }
    void
}

fn line_of(op: &Op) -> String {
    let place = format!(
        "to {:.3} session {} replica {} life {:?}",
        op.ret as f64 / MILLI as f64,
        op.session,
        op.replica.number,
        op.replica.life
    );
    match &op.act {
        Act::Write {
            through,
            change,
            condition,
            request,
            outcome,
        } => {
            let what = match change {
                Change::Put(value) => format!("put of {value:?}"),
                Change::Delete => "delete".to_owned(),
                Change::Touch => "touch".to_owned(),
                Change::Add { delta, made } => format!("add of {delta}, which made {made:?}"),
            };
            let how = if *through { "through" } else { "behind" };
            let condition = condition
                .map(|condition| format!(" if {condition:?}"))
                .unwrap_or_default();
            let request = request
                .map(|request| format!(" as request {request}"))
                .unwrap_or_default();
            let outcome = match outcome {
                Outcome::Ok(version) => format!("version {version}"),
                Outcome::Refused(_) | Outcome::NotApplied | Outcome::Unknown => format!("{outcome:?}"),
            };
            format!("{place}: {what} {how}{condition}{request}: {outcome}")
        }
        Act::Read {
            consistency,
            at_least,
            found,
            stale,
            source,
        } => {
            let asked = at_least
                .map(|version| format!(" of at least {version}"))
                .unwrap_or_default();
            let stale = if *stale { " which may be outdated" } else { "" };
            format!("{place}: {consistency:?} read{asked}: {found:?} from {source}{stale}")
        }
    }
}
