//! What a client can ask for, and what an answer or a failure says of it: between the proto and the history.
//!
//! Owns the requests and how their answers are read. Sends nothing.

use std::time::Duration;

use bytes::Bytes;
use tidegate::rpc::proto::{
    self, DeleteRequest, Existence, Failure, IncrementRequest, PutRequest, TouchRequest, WriteItem, write_item,
};
use tonic::Status;
use tonic_types::StatusExt;

use crate::{
    harness::Mode,
    history::{Act, Change, Condition, Outcome, Value, Version},
    keys,
};

/// How long a record that is touched exists: it outlives every run.
const LASTS: Duration = Duration::from_secs(6 * 3600);

/// A write, before it is sent.
#[derive(Debug, Clone)]
pub struct Order {
    pub key: usize,
    pub mode: Mode,
    pub change: Change,
    pub condition: Option<Condition>,
    /// Its number, if it has a name.
    pub request: Option<u64>,
    /// The bytes of a put.
    pub value: Bytes,
    /// The gateway that knows its name, if not all of them do.
    pub home: Option<usize>,
}

impl Order {
    fn namespace(&self) -> String {
        keys::namespace(keys::classes()[self.key]).to_owned()
    }

    fn request_id(&self, run: u64) -> String {
        self.request
            .map(|request| format!("{run:016x}.{request}"))
            .unwrap_or_default()
    }

    fn condition(&self) -> Option<proto::Condition> {
        let of = |existence: Existence| proto::Condition {
            existence: existence as i32,
            ..proto::Condition::default()
        };
        self.condition.map(|condition| match condition {
            Condition::Absent => of(Existence::Absent),
            Condition::Present => of(Existence::Present),
            Condition::Version(version) => proto::Condition {
                version,
                ..proto::Condition::default()
            },
        })
    }

    pub fn put(&self, run: u64) -> PutRequest {
        PutRequest {
            namespace: self.namespace(),
            key: keys::name(self.key),
            value: self.value.clone(),
            write_mode: self.mode.number(),
            condition: self.condition(),
            request_id: self.request_id(run),
            ..PutRequest::default()
        }
    }

    pub fn delete(&self, run: u64) -> DeleteRequest {
        DeleteRequest {
            namespace: self.namespace(),
            key: keys::name(self.key),
            write_mode: self.mode.number(),
            condition: self.condition(),
            request_id: self.request_id(run),
            ..DeleteRequest::default()
        }
    }

    pub fn touch(&self, run: u64) -> TouchRequest {
        TouchRequest {
            namespace: self.namespace(),
            key: keys::name(self.key),
            ttl: Some(LASTS.try_into().expect("it fits")),
            request_id: self.request_id(run),
        }
    }

    pub fn increment(&self, run: u64, delta: u64) -> IncrementRequest {
        IncrementRequest {
            namespace: self.namespace(),
            key: keys::name(self.key),
            delta: Some(delta as i64),
            request_id: self.request_id(run),
            ..IncrementRequest::default()
        }
    }

    /// The same as one of several.
    pub fn item(&self, run: u64) -> WriteItem {
        let operation = match self.change {
            Change::Delete => write_item::Operation::Delete(self.delete(run)),
            Change::Put(_) | Change::Touch | Change::Add { .. } => write_item::Operation::Put(self.put(run)),
        };
        WriteItem {
            operation: Some(operation),
        }
    }

    /// What it has come to.
    pub fn act(&self, told: Told) -> Act {
        let (change, outcome) = match (self.change, told) {
            (Change::Add { delta, .. }, Told::Ok { version, made }) => {
                (Change::Add { delta, made }, Outcome::Ok(version))
            }
            (change, Told::Ok { version, .. }) => (change, Outcome::Ok(version)),
            (change, Told::Failed(outcome)) => (change, outcome),
        };
        Act::Write {
            through: self.mode == Mode::Through,
            change,
            condition: self.condition,
            request: self.request,
            outcome,
        }
    }
}

/// What the caller of a write was told.
#[derive(Debug, Clone, Copy)]
pub enum Told {
    Ok { version: Version, made: Option<Value> },
    Failed(Outcome),
}

impl Told {
    pub fn version(version: Version) -> Told {
        Told::Ok { version, made: None }
    }
}

/// What an error says about a write; or what is wrong with it.
pub fn outcome_of(status: &Status) -> Result<Outcome, String> {
    let Some(info) = status.get_details_error_info() else {
        // Not the gateway's word.
        return Ok(Outcome::Unknown);
    };
    let unknown = match info.metadata.get("outcome").map(String::as_str) {
        Some("not_applied") => false,
        Some("unknown") => true,
        other => return Err(format!("a write failed with the outcome {other:?}: {status:?}")),
    };
    let standing = || info.metadata.get("standing_version").and_then(|text| text.parse().ok());
    outcome(&info.reason, unknown, standing)
}

/// What the failure of one of several says about it.
pub fn outcome_of_item(failure: &Failure) -> Result<Outcome, String> {
    outcome(&failure.reason, failure.unknown, || Some(failure.standing_version))
}

fn outcome(reason: &str, unknown: bool, standing: impl FnOnce() -> Option<Version>) -> Result<Outcome, String> {
    match (reason, unknown) {
        ("CONFLICT", false) => {
            let standing = standing().ok_or("a conflict does not say what stands")?;
            Ok(Outcome::Refused((standing != 0).then_some(standing)))
        }
        ("ABSENT", false) => Ok(Outcome::Refused(None)),
        ("UNAVAILABLE" | "OVERLOADED" | "TIMEOUT" | "SUPERSEDED", false) => Ok(Outcome::NotApplied),
        ("UNAVAILABLE" | "OVERLOADED" | "TIMEOUT", true) => Ok(Outcome::Unknown),
        _ => Err(format!("a write failed for {reason}, unknown: {unknown}")),
    }
}
