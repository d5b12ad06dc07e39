//! What the planted faults of the queue do.
//!
//! Owns nothing but harm. Each does nothing unless it is the chosen one.

use super::Shard;
use crate::{
    model::Write,
    planted::{self, Fault},
};

/// With [`Fault::CheckpointBeforeCommit`] the journal is told that these writes are in the store, which was not asked yet.
pub(super) fn checkpoint(shard: &Shard, writes: &[Write]) {
    if planted::is(Fault::CheckpointBeforeCommit) {
        let mut pending = shard.pending.lock();
        for write in writes {
            if let Some(held) = pending.payload_of(&write.key, write.entry.version) {
                held.record.take().into_iter().for_each(|(_, record)| record.release());
            }
        }
    }
}
