//! Tidegate: a write-behind caching persistence gateway over gRPC.
//!
//! The map, in reading order. A request goes down, an answer comes back by return value, and nothing points up.
//!
//! - [`model`], [`clock`], [`error`], [`namespace`], [`settings`], [`backoff`], [`telemetry`]: the vocabulary. All others may
//!   use them; of I/O they have only the log.
//! - [`rpc`]: the gRPC face. Threads, validation, statuses.
//! - [`gateway`]: the algorithm: get, put, delete in plain steps. Alone knows both of the next two.
//! - [`cache`]: copies for reading. L1 in memory, Redis, one load per missing key.
//! - [`queue`]: writes accepted and not yet in the store, and their drain.
//! - [`store`]: the durable end: PostgreSQL or SQLite behind one trait.
//! - [`config`], [`data_dir`], [`start`], [`shutdown`], [`health`], [`operations`]: the process around it.
//! - [`client`] (with the feature of that name, on by default): a client for Rust programs. [`commands`]: the commands that ask a gateway that runs.

/// A place where a test build may be told to kill itself (`planted`); nothing in any other build.
macro_rules! kill_point {
    ($name:ident) => {
        #[cfg(feature = "planted-faults")]
        $crate::planted::reach($crate::planted::KillPoint::$name);
    };
}

pub mod backoff;
pub mod cache;
#[cfg(feature = "client")]
pub mod client;
pub mod clock;
pub mod commands;
pub mod config;
pub mod data_dir;
pub mod error;
pub mod gateway;
pub mod health;
pub mod model;
pub mod namespace;
pub mod operations;
#[cfg(feature = "planted-faults")]
pub mod planted;
pub mod queue;
pub mod rpc;
pub mod settings;
pub mod shutdown;
pub mod start;
pub mod store;
pub mod telemetry;
