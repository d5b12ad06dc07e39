//! A caller of the gateway: the generated client over one connection, speaking of one namespace.

use std::time::Duration;

use bytes::Bytes;
use tidegate::rpc::proto::{
    DeleteRequest, DeleteResponse, GetRequest, GetResponse, PutRequest, PutResponse, ReadConsistency, Source,
    WriteMode, gateway_client::GatewayClient,
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

/// Every consistency that a read can ask for.
pub const EVERY: [ReadConsistency; 3] = [ReadConsistency::Cached, ReadConsistency::Shared, ReadConsistency::Store];

/// When a write is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As the namespace is configured.
    Default,
    Through,
    Behind,
}

impl Mode {
    pub fn number(self) -> i32 {
        (match self {
            Mode::Default => WriteMode::Unspecified,
            Mode::Through => WriteMode::Through,
            Mode::Behind => WriteMode::Behind,
        }) as i32
    }
}

/// A client for one namespace, `orders` unless told otherwise. Cheap to clone; clones share the connection.
#[derive(Clone)]
pub struct Client {
    stub: GatewayClient<Channel>,
    pub(super) namespace: String,
}

impl Client {
    pub fn new(channel: Channel) -> Client {
        Client {
            stub: GatewayClient::new(channel)
                .max_decoding_message_size(usize::MAX)
                .max_encoding_message_size(usize::MAX),
            namespace: "orders".to_owned(),
        }
    }

    /// The same client for another namespace.
    pub fn namespace(&self, namespace: &str) -> Client {
        Client {
            namespace: namespace.to_owned(),
            ..self.clone()
        }
    }

    /// The generated client.
    pub fn stub(&self) -> GatewayClient<Channel> {
        self.stub.clone()
    }

    /// A Get to be sent; for what the shorter calls do not offer.
    pub fn get_request(&self, key: &str, consistency: ReadConsistency) -> GetRequest {
        GetRequest {
            namespace: self.namespace.clone(),
            key: key.to_owned(),
            consistency: consistency as i32,
            ..GetRequest::default()
        }
    }

    pub async fn get(&self, key: &str, consistency: ReadConsistency) -> Result<GetResponse, Status> {
        let request = self.get_request(key, consistency);
        self.stub().get(request).await.map(tonic::Response::into_inner)
    }

    /// Reads at least a version.
    pub async fn get_at_least(
        &self,
        key: &str,
        consistency: ReadConsistency,
        min_version: i64,
    ) -> Result<GetResponse, Status> {
        let request = GetRequest {
            min_version,
            ..self.get_request(key, consistency)
        };
        self.stub().get(request).await.map(tonic::Response::into_inner)
    }

    /// Reads nothing that is older.
    pub async fn get_within(
        &self,
        key: &str,
        consistency: ReadConsistency,
        max_staleness: Duration,
    ) -> Result<GetResponse, Status> {
        let request = GetRequest {
            max_staleness: Some(max_staleness.try_into().expect("a duration of a test fits")),
            ..self.get_request(key, consistency)
        };
        self.stub().get(request).await.map(tonic::Response::into_inner)
    }

    /// Reads with the default consistency.
    pub async fn read(&self, key: &str) -> GetResponse {
        self.get(key, ReadConsistency::Cached).await.expect("a read succeeds")
    }

    /// The value that a read of any consistency sees; `None` if the key is absent.
    pub async fn value(&self, key: &str, consistency: ReadConsistency) -> Option<Bytes> {
        let answer = self.get(key, consistency).await.expect("a read succeeds");
        answer.entry.map(|entry| entry.value)
    }

    /// Asserts that a read of every consistency sees this value; `None`: that the key is absent.
    pub async fn assert_everywhere(&self, key: &str, value: Option<&[u8]>) {
        for consistency in EVERY {
            let answer = self.get(key, consistency).await.expect("a read succeeds");
            let (seen, source) = seen(&answer);
            // A value of the tests may be long.
            let text = |value: Option<&[u8]>| {
                value.map(|value| String::from_utf8_lossy(&value[..value.len().min(80)]).into_owned())
            };
            assert!(
                seen == value,
                "{key} for {consistency:?}: {source:?} answers {:?} and not {:?}",
                text(seen),
                text(value)
            );
        }
    }

    /// A Put to be sent; for what the shorter calls do not offer.
    pub fn put_request(&self, key: &str, value: &[u8], mode: Mode) -> PutRequest {
        PutRequest {
            namespace: self.namespace.clone(),
            key: key.to_owned(),
            value: Bytes::copy_from_slice(value),
            write_mode: mode.number(),
            ttl: None,
            tags: Vec::new(),
            ..PutRequest::default()
        }
    }

    pub async fn put(&self, key: &str, value: &[u8], mode: Mode) -> Result<PutResponse, Status> {
        let request = self.put_request(key, value, mode);
        self.stub().put(request).await.map(tonic::Response::into_inner)
    }

    pub async fn put_for(&self, key: &str, value: &[u8], mode: Mode, ttl: Duration) -> Result<PutResponse, Status> {
        let request = PutRequest {
            ttl: Some(ttl.try_into().expect("a ttl of a test fits")),
            ..self.put_request(key, value, mode)
        };
        self.stub().put(request).await.map(tonic::Response::into_inner)
    }

    pub async fn delete(&self, key: &str, mode: Mode) -> Result<DeleteResponse, Status> {
        let request = DeleteRequest {
            namespace: self.namespace.clone(),
            key: key.to_owned(),
            write_mode: mode.number(),
            ..DeleteRequest::default()
        };
        self.stub().delete(request).await.map(tonic::Response::into_inner)
    }
}

/// The value and the source of an answer, for comparison with what is expected.
pub fn seen(answer: &GetResponse) -> (Option<&[u8]>, Source) {
    (answer.entry.as_ref().map(|entry| entry.value.as_ref()), answer.source())
}

/// The outcome that the details of an error promise: `not_applied` or `unknown`.
pub fn outcome(status: &Status) -> String {
    let info = status
        .get_details_error_info()
        .unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "tidegate");
    info.metadata
        .get("outcome")
        .cloned()
        .unwrap_or_else(|| panic!("no outcome in {info:?}"))
}

/// Asserts a refusal that changed nothing and is worth another try after a while.
pub fn assert_come_back(status: &Status, code: Code) {
    assert_eq!(status.code(), code, "{status:?}");
    assert_eq!(outcome(status), "not_applied");
    let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
    assert!(
        delay.is_some_and(|delay| !delay.is_zero()),
        "no RetryInfo in {status:?}"
    );
}

/// Asserts a failure for which another try is no remedy, and which says so by its reason and by what it leaves out.
#[track_caller]
pub fn assert_do_not_come_back(status: &Status, code: Code, reason: &str) {
    assert_eq!(status.code(), code, "{status:?}");
    let info = status.get_details_error_info();
    assert_eq!(info.map(|info| info.reason).as_deref(), Some(reason), "{status:?}");
    assert!(status.get_details_retry_info().is_none(), "{status:?}");
}
