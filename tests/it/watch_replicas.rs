//! Proves what a watch promises across two gateways on one Redis and one PostgreSQL: watchers that come and go with their tokens miss none of 10,000
//! changes and hear each writer in its order; a restart of Redis sends them to look anew; and who keeps a copy by the rules ends with what is stored.

use std::{
    collections::{BTreeMap, HashMap},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use rand::RngExt as _;
use tidegate::rpc::proto::{
    ChangeKind, InvalidateRequest, ReadConsistency, RescanReason, WatchRequest, WatchScope, watch_response::Event,
};
use tokio::task::JoinSet;

use crate::harness::{
    Client, Database, Gateway, Mode, SOON, Setup, eventually, expect, redis,
    watch::{Watch, said},
};

struct Pair {
    database: Database,
    redis: redis::Server,
    gateways: [Gateway; 2],
}

async fn pair(config: &str) -> Pair {
    let (database, redis) = tokio::join!(Database::postgres(), redis::start());
    // A busy machine is no outage of Redis, and no failure of a write.
    let setup = Setup::new().store(database.url()).redis(&redis.url());
    let setup = setup
        .config("[redis]\ntimeout = \"5s\"\n[rpc]\ndeadline_default = \"60s\"")
        .config(config);
    let gateways = [setup.clone().start().await, setup.start().await];
    Pair {
        database,
        redis,
        gateways,
    }
}

/// What one writer was answered: keys and versions, in its order.
type Written = Vec<(String, i64)>;

/// Writes so many times, one after the other, to keys that nobody else writes.
async fn write(client: Client, writer: usize, count: usize) -> Written {
    let mut written = Vec::new();
    for round in 0..count {
        let key = format!("w{writer}/{}", round * 7 % 50);
        let mode = [Mode::Through, Mode::Behind, Mode::Behind][round % 3];
        let version = if round % 10 == 9 {
            client.delete(&key, mode).await.unwrap().version
        } else {
            client
                .put(&key, format!("{round}").as_bytes(), mode)
                .await
                .unwrap()
                .version
        };
        written.push((key, version));
    }
    written
}

/// What somebody has who watches, takes some messages, leaves, and comes back with the token of the last.
struct Wanderer {
    client: Client,
    token: String,
    /// When each change was first told, by its key and version.
    first: HashMap<(String, i64), usize>,
    told: usize,
    comings: usize,
}

impl Wanderer {
    fn new(client: Client) -> Wanderer {
        Wanderer {
            client,
            token: String::new(),
            first: HashMap::new(),
            told: 0,
            comings: 0,
        }
    }

    /// Comes, for so many messages.
    async fn stay(&mut self, messages: usize) {
        let request = WatchRequest {
            resume_token: self.token.clone(),
            ..self.client.watch_request("w")
        };
        let mut watch = self.client.send_watch(request).await.expect("it may be watched");
        match watch.next().await {
            Ok(Event::Started(started)) => assert_eq!(started.resumed, !self.token.is_empty(), "{started:?}"),
            event => panic!("{event:?}"),
        }
        self.comings += 1;
        for _ in 0..messages {
            self.token.clone_from(&watch.token);
            match watch.next().await.expect("the watch goes on") {
                Event::Change(change) => {
                    self.told += 1;
                    let (key, version, kind) = said(&change);
                    // A write behind that lost to a later one through, on its way to the store.
                    if kind != ChangeKind::Invalidate {
                        self.first.entry((key.to_owned(), version)).or_insert(self.told);
                    }
                }
                Event::Progress(_) => break,
                event => panic!("{event:?}"),
            }
        }
        self.token.clone_from(&watch.token);
    }
}

const GATEWAY_WRITERS: usize = 5;
const WRITES_EACH: usize = 1_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_ten_thousand_changes_none_is_missed_by_watchers_that_come_and_go() {
    let pair = pair("[watch]\nprogress_interval = \"1s\"").await;
    let mut wanderers: Vec<Wanderer> = Vec::new();
    for gateway in &pair.gateways {
        for _ in 0..2 {
            let mut wanderer = Wanderer::new(gateway.client.clone());
            wanderer.stay(0).await;
            wanderers.push(wanderer);
        }
    }
    let mut writers = JoinSet::new();
    for writer in 0..2 * GATEWAY_WRITERS {
        let client = pair.gateways[writer % 2].client.clone();
        writers.spawn(write(client, writer, WRITES_EACH));
    }
    let (written, left) = (AtomicBool::new(false), AtomicUsize::new(wanderers.len()));
    let wander = async |mut wanderer: Wanderer| {
        loop {
            let (before, is_over) = (wanderer.told, written.load(Ordering::Relaxed));
            let messages = rand::rng().random_range(1..700);
            wanderer.stay(messages).await;
            // All had been answered, and nothing came for a while.
            if is_over && wanderer.told == before {
                left.fetch_sub(1, Ordering::Relaxed);
                return wanderer;
            }
        }
    };
    let writing = async {
        let written_by = writers.join_all().await;
        written.store(true, Ordering::Relaxed);
        written_by
    };
    let wandering = futures_util::future::join_all(wanderers.into_iter().map(wander));
    let (written_by, wanderers) = tokio::join!(writing, wandering);
    assert_eq!(written_by.iter().map(Vec::len).sum::<usize>(), 10_000);
    for (index, wanderer) in wanderers.iter().enumerate() {
        assert!(wanderer.comings > 10, "{index} stayed: {}", wanderer.comings);
        for written in &written_by {
            let told = written.iter().map(|change| wanderer.first.get(change));
            let told: Vec<usize> = told
                .zip(written)
                .map(|(at, change)| *at.unwrap_or_else(|| panic!("{index} was not told of {change:?}")))
                .collect();
            assert!(told.is_sorted(), "{index} was told in another order than was written");
        }
    }
}

/// A copy of what begins with a prefix, kept by the rules: scanned at first and whenever that is said, and changed by what is newer.
struct Keeper {
    client: Client,
    watch: Watch,
    /// Values; of a deletion none. By key, with the version.
    copy: BTreeMap<String, (i64, Option<Vec<u8>>)>,
    rescans: Vec<(RescanReason, WatchScope)>,
}

impl Keeper {
    async fn new(client: Client) -> Keeper {
        let (watch, scope) = client.watch("w").await;
        assert_eq!(scope, WatchScope::AllGateways);
        let mut keeper = Keeper {
            client,
            watch,
            copy: BTreeMap::new(),
            rescans: Vec::new(),
        };
        keeper.scan().await;
        keeper
    }

    async fn scan(&mut self) {
        let pages = self.client.scan_pages(self.client.scan_request("w")).await;
        let records = pages.into_iter().flatten().map(|record| {
            let entry = record.entry.expect("a record has one");
            (record.key, (entry.version, Some(entry.value.to_vec())))
        });
        self.copy = records.collect();
    }

    /// Takes what is told, until the copy is as wanted.
    async fn keep_until(&mut self, what: &str, wanted: impl Fn(&Keeper) -> bool) {
        let end = tokio::time::Instant::now() + 2 * SOON;
        while !wanted(self) {
            assert!(
                tokio::time::Instant::now() < end,
                "{what}: {:?} {:?}",
                self.rescans,
                self.copy
            );
            match self.watch.next().await.expect("the watch goes on") {
                Event::Change(change) => self.take(said(&change)).await,
                Event::Rescan(rescan) => {
                    self.rescans.push((rescan.reason(), rescan.scope()));
                    self.scan().await;
                }
                Event::Progress(_) => {}
                Event::Started(started) => panic!("{started:?}"),
            }
        }
    }

    /// Reads a key that has changed, unless more is known of it.
    async fn take(&mut self, (key, version, kind): (&str, i64, ChangeKind)) {
        let known = self.copy.get(key).map_or(0, |(known, _)| *known);
        if kind == ChangeKind::Invalidate {
            if version == 0 || known <= version {
                let read = self.client.get(key, ReadConsistency::Cached).await;
                self.copy.remove(key);
                if let Some(entry) = read.expect("a tier answers").entry {
                    let found = (entry.version, Some(entry.value.to_vec()));
                    self.copy.insert(key.to_owned(), found);
                }
            }
            return;
        }
        if known >= version {
            return;
        }
        let read = self.client.get_at_least(key, ReadConsistency::Cached, version).await;
        let entry = read.expect("a tier answers").entry;
        let known = entry.map_or((version, None), |entry| (entry.version, Some(entry.value.to_vec())));
        self.copy.insert(key.to_owned(), known);
    }

    fn live(&self) -> BTreeMap<&str, &[u8]> {
        let live = self.copy.iter();
        live.filter_map(|(key, (_, value))| Some((key.as_str(), value.as_deref()?)))
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_redis_sends_watchers_to_look_anew_and_their_copies_end_as_the_store() {
    let mut pair = pair("[watch]\nprogress_interval = \"1s\"").await;
    let clients = [0, 1].map(|gateway: usize| pair.gateways[gateway].client.clone());
    let mut keepers = [
        Keeper::new(clients[0].clone()).await,
        Keeper::new(clients[1].clone()).await,
    ];
    let write_some = async |writers: std::ops::Range<usize>| {
        let mut writing = JoinSet::new();
        for writer in writers {
            writing.spawn(write(clients[writer % 2].clone(), writer, 100));
        }
        writing.join_all().await;
    };
    write_some(0..4).await;
    let busy = async {
        write_some(4..8).await;
        write_some(8..12).await;
    };
    let restart = async {
        pair.redis.stop().await;
        pair.redis.start_again().await;
    };
    tokio::join!(busy, restart);
    for keeper in &mut keepers {
        keeper
            .keep_until("told that Redis is lost, and back", |keeper| {
                let lost = keeper
                    .rescans
                    .contains(&(RescanReason::RedisLost, WatchScope::ThisGateway));
                let last = keeper.rescans.last();
                lost && last.is_some_and(|(_, scope)| *scope == WatchScope::AllGateways)
            })
            .await;
        let back = (RescanReason::RedisBack, WatchScope::AllGateways);
        assert!(keeper.rescans.contains(&back), "{:?}", keeper.rescans);
    }
    write_some(12..14).await;
    for gateway in &pair.gateways {
        gateway.drained().await;
    }
    let mut stored = Keeper::new(clients[0].clone()).await;
    stored.scan().await;
    let stored = stored.live();
    assert!(stored.len() > 400, "{}", stored.len());
    for keeper in &mut keepers {
        keeper
            .keep_until("the copy is as the store", |keeper| keeper.live() == stored)
            .await;
    }
}

#[tokio::test]
async fn what_is_pending_on_another_gateway_is_told_to_who_begins_to_watch() {
    let pair = pair("[namespaces.orders]\nwrite_delay = \"1h\"").await;
    let [writer, reader] = [0, 1].map(|gateway: usize| &pair.gateways[gateway].client);
    // More than are told in one message.
    let mut pending = BTreeMap::new();
    for number in 0..600 {
        let key = format!("w{number}");
        let version = if number % 3 == 0 {
            writer.delete(&key, Mode::Behind).await.unwrap().version
        } else {
            writer.put(&key, b"v", Mode::Behind).await.unwrap().version
        };
        pending.insert(key, version);
    }
    writer.put("another", b"v", Mode::Behind).await.unwrap();
    for _ in 0..2 {
        let (mut watch, scope) = reader.watch("w").await;
        assert_eq!(scope, WatchScope::AllGateways);
        let pages = reader.scan_pages(reader.scan_request("w")).await;
        assert_eq!(pages.concat(), [], "a scan does not find it");
        let mut told = BTreeMap::new();
        while told.len() < pending.len() {
            let change = watch.change().await;
            let (key, version, kind) = said(&change);
            let is_deleted = key[1..].parse::<i32>().expect("one of ours") % 3 == 0;
            assert_eq!(kind == ChangeKind::Delete, is_deleted);
            told.insert(key.to_owned(), version);
        }
        assert_eq!(told, pending);
    }
}

#[tokio::test]
async fn of_much_that_is_pending_on_another_gateway_each_write_is_told_when_it_drains() {
    let pair = pair("[namespaces.orders]\nwrite_delay = \"1h\"\n[watch]\nlog_entries_max = 400").await;
    let [writer, reader] = [0, 1].map(|gateway: usize| &pair.gateways[gateway].client);
    let mut pending = BTreeMap::new();
    for number in 0..200 {
        let key = format!("w{number}");
        let version = writer.put(&key, b"v", Mode::Behind).await.unwrap().version;
        pending.insert(key, version);
    }
    let (mut watch, _) = reader.watch("w").await;
    let pages = reader.scan_pages(reader.scan_request("w")).await;
    assert_eq!(pages.concat(), [], "a scan does not find it");
    writer.await_all_persisted().await.expect("the store takes it");
    let mut told = BTreeMap::new();
    while told.len() < pending.len() {
        let change = watch.change().await;
        told.insert(change.key, change.version);
    }
    assert_eq!(told, pending);
}

#[tokio::test]
async fn what_the_store_does_not_take_leaves_the_copies_of_watchers() {
    let pair = pair("[namespaces.orders]\nwrite_delay = \"1h\"").await;
    pair.database
        .execute("alter table tidegate_entries add constraint no_poison check (value is distinct from 'poison'::bytea)")
        .await;
    let [writer, reader] = [0, 1].map(|gateway: usize| &pair.gateways[gateway].client);
    writer.put("w", b"good", Mode::Through).await.unwrap();
    let mut keeper = Keeper::new(reader.clone()).await;
    let poison = writer.put("w", b"poison", Mode::Behind).await.unwrap().version;
    let holds = |value: &'static [u8]| move |keeper: &Keeper| keeper.live().get("w") == Some(&value);
    keeper.keep_until("what is pending is told", holds(b"poison")).await;
    let refused = writer.await_persisted("w", poison).await;
    refused.expect_err("the store does not take it");
    keeper
        .keep_until("what it is not any more is told", holds(b"good"))
        .await;
}

#[tokio::test]
async fn what_is_invalidated_through_one_is_told_through_the_other() {
    let pair = pair("").await;
    let [here, there] = &pair.gateways;
    let (mut watch, _) = there.client.watch("w").await;
    let invalidate = async |target: InvalidateRequest| {
        let request = InvalidateRequest {
            namespace: "orders".to_owned(),
            ..target
        };
        here.admin().await.invalidate(request).await.expect("it is invalidated");
    };
    let keys = |name: &str| InvalidateRequest {
        keys: vec![name.to_owned()],
        ..InvalidateRequest::default()
    };
    let prefix = |prefix: &str| InvalidateRequest {
        prefix: prefix.to_owned(),
        ..InvalidateRequest::default()
    };
    invalidate(keys("another")).await;
    invalidate(keys("w1")).await;
    assert_eq!(said(&watch.change().await), ("w1", 0, ChangeKind::Invalidate));
    let rescan = (RescanReason::Invalidated, WatchScope::AllGateways);
    invalidate(prefix("another")).await;
    invalidate(prefix("w1")).await;
    assert_eq!(watch.rescan().await, rescan);
    invalidate(InvalidateRequest {
        whole_namespace: true,
        ..InvalidateRequest::default()
    })
    .await;
    assert_eq!(watch.rescan().await, rescan);
    let version = here.client.put("w1", b"v", Mode::Through).await.unwrap().version;
    assert_eq!(said(&watch.change().await), ("w1", version, ChangeKind::Put));
}

#[tokio::test]
async fn a_moved_epoch_sends_watchers_to_look_anew() {
    let pair = pair("").await;
    let [here, there] = &pair.gateways;
    let (mut watch, _) = there.client.watch("").await;
    let moved = "update tidegate_control set epoch = epoch + 1, moved_at = clock_timestamp()";
    pair.database.execute(moved).await;
    let rescan = (RescanReason::EpochMoved, WatchScope::AllGateways);
    assert_eq!(watch.rescan().await, rescan);
    let version = here.client.put("w1", b"v", Mode::Behind).await.unwrap().version;
    eventually("the write is told", SOON, async || {
        let change = watch.change().await;
        expect(said(&change) == ("w1", version, ChangeKind::Put), change)
    })
    .await;
}
