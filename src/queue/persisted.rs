//! Waiting until accepted writes have left the queue, and looking at what has not.
//!
//! Owns the deadlines of those waits, and that whoever gives up leaves nothing behind. Does not own who is told what (the pending tables), nor
//! what the store has of other gateways' writes. Everything here is cancel-safe; each wait holds a few words until it ends, so their number is
//! bounded by the calls that wait. What is waited for is drained at once, whatever the delay, and nothing is gathered while somebody waits.

use std::sync::{Arc, atomic::Ordering};

use tokio::time::{Instant, timeout_at};

use super::{
    Fate, Held, PendingEntry, Queue, Shared,
    pending::{Pending, Watch},
};
use crate::{
    error::{Error, ErrorKind},
    model::{Key, Tags, Timestamp, Version},
};

impl Queue {
    /// Waits until the store is known to have `version` of a key or a higher one, or until that write, or a newer one that stood for it, is
    /// among the dead letters. At once [`Fate::Unknown`] where neither is pending here: then the store can tell, or another gateway has it.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`].
    pub async fn persisted(&self, key: &Key, version: Version, deadline: Instant) -> Result<Fate, Error> {
        let waiting = Wait::begin(&self.shared, self.shared.index(key), Some(key), |pending, now| {
            pending.await_stored(key, version, now)
        });
        match waiting {
            Some(wait) => wait.end(deadline).await,
            None => Ok(Fate::Unknown),
        }
    }

    /// Waits until nothing of a key is pending here that is older than `version`, nor any write of it on its way that had its passage before
    /// this call. Newer writes that keep coming do not prolong it.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`].
    pub async fn settled_below(&self, key: &Key, version: Version, deadline: Instant) -> Result<(), Error> {
        #[cfg(feature = "planted-faults")]
        if crate::planted::is(crate::planted::Fault::DecidedBeforePending) {
            return Ok(());
        }
        let waiting = Wait::begin(&self.shared, self.shared.index(key), Some(key), |pending, now| {
            pending.await_settled(key, version, now)
        });
        match waiting {
            Some(wait) => wait.end(deadline).await,
            None => Ok(()),
        }
    }

    /// Waits until everything has left the queue that was accepted before the call: it is in the store, or superseded there, or among the
    /// dead letters. Until then no write is delayed.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`].
    pub async fn all_persisted(&self, deadline: Instant) -> Result<(), Error> {
        let _hurry = Hurry::begin(&self.shared);
        let shards = 0..self.shared.shards.len();
        let begin = |index| Wait::begin(&self.shared, index, None, |pending, _| pending.await_all());
        // All of them before the first await: what is accepted later is not waited for.
        let waits: Vec<Wait<'_, ()>> = shards.filter_map(begin).collect();
        self.shared.wake_all();
        for wait in waits {
            wait.end(deadline).await?;
        }
        Ok(())
    }

    /// How many writes have gone to the dead letters since the start. Those that [`Queue::all_persisted`] and [`Queue::persisted`] have waited
    /// for are among them by then.
    pub fn dead_lettered(&self) -> u64 {
        self.shared.dead_lettered.load(Ordering::Relaxed)
    }

    /// The pending writes of a namespace whose keys begin with `prefix`, with their tags, in order, from the first one after `after`; at most `limit`, and if they
    /// are fewer there are no more. Of one moment within each shard, and not of all of them.
    pub fn pending_range(
        &self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Vec<(Key, PendingEntry, Tags)> {
        let mut found = Vec::new();
        for shard in &self.shared.shards {
            let pending = shard.pending.lock();
            found.extend(pending.range(namespace, prefix, after).take(limit));
        }
        // No key is in two shards.
        found.sort_unstable_by(|(a, ..), (b, ..)| a.cmp(b));
        found.truncate(limit);
        found
    }
}

/// A wait in the table of one shard, which is taken back when this is dropped.
struct Wait<'a, T> {
    shared: &'a Arc<Shared>,
    index: usize,
    key: Option<&'a Key>,
    watch: Watch<T>,
}

impl<'a, T> Wait<'a, T> {
    /// Begins one, if there is anything to wait for.
    fn begin(
        shared: &'a Arc<Shared>,
        index: usize,
        key: Option<&'a Key>,
        watch: impl FnOnce(&mut Pending<Held>, Timestamp) -> Option<Watch<T>>,
    ) -> Option<Wait<'a, T>> {
        let now = shared.clock.now();
        let shard = &shared.shards[index];
        let watch = shared.change(shard, |pending| watch(pending, now))?;
        // It may be gathering more for its next batch.
        shard.changed.notify_one();
        Some(Wait {
            shared,
            index,
            key,
            watch,
        })
    }

    async fn end(mut self, deadline: Instant) -> Result<T, Error> {
        match timeout_at(deadline, &mut self.watch.end).await {
            Ok(Ok(end)) => Ok(end),
            // The table tells everybody before it goes, and it does not go while somebody has a handle.
            Ok(Err(_)) => Err(super::closed()),
            Err(_) => {
                let message = "earlier writes were not in the store by the deadline";
                Err(Error::new(ErrorKind::Timeout, message))
            }
        }
    }
}

impl<T> Drop for Wait<'_, T> {
    fn drop(&mut self) {
        let mut pending = self.shared.shards[self.index].pending.lock();
        pending.take_back(self.key, self.watch.number);
    }
}

/// While this is held no write waits out its delay.
struct Hurry<'a>(&'a Shared);

impl<'a> Hurry<'a> {
    fn begin(shared: &'a Shared) -> Hurry<'a> {
        shared.emptying.fetch_add(1, Ordering::Relaxed);
        Hurry(shared)
    }
}

impl Drop for Hurry<'_> {
    fn drop(&mut self) {
        self.0.emptying.fetch_sub(1, Ordering::Relaxed);
    }
}
