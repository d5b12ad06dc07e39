//! L2 against real Redis servers: the one rule holds whatever is delivered in whatever order, and a Redis that fails is a miss that
//! costs next to no waiting.

use std::{
    collections::{BTreeSet, HashMap},
    iter,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use proptest::{
    collection::vec,
    prelude::*,
    sample::{select, subsequence},
    test_runner::{Config as Cases, TestRunner},
};
use redis::cmd;
use tidegate::{
    cache::{
        Copy,
        epochs::{Adopted, Epochs},
        memory::{self, Memory},
        message::Origin,
        redis::{Config, Hold, Published, RedisCache, RedisFailure, Server, SlotToken},
    },
    model::{Entry, Epoch, Key, Tags, Timestamp, Version, Write},
    telemetry::CacheMetrics,
};
use tokio::{net::TcpListener, task::JoinSet};

use crate::harness::{redis as redis_server, until};

pub const NOW: Timestamp = Timestamp(1_800_000_000_000);
const MINUTE: Duration = Duration::from_secs(60);
pub const LONG: Duration = Duration::from_secs(300);

const EPOCH: Epoch = Epoch(7);

/// L2 as one replica has it, by epochs that the test gives it.
pub struct Replica {
    cache: RedisCache,
    epochs: Arc<Epochs>,
    pub origin: Origin,
}

impl Replica {
    /// On a server, once it is up.
    pub async fn of(server: &redis_server::Server) -> Replica {
        Replica::counting(server, CacheMetrics::default()).await
    }

    async fn counting(server: &redis_server::Server, metrics: CacheMetrics) -> Replica {
        let replica = Replica::at(&server.url(), metrics);
        replica.up().await;
        replica
    }

    /// Whoever answers there. Its epoch holds for a server that nobody is.
    fn at(url: &str, metrics: CacheMetrics) -> Replica {
        Replica::start(url, "tidegate:", metrics)
    }

    fn start(url: &str, prefix: &str, metrics: CacheMetrics) -> Replica {
        let config = Config {
            prefix: prefix.to_owned(),
            // Longer than the default: a busy machine must not look like a frozen Redis.
            timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(1),
            ..Config::default()
        };
        let (epochs, origin) = (Arc::new(Epochs::new(prefix)), Origin::random());
        let server = Server::parse(url).expect("a valid URL");
        let replica = Replica {
            cache: RedisCache::start(&config, &server, Arc::clone(&epochs), origin, metrics),
            epochs,
            origin,
        };
        replica.adopt("nobody");
        replica
    }

    /// Waits until the server answers, and goes by an epoch that holds for it.
    pub async fn up(&self) {
        until("Redis is held to be up", async || self.cache.is_up()).await;
        let server = self.cache.server().expect("it is up");
        self.adopt(&server);
    }

    fn adopt(&self, server: &str) {
        self.epochs.adopt(Adopted {
            epoch: EPOCH,
            server: Some(server.to_owned()),
            readable_from: NOW,
            namespaces: HashMap::default(),
        });
    }

    /// Writes as a gateway does, with a token left before.
    pub async fn write(
        &self,
        key: &Key,
        entry: &Entry,
        at: Timestamp,
        lifetime: Duration,
    ) -> Result<Published, RedisFailure> {
        let entered = self.enter(key).await?;
        self.publish_entry(key, entry, at, lifetime, Hold::Token(entered.token))
            .await
    }

    /// Publishes without a token: over what is older, and into no empty slot.
    pub async fn overwrite(&self, key: &Key, entry: &Entry) -> Result<Published, RedisFailure> {
        self.publish_entry(key, entry, NOW, LONG, Hold::Nothing).await
    }

    pub async fn publish_entry(
        &self,
        key: &Key,
        entry: &Entry,
        at: Timestamp,
        lifetime: Duration,
        hold: Hold,
    ) -> Result<Published, RedisFailure> {
        let write = Write {
            key: key.clone(),
            entry: entry.clone(),
            tags: Tags::default(),
            requests: Vec::new(),
        };
        let copy = Copy::new(Some(entry.clone()), at, lifetime);
        self.publish(&write, &copy, hold, Duration::ZERO).await
    }
}

impl Deref for Replica {
    type Target = RedisCache;

    fn deref(&self) -> &RedisCache {
        &self.cache
    }
}

pub fn key(name: impl ToString) -> Key {
    Key::new("test", &name.to_string()).expect("valid")
}

/// Where the copy of a key lies in Redis.
pub fn slot(name: impl ToString) -> String {
    format!("tidegate:{:016x}:test:{}", EPOCH.0, name.to_string())
}

pub fn version(number: i64) -> Version {
    Version::new(number).expect("positive")
}

pub fn put(number: i64) -> Entry {
    Entry {
        version: version(number),
        value: Some(Bytes::from(format!("value {number}"))),
        expires_at: None,
    }
}

fn tombstone(number: i64) -> Entry {
    Entry {
        value: None,
        ..put(number)
    }
}

fn stands(number: i64) -> Result<Published, RedisFailure> {
    Ok(Published::Stands(version(number)))
}

pub async fn standing(cache: &RedisCache, key: &Key) -> Option<Entry> {
    cache.get(key).await.expect("Redis answers").and_then(|copy| copy.entry)
}

/// Where the halves of 32 bits end, where doubles stop being exact, and the ends.
pub fn edges() -> Vec<i64> {
    let around = [
        1,
        1 << 31,
        1 << 32,
        1 << 53,
        1 << 62,
        (1 << 62) + (1 << 31),
        0x7FFF_FFFF << 32,
    ]
    .into_iter()
    .flat_map(|number: i64| [number - 1, number, number + 1]);
    let bytes = [
        0x0102_0304_0506_0708,
        0x00FF_0000_0000_00FF,
        0x7FFF_FFFF_0000_0000,
        i64::MAX - 1,
        i64::MAX,
    ];
    around
        .chain(bytes)
        .filter(|number| *number > 0)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

#[tokio::test]
async fn of_every_two_versions_at_the_edges_the_higher_stands() {
    let server = redis_server::start().await;
    let cache = Replica::of(&server).await;
    let edges = edges();
    for first in &edges {
        for second in &edges {
            let key = key(format!("{first} {second}"));
            let highest = *first.max(second);
            assert_eq!(cache.write(&key, &put(*first), NOW, LONG).await, stands(*first));
            let answer = cache.overwrite(&key, &put(*second)).await;
            assert_eq!(answer, stands(highest), "{first} {second}");
            assert_eq!(standing(&cache, &key).await, Some(put(highest)), "{first} {second}");
        }
    }
}

/// Distinct writes of one key: puts, deletes, records that expire or have expired.
fn writes() -> impl Strategy<Value = Vec<Entry>> {
    let number = prop_oneof![select(edges()), 1..=i64::MAX, 1..=20_i64];
    let expiry = prop_oneof![
        Just(None),
        Just(Some(-1)),
        Just(Some(0)),
        Just(Some(5_000)),
        Just(Some(1 << 40))
    ];
    vec((number, any::<bool>(), expiry, vec(any::<u8>(), 0..40)), 1..10).prop_map(|writes| {
        let mut seen = BTreeSet::new();
        writes
            .into_iter()
            .filter(|(number, ..)| seen.insert(*number))
            .map(|(number, deleted, expires_in, value)| Entry {
                version: version(number),
                value: (!deleted).then(|| Bytes::from(value)),
                expires_at: expires_in.map(|millis: i64| Timestamp(NOW.0 + millis)),
            })
            .collect()
    })
}

#[test]
fn any_order_repetition_and_late_redelivery_leave_both_tiers_with_the_highest_version() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (server, cache) = runtime.block_on(async {
        let server = redis_server::start().await;
        let cache = Replica::of(&server).await;
        (server, cache)
    });
    let memory = Arc::new(Memory::new(&memory::Config::default()));
    let cases = AtomicI64::new(0);
    let deliveries = writes().prop_flat_map(|writes| {
        let all: Vec<usize> = (0..writes.len()).collect();
        // Some are lost at first; then all are delivered, in another order.
        let some = subsequence(all.clone(), 0..=writes.len()).prop_shuffle();
        (Just(writes), some, Just(all).prop_shuffle())
    });
    let mut runner = TestRunner::new(Cases {
        cases: 400,
        failure_persistence: None,
        ..Cases::default()
    });
    let outcome = runner.run(&deliveries, |(writes, first, second)| {
        let key = key(cases.fetch_add(1, Ordering::Relaxed));
        let highest = writes.iter().max_by_key(|entry| entry.version).cloned();
        runtime.block_on(async {
            let mut stands = None;
            for entry in first.iter().chain(&second).map(|index| &writes[*index]) {
                stands = stands.max(Some(entry.version));
                let answer = cache.write(&key, entry, NOW, LONG).await;
                prop_assert_eq!(answer, Ok(stands.map_or(Published::Nothing, Published::Stands)));
                let copy = Copy::new(Some(entry.clone()), NOW, LONG);
                memory.leave_token(&key).land_write(copy);
            }
            prop_assert_eq!(&standing(&cache, &key).await, &highest);
            prop_assert_eq!(memory.get(&key, NOW).and_then(|copy| copy.entry), highest);
            Ok(())
        })
    });
    drop((cache, server));
    outcome.expect("both tiers agree");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_land_at_the_same_time_leave_the_highest() {
    let server = redis_server::start().await;
    let mut replicas = JoinSet::new();
    for replica in 0..4 {
        let cache = Replica::of(&server).await;
        replicas.spawn(async move {
            for round in 0..500 {
                // Each replica delivers every fourth version, the later ones first.
                let number = 2_000 - round * 4 - replica;
                let published = cache.write(&key("k"), &put(number), NOW, LONG).await;
                assert!(
                    matches!(published, Ok(Published::Stands(stands)) if stands >= version(number)),
                    "{published:?}"
                );
            }
        });
    }
    while let Some(replica) = replicas.join_next().await {
        replica.expect("no replica fails");
    }
    let cache = Replica::of(&server).await;
    assert_eq!(standing(&cache, &key("k")).await, Some(put(2_000)));
}

#[tokio::test]
async fn a_copy_comes_back_with_its_times_and_the_same_version_sets_them_anew() {
    let server = redis_server::start().await;
    let cache = Replica::of(&server).await;
    let key = key("k");
    let entry = Entry {
        expires_at: Some(NOW.after(LONG * 2)),
        ..put(1)
    };
    let mut connection = server.connect().await;
    let mut kept = async || -> i64 {
        let kept = cmd("PTTL").arg(slot("k")).query_async(&mut connection).await;
        kept.expect("PTTL")
    };
    cache.write(&key, &entry, NOW, LONG).await.expect("lands");
    assert_eq!(
        cache.get(&key).await,
        Ok(Some(Copy::new(Some(entry.clone()), NOW, LONG)))
    );
    assert!((290_000..=300_000).contains(&kept().await));
    let later = NOW.after(MINUTE);
    cache.write(&key, &entry, later, MINUTE).await.expect("lands");
    assert_eq!(cache.get(&key).await, Ok(Some(Copy::new(Some(entry), later, MINUTE))));
    assert!((50_000..=60_000).contains(&kept().await));
    // A tombstone outlives its lifetime, and so refuses what is late; so does a record that will expire.
    let moment = Duration::from_secs(5);
    cache.write(&key, &tombstone(2), NOW, moment).await.expect("lands");
    assert!((50_000..=60_000).contains(&kept().await));
    let short = Entry {
        expires_at: Some(NOW.after(Duration::from_secs(30))),
        ..put(3)
    };
    cache.write(&key, &short, NOW, LONG).await.expect("lands");
    assert!((80_000..=90_000).contains(&kept().await));
}

#[tokio::test]
async fn large_empty_and_binary_values_come_back_as_they_went() {
    let server = redis_server::start().await;
    let cache = Replica::of(&server).await;
    for (number, value) in [(1, vec![]), (2, vec![0; 1 << 20]), (3, (0..=255).collect::<Vec<u8>>())] {
        let entry = Entry {
            value: Some(Bytes::from(value)),
            ..put(number)
        };
        cache.write(&key("k é\r\n"), &entry, NOW, LONG).await.expect("lands");
        assert_eq!(standing(&cache, &key("k é\r\n")).await, Some(entry));
    }
}

#[tokio::test]
async fn a_version_is_dropped_only_while_it_stands() {
    let server = redis_server::start().await;
    let cache = Replica::of(&server).await;
    let key = key("k");
    assert_eq!(cache.drop_version(&key, version(5)).await, Ok(false));
    cache.write(&key, &put(5), NOW, LONG).await.expect("lands");
    for other in [4, 6, 5 + (1 << 32)] {
        assert_eq!(cache.drop_version(&key, version(other)).await, Ok(false));
        assert_eq!(standing(&cache, &key).await, Some(put(5)));
    }
    assert_eq!(cache.drop_version(&key, version(5)).await, Ok(true));
    assert_eq!(standing(&cache, &key).await, None);
}

#[tokio::test]
async fn prefixes_and_namespaces_keep_keys_apart() {
    let server = redis_server::start().await;
    let cache = Replica::of(&server).await;
    let keys = [("a", "b:c"), ("a.b", "c"), ("b", "a:b:c")].map(|(n, k)| Key::new(n, k).expect("valid"));
    for (number, key) in iter::zip(1.., &keys) {
        cache.write(key, &put(number), NOW, LONG).await.expect("lands");
    }
    for (number, key) in iter::zip(1.., &keys) {
        assert_eq!(standing(&cache, key).await, Some(put(number)));
    }
    let other = Replica::start(&server.url(), "other:", CacheMetrics::default());
    other.up().await;
    assert_eq!(standing(&other, &keys[0]).await, None);
}

#[tokio::test]
async fn a_flushed_redis_is_empty_and_learns_the_script_again() {
    let server = redis_server::start().await;
    let metrics = CacheMetrics::default();
    let cache = Replica::counting(&server, metrics.clone()).await;
    let mut connection = server.connect().await;
    for number in [9, 5, 7] {
        cache.write(&key("k"), &put(number), NOW, LONG).await.expect("lands");
        assert_eq!(standing(&cache, &key("k")).await, Some(put(number)));
        let flush = redis::pipe()
            .cmd("FLUSHALL")
            .cmd("SCRIPT")
            .arg("FLUSH")
            .exec_async(&mut connection)
            .await;
        flush.expect("flushes");
        assert_eq!(standing(&cache, &key("k")).await, None);
        assert_eq!(cache.drop_version(&key("other"), version(number)).await, Ok(false));
    }
    assert_eq!(metrics.redis_errors.get(), 0);
}

#[tokio::test]
async fn an_error_about_one_key_is_a_miss_and_leaves_the_link_up() {
    let server = redis_server::start().await;
    let metrics = CacheMetrics::default();
    let cache = Replica::counting(&server, metrics.clone()).await;
    let mut connection = server.connect().await;
    let push = cmd("LPUSH")
        .arg(slot("list"))
        .arg("x")
        .exec_async(&mut connection)
        .await;
    push.expect("LPUSH");
    let wrong_type = RedisFailure::Refused {
        code: "WRONGTYPE".to_owned(),
    };
    // To a look among others what is no string is nothing.
    assert_eq!(cache.get(&key("list")).await, Ok(None));
    assert_eq!(cache.overwrite(&key("list"), &put(1)).await, Err(wrong_type.clone()));
    assert_eq!(cache.drop_version(&key("list"), version(1)).await, Err(wrong_type));
    assert_eq!(metrics.redis_errors.get(), 2);
    assert!(cache.is_up());
    assert_eq!(cache.write(&key("k"), &put(1), NOW, LONG).await, stands(1));
}

#[tokio::test]
async fn a_foreign_value_is_a_miss_and_makes_room() {
    let server = redis_server::start().await;
    let metrics = CacheMetrics::default();
    let cache = Replica::counting(&server, metrics.clone()).await;
    let mut connection = server.connect().await;
    let mut negative = vec![0xFF; 8];
    negative.push(0xD1);
    let foreign = [vec![], b"short".to_vec(), vec![b'z'; 100], vec![0xFF; 100], negative];
    for (count, value) in iter::zip(1.., foreign) {
        let set = cmd("SET").arg(slot("k")).arg(value).exec_async(&mut connection).await;
        set.expect("SET");
        assert_eq!(cache.get(&key("k")).await, Ok(None));
        assert_eq!(metrics.redis_errors.get(), count);
        assert_eq!(cache.write(&key("k"), &put(1), NOW, LONG).await, stands(1));
        assert_eq!(standing(&cache, &key("k")).await, Some(put(1)));
    }
    // Of another format: what it says of its version is not taken for granted.
    let newer = [&9_i64.to_be_bytes()[..], &[0xD3], &[0; 50]].concat();
    let set = cmd("SET").arg(slot("k")).arg(newer).exec_async(&mut connection).await;
    set.expect("SET");
    assert_eq!(cache.get(&key("k")).await, Ok(None));
    assert_eq!(cache.write(&key("k"), &put(8), NOW, LONG).await, stands(8));
}

#[tokio::test]
async fn a_redis_without_memory_or_in_a_replicas_role_refuses_and_still_drops_or_reads() {
    let server = redis_server::start().await;
    let cache = Replica::of(&server).await;
    let mut connection = server.connect().await;
    let refused = |code: &str| RedisFailure::Refused { code: code.to_owned() };
    cache.write(&key("k"), &put(1), NOW, LONG).await.expect("lands");
    let mut config = async |memory: &str| {
        let set = cmd("CONFIG")
            .arg("SET")
            .arg("maxmemory")
            .arg(memory)
            .exec_async(&mut connection)
            .await;
        set.expect("CONFIG SET");
    };
    config("1").await;
    assert_eq!(cache.enter(&key("k")).await, Err(refused("OOM")));
    assert_eq!(
        cache.claim(&key("other"), SlotToken::random()).await,
        Err(refused("OOM"))
    );
    assert_eq!(cache.overwrite(&key("k"), &put(2)).await, Ok(Published::Nothing));
    // What is older must not go on answering.
    assert_eq!(standing(&cache, &key("k")).await, None);
    assert_eq!(cache.drop_version(&key("k"), version(1)).await, Ok(false));
    config("0").await;
    cache.write(&key("k"), &put(3), NOW, LONG).await.expect("lands");
    let mut connection = server.connect().await;
    cmd("REPLICAOF")
        .arg("127.0.0.1")
        .arg(1)
        .exec_async(&mut connection)
        .await
        .expect("REPLICAOF");
    assert_eq!(cache.enter(&key("k")).await, Err(refused("READONLY")));
    assert_eq!(cache.overwrite(&key("k"), &put(4)).await, Err(refused("READONLY")));
    assert_eq!(standing(&cache, &key("k")).await, Some(put(3)));
    cmd("REPLICAOF")
        .arg("NO")
        .arg("ONE")
        .exec_async(&mut connection)
        .await
        .expect("REPLICAOF");
    assert_eq!(cache.write(&key("k"), &put(4), NOW, LONG).await, stands(4));
    assert!(cache.is_up());
}

/// What calls that failed met.
#[derive(Debug, Default)]
struct Failures {
    /// Calls that were sent and waited for in vain.
    waited: usize,
    /// Calls that failed at once.
    down: usize,
}

/// Calls, reads and writes in turn, until so many have failed. Those that succeed are counted.
async fn call_until_failed(cache: &Replica, failures: usize, succeeded: &AtomicUsize) -> Failures {
    let mut met = Failures::default();
    for call in 0.. {
        let failed = match call % 2 {
            0 => cache.get(&key("k")).await.err(),
            _ => cache.overwrite(&key("k"), &put(1)).await.err(),
        };
        match failed {
            Some(RedisFailure::Down) => met.down += 1,
            Some(RedisFailure::Lost | RedisFailure::TimedOut) => met.waited += 1,
            Some(other) => panic!("not a failure of the connection: {other}"),
            None => _ = succeeded.fetch_add(1, Ordering::Relaxed),
        }
        if met.waited + met.down == failures {
            break;
        }
    }
    met
}

/// Sixteen callers at once, while `fail` makes the server fail: each waits once at most.
async fn callers_wait_once_at_most(cache: &Arc<Replica>, fail: impl FnOnce()) {
    let succeeded = Arc::new(AtomicUsize::new(0));
    let mut callers = JoinSet::new();
    for _ in 0..16 {
        let (cache, succeeded) = (Arc::clone(cache), Arc::clone(&succeeded));
        callers.spawn(async move { call_until_failed(&cache, 200, &succeeded).await });
    }
    until("the traffic flows", async || succeeded.load(Ordering::Relaxed) >= 1_000).await;
    fail();
    while let Some(caller) = callers.join_next().await {
        let met = caller.expect("no caller fails");
        assert!(met.waited <= 1, "{met:?}");
    }
    assert!(!cache.is_up());
}

#[tokio::test]
async fn a_killed_redis_makes_no_caller_wait_twice_and_serves_again_after_its_restart() {
    let mut server = redis_server::start().await;
    let metrics = CacheMetrics::default();
    let cache = Arc::new(Replica::counting(&server, metrics.clone()).await);
    for round in 1..=3 {
        assert_eq!(metrics.redis_down.get(), 0);
        callers_wait_once_at_most(&cache, || server.kill()).await;
        assert_eq!(metrics.redis_down.get(), 1);
        server.start_again().await;
        cache.up().await;
        assert_eq!(cache.write(&key("k"), &put(round), NOW, LONG).await, stands(round));
        assert_eq!(standing(&cache, &key("k")).await, Some(put(round)));
    }
}

#[tokio::test]
async fn a_frozen_redis_makes_no_caller_wait_twice_and_serves_again_when_it_thaws() {
    let server = redis_server::start().await;
    let cache = Arc::new(Replica::of(&server).await);
    callers_wait_once_at_most(&cache, || server.freeze()).await;
    assert_eq!(cache.get(&key("k")).await, Err(RedisFailure::Down));
    server.thaw();
    cache.up().await;
    assert_eq!(cache.write(&key("k"), &put(2), NOW, LONG).await, stands(2));
}

#[tokio::test]
async fn a_redis_that_nobody_calls_is_known_to_be_gone() {
    let server = redis_server::start().await;
    let cache = Replica::of(&server).await;
    server.freeze();
    until("Redis is held to be down", async || !cache.is_up()).await;
}

#[tokio::test]
async fn a_redis_that_is_absent_at_the_start_is_found_when_it_comes() {
    let mut server = redis_server::start().await;
    server.kill();
    let cache = Replica::at(&server.url(), CacheMetrics::default());
    assert_eq!(call_until_failed(&cache, 10, &AtomicUsize::new(0)).await.waited, 0);
    server.start_again().await;
    cache.up().await;
    assert_eq!(cache.write(&key("k"), &put(1), NOW, LONG).await, stands(1));
}

#[tokio::test]
async fn what_accepts_and_never_answers_is_never_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("redis://{}", listener.local_addr().expect("bound"));
    let dials = Arc::new(AtomicUsize::new(0));
    let hole = tokio::spawn({
        let dials = Arc::clone(&dials);
        async move {
            let mut held = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                held.push(stream);
                dials.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let cache = Replica::at(&url, CacheMetrics::default());
    until("it is dialled again and again", async || {
        assert_eq!(call_until_failed(&cache, 100, &AtomicUsize::new(0)).await.waited, 0);
        dials.load(Ordering::Relaxed) >= 3
    })
    .await;
    assert!(!cache.is_up());
    hole.abort();
}

#[tokio::test]
async fn a_password_is_used_and_a_wrong_one_is_no_connection() {
    let server = redis_server::start().await;
    let mut connection = server.connect().await;
    let set = cmd("CONFIG")
        .arg("SET")
        .arg("requirepass")
        .arg("right")
        .exec_async(&mut connection)
        .await;
    set.expect("CONFIG SET");
    let with = |password: &str| {
        Replica::at(
            &server.url().replace("://", &format!("://:{password}@")),
            CacheMetrics::default(),
        )
    };
    let (right, wrong, none) = (
        with("right"),
        with("wrong"),
        Replica::at(&server.url(), CacheMetrics::default()),
    );
    right.up().await;
    until("both others were refused", async || {
        let info: String = cmd("INFO")
            .arg("errorstats")
            .query_async(&mut connection.clone())
            .await
            .expect("INFO");
        info.contains("errorstat_WRONGPASS") && info.contains("errorstat_NOAUTH")
    })
    .await;
    assert!(!wrong.is_up() && !none.is_up());
    assert_eq!(none.get(&key("k")).await, Err(RedisFailure::Down));
}

#[tokio::test]
async fn a_dropped_cache_leaves_no_connection_and_no_count_behind() {
    let server = redis_server::start().await;
    let metrics = CacheMetrics::default();
    let connections = async || -> usize {
        let mut connection = server.connect().await;
        let list: String = cmd("CLIENT")
            .arg("LIST")
            .query_async(&mut connection)
            .await
            .expect("CLIENT LIST");
        list.lines().count()
    };
    let cache = Replica::counting(&server, metrics.clone()).await;
    until("there is one beside the test's own", async || connections().await == 2).await;
    drop(cache);
    until("only the test's own is left", async || connections().await == 1).await;
    let absent = Replica::at("redis://127.0.0.1:1", metrics.clone());
    assert_eq!(metrics.redis_down.get(), 1);
    drop(absent);
    until("nothing is counted", async || metrics.redis_down.get() == 0).await;
}
