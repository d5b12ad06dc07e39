//! The commands of the binary that ask a running gateway: what they take, what they print, and how they end.
//!
//! Owns their arguments and their output. Does not own the calls ([`crate::client`], `rpc::admin::client`) nor the process, which `main.rs` ends
//! with the [`exit`] code. Invariants: what was asked for is all that goes to standard output, everything else goes to standard error; a reader
//! of the output that has gone ends a command, and is no error.

pub mod admin;
pub mod exit;
pub mod progress;
pub mod table;

#[cfg(feature = "client")]
mod export;
#[cfg(feature = "client")]
mod import;
#[cfg(feature = "client")]
mod output;
#[cfg(feature = "client")]
mod read;
#[cfg(feature = "client")]
mod record;
#[cfg(feature = "client")]
mod records;
#[cfg(feature = "client")]
mod state;
#[cfg(feature = "client")]
mod target;
#[cfg(feature = "client")]
mod watch;
#[cfg(feature = "client")]
mod write;

#[cfg(feature = "client")]
pub use records::{Command, run};
