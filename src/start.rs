//! How the process starts and stops: every part made and joined to the others, from the store up to the port, and taken down again.
//!
//! Owns both orders, and is the only place that starts and watches the background's tasks. Invariants: the port opens last, when everything behind
//! it can work; a part that cannot be made ends the start with one clear line; a background task that ends unasked stops the process; when
//! stopping, admission closes only after the calls that use it have finished, and what is left is counted and said.

mod opening;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::{JoinError, JoinHandle, JoinSet},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    cache::{
        flight::{FLIGHTS_MAX, Flights},
        memory::Memory,
        redis::{self, channel::Channel},
    },
    clock::Clock,
    config::{Config, Url},
    data_dir::{DataDir, DataDirError},
    error::Error,
    gateway::{Gateway, GatewayParts, Refreshes, Requests, Sharing, Watches},
    health::Health,
    operations::{self, figures::Figures},
    queue::{
        self, Left, Notice, Queue,
        journal::{Journal, JournalError, Recovered, fs::DiskFs},
    },
    rpc::{
        admin::{Admin, Asked},
        serve::Server,
    },
    shutdown,
    store::{
        Store, StoreError, collect, commit::GroupCommit, control, decisions::GroupDecide, load::GroupLoad,
        ranges::Ranges, watch,
    },
    telemetry::{Metrics, log::Log},
};

/// How long background tasks may take to end once nothing waits for them: the node id is given back then.
const TASKS_WAIT: Duration = Duration::from_secs(3);

/// How long the journal may take to note on disk what has left it: a courtesy to the next start.
const JOURNAL_WAIT: Duration = Duration::from_secs(3);

/// How long a start waits for the control row, from a store that has just leased it a node id.
const CONTROL_WAIT: Duration = Duration::from_secs(5);

/// How many notices of the queue are passed on to Redis at a time.
const NOTICES_AT_A_TIME: usize = 64;

/// Why the gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory is not ours to use.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The journal cannot be used, or not be trusted.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The store cannot be used, or could not be reached in time.
    #[error("the store {url} cannot be used")]
    Store {
        /// The store, without its password.
        url: Url,
        /// Why.
        source: StoreError,
    },
    /// The store leased no node id.
    #[error("{0}")]
    Node(Error),
    /// A task of the start failed.
    #[error("the gateway failed while it started: {0}")]
    Died(JoinError),
    /// The Redis URL is none.
    #[error(transparent)]
    Redis(#[from] redis::InvalidUrl),
    /// A port or a thread is not to be had.
    #[error("cannot serve on {address}")]
    Serve {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// A gateway that serves.
pub struct Running {
    /// What orchestrators are told.
    pub health: Health,
    /// The gRPC face.
    pub server: Server,
    /// Write-behind.
    pub queue: Queue,
    /// Everything else.
    pub background: Background,
}

/// How a gateway stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Every call was answered, and every accepted write is in the store.
    Clean,
    /// Not so: the log says what was left.
    LeftBehind,
}

/// Everything that runs behind the port.
pub struct Background {
    /// None ends before it is told to.
    tasks: JoinSet<Result<(), JoinError>>,
    stop: CancellationToken,
    /// Held until the process ends.
    _data_dir: DataDir,
}

impl Running {
    /// Makes every part and opens the ports, on the current runtime, which becomes the background's.
    ///
    /// # Errors
    /// The first part that cannot be made.
    pub async fn start(config: &Config, log: Log) -> Result<Running, StartError> {
        let data_dir = DataDir::open(&config.data_dir)?;
        let redis = config
            .redis_url
            .as_ref()
            .map(|url| redis::Server::parse(url.reveal()))
            .transpose()?;
        let mut metrics = Metrics::default();
        let mut tasks = Tasks::default();
        let (journal, recovered) = open_journal(config, &metrics).await?;
        let opened = opening::open(config, &data_dir).await?;
        let store = opened.store.clone();
        tasks.add([watch::start(store.clone(), &tasks.stop)]);
        let clock = opened
            .lease(config, &data_dir, recovered.high_water, &mut tasks)
            .await?;
        let sharing = Arc::new(Sharing::new(&config.redis.prefix));
        let control = follow_control(&store, &clock, &sharing, &mut tasks).await;
        let queue = queue::Parts {
            store: store.clone(),
            clock,
            journal,
            recovered: recovered.writes,
            metrics: metrics.queue.clone(),
            store_metrics: metrics.store.clone(),
        };
        let (parts, notices) = assemble(config, redis, sharing, queue, &metrics, &mut tasks);
        let gateway = Gateway::on_this_thread(&parts, metrics.calls.thread());
        // Ends with the drain workers, when all of theirs is done.
        tasks.add([tokio::spawn(heed(gateway.clone(), notices))]);
        follow(&parts, &gateway, control, &mut tasks);
        let collecting = collect::start(store.clone(), &config.store, metrics.store.clone(), &tasks.stop);
        tasks.add([collecting]);

        let health = Health::new(store.clone(), gateway.clone(), Arc::clone(&parts.clock));
        // Once before the port opens, so that nobody is told that a service is not known.
        health.report().await;
        tasks.spawn(health.clone().keep());
        observe(&mut metrics, &store, &parts);
        let figures = Figures::new(gateway.clone(), health.clone(), &metrics);
        let operations_address = open_operations(config, metrics.registry, figures, &mut tasks).await?;
        let asked = Asked::new(gateway.clone(), metrics.calls.clone(), log);
        let admin_address = open_admin(config, asked, &health, &mut tasks).await?;
        let listener = listen(config.listen).await?;
        let failed = |source| StartError::Serve {
            address: config.listen,
            source,
        };
        let started = Server::start(listener, &config.rpc, &parts, &metrics.calls, health.reporter());
        let (server, acceptor) = started.map_err(failed)?;
        tasks.add([acceptor]);
        tracing::info!(
            listen = %server.address(),
            operations = %operations_address,
            admin = %admin_address,
            store = %config.store_url(),
            cache = %config.redis_url.as_ref().map_or("memory only".to_owned(), Url::masked),
            data_dir = %config.data_dir.display(),
            "serving"
        );
        tasks.spawn(gateway.warm_at_start());
        Ok(Running {
            health,
            server,
            queue: parts.queue,
            background: Background {
                tasks: tasks.running,
                stop: tasks.stop,
                _data_dir: data_dir,
            },
        })
    }

    /// Stops in the order in which data flows: says so, finishes calls, closes admission, drains, gives the node back, closes the journal
    /// with what is left in it; and says in one line what happened.
    pub async fn stop(self, config: &shutdown::Config) -> Ending {
        let started = Instant::now();
        self.health.stop().await;
        let calls_finished = self.server.stop(config.calls_wait).await;
        self.queue.close();
        kill_point!(StopBeforeDrain);
        let left = self.queue.drained(Instant::now() + config.drain_wait).await;
        self.background.stop(TASKS_WAIT).await;
        kill_point!(StopDrained);
        match timeout(JOURNAL_WAIT, self.queue.close_journal()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "the journal was not closed in order; the next start reads what is on disk")
            }
            Err(_) => tracing::error!("the journal's disk does not answer; the next start reads what is on it"),
        }
        let seconds = started.elapsed().as_secs_f64();
        let Left { entries, bytes, lost } = left;
        if entries > 0 {
            let what = "stopped; the store did not take every accepted write in time: what is in the journal comes back with the next start";
            tracing::error!(seconds, entries, bytes, lost, calls_finished, "{what}");
        } else if !calls_finished {
            let what = "stopped, and cut off calls that did not end in time; every accepted write is in the store";
            tracing::error!(seconds, "{what}");
        } else {
            tracing::info!(
                seconds,
                "stopped: every call answered, every accepted write in the store"
            );
            return Ending::Clean;
        }
        Ending::LeftBehind
    }
}

impl Background {
    /// Waits for a background task to end, which none does unless it failed.
    pub async fn died(&mut self) {
        if let Some(ended) = self.tasks.join_next().await {
            let panic = ended.and_then(|ended| ended).err().map(|error| error.to_string());
            tracing::error!(panic, "a background task ended: stopping");
        }
    }

    /// Stops the background's tasks, and waits until they have ended or `grace` is over.
    pub async fn stop(mut self, grace: Duration) {
        self.stop.cancel();
        let ended = timeout(grace, async { while self.tasks.join_next().await.is_some() {} });
        if ended.await.is_err() {
            tracing::warn!("background tasks did not end in time");
        }
    }
}

/// The background's tasks while they are being made.
#[derive(Default)]
struct Tasks {
    running: JoinSet<Result<(), JoinError>>,
    stop: CancellationToken,
}

impl Tasks {
    /// Runs a task until `stop`.
    fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.add([tokio::spawn(async move {
            stop.run_until_cancelled(task).await;
        })]);
    }

    /// Watches tasks that run: all of them end when `stop` is cancelled, and none before.
    fn add(&mut self, handles: impl IntoIterator<Item = JoinHandle<()>>) {
        for handle in handles {
            self.running.spawn(handle);
        }
    }
}

/// What all gateways of the store share, from now on; with a store that answers it is known, and the clocks are compared, when this returns.
async fn follow_control(store: &Store, clock: &Arc<Clock>, sharing: &Sharing, tasks: &mut Tasks) -> control::Follower {
    let wake = Arc::clone(&sharing.control_changed);
    let (mut known, following) = control::follow(store.clone(), Arc::clone(clock), wake, &tasks.stop);
    tasks.add([following]);
    if !store.breaker().is_open() {
        // Late or not, the start goes on: so it would without the store.
        let _ = timeout(CONTROL_WAIT, known.wait_for(Option::is_some)).await;
    }
    known
}

/// The journal, and what an earlier process left in it.
async fn open_journal(config: &Config, metrics: &Metrics) -> Result<(Journal, Recovered), StartError> {
    let (path, config, metrics) = (config.journal_dir(), config.journal.clone(), metrics.journal.clone());
    let opening = tokio::task::spawn_blocking(move || {
        let fs = DiskFs::create(&path).map_err(|why| JournalError::Unusable {
            path: path.display().to_string(),
            why,
        })?;
        Journal::open(Arc::new(fs), &config, metrics)
    });
    let (journal, recovered) = opening.await.map_err(StartError::Died)??;
    if !recovered.writes.is_empty() {
        tracing::info!(
            writes = recovered.writes.len(),
            journal_bytes = recovered.bytes,
            seconds = recovered.took.as_secs_f64(),
            "recovered accepted writes from the journal"
        );
    }
    Ok((journal, recovered))
}

/// The parts that the serving threads share, and what runs behind them.
fn assemble(
    config: &Config,
    redis: Option<redis::Server>,
    sharing: Arc<Sharing>,
    queue: queue::Parts,
    metrics: &Metrics,
    tasks: &mut Tasks,
) -> (GatewayParts, mpsc::Receiver<Notice>) {
    let (store, clock) = (queue.store.clone(), Arc::clone(&queue.clock));
    let commits = GroupCommit::new(store.clone(), &config.store, metrics.store.clone());
    let loads = GroupLoad::new(store.clone(), &config.store, metrics.store.clone());
    let decisions = GroupDecide::new(store.clone(), &config.store, Arc::clone(&clock), metrics.store.clone());
    tasks.add(commits.start(&tasks.stop));
    tasks.add(decisions.start(&tasks.stop));
    tasks.add(loads.start(&tasks.stop));
    let requests = Requests::new(&config.requests, config.rpc.deadline_max, clock.now());
    requests.restore(queue.recovered.iter().flat_map(|(write, _)| write.answers()));
    let ranges = Ranges::new(store.clone(), &config.store);
    tasks.add(ranges.start(&tasks.stop));
    let started = Queue::start(&config.queue, queue, &tasks.stop);
    tasks.add(started.workers);
    kill_point!(Recovered);
    let parts = GatewayParts {
        clock,
        namespaces: Arc::new(config.namespaces()),
        memory: Arc::new(Memory::new(&config.memory)),
        flights: Flights::new(FLIGHTS_MAX, metrics.cache.clone()),
        queue: started.queue,
        commits,
        decisions,
        requests: Arc::new(requests),
        loads,
        ranges,
        store,
        redis: redis.map(|server| (config.redis.clone(), server)),
        sharing,
        watches: Arc::new(Watches::new(&config.watch, metrics.watch.clone())),
        metrics: metrics.cache.clone(),
        refreshes: Refreshes::default(),
        load_wait: config.rpc.deadline_default,
    };
    (parts, started.notices)
}

/// Goes by the control row; and has L1 follow what other gateways write, if there may be others, before the port opens, for until then it
/// is off.
fn follow(parts: &GatewayParts, gateway: &Gateway, control: control::Follower, tasks: &mut Tasks) {
    tasks.spawn(gateway.clone().follow_control(control));
    let Some((config, server)) = &parts.redis else {
        return;
    };
    parts.memory.gate();
    let channel = Channel::start(config, server, parts.sharing.origin, parts.metrics.clone());
    let following = gateway.clone();
    tasks.spawn(async move { following.follow_channel(channel).await });
    tasks.spawn(gateway.clone().watch_redis(parts.store.clone()));
    tasks.spawn(gateway.clone().mend());
    tasks.spawn(gateway.clone().renew());
}

/// Tells the caches what became of writes that leave the queue. Ends early if that panics, which stops the process.
async fn heed(gateway: Gateway, mut notices: mpsc::Receiver<Notice>) {
    // In any order: of two notices that concern one key, the caches keep the higher version.
    let mut heeded = JoinSet::new();
    while let Some(notice) = notices.recv().await {
        if heeded.len() >= NOTICES_AT_A_TIME && matches!(heeded.join_next().await, Some(Err(_))) {
            return;
        }
        let gateway = gateway.clone();
        heeded.spawn(async move { gateway.heed(notice).await });
    }
    while heeded.join_next().await.is_some() {}
}

/// The metrics that are read when they are scraped.
fn observe(metrics: &mut Metrics, store: &Store, parts: &GatewayParts) {
    let (store, queue, memory) = (store.clone(), parts.queue.clone(), Arc::clone(&parts.memory));
    metrics.gauge(
        "store_breaker_open",
        "Whether the store is held to be down: 1 while it is",
        move || f64::from(u8::from(store.breaker().is_open())),
    );
    let clock = Arc::clone(&parts.clock);
    metrics.gauge(
        "store_clock_offset_seconds",
        "How far this gateway's clock is ahead of the store's, negative if behind; beyond 10 either way writes are refused",
        move || clock.offset().0 as f64 / 1_000.0,
    );
    let (entries, bytes) = (queue.clone(), queue.clone());
    metrics.gauge(
        "queue_pending_entries",
        "Entries accepted and not yet in the store",
        move || entries.stats().entries as f64,
    );
    metrics.gauge(
        "queue_pending_bytes",
        "Bytes accepted and not yet in the store",
        move || bytes.stats().bytes as f64,
    );
    metrics.gauge(
        "queue_oldest_pending_age_seconds",
        "How long the oldest write that is not in the store has been pending",
        move || queue.stats().oldest_age.as_secs_f64(),
    );
    let watches = Arc::clone(&parts.watches);
    metrics.gauge("watchers", "Watches under way", move || watches.watching() as f64);
    let paused = parts.queue.clone();
    metrics.gauge(
        "queue_paused_namespaces",
        "Namespaces whose drain is paused by an operator",
        move || paused.paused().len() as f64,
    );
    let entries = Arc::clone(&memory);
    metrics.gauge("memory_cache_entries", "Copies in L1", move || entries.len() as f64);
    metrics.gauge("memory_cache_bytes", "Bytes of the copies in L1", move || {
        memory.bytes() as f64
    });
}

/// Opens the operations port. Where it is.
async fn open_operations(
    config: &Config,
    registry: Registry,
    figures: Figures,
    tasks: &mut Tasks,
) -> Result<SocketAddr, StartError> {
    let listener = listen(config.operations.listen).await?;
    let address = address(&listener, config.operations.listen)?;
    let serving = operations::serve(listener, Arc::new(registry), figures, tasks.stop.clone());
    tasks.add([tokio::spawn(async {
        if let Err(error) = serving.await {
            tracing::error!(%error, "the operations port failed");
        }
    })]);
    Ok(address)
}

/// Opens the operators' gRPC port. Where it is.
async fn open_admin(
    config: &Config,
    asked: Asked,
    health: &Health,
    tasks: &mut Tasks,
) -> Result<SocketAddr, StartError> {
    let listener = listen(config.admin.listen).await?;
    let address = address(&listener, config.admin.listen)?;
    let stop = tasks.stop.clone();
    let admin = Admin::new(asked, health.reporter(), config.rpc.reflection, stop);
    let admin = admin.map_err(|source| StartError::Serve { address, source })?;
    tasks.add([tokio::spawn(admin.serve(listener))]);
    Ok(address)
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| StartError::Serve { address, source })
}

fn address(listener: &TcpListener, asked: SocketAddr) -> Result<SocketAddr, StartError> {
    listener
        .local_addr()
        .map_err(|source| StartError::Serve { address: asked, source })
}
