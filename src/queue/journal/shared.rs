//! What those who append, those who release, and the journal thread share: the group that is being gathered, and what is live.
//!
//! Owns the one lock of the journal, the room that appends wait for, and when the journal thread sleeps. Does not own files (`writer`)
//! nor the waits for a sync (`wake`). Room is granted in two steps, in the order of asking: first of what may be live in the whole
//! journal, then of what may be gathered. The thread grants the latter only while it has a place on disk for it, so that what was
//! gathered can always be written, and a full journal or disk is felt as waiting, before anything is appended.

use std::{
    fmt, mem,
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Notify, Semaphore, SemaphorePermit, TryAcquireError};
use tokio_util::sync::CancellationToken;

use super::{
    Stall,
    format::{CHARGE_OVERHEAD_BYTES, GROUP_HEADER_BYTES, GroupHeader},
    live::Live,
    sync::{Arc, Weak},
    wake::{LaneCore, Progress},
};
use crate::telemetry::journal::JournalMetrics;

/// See the module.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Notified when the sleeping journal thread has something to do.
    work: Condvar,
    pub(super) progress: Arc<Progress>,
    /// What may still become live, in bytes.
    live_room: Semaphore,
    /// What may still be gathered, in bytes. What the journal thread takes away it gives back.
    buffer_room: Semaphore,
    /// At or below this much room for what may become live there is little left.
    live_room_little: usize,
    /// Whether no room is granted, and where it is told that this began.
    stalled: AtomicBool,
    stall_began: Notify,
    /// Cancelled once the journal thread has ended.
    pub(super) ended: CancellationToken,
    pub(super) metrics: JournalMetrics,
    /// The longest charge of a record.
    pub(super) charge_max: usize,
}

#[derive(Debug)]
struct State {
    gathered: Gathered,
    live: Live,
    /// What recovered records hold beyond the room for live ones: their release pays this off first.
    debt: u64,
    phase: Phase,
    lanes: Vec<Weak<LaneCore>>,
    /// While the journal thread sleeps: the lowest live number that wakes it.
    asleep: Option<u64>,
    standing: Standing,
}

/// What may be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Everything.
    Open,
    /// No more appends; what was gathered is still written.
    Closing,
    /// Nothing; all that was gathered is written.
    Closed,
    /// Nothing: writing failed.
    Poisoned,
}

/// How the files stand, as the journal thread last saw them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Standing {
    /// How many segments hold records.
    pub(super) segments: usize,
    /// The length of all files.
    pub(super) bytes: u64,
    /// Why no room is granted, if none is.
    pub(super) stall: Option<Stall>,
}

/// The group that is being gathered.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) sequence: u64,
    pub(super) first_record: u64,
    pub(super) records: u32,
    /// Room for the header, then the body.
    pub(super) buffer: Vec<u8>,
    /// How much room was granted for it.
    pub(super) charge: usize,
}

impl Gathered {
    fn new(sequence: u64, first_record: u64, mut buffer: Vec<u8>) -> Gathered {
        buffer.clear();
        buffer.resize(GROUP_HEADER_BYTES, 0);
        Gathered {
            sequence,
            first_record,
            records: 0,
            buffer,
            charge: 0,
        }
    }

    /// Its header, when records below `released_below` are released.
    pub(super) fn header(&self, released_below: u64) -> GroupHeader {
        GroupHeader {
            sequence: self.sequence,
            first_record: self.first_record,
            released_below,
            records: self.records,
            // The buffer's bounds are a fraction of a segment, which is at most 1 GiB.
            body_bytes: (self.buffer.len() - GROUP_HEADER_BYTES) as u32,
        }
    }
}

/// What the journal thread decides by.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    pub(super) records: u32,
    pub(super) gathered_bytes: usize,
    pub(super) low: u64,
    pub(super) live_bytes: u64,
    pub(super) phase: Phase,
}

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// There may be later.
    Full,
    /// The journal takes no more appends.
    Ended(Phase),
}

/// Room for one write in the journal, claimed before the write is stamped. Given back when dropped.
pub struct Room {
    shared: Arc<Shared>,
    charge: u32,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shared.live_room.add_permits(self.charge as usize);
        self.shared.buffer_room.add_permits(self.charge as usize);
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Room({})", self.charge)
    }
}

/// Where the next group goes, and what stands.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) sequence: u64,
    pub(super) live: Live,
    pub(super) live_bytes_max: usize,
    pub(super) buffer_bytes: usize,
}

impl Shared {
    pub(super) fn new(start: Start, metrics: JournalMetrics) -> Shared {
        let next_record = start.live.next();
        let live_bytes_max = start.live_bytes_max as u64;
        let live_bytes = start.live.bytes();
        Shared {
            progress: Arc::new(Progress::new(start.sequence - 1)),
            live_room: Semaphore::new(live_bytes_max.saturating_sub(live_bytes) as usize),
            live_room_little: start.live_bytes_max / 2,
            stalled: AtomicBool::new(false),
            stall_began: Notify::new(),
            // All of it is the journal thread's to grant.
            buffer_room: Semaphore::new(0),
            ended: CancellationToken::new(),
            metrics,
            charge_max: start.buffer_bytes,
            work: Condvar::new(),
            state: Mutex::new(State {
                gathered: Gathered::new(start.sequence, next_record, Vec::new()),
                debt: live_bytes.saturating_sub(live_bytes_max),
                live: start.live,
                phase: Phase::Open,
                lanes: Vec::new(),
                asleep: None,
                standing: Standing::default(),
            }),
        }
    }

    /// Waits for room for a record of up to `record_bytes`. Cancel-safe: who stops waiting loses the place in line.
    pub(super) async fn room(self: &Arc<Shared>, record_bytes: usize) -> Result<Room, NoRoom> {
        let charge = charge(record_bytes);
        let ended = |_| NoRoom::Ended(self.phase());
        let live = self.live_room.acquire_many(charge).await.map_err(ended)?;
        self.buffer_room.acquire_many(charge).await.map_err(ended)?.forget();
        live.forget();
        Ok(self.claimed(charge))
    }

    /// Room, unless the journal or its disk is full. Waits for what is being written: that takes a moment. Cancel-safe.
    pub(super) async fn room_unless_full(self: &Arc<Shared>, record_bytes: usize) -> Result<Room, NoRoom> {
        let charge = charge(record_bytes);
        let live = self
            .live_room
            .try_acquire_many(charge)
            .map_err(|error| self.none(error))?;
        if let Err(error) = self.buffer_room.try_acquire_many(charge).map(SemaphorePermit::forget) {
            let mut stall_began = pin!(self.stall_began.notified());
            stall_began.as_mut().enable();
            if error == TryAcquireError::Closed || self.stalled.load(Ordering::Acquire) {
                return Err(self.none(error));
            }
            tokio::select! {
                acquired = self.buffer_room.acquire_many(charge) => {
                    acquired.map_err(|_| self.none(TryAcquireError::Closed))?.forget();
                }
                () = stall_began => return Err(NoRoom::Full),
            }
        }
        live.forget();
        Ok(self.claimed(charge))
    }

    /// Room, if there is any now and nobody waits for it.
    pub(super) fn try_room(self: &Arc<Shared>, record_bytes: usize) -> Result<Room, NoRoom> {
        let charge = charge(record_bytes);
        let none = |error| self.none(error);
        let live = self.live_room.try_acquire_many(charge).map_err(none)?;
        self.buffer_room.try_acquire_many(charge).map_err(none)?.forget();
        live.forget();
        Ok(self.claimed(charge))
    }

    fn none(&self, error: TryAcquireError) -> NoRoom {
        match error {
            TryAcquireError::NoPermits => NoRoom::Full,
            TryAcquireError::Closed => NoRoom::Ended(self.phase()),
        }
    }

    fn claimed(self: &Arc<Shared>, charge: u32) -> Room {
        Room {
            shared: Arc::clone(self),
            charge,
        }
    }

    /// Whether little room is left, or none is granted: what is live should leave soon.
    pub(super) fn is_pressed(&self) -> bool {
        self.live_room.available_permits() <= self.live_room_little || self.stalled.load(Ordering::Relaxed)
    }

    /// Whether the longest record would have to wait until others are released.
    pub(super) fn is_full(&self) -> bool {
        self.live_room.available_permits() < self.charge_max
    }

    /// Puts a record in the group that is being gathered: the group's sequence, the record's handle and its charge.
    ///
    /// # Errors
    /// The phase, when there is nothing to append to any more; nothing was appended.
    pub(super) fn push(
        &self,
        record: &[u8],
        mut room: Room,
        lane: Option<&LaneCore>,
    ) -> Result<(u64, u64, u32), Phase> {
        let charge = charge(record.len());
        debug_assert!(
            charge <= room.charge,
            "room is claimed for the longest that the record can be"
        );
        let mut state = self.state.lock();
        if state.phase != Phase::Open {
            return Err(state.phase);
        }
        // What is left of it goes back, once the lock is free.
        room.charge = room.charge.saturating_sub(charge);
        let number = state.live.add(charge);
        let gathered = &mut state.gathered;
        gathered.buffer.extend_from_slice(record);
        gathered.records += 1;
        gathered.charge += charge as usize;
        let sequence = gathered.sequence;
        if let Some(lane) = lane {
            lane.join(sequence);
        }
        if state.asleep.take().is_some() {
            self.work.notify_one();
        }
        drop(state);
        Ok((sequence, number, charge))
    }

    /// Releases a record: a restart need not bring it back. Has no effect on disk until a later group tells so.
    pub(super) fn release(&self, handle: u64, charge: u32) {
        let free = {
            let mut state = self.state.lock();
            state.live.release(handle, charge);
            let low = state.live.low();
            if state.asleep.take_if(|wake_at| low >= *wake_at).is_some() {
                self.work.notify_one();
            }
            let paid = state.debt.min(u64::from(charge));
            state.debt -= paid;
            u64::from(charge) - paid
        };
        self.live_room.add_permits(free as usize);
    }

    /// A lane that takes part from now on.
    pub(super) fn register(&self, lane: &Arc<LaneCore>) {
        let mut state = self.state.lock();
        state.lanes.retain(|lane| lane.strong_count() > 0);
        state.lanes.push(Arc::downgrade(lane));
    }

    /// Ends appends. The journal thread writes what was gathered, and ends.
    pub(super) fn close(&self) {
        {
            let mut state = self.state.lock();
            if state.phase != Phase::Open {
                return;
            }
            state.phase = Phase::Closing;
            if state.asleep.take().is_some() {
                self.work.notify_one();
            }
        }
        self.live_room.close();
        self.buffer_room.close();
    }

    pub(super) fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    pub(super) fn standing(&self) -> Standing {
        self.state.lock().standing
    }

    pub(super) fn live_bytes(&self) -> u64 {
        self.state.lock().live.bytes()
    }

    /// Whether the journal thread has nothing to do.
    #[cfg(test)]
    pub(super) fn is_asleep(&self) -> bool {
        self.state.lock().asleep.is_some()
    }

    // What follows is for the journal thread alone.

    pub(super) fn view(&self) -> View {
        let state = self.state.lock();
        View {
            records: state.gathered.records,
            gathered_bytes: state.gathered.buffer.len() - GROUP_HEADER_BYTES,
            low: state.live.low(),
            live_bytes: state.live.bytes(),
            phase: state.phase,
        }
    }

    /// Takes what was gathered, and the number below which every record is released. The next group is gathered in `buffer`.
    pub(super) fn take(&self, buffer: Vec<u8>) -> (Gathered, u64) {
        let mut state = self.state.lock();
        let next = Gathered::new(state.gathered.sequence + 1, state.live.next(), buffer);
        (mem::replace(&mut state.gathered, next), state.live.low())
    }

    /// Whether any of the records is live under these numbers.
    pub(super) fn any_live(&self, numbers: std::ops::Range<u64>) -> bool {
        let state = self.state.lock();
        numbers.start < state.live.next() && numbers.into_iter().any(|number| state.live.is_live(number))
    }

    /// Puts a copy of a live record, written under `number`, in the group that is being gathered. Says whether it is live.
    pub(super) fn relocate(&self, number: u64, record: &[u8]) -> bool {
        let mut state = self.state.lock();
        if !state.live.is_live(number) {
            return false;
        }
        state.live.relocate(number);
        state.gathered.buffer.extend_from_slice(record);
        state.gathered.records += 1;
        true
    }

    /// Gives back room for gathering.
    pub(super) fn grant(&self, charge: usize) {
        self.buffer_room.add_permits(charge);
    }

    /// Tells that the group `sequence` is synced.
    pub(super) fn synced(&self, sequence: u64) {
        self.progress.sync_to(sequence);
        for lane in self.lanes() {
            if lane.is_in(sequence) {
                lane.raise();
            }
        }
    }

    /// Tells how the files stand.
    pub(super) fn stands(&self, standing: Standing) {
        let stalled = standing.stall.is_some();
        if !self.stalled.swap(stalled, Ordering::AcqRel) && stalled {
            self.stall_began.notify_waiters();
        }
        self.state.lock().standing = standing;
    }

    /// Sleeps until something is gathered, the phase is no longer the one in `seen`, the lowest live number reaches `wake_at`, or
    /// `timeout` has passed; says whether it was the timeout.
    pub(super) fn sleep(&self, seen: View, wake_at: u64, timeout: Option<Duration>) -> bool {
        let mut state = self.state.lock();
        if state.gathered.records > 0 || state.phase != seen.phase || state.live.low() >= wake_at {
            return false;
        }
        state.asleep = Some(wake_at);
        match timeout {
            None => self.work.wait(&mut state),
            Some(timeout) => {
                self.work.wait_for(&mut state, timeout);
            }
        }
        // Whoever woke the thread has taken this down.
        state.asleep.take().is_some()
    }

    /// Tells that everything that was gathered is written, and that the thread ends.
    pub(super) fn finished(&self) {
        self.state.lock().phase = Phase::Closed;
        self.ended.cancel();
    }

    /// Tells that the journal has failed for good, and that the thread ends. The group that was last taken and is not synced may be
    /// there or not; what was gathered since was never written.
    pub(super) fn poison(&self) {
        let unwritten = {
            let mut state = self.state.lock();
            state.phase = Phase::Poisoned;
            state.gathered.sequence
        };
        self.live_room.close();
        self.buffer_room.close();
        self.progress.end_at(unwritten);
        for lane in self.lanes() {
            lane.raise();
        }
        self.metrics.poisoned.set(1);
        self.ended.cancel();
    }

    fn lanes(&self) -> Vec<Arc<LaneCore>> {
        self.state.lock().lanes.iter().filter_map(Weak::upgrade).collect()
    }
}

/// What a record of so many bytes is charged.
fn charge(record_bytes: usize) -> u32 {
    (record_bytes + CHARGE_OVERHEAD_BYTES) as u32
}
