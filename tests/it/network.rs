//! Proves that the network of the harness breaks as it is told to, and in no other way: what the tests of outages take for granted.

use std::{io::ErrorKind, time::Duration};

use redis::AsyncCommands;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{Instant, timeout},
};

use crate::harness::{
    SOON, postgres,
    proxy::{Passage, Proxy},
    redis as redis_server,
};

/// How long a thing is waited for that must not come. Too short proves less, and never fails for it.
const NEVER: Duration = Duration::from_millis(150);

/// A server that answers each byte with itself, behind a network; and what came to it.
struct Echo {
    proxy: Proxy,
    heard: mpsc::Receiver<u8>,
}

impl Echo {
    async fn start() -> Echo {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap().to_string();
        let (sender, heard) = mpsc::channel(100);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let sender = sender.clone();
                tokio::spawn(async move {
                    while let Ok(byte) = stream.read_u8().await {
                        sender.send(byte).await.unwrap();
                        if stream.write_u8(byte).await.is_err() {
                            break;
                        }
                    }
                    // Heard too: the end.
                    sender.send(0).await.unwrap();
                });
            }
        });
        Echo {
            proxy: Proxy::start(&server).await,
            heard,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.proxy.address()).await.unwrap()
    }

    /// A connection that has been answered once.
    async fn used(&mut self) -> TcpStream {
        let mut stream = self.connect().await;
        assert_eq!(ask(&mut stream, 1).await.unwrap(), 1);
        assert_eq!(self.hear().await, 1);
        stream
    }

    async fn hear(&mut self) -> u8 {
        timeout(SOON, self.heard.recv()).await.unwrap().unwrap()
    }

    async fn assert_silence(&mut self) {
        let heard = timeout(NEVER, self.heard.recv()).await;
        assert!(heard.is_err(), "the server heard {heard:?}");
    }
}

async fn ask(stream: &mut TcpStream, byte: u8) -> std::io::Result<u8> {
    stream.write_u8(byte).await?;
    timeout(SOON, stream.read_u8()).await.unwrap()
}

async fn assert_unanswered(stream: &mut TcpStream) {
    let answer = timeout(NEVER, stream.read_u8()).await;
    assert!(answer.is_err(), "it is answered {answer:?}");
}

/// Asserts that a connection has ended, or ends, and for which reason: ended in order, or reset.
async fn assert_ended(stream: &mut TcpStream, reasons: &[ErrorKind]) {
    let ended = timeout(SOON, stream.read_u8()).await.unwrap().unwrap_err();
    assert!(reasons.contains(&ended.kind()), "{ended:?}");
}

#[tokio::test]
async fn cut_ends_what_is_and_what_comes() {
    let mut echo = Echo::start().await;
    let mut old = echo.used().await;
    echo.proxy.cut();
    assert_ended(&mut old, &[ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset]).await;
    let mut new = echo.connect().await;
    assert_ended(&mut new, &[ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset]).await;
    assert_eq!(echo.hear().await, 0);
    echo.proxy.restore();
    echo.used().await;
}

#[tokio::test]
async fn a_hole_keeps_connections_and_loses_what_is_sent() {
    let mut echo = Echo::start().await;
    let (mut asking, mut silent) = (echo.used().await, echo.used().await);
    echo.proxy.set(Passage::Hole);
    let mut new = echo.connect().await;
    for stream in [&mut asking, &mut new] {
        stream.write_u8(2).await.unwrap();
        assert_unanswered(stream).await;
    }
    echo.assert_silence().await;
    echo.proxy.restore();
    // Something is missing on these two, and nothing on the third.
    for stream in [&mut asking, &mut new] {
        assert_ended(stream, &[ErrorKind::ConnectionReset]).await;
    }
    assert_eq!(ask(&mut silent, 3).await.unwrap(), 3);
}

#[tokio::test]
async fn a_hole_swallows_the_end_of_a_connection() {
    let mut echo = Echo::start().await;
    let stream = echo.used().await;
    echo.proxy.set(Passage::Hole);
    drop(stream);
    echo.assert_silence().await;
    echo.proxy.restore();
    assert_eq!(echo.hear().await, 0);
}

#[tokio::test]
async fn what_was_held_arrives_late_and_whole() {
    let mut echo = Echo::start().await;
    let mut old = echo.used().await;
    echo.proxy.set(Passage::Held);
    let mut new = echo.connect().await;
    old.write_all(&[2, 3]).await.unwrap();
    new.write_u8(4).await.unwrap();
    // Its caller has given up, and what it asked for happens all the same.
    drop(new);
    assert_unanswered(&mut old).await;
    echo.assert_silence().await;
    echo.proxy.restore();
    let mut answer = [0; 2];
    timeout(SOON, old.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, [2, 3]);
    let mut heard = Vec::new();
    while heard.len() < 4 {
        heard.push(echo.hear().await);
    }
    heard.sort_unstable();
    assert_eq!(heard, [0, 2, 3, 4], "with the end of the second connection");
}

#[tokio::test]
async fn lost_answers_leave_the_effect_and_end_the_connection() {
    let mut echo = Echo::start().await;
    let mut old = echo.used().await;
    echo.proxy.set(Passage::AnswersLost);
    let mut new = echo.connect().await;
    for (stream, byte) in [(&mut old, 2), (&mut new, 3)] {
        stream.write_u8(byte).await.unwrap();
        assert_eq!(echo.hear().await, byte);
        assert_ended(stream, &[ErrorKind::ConnectionReset]).await;
        assert_eq!(echo.hear().await, 0, "the server is told of the end");
    }
    echo.proxy.restore();
    echo.used().await;
}

#[tokio::test]
async fn a_reset_ends_what_is_at_once_and_spares_what_comes() {
    let mut echo = Echo::start().await;
    let mut old = echo.used().await;
    echo.proxy.reset();
    assert_ended(&mut old, &[ErrorKind::ConnectionReset]).await;
    assert_eq!(echo.hear().await, 0);
    echo.used().await;
}

#[tokio::test]
async fn each_way_has_its_delay() {
    let mut echo = Echo::start().await;
    let mut stream = echo.used().await;
    let (requests, answers) = (Duration::from_millis(60), Duration::from_millis(40));
    echo.proxy.delay(requests, answers);
    let sent = Instant::now();
    stream.write_u8(2).await.unwrap();
    assert_eq!(echo.hear().await, 2);
    assert!(sent.elapsed() >= requests);
    assert_eq!(timeout(SOON, stream.read_u8()).await.unwrap().unwrap(), 2);
    assert!(sent.elapsed() >= requests + answers);
    echo.proxy.restore();
    assert_eq!(ask(&mut stream, 3).await.unwrap(), 3);
}

#[tokio::test]
async fn a_connection_ends_in_halves_as_its_ends_do() {
    let mut echo = Echo::start().await;
    let mut stream = echo.used().await;
    stream.write_u8(2).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(echo.hear().await, 2);
    assert_eq!(echo.hear().await, 0);
    assert_eq!(timeout(SOON, stream.read_u8()).await.unwrap().unwrap(), 2);
    assert_ended(&mut stream, &[ErrorKind::UnexpectedEof]).await;
}

#[tokio::test]
async fn servers_can_be_reached_through_it_by_their_urls() {
    let server = redis_server::start().await;
    let (_proxy, url) = Proxy::before(&server.url()).await;
    let client = redis::Client::open(url).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let long = vec![7_u8; 3 << 20];
    let _: () = connection.set("key", &long).await.unwrap();
    assert!(connection.get::<_, Vec<u8>>("key").await.unwrap() == long);

    let (proxy, url) = Proxy::before(&postgres::database().await).await;
    let mut connection = postgres::connect(&url).await;
    let one = sqlx::query_scalar::<_, i32>("select 1");
    assert_eq!(one.fetch_one(&mut connection).await.unwrap(), 1);
    proxy.cut();
    let one = sqlx::query_scalar::<_, i32>("select 1");
    assert!(one.fetch_one(&mut connection).await.is_err());
}
