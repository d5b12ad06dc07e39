//! The harness: real PostgreSQL, Redis and gateway processes for the tests.
//!
//! Owns starting them on free ports in temporary directories, waiting for conditions, and leaving nothing behind, even when the
//! test process is killed. Owns no expectation: what must hold is in the tests. Invariants: every wait has a deadline and says
//! what it waited for; servers are shared only where a test cannot notice (one PostgreSQL, a database per test).

pub mod calls;
pub mod client;
pub mod database;
pub mod disk;
pub mod gateway;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod redis;
pub mod stage;
#[allow(dead_code, reason = "other targets share the harness, and watch nothing")]
pub mod watch;
pub mod wire;

use std::time::Duration;

use tokio::time::{Instant, sleep};

pub use self::{
    client::{Client, Mode},
    database::Database,
    gateway::{Gateway, Setup},
};

/// How long anything may take that should take a moment: generous, for the machine may be busy with something else.
pub const SOON: Duration = Duration::from_secs(30);

/// Tries until `attempt` succeeds, and gives its result. What it answers in the meantime is what has been seen so far.
///
/// # Panics
/// After `deadline`, with what was waited for and what was seen last.
pub async fn eventually<T>(what: &str, deadline: Duration, mut attempt: impl AsyncFnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + deadline;
    loop {
        match attempt().await {
            Ok(result) => return result,
            Err(seen) if Instant::now() >= end => panic!("not within {deadline:?}: {what}; last seen: {seen}"),
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Waits until something holds.
///
/// # Panics
/// When it does not hold [`SOON`].
pub async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    eventually(what, SOON, async || expect(holds().await, "not yet")).await;
}

/// `Ok` if it holds, else what was seen instead, for [`eventually`].
pub fn expect(holds: bool, seen: impl std::fmt::Debug) -> Result<(), String> {
    if holds { Ok(()) } else { Err(format!("{seen:?}")) }
}
