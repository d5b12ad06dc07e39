//! Proves which versions a restart's clock starts above: all that are in order, released or not, and none that is far ahead.

use std::time::Duration;

use super::{Driver, key, small};
use crate::{
    clock::{self, Clock},
    model::{COUNTER_BITS, Entry, NODE_BITS, Tags, VERSION_EPOCH_MILLIS, Version, Write},
    queue::journal::sim::{Dice, SimFs},
};

fn stamped(ahead: Duration) -> Version {
    let millis = clock::wall_time().after(ahead).0 - VERSION_EPOCH_MILLIS;
    Version::new((millis << COUNTER_BITS << NODE_BITS) | 9).expect("positive")
}

/// The mark, and the versions, that come back when these were appended; the first of them was released, and that is known on disk.
fn recovered(versions: &[Version]) -> (Option<Version>, Vec<Version>) {
    let fs = SimFs::default();
    let (mut driver, _) = Driver::open(&fs, &small(), Dice::new(1)).expect("an empty disk");
    for (number, version) in versions.iter().enumerate() {
        driver.work(false).expect("no fault");
        let entry = Entry {
            version: *version,
            value: None,
            expires_at: None,
        };
        let key = key(number);
        assert!(
            driver.append(Write {
                key,
                entry,
                tags: Tags::default(),
                requests: Vec::new(),
            }),
            "room"
        );
    }
    driver.work(false).expect("no fault");
    driver.release(0);
    driver.work(true).expect("no fault");
    let opened = super::recover::open(
        std::sync::Arc::new(fs),
        &small(),
        crate::telemetry::journal::JournalMetrics::default(),
    )
    .expect("in order");
    let mut back: Vec<Version> = opened.found.iter().map(|found| found.write.entry.version).collect();
    back.sort_unstable();
    (opened.high_water, back)
}

#[test]
fn a_version_far_ahead_comes_back_and_does_not_carry_the_clock_along() {
    const YEAR: Duration = Duration::from_secs(365 * 86_400);
    let recent = stamped(Duration::from_secs(20));
    for far in [stamped(Duration::from_secs(3600)), stamped(YEAR)] {
        // Released or not.
        for versions in [
            [far, recent, stamped(Duration::ZERO)],
            [recent, far, stamped(Duration::ZERO)],
        ] {
            let (mark, back) = recovered(&versions);
            assert_eq!(mark, Some(recent));
            assert_eq!(back.contains(&far), versions[0] != far);
            let clock = Clock::new(3, mark);
            let stamp = clock.stamp(None).expect("leased");
            assert!(stamp > recent && stamp < far);
            assert!(clock.stamp(Some(far)).expect("leased") > far, "on its own key");
        }
    }
}

/// As after the wall clock was set back by an hour: everything is far ahead.
#[test]
fn after_a_step_back_every_key_still_comes_back_with_its_version() {
    let hour = Duration::from_secs(3600);
    let versions = [stamped(hour), stamped(hour + Duration::from_secs(1)), stamped(2 * hour)];
    let (mark, back) = recovered(&versions);
    assert_eq!(mark, None, "the store's reservation is all that the clock starts from");
    assert_eq!(back, versions[1..]);
    let clock = Clock::new(3, mark);
    for version in back {
        assert!(clock.stamp(Some(version)).expect("leased") > version);
    }
}
