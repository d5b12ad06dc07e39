//! What is kept is given out by every replica, for as long as it may be and no longer; and the service works without a gateway.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::header::CACHE_CONTROL,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::stream;
use tidegate_examples::http_cache::HttpCache;
use tonic::transport::Channel;

use crate::world::{Api, Gateway, Nowhere, SOON, eventually};

/// How often the service was asked, all replicas together: each answer says which time it was.
type Asked = Arc<AtomicU32>;

async fn numbered(asked: Asked, said: &'static str) -> Response {
    let number = asked.fetch_add(1, Ordering::Relaxed) + 1;
    ([(CACHE_CONTROL, said)], number.to_string()).into_response()
}

/// A replica of a service behind the cache.
async fn replica(channel: Channel, asked: &Asked) -> Api {
    // A test that is slow must not take a slow answer for none.
    let cache = HttpCache::new(channel, "responses")
        .patience(SOON)
        .body_bytes_max(1_000);
    Api::serve(router(asked).layer(cache)).await
}

fn router(asked: &Asked) -> Router {
    let long = async |State(asked): State<Asked>| numbered(asked, "max-age=3600").await;
    let brief = async |State(asked): State<Asked>| numbered(asked, "max-age=1").await;
    let private = async |State(asked): State<Asked>| numbered(asked, "private, max-age=3600").await;
    let large = async |State(asked): State<Asked>| {
        asked.fetch_add(1, Ordering::Relaxed);
        ([(CACHE_CONTROL, "max-age=3600")], "x".repeat(1_001))
    };
    let streamed = async |State(asked): State<Asked>| {
        asked.fetch_add(1, Ordering::Relaxed);
        // Its length is not known before it ends.
        let parts = stream::iter(["stre", "amed"].map(Ok::<_, Infallible>));
        ([(CACHE_CONTROL, "max-age=3600")], Body::from_stream(parts))
    };
    Router::new()
        .route(
            "/long",
            get(long)
                .post(async || "changed")
                .delete(async || http::StatusCode::CONFLICT),
        )
        .route("/other", post(async || "changed"))
        .route("/brief", get(brief))
        .route("/private", get(private))
        .route("/large", get(large))
        .route("/streamed", get(streamed))
        .with_state(Arc::clone(asked))
}

#[tokio::test]
async fn what_one_replica_answered_every_replica_gives_out() {
    let (gateway, asked) = (Gateway::start().await, Asked::default());
    let first = replica(gateway.channel(), &asked).await;
    let second = replica(gateway.channel(), &asked).await;

    let answer = first.get("/long").await;
    assert_eq!(
        (answer.body.as_str(), answer.header("cache-status")),
        ("1", "tidegate; fwd=uri-miss; stored")
    );
    for replica in [&first, &second] {
        let answer = replica.get("/long").await;
        assert_eq!(
            (answer.body.as_str(), answer.header("cache-status")),
            ("1", "tidegate; hit")
        );
        assert_eq!(answer.header("cache-control"), "max-age=3600");
        assert!(!answer.header("age").is_empty(), "{answer:?}");
    }
    // Another query is another response.
    assert_eq!(second.get("/long?page=2").await.body, "2");
    // Who asks for a fresh one gets it, and leaves it for the others.
    let answer = second.ask("GET", "/long", &[("cache-control", "no-cache")]).await;
    assert_eq!(
        (answer.body.as_str(), answer.header("cache-status")),
        ("3", "tidegate; fwd=request; stored")
    );
    assert_eq!(first.get("/long").await.body, "3");
    gateway.stop().await;
}

#[tokio::test]
async fn what_is_old_is_not_given_out() {
    let (gateway, asked) = (Gateway::start().await, Asked::default());
    let api = replica(gateway.channel(), &asked).await;
    assert_eq!(api.get("/brief").await.body, "1");
    let answer = eventually("the response is too old", async || {
        let answer = api.get("/brief").await;
        if answer.body == "1" {
            Err(format!("{answer:?}"))
        } else {
            Ok(answer)
        }
    })
    .await;
    assert_eq!(
        (answer.body.as_str(), answer.header("cache-status")),
        ("2", "tidegate; fwd=uri-miss; stored")
    );
    gateway.stop().await;
}

#[tokio::test]
async fn what_changes_something_removes_what_is_kept_there() {
    let (gateway, asked) = (Gateway::start().await, Asked::default());
    let (first, second) = (
        replica(gateway.channel(), &asked).await,
        replica(gateway.channel(), &asked).await,
    );
    assert_eq!(first.get("/long").await.body, "1");
    // Neither what failed, nor what concerns another address.
    let refused = second.ask("DELETE", "/long", &[]).await;
    assert_eq!(
        (refused.status.as_u16(), refused.header("cache-status")),
        (409, "tidegate; fwd=method")
    );
    assert_eq!(second.ask("POST", "/other", &[]).await.status, 200);
    assert_eq!(first.get("/long").await.body, "1");

    let changed = second.ask("POST", "/long", &[]).await;
    assert_eq!(changed.header("cache-status"), "tidegate; fwd=method; detail=forgotten");
    assert_eq!(first.get("/long").await.body, "2");
    gateway.stop().await;
}

#[tokio::test]
async fn what_is_not_for_all_is_not_kept() {
    let (gateway, asked) = (Gateway::start().await, Asked::default());
    let api = replica(gateway.channel(), &asked).await;
    for number in ["1", "2"] {
        let answer = api.get("/private").await;
        assert_eq!(
            (answer.body.as_str(), answer.header("cache-status")),
            (number, "tidegate; fwd=uri-miss")
        );
    }
    assert_eq!(api.get("/long").await.body, "3");
    let answer = api.ask("GET", "/long", &[("authorization", "Bearer x")]).await;
    assert_eq!(
        (answer.body.as_str(), answer.header("cache-status")),
        ("4", "tidegate; fwd=bypass")
    );
    // Too long, and of unknown length: passed on whole, and not kept.
    for (path, body) in [("/large", "x".repeat(1_001)), ("/streamed", "streamed".to_owned())] {
        for _ in 0..2 {
            let answer = api.get(path).await;
            assert_eq!(answer.header("cache-status"), "tidegate; fwd=uri-miss", "{path}");
            assert_eq!(answer.body, body, "{path}");
        }
    }
    assert_eq!(asked.load(Ordering::Relaxed), 8);
    gateway.stop().await;
}

#[tokio::test]
async fn without_a_gateway_the_service_answers_itself() {
    let (nowhere, asked) = (Nowhere::new(), Asked::default());
    let api = replica(nowhere.channel(), &asked).await;
    for number in ["1", "2"] {
        let answer = api.get("/long").await;
        let said = (
            answer.status.as_u16(),
            answer.body.as_str(),
            answer.header("cache-status"),
        );
        assert_eq!(said, (200, number, "tidegate; fwd=bypass; detail=unavailable"));
    }
    assert_eq!(
        api.ask("POST", "/long", &[]).await.header("cache-status"),
        "tidegate; fwd=method"
    );

    // One that goes away while it is used.
    let gateway = Gateway::start().await;
    let api = Api::serve(router(&asked).layer(HttpCache::new(gateway.channel(), "responses").patience(SOON))).await;
    assert_eq!(
        api.get("/long").await.header("cache-status"),
        "tidegate; fwd=uri-miss; stored"
    );
    let _stopped = gateway.stop().await;
    let answer = api.get("/long").await;
    assert_eq!(
        (answer.status.as_u16(), answer.header("cache-status")),
        (200, "tidegate; fwd=bypass; detail=unavailable")
    );
}

#[tokio::test]
async fn a_gateway_that_hangs_costs_the_patience_and_no_request() {
    // It accepts, and says nothing.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let cache =
        HttpCache::new(tidegate_examples::connect(&address).unwrap(), "responses").patience(Duration::from_millis(100));
    let api = Api::serve(router(&Asked::default()).layer(cache)).await;
    let answer = api.get("/long").await;
    assert_eq!(
        (answer.body.as_str(), answer.header("cache-status")),
        ("1", "tidegate; fwd=bypass; detail=unavailable")
    );
}
