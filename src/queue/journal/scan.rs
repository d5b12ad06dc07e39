//! Reading a journal: which groups are whole, in which order they belong, and what is damage.
//!
//! Owns that judgement. Changes nothing (`recover` and `inspect` do). Groups are written one after the other, each only once the one
//! before it is synced, so a crash can hurt none but the last. Damage with no whole group behind it, in this segment or a later one,
//! is therefore a torn tail: it was never acknowledged. Damage with one behind it is a fault of the disk, or somebody's doing.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    io, mem,
};

use foldhash::fast::RandomState;

use super::{
    JournalError,
    format::{
        self, ALIGNMENT, CHARGE_OVERHEAD_BYTES, GROUP_HEADER_BYTES, GroupHeader, HeaderFault, SEGMENT_HEADER_BYTES,
        SegmentHeader,
    },
    fs::{JournalFile, JournalFs},
    segments::{is_spare, segment_id, segment_name},
};
use crate::{
    clock,
    model::{Key, Timestamp, Version, Write},
};

/// How much of a segment is read at a time; more where a group is longer. Little in tests, so that their groups cross it.
const WINDOW_BYTES: usize = if cfg!(test) { 256 } else { 1 << 20 };

/// A file that is a segment, read through a window: a journal may be larger than memory.
#[derive(Debug)]
pub(super) struct SegmentFile {
    pub(super) header: SegmentHeader,
    pub(super) file: Box<dyn JournalFile>,
    /// The path, for people.
    path: String,
    /// Bytes of the file, from `window_at` on.
    window: Vec<u8>,
    window_at: u64,
}

impl SegmentFile {
    /// Opens a segment.
    pub(super) fn open(fs: &dyn JournalFs, id: u64) -> Result<SegmentFile, JournalError> {
        match SegmentFile::salvage(fs, id)? {
            (segment, None) => Ok(segment),
            (segment, Some(why)) => Err(JournalError::NotASegment {
                file: segment.path,
                why,
            }),
        }
    }

    /// Opens a file that has the name of a segment, to read whatever groups it holds. Says why it is no segment, if it is none.
    pub(super) fn salvage(fs: &dyn JournalFs, id: u64) -> Result<(SegmentFile, Option<&'static str>), JournalError> {
        let name = segment_name(id);
        let path = path(fs, &name);
        let unusable = |source| JournalError::unusable(fs, Some(&name), source);
        let file = fs.open(&name).map_err(unusable)?;
        let length = file.length().map_err(unusable)?;
        let mut begin = vec![0; length.min((SEGMENT_HEADER_BYTES + GROUP_HEADER_BYTES) as u64) as usize];
        file.read_exact_at(&mut begin, 0).map_err(unusable)?;
        let (mark, why) = match SegmentHeader::decode(&begin) {
            Ok(header) if header.id != id => (header.mark, Some("it was another one when it was written")),
            Ok(header) if header.bytes != length => (header.mark, Some("it is not as long as when it was made")),
            Ok(header) => (header.mark, None),
            Err(HeaderFault::Newer(format)) => return Err(JournalError::Newer { file: path, format }),
            Err(fault) => {
                // The first group has it, too, and always in the same place: where no value can have put it.
                let first = begin.get(SEGMENT_HEADER_BYTES..).unwrap_or_default();
                let why = match fault {
                    HeaderFault::Short if length == 0 => "it is empty",
                    HeaderFault::Short => "it is too short",
                    HeaderFault::Foreign => "it does not begin like one",
                    _ => "its header is damaged",
                };
                (GroupHeader::peek_mark(first).unwrap_or_default(), Some(why))
            }
        };
        let segment = SegmentFile {
            header: SegmentHeader {
                id,
                mark,
                bytes: length,
            },
            file,
            path,
            window: Vec::new(),
            window_at: 0,
        };
        Ok((segment, why))
    }

    /// The whole group at `offset`, with its body.
    pub(super) fn group_at(&mut self, offset: u64) -> Result<Option<(GroupHeader, &[u8])>, JournalError> {
        let mark = self.header.mark;
        let Some(group) = GroupHeader::peek(mark, self.bytes_from(offset, GROUP_HEADER_BYTES)?) else {
            return Ok(None);
        };
        let length = GROUP_HEADER_BYTES + group.body_bytes as usize;
        // What a damaged header promises beyond the file is not read.
        if self.header.bytes - offset < length as u64 {
            return Ok(None);
        }
        let bytes = &self.bytes_from(offset, length)?[..length];
        let whole = GroupHeader::verify(mark, bytes);
        Ok(whole.map(|group| (group, &bytes[GROUP_HEADER_BYTES..])))
    }

    /// The offset of the first whole group from `offset` on.
    pub(super) fn find_from(&mut self, offset: u64) -> Result<Option<u64>, JournalError> {
        let mark = self.header.mark;
        let mut from = offset.next_multiple_of(ALIGNMENT as u64);
        loop {
            let bytes = self.bytes_from(from, GROUP_HEADER_BYTES)?;
            if bytes.len() < GROUP_HEADER_BYTES {
                return Ok(None);
            }
            let Some(skipped) = format::find_header(mark, bytes) else {
                from += (bytes.len() - GROUP_HEADER_BYTES + 1).next_multiple_of(ALIGNMENT) as u64;
                continue;
            };
            from += skipped as u64;
            if self.group_at(from)?.is_some() {
                return Ok(Some(from));
            }
            from += ALIGNMENT as u64;
        }
    }

    /// Bytes from `offset` on: at least `length`, unless the file ends before.
    fn bytes_from(&mut self, offset: u64, length: usize) -> Result<&[u8], JournalError> {
        let rest = self.header.bytes.saturating_sub(offset);
        let length = rest.min(length as u64);
        let held_to = self.window_at + self.window.len() as u64;
        if offset < self.window_at || offset + length > held_to {
            self.window.clear();
            self.window
                .resize(rest.min(length.max(WINDOW_BYTES as u64)) as usize, 0);
            self.window_at = offset;
            let read = self.file.read_exact_at(&mut self.window, offset);
            read.map_err(|why| JournalError::Unusable {
                path: self.path.clone(),
                why,
            })?;
        }
        Ok(self
            .window
            .get((offset - self.window_at) as usize..)
            .unwrap_or_default())
    }
}

/// A group is not whole that was whole a moment ago. The system shows what it failed to write for as long as it has it in memory, and
/// then what is on disk.
pub(super) fn changed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it changed while it was read: start again")
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
            let segment = survey.survey(fs, SegmentFile::open(fs, id)?, lowest.is_none())?;
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
    fn survey(
        &mut self,
        fs: &dyn JournalFs,
        mut segment: SegmentFile,
        is_first: bool,
    ) -> Result<Surveyed, JournalError> {
        let name = segment_name(segment.header.id);
        let damaged = |name: &str, offset| JournalError::Damaged {
            file: path(fs, name),
            offset,
        };
        let mut offset = SEGMENT_HEADER_BYTES as u64;
        let mut first_record = None;
        let mut last_group = None;
        while let Some((group, _)) = segment.group_at(offset)? {
            let follows = (group.sequence, group.first_record) == (self.next_sequence, self.next_record);
            if !(follows || (is_first && first_record.is_none())) {
                // Where the missing groups should have been: mostly at the end of the segment before.
                let (name, offset) = match self.segments.last() {
                    Some(before) if first_record.is_none() => (segment_name(before.header.id), before.end),
                    _ => (name, offset),
                };
                return Err(damaged(&name, offset));
            }
            if group.released_below > group.next_record() || group.released_below < self.released_below {
                return Err(damaged(&name, offset));
            }
            first_record = first_record.or(Some(group.first_record));
            last_group = Some(offset);
            self.next_sequence = group.sequence + 1;
            self.next_record = group.next_record();
            self.released_below = group.released_below;
            offset += group.group_bytes() as u64;
        }
        if segment.find_from(offset)?.is_some() {
            return Err(damaged(&name, offset));
        }
        Ok(Surveyed {
            header: segment.header,
            file: segment.file,
            end: offset,
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
#[derive(Debug)]
pub(super) struct Harvest {
    /// The wall clock.
    now: Timestamp,
    /// Of the records that are not released, the one with the highest version of each key.
    pub(super) newest: Vec<Found>,
    /// Where each key is among them.
    places: HashMap<Key, usize, RandomState>,
    /// Of those that are older than the newest of their key, the ones with a request id that is still remembered.
    older: HashMap<Key, BTreeMap<Version, Found>, RandomState>,
    /// The highest version of all records, released ones too.
    pub(super) highest: Option<Version>,
    /// The same without those that are far ahead of the wall clock: what the next process must stamp above.
    pub(super) high_water: Option<Version>,
}

impl Harvest {
    /// No records.
    pub(super) fn new(now: Timestamp) -> Harvest {
        Harvest {
            now,
            newest: Vec::new(),
            places: HashMap::default(),
            older: HashMap::default(),
            highest: None,
            high_water: None,
        }
    }

    /// Takes in the records of a group. `Err` if another program wrote them.
    pub(super) fn add(
        &mut self,
        group: &GroupHeader,
        body: &[u8],
        released_below: u64,
    ) -> Result<(), format::Malformed> {
        let records = format::split_records(group, body)?;
        for (number, place) in (group.first_record..).zip(records) {
            let record = &body[place];
            if number < released_below {
                self.note(format::decode_version(record)?);
                continue;
            }
            let charge = (record.len() + CHARGE_OVERHEAD_BYTES) as u32;
            let write = format::decode_record(record)?;
            self.note(write.entry.version);
            let found = Found { number, charge, write };
            match self.places.entry(found.write.key.clone()) {
                Entry::Vacant(place) => {
                    place.insert(self.newest.len());
                    self.newest.push(found);
                }
                Entry::Occupied(place) => {
                    let standing = &mut self.newest[*place.get()];
                    let (versions, mut older) = ((standing.write.entry.version, found.write.entry.version), found);
                    // Of a record and its copy the copy stands, which lies in the younger segment.
                    if versions.0 <= versions.1 {
                        mem::swap(standing, &mut older);
                    }
                    if versions.0 != versions.1 && is_remembered(&older.write, self.now) {
                        let key = older.write.key.clone();
                        let of_key = self.older.entry(key).or_default();
                        of_key.insert(older.write.entry.version, older);
                    }
                }
            }
        }
        Ok(())
    }

    /// All that a restart brings back: the newest write of each key, then what is older for the sake of its request id.
    pub(super) fn into_found(self) -> Vec<Found> {
        let mut found = self.newest;
        found.extend(self.older.into_values().flat_map(BTreeMap::into_values));
        found
    }

    fn note(&mut self, version: Version) {
        self.highest = self.highest.max(Some(version));
        if !clock::is_far_ahead(version, self.now) {
            self.high_water = self.high_water.max(Some(version));
        }
    }

    /// Reads the records of every segment of a journal that is in order.
    pub(super) fn read(fs: &dyn JournalFs, survey: &Survey, now: Timestamp) -> Result<Harvest, JournalError> {
        let mut harvest = Harvest::new(now);
        for surveyed in &survey.segments {
            if surveyed.last_group.is_none() {
                continue;
            }
            // Read once more rather than held: which records are released is known only now.
            let mut segment = SegmentFile::open(fs, surveyed.header.id)?;
            let mut offset = SEGMENT_HEADER_BYTES as u64;
            while offset < surveyed.end {
                let damaged = || JournalError::Damaged {
                    file: path(fs, &segment_name(surveyed.header.id)),
                    offset,
                };
                let unusable = || JournalError::Unusable {
                    path: path(fs, &segment_name(surveyed.header.id)),
                    why: changed(),
                };
                let (group, body) = segment.group_at(offset)?.ok_or_else(unusable)?;
                harvest
                    .add(&group, body, survey.released_below)
                    .map_err(|_| damaged())?;
                offset += group.group_bytes() as u64;
            }
        }
        Ok(harvest)
    }
}

/// Whether the store may have to be told of the request that a write came with.
fn is_remembered(write: &Write, now: Timestamp) -> bool {
    write.requests.iter().any(|answered| now < answered.request.ends_at)
}
