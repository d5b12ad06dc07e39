//! A limit holds over all replicas, exactly, under concurrent requests; each client has its own; a window that is over gives way to the next.

use std::time::Duration;

use axum::{Router, extract::Request, routing::get};
use futures_util::future::join_all;
use tidegate_examples::rate_limit::{RateLimit, Uncounted};
use tonic::transport::Channel;

use crate::world::{Answer, Api, Gateway, Nowhere, SOON, eventually};

const HOUR: Duration = Duration::from_secs(3_600);

fn limit(channel: Channel, requests: u32, window: Duration) -> RateLimit {
    let key = |request: &Request| Some(request.headers().get("x-api-key")?.to_str().ok()?.to_owned());
    // A test that is slow must not take a slow answer for none.
    RateLimit::new(channel, "rate-limits", requests, window, key).patience(SOON)
}

async fn replica(limit: RateLimit) -> Api {
    Api::serve(Router::new().route("/", get(async || "answered")).layer(limit)).await
}

async fn ask(api: &Api, key: &str) -> Answer {
    api.ask("GET", "/", &[("x-api-key", key)]).await
}

#[tokio::test]
async fn a_client_gets_what_it_may_have_from_all_replicas_together() {
    let gateway = Gateway::start().await;
    let first = replica(limit(gateway.channel(), 20, HOUR)).await;
    let second = replica(limit(gateway.channel(), 20, HOUR)).await;
    let asks = (0..25).flat_map(|_| [ask(&first, "anna"), ask(&second, "anna")]);
    let answers = join_all(asks).await;
    let passed: Vec<&Answer> = answers.iter().filter(|answer| answer.status == 200).collect();
    assert_eq!(passed.len(), 20);
    let mut remaining: Vec<u32> = passed
        .iter()
        .map(|answer| answer.header("ratelimit-remaining").parse().unwrap())
        .collect();
    remaining.sort_unstable();
    assert_eq!(remaining, (0..20).collect::<Vec<u32>>());
    for answer in answers.iter().filter(|answer| answer.status != 200) {
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (429, ""));
        assert_eq!(
            (answer.header("ratelimit-limit"), answer.header("ratelimit-remaining")),
            ("20", "0")
        );
        let wait: u64 = answer.header("retry-after").parse().unwrap();
        assert!((1..=3_601).contains(&wait), "{answer:?}");
    }
    // Another client is counted by itself, and who is nobody is not counted.
    assert_eq!(ask(&second, "bob").await.header("ratelimit-remaining"), "19");
    let answer = second.get("/").await;
    assert_eq!((answer.status.as_u16(), answer.header("ratelimit-limit")), (200, ""));
    gateway.stop().await;
}

#[tokio::test]
async fn a_window_ends_whatever_is_asked_meanwhile() {
    let gateway = Gateway::start().await;
    let api = replica(limit(gateway.channel(), 1, Duration::from_secs(1))).await;
    assert_eq!(ask(&api, "anna").await.status, 200);
    // What is refused does not prolong it.
    eventually("the next window has begun", async || {
        let answer = ask(&api, "anna").await;
        if answer.status == 200 {
            Ok(())
        } else {
            Err(format!("{answer:?}"))
        }
    })
    .await;
    gateway.stop().await;
}

#[tokio::test]
async fn what_cannot_be_counted_passes_or_is_refused_as_the_service_wants() {
    let nowhere = Nowhere::new();
    let open = replica(limit(nowhere.channel(), 1, HOUR)).await;
    for _ in 0..3 {
        assert_eq!(ask(&open, "anna").await.body, "answered");
    }
    let closed = replica(limit(nowhere.channel(), 1, HOUR).uncounted(Uncounted::IsRefused)).await;
    let answer = ask(&closed, "anna").await;
    assert_eq!((answer.status.as_u16(), answer.header("retry-after")), (503, "1"));
}

#[tokio::test]
async fn a_name_that_cannot_be_counted_is_the_clients_fault() {
    let gateway = Gateway::start().await;
    let api = replica(limit(gateway.channel(), 1, HOUR)).await;
    assert_eq!(ask(&api, &"x".repeat(1_025)).await.status, 400);
    assert_eq!(ask(&api, "").await.status, 400);
    gateway.stop().await;
}
