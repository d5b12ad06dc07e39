//! Reading a journal: which groups are whole, in which order they belong, and what is damage.
//!
//! Owns that judgement. Changes nothing (`recover` and `inspect` do). Groups are written one after the other, each only once the one
//! before it is synced, so a crash can hurt none but the last. Damage with no whole group behind it, in this segment or a later one,
//! is therefore a torn tail: it was never acknowledged. Damage with one behind it is a fault of the disk, or somebody's doing.

use std::collections::{HashMap, hash_map::Entry};

use foldhash::fast::RandomState;

use super::{
    JournalError,
    format::{
        self, CHARGE_OVERHEAD_BYTES, GROUP_HEADER_BYTES, GroupHeader, HeaderFault, SEGMENT_HEADER_BYTES, SegmentHeader,
    },
    fs::{JournalFile, JournalFs},
    segments::{is_spare, segment_id, segment_name},
};
use crate::model::{Key, Version, Write};

/// A file that is a segment.
#[derive(Debug)]
pub(super) struct SegmentFile {
    pub(super) header: SegmentHeader,
    pub(super) file: Box<dyn JournalFile>,
    /// All of its bytes.
    pub(super) data: Vec<u8>,
}

impl SegmentFile {
    /// Opens and reads a segment.
    pub(super) fn read(fs: &dyn JournalFs, id: u64) -> Result<SegmentFile, JournalError> {
        let name = segment_name(id);
        let opened = fs.open(&name).and_then(|file| Ok((file.read_all()?, file)));
        let (data, file) = opened.map_err(|source| JournalError::unusable(fs, Some(&name), source))?;
        let foreign = |why| JournalError::NotASegment {
            file: path(fs, &name),
            why,
        };
        let header = SegmentHeader::decode(&data).map_err(|fault| match fault {
            HeaderFault::Short if data.is_empty() => foreign("it is empty"),
            HeaderFault::Short => foreign("it is too short"),
            HeaderFault::Foreign => foreign("it does not begin like one"),
            HeaderFault::Damaged => foreign("its header is damaged"),
            HeaderFault::Newer(format) => JournalError::Newer {
                file: path(fs, &name),
                format,
            },
        })?;
        if header.id != id {
            return Err(foreign("it was another one when it was written"));
        }
        if header.bytes != data.len() as u64 {
            return Err(foreign("it is not as long as when it was made"));
        }
        Ok(SegmentFile { header, file, data })
    }

    /// The whole group at `offset`, with its body.
    pub(super) fn group_at(&self, offset: usize) -> Option<(GroupHeader, &[u8])> {
        let bytes = self.data.get(offset..)?;
        let group = GroupHeader::verify(self.header.mark, bytes)?;
        let body = bytes.get(GROUP_HEADER_BYTES..)?.get(..group.body_bytes as usize)?;
        Some((group, body))
    }

    /// The offset of the first whole group from `offset` on.
    pub(super) fn find_from(&self, offset: usize) -> Option<usize> {
        format::find_group(self.header.mark, &self.data, offset)
    }
}

/// The path of a file, for people.
pub(super) fn path(fs: &dyn JournalFs, name: &str) -> String {
    format!("{}/{name}", fs.name())
}

/// The files of a journal, by their names.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// The segments, the oldest first.
    pub(super) segments: Vec<u64>,
    pub(super) spares: Vec<String>,
}

impl Listing {
    pub(super) fn read(fs: &dyn JournalFs) -> Result<Listing, JournalError> {
        let names = fs.list().map_err(|source| JournalError::unusable(fs, None, source))?;
        let mut listing = Listing::default();
        for name in names {
            if let Some(id) = segment_id(&name) {
                listing.segments.push(id);
            } else if is_spare(&name) {
                listing.spares.push(name);
            }
        }
        listing.segments.sort_unstable();
        Ok(listing)
    }
}

/// A segment of a journal that is in order.
#[derive(Debug)]
pub(super) struct Surveyed {
    pub(super) header: SegmentHeader,
    pub(super) file: Box<dyn JournalFile>,
    /// Where its last whole group ends.
    pub(super) end: u64,
    /// The number of its first record, if it has a group.
    pub(super) first_record: Option<u64>,
    /// Where its last whole group begins, if it has one.
    pub(super) last_group: Option<u64>,
}

/// A journal that is in order: every whole group follows the one before.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) segments: Vec<Surveyed>,
    pub(super) spares: Vec<String>,
    pub(super) next_sequence: u64,
    pub(super) next_record: u64,
    pub(super) released_below: u64,
}

impl Survey {
    /// Reads every segment.
    pub(super) fn read(fs: &dyn JournalFs) -> Result<Survey, JournalError> {
        let listing = Listing::read(fs)?;
        let mut survey = Survey {
            segments: Vec::with_capacity(listing.segments.len()),
            spares: listing.spares,
            next_sequence: 1,
            next_record: 1,
            released_below: 1,
        };
        let mut lowest = None;
        for id in listing.segments {
            if let Some(before) = survey.segments.last()
                && before.header.id + 1 != id
            {
                return Err(JournalError::Missing {
                    file: path(fs, &segment_name(before.header.id + 1)),
                });
            }
            let segment = survey.survey(fs, SegmentFile::read(fs, id)?, lowest.is_none())?;
            lowest = lowest.or(segment.first_record);
            survey.segments.push(segment);
        }
        if let Some(first) = survey.segments.first()
            && lowest.is_some_and(|lowest| lowest > survey.released_below)
        {
            return Err(JournalError::Missing {
                file: path(fs, &segment_name(first.header.id - 1)),
            });
        }
        Ok(survey)
    }

    /// Reads one segment, behind those that were. `is_first` says that none of them had a group.
    fn survey(&mut self, fs: &dyn JournalFs, segment: SegmentFile, is_first: bool) -> Result<Surveyed, JournalError> {
        let name = segment_name(segment.header.id);
        let damaged = |name: &str, offset| JournalError::Damaged {
            file: path(fs, name),
            offset,
        };
        let mut offset = SEGMENT_HEADER_BYTES;
        let mut first_record = None;
        let mut last_group = None;
        while let Some((group, _)) = segment.group_at(offset) {
            let follows = (group.sequence, group.first_record) == (self.next_sequence, self.next_record);
            if !(follows || (is_first && first_record.is_none())) {
                // Where the missing groups should have been: mostly at the end of the segment before.
                let (name, offset) = match self.segments.last() {
                    Some(before) if first_record.is_none() => (segment_name(before.header.id), before.end),
                    _ => (name, offset as u64),
                };
                return Err(damaged(&name, offset));
            }
            if group.released_below > group.next_record() || group.released_below < self.released_below {
                return Err(damaged(&name, offset as u64));
            }
            first_record = first_record.or(Some(group.first_record));
            last_group = Some(offset as u64);
            self.next_sequence = group.sequence + 1;
            self.next_record = group.next_record();
            self.released_below = group.released_below;
            offset += group.group_bytes();
        }
        if segment.find_from(offset).is_some() {
            return Err(damaged(&name, offset as u64));
        }
        Ok(Surveyed {
            header: segment.header,
            file: segment.file,
            end: offset as u64,
            first_record,
            last_group,
        })
    }
}

/// A write that was read, with what its record is known by.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) number: u64,
    pub(super) charge: u32,
    pub(super) write: Write,
}

/// What the records of a journal come to.
#[derive(Debug, Default)]
pub(super) struct Harvest {
    /// Of the records that are not released, the one with the highest version of each key.
    pub(super) newest: HashMap<Key, Found, RandomState>,
    /// The highest version of all records, released ones too.
    pub(super) high_water: Option<Version>,
}

impl Harvest {
    /// Takes in the records of a group. `Err` if another program wrote them.
    pub(super) fn add(
        &mut self,
        group: &GroupHeader,
        body: &[u8],
        released_below: u64,
    ) -> Result<(), format::Malformed> {
        let records = format::split_records(group, body)?;
        for (number, place) in (group.first_record..).zip(records) {
            let charge = (place.len() + CHARGE_OVERHEAD_BYTES) as u32;
            let write = format::decode_record(&body[place])?;
            self.high_water = self.high_water.max(Some(write.entry.version));
            if number < released_below {
                continue;
            }
            let found = Found { number, charge, write };
            match self.newest.entry(found.write.key.clone()) {
                Entry::Vacant(place) => {
                    place.insert(found);
                }
                // Of a record and its copy the copy stands, which lies in the younger segment.
                Entry::Occupied(mut place) if place.get().write.entry.version <= found.write.entry.version => {
                    place.insert(found);
                }
                Entry::Occupied(_) => {}
            }
        }
        Ok(())
    }

    /// Reads the records of every segment of a journal that is in order.
    pub(super) fn read(fs: &dyn JournalFs, survey: &Survey) -> Result<Harvest, JournalError> {
        let mut harvest = Harvest::default();
        for surveyed in &survey.segments {
            if surveyed.last_group.is_none() {
                continue;
            }
            // Read once more rather than held: a journal may be larger than memory.
            let segment = SegmentFile::read(fs, surveyed.header.id)?;
            let mut offset = SEGMENT_HEADER_BYTES;
            while (offset as u64) < surveyed.end {
                let damaged = || JournalError::Damaged {
                    file: path(fs, &segment_name(surveyed.header.id)),
                    offset: offset as u64,
                };
                let (group, body) = segment.group_at(offset).ok_or_else(damaged)?;
                harvest
                    .add(&group, body, survey.released_below)
                    .map_err(|_| damaged())?;
                offset += group.group_bytes();
            }
        }
        Ok(harvest)
    }
}
