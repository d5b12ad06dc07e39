//! What the clients added to counters, what they were answered, and what the store shows: and the judgement of that.
//!
//! Owns the rules of counting. Knows no server and no time. An add that has a name is sent again with that name until it is answered, and counts
//! once; one without is sent once, and where its caller was not told it counts once or not at all. Those without a name add [`ONCE`]
//! each, so that what a sum holds beyond the answers tells of them and of nothing else. Invariants that are judged: in the order of versions
//! each answer is the one before and what was added, or some of those of which nobody was told; a name has one answer; the store ends
//! with the sum of all.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::ledger::Change;

/// The namespace of the counters, which are nothing else's.
pub const NAMESPACE: &str = "counted";

/// What an add without a name adds.
pub const ONCE: i64 = 1_000_000;

/// What an add with a name adds at most.
pub const NAMED_MAX: i64 = 9;

/// How many clients count: each has at most one add that is not answered.
pub const CLIENTS: usize = 6;

/// What an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    pub value: i64,
    pub version: i64,
}

#[derive(Debug)]
struct Add {
    counter: u32,
    delta: i64,
    named: bool,
    /// How many times it was sent.
    sent: u32,
    /// Whether its caller could not tell what became of a try.
    doubtful: bool,
    answer: Option<Answer>,
}

/// An add to be sent.
#[derive(Debug, Clone)]
pub struct Sent {
    pub number: usize,
    pub counter: String,
    pub delta: i64,
    /// Its name; empty: none.
    pub request_id: String,
}

/// See the module.
#[derive(Debug)]
pub struct Counters {
    /// Tells this run's names from any other's.
    run: u64,
    adds: Vec<Add>,
    /// What each client has to send again.
    open: [Option<usize>; CLIENTS],
    /// What stands of each counter, as the audit says.
    stored: HashMap<u32, Answer>,
    /// How many adds were answered.
    pub counted: u64,
    /// How many of them were sent again since nobody knew what had become of them.
    pub doubted: u64,
    /// How many of these had been counted.
    pub found: u64,
    pub complaints: Vec<String>,
}

impl Counters {
    pub fn new(run: u64) -> Counters {
        Counters {
            run,
            adds: Vec::new(),
            open: [None; CLIENTS],
            stored: HashMap::new(),
            counted: 0,
            doubted: 0,
            found: 0,
            complaints: Vec::new(),
        }
    }

    /// An add that is about to be sent for the first time.
    pub fn send(&mut self, client: usize, counter: u32, delta: i64, named: bool) -> Sent {
        self.adds.push(Add {
            counter,
            delta,
            named,
            sent: 0,
            doubtful: false,
            answer: None,
        });
        let number = self.adds.len() - 1;
        if named {
            self.open[client] = Some(number);
        }
        self.send_again(number)
    }

    /// The add that this client has to send again, if there is one.
    pub fn unanswered(&mut self, client: usize) -> Option<Sent> {
        let number = self.open[client]?;
        Some(self.send_again(number))
    }

    /// The same add again.
    pub fn send_again(&mut self, number: usize) -> Sent {
        let add = &mut self.adds[number];
        add.sent += 1;
        Sent {
            number,
            counter: name(add.counter),
            delta: add.delta,
            request_id: if add.named {
                format!("{:016x}.{number}", self.run)
            } else {
                String::new()
            },
        }
    }

    /// An add was answered with OK.
    pub fn answer(&mut self, number: usize, answer: Answer, deduplicated: bool) {
        self.open
            .iter_mut()
            .filter(|open| **open == Some(number))
            .for_each(|open| *open = None);
        let add = &mut self.adds[number];
        if deduplicated && add.sent == 1 {
            self.complaints.push(format!(
                "{add:?} was sent once, and answered as one that was sent before"
            ));
        }
        if let Some(first) = add.answer {
            if first != answer {
                self.complaints
                    .push(format!("{add:?} was answered once more, with {answer:?}"));
            }
            return;
        }
        add.answer = Some(answer);
        self.counted += 1;
        self.doubted += u64::from(add.doubtful);
        self.found += u64::from(add.doubtful && deduplicated);
    }

    /// Nobody told its caller what became of a try.
    pub fn doubt(&mut self, number: usize) {
        self.adds[number].doubtful = true;
    }

    /// The rows of the audit since the last time, in their order.
    pub fn audit(&mut self, changes: &[Change]) {
        let answers: HashMap<(u32, i64), i64> = self
            .adds
            .iter()
            .filter_map(|add| Some(((add.counter, add.answer?.version), add.answer?.value)))
            .collect();
        for change in changes {
            let shown = parse(&change.key)
                .zip(change.version)
                .zip(value(change.value.as_deref()));
            let Some(((counter, version), value)) = shown else {
                self.complaints
                    .push(format!("a row of a counter that nobody counted so: {change:?}"));
                continue;
            };
            let stored = self.stored.insert(counter, Answer { value, version });
            let stood = stored.map_or(0, |stored| stored.version);
            if version <= stood || change.before.unwrap_or(0) != stood {
                self.complaints.push(format!(
                    "{}: its version went from {stood} to {version}: audit {}",
                    change.key, change.seq
                ));
            }
            if let Some(answered) = answers.get(&(counter, version)).filter(|answered| **answered != value) {
                self.complaints.push(format!(
                    "{}: version {version} is {value} in the store, and was answered as {answered}",
                    change.key
                ));
            }
        }
    }

    /// Judges the sums when every add that has a name was answered, and nothing is under way.
    pub fn settle(&mut self) {
        let mut counters: BTreeMap<u32, Vec<&Add>> = BTreeMap::new();
        for add in &self.adds {
            counters.entry(add.counter).or_default().push(add);
        }
        for (counter, adds) in counters {
            if let Err(what) = sum(&adds, self.stored.get(&counter).copied()) {
                self.complaints.push(format!("{}: {what}", name(counter)));
            }
        }
    }
}

/// Whether the answers, and what stands in the end, can be the sums of the adds.
fn sum(adds: &[&Add], stored: Option<Answer>) -> Result<(), String> {
    let mut answered: Vec<(Answer, i64)> = adds.iter().filter_map(|add| Some((add.answer?, add.delta))).collect();
    answered.sort_by_key(|(answer, _)| answer.version);
    let versions: HashSet<i64> = answered.iter().map(|(answer, _)| answer.version).collect();
    if versions.len() < answered.len() {
        return Err(format!("two adds were answered with one version: {answered:?}"));
    }
    let untold = adds.iter().filter(|add| add.answer.is_none() && add.doubtful);
    let untold: i64 = untold.map(|add| add.delta).sum();
    let mut before = 0;
    let mut unexplained = 0;
    let stored = stored.map(|stored| (stored, 0));
    for (answer, delta) in answered.into_iter().chain(stored) {
        let Answer { value, version } = answer;
        let beyond = value - delta - before;
        if beyond < 0 || beyond % ONCE != 0 {
            return Err(format!(
                "it was {before}, {delta} was added, and version {version} made it {value}"
            ));
        }
        unexplained += beyond;
        before = value;
    }
    if unexplained > untold {
        return Err(format!(
            "it has {unexplained} that nobody was told of, and {untold} can be that"
        ));
    }
    let counted: i64 = adds
        .iter()
        .filter(|add| add.answer.is_some())
        .map(|add| add.delta)
        .sum();
    if stored.map_or(0, |(stored, _)| stored.value) != counted + unexplained {
        return Err(format!("{counted} was answered, and {stored:?} stands"));
    }
    Ok(())
}

fn name(counter: u32) -> String {
    format!("c{counter:03}")
}

fn parse(key: &str) -> Option<u32> {
    key.strip_prefix('c')?.parse().ok()
}

/// What a row of a counter says.
fn value(text: Option<&[u8]>) -> Option<i64> {
    std::str::from_utf8(text?).ok()?.parse().ok()
}
