//! How those who wait for a sync learn of it: one wake-up per serving thread per sync, however many calls wait on it.
//!
//! Owns the protocol between the journal thread and the lanes. The journal thread moves [`Progress`] on and raises the [`Signal`] of each
//! lane that has a record in the group; the lane's task, on the lane's own thread, then wakes those of its waiters whose fate is
//! settled. Does not own what is written. Invariants: nobody is told `Durable` before the sync that covers its group returned; a
//! waiter is registered and swept under one lock, and looks at the progress under it, so none is forgotten; one that is dropped
//! leaves nothing behind. Built a second time over the primitives of a model checker, which tries every interleaving (`model`).

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    sync::PoisonError,
    task::{Context, Poll, Waker},
};

use super::sync::{Arc, AtomicU64, Mutex, MutexGuard, Ordering};

/// What became of a group of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is synced.
    Durable,
    /// Writing or syncing it failed: it may be there after a restart, or not.
    Unknown,
    /// Nothing of it was written, and nothing will be.
    NotWritten,
}

/// How far the journal has come, in sequences of groups.
#[derive(Debug)]
pub(super) struct Progress {
    /// Every group up to this one is synced.
    synced: AtomicU64,
    /// `u64::MAX` until the journal fails; then this group and those after it will never be written, and `synced` moves no more.
    ended: AtomicU64,
}

impl Progress {
    /// Progress up to a group that is synced.
    pub(super) fn new(synced: u64) -> Progress {
        Progress {
            synced: AtomicU64::new(synced),
            ended: AtomicU64::new(u64::MAX),
        }
    }

    /// Tells that every group up to `sequence` is synced.
    pub(super) fn sync_to(&self, sequence: u64) {
        self.synced.store(sequence, Ordering::Release);
    }

    /// Tells that the journal has failed, and that the group `sequence` and those after it will never be written.
    pub(super) fn end_at(&self, sequence: u64) {
        self.ended.store(sequence, Ordering::Release);
    }

    /// What became of a group; `None` while that is open.
    pub(super) fn fate(&self, sequence: u64) -> Option<Fate> {
        // In this order: once it has ended, what is synced is final.
        let ended = self.ended.load(Ordering::Acquire);
        if self.synced.load(Ordering::Acquire) >= sequence {
            Some(Fate::Durable)
        } else if ended == u64::MAX {
            None
        } else if sequence < ended {
            Some(Fate::Unknown)
        } else {
            Some(Fate::NotWritten)
        }
    }
}

/// What the journal thread and one serving thread share.
#[derive(Debug)]
pub(super) struct LaneCore {
    progress: Arc<Progress>,
    /// The newest group that a record of this lane is in. Written under the lock of the group that is gathered.
    joined: AtomicU64,
    waiters: Mutex<Waiters>,
    signal: Mutex<Signal>,
}

/// Who waits, in the order of their tickets.
#[derive(Debug, Default)]
struct Waiters {
    tickets: u64,
    queue: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    sequence: u64,
    waker: Waker,
}

/// Wakes the lane's task.
#[derive(Debug, Default)]
struct Signal {
    raised: bool,
    closed: bool,
    task: Option<Waker>,
}

impl LaneCore {
    pub(super) fn new(progress: Arc<Progress>) -> LaneCore {
        LaneCore {
            progress,
            joined: AtomicU64::new(0),
            waiters: Mutex::default(),
            signal: Mutex::default(),
        }
    }

    /// Notes that a record of this lane is in the group `sequence`.
    pub(super) fn join(&self, sequence: u64) {
        self.joined.store(sequence, Ordering::Release);
    }

    /// Whether a record of this lane may be in the group `sequence`.
    pub(super) fn is_in(&self, sequence: u64) -> bool {
        self.joined.load(Ordering::Acquire) >= sequence
    }

    /// Wakes the lane's task: the progress has moved. Called once per sync, by the journal thread.
    pub(super) fn raise(&self) {
        let task = {
            let mut signal = lock(&self.signal);
            signal.raised = true;
            signal.task.take()
        };
        if let Some(task) = task {
            task.wake();
        }
    }

    /// Ends the lane's task.
    pub(super) fn close(&self) {
        lock(&self.signal).closed = true;
        self.raise();
    }

    /// The lane's task: wakes the waiters whose fate is settled, whenever the signal is raised, until the lane is closed.
    pub(super) async fn run(&self) {
        while poll_fn(|context| self.poll_raised(context)).await {
            self.sweep();
        }
    }

    /// Waits until the fate of the group `sequence` is settled. Cancel-safe: a wait that is given up leaves nothing behind.
    pub(super) fn settled(&self, sequence: u64) -> Settled<'_> {
        Settled {
            lane: self,
            sequence,
            ticket: None,
        }
    }

    /// Whether to go on: true each time that the signal was raised, false once closed.
    fn poll_raised(&self, context: &mut Context<'_>) -> Poll<bool> {
        let mut signal = lock(&self.signal);
        if signal.closed {
            return Poll::Ready(false);
        }
        if signal.raised {
            signal.raised = false;
            return Poll::Ready(true);
        }
        signal.task = Some(context.waker().clone());
        Poll::Pending
    }

    fn sweep(&self) {
        let mut woken = Vec::new();
        {
            let mut waiters = lock(&self.waiters);
            let settled = |waiter: &Waiter| self.progress.fate(waiter.sequence).is_some();
            // Mostly the whole queue, or its older part; one that came out of order is found by the next sweep.
            while let Some(waiter) = waiters.queue.pop_front_if(|waiter| settled(waiter)) {
                woken.push(waiter.waker);
            }
        }
        for waker in woken {
            waker.wake();
        }
    }
}

/// A wait for a group's fate.
#[derive(Debug)]
pub(super) struct Settled<'a> {
    lane: &'a LaneCore,
    sequence: u64,
    /// The place in the queue, once there.
    ticket: Option<u64>,
}

impl Future for Settled<'_> {
    type Output = Fate;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Fate> {
        let lane = self.lane;
        let mut waiters = lock(&lane.waiters);
        if let Some(fate) = lane.progress.fate(self.sequence) {
            return Poll::Ready(fate);
        }
        let waker = context.waker();
        if let Some(ticket) = self.ticket {
            if let Ok(at) = waiters.queue.binary_search_by_key(&ticket, |waiter| waiter.ticket) {
                waiters.queue[at].waker.clone_from(waker);
            }
        } else {
            waiters.tickets += 1;
            let waiter = Waiter {
                ticket: waiters.tickets,
                sequence: self.sequence,
                waker: waker.clone(),
            };
            self.ticket = Some(waiter.ticket);
            waiters.queue.push_back(waiter);
        }
        Poll::Pending
    }
}

impl Drop for Settled<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut waiters = lock(&self.lane.waiters);
        if let Ok(at) = waiters.queue.binary_search_by_key(&ticket, |waiter| waiter.ticket) {
            waiters.queue.remove(at);
        }
    }
}

/// No state that these locks guard is ever left half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
