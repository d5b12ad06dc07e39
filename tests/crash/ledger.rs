//! What the clients asked of the gateway, what it answered, and what they and the store showed: and the judgement of all that.
//!
//! Owns the rules. Knows no server and no time but what it is told. A write's value tells which write it is, so that whoever sees it knows
//! who asked for it. Invariants that are judged: a version is one write; a key in the store only moves forward, and no row of it goes;
//! an acknowledged durable write, and whatever a reader saw of durable ones, is in the store in the end, or something newer is; what was
//! refused is never seen; a read sees what was acknowledged before it began. A write that has a name is sent again, also long after it was
//! answered and newer ones were: it is the same write, and has the version that it had.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tidegate::rpc::proto::Durability;

/// The namespaces, by their places: with the write delay of each. The last one's writes rest on memory.
pub const NAMESPACES: [(&str, &str); 4] = [("now", "0s"), ("soon", "200ms"), ("late", "2s"), ("volatile", "0s")];

/// The place of the namespace whose write-behind writes may be lost.
pub const VOLATILE: usize = 3;

/// How long a record with an expiry exists: it outlives every run.
pub const TTL_MILLIS: u64 = 6 * 3600 * 1000;

/// How far an expiry may be from what the clients' own clock says.
const CLOCK_TOLERANCE_MILLIS: u64 = 60_000;

/// How long after its first try a write with a name is sent again: names are remembered for ten minutes.
const NAME_LASTS_MILLIS: u64 = 180_000;

/// How many of them are kept for that.
const NAMED_MAX: usize = 96;

/// The most complaints that are kept; the rest is counted.
const COMPLAINTS_MAX: usize = 10;

/// A key, by the place of its namespace and its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub namespace: usize,
    pub number: u32,
}

impl Key {
    pub fn namespace(self) -> &'static str {
        NAMESPACES[self.namespace].0
    }

    pub fn name(self) -> String {
        format!("k{:05}", self.number)
    }

    pub fn parse(namespace: &str, name: &str) -> Option<Key> {
        let key = Key {
            namespace: NAMESPACES.iter().position(|(known, _)| *known == namespace)?,
            number: name.strip_prefix('k')?.parse().ok()?,
        };
        (key.name() == name).then_some(key)
    }
}

/// What a write asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Put { expires: bool },
    Delete,
}

/// What is known of how a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Under way, or its caller was never told: it may be anywhere.
    Open,
    /// Its caller was told that this is not known: it may come with any later start.
    Unknown,
    /// Of an earlier time, never told, and not in the store when everything that could bring it there had ended.
    Closed,
    /// Its caller was told that nothing was applied.
    Refused,
    Acknowledged(Durability),
}

#[derive(Debug)]
struct Write {
    key: Key,
    asked: Asked,
    sent_millis: u64,
    outcome: Outcome,
    /// Known from the answer, or from where it was seen.
    version: Option<i64>,
    /// Whether an earlier try of it may have taken effect: then a refusal of this one says nothing.
    doubtful: bool,
}

/// Who wrote a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Author {
    Write(usize),
    /// A delete that nobody was told of.
    SomeDelete,
}

#[derive(Debug, Default)]
struct KeyLog {
    /// The highest acknowledged version that is durable.
    durable: i64,
    /// The highest acknowledged version that rests on memory, and the life of the gateway in which it did.
    volatile: (u32, i64),
    /// The highest acknowledged version of a delete.
    deleted: i64,
    /// The highest version that a reader saw.
    seen: i64,
    /// The version that stands in the store, as the audit says.
    stored: i64,
    authors: BTreeMap<i64, Author>,
    /// Deletes that nobody was told of, less those that were seen.
    open_deletes: usize,
}

/// What a reader may be told: everything below was superseded before it asked.
#[derive(Debug, Clone, Copy)]
pub struct Floor(i64);

impl Floor {
    /// Anything may be told.
    pub const NONE: Floor = Floor(0);
}

/// A record, where it was seen.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    pub version: i64,
    /// `None`: a tombstone.
    pub value: Option<&'a [u8]>,
    pub expires_millis: Option<i64>,
}

/// A change of a row, as the trigger of the audit noted it.
#[derive(Debug, sqlx::FromRow)]
pub struct Change {
    pub seq: i64,
    pub namespace: String,
    pub key: String,
    pub before: Option<i64>,
    pub version: Option<i64>,
    pub value: Option<Vec<u8>>,
    pub expires_millis: Option<i64>,
}

/// What is wrong.
#[derive(Debug)]
pub struct Complaint {
    pub what: String,
    pub key: Option<Key>,
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    /// Tells this run's values from any other's.
    run: u64,
    life: u32,
    writes: Vec<Write>,
    keys: HashMap<Key, KeyLog>,
    /// Writes to be sent again under their names.
    named: VecDeque<usize>,
    pub acknowledged: u64,
    /// How many times a write was sent again under its name, and how many of those were answered as before.
    pub sent_again: u64,
    pub repeated: u64,
    pub lost: u64,
    pub violations: u64,
    pub complaints: Vec<Complaint>,
}

impl Ledger {
    pub fn new(run: u64) -> Ledger {
        Ledger {
            run,
            life: 0,
            writes: Vec::new(),
            keys: HashMap::new(),
            named: VecDeque::new(),
            acknowledged: 0,
            sent_again: 0,
            repeated: 0,
            lost: 0,
            violations: 0,
            complaints: Vec::new(),
        }
    }

    /// The gateway was started again: what rested on its memory is gone.
    pub fn next_life(&mut self) {
        self.life += 1;
    }

    /// How many writes were sent so far.
    pub fn sent(&self) -> usize {
        self.writes.len()
    }

    /// A write is about to be sent: its number.
    pub fn send(&mut self, key: Key, asked: Asked, now_millis: u64) -> usize {
        self.writes.push(Write {
            key,
            asked,
            sent_millis: now_millis,
            outcome: Outcome::Open,
            version: None,
            doubtful: false,
        });
        if asked == Asked::Delete {
            self.keys.entry(key).or_default().open_deletes += 1;
        }
        self.writes.len() - 1
    }

    /// A write that has a name is about to be sent again: what it asks for.
    pub fn send_again(&mut self, write: usize) -> (Key, Asked) {
        let Write {
            key, asked, outcome, ..
        } = self.writes[write];
        let over = matches!(outcome, Outcome::Closed | Outcome::Refused);
        self.writes[write].doubtful = !over;
        if over {
            self.writes[write].outcome = Outcome::Open;
            if asked == Asked::Delete {
                self.keys.entry(key).or_default().open_deletes += 1;
            }
        }
        self.sent_again += 1;
        (key, asked)
    }

    /// Gives a write a name, by which it can be sent again.
    pub fn name(&self, write: usize) -> String {
        format!("{:016x}.{write}", self.run)
    }

    /// Keeps a write that has a name, to be sent again. The oldest are let go of.
    pub fn keep_named(&mut self, write: usize, now_millis: u64) {
        if now_millis.saturating_sub(self.writes[write].sent_millis) < NAME_LASTS_MILLIS {
            self.named.push_back(write);
        }
        if self.named.len() > NAMED_MAX {
            self.named.pop_front();
        }
    }

    /// Takes one of those out, by a number.
    pub fn take_named(&mut self, choice: usize) -> Option<usize> {
        let place = choice % self.named.len().max(1);
        self.named.swap_remove_back(place)
    }

    /// The value of a write: which it is, and something that depends on nothing but that.
    pub fn value(&self, write: usize) -> Vec<u8> {
        let mut value = format!("{:016x}.{write:012}.", self.run).into_bytes();
        let mixed = (write as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let length = [0, 16, 100, (mixed >> 48) as usize % 4000][(mixed >> 32) as usize % 4];
        value.extend((0..length).map(|place| (mixed >> (place % 8 * 8)) as u8));
        value
    }

    /// A write was answered with OK.
    pub fn acknowledge(&mut self, write: usize, version: i64, durability: Durability) {
        let Write { key, asked, .. } = self.writes[write];
        if let Some(known) = self.writes[write].version.filter(|known| *known != version) {
            self.complain(
                key,
                format!("write {write} stands as version {known} and was answered as {version}"),
            );
        }
        if durability == Durability::Memory && key.namespace != VOLATILE {
            self.complain(key, format!("write {write} rests on memory alone"));
        }
        self.attribute(key, version, write);
        let before = std::mem::replace(&mut self.writes[write].outcome, Outcome::Acknowledged(durability));
        if let Outcome::Acknowledged(_) = before {
            self.repeated += 1;
            return;
        }
        self.acknowledged += 1;
        let life = self.life;
        let log = self.keys.entry(key).or_default();
        if durability == Durability::Memory {
            let highest = if log.volatile.0 == life { log.volatile.1 } else { 0 };
            log.volatile = (life, highest.max(version));
        } else {
            log.durable = log.durable.max(version);
        }
        if asked == Asked::Delete {
            log.deleted = log.deleted.max(version);
        }
    }

    /// A write was answered with an error that says that nothing was applied.
    pub fn refuse(&mut self, write: usize) {
        let Write {
            key,
            asked,
            version,
            doubtful,
            ..
        } = self.writes[write];
        if doubtful {
            return;
        }
        self.writes[write].outcome = Outcome::Refused;
        let log = self.keys.entry(key).or_default();
        let mut seen = version.is_some();
        if asked == Asked::Delete {
            match log.open_deletes.checked_sub(1) {
                Some(left) => log.open_deletes = left,
                None => seen = true,
            }
        }
        if seen {
            self.complain(key, format!("write {write} was refused, and was seen before"));
        }
    }

    /// A write was answered with an error that says that it may still take effect.
    pub fn leave_open(&mut self, write: usize) {
        let outcome = &mut self.writes[write].outcome;
        if !matches!(outcome, Outcome::Acknowledged(_)) {
            *outcome = Outcome::Unknown;
        }
    }

    /// What a read of a key that begins now must at least see.
    pub fn floor(&self, key: Key) -> Floor {
        let Some(log) = self.keys.get(&key) else {
            return Floor(0);
        };
        let volatile = if log.volatile.0 == self.life { log.volatile.1 } else { 0 };
        Floor(log.durable.max(volatile))
    }

    /// A reader was shown a record.
    pub fn read(&mut self, key: Key, seen: Seen<'_>, floor: Floor, how: &str, now_millis: u64) {
        self.recognise(key, seen, how, now_millis);
        if seen.version < floor.0 {
            let what = format!(
                "{how} showed version {}, and {} was acknowledged before",
                seen.version, floor.0
            );
            self.complain(key, what);
        }
        let log = self.keys.entry(key).or_default();
        log.seen = log.seen.max(seen.version);
    }

    /// A reader was shown that there is no record.
    pub fn read_absent(&mut self, key: Key, floor: Floor, how: &str) {
        let log = self.keys.entry(key).or_default();
        if floor.0 > log.deleted && log.open_deletes == 0 && !log.has_delete_above(floor) {
            self.complain(
                key,
                format!("{how} showed nothing, and version {} was acknowledged before", floor.0),
            );
        }
    }

    /// The rows of the audit since the last time, in their order.
    pub fn audit(&mut self, changes: &[Change], now_millis: u64) {
        for change in changes {
            let Some(key) = Key::parse(&change.namespace, &change.key) else {
                self.complain_at(None, format!("a row of a key that nobody wrote: {change:?}"));
                continue;
            };
            let Some(version) = change.version else {
                self.complain(key, format!("its row was deleted: audit {}", change.seq));
                continue;
            };
            let log = self.keys.entry(key).or_default();
            let stored = log.stored;
            log.stored = version;
            if version <= stored || change.before.unwrap_or(0) != stored {
                let what = format!("its version went from {stored} to {version}: audit {}", change.seq);
                self.complain(key, what);
            }
            let seen = Seen {
                version,
                value: change.value.as_deref(),
                expires_millis: change.expires_millis,
            };
            self.recognise(key, seen, "the store", now_millis);
            if let Some(Author::Write(write)) = self.keys[&key].authors.get(&version).copied()
                && self.writes[write].outcome == Outcome::Closed
            {
                self.complain(
                    key,
                    format!("write {write} came into the store when nothing could bring it there any more"),
                );
            }
        }
    }

    /// How many keys have an acknowledged durable version above the one that the store holds.
    pub fn unflushed(&self, stored: &HashMap<Key, i64>) -> usize {
        let missing = |(key, log): &(&Key, &KeyLog)| log.durable > stored.get(key).copied().unwrap_or(0);
        self.keys.iter().filter(missing).count()
    }

    /// How many writes from this number on were acknowledged by the journal alone.
    pub fn journaled_since(&self, first: usize) -> usize {
        let journaled = |write: &&Write| write.outcome == Outcome::Acknowledged(Durability::Journal);
        self.writes[first..].iter().filter(journaled).count()
    }

    /// Judges the store when everything that was accepted has come there, and nothing is under way.
    pub fn settle(&mut self, stored: &HashMap<Key, i64>) {
        let mut complaints = Vec::new();
        for (key, log) in &self.keys {
            let stands = stored.get(key).copied().unwrap_or(0);
            if stands != log.stored {
                complaints.push((
                    *key,
                    false,
                    format!("version {stands} stands, and the audit says {}", log.stored),
                ));
            }
            if stands < log.durable {
                let what = format!("version {} was acknowledged and is lost: {stands} stands", log.durable);
                complaints.push((*key, true, what));
            } else if stands < log.seen && key.namespace != VOLATILE {
                let what = format!(
                    "version {} was shown to a reader and is lost: {stands} stands",
                    log.seen
                );
                complaints.push((*key, false, what));
            }
        }
        for (key, lost, what) in complaints {
            self.lost += u64::from(lost);
            if !lost {
                self.violations += 1;
            }
            self.keep(Some(key), what);
        }
        let mut unknown_deletes: HashMap<Key, usize> = HashMap::new();
        for write in self.writes.iter_mut().filter(|write| write.version.is_none()) {
            match write.outcome {
                Outcome::Open => write.outcome = Outcome::Closed,
                Outcome::Unknown if write.asked == Asked::Delete => *unknown_deletes.entry(write.key).or_default() += 1,
                _ => {}
            }
        }
        // A delete that can come no more excuses nothing that is shown from now on; but one that rested on memory may outlive its process in
        // Redis, as a put that did may.
        for (key, log) in self.keys.iter_mut().filter(|(key, _)| key.namespace != VOLATILE) {
            log.open_deletes = log.open_deletes.min(unknown_deletes.get(key).copied().unwrap_or(0));
        }
    }

    /// Whether a version of a key is known to be a put.
    pub fn is_put(&self, key: Key, version: i64) -> bool {
        let author = self.keys.get(&key).and_then(|log| log.authors.get(&version));
        matches!(author, Some(Author::Write(write)) if self.writes[*write].asked != Asked::Delete)
    }

    /// The last writes of a key, for people.
    pub fn history(&self, key: Key) -> Vec<String> {
        let writes = self.writes.iter().enumerate().filter(|(_, write)| write.key == key);
        let mut last: Vec<String> = writes
            .rev()
            .take(12)
            .map(|(number, write)| {
                let Write {
                    asked,
                    sent_millis,
                    outcome,
                    version,
                    ..
                } = write;
                format!("write {number} at {sent_millis}: {asked:?}, {outcome:?}, version {version:?}")
            })
            .collect();
        last.reverse();
        last
    }

    /// Notes something that is wrong.
    pub fn complain_at(&mut self, key: Option<Key>, what: String) {
        self.violations += 1;
        self.keep(key, what);
    }

    fn complain(&mut self, key: Key, what: String) {
        self.complain_at(Some(key), what);
    }

    fn keep(&mut self, key: Option<Key>, what: String) {
        if self.complaints.len() < COMPLAINTS_MAX {
            self.complaints.push(Complaint { what, key });
        }
    }

    /// Finds out who wrote what was seen.
    fn recognise(&mut self, key: Key, seen: Seen<'_>, place: &str, now_millis: u64) {
        let Seen {
            version,
            value,
            expires_millis,
        } = seen;
        let Some(value) = value else {
            return self.recognise_tombstone(key, version, place);
        };
        let Some(write) = self.author_of(value).filter(|write| self.writes[*write].key == key) else {
            return self.complain(
                key,
                format!("{place} holds a value that was never written to it, as version {version}"),
            );
        };
        let Write {
            asked,
            sent_millis,
            outcome,
            version: known,
            ..
        } = self.writes[write];
        let Asked::Put { expires } = asked else {
            return self.complain(key, format!("{place} holds a value of write {write}, a delete"));
        };
        if outcome == Outcome::Refused {
            self.complain(key, format!("{place} holds write {write}, which was refused"));
        }
        if known.is_some_and(|known| known != version) {
            self.complain(
                key,
                format!("{place} holds write {write} as version {version}, which was {known:?}"),
            );
        }
        let expiry =
            sent_millis + TTL_MILLIS - CLOCK_TOLERANCE_MILLIS..now_millis + TTL_MILLIS + CLOCK_TOLERANCE_MILLIS;
        let right = match expires_millis {
            Some(at) => expires && expiry.contains(&(at as u64)),
            None => !expires,
        };
        if !right {
            self.complain(
                key,
                format!("{place} holds write {write} ({asked:?}) with the expiry {expires_millis:?}"),
            );
        }
        self.attribute(key, version, write);
    }

    fn recognise_tombstone(&mut self, key: Key, version: i64, place: &str) {
        let log = self.keys.entry(key).or_default();
        let complaint = match log.authors.get(&version) {
            None if log.open_deletes > 0 => {
                log.open_deletes -= 1;
                log.authors.insert(version, Author::SomeDelete);
                None
            }
            None => Some(format!(
                "{place} holds a tombstone of version {version}, which nobody asked for"
            )),
            Some(Author::SomeDelete) => None,
            Some(Author::Write(write)) if self.writes[*write].asked == Asked::Delete => None,
            Some(Author::Write(write)) => Some(format!(
                "{place} holds a tombstone of version {version}, a put: write {write}"
            )),
        };
        if let Some(what) = complaint {
            self.complain(key, what);
        }
    }

    /// Notes that a version is this write.
    fn attribute(&mut self, key: Key, version: i64, write: usize) {
        let asked = self.writes[write].asked;
        self.writes[write].version = Some(version);
        let log = self.keys.entry(key).or_default();
        let before = log.authors.insert(version, Author::Write(write));
        match (before, asked) {
            (Some(Author::Write(other)), _) if other == write => {}
            // Seen before its caller was told.
            (Some(Author::SomeDelete), Asked::Delete) => {}
            (None, Asked::Delete) => log.open_deletes = log.open_deletes.saturating_sub(1),
            (None, Asked::Put { .. }) => {}
            (Some(other), _) => {
                self.complain(key, format!("version {version} is write {write}, and {other:?}"));
            }
        }
    }

    /// The write whose value this is, byte for byte.
    fn author_of(&self, value: &[u8]) -> Option<usize> {
        let mut parts = std::str::from_utf8(value.get(..30)?).ok()?.split('.');
        let run = u64::from_str_radix(parts.next()?, 16).ok()?;
        let write: usize = parts.next()?.parse().ok()?;
        (run == self.run && write < self.writes.len() && self.value(write) == value).then_some(write)
    }
}

impl KeyLog {
    fn has_delete_above(&self, floor: Floor) -> bool {
        let mut above = self.authors.range(floor.0..);
        above.any(|(_, author)| *author == Author::SomeDelete)
    }
}
