//! L1: copies in this process, shared by all of its serving threads.
//!
//! Owns the bound in bytes and the comparison of versions, made in place under the lock of the key's shard. Does not own when a
//! load may land (`flight` does), nor lifetimes (the gateway sets them). Invariants: no landing puts a lower version over a higher
//! one that stands; no lock lives across an await; a copy may be evicted at any time, and then nothing of it is remembered.
//!
//! The last means that an older copy could land late in the slot of an evicted newer one. A load cannot, for it lands only while
//! its flight stands; a write's own landing follows its answer from the slower tier at once.

use std::mem;

use quick_cache::{
    OptionsBuilder, Weighter,
    sync::{Cache, DefaultLifecycle, EntryAction, EntryResult},
};
use serde::{Deserialize, Serialize};

use crate::{
    cache::Copy,
    model::{Key, Timestamp, Version},
};

/// What a copy takes beyond its key's text and its value: its slot with the links, the places in the hash table, and the
/// headers and rounding of two allocations.
const OVERHEAD_BYTES: usize = mem::size_of::<Key>() + mem::size_of::<Copy>() + 80;

/// What a copy is taken to weigh when room is planned for the traces of evicted keys, which make a returning key stay. Far
/// smaller copies get fewer traces than would serve them best, and far larger ones leave room unused.
const TYPICAL_BYTES: usize = 1024;

/// The least share of the bytes that a shard gets: several copies of the largest usual value.
const SHARD_BYTES_MIN: usize = 8 * 1024 * 1024;

/// The settings of L1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How many bytes the copies may take together: keys, values, and what it takes to keep them. Default: 268435456 (256 MiB).
    /// 0 turns L1 off. More answers more reads from memory; the traces of evicted keys take up to a sixteenth on top.
    pub bytes_max: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            bytes_max: 256 * 1024 * 1024,
        }
    }
}

/// What became of a copy that was offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Landing {
    /// It stands now, unless it is larger than a shard keeps: then nothing stands.
    Landed,
    /// The same version stood: its lifetime was renewed, if the offered one ends later.
    Renewed,
    /// Something newer stands, and was left.
    Refused {
        /// What stands.
        standing: Copy,
    },
}

/// How an offered copy compares to the one that stands.
enum Order {
    Newer,
    Same,
    Older,
}

/// L1.
#[derive(Debug)]
pub struct Memory {
    copies: Cache<Key, Copy, Weigh, foldhash::fast::RandomState>,
}

impl Memory {
    /// An empty L1.
    pub fn new(config: &Config) -> Memory {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let shards = (config.bytes_max / SHARD_BYTES_MIN).clamp(1, threads * 8);
        // Rounded down to a power of two, for it is rounded up below here.
        let shards = 1 << shards.ilog2();
        let options = OptionsBuilder::new()
            .shards(shards)
            .estimated_items_capacity(config.bytes_max / TYPICAL_BYTES)
            .weight_capacity(config.bytes_max as u64)
            .build()
            .expect("both capacities are set");
        Memory {
            copies: Cache::with_options(
                options,
                Weigh,
                foldhash::fast::RandomState::default(),
                DefaultLifecycle::default(),
            ),
        }
    }

    /// The copy of a key, while it may answer at `now`. A record past its own expiry comes back as what it is: it means absent.
    pub fn get(&self, key: &Key, now: Timestamp) -> Option<Copy> {
        self.copies.get(key).filter(|copy| copy.is_fresh(now))
    }

    /// The version that stands on a key, however old the copy. Does not count as a use of it.
    pub fn version(&self, key: &Key) -> Option<Version> {
        self.copies.peek(key).and_then(|copy| copy.version())
    }

    /// Offers the copy of a write, or of anything else but a load. A known absence lands only where no entry stands.
    ///
    /// The value should own its bytes: a slice of a larger buffer keeps all of that alive, beyond the bound.
    pub fn land(&self, key: &Key, copy: Copy) -> Landing {
        self.land_where(key, copy, Order::Older)
    }

    /// Offers what a load found, which only the key's standing flight may do: a known absence lands over an entry too, for
    /// the store was asked and no write came in between.
    pub(super) fn land_load(&self, key: &Key, copy: Copy) -> Landing {
        self.land_where(key, copy, Order::Newer)
    }

    /// Removes the copy of a key if exactly `version` stands. Whether it did.
    pub fn drop_version(&self, key: &Key, version: Version) -> bool {
        self.copies
            .remove_if(key, |copy| copy.version() == Some(version))
            .is_some()
    }

    /// How many copies there are.
    pub fn len(&self) -> usize {
        self.copies.len()
    }

    /// Whether there is no copy.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// What the copies weigh, in bytes.
    pub fn bytes(&self) -> u64 {
        self.copies.weight()
    }

    fn land_where(&self, key: &Key, mut copy: Copy, absence_over_entry: Order) -> Landing {
        let weight = Weigh.weight(key, &copy);
        let entry = self.copies.entry(key, None, |_, standing| {
            match order(standing, &copy, absence_over_entry) {
                // What grows goes through an insertion, which alone evicts others to make room.
                Order::Newer if weight > Weigh.weight(key, standing) => EntryAction::ReplaceWithGuard,
                Order::Newer => {
                    mem::swap(standing, &mut copy);
                    EntryAction::Retain(Landing::Landed)
                }
                Order::Same => {
                    if copy.fresh_until > standing.fresh_until {
                        standing.fresh_until = copy.fresh_until;
                    }
                    standing.loaded_at = standing.loaded_at.max(copy.loaded_at);
                    EntryAction::Retain(Landing::Renewed)
                }
                Order::Older => EntryAction::Retain(Landing::Refused {
                    standing: standing.clone(),
                }),
            }
        });
        match entry {
            EntryResult::Retained(landing) => landing,
            EntryResult::Vacant(slot) | EntryResult::Replaced(slot, _) => {
                // Inserted at once: others who land on this key wait while the slot is held, and then compare. The slot cannot
                // have been taken away, for nothing here removes or inserts past it; if it had, nothing stands, which is safe.
                let _ = slot.insert(copy);
                Landing::Landed
            }
            EntryResult::Removed(..) | EntryResult::Timeout => {
                unreachable!("the callback does not remove, and the wait for a slot has no limit")
            }
        }
    }
}

fn order(standing: &Copy, offered: &Copy, absence_over_entry: Order) -> Order {
    match (standing.version(), offered.version()) {
        (None, None) => Order::Same,
        (None, Some(_)) => Order::Newer,
        (Some(_), None) => absence_over_entry,
        (Some(standing), Some(offered)) if offered > standing => Order::Newer,
        (Some(standing), Some(offered)) if offered == standing => Order::Same,
        (Some(_), Some(_)) => Order::Older,
    }
}

#[derive(Debug, Clone)]
struct Weigh;

impl Weighter<Key, Copy> for Weigh {
    fn weight(&self, key: &Key, copy: &Copy) -> u64 {
        let value = copy.entry.as_ref().map_or(0, |entry| entry.value_bytes());
        (key.bytes() + value + OVERHEAD_BYTES) as u64
    }
}

#[cfg(test)]
mod tests;
