//! A Rust client of a gateway: the generated one, with deadlines, request ids, and tries that honour what the gateway asks for.
//!
//! Owns channels, what is added to a request before it is sent, and what is tried again. Does not own the messages, which are the contract's
//! ([`proto`]: what each field means, and what each call promises, is said there). Invariants: every call ends by its deadline; a write that may
//! have been applied is repeated under its request id or not at all; the last error says whether it may have been applied.
//!
//! ```no_run
//! use tidegate::client::{Client, Error, Reason, proto::{GetRequest, PutRequest}};
//!
//! # async fn example() -> Result<(), Error> {
//! let client = Client::new(&["127.0.0.1:50051"])?;
//! let put = PutRequest {
//!     namespace: "orders".into(),
//!     key: "order:1".into(),
//!     value: "paid".into(),
//!     ..PutRequest::default()
//! };
//! match client.put(put).await {
//!     Ok(written) => println!("version {}", written.version),
//!     Err(Error::Failed(failure)) if failure.reason == Reason::Invalid => println!("{:?}", failure.violations),
//!     Err(error) if error.may_be_applied() => println!("not known whether it was written: {error}"),
//!     Err(error) => return Err(error),
//! }
//!
//! // A session reads what it has written, whichever gateway answers.
//! let session = client.session();
//! let get = GetRequest { namespace: "orders".into(), key: "order:1".into(), ..GetRequest::default() };
//! let record = session.get(get).await?.entry;
//! # Ok(())
//! # }
//! ```

mod calls;
mod error;
mod pages;
mod retry;
mod session;
mod watch;

use std::{
    num::{NonZeroU32, NonZeroUsize},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint},
};

pub use self::{
    error::{Error, Failure, Reason, Violation},
    pages::Pages,
    retry::Retry,
    session::{SESSION_KEYS_MAX, Session},
    watch::Watch,
};
use self::{
    proto::gateway_client::GatewayClient,
    retry::{Effect, Tries},
};
pub use crate::rpc::proto;

/// How long a connection may take to be made.
const CONNECT_WAIT: Duration = Duration::from_secs(3);

/// How long a connection may be silent before it is asked whether it lives, and how long it may take to say so.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_WAIT: Duration = Duration::from_secs(5);

/// The longest time that a caller, or a gateway, can ask for: clocks cannot be reckoned with beyond all bounds.
const DURATION_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What a client does unless it is told otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// How long a call may take, all its tries together; at most a day. Default: 5 s, as the gateway's own.
    pub deadline: Duration,
    /// What is tried again.
    pub retry: Retry,
    /// Whether each write that has no request id is given one, so that it can be repeated safely. A write-through one costs the store a row, for
    /// the window in which the id holds. Default: true.
    pub request_ids: bool,
    /// For how long the gateways remember a request id: their `requests.window`, or less. A write that may have been applied is not repeated
    /// any later. Default: 10 min, as the gateway's own.
    pub request_id_window: Duration,
    /// Channels to each address: each is one HTTP/2 connection, and is served by one thread of the gateway. Default: 1. A caller that keeps a
    /// core busy wants as many as the gateway has threads.
    pub channels: NonZeroU32,
    /// The largest answer that is read. Default: 68 MiB, room for the largest value that a gateway can be told to take.
    pub answer_bytes_max: NonZeroUsize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            deadline: Duration::from_secs(5),
            retry: Retry::default(),
            request_ids: true,
            request_id_window: Duration::from_secs(600),
            channels: NonZeroU32::MIN,
            answer_bytes_max: NonZeroUsize::MIN.saturating_add(68 * 1024 * 1024 - 1),
        }
    }
}

/// A client of one gateway, or of several of one store. Cheap to clone; clones share the channels.
#[derive(Debug, Clone)]
pub struct Client {
    channels: Arc<Channels>,
    options: Options,
}

/// Used in turn, so that each carries its share.
#[derive(Debug)]
struct Channels {
    channels: Vec<Channel>,
    /// How many of them, from the first, reach each gateway at least once.
    gateways: usize,
    next: AtomicUsize,
}

impl Client {
    /// A client of the gateways at these addresses, as `127.0.0.1:50051` or `http://gateway:50051`. Connects when it is first used, and again
    /// when a connection is lost. To be called on a Tokio runtime.
    ///
    /// Each address must be that of one gateway, and not one behind which a balancer picks one of several: a write-behind write that may have
    /// been applied is repeated at the address that it was sent to, for another gateway does not know its request id, and would write it once
    /// more. Behind a balancer let the writes be write-through, whose ids the store keeps, or do without [`Options::request_ids`], which
    /// leaves the repetition to the caller.
    ///
    /// # Errors
    /// [`Error::Address`].
    pub fn new(addresses: &[impl AsRef<str>]) -> Result<Client, Error> {
        Client::with_options(addresses, Options::default())
    }

    /// The same with other options.
    ///
    /// # Errors
    /// [`Error::Address`].
    pub fn with_options(addresses: &[impl AsRef<str>], options: Options) -> Result<Client, Error> {
        let mut channels = Vec::new();
        // One to each first: then the next of a gateway that is gone is another one.
        for _ in 0..options.channels.get() {
            for address in addresses {
                channels.push(endpoint(address.as_ref())?.connect_lazy());
            }
        }
        Client::of(channels, addresses.len(), options)
    }

    /// A client over channels that the caller has made: with TLS, with an interceptor's connector, to a socket. Each must lead to one gateway, as
    /// the addresses of [`Client::new`].
    ///
    /// # Errors
    /// [`Error::Address`] if there are none.
    pub fn over(channels: Vec<Channel>, options: Options) -> Result<Client, Error> {
        let gateways = channels.len();
        Client::of(channels, gateways, options)
    }

    fn of(channels: Vec<Channel>, gateways: usize, options: Options) -> Result<Client, Error> {
        if channels.is_empty() {
            return Err(Error::Address {
                address: String::new(),
                rule: "at least one is needed".to_owned(),
            });
        }
        let channels = Channels {
            channels,
            gateways,
            next: AtomicUsize::new(0),
        };
        let client = Client {
            channels: Arc::new(channels),
            options,
        };
        Ok(client.deadline(options.deadline))
    }

    /// The same client, over the same channels, with another deadline for each call; of at most a day.
    #[must_use]
    pub fn deadline(&self, deadline: Duration) -> Client {
        let options = Options {
            deadline: deadline.min(DURATION_MAX),
            ..self.options
        };
        Client {
            options,
            ..self.clone()
        }
    }

    /// What it does.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// A session, which reads what it has written and what it has read.
    pub fn session(&self) -> Session {
        Session::new(self.clone())
    }

    /// The next channel.
    fn place(&self) -> usize {
        self.channels.next.fetch_add(1, Ordering::Relaxed)
    }

    fn stub(&self, place: usize) -> GatewayClient<Channel> {
        let channels = &self.channels.channels;
        GatewayClient::new(channels[place % channels.len()].clone())
            .max_decoding_message_size(self.options.answer_bytes_max.get())
            // What is too large is for the gateway to say.
            .max_encoding_message_size(usize::MAX)
    }

    /// Sends a request until there is an answer, or none is to be had.
    async fn call<Q: Clone, A>(&self, effect: Effect, request: Q, send: Sending<Q, A>) -> Result<A, Error> {
        self.call_at(self.place(), effect, request, send).await
    }

    /// The same, over that channel first.
    async fn call_at<Q: Clone, A>(
        &self,
        mut place: usize,
        effect: Effect,
        request: Q,
        send: Sending<Q, A>,
    ) -> Result<A, Error> {
        let window = self.options.request_id_window.min(DURATION_MAX);
        let mut until = Instant::now() + self.options.deadline;
        let mut tries = Tries::new(effect, self.options.retry);
        loop {
            let at = Instant::now();
            let mut sent = Request::new(request.clone());
            sent.set_timeout(until.saturating_duration_since(at));
            let answer = timeout_at(until, send(self.stub(place), sent)).await;
            let error = match answer {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => Error::of(&status, effect.is_write()),
                Err(_) => Error::TimedOut {
                    may_be_applied: effect.is_write(),
                },
            };
            let (again, error) = tries.after(error, at)?;
            until = tries.until(until, window);
            if Instant::now() + again.delay >= until {
                return Err(error);
            }
            sleep(again.delay).await;
            if again.elsewhere {
                place = place.wrapping_add(1);
            }
        }
    }
}

/// How a request is sent over the generated client.
type Sending<Q, A> = fn(GatewayClient<Channel>, Request<Q>) -> BoxFuture<'static, Result<Response<A>, Status>>;

fn endpoint(address: &str) -> Result<Endpoint, Error> {
    // Who copies an address from elsewhere may have copied a password with it.
    let shown = address
        .rsplit_once('@')
        .map_or(address.to_owned(), |(_, host)| format!("…@{host}"));
    let refused = |rule: &str| Error::Address {
        address: shown.clone(),
        rule: rule.to_owned(),
    };
    let url = match address.split_once("://") {
        None => format!("http://{address}"),
        Some(("http", _)) => address.to_owned(),
        Some(_) => {
            return Err(refused(
                "only http:// is spoken; make the channel yourself for anything else",
            ));
        }
    };
    if address.contains('@') {
        return Err(refused("no user and no password can be given"));
    }
    let uri: http::Uri = url
        .parse()
        .map_err(|_| refused("it must be HOST:PORT or http://HOST:PORT"))?;
    if uri.port_u16().is_none_or(|port| port == 0) || uri.path() != "/" {
        return Err(refused("it must be HOST:PORT or http://HOST:PORT"));
    }
    let endpoint = Endpoint::from(uri)
        .connect_timeout(CONNECT_WAIT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_WAIT);
    endpoint
        .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
        .map_err(|error| refused(&error.to_string()))
}

/// A request id that nobody else makes up.
pub(crate) fn new_request_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for address in [
            "127.0.0.1:50051",
            "gateway:1",
            "[::1]:50051",
            "http://gateway:50051",
            "http://gateway:50051/",
        ] {
            assert!(endpoint(address).is_ok(), "{address}");
        }
        for address in [
            "",
            "gateway",
            "gateway:0",
            "https://gateway:50051",
            "http://gateway:1/path",
            "a b:1",
            ":::",
            "http://user:secret@gateway:1",
        ] {
            let error = endpoint(address).expect_err(address).to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[tokio::test]
    async fn no_time_is_too_long_to_reckon_with() {
        let options = Options {
            deadline: Duration::MAX,
            request_id_window: Duration::MAX,
            retry: Retry::NONE,
            ..Options::default()
        };
        let client = Client::with_options(&["127.0.0.1:1"], options).expect("an address");
        assert_eq!(client.options().deadline, DURATION_MAX);
        assert_eq!(client.deadline(Duration::MAX).options().deadline, DURATION_MAX);
        // Nobody listens there.
        let error = client.put(proto::PutRequest::default()).await;
        assert!(matches!(error, Err(Error::Unreachable { .. })), "{error:?}");
    }

    #[test]
    fn made_up_ids_are_valid_and_differ() {
        let (one, other) = (new_request_id(), new_request_id());
        assert_ne!(one, other);
        assert_eq!(one.len(), 32);
    }
}
