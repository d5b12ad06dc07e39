//! The codec of every message: prost, with two differences to tonic's own.
//!
//! Owns the buffer sizes (tonic starts each call with two buffers of 8 KiB, our messages are mostly smaller) and what bytes that
//! are no message are answered with: INVALID_ARGUMENT, for the caller can mend them, where tonic says INTERNAL.

use std::marker::PhantomData;

use prost::{DecodeError, Message};
use tonic::{
    Status,
    codec::{BufferSettings, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstEncoder};

use crate::{
    error::{Error, FieldViolation},
    rpc::status::to_status,
};

const BUFFERS: (usize, usize) = (1024, 32 * 1024);

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFERS.0, BUFFERS.1)
}

/// Encodes `T` and decodes `U`.
#[derive(Debug, Clone)]
pub struct Codec<T, U> {
    messages: PhantomData<(T, U)>,
}

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Codec { messages: PhantomData }
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = MessageDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        MessageDecoder { message: PhantomData }
    }
}

/// Decodes `U`, and blames the sender when it cannot.
#[derive(Debug, Clone)]
pub struct MessageDecoder<U> {
    message: PhantomData<U>,
}

impl<U: Message + Default> Decoder for MessageDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        U::decode(buffer).map(Some).map_err(|error| undecodable(&error))
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

/// The fields that can be at fault by themselves, when their text is not UTF-8.
const TEXT_FIELDS: [&str; 9] = [
    "namespace",
    "key",
    "keys",
    "prefix",
    "tag",
    "tags",
    "request_id",
    "page_token",
    "resume_token",
];

/// prost names the message and the field in its text alone, as `GetRequest.key`.
pub(crate) fn undecodable(error: &DecodeError) -> Status {
    let text = error.to_string();
    let named = TEXT_FIELDS
        .into_iter()
        .find_map(|field| Some((field, text.split_once(&format!(".{field}: "))?.1)));
    let (field, description) = match named {
        Some((field, reason)) => (field, format!("cannot be read: {reason}")),
        None => ("", format!("the bytes are no message of this method: {text}")),
    };
    to_status(Error::invalid(vec![FieldViolation {
        field: field.into(),
        description: description.into(),
    }]))
}
