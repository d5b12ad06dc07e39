//! A watch of a client's namespace: what it is told, and the token of what was told last. Owns no expectation, but that something is told in time.

use tidegate::rpc::proto::{
    ChangeKind, RescanReason, WatchChange, WatchRequest, WatchResponse, WatchScope, watch_response::Event,
};
use tokio::time::timeout;
use tonic::{Status, Streaming};

use super::{Client, SOON};

/// A watch under way. Dropping it hangs up.
pub struct Watch {
    told: Streaming<WatchResponse>,
    /// The token of the last message; empty before the first.
    pub token: String,
}

impl Client {
    /// A Watch to be sent.
    pub fn watch_request(&self, prefix: &str) -> WatchRequest {
        WatchRequest {
            namespace: self.namespace.clone(),
            prefix: prefix.to_owned(),
            ..WatchRequest::default()
        }
    }

    /// Sends a Watch.
    pub async fn send_watch(&self, request: WatchRequest) -> Result<Watch, Status> {
        let told = self.stub().watch(request).await?.into_inner();
        Ok(Watch {
            told,
            token: String::new(),
        })
    }

    /// Begins to watch all keys with a prefix, and waits until that has begun.
    pub async fn watch(&self, prefix: &str) -> (Watch, WatchScope) {
        let mut watch = self
            .send_watch(self.watch_request(prefix))
            .await
            .expect("it may be watched");
        match watch.next().await.expect("it begins") {
            Event::Started(started) => (watch, started.scope()),
            event => panic!("the first message is {event:?}"),
        }
    }
}

impl Watch {
    /// What is told next, progress included.
    pub async fn next(&mut self) -> Result<Event, Status> {
        let told = timeout(SOON, self.told.message())
            .await
            .expect("something is told in time")?;
        let Some(WatchResponse { resume_token, event }) = told else {
            return Err(Status::ok("the stream ended without a status"));
        };
        assert!(!resume_token.is_empty(), "each message has a token: {event:?}");
        self.token = resume_token;
        Ok(event.expect("each message tells something"))
    }

    /// The next change; nothing but progress comes before it.
    pub async fn change(&mut self) -> WatchChange {
        loop {
            match self.next().await.expect("the watch goes on") {
                Event::Change(change) => return change,
                Event::Progress(_) => {}
                event => panic!("{event:?} and no change"),
            }
        }
    }

    /// The next rescan, whatever changes come before it.
    pub async fn rescan(&mut self) -> (RescanReason, WatchScope) {
        loop {
            if let Event::Rescan(rescan) = self.next().await.expect("the watch goes on") {
                return (rescan.reason(), rescan.scope());
            }
        }
    }
}

/// What a change says of which key, for comparison with what is expected.
pub fn said(change: &WatchChange) -> (&str, i64, ChangeKind) {
    (&change.key, change.version, change.kind())
}
