//! The slot of a key in Redis: who may land there, what stands, and what the other replicas are told.
//!
//! [`model`] holds it against a model of it; here is what the model leaves out (a full Redis, another server, prefixes, crowds), and in so many
//! words what matters most.

mod model;

use std::{
    future::poll_fn,
    iter,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_core::Stream;
use futures_util::future::join_all;
use redis::{aio::MultiplexedConnection, cmd};
use tidegate::{
    cache::{
        Copy,
        message::{Message, Origin},
        redis::{Hold, Published, RedisFailure, SlotToken},
    },
    model::{ChangeKind, Entry, Epoch, Key, VERSION_EPOCH_MILLIS, Version},
};
use tokio::{task::JoinSet, time::timeout};

use crate::{
    cache_redis::{LONG, NOW, Replica, key, put, slot, standing, version},
    harness::{SOON, redis as redis_server, until},
};

/// Two replicas on one Redis, and somebody who meddles and hears all that is told.
struct Bench {
    replicas: [Replica; 2],
    connection: MultiplexedConnection,
    heard: redis::aio::PubSubStream,
    server: redis_server::Server,
}

/// A slot's bytes, as far as they are not the copy's.
#[derive(Debug, Default, PartialEq, Eq)]
struct Raw {
    /// Nothing at all, or a token, or eight zeros.
    token: Option<[u8; 8]>,
    /// For how long Redis keeps it.
    kept: Duration,
}

impl Bench {
    async fn start() -> Bench {
        let server = redis_server::start().await;
        let client = redis::Client::open(server.url()).expect("a valid URL");
        let mut listening = client.get_async_pubsub().await.expect("Redis can be reached");
        listening.subscribe("tidegate:changes").await.expect("SUBSCRIBE");
        Bench {
            replicas: [Replica::of(&server).await, Replica::of(&server).await],
            connection: server.connect().await,
            heard: listening.into_on_message(),
            server,
        }
    }

    async fn run(&mut self, command: &mut redis::Cmd) {
        command.exec_async(&mut self.connection).await.expect("Redis does it");
    }

    async fn raw(&mut self, name: &str) -> Raw {
        let place = slot(name);
        let (head, kept): (Vec<u8>, i64) = redis::pipe()
            .cmd("GETRANGE")
            .arg(&place)
            .arg(34)
            .arg(41)
            .cmd("PTTL")
            .arg(&place)
            .query_async(&mut self.connection)
            .await
            .expect("Redis answers");
        Raw {
            token: head.try_into().ok(),
            kept: Duration::from_millis(kept.try_into().unwrap_or(0)),
        }
    }

    /// All that was told since the last call.
    async fn heard(&mut self) -> Vec<(Origin, Message)> {
        const MARK: &[u8] = b"mark";
        self.run(cmd("PUBLISH").arg("tidegate:changes").arg(MARK)).await;
        let mut heard = Vec::new();
        loop {
            let next = poll_fn(|context| Pin::new(&mut self.heard).poll_next(context));
            let next = timeout(SOON, next).await.expect("in time").expect("subscribed");
            if next.get_payload_bytes() == MARK {
                return heard;
            }
            let (origin, messages) = Message::decode(next.get_payload_bytes()).expect("messages of ours");
            heard.extend(messages.into_iter().map(|message| (origin, message)));
        }
    }
}

/// Offers what a load found.
async fn load(replica: &Replica, name: &str, token: SlotToken, found: Option<Entry>) -> Result<bool, RedisFailure> {
    let copy = Copy::new(found, NOW, LONG);
    replica.land_load(&key(name), token, &copy, Duration::ZERO).await
}

/// What is told of a version of a key.
fn told(key: &Key, version: Version, kind: ChangeKind) -> Message {
    Message::Written {
        key: key.clone(),
        version,
        kind,
    }
}

/// What is told of a write.
fn written(key: &Key, entry: &Entry) -> Message {
    told(key, entry.version, ChangeKind::of(entry))
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(now.as_millis()).expect("not so far in the future")
}

#[tokio::test]
async fn of_many_who_ask_for_the_load_one_gets_it() {
    let server = redis_server::start().await;
    let mut asking = JoinSet::new();
    let replicas = [Replica::of(&server).await, Replica::of(&server).await].map(Arc::new);
    for asker in 0..64 {
        let replica = Arc::clone(&replicas[asker % 2]);
        asking.spawn(async move {
            replica
                .claim(&key("k"), SlotToken::random())
                .await
                .expect("Redis answers")
        });
    }
    let claimed = asking.join_all().await;
    let tokens: Vec<SlotToken> = claimed.iter().filter_map(|claimed| claimed.token).collect();
    assert_eq!(tokens.len(), 1);
    // Given back, it is to be had again.
    replicas[0].release(&key("k"), tokens[0]).await.expect("Redis answers");
    let again = replicas[1]
        .claim(&key("k"), SlotToken::random())
        .await
        .expect("Redis answers")
        .token;
    assert!(again.is_some_and(|again| again != tokens[0]));
}

#[tokio::test]
async fn where_redis_was_emptied_between_a_claim_and_its_fill_nothing_lands() {
    let mut bench = Bench::start().await;
    for empty in ["FLUSHALL", "DEL", "UNLINK"] {
        let token = bench.replicas[0]
            .claim(&key("k"), SlotToken::random())
            .await
            .expect("Redis answers")
            .token;
        let token = token.expect("nobody else has it");
        let mut command = cmd(empty);
        if empty != "FLUSHALL" {
            command.arg(slot("k"));
        }
        bench.run(&mut command).await;
        let landed = load(&bench.replicas[0], "k", token, Some(put(1))).await;
        assert_eq!(landed, Ok(false), "after {empty}");
        assert_eq!(bench.raw("k").await.token, None, "after {empty}");
    }
}

#[tokio::test]
async fn a_write_behind_write_that_comes_too_late_enters_no_empty_slot_and_nobody_is_told() {
    let mut bench = Bench::start().await;
    let stamped = |ago: i64| version(((now() - ago - VERSION_EPOCH_MILLIS) << 21) + 1);
    let (old, new) = (put(stamped(10_500).get()), put(stamped(0).get()));
    let fresh = async |bench: &Bench, entry: &Entry| {
        let published = bench.replicas[0]
            .publish_entry(&key("k"), entry, NOW, LONG, Hold::Fresh)
            .await;
        published.expect("Redis answers")
    };
    assert_eq!(fresh(&bench, &old).await, Published::Late);
    assert_eq!(standing(&bench.replicas[0], &key("k")).await, None);
    assert_eq!(bench.heard().await, []);
    // Nor does it end a load.
    let token = bench.replicas[1]
        .claim(&key("k"), SlotToken::random())
        .await
        .expect("Redis answers")
        .token;
    assert_eq!(fresh(&bench, &old).await, Published::Late);
    let token = token.expect("nobody else has it");
    assert_eq!(load(&bench.replicas[1], "k", token, None).await, Ok(true));
    // What stands there tells nothing of what had stood before.
    assert_eq!(fresh(&bench, &old).await, Published::Late);
    assert_eq!(fresh(&bench, &new).await, Published::Stands(new.version));
    assert_eq!(standing(&bench.replicas[1], &key("k")).await, Some(new.clone()));
    assert_eq!(
        bench.heard().await,
        [(bench.replicas[0].origin, written(&key("k"), &new))]
    );
    // Where something older stands, there is no doubt.
    bench.run(cmd("DEL").arg(slot("k"))).await;
    bench.replicas[1]
        .write(&key("k"), &put(1), NOW, LONG)
        .await
        .expect("lands");
    assert_eq!(fresh(&bench, &old).await, Published::Stands(old.version));
}

/// A network may hold what a gateway has published, and given up, and deliver it behind all that others have done meanwhile.
#[tokio::test]
async fn what_comes_late_enters_no_slot_from_which_something_newer_has_gone() {
    let mut bench = Bench::start().await;
    let [late, gone] = [1, 2].map(|counter| put(((now() - VERSION_EPOCH_MILLIS) << 21) + counter));
    for (name, newer) in [
        ("purged", true),
        ("dropped", true),
        ("invalidated", true),
        ("refused", false),
    ] {
        let (k, [one, other]) = (key(name), &bench.replicas);
        if newer {
            other.write(&k, &gone, NOW, LONG).await.expect("lands");
        }
        match name {
            "purged" => other.purge(&k, version(gone.version.get() + 1)).await.expect("purged"),
            "dropped" => assert_eq!(other.drop_version(&k, gone.version).await, Ok(true)),
            "invalidated" => assert_eq!(other.invalidate(&k).await, Ok(true)),
            // Written through, and its token was gone by then.
            _ => {
                let published = other.publish_entry(&k, &gone, NOW, LONG, Hold::Nothing).await;
                assert_eq!(published, Ok(Published::Nothing));
            }
        }
        let published = one.publish_entry(&k, &late, NOW, LONG, Hold::Fresh).await;
        let Ok(Published::Stands(floor)) = published else {
            panic!("{name}: {published:?}");
        };
        assert!(floor >= gone.version, "{name}");
        assert_eq!(standing(other, &k).await, None, "{name}");
        // Nor does that very version, but by a token; and what the store says does.
        let published = one.publish_entry(&k, &gone, NOW, LONG, Hold::Fresh).await;
        assert_ne!(published, Ok(Published::Stands(gone.version)), "{name}");
        let claimed = one.claim(&k, SlotToken::random()).await.expect("Redis answers");
        let token = claimed.token.expect("nobody else has it");
        let newest = put(floor.get());
        assert_eq!(load(one, name, token, Some(newest.clone())).await, Ok(true), "{name}");
        assert_eq!(standing(other, &k).await, Some(newest), "{name}");
    }
    bench.heard().await;
}

#[tokio::test]
async fn a_full_redis_still_forgets_and_tells() {
    let mut bench = Bench::start().await;
    let replica = &bench.replicas[0];
    let mut tokens = Vec::new();
    for name in ["dropped", "purged", "loaded", "alone"] {
        if name != "alone" {
            replica.write(&key(name), &put(5), NOW, LONG).await.expect("lands");
        }
        let claimed = replica
            .claim(&key(name), SlotToken::random())
            .await
            .expect("Redis answers");
        tokens.push(claimed.token.expect("nobody else has it"));
    }
    bench.heard().await;
    bench.run(cmd("CONFIG").arg("SET").arg("maxmemory").arg(1)).await;
    let replica = &bench.replicas[0];
    assert_eq!(replica.drop_version(&key("dropped"), version(4)).await, Ok(false));
    assert_eq!(replica.purge(&key("purged"), version(5)).await, Ok(()));
    assert_eq!(load(replica, "loaded", tokens[2], None).await, Ok(false));
    assert_eq!(replica.release(&key("alone"), tokens[3]).await, Ok(()));
    assert_eq!(replica.invalidate(&key("alone")).await, Ok(false));
    let dropped = Message::Dropped {
        key: key("dropped"),
        version: version(4),
    };
    let invalidated = Message::Invalidated { key: key("alone") };
    let told = [
        dropped,
        told(&key("purged"), version(5), ChangeKind::Invalidate),
        invalidated,
    ]
    .map(|told| (replica.origin, told));
    assert_eq!(bench.heard().await, told);
    // What was told to go is gone, when there is room again, too: no token is left to land by.
    bench.run(cmd("CONFIG").arg("SET").arg("maxmemory").arg(0)).await;
    for (name, token) in iter::zip(["dropped", "purged", "loaded", "alone"], tokens) {
        let landed = load(&bench.replicas[0], name, token, Some(put(9))).await;
        assert_eq!(landed, Ok(false), "{name}");
    }
}

#[tokio::test]
async fn nothing_is_said_to_a_server_for_which_the_epoch_does_not_hold() {
    let mut bench = Bench::start().await;
    bench.replicas[0]
        .write(&key("k"), &put(1), NOW, LONG)
        .await
        .expect("lands");
    // As after a restart: the connection is another one, and leads to what is empty or old.
    let before = bench.replicas[0].server().expect("it is up");
    bench.server.kill();
    bench.server.start_again().await;
    let replica = &bench.replicas[0];
    until("it is found again", async || {
        replica.server().is_some_and(|server| server != before)
    })
    .await;
    assert!(!replica.is_usable());
    assert_eq!(replica.get(&key("k")).await, Err(RedisFailure::NoEpoch));
    assert_eq!(
        replica.claim(&key("k"), SlotToken::random()).await,
        Err(RedisFailure::NoEpoch)
    );
    assert_eq!(
        replica.write(&key("k"), &put(2), NOW, LONG).await,
        Err(RedisFailure::NoEpoch)
    );
    assert_eq!(replica.invalidate(&key("k")).await, Err(RedisFailure::NoEpoch));
    let keys: i64 = cmd("DBSIZE")
        .query_async(&mut bench.server.connect().await)
        .await
        .expect("DBSIZE");
    assert_eq!(keys, 0);
    replica.up().await;
    assert!(replica.is_usable());
    assert_eq!(replica.get(&key("k")).await, Ok(None));
}

#[tokio::test]
async fn a_prefix_goes_with_its_wildcards_taken_at_their_word() {
    let mut bench = Bench::start().await;
    let replica = &bench.replicas[0];
    let names = ["a*1", "a*2", "ab", "a?", "a[b]", "a\\b", "b", "é", "éa"];
    for (number, name) in iter::zip(1.., names) {
        replica.write(&key(name), &put(number), NOW, LONG).await.expect("lands");
    }
    let other = Key::new("test.b", "a*1").expect("valid");
    replica.write(&other, &put(1), NOW, LONG).await.expect("lands");
    let remove = async |prefix: &str| {
        let (mut removed, mut cursor) = (0, Some(0));
        while let Some(from) = cursor {
            let step = replica
                .remove_prefix("test", prefix, from)
                .await
                .expect("Redis answers");
            removed += step.0;
            cursor = step.1;
        }
        removed
    };
    for (prefix, expected) in [("a*", 2), ("a?", 1), ("a[b", 1), ("a\\", 1), ("x", 0), ("é", 2)] {
        assert_eq!(remove(prefix).await, expected, "{prefix}");
    }
    assert_eq!(standing(replica, &key("ab")).await, Some(put(3)));
    assert_eq!(remove("").await, 2, "ab and b");
    assert_eq!(
        standing(replica, &other).await,
        Some(put(1)),
        "another namespace's stays"
    );
    bench.heard().await;
}

#[tokio::test]
async fn the_sentinel_of_an_epoch_goes_with_what_was_flushed() {
    let mut bench = Bench::start().await;
    let (epoch, other) = (Epoch(7), Epoch(8));
    let replica = &bench.replicas[0];
    assert_eq!(replica.has_sentinel(epoch).await, Ok(false));
    replica.set_sentinel(epoch).await.expect("Redis answers");
    assert_eq!(replica.has_sentinel(epoch).await, Ok(true));
    assert_eq!(replica.has_sentinel(other).await, Ok(false));
    // Who listens here is this test.
    assert_eq!(replica.announce(&[Message::EpochMoved]).await, Ok(1));
    let told = (replica.origin, Message::EpochMoved);
    assert_eq!(bench.heard().await, [told]);
    bench.run(&mut cmd("FLUSHALL")).await;
    assert_eq!(bench.replicas[1].has_sentinel(epoch).await, Ok(false));
}

#[tokio::test]
async fn what_is_asked_at_the_same_moment_is_answered_each_by_itself() {
    let mut bench = Bench::start().await;
    bench.run(cmd("LPUSH").arg(slot("list")).arg("x")).await;
    let names: Vec<String> = (0..100).map(|number| format!("k{number}")).collect();
    let newer = put(i64::MAX);
    // Every tenth has something newer; and among them is a slot that is not ours.
    for name in names.iter().step_by(10) {
        let landed = bench.replicas[1].write(&key(name), &newer, NOW, LONG).await;
        landed.expect("lands");
    }
    bench.heard().await;
    let replica = &bench.replicas[0];
    let stamped = |number: i64| version(((now() - VERSION_EPOCH_MILLIS) << 21) + number);
    let entries: Vec<Entry> = (1..=100).map(|number| put(stamped(number).get())).collect();
    let writes = iter::zip(&names, &entries)
        .map(async |(name, entry)| replica.publish_entry(&key(name), entry, NOW, LONG, Hold::Fresh).await);
    let (list, one) = (key("list"), put(1));
    let (published, broken) = tokio::join!(join_all(writes), replica.overwrite(&list, &one));
    let wrong_type = RedisFailure::Refused {
        code: "WRONGTYPE".to_owned(),
    };
    assert_eq!(broken, Err(wrong_type));
    for (number, published) in published.into_iter().enumerate() {
        let standing = if number % 10 == 0 {
            newer.version
        } else {
            entries[number].version
        };
        assert_eq!(published, Ok(Published::Stands(standing)), "{number}");
    }
    let looks = join_all(
        names
            .iter()
            .map(async |name| standing(&bench.replicas[1], &key(name)).await),
    )
    .await;
    for (number, found) in looks.into_iter().enumerate() {
        let expected = if number % 10 == 0 {
            newer.clone()
        } else {
            entries[number].clone()
        };
        assert_eq!(found, Some(expected), "{number}");
    }
    let told = bench.heard().await;
    for (name, entry) in iter::zip(&names, &entries) {
        let message = (bench.replicas[0].origin, written(&key(name), entry));
        assert_eq!(told.iter().filter(|heard| **heard == message).count(), 1, "{name}");
    }
}

#[tokio::test]
async fn a_full_redis_takes_none_of_what_is_published_together() {
    let mut bench = Bench::start().await;
    let names: Vec<String> = (0..20).map(|number| format!("k{number}")).collect();
    for name in names.iter().step_by(3) {
        bench.replicas[1]
            .write(&key(name), &put(1), NOW, LONG)
            .await
            .expect("lands");
    }
    bench.run(cmd("CONFIG").arg("SET").arg("maxmemory").arg(1)).await;
    let replica = &bench.replicas[0];
    let stamp = version((now() - VERSION_EPOCH_MILLIS) << 21);
    let entry = put(stamp.get());
    let publishing = names.iter().map(async |name| {
        let published = replica.publish_entry(&key(name), &entry, NOW, LONG, Hold::Fresh).await;
        published.expect("Redis answers")
    });
    let published = join_all(publishing).await;
    assert_eq!(published, vec![Published::Nothing; names.len()]);
    // Nor does anything older stand.
    let keys: usize = cmd("DBSIZE")
        .query_async(&mut bench.connection)
        .await
        .expect("Redis answers");
    assert_eq!(keys, 0);
}
