//! What a BatchGet saves: keys per second that L1 answers, one by one and a hundred at a time: `cargo bench --bench batch [-- ROUNDS]`.
//!
//! Owns the load and the figures: a gateway of its own (the real binary, over SQLite, without Redis), as many calls under way on either
//! side, and both sides in turn in one run, for the machine does not stay the same. The client runs on the same cores and is
//! measured with it. Checks that every answer came from L1, and is whole.
#![expect(clippy::print_stdout, reason = "it prints what it measured")]

use std::{
    env,
    error::Error,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tidegate::rpc::proto::{
    BatchGetRequest, BatchWriteRequest, GetRequest, GetResponse, PutRequest, Source, WriteItem, batch_get_result,
    gateway_client::GatewayClient, write_item, write_result,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tonic::transport::{Channel, Endpoint};

const NAMESPACE: &str = "bench";
const KEYS: usize = 10_000;
const VALUE_BYTES: usize = 100;
const BATCH_KEYS: usize = 100;
/// Calls under way: so many on each connection.
const CONNECTIONS: usize = 8;
const CALLS: usize = 16;
/// Of each side, in each round.
const MEASURED: Duration = Duration::from_secs(3);
const ROUNDS: usize = 5;
const START_WAIT: Duration = Duration::from_secs(60);

/// Whatever ends the run. Tasks hand it on.
type Failure = Box<dyn Error + Send + Sync>;

#[derive(Clone, Copy)]
enum Side {
    Unary,
    Batch,
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let rounds = env::args().skip(1).find_map(|argument| argument.parse().ok());
    let directory = tempfile::tempdir()?;
    let gateway = Server::start(directory.path())?;
    let address = gateway.address(directory.path()).await?;
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(GatewayClient::new(endpoint.connect().await?));
    }
    fill(&clients[0]).await?;
    println!("{KEYS} keys of {VALUE_BYTES} bytes in L1, {CONNECTIONS} connections with {CALLS} calls each");
    let mut ratios = Vec::new();
    for round in 1..=rounds.unwrap_or(ROUNDS) {
        let unary = keys_per_second(&clients, Side::Unary).await?;
        let batch = keys_per_second(&clients, Side::Batch).await?;
        println!(
            "round {round}: Get {unary:>9.0} keys/s, BatchGet of {BATCH_KEYS} {batch:>9.0} keys/s: {:.1} times as many",
            batch / unary
        );
        ratios.push(batch / unary);
    }
    ratios.sort_unstable_by(f64::total_cmp);
    println!("median: {:.1} times as many", ratios[ratios.len() / 2]);
    Ok(())
}

fn key(number: usize) -> String {
    format!("key:{:06}", number % KEYS)
}

/// Writes all keys, so that each has a copy in L1.
async fn fill(client: &GatewayClient<Channel>) -> Result<(), Failure> {
    for first in (0..KEYS).step_by(BATCH_KEYS) {
        let put = |number| PutRequest {
            namespace: NAMESPACE.to_owned(),
            key: key(number),
            value: vec![b'x'; VALUE_BYTES].into(),
            ..PutRequest::default()
        };
        let items = (first..first + BATCH_KEYS).map(|number| WriteItem {
            operation: Some(write_item::Operation::Put(put(number))),
        });
        let request = BatchWriteRequest { items: items.collect() };
        let answer = client.clone().batch_write(request).await?.into_inner();
        for result in answer.results {
            if !matches!(result.outcome, Some(write_result::Outcome::Written(_))) {
                return Err(format!("not written: {result:?}").into());
            }
        }
    }
    Ok(())
}

async fn keys_per_second(clients: &[GatewayClient<Channel>], side: Side) -> Result<f64, Failure> {
    let start = Instant::now();
    let mut calls = JoinSet::new();
    for (connection, client) in clients.iter().enumerate() {
        for call in 0..CALLS {
            // Each begins elsewhere.
            let first = (connection * CALLS + call) * 7_919;
            calls.spawn(read_until(client.clone(), side, first, start + MEASURED));
        }
    }
    let mut keys = 0;
    while let Some(read) = calls.join_next().await {
        keys += read??;
    }
    Ok(keys as f64 / start.elapsed().as_secs_f64())
}

/// Reads until `end`, one call after the other. How many keys it read.
async fn read_until(
    mut client: GatewayClient<Channel>,
    side: Side,
    first: usize,
    end: Instant,
) -> Result<usize, Failure> {
    let mut keys = 0;
    while Instant::now() < end {
        let next = first + keys;
        match side {
            Side::Unary => {
                let request = GetRequest {
                    namespace: NAMESPACE.to_owned(),
                    key: key(next),
                    ..GetRequest::default()
                };
                check(&client.get(request).await?.into_inner())?;
                keys += 1;
            }
            Side::Batch => {
                let request = BatchGetRequest {
                    namespace: NAMESPACE.to_owned(),
                    keys: (next..next + BATCH_KEYS).map(key).collect(),
                    ..BatchGetRequest::default()
                };
                let answer = client.batch_get(request).await?.into_inner();
                for result in &answer.results {
                    match &result.outcome {
                        Some(batch_get_result::Outcome::Found(found)) => check(found)?,
                        other => return Err(format!("no answer: {other:?}").into()),
                    }
                }
                keys += answer.results.len();
            }
        }
    }
    Ok(keys)
}

fn check(found: &GetResponse) -> Result<(), Failure> {
    let bytes = found.entry.as_ref().map(|entry| entry.value.len());
    if bytes != Some(VALUE_BYTES) || found.source() != Source::L1 {
        return Err(format!("not a whole value from L1: {bytes:?} from {:?}", found.source()).into());
    }
    Ok(())
}

/// The gateway. Dropping it ends it.
struct Server(Child);

impl Server {
    fn start(directory: &Path) -> Result<Server, Failure> {
        let log = fs::File::create(directory.join("log"))?;
        let child = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(directory.join("data"))
            .env("TIDEGATE_OPERATIONS__LISTEN", "127.0.0.1:0")
            .env("TIDEGATE_ADMIN__LISTEN", "127.0.0.1:0")
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        Ok(Server(child))
    }

    /// Where it serves, once it does.
    async fn address(&self, directory: &Path) -> Result<String, Failure> {
        let end = Instant::now() + START_WAIT;
        while Instant::now() < end {
            let log = fs::read_to_string(directory.join("log"))?;
            let mut lines = log
                .lines()
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            let serving = lines.find(|line| line["message"] == "serving");
            if let Some(address) = serving.as_ref().and_then(|line| line["listen"].as_str()) {
                return Ok(address.to_owned());
            }
            sleep(Duration::from_millis(50)).await;
        }
        Err("the gateway does not serve".into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself, and what it kept is thrown away.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
