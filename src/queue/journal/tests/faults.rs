//! Proves that an error of any single call to the disk, once or for ever, loses nothing that was acknowledged: whether the machine goes on
//! or loses its power next. Each call of a workload fails in turn, until none does.

use std::io::ErrorKind;

use super::{Driver, small};
use crate::queue::journal::{
    scan::Found,
    sim::{Dice, Disk, Faults, Loss, SimFs},
};

/// Runs a workload on a disk with faults. `None` if it could not even be opened.
fn run(fs: &SimFs, seed: u64) -> Option<Driver> {
    let (mut driver, _) = Driver::open(fs, &small(), Dice::new(seed)).ok()?;
    for _ in 0..250 {
        if driver.step(6, 300).is_err() {
            return Some(driver);
        }
    }
    driver.shared.close();
    // Its outcome is in what was acknowledged.
    let _ended = driver.work(false);
    Some(driver)
}

fn versions(found: &[Found]) -> Vec<i64> {
    let mut versions: Vec<i64> = found.iter().map(|found| found.write.entry.version.get()).collect();
    versions.sort_unstable();
    versions
}

/// Fails call after call; says how many.
fn fail_each_call(kind: Option<ErrorKind>, for_ever: bool, seed: u64) -> u64 {
    for number in 1.. {
        let faults = Faults {
            fail_at: Some(number),
            for_ever,
            kind,
            short_writes: number % 2 == 0,
            ..Faults::default()
        };
        let fs = SimFs::new(Disk::default(), faults);
        let driver = run(&fs, seed);
        if fs.failed() == 0 {
            return number - 1;
        }
        assert_eq!(
            fs.syncs_after_failure(),
            0,
            "synced again after a failure of call {number}"
        );
        let history = driver.map(|driver| driver.history.clone()).unwrap_or_default();
        let expected = history.after(fs.ops());
        let failing = fs.disk();

        // The power fails next.
        for loss in [
            Loss::All,
            Loss::Nothing,
            Loss::Chance(Dice::new(number)),
            Loss::Chance(Dice::new(number + seed)),
        ] {
            let context = || format!("call {number} failed with {kind:?}, for ever {for_ever}; then {loss:?}");
            let crashed = SimFs::new(failing.crashed(&loss), Faults::default());
            let (_, found) =
                Driver::open(&crashed, &small(), Dice::new(0)).unwrap_or_else(|e| panic!("{e}; {}", context()));
            expected.check(&found, &context);
        }

        // Or the machine goes on, and a new process reads what the system's memory holds of the files. What it then recovers is on
        // disk, whatever was not before.
        let context = || format!("call {number} failed with {kind:?}, for ever {for_ever}; then a restart");
        fs.set_faults(Faults::default());
        let (_, found) = Driver::open(&fs, &small(), Dice::new(0)).unwrap_or_else(|e| panic!("{e}; {}", context()));
        expected.check(&found, &context);
        assert_eq!(fs.syncs_after_failure(), 0, "{}", context());
        let crashed = SimFs::new(fs.disk().crashed(&Loss::All), Faults::default());
        let (_, again) =
            Driver::open(&crashed, &small(), Dice::new(0)).unwrap_or_else(|e| panic!("{e}; {}", context()));
        assert_eq!(
            versions(&found),
            versions(&again),
            "recovered, and not on disk; {}",
            context()
        );
    }
    unreachable!("some call does not fail")
}

#[test]
fn an_error_of_any_call_loses_nothing_that_was_acknowledged() {
    let mut calls = 0;
    for kind in [None, Some(ErrorKind::StorageFull)] {
        for for_ever in [false, true] {
            calls += fail_each_call(kind, for_ever, 3);
        }
    }
    println!("{calls} failing calls");
    assert!(calls > 1_000);
}

#[test]
fn what_the_system_lets_go_of_meanwhile_is_not_recovered() {
    let (mut failures, mut given_up) = (0, 0);
    for number in 1.. {
        let faults = Faults {
            fail_at: Some(number),
            ..Faults::default()
        };
        let fs = SimFs::new(Disk::default(), faults);
        let driver = run(&fs, 4);
        if fs.failed() == 0 {
            break;
        }
        if !fs.is_suspect() {
            continue;
        }
        failures += 1;
        let history = driver.map(|driver| driver.history.clone()).unwrap_or_default();
        let expected = history.after(fs.ops());
        // At every fourth call of the restart; which ones differs from failure to failure.
        for forgets_at in (1 + number % 4..).step_by(4) {
            let faults = Faults {
                forgets_at: Some(forgets_at),
                ..Faults::default()
            };
            let context = || format!("call {number} failed; let go at call {forgets_at} of the restart");
            let again = fs.restarted(faults);
            match Driver::open(&again, &small(), Dice::new(0)) {
                Ok((_, found)) => {
                    expected.check(&found, &context);
                    let crashed = SimFs::new(again.disk().crashed(&Loss::All), Faults::default());
                    let (_, after_crash) =
                        Driver::open(&crashed, &small(), Dice::new(0)).unwrap_or_else(|e| panic!("{e}; {}", context()));
                    assert_eq!(
                        versions(&found),
                        versions(&after_crash),
                        "recovered, and not on disk; {}",
                        context()
                    );
                }
                Err(_) => given_up += 1,
            }
            if again.calls() < forgets_at {
                break;
            }
        }
    }
    println!("{failures} failing syncs, {given_up} starts given up");
    assert!(failures > 50 && given_up > 50);
}
