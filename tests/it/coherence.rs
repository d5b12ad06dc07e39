//! Proves what several gateways on one Redis and one PostgreSQL look like from outside while the networks between them break: how old at
//! most is what a `CACHED` read answers, and that the caches are in use again afterwards.
//!
//! Each gateway reaches its servers through networks of its own, which a test breaks. Copies live for five minutes, as they do by default, so
//! nothing here is repaired by time. Bounds are on ages by the clock of the test: from the answer to a write until a read that does not show
//! it was *sent*.

mod breakers;
mod emptied;
mod ledger;
mod parted;
mod pending;
mod refreshed;
mod repeated;
mod replaced;
mod whole;

use std::time::Duration;

use ::redis::AsyncCommands;
use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::time::{Instant, sleep};

use self::ledger::{KEYS, Ledger, Reading, key};
use crate::harness::{
    Client, Database, Gateway, SOON, Setup,
    client::seen,
    eventually, expect,
    proxy::{Passage, Proxy},
    redis,
};

/// How old an answer may be where the reader is cut off from Redis: its beats are missed for a second; and then some for the machine.
const READER_CUT_OFF: Duration = Duration::from_millis(1_500);

/// How old an answer may be where a writer is cut off from Redis: six seconds, and how long calls take.
const WRITER_CUT_OFF: Duration = Duration::from_secs(7);

/// A gateway, and its networks.
struct Replica {
    gateway: Gateway,
    redis: Proxy,
    store: Proxy,
}

/// What gateways share.
struct World {
    database: Database,
    redis: redis::Server,
    config: String,
}

impl World {
    /// A store and a Redis for gateways of this configuration.
    async fn new(config: &str) -> World {
        let (database, redis) = tokio::join!(Database::postgres(), redis::start());
        World {
            database,
            redis,
            config: config.to_owned(),
        }
    }

    /// The same, and two gateways that both serve and hear each other.
    async fn pair(config: &str) -> (World, [Replica; 2]) {
        let world = World::new(config).await;
        let replicas = tokio::join!(world.replica(), world.replica());
        (world, replicas.into())
    }

    /// Makes Redis look emptied, and waits until a new epoch has begun for that. What the places of the old one's copies begin with.
    async fn remove_sentinel(&self) -> String {
        let old = self.database.place("").await;
        let sentinel = format!("{}~", old.trim_end_matches("orders:"));
        let mut connection = self.redis.connect().await;
        eventually("the epoch moves", SOON, async || {
            // Again and again: a gateway that has not seen it yet sets it.
            let _: u64 = connection.del(&sentinel).await.expect("Redis answers");
            let new = self.database.place("").await;
            expect(new != old, new)
        })
        .await;
        old
    }

    /// A gateway that serves and has found Redis.
    async fn replica(&self) -> Replica {
        self.replica_as(&self.redis.url(), Passage::Open).await
    }

    /// A gateway whose URL of Redis is `url`, over a network in this state at first.
    async fn replica_as(&self, url: &str, passage: Passage) -> Replica {
        let (redis, redis_url) = Proxy::before(url).await;
        let (store, store_url) = Proxy::before(self.database.url()).await;
        redis.set(passage);
        let setup = Setup::new().store(&store_url).config(&self.config);
        let setup = match passage {
            Passage::Open => setup.redis(&redis_url),
            // It is not waited for.
            _ => setup.argument("--redis-url").argument(&redis_url),
        };
        Replica {
            gateway: setup.start().await,
            redis,
            store,
        }
    }
}

impl Replica {
    fn client(&self) -> &Client {
        &self.gateway.client
    }

    /// Starts to read through it, in turn, all that a ledger is about.
    fn read(&self, consistency: ReadConsistency) -> Reading {
        Reading::start(self.client(), consistency)
    }

    /// How many epochs it has begun.
    async fn epochs_moved(&self) -> f64 {
        self.gateway.metric("tidegate_cache_epochs_moved_total", &[]).await
    }

    async fn redis_is_down(&self) -> bool {
        self.gateway.metric("tidegate_redis_connections_down", &[]).await > 0.0
    }
}

/// Waits until every one of them reads what was written last, from its own memory and from Redis (or from its queue, which comes before): the
/// caches are in use again. Nothing may be written meanwhile.
async fn await_agreement(replicas: &[Replica], ledger: &Ledger) {
    const SHARED: [Source; 2] = [Source::L2, Source::Pending];
    for replica in replicas {
        for number in 0..KEYS {
            let (key, last) = (key(number), ledger.last(number).to_string());
            for (consistency, from) in [
                (ReadConsistency::Shared, &SHARED[..]),
                (ReadConsistency::Cached, &[Source::L1]),
            ] {
                eventually(&format!("{key} is read from {from:?}"), SOON, async || {
                    let read = replica.client().get(&key, consistency).await;
                    let read = read.map_err(|status| format!("{status:?}"))?;
                    let (value, source) = seen(&read);
                    let agreed = value == Some(last.as_bytes()) && from.contains(&source);
                    expect(agreed, (last.as_str(), &read))
                })
                .await;
            }
        }
    }
}

/// Goes on until so long after `since`.
async fn pass(since: Instant, time: Duration) {
    sleep(time.saturating_sub(since.elapsed())).await;
}
