//! The journal: what makes a write-behind write survive this process, this machine's crash, and a loss of power.
//!
//! Limits first: its size, and what of it may be live ([`Config`]); a write claims [`Room`] before it is anything. Then the way of a
//! write: [`Journal::append`] gathers its record with all others of the moment into a group, the journal
//! thread writes and syncs that (`writer`), and wakes each serving thread once (`wake`). It answers with a [`Record`]: until that is
//! released, a restart brings the write back. Owns the files, the format and the thread; does not own which version of a key counts
//! nor when a write is in the store (its caller, who releases the record then). Invariants: an append that was answered is on disk;
//! what was never appended is never recovered; what was released, and told so on disk, is not recovered either.
//!
//! In reading order: this file, `format` (the bytes), `shared` and `live` (the state), `writer` (the algorithm), `segments` and [`fs`] (the
//! files), `wake` and `thread`, `scan` and `recover` (the restart), [`inspect`] (for people).
//!
//! Any error of a write or a sync ends the journal for good (*poisoned*): what the system's memory holds of a file whose sync failed
//! says nothing about the disk, so nothing more is promised until a restart has read the files again.

mod config;
mod format;
pub mod fs;
pub mod inspect;
mod live;
mod recover;
mod scan;
mod segments;
mod shared;
#[cfg(test)]
pub mod sim;
#[cfg(test)]
mod tests;
mod thread;
mod wake;
mod writer;

/// The primitives that `wake` is built on, so that it can be built on others, too.
mod sync {
    pub(super) use std::sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicU64, Ordering},
    };
}

pub use self::{config::Config, shared::Room};

use std::{fmt, io, time::Duration};

use tokio::time::{Instant, timeout_at};

use self::{
    config::RECORD_FRAME_BYTES,
    format::CHARGE_OVERHEAD_BYTES,
    fs::JournalFs,
    scan::Found,
    shared::{NoRoom, Phase, Shared},
    sync::Arc,
    wake::{Fate, LaneCore},
};
use crate::{
    error::{Error, ErrorKind},
    model::{Version, Write},
    telemetry::journal::JournalMetrics,
};

/// Why a journal cannot be opened. Each is one line that names the place; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process has it.
    #[error("the journal {0} is in use by another process")]
    InUse(String),
    /// Its directory or a file of it cannot be read or written.
    #[error("the journal cannot be used: {path}: {why}")]
    Unusable {
        /// The directory or the file.
        path: String,
        /// Why. Not a source: whoever prints the chain of causes would say it twice.
        why: io::Error,
    },
    /// A file has the name of a segment and is none.
    #[error("{file} is no segment of a journal: {why}; put it back as it was, or run `tidegate journal repair`")]
    NotASegment {
        /// The file.
        file: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A later version of the gateway wrote it.
    #[error("{file} has format {format}, which this version cannot read: start the version that wrote it")]
    Newer {
        /// The file.
        file: String,
        /// Its format.
        format: u32,
    },
    /// There is damage, with whole groups behind it: records that were acknowledged are lost or unreadable.
    #[error(
        "{file} is damaged at offset {offset}, and whole groups follow: acknowledged writes may be lost; restore the file, or run \
         `tidegate journal repair` to go on with what is readable"
    )]
    Damaged {
        /// The file.
        file: String,
        /// Where the first group that is missing or not whole should begin.
        offset: u64,
    },
    /// A segment is not there, and holds records that were not released.
    #[error("{file} is missing: put it back, or run `tidegate journal repair` to go on with what is readable")]
    Missing {
        /// The file.
        file: String,
    },
    /// A thread could not be started.
    #[error("the journal's thread cannot be started: {0}")]
    NoThread(io::Error),
}

impl JournalError {
    /// Whether it is about what lies in the directory, so that trying again does not help.
    pub fn is_of_content(&self) -> bool {
        match self {
            JournalError::NotASegment { .. }
            | JournalError::Newer { .. }
            | JournalError::Damaged { .. }
            | JournalError::Missing { .. } => true,
            JournalError::InUse(_) | JournalError::Unusable { .. } | JournalError::NoThread(_) => false,
        }
    }

    fn unusable(fs: &dyn JournalFs, name: Option<&str>, why: io::Error) -> JournalError {
        JournalError::Unusable {
            path: name.map_or_else(|| fs.name(), |name| scan::path(fs, name)),
            why,
        }
    }
}

/// What an earlier process left in the journal.
#[derive(Debug)]
pub struct Recovered {
    /// The newest write of each key that was not released, with its record; then the older ones with a request id that is still remembered.
    /// Whether the store has them by now is not known.
    pub writes: Vec<(Write, Record)>,
    /// The highest version of all that was read, released or not, but for those far ahead of the wall clock
    /// ([`is_far_ahead`](crate::clock::is_far_ahead)): the clock must start above it. Those, as from a machine whose clock was wrong, would
    /// carry every later stamp along; each is among `writes` until the store has it, so a new write of its key is stamped above it.
    ///
    /// Where the wall clock was set back by more than a minute since the earlier process, this misses versions that were in order then. The
    /// store's reservation covers those up to its last renewal. Those stamped after it, in an outage, are covered key by key: the store
    /// has not taken them, so the newest of each key is among `writes`. What rested on memory alone is not covered.
    pub high_water: Option<Version>,
    /// How long reading took.
    pub took: Duration,
    /// The length of the files that were read.
    pub bytes: u64,
}

/// Why appends wait for space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stall {
    /// The journal is as large as it may be, and everything in it is needed: the store must take writes.
    Full,
    /// The disk is full before the journal is.
    DiskFull,
}

/// What the journal can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It takes writes.
    Up,
    /// It is as large as it may be, and the longest write would have to wait until the store has taken others.
    Full,
    /// Its disk is full: writes wait for space there.
    DiskFull,
    /// Writing or syncing failed: it takes no write until a restart.
    Failed,
}

/// How full the journal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalStats {
    /// The length of its files, in bytes.
    pub bytes: u64,
    /// Its segments that hold records.
    pub segments: usize,
    /// What the records that are not released are charged, in bytes.
    pub live_bytes: u64,
    /// Why appends wait for space, if they do.
    pub stall: Option<Stall>,
}

/// A handle on the journal. Cheap to clone; usable from any thread. When the last one is dropped the journal closes by itself, without
/// anybody waiting for it.
#[derive(Clone)]
pub struct Journal {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// The place of one serving thread in the journal's wake-ups. Its task runs on the runtime that made it, until the last clone is
/// dropped. A wait that uses the lane of another thread is correct, and costs a wake-up of its own.
#[derive(Clone)]
pub struct Lane {
    core: Arc<OpenLane>,
}

struct OpenLane(Arc<LaneCore>);

impl Drop for OpenLane {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A record on disk: a restart brings its write back, until the record is [released](Record::release). Dropping it releases nothing. So
/// whatever is dropped because a start failed, or the process gives up, comes back with the next start.
#[must_use = "a record that is not released is recovered by every start"]
pub struct Record {
    shared: Arc<Shared>,
    number: u64,
    charge: u32,
}

impl Record {
    /// Its write is in the store, or superseded by a durable one of its key, or was never answered: a restart need not bring it back. That
    /// is told on disk by the next group, or after a lull; until then, and wherever a crash comes first, a restart may still bring it
    /// back, which is harmless. After the journal has closed it changes nothing.
    pub fn release(self) {
        self.shared.release(self.number, self.charge);
    }
}

impl Journal {
    /// Recovers the journal of a directory, or makes one, and starts its thread. Reads all of it: blocks.
    ///
    /// # Errors
    /// The directory is in use, cannot be used, or holds what is not the work of a journal and a crash. Nothing was changed then,
    /// unless the disk failed on the way.
    pub fn open(
        fs: Arc<dyn JournalFs>,
        config: &Config,
        metrics: JournalMetrics,
    ) -> Result<(Journal, Recovered), JournalError> {
        let lock = lock(&*fs)?;
        let opened = recover::open(fs, config, metrics)?;
        let shared = Arc::clone(opened.writer.shared());
        thread::start(opened.writer, lock).map_err(JournalError::NoThread)?;
        let journal = Journal {
            handle: Arc::new(Handle {
                shared: Arc::clone(&shared),
            }),
        };
        let held = |Found { number, charge, write }| {
            let shared = Arc::clone(&shared);
            (write, Record { shared, number, charge })
        };
        let recovered = Recovered {
            writes: opened.found.into_iter().map(held).collect(),
            high_water: opened.high_water,
            took: opened.took,
            bytes: opened.bytes,
        };
        Ok((journal, recovered))
    }

    /// A lane for the current thread. Its task is spawned on the current runtime: call this there.
    pub fn lane(&self) -> Lane {
        let core = Arc::new(LaneCore::new(Arc::clone(&self.handle.shared.progress)));
        self.handle.shared.register(&core);
        tokio::spawn({
            let core = Arc::clone(&core);
            async move { core.run().await }
        });
        Lane {
            core: Arc::new(OpenLane(core)),
        }
    }

    /// Room for a write whose key and value have `bytes` together, if there is some now and nobody waits for it.
    pub fn room_at_once(&self, bytes: usize) -> Option<Room> {
        let record_bytes = self.record_bytes_max(bytes).ok()?;
        self.handle.shared.try_room(record_bytes).ok()
    }

    /// The same, unless the journal or its disk is full (`None`). Waits until `deadline`
    /// for what is being written, which takes a moment. Cancel-safe: who stops waiting has claimed nothing.
    ///
    /// # Errors
    /// Not applied. [`ErrorKind::Unavailable`]: closed or poisoned; [`ErrorKind::Rejected`]: larger than
    /// [`Config::write_bytes_max`]; [`ErrorKind::Timeout`]: the disk does not answer.
    pub async fn room_unless_full(&self, bytes: usize, deadline: Instant) -> Result<Option<Room>, Error> {
        let shared = &self.handle.shared;
        let claiming = shared.room_unless_full(self.record_bytes_max(bytes)?);
        match timeout_at(deadline, claiming).await {
            Ok(Ok(room)) => Ok(Some(room)),
            Ok(Err(NoRoom::Full)) => Ok(None),
            Ok(Err(NoRoom::Ended(phase))) => Err(refused(phase)),
            Err(_) => Err(self.no_room()),
        }
    }

    /// The same, waited for until `deadline` also while it is full, first come first served.
    ///
    /// # Errors
    /// As [`Journal::room_unless_full`], and [`ErrorKind::Timeout`]: full until the deadline.
    pub async fn room(&self, bytes: usize, deadline: Instant) -> Result<Room, Error> {
        let claiming = self.handle.shared.room(self.record_bytes_max(bytes)?);
        match timeout_at(deadline, claiming).await {
            Ok(Ok(room)) => Ok(room),
            Ok(Err(NoRoom::Ended(phase))) => Err(refused(phase)),
            Ok(Err(NoRoom::Full)) | Err(_) => Err(self.no_room()),
        }
    }

    fn no_room(&self) -> Error {
        let message = match self.handle.shared.standing().stall {
            Some(Stall::DiskFull) => "the journal's disk stayed full until the deadline",
            Some(Stall::Full) | None => "the journal stayed full until the deadline",
        };
        Error::new(ErrorKind::Timeout, message)
    }

    /// Appends a write for which `room` was claimed. OK means that it is on disk, and stays there until the record is released.
    ///
    /// Cancelling it before the record is gathered leaves nothing. Afterwards it is written all the same, and nobody can release it: a
    /// restart brings it back. Whoever must not lose track of it runs this in a task of its own.
    ///
    /// # Errors
    /// Not applied: [`ErrorKind::Unavailable`], closed or poisoned before. Unknown: [`ErrorKind::Timeout`], the disk did not answer until
    /// `deadline`; [`ErrorKind::Unavailable`], writing or syncing failed.
    pub async fn append(&self, lane: &Lane, room: Room, write: &Write, deadline: Instant) -> Result<Record, Error> {
        let shared = &self.handle.shared;
        let pushed = shared.push(&format::encode_record(write), room, Some(&lane.core.0));
        let (sequence, number, charge) = pushed.map_err(refused)?;
        let record = Record {
            shared: Arc::clone(shared),
            number,
            charge,
        };
        let error = match timeout_at(deadline, lane.core.0.settled(sequence)).await {
            Ok(Fate::Durable) => return Ok(record),
            Ok(Fate::NotWritten) => refused(Phase::Poisoned),
            Ok(Fate::Unknown) => Error::new(ErrorKind::Unavailable, "the journal could not be written").unknown(),
            Err(_) => Error::new(ErrorKind::Timeout, "the journal was not written by the deadline").unknown(),
        };
        record.release();
        Err(error)
    }

    /// The longest that the record of a write of `bytes` can be.
    fn record_bytes_max(&self, bytes: usize) -> Result<usize, Error> {
        let record_bytes = bytes.saturating_add(RECORD_FRAME_BYTES);
        if record_bytes.saturating_add(CHARGE_OVERHEAD_BYTES) > self.handle.shared.charge_max {
            let message = "the record is larger than the journal takes: raise the journal's segment_bytes";
            return Err(Error::new(ErrorKind::Rejected, message));
        }
        Ok(record_bytes)
    }

    /// Ends appends, writes what was gathered, tells on disk what is released by now, and waits until all of that is done and the directory
    /// is free. What is still held then is recovered by the next start. Cancel-safe, and may be called again.
    ///
    /// # Errors
    /// The journal is poisoned: what was released last may be recovered again.
    pub async fn close(&self) -> Result<(), Error> {
        let shared = &self.handle.shared;
        shared.close();
        shared.ended.cancelled().await;
        match shared.phase() {
            Phase::Poisoned => Err(refused(Phase::Poisoned)),
            Phase::Open | Phase::Closing | Phase::Closed => Ok(()),
        }
    }

    /// What it can do now.
    pub fn state(&self) -> State {
        let shared = &self.handle.shared;
        match shared.standing().stall {
            _ if shared.phase() == Phase::Poisoned => State::Failed,
            Some(Stall::DiskFull) => State::DiskFull,
            Some(Stall::Full) => State::Full,
            None if shared.is_full() => State::Full,
            None => State::Up,
        }
    }

    /// Whether little room is left, so that what is live should leave soon.
    pub fn is_pressed(&self) -> bool {
        self.handle.shared.is_pressed()
    }

    /// Waits until its thread has ended: closed, or poisoned. Cancel-safe.
    pub async fn ended(&self) {
        self.handle.shared.ended.cancelled().await;
    }

    /// How full it is.
    pub fn stats(&self) -> JournalStats {
        let shared = &self.handle.shared;
        let standing = shared.standing();
        JournalStats {
            bytes: standing.bytes,
            segments: standing.segments,
            live_bytes: shared.live_bytes(),
            stall: standing.stall,
        }
    }
}

/// Takes the directory for this process.
fn lock(fs: &dyn JournalFs) -> Result<Box<dyn Send>, JournalError> {
    let locked = fs.lock().map_err(|source| JournalError::unusable(fs, None, source))?;
    locked.ok_or_else(|| JournalError::InUse(fs.name()))
}

/// The refusal of an append that was not made.
fn refused(phase: Phase) -> Error {
    let message = match phase {
        Phase::Poisoned => "the journal has failed and takes no writes until the gateway is restarted",
        Phase::Open | Phase::Closing | Phase::Closed => "the gateway is shutting down and takes no write-behind writes",
    };
    Error::new(ErrorKind::Unavailable, message)
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.stats().fmt(f)
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lane")
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Record({})", self.number)
    }
}
