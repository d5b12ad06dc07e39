//! A run: the clients are busy, things break and are mended as planned, and in the end all is healed, drained and read once more.
//!
//! Owns the order of things, and what is written down of it. Judges nothing but what a gateway must never do: end by itself.

use std::{ops::Range, sync::Arc, time::Duration};

use rand::random;
use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    harness::SOON,
    history::{Consistency, History, Nanos, Op, Settled},
    keys,
    load::{self, Load, Record},
    plan::{Scene, plan},
    stage::{REPLICAS, Stage},
};

/// How long after a fault a replica's writes may still be on their way to the others.
pub const AFTERMATH: Duration = Duration::from_secs(8);

/// How long the replicas may take to agree once everything is healed.
const SETTLING: Duration = Duration::from_secs(10);

/// A fault that came, and when.
#[derive(Debug, Clone)]
pub struct Happened {
    pub scene: Scene,
    pub time: Range<Nanos>,
}

/// All that is known of a run.
pub struct Ended {
    pub length: Duration,
    pub history: History,
    pub faults: Vec<Happened>,
    pub failed_reads: u64,
    /// What is wrong whatever the history says.
    pub complaints: Vec<String>,
    pub logs: Vec<String>,
}

/// Runs for so long; with the faults of one lane alone, if one is given.
pub async fn run(seed: u64, length: Duration, lane: Option<usize>) -> Ended {
    let mut stage = Stage::start(seed).await;
    let began = Instant::now();
    let load = Load::start(&stage.front, seed, random());
    let scenes = plan(seed, length, lane);
    let mut complaints = Vec::new();
    let faults = direct(&mut stage, &scenes, began, &mut complaints).await;
    sleep_until(began + length).await;
    let mut records = load.finish().await;
    stage.drained().await;
    let applied = stage.store.applied().await;
    let rows = stage.store.rows().await;
    let dead_letters = stage.store.dead_letters().await;
    if dead_letters > 0 {
        complaints.push(format!("{dead_letters} writes were set aside as dead letters"));
    }
    let mut history = History {
        classes: keys::classes(),
        applied,
        rows,
        ..History::default()
    };
    settle(&stage, &mut history).await;
    fallen(&mut stage, &mut complaints);
    for what in records.iter_mut().flat_map(|record| record.complaints.drain(..)) {
        if !complaints.contains(&what) {
            complaints.push(what);
        }
    }
    history.calm = calm(&faults, history.ops.iter().map(|op| op.ret).max().unwrap_or(0));
    let failed_reads = records.iter().map(|record| record.failed_reads).sum();
    history
        .ops
        .extend(records.into_iter().flat_map(|Record { ops, .. }| ops));
    Ended {
        length,
        history,
        faults,
        failed_reads,
        complaints,
        logs: stage.logs(),
    }
}

/// Something that is due.
#[derive(Debug, Clone, Copy)]
enum Cue {
    Inject(usize),
    Heal(usize),
}

/// Does what is planned, each thing as soon as it is due and what came before it is done.
async fn direct(stage: &mut Stage, scenes: &[Scene], began: Instant, complaints: &mut Vec<String>) -> Vec<Happened> {
    let mut cues: Vec<(Duration, Cue)> = Vec::new();
    for (number, scene) in scenes.iter().enumerate() {
        cues.push((scene.time.start, Cue::Inject(number)));
        cues.push((scene.time.end, Cue::Heal(number)));
    }
    cues.sort_by_key(|(due, _)| *due);
    let mut happened: Vec<Option<Happened>> = vec![None; scenes.len()];
    for (due, cue) in cues {
        sleep_until(began + due).await;
        let front = Arc::clone(&stage.front);
        match cue {
            Cue::Inject(number) => {
                let scene = scenes[number].clone();
                let start = front.nanos(Instant::now());
                // Before it is done: none of it may be taken for calm.
                happened[number] = Some(Happened {
                    time: start..start,
                    scene: scene.clone(),
                });
                fallen(stage, complaints);
                stage.inject(&scene.fault).await;
            }
            Cue::Heal(number) => {
                stage.heal(&scenes[number].fault).await;
                if let Some(happened) = &mut happened[number] {
                    happened.time.end = front.nanos(Instant::now());
                }
            }
        }
    }
    happened.into_iter().flatten().collect()
}

fn fallen(stage: &mut Stage, complaints: &mut Vec<String>) {
    for replica in stage.fallen() {
        let what = format!("gateway {replica} has ended by itself, or panicked");
        if !complaints.contains(&what) {
            complaints.push(what);
        }
    }
}

/// The times at which nothing was between each replica and Redis.
fn calm(faults: &[Happened], end: Nanos) -> Vec<Vec<Range<Nanos>>> {
    let aftermath = AFTERMATH.as_nanos() as Nanos;
    let of_replica = |replica| {
        let mut times = Vec::new();
        let mut start = 0;
        let mut between: Vec<&Happened> = faults
            .iter()
            .filter(|fault| fault.scene.fault.is_between(replica))
            .collect();
        between.sort_by_key(|fault| fault.time.start);
        for fault in between {
            if fault.time.start > start {
                times.push(start..fault.time.start);
            }
            start = start.max(fault.time.end + aftermath);
        }
        if end > start {
            times.push(start..end);
        }
        times
    };
    (0..REPLICAS).map(of_replica).collect()
}

/// Reads every key from every replica in every way until it shows what stands in the store, or it is time that it did.
async fn settle(stage: &Stage, history: &mut History) {
    let deadline = Instant::now() + SETTLING;
    let mut left: Vec<(usize, usize, Consistency)> = Vec::new();
    for key in 0..history.classes.len() {
        for replica in 0..REPLICAS {
            for consistency in [Consistency::Cached, Consistency::Shared, Consistency::Store] {
                left.push((key, replica, consistency));
            }
        }
    }
    loop {
        let late = Instant::now() >= deadline;
        let mut behind = Vec::new();
        for (key, replica, consistency) in left {
            let session = u32::MAX - replica as u32;
            let what = async || load::read(&stage.front, session, replica, key, consistency, None).await;
            let op = answered(what).await;
            let row = history.rows.get(&key);
            let stored = row.and_then(|row| Some((row.version, row.value?)));
            let found = load::found(&op);
            if found == stored || late {
                history.settled.push(Settled {
                    key,
                    replica,
                    consistency,
                    found,
                });
            } else {
                behind.push((key, replica, consistency));
            }
            history.ops.push(op);
        }
        left = behind;
        if left.is_empty() {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Tries again for as long as it fails.
async fn answered(read: impl AsyncFn() -> Result<Op, tonic::Status>) -> Op {
    crate::harness::eventually("a key can be read when all is healed", SOON, async || {
        read().await.map_err(|status| format!("{status:?}"))
    })
    .await
}
