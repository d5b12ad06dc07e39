//! Tests of the journal as a whole, and what they share: a driver that runs it step by step, without threads, on a simulated disk.

mod crash;
mod damage;
mod faults;
mod marks;
mod model;
mod repair;
mod space;
mod threads;
mod wakes;

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    Config, JournalError, Record, recover,
    scan::Found,
    shared::Shared,
    sim::{Dice, SimFs},
    sync::Arc,
    wake::Fate,
    writer::{Turn, Writer},
};
use crate::{
    model::{Answer, Answered, Entry, Fingerprint, Key, Request, RequestId, Tags, Timestamp, Version, Write},
    telemetry::journal::JournalMetrics,
};

/// A journal small enough to be full, rotated and recycled all the time.
fn small() -> Config {
    Config {
        segment_bytes: 4096,
        bytes_max: 7 * 4096,
        idle_sync: std::time::Duration::from_secs(3600),
    }
}

fn key(number: usize) -> Key {
    Key::new("test", &format!("key-{number}")).expect("valid")
}

/// Keys from here on are stragglers.
const STRAGGLERS: usize = 1000;

fn is_straggler(write: &Write) -> bool {
    let number = write
        .key
        .key()
        .strip_prefix("key-")
        .and_then(|number| number.parse().ok());
    number.is_some_and(|number: usize| number >= STRAGGLERS)
}

fn version(number: i64) -> Version {
    Version::new(number).expect("positive")
}

/// A write whose value tells its key and version; a tombstone now and then.
fn write(key_number: usize, number: i64, bytes: usize) -> Write {
    let seed = format!("{key_number}:{number};");
    let value = seed.bytes().cycle().take(bytes).collect::<Vec<u8>>();
    Write {
        key: key(key_number),
        entry: Entry {
            version: version(number),
            value: (number % 7 != 0).then(|| Bytes::from(value)),
            expires_at: (number % 5 == 0).then_some(Timestamp(number)),
        },
        tags: Tags::default(),
        requests: Vec::new(),
    }
}

/// The same write with a request id, which is still remembered or not.
fn with_id(write: Write, remembered: bool) -> Write {
    let answered = Answered {
        request: Request {
            id: RequestId::new(&format!("request of {}", write.entry.version.get())).expect("valid"),
            fingerprint: Fingerprint((write.entry.version.get() as u128).to_be_bytes()),
            ends_at: Timestamp(if remembered { i64::MAX } else { 1 }),
        },
        answer: Answer {
            version: write.entry.version,
            counter: None,
            expires_at: write.entry.expires_at,
        },
    };
    Write {
        requests: vec![answered],
        ..write
    }
}

/// Whether a write is to come back for the sake of its id, whatever else stands on its key.
fn has_id(write: &Write) -> bool {
    write
        .requests
        .iter()
        .any(|answered| answered.request.ends_at == Timestamp(i64::MAX))
}

/// What was appended, and when, in operations of the disk.
#[derive(Debug, Clone)]
struct Issued {
    write: Write,
    queued: usize,
    acked: Option<usize>,
    released: Option<usize>,
}

/// What may and must be recovered.
#[derive(Debug, Default, Clone)]
struct History {
    issued: Vec<Issued>,
}

/// What a crash after so many operations must leave.
struct Expected<'a> {
    possible: HashMap<(&'a Key, Version), &'a Write>,
    acked: Vec<&'a Write>,
    /// In the order in which they were appended.
    unreleased: Vec<&'a Write>,
}

impl History {
    fn after(&self, ops: usize) -> Expected<'_> {
        let issued = || self.issued.iter().filter(|issued| issued.queued <= ops);
        let unreleased = || issued().filter(|issued| issued.released.is_none_or(|at| at >= ops));
        Expected {
            possible: issued()
                .map(|issued| ((&issued.write.key, issued.write.entry.version), &issued.write))
                .collect(),
            acked: unreleased()
                .filter(|issued| issued.acked.is_some_and(|at| at <= ops))
                .map(|issued| &issued.write)
                .collect(),
            unreleased: unreleased().map(|issued| &issued.write).collect(),
        }
    }
}

impl Expected<'_> {
    /// Says what is wrong with what was recovered.
    fn check(&self, found: &[Found], context: &dyn Fn() -> String) {
        let mut newest: HashMap<&Key, Version> = HashMap::new();
        let mut all: HashSet<(&Key, Version)> = HashSet::new();
        for found in found {
            let Write { key, entry, .. } = &found.write;
            let issued = self.possible.get(&(key, entry.version));
            assert!(
                issued.is_some(),
                "recovered what was never appended: {:?}; {}",
                found.write,
                context()
            );
            assert_eq!(issued.copied(), Some(&found.write), "changed; {}", context());
            assert!(all.insert((key, entry.version)), "recovered twice; {}", context());
            let newest = newest.entry(key).or_insert(entry.version);
            *newest = entry.version.max(*newest);
        }
        let is_newest = |write: &Write| newest.get(&write.key) == Some(&write.entry.version);
        let needless = found
            .iter()
            .find(|found| !is_newest(&found.write) && !has_id(&found.write));
        assert!(
            needless.is_none(),
            "one write per key, and those with ids; {}",
            context()
        );
        let present = |write: &Write| {
            newest
                .get(&write.key)
                .is_some_and(|newest| *newest >= write.entry.version)
        };
        for write in &self.acked {
            assert!(present(write), "acknowledged and lost: {write:?}; {}", context());
            let is_there = all.contains(&(&write.key, write.entry.version));
            assert!(!has_id(write) || is_there, "an id is lost: {write:?}; {}", context());
        }
        // No hole: behind the first one that is missing, everything is. A write that came late, behind a newer one of its key, shows
        // nothing.
        let mut missing: Option<&&Write> = None;
        let mut highest: HashMap<&Key, Version> = HashMap::new();
        for write in &self.unreleased {
            let version = write.entry.version;
            if highest.get(&write.key).is_some_and(|highest| *highest > version) {
                continue;
            }
            highest.insert(&write.key, version);
            match (present(write), missing) {
                (true, Some(missing)) => panic!(
                    "{write:?} is there and {missing:?}, appended before, is not; {}",
                    context()
                ),
                (false, None) => missing = Some(write),
                _ => {}
            }
        }
    }
}

/// Runs a journal by hand.
struct Driver {
    fs: SimFs,
    shared: Arc<Shared>,
    writer: Writer,
    history: History,
    held: Vec<(usize, Record)>,
    /// Appended, not yet acknowledged: the place in the history, and the group.
    waiting: Vec<(usize, u64, Record)>,
    /// Which group was first told to be durable after how many operations.
    told: Arc<Mutex<Vec<(u64, usize)>>>,
    next_version: i64,
    dice: Dice,
}

impl Driver {
    fn open(fs: &SimFs, config: &Config, dice: Dice) -> Result<(Driver, Vec<Found>), JournalError> {
        let opened = recover::open(Arc::new(fs.clone()), config, JournalMetrics::default())?;
        let told = Arc::new(Mutex::new(Vec::new()));
        fs.set_probe(Box::new({
            let (told, progress) = (Arc::clone(&told), Arc::clone(&opened.writer.shared().progress));
            move |ops| {
                let mut told = told.lock();
                let mut next = told.last().map_or(1, |(sequence, _)| sequence + 1);
                while progress.fate(next) == Some(Fate::Durable) {
                    told.push((next, ops));
                    next += 1;
                }
            }
        }));
        let driver = Driver {
            told,
            fs: fs.clone(),
            shared: Arc::clone(opened.writer.shared()),
            writer: opened.writer,
            history: History::default(),
            held: Vec::new(),
            waiting: Vec::new(),
            next_version: 1,
            dice,
        };
        Ok((driver, opened.found))
    }

    /// Holds what was recovered, as the gateway does.
    fn hold(&mut self, found: Vec<Found>) {
        for Found { number, charge, write } in found {
            let shared = Arc::clone(&self.shared);
            self.held
                .push((self.history.issued.len(), Record { shared, number, charge }));
            self.history.issued.push(Issued {
                write,
                queued: 0,
                acked: Some(0),
                released: None,
            });
        }
    }

    /// Appends if there is room. Says whether there was.
    fn append(&mut self, write: Write) -> bool {
        let encoded = super::format::encode_record(&write);
        let Ok(room) = self.shared.try_room(encoded.len()) else {
            return false;
        };
        let Ok((sequence, number, charge)) = self.shared.push(&encoded, room, None) else {
            return false;
        };
        let shared = Arc::clone(&self.shared);
        let record = Record { shared, number, charge };
        self.waiting.push((self.history.issued.len(), sequence, record));
        self.history.issued.push(Issued {
            write,
            queued: self.fs.ops(),
            acked: None,
            released: None,
        });
        true
    }

    /// Lets the journal work until it would sleep, and notes what it acknowledged. As soon as a write is acknowledged, the older ones
    /// of its key are released, unless they have an id.
    fn work(&mut self, idle: bool) -> std::io::Result<bool> {
        let mut idle = idle;
        loop {
            let turn = self.writer.turn(idle);
            self.notice();
            idle = false;
            match turn? {
                Turn::Again => {}
                Turn::Sleep { .. } => return Ok(false),
                Turn::Done => return Ok(true),
            }
        }
    }

    fn notice(&mut self) {
        let ops = self.fs.ops();
        for (index, sequence, record) in std::mem::take(&mut self.waiting) {
            match self.shared.progress.fate(sequence) {
                Some(Fate::Durable) => {
                    let told = self
                        .told
                        .lock()
                        .iter()
                        .find(|(told, _)| *told == sequence)
                        .map(|(_, ops)| *ops);
                    self.history.issued[index].acked = Some(told.unwrap_or(ops));
                    self.held.push((index, record));
                    self.supersede(index);
                }
                None => self.waiting.push((index, sequence, record)),
                Some(Fate::Unknown | Fate::NotWritten) => panic!("nothing failed"),
            }
        }
    }

    /// Releases all but the newest of the records of a key, and those with an id.
    fn supersede(&mut self, index: usize) {
        let key = self.history.issued[index].write.key.clone();
        let of_key = |history: &History, index: usize| history.issued[index].write.key == key;
        let version = |history: &History, index: usize| history.issued[index].write.entry.version;
        let held = || self.held.iter().map(|(index, _)| *index);
        let newest = held()
            .filter(|index| of_key(&self.history, *index))
            .max_by_key(|index| version(&self.history, *index));
        let old: Vec<usize> = held()
            .filter(|index| of_key(&self.history, *index) && Some(*index) != newest)
            .filter(|index| self.history.issued[*index].write.requests.is_empty())
            .collect();
        for index in old {
            self.release(index);
        }
    }

    fn release(&mut self, index: usize) {
        self.history.issued[index].released = Some(self.fs.ops());
        let at = self
            .held
            .iter()
            .position(|(held, _)| *held == index)
            .expect("it is held");
        self.held.remove(at).1.release();
    }

    /// Releases everything.
    fn release_all(&mut self) {
        while let Some((index, _)) = self.held.first() {
            self.release(*index);
        }
    }

    /// One step of a random workload on `keys` keys.
    fn step(&mut self, keys: usize, value_bytes_max: usize) -> std::io::Result<()> {
        match self.dice.below(10) {
            0..6 => {
                // Room is granted by the journal's turns.
                self.work(false)?;
                for _ in 0..=self.dice.below(4) {
                    self.next_version += 1;
                    // Now and then one that was stamped before, and comes late.
                    let late = if self.dice.below(8) == 0 {
                        self.dice.below(3) as i64
                    } else {
                        0
                    };
                    let number = self.next_version * 4 - late * 5;
                    // Now and then a key that is written once and stays for long.
                    let key_number = match self.dice.below(12) {
                        0 => STRAGGLERS + self.next_version as usize,
                        _ => self.dice.below(keys),
                    };
                    let mut write = write(key_number, number.max(1), self.dice.below(value_bytes_max + 1));
                    if self.dice.below(6) == 0 {
                        write = with_id(write, self.dice.below(4) > 0);
                    }
                    let known = |issued: &Issued| {
                        issued.write.key == write.key && issued.write.entry.version == write.entry.version
                    };
                    if !self.history.issued.iter().any(known) {
                        self.append(write);
                    }
                }
                self.work(false)?;
            }
            6..9 => {
                if !self.held.is_empty() {
                    // Mostly an old one, as they are drained; some keys are stragglers for long.
                    let at = self.dice.below(self.held.len()).min(self.dice.below(self.held.len()));
                    let index = self.held[at].0;
                    if !is_straggler(&self.history.issued[index].write) || self.dice.below(8) == 0 {
                        self.release(index);
                    }
                }
            }
            _ => {
                // A lull, in which what is oldest is drained.
                if self.dice.below(2) == 0 && !self.held.is_empty() {
                    self.release(self.held[0].0);
                }
                self.work(true)?;
            }
        }
        Ok(())
    }
}
