//! The settings of the store's users. The store's address is a top-level setting, and so not here.

use std::{num::NonZeroUsize, time::Duration};

use serde::{Deserialize, Serialize};

use crate::settings::{DAY, Unfit, count, within};

/// How the gateway uses its store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether pending migrations are applied before the store is used. Default: true. Without it the role needs no right to change the
    /// schema, and somebody has to apply them before a new version starts.
    pub migrate: bool,
    /// How long the start waits for the store to answer before it fails. Default: 30 s. A gateway that used this store within the last twelve
    /// hours, from the same data directory, waits two seconds and then starts without it.
    #[serde(with = "humantime_serde")]
    pub connect_wait: Duration,
    /// How long one call to the store may take, connecting included, before its connection is given up. Default: 10 s. Shorter
    /// notices a hung store sooner and cuts off large commits on a slow one.
    #[serde(with = "humantime_serde")]
    pub call_timeout: Duration,
    /// Connections that commit write-through writes; never more than the store can use at once (SQLite: one). Default: 4. More
    /// lowers the wait for a commit to begin, and makes each commit hold fewer writes.
    pub commit_connections: NonZeroUsize,
    /// The most write-through writes of one commit. Default: 1,000.
    pub commit_batch_writes_max: NonZeroUsize,
    /// The most bytes of keys and values of one commit; a single larger write still has a commit to itself. Default: 4 MiB. Larger
    /// makes each commit, and so the wait for the next, longer.
    pub commit_batch_bytes_max: NonZeroUsize,
    /// How many write-through writes may wait for a commit to begin; further ones are refused. Default: 10,000.
    pub waiting_commits_max: NonZeroUsize,
    /// How many bytes of write-through writes may wait for a commit to begin; further ones are refused. Default: 64 MiB.
    pub waiting_commits_bytes_max: NonZeroUsize,
    /// Connections that decide writes which depend on what stands (conditions, counters, request ids); never more than the store can use at
    /// once (SQLite: one). Default: 2. More lowers the wait for a decision to begin, and makes those of one key wait for each other's locks.
    pub decide_connections: NonZeroUsize,
    /// Connections that load what the caches lack. Default: 2.
    pub load_connections: NonZeroUsize,
    /// The most keys of one load query. Default: 1,000. Whatever this is, a query brings up 16 MiB of values, and one value more, at most; the keys
    /// beyond are asked for in another.
    pub load_batch_keys_max: NonZeroUsize,
    /// How many reads may wait for a load query to begin; further ones are refused. Default: 10,000.
    pub waiting_loads_max: NonZeroUsize,
    /// Connections that find the rows of scans, each made when it is first needed. Default: 4.
    pub scan_connections: NonZeroUsize,
    /// How many scans may wait for one of them; further ones are refused. Default: 256.
    pub waiting_scans_max: NonZeroUsize,
    /// How long a deleted or expired row is kept. Default: 7 days. Longer than `call_timeout` and every `write_delay`. A write-behind write
    /// that reaches the store later than this after it was stamped, as from a gateway that was cut off, goes to the dead letters if its key
    /// has no row: it could bring back what was deleted after it. Shorter saves room. Of several gateways the shortest counts.
    #[serde(with = "humantime_serde")]
    pub tombstone_retention: Duration,
    /// How often rows past their retention are looked for, give or take a tenth. Default: 10 minutes.
    #[serde(with = "humantime_serde")]
    pub collect_interval: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            migrate: true,
            connect_wait: Duration::from_secs(30),
            call_timeout: Duration::from_secs(10),
            commit_connections: count::<4>(),
            commit_batch_writes_max: count::<1_000>(),
            commit_batch_bytes_max: count::<{ 4 << 20 }>(),
            waiting_commits_max: count::<10_000>(),
            waiting_commits_bytes_max: count::<{ 64 << 20 }>(),
            decide_connections: count::<2>(),
            load_connections: count::<2>(),
            load_batch_keys_max: count::<1_000>(),
            waiting_loads_max: count::<10_000>(),
            scan_connections: count::<4>(),
            waiting_scans_max: count::<256>(),
            tombstone_retention: Duration::from_secs(7 * 24 * 3600),
            collect_interval: Duration::from_secs(600),
        }
    }
}

impl Config {
    /// Refuses what cannot work. Zero counts never get here: their types have none.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn validate(&self) -> Result<(), Unfit> {
        within("connect_wait", self.connect_wait, DAY)?;
        within("call_timeout", self.call_timeout, DAY)?;
        within("tombstone_retention", self.tombstone_retention, 3_660 * DAY)?;
        within("collect_interval", self.collect_interval, DAY)?;
        if self.tombstone_retention <= self.call_timeout {
            let reason = "must be longer than call_timeout, or ordinary writes could come too late";
            return Err(Unfit::new("tombstone_retention", reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_survive_being_written_and_read() {
        let defaults = Config::default();
        defaults.validate().expect("valid");
        let text = toml::to_string(&defaults).expect("serializable");
        assert_eq!(toml::from_str::<Config>(&text).expect("readable"), defaults);
    }

    #[test]
    fn zeroes_and_unknown_names_are_refused() {
        assert!(toml::from_str::<Config>("commit_connections = 0").is_err());
        assert!(toml::from_str::<Config>("commit_conections = 1").is_err());
        let config = toml::from_str::<Config>("call_timeout = '0s'").expect("readable");
        assert!(config.validate().expect_err("zero").field == "call_timeout");
        let config = toml::from_str::<Config>("call_timeout = '5s'\ntombstone_retention = '5s'").expect("readable");
        assert!(config.validate().expect_err("equal").field == "tombstone_retention");
    }
}
