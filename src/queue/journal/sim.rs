//! A disk in memory that loses, tears and reorders whatever was not synced, and fails when it is told to.
//!
//! For tests. Owns what a crash may leave: of each write that no sync of its file followed nothing, all, any part, or, where it
//! differs from what was there, garbage; of each making, renaming or removing of a file that no sync of the directory followed,
//! all or nothing, each for itself. After a failed sync the unsynced writes of the file are still read back, and will never be durable
//! unless they are written again, as systems do. Every operation is logged, so that a run can be replayed and crashed after each.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    io, mem,
    sync::Arc,
};

use parking_lot::Mutex;

use super::{
    Config, Journal, Recovered,
    fs::{JournalFile, JournalFs},
};
use crate::telemetry::journal::JournalMetrics;

/// What the disk writes as a whole. Smaller than on any real disk, so that short groups are torn, too.
const SECTOR_BYTES: usize = 64;

/// A source of chance that repeats itself from the same seed (splitmix64).
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// Dice that fall as `seed` says.
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((number ^ (number >> 31)) % bound.max(1) as u64) as usize
    }
}

/// What was done to a disk. Files are known by number.
#[derive(Debug, Clone)]
pub enum Op {
    /// Bytes were written at an offset.
    Write(usize, usize, Vec<u8>),
    /// A file was synced.
    Sync(usize),
    /// A file was made.
    Create(String, usize),
    /// A file was renamed.
    Rename(String, String),
    /// A file was removed.
    Remove(String),
    /// The directory was synced.
    SyncDir,
}

/// What a crash does to whatever is not synced.
#[derive(Debug, Clone)]
pub enum Loss {
    /// All of it is lost.
    All,
    /// Nothing is lost.
    Nothing,
    /// What was written is lost; names are kept.
    Data,
    /// Changes of names are lost; what was written is kept.
    Names,
    /// Of the last write only so many bytes are kept.
    Cut(usize),
    /// Of the last write so many leading bytes are lost.
    Head(usize),
    /// Each write and each change of a name as the dice fall.
    Chance(Dice),
}

/// The faults that a disk is told to have.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// The number of the call that fails, counted from 1.
    pub fail_at: Option<u64>,
    /// Whether every call after it fails, too.
    pub for_ever: bool,
    /// How it fails; an I/O error if unset.
    pub kind: Option<io::ErrorKind>,
    /// Whether a write takes only part of what it is given.
    pub short_writes: bool,
    /// How many bytes all files may have together.
    pub capacity: Option<usize>,
    /// From which call on the system has let go of what a failed sync left in its memory: then the disk itself is read.
    pub forgets_at: Option<u64>,
}

#[derive(Debug, Clone, Default)]
struct Content {
    durable: Vec<u8>,
    /// What is read: the durable bytes with every write since.
    current: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
}

/// The disk's state, for itself.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    files: Vec<Content>,
    durable_names: BTreeMap<String, usize>,
    names: BTreeMap<String, usize>,
    unsynced_names: Vec<Op>,
}

impl Disk {
    /// The same for disks that a process cannot tell apart.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (name, file) in &self.names {
            (name, &self.files[*file].current).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Does what `op` says.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Write(file, offset, data) => {
                let content = &mut self.files[*file];
                put(&mut content.current, *offset, data);
                content.unsynced.push((*offset, data.clone()));
            }
            Op::Sync(file) => {
                let content = &mut self.files[*file];
                for (offset, data) in mem::take(&mut content.unsynced) {
                    put(&mut content.durable, offset, &data);
                }
            }
            Op::Create(_, file) => {
                self.files.resize_with(self.files.len().max(file + 1), Content::default);
                rename(&mut self.names, op);
                self.unsynced_names.push(op.clone());
            }
            Op::Rename(..) | Op::Remove(_) => {
                rename(&mut self.names, op);
                self.unsynced_names.push(op.clone());
            }
            Op::SyncDir => {
                for op in mem::take(&mut self.unsynced_names) {
                    rename(&mut self.durable_names, &op);
                }
            }
        }
    }

    /// The disk after a crash.
    #[must_use]
    pub fn crashed(&self, loss: &Loss) -> Disk {
        let mut dice = match loss {
            Loss::Chance(dice) => dice.clone(),
            _ => Dice::new(0),
        };
        let mut names = self.durable_names.clone();
        for op in &self.unsynced_names {
            let kept = match loss {
                Loss::All | Loss::Names => false,
                Loss::Chance(_) => dice.below(2) == 0,
                Loss::Nothing | Loss::Data | Loss::Cut(_) | Loss::Head(_) => true,
            };
            if kept {
                rename(&mut names, op);
            }
        }
        let mut disk = Disk::default();
        for (name, file) in names {
            let content = &self.files[file];
            let mut durable = content.durable.clone();
            let last = content.unsynced.len().wrapping_sub(1);
            for (index, (offset, data)) in content.unsynced.iter().enumerate() {
                match loss {
                    Loss::All | Loss::Data => {}
                    Loss::Cut(kept) if index == last => put(&mut durable, *offset, &data[..data.len().min(*kept)]),
                    Loss::Head(lost) if index == last => {
                        let lost = data.len().min(*lost);
                        put(&mut durable, offset + lost, &data[lost..]);
                    }
                    Loss::Nothing | Loss::Names | Loss::Cut(_) | Loss::Head(_) => put(&mut durable, *offset, data),
                    Loss::Chance(_) => tear(&mut durable, *offset, data, &mut dice),
                }
            }
            disk.durable_names.insert(name, disk.files.len());
            disk.files.push(Content {
                current: durable.clone(),
                durable,
                unsynced: Vec::new(),
            });
        }
        disk.names = disk.durable_names.clone();
        disk
    }

    /// The length of the last write that is not synced, of the file where it is the longest.
    pub fn unsynced_bytes(&self) -> usize {
        let last = |content: &Content| content.unsynced.last().map(|(_, data)| data.len());
        self.files.iter().filter_map(last).max().unwrap_or(0)
    }

    /// The names of the files.
    pub fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    /// A file's bytes, to be looked at or changed behind everybody's back.
    pub fn bytes_mut(&mut self, name: &str) -> Option<&mut Vec<u8>> {
        Some(&mut self.files[*self.names.get(name)?].current)
    }

    /// Takes whatever was changed behind everybody's back for durable, names too.
    #[must_use]
    pub fn settled(mut self) -> Disk {
        for content in &mut self.files {
            content.durable = content.current.clone();
            content.unsynced.clear();
        }
        self.durable_names = self.names.clone();
        self.unsynced_names.clear();
        self
    }

    /// A file's name taken away, or given to other bytes.
    pub fn replace(&mut self, name: &str, bytes: Option<Vec<u8>>) {
        self.names.remove(name);
        if let Some(current) = bytes {
            self.names.insert(name.to_owned(), self.files.len());
            self.files.push(Content {
                current,
                ..Content::default()
            });
        }
    }

    fn bytes(&self) -> usize {
        self.names.values().map(|file| self.files[*file].current.len()).sum()
    }
}

/// Writes to bytes, which grow where needed.
fn put(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
    if bytes.len() < offset + data.len() {
        bytes.resize(offset + data.len(), 0);
    }
    bytes[offset..offset + data.len()].copy_from_slice(data);
}

fn rename(names: &mut BTreeMap<String, usize>, op: &Op) {
    match op {
        Op::Create(name, file) => {
            names.insert(name.clone(), *file);
        }
        Op::Rename(from, to) => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
        Op::Remove(name) => {
            names.remove(name);
        }
        Op::Write(..) | Op::Sync(_) | Op::SyncDir => {}
    }
}

/// Writes some of `data`.
fn tear(bytes: &mut Vec<u8>, offset: usize, data: &[u8], dice: &mut Dice) {
    match dice.below(6) {
        0 => {}
        1 => put(bytes, offset, data),
        // Cut at any byte.
        2 => put(bytes, offset, &data[..dice.below(data.len() + 1)]),
        // Any sectors; with garbage instead of some.
        kind => {
            let mut start = 0;
            while start < data.len() {
                let end = ((offset + start + 1).next_multiple_of(SECTOR_BYTES) - offset).min(data.len());
                match dice.below(4) {
                    0 => {}
                    1 if kind == 5 => {
                        let mut garbage = data[start..end].to_vec();
                        for (index, byte) in garbage.iter_mut().enumerate() {
                            if bytes.get(offset + start + index) != Some(byte) {
                                *byte = dice.below(256) as u8;
                            }
                        }
                        put(bytes, offset + start, &garbage);
                    }
                    _ => put(bytes, offset + start, &data[start..end]),
                }
                start = end;
            }
        }
    }
}

/// Called before each operation, with the number of those before it.
pub type Probe = Box<dyn FnMut(usize) + Send>;

/// A file system on such a disk. Clones share it.
#[derive(Clone, Default)]
pub struct SimFs {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    disk: Disk,
    log: Vec<Op>,
    probe: Option<Probe>,
    calls: u64,
    faults: Faults,
    failed: u64,
    locked: bool,
    /// Files whose last sync failed, and that were not written since.
    suspect: HashSet<usize>,
    /// Syncs of such files.
    syncs_after_failure: u64,
}

impl SimFs {
    /// A file system on a disk.
    pub fn new(disk: Disk, faults: Faults) -> SimFs {
        let state = State {
            disk,
            faults,
            ..State::default()
        };
        SimFs {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// A copy of the disk as it is.
    pub fn disk(&self) -> Disk {
        self.state.lock().disk.clone()
    }

    /// How many operations were done.
    pub fn ops(&self) -> usize {
        self.state.lock().log.len()
    }

    /// The operations that were done.
    pub fn log(&self) -> Vec<Op> {
        self.state.lock().log.clone()
    }

    /// How many calls there were since the faults were set.
    pub fn calls(&self) -> u64 {
        self.state.lock().calls
    }

    /// How many calls failed as they were told to.
    pub fn failed(&self) -> u64 {
        self.state.lock().failed
    }

    /// How many syncs there were of a file whose last sync failed, without a write in between. One is too many.
    pub fn syncs_after_failure(&self) -> u64 {
        self.state.lock().syncs_after_failure
    }

    /// Whether it reads back what a failed sync may have left in memory alone.
    pub fn is_suspect(&self) -> bool {
        !self.state.lock().suspect.is_empty()
    }

    /// What another process finds on the same machine, on a disk with other faults: its memory of what was not synced is left.
    pub fn restarted(&self, faults: Faults) -> SimFs {
        let state = self.state.lock();
        let again = SimFs::new(state.disk.clone(), faults);
        again.state.lock().suspect = state.suspect.clone();
        again
    }

    /// Changes a byte of a file, as a disk does that rots.
    pub fn rot(&self, name: &str, offset: usize) {
        let mut state = self.state.lock();
        let file = state.disk.names[name];
        let content = &mut state.disk.files[file];
        content.current[offset] ^= 1;
        content.durable[offset] ^= 1;
    }

    /// Has somebody look before each operation from now on.
    pub fn set_probe(&self, probe: Probe) {
        self.state.lock().probe = Some(probe);
    }

    /// Gives the disk other faults; calls are counted from 1 again.
    pub fn set_faults(&self, faults: Faults) {
        let mut state = self.state.lock();
        state.faults = faults;
        state.calls = 0;
    }
}

impl fmt::Debug for SimFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimFs")
    }
}

impl State {
    /// Counts a call, and fails it if it is told to.
    fn call(&mut self) -> io::Result<()> {
        self.calls += 1;
        let Some(at) = self.faults.fail_at else { return Ok(()) };
        if self.calls == at || (self.faults.for_ever && self.calls > at) {
            self.failed += 1;
            return Err(match self.faults.kind {
                Some(kind) => kind.into(),
                None => io::Error::other("input/output error"),
            });
        }
        Ok(())
    }

    fn apply(&mut self, op: Op) {
        if let Some(probe) = &mut self.probe {
            probe(self.log.len());
        }
        self.disk.apply(&op);
        self.log.push(op);
    }
}

impl JournalFs for SimFs {
    fn name(&self) -> String {
        "sim".to_owned()
    }

    fn lock(&self) -> io::Result<Option<Box<dyn Send>>> {
        let mut state = self.state.lock();
        state.call()?;
        if mem::replace(&mut state.locked, true) {
            return Ok(None);
        }
        Ok(Some(Box::new(SimLock(self.clone()))))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut state = self.state.lock();
        state.call()?;
        Ok(state.disk.names())
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn JournalFile>> {
        let mut state = self.state.lock();
        state.call()?;
        let file = state.disk.names.get(name).copied().ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(SimFile { fs: self.clone(), file }))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn JournalFile>> {
        let mut state = self.state.lock();
        state.call()?;
        if state.disk.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = state.disk.files.len();
        state.apply(Op::Create(name.to_owned(), file));
        Ok(Box::new(SimFile { fs: self.clone(), file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        state.call()?;
        if !state.disk.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.apply(Op::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        state.call()?;
        if !state.disk.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.apply(Op::Remove(name.to_owned()));
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        state.call()?;
        state.apply(Op::SyncDir);
        Ok(())
    }
}

struct SimLock(SimFs);

impl Drop for SimLock {
    fn drop(&mut self) {
        self.0.state.lock().locked = false;
    }
}

#[derive(Debug)]
struct SimFile {
    fs: SimFs,
    file: usize,
}

impl JournalFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        let mut state = self.fs.state.lock();
        state.call()?;
        Ok(state.disk.files[self.file].current.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.fs.state.lock();
        state.call()?;
        let forgotten =
            state.faults.forgets_at.is_some_and(|at| state.calls >= at) && state.suspect.contains(&self.file);
        let content = &mut state.disk.files[self.file];
        if forgotten {
            content.current.clone_from(&content.durable);
        }
        let current = &content.current;
        let rest = current.get(offset as usize..).unwrap_or_default();
        let read = rest.len().min(buffer.len());
        buffer[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<usize> {
        let mut state = self.fs.state.lock();
        let offset = offset as usize;
        let failed = state.call();
        let grown = (offset + data.len()).saturating_sub(state.disk.files[self.file].current.len());
        if state
            .faults
            .capacity
            .is_some_and(|capacity| state.disk.bytes() + grown > capacity)
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        // A write that fails may have done some of its work.
        let written = match (&failed, state.faults.short_writes) {
            (Err(_), _) => data.len() / 2,
            (Ok(()), true) => data.len().div_ceil(2),
            (Ok(()), false) => data.len(),
        };
        state.suspect.remove(&self.file);
        state.apply(Op::Write(self.file, offset, data[..written].to_vec()));
        failed.map(|()| written)
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.fs.state.lock();
        if state.suspect.contains(&self.file) {
            state.syncs_after_failure += 1;
        }
        if let Err(error) = state.call() {
            state.suspect.insert(self.file);
            state.disk.files[self.file].unsynced.clear();
            return Err(error);
        }
        state.apply(Op::Sync(self.file));
        Ok(())
    }
}

/// A running journal on an empty simulated disk.
pub fn journal() -> Journal {
    open(&SimFs::default()).0
}

/// A running journal of at most 16 segments of 64 KiB on a simulated disk, and what lay there.
pub fn open(fs: &SimFs) -> (Journal, Recovered) {
    let config = Config {
        segment_bytes: 64 << 10,
        bytes_max: 1 << 20,
        ..Config::default()
    };
    Journal::open(Arc::new(fs.clone()), &config, JournalMetrics::default()).expect("in order")
}
