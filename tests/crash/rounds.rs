//! The rounds: clients are busy, the gateway ends in one of many ways, is started again on its data, and all is judged.
//!
//! Owns the servers and the order of things. Does not own what happens in a round (`plan`) nor what is right (`ledger`). A round counts
//! as a kill when there were acknowledged durable writes that the store did not have at the moment of its end.

use std::{collections::BTreeSet, net::TcpListener, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tidegate::rpc::proto::ReadConsistency;
use tokio::time::{Instant, sleep};

use crate::{
    counters::{self, Counters},
    harness::{Gateway, SOON, Setup, eventually, postgres, process::Directory, redis},
    ledger::{Key, Ledger, NAMESPACES, VOLATILE},
    load::{self, Load, now_millis},
    plan::{End, KILL_POINTS, Plan, Planner, Redis},
    store::Store,
};

/// Small segments and small batches, so that there are many of both, some of them under way at the same time. And patience with Redis: what
/// a publish that timed out leaves there is older than what was acknowledged, which is not what is judged here.
const CONFIG: &str = r#"
[journal]
segment_bytes = 1048576
bytes_max = 8388608
idle_sync = "100ms"

[redis]
timeout = "5s"

[rpc]
value_bytes_max = 65536

[queue]
drain_batch_writes_max = 40
retry_backoff_max = "200ms"

[shutdown]
calls_wait = "5s"
drain_wait = "400ms"
"#;

/// How long a gateway may take to come to its kill point, once the clients were busy for as long as planned.
const PATIENCE: Duration = Duration::from_secs(6);

/// How long after the first signal the second one comes. Those closer together are one.
const IMPATIENCE: Duration = Duration::from_millis(250);

/// Ended by its own hand, at a kill point.
const ABORTED: i32 = 128 + 6;
const KILLED: i32 = 128 + 9;
const STOPPED: i32 = 0;
const UNAVAILABLE: i32 = 69;
const LEFT_BEHIND: i32 = 75;
const AT_ONCE: i32 = 130;

/// From so many kills on, each kill point must have been reached.
const KILLS_FOR_ALL: u32 = 100;

/// How many keys of each namespace are read by every consistency when the store is judged. The lowest are the hot ones.
const READ_KEYS: u32 = 12;

/// What happened so far.
#[derive(Debug, Default)]
pub struct Tally {
    pub kills: u32,
    pub rounds: u32,
    pub outages: u32,
    pub at_kill_points: u32,
    /// The kill points that were reached.
    pub reached: BTreeSet<&'static str>,
    /// Ends that were asked for, by SIGTERM. They are no kills.
    pub stops: u32,
    pub checks: u32,
}

/// See the module.
pub struct Run {
    postgres: postgres::Server,
    redis: redis::Server,
    store: Store,
    setup: Setup,
    /// Before the directory: its log is shown when the run breaks off.
    gateway: Gateway,
    directory: Directory,
    /// Whether PostgreSQL is stopped.
    outage: bool,
    /// How many acknowledged writes the store did not have when the gateway last ended.
    unflushed: usize,
    pub ledger: Arc<Mutex<Ledger>>,
    pub counters: Arc<Mutex<Counters>>,
    pub tally: Tally,
}

/// Something that cannot be: the run ends.
#[derive(Debug)]
pub struct Broken(pub String);

impl Run {
    /// Starts the servers, and the gateway for the first time.
    pub async fn start(run: u64) -> Run {
        let postgres = postgres::Server::start().await;
        let redis = redis::start().await;
        let url = postgres.create_database().await;
        let setup = Setup::new().store(&url).redis(&redis.url()).config(&config());
        let directory = Directory::new("crash");
        let started = setup.try_start_in(&directory).await;
        let gateway = started.unwrap_or_else(|exit| panic!("the gateway does not start: {exit:?}"));
        Run {
            store: Store::watch(&url).await,
            postgres,
            redis,
            setup,
            directory,
            gateway,
            outage: false,
            unflushed: 0,
            ledger: Arc::new(Mutex::new(Ledger::new(run))),
            counters: Arc::new(Mutex::new(Counters::new(run))),
            tally: Tally::default(),
        }
    }

    /// Kills until so many kills count, or something is wrong.
    pub async fn kill(&mut self, kills: u32, seed: u64) -> Result<(), Broken> {
        let mut planner = Planner::new(seed);
        let mut plan = planner.plan();
        // The gateway that runs was started without its kill point.
        plan.end = End::Kill;
        while self.tally.kills < kills {
            if self.tally.rounds > 3 * kills + 20 {
                return Err(Broken(
                    "hardly any kill meets a write that is acknowledged and not in the store".to_owned(),
                ));
            }
            let next = planner.plan();
            self.round(&plan, &next).await?;
            plan = next;
            if self.is_wrong() {
                break;
            }
        }
        self.judge_at_rest(&plan).await
    }

    /// Judges in the end, by a gateway that does not come to a kill point while it is asked.
    async fn judge_at_rest(&mut self, waiting: &Plan) -> Result<(), Broken> {
        self.end_outage().await;
        if matches!(waiting.end, End::KillPoint { .. }) {
            self.gateway.kill().await;
            self.start_again(&End::Kill).await?;
        }
        self.judge().await;
        Ok(())
    }

    /// The kill points that should have been reached by so many kills, and were not.
    pub fn missed(&self) -> Vec<&'static str> {
        let all = KILL_POINTS.iter().map(|(name, ..)| *name);
        let due = |_: &&str| self.tally.kills >= KILLS_FOR_ALL;
        all.filter(due)
            .filter(|name| !self.tally.reached.contains(name))
            .collect()
    }

    fn is_wrong(&self) -> bool {
        !self.ledger.lock().complaints.is_empty()
    }

    /// One round: `plan`, up to a gateway that is ready for `next`.
    async fn round(&mut self, plan: &Plan, next: &Plan) -> Result<(), Broken> {
        self.tally.rounds += 1;
        let load = Load::start(&self.gateway, &self.ledger, &self.counters, plan);
        if self.outage {
            // The gateway was started without it.
            self.runs_for(plan.load / 2).await;
            self.end_outage().await;
        }
        let mut stopped_at = None;
        if self.runs_for(plan.load).await
            && let Some(outage) = &plan.outage
        {
            self.postgres.stop(outage.how).await;
            self.outage = true;
            stopped_at = Some(self.ledger.lock().sent());
            self.runs_for(outage.lasts).await;
        }
        let code = self.end(&plan.end).await?;
        if let End::KillPoint { name, .. } = plan.end
            && code == ABORTED
        {
            self.tally.reached.insert(name);
        }
        load.finish().await;
        self.unflushed = match stopped_at {
            Some(first) => self.ledger.lock().journaled_since(first),
            None => self.compare().await,
        };
        let unflushed = self.unflushed;
        if code == STOPPED && unflushed > 0 {
            let what = format!("it stopped with exit code 0, and {unflushed} acknowledged writes are not in the store");
            self.ledger.lock().complain_at(None, what);
        }
        match code {
            KILLED | ABORTED => self.count(code == ABORTED),
            _ => self.tally.stops += 1,
        }
        self.meddle(plan.redis).await;
        if !plan.gateway_first {
            self.end_outage().await;
        }
        self.ledger.lock().next_life();
        if plan.failed_start {
            self.fail_to_start().await?;
        }
        self.start_again(&next.end).await?;
        if plan.redis == Redis::Away {
            self.redis.start_again().await;
        }
        if plan.check && !matches!(next.end, End::KillPoint { .. }) {
            self.end_outage().await;
            self.judge().await;
        }
        Ok(())
    }

    /// Counts the end of the gateway, if it met acknowledged writes that the store did not have.
    fn count(&mut self, at_kill_point: bool) {
        if self.unflushed > 0 {
            self.tally.kills += 1;
            self.tally.outages += u32::from(self.outage);
            self.tally.at_kill_points += u32::from(at_kill_point);
        }
    }

    async fn end_outage(&mut self) {
        if self.outage {
            self.postgres.start_again().await;
            self.outage = false;
        }
    }

    /// Whether the gateway still runs after that time.
    async fn runs_for(&mut self, time: Duration) -> bool {
        let end = Instant::now() + time;
        while Instant::now() < end {
            if !self.gateway.runs() {
                return false;
            }
            sleep(Duration::from_millis(10)).await;
        }
        true
    }

    /// Ends the gateway. Its exit code.
    async fn end(&mut self, how: &End) -> Result<i32, Broken> {
        match how {
            End::Kill => self.gateway.kill().await,
            End::Terminate => self.gateway.terminate(),
            End::TerminateTwice => {
                self.gateway.terminate();
                sleep(IMPATIENCE).await;
                self.gateway.terminate();
            }
            End::KillPoint { stopping: true, .. } => self.gateway.terminate(),
            End::KillPoint { stopping: false, .. } => {
                if self.runs_for(PATIENCE).await {
                    self.gateway.kill().await;
                }
            }
        }
        let exit = self.gateway.wait_exit(SOON).await;
        let Some(code) = exit.code else {
            // Else its keeper would have said so: it was ended by somebody else.
            return Err(Broken(format!(
                "nobody knows how the gateway ended, to be ended by {how:?}; it said:\n{}",
                exit.log
            )));
        };
        let expected: &[i32] = match how {
            End::Kill => &[KILLED],
            End::Terminate => &[STOPPED, LEFT_BEHIND],
            End::TerminateTwice => &[STOPPED, LEFT_BEHIND, AT_ONCE],
            End::KillPoint { .. } => &[ABORTED, KILLED],
        };
        let log = exit.log;
        if expected.contains(&code) && !log.contains("panicked at") {
            return Ok(code);
        }
        Err(Broken(format!(
            "the gateway ended with {code}, to be ended by {how:?}; it said:\n{log}"
        )))
    }

    /// Starts the gateway on what it left. It may be killed before it serves: then once more.
    async fn start_again(&mut self, next: &End) -> Result<(), Broken> {
        let setup = match next {
            End::KillPoint { point, .. } => self.setup.clone().argument("--kill-point").argument(point),
            End::Kill | End::Terminate | End::TerminateTwice => self.setup.clone(),
        };
        let mut started = setup.try_start_in(&self.directory).await;
        if let Err(exit) = &started
            && let End::KillPoint { name, .. } = next
            && exit.code == Some(ABORTED)
        {
            self.tally.reached.insert(name);
            if !self.outage {
                self.unflushed = self.compare().await;
            }
            self.count(true);
            started = self.setup.try_start_in(&self.directory).await;
        }
        match started {
            Ok(gateway) => {
                self.gateway = gateway;
                Ok(())
            }
            Err(exit) => Err(Broken(format!(
                "the gateway does not start again: exit code {:?}; it said:\n{}",
                exit.code, exit.log
            ))),
        }
    }

    /// Starts a gateway whose port is taken: it ends, and must not take along what it found.
    async fn fail_to_start(&mut self) -> Result<(), Broken> {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = taken.local_addr().expect("it is bound").to_string();
        let setup = self.setup.clone().argument("--listen").argument(&address);
        match setup.try_start_in(&self.directory).await {
            Err(exit) if exit.code == Some(UNAVAILABLE) => Ok(()),
            Err(exit) => Err(Broken(format!("on a port that is taken the gateway ends so: {exit:?}"))),
            Ok(_) => Err(Broken("the gateway serves on a port that is taken".to_owned())),
        }
    }

    /// How many keys have an acknowledged durable version that the store does not have.
    async fn compare(&self) -> usize {
        let stored = self.store.versions().await;
        self.ledger.lock().unflushed(&stored)
    }

    async fn meddle(&mut self, redis: Redis) {
        match redis {
            Redis::Nothing => {}
            Redis::Flushed => {
                let mut connection = self.redis.connect().await;
                let flushed = ::redis::cmd("FLUSHALL").query_async(&mut connection).await;
                let () = flushed.expect("Redis can be flushed");
            }
            Redis::Restarted => {
                self.redis.kill();
                self.redis.start_again().await;
            }
            Redis::Away => self.redis.kill(),
        }
    }

    /// Waits until all that was accepted is in the store, and judges that, and what is read.
    async fn judge(&mut self) {
        self.tally.checks += 1;
        self.count_to_the_end().await;
        self.gateway.drained().await;
        self.store.quiet().await;
        let changes = self.store.changes().await;
        let (counted, changes): (Vec<_>, Vec<_>) = changes
            .into_iter()
            .partition(|change| change.namespace == counters::NAMESPACE);
        let stored = self.store.versions().await;
        let dead_letters = self.store.dead_letters().await;
        {
            let mut ledger = self.ledger.lock();
            ledger.audit(&changes, now_millis());
            ledger.settle(&stored);
            let mut counters = self.counters.lock();
            counters.audit(&counted);
            counters.settle();
            for what in counters.complaints.drain(..) {
                ledger.complain_at(None, what);
            }
            if dead_letters > 0 {
                ledger.complain_at(None, format!("{dead_letters} writes were set aside as dead letters"));
            }
        }
        for namespace in 0..NAMESPACES.len() {
            for number in 0..READ_KEYS {
                let key = Key { namespace, number };
                self.judge_reads(key, stored.get(&key).copied()).await;
            }
        }
    }

    /// Sends every add that is to be counted exactly once again, until it is answered.
    async fn count_to_the_end(&self) {
        for client in 0..counters::CLIENTS {
            eventually("an add is answered", SOON, async || {
                let unanswered = self.counters.lock().unanswered(client);
                let Some(sent) = unanswered else { return Ok(()) };
                let added = load::add(&self.gateway.client, &self.counters, &sent).await;
                added.map_err(|status| format!("{status:?}"))
            })
            .await;
        }
    }

    /// Reads a key by every consistency. Caches may lag behind what nobody was told of, and never be ahead of the store.
    async fn judge_reads(&self, key: Key, stands: Option<i64>) {
        for consistency in [ReadConsistency::Store, ReadConsistency::Shared, ReadConsistency::Cached] {
            let what = format!("{key:?} can be read");
            let answer = eventually(&what, SOON, async || {
                let read = load::read(&self.gateway.client, &self.ledger, key, consistency).await;
                read.map_err(|status| format!("{status:?}"))
            })
            .await;
            let Some(version) = answer.entry.map(|entry| entry.version) else {
                let mut ledger = self.ledger.lock();
                if consistency == ReadConsistency::Store
                    && let Some(put) = stands.filter(|version| ledger.is_put(key, *version))
                {
                    ledger.complain_at(
                        Some(key),
                        format!("a read of the store shows nothing, and the put {put} stands"),
                    );
                }
                continue;
            };
            let ahead = Some(version) > stands && key.namespace != VOLATILE;
            if ahead || (consistency == ReadConsistency::Store && Some(version) != stands) {
                let what = format!(
                    "a {} read shows version {version}, and {stands:?} stands",
                    consistency.as_str_name()
                );
                self.ledger.lock().complain_at(Some(key), what);
            }
        }
    }

    /// What is wrong, and what is known of the keys that it is about.
    pub async fn explain(&mut self) -> String {
        self.end_outage().await;
        let mut lines = Vec::new();
        let complaints = std::mem::take(&mut self.ledger.lock().complaints);
        for complaint in complaints {
            let Some(key) = complaint.key else {
                lines.push(complaint.what);
                continue;
            };
            lines.push(format!("{} {}: {}", key.namespace(), key.name(), complaint.what));
            let known = self.ledger.lock().history(key);
            let audit = self.store.history(key).await;
            lines.extend(known.into_iter().chain(audit).map(|line| format!("    {line}")));
        }
        lines.join("\n")
    }
}

/// The configuration of every gateway.
fn config() -> String {
    let namespaces = NAMESPACES.iter().enumerate().map(|(place, (name, delay))| {
        let durability = if place == VOLATILE { "memory" } else { "journal" };
        format!("[namespaces.{name}]\nwrite_delay = \"{delay}\"\ndurability = \"{durability}\"\n")
    });
    namespaces.fold(CONFIG.to_owned(), |config, section| config + &section)
}
