//! Proves that replicas share their loads: of all who miss a key, or renew it, in two gateways, one asks the store, as long as it answers within
//! the wait; and that who comes late, or whose loader died, lands nothing.

use std::time::Duration;

use redis::cmd;
use tidegate::rpc::proto::{ReadConsistency, Source};
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup, client::seen, eventually, expect, proxy::Proxy, redis as redis_server,
};

/// Longer than any test holds the store.
const PATIENT: &str = "[rpc]\nstreams_max = 512\ndeadline_default = \"1m\"\n[store]\ncall_timeout = \"2m\"\n";

/// How long a read waits for another gateway's load, where it is to wait.
const WAITING: &str = "[redis]\nload_wait = \"10s\"\n";

/// Two gateways on one Redis and one PostgreSQL.
struct Pair {
    database: Database,
    redis: redis_server::Server,
    gateways: [Gateway; 2],
}

async fn pair(sections: &str) -> Pair {
    let (database, redis) = (Database::postgres().await, redis_server::start().await);
    let setup = Setup::new().store(database.url()).redis(&redis.url()).config(sections);
    let gateways = [setup.clone().start().await, setup.start().await];
    let pair = Pair {
        database,
        redis,
        gateways,
    };
    pair.shared().await;
    pair
}

impl Pair {
    /// Waits until both read what lies in Redis, which nobody does before all go by the same epoch.
    async fn shared(&self) {
        self.gateways[0]
            .client
            .put("probe", b"value", Mode::Through)
            .await
            .unwrap();
        for gateway in &self.gateways {
            eventually("copies in Redis are read", SOON, async || {
                let read = gateway.client.get("probe", ReadConsistency::Shared).await.unwrap();
                expect(read.source() == Source::L2, read)
            })
            .await;
        }
    }

    /// How many keys the store was asked for by either.
    async fn loads(&self) -> f64 {
        self.sum("tidegate_store_load_batch_keys_sum").await
    }

    async fn sum(&self, metric: &str) -> f64 {
        self.gateways[0].metric(metric, &[]).await + self.gateways[1].metric(metric, &[]).await
    }

    /// Where slots of a key are, whatever the epoch.
    async fn places(&self, key: &str) -> Vec<String> {
        let keys = cmd("KEYS")
            .arg(format!("tidegate:*:orders:{key}"))
            .query_async(&mut self.redis.connect().await)
            .await;
        keys.expect("KEYS")
    }

    /// The version of the copy of a key in Redis; `None` where there is none, whether there is a token or not.
    async fn version(&self, key: &str) -> Option<i64> {
        let place = self.places(key).await.pop()?;
        let version: Vec<u8> = cmd("GETRANGE")
            .arg(place)
            .arg(0)
            .arg(7)
            .query_async(&mut self.redis.connect().await)
            .await
            .expect("GETRANGE");
        let version = i64::from_be_bytes(version.try_into().ok()?);
        (version != 0).then_some(version)
    }

    /// Has Redis forget the slot of a key, as if it had needed the room.
    async fn evict(&self, key: &str) {
        for place in self.places(key).await {
            let evicted = cmd("DEL").arg(place).exec_async(&mut self.redis.connect().await).await;
            evicted.expect("DEL");
        }
    }

    /// How many queries wait for the store.
    async fn waiting(&self) -> String {
        let waiting = "select count(*)::text from pg_stat_activity \
             where datname = current_database() and wait_event_type = 'Lock'";
        self.database.texts(waiting).await.remove(0)
    }
}

/// 250 reads of a key through each of the two, while the store holds its answer, ask it once.
async fn all_share_one_load(pair: &Pair, key: &str, value: Option<&[u8]>) {
    let before = pair.loads().await;
    let hold = pair.database.hold_all().await;
    let mut readers = JoinSet::new();
    for reader in 0..500 {
        let (client, key) = (pair.gateways[reader % 2].client.clone(), key.to_owned());
        readers.spawn(async move { client.read(&key).await });
    }
    eventually("all of them wait", SOON, async || {
        let running = pair.sum("tidegate_calls_running").await;
        expect(running >= 500.0, running)
    })
    .await;
    pair.database.await_waiting(1).await;
    assert_eq!(pair.waiting().await, "1", "queries wait for the store");
    hold.release().await;
    while let Some(read) = readers.join_next().await {
        let read = read.expect("no reader fails");
        assert_eq!(seen(&read).0, value, "{read:?}");
        assert!(!read.stale, "{read:?}");
    }
    assert_eq!(pair.loads().await - before, 1.0, "the store was asked once");
}

#[tokio::test]
async fn of_five_hundred_reads_of_one_key_through_two_gateways_one_asks_the_store() {
    let pair = pair(&format!(
        "{PATIENT}[namespace_defaults]\nabsence_lifetime = \"1m\"\n{WAITING}"
    ))
    .await;
    pair.database.write_past("orders", "there", b"value").await;
    all_share_one_load(&pair, "there", Some(b"value")).await;
    all_share_one_load(&pair, "absent", None).await;
}

#[tokio::test]
async fn a_copy_in_both_gateways_is_renewed_once_and_nobody_waits() {
    // Copies are renewed from their second second on at the earliest, and end in their eighteenth.
    let lifetimes = "[namespace_defaults]\ncache_lifetime = \"20s\"\nrefresh_threshold = 0.8\n";
    let pair = pair(&format!("{PATIENT}{lifetimes}{WAITING}")).await;
    let clients = [&pair.gateways[0].client, &pair.gateways[1].client];
    clients[0].put("key", b"old", Mode::Through).await.unwrap();
    assert_eq!(seen(&clients[1].read("key").await).0, Some(&b"old"[..]));
    pair.database.write_past("orders", "key", b"new").await;
    let hold = pair.database.hold_all().await;
    let before = pair.loads().await;
    let read_at_once = async |value: &[u8]| {
        let mut agreed = true;
        for client in clients {
            let read = client.read("key").await;
            let (value_seen, source) = seen(&read);
            assert!(matches!(source, Source::L1 | Source::L2), "a reader waited: {read:?}");
            agreed &= value_seen == Some(value);
        }
        agreed
    };
    eventually("both renew it", SOON, async || {
        assert!(read_at_once(b"old").await, "the store has not answered yet");
        let refreshes = pair.sum("tidegate_cache_refreshes_total").await;
        expect(refreshes >= 2.0, refreshes)
    })
    .await;
    pair.database.await_waiting(1).await;
    assert_eq!(pair.waiting().await, "1", "queries wait for the store");
    hold.release().await;
    eventually("both have the new one", SOON, async || {
        expect(read_at_once(b"new").await, "an older one")
    })
    .await;
    assert_eq!(pair.loads().await - before, 1.0, "the store was asked once");
}

#[tokio::test]
async fn who_waited_in_vain_asks_for_itself_and_fills_nothing_until_the_token_of_the_dead_has_ended() {
    let mut pair = pair(&format!("{PATIENT}[redis]\nload_wait = \"50ms\"\n")).await;
    pair.database.write_past("orders", "key", b"value").await;
    let hold = pair.database.hold_all().await;
    let read = |gateway: &Gateway| {
        let client = gateway.client.clone();
        tokio::spawn(async move { client.get("key", ReadConsistency::Cached).await })
    };
    let loading = read(&pair.gateways[0]);
    pair.database.await_waiting(1).await;
    let waiting = read(&pair.gateways[1]);
    // The second has waited long enough.
    pair.database.await_waiting(2).await;
    pair.gateways[0].kill().await;
    assert!(loading.await.expect("no panic").is_err(), "its gateway died");
    hold.release().await;
    let read = waiting.await.expect("no panic").expect("it is answered");
    assert_eq!(seen(&read), (Some(&b"value"[..]), Source::Store));
    assert_eq!(pair.places("key").await.len(), 1, "the dead one's token stands");
    assert_eq!(pair.version("key").await, None, "and nothing else");
    let survivor = &pair.gateways[1].client;
    let read = survivor.get("key", ReadConsistency::Shared).await.unwrap();
    assert_eq!(seen(&read), (Some(&b"value"[..]), Source::Store));
    eventually("the token has ended, and a load lands", SOON, async || {
        let read = survivor.get("key", ReadConsistency::Shared).await.unwrap();
        assert_eq!(seen(&read).0, Some(&b"value"[..]));
        expect(read.source() == Source::L2, read)
    })
    .await;
}

#[tokio::test]
async fn a_load_that_failed_gives_its_token_back() {
    let pair = pair(&format!("[rpc]\ndeadline_default = \"1s\"\n{WAITING}")).await;
    let hold = pair.database.hold_all().await;
    let client = pair.gateways[0].client.clone();
    let reader = tokio::spawn(async move { client.get("key", ReadConsistency::Cached).await });
    let place = eventually("a token stands", SOON, async || {
        pair.places("key").await.pop().ok_or_else(|| "nothing".to_owned())
    })
    .await;
    let failed = reader.await.expect("no panic");
    assert_eq!(failed.map_err(|status| status.code()), Err(Code::DeadlineExceeded));
    let mut connection = pair.redis.connect().await;
    eventually("the token is gone", SOON, async || {
        let stands: bool = cmd("EXISTS")
            .arg(&place)
            .query_async(&mut connection)
            .await
            .expect("EXISTS");
        expect(!stands, stands)
    })
    .await;
    // Had it ended by itself, that look at it would have been counted, at the latest.
    let stats: String = cmd("INFO")
        .arg("stats")
        .query_async(&mut connection)
        .await
        .expect("INFO");
    assert!(stats.contains("expired_keys:0\r"), "{stats}");
    hold.release().await;
}

#[tokio::test]
async fn what_a_load_read_before_a_write_lands_nowhere_after_it() {
    let (database, redis) = (Database::postgres().await, redis_server::start().await);
    let (network, slow_url) = Proxy::before(database.url()).await;
    // One connection, on which the query is prepared already: then a load is one question and one answer.
    let sections = format!("{PATIENT}load_connections = 1\n");
    let setup = |url: &str| Setup::new().store(url).redis(&redis.url()).config(&sections);
    let gateways = [setup(&slow_url).start().await, setup(database.url()).start().await];
    let pair = Pair {
        database,
        redis,
        gateways,
    };
    pair.shared().await;
    let [slow, quick] = pair.gateways.each_ref().map(|gateway| gateway.client.clone());
    slow.get("probe", ReadConsistency::Store).await.unwrap();
    // On a busy machine the write may take longer than the answer: then once more, with a slower network.
    for (key, delay) in [("1", 1), ("2", 4), ("3", 15)] {
        pair.database.write_past("orders", key, b"old").await;
        let since = pair.database.texts("select clock_timestamp()::text").await.remove(0);
        network.delay(Duration::ZERO, Duration::from_secs(delay));
        let reader = tokio::spawn({
            let client = slow.clone();
            async move { client.read(key).await }
        });
        let asked = format!(
            "select state from pg_stat_activity where datname = current_database() \
                and query like '%join tidegate_entries e%' and query_start > '{since}' and state = 'idle'"
        );
        eventually("the store has answered", SOON, async || {
            let asked = pair.database.texts(&asked).await;
            expect(asked.len() == 1, asked)
        })
        .await;
        quick.put(key, b"new", Mode::Through).await.unwrap();
        pair.evict(key).await;
        let in_time = !reader.is_finished();
        network.restore();
        let read = reader.await.expect("the reader is answered");
        if !in_time {
            continue;
        }
        assert_eq!(
            seen(&read),
            (Some(&b"old"[..]), Source::Store),
            "it asked before the write"
        );
        // On the same thread as the fill, and so after it.
        assert_eq!(
            seen(&slow.read(key).await).0,
            Some(&b"new"[..]),
            "from its L1, or Redis"
        );
        for client in [&slow, &quick] {
            for consistency in [ReadConsistency::Cached, ReadConsistency::Shared] {
                assert_eq!(client.value(key, consistency).await.as_deref(), Some(&b"new"[..]));
            }
        }
        return;
    }
    panic!("the write is never faster than the answer of a slow network");
}
