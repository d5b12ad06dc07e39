//! Faults that are planted on purpose, to prove that the proofs can fail, points at which the process kills itself, and a machine whose clock is
//! set apart. Compiled into no build but the one that asks for them.
//!
//! Owns their names and which are chosen. Each stands in one line of the place where it does harm. At most one fault and one kill point
//! are chosen in a process, before anything runs; a test chooses a fault for its own thread.

#[cfg(test)]
use std::cell::Cell;
use std::{
    process,
    sync::{
        OnceLock,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `ack-before-sync`: the journal tells its callers before fdatasync.
    AckBeforeSync,
    /// `tail-not-cut`: the journal appends behind a torn tail instead of in its place.
    TailNotCut,
    /// `no-version-guard`: PostgreSQL's upsert lets an older version replace a newer one.
    NoVersionGuard,
    /// `delete-without-tombstone`: a delete leaves no row in PostgreSQL.
    DeleteWithoutTombstone,
    /// `batch-dead-lettered`: one row that the store refuses takes its whole batch with it to the dead letters.
    BatchDeadLettered,
    /// `checkpoint-before-commit`: the drain releases a write's record in the journal before its COMMIT was answered.
    CheckpointBeforeCommit,
    /// `fill-without-token`: what a load found lands in L1 and in Redis whatever became of its token, and whatever stands there.
    FillWithoutToken,
    /// `fill-by-version-only`: it lands without its token over what is older, and where nothing stands.
    FillByVersionOnly,
    /// `retry-under-new-version`: a write-through of which nobody knows whether it was committed is tried again under another version.
    RetryUnderNewVersion,
    /// `keep-memory-on-lost-channel`: L1 keeps what it holds when messages were missed.
    KeepMemoryOnLostChannel,
    /// `refresh-over-pending`: a refresh lands in L1 what the store holds, whatever is pending and whatever stands there.
    RefreshOverPending,
    /// `epoch-not-checked`: copies are read and filled under another epoch as if it had not moved, and L1 keeps what it holds.
    EpochNotChecked,
    /// `publish-before-commit`: a write-through is in Redis before the store has it.
    PublishBeforeCommit,
    /// `request-forgotten`: a write-behind write that a newer one of its key takes the place of leaves its request id behind.
    RequestForgotten,
    /// `request-not-looked-up`: PostgreSQL decides without looking up which requests were applied, and remembers none.
    RequestNotLookedUp,
    /// `decided-unlocked`: PostgreSQL decides about rows that others may change meanwhile.
    DecidedUnlocked,
    /// `decided-before-pending`: what the store decides does not wait for what is pending.
    DecidedBeforePending,
    /// `repeat-not-told`: a request that the store has applied before is answered, and the caches are left as they are.
    RepeatNotTold,
}

const FAULTS: [(&str, Fault); 18] = [
    ("ack-before-sync", Fault::AckBeforeSync),
    ("tail-not-cut", Fault::TailNotCut),
    ("no-version-guard", Fault::NoVersionGuard),
    ("delete-without-tombstone", Fault::DeleteWithoutTombstone),
    ("batch-dead-lettered", Fault::BatchDeadLettered),
    ("checkpoint-before-commit", Fault::CheckpointBeforeCommit),
    ("fill-without-token", Fault::FillWithoutToken),
    ("fill-by-version-only", Fault::FillByVersionOnly),
    ("retry-under-new-version", Fault::RetryUnderNewVersion),
    ("keep-memory-on-lost-channel", Fault::KeepMemoryOnLostChannel),
    ("refresh-over-pending", Fault::RefreshOverPending),
    ("epoch-not-checked", Fault::EpochNotChecked),
    ("publish-before-commit", Fault::PublishBeforeCommit),
    ("request-forgotten", Fault::RequestForgotten),
    ("request-not-looked-up", Fault::RequestNotLookedUp),
    ("decided-unlocked", Fault::DecidedUnlocked),
    ("decided-before-pending", Fault::DecidedBeforePending),
    ("repeat-not-told", Fault::RepeatNotTold),
];

/// A point at which the process may end as abruptly as by SIGKILL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillPoint {
    /// `journal-before-write`: a group is gathered, and none of it written.
    JournalBeforeWrite,
    /// `journal-before-sync`: a group is written, not synced.
    JournalBeforeSync,
    /// `journal-after-sync`: a group is synced, and nobody was told.
    JournalAfterSync,
    /// `segment-before-rename`: the next segment is filled and has its header, under the name of a spare.
    SegmentBeforeRename,
    /// `segment-renamed`: it has its name, and the directory is not synced.
    SegmentRenamed,
    /// `segment-freed`: an old segment has lost its name, and the directory is not synced.
    SegmentFreed,
    /// `write-appended`: a write is durable in the journal, and published nowhere.
    WriteAppended,
    /// `write-published`: it is in Redis too, and not pending.
    WritePublished,
    /// `write-pending`: it is pending too, and its caller was not answered.
    WritePending,
    /// `decision-committed`: what the store decides is committed, and no tier above it knows.
    DecisionCommitted,
    /// `drain-before-commit`: a batch is taken, and not sent to the store.
    DrainBeforeCommit,
    /// `drain-committed`: the store has answered, and the batch is still pending.
    DrainCommitted,
    /// `recovered`: the journal is read and what it held is pending; the port is closed.
    Recovered,
    /// `stop-before-drain`: asked to stop, calls have ended, and the queue begins to drain.
    StopBeforeDrain,
    /// `stop-drained`: the drain is over, and the journal was not closed.
    StopDrained,
}

const KILL_POINTS: [(&str, KillPoint); 15] = [
    ("journal-before-write", KillPoint::JournalBeforeWrite),
    ("journal-before-sync", KillPoint::JournalBeforeSync),
    ("journal-after-sync", KillPoint::JournalAfterSync),
    ("segment-before-rename", KillPoint::SegmentBeforeRename),
    ("segment-renamed", KillPoint::SegmentRenamed),
    ("segment-freed", KillPoint::SegmentFreed),
    ("write-appended", KillPoint::WriteAppended),
    ("write-published", KillPoint::WritePublished),
    ("write-pending", KillPoint::WritePending),
    ("decision-committed", KillPoint::DecisionCommitted),
    ("drain-before-commit", KillPoint::DrainBeforeCommit),
    ("drain-committed", KillPoint::DrainCommitted),
    ("recovered", KillPoint::Recovered),
    ("stop-before-drain", KillPoint::StopBeforeDrain),
    ("stop-drained", KillPoint::StopDrained),
];

static CHOSEN: OnceLock<Fault> = OnceLock::new();

/// How far the machine's clock is taken to be set apart, in milliseconds.
static CLOCK_OFFSET: AtomicI64 = AtomicI64::new(0);

/// The chosen kill point, and how many times it is still to be reached.
static FATAL: OnceLock<(KillPoint, AtomicU64)> = OnceLock::new();

#[cfg(test)]
thread_local! {
    static CHOSEN_HERE: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Chooses the fault of this thread.
#[cfg(test)]
pub(crate) fn choose_here(fault: Option<Fault>) {
    CHOSEN_HERE.set(fault);
}

/// Chooses the fault of this process by its name.
///
/// # Errors
/// There is none of that name, or one is chosen already.
pub fn choose(name: &str) -> Result<(), String> {
    let fault = named(&FAULTS, name).ok_or_else(|| format!("there is no planted fault of the name {name}"))?;
    CHOSEN
        .set(fault)
        .map_err(|_| "a planted fault is chosen already".to_owned())
}

/// Chooses the point at which this process kills itself: `NAME`, or `NAME:N` for the Nth time that it is reached.
///
/// # Errors
/// There is none of that name, N is not a positive number, or one is chosen already.
pub fn choose_kill_point(text: &str) -> Result<(), String> {
    let (name, times) = text.split_once(':').unwrap_or((text, "1"));
    let point = named(&KILL_POINTS, name).ok_or_else(|| format!("there is no kill point of the name {name}"))?;
    let times: u64 = times.parse().unwrap_or(0);
    if times == 0 {
        return Err(format!(
            "{text}: after the colon stands how many times the point is reached"
        ));
    }
    FATAL
        .set((point, AtomicU64::new(times)))
        .map_err(|_| "a kill point is chosen already".to_owned())
}

/// Sets the machine's clock ahead, or (negative) back, by milliseconds, as this process sees it. To be called before anything looks at it.
pub fn set_clock_offset(millis: i64) {
    CLOCK_OFFSET.store(millis, Ordering::Relaxed);
}

/// How far the machine's clock is set apart, in milliseconds.
pub(crate) fn clock_offset() -> i64 {
    CLOCK_OFFSET.load(Ordering::Relaxed)
}

fn named<T: Copy>(list: &[(&str, T)], name: &str) -> Option<T> {
    list.iter().find(|(known, _)| *known == name).map(|(_, it)| *it)
}

/// Whether this fault is chosen.
pub(crate) fn is(fault: Fault) -> bool {
    #[cfg(test)]
    if CHOSEN_HERE.get() == Some(fault) {
        return true;
    }
    CHOSEN.get() == Some(&fault)
}

/// Ends the process, if this is the chosen kill point and it was reached often enough: at once, with all its threads, and with nothing
/// written or tidied up, as SIGKILL would.
pub(crate) fn reach(point: KillPoint) {
    if let Some((fatal, left)) = FATAL.get()
        && *fatal == point
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        process::abort();
    }
}
