//! The settings of the journal.
//!
//! Owns their meaning, defaults, what is refused, and the sizes that follow from them. Does not own where they are read from.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::settings::{DAY, Unfit, within};

use super::format::{CHARGE_OVERHEAD_BYTES, SEGMENT_HEADER_BYTES};

/// Segments that only stragglers may take. Two: the records moved out of one segment may spill a little into a second one.
pub(super) const RESERVE_SEGMENTS: usize = 2;

/// The fewest segments that a journal can work with: the reserve, one being written, one being freed, and one between.
const SEGMENTS_MIN: u64 = 5;
/// The most: each is an open file.
const SEGMENTS_MAX: u64 = 512;

/// The most that a record adds to its key and value: five field numbers and four lengths and numbers, none of more than ten bytes, and
/// its own length.
pub(super) const RECORD_FRAME_BYTES: usize = 64;

const SEGMENT_BYTES_MIN: u64 = 1 << 20;
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// The settings of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How large each file of the journal is. Default: 67,108,864 (64 MiB); from 1 MiB to 1 GiB. An eighth of it is the longest
    /// record. Larger files are made and freed less often, and are freed later. A start goes on with the size of the largest file that
    /// it finds: lowered, it takes effect only in a directory without a journal.
    pub segment_bytes: u64,
    /// How large the journal may become: all of its files together. Default: 1,073,741,824 (1 GiB); from 5 to 512 times
    /// `segment_bytes`, and never less than five files as large as they are. More rides out a longer outage of the store; when full, writes
    /// wait.
    pub bytes_max: u64,
    /// After how long without writes the journal notes on disk what has left it. Default: 1 s. Shorter leaves less to replay after
    /// a crash, and costs a sync per lull.
    #[serde(with = "humantime_serde")]
    pub idle_sync: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            segment_bytes: 64 << 20,
            bytes_max: 1 << 30,
            idle_sync: Duration::from_secs(1),
        }
    }
}

impl Config {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// A sentence that begins with the field.
    pub fn validate(&self) -> Result<(), Unfit> {
        if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&self.segment_bytes)
            || !self.segment_bytes.is_multiple_of(4096)
        {
            return Err(Unfit::new(
                "segment_bytes",
                "must be from 1,048,576 to 1,073,741,824, and a multiple of 4,096",
            ));
        }
        if !(SEGMENTS_MIN..=SEGMENTS_MAX).contains(&(self.bytes_max / self.segment_bytes)) {
            return Err(Unfit::new(
                "bytes_max",
                format!("must be from {SEGMENTS_MIN} to {SEGMENTS_MAX} times segment_bytes"),
            ));
        }
        within("idle_sync", self.idle_sync, DAY)
    }

    /// The most bytes that a key, its value, its tags and its request id may have together for a write to fit.
    pub fn write_bytes_max(&self) -> usize {
        self.buffer_bytes() - CHARGE_OVERHEAD_BYTES - RECORD_FRAME_BYTES
    }

    /// The same for a journal that has files of `segment_bytes`: a record may be as long as those allow.
    pub(super) fn not_below(&self, segment_bytes: u64) -> Config {
        let segment_bytes = self.segment_bytes.max(segment_bytes);
        Config {
            segment_bytes,
            bytes_max: self.bytes_max.max(segment_bytes * SEGMENTS_MIN),
            idle_sync: self.idle_sync,
        }
    }

    /// How many bytes may be granted to records that are not written yet. Also the longest record.
    pub(super) fn buffer_bytes(&self) -> usize {
        (self.segment_bytes / 8) as usize
    }

    /// How many segments there may be.
    pub(super) fn segments_max(&self) -> usize {
        (self.bytes_max / self.segment_bytes) as usize
    }

    /// How many bytes may be live. Three quarters of what fits beside the reserve and the segment being written: moving the stragglers
    /// of any round of segments then frees a quarter of them.
    pub(super) fn live_bytes_max(&self) -> usize {
        let usable = self.segments_max() - RESERVE_SEGMENTS - 1;
        usable * (self.segment_bytes as usize - SEGMENT_HEADER_BYTES) / 4 * 3
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
    fn what_cannot_work_is_refused() {
        assert!(toml::from_str::<Config>("segment_bites = 1").is_err());
        for (text, field) in [
            ("segment_bytes = 1000", "segment_bytes"),
            ("segment_bytes = 2147483648", "segment_bytes"),
            ("bytes_max = 67108864", "bytes_max"),
            ("idle_sync = '0s'", "idle_sync"),
            ("idle_sync = '2d'", "idle_sync"),
        ] {
            let config = toml::from_str::<Config>(text).expect("readable");
            assert!(config.validate().expect_err(text).field == field);
        }
    }
}
