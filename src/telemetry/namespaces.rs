//! What is counted of each namespace: which tier answered its reads, its loads and writes, and how long its calls took.
//!
//! Owns the counting, and the bound on how many namespaces are told apart: names come from callers, so that what comes after the first
//! thousand is counted together, as [`OTHERS`]. Each serving thread counts for itself, for then its lock is never contended but by
//! whoever sums. Does not own what a tier is, nor what is made of the counts. Invariants: nothing is allocated for a namespace that is
//! known; a namespace once told apart stays so; counts only grow.

use std::{
    array,
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use crate::model::Source;

/// How many namespaces are told apart.
pub const NAMESPACES_MAX: usize = 1_000;

/// What the others are counted as. No namespace can have this name.
pub const OTHERS: &str = "(others)";

/// Where a read began to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// In L1.
    L1,
    /// In what is pending and in Redis.
    Shared,
    /// In the store, overlaid with what is pending.
    Store,
}

/// A read that was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answered {
    /// Where it began.
    pub first: First,
    /// Who knew.
    pub source: Source,
    /// Whether the key is absent.
    pub absent: bool,
}

impl Answered {
    const COUNT: usize = 3 * 4 * 2;

    /// Every way to be answered.
    pub fn all() -> impl Iterator<Item = Answered> {
        [First::L1, First::Shared, First::Store].into_iter().flat_map(|first| {
            [Source::L1, Source::Pending, Source::L2, Source::Store]
                .into_iter()
                .flat_map(move |source| [false, true].map(|absent| Answered { first, source, absent }))
        })
    }

    fn index(self) -> usize {
        (self.first as usize * 4 + self.source as usize) * 2 + usize::from(self.absent)
    }
}

/// Latency buckets: eight in each doubling from 128 ns to 137 s, each a tenth wider than the one before; one below, one beyond.
const STEPS: [u64; 8] = [35_734, 38_968, 42_495, 46_341, 50_536, 55_109, 60_097, 65_536];
/// What the steps begin from: they are 2^(n/8) in this unit, so a doubling is twice that.
const STEP_BITS: u32 = 15;
const FIRST_DOUBLING: u32 = 7;
const DOUBLINGS: u32 = 30;
const BUCKETS: usize = STEPS.len() * DOUBLINGS as usize + 2;

fn bucket(nanos: u64) -> usize {
    let Some(doubling) = nanos.checked_ilog2().and_then(|log| log.checked_sub(FIRST_DOUBLING)) else {
        return 0;
    };
    if doubling >= DOUBLINGS {
        return BUCKETS - 1;
    }
    // The leading bit and the fifteen behind it.
    let place = (nanos << nanos.leading_zeros()) >> (u64::BITS - 1 - STEP_BITS);
    let step = STEPS.iter().filter(|bound| place >= **bound).count();
    1 + doubling as usize * STEPS.len() + step
}

/// Where a bucket ends, in nanoseconds; of the last one, where it begins.
fn upper_bound(index: usize) -> u64 {
    let Some(index) = index.min(BUCKETS - 2).checked_sub(1) else {
        return 1 << FIRST_DOUBLING;
    };
    // Below the number of doublings, so it fits.
    let doubling = FIRST_DOUBLING + (index / STEPS.len()) as u32;
    (STEPS[index % STEPS.len()] << doubling) >> STEP_BITS
}

/// Where in the cells of a namespace each count stands.
mod cell {
    use super::{Answered, BUCKETS};

    pub(super) const READ_FAILURES: usize = Answered::COUNT;
    pub(super) const LOADS: usize = READ_FAILURES + 1;
    pub(super) const REFRESHES: usize = LOADS + 1;
    pub(super) const WRITES: usize = REFRESHES + 1;
    pub(super) const WRITE_FAILURES: usize = WRITES + 1;
    pub(super) const READ_NANOS: usize = WRITE_FAILURES + 1;
    pub(super) const WRITE_NANOS: usize = READ_NANOS + 1;
    pub(super) const READ_BUCKETS: usize = WRITE_NANOS + 1;
    pub(super) const WRITE_BUCKETS: usize = READ_BUCKETS + BUCKETS;
    pub(super) const COUNT: usize = WRITE_BUCKETS + BUCKETS;
}

#[derive(Debug)]
struct Cells([AtomicU64; cell::COUNT]);

impl Default for Cells {
    fn default() -> Cells {
        Cells(array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Cells {
    /// Not to be called but under the table's lock: there is one writer then, and a locked add, of which a call takes several, is saved.
    fn add(&self, cell: usize, by: u64) {
        let before = self.0[cell].load(Ordering::Relaxed);
        self.0[cell].store(before.wrapping_add(by), Ordering::Relaxed);
    }

    fn add_latency(&self, nanos_cell: usize, buckets: usize, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.add(nanos_cell, nanos);
        self.add(buckets + bucket(nanos), 1);
    }
}

#[derive(Debug, Default)]
struct Table {
    named: HashMap<Box<str>, Arc<Cells>, RandomState>,
    others: Arc<Cells>,
}

/// What one thread has counted of each namespace.
#[derive(Debug, Default)]
pub struct NamespaceCounters {
    table: Mutex<Table>,
}

impl NamespaceCounters {
    /// Counts a read; `None`: it failed.
    pub fn read(&self, namespace: &str, answered: Option<Answered>, took: Duration) {
        self.count(namespace, |cells| {
            cells.add(answered.map_or(cell::READ_FAILURES, Answered::index), 1);
            cells.add_latency(cell::READ_NANOS, cell::READ_BUCKETS, took);
        });
    }

    /// Counts a write.
    pub fn write(&self, namespace: &str, failed: bool, took: Duration) {
        self.count(namespace, |cells| {
            cells.add(if failed { cell::WRITE_FAILURES } else { cell::WRITES }, 1);
            cells.add_latency(cell::WRITE_NANOS, cell::WRITE_BUCKETS, took);
        });
    }

    /// Counts a key that the store is asked for.
    pub fn load(&self, namespace: &str) {
        self.count(namespace, |cells| cells.add(cell::LOADS, 1));
    }

    /// Counts a renewal in the background.
    pub fn refresh(&self, namespace: &str) {
        self.count(namespace, |cells| cells.add(cell::REFRESHES, 1));
    }

    fn count(&self, namespace: &str, count: impl FnOnce(&Cells)) {
        let mut table = self.table.lock();
        if let Some(cells) = table.named.get(namespace) {
            count(cells);
        } else if table.named.len() < NAMESPACES_MAX {
            count(table.named.entry(namespace.into()).or_default());
        } else {
            count(&table.others);
        }
    }

    /// Adds what was counted to `sum`.
    pub(crate) fn add_to(&self, sum: &mut BTreeMap<String, Counted>) {
        // The lock is held for this alone: a serving thread may wait for it.
        let (named, others) = {
            let table = self.table.lock();
            let named: Vec<_> = table
                .named
                .iter()
                .map(|(name, cells)| (name.clone(), Arc::clone(cells)))
                .collect();
            (named, Arc::clone(&table.others))
        };
        for (name, cells) in named {
            sum.entry(name.into()).or_default().add_cells(&cells);
        }
        let mut unnamed = Counted::default();
        unnamed.add_cells(&others);
        if unnamed.calls() > 0 || unnamed.loads() > 0 {
            sum.entry(OTHERS.to_owned()).or_default().add(&unnamed);
        }
    }
}

/// What was counted of one namespace, or of several together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted(Box<[u64]>);

impl Default for Counted {
    fn default() -> Counted {
        Counted(vec![0; cell::COUNT].into())
    }
}

impl Counted {
    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Counted) {
        for (sum, other) in self.0.iter_mut().zip(&other.0) {
            *sum = sum.wrapping_add(*other);
        }
    }

    fn add_cells(&mut self, cells: &Cells) {
        for (sum, cell) in self.0.iter_mut().zip(&cells.0) {
            *sum = sum.wrapping_add(cell.load(Ordering::Relaxed));
        }
    }

    /// Reads answered so.
    pub fn answered(&self, answered: Answered) -> u64 {
        self.0[answered.index()]
    }

    /// Reads that failed.
    pub fn read_failures(&self) -> u64 {
        self.0[cell::READ_FAILURES]
    }

    /// Keys that the store was asked for.
    pub fn loads(&self) -> u64 {
        self.0[cell::LOADS]
    }

    /// Renewals in the background.
    pub fn refreshes(&self) -> u64 {
        self.0[cell::REFRESHES]
    }

    /// Writes that were answered with OK.
    pub fn writes(&self) -> u64 {
        self.0[cell::WRITES]
    }

    /// Writes that failed.
    pub fn write_failures(&self) -> u64 {
        self.0[cell::WRITE_FAILURES]
    }

    /// How long reads took, failed ones included.
    pub fn read_latency(&self) -> Latency<'_> {
        self.latency(cell::READ_NANOS, cell::READ_BUCKETS)
    }

    /// How long writes took, failed ones included.
    pub fn write_latency(&self) -> Latency<'_> {
        self.latency(cell::WRITE_NANOS, cell::WRITE_BUCKETS)
    }

    /// Reads and writes.
    pub fn calls(&self) -> u64 {
        self.read_latency().count() + self.write_latency().count()
    }

    fn latency(&self, nanos: usize, buckets: usize) -> Latency<'_> {
        Latency {
            nanos: self.0[nanos],
            buckets: &self.0[buckets..buckets + BUCKETS],
        }
    }
}

/// How long calls took.
#[derive(Debug, Clone, Copy)]
pub struct Latency<'a> {
    nanos: u64,
    buckets: &'a [u64],
}

impl Latency<'_> {
    /// How many calls.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Their mean; `None` if there were none.
    pub fn average(&self) -> Option<Duration> {
        self.nanos.checked_div(self.count()).map(Duration::from_nanos)
    }

    /// What `percent` in a hundred calls took no longer than: the upper end of a bucket, so up to a tenth more than the exact figure.
    /// `None` if there were none.
    pub fn percentile(&self, percent: u64) -> Option<Duration> {
        let rank = (self.count() * percent).div_ceil(100).max(1);
        let mut counted = 0;
        let index = self.buckets.iter().position(|calls| {
            counted += calls;
            counted >= rank
        });
        index.map(|index| Duration::from_nanos(upper_bound(index)))
    }
}

/// A count by namespace that all threads share, for what is rare enough. Bounded as the rest.
#[derive(Debug, Default)]
pub struct Tally {
    counts: Mutex<BTreeMap<Box<str>, u64>>,
}

impl Tally {
    /// Counts one.
    pub fn count(&self, namespace: &str) {
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(namespace) {
            *count += 1;
            return;
        }
        let name = if counts.len() < NAMESPACES_MAX {
            namespace
        } else {
            OTHERS
        };
        *counts.entry(name.into()).or_default() += 1;
    }

    /// The counts so far.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let counts = self.counts.lock();
        counts.iter().map(|(name, count)| (name.to_string(), *count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABSENT: Answered = Answered {
        first: First::L1,
        source: Source::Store,
        absent: true,
    };

    #[test]
    fn a_bucket_holds_what_is_below_its_bound_and_is_at_most_a_tenth_wide() {
        for index in 1..BUCKETS - 1 {
            let (from, to) = (upper_bound(index - 1), upper_bound(index));
            assert!(to as f64 <= from as f64 * 1.1, "{index}: {from} to {to}");
            assert_eq!((bucket(from + 1), bucket(to - 1)), (index, index), "{from} to {to}");
        }
        assert_eq!((bucket(0), bucket(127), bucket(128)), (0, 0, 1));
        assert_eq!(upper_bound(BUCKETS - 2), 1 << (FIRST_DOUBLING + DOUBLINGS));
        for beyond in [upper_bound(BUCKETS - 2), u64::MAX] {
            assert_eq!(bucket(beyond), BUCKETS - 1);
        }
    }

    #[test]
    fn every_way_to_be_answered_has_a_cell_of_its_own() {
        let mut seen = [false; Answered::COUNT];
        for answered in Answered::all() {
            assert!(!std::mem::replace(&mut seen[answered.index()], true));
        }
        assert!(seen.iter().all(|seen| *seen));
    }

    #[test]
    fn percentiles_are_what_so_many_calls_took_at_most() {
        let counters = NamespaceCounters::default();
        for micros in 1..=1000 {
            counters.read("a", Some(ABSENT), Duration::from_micros(micros));
        }
        counters.write("a", true, Duration::from_secs(3600));
        let mut sum = BTreeMap::new();
        counters.add_to(&mut sum);
        let counted = &sum["a"];
        let reads = counted.read_latency();
        assert_eq!((reads.count(), counted.answered(ABSENT)), (1000, 1000));
        assert_eq!(reads.average(), Some(Duration::from_nanos(500_500)));
        for percent in [1, 50, 90, 99, 100] {
            let exact = percent as f64 * 10.0;
            let told = reads.percentile(percent).expect("there were some").as_secs_f64() * 1e6;
            assert!(exact <= told && told < exact * 1.1, "{percent}: {told} for {exact}");
        }
        assert_eq!((counted.writes(), counted.write_failures()), (0, 1));
        assert_eq!(
            counted.write_latency().percentile(50),
            Some(Duration::from_nanos(1 << 37))
        );
        assert_eq!(Counted::default().read_latency().percentile(50), None);
        assert_eq!(Counted::default().read_latency().average(), None);
    }

    #[test]
    fn namespaces_beyond_the_bound_are_counted_together() {
        let (counters, tally) = (NamespaceCounters::default(), Tally::default());
        for number in 0..NAMESPACES_MAX + 5 {
            let name = format!("n{number}");
            for _ in 0..2 {
                counters.read(&name, None, Duration::ZERO);
                tally.count(&name);
            }
        }
        let mut sum = BTreeMap::new();
        counters.add_to(&mut sum);
        assert_eq!(sum.len(), NAMESPACES_MAX + 1);
        assert_eq!((sum["n0"].read_failures(), sum[OTHERS].read_failures()), (2, 10));
        let counts = tally.counts();
        assert_eq!(
            (counts.len(), counts["n0"], counts[OTHERS]),
            (NAMESPACES_MAX + 1, 2, 10)
        );
    }

    #[test]
    fn what_several_threads_counted_adds_up() {
        let metrics = crate::telemetry::calls::CallMetrics::default();
        let threads: Vec<_> = (0..2).map(|_| metrics.thread()).collect();
        for thread in &threads {
            thread.namespaces.read("a", Some(ABSENT), Duration::from_millis(1));
            thread.namespaces.load("a");
            thread.namespaces.refresh("a");
            thread.namespaces.write("b", false, Duration::from_millis(1));
        }
        let sum = metrics.namespaces();
        assert_eq!(sum.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(
            (sum["a"].answered(ABSENT), sum["a"].loads(), sum["a"].refreshes()),
            (2, 2, 2)
        );
        assert_eq!((sum["b"].writes(), sum["b"].calls()), (2, 2));
    }
}
