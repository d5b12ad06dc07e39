//! Proves what is done about a damaged directory: a torn tail is cut, whatever else is refused with its place, and refusing changes
//! nothing.

use std::io::ErrorKind;

use super::{Driver, JournalError, small};
use crate::queue::journal::{
    format::{FORMAT, GROUP_HEADER_BYTES, GroupHeader, SEGMENT_HEADER_BYTES, SegmentHeader},
    segments::segment_name,
    sim::{Dice, Disk, Faults, Loss, SimFs},
};

/// Where each group of a segment lies.
pub(super) fn groups(bytes: &[u8]) -> Vec<(usize, GroupHeader)> {
    let header = SegmentHeader::decode(bytes).expect("a segment");
    let mut groups = Vec::new();
    let mut offset = SEGMENT_HEADER_BYTES;
    while let Some(group) = GroupHeader::verify(header.mark, &bytes[offset..]) {
        groups.push((offset, group));
        offset += group.group_bytes();
    }
    groups
}

/// A journal of several segments with recycled files, all of which hold groups but perhaps the last one.
pub(super) fn journal() -> (Disk, Driver) {
    let fs = SimFs::default();
    let (mut driver, _) = Driver::open(&fs, &small(), Dice::new(5)).expect("an empty disk");
    while driver.shared.metrics.moved.get() == 0 || driver.shared.standing().segments < 4 {
        driver.step(20, 300).expect("no fault");
    }
    (fs.disk().settled(), driver)
}

pub(super) fn segments(disk: &Disk) -> Vec<String> {
    let names = disk.names();
    names.into_iter().filter(|name| name.starts_with("segment-")).collect()
}

/// The error that a damaged disk is refused with. Nothing on it has changed.
fn refusal(mut disk: Disk) -> JournalError {
    let fs = SimFs::new(disk.clone(), Faults::default());
    let error = match Driver::open(&fs, &small(), Dice::new(0)) {
        Ok(_) => panic!("taken for a journal in order"),
        Err(error) => error,
    };
    let mut after = fs.disk();
    assert_eq!(after.names(), disk.names());
    for name in disk.names() {
        assert_eq!(after.bytes_mut(&name), disk.bytes_mut(&name), "{name} has changed");
    }
    assert!(!error.to_string().contains('\n'));
    error
}

#[test]
fn any_flipped_bit_of_the_last_group_costs_that_group_and_no_other() {
    let (mut disk, driver) = journal();
    let last = segments(&disk)
        .into_iter()
        .rfind(|name| !groups(disk.bytes_mut(name).expect("there")).is_empty());
    let name = last.expect("one with a group");
    let (offset, group) = *groups(disk.bytes_mut(&name).expect("there")).last().expect("a group");
    let in_last = |number: u64| (group.first_record..group.next_record()).contains(&number);
    let (_, whole) =
        Driver::open(&SimFs::new(disk.clone(), Faults::default()), &small(), Dice::new(0)).expect("in order");
    let kept: Vec<i64> = whole
        .iter()
        .filter(|found| !in_last(found.number))
        .map(|found| found.write.entry.version.get())
        .collect();
    let expected = driver.history.after(usize::MAX);
    // What aligns the next group is not part of this one.
    for at in offset..offset + GROUP_HEADER_BYTES + group.body_bytes as usize {
        let mut flipped = disk.clone();
        flipped.bytes_mut(&name).expect("there")[at] ^= 1 << (at % 8);
        let fs = SimFs::new(flipped.settled(), Faults::default());
        let (_, found) = Driver::open(&fs, &small(), Dice::new(0)).expect("a torn tail");
        let mut on_disk = fs.disk().crashed(&Loss::All);
        let tail = &on_disk.bytes_mut(&name).expect("there")[offset..offset + group.group_bytes()];
        assert!(tail.iter().all(|byte| *byte == 0), "cut, and synced");
        for version in &kept {
            assert!(found.iter().any(|found| found.write.entry.version.get() == *version));
        }
        for found in found {
            let key = (&found.write.key, found.write.entry.version);
            assert_eq!(expected.possible.get(&key).copied(), Some(&found.write));
        }
    }
}

#[test]
fn damage_with_a_whole_group_behind_it_is_refused_with_its_place() {
    let (mut disk, _) = journal();
    let mut tried = 0;
    let names = segments(&disk);
    let places: Vec<(String, usize, GroupHeader)> = names
        .iter()
        .flat_map(|name| {
            let groups = groups(disk.bytes_mut(name).expect("there"));
            groups
                .into_iter()
                .map(|(offset, group)| (name.clone(), offset, group))
                .collect::<Vec<_>>()
        })
        .collect();
    for (name, offset, group) in &places[..places.len() - 1] {
        let length = GROUP_HEADER_BYTES + group.body_bytes as usize;
        for at in [0, 5, 9, 17, 30, 36, 41, 45, 48, length / 2, length - 1] {
            if at >= length {
                continue;
            }
            let mut flipped = disk.clone();
            flipped.bytes_mut(name).expect("there")[offset + at] ^= 0x10;
            let error = refusal(flipped.settled());
            let place = matches!(&error, JournalError::Damaged { file, offset: found }
                if file.ends_with(name.as_str()) && *found == *offset as u64);
            assert!(place, "{error} for {name} at {offset}");
            tried += 1;
        }
    }
    assert!(tried > 100, "{tried} places");
}

#[test]
fn files_that_are_no_segments_are_refused() {
    let (mut disk, _) = journal();
    let names = segments(&disk);
    for (index, name) in names.iter().enumerate() {
        let bytes = disk.bytes_mut(name).expect("there").clone();
        let header = SegmentHeader::decode(&bytes).expect("a segment");
        let replace = |bytes: Option<Vec<u8>>| {
            let mut changed = disk.clone();
            changed.replace(name, bytes);
            changed.settled()
        };
        let why = |error: &JournalError| match error {
            JournalError::NotASegment { file, why } if file.ends_with(name.as_str()) => (*why).to_owned(),
            other => format!("{other}"),
        };
        assert_eq!(why(&refusal(replace(Some(Vec::new())))), "it is empty");
        assert_eq!(why(&refusal(replace(Some(bytes[..511].to_vec())))), "it is too short");
        assert_eq!(
            why(&refusal(replace(Some(vec![b'x'; 4096])))),
            "it does not begin like one"
        );
        assert_eq!(
            why(&refusal(replace(Some(bytes[..4000].to_vec())))),
            "it is not as long as when it was made"
        );
        let mut changed = bytes.clone();
        changed[500] ^= 1;
        assert_eq!(why(&refusal(replace(Some(changed)))), "its header is damaged");
        let mut other = bytes.clone();
        let renamed = SegmentHeader {
            id: header.id + 1,
            ..header
        };
        other[..SEGMENT_HEADER_BYTES].copy_from_slice(&renamed.encode());
        assert_eq!(
            why(&refusal(replace(Some(other)))),
            "it was another one when it was written"
        );
        let mut newer = bytes.clone();
        newer[8..12].copy_from_slice(&(FORMAT + 1).to_le_bytes());
        let error = refusal(replace(Some(newer)));
        assert!(matches!(&error, JournalError::Newer { format: 2, .. }), "{error}");
        // Without the last ones nobody can tell that they were there.
        if index + 1 < names.len() && !groups(disk.bytes_mut(&names[index + 1]).expect("there")).is_empty() {
            let mut changed = disk.clone();
            changed.replace(name, None);
            let error = refusal(changed.settled());
            let missing = segment_name(header.id);
            assert!(
                matches!(&error, JournalError::Missing { file } if file.ends_with(&missing)),
                "{error}"
            );
        }
    }
}

#[test]
fn a_directory_that_cannot_be_written_is_refused() {
    let (disk, _) = journal();
    let faults = Faults {
        fail_at: Some(1),
        for_ever: true,
        kind: Some(ErrorKind::PermissionDenied),
        ..Faults::default()
    };
    let fs = SimFs::new(disk, faults);
    let error = Driver::open(&fs, &small(), Dice::new(0))
        .map(|_| ())
        .expect_err("no right");
    assert!(
        matches!(&error, JournalError::Unusable { .. }) && error.to_string().contains("permission"),
        "{error}"
    );
}

#[test]
fn what_is_none_of_its_files_is_left_alone() {
    let (mut disk, _) = journal();
    for name in ["lost+found", "segment-1", "segment-00000000000000zz", "notes"] {
        disk.replace(name, Some(b"not mine".to_vec()));
    }
    let fs = SimFs::new(disk.settled(), Faults::default());
    let (mut driver, found) = Driver::open(&fs, &small(), Dice::new(0)).expect("in order");
    driver.hold(found);
    for _ in 0..200 {
        driver.step(5, 300).expect("no fault");
    }
    assert_eq!(
        fs.disk().bytes_mut("notes").map(|bytes| bytes.as_slice()),
        Some(b"not mine".as_slice())
    );
    assert!(fs.disk().names().contains(&"segment-1".to_owned()));
}
