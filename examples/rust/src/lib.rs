//! What services do with Tidegate, as layers that an axum router, or any other tower service of its bodies, is put behind.
//!
//! - [`http_cache`]: responses that may be kept are kept in the gateway, for all replicas of a service together.
//! - [`rate_limit`]: each client gets so many requests in a window of time, whichever replica it asks.
//!
//! Both are put together in `src/bin/api.rs`, and run by `tests/live`, which start a gateway and ask over its socket. They use the client
//! that is generated from the contract, and nothing else of the gateway.

mod gateway;
pub mod http_cache;
pub mod rate_limit;

pub use gateway::{ConnectError, connect};
