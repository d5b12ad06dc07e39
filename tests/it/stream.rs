//! Proves that a stream of writes is answered in order, holds only so much, and ends as it says, whatever its client does.

use std::time::Duration;

use bytes::Bytes;
use h2::SendStream;
use prost::Message;
use tidegate::rpc::proto::{
    Failure, WriteItem, WriteResult, WriteStreamRequest, WriteStreamResponse, Written, gateway_client::GatewayClient,
    write_result::Outcome,
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Endpoint};

use crate::{
    batch_write::{delete, put},
    harness::{
        Client, Database, Gateway, Mode, SOON, Setup,
        client::{assert_do_not_come_back, outcome},
        eventually, expect, redis, until,
        wire::{Answer, Wire, answer, frame, message},
    },
};

const WRITE_STREAM: &str = "/tidegate.v1.Gateway/WriteStream";

/// Both sides of a stream.
struct Stream {
    writes: mpsc::Sender<WriteStreamRequest>,
    answers: Streaming<WriteStreamResponse>,
}

impl Stream {
    async fn open(client: &Client) -> Stream {
        Stream::of(client.stub()).await
    }

    async fn of(mut stub: GatewayClient<tonic::transport::Channel>) -> Stream {
        let (writes, receiver) = mpsc::channel(16);
        let answers = stub.write_stream(ReceiverStream::new(receiver)).await;
        Stream {
            writes,
            answers: answers.expect("a stream begins").into_inner(),
        }
    }

    async fn send(&self, item: WriteItem) {
        let request = WriteStreamRequest { item: Some(item) };
        self.writes.send(request).await.expect("the stream goes on");
    }

    /// Sends all that comes, as fast as it is taken, and ends the client's side.
    fn pour(&mut self, items: Vec<WriteItem>) -> JoinHandle<()> {
        let (ended, _) = mpsc::channel(1);
        let writes = std::mem::replace(&mut self.writes, ended);
        tokio::spawn(async move {
            for item in items {
                if writes.send(WriteStreamRequest { item: Some(item) }).await.is_err() {
                    return;
                }
            }
        })
    }

    async fn next(&mut self) -> Result<Option<WriteStreamResponse>, Status> {
        let next = timeout(SOON, self.answers.message()).await;
        next.expect("the stream is neither answered nor ended")
    }

    /// The answer to the write of this number.
    async fn outcome(&mut self, number: u64) -> Result<Written, Failure> {
        let answer = self.next().await.expect("the stream goes on").expect("an answer");
        assert_eq!(answer.number, number, "answers are in order");
        outcome_of(answer.result)
    }

    async fn assert_ends(&mut self) {
        assert_eq!(self.next().await.expect("it ends in order"), None);
    }
}

fn outcome_of(result: Option<WriteResult>) -> Result<Written, Failure> {
    match result.and_then(|result| result.outcome) {
        Some(Outcome::Written(written)) => Ok(written),
        Some(Outcome::Failure(failure)) => Err(failure),
        None => panic!("an answer without an outcome"),
    }
}

fn item(client: &Client, key: &str, value: &[u8], mode: Mode) -> WriteItem {
    put(client.put_request(key, value, mode))
}

fn request(item: WriteItem) -> Bytes {
    message(&WriteStreamRequest { item: Some(item) })
}

async fn await_calls_running(gateway: &Gateway, count: f64) {
    until(&format!("{count} calls run"), async || {
        gateway.metric("tidegate_calls_running", &[]).await == count
    })
    .await;
}

/// How many streams ended so.
async fn ended(gateway: &Gateway, code: &str) -> f64 {
    let code = format!("code=\"{code}\"");
    gateway
        .metric("tidegate_calls_total", &["method=\"WriteStream\"", &code])
        .await
}

async fn many_writes_are_answered_in_order(setup: Setup) {
    let gateway = setup.start().await;
    let client = &gateway.client;
    let mode = |index: u64| {
        if index.is_multiple_of(3) {
            Mode::Through
        } else {
            Mode::Behind
        }
    };
    let deleted = |index: u64| index % 7 == 6;
    let items = (0..1_000_u64).map(|index| {
        // A deletion takes the key of the write before it.
        if deleted(index) {
            delete(&(index - 1).to_string(), mode(index))
        } else {
            item(client, &index.to_string(), index.to_string().as_bytes(), mode(index))
        }
    });
    let mut stream = Stream::open(client).await;
    let pouring = stream.pour(items.collect());
    let mut before = 0;
    for number in 1..=1_000 {
        let written = stream.outcome(number).await.expect("written");
        assert!(written.version > 0 && !written.deduplicated);
        if deleted(number - 1) {
            assert!(written.version > before, "the later write of a key is the higher");
        }
        before = written.version;
    }
    stream.assert_ends().await;
    pouring.await.unwrap();
    for index in [0, 1, 4, 500, 998] {
        client
            .assert_everywhere(&index.to_string(), Some(index.to_string().as_bytes()))
            .await;
    }
    for index in [5, 12, 992] {
        client.assert_everywhere(&index.to_string(), None).await;
    }
    until("it is counted once", async || ended(&gateway, "OK").await == 1.0).await;
    await_calls_running(&gateway, 0.0).await;
}

#[tokio::test]
async fn many_writes_are_answered_in_order_embedded() {
    many_writes_are_answered_in_order(Setup::new()).await;
}

#[tokio::test]
async fn many_writes_are_answered_in_order_by_postgres_and_redis() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    many_writes_are_answered_in_order(Setup::new().store(database.url()).redis(&redis.url())).await;
}

async fn the_last_of_many_writes_of_a_key_stands(setup: Setup) {
    let gateway = setup.start().await;
    let client = &gateway.client;
    let modes = [Mode::Through, Mode::Behind, Mode::Behind, Mode::Through, Mode::Behind];
    let items = (0..900_usize).map(|index| {
        let (key, value) = (format!("key{}", index % 3), index.to_string());
        item(client, &key, value.as_bytes(), modes[index % modes.len()])
    });
    let mut stream = Stream::open(client).await;
    stream.pour(items.collect());
    let mut versions = [0; 3];
    for number in 1..=900 {
        let written = stream.outcome(number).await.expect("written");
        let before = &mut versions[(number as usize - 1) % 3];
        assert!(
            written.version > *before,
            "write {number} came later than the one before it"
        );
        *before = written.version;
    }
    stream.assert_ends().await;
    for (key, value) in [("key0", b"897"), ("key1", b"898"), ("key2", b"899")] {
        client.assert_everywhere(key, Some(value)).await;
    }
}

#[tokio::test]
async fn the_last_of_many_writes_of_a_key_stands_embedded() {
    the_last_of_many_writes_of_a_key_stands(Setup::new()).await;
}

#[tokio::test]
async fn the_last_of_many_writes_of_a_key_stands_in_postgres_and_redis() {
    let (database, redis) = (Database::postgres().await, redis::start().await);
    the_last_of_many_writes_of_a_key_stands(Setup::new().store(database.url()).redis(&redis.url())).await;
}

#[tokio::test]
async fn writes_of_other_keys_go_on_while_one_key_is_held() {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config("[rpc]\ndeadline_default = \"1m\"\n[store]\ncall_timeout = \"2m\"")
        .start()
        .await;
    let client = &gateway.client;
    let hold = database.hold_namespace("held").await;
    let mut stream = Stream::open(client).await;
    stream
        .send(item(&client.namespace("held"), "key", b"1", Mode::Through))
        .await;
    database.await_waiting(1).await;
    // The second of the key must wait for the first, though it could be accepted at once; the others are written.
    stream
        .send(item(&client.namespace("held"), "key", b"2", Mode::Behind))
        .await;
    stream.send(item(client, "free", b"free", Mode::Behind)).await;
    eventually("the free one is there", SOON, async || {
        let value = client
            .value("free", tidegate::rpc::proto::ReadConsistency::Cached)
            .await;
        expect(value.as_deref() == Some(&b"free"[..]), value)
    })
    .await;
    assert_eq!(gateway.metric("tidegate_queue_accepted_writes_total", &[]).await, 1.0);
    hold.release().await;
    for number in 1..=3 {
        stream.outcome(number).await.expect("written");
    }
    client.namespace("held").assert_everywhere("key", Some(b"2")).await;
}

#[tokio::test]
async fn what_is_invalid_is_answered_and_the_stream_goes_on() {
    let database = Database::sqlite();
    let gateway = Setup::new().store(database.url()).start().await;
    let client = &gateway.client;
    let mut stream = Stream::open(client).await;
    stream.send(item(client, "", b"value", Mode::Through)).await;
    stream.send(WriteItem::default()).await;
    let large = vec![0; 1024 * 1024 + 1];
    stream.send(item(client, "large", &large, Mode::Behind)).await;
    stream.writes.send(WriteStreamRequest { item: None }).await.unwrap();
    stream.send(item(client, "good", b"good", Mode::Through)).await;
    for (number, field) in [(1, "key"), (2, ""), (3, "value"), (4, "item")] {
        let failure = stream.outcome(number).await.expect_err("it is at fault");
        assert_eq!(
            (failure.code, failure.reason.as_str()),
            (Code::InvalidArgument as i32, "INVALID")
        );
        let named: Vec<&str> = failure
            .violations
            .iter()
            .map(|violation| violation.field.as_str())
            .collect();
        assert_eq!(named, [field]);
        assert!(!failure.unknown && failure.message.contains(field), "{failure:?}");
    }
    stream.outcome(5).await.expect("the stream goes on");
    assert_eq!(database.records("orders").await, ["good"]);
}

/// Reads the answers of a body.
fn answers(answer: &Answer) -> Vec<WriteStreamResponse> {
    let (mut body, mut answers) = (answer.body.clone(), Vec::new());
    while !body.is_empty() {
        let length = u32::from_be_bytes(body[1..5].try_into().unwrap()) as usize;
        answers.push(WriteStreamResponse::decode(body.slice(5..5 + length)).unwrap());
        body = body.slice(5 + length..);
    }
    answers
}

#[tokio::test]
async fn what_is_no_message_ends_the_stream_after_what_came_before() {
    let database = Database::sqlite();
    let gateway = Setup::new().store(database.url()).start().await;
    let wire = Wire::connect(gateway.address).await;
    let good = request(item(&gateway.client, "key", b"value", Mode::Through));
    // An item, of a Put, with a key that is not UTF-8.
    let text = b"\x0a\x06\x0a\x04\x12\x02\xc3\x28";
    for (what, bad, code, reason) in [
        (
            "no message",
            frame(0, 2, &[0x0a, 0xff]),
            Code::InvalidArgument,
            "INVALID",
        ),
        ("no text", frame(0, text.len(), text), Code::InvalidArgument, "INVALID"),
        ("half a message", good.slice(..9), Code::InvalidArgument, "INVALID"),
        ("half a prefix", good.slice(..3), Code::InvalidArgument, "INVALID"),
        ("no such flag", frame(7, 0, b""), Code::InvalidArgument, "INVALID"),
        (
            "4 GiB announced",
            frame(0, u32::MAX as usize, b""),
            Code::ResourceExhausted,
            "TOO_LARGE",
        ),
    ] {
        let body = [good.as_ref(), &good, &bad].concat();
        let answer = wire.call(WRITE_STREAM, &[], body.into()).await;
        let status = answer.status.clone().expect("a status");
        assert_do_not_come_back(&status, code, reason);
        assert_eq!(outcome(&status), "not_applied", "{what}");
        if what == "no text" {
            assert!(status.message().contains("key"), "{status:?}");
        }
        let numbers: Vec<u64> = answers(&answer).iter().map(|answer| answer.number).collect();
        assert_eq!(numbers, [1, 2], "{what}: all before it is answered");
    }
    // No message at all is no mistake.
    let answer = wire.call(WRITE_STREAM, &[], Bytes::new()).await;
    assert_eq!(answer.code(), Some(Code::Ok), "{answer:?}");
}

/// A client that has room for very few answers that it has not read.
async fn narrow(gateway: &Gateway) -> GatewayClient<tonic::transport::Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", gateway.address)).unwrap();
    let channel = endpoint.initial_stream_window_size(1_024).connect().await;
    GatewayClient::new(channel.expect("it accepts"))
}

/// 10,000 writes of ten MB in all: more than what the network between holds.
const FLOOD: u64 = 10_000;

/// Far more than a stream may have under way, its answers and what carries them included; and far less than the flood.
const STOPPED: f64 = 5_000.0;

fn flood(client: &Client) -> Vec<WriteItem> {
    let item = |index: u64| item(client, &index.to_string(), &[b'x'; 1_000], Mode::Behind);
    (0..FLOOD).map(item).collect()
}

async fn accepted(gateway: &Gateway) -> f64 {
    gateway.metric("tidegate_queue_accepted_writes_total", &[]).await
}

/// Waits until nothing more is read from a stream whose answers nobody reads.
async fn await_stopped(gateway: &Gateway) -> f64 {
    let (mut before, mut same) = (0.0, 0);
    eventually("nothing more is read", SOON, async || {
        sleep(Duration::from_millis(200)).await;
        let now = accepted(gateway).await;
        same = if now == before && now > 0.0 { same + 1 } else { 0 };
        before = now;
        expect(same >= 5, (same, now))
    })
    .await;
    before
}

#[tokio::test]
async fn a_client_that_reads_late_loses_nothing() {
    let gateway = Setup::new().start().await;
    let mut stream = Stream::of(narrow(&gateway).await).await;
    let pouring = stream.pour(flood(&gateway.client));
    let stopped = await_stopped(&gateway).await;
    assert!(stopped < STOPPED, "{stopped} were taken while nobody read");
    assert!(!pouring.is_finished(), "the client cannot send what is not read");
    for number in 1..=FLOOD {
        stream.outcome(number).await.expect("written");
    }
    stream.assert_ends().await;
    assert_eq!(accepted(&gateway).await, FLOOD as f64);
}

#[tokio::test]
async fn a_client_that_never_reads_loses_the_stream() {
    let gateway = Setup::new().config("[rpc]\nstream_unread_max = \"1s\"").start().await;
    let stub = narrow(&gateway).await;
    let mut stream = Stream::of(stub.clone()).await;
    let pouring = stream.pour(flood(&gateway.client));
    await_calls_running(&gateway, 1.0).await;
    // Its call is over, and nothing is left of it, though the client reads nothing and its connection stays.
    await_calls_running(&gateway, 0.0).await;
    timeout(SOON, pouring).await.expect("nobody takes its writes").unwrap();
    let taken = accepted(&gateway).await;
    assert!(0.0 < taken && taken < STOPPED, "{taken} were taken while nobody read");
    let mut number = 0;
    let end = loop {
        match stream.next().await {
            Ok(Some(answer)) => {
                number += 1;
                assert_eq!(answer.number, number);
            }
            other => break other,
        }
    };
    assert!(end.is_err(), "it did not end in order: {end:?}");
    assert!(number as f64 <= taken);
    let mut another = Stream::of(stub).await;
    another.send(item(&gateway.client, "key", b"value", Mode::Behind)).await;
    another.outcome(1).await.expect("the connection is served");
}

#[tokio::test]
async fn a_client_that_reads_too_late_is_told_why() {
    let gateway = Setup::new().config("[rpc]\nstream_unread_max = \"1s\"").start().await;
    let mut stream = Stream::of(narrow(&gateway).await).await;
    stream.pour(flood(&gateway.client));
    until("the stream is lost", async || {
        !gateway.said("reads no answers").is_empty()
    })
    .await;
    let mut number = 0;
    let status = loop {
        match stream.next().await {
            Ok(Some(answer)) => {
                number += 1;
                assert_eq!(answer.number, number, "what was answered is there, in order");
            }
            Ok(None) => panic!("not everything was answered"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert_eq!(outcome(&status), "unknown");
    assert!(0 < number && number < FLOOD);
    assert_eq!(ended(&gateway, "RESOURCE_EXHAUSTED").await, 1.0);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_nothing_but_what_was_admitted() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    let hold = database.hold_writes().await;
    let stream = Stream::open(&gateway.client).await;
    stream.send(item(&gateway.client, "key", b"value", Mode::Through)).await;
    // It waits for the first of its key, and so is not admitted.
    stream.send(item(&gateway.client, "key", b"never", Mode::Through)).await;
    database.await_waiting(1).await;
    drop(stream);
    await_calls_running(&gateway, 0.0).await;
    assert_eq!(ended(&gateway, "CANCELLED").await, 1.0);
    hold.release().await;
    database.await_value("orders", "key", b"value").await;
    gateway.client.put("other", b"value", Mode::Through).await.unwrap();
    assert_eq!(database.value("orders", "key").await.as_deref(), Some(&b"value"[..]));
}

#[tokio::test]
async fn a_shutdown_answers_what_was_read() {
    let database = Database::postgres().await;
    let mut gateway = Setup::new()
        .store(database.url())
        .config("[shutdown]\ncalls_wait = \"10m\"\ndrain_wait = \"10m\"")
        .start()
        .await;
    let mut idle = Stream::open(&gateway.client).await;
    let mut stream = Stream::open(&gateway.client).await;
    let hold = database.hold_writes().await;
    for index in 0..5 {
        stream
            .send(item(&gateway.client, &index.to_string(), b"value", Mode::Through))
            .await;
    }
    // One that is known to be accepted, behind the others, shows that they were read.
    stream.send(item(&gateway.client, "last", b"value", Mode::Behind)).await;
    until("all are read", async || accepted(&gateway).await == 1.0).await;
    gateway.terminate();
    // An idle stream is ended at once.
    let status = idle.next().await.expect_err("the gateway stops");
    assert_eq!(
        (status.code(), outcome(&status).as_str()),
        (Code::Unavailable, "not_applied")
    );
    hold.release().await;
    for number in 1..=6 {
        stream
            .outcome(number)
            .await
            .expect("it was read, and so it is finished");
    }
    let status = stream.next().await.expect_err("the gateway stops");
    assert_eq!(
        (status.code(), outcome(&status).as_str()),
        (Code::Unavailable, "not_applied")
    );
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert_eq!(database.records("orders").await, ["0", "1", "2", "3", "4", "last"]);
}

#[tokio::test]
async fn a_stream_that_nobody_reads_does_not_hold_a_shutdown_for_ever() {
    let mut gateway = Setup::new().config("[shutdown]\ncalls_wait = \"1s\"").start().await;
    let mut stream = Stream::of(narrow(&gateway).await).await;
    stream.pour(flood(&gateway.client));
    await_stopped(&gateway).await;
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    assert!(exit.log.contains("cut off calls"), "it says so: {}", exit.log);
}

#[tokio::test]
async fn each_write_has_its_own_deadline_and_the_stream_none() {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config("[store]\ncall_timeout = \"2m\"\n[rpc]\ndeadline_default = \"3s\"\ndeadline_max = \"3s\"")
        .start()
        .await;
    let hold = database.hold_writes().await;
    let mut stream = Stream::open(&gateway.client).await;
    stream.send(item(&gateway.client, "key", b"1", Mode::Through)).await;
    let failure = stream.outcome(1).await.expect_err("the store is held");
    assert_eq!(
        (failure.code, failure.reason.as_str()),
        (Code::DeadlineExceeded as i32, "TIMEOUT")
    );
    assert!(failure.unknown, "it may still be written: {failure:?}");
    hold.release().await;
    database.await_value("orders", "key", b"1").await;
    // Longer than any call may take.
    sleep(Duration::from_millis(3_200)).await;
    stream.send(item(&gateway.client, "key", b"2", Mode::Behind)).await;
    stream.outcome(2).await.expect("the stream goes on");
}

#[tokio::test]
async fn a_stream_ends_at_the_deadline_of_its_client() {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config("[store]\ncall_timeout = \"2m\"\n[rpc]\ndeadline_default = \"1m\"")
        .start()
        .await;
    let hold = database.hold_writes().await;
    let wire = Wire::connect(gateway.address).await;
    let body = request(item(&gateway.client, "key", b"value", Mode::Through));
    let headers = [("grpc-timeout", "2S")];
    let (answer, ()) = tokio::join!(wire.call(WRITE_STREAM, &headers, body), database.await_waiting(1));
    let status = answer.status.clone().expect("a status");
    assert_do_not_come_back(&status, Code::DeadlineExceeded, "TIMEOUT");
    assert_eq!(outcome(&status), "unknown");
    assert_eq!(answers(&answer), []);
    hold.release().await;
    database.await_value("orders", "key", b"value").await;
}

/// Sends bytes for as long as they are taken.
async fn trickle(mut sender: SendStream<Bytes>, bytes: &'static [u8]) {
    for byte in bytes.chunks(1) {
        if sender.send_data(Bytes::from_static(byte), false).is_err() {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    std::future::pending().await
}

#[tokio::test]
async fn a_stream_that_sends_nothing_whole_is_ended() {
    let gateway = Setup::new().config("[rpc]\nstream_idle_max = \"1s\"").start().await;
    let mut silent = Stream::open(&gateway.client).await;
    let status = silent.next().await.expect_err("it is idle");
    assert_do_not_come_back(&status, Code::DeadlineExceeded, "TIMEOUT");
    assert_eq!(outcome(&status), "not_applied");
    // A prefix that announces 1,000 bytes, which come one by one.
    static BYTES: [u8; 1_005] = {
        let mut bytes = [0; 1_005];
        (bytes[3], bytes[4]) = (3, 0xe8);
        bytes
    };
    let wire = Wire::connect(gateway.address).await;
    let (sender, response) = wire.begin(WRITE_STREAM).await;
    let answer = tokio::select! {
        answer = timeout(SOON, answer(response)) => answer.expect("it is ended").expect("in order"),
        () = trickle(sender, &BYTES) => panic!("it never ends"),
    };
    let status = answer.status.expect("a status");
    assert_do_not_come_back(&status, Code::DeadlineExceeded, "TIMEOUT");
    await_calls_running(&gateway, 0.0).await;
}
