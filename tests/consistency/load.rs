//! The clients: each a session of its own, at one replica or at all of them.
//!
//! Owns what they ask for, and that every call is noted with its times and its outcome. A call that is not answered in time, or by whom it
//! was sent to, has an outcome that nobody knows: a write that has a name is then sent again, and sometimes all the same.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidegate::rpc::proto::{
    BatchGetRequest, BatchWriteRequest, Entry, GetRequest, GetResponse, ReadConsistency, WriteResult, batch_get_result,
    write_result,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use crate::{
    check::ONCE,
    harness::Mode,
    history::{Act, Change, Class, Condition, Consistency, Nanos, Op, Outcome, Value, Version},
    keys,
    orders::{Order, Told, outcome_of, outcome_of_item},
    stage::{Front, REPLICAS},
};

const SESSIONS: u32 = 24;

/// How long a call may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// How much longer its answer is waited for.
const GRACE: Duration = Duration::from_millis(500);

/// The hundredths of the calls that are writes.
const WRITES: u32 = 35;

/// The share of the calls of a quiet key that may be one.
const QUIET_WRITES: f64 = 0.01;

/// The shares of the calls that are several at once, of the writes and of the adds that have a name, of those that are sent again though they were
/// answered, and of the turns of a client that has one to send again which it does.
const BATCHES: f64 = 0.04;
const NAMED_WRITES: f64 = 0.4;
const NAMED_ADDS: f64 = 0.8;
const AGAIN: f64 = 0.05;
const RETRIES: f64 = 0.5;

/// How many keys a call of several has.
const BATCH: std::ops::Range<usize> = 2..9;

/// With how many writes that are to be sent again a session sends nothing else.
const OPEN_MAX: usize = 16;

/// How many writes a session keeps to send them again, and for how long: names are remembered for ten minutes.
const KEPT_MAX: usize = 8;
const KEPT: Duration = Duration::from_secs(120);

/// How long after the run a write with a name is sent again until it is answered.
const PATIENCE: Duration = Duration::from_secs(30);

/// The most calls of one session: a run that is longer than that has enough of them.
const CALLS_MAX: usize = 100_000;

/// How long a client leaves those alone who have failed it.
const PACE: Duration = Duration::from_millis(10);

/// What tells a value of a key from all others of it.
pub fn tell(key: usize, bytes: &[u8]) -> Value {
    if keys::classes()[key] == Class::Counter
        && let Some(number) = std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok())
    {
        return Value(number);
    }
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
                shown: HashMap::new(),
                written: 0,
                open: VecDeque::new(),
                kept: VecDeque::new(),
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
    /// Of each key the version that it was shown last.
    shown: HashMap<usize, Version>,
    /// How many writes it has sent, each time that one is sent again not counted.
    written: u64,
    /// Writes with names that were not answered.
    open: VecDeque<Order>,
    /// Those that were, to be sent again.
    kept: VecDeque<(Instant, Order)>,
    record: Record,
}

impl Session {
    async fn run(mut self) -> Record {
        while !self.stop.is_cancelled() && self.record.ops.len() < CALLS_MAX {
            if self.turn().await {
                // A few in between leave the machine to the gateways.
                sleep(Duration::from_micros(self.rng.random_range(0..4000))).await;
            } else {
                sleep(PACE).await;
            }
        }
        self.end().await;
        self.record
    }

    /// Sends something. Whether it was answered.
    async fn turn(&mut self) -> bool {
        let replica = self.home.unwrap_or_else(|| self.rng.random_range(0..REPLICAS));
        if self.open.len() >= OPEN_MAX || !self.open.is_empty() && self.rng.random_bool(RETRIES) {
            let order = self.open.pop_front();
            return self.again(replica, order).await;
        }
        if !self.kept.is_empty() && self.rng.random_bool(AGAIN) {
            let place = self.rng.random_range(0..self.kept.len());
            let kept = self.kept.remove(place).filter(|(since, _)| since.elapsed() < KEPT);
            return self.again(replica, kept.map(|(_, order)| order)).await;
        }
        if !self.front.is_up(replica) {
            return false;
        }
        if self.rng.random_bool(BATCHES) {
            return if self.rng.random() {
                self.get_several(replica).await
            } else {
                self.write_several(replica).await
            };
        }
        let key = self.rng.random_range(0..self.classes.len());
        let writes =
            (!keys::is_quiet(key) || self.rng.random_bool(QUIET_WRITES)) && self.rng.random_range(0..100) < WRITES;
        if !writes {
            return self.get(replica, key).await;
        }
        let order = self.order(replica, key, true);
        self.write(replica, order).await
    }

    /// Sends a write again that has a name, to whom it may be sent.
    async fn again(&mut self, replica: usize, order: Option<Order>) -> bool {
        let Some(order) = order else { return true };
        let replica = order.home.unwrap_or(replica);
        if !self.front.is_up(replica) {
            self.open.push_back(order);
            return false;
        }
        self.write(replica, order).await
    }

    /// Sends what was not answered until it is, when everything is whole again.
    async fn end(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while let Some(order) = self.open.pop_front() {
            let replica = order.home.unwrap_or_else(|| self.rng.random_range(0..REPLICAS));
            let Order {
                key, change, request, ..
            } = order;
            let what = format!("{change:?} of key {key} as request {request:?}");
            if self.front.is_up(replica) && self.write(replica, order).await {
                continue;
            }
            if Instant::now() > deadline {
                let what = format!("when all was healed for {PATIENCE:?} this was not answered: {what}");
                self.record.complaints.push(what);
                return;
            }
            sleep(PACE).await;
        }
    }

    /// Makes up a write of a key; one of several is a put or a delete.
    fn order(&mut self, replica: usize, key: usize, alone: bool) -> Order {
        self.written += 1;
        let number = u64::from(self.number) << 32 | self.written;
        let class = self.classes[key];
        if class == Class::Counter {
            let named = self.rng.random_bool(NAMED_ADDS);
            let delta = if named { self.rng.random_range(1..10) } else { ONCE };
            return Order {
                key,
                mode: Mode::Through,
                change: Change::Add { delta, made: None },
                condition: None,
                request: named.then_some(number),
                value: bytes::Bytes::new(),
                home: None,
            };
        }
        let mut value = format!("{:016x}.{number}.", self.run).into_bytes();
        value.resize(value.len() + self.rng.random_range(0..800), b'.');
        let put = Change::Put(tell(key, &value));
        let shown = self.shown.get(&key).copied().map(Condition::Version);
        let dice = self.rng.random_range(match class {
            Class::Behind => 0..65,
            // More of what has to wait for what is pending.
            Class::Mixed => 25..100,
            Class::Through | Class::Counter => 0..100,
        });
        let (change, condition) = match dice {
            0..55 => (put, None),
            55..65 => (Change::Delete, None),
            65..73 => (put, Some(Condition::Absent)),
            73..78 => (put, Some(Condition::Present)),
            78..88 => (put, shown),
            88..92 => (Change::Delete, shown),
            92..95 => (Change::Delete, Some(Condition::Present)),
            _ if alone => (Change::Touch, None),
            _ => (put, Some(Condition::Absent)),
        };
        let decided = condition.is_some() || change == Change::Touch;
        let mode = match class {
            Class::Behind => Mode::Behind,
            Class::Mixed if !decided && self.rng.random() => Mode::Behind,
            Class::Through | Class::Mixed | Class::Counter => Mode::Through,
        };
        let named = self.rng.random_bool(NAMED_WRITES);
        Order {
            key,
            mode,
            change,
            condition,
            request: named.then_some(number),
            value: value.into(),
            home: (named && mode == Mode::Behind).then_some(replica),
        }
    }

    /// Sends a write and notes it. Whether it was answered, if with a refusal.
    async fn write(&mut self, replica: usize, order: Order) -> bool {
        let front = Arc::clone(&self.front);
        let asked = Asked::now(&front, replica);
        let told = match timeout(DEADLINE + GRACE, self.send(&front, replica, &order)).await {
            Ok(Ok(told)) => told,
            Ok(Err(status)) => self.failed(outcome_of(&status)),
            Err(_) => Told::Failed(Outcome::Unknown),
        };
        self.note(order, told, &asked)
    }

    async fn send(&self, front: &Front, replica: usize, order: &Order) -> Result<Told, Status> {
        let mut stub = front.client(replica, self.number).stub();
        Ok(match order.change {
            Change::Put(_) => Told::version(
                stub.put(within_deadline(order.put(self.run)))
                    .await?
                    .into_inner()
                    .version,
            ),
            Change::Delete => Told::version(
                stub.delete(within_deadline(order.delete(self.run)))
                    .await?
                    .into_inner()
                    .version,
            ),
            Change::Touch => Told::version(
                stub.touch(within_deadline(order.touch(self.run)))
                    .await?
                    .into_inner()
                    .version,
            ),
            Change::Add { delta, .. } => {
                let request = within_deadline(order.increment(self.run, delta));
                let answer = stub.increment(request).await?.into_inner();
                Told::Ok {
                    version: answer.version,
                    made: Some(Value(answer.value as u64)),
                }
            }
        })
    }

    /// Sends several writes at once.
    async fn write_several(&mut self, replica: usize) -> bool {
        let mut orders = Vec::new();
        for key in self.several(|key, class| !keys::is_quiet(key) && class != Class::Counter) {
            orders.push(self.order(replica, key, false));
        }
        // Now and then one key twice.
        if self.rng.random_range(0..10) == 0 {
            let key = orders[0].key;
            orders.push(self.order(replica, key, false));
        }
        let front = Arc::clone(&self.front);
        let asked = Asked::now(&front, replica);
        let mut stub = front.client(replica, self.number).stub();
        let request = within_deadline(BatchWriteRequest {
            items: orders.iter().map(|order| order.item(self.run)).collect(),
        });
        let results = match timeout(DEADLINE + GRACE, stub.batch_write(request)).await {
            Ok(Ok(answer)) => answer.into_inner().results,
            Ok(Err(status)) => {
                let told = self.failed(outcome_of(&status));
                orders.into_iter().for_each(|order| {
                    self.note(order, told, &asked);
                });
                return false;
            }
            Err(_) => {
                let told = Told::Failed(Outcome::Unknown);
                orders.into_iter().for_each(|order| {
                    self.note(order, told, &asked);
                });
                return false;
            }
        };
        if results.len() != orders.len() {
            let what = format!("{} writes were answered by {}", orders.len(), results.len());
            self.record.complaints.push(what);
        }
        let mut answered = true;
        for (order, WriteResult { outcome }) in orders.into_iter().zip(results) {
            let told = match outcome {
                Some(write_result::Outcome::Written(written)) => Told::version(written.version),
                Some(write_result::Outcome::Failure(failure)) => self.failed(outcome_of_item(&failure)),
                None => self.failed(Err("one of several writes has no outcome".to_owned())),
            };
            answered &= self.note(order, told, &asked);
        }
        answered
    }

    /// Some keys that fit, each once.
    fn several(&mut self, fits: impl Fn(usize, Class) -> bool) -> BTreeSet<usize> {
        let fitting: Vec<usize> = (0..self.classes.len())
            .filter(|key| fits(*key, self.classes[*key]))
            .collect();
        let count = self.rng.random_range(BATCH);
        (0..count)
            .map(|_| fitting[self.rng.random_range(0..fitting.len())])
            .collect()
    }

    /// Notes a write that was sent. Whether it was answered, if with a refusal.
    fn note(&mut self, order: Order, told: Told, asked: &Asked) -> bool {
        let act = order.act(told);
        self.record
            .ops
            .push(asked.answered(&self.front, self.number, order.key, act));
        let answered = match told {
            Told::Ok { version, .. } => {
                self.shown.insert(order.key, version);
                self.learn(order.key, version);
                true
            }
            Told::Failed(Outcome::Refused(standing)) => {
                if let Some(standing) = standing {
                    self.shown.insert(order.key, standing);
                }
                true
            }
            Told::Failed(_) => false,
        };
        if order.request.is_none() {
            return answered;
        }
        // What was not applied need not be sent again; but what is to be counted is.
        let again = match told {
            Told::Failed(Outcome::NotApplied) => matches!(order.change, Change::Add { .. }) || self.rng.random(),
            _ => true,
        };
        if !answered && again {
            self.open.push_back(order);
        } else if again {
            self.kept.push_back((Instant::now(), order));
            if self.kept.len() > KEPT_MAX {
                self.kept.pop_front();
            }
        }
        answered
    }

    fn failed(&mut self, outcome: Result<Outcome, String>) -> Told {
        Told::Failed(outcome.unwrap_or_else(|what| {
            self.record.complaints.push(what);
            Outcome::Unknown
        }))
    }

    fn learn(&mut self, key: usize, version: Version) {
        if let Some(known) = &mut self.known {
            let highest = known.entry(key).or_default();
            *highest = version.max(*highest);
        }
    }

    fn consistency(&mut self) -> Consistency {
        match self.rng.random_range(0..20) {
            0..10 => Consistency::Cached,
            10..13 => Consistency::Shared,
            _ => Consistency::Store,
        }
    }

    /// Reads several keys at once.
    async fn get_several(&mut self, replica: usize) -> bool {
        // Of one namespace.
        let class = self.classes[self.rng.random_range(0..self.classes.len())];
        let keys = self.several(|_, other| other == class);
        let consistency = self.consistency();
        let request = within_deadline(BatchGetRequest {
            namespace: keys::namespace(class).to_owned(),
            keys: keys.iter().map(|key| keys::name(*key)).collect(),
            consistency: number(consistency),
            max_staleness: None,
        });
        let front = Arc::clone(&self.front);
        let asked = Asked::now(&front, replica);
        let mut stub = front.client(replica, self.number).stub();
        let Ok(Ok(answer)) = timeout(DEADLINE + GRACE, stub.batch_get(request)).await else {
            self.record.failed_reads += 1;
            return false;
        };
        let results = answer.into_inner().results;
        if results.len() != keys.len() {
            let what = format!("{} reads were answered by {}", keys.len(), results.len());
            self.record.complaints.push(what);
        }
        for (key, result) in keys.into_iter().zip(results) {
            match result.outcome {
                Some(batch_get_result::Outcome::Found(found)) => {
                    let act = shown(key, consistency, None, &found);
                    self.note_read(asked.answered(&front, self.number, key, act));
                }
                Some(batch_get_result::Outcome::Failure(_)) => self.record.failed_reads += 1,
                None => self
                    .record
                    .complaints
                    .push("one of several reads has no outcome".to_owned()),
            }
        }
        true
    }

    fn note_read(&mut self, op: Op) {
        if let Some((version, _)) = found(&op) {
            self.shown.insert(op.key, version);
            self.learn(op.key, version);
        }
        self.record.ops.push(op);
    }

    /// Reads, and notes what was there. Whether it was answered.
    async fn get(&mut self, replica: usize, key: usize) -> bool {
        let consistency = self.consistency();
        let front = Arc::clone(&self.front);
        // Who asks for a version renews the copies that are below it, and nobody would see those of a quiet key.
        let known = self.known.as_ref().filter(|_| !keys::is_quiet(key));
        let at_least = known.and_then(|known| known.get(&key).copied());
        let read = read(&front, self.number, replica, key, consistency, at_least);
        match read.await {
            Ok(op) => {
                self.note_read(op);
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
        consistency: number(consistency),
        min_version: at_least.unwrap_or(0),
        ..GetRequest::default()
    };
    let asked = Asked::now(front, replica);
    let mut stub = front.client(replica, session).stub();
    let call = timeout(DEADLINE + GRACE, stub.get(within_deadline(request)));
    let late = |_| Status::deadline_exceeded("not answered in time");
    let answer = call.await.map_err(late)??.into_inner();
    let act = shown(key, consistency, at_least, &answer);
    Ok(asked.answered(front, session, key, act))
}

/// What an answer shows of a key.
fn shown(key: usize, consistency: Consistency, at_least: Option<Version>, answer: &GetResponse) -> Act {
    let entry = answer.entry.as_ref();
    Act::Read {
        consistency,
        at_least,
        found: entry.map(|Entry { version, value, .. }| (*version, tell(key, value))),
        stale: answer.stale,
        source: answer.source().as_str_name(),
    }
}

fn number(consistency: Consistency) -> i32 {
    (match consistency {
        Consistency::Cached => ReadConsistency::Cached,
        Consistency::Shared => ReadConsistency::Shared,
        Consistency::Store => ReadConsistency::Store,
    }) as i32
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

    fn answered(&self, front: &Front, session: u32, key: usize, act: Act) -> Op {
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
