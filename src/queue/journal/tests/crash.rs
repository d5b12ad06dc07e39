//! Proves that a loss of power at any operation of the disk, losing whatever was not synced in any way, leaves a journal that recovers to
//! a prefix of what was appended, with everything that was acknowledged and not released; also when it strikes again.

use std::collections::HashSet;

use super::{Driver, Expected, small};
use crate::queue::journal::{
    format::GROUP_HEADER_BYTES,
    sim::{Dice, Disk, Faults, Loss, Op, SimFs},
};

/// How many random losses are tried for each state of the disk that has something to lose.
const CHANCES: usize = 12;

/// Counts what was tried.
#[derive(Default)]
struct Tally {
    recoveries: usize,
    /// What was recovered, by its fingerprint: many a loss leaves what another one left.
    images: HashSet<u64>,
    boundaries: usize,
    /// What the workloads did, for a proof about what never happens proves nothing.
    rotations: usize,
    recycled: usize,
    moved: u64,
    empty_groups: usize,
}

impl Tally {
    /// A disk as a crash left it, which is about to be recovered.
    fn add(&mut self, image: &Disk) {
        self.recoveries += 1;
        self.images.insert(image.fingerprint());
    }
}

/// Every kind of loss that is worth trying on a disk.
fn losses(disk: &Disk, dice: &mut Dice) -> Vec<Loss> {
    let bytes = disk.unsynced_bytes();
    let mut losses = vec![Loss::Nothing, Loss::All, Loss::Data, Loss::Names];
    if bytes == 0 {
        return losses;
    }
    for cut in [1, 47, 48, 64, bytes / 2, bytes - 1] {
        losses.push(Loss::Cut(cut));
        losses.push(Loss::Head(cut));
    }
    losses.extend((0..CHANCES).map(|_| Loss::Chance(Dice::new(dice.below(usize::MAX) as u64))));
    losses
}

/// Recovers a disk after a crash and checks it; then, now and then, crashes the recovery, or appends to what was recovered and
/// crashes that.
fn recover(image: Disk, expected: &Expected<'_>, dice: &mut Dice, tally: &mut Tally, context: &dyn Fn() -> String) {
    tally.add(&image);
    let config = small();
    let fs = SimFs::new(image.clone(), Faults::default());
    let (mut driver, found) = match Driver::open(&fs, &config, Dice::new(dice.below(usize::MAX) as u64)) {
        Ok(opened) => opened,
        Err(error) => panic!("{error}; {}", context()),
    };
    expected.check(&found, context);

    match dice.below(12) {
        0 => {
            let mut disk = image;
            for (index, op) in fs.log().iter().enumerate() {
                disk.apply(op);
                let loss = Loss::Chance(Dice::new(dice.below(usize::MAX) as u64));
                let crashed = disk.crashed(&loss);
                tally.add(&crashed);
                let fs = SimFs::new(crashed, Faults::default());
                let context = || format!("{}, then {loss:?} after operation {index} of the recovery", context());
                match Driver::open(&fs, &config, Dice::new(0)) {
                    Ok((_, found)) => expected.check(&found, &context),
                    Err(error) => panic!("{error}; {}", context()),
                }
            }
        }
        1..4 => {
            // What was recovered is held, as the gateway holds it; what is appended now is newer.
            driver.hold(found);
            driver.next_version = 1_000_000;
            for _ in 0..1 + dice.below(6) {
                driver.step(4, 300).expect("no fault");
            }
            let ops = fs.ops();
            let log = fs.log();
            let crash_at = dice.below(ops + 1);
            let mut disk = image;
            for op in &log[..crash_at] {
                disk.apply(op);
            }
            let loss = Loss::Chance(Dice::new(dice.below(usize::MAX) as u64));
            let crashed = disk.crashed(&loss);
            tally.add(&crashed);
            let again = SimFs::new(crashed, Faults::default());
            let context = || format!("{}, then {loss:?} after operation {crash_at} of {ops}", context());
            let mut again_expected = driver.history.after(crash_at);
            // What was not recovered for the sake of a newer one may be found again once that is released, which is harmless.
            again_expected.possible.extend(&expected.possible);
            match Driver::open(&again, &config, Dice::new(0)) {
                Ok((_, found)) => again_expected.check(&found, &context),
                Err(error) => panic!("{error}; {}", context()),
            }
        }
        _ => {}
    }
}

/// Runs a workload, and crashes it after every operation in every way.
fn crash_everywhere(seed: u64, steps: usize, tally: &mut Tally) {
    let fs = SimFs::default();
    let (mut driver, _) = Driver::open(&fs, &small(), Dice::new(seed)).expect("an empty disk");
    for _ in 0..steps {
        driver.step(12, 300).expect("no fault");
    }
    let drained = seed.is_multiple_of(2);
    if drained {
        driver.release_all();
    }
    driver.shared.close();
    assert!(driver.work(false).expect("no fault"), "closed");

    tally.moved += driver.shared.metrics.moved.get();
    for op in fs.log() {
        match op {
            Op::Rename(_, to) if to.starts_with("segment-") => tally.rotations += 1,
            Op::Rename(_, to) if to.starts_with("spare-") => tally.recycled += 1,
            Op::Write(_, _, data) if data.len() == GROUP_HEADER_BYTES => tally.empty_groups += 1,
            _ => {}
        }
    }

    let mut dice = Dice::new(seed ^ 0x5eed);
    let mut disk = Disk::default();
    let log = fs.log();
    for done in 0..=log.len() {
        if done > 0 {
            disk.apply(&log[done - 1]);
        }
        tally.boundaries += 1;
        let expected = driver.history.after(done);
        if drained && done == log.len() {
            let fs = SimFs::new(disk.crashed(&Loss::All), Faults::default());
            let (_, found) = Driver::open(&fs, &small(), Dice::new(0)).expect("in order");
            assert!(
                found.is_empty(),
                "what was released before the journal closed does not come back"
            );
        }
        for loss in losses(&disk, &mut dice) {
            let context = || format!("seed {seed}, {loss:?} after operation {done} of {}", log.len());
            recover(disk.crashed(&loss), &expected, &mut dice, tally, &context);
        }
    }
}

#[test]
fn a_crash_at_any_operation_loses_nothing_that_was_acknowledged() {
    let mut tally = Tally::default();
    let mut seed = 1;
    while tally.images.len() < 50_000 {
        crash_everywhere(seed, 250, &mut tally);
        seed += 1;
    }
    let Tally {
        recoveries,
        images,
        boundaries,
        rotations,
        recycled,
        moved,
        empty_groups,
    } = tally;
    println!(
        "seeds 1 to {}: {} different images, {recoveries} recoveries, {boundaries} boundaries, {rotations} rotations, \
         {recycled} recycled, {moved} moved, {empty_groups} empty groups",
        seed - 1,
        images.len()
    );
    assert!(rotations > 50 && recycled > 50 && moved > 50 && empty_groups > 20);
}

/// The proof above can fail: with each planted fault it does.
#[cfg(feature = "planted-faults")]
#[test]
fn planted_faults_are_caught() {
    use crate::planted::{Fault, choose_here};
    for (fault, complaint) in [
        (Fault::AckBeforeSync, "acknowledged and lost"),
        (Fault::TailNotCut, "is damaged at offset"),
    ] {
        choose_here(Some(fault));
        let run = || crash_everywhere(2, 250, &mut Tally::default());
        let caught = std::panic::catch_unwind(run);
        choose_here(None);
        let why = caught.expect_err("the fault was not caught");
        let why = why.downcast_ref::<String>().expect("a message");
        assert!(why.contains(complaint), "caught {fault:?} by something else: {why}");
        println!("caught {fault:?}: {why}");
    }
}
