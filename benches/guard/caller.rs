//! One HTTP/2 connection that calls one at a time.
//!
//! Owns that every call reaches the gateway in one piece, headers and message: Nagle's algorithm would hold back what is sent second, and a
//! window that fills up would add frames of its own.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use http::Request;
use tokio::{net::TcpStream, time::timeout};
use tonic::Code;

use crate::{
    Failure,
    harness::{SOON, wire::answer},
};

/// More than all answers of a run.
const WINDOW_BYTES: u32 = 1 << 30;
/// What gRPC puts before a message.
const PREFIX_BYTES: usize = 5;

/// A connected client.
pub struct Caller {
    requests: SendRequest<Bytes>,
    address: SocketAddr,
}

impl Caller {
    /// Connects.
    pub async fn connect(address: SocketAddr) -> Result<Caller, Failure> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut builder = Builder::new();
        builder
            .initial_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        let (requests, connection) = builder.handshake(stream).await?;
        tokio::spawn(connection);
        Ok(Caller { requests, address })
    }

    /// Calls a method with a message in its frame. The message of the answer.
    ///
    /// # Errors
    /// The call was not OK, or took too long.
    pub async fn call(&self, path: &str, body: Bytes) -> Result<Bytes, Failure> {
        let exchange = self.exchange(path, body);
        timeout(3 * SOON, exchange)
            .await
            .map_err(|_| format!("{path} is not answered"))?
    }

    async fn exchange(&self, path: &str, body: Bytes) -> Result<Bytes, Failure> {
        let request = Request::post(format!("http://{}{path}", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let mut requests = self.requests.clone().ready().await?;
        let (response, mut sender) = requests.send_request(request, false)?;
        sender.send_data(body, true)?;
        let mut answer = answer(response).await?;
        if answer.code() != Some(Code::Ok) || answer.body.len() < PREFIX_BYTES {
            return Err(format!("{path}: {:?}", answer.status).into());
        }
        Ok(answer.body.split_off(PREFIX_BYTES))
    }
}
