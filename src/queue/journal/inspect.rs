//! The journal for people: what lies in it, and the explicit way out of damage that a start refuses.
//!
//! Owns the reading of what is damaged, and the repair. Does not own what is refused (`scan`) nor how records are written (`writer`).
//! Invariants: inspecting changes nothing; repairing deletes no file that a record was in, loses no record that can be read, and can be interrupted
//! anywhere and done again: what was read is on disk anew before the first old file is set aside.

use std::{fmt, io, ops::Range};

use super::{
    Config, JournalError,
    format::{self, GroupHeader, SEGMENT_HEADER_BYTES},
    fs::JournalFs,
    live::Live,
    lock, recover,
    scan::{Found, Harvest, Listing, SegmentFile, Survey},
    segments::{Segments, segment_name},
    shared::{Shared, Start},
    sync::Arc,
    writer::{Turn, Writer},
};
use crate::{clock, model::Version, telemetry::journal::JournalMetrics};

/// How often a journal is looked at again that seems to change.
const LOOKS_MAX: usize = 10;

/// What files that were set aside begin with.
const ASIDE_PREFIX: &str = "damaged-";

/// What lies in a journal.
#[derive(Debug)]
pub struct Inspection {
    /// Its segments, the oldest first.
    pub segments: Vec<SegmentReport>,
    /// Writes that a start would recover: the newest of each key, of what is not released and can be read.
    pub live_writes: usize,
    /// The highest version of all that can be read.
    pub high_water: Option<Version>,
    /// Why a start would refuse it, if it would.
    pub refusal: Option<JournalError>,
}

/// What lies in a segment.
#[derive(Debug, Default)]
pub struct SegmentReport {
    /// The name of its file.
    pub name: String,
    /// The length of its file.
    pub bytes: u64,
    /// Whole groups.
    pub groups: usize,
    /// The sequences of the first and the last of them.
    pub sequences: Option<(u64, u64)>,
    /// Records in them.
    pub records: u64,
    /// Those of them that are not released, superseded ones too.
    pub unreleased: u64,
    /// Where whole groups follow something else.
    pub damaged_at: Vec<u64>,
    /// Why it is no segment. Groups in it may be whole all the same.
    pub fault: Option<&'static str>,
    /// Why the file cannot be read; nothing else is known of it then.
    pub unreadable: Option<String>,
}

/// What a repair did.
#[derive(Debug)]
pub struct Repair {
    /// Why a start refused the journal; `None` if it did not, and nothing was done.
    pub refusal: Option<JournalError>,
    /// Writes that were kept: of what was not released and could be read the newest of each key, and older ones for their request ids.
    pub kept_writes: usize,
    /// The files that were set aside, by their new names.
    pub set_aside: Vec<String>,
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.segments {
            writeln!(f, "{segment}")?;
        }
        let high_water = self.high_water.map_or(0, Version::get);
        writeln!(f, "{} live writes, highest version {high_water}", self.live_writes)?;
        match &self.refusal {
            None => f.write_str("in order"),
            Some(refusal) => write!(f, "{refusal}"),
        }
    }
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(refusal) = &self.refusal else {
            return f.write_str("in order: there was nothing to do");
        };
        writeln!(f, "{refusal}")?;
        for name in &self.set_aside {
            writeln!(f, "set aside: {name}")?;
        }
        write!(f, "repaired: {} live writes kept", self.kept_writes)
    }
}

impl fmt::Display for SegmentReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = &self.unreadable {
            return write!(f, "{}: not readable: {why}", self.name);
        }
        write!(f, "{}: {} bytes", self.name, self.bytes)?;
        if let Some(fault) = self.fault {
            write!(f, ", no segment: {fault}")?;
        }
        if let Some((first, last)) = self.sequences {
            write!(f, ", groups {first} to {last}")?;
        }
        let Self {
            groups,
            records,
            unreleased,
            ..
        } = self;
        write!(f, ", {groups} whole, {records} records, {unreleased} not released")?;
        for offset in &self.damaged_at {
            write!(f, ", damaged at offset {offset}")?;
        }
        Ok(())
    }
}

/// Reads a journal and changes nothing. Takes no lock: what a running gateway writes and frees meanwhile may be missing from the segments,
/// or look torn.
///
/// # Errors
/// The directory cannot be read.
pub fn inspect(fs: &dyn JournalFs) -> Result<Inspection, JournalError> {
    let salvage = Salvage::read(fs)?;
    Ok(Inspection {
        live_writes: salvage.harvest.newest.len(),
        high_water: salvage.harvest.highest,
        segments: salvage.segments,
        refusal: refusal(fs),
    })
}

/// Why a start would refuse a journal, also while it is written: damage stays where it is, and what a running gateway was just writing or
/// freeing is elsewhere at the next look.
fn refusal(fs: &dyn JournalFs) -> Option<JournalError> {
    let mut refusal = check(fs).err()?;
    for _ in 0..LOOKS_MAX {
        let again = check(fs).err()?;
        if again.to_string() == refusal.to_string() {
            return Some(again);
        }
        refusal = again;
    }
    Some(refusal)
}

/// Makes a journal that a start refuses one that it takes: everything in it that can be read and is not released is written to new
/// segments, and all old ones are set aside under names that begin with `damaged-`. Does nothing to a journal that is in order.
///
/// # Errors
/// It is in use, was written by a later version, or cannot be read and written. Nothing is lost then, and it can be repeated.
pub fn repair(fs: Arc<dyn JournalFs>, config: &Config) -> Result<Repair, JournalError> {
    let _lock = lock(&*fs)?;
    let refusal = match check(&*fs) {
        Ok(()) => {
            return Ok(Repair {
                refusal: None,
                kept_writes: 0,
                set_aside: Vec::new(),
            });
        }
        Err(
            refusal @ (JournalError::Damaged { .. } | JournalError::Missing { .. } | JournalError::NotASegment { .. }),
        ) => refusal,
        Err(other) => return Err(other),
    };
    let salvage = Salvage::read(&*fs)?;
    if let Some(obstacle) = salvage.obstacle {
        return Err(obstacle);
    }
    let unusable = |source| JournalError::unusable(&*fs, None, source);
    // One that an interrupted repair left stands in the way.
    recover::remove_spares(&*fs, &salvage.spares).map_err(unusable)?;
    let kept = salvage.harvest.into_found();
    let config = config.not_below(salvage.bytes_max);
    let segments = Segments::first(
        Arc::clone(&fs),
        config.segment_bytes,
        usize::MAX,
        salvage.next_id,
        salvage.next_record,
    );
    let segments = segments.map_err(unusable)?;
    rewrite(
        &kept,
        segments,
        &config,
        salvage.next_sequence,
        salvage.released_below..salvage.next_record,
    )
    .map_err(unusable)?;

    let mut set_aside = Vec::new();
    for segment in &salvage.segments {
        let names = fs.list().map_err(unusable)?;
        let mut name = format!("{ASIDE_PREFIX}{}", segment.name);
        while names.contains(&name) {
            name.push('+');
        }
        fs.rename(&segment.name, &name).map_err(unusable)?;
        // The oldest first and each for itself, so that those that are left always follow each other.
        fs.sync_dir().map_err(unusable)?;
        set_aside.push(name);
    }
    Ok(Repair {
        refusal: Some(refusal),
        kept_writes: kept.len(),
        set_aside,
    })
}

/// Whether a start would take the journal.
fn check(fs: &dyn JournalFs) -> Result<(), JournalError> {
    let survey = Survey::read(fs)?;
    Harvest::read(fs, &survey, clock::wall_time()).map(|_| ())
}

/// Writes and syncs records behind everything that was there, and then, once they are on disk, that the records `before` are released:
/// a repair that is interrupted earlier must find them again.
fn rewrite(kept: &[Found], segments: Segments, config: &Config, sequence: u64, before: Range<u64>) -> io::Result<()> {
    let unbounded = Config {
        bytes_max: u64::MAX,
        ..config.clone()
    };
    // The lowest of them stands for all.
    let stand_in = before.clone().next();
    let start = Start {
        sequence,
        live: Live::restored(before.clone(), stand_in.into_iter().map(|number| (number, 0))),
        // Whatever is kept was in the journal before.
        live_bytes_max: tokio::sync::Semaphore::MAX_PERMITS,
        buffer_bytes: config.buffer_bytes(),
    };
    let shared = Arc::new(Shared::new(start, JournalMetrics::default()));
    let mut writer = Writer::new(Arc::clone(&shared), segments, before.start, &unbounded);
    work(&mut writer)?;
    for found in kept {
        let record = format::encode_record(&found.write);
        let mut room = shared.try_room(record.len());
        if room.is_err() {
            work(&mut writer)?;
            room = shared.try_room(record.len());
        }
        let room = room.map_err(|_| io::ErrorKind::StorageFull)?;
        let pushed = shared.push(&record, room, None);
        pushed.map_err(|_| io::Error::other("the journal was closed"))?;
    }
    work(&mut writer)?;
    if let Some(number) = stand_in {
        shared.release(number, 0);
    }
    shared.close();
    work(&mut writer)?;
    if writer.told() == before.end {
        Ok(())
    } else {
        Err(io::ErrorKind::StorageFull.into())
    }
}

/// Lets the writer do all that there is to do.
fn work(writer: &mut Writer) -> io::Result<()> {
    while let Turn::Again = writer.turn(false)? {}
    Ok(())
}

/// All that can be read of a journal, in order or not.
struct Salvage {
    segments: Vec<SegmentReport>,
    spares: Vec<String>,
    harvest: Harvest,
    /// Why it must not be repaired: a file that a later version wrote, or that cannot be read now.
    obstacle: Option<JournalError>,
    next_id: u64,
    next_sequence: u64,
    next_record: u64,
    released_below: u64,
    /// The length of the longest segment.
    bytes_max: u64,
}

impl Salvage {
    fn read(fs: &dyn JournalFs) -> Result<Salvage, JournalError> {
        let listing = Listing::read(fs)?;
        let mut salvage = Salvage {
            segments: Vec::new(),
            spares: listing.spares,
            harvest: Harvest::new(clock::wall_time()),
            obstacle: None,
            next_id: listing.segments.last().map_or(1, |last| last + 1),
            next_sequence: 1,
            next_record: 1,
            released_below: 1,
            bytes_max: 0,
        };
        // Twice: which records are released is known at the end.
        for id in &listing.segments {
            if let Ok((mut segment, fault)) = SegmentFile::salvage(fs, *id) {
                // What is no segment may have any length.
                if fault.is_none() {
                    salvage.bytes_max = salvage.bytes_max.max(segment.header.bytes);
                }
                // What cannot be read is reported below.
                let _unreadable = for_each_group(&mut segment, |_, group, _| {
                    salvage.released_below = salvage.released_below.max(group.released_below);
                    salvage.next_sequence = salvage.next_sequence.max(group.sequence + 1);
                    salvage.next_record = salvage.next_record.max(group.next_record());
                });
            }
        }
        for id in listing.segments {
            let mut report = SegmentReport {
                name: segment_name(id),
                ..SegmentReport::default()
            };
            if let Err(error) = salvage.read_segment(fs, id, &mut report) {
                report.unreadable = Some(error.to_string());
                salvage.obstacle = Some(error);
            }
            salvage.segments.push(report);
        }
        Ok(salvage)
    }

    /// Reads a segment, and reports it.
    fn read_segment(&mut self, fs: &dyn JournalFs, id: u64, report: &mut SegmentReport) -> Result<(), JournalError> {
        let released_below = self.released_below;
        let (mut segment, fault) = SegmentFile::salvage(fs, id)?;
        (report.bytes, report.fault) = (segment.header.bytes, fault);
        let mut end = SEGMENT_HEADER_BYTES as u64;
        for_each_group(&mut segment, |offset, group, body| {
            if offset != end {
                report.damaged_at.push(end);
            }
            end = offset + group.group_bytes() as u64;
            if self.harvest.add(group, body, released_below).is_err() {
                report.damaged_at.push(offset);
            }
            report.groups += 1;
            report.records += u64::from(group.records);
            report.unreleased += group
                .next_record()
                .saturating_sub(group.first_record.max(released_below));
            let first = report.sequences.map_or(group.sequence, |(first, _)| first);
            report.sequences = Some((first, group.sequence));
        })
    }
}

/// Calls `visit` with the offset of each whole group of a segment, its header and its body, whatever lies between them.
fn for_each_group(
    segment: &mut SegmentFile,
    mut visit: impl FnMut(u64, &GroupHeader, &[u8]),
) -> Result<(), JournalError> {
    let mut offset = SEGMENT_HEADER_BYTES as u64;
    loop {
        if let Some((group, body)) = segment.group_at(offset)? {
            visit(offset, &group, body);
            offset += group.group_bytes() as u64;
        } else if let Some(next) = segment.find_from(offset)? {
            offset = next;
        } else {
            return Ok(());
        }
    }
}
