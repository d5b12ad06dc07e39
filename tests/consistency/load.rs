//! The clients: each a session of its own, at one replica or at all of them.
//!
//! Owns what they ask for, and that every call is noted with its times and its outcome. A call that is not answered in time, or by whom it
//! was sent to, has an outcome that nobody knows.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidegate::rpc::proto::{DeleteRequest, Entry, GetRequest, PutRequest, ReadConsistency};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};
use tonic_types::StatusExt;

use crate::{
    harness::Mode,
    history::{Act, Class, Consistency, Nanos, Op, Outcome, Value, Version},
    keys,
    stage::{Front, REPLICAS},
};

const SESSIONS: u32 = 24;

/// How long a call may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// How much longer its answer is waited for.
const GRACE: Duration = Duration::from_millis(500);

/// The hundredths of the calls that are writes.
const READS: u32 = 35;

/// The share of the calls of a quiet key that may be one.
const QUIET_WRITES: f64 = 0.01;

/// The most calls of one session: a run that is longer than that has enough of them.
const CALLS_MAX: usize = 100_000;

/// How long a client leaves those alone who have failed it.
const PACE: Duration = Duration::from_millis(10);

/// What tells a value from all others.
pub fn hash(bytes: &[u8]) -> Value {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    Value(hasher.finish())
}

/// What one client did.
#[derive(Debug, Default)]
pub struct Record {
    pub ops: Vec<Op>,
    pub failed_reads: u64,
    /// Answers that no gateway may give.
    pub complaints: Vec<String>,
}

/// The clients of a run.
pub struct Load {
    clients: JoinSet<Record>,
    stop: CancellationToken,
}

impl Load {
    pub fn start(front: &Arc<Front>, seed: u64, run: u64) -> Load {
        let stop = CancellationToken::new();
        let mut clients = JoinSet::new();
        for session in 0..SESSIONS {
            let client = Session {
                front: Arc::clone(front),
                stop: stop.clone(),
                rng: StdRng::seed_from_u64(seed.wrapping_mul(31).wrapping_add(u64::from(session))),
                number: session,
                // A third stays with one replica, and each of those has its share.
                home: session.is_multiple_of(3).then_some((session / 3) as usize % REPLICAS),
                run,
                classes: keys::classes(),
                // Another third carries what it knows.
                known: (session % 3 == 2).then(HashMap::new),
                record: Record::default(),
            };
            clients.spawn(client.run());
        }
        Load { clients, stop }
    }

    /// Lets every client finish its call. What they did.
    pub async fn finish(mut self) -> Vec<Record> {
        self.stop.cancel();
        let mut records = Vec::new();
        while let Some(record) = self.clients.join_next().await {
            records.push(record.expect("a client does not fail"));
        }
        records
    }
}

struct Session {
    front: Arc<Front>,
    stop: CancellationToken,
    rng: StdRng,
    number: u32,
    home: Option<usize>,
    run: u64,
    classes: Vec<Class>,
    /// Of each key the highest version that it wrote or was shown, if it carries that from replica to replica.
    known: Option<HashMap<usize, Version>>,
    record: Record,
}

impl Session {
    async fn run(mut self) -> Record {
        while !self.stop.is_cancelled() && self.record.ops.len() < CALLS_MAX {
            let replica = self.home.unwrap_or_else(|| self.rng.random_range(0..REPLICAS));
            let key = self.rng.random_range(0..self.classes.len());
            let asked = if keys::is_quiet(key) && !self.rng.random_bool(QUIET_WRITES) {
                READS
            } else {
                self.rng.random_range(0..100)
            };
            let answered = self.front.is_up(replica)
                && match asked {
                    0..30 => self.put(replica, key).await,
                    30..READS => self.delete(replica, key).await,
                    _ => self.get(replica, key).await,
                };
            if answered {
                // A few in between leave the machine to the gateways.
                sleep(Duration::from_micros(self.rng.random_range(0..4000))).await;
            } else {
                sleep(PACE).await;
            }
        }
        self.record
    }

    async fn put(&mut self, replica: usize, key: usize) -> bool {
        let mut value = format!("{:016x}.{}.{}.", self.run, self.number, self.record.ops.len()).into_bytes();
        let filler = self.rng.random_range(0..800);
        value.resize(value.len() + filler, b'.');
        let seen = hash(&value);
        let mode = self.mode(key);
        let request = PutRequest {
            namespace: keys::namespace(self.classes[key]).to_owned(),
            key: keys::name(key),
            value: value.into(),
            write_mode: mode.number(),
            ..PutRequest::default()
        };
        let send = async |front: &Front, session| {
            let mut stub = front.client(replica, session).stub();
            let answer = stub.put(within_deadline(request)).await?;
            Ok(answer.into_inner().version)
        };
        self.write(replica, key, mode, Some(seen), send).await
    }

    async fn delete(&mut self, replica: usize, key: usize) -> bool {
        let mode = self.mode(key);
        let request = DeleteRequest {
            namespace: keys::namespace(self.classes[key]).to_owned(),
            key: keys::name(key),
            write_mode: mode.number(),
            ..DeleteRequest::default()
        };
        let send = async |front: &Front, session| {
            let mut stub = front.client(replica, session).stub();
            let answer = stub.delete(within_deadline(request)).await?;
            Ok(answer.into_inner().version)
        };
        self.write(replica, key, mode, None, send).await
    }

    fn mode(&mut self, key: usize) -> Mode {
        match self.classes[key] {
            Class::Through => Mode::Through,
            Class::Behind => Mode::Behind,
            Class::Mixed => [Mode::Through, Mode::Behind][self.rng.random_range(0..2)],
        }
    }

    /// Sends a write and notes it. Whether it was answered with OK.
    async fn write(
        &mut self,
        replica: usize,
        key: usize,
        mode: Mode,
        value: Option<Value>,
        send: impl AsyncFnOnce(&Front, u32) -> Result<Version, Status>,
    ) -> bool {
        let front = Arc::clone(&self.front);
        let asked = Asked::now(&front, replica);
        let outcome = match timeout(DEADLINE + GRACE, send(&front, self.number)).await {
            Ok(Ok(version)) => Outcome::Ok(version),
            Ok(Err(status)) => self.outcome(&status),
            Err(_) => Outcome::Unknown,
        };
        let act = Act::Write {
            through: mode == Mode::Through,
            value,
            outcome,
        };
        self.record.ops.push(asked.answered(&front, self.number, key, act));
        if let Outcome::Ok(version) = outcome {
            self.learn(key, version);
        }
        matches!(outcome, Outcome::Ok(_))
    }

    /// What an error says about a write.
    fn outcome(&mut self, status: &Status) -> Outcome {
        let Some(info) = status.get_details_error_info() else {
            // Not the gateway's word.
            return Outcome::Unknown;
        };
        match info.metadata.get("outcome").map(String::as_str) {
            Some("not_applied") => Outcome::NotApplied,
            Some("unknown") => Outcome::Unknown,
            other => {
                let what = format!("a write failed with the outcome {other:?}: {status:?}");
                self.record.complaints.push(what);
                Outcome::Unknown
            }
        }
    }

    fn learn(&mut self, key: usize, version: Version) {
        if let Some(known) = &mut self.known {
            let highest = known.entry(key).or_default();
            *highest = version.max(*highest);
        }
    }

    /// Reads, and notes what was there. Whether it was answered.
    async fn get(&mut self, replica: usize, key: usize) -> bool {
        let consistency = match self.rng.random_range(0..20) {
            0..10 => Consistency::Cached,
            10..13 => Consistency::Shared,
            _ => Consistency::Store,
        };
        let front = Arc::clone(&self.front);
        // Who asks for a version renews the copies that are below it, and nobody would see those of a quiet key.
        let known = self.known.as_ref().filter(|_| !keys::is_quiet(key));
        let at_least = known.and_then(|known| known.get(&key).copied());
        let read = read(&front, self.number, replica, key, consistency, at_least);
        match read.await {
            Ok(op) => {
                if let Some((version, _)) = found(&op) {
                    self.learn(key, version);
                }
                self.record.ops.push(op);
                true
            }
            Err(_) => {
                self.record.failed_reads += 1;
                false
            }
        }
    }
}

/// What a read showed.
pub fn found(op: &Op) -> Option<(Version, Value)> {
    match op.act {
        Act::Read { found, .. } => found,
        Act::Write { .. } => None,
    }
}

/// Reads a key.
pub async fn read(
    front: &Front,
    session: u32,
    replica: usize,
    key: usize,
    consistency: Consistency,
    at_least: Option<Version>,
) -> Result<Op, Status> {
    let request = GetRequest {
        namespace: keys::namespace(keys::classes()[key]).to_owned(),
        key: keys::name(key),
        consistency: (match consistency {
            Consistency::Cached => ReadConsistency::Cached,
            Consistency::Shared => ReadConsistency::Shared,
            Consistency::Store => ReadConsistency::Store,
        }) as i32,
        min_version: at_least.unwrap_or(0),
        ..GetRequest::default()
    };
    let asked = Asked::now(front, replica);
    let mut stub = front.client(replica, session).stub();
    let call = timeout(DEADLINE + GRACE, stub.get(within_deadline(request)));
    let late = |_| Status::deadline_exceeded("not answered in time");
    let answer = call.await.map_err(late)??.into_inner();
    let source = answer.source().as_str_name();
    let found = answer.entry.map(|Entry { version, value, .. }| (version, hash(&value)));
    let act = Act::Read {
        consistency,
        at_least,
        found,
        stale: answer.stale,
        source,
    };
    Ok(asked.answered(front, session, key, act))
}

fn within_deadline<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

/// A call that was sent.
struct Asked {
    replica: usize,
    life: u32,
    call: Nanos,
}

impl Asked {
    fn now(front: &Front, replica: usize) -> Asked {
        Asked {
            replica,
            life: front.life(replica),
            call: front.nanos(Instant::now()),
        }
    }

    fn answered(self, front: &Front, session: u32, key: usize, act: Act) -> Op {
        let ret = front.nanos(Instant::now());
        let same = front.life(self.replica) == self.life;
        Op {
            key,
            session,
            replica: crate::history::Replica {
                number: self.replica,
                life: same.then_some(self.life),
            },
            call: self.call,
            ret,
            act,
        }
    }
}
