//! The serving threads and the acceptor.
//!
//! Owns threads, sockets and their bounds: N threads, each a `current_thread` runtime that serves its own connections from the first byte to
//! the last, and one acceptor that hands a new connection to the thread with the fewest. Does not own a connection's protocol
//! (`rpc/connection.rs`). Invariants: no file I/O, no SQL and nothing that blocks runs on a serving thread; a connection never changes
//! its thread, so no lock of its is contended (two such threads answer twice the calls of a runtime that steals work).

use std::{
    io,
    net::SocketAddr,
    num::{NonZeroU32, NonZeroUsize},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::{pb::health_server::HealthServer, server::HealthReporter, server::HealthService};

use crate::{
    gateway::{Gateway, GatewayParts},
    rpc::{
        connection,
        reflection::Reflection,
        router::Router,
        service::{CallLimits, Deadlines, GatewayService},
    },
    settings::{DAY, Unfit, count, within},
    telemetry::calls::{CallMetrics, ThreadCounters},
};

/// What a message may hold beside its value: namespace, key, ttl and the encoding's own bytes, with room for a value that is a
/// little over its limit, so that the caller is told which field is too long.
const MESSAGE_OVERHEAD_BYTES: usize = 64 * 1024;

/// What a batch may hold in all: what servers of gRPC read by default.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A health check names a service.
pub(crate) const HEALTH_MESSAGE_BYTES_MAX: usize = 4 * 1024;

/// Connections on their way from the acceptor to one thread.
const HANDOVER_CONNECTIONS_MAX: usize = 128;

/// How long accepting rests after an error that is the machine's, such as too many open files.
pub(crate) const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Between two looks at whether the calls under way have ended.
const RUNNING_POLL: Duration = Duration::from_millis(5);

/// How long connections may take to flush their last answers and close.
pub(crate) const FLUSH_WAIT: Duration = Duration::from_secs(1);

/// The `[rpc]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Serving threads. Default: one for each core.
    pub threads: Option<NonZeroUsize>,
    /// Open connections; one more is closed at once. Default: 10,000.
    pub connections_max: NonZeroUsize,
    /// Calls at a time on one connection. Default: 100. Each may hold a message of `value_bytes_max`, a batch or a stream of writes 4 MiB and
    /// one such message, so this bounds what one connection can make the gateway hold. At more than 900, a client that pours tiny writes
    /// into most of them at once may lose its connection.
    pub streams_max: NonZeroU32,
    /// The largest value, in bytes. Default: 1 MiB.
    pub value_bytes_max: usize,
    /// The deadline of a call that brings none. Default: 5 s.
    #[serde(with = "humantime_serde")]
    pub deadline_default: Duration,
    /// The longest deadline; a longer one is cut. Default: 60 s.
    #[serde(with = "humantime_serde")]
    pub deadline_max: Duration,
    /// How long a stream of writes may go on sending nothing, or no whole message. Default: 5 min. It holds a place of `streams_max`.
    #[serde(with = "humantime_serde")]
    pub stream_idle_max: Duration,
    /// How long an answer, of a stream of writes or of any other call, may wait for a client that takes nothing of it, before the call is cut
    /// off. Default: 1 min. Less frees sooner what such a client holds, and cuts off one that is merely slow.
    #[serde(with = "humantime_serde")]
    pub stream_unread_max: Duration,
    /// Whether server reflection answers. Default: true.
    pub reflection: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            threads: None,
            connections_max: count::<10_000>(),
            streams_max: STREAMS_MAX_DEFAULT,
            value_bytes_max: 1024 * 1024,
            deadline_default: Duration::from_secs(5),
            deadline_max: Duration::from_secs(60),
            stream_idle_max: Duration::from_secs(300),
            stream_unread_max: Duration::from_secs(60),
            reflection: true,
        }
    }
}

const STREAMS_MAX_DEFAULT: NonZeroU32 = NonZeroU32::new(100).expect("not zero");

/// The largest limit of values: they are held whole in memory, several at a time.
const VALUE_BYTES_CEILING: usize = 64 * 1024 * 1024;

impl Config {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn validate(&self) -> Result<(), Unfit> {
        if self.value_bytes_max > VALUE_BYTES_CEILING {
            return Err(Unfit::new(
                "value_bytes_max",
                format!("must be at most {VALUE_BYTES_CEILING}"),
            ));
        }
        within("deadline_max", self.deadline_max, DAY)?;
        within("stream_idle_max", self.stream_idle_max, DAY)?;
        within("stream_unread_max", self.stream_unread_max, DAY)?;
        within("deadline_default", self.deadline_default, self.deadline_max)
    }
}

/// A running gRPC face.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    threads: Vec<thread::JoinHandle<()>>,
    /// How each thread ended: whether it finished what was under way.
    ended: Vec<oneshot::Receiver<bool>>,
    kill: CancellationToken,
}

/// One serving thread, as the acceptor sees it.
struct Seat {
    connections: mpsc::Sender<TcpStream>,
    open: Arc<AtomicUsize>,
}

impl Server {
    /// Starts the serving threads, then accepts connections from `listener` in a task on the current runtime, which ends when the
    /// server is stopped.
    ///
    /// # Errors
    /// A thread or its runtime could not be made, or the descriptors of the contract are broken.
    pub fn start(
        listener: TcpListener,
        config: &Config,
        parts: &GatewayParts,
        calls: &CallMetrics,
        health: &HealthReporter,
    ) -> io::Result<(Server, JoinHandle<()>)> {
        let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
        let reflection = config
            .reflection
            .then(|| Reflection::of("tidegate.v1.Gateway"))
            .transpose()?;
        let mut server = Server {
            address: listener.local_addr()?,
            stop: stop.clone(),
            threads: Vec::new(),
            ended: Vec::new(),
            kill: kill.clone(),
        };
        let mut seats = Vec::new();
        for index in 0..config.threads.map_or_else(cores, NonZeroUsize::get) {
            let (sender, receiver) = mpsc::channel(HANDOVER_CONNECTIONS_MAX);
            let (ended_sender, ended) = oneshot::channel();
            let open = Arc::new(AtomicUsize::new(0));
            seats.push(Seat {
                connections: sender,
                open: Arc::clone(&open),
            });
            let thread = ServingThread {
                connections: receiver,
                open,
                config: config.clone(),
                parts: parts.clone(),
                calls: calls.clone(),
                health: health.clone(),
                reflection: reflection.clone(),
                stop: stop.clone(),
                kill: kill.clone(),
            };
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            let handle = thread::Builder::new().name(format!("serve-{index}")).spawn(move || {
                let finished = runtime.block_on(thread.run());
                // Dropping it would wait for a name lookup that is under way, however long that takes.
                runtime.shutdown_background();
                // Nobody waits for it once the process ends in haste.
                let _ = ended_sender.send(finished);
            })?;
            server.threads.push(handle);
            server.ended.push(ended);
        }
        let acceptor = tokio::spawn(accept(listener, seats, config.connections_max.get(), stop));
        Ok((server, acceptor))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops accepting, lets the calls under way finish until `grace` is over, and ends the threads. Whether all calls finished.
    pub async fn stop(self, grace: Duration) -> bool {
        self.stop.cancel();
        let all = async {
            let mut finished = true;
            for ended in self.ended {
                // An error means that the thread is gone.
                finished &= ended.await.unwrap_or(false);
            }
            finished
        };
        let finished = timeout(grace, all).await.unwrap_or(false);
        self.kill.cancel();
        for thread in self.threads {
            // A thread that panicked has said so on standard error.
            let _ = thread.join();
        }
        finished
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Accepts until `stop`: each connection goes to the thread with the fewest. A few long-lived connections are the rule in gRPC, and a
/// hash of their addresses would leave a core idle.
async fn accept(listener: TcpListener, seats: Vec<Seat>, connections_max: usize, stop: CancellationToken) {
    let mut failing = false;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Once, not for each try.
                if !failing {
                    tracing::warn!(%error, "cannot accept connections");
                }
                failing = true;
                sleep(ACCEPT_REST).await;
                continue;
            }
        };
        failing = false;
        let open = |seat: &&Seat| seat.open.load(Ordering::Relaxed);
        if seats.iter().map(|seat| open(&seat)).sum::<usize>() >= connections_max {
            tracing::warn!(connections_max, "refused a connection: as many are open as may");
            continue;
        }
        let Some(seat) = seats.iter().min_by_key(open) else {
            return;
        };
        match seat.connections.try_send(stream) {
            Ok(()) => seat.open.fetch_add(1, Ordering::Relaxed),
            Err(TrySendError::Full(_)) => {
                tracing::warn!("refused a connection: its serving thread has not taken the last ones yet");
                continue;
            }
            Err(TrySendError::Closed(_)) => return,
        };
    }
}

/// What one serving thread needs to build its services.
struct ServingThread {
    connections: mpsc::Receiver<TcpStream>,
    open: Arc<AtomicUsize>,
    config: Config,
    parts: GatewayParts,
    calls: CallMetrics,
    health: HealthReporter,
    reflection: Option<Reflection>,
    stop: CancellationToken,
    kill: CancellationToken,
}

impl ServingThread {
    /// Serves until `stop`; then finishes what is under way, unless `kill` comes first. Whether it finished.
    async fn run(mut self) -> bool {
        let counters = self.calls.thread();
        let gateway = Gateway::on_this_thread(&self.parts, Arc::clone(&counters));
        let router = self.router(gateway.clone(), Arc::clone(&counters));
        let connections = TaskTracker::new();
        loop {
            let stream = tokio::select! {
                stream = self.connections.recv() => stream,
                () = self.stop.cancelled() => None,
            };
            let Some(stream) = stream else { break };
            let Some(stream) = adopt(stream) else {
                self.open.fetch_sub(1, Ordering::Relaxed);
                continue;
            };
            let serve = connection::serve(stream, router.clone(), self.config.streams_max.get(), self.stop.clone());
            let open = Arc::clone(&self.open);
            connections.spawn(async move {
                serve.await;
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
        connections.close();
        let finished = async {
            while counters.running() > 0 {
                sleep(RUNNING_POLL).await;
            }
            // Streams without an end, such as a watch of health, do not hold the process.
            let _ = timeout(FLUSH_WAIT, connections.wait()).await;
            // A write that its caller left goes on, and must not be cut off between Redis and the queue.
            gateway.finish().await;
        };
        self.kill.run_until_cancelled(finished).await.is_some() && counters.running() == 0
    }

    fn router(&self, gateway: Gateway, counters: Arc<ThreadCounters>) -> Router {
        let message_bytes_max = self.config.value_bytes_max.saturating_add(MESSAGE_OVERHEAD_BYTES);
        let limits = CallLimits {
            value_bytes_max: self.config.value_bytes_max,
            message_bytes_max,
            batch_bytes_max: message_bytes_max.max(BATCH_BYTES_MAX),
            deadlines: Deadlines {
                default: self.config.deadline_default,
                max: self.config.deadline_max,
            },
            stream_idle_max: self.config.stream_idle_max,
            stream_unread_max: self.config.stream_unread_max,
            watch_unread_max: self.parts.watches.unread_max(),
        };
        let gateway = Arc::new(GatewayService {
            gateway,
            limits,
            stop: self.stop.clone(),
        });
        Router {
            gateway,
            health: HealthServer::new(HealthService::from_health_reporter(self.health.clone()))
                .max_decoding_message_size(HEALTH_MESSAGE_BYTES_MAX),
            reflection: self.reflection.clone(),
            counters,
            limits,
        }
    }
}

/// Moves a connection from the acceptor's runtime to this one; answers leave at once, not when a packet is full.
fn adopt(stream: TcpStream) -> Option<TcpStream> {
    let adopted = stream.into_std().and_then(TcpStream::from_std).and_then(|stream| {
        stream.set_nodelay(true)?;
        Ok(stream)
    });
    adopted
        .inspect_err(|error| tracing::debug!(%error, "connection lost before it was served"))
        .ok()
}
