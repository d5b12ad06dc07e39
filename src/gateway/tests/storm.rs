//! Everything at once: callers who read and write a few keys while the store fails in every way that it can, at random, from a seed.
//!
//! Checked at every read: it is not older than a write of its key that had been answered before the read began; what a version was said
//! to hold is what is read under it; what was refused is never seen. And at the end: the store agrees.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{task::JoinSet, time::sleep};

use super::*;
use crate::store::StoreErrorKind;

const SEEDS: u64 = 40;
const CALLERS: usize = 8;
const STEPS: usize = 120;
const KEYS: usize = 3;

/// What callers know of one storm.
struct Ledger {
    seed: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    writes: u64,
    /// The highest version of each key that a caller was given.
    answered: HashMap<Key, Version>,
    /// What was written under the versions that callers were given; `None` is a delete.
    written: HashMap<(Key, Version), Option<Bytes>>,
    /// Values of writes that were refused for good, and every value that was read.
    refused: HashSet<Bytes>,
    read: HashSet<Bytes>,
    met: Met,
}

/// How often each outcome was met, to tell a storm from a calm.
#[derive(Debug, Default, Clone, Copy)]
struct Met {
    through: u32,
    behind: u32,
    not_applied: u32,
    unknown: u32,
    reads: u32,
    reads_failed: u32,
    refreshes: u64,
}

impl Ledger {
    /// A value that no other write has; `None` for a delete, now and then.
    fn value(&self, rng: &mut StdRng) -> Option<Bytes> {
        let mut state = self.state.lock();
        state.writes += 1;
        let bytes = format!("{:0width$}", state.writes, width = rng.random_range(1..200));
        rng.random_bool(0.8).then(|| Bytes::from(bytes))
    }

    fn note_write(&self, key: Key, value: Option<Bytes>, outcome: Result<Written, Error>) {
        let state = &mut *self.state.lock();
        match outcome {
            Ok(Written {
                version, durability, ..
            }) => {
                match durability {
                    Durability::Store => state.met.through += 1,
                    Durability::Journal | Durability::Memory => state.met.behind += 1,
                }
                let highest = state.answered.entry(key.clone()).or_insert(version);
                *highest = version.max(*highest);
                let twin = state.written.insert((key, version), value);
                assert!(twin.is_none(), "two writes got one version, seed {}", self.seed);
            }
            Err(error) if error.outcome() == Outcome::NotApplied => {
                state.met.not_applied += 1;
                state.refused.extend(value);
            }
            Err(_) => state.met.unknown += 1,
        }
    }

    fn check_read(&self, key: &Key, floor: Option<Version>, loaded: Loaded) {
        let state = &mut *self.state.lock();
        state.met.reads += 1;
        let (version, source, seed) = (loaded.copy.version(), loaded.source, self.seed);
        assert!(
            version >= floor,
            "{version:?} of {key:?} is read from {source:?} after {floor:?} was answered, seed {seed}"
        );
        let Some(entry) = loaded.copy.entry else { return };
        if let Some(written) = state.written.get(&(key.clone(), entry.version)) {
            assert_eq!(*written, entry.value, "from {source:?}, seed {seed}");
        }
        state.read.extend(entry.value);
    }
}

/// A gateway that is short of everything, so that every way is taken.
fn short(rng: &mut StdRng) -> Rig {
    rig(|setup| {
        setup.memory_bytes = [0, 1500, 1 << 20][rng.random_range(0..3)];
        setup.namespace = NamespaceSettings {
            write_delay: Duration::from_millis([0, 30][rng.random_range(0..2)]),
            queue_full: [QueueFull::Wait, QueueFull::Reject, QueueFull::WriteThrough][rng.random_range(0..3)],
            cache_lifetime: Duration::from_millis([20, 500][rng.random_range(0..2)]),
            absence_lifetime: Duration::from_millis(20),
            refresh_threshold: 0.9,
            ..NamespaceSettings::default()
        };
        setup.queue.entries_max = NonZeroUsize::new(rng.random_range(1..6)).expect("at least one");
        setup.queue.retry_backoff_max = Duration::from_millis(200);
    })
}

/// A store that is slow now and then, fails, and leaves its callers in doubt.
fn faults(mut rng: StdRng) -> impl FnMut(Call) -> Option<Fault> + Send {
    move |_| {
        let fault = match rng.random_range(0..20) {
            0 => Fault::fail(StoreErrorKind::Transient),
            1 => Fault::fail(StoreErrorKind::Unknown),
            2 => Fault::lose_reply(),
            3 => Fault::land_later(),
            4..12 => Fault::delay(Duration::ZERO),
            _ => return None,
        };
        Some(fault.after(Duration::from_millis(rng.random_range(0..40))))
    }
}

async fn look(gateway: &Gateway, key: &Key, consistency: ReadConsistency, deadline: Instant) -> Option<Loaded> {
    let answer = gateway.answer(key, consistency.into(), deadline);
    timeout_at(deadline, answer).await.ok()?.ok()
}

async fn caller(gateway: Gateway, ledger: Arc<Ledger>, mut rng: StdRng) {
    for _ in 0..STEPS {
        sleep(Duration::from_millis(rng.random_range(0..15))).await;
        let key = key(&rng.random_range(0..KEYS).to_string());
        let deadline = Instant::now() + Duration::from_millis([20, 300, 3_000][rng.random_range(0..3)]);
        if rng.random_bool(0.5) {
            let value = ledger.value(&mut rng);
            let request = WriteRequest {
                key: key.clone(),
                value: value.clone(),
                ttl: None,
                mode: Some([Through, Behind][rng.random_range(0..2)]),
                tags: Tags::default(),
                condition: None,
                request: None,
                await_persisted: false,
            };
            let outcome = gateway.write(request, deadline).await;
            ledger.note_write(key, value, outcome);
        } else {
            let consistency = [Cached, Cached, Shared, ReadConsistency::Store][rng.random_range(0..4)];
            let floor = ledger.state.lock().answered.get(&key).copied();
            match look(&gateway, &key, consistency, deadline).await {
                Some(loaded) => ledger.check_read(&key, floor, loaded),
                None => ledger.state.lock().met.reads_failed += 1,
            }
        }
    }
}

/// Takes the store away now and then, and lets what is in doubt take effect late.
async fn weather(fake: FakeBackend, mut rng: StdRng) {
    loop {
        sleep(Duration::from_millis(rng.random_range(0..400))).await;
        fake.land();
        if rng.random_bool(0.2) {
            fake.down(true);
            sleep(Duration::from_millis(rng.random_range(0..300))).await;
            fake.down(false);
        }
    }
}

async fn storm(seed: u64) -> Met {
    let mut rng = StdRng::seed_from_u64(seed);
    let rig = short(&mut rng);
    let ledger = Arc::new(Ledger {
        seed,
        state: Mutex::default(),
    });
    rig.fake.script(faults(StdRng::seed_from_u64(rng.random())));
    let weather = tokio::spawn(weather(rig.fake.clone(), StdRng::seed_from_u64(rng.random())));
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let rng = StdRng::seed_from_u64(rng.random());
        callers.spawn(caller(rig.gateway.clone(), Arc::clone(&ledger), rng));
    }
    while let Some(caller) = callers.join_next().await {
        caller.expect("no caller finds a fault");
    }
    weather.abort();
    rig.fake.down(false);
    rig.fake.script(|_| None);
    rig.fake.land();
    eventually(|| !rig.store.breaker().is_open()).await;
    rig.drained().await;
    rig.gateway.finish().await;
    rig.fake.land();

    for number in 0..KEYS {
        let key = key(&number.to_string());
        let stored = rig.fake.entry(&key);
        let floor = ledger.state.lock().answered.get(&key).copied();
        assert!(stored.as_ref().map(|entry| entry.version) >= floor, "lost, seed {seed}");
        let read = look(&rig.gateway, &key, ReadConsistency::Store, Instant::now() + PATIENCE).await;
        let read = read.expect("the weather is fine");
        assert_eq!(read.copy.entry, stored, "seed {seed}");
        ledger.check_read(&key, floor, read);
    }
    let state = ledger.state.lock();
    let seen = state.refused.intersection(&state.read).count();
    assert_eq!(seen, 0, "refused, and yet read, seed {seed}");
    Met {
        refreshes: rig.parts().metrics.refreshes.get(),
        ..state.met
    }
}

#[tokio::test(start_paused = true)]
async fn no_read_is_older_than_what_was_answered_before_it_began() {
    let mut all = Met::default();
    for seed in 0..SEEDS {
        let met = storm(seed).await;
        all = Met {
            through: all.through + met.through,
            behind: all.behind + met.behind,
            not_applied: all.not_applied + met.not_applied,
            unknown: all.unknown + met.unknown,
            reads: all.reads + met.reads,
            reads_failed: all.reads_failed + met.reads_failed,
            refreshes: all.refreshes + met.refreshes,
        };
    }
    let calls = [
        all.through,
        all.behind,
        all.not_applied,
        all.unknown,
        all.reads,
        all.reads_failed,
    ];
    assert!(calls.iter().all(|count| *count > 100) && all.refreshes > 100, "{all:?}");
}
