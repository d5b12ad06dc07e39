//! A response as the value of a record.
//!
//! Owns its form: a protobuf message, so that what an older version of the service left can be read by a newer one. Does not own for how
//! long it is kept: the record's own lifetime is that.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{AGE, CONNECTION, TRANSFER_ENCODING},
};
use prost::Message;

/// A response, and when it was made.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Stored {
    #[prost(uint32, tag = "1")]
    status: u32,
    #[prost(message, repeated, tag = "2")]
    headers: Vec<Field>,
    #[prost(bytes = "bytes", tag = "3")]
    body: Bytes,
    /// In milliseconds since 1970, by the clock of the service that made it.
    #[prost(uint64, tag = "4")]
    made_at: u64,
}

/// A header. Its value need not be text.
#[derive(Clone, PartialEq, Message)]
struct Field {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

impl Stored {
    /// A response of now.
    pub(super) fn new(status: StatusCode, headers: &HeaderMap, body: Bytes) -> Stored {
        // Those of one connection are no part of what is kept.
        let kept = headers
            .iter()
            .filter(|(name, _)| ![CONNECTION, TRANSFER_ENCODING].contains(name));
        let field = |(name, value): (&HeaderName, &HeaderValue)| Field {
            name: name.as_str().to_owned(),
            value: Bytes::copy_from_slice(value.as_bytes()),
        };
        Stored {
            status: status.as_u16().into(),
            headers: kept.map(field).collect(),
            body,
            made_at: now().as_millis().try_into().unwrap_or(u64::MAX),
        }
    }

    /// The response that a value holds. `None`: it is none, as somebody else may have written it.
    pub(super) fn read(value: Bytes) -> Option<Response> {
        let stored = Stored::decode(value).ok()?;
        let mut response = Response::new(Body::from(stored.body));
        *response.status_mut() = StatusCode::from_u16(stored.status.try_into().ok()?).ok()?;
        let headers = response.headers_mut();
        for field in stored.headers {
            let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
            headers.append(name, HeaderValue::from_maybe_shared(field.value).ok()?);
        }
        let age = now().saturating_sub(Duration::from_millis(stored.made_at));
        headers.insert(AGE, HeaderValue::from(age.as_secs()));
        Some(response)
    }
}

fn now() -> Duration {
    // A clock before 1970 makes everything new.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use http::header::CONTENT_TYPE;

    use super::*;

    #[tokio::test]
    async fn a_response_is_read_back_with_its_headers_and_its_age() {
        let mut headers = HeaderMap::new();
        headers.append("x-many", HeaderValue::from_static("a"));
        headers.append("x-many", HeaderValue::from_bytes(b"\xff").unwrap());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        let mut stored = Stored::new(StatusCode::NOT_FOUND, &headers, Bytes::from_static(b"nothing"));
        stored.made_at -= 90_500;
        let response = Stored::read(stored.encode_to_vec().into()).unwrap();
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(response.headers()[AGE], "90");
        assert!(!response.headers().contains_key(CONNECTION));
        let many: Vec<&[u8]> = response
            .headers()
            .get_all("x-many")
            .iter()
            .map(HeaderValue::as_bytes)
            .collect();
        assert_eq!(many, [b"a".as_slice(), b"\xff"]);
        assert_eq!(to_bytes(response.into_body(), 64).await.unwrap(), "nothing");
    }

    #[test]
    fn what_is_no_response_is_read_as_none() {
        assert!(Stored::read(Bytes::from_static(b"what somebody put there")).is_none());
        assert!(Stored::read(Bytes::new()).is_none(), "there is no status 0");
    }
}
