//! Recovery: from what a process left behind to a journal that can be appended to.
//!
//! Owns the order in which files are changed: only once everything was read and found in order, and so that a crash at any point leaves
//! what the next recovery reads alike. Does not own the judgement of what was read (`scan`). Invariants: a torn tail is cut and
//! synced before anything is appended; everything that is recovered is on disk, not only in the page cache of a machine that an
//! earlier process ran on.

use std::{collections::VecDeque, io, time::Duration};

use tokio::time::Instant;

use super::{
    Config, JournalError,
    format::{GroupHeader, SEGMENT_HEADER_BYTES},
    fs::JournalFs,
    live::Live,
    scan::{Found, Harvest, Survey, Surveyed, changed},
    segments::{Segment, Segments, segment_name},
    shared::{Shared, Start},
    sync::Arc,
    writer::Writer,
};
use crate::{clock, model::Version, telemetry::journal::JournalMetrics};

/// How much of a torn group is cut off, from its beginning. Without its header it is never again a group, whatever is written over the
/// rest of it; what an earlier life of the file left there is as harmless. To cut more of it would mean to rewrite half of every recycled
/// file at every start.
const CUT_BYTES: u64 = 4096;

/// A journal that was recovered, not yet run.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) writer: Writer,
    pub(super) found: Vec<Found>,
    /// See [`Harvest::high_water`].
    pub(super) high_water: Option<Version>,
    pub(super) took: Duration,
    pub(super) bytes: u64,
}

/// Recovers the journal of a directory that this process has locked.
pub(super) fn open(fs: Arc<dyn JournalFs>, config: &Config, metrics: JournalMetrics) -> Result<Opened, JournalError> {
    let started = Instant::now();
    // What an earlier process renamed may still be undone by a crash, and what follows builds upon it.
    fs.sync_dir()
        .map_err(|source| JournalError::unusable(&*fs, None, source))?;
    let survey = Survey::read(&*fs)?;
    let harvest = Harvest::read(&*fs, &survey, clock::wall_time())?;

    remove_spares(&*fs, &survey.spares).map_err(|source| JournalError::unusable(&*fs, None, source))?;
    let Survey {
        next_sequence,
        next_record,
        released_below,
        ..
    } = survey;
    let mut segments = survey.segments;
    let active = segments
        .iter()
        .rposition(|segment| segment.last_group.is_some())
        .unwrap_or(0);
    for (index, segment) in segments.iter_mut().enumerate().skip(active) {
        let name = segment_name(segment.header.id);
        settle(segment, index == active).map_err(|source| JournalError::unusable(&*fs, Some(&name), source))?;
    }
    let bytes = segments.iter().map(|segment| segment.header.bytes).sum();
    let config = &config.not_below(segments.iter().map(|segment| segment.header.bytes).max().unwrap_or(0));
    let segments = arrange(&fs, config, segments, active, next_record)
        .map_err(|source| JournalError::unusable(&*fs, None, source))?;

    let high_water = harvest.high_water;
    let found = harvest.into_found();
    let live = found.iter().map(|found| (found.number, found.charge));
    let start = Start {
        sequence: next_sequence,
        live: Live::restored(released_below..next_record, live),
        live_bytes_max: config.live_bytes_max(),
        buffer_bytes: config.buffer_bytes(),
    };
    let took = started.elapsed();
    metrics.recovery_duration.set(took.as_secs_f64());
    let shared = Arc::new(Shared::new(start, metrics));
    Ok(Opened {
        writer: Writer::new(shared, segments, released_below, config),
        found,
        high_water,
        took,
        bytes,
    })
}

/// Spares mean nothing, and one of a process that died may not be allocated whole.
pub(super) fn remove_spares(fs: &dyn JournalFs, spares: &[String]) -> io::Result<()> {
    for spare in spares {
        fs.remove(spare)?;
    }
    if spares.is_empty() { Ok(()) } else { fs.sync_dir() }
}

/// Makes the end of a segment fit for appending: no torn group there, and everything before it on disk.
fn settle(segment: &mut Surveyed, is_active: bool) -> io::Result<()> {
    #[cfg(feature = "planted-faults")]
    if crate::planted::is(crate::planted::Fault::TailNotCut) {
        let mut data = vec![0; segment.header.bytes as usize];
        segment.file.read_exact_at(&mut data, 0)?;
        let used = data
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last as u64 + 1);
        segment.end = segment.end.max(used.next_multiple_of(8)).min(segment.header.bytes);
        return Ok(());
    }
    let mut tail = vec![0; CUT_BYTES.min(segment.header.bytes.saturating_sub(segment.end)) as usize];
    segment.file.read_exact_at(&mut tail, segment.end)?;
    let torn = tail.iter().any(|byte| *byte != 0);
    if torn {
        tail.fill(0);
        segment.file.write_all_at(&tail, segment.end)?;
    }
    if let Some(at) = segment.last_group {
        // The last group may never have been synced, or its sync may have failed: then the system counts its pages as written, and
        // a sync alone would do nothing.
        let mut group = vec![0; (segment.end - at) as usize];
        segment.file.read_exact_at(&mut group, at)?;
        GroupHeader::verify(segment.header.mark, &group).ok_or_else(changed)?;
        segment.file.write_all_at(&group, at)?;
    }
    if torn || is_active {
        segment.file.sync()?;
    }
    Ok(())
}

/// The segments up to the active one are in use, the others are for later. Makes a first one if there is none.
fn arrange(
    fs: &Arc<dyn JournalFs>,
    config: &Config,
    mut surveyed: Vec<Surveyed>,
    active: usize,
    next_record: u64,
) -> io::Result<Segments> {
    // An empty one of another size may be too short for a group. The last first, so that none is ever missing between two.
    while surveyed.len() > active + 1
        && let Some(last) = surveyed.pop_if(|last| last.header.bytes != config.segment_bytes)
    {
        fs.remove(&segment_name(last.header.id))?;
        fs.sync_dir()?;
    }
    if surveyed.is_empty() {
        return Segments::first(
            Arc::clone(fs),
            config.segment_bytes,
            config.segments_max(),
            1,
            next_record,
        );
    }
    let mut in_use = VecDeque::new();
    let mut ready = VecDeque::new();
    let mut first_record = next_record;
    for (index, segment) in surveyed.into_iter().enumerate().rev() {
        if index > active {
            ready.push_front(Segment::new(
                segment.header,
                segment.file,
                SEGMENT_HEADER_BYTES as u64,
                0,
            ));
        } else {
            // One without a group holds no record: the next one's first is the first that is not older.
            first_record = segment.first_record.unwrap_or(first_record);
            in_use.push_front(Segment::new(segment.header, segment.file, segment.end, first_record));
        }
    }
    Ok(Segments::new(
        Arc::clone(fs),
        config.segment_bytes,
        config.segments_max(),
        in_use,
        ready,
    ))
}
