//! What the contestants are asked: calls encoded beforehand, and the order in which they are sent.
//!
//! Owns the messages of every service that is driven over gRPC, as bytes with their prefix, and the choice of keys: evenly, or by Zipf's law.
//! Does not own sending (`load`). Invariant: calls differ in their key alone, so all bodies have one length and lie in one buffer.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use http::Uri;
use prost::Message;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use rand_distr::{Distribution, Zipf};
use tidegate::rpc::proto::{
    BatchGetRequest, BatchWriteRequest, GetRequest, PutRequest, WriteItem, WriteMode, write_item::Operation,
};

use crate::Failure;

pub const NAMESPACE: &str = "bench";

/// How many picks by Zipf's law are made beforehand; then they begin again.
const ZIPF_PICKS: usize = 1 << 20;

/// The gRPC prefix of a message: its compression flag and its length.
const PREFIX_BYTES: usize = 5;

/// The calls of one method over a set of keys.
#[derive(Debug, Clone)]
pub struct Calls {
    pub uri: Uri,
    bodies: Bytes,
    body_bytes: usize,
    /// The least that an answer has, its prefix included.
    pub answer_bytes_min: usize,
    order: Order,
}

/// In which order keys come.
#[derive(Debug, Clone)]
enum Order {
    Even,
    /// Beforehand, for the law costs more than a call.
    Listed(Arc<[u32]>),
}

impl Calls {
    /// `count` calls of the method at `path`, of which `message` gives each.
    pub fn new<M: Message>(
        path: &'static str,
        count: usize,
        answer_bytes_min: usize,
        message: impl Fn(usize) -> M,
    ) -> Result<Arc<Calls>, Failure> {
        let body_bytes = PREFIX_BYTES + message(0).encoded_len();
        let mut bodies = BytesMut::with_capacity(body_bytes * count);
        for index in 0..count {
            let message = message(index);
            bodies.put_u8(0);
            bodies.put_u32(u32::try_from(message.encoded_len())?);
            message.encode(&mut bodies)?;
        }
        if bodies.len() != body_bytes * count {
            return Err("calls of different lengths".into());
        }
        Ok(Arc::new(Calls {
            uri: Uri::builder()
                .scheme("http")
                .authority("bench")
                .path_and_query(path)
                .build()?,
            bodies: bodies.freeze(),
            body_bytes,
            answer_bytes_min,
            order: Order::Even,
        }))
    }

    /// The same calls, some keys far more often than others.
    pub fn by_zipf(&self, exponent: f64) -> Result<Arc<Calls>, Failure> {
        let law = Zipf::new(self.len() as f64, exponent).map_err(|error| error.to_string())?;
        let mut random = SmallRng::seed_from_u64(1);
        // The law's first number is 1.
        let picks = (0..ZIPF_PICKS).map(|_| law.sample(&mut random) as u32 - 1);
        Ok(Arc::new(Calls {
            order: Order::Listed(picks.collect()),
            ..self.clone()
        }))
    }

    pub fn len(&self) -> usize {
        self.bodies.len() / self.body_bytes
    }

    /// The encoded call, a slice of the common buffer.
    pub fn body(&self, index: usize) -> Bytes {
        let start = index * self.body_bytes;
        self.bodies.slice(start..start + self.body_bytes)
    }

    /// The same calls for a thread of the generator: the first shares the buffer, each other one has its own.
    pub fn on_thread(self: &Arc<Calls>, thread: usize) -> Arc<Calls> {
        if thread == 0 {
            return Arc::clone(self);
        }
        Arc::new(Calls {
            bodies: Bytes::copy_from_slice(&self.bodies),
            ..Calls::clone(self)
        })
    }

    /// An order for one stream; streams at different places begin elsewhere.
    pub fn picks(&self, place: usize) -> Picks {
        match &self.order {
            Order::Even => Picks::Even {
                random: SmallRng::seed_from_u64(place as u64),
                count: self.len(),
            },
            Order::Listed(listed) => Picks::Listed {
                listed: Arc::clone(listed),
                next: place * 7_919,
            },
        }
    }
}

/// Which call is next.
pub enum Picks {
    Even { random: SmallRng, count: usize },
    Listed { listed: Arc<[u32]>, next: usize },
}

impl Picks {
    pub fn pick(&mut self) -> usize {
        match self {
            Picks::Even { random, count } => random.random_range(0..*count),
            Picks::Listed { listed, next } => {
                *next += 1;
                listed[*next % listed.len()] as usize
            }
        }
    }
}

pub fn key(index: usize) -> String {
    format!("key:{index:08}")
}

/// A value that does not compress to nothing.
pub fn value(bytes: usize) -> Bytes {
    let mut random = SmallRng::seed_from_u64(bytes as u64);
    (0..bytes).map(|_| random.random::<u8>()).collect()
}

pub fn gets(keys: usize, value_bytes: usize) -> Result<Arc<Calls>, Failure> {
    Calls::new("/tidegate.v1.Gateway/Get", keys, value_bytes, |index| GetRequest {
        namespace: NAMESPACE.to_owned(),
        key: key(index),
        ..GetRequest::default()
    })
}

fn put(index: usize, value: &Bytes, mode: WriteMode) -> PutRequest {
    PutRequest {
        namespace: NAMESPACE.to_owned(),
        key: key(index),
        value: value.clone(),
        write_mode: mode.into(),
        ..PutRequest::default()
    }
}

pub fn puts(keys: usize, value_bytes: usize, mode: WriteMode) -> Result<Arc<Calls>, Failure> {
    let value = value(value_bytes);
    Calls::new("/tidegate.v1.Gateway/Put", keys, PREFIX_BYTES + 1, |index| {
        put(index, &value, mode)
    })
}

pub fn batch_gets(keys: usize, batch: usize, value_bytes: usize) -> Result<Arc<Calls>, Failure> {
    Calls::new(
        "/tidegate.v1.Gateway/BatchGet",
        keys / batch,
        batch * value_bytes,
        |index| BatchGetRequest {
            namespace: NAMESPACE.to_owned(),
            keys: scattered(index, batch, keys).map(key).collect(),
            ..BatchGetRequest::default()
        },
    )
}

pub fn batch_writes(keys: usize, batch: usize, value_bytes: usize, mode: WriteMode) -> Result<Arc<Calls>, Failure> {
    let value = value(value_bytes);
    Calls::new("/tidegate.v1.Gateway/BatchWrite", keys / batch, batch, |index| {
        BatchWriteRequest {
            items: scattered(index, batch, keys)
                .map(|index| WriteItem {
                    operation: Some(Operation::Put(put(index, &value, mode))),
                })
                .collect(),
        }
    })
}

/// The keys of one batch: far from each other, and in one batch of all.
fn scattered(index: usize, batch: usize, keys: usize) -> impl Iterator<Item = usize> {
    (0..batch).map(move |item| item * (keys / batch) + index)
}
