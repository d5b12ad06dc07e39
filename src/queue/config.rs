//! The settings of the queue.
//!
//! Owns their meaning, defaults and what is refused. Does not own where they are read from.

use std::{num::NonZeroUsize, time::Duration};

use serde::{Deserialize, Serialize};

use super::budget::Budget;
use crate::settings::{DAY, Unfit, count, within};

/// The most drain workers: each holds a connection of the store.
const DRAIN_WORKERS_MAX: usize = 64;

/// The longest gathering: whoever wants a longer delay wants that of a namespace.
const DRAIN_INTERVAL_MAX: Duration = Duration::from_secs(10);

/// The settings of the queue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How many writes may be pending. Default: 100,000. More rides out a longer outage of the store, and loses more with the
    /// process where writes rest on memory alone.
    pub entries_max: NonZeroUsize,
    /// How many bytes they may hold together: keys, values and a flat charge each. Default: 268,435,456 (256 MiB). As above, in
    /// memory.
    pub bytes_max: NonZeroUsize,
    /// The share of either bound from which on no write waits out its `write_delay`. Default: 0.5. Higher coalesces more and leaves
    /// less room for a burst.
    pub pressure: f64,
    /// How many workers write to the store, each over a connection of its own; fewer where the store has fewer writers. Default: 4,
    /// at most 64. More drain faster until the store is busy, and make batches smaller.
    pub drain_workers: NonZeroUsize,
    /// The most writes of one commit. Default: 1,000. More is little faster and holds row locks longer.
    pub drain_batch_writes_max: NonZeroUsize,
    /// The bytes at which a commit takes no further write. Default: 4,194,304 (4 MiB). As above.
    pub drain_batch_bytes_max: NonZeroUsize,
    /// How long a worker gathers writes from one batch to the next, unless there are enough for a whole one or somebody waits for the store.
    /// The first write after a pause goes at once. Default: 100 ms; 0 gathers only for as long as a commit takes. Longer costs the store less for
    /// each write, for a small batch takes it nearly as long as a large one, and leaves it behind by as much.
    #[serde(with = "humantime_serde")]
    pub drain_interval: Duration,
    /// How long a worker waits after a failed commit; twice as long after each further one. Default: 50 ms. Shorter recovers
    /// sooner and presses a struggling store more.
    #[serde(with = "humantime_serde")]
    pub retry_backoff_min: Duration,
    /// The longest it waits. Default: 10 s. Longer spares a store that is down, and notices its return later.
    #[serde(with = "humantime_serde")]
    pub retry_backoff_max: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            entries_max: count::<100_000>(),
            bytes_max: count::<{ 256 << 20 }>(),
            pressure: 0.5,
            drain_workers: count::<4>(),
            drain_batch_writes_max: count::<1_000>(),
            drain_batch_bytes_max: count::<{ 4 << 20 }>(),
            drain_interval: Duration::from_millis(100),
            retry_backoff_min: Duration::from_millis(50),
            retry_backoff_max: Duration::from_secs(10),
        }
    }
}

impl Config {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn validate(&self) -> Result<(), Unfit> {
        for (field, bound) in [("entries_max", self.entries_max), ("bytes_max", self.bytes_max)] {
            if bound.get() > Budget::BOUND_MAX {
                return Err(Unfit::new(field, format!("must be at most {}", Budget::BOUND_MAX)));
            }
        }
        if !(self.pressure > 0.0 && self.pressure <= 1.0) {
            return Err(Unfit::new("pressure", "must be above 0, and at most 1"));
        }
        if self.drain_workers.get() > DRAIN_WORKERS_MAX {
            return Err(Unfit::new(
                "drain_workers",
                format!("must be at most {DRAIN_WORKERS_MAX}"),
            ));
        }
        if self.drain_interval > DRAIN_INTERVAL_MAX {
            return Err(Unfit::new(
                "drain_interval",
                format!("must be at most {DRAIN_INTERVAL_MAX:?}"),
            ));
        }
        within("retry_backoff_max", self.retry_backoff_max, DAY)?;
        within("retry_backoff_min", self.retry_backoff_min, self.retry_backoff_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused_by_name() {
        let refused = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.validate().expect_err("nonsense")
        };
        assert!(Config::default().validate().is_ok());
        assert!(refused(|c| c.bytes_max = NonZeroUsize::MAX).field == "bytes_max");
        assert!(refused(|c| c.pressure = 0.0).field == "pressure");
        assert!(refused(|c| c.pressure = f64::NAN).field == "pressure");
        assert!(refused(|c| c.drain_workers = count::<65>()).field == "drain_workers");
        assert!(refused(|c| c.retry_backoff_min = Duration::ZERO).field == "retry_backoff_min");
        assert!(refused(|c| c.retry_backoff_max = Duration::from_millis(1)).field == "retry_backoff_min");
    }

    #[test]
    fn the_settings_are_read_with_defaults_and_without_strangers() {
        let config: Config = serde_json::from_str(r#"{"drain_workers": 2, "retry_backoff_max": "1m"}"#).expect("valid");
        assert_eq!(config.drain_workers.get(), 2);
        assert_eq!(config.retry_backoff_max, Duration::from_secs(60));
        assert_eq!(config.entries_max, Config::default().entries_max);
        assert!(serde_json::from_str::<Config>(r#"{"drain_worker": 2}"#).is_err());
        assert!(serde_json::from_str::<Config>(r#"{"entries_max": 0}"#).is_err());
    }
}
