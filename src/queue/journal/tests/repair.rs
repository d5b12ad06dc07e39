//! Proves that a repair keeps everything that can be read, deletes nothing, can be interrupted anywhere, and that inspecting shows what is
//! there and changes nothing.

use std::{collections::HashSet, ops::Range, sync::Arc};

use super::{
    Driver, JournalError,
    damage::{groups, journal, segments},
    small,
};
use crate::model::Key;
use crate::queue::journal::{
    format::{GroupHeader, SEGMENT_HEADER_BYTES},
    inspect::{inspect, repair},
    scan::Found,
    sim::{Dice, Disk, Faults, Loss, SimFs},
};

fn fs(disk: &Disk) -> SimFs {
    SimFs::new(disk.clone(), Faults::default())
}

/// A damage: what it is called, the disk, and the numbers of the records that it makes unreadable.
struct Damage {
    what: &'static str,
    disk: Disk,
    lost: Vec<Range<u64>>,
}

fn damages(whole: &Disk, recovered: &[Found]) -> Vec<Damage> {
    let mut disk = whole.clone();
    let is_needed = |numbers: &Range<u64>| recovered.iter().any(|found| numbers.contains(&found.number));
    let numbers = |group: &GroupHeader| group.first_record..group.next_record();
    let of = |disk: &mut Disk, name: &str| groups(disk.bytes_mut(name).expect("there"));

    let mut flipped = disk.clone();
    let mut lost = Vec::new();
    // Not the last group: that would be a torn tail.
    let mut places = Vec::new();
    for name in segments(&disk) {
        places.extend(
            of(&mut disk, &name)
                .into_iter()
                .map(|(offset, group)| (name.clone(), offset, group)),
        );
    }
    places.pop();
    places.retain(|(_, _, group)| is_needed(&numbers(group)));
    assert!(places.len() > 2, "something to lose");
    for (name, offset, group) in [&places[0], &places[places.len() / 2]] {
        flipped.bytes_mut(name).expect("there")[offset + 20] ^= 1;
        lost.push(numbers(group));
    }
    let mut damages = vec![Damage {
        what: "two damaged groups",
        disk: flipped.settled(),
        lost,
    }];

    let (name, _, _) = &places[places.len() / 2];
    let in_segment = of(&mut disk, name);
    let of_segment: Vec<Range<u64>> = in_segment.iter().map(|(_, group)| numbers(group)).collect();
    for (what, at) in [
        ("a damaged header", 400),
        ("a header that begins with something else", 0),
    ] {
        let mut flipped = disk.clone();
        flipped.bytes_mut(name).expect("there")[at] ^= 1;
        damages.push(Damage {
            what,
            disk: flipped.settled(),
            lost: Vec::new(),
        });
    }
    let last = in_segment.iter().rposition(|(_, group)| is_needed(&numbers(group)));
    let last = last.expect("it holds what is needed");
    let cut = disk.bytes_mut(name).expect("there")[..in_segment[last].0 + 1].to_vec();
    let mut shortened = disk.clone();
    shortened.replace(name, Some(cut));
    damages.push(Damage {
        what: "a file that was cut short",
        disk: shortened.settled(),
        lost: of_segment[last..].to_vec(),
    });
    for (what, bytes) in [
        ("a missing segment", None),
        ("a foreign file", Some(b"a letter".to_vec())),
    ] {
        let mut replaced = disk.clone();
        replaced.replace(name, bytes);
        damages.push(Damage {
            what,
            disk: replaced.settled(),
            lost: of_segment.clone(),
        });
    }
    damages
}

#[test]
fn a_repair_keeps_what_can_be_read_and_can_be_interrupted_anywhere() {
    let (whole, driver) = journal();
    let (_, recovered) = Driver::open(&fs(&whole), &small(), Dice::new(0)).expect("in order");
    let mut interrupted = 0;
    for Damage { what, disk, lost } in damages(&whole, &recovered) {
        let is_lost = |number: &u64| lost.iter().any(|numbers| numbers.contains(number));
        let kept: Vec<i64> = recovered
            .iter()
            .filter(|found| !is_lost(&found.number))
            .map(|found| found.write.entry.version.get())
            .collect();
        assert!(
            !kept.is_empty() && (lost.is_empty() || kept.len() < recovered.len()),
            "{what}: something to keep, and something to lose unless all can be read"
        );
        let check = |disk: &Disk, context: &str| {
            let (_, found) =
                Driver::open(&fs(disk), &small(), Dice::new(0)).unwrap_or_else(|e| panic!("{e}: {context}"));
            for version in &kept {
                let is_there = found.iter().any(|found| found.write.entry.version.get() == *version);
                assert!(is_there, "version {version} could be read: {context}");
            }
            let expected = driver.history.after(usize::MAX);
            for found in &found {
                let key = (&found.write.key, found.write.entry.version);
                assert_eq!(expected.possible.get(&key).copied(), Some(&found.write), "{context}");
            }
        };

        let repaired = fs(&disk);
        let done = repair(Arc::new(repaired.clone()), &small()).expect("repaired");
        assert!(done.refusal.is_some() && done.kept_writes >= kept.len());
        let before: usize = segments(&disk).len();
        assert_eq!(done.set_aside.len(), before);
        let mut after = repaired.disk();
        let mut original = disk.clone();
        for name in segments(&disk) {
            let aside = after.bytes_mut(&format!("damaged-{name}")).expect("set aside").clone();
            assert_eq!(
                Some(&aside),
                original.bytes_mut(&name).map(|bytes| &*bytes),
                "{what}: {name} is kept as it was"
            );
        }
        check(&after.crashed(&Loss::All), what);
        let again = repair(Arc::new(repaired.clone()), &small()).expect("in order");
        assert!(again.refusal.is_none() && again.set_aside.is_empty());

        let mut replayed = disk.clone();
        for (index, op) in repaired.log().iter().enumerate() {
            replayed.apply(op);
            let chances = (0..6).map(|seed| Loss::Chance(Dice::new(seed + 100 * index as u64)));
            for loss in [Loss::All, Loss::Nothing].into_iter().chain(chances) {
                interrupted += 1;
                let context = format!("{what}, {loss:?} after operation {index} of the repair");
                let crashed = fs(&replayed.crashed(&loss));
                if Driver::open(&crashed, &small(), Dice::new(0)).is_err() {
                    repair(Arc::new(crashed.clone()), &small()).unwrap_or_else(|error| panic!("{error}: {context}"));
                }
                check(&crashed.disk(), &context);
            }
        }
    }
    assert!(interrupted > 300, "{interrupted} interrupted repairs");
}

#[test]
fn a_repair_leaves_alone_what_it_must_not_touch() {
    let (whole, _) = journal();
    let disk = fs(&whole);
    let done = repair(Arc::new(disk.clone()), &small()).expect("in order");
    assert!(done.refusal.is_none() && disk.ops() == 0, "nothing to repair");

    let mut newer = whole.clone();
    let name = &segments(&newer)[1];
    newer.bytes_mut(name).expect("there")[8] = 9;
    let disk = fs(&newer.settled());
    let error = repair(Arc::new(disk.clone()), &small()).expect_err("a later version's");
    assert!(matches!(error, JournalError::Newer { format: 9, .. }) && disk.ops() == 0);
}

#[test]
fn an_inspection_shows_what_is_there_and_changes_nothing() {
    let (whole, driver) = journal();
    let disk = fs(&whole);
    let inspection = inspect(&disk).expect("readable");
    assert!(
        inspection.refusal.is_none() && inspection.to_string().ends_with("in order"),
        "{inspection}"
    );
    let (_, found) = Driver::open(&fs(&whole), &small(), Dice::new(0)).expect("in order");
    let keys: HashSet<&Key> = found.iter().map(|found| &found.write.key).collect();
    assert_eq!(inspection.live_writes, keys.len());
    assert_eq!(
        inspection.high_water,
        driver
            .history
            .issued
            .iter()
            .map(|issued| issued.write.entry.version)
            .max()
    );
    assert_eq!(inspection.segments.len(), segments(&whole).len());

    let mut damaged = whole.clone();
    let name = &segments(&whole)[0];
    damaged.bytes_mut(name).expect("there")[SEGMENT_HEADER_BYTES + 20] ^= 1;
    damaged.replace(&segments(&whole)[1], Some(Vec::new()));
    let damaged = fs(&damaged.settled());
    let inspection = inspect(&damaged).expect("readable");
    assert_eq!(inspection.segments[0].damaged_at, [SEGMENT_HEADER_BYTES as u64]);
    assert!(inspection.segments[1].fault == Some("it is empty") && inspection.refusal.is_some());
    let text = inspection.to_string();
    assert!(
        text.contains("damaged at offset 512") && text.contains(": 0 bytes, no segment: it is empty"),
        "{text}"
    );
    assert_eq!((disk.ops(), damaged.ops()), (0, 0));
}
