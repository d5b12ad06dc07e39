//! The gRPC face: `tidegate.v1`, health and reflection.
//!
//! Owns threads, connections, validation of input and the statuses of failures. Decides nothing about records: that is
//! [`crate::gateway`]. In the order of a call: [`serve`] (threads, acceptor), `connection` (HTTP/2 and its bounds), `router` (path to service,
//! counting), `arrival` (a body's deadline), `unary` and [`codec`] (messages), `service` (the methods), `stream` (the one that lasts), `convert` (validation), [`status`] (failures). The operators' service,
//! on an address of its own, is [`admin`].

pub mod admin;
mod arrival;
pub mod codec;
mod connection;
mod convert;
mod reflection;
mod router;
pub mod serve;
mod service;
pub mod status;
mod stream;
mod unary;
mod watch;

/// The generated code of `tidegate.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("tidegate.v1");

    /// The descriptors of the contract, both services of it, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tidegate_descriptor.bin"));
}
