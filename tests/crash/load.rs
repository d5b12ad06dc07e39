//! The clients: writers, readers and those who count, each in a task of its own, over a few connections.
//!
//! Owns what they ask for, and that the ledger hears of it before it is sent and after it is answered. They end when they are told to, or when
//! the gateway no longer answers as a gateway.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidegate::rpc::proto::{DeleteRequest, Durability, GetResponse, IncrementRequest, PutRequest, ReadConsistency};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Endpoint};
use tonic_types::StatusExt;

use crate::{
    counters::{self, Answer, Counters},
    harness::{Client, Gateway, Mode, SOON},
    ledger::{Asked, Floor, Key, Ledger, NAMESPACES, Seen, TTL_MILLIS, VOLATILE},
    plan::Plan,
};

const WRITERS: u64 = 16;
const READERS: u64 = 4;
const CONNECTIONS: usize = 4;

/// Few keys get half of the calls.
const HOT_KEYS: Range<u32> = 0..8;
const WIDE_KEYS: Range<u32> = 8..1500;

/// Few counters get most of what is added; the others are there to be made.
const HOT_COUNTERS: Range<u32> = 0..3;
const WIDE_COUNTERS: Range<u32> = 3..400;

/// The hundredths of the writes that have a name, and of those the ones that are sent twice at a time; of all writes, those that are an earlier one
/// once more; and of the answered adds, those that are sent again all the same.
const NAMED: u32 = 40;
const TWICE: u32 = 10;
const AGAIN: u32 = 12;
const ADDED_AGAIN: u32 = 5;

/// The hundredths of the adds that have no name.
const NAMELESS: u32 = 20;

/// How long a client leaves a gateway alone that has refused it.
const PACE: Duration = Duration::from_millis(5);

/// The clients of one life of the gateway.
pub struct Load {
    clients: JoinSet<()>,
    stop: CancellationToken,
}

/// What every client has.
#[derive(Clone)]
struct Caller {
    client: Client,
    ledger: Arc<Mutex<Ledger>>,
    counters: Arc<Mutex<Counters>>,
    stop: CancellationToken,
    namespaces: Range<usize>,
}

impl Load {
    /// Starts the clients of a round.
    pub fn start(gateway: &Gateway, ledger: &Arc<Mutex<Ledger>>, counters: &Arc<Mutex<Counters>>, plan: &Plan) -> Load {
        let stop = CancellationToken::new();
        let mut clients = JoinSet::new();
        let endpoint = Endpoint::from_shared(format!("http://{}", gateway.address)).expect("an address makes a URL");
        let connections: Vec<Client> = (0..CONNECTIONS).map(|_| Client::new(endpoint.connect_lazy())).collect();
        for number in 0..WRITERS + READERS + counters::CLIENTS as u64 {
            let caller = Caller {
                client: connections[number as usize % CONNECTIONS].clone(),
                ledger: Arc::clone(ledger),
                counters: Arc::clone(counters),
                stop: stop.clone(),
                namespaces: plan.namespaces.clone(),
            };
            let rng = StdRng::seed_from_u64(plan.seed.wrapping_mul(31).wrapping_add(number));
            if number < WRITERS {
                clients.spawn(caller.write(rng));
            } else if number < WRITERS + READERS {
                clients.spawn(caller.read(rng));
            } else {
                clients.spawn(caller.count((number - WRITERS - READERS) as usize, rng));
            }
        }
        Load { clients, stop }
    }

    /// Lets every client finish its call, and waits for that.
    pub async fn finish(mut self) {
        self.stop.cancel();
        let finished = async {
            while let Some(ended) = self.clients.join_next().await {
                ended.expect("a client does not fail");
            }
        };
        timeout(SOON, finished)
            .await
            .expect("a call is neither answered nor cut off in 30 s");
    }
}

impl Caller {
    async fn write(self, mut rng: StdRng) {
        while !self.stop.is_cancelled() {
            let (write, key, named, asked, mode) = self.next_write(&mut rng);
            let (value, name) = {
                let ledger = self.ledger.lock();
                let name = if named { ledger.name(write) } else { String::new() };
                (ledger.value(write), name)
            };
            let send = || self.send(key, asked, &value, mode, &name);
            let answers = if named && rng.random_range(0..100) < TWICE {
                let both = tokio::join!(send(), send());
                vec![both.0, both.1]
            } else {
                vec![send().await]
            };
            let failed = answers.iter().any(Result::is_err);
            let mut is_there = true;
            // One of them may have been written, whatever the other was told.
            let told: Vec<Told> = answers.iter().map(Told::of).collect();
            let refused = told.iter().all(|told| *told == Told::Refused);
            for answer in answers {
                match answer {
                    Ok((version, durability)) => self.ledger.lock().acknowledge(write, version, durability),
                    Err(status) => is_there &= self.note_failure(Some(key), &status),
                }
            }
            {
                let mut ledger = self.ledger.lock();
                if refused {
                    ledger.refuse(write);
                } else if told.contains(&Told::Unknown) {
                    ledger.leave_open(write);
                }
                if named {
                    ledger.keep_named(write, now_millis());
                }
            }
            if !is_there {
                return;
            }
            if failed {
                sleep(PACE).await;
            }
        }
    }

    /// A write, or an earlier one again: whether it has a name, and how it is to be sent.
    fn next_write(&self, rng: &mut StdRng) -> (usize, Key, bool, Asked, Mode) {
        let (mode, asked) = match rng.random_range(0..100) {
            0..58 => (Mode::Behind, Asked::Put { expires: false }),
            58..66 => (Mode::Behind, Asked::Put { expires: true }),
            66..80 => (Mode::Behind, Asked::Delete),
            80..92 => (Mode::Through, Asked::Put { expires: false }),
            92..94 => (Mode::Through, Asked::Put { expires: true }),
            _ => (Mode::Through, Asked::Delete),
        };
        let key = self.key(rng);
        // What rests on memory has no name that outlives it.
        let named = key.namespace != VOLATILE && rng.random_range(0..100) < NAMED;
        let again = rng.random_range(0..100) < AGAIN;
        let choice = rng.random_range(0..usize::MAX);
        let mut ledger = self.ledger.lock();
        if again && let Some(write) = ledger.take_named(choice) {
            let (key, asked) = ledger.send_again(write);
            return (write, key, true, asked, mode);
        }
        (ledger.send(key, asked, now_millis()), key, named, asked, mode)
    }

    async fn send(
        &self,
        key: Key,
        asked: Asked,
        value: &[u8],
        mode: Mode,
        name: &str,
    ) -> Result<(i64, Durability), Status> {
        let client = self.client.namespace(key.namespace());
        let mut stub = client.stub();
        if asked == Asked::Delete {
            let request = DeleteRequest {
                namespace: key.namespace().to_owned(),
                key: key.name(),
                write_mode: mode.number(),
                request_id: name.to_owned(),
                ..DeleteRequest::default()
            };
            let answer = stub.delete(request).await?.into_inner();
            return Ok((answer.version, answer.durability()));
        }
        let ttl = Duration::from_millis(TTL_MILLIS);
        let request = PutRequest {
            ttl: (asked == Asked::Put { expires: true }).then(|| ttl.try_into().expect("it fits")),
            request_id: name.to_owned(),
            ..client.put_request(&key.name(), value, mode)
        };
        let answer = stub.put(request).await?.into_inner();
        Ok((answer.version, answer.durability()))
    }

    /// Counts, and sends what was not answered again: also what an earlier life of the gateway left unanswered.
    async fn count(self, client: usize, mut rng: StdRng) {
        while !self.stop.is_cancelled() {
            let unanswered = self.counters.lock().unanswered(client);
            let sent = unanswered.unwrap_or_else(|| {
                let named = rng.random_range(0..100) >= NAMELESS;
                let delta = if named {
                    rng.random_range(1..=counters::NAMED_MAX)
                } else {
                    counters::ONCE
                };
                let numbers = if rng.random_range(0..4) == 0 {
                    WIDE_COUNTERS
                } else {
                    HOT_COUNTERS
                };
                self.counters
                    .lock()
                    .send(client, rng.random_range(numbers), delta, named)
            });
            match add(&self.client, &self.counters, &sent).await {
                Ok(()) if !sent.request_id.is_empty() && rng.random_range(0..100) < ADDED_AGAIN => {
                    let again = self.counters.lock().send_again(sent.number);
                    if let Err(status) = add(&self.client, &self.counters, &again).await
                        && !self.note_failure(None, &status)
                    {
                        return;
                    }
                }
                Ok(()) => {}
                Err(status) => {
                    if !self.note_failure(None, &status) {
                        return;
                    }
                    sleep(PACE).await;
                }
            }
        }
    }

    async fn read(self, mut rng: StdRng) {
        while !self.stop.is_cancelled() {
            let key = self.key(&mut rng);
            let consistency = match rng.random_range(0..3) {
                0 => ReadConsistency::Cached,
                1 => ReadConsistency::Shared,
                _ => ReadConsistency::Store,
            };
            if let Err(status) = read(&self.client, &self.ledger, key, consistency).await {
                if !self.note_failure(Some(key), &status) {
                    return;
                }
                sleep(PACE).await;
            }
        }
    }

    fn key(&self, rng: &mut StdRng) -> Key {
        let numbers = if rng.random() { HOT_KEYS } else { WIDE_KEYS };
        Key {
            namespace: rng.random_range(self.namespaces.clone()),
            number: rng.random_range(numbers),
        }
    }

    /// Notes how a call failed. Whether it was the gateway that said so.
    fn note_failure(&self, key: Option<Key>, status: &Status) -> bool {
        let Some(info) = status.get_details_error_info() else {
            return false;
        };
        let outcome = info.metadata.get("outcome").map(String::as_str);
        if !matches!(outcome, Some("not_applied" | "unknown")) {
            let what = format!("a call failed with the outcome {outcome:?}");
            self.ledger.lock().complain_at(key, what);
        }
        match status.code() {
            Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded => {}
            code => {
                let what = format!("a call failed with {code:?}: {}", status.message());
                self.ledger.lock().complain_at(key, what);
            }
        }
        true
    }
}

/// What the caller of a write was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Ok,
    Refused,
    Unknown,
    /// Nothing, by nobody.
    Nothing,
}

impl Told {
    fn of<T>(answer: &Result<T, Status>) -> Told {
        let Err(status) = answer else { return Told::Ok };
        let info = status.get_details_error_info();
        match info.map(|info| {
            info.metadata
                .get("outcome")
                .is_some_and(|outcome| outcome == "not_applied")
        }) {
            None => Told::Nothing,
            Some(true) => Told::Refused,
            Some(false) => Told::Unknown,
        }
    }
}

/// Sends an add, and notes what came of it.
pub async fn add(client: &Client, counters: &Mutex<Counters>, sent: &counters::Sent) -> Result<(), Status> {
    let request = IncrementRequest {
        namespace: counters::NAMESPACE.to_owned(),
        key: sent.counter.clone(),
        delta: Some(sent.delta),
        request_id: sent.request_id.clone(),
        ..IncrementRequest::default()
    };
    let answer = client.stub().increment(request).await.map(tonic::Response::into_inner);
    match &answer {
        Ok(answer) => {
            let counted = Answer {
                value: answer.value,
                version: answer.version,
            };
            counters.lock().answer(sent.number, counted, answer.deduplicated);
        }
        Err(_) if Told::of(&answer) == Told::Refused => {}
        Err(_) => counters.lock().doubt(sent.number),
    }
    answer.map(|_| ())
}

/// Reads a key, and tells the ledger what was there.
pub async fn read(
    client: &Client,
    ledger: &Mutex<Ledger>,
    key: Key,
    consistency: ReadConsistency,
) -> Result<GetResponse, Status> {
    let floor = ledger.lock().floor(key);
    let answer = client.namespace(key.namespace()).get(&key.name(), consistency).await?;
    let how = format!(
        "a {} read, of {}",
        consistency.as_str_name(),
        answer.source().as_str_name()
    );
    let mut ledger = ledger.lock();
    // Something newer may stand in a store that cannot be asked, and it says so.
    let floor = if answer.stale { Floor::NONE } else { floor };
    match &answer.entry {
        None => ledger.read_absent(key, floor, &how),
        Some(entry) => {
            let expires = entry.expire_time.as_ref();
            let seen = Seen {
                version: entry.version,
                value: Some(&entry.value),
                expires_millis: expires.map(|at| at.seconds * 1000 + i64::from(at.nanos) / 1_000_000),
            };
            ledger.read(key, seen, floor, &how, now_millis());
        }
    }
    Ok(answer)
}

/// Namespaces to use together, by a number.
pub fn namespaces(choice: u32) -> Range<usize> {
    match choice {
        // What waits for long holds back what the journal can let go of.
        0 => 0..1,
        1 => 0..2,
        2 => 2..3,
        _ => 0..NAMESPACES.len(),
    }
}

/// The time of the wall, as the clients' clock shows it.
pub fn now_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("it is after 1970").as_millis() as u64
}
