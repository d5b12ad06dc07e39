//! The clients: writers and readers, each in a task of its own, over a few connections.
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
use tidegate::rpc::proto::{Durability, GetResponse, ReadConsistency};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Endpoint};
use tonic_types::StatusExt;

use crate::{
    harness::{Client, Gateway, Mode, SOON},
    ledger::{Asked, Floor, Key, Ledger, NAMESPACES, Seen, TTL_MILLIS},
    plan::Plan,
};

const WRITERS: u64 = 16;
const READERS: u64 = 4;
const CONNECTIONS: usize = 4;

/// Few keys get half of the calls.
const HOT_KEYS: Range<u32> = 0..8;
const WIDE_KEYS: Range<u32> = 8..1500;

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
    stop: CancellationToken,
    namespaces: Range<usize>,
}

impl Load {
    /// Starts the clients of a round.
    pub fn start(gateway: &Gateway, ledger: &Arc<Mutex<Ledger>>, plan: &Plan) -> Load {
        let stop = CancellationToken::new();
        let mut clients = JoinSet::new();
        let endpoint = Endpoint::from_shared(format!("http://{}", gateway.address)).expect("an address makes a URL");
        let connections: Vec<Client> = (0..CONNECTIONS).map(|_| Client::new(endpoint.connect_lazy())).collect();
        for number in 0..WRITERS + READERS {
            let caller = Caller {
                client: connections[number as usize % CONNECTIONS].clone(),
                ledger: Arc::clone(ledger),
                stop: stop.clone(),
                namespaces: plan.namespaces.clone(),
            };
            let rng = StdRng::seed_from_u64(plan.seed.wrapping_mul(31).wrapping_add(number));
            if number < WRITERS {
                clients.spawn(caller.write(rng));
            } else {
                clients.spawn(caller.read(rng));
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
            let key = self.key(&mut rng);
            let (mode, asked) = match rng.random_range(0..100) {
                0..58 => (Mode::Behind, Asked::Put { expires: false }),
                58..66 => (Mode::Behind, Asked::Put { expires: true }),
                66..80 => (Mode::Behind, Asked::Delete),
                80..92 => (Mode::Through, Asked::Put { expires: false }),
                92..94 => (Mode::Through, Asked::Put { expires: true }),
                _ => (Mode::Through, Asked::Delete),
            };
            let (write, value) = {
                let mut ledger = self.ledger.lock();
                let write = ledger.send(key, asked, now_millis());
                (write, ledger.value(write))
            };
            match self.send(key, asked, &value, mode).await {
                Ok((version, durability)) => self.ledger.lock().acknowledge(write, version, durability),
                Err(status) => {
                    if !self.note_failure(key, Some(write), &status) {
                        return;
                    }
                    sleep(PACE).await;
                }
            }
        }
    }

    async fn send(&self, key: Key, asked: Asked, value: &[u8], mode: Mode) -> Result<(i64, Durability), Status> {
        let (client, name) = (self.client.namespace(key.namespace()), key.name());
        match asked {
            Asked::Delete => {
                let answer = client.delete(&name, mode).await?;
                Ok((answer.version, answer.durability()))
            }
            Asked::Put { expires: false } => {
                let answer = client.put(&name, value, mode).await?;
                Ok((answer.version, answer.durability()))
            }
            Asked::Put { expires: true } => {
                let ttl = Duration::from_millis(TTL_MILLIS);
                let answer = client.put_for(&name, value, mode, ttl).await?;
                Ok((answer.version, answer.durability()))
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
                if !self.note_failure(key, None, &status) {
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
    fn note_failure(&self, key: Key, write: Option<usize>, status: &Status) -> bool {
        let Some(info) = status.get_details_error_info() else {
            return false;
        };
        let mut ledger = self.ledger.lock();
        if let Some(write) = write {
            match info.metadata.get("outcome").map(String::as_str) {
                Some("not_applied") => ledger.refuse(write),
                Some("unknown") => ledger.leave_open(write),
                other => ledger.complain_at(Some(key), format!("a write failed with the outcome {other:?}")),
            }
        }
        match status.code() {
            Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded => {}
            code => ledger.complain_at(Some(key), format!("a call failed with {code:?}: {}", status.message())),
        }
        true
    }
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
