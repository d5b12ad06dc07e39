//! A watch of changes that goes on where it was when its stream breaks.
//!
//! Owns the stream and the token of the last message. Does not own what is told, nor what a watcher has to do about a `rescan`: `gateway.proto` says
//! that. Invariant: no message is taken for told that was not handed out, so a watch that breaks misses none; one may come twice.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tonic::{Request, Streaming};

use super::{
    Client, Error,
    proto::{WatchRequest, WatchResponse},
    retry::{Effect, Tries},
};

/// How many times in a row a gateway is gone back to, for the token is good there, before another is tried.
const RETURNS_MAX: u32 = 3;

/// A watch under way. Ends when it is dropped.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    request: WatchRequest,
    stream: Option<Streaming<WatchResponse>>,
    /// Over which channel.
    place: usize,
    tries: Tries,
    /// Failures since the last message.
    failures: u32,
}

impl Watch {
    pub(super) fn new(client: Client, request: WatchRequest) -> Watch {
        Watch {
            place: client.place(),
            tries: Tries::new(Effect::Read, client.options.retry),
            client,
            request,
            stream: None,
            failures: 0,
        }
    }

    /// The next message. When the stream breaks it is begun again behind the last message that this has handed out, as often as the client's
    /// [`super::Retry`] allows without a message in between. Safe to drop: no message is lost.
    ///
    /// # Errors
    /// Every [`Error`] but those of writes. May be called again after one, and goes on then.
    pub async fn next(&mut self) -> Result<WatchResponse, Error> {
        loop {
            let sent = Instant::now();
            let error = match self.message().await {
                Ok(message) => {
                    self.failures = 0;
                    self.tries = Tries::new(Effect::Read, self.client.options.retry);
                    self.request.resume_token.clone_from(&message.resume_token);
                    return Ok(message);
                }
                Err(error) => error,
            };
            self.stream = None;
            self.failures += 1;
            let tried = self.tries.after(error, sent).inspect_err(|_| {
                self.tries = Tries::new(Effect::Read, self.client.options.retry);
            });
            let (again, _) = tried?;
            if self.failures.is_multiple_of(RETURNS_MAX) {
                self.place = self.place.wrapping_add(1);
            }
            sleep(again.delay).await;
        }
    }

    /// The token of the last message; what the request had before the first.
    pub fn token(&self) -> &str {
        &self.request.resume_token
    }

    async fn message(&mut self) -> Result<WatchResponse, Error> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let stream = self.begin(self.client.options.deadline).await?;
                self.stream.insert(stream)
            }
        };
        match stream.message().await {
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(Error::Unreachable {
                message: "the watch was ended".to_owned(),
                may_be_applied: false,
            }),
            Err(status) => Err(Error::of(&status, false)),
        }
    }

    async fn begin(&self, within: Duration) -> Result<Streaming<WatchResponse>, Error> {
        let mut stub = self.client.stub(self.place);
        // Without a deadline of its own: the stream lasts.
        let begun = timeout(within, stub.watch(Request::new(self.request.clone()))).await;
        match begun {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(Error::of(&status, false)),
            Err(_) => Err(Error::Unreachable {
                message: "the watch did not begin within the deadline".to_owned(),
                may_be_applied: false,
            }),
        }
    }
}
