//! Proves that a peer can make the gateway hold only so much: connections, calls on each of them, and the time of one that says nothing.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::Code;

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup, until,
    wire::{Wire, message},
};

/// What an HTTP/2 client says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The kinds of frames that are told apart here.
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;

const REFUSED_STREAM: [u8; 4] = 7_u32.to_be_bytes();
const MAX_CONCURRENT_STREAMS: [u8; 2] = 3_u16.to_be_bytes();

/// An HTTP/2 connection of single frames, by whoever ignores what the other side allows.
struct Frames(TcpStream);

/// A frame that came.
#[derive(Debug)]
struct Frame {
    kind: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Frames {
    /// Connects and says hello.
    async fn connect(gateway: &Gateway) -> Frames {
        let mut stream = TcpStream::connect(gateway.address).await.expect("the system accepts");
        stream.write_all(PREFACE).await.expect("there is room");
        let mut frames = Frames(stream);
        frames.send(SETTINGS, 0, 0, &[]).await;
        frames
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        // A connection that was refused says so when it is read.
        let _ = self.0.write_all(&frame).await;
    }

    /// The next frame; `None` once the connection has ended.
    async fn next(&mut self) -> Option<Frame> {
        let frame = async {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await?;
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            self.0.read_exact(&mut payload).await?;
            std::io::Result::Ok(Frame {
                kind: head[3],
                stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
                payload,
            })
        };
        timeout(SOON, frame)
            .await
            .expect("the connection is neither served nor ended")
            .ok()
    }

    async fn next_of(&mut self, kind: u8) -> Frame {
        loop {
            let frame = self.next().await.expect("the connection is served");
            if frame.kind == kind {
                return frame;
            }
        }
    }

    /// Waits until a call is answered.
    async fn answered(&mut self, stream: u32) {
        while self.next_of(HEADERS).await.stream != stream {}
    }

    /// Begins a call to Get, and leaves its message to be sent.
    async fn begin_call(&mut self, stream: u32) {
        // POST and http from the static table; the rest literal, with an indexed name where there is one.
        let mut block = vec![0x83, 0x86];
        for (name, value) in [
            (&[0x04][..], "/tidegate.v1.Gateway/Get"),
            (&[0x01], "localhost"),
            (&[0x0f, 0x10], "application/grpc"),
            (b"\x00\x02te", "trailers"),
        ] {
            block.extend(name);
            block.push(u8::try_from(value.len()).expect("short"));
            block.extend(value.as_bytes());
        }
        const END_HEADERS: u8 = 4;
        self.send(HEADERS, END_HEADERS, stream, &block).await;
    }

    /// Sends the message of a call that was begun, and ends it.
    async fn end_call(&mut self, stream: u32) {
        const DATA: u8 = 0;
        const END_STREAM: u8 = 1;
        let request = tidegate::rpc::proto::GetRequest {
            namespace: "orders".into(),
            key: "key".into(),
            ..Default::default()
        };
        self.send(DATA, END_STREAM, stream, &message(&request)).await;
    }
}

/// Waits until the other side ends a connection, in order or not.
async fn await_end(stream: &mut (impl AsyncReadExt + Unpin)) {
    let mut said = Vec::new();
    let ended = timeout(SOON, stream.read_to_end(&mut said)).await;
    assert!(ended.is_ok(), "the connection is held open");
    assert!(said.is_empty(), "nothing was asked: {said:?}");
}

#[tokio::test]
async fn a_connection_that_does_not_begin_is_closed() {
    let gateway = Setup::new().start().await;
    let mut silent = TcpStream::connect(gateway.address).await.unwrap();
    let dribbling = TcpStream::connect(gateway.address).await.unwrap();
    let (mut dribbling, mut drops) = dribbling.into_split();
    // So slowly that its preface is not complete when we stop waiting.
    let dribble = async {
        for byte in PREFACE {
            if drops.write_all(&[*byte]).await.is_err() {
                return;
            }
            sleep(Duration::from_secs(2)).await;
        }
    };
    let both_end = async { tokio::join!(await_end(&mut silent), await_end(&mut dribbling)) };
    tokio::select! {
        _ = both_end => {}
        () = async { dribble.await; std::future::pending().await } => {}
    }
    // One that has begun may be silent for as long.
    gateway.client.read("key").await;
}

#[tokio::test]
async fn one_connection_too_many_is_closed_at_once() {
    let gateway = Setup::new().config("[rpc]\nconnections_max = 3").start().await;
    // Beside the client's own.
    let mut first = Frames::connect(&gateway).await;
    first.next_of(SETTINGS).await;
    let mut second = Frames::connect(&gateway).await;
    second.next_of(SETTINGS).await;
    let mut third = Frames::connect(&gateway).await;
    assert!(third.next().await.is_none(), "there are as many as may be");
    assert_eq!(gateway.said("refused a connection").len(), 1);
    gateway.client.read("key").await;
    drop(second);
    until("there is room again", async || {
        Frames::connect(&gateway).await.next().await.is_some()
    })
    .await;
    first.begin_call(1).await;
    first.end_call(1).await;
    // The others are served.
    first.answered(1).await;
}

#[tokio::test]
async fn one_call_too_many_on_a_connection_is_refused_and_the_others_answered() {
    let gateway = Setup::new().config("[rpc]\nstreams_max = 2").start().await;
    let mut frames = Frames::connect(&gateway).await;
    let settings = frames.next_of(SETTINGS).await.payload;
    let allowed = settings
        .chunks(6)
        .find(|setting| setting[..2] == MAX_CONCURRENT_STREAMS);
    assert_eq!(allowed.map(|setting| &setting[2..]), Some(&2_u32.to_be_bytes()[..]));
    for stream in [1, 3, 5] {
        frames.begin_call(stream).await;
    }
    let refused = frames.next_of(RST_STREAM).await;
    assert_eq!((refused.stream, refused.payload), (5, REFUSED_STREAM.to_vec()));
    for stream in [3, 1] {
        frames.end_call(stream).await;
        frames.answered(stream).await;
    }
    // There is room again.
    frames.begin_call(7).await;
    frames.end_call(7).await;
    frames.answered(7).await;
}

#[tokio::test]
async fn who_keeps_to_the_limit_of_calls_waits_for_a_place() {
    let database = Database::postgres().await;
    let gateway = Setup::new()
        .store(database.url())
        .config("[rpc]\nstreams_max = 2\ndeadline_default = \"1m\"")
        .start()
        .await;
    // An answer shows that the client knows the limit: before, it may begin more calls than it is allowed.
    gateway.client.read("key").await;
    let hold = database.hold_writes().await;
    let mut writes = JoinSet::new();
    for index in 0..10 {
        let client = gateway.client.clone();
        writes.spawn(async move { client.put(&index.to_string(), b"value", Mode::Through).await });
    }
    database.await_waiting(1).await;
    until("as many are under way as may be", async || {
        gateway.metric("tidegate_calls_running", &[]).await == 2.0
    })
    .await;
    // Another connection has places of its own.
    let wire = Wire::connect(gateway.address).await;
    let request = gateway.client.put_request("behind", b"value", Mode::Behind);
    let answer = wire.call("/tidegate.v1.Gateway/Put", &[], message(&request)).await;
    assert_eq!(answer.code(), Some(Code::Ok), "{answer:?}");
    assert_eq!(gateway.metric("tidegate_calls_running", &[]).await, 2.0);
    hold.release().await;
    while let Some(write) = writes.join_next().await {
        write.unwrap().expect("each has its turn");
    }
    gateway.drained().await;
    assert_eq!(database.entries().await, 11);
}
