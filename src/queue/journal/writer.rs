//! What the journal thread does in one turn: a group written and synced, old segments freed, the next one prepared.
//!
//! Owns the order of those, and where groups go. Does not own the loop around it (`thread`), the files (`segments`) nor the waits of
//! others (`shared`). Invariants: one write and one sync per group, then everybody who is in it is told; a segment is freed only when
//! a *synced* group says that nothing in it is needed; whatever room was granted for gathering has a place on disk; any error is final.
//!
//! Space. Segments are freed from the oldest only. Where live records hold the oldest back while space gets short, or while the journal
//! is much larger than what is live in it, they are copied to its end: stragglers travel in ordinary groups, in step with what is
//! appended, or by themselves while appends wait for space.

use std::{io, mem, time::Duration};

use tokio::time::Instant;

use super::{
    Config, Stall,
    config::RESERVE_SEGMENTS,
    format::{self, GROUP_HEADER_BYTES, GroupHeader},
    segments::{Segments, Step},
    shared::{Phase, Shared, Standing, View},
    sync::Arc,
};

/// A journal of at most so many segments is never too large for what is live in it.
const FEW_SEGMENTS: usize = 4;
/// How much larger than what is live it may be otherwise.
const SPARSE_FACTOR: u64 = 4;
/// How many groups are looked at for stragglers in one turn.
const LOOKS_MAX: usize = 1_000;
/// When to try again while the disk is full.
const DISK_FULL_RETRY: Duration = Duration::from_secs(1);

/// The journal's writing end.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    segments: Segments,
    /// What the last synced group says: records below are released.
    told: u64,
    /// Room for gathering that is not granted, for want of a place on disk.
    withheld: usize,
    moving: Moving,
    /// The buffer of the last group, for the next but one.
    buffer: Vec<u8>,
    disk_full: bool,
    limits: Limits,
}

/// Where the search for stragglers has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Moving {
    /// The segment that is searched.
    segment: u64,
    offset: u64,
    /// The number that the first record of the group at `offset` must have.
    first_record: u64,
    /// How many records of that group are done.
    records: usize,
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    segment_bytes: u64,
    segments_max: usize,
    buffer_bytes: usize,
    idle_sync: Duration,
}

/// What to do after a turn.
#[derive(Debug)]
pub(super) enum Turn {
    /// Another one.
    Again,
    /// Nothing, until something is gathered, the phase is no longer `seen`'s, the lowest live number reaches `wake_at`, or `timeout`
    /// has passed.
    Sleep {
        seen: View,
        wake_at: u64,
        timeout: Option<Duration>,
    },
    /// Nothing more: closed, and all is written.
    Done,
}

impl Writer {
    /// A writer behind the last group, which said `told`. Grants no room before its first turn.
    pub(super) fn new(shared: Arc<Shared>, segments: Segments, told: u64, config: &Config) -> Writer {
        Writer {
            shared,
            segments,
            told,
            withheld: config.buffer_bytes(),
            moving: Moving::default(),
            buffer: Vec::new(),
            disk_full: false,
            limits: Limits {
                segment_bytes: config.segment_bytes,
                segments_max: config.segments_max(),
                buffer_bytes: config.buffer_bytes(),
                idle_sync: config.idle_sync,
            },
        }
    }

    /// What it writes for.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Below which number every record is released, as the disk knows.
    pub(super) fn told(&self) -> u64 {
        self.told
    }

    /// One turn. `idle` says that nothing was appended for the time that the last turn asked for.
    ///
    /// # Errors
    /// Any is final: no further turn may be taken.
    pub(super) fn turn(&mut self, idle: bool) -> io::Result<Turn> {
        while self.segments.free(self.told)? {}
        let view = self.shared.view();
        let worked = self.write(view, idle)?;
        if worked {
            while self.segments.free(self.told)? {}
        }
        let closing = view.phase != Phase::Open;
        let step = if closing {
            Step::Nothing
        } else {
            self.segments.prepare()?
        };
        self.disk_full = step == Step::DiskFull;
        self.grant();
        self.stand();
        if worked || step == Step::Made {
            return Ok(Turn::Again);
        }
        if closing {
            return Ok(Turn::Done);
        }
        let to_tell = view.low > self.told;
        let timeout = match (self.disk_full, to_tell) {
            (true, _) => Some(DISK_FULL_RETRY),
            (false, true) => Some(self.limits.idle_sync),
            (false, false) => None,
        };
        let freeable = self.segments.second_record().filter(|second| *second > view.low);
        let wake_at = match (self.withheld > 0, to_tell) {
            (true, _) => freeable.unwrap_or(u64::MAX),
            (false, true) => u64::MAX,
            (false, false) => view.low + 1,
        };
        Ok(Turn::Sleep {
            seen: view,
            wake_at,
            timeout,
        })
    }

    /// Writes a group if there is reason to. Says whether it did anything.
    fn write(&mut self, view: View, idle: bool) -> io::Result<bool> {
        if view.records > 0 {
            if self.is_short(view) && self.segments.is_ready() {
                let budget = (view.gathered_bytes * 4).clamp(self.limits.buffer_bytes / 8, self.limits.buffer_bytes);
                self.move_stragglers(budget)?;
            }
            self.write_group()?;
            return Ok(true);
        }
        let frees = self.segments.second_record().is_some_and(|second| second <= view.low);
        let closing = view.phase != Phase::Open;
        if view.low > self.told && (idle || closing || (frees && self.withheld > 0)) {
            return self.write_empty(frees || closing);
        }
        let can_help = !self.has_place() && self.withheld > 0 && self.segments.is_ready();
        if !can_help || closing {
            return Ok(false);
        }
        let from = self.moving;
        if self.move_stragglers(self.limits.buffer_bytes)? {
            self.write_group()?;
            return Ok(true);
        }
        // It may have looked at many groups in vain, with more to look at.
        Ok(self.moving != from)
    }

    /// Writes and syncs what is gathered, and tells all who are in it.
    fn write_group(&mut self) -> io::Result<()> {
        let (mut gathered, low) = self.shared.take(mem::take(&mut self.buffer));
        let header = gathered.header(low);
        let bytes = header.group_bytes() as u64;
        if self.segments.active().is_none_or(|active| active.room() < bytes) {
            self.segments.rotate(header.first_record);
        }
        let Some(active) = self.segments.active().filter(|active| active.room() >= bytes) else {
            return Err(io::Error::other("there is no place for what was gathered"));
        };
        header.seal(active.header.mark, &mut gathered.buffer);
        kill_point!(JournalBeforeWrite);
        active.file.write_all_at(&gathered.buffer, active.end)?;
        kill_point!(JournalBeforeSync);
        #[cfg(feature = "planted-faults")]
        if crate::planted::is(crate::planted::Fault::AckBeforeSync) {
            self.shared.synced(header.sequence);
        }
        let started = Instant::now();
        active.file.sync()?;
        let metrics = &self.shared.metrics;
        metrics.sync_duration.observe(started.elapsed().as_secs_f64());
        kill_point!(JournalAfterSync);
        active.end += bytes;
        self.told = low;
        self.shared.synced(header.sequence);
        metrics.syncs.inc();
        metrics.group_records.observe(f64::from(header.records));
        metrics.group_bytes.observe(bytes as f64);
        self.withheld += gathered.charge;
        self.buffer = gathered.buffer;
        Ok(())
    }

    /// Writes a group without records, which tells what is released, if there is a place that is not needed for more; says whether there
    /// was. The place kept for the last word is used only when that is `worth` it.
    fn write_empty(&mut self, worth: bool) -> io::Result<bool> {
        let bytes = GROUP_HEADER_BYTES as u64;
        let needed = self.limits.buffer_bytes as u64 + bytes;
        let Some(active) = self.segments.active() else {
            return Ok(false);
        };
        let plenty = active.room() >= needed;
        if !plenty && !self.segments.is_ready() {
            if !worth {
                return Ok(false);
            }
            self.segments.take_last_word();
            if self.segments.active().is_none_or(|active| active.room() < bytes) {
                return Ok(false);
            }
        }
        self.write_group()?;
        Ok(true)
    }

    /// Whether a further buffer has a place on disk that need not be kept for stragglers.
    fn has_place(&mut self) -> bool {
        let beside_reserve = self.segments.len() + 1 + RESERVE_SEGMENTS <= self.limits.segments_max;
        let room = self.segments.active().map_or(0, |active| active.room());
        room >= self.limits.buffer_bytes as u64 || (self.segments.is_ready() && beside_reserve)
    }

    /// Grants the room that there is a place for.
    fn grant(&mut self) {
        if self.withheld > 0 && self.has_place() {
            self.shared.grant(mem::take(&mut self.withheld));
        }
    }

    /// Whether stragglers should be moved along with what is appended.
    fn is_short(&self, view: View) -> bool {
        let segments = self.segments.len();
        let sparse = view.live_bytes * SPARSE_FACTOR < segments as u64 * self.limits.segment_bytes;
        (segments > FEW_SEGMENTS && sparse) || segments + 2 + RESERVE_SEGMENTS > self.limits.segments_max
    }

    /// Gathers copies of live records of the oldest segment, of about `budget` bytes. Says whether there were any.
    fn move_stragglers(&mut self, budget: usize) -> io::Result<bool> {
        let Some(oldest) = self.segments.oldest() else {
            return Ok(false);
        };
        let (id, mark, end) = (oldest.header.id, oldest.header.mark, oldest.end);
        if self.moving.segment != id {
            self.moving = Moving {
                segment: id,
                offset: format::SEGMENT_HEADER_BYTES as u64,
                first_record: oldest.first_record,
                records: 0,
            };
        }
        let mut moved = 0;
        for _ in 0..LOOKS_MAX {
            let Moving { offset, records, .. } = self.moving;
            if offset >= end || moved >= budget {
                break;
            }
            let mut bytes = vec![0; GROUP_HEADER_BYTES];
            oldest.file.read_exact_at(&mut bytes, offset)?;
            // With other numbers it would be skipped, and its segment never freed.
            let expected = |header: &GroupHeader| {
                header.first_record == self.moving.first_record && header.group_bytes() as u64 <= end - offset
            };
            let header = GroupHeader::peek(mark, &bytes).filter(expected).ok_or_else(rotten)?;
            if self
                .shared
                .any_live(header.first_record + records as u64..header.next_record())
            {
                bytes.resize(GROUP_HEADER_BYTES + header.body_bytes as usize, 0);
                let rest = &mut bytes[GROUP_HEADER_BYTES..];
                oldest.file.read_exact_at(rest, offset + GROUP_HEADER_BYTES as u64)?;
                GroupHeader::verify(mark, &bytes).ok_or_else(rotten)?;
                let body = &bytes[GROUP_HEADER_BYTES..];
                let places = format::split_records(&header, body).map_err(|_| rotten())?;
                for (index, place) in places.into_iter().enumerate().skip(records) {
                    if moved >= budget {
                        break;
                    }
                    self.moving.records = index + 1;
                    let record = &body[place];
                    if self.shared.relocate(header.first_record + index as u64, record) {
                        moved += record.len();
                        self.shared.metrics.moved.inc();
                    }
                }
                if self.moving.records < header.records as usize {
                    break;
                }
            }
            self.moving.offset += header.group_bytes() as u64;
            self.moving.first_record = header.next_record();
            self.moving.records = 0;
        }
        Ok(moved > 0)
    }

    /// Shows how the files stand.
    fn stand(&self) {
        let full = self.segments.is_ready() || self.disk_full;
        let stall = match (self.withheld > 0 && full, self.disk_full) {
            (false, _) => None,
            (true, true) => Some(Stall::DiskFull),
            (true, false) => Some(Stall::Full),
        };
        let standing = Standing {
            segments: self.segments.len(),
            bytes: self.segments.bytes(),
            stall,
        };
        let metrics = &self.shared.metrics;
        metrics.segments.set(standing.segments as i64);
        metrics.bytes.set(standing.bytes as i64);
        metrics.live_bytes.set(self.shared.live_bytes() as i64);
        metrics.stalled.set(i64::from(stall.is_some()));
        self.shared.stands(standing);
    }
}

/// What was read back is not what was written.
fn rotten() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "a group of the oldest segment is not as it was written",
    )
}
