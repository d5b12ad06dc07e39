//! The examples at work: services that really listen, before a gateway that really does, in this process on free ports.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    missing_docs,
    reason = "a test binary: it may fail loudly, and nobody is outside to reach or read it"
)]

mod http_cache;
mod rate_limit;
mod world;
