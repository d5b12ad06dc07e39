//! Proves the bounds: the journal stays small while little of it is live, never grows past its bound, and never gets stuck while there
//! is room for a record.

use super::{Config, Driver, STRAGGLERS, small, write};
use crate::queue::journal::{
    format::{CHARGE_OVERHEAD_BYTES, GROUP_HEADER_BYTES, SEGMENT_HEADER_BYTES, encode_record},
    segments::segment_name,
    sim::{Dice, Faults, SimFs},
};

fn large() -> Config {
    Config {
        bytes_max: 40 * 4096,
        ..small()
    }
}

fn open(config: &Config) -> (SimFs, Driver) {
    let fs = SimFs::default();
    let (driver, _) = Driver::open(&fs, config, Dice::new(1)).expect("an empty disk");
    (fs, driver)
}

#[test]
fn a_hot_key_never_grows_it_past_a_few_segments() {
    for stragglers in [0, 3] {
        let (fs, mut driver) = open(&large());
        for number in 0..stragglers {
            assert!(driver.work(false).is_ok() && driver.append(write(STRAGGLERS + number, 1 + number as i64, 50)));
        }
        for number in 10..5_000 {
            driver.work(false).expect("no fault");
            assert!(driver.append(write(1, number, 200)), "room");
        }
        driver.work(false).expect("no fault");
        let standing = driver.shared.standing();
        assert!(
            standing.segments <= 5,
            "{} segments with {stragglers} stragglers",
            standing.segments
        );
        assert!(fs.disk().names().len() <= 7);
        assert_eq!(driver.held.len(), 1 + stragglers, "the newest of each key");
    }
}

#[test]
fn it_is_never_larger_than_its_bound_and_never_stuck_below_it() {
    for (seed, config) in [(1, small()), (2, small()), (3, large())] {
        let (fs, mut driver) = open(&config);
        driver.dice = Dice::new(seed);
        let mut refused = 0;
        for number in 1..6_000 {
            driver.work(false).expect("no fault");
            // Sizes from the smallest to the largest that fits; now and then a whole row of the same.
            let bytes = match driver.dice.below(4) {
                0 => driver.dice.below(20),
                1 => driver.dice.below(config.write_bytes_max() - 32),
                _ => 300,
            };
            let write = write(number as usize, number, bytes);
            let charge = encode_record(&write).len() + CHARGE_OVERHEAD_BYTES;
            let fits = driver.shared.live_bytes() as usize + charge <= config.live_bytes_max();
            assert_eq!(driver.append(write), fits, "seed {seed}, write {number}");
            if !fits {
                refused += 1;
                // Anything may go, old or new.
                for _ in 0..=driver.dice.below(6) {
                    let at = driver.dice.below(driver.held.len());
                    driver.release(driver.held[at].0);
                }
            }
            let bytes: u64 = driver.shared.standing().bytes;
            assert!(bytes <= config.bytes_max, "{bytes} bytes");
            assert!(fs.disk().names().len() <= config.segments_max());
        }
        assert!(refused > 500 && driver.shared.metrics.moved.get() > 1_000);
    }
}

#[test]
fn a_bound_that_was_lowered_lets_the_journal_go_on() {
    let (fs, mut driver) = open(&large());
    for number in 1..300 {
        driver.work(false).expect("no fault");
        if !driver.append(write(number as usize, number, 300)) {
            break;
        }
    }
    driver.work(false).expect("no fault");
    let held = driver.held.len();
    assert!(driver.shared.standing().bytes > 2 * small().bytes_max);
    let (mut driver, found) = Driver::open(&fs, &small(), Dice::new(1)).expect("in order");
    assert_eq!(found.len(), held);
    driver.hold(found);
    driver.work(false).expect("no fault");
    assert!(!driver.append(write(1, 1_000, 300)), "full");
    while driver.shared.live_bytes() > small().live_bytes_max() as u64 / 2 {
        driver.release(driver.held[driver.held.len() / 2].0);
    }
    for number in 1_000..1_500 {
        driver.work(false).expect("no fault");
        assert!(driver.append(write(1, number, 300)), "write {number}");
    }
    driver.work(false).expect("no fault");
    assert!(driver.shared.standing().bytes <= small().bytes_max);
}

#[test]
fn another_segment_size_is_taken_over_when_the_old_files_are_gone() {
    let sizes = [4096, 16_384, 8192, 4096];
    let fs = SimFs::default();
    let mut version = 1;
    for segment_bytes in sizes {
        let config = Config {
            segment_bytes,
            bytes_max: segment_bytes * 8,
            ..small()
        };
        let (mut driver, found) = Driver::open(&fs, &config, Dice::new(1)).expect("in order");
        assert_eq!(found.len(), usize::from(version > 1));
        driver.hold(found);
        for _ in 0..200 {
            version += 1;
            driver.work(false).expect("no fault");
            assert!(driver.append(write(1, version, config.write_bytes_max() - 32)));
        }
        driver.work(false).expect("no fault");
        driver.shared.close();
        assert!(driver.work(false).expect("no fault"));
        // The last write is held.
        std::mem::forget(std::mem::take(&mut driver.held));
    }
}

#[test]
fn on_a_full_disk_the_last_word_frees_a_segment_however_full_the_others_are() {
    for bytes in 0..250 {
        let (fs, mut driver) = open(&small());
        driver.work(false).expect("no fault");
        fs.set_faults(Faults {
            capacity: Some(2 * 4096),
            ..Faults::default()
        });
        let mut number = 1;
        while driver.append(write(number as usize, number, bytes)) {
            number += 1;
            driver.work(false).expect("a full disk is no failure");
            assert!(number < 1_000, "bounded");
        }
        driver.release_all();
        driver.work(false).expect("no fault");
        assert!(
            driver.append(write(1, 1_000, bytes)),
            "room again, with values of {bytes} bytes"
        );
    }
}

#[test]
fn a_segment_that_rots_ends_the_journal_instead_of_filling_it() {
    for byte in 0..GROUP_HEADER_BYTES {
        let (fs, mut driver) = open(&small());
        driver.work(false).expect("no fault");
        assert!(driver.append(write(STRAGGLERS, 1, 50)));
        driver.work(false).expect("no fault");
        fs.rot(&segment_name(1), SEGMENT_HEADER_BYTES + byte);
        let mut number = 10;
        let error = loop {
            if let Err(error) = driver.work(false) {
                break error;
            }
            assert!(driver.append(write(1, number, 200)), "stuck, with byte {byte} changed");
            number += 1;
            assert!(number < 1_000, "never looked at, with byte {byte} changed");
        };
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{error}");
    }
}
