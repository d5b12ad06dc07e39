//! The files of the journal: the segments in use, the next one, and what becomes of old ones.
//!
//! Owns names, order, making, recycling and freeing of files. Does not own what is in a group (`writer`) nor when a record is released
//! (`live`). Invariants: ids are consecutive, so only the oldest segment is ever freed, one at a time, each time synced; a file
//! gets a segment's name only when all of it is allocated and its header is synced; a spare's content means nothing.

use std::{collections::VecDeque, io, sync::Arc};

use rand::RngExt;

use super::{
    format::{GROUP_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader},
    fs::{JournalFile, JournalFs},
};

/// How much of a new file is written at a time, and synced: groups wait for it.
const FILL_BYTES: u64 = 1 << 20;
/// How much of the first one is synced at a time: nobody waits for a group yet, and a start is the sooner done the fewer syncs it takes.
const FIRST_FILL_BYTES: u64 = 16 << 20;

const SEGMENT_PREFIX: &str = "segment-";
const SPARE_PREFIX: &str = "spare-";

/// The name of the file of a segment.
pub(super) fn segment_name(id: u64) -> String {
    format!("{SEGMENT_PREFIX}{id:016x}")
}

/// The id of the segment that a file's name promises; `None` if it promises none.
pub(super) fn segment_id(name: &str) -> Option<u64> {
    let id = u64::from_str_radix(name.strip_prefix(SEGMENT_PREFIX)?, 16).ok()?;
    (segment_name(id) == name).then_some(id)
}

/// Whether a file is one that was freed, or was never finished.
pub(super) fn is_spare(name: &str) -> bool {
    name.starts_with(SPARE_PREFIX)
}

fn spare_name(id: u64) -> String {
    format!("{SPARE_PREFIX}{id:016x}")
}

/// A segment's file.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) header: SegmentHeader,
    pub(super) file: Box<dyn JournalFile>,
    /// Where its next group goes; where its last one ends.
    pub(super) end: u64,
    /// The number of its first record; every one before lies in an older segment.
    pub(super) first_record: u64,
    /// Kept for a last empty group that tells what is released: so that a full disk does not keep a segment from being freed.
    last_word: u64,
}

impl Segment {
    pub(super) fn new(header: SegmentHeader, file: Box<dyn JournalFile>, end: u64, first_record: u64) -> Segment {
        Segment {
            header,
            file,
            end,
            first_record,
            last_word: GROUP_HEADER_BYTES as u64,
        }
    }

    /// How many bytes of groups still fit.
    pub(super) fn room(&self) -> u64 {
        self.header.bytes.saturating_sub(self.end + self.last_word)
    }
}

/// A file that is being made a segment.
#[derive(Debug)]
struct Filling {
    name: String,
    file: Box<dyn JournalFile>,
    /// How much of it is allocated and synced.
    filled: u64,
}

impl Filling {
    /// Writes zeros over the next so many bytes.
    fn allocate(&mut self, bytes: u64) -> io::Result<()> {
        let zeros = vec![0; FILL_BYTES.min(bytes) as usize];
        let mut allocated = 0;
        while allocated < bytes {
            let part = (bytes - allocated).min(FILL_BYTES);
            self.file
                .write_all_at(&zeros[..part as usize], self.filled + allocated)?;
            allocated += part;
        }
        Ok(())
    }
}

/// The outcome of a step towards the next segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// There is a next segment, or there may be none: nothing to do.
    Nothing,
    /// A step was made.
    Made,
    /// The disk is full. Nothing is lost; it can be tried again.
    DiskFull,
}

/// All segments.
#[derive(Debug)]
pub(super) struct Segments {
    fs: Arc<dyn JournalFs>,
    segment_bytes: u64,
    /// How many files there may be.
    files_max: usize,
    /// Those that hold records, the oldest first; the last one is written. Never empty.
    in_use: VecDeque<Segment>,
    /// Empty ones for later. Mostly one.
    ready: VecDeque<Segment>,
    filling: Option<Filling>,
    /// Names of files to be recycled.
    spares: Vec<String>,
    next_id: u64,
}

impl Segments {
    /// Segments as recovery found them: those in use, of which there is at least one, and the empty ones behind them.
    pub(super) fn new(
        fs: Arc<dyn JournalFs>,
        segment_bytes: u64,
        files_max: usize,
        in_use: VecDeque<Segment>,
        ready: VecDeque<Segment>,
    ) -> Segments {
        let next_id = ready.back().or(in_use.back()).map_or(1, |last| last.header.id + 1);
        Segments {
            fs,
            segment_bytes,
            // A bound that was lowered below what is there takes effect as that is freed.
            files_max: files_max.max(in_use.len() + ready.len() + 1),
            in_use,
            ready,
            filling: None,
            spares: Vec::new(),
            next_id,
        }
    }

    /// A journal's first segment, on an empty directory, or behind segments that are not read any more.
    ///
    /// # Errors
    /// It could not be made.
    pub(super) fn first(
        fs: Arc<dyn JournalFs>,
        segment_bytes: u64,
        files_max: usize,
        id: u64,
        first_record: u64,
    ) -> io::Result<Segments> {
        let mut segments = Segments::new(fs, segment_bytes, files_max, VecDeque::new(), VecDeque::new());
        segments.next_id = id;
        while segments.ready.is_empty() {
            if segments.prepare_by(FIRST_FILL_BYTES)? == Step::DiskFull {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        segments.rotate(first_record);
        Ok(segments)
    }

    /// The segment that is written.
    pub(super) fn active(&mut self) -> Option<&mut Segment> {
        self.in_use.back_mut()
    }

    /// The oldest segment, unless it is the one that is written.
    pub(super) fn oldest(&self) -> Option<&Segment> {
        if self.in_use.len() > 1 {
            self.in_use.front()
        } else {
            None
        }
    }

    /// The number from which on no record lies in the oldest segment, unless that is the one that is written.
    pub(super) fn second_record(&self) -> Option<u64> {
        self.in_use.get(1).map(|second| second.first_record)
    }

    /// How many hold records.
    pub(super) fn len(&self) -> usize {
        self.in_use.len()
    }

    /// The length of all files.
    pub(super) fn bytes(&self) -> u64 {
        let segments = self.in_use.iter().chain(&self.ready);
        let filled = self.filling.as_ref().map_or(0, |filling| filling.filled);
        segments.map(|segment| segment.header.bytes).sum::<u64>()
            + filled
            + self.spares.len() as u64 * self.segment_bytes
    }

    /// Whether there is a next segment.
    pub(super) fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Goes on to the next segment, whose first record will be `first_record`. Says whether there was one.
    pub(super) fn rotate(&mut self, first_record: u64) -> bool {
        let Some(mut next) = self.ready.pop_front() else {
            return false;
        };
        next.first_record = first_record;
        self.in_use.push_back(next);
        true
    }

    /// Takes the room that is kept for the last word of the segment that is written.
    pub(super) fn take_last_word(&mut self) {
        if let Some(active) = self.in_use.back_mut() {
            active.last_word = 0;
        }
    }

    /// Makes a step towards the next segment: opens a spare or makes a file, allocates some of it, gives it its header and name.
    ///
    /// # Errors
    /// All but a full disk before the file is a segment.
    pub(super) fn prepare(&mut self) -> io::Result<Step> {
        self.prepare_by(FILL_BYTES)
    }

    /// The same, with so many bytes to a step.
    fn prepare_by(&mut self, step_bytes: u64) -> io::Result<Step> {
        if self.is_ready() || self.in_use.len() >= self.files_max {
            return Ok(Step::Nothing);
        }
        let Some(mut filling) = self.filling.take() else {
            return self.begin();
        };
        if filling.filled < self.segment_bytes && !self.spares.is_empty() {
            // A spare needs no more of a disk that may be full.
            self.discard(filling)?;
            return Ok(Step::Made);
        }
        if filling.filled < self.segment_bytes {
            let chunk = step_bytes.min(self.segment_bytes - filling.filled);
            match filling.allocate(chunk) {
                Err(error) if is_full(&error) => {
                    self.filling = Some(filling);
                    return Ok(Step::DiskFull);
                }
                written => written?,
            }
            match filling.file.sync() {
                Err(error) if is_full(&error) => {
                    // Another sync of the file would prove nothing.
                    self.discard(filling)?;
                    return Ok(Step::DiskFull);
                }
                synced => synced?,
            }
            filling.filled += chunk;
            self.filling = Some(filling);
            return Ok(Step::Made);
        }
        let header = SegmentHeader {
            id: self.next_id,
            mark: rand::rng().random(),
            bytes: self.segment_bytes,
        };
        let written = filling.file.write_all_at(&header.encode(), 0);
        match written.and_then(|()| filling.file.sync()) {
            Err(error) if is_full(&error) => {
                self.discard(filling)?;
                return Ok(Step::DiskFull);
            }
            written => written?,
        }
        kill_point!(SegmentBeforeRename);
        self.fs.rename(&filling.name, &segment_name(header.id))?;
        kill_point!(SegmentRenamed);
        self.fs.sync_dir()?;
        self.next_id += 1;
        self.ready
            .push_back(Segment::new(header, filling.file, SEGMENT_HEADER_BYTES as u64, 0));
        Ok(Step::Made)
    }

    /// Frees the oldest segment if it holds no record at or above `released_below`, which is synced. Says whether it did.
    ///
    /// # Errors
    /// Its file may still be there, or not.
    pub(super) fn free(&mut self, released_below: u64) -> io::Result<bool> {
        if self.second_record().is_none_or(|second| second > released_below) {
            return Ok(false);
        }
        let Some(oldest) = self.in_use.pop_front() else {
            return Ok(false);
        };
        let name = segment_name(oldest.header.id);
        let files = self.in_use.len() + self.ready.len() + usize::from(self.filling.is_some()) + self.spares.len();
        if self.spares.is_empty() && files < self.files_max && oldest.header.bytes == self.segment_bytes {
            let spare = spare_name(oldest.header.id);
            self.fs.rename(&name, &spare)?;
            self.spares.push(spare);
        } else {
            self.fs.remove(&name)?;
        }
        kill_point!(SegmentFreed);
        // Before anything is written to it under its new name, and before the next one is freed.
        self.fs.sync_dir()?;
        Ok(true)
    }

    /// Takes a file that is to become a segment.
    fn begin(&mut self) -> io::Result<Step> {
        let filling = match self.spares.pop() {
            Some(name) => Filling {
                file: self.fs.open(&name)?,
                filled: self.segment_bytes,
                name,
            },
            None => {
                let name = spare_name(self.next_id);
                let file = match self.fs.create(&name) {
                    Err(error) if is_full(&error) => return Ok(Step::DiskFull),
                    made => made?,
                };
                Filling { name, file, filled: 0 }
            }
        };
        self.filling = Some(filling);
        Ok(Step::Made)
    }

    /// Gives up a file that was to become a segment.
    fn discard(&self, filling: Filling) -> io::Result<()> {
        drop(filling.file);
        self.fs.remove(&filling.name)
    }
}

/// Whether the disk, or what may be used of it, is full.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
