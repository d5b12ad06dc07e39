//! The gateway under test: the real binary, found by what its log says.
//!
//! Owns starting it with a configuration, its log, its signals and its end. When a test fails, its log is printed with the failure.

use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;
use tidegate::rpc::proto::{NamespaceStats, StatsRequest, admin_client::AdminClient};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{
    Client, SOON, eventually,
    process::{Directory, Process},
};

/// What a gateway is started with. Listens on free ports; keeps everything in a temporary directory.
#[derive(Clone, Default)]
pub struct Setup {
    arguments: Vec<String>,
    redis: bool,
    sections: String,
}

impl Setup {
    /// The embedded default: SQLite in the data directory, no Redis.
    pub fn new() -> Setup {
        Setup::default()
    }

    /// Keeps its records in the store at `url`.
    pub fn store(self, url: &str) -> Setup {
        self.argument("--store-url").argument(url)
    }

    /// Shares a cache in the Redis at `url`, which answers: the start waits for its connection.
    pub fn redis(mut self, url: &str) -> Setup {
        self.redis = true;
        self.argument("--redis-url").argument(url)
    }

    /// Adds sections to the configuration file.
    pub fn config(mut self, sections: &str) -> Setup {
        self.sections.push_str(sections);
        self.sections.push('\n');
        self
    }

    /// Adds an argument to the command line.
    pub fn argument(mut self, argument: &str) -> Setup {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Starts the gateway and waits until it serves.
    pub async fn start(self) -> Gateway {
        self.start_in(Directory::new("gateway")).await
    }

    /// Starts the gateway on what an earlier one left in its directory, and waits until it serves.
    pub async fn start_in(self, directory: Directory) -> Gateway {
        let started = self.try_start_in(&directory).await;
        let mut gateway = started.unwrap_or_else(|Exit { code, log }| {
            panic!("the gateway ended with {code:?} instead of serving; it said:\n{log}")
        });
        gateway.directory = Some(directory);
        if self.redis {
            gateway.linked_to_redis().await;
        }
        gateway
    }

    /// Starts the gateway in a directory that outlives it, and waits until it serves, or ends instead. Redis may be down.
    pub async fn try_start_in(&self, directory: &Directory) -> Result<Gateway, Exit> {
        let mut process = self.run(directory);
        let served = eventually("the gateway serves", SOON, async || {
            let log = process.stderr();
            match serving(&log) {
                Some(addresses) => Ok(Some(addresses)),
                None if process.ended().is_some() => Ok(None),
                None => Err(log),
            }
        })
        .await;
        let connected = match served {
            // It may have ended since.
            Some(addresses) => {
                let channel = endpoint(addresses.listen).connect().await.ok();
                channel.map(|channel| (addresses, channel))
            }
            None => None,
        };
        let Some((addresses, channel)) = connected else {
            let code = process.wait(SOON).await.code();
            let log = process.stderr();
            return Err(Exit { code, log });
        };
        Ok(Gateway {
            client: Client::new(channel.clone()),
            address: addresses.listen,
            operations: addresses.operations,
            admin: addresses.admin,
            channel,
            process,
            setup: self.clone(),
            directory: None,
        })
    }

    /// Starts a gateway that is expected to end by itself, and waits for that.
    pub async fn run_to_end(self) -> Exit {
        self.run_to_end_in(&Directory::new("gateway")).await
    }

    /// The same on what an earlier one left in its directory.
    pub async fn run_to_end_in(&self, directory: &Directory) -> Exit {
        let mut process = self.run(directory);
        let code = process.wait(SOON).await.code();
        Exit {
            code,
            log: process.stderr(),
        }
    }

    /// Starts a gateway that cannot serve yet, and asks it to stop once its log says `text`.
    pub async fn stop_while_it_starts_in(&self, directory: &Directory, text: &str) -> Exit {
        let mut process = self.run(directory);
        eventually(&format!("the gateway says {text:?}"), SOON, async || {
            let log = process.stderr();
            if log.contains(text) { Ok(()) } else { Err(log) }
        })
        .await;
        process.signal("TERM");
        let code = process.wait(SOON).await.code();
        Exit {
            code,
            log: process.stderr(),
        }
    }

    fn run(&self, directory: &Directory) -> Process {
        let path = directory.path();
        let file = path.join("tidegate.toml");
        let mut text = self.sections.clone();
        if !text.contains("[operations]") {
            text.push_str("\n[operations]\nlisten = \"127.0.0.1:0\"\n");
        }
        if !text.contains("[admin]") {
            text.push_str("\n[admin]\nlisten = \"127.0.0.1:0\"\n");
        }
        if !text.contains("[journal]") {
            // Smaller files than the default's are made sooner, and take every value of the default's length.
            text.push_str("\n[journal]\nsegment_bytes = 16_777_216\n");
        }
        fs::write(&file, text).expect("the directory is ours");
        // A process appends to its log: what an earlier one said must not be taken for it.
        let _ = fs::remove_file(path.join("gateway.err"));
        let mut command = command();
        command.arg("serve").arg("--config").arg(&file);
        command.arg("--data-dir").arg(data_dir(directory));
        if !self.arguments.iter().any(|argument| argument == "--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command.args(&self.arguments).current_dir(path);
        // A build that holds planted faults is to serve with one of them: the tests must fail.
        if let Some(fault) = env::var_os("PLANTED_FAULT") {
            command.arg("--planted-fault").arg(fault);
        }
        Process::start("the gateway", &command, "KILL", path, "gateway")
    }
}

/// Where a gateway that was started in a directory keeps its data.
pub fn data_dir(directory: &Directory) -> PathBuf {
    directory.path().join("data")
}

/// The command, for what is not serving.
pub fn command() -> Command {
    match option_env!("CARGO_BIN_EXE_tidegate") {
        Some(binary) => Command::new(binary),
        // The benchmark is of another package, and lies beside it.
        None => Command::new(env::current_exe().expect("this runs").with_file_name("tidegate")),
    }
}

/// Runs a command of the binary to its end, in `directory`, with nothing in its environment but `variables`.
pub async fn run_command(arguments: &[&str], variables: &[(&str, &str)], directory: &Path) -> Output {
    let mut command = command();
    command
        .args(arguments)
        .envs(variables.iter().copied())
        .current_dir(directory);
    let mut process = Process::start("the command", &command, "KILL", directory, "command");
    let code = process.wait(SOON).await.code();
    let stdout = fs::read_to_string(directory.join("command.out")).unwrap_or_default();
    Output {
        code,
        stdout,
        stderr: process.stderr(),
    }
}

/// What a command left.
#[derive(Debug)]
pub struct Output {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// How a gateway ended.
#[derive(Debug)]
pub struct Exit {
    /// Its exit code; 128 and the number of a signal that ended it.
    pub code: Option<i32>,
    /// All that it said.
    pub log: String,
}

/// A running gateway. Dropping it kills it and removes its data.
pub struct Gateway {
    /// A client, connected.
    pub client: Client,
    /// Where it serves gRPC.
    pub address: SocketAddr,
    /// Where it serves its operations HTTP.
    pub operations: SocketAddr,
    /// Where it serves its operators' gRPC.
    pub admin: SocketAddr,
    channel: Channel,
    process: Process,
    setup: Setup,
    directory: Option<Directory>,
}

/// An answer of the operations HTTP.
#[derive(Debug)]
pub struct Page {
    pub status: u16,
    /// Its status line and its headers.
    pub head: String,
    pub body: String,
}

impl Gateway {
    /// The connection of its clients.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A client of its operators' port, over a connection of its own.
    pub async fn admin(&self) -> AdminClient<Channel> {
        let channel = endpoint(self.admin)
            .connect()
            .await
            .expect("the operators' port accepts");
        AdminClient::new(channel)
    }

    /// What it has counted of a namespace: zeros where there is nothing yet.
    pub async fn stats(&self, namespace: &str) -> NamespaceStats {
        let request = StatsRequest {
            namespace: namespace.to_owned(),
        };
        let answer = self.admin().await.stats(request).await.expect("stats are told");
        answer.into_inner().total.expect("there is a total")
    }

    /// All that it said so far.
    pub fn log(&self) -> String {
        self.process.stderr()
    }

    /// The messages of its log that hold `text`.
    pub fn said(&self, text: &str) -> Vec<String> {
        let log = self.log();
        log.lines()
            .filter(|line| line.contains(text))
            .map(str::to_owned)
            .collect()
    }

    /// What `grpc.health.v1` says about a service.
    pub async fn health(&self, service: &str) -> Result<ServingStatus, Status> {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = HealthClient::new(self.channel.clone()).check(request).await?;
        Ok(answer.into_inner().status())
    }

    /// Waits until `grpc.health.v1` says so about a service.
    pub async fn await_health(&self, service: &str, wanted: ServingStatus) {
        eventually(&format!("{service} is {wanted:?}"), SOON, async || {
            match self.health(service).await {
                Ok(status) if status == wanted => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }

    /// Gets a page of the operations HTTP.
    pub async fn page(&self, path: &str) -> Page {
        self.ask("GET", path).await
    }

    /// Asks the operations HTTP by any method.
    pub async fn ask(&self, method: &str, path: &str) -> Page {
        let exchange = async {
            let mut stream = TcpStream::connect(self.operations).await?;
            let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        let answer = timeout(SOON, exchange)
            .await
            .expect("the operations HTTP answers in time")
            .expect("the operations HTTP answers");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Page {
            status: status.expect("an answer has a status"),
            head: head.to_owned(),
            body: body.to_owned(),
        }
    }

    /// A metric, summed over those of its samples that have every one of the labels, as `path="behind"`.
    ///
    /// # Panics
    /// If there is no metric of this name.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let page = self.page("/metrics").await;
        assert_eq!(page.status, 200);
        let samples: Vec<(&str, f64)> = page
            .body
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '))
            .filter(|(labels, _)| labels.is_empty() || labels.starts_with('{'))
            .map(|(labels, value)| (labels, value.parse().expect("a sample has a number")))
            .collect();
        assert!(!samples.is_empty(), "there is no metric {name}");
        let wanted = |sample: &str| labels.iter().all(|label| sample.contains(label));
        samples
            .iter()
            .filter(|(sample, _)| wanted(sample))
            .fold(0.0, |sum, (_, value)| sum + value)
    }

    /// Waits until the thread that serves our connection, and with it every other one, has found Redis, and L1 is on.
    async fn linked_to_redis(&self) {
        // Once our thread has answered it counts its connection as down or up.
        self.health("").await.expect("the gateway serves");
        eventually("the gateway finds Redis", SOON, async || {
            let down = self.metric("tidegate_redis_connections_down", &[]).await;
            super::expect(down == 0.0, down)
        })
        .await;
        self.await_readiness("invalidation: up").await;
    }

    /// Waits until nothing is pending.
    pub async fn drained(&self) {
        eventually("the queue is drained", SOON, async || {
            let pending = self.metric("tidegate_queue_pending_entries", &[]).await;
            super::expect(pending == 0.0, format!("{pending} pending; log:\n{}", self.log()))
        })
        .await;
    }

    /// Waits until `/readyz` says a line.
    pub async fn await_readiness(&self, line: &str) -> Page {
        eventually(&format!("/readyz says {line:?}"), SOON, async || {
            let page = self.page("/readyz").await;
            if page.body.lines().any(|said| said == line) {
                Ok(page)
            } else {
                Err(format!("{page:?}"))
            }
        })
        .await
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Asks it to shut down in order.
    pub fn terminate(&mut self) {
        self.process.signal("TERM");
    }

    /// Asks the system to let it do nothing for a while.
    pub fn pause(&mut self) {
        self.process.signal("STOP");
    }

    /// Lets it go on after a pause.
    pub fn go_on(&mut self) {
        self.process.signal("CONT");
    }

    /// Ends it as a crash would, and waits for its end.
    pub async fn kill(&mut self) {
        self.process.signal("KILL");
        self.process.wait(SOON).await;
    }

    /// Freezes it: connections stay, nothing is answered, and time goes on without it.
    pub fn freeze(&self) {
        self.process.signal("STOP");
    }

    /// Lets a frozen gateway go on.
    pub fn thaw(&self) {
        self.process.signal("CONT");
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.process.ended().is_none()
    }

    /// Waits for its end.
    pub async fn wait_exit(&mut self, deadline: Duration) -> Exit {
        let code = self.process.wait(deadline).await.code();
        Exit {
            code,
            log: self.process.stderr(),
        }
    }

    /// Starts a gateway that has ended again, on its data, with the same configuration.
    pub async fn start_again(self) -> Gateway {
        let setup = self.setup.clone();
        self.start_again_as(setup).await
    }

    /// The same with another configuration.
    pub async fn start_again_as(self, setup: Setup) -> Gateway {
        setup.start_in(self.leave()).await
    }

    /// Where it keeps everything.
    pub fn directory(&self) -> &Directory {
        self.directory.as_ref().expect("held until it is left")
    }

    /// What a gateway that has ended left behind.
    pub fn leave(mut self) -> Directory {
        assert!(!self.runs(), "the gateway still runs");
        self.directory.take().expect("held until now")
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the log of the gateway at {}:\n{}", self.address, self.log());
        }
    }
}

/// Where a gateway says in its log that it serves.
struct Addresses {
    listen: SocketAddr,
    operations: SocketAddr,
    admin: SocketAddr,
}

fn serving(log: &str) -> Option<Addresses> {
    let fields = line(log, "serving")?;
    let address = |name: &str| {
        let text = fields[name].as_str().unwrap_or_default();
        text.parse()
            .unwrap_or_else(|_| panic!("no address in the field {name} of {fields}"))
    };
    Some(Addresses {
        listen: address("listen"),
        operations: address("operations"),
        admin: address("admin"),
    })
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).expect("an address makes a URL")
}

/// The first line of a log whose message begins so.
pub fn line(log: &str, message: &str) -> Option<Value> {
    log.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|fields| fields["message"].as_str().is_some_and(|text| text.starts_with(message)))
}
