//! What a caller does with the calls beyond Get, Put and Delete: conditions, request ids, counters, batches, scans, and waiting.
//!
//! Of the same [`Client`] as the others. Owns no expectation, but for the shape of refusals.

use std::{collections::BTreeSet, time::Duration};

use tidegate::rpc::proto::{
    AwaitPersistedRequest, AwaitPersistedResponse, BatchGetRequest, BatchGetResult, BatchWriteRequest, Condition,
    DeleteRequest, DeleteResponse, Existence, Failure, GetResponse, IncrementRequest, IncrementResponse, PutRequest,
    PutResponse, ReadConsistency, ScanRecord, ScanRequest, ScanResponse, TouchRequest, TouchResponse, WriteItem,
    WriteResult, Written, batch_get_result, write_item, write_result,
};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt;

use super::{
    Client, Mode,
    client::{assert_do_not_come_back, outcome},
};

/// That there is no record.
pub const ABSENT: Condition = Condition {
    existence: Existence::Absent as i32,
    version: 0,
};

/// That there is one.
pub const PRESENT: Condition = Condition {
    existence: Existence::Present as i32,
    version: 0,
};

/// That there is one of this version.
pub const fn version(version: i64) -> Condition {
    Condition {
        existence: Existence::Unspecified as i32,
        version,
    }
}

impl Client {
    /// Sends a Put.
    pub async fn send_put(&self, request: PutRequest) -> Result<PutResponse, Status> {
        self.stub().put(request).await.map(Response::into_inner)
    }

    /// A Delete to be sent; for what the shorter calls do not offer.
    pub fn delete_request(&self, key: &str, mode: Mode) -> DeleteRequest {
        DeleteRequest {
            namespace: self.namespace.clone(),
            key: key.to_owned(),
            write_mode: mode.number(),
            ..DeleteRequest::default()
        }
    }

    /// Sends a Delete.
    pub async fn send_delete(&self, request: DeleteRequest) -> Result<DeleteResponse, Status> {
        self.stub().delete(request).await.map(Response::into_inner)
    }

    /// Puts if a condition holds, in the namespace's mode.
    pub async fn put_if(&self, key: &str, value: &[u8], condition: Condition) -> Result<PutResponse, Status> {
        self.send_put(PutRequest {
            condition: Some(condition),
            ..self.put_request(key, value, Mode::Default)
        })
        .await
    }

    /// Deletes if a condition holds, in the namespace's mode.
    pub async fn delete_if(&self, key: &str, condition: Condition) -> Result<DeleteResponse, Status> {
        self.send_delete(DeleteRequest {
            condition: Some(condition),
            ..self.delete_request(key, Mode::Default)
        })
        .await
    }

    /// Puts under a request id.
    pub async fn put_named(&self, key: &str, value: &[u8], mode: Mode, id: &str) -> Result<PutResponse, Status> {
        self.send_put(PutRequest {
            request_id: id.to_owned(),
            ..self.put_request(key, value, mode)
        })
        .await
    }

    /// Deletes under a request id.
    pub async fn delete_named(&self, key: &str, mode: Mode, id: &str) -> Result<DeleteResponse, Status> {
        self.send_delete(DeleteRequest {
            request_id: id.to_owned(),
            ..self.delete_request(key, mode)
        })
        .await
    }

    /// An Increment to be sent; for what the shorter calls do not offer.
    pub fn increment_request(&self, key: &str, delta: i64) -> IncrementRequest {
        IncrementRequest {
            namespace: self.namespace.clone(),
            key: key.to_owned(),
            delta: Some(delta),
            ..IncrementRequest::default()
        }
    }

    /// Sends an Increment.
    pub async fn send_increment(&self, request: IncrementRequest) -> Result<IncrementResponse, Status> {
        self.stub().increment(request).await.map(Response::into_inner)
    }

    pub async fn increment(&self, key: &str, delta: i64) -> Result<IncrementResponse, Status> {
        self.send_increment(self.increment_request(key, delta)).await
    }

    /// Increments under a request id.
    pub async fn increment_named(&self, key: &str, delta: i64, id: &str) -> Result<IncrementResponse, Status> {
        self.send_increment(IncrementRequest {
            request_id: id.to_owned(),
            ..self.increment_request(key, delta)
        })
        .await
    }

    /// A Touch to be sent; for what the shorter call does not offer.
    pub fn touch_request(&self, key: &str, ttl: Option<Duration>) -> TouchRequest {
        TouchRequest {
            namespace: self.namespace.clone(),
            key: key.to_owned(),
            ttl: ttl.map(|ttl| ttl.try_into().expect("a ttl of a test fits")),
            ..TouchRequest::default()
        }
    }

    /// Sends a Touch.
    pub async fn send_touch(&self, request: TouchRequest) -> Result<TouchResponse, Status> {
        self.stub().touch(request).await.map(Response::into_inner)
    }

    pub async fn touch(&self, key: &str, ttl: Option<Duration>) -> Result<TouchResponse, Status> {
        self.send_touch(self.touch_request(key, ttl)).await
    }

    /// Waits until the store has a write.
    pub async fn await_persisted(&self, key: &str, version: i64) -> Result<AwaitPersistedResponse, Status> {
        let request = AwaitPersistedRequest {
            namespace: self.namespace.clone(),
            key: key.to_owned(),
            version,
        };
        self.stub().await_persisted(request).await.map(Response::into_inner)
    }

    /// Waits until the store has all writes of the gateway.
    pub async fn await_all_persisted(&self) -> Result<AwaitPersistedResponse, Status> {
        let request = AwaitPersistedRequest::default();
        self.stub().await_persisted(request).await.map(Response::into_inner)
    }

    /// Reads several keys: an answer for each.
    pub async fn batch_get<K: Into<String>>(
        &self,
        keys: impl IntoIterator<Item = K>,
        consistency: ReadConsistency,
    ) -> Vec<BatchGetResult> {
        let request = BatchGetRequest {
            namespace: self.namespace.clone(),
            keys: keys.into_iter().map(Into::into).collect(),
            consistency: consistency as i32,
            max_staleness: None,
        };
        let keys = request.keys.len();
        let answer = self.stub().batch_get(request).await.expect("a batch is answered");
        let results = answer.into_inner().results;
        assert_eq!(results.len(), keys, "an answer for each key");
        results
    }

    /// Writes several items: an answer for each.
    pub async fn batch_write(&self, items: Vec<WriteItem>) -> Vec<WriteResult> {
        let count = items.len();
        let answer = self.stub().batch_write(BatchWriteRequest { items }).await;
        let results = answer.expect("a batch is answered").into_inner().results;
        assert_eq!(results.len(), count, "an answer for each item");
        results
    }

    /// A Scan of what begins with a prefix, in pages of the default sizes.
    pub fn scan_request(&self, prefix: &str) -> ScanRequest {
        ScanRequest {
            namespace: self.namespace.clone(),
            prefix: prefix.to_owned(),
            ..ScanRequest::default()
        }
    }

    /// Reads a page.
    pub async fn scan(&self, request: ScanRequest) -> Result<ScanResponse, Status> {
        self.stub().scan(request).await.map(Response::into_inner)
    }

    /// Reads the pages from this one on, to the last.
    pub async fn scan_pages(&self, mut request: ScanRequest) -> Vec<Vec<ScanRecord>> {
        let mut pages = Vec::new();
        loop {
            let page = self.scan(request.clone()).await.expect("a page is answered");
            pages.push(page.records);
            if page.next_page_token.is_empty() {
                return pages;
            }
            assert_ne!(page.next_page_token, request.page_token, "a scan gets on");
            request.page_token = page.next_page_token;
        }
    }
}

/// A Put as an item of a batch.
pub fn put_item(request: PutRequest) -> WriteItem {
    WriteItem {
        operation: Some(write_item::Operation::Put(request)),
    }
}

/// A Delete as an item of a batch.
pub fn delete_item(request: DeleteRequest) -> WriteItem {
    WriteItem {
        operation: Some(write_item::Operation::Delete(request)),
    }
}

/// The answer of a key of a batch, which is one.
#[track_caller]
pub fn found(result: &BatchGetResult) -> &GetResponse {
    match &result.outcome {
        Some(batch_get_result::Outcome::Found(found)) => found,
        other => panic!("no answer: {other:?}"),
    }
}

/// Why a key of a batch has none.
#[track_caller]
pub fn unread(result: &BatchGetResult) -> &Failure {
    match &result.outcome {
        Some(batch_get_result::Outcome::Failure(failure)) => failure,
        other => panic!("no failure: {other:?}"),
    }
}

/// The answer of an item of a batch, which was written.
#[track_caller]
pub fn written(result: &WriteResult) -> &Written {
    match &result.outcome {
        Some(write_result::Outcome::Written(written)) => written,
        other => panic!("it was not written: {other:?}"),
    }
}

/// Why an item of a batch was not written.
#[track_caller]
pub fn unwritten(result: &WriteResult) -> &Failure {
    match &result.outcome {
        Some(write_result::Outcome::Failure(failure)) => failure,
        other => panic!("no failure: {other:?}"),
    }
}

/// Asserts that a condition did not hold, and that the answer says what stands; 0: nothing does.
#[track_caller]
pub fn assert_conflict(status: &Status, standing: i64) {
    assert_do_not_come_back(status, Code::Aborted, "CONFLICT");
    assert_eq!(outcome(status), "not_applied");
    assert_eq!(standing_version(status), standing, "{status:?}");
}

/// Which version a conflict says to stand.
#[track_caller]
pub fn standing_version(status: &Status) -> i64 {
    let info = status.get_details_error_info();
    let standing = info.and_then(|info| info.metadata.get("standing_version")?.parse().ok());
    standing.unwrap_or_else(|| panic!("no standing version in {status:?}"))
}

/// Asserts a refusal for good that changed nothing.
#[track_caller]
pub fn assert_refused(status: &Status, code: Code, reason: &str) {
    assert_do_not_come_back(status, code, reason);
    assert_eq!(outcome(status), "not_applied");
}

/// Asserts that a request is invalid for one of its fields.
#[track_caller]
pub fn assert_invalid(status: &Status, field: &str) {
    assert_refused(status, Code::InvalidArgument, "INVALID");
    let request = status.get_details_bad_request();
    let violations = request.map_or_else(Vec::new, |request| request.field_violations);
    let named: BTreeSet<&str> = violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(named, BTreeSet::from([field]), "{status:?}");
}
