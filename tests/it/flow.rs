//! Proves that HTTP/2's flow control keeps with the client what the gateway does not read, in whatever frames it comes, and that nobody
//! keeps an answer here by not taking it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use prost::Message;
use tidegate::rpc::proto::{
    BatchGetRequest, GetResponse, ReadConsistency, WriteItem, WriteStreamRequest, WriteStreamResponse,
    write_result::Outcome,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::Code;

use crate::{
    batch_write::put,
    harness::{
        Client, Database, Gateway, Mode, SOON, Setup, eventually, expect, until,
        wire::{Wire, answer, message, send_frame},
    },
};

const GET: &str = "/tidegate.v1.Gateway/Get";
const BATCH_GET: &str = "/tidegate.v1.Gateway/BatchGet";
const WRITE_STREAM: &str = "/tidegate.v1.Gateway/WriteStream";

/// More than a server of HTTP/2 that does not stop its clients puts up with.
const WRITES: u64 = 20_500;

/// Streams that pour at once.
const STREAMS: u64 = 40;

/// What all of them may take together and lasts: the writes that they will never send in this test are far more.
const LONG: Duration = Duration::from_secs(120);

fn small(client: &Client) -> Bytes {
    let item: WriteItem = put(client.put_request("key", b"1", Mode::Through));
    message(&WriteStreamRequest { item: Some(item) })
}

/// Pours small writes of one key into a stream, each in a frame of its own, and counts them. How many of the answers are OK.
async fn pour(wire: &Wire, write: Bytes, sent: Arc<AtomicU64>) -> JoinHandle<u64> {
    let (mut sender, response) = wire.begin(WRITE_STREAM).await;
    tokio::spawn(async move {
        let pouring = async {
            for _ in 0..WRITES {
                if !send_frame(&mut sender, write.clone()).await {
                    return;
                }
                sent.fetch_add(1, Ordering::Relaxed);
            }
            // The stream may have ended.
            let _ = sender.send_data(Bytes::new(), true);
        };
        let (answer, ()) = tokio::join!(answer(response), pouring);
        let answer = answer.expect("the connection lasts");
        assert_eq!(answer.code(), Some(Code::Ok), "{:?}", answer.status);
        let (mut body, mut written) = (answer.body, 0);
        while !body.is_empty() {
            let length = u32::from_be_bytes(body[1..5].try_into().unwrap()) as usize;
            let answer = WriteStreamResponse::decode(body.slice(5..5 + length)).unwrap();
            if let Some(Outcome::Written(_)) = answer.result.and_then(|result| result.outcome) {
                written += 1;
            }
            body = body.slice(5 + length..);
        }
        written
    })
}

/// Waits until the pouring has been stopped, while single calls on the same connection are answered.
async fn await_stopped(gateway: &Gateway, wire: &Wire, sent: &AtomicU64) -> u64 {
    let get = message(&gateway.client.get_request("standing", ReadConsistency::Cached));
    let (mut before, mut same) = (0, 0);
    eventually("nothing more can be sent", SOON, async || {
        sleep(Duration::from_millis(100)).await;
        let answer = wire.call(GET, &[], get.clone()).await;
        assert_eq!(answer.code(), Some(Code::Ok), "{:?}", answer.status);
        let now = sent.load(Ordering::Relaxed);
        same = if now == before && now > 0 { same + 1 } else { 0 };
        before = now;
        expect(same >= 5, (same, now))
    })
    .await;
    before
}

#[tokio::test]
async fn small_writes_are_stopped_and_the_connection_lasts() {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config("[rpc]\ndeadline_default = \"60s\"")
        .start()
        .await;
    gateway.client.put("standing", b"value", Mode::Through).await.unwrap();
    let hold = database.hold_writes().await;
    let wire = Wire::connect(gateway.address).await;
    let sent = Arc::new(AtomicU64::new(0));
    let pouring = pour(&wire, small(&gateway.client), Arc::clone(&sent)).await;
    let stopped = await_stopped(&gateway, &wire, &sent).await;
    assert!(stopped < WRITES, "{stopped}");
    hold.release().await;
    let get = message(&gateway.client.get_request("standing", ReadConsistency::Cached));
    let reading = async {
        while !pouring.is_finished() {
            let answer = wire.call(GET, &[], get.clone()).await;
            assert_eq!(answer.code(), Some(Code::Ok), "{:?}", answer.status);
        }
        pouring.await.unwrap()
    };
    let written = timeout(LONG, reading).await.expect("all are written");
    assert_eq!(written, WRITES);
}

#[tokio::test]
async fn small_writes_of_many_streams_are_stopped_and_the_connection_lasts() {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config("[rpc]\ndeadline_default = \"60s\"")
        .start()
        .await;
    gateway.client.put("standing", b"value", Mode::Through).await.unwrap();
    let hold = database.hold_writes().await;
    let wire = Wire::connect(gateway.address).await;
    let sent = Arc::new(AtomicU64::new(0));
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        streams.push(pour(&wire, small(&gateway.client), Arc::clone(&sent)).await);
    }
    let stopped = await_stopped(&gateway, &wire, &sent).await;
    assert!(stopped > WRITES && stopped < STREAMS * WRITES / 2, "{stopped}");
    assert!(streams.iter().all(|stream| !stream.is_finished()));
    streams.iter().for_each(JoinHandle::abort);
    until("nothing is left of them", async || {
        gateway.metric("tidegate_calls_running", &[]).await == 0.0
    })
    .await;
    hold.release().await;
    assert_eq!(
        wire.call(WRITE_STREAM, &[], small(&gateway.client)).await.code(),
        Some(Code::Ok)
    );
}

/// A gateway that soon loses patience, with a large value.
async fn with_large_value(unread_max: &str) -> (Gateway, Vec<u8>) {
    let config = format!("[rpc]\nstream_unread_max = \"{unread_max}\"");
    let gateway = Setup::new().config(&config).start().await;
    let value = vec![b'x'; 1024 * 1024];
    gateway.client.put("large", &value, Mode::Through).await.unwrap();
    (gateway, value)
}

/// Begins a call and leaves its answer unread.
async fn unread(wire: &Wire, path: &str, request: Bytes) -> RecvStream {
    let (mut sender, response) = wire.begin(path).await;
    sender.send_data(request, true).expect("there is room");
    let head = timeout(SOON, response).await.expect("it is answered");
    head.expect("the connection lasts").into_body()
}

/// Reads what there is without making room for more, until the end; by which reset it came.
async fn reset_of(body: &mut RecvStream) -> Option<Reason> {
    let reading = async {
        loop {
            match body.data().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => return error.reason(),
                None => return None,
            }
        }
    };
    timeout(SOON, reading).await.expect("it is cut off")
}

#[tokio::test]
async fn an_answer_that_nobody_takes_is_cut_off() {
    let (gateway, _) = with_large_value("1s").await;
    let get = message(&gateway.client.get_request("large", ReadConsistency::Cached));
    let batch = message(&BatchGetRequest {
        namespace: "orders".to_owned(),
        keys: vec!["large".to_owned(); 2],
        ..BatchGetRequest::default()
    });
    // With no room at all, and with room for the beginning.
    for room in [0, 1_000] {
        let wire = Wire::connect_with_room(gateway.address, room).await;
        for (path, request) in [(GET, &get), (BATCH_GET, &batch)] {
            let mut body = unread(&wire, path, request.clone()).await;
            assert_eq!(reset_of(&mut body).await, Some(Reason::CANCEL), "{path} {room}");
        }
    }
    assert_eq!(gateway.said("cut off an answer").len(), 4);
    gateway
        .client
        .value("large", ReadConsistency::Cached)
        .await
        .expect("it is there");
}

#[tokio::test]
async fn an_answer_that_is_taken_slowly_is_not_cut_off() {
    let unread_max = Duration::from_secs(3);
    let (gateway, value) = with_large_value("3s").await;
    let wire = Wire::connect_with_room(gateway.address, 20_000).await;
    let get = message(&gateway.client.get_request("large", ReadConsistency::Cached));
    let (began, mut taken) = (Instant::now(), Vec::new());
    let mut body = unread(&wire, GET, get).await;
    while let Some(part) = body.data().await {
        let part = part.expect("it is not cut off");
        // So that the whole takes twice as long as nothing may be taken.
        sleep(unread_max.mul_f64(2.0 * part.len() as f64 / value.len() as f64)).await;
        body.flow_control().release_capacity(part.len()).unwrap();
        taken.extend_from_slice(&part);
    }
    assert!(began.elapsed() > unread_max, "{:?}", began.elapsed());
    let response = GetResponse::decode(&taken[5..]).expect("it is whole");
    assert_eq!(response.entry.expect("it is there").value, value);
}
