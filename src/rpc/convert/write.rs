//! Put, Delete, Touch, Increment and the waiting for persistence: what they ask for, and how they are answered; alone, or several at a time.

use bytes::Bytes;

use crate::{
    error::{Error, FieldViolation},
    gateway::{Counted, Durability, IncrementRequest, TouchRequest, Touched, WriteRequest, Written},
    model::{BrokenTag, Condition, Key, RequestId, Tags, Version},
    namespace::WriteMode,
    rpc::{
        proto::{self, write_item::Operation, write_result::Outcome},
        status::to_failure,
    },
};

use super::{BATCH_MAX, key, timestamp, ttl, violate};

/// Values from this size on keep the buffer they were received in: it was grown for them. Smaller ones are copied, for a slice of
/// a shared buffer would keep all of it.
const KEEP_BUFFER_BYTES: usize = 16 * 1024;

pub(crate) fn put(request: proto::PutRequest, value_bytes_max: usize) -> Result<WriteRequest, Error> {
    let mut violations = Vec::new();
    let key = key(&request.namespace, &request.key, &mut violations);
    if request.value.len() > value_bytes_max {
        let description = format!("must have at most {value_bytes_max} bytes, has {}", request.value.len());
        violate(&mut violations, "value", description);
    }
    let mode = write_mode(request.write_mode, request.condition.is_some(), &mut violations);
    let ttl = ttl(request.ttl, &mut violations);
    let tags = tags(&request.tags, &mut violations);
    let condition = condition(request.condition, &mut violations);
    let id = request_id(&request.request_id, &mut violations);
    match key {
        Some(key) if violations.is_empty() => Ok(WriteRequest {
            key,
            value: Some(own(request.value)),
            ttl,
            tags,
            mode,
            condition,
            request: id,
            await_persisted: request.await_persisted,
        }),
        _ => Err(Error::invalid(violations)),
    }
}

pub(crate) fn delete(request: &proto::DeleteRequest) -> Result<WriteRequest, Error> {
    let mut violations = Vec::new();
    let key = key(&request.namespace, &request.key, &mut violations);
    let mode = write_mode(request.write_mode, request.condition.is_some(), &mut violations);
    let condition = condition(request.condition, &mut violations);
    let id = request_id(&request.request_id, &mut violations);
    match key {
        Some(key) if violations.is_empty() => Ok(WriteRequest {
            key,
            value: None,
            tags: Tags::default(),
            ttl: None,
            mode,
            condition,
            request: id,
            await_persisted: request.await_persisted,
        }),
        _ => Err(Error::invalid(violations)),
    }
}

/// One write of several. Its violations name the fields of its operation.
pub(crate) fn item(item: proto::WriteItem, value_bytes_max: usize) -> Result<WriteRequest, Error> {
    match item.operation {
        Some(Operation::Put(request)) => put(request, value_bytes_max),
        Some(Operation::Delete(request)) => delete(&request),
        None => {
            let mut violations = Vec::new();
            violate(&mut violations, "", "exactly one of put and delete must be given");
            Err(Error::invalid(violations))
        }
    }
}

/// The writes of a batch, each valid or by itself at fault.
pub(crate) fn batch_write(
    request: proto::BatchWriteRequest,
    value_bytes_max: usize,
) -> Result<Vec<Result<WriteRequest, Error>>, Error> {
    let items = request.items;
    if items.is_empty() || items.len() > BATCH_MAX {
        let mut violations = Vec::new();
        let description = format!("must be 1 to {BATCH_MAX}, are {}", items.len());
        violate(&mut violations, "items", description);
        return Err(Error::invalid(violations));
    }
    Ok(items.into_iter().map(|one| item(one, value_bytes_max)).collect())
}

pub(crate) fn touch(request: &proto::TouchRequest) -> Result<TouchRequest, Error> {
    let mut violations = Vec::new();
    let key = key(&request.namespace, &request.key, &mut violations);
    let ttl = ttl(request.ttl, &mut violations);
    let id = request_id(&request.request_id, &mut violations);
    match key {
        Some(key) if violations.is_empty() => Ok(TouchRequest { key, ttl, request: id }),
        _ => Err(Error::invalid(violations)),
    }
}

pub(crate) fn increment(request: &proto::IncrementRequest) -> Result<IncrementRequest, Error> {
    let mut violations = Vec::new();
    let key = key(&request.namespace, &request.key, &mut violations);
    let delta = request.delta.unwrap_or(1);
    if delta == 0 {
        violate(&mut violations, "delta", "must not be 0; leave it out to add 1");
    }
    let ttl = ttl(request.ttl, &mut violations);
    let id = request_id(&request.request_id, &mut violations);
    match key {
        Some(key) if violations.is_empty() => Ok(IncrementRequest {
            key,
            delta,
            ttl,
            request: id,
        }),
        _ => Err(Error::invalid(violations)),
    }
}

/// What is awaited.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AwaitedWrite {
    /// All that this gateway acknowledged.
    All,
    /// One write of a key, or a later one.
    One(Key, Version),
}

pub(crate) fn await_persisted(request: &proto::AwaitPersistedRequest) -> Result<AwaitedWrite, Error> {
    if request.namespace.is_empty() && request.key.is_empty() && request.version == 0 {
        return Ok(AwaitedWrite::All);
    }
    let mut violations = Vec::new();
    let key = key(&request.namespace, &request.key, &mut violations);
    let version = Version::new(request.version);
    if version.is_none() {
        let description = "must be the version that the write returned; leave out all fields to await every write";
        violate(&mut violations, "version", description);
    }
    match (key, version) {
        (Some(key), Some(version)) => Ok(AwaitedWrite::One(key, version)),
        _ => Err(Error::invalid(violations)),
    }
}

pub(crate) fn put_response(written: Written) -> proto::PutResponse {
    proto::PutResponse {
        version: written.version.get(),
        durability: durability(written.durability).into(),
        deduplicated: written.deduplicated,
    }
}

pub(crate) fn delete_response(written: Written) -> proto::DeleteResponse {
    proto::DeleteResponse {
        version: written.version.get(),
        durability: durability(written.durability).into(),
        deduplicated: written.deduplicated,
    }
}

/// The answer to one write of several.
pub(crate) fn write_result(outcome: Result<Written, Error>) -> proto::WriteResult {
    proto::WriteResult {
        outcome: Some(match outcome {
            Ok(written) => Outcome::Written(proto::Written {
                version: written.version.get(),
                durability: durability(written.durability).into(),
                deduplicated: written.deduplicated,
            }),
            Err(error) => Outcome::Failure(to_failure(error)),
        }),
    }
}

pub(crate) fn touch_response(touched: Touched) -> proto::TouchResponse {
    proto::TouchResponse {
        version: touched.version.get(),
        expire_time: touched.expires_at.map(timestamp),
        deduplicated: touched.deduplicated,
    }
}

pub(crate) fn increment_response(counted: Counted) -> proto::IncrementResponse {
    proto::IncrementResponse {
        value: counted.value,
        version: counted.version.get(),
        expire_time: counted.expires_at.map(timestamp),
        deduplicated: counted.deduplicated,
    }
}

fn durability(durability: Durability) -> proto::Durability {
    match durability {
        Durability::Store => proto::Durability::Store,
        Durability::Journal => proto::Durability::Journal,
        Durability::Memory => proto::Durability::Memory,
    }
}

fn write_mode(number: i32, conditional: bool, violations: &mut Vec<FieldViolation>) -> Option<WriteMode> {
    match proto::WriteMode::try_from(number) {
        Ok(proto::WriteMode::Unspecified) => None,
        Ok(proto::WriteMode::Through) => Some(WriteMode::Through),
        Ok(proto::WriteMode::Behind) => {
            if conditional {
                let description = "must not be WRITE_MODE_BEHIND together with a condition, which the store decides";
                violate(violations, "write_mode", description);
            }
            Some(WriteMode::Behind)
        }
        Err(_) => {
            violate(violations, "write_mode", format!("has no value {number}"));
            None
        }
    }
}

fn condition(given: Option<proto::Condition>, violations: &mut Vec<FieldViolation>) -> Option<Condition> {
    let proto::Condition { existence, version } = given?;
    match (proto::Existence::try_from(existence), version) {
        (Ok(proto::Existence::Absent), 0) => return Some(Condition::Absent),
        (Ok(proto::Existence::Present), 0) => return Some(Condition::Present),
        (Ok(proto::Existence::Unspecified), 1..) => return Version::new(version).map(Condition::Version),
        (Ok(proto::Existence::Unspecified), 0) => {
            violate(
                violations,
                "condition",
                "must have existence or version; leave it out for none",
            );
        }
        (Ok(proto::Existence::Absent | proto::Existence::Present), 1..) => {
            violate(violations, "condition", "must not have both existence and version");
        }
        (Ok(_), _) => {}
        (Err(_), _) => violate(violations, "condition.existence", format!("has no value {existence}")),
    }
    if version < 0 {
        let description = "must be a version that a read or a write returned";
        violate(violations, "condition.version", description);
    }
    None
}

/// The id of a request; the empty one is none.
fn request_id(id: &str, violations: &mut Vec<FieldViolation>) -> Option<RequestId> {
    if id.is_empty() {
        return None;
    }
    RequestId::new(id)
        .map_err(|rule| violate(violations, "request_id", rule))
        .ok()
}

fn tags(tags: &[String], violations: &mut Vec<FieldViolation>) -> Tags {
    Tags::new(tags).unwrap_or_else(|broken| {
        for BrokenTag { place, rule } in broken {
            let field = place.map_or_else(|| "tags".to_owned(), |place| format!("tags[{place}]"));
            violate(violations, field, rule);
        }
        Tags::default()
    })
}

fn own(value: Bytes) -> Bytes {
    if value.len() < KEEP_BUFFER_BYTES {
        Bytes::copy_from_slice(&value)
    } else {
        value
    }
}
