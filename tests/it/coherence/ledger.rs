//! Who writes what when, who reads what when, and how old it was: the clock and the judge of the tests beside this one.
//!
//! Each key has one writer at a time, which writes rising numbers and knows when each was answered. An answer is as old as the first number
//! above it that was acknowledged before the read was sent; a write without an answer says nothing.

use std::{
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::harness::{Client, Mode, SOON, client::seen, eventually, expect};

/// How many keys there are.
pub const KEYS: usize = 3;

/// Between two writes, and between two reads: enough of both, and not the whole machine.
const WRITE_PAUSE: Duration = Duration::from_millis(20);
const READ_PAUSE: Duration = Duration::from_millis(4);

/// The name of a key.
pub fn key(number: usize) -> String {
    format!("key{number}")
}

/// What was acknowledged.
#[derive(Clone, Default)]
pub struct Ledger(Arc<[Mutex<Vec<Acknowledged>>; KEYS]>);

#[derive(Clone, Copy)]
struct Acknowledged {
    pub number: u64,
    at: Instant,
}

impl Ledger {
    fn add(&self, key: usize, number: u64) {
        let at = Instant::now();
        self.0[key].lock().unwrap().push(Acknowledged { number, at });
    }

    /// Writes every key once, above all that it had.
    ///
    /// # Panics
    /// When a write fails.
    pub async fn write_each(&self, client: &Client, mode: Mode) {
        for number in 0..KEYS {
            let next = self.last(number) + 1;
            let written = client.put(&key(number), next.to_string().as_bytes(), mode).await;
            written.expect("a write succeeds");
            self.add(number, next);
        }
    }

    /// The highest number that was acknowledged of a key; 0: none was.
    pub fn last(&self, key: usize) -> u64 {
        self.0[key].lock().unwrap().last().map_or(0, |last| last.number)
    }

    /// How long before a read was sent the number that it should have shown was acknowledged; zero if it showed it.
    fn age(&self, read: &Read) -> Duration {
        let acknowledged = self.0[read.key].lock().unwrap();
        let missed = acknowledged.partition_point(|known| known.number <= read.number);
        let missed = acknowledged.get(missed);
        missed.map_or(Duration::ZERO, |missed| read.sent.saturating_duration_since(missed.at))
    }
}

/// A writer that goes on until it is told to stop.
pub struct Writing {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Writing {
    /// Starts to write the keys of a ledger in turn.
    pub fn start(client: &Client, mode: Mode, ledger: &Ledger) -> Writing {
        let (client, ledger) = (client.clone(), ledger.clone());
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            while !*stopped.borrow() {
                ledger.write_each(&client, mode).await;
                sleep(WRITE_PAUSE).await;
            }
        });
        Writing { stop, task }
    }

    /// Stops after the write that is under way.
    ///
    /// # Panics
    /// If a write had failed.
    pub async fn finish(self) {
        self.stop.send_replace(true);
        self.task.await.expect("every write succeeds");
    }
}

/// A read that was answered.
#[derive(Debug, Clone, Copy)]
pub struct Read {
    key: usize,
    pub sent: Instant,
    pub took: Duration,
    /// 0: no record.
    pub number: u64,
    pub source: Source,
    /// How old the copy was, as the gateway says.
    copy_age: Duration,
}

/// A reader that goes on until it is told to stop.
pub struct Reading {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    reads: Arc<Mutex<Vec<Read>>>,
}

impl Reading {
    /// Starts to read the keys in turn.
    pub fn start(client: &Client, consistency: ReadConsistency) -> Reading {
        let client = client.clone();
        let reads = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = watch::channel(false);
        let all = Arc::clone(&reads);
        let task = tokio::spawn(async move {
            for round in 0.. {
                if *stopped.borrow() {
                    return;
                }
                let number = round % KEYS;
                let read = read(&client, number, consistency).await;
                all.lock().unwrap().push(read);
                sleep(READ_PAUSE).await;
            }
        });
        Reading { stop, task, reads }
    }

    /// Waits until a read that was sent from now on was answered so.
    pub async fn until(&self, what: &str, wanted: impl Fn(&Read) -> bool) {
        let now = Instant::now();
        eventually(what, SOON, async || {
            assert!(!self.task.is_finished(), "the reads have ended");
            let last = self.reads.lock().unwrap().last().copied();
            expect(last.is_some_and(|last| last.sent > now && wanted(&last)), last)
        })
        .await;
    }

    /// Stops after the read that is under way.
    ///
    /// # Panics
    /// If a read had failed.
    pub async fn finish(self) -> Reads {
        self.stop.send_replace(true);
        self.task.await.expect("every read succeeds");
        Reads(std::mem::take(&mut self.reads.lock().unwrap()))
    }
}

/// One read of a key.
///
/// # Panics
/// When it fails.
pub async fn read(client: &Client, number: usize, consistency: ReadConsistency) -> Read {
    let sent = Instant::now();
    let read = client.get(&key(number), consistency).await.expect("a read succeeds");
    let (value, source) = seen(&read);
    Read {
        key: number,
        sent,
        took: sent.elapsed(),
        number: value.map_or(0, |value| String::from_utf8_lossy(value).parse().expect("a number")),
        source,
        copy_age: read.age.and_then(|age| age.try_into().ok()).unwrap_or_default(),
    }
}

/// What was read, in the order in which it was asked.
pub struct Reads(Vec<Read>);

impl Reads {
    /// Those that were sent in a time.
    pub fn between(&self, from: Instant, to: Instant) -> Reads {
        let within = |read: &&Read| (from..to).contains(&read.sent);
        Reads(self.0.iter().filter(within).copied().collect())
    }

    /// Those that were sent from then on.
    pub fn since(&self, from: Instant) -> Reads {
        self.between(from, from + 10 * SOON)
    }

    /// The share of them that were answered from there.
    pub fn share(&self, source: Source) -> f64 {
        assert!(!self.0.is_empty(), "nothing was read");
        let count = self.0.iter().filter(|read| read.source == source).count();
        count as f64 / self.0.len() as f64
    }

    /// How long each took.
    pub fn latencies(&self) -> Figures {
        Figures::of(self.0.iter().map(|read| read.took))
    }

    /// Those that were sent so shortly before or after the copy of their key was made anew.
    pub fn around_renewals(&self, near: Duration) -> Reads {
        let of = |key: usize| self.0.iter().filter(move |read| read.key == key);
        let renewed = |key: usize| {
            let pairs = of(key).zip(of(key).skip(1));
            let renewed = pairs.filter(|(before, after)| after.copy_age < before.copy_age);
            renewed.map(|(_, after)| after.sent).collect::<Vec<Instant>>()
        };
        let renewed: Vec<Vec<Instant>> = (0..KEYS).map(renewed).collect();
        let is_near = |read: &&Read| {
            let times = &renewed[read.key];
            times.iter().any(|at| (*at - near..*at + near).contains(&read.sent))
        };
        Reads(self.0.iter().filter(is_near).copied().collect())
    }

    /// How old each was.
    pub fn ages(&self, ledger: &Ledger) -> Figures {
        Figures::of(self.0.iter().map(|read| ledger.age(read)))
    }

    /// Asserts that none was older than `bound`, and prints how old they were.
    #[track_caller]
    pub fn assert_ages(&self, what: &str, ledger: &Ledger, bound: Duration) {
        assert!(!self.0.is_empty(), "{what}: nothing was read");
        eprintln!("{what}: {}, allowed {bound:?}", self.ages(ledger));
        for read in &self.0 {
            let age = ledger.age(read);
            assert!(
                age <= bound,
                "{what}: an answer is {age:?} old, and {bound:?} is allowed: {read:?}"
            );
        }
    }

    /// Asserts that no key was read as older than it had been read before.
    #[track_caller]
    pub fn assert_never_backwards(&self, what: &str) {
        let mut before: [Option<Read>; KEYS] = [None; KEYS];
        for read in &self.0 {
            if let Some(before) = before[read.key] {
                assert!(read.number >= before.number, "{what}: first {before:?}, then {read:?}");
            }
            before[read.key] = Some(*read);
        }
    }
}

/// Durations, to be told of.
pub struct Figures(Vec<Duration>);

impl Figures {
    pub fn of(durations: impl Iterator<Item = Duration>) -> Figures {
        let mut sorted: Vec<Duration> = durations.collect();
        sorted.sort_unstable();
        Figures(sorted)
    }

    /// What so many of a thousand do not exceed.
    pub fn permille(&self, share: usize) -> Duration {
        let rank = (self.0.len() * share).div_ceil(1_000).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }

    pub fn max(&self) -> Duration {
        self.permille(1_000)
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (p50, p99, max) = (self.permille(500), self.permille(990), self.max());
        write!(f, "{} times, p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?}", self.0.len())
    }
}
