//! The stage: PostgreSQL, Redis, and gateways that reach them over networks of their own.
//!
//! Owns the servers, how each fault is done and undone, and what the clients need to know: where the gateways are, and which start of each it
//! is. Does not own when anything breaks (`plan`).

use std::sync::Arc;

use parking_lot::RwLock;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use redis::cmd;
use tokio::time::Instant;
use tonic::transport::Endpoint;

use crate::{
    harness::{
        Client, Gateway, Setup, postgres, postgres::Stop, process::Directory, proxy::Proxy, redis as redis_server,
    },
    history::Nanos,
    plan::{Fault, Server, Trouble},
    store::Store,
};

/// How many gateways there are.
pub const REPLICAS: usize = 3;

/// How far the clock of a gateway may be from that of the store, in milliseconds.
const CLOCK_OFFSET_MAX: i64 = 5_000;

/// Each connection is one serving thread's.
const CONNECTIONS: usize = 4;

/// The configuration of every gateway. Copies of the keys that are written only through live as long as by default: nothing but what is promised
/// keeps them from being stale. Those of the keys written behind end soon, so that they are renewed while writes are pending. On the keys written
/// either way writes are pending for long enough that what the store decides has to wait for them.
const CONFIG: &str = r#"
[namespaces.behind]
write_delay = "100ms"
cache_lifetime = "500ms"
refresh_threshold = 0.9

[namespaces.mixed]
write_delay = "300ms"

[queue]
retry_backoff_max = "200ms"

[shutdown]
calls_wait = "5s"
drain_wait = "5s"
"#;

/// What the clients know of the gateways.
pub struct Front {
    began: Instant,
    replicas: Vec<RwLock<Door>>,
}

struct Door {
    life: u32,
    up: bool,
    clients: Vec<Client>,
}

impl Front {
    /// When something was, since the run began.
    pub fn nanos(&self, instant: Instant) -> Nanos {
        instant.saturating_duration_since(self.began).as_nanos() as Nanos
    }

    /// Whether a gateway is there, as far as is known.
    pub fn is_up(&self, replica: usize) -> bool {
        self.replicas[replica].read().up
    }

    /// Which start of the gateway it is.
    pub fn life(&self, replica: usize) -> u32 {
        self.replicas[replica].read().life
    }

    /// A session's client of a gateway.
    pub fn client(&self, replica: usize, session: u32) -> Client {
        self.replicas[replica].read().clients[session as usize % CONNECTIONS].clone()
    }

    fn close(&self, replica: usize) {
        let mut door = self.replicas[replica].write();
        door.life += 1;
        door.up = false;
    }

    fn open(&self, replica: usize, gateway: &Gateway) {
        let endpoint = Endpoint::from_shared(format!("http://{}", gateway.address)).expect("an address makes a URL");
        let mut door = self.replicas[replica].write();
        door.life += 1;
        door.up = true;
        door.clients = (0..CONNECTIONS).map(|_| Client::new(endpoint.connect_lazy())).collect();
    }
}

/// A gateway, what it was started with, and its networks.
struct Member {
    setup: Setup,
    gateway: Option<Gateway>,
    /// After the gateway: its log is shown when the run breaks off.
    directory: Directory,
    networks: [Proxy; 2],
    /// What earlier lives of it said.
    logs: String,
}

impl Member {
    fn network(&self, server: Server) -> &Proxy {
        &self.networks[server as usize]
    }
}

/// See the module.
pub struct Stage {
    pub front: Arc<Front>,
    pub store: Store,
    members: Vec<Member>,
    postgres: postgres::Server,
    redis: redis_server::Server,
}

impl Stage {
    /// Starts everything, whole, with the clocks of the gateways apart.
    pub async fn start(seed: u64) -> Stage {
        let mut rng = StdRng::seed_from_u64(seed);
        let postgres = postgres::Server::start().await;
        let redis = redis_server::start().await;
        let url = postgres.create_database().await;
        let mut members = Vec::new();
        for _ in 0..REPLICAS {
            let (to_redis, redis_url) = Proxy::before(&redis.url()).await;
            let (to_postgres, store_url) = Proxy::before(&url).await;
            let offset = rng.random_range(-CLOCK_OFFSET_MAX..=CLOCK_OFFSET_MAX);
            let setup = Setup::new()
                .argument("--planted-clock-offset")
                .argument(&offset.to_string());
            members.push(Member {
                setup: setup.store(&store_url).redis(&redis_url).config(CONFIG),
                gateway: None,
                directory: Directory::new("consistency"),
                networks: [to_redis, to_postgres],
                logs: String::new(),
            });
        }
        let door = |_| {
            RwLock::new(Door {
                life: 0,
                up: false,
                clients: Vec::new(),
            })
        };
        let front = Arc::new(Front {
            began: Instant::now(),
            replicas: (0..REPLICAS).map(door).collect(),
        });
        let first = start(&mut members[0], &front, 0);
        first.await;
        let mut stage = Stage {
            store: Store::watch(&url).await,
            front,
            members,
            postgres,
            redis,
        };
        for replica in 1..REPLICAS {
            stage.start_gateway(replica).await;
        }
        stage
    }

    async fn start_gateway(&mut self, replica: usize) {
        start(&mut self.members[replica], &self.front, replica).await;
    }

    /// Breaks something.
    pub async fn inject(&mut self, fault: &Fault) {
        match fault {
            Fault::RedisKilled => self.redis.kill(),
            Fault::RedisOld => self.redis.save().await,
            Fault::RedisFlushed => self.on_redis(&["FLUSHALL"]).await,
            Fault::RedisEvicts => {
                // Some of what it holds has to go, and goes again with every write.
                let bytes = self.redis.used_bytes().await;
                self.on_redis(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"])
                    .await;
                self.on_redis(&["CONFIG", "SET", "maxmemory", &(bytes - 4096).to_string()])
                    .await;
            }
            Fault::RedisFull => self.on_redis(&["CONFIG", "SET", "maxmemory", "1"]).await,
            Fault::RedisFrozen => self.redis.freeze(),
            Fault::Network {
                gateway,
                server,
                trouble,
            } => {
                let network = self.members[*gateway].network(*server);
                match trouble {
                    Trouble::Passes(passage) => network.set(*passage),
                    Trouble::Slow { requests, answers } => network.delay(*requests, *answers),
                    Trouble::Reset => network.reset(),
                }
            }
            Fault::PostgresKilled => self.postgres.stop(Stop::Immediate).await,
            Fault::GatewayKilled(replica) => {
                self.front.close(*replica);
                self.end_gateway(*replica).await;
            }
            Fault::GatewayPaused(replica) => {
                if let Some(gateway) = &self.members[*replica].gateway {
                    gateway.freeze();
                }
            }
        }
    }

    /// Mends it.
    pub async fn heal(&mut self, fault: &Fault) {
        match fault {
            Fault::RedisKilled => self.redis.start_again().await,
            Fault::RedisOld => {
                self.redis.kill();
                self.redis.start_again().await;
            }
            Fault::RedisFlushed => {}
            Fault::RedisEvicts | Fault::RedisFull => {
                self.on_redis(&["CONFIG", "SET", "maxmemory", "0"]).await;
                self.on_redis(&["CONFIG", "SET", "maxmemory-policy", "noeviction"])
                    .await;
            }
            Fault::RedisFrozen => self.redis.thaw(),
            Fault::Network { gateway, server, .. } => self.members[*gateway].network(*server).restore(),
            Fault::PostgresKilled => self.postgres.start_again().await,
            Fault::GatewayKilled(replica) => self.start_gateway(*replica).await,
            Fault::GatewayPaused(replica) => {
                if let Some(gateway) = &self.members[*replica].gateway {
                    gateway.thaw();
                }
            }
        }
    }

    async fn on_redis(&self, words: &[&str]) {
        let mut connection = self.redis.connect().await;
        let done = cmd(words[0]).arg(&words[1..]).query_async(&mut connection).await;
        let () = done.expect("Redis does as it is told");
    }

    async fn end_gateway(&mut self, replica: usize) {
        let member = &mut self.members[replica];
        if let Some(mut gateway) = member.gateway.take() {
            gateway.kill().await;
            member.logs.push_str(&gateway.log());
        }
    }

    /// Gateways that have ended though nobody ended them, or have panicked, each with its number.
    pub fn fallen(&mut self) -> Vec<usize> {
        let is_fallen = |member: &mut Member| {
            member
                .gateway
                .as_mut()
                .is_some_and(|gateway| !gateway.runs() || gateway.log().contains("panicked at"))
        };
        let members = self.members.iter_mut().enumerate();
        members
            .filter_map(|(number, member)| is_fallen(member).then_some(number))
            .collect()
    }

    /// Waits until every gateway has brought what it accepted to the store.
    pub async fn drained(&self) {
        for member in &self.members {
            if let Some(gateway) = &member.gateway {
                gateway.drained().await;
            }
        }
        self.store.quiet().await;
    }

    /// All that the gateways said, by their numbers.
    pub fn logs(&self) -> Vec<String> {
        let log = |member: &Member| {
            let now = member.gateway.as_ref().map(Gateway::log).unwrap_or_default();
            format!("{}{now}", member.logs)
        };
        self.members.iter().map(log).collect()
    }
}

async fn start(member: &mut Member, front: &Front, replica: usize) {
    let started = member.setup.try_start_in(&member.directory).await;
    let gateway = started.unwrap_or_else(|exit| panic!("gateway {replica} does not start: {exit:?}"));
    front.open(replica, &gateway);
    member.gateway = Some(gateway);
}
