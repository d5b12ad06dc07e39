//! When the process stops, and how long that may take.
//!
//! Owns the signals and the waits. The order in which the parts stop is the order in which they were made, backwards, and so is
//! next to it: [`crate::start::Running::stop`].

use std::{io, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::Instant,
};

use crate::settings::{DAY, Unfit, within};

/// Signals this close together are one.
const REPEATED_WITHIN: Duration = Duration::from_millis(200);

/// The `[shutdown]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How long calls under way may take to finish. Default: 10 s.
    #[serde(with = "humantime_serde")]
    pub calls_wait: Duration,
    /// How long the queue may take to drain after that. Default: 30 s. An orchestrator's own patience should be longer than both.
    #[serde(with = "humantime_serde")]
    pub drain_wait: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            calls_wait: Duration::from_secs(10),
            drain_wait: Duration::from_secs(30),
        }
    }
}

impl Config {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn validate(&self) -> Result<(), Unfit> {
        within("calls_wait", self.calls_wait, DAY)?;
        within("drain_wait", self.drain_wait, DAY)
    }
}

/// The signals that ask a process to stop.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    /// A terminal that closes.
    hangup: Signal,
    /// When the last one came.
    last: Option<Instant>,
}

impl StopSignals {
    /// Takes the signals from now on.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn listen() -> io::Result<StopSignals> {
        Ok(StopSignals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            last: None,
        })
    }

    /// Waits for the next one that is meant as one: what sends a signal to a process often sends it to its group as well.
    pub async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
                _ = self.hangup.recv() => {}
            }
            let now = Instant::now();
            if self.last.is_none_or(|last| now - last >= REPEATED_WITHIN) {
                self.last = Some(now);
                return;
            }
        }
    }
}
