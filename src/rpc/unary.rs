//! One message in, one message out: the calls of `tidegate.v1.Gateway` but for its stream.
//!
//! Owns the framing of such a call on both sides. Does not own what is asked or answered (`service`), nor how the answer's bytes are handed to
//! HTTP/2 (`router`). It stands in the place of tonic's own stack, which takes streams, compression and interceptors into account,
//! and for that boxes the body, the call and the answer, and copies the message into a buffer of its own first
//! (docs/decisions/0022-unary-calls-on-hyper.md has the figures). Invariants: a request that is not exactly one whole message within
//! its bound changes nothing; nothing but a refusal is answered before the request has ended, for HTTP/2 would have to reset it.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response, header::CONTENT_TYPE};
use hyper::body::Body;
use prost::Message;
use tonic::Status;

use crate::{
    error::{Error, ErrorKind},
    rpc::{arrival::Arrival, codec::undecodable, status::to_status},
};

/// What stands before a message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// In which encoding messages of a request may be compressed; none is offered.
const ENCODING: &str = "grpc-encoding";
const ACCEPT_ENCODING: &str = "grpc-accept-encoding";
const IDENTITY: HeaderValue = HeaderValue::from_static("identity");

/// Reads the message of a request of at most so many bytes, has it handled, and frames what comes of it: the bytes of the answer, or the
/// status that refuses it. Dropped, it drops what handles the message.
pub(crate) async fn unary<Q, A, F>(
    body: Arrival,
    encoding: Option<HeaderValue>,
    message_bytes_max: usize,
    handle: impl FnOnce(Q) -> F,
) -> Result<Bytes, Status>
where
    Q: Message + Default,
    A: Message,
    F: Future<Output = Result<A, Status>>,
{
    let request = match encoding {
        Some(encoding) if encoding != IDENTITY => return Err(not_offered()),
        _ => read(body, message_bytes_max).await?,
    };
    handle(request).await.map(|answer| framed(&answer))
}

/// The encoding of a request's messages.
pub(crate) fn encoding(headers: &HeaderMap) -> Option<HeaderValue> {
    headers.get(ENCODING).cloned()
}

/// The head of an answer that begins with a message.
pub(crate) fn answered<B>(body: B) -> Response<B> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, tonic::metadata::GRPC_CONTENT_TYPE);
    response
}

/// What stands behind an answer's message.
pub(crate) fn ok() -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    trailers
}

async fn read<Q: Message + Default>(mut body: Arrival, message_bytes_max: usize) -> Result<Q, Status> {
    // Mostly all of it comes in one frame, and is decoded where it lies.
    let mut whole = Bytes::new();
    let mut gathered = BytesMut::new();
    while let Some(data) = next_data(&mut body).await? {
        if whole.is_empty() && gathered.is_empty() {
            whole = data;
        } else {
            gathered.extend_from_slice(&std::mem::take(&mut whole));
            gathered.extend_from_slice(&data);
        }
        let length = check(if whole.is_empty() { &gathered } else { &whole }, message_bytes_max)?;
        gathered.reserve(
            length
                .filter(|_| !body.is_end_stream())
                .map_or(0, |length| length.saturating_sub(gathered.len())),
        );
    }
    if whole.is_empty() {
        whole = gathered.freeze();
    }
    match check(&whole, message_bytes_max)? {
        Some(length) if length == whole.len() => {
            whole.advance(PREFIX_BYTES);
            Q::decode(whole).map_err(|error| undecodable(&error))
        }
        _ => Err(broken()),
    }
}

/// How long the message that begins so is with its prefix, as soon as that can be told.
fn check(begun: &[u8], message_bytes_max: usize) -> Result<Option<usize>, Status> {
    let Some((compressed, rest)) = begun.split_first() else {
        return Ok(None);
    };
    if *compressed != 0 {
        return Err(broken());
    }
    let Some(length) = rest.first_chunk() else {
        return Ok(None);
    };
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    if length > message_bytes_max {
        return Err(to_status(too_large(message_bytes_max)));
    }
    let length = PREFIX_BYTES + length;
    // Whatever comes behind the message is no part of such a call.
    if begun.len() > length {
        Err(broken())
    } else {
        Ok(Some(length))
    }
}

/// What comes next of a body, unless it has ended.
async fn next_data(body: &mut Arrival) -> Result<Option<Bytes>, Status> {
    loop {
        if body.is_end_stream() {
            return Ok(None);
        }
        let frame = match poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await {
            None => return Ok(None),
            Some(frame) => frame.map_err(lost)?,
        };
        match frame.into_data() {
            Ok(data) if data.is_empty() => {}
            Ok(data) => return Ok(Some(data)),
            // A client may say something behind its message; nobody asks for it.
            Err(_trailers) => {}
        }
    }
}

/// Why the rest of a body does not come: its deadline, or the end of its connection.
fn lost(error: Box<dyn std::error::Error + Send + Sync>) -> Status {
    match error.downcast::<Status>() {
        Ok(status) => *status,
        Err(_) => broken(),
    }
}

fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX_BYTES + length);
    bytes.put_u8(0);
    // Answers are bounded far below this.
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.encode(&mut bytes).expect("a buffer grows");
    bytes.freeze()
}

pub(crate) fn too_large(message_bytes_max: usize) -> Error {
    Error::new(
        ErrorKind::TooLarge,
        format!("the request is larger than the {message_bytes_max} bytes that this server reads: send less"),
    )
}

fn broken() -> Status {
    to_status(no_message())
}

pub(crate) fn no_message() -> Error {
    Error::new(
        ErrorKind::Invalid,
        "the request is no complete gRPC message: check its length prefix, its compression flag and its encoding",
    )
}

fn not_offered() -> Status {
    let mut status = Status::unimplemented("messages are read uncompressed alone: send them without an encoding");
    let metadata = status.metadata_mut();
    metadata.insert(ACCEPT_ENCODING, tonic::metadata::MetadataValue::from_static("identity"));
    status
}
