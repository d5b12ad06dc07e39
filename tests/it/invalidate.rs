//! Proves that an invalidation on request makes every cache forget, on every gateway, that it takes nothing else along, and what it says
//! when it cannot.

use tidegate::rpc::proto::{InvalidateRequest, InvalidateResponse, PutRequest, ReadConsistency, Source, StatsRequest};
use tonic::{Code, Status};

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::{assert_do_not_come_back, outcome, seen},
    eventually, expect,
    postgres::{self, Stop},
    redis,
};

/// Two gateways on one PostgreSQL and one Redis.
struct Pair {
    database: Database,
    redis: redis::Server,
    gateways: [Gateway; 2],
}

const OLD: &[u8] = b"old";
const NEW: &[u8] = b"new";

impl Pair {
    async fn start() -> Pair {
        let (database, redis) = (Database::postgres().await, redis::start().await);
        let setup = Setup::new().store(database.url()).redis(&redis.url());
        let gateways = [setup.clone().start().await, setup.start().await];
        Pair {
            database,
            redis,
            gateways,
        }
    }

    /// Lets every cache hold keys as they were before somebody wrote past the gateways.
    async fn outdated(&self, namespace: &str, keys: &[&str]) {
        for key in keys {
            let clients = self
                .gateways
                .each_ref()
                .map(|gateway| gateway.client.namespace(namespace));
            clients[0].put(key, OLD, Mode::Through).await.unwrap();
            for client in &clients {
                eventually("the copy is in memory", SOON, async || {
                    let answer = client.read(key).await;
                    expect(seen(&answer) == (Some(OLD), Source::L1), answer)
                })
                .await;
            }
            self.database.write_past(namespace, key, NEW).await;
        }
    }

    /// Asserts that no cache of either gateway gives what it held: the first at once, the other soon.
    async fn assert_forgotten(&self, namespace: &str, key: &str) {
        let [here, there] = self
            .gateways
            .each_ref()
            .map(|gateway| gateway.client.namespace(namespace));
        for consistency in [ReadConsistency::Cached, ReadConsistency::Shared] {
            assert_eq!(
                here.value(key, consistency).await.as_deref(),
                Some(NEW),
                "{key} {consistency:?}"
            );
        }
        eventually("the other gateway forgets", SOON, async || {
            let answer = there.read(key).await;
            expect(seen(&answer).0 == Some(NEW), answer)
        })
        .await;
    }

    async fn assert_kept(&self, namespace: &str, key: &str) {
        for gateway in &self.gateways {
            let answer = gateway.client.namespace(namespace).read(key).await;
            assert_eq!(seen(&answer), (Some(OLD), Source::L1), "{key}");
        }
    }
}

async fn invalidate(gateway: &Gateway, request: InvalidateRequest) -> Result<InvalidateResponse, Status> {
    let answer = gateway.admin().await.invalidate(request).await;
    answer.map(tonic::Response::into_inner)
}

fn of(namespace: &str) -> InvalidateRequest {
    InvalidateRequest {
        namespace: namespace.to_owned(),
        ..InvalidateRequest::default()
    }
}

fn keys(keys: &[&str]) -> InvalidateRequest {
    InvalidateRequest {
        keys: keys.iter().map(|key| (*key).to_owned()).collect(),
        ..of("orders")
    }
}

fn prefix(prefix: &str) -> InvalidateRequest {
    InvalidateRequest {
        prefix: prefix.to_owned(),
        ..of("orders")
    }
}

fn whole() -> InvalidateRequest {
    InvalidateRequest {
        whole_namespace: true,
        ..of("orders")
    }
}

#[tokio::test]
async fn keys_are_forgotten_everywhere_and_no_others() {
    let pair = Pair::start().await;
    pair.outdated("orders", &["a", "b", "kept"]).await;
    let answer = invalidate(&pair.gateways[0], keys(&["a", "b", "a", "never-seen"]))
        .await
        .unwrap();
    assert_eq!((answer.keys, answer.memory_copies), (3, 2));
    pair.assert_forgotten("orders", "a").await;
    pair.assert_forgotten("orders", "b").await;
    pair.assert_kept("orders", "kept").await;
}

#[tokio::test]
async fn a_prefix_is_forgotten_everywhere_and_no_other_key() {
    let pair = Pair::start().await;
    // What means something in a pattern means itself here.
    pair.outdated("orders", &["a*[b]:1", "a*[b]:2", "aXb:1", "a"]).await;
    pair.outdated("sessions", &["a*[b]:1"]).await;
    let answer = invalidate(&pair.gateways[0], prefix("a*[b]:")).await.unwrap();
    assert_eq!((answer.keys, answer.memory_copies), (0, 2));
    pair.assert_forgotten("orders", "a*[b]:1").await;
    pair.assert_forgotten("orders", "a*[b]:2").await;
    pair.assert_kept("orders", "aXb:1").await;
    pair.assert_kept("orders", "a").await;
    pair.assert_kept("sessions", "a*[b]:1").await;
}

#[tokio::test]
async fn a_tag_is_forgotten_everywhere_and_no_other_key() {
    let pair = Pair::start().await;
    let tagged = async |namespace: &str, key: &str, tags: &[&str]| {
        let client = pair.gateways[0].client.namespace(namespace);
        let request = PutRequest {
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            ..client.put_request(key, OLD, Mode::Through)
        };
        client.stub().put(request).await.unwrap();
        for gateway in &pair.gateways {
            let client = gateway.client.namespace(namespace);
            eventually("the copy is in memory", SOON, async || {
                let answer = client.read(key).await;
                expect(seen(&answer) == (Some(OLD), Source::L1), answer)
            })
            .await;
        }
        // Whoever writes past the gateways leaves the tags as they are.
        pair.database.write_past(namespace, key, NEW).await;
    };
    tagged("orders", "both", &["red", "round"]).await;
    tagged("orders", "red", &["red"]).await;
    tagged("orders", "round", &["round"]).await;
    tagged("orders", "reddish", &["reddish"]).await;
    tagged("sessions", "red", &["red"]).await;
    let red = InvalidateRequest {
        tag: "red".to_owned(),
        ..of("orders")
    };
    let answer = invalidate(&pair.gateways[0], red.clone()).await.unwrap();
    assert_eq!((answer.keys, answer.memory_copies), (2, 2));
    pair.assert_forgotten("orders", "both").await;
    pair.assert_forgotten("orders", "red").await;
    pair.assert_kept("orders", "round").await;
    pair.assert_kept("orders", "reddish").await;
    pair.assert_kept("sessions", "red").await;
    // A Put without the tag takes it away.
    pair.gateways[1].client.put("red", OLD, Mode::Through).await.unwrap();
    assert_eq!(invalidate(&pair.gateways[0], red).await.unwrap().keys, 1);
}

#[tokio::test]
async fn a_tag_of_many_keys_is_resolved_in_steps() {
    let gateway = Setup::new().start().await;
    let client = &gateway.client;
    for number in 0..2_050 {
        let request = PutRequest {
            tags: vec!["red".to_owned()],
            ..client.put_request(&format!("k{number}"), OLD, Mode::Behind)
        };
        client.stub().put(request).await.unwrap();
    }
    gateway.drained().await;
    let red = InvalidateRequest {
        tag: "red".to_owned(),
        ..of("orders")
    };
    let answer = invalidate(&gateway, red).await.unwrap();
    assert_eq!(answer.keys, 2_050);
    let stats = gateway.admin().await.stats(StatsRequest::default()).await.unwrap();
    assert_eq!(stats.into_inner().memory_entries, 0);
}

#[tokio::test]
async fn a_namespace_is_forgotten_everywhere_and_no_other() {
    let pair = Pair::start().await;
    pair.outdated("orders", &["a", "b"]).await;
    pair.outdated("orders2", &["a"]).await;
    let answer = invalidate(&pair.gateways[0], whole()).await.unwrap();
    assert_eq!((answer.keys, answer.memory_copies), (0, 2));
    pair.assert_forgotten("orders", "a").await;
    pair.assert_forgotten("orders", "b").await;
    pair.assert_kept("orders2", "a").await;
}

#[tokio::test]
async fn what_is_pending_is_no_copy() {
    let pair = Pair::start().await;
    let [here, there] = &pair.gateways;
    for request in [keys(&["key"]), prefix("ke"), whole()] {
        let hold = pair.database.hold_writes().await;
        let value = format!("{request:?}");
        here.client.put("key", value.as_bytes(), Mode::Behind).await.unwrap();
        // The namespace's epoch is in the store, whose other tables are not held.
        for gateway in [here, there] {
            invalidate(gateway, request.clone()).await.unwrap();
            let answer = here.client.get("key", ReadConsistency::Shared).await.unwrap();
            assert_eq!(seen(&answer), (Some(value.as_bytes()), Source::Pending), "{request:?}");
        }
        hold.release().await;
        here.drained().await;
        assert_eq!(
            pair.database.value("orders", "key").await.as_deref(),
            Some(value.as_bytes())
        );
    }
}

#[tokio::test]
async fn what_is_pending_gets_its_place_in_redis_back() {
    let pair = Pair::start().await;
    let [here, there] = &pair.gateways;
    let hold = pair.database.hold_writes().await;
    here.client.put("key", NEW, Mode::Behind).await.unwrap();
    for request in [keys(&["key"]), prefix("ke")] {
        for gateway in [here, there] {
            invalidate(gateway, request.clone()).await.unwrap();
            eventually("the other gateway sees the pending write", SOON, async || {
                let answer = there.client.get("key", ReadConsistency::Shared).await.unwrap();
                expect(seen(&answer) == (Some(NEW), Source::L2), answer)
            })
            .await;
        }
    }
    hold.release().await;
}

#[tokio::test]
async fn without_redis_memory_forgets() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    for request in [keys(&["a"]), prefix("a"), whole()] {
        gateway.client.put("a", OLD, Mode::Through).await.unwrap();
        database.write_past("orders", "a", NEW).await;
        assert_eq!(seen(&gateway.client.read("a").await).0, Some(OLD));
        let answer = invalidate(&gateway, request.clone()).await.unwrap();
        assert_eq!(
            seen(&gateway.client.read("a").await),
            (Some(NEW), Source::Store),
            "{request:?}"
        );
        assert_eq!(answer.memory_copies, 1, "{request:?}");
    }
}

#[tokio::test]
async fn a_redis_that_cannot_be_told_is_said_and_memory_forgets_all_the_same() {
    let mut pair = Pair::start().await;
    pair.outdated("orders", &["a", "b"]).await;
    pair.redis.kill();
    for (key, request) in [("a", keys(&["a"])), ("b", prefix("b"))] {
        let status = invalidate(&pair.gateways[0], request).await.expect_err("Redis is gone");
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert_eq!(outcome(&status), "unknown");
        assert!(status.message().contains("Redis"), "{status:?}");
        assert_eq!(
            seen(&pair.gateways[0].client.read(key).await),
            (Some(NEW), Source::Store)
        );
    }
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_said() {
    let mut server = postgres::Server::start().await;
    let gateway = Setup::new().store(&server.create_database().await).start().await;
    gateway.client.put("a", OLD, Mode::Through).await.unwrap();
    server.stop(Stop::Fast).await;
    // Keys need no store.
    assert_eq!(invalidate(&gateway, keys(&["a"])).await.unwrap().memory_copies, 1);
    let tag = InvalidateRequest {
        tag: "red".to_owned(),
        ..of("orders")
    };
    for request in [tag, whole()] {
        let status = invalidate(&gateway, request).await.expect_err("the store is gone");
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains("store"), "{status:?}");
    }
}

#[tokio::test]
async fn bad_requests_change_nothing() {
    let gateway = Setup::new().start().await;
    gateway.client.put("a", OLD, Mode::Through).await.unwrap();
    let many: Vec<String> = (0..1_001).map(|number| number.to_string()).collect();
    for (request, field) in [
        (
            InvalidateRequest {
                keys: many,
                ..of("orders")
            },
            "keys",
        ),
        (keys(&["a", ""]), "number 2"),
        (keys(&["a\0"]), "NUL"),
        (keys(&["a", &"k".repeat(1025)]), "number 2"),
        (of("orders"), "keys"),
        (prefix(""), "prefix"),
        (prefix(&"a".repeat(1025)), "prefix"),
        (
            InvalidateRequest {
                tag: "t".repeat(129),
                ..of("orders")
            },
            "tag",
        ),
        (
            InvalidateRequest {
                prefix: "a".to_owned(),
                ..keys(&["a"])
            },
            "together with keys",
        ),
        (
            InvalidateRequest {
                whole_namespace: true,
                ..prefix("a")
            },
            "together with prefix",
        ),
        (
            InvalidateRequest {
                whole_namespace: true,
                ..of("Orders")
            },
            "namespace",
        ),
        (
            InvalidateRequest {
                keys: vec!["a".to_owned()],
                ..of("")
            },
            "namespace",
        ),
    ] {
        let status = invalidate(&gateway, request).await.expect_err("refused");
        assert_do_not_come_back(&status, Code::InvalidArgument, "INVALID");
        assert_eq!(outcome(&status), "not_applied");
        assert!(status.message().contains(field), "{field}: {status:?}");
        assert_eq!(seen(&gateway.client.read("a").await).1, Source::L1);
    }
}

#[tokio::test]
async fn as_many_of_the_longest_keys_as_may_be_named_fit_one_request() {
    let gateway = Setup::new().start().await;
    let many = (0..1_000).map(|number| format!("{number:0>1024}")).collect();
    let answer = invalidate(
        &gateway,
        InvalidateRequest {
            keys: many,
            ..of("orders")
        },
    )
    .await
    .unwrap();
    assert_eq!((answer.keys, answer.memory_copies), (1_000, 0));
}
