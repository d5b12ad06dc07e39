//! A client without a stub: sends whatever bytes a test likes over HTTP/2, as no generated client would.

use std::net::SocketAddr;

use bytes::{BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use http::{HeaderMap, Request};
use tokio::{net::TcpStream, time::timeout};
use tonic::{Code, Status};

use super::SOON;

/// One HTTP/2 connection.
pub struct Wire {
    requests: SendRequest<Bytes>,
    address: SocketAddr,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub http_status: u16,
    /// The status of the call, wherever it stood.
    pub status: Option<Status>,
    /// The bytes of the answer.
    pub body: Bytes,
}

impl Answer {
    pub fn code(&self) -> Option<Code> {
        self.status.as_ref().map(Status::code)
    }
}

/// A message as gRPC frames it: a flag that says whether it is compressed, its length, itself.
pub fn frame(compressed: u8, length: usize, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(compressed);
    frame.put_u32(length.try_into().expect("a length of a test fits"));
    frame.put_slice(message);
    frame.freeze()
}

/// A message framed as it should be.
pub fn message(message: &impl prost::Message) -> Bytes {
    let bytes = message.encode_to_vec();
    frame(0, bytes.len(), &bytes)
}

impl Wire {
    pub async fn connect(address: SocketAddr) -> Wire {
        Wire::connect_with_room(address, 65_535).await
    }

    /// One that has room for so many bytes of an answer that it has not read.
    pub async fn connect_with_room(address: SocketAddr, bytes: u32) -> Wire {
        let stream = TcpStream::connect(address).await.expect("the gateway accepts");
        let mut builder = h2::client::Builder::new();
        let handshake = builder.initial_window_size(bytes).handshake(stream);
        let (requests, connection) = handshake.await.expect("it speaks HTTP/2");
        tokio::spawn(connection);
        Wire { requests, address }
    }

    /// Posts a body to a path, with `headers` besides those that gRPC needs (or in their stead), and waits for the end of the answer.
    pub async fn call(&self, path: &str, headers: &[(&str, &str)], body: Bytes) -> Answer {
        let exchange = self.exchange(path, headers, body);
        timeout(SOON, exchange)
            .await
            .unwrap_or_else(|_| panic!("{path} is not answered"))
            .unwrap_or_else(|error| panic!("{path} broke off: {error}"))
    }

    fn request(&self, path: &str) -> Request<()> {
        Request::post(format!("http://{}{path}", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("a request of a test is well-formed")
    }

    /// Begins a call whose body is sent bit by bit.
    pub async fn begin(&self, path: &str) -> (h2::SendStream<Bytes>, ResponseFuture) {
        let request = self.request(path);
        let mut requests = self.requests.clone().ready().await.expect("the connection is open");
        let (response, sender) = requests.send_request(request, false).expect("there is a place");
        (sender, response)
    }

    async fn exchange(&self, path: &str, headers: &[(&str, &str)], body: Bytes) -> Result<Answer, h2::Error> {
        let mut request = self.request(path);
        for &(name, value) in headers {
            let name: http::HeaderName = name.parse().expect("a header of a test is well-formed");
            let value = value.parse().expect("a header of a test is well-formed");
            request.headers_mut().insert(name, value);
        }
        let mut requests = self.requests.clone().ready().await?;
        let (response, mut sender) = requests.send_request(request, body.is_empty())?;
        if !body.is_empty() {
            send(&mut sender, body).await?;
        }
        answer(response).await
    }
}

/// The whole answer to a call.
pub async fn answer(response: ResponseFuture) -> Result<Answer, h2::Error> {
    let (head, mut stream) = response.await?.into_parts();
    let mut received = BytesMut::new();
    while let Some(chunk) = stream.data().await {
        let chunk = chunk?;
        stream.flow_control().release_capacity(chunk.len())?;
        received.extend_from_slice(&chunk);
    }
    let trailers: Option<HeaderMap> = stream.trailers().await?;
    Ok(Answer {
        http_status: head.status.as_u16(),
        status: trailers
            .as_ref()
            .and_then(Status::from_header_map)
            .or_else(|| Status::from_header_map(&head.headers)),
        body: received.freeze(),
    })
}

/// Sends what is to be one frame, once the other side has room for it whole. Whether it goes on.
pub async fn send_frame(sender: &mut h2::SendStream<Bytes>, frame: Bytes) -> bool {
    sender.reserve_capacity(frame.len());
    while sender.capacity() < frame.len() {
        let granted = std::future::poll_fn(|context| sender.poll_capacity(context)).await;
        if !matches!(granted, Some(Ok(_))) {
            return false;
        }
    }
    sender.send_data(frame, false).is_ok()
}

/// Sends the body as fast as the other side takes it, and stops when it has heard enough and resets the stream.
async fn send(sender: &mut h2::SendStream<Bytes>, mut body: Bytes) -> Result<(), h2::Error> {
    while !body.is_empty() {
        sender.reserve_capacity(body.len());
        let granted = std::future::poll_fn(|context| sender.poll_capacity(context)).await;
        let Some(Ok(granted)) = granted else {
            return Ok(());
        };
        let last = granted >= body.len();
        if sender.send_data(body.split_to(granted.min(body.len())), last).is_err() {
            return Ok(());
        }
    }
    Ok(())
}
