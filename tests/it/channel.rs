//! Following what other gateways write, against real Redis servers: whatever was missed is known to have been missed, and L1 answers only
//! while nothing was.

use std::{collections::HashMap, fs, sync::Arc, time::Duration};

use redis::{aio::MultiplexedConnection, cmd, pipe};
use tidegate::{
    cache::{
        epochs::{Adopted, Epochs},
        message::{Message, Origin},
        redis::{
            Config, RedisCache, RedisFailure, Server,
            channel::{Beats, Channel, Heard},
        },
    },
    model::{ChangeKind, Epoch, Key, Timestamp, Version},
    rpc::proto::{ReadConsistency, Source},
    telemetry::CacheMetrics,
};
use tokio::{
    task::JoinSet,
    time::{Instant, interval, sleep_until, timeout},
};

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup, client::seen, eventually, expect, proxy::Proxy, redis as redis_server, until,
};

const CHANGES: &str = "tidegate:changes";
const OURS: Origin = Origin(1);
const THEIRS: Origin = Origin(2);

/// How long after the loss of the channel L1 may answer at most, and then some for the machine.
const BOUND: Duration = Duration::from_millis(1_500);

/// A connection to publish beats, on whatever server answers.
struct Beater {
    cache: RedisCache,
    epochs: Arc<Epochs>,
}

impl Beater {
    async fn beat(&self, number: u64) -> Result<(), RedisFailure> {
        self.epochs.adopt(Adopted {
            epoch: Epoch(7),
            server: self.cache.server().map(|server| server.to_string()),
            readable_from: Timestamp(0),
            namespaces: HashMap::default(),
        });
        self.cache.beat(number).await
    }
}

/// A subscription, and what publishes its beats.
struct Subscriber {
    channel: Channel,
    beater: Beater,
    metrics: CacheMetrics,
}

impl Subscriber {
    /// On a server that need not run yet, without beats so far.
    fn start(server: &redis_server::Server) -> Subscriber {
        let config = Config {
            // Longer than the default: a busy machine must not look like a frozen Redis.
            timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(1),
            ..Config::default()
        };
        let url = Server::parse(&server.url()).expect("a valid URL");
        let (metrics, epochs) = (CacheMetrics::default(), Arc::new(Epochs::new(&config.prefix)));
        Subscriber {
            channel: Channel::start(&config, &url, OURS, metrics.clone()),
            beater: Beater {
                cache: RedisCache::start(&config, &url, Arc::clone(&epochs), OURS, CacheMetrics::default()),
                epochs,
            },
            metrics,
        }
    }

    async fn next(&mut self) -> Heard {
        self.next_that(|_| true).await
    }

    /// What is heard next besides beats.
    async fn next_but_beats(&mut self) -> Heard {
        self.next_that(|heard| !matches!(heard, Heard::Beat(_))).await
    }

    /// The next of a kind; what comes before it is let pass.
    async fn next_that(&mut self, wanted: impl Fn(&Heard) -> bool) -> Heard {
        let heard = async {
            loop {
                let heard = self.channel.next().await.expect("the keeper lives");
                if wanted(&heard) {
                    return heard;
                }
            }
        };
        timeout(SOON, heard).await.expect("something is heard")
    }
}

/// Publishes beats until it is dropped.
fn beating(beater: Beater, beats: Beats) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut ticks = interval(Duration::from_millis(50));
        loop {
            ticks.tick().await;
            // Redis may be away.
            let _ = beater.beat(beats.number()).await;
        }
    });
    tasks
}

/// A subscription that hears its beats.
async fn subscribed(server: &redis_server::Server) -> (Subscriber, JoinSet<()>) {
    let mut subscriber = Subscriber::start(server);
    let spare = Subscriber::start(server).beater;
    let beats = beating(
        std::mem::replace(&mut subscriber.beater, spare),
        subscriber.channel.beats(),
    );
    assert_eq!(subscriber.next().await, Heard::Subscribed);
    (subscriber, beats)
}

fn written(number: i64) -> Message {
    Message::Written {
        key: Key::new("orders", "key").expect("valid"),
        version: Version::new(number).expect("positive"),
        kind: ChangeKind::Put,
    }
}

async fn publish(connection: &mut MultiplexedConnection, channel: &str, payload: &[u8]) {
    let mut command = cmd("PUBLISH");
    command.arg(channel).arg(payload);
    command.exec_async(connection).await.unwrap();
}

#[tokio::test]
async fn what_others_say_is_heard_in_order_and_before_any_later_beat() {
    const MESSAGES: i64 = 3_000;
    let server = redis_server::start().await;
    let mut subscriber = Subscriber::start(&server);
    assert_eq!(subscriber.next().await, Heard::Subscribed);
    until("Redis is held to be up", async || subscriber.beater.cache.is_up()).await;
    let beats = subscriber.channel.beats();
    let mut connection = server.connect().await;
    let beater = &subscriber.beater;
    let publishing = async {
        let mut told_at = Vec::new();
        for number in 1..=MESSAGES {
            publish(&mut connection, CHANGES, &written(number).told(OURS)).await;
            publish(&mut connection, CHANGES, &written(number).told(THEIRS)).await;
            told_at.push(Instant::now());
            if number % 3 == 0 {
                beater.beat(beats.number()).await.expect("Redis answers");
            }
        }
        told_at
    };
    let channel = &mut subscriber.channel;
    let hearing = async {
        let (mut heard, mut beats) = (0, Vec::new());
        while beats.len() < MESSAGES as usize / 3 {
            match channel.next().await.expect("the keeper lives") {
                Heard::Message(message) => {
                    heard += 1;
                    assert_eq!(message, written(heard), "in order, each once, and none of our own");
                }
                Heard::Beat(sent_at) => beats.push((sent_at, heard)),
                other => panic!("heard {other:?}"),
            }
        }
        beats
    };
    let (told_at, beats) = timeout(SOON, async { tokio::join!(publishing, hearing) })
        .await
        .expect("all is heard");
    assert!(beats.is_sorted_by_key(|(sent_at, _)| *sent_at));
    for (sent_at, heard) in beats {
        let told = told_at.iter().filter(|told_at| **told_at < sent_at).count();
        assert!(heard as usize >= told, "{heard} heard, {told} told before the beat");
    }
    assert_eq!(subscriber.metrics.messages_heard.get(), MESSAGES as u64);
    assert_eq!(subscriber.metrics.channel_up.get(), 1);
}

#[tokio::test]
async fn a_broken_connection_is_a_loss_and_is_made_anew() {
    let mut server = redis_server::start().await;
    server.kill();
    let mut subscriber = Subscriber::start(&server);
    server.start_again().await;
    assert_eq!(subscriber.next().await, Heard::Subscribed, "it was away at first");
    drop(subscriber);

    let (mut subscriber, _beats) = subscribed(&server).await;
    let killing = server.connect().await;
    let breaks: [(&str, _); 2] = [("killed by name", true), ("killed with the server", false)];
    for (number, (how, by_name)) in breaks.into_iter().enumerate() {
        if by_name {
            let mut kill = cmd("CLIENT");
            kill.arg(&["KILL", "TYPE", "pubsub"]);
            kill.exec_async(&mut killing.clone()).await.unwrap();
        } else {
            server.kill();
        }
        assert_eq!(subscriber.next_but_beats().await, Heard::Lost, "{how}");
        if !by_name {
            server.start_again().await;
        }
        assert_eq!(subscriber.next_but_beats().await, Heard::Subscribed, "{how}");
        let message = written(1 + number as i64);
        publish(&mut server.connect().await, CHANGES, &message.told(THEIRS)).await;
        assert_eq!(subscriber.next_but_beats().await, Heard::Message(message), "{how}");
        assert_eq!(subscriber.metrics.channel_losses.get(), 1 + number as u64);
    }
}

#[tokio::test]
async fn a_silent_connection_is_a_loss() {
    let server = redis_server::start().await;
    let (mut subscriber, _beats) = subscribed(&server).await;
    assert!(matches!(subscriber.next().await, Heard::Beat(_)));
    let frozen_at = Instant::now();
    server.freeze();
    assert_eq!(subscriber.next_but_beats().await, Heard::Lost);
    assert!(frozen_at.elapsed() > Duration::from_secs(2), "it is not hasty");
    server.thaw();
    assert_eq!(subscriber.next_but_beats().await, Heard::Subscribed);
}

#[tokio::test]
async fn what_is_not_ours_to_read_is_a_loss() {
    let server = redis_server::start().await;
    let (mut subscriber, _beats) = subscribed(&server).await;
    let mut connection = server.connect().await;
    let newer = {
        let mut bytes = written(1).told(THEIRS);
        bytes[8] = 99;
        bytes
    };
    let own_beats = format!("tidegate:beat:{OURS}");
    let payloads: [(&str, &[u8]); 4] = [
        (CHANGES, b"hello"),
        (CHANGES, &newer),
        (&own_beats, b"18446744073709551615"),
        (&own_beats, b"x"),
    ];
    for (number, (channel, payload)) in payloads.into_iter().enumerate() {
        publish(&mut connection, channel, payload).await;
        assert_eq!(subscriber.next_but_beats().await, Heard::Lost);
        assert_eq!(subscriber.metrics.messages_foreign.get(), 1 + number as u64);
        assert_eq!(subscriber.next_but_beats().await, Heard::Subscribed);
    }
}

#[tokio::test]
async fn whoever_hears_too_slowly_is_told_that_it_missed_something() {
    /// How many messages may wait.
    const BUFFERED: usize = 16_384;
    let server = redis_server::start().await;
    let (mut subscriber, _beats) = subscribed(&server).await;
    let mut connection = server.connect().await;
    let message = written(1).told(THEIRS);
    for _ in 0..20 {
        let mut batch = pipe();
        for _ in 0..1_000 {
            batch.cmd("PUBLISH").arg(CHANGES).arg(&message).ignore();
        }
        batch.exec_async(&mut connection).await.unwrap();
    }
    until("the subscription is lost", async || {
        subscriber.metrics.channel_losses.get() > 0
    })
    .await;
    let mut heard = 0;
    while subscriber.next().await != Heard::Lost {
        heard += 1;
    }
    assert_eq!(heard, BUFFERED, "what waited is not lost");
    assert_eq!(subscriber.next_but_beats().await, Heard::Subscribed);
    publish(&mut connection, CHANGES, &written(2).told(THEIRS)).await;
    subscriber.next_that(|heard| *heard == Heard::Message(written(2))).await;
}

/// A gateway whose L1 holds `key`.
async fn gateway_with_copy(setup: Setup) -> Gateway {
    let gateway = setup.start().await;
    gateway.client.put("key", b"one", Mode::Through).await.unwrap();
    let read = gateway.client.read("key").await;
    assert_eq!(seen(&read), (Some(&b"one"[..]), Source::L1));
    gateway
}

/// Reads without a pause from `since` on: after the bound, L1 answers nothing, and the value is what others wrote.
async fn assert_not_from_l1_after_the_bound(gateway: &Gateway, since: Instant, value: &[u8]) {
    let mut judged = 0;
    while judged < 20 {
        let began = Instant::now();
        let read = gateway.client.read("key").await;
        if began - since > BOUND {
            let (found, source) = seen(&read);
            assert_eq!(found, Some(value), "from {source:?}, {:?} after", began - since);
            assert_ne!(source, Source::L1);
            judged += 1;
        }
    }
}

async fn await_l1(gateway: &Gateway, value: &[u8]) {
    eventually("L1 answers again", SOON, async || {
        let read = gateway.client.read("key").await;
        expect(seen(&read) == (Some(value), Source::L1), read)
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_is_cut_off_from_redis_reads_what_others_wrote() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let setup = Setup::new().store(database.url());
    let other = setup.clone().redis(&server.url()).start().await;
    let network = Proxy::start(server.url().trim_start_matches("redis://")).await;
    let url = format!("redis://{}", network.address());
    let gateway = gateway_with_copy(setup.redis(&url)).await;
    network.cut();
    let cut_at = Instant::now();
    other.client.put("key", b"two", Mode::Through).await.unwrap();
    assert_not_from_l1_after_the_bound(&gateway, cut_at, b"two").await;
    gateway.await_readiness("invalidation: down").await;
    assert_eq!(gateway.page("/readyz").await.status, 200, "it serves");
    network.restore();
    gateway.await_readiness("invalidation: up").await;
    await_l1(&gateway, b"two").await;
}

#[tokio::test]
async fn a_gateway_whose_redis_says_nothing_reads_what_others_wrote() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let gateway = gateway_with_copy(Setup::new().store(database.url()).redis(&server.url())).await;
    server.freeze();
    let frozen_at = Instant::now();
    database.write_past("orders", "key", b"two").await;
    assert_not_from_l1_after_the_bound(&gateway, frozen_at, b"two").await;
    server.thaw();
    gateway.await_readiness("invalidation: up").await;
}

#[tokio::test]
async fn a_gateway_that_was_paused_does_not_answer_from_what_it_knew_before() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let setup = Setup::new().store(database.url()).redis(&server.url());
    let other = setup.clone().start().await;
    let mut gateway = gateway_with_copy(setup).await;
    gateway.pause();
    let stat = format!("/proc/{}/stat", gateway.pid());
    until("it is paused", async || {
        fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T "))
    })
    .await;
    let paused_at = Instant::now();
    let version = other.client.put("key", b"two", Mode::Through).await.unwrap().version;
    publish(&mut server.connect().await, CHANGES, &written(version).told(THEIRS)).await;
    // On its way before the gateway goes on, so that it does not wait for anything but the gateway.
    let client = gateway.client.clone();
    let reading = tokio::spawn(async move { client.read("key").await });
    sleep_until(paused_at + Duration::from_millis(1_100)).await;
    gateway.go_on();
    let read = reading.await.unwrap();
    let entry = read.entry.clone().expect("there is a record");
    assert!(entry.version >= version && read.source() != Source::L1, "{read:?}");
    await_l1(&gateway, b"two").await;
}

#[tokio::test]
async fn a_gateway_heeds_what_others_say() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let gateway = gateway_with_copy(Setup::new().store(database.url()).redis(&server.url())).await;
    let mut connection = server.connect().await;
    let key = || Key::new("orders", "key").expect("valid");
    let stands = gateway.client.read("key").await.entry.expect("it was put").version;
    let version = |number| Version::new(number).expect("positive");
    let prefix = |prefix: &str| Message::InvalidatedPrefix {
        namespace: "orders".to_owned(),
        prefix: prefix.to_owned(),
    };
    let written = |number| Message::Written {
        key: key(),
        version: version(number),
        kind: ChangeKind::Put,
    };
    let dropped = |number| Message::Dropped {
        key: key(),
        version: version(number),
    };
    for (message, goes) in [
        (written(stands - 1), false),
        (written(stands), false),
        (written(stands + 1), true),
        (dropped(stands - 1), false),
        (dropped(stands), true),
        (Message::Invalidated { key: key() }, true),
        (prefix("k"), true),
        (prefix("other"), false),
        (prefix(""), true),
        (Message::EpochMoved, false),
    ] {
        await_l1(&gateway, b"one").await;
        let heeded = async || gateway.metric("tidegate_invalidation_messages_heeded_total", &[]).await;
        let before = heeded().await;
        publish(&mut connection, CHANGES, &message.told(THEIRS)).await;
        until("the message is heeded", async || heeded().await > before).await;
        let read = gateway.client.get("key", ReadConsistency::Cached).await.unwrap();
        assert_eq!(read.source() != Source::L1, goes, "{message:?}: {read:?}");
    }
}

#[tokio::test]
async fn a_foreign_message_costs_the_copies_and_no_more() {
    let (database, server) = (Database::postgres().await, redis_server::start().await);
    let gateway = gateway_with_copy(Setup::new().store(database.url()).redis(&server.url())).await;
    publish(&mut server.connect().await, CHANGES, b"hello").await;
    eventually("the copies are gone", SOON, async || {
        let losses = gateway.metric("tidegate_invalidation_channel_losses_total", &[]).await;
        let copies = gateway.metric("tidegate_memory_cache_entries", &[]).await;
        expect(losses == 1.0 && copies == 0.0, (losses, copies))
    })
    .await;
    await_l1(&gateway, b"one").await;
    assert_eq!(gateway.metric("tidegate_invalidation_channel_up", &[]).await, 1.0);
    assert_eq!(
        gateway
            .metric("tidegate_invalidation_messages_foreign_total", &[])
            .await,
        1.0
    );
}
