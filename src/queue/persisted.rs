//! Waiting until accepted writes have left the queue, and looking at what has not.
//!
//! Owns the deadlines of those waits, and that whoever gives up leaves nothing behind. Does not own who is told what (the pending tables), nor
//! what the store has of other gateways' writes. Everything here is cancel-safe; each wait holds a few words until it ends, so their number is
//! bounded by the calls that wait. What is waited for is drained at once, whatever the delay, and nothing is gathered while somebody waits.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

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
        let waits = self.begin_waits(None, &mut 0);
        end_all(waits, deadline).await
    }

    /// The same of a namespace, or of all, for an operator, who is told where a pause makes the wait vain: how many writes were waited for.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`]; [`ErrorKind::Paused`], now or as soon as it is.
    pub async fn flush(&self, namespace: Option<&str>, deadline: Instant) -> Result<u64, Error> {
        let _hurry = Hurry::begin(&self.shared);
        // Before the waits begin, so that no pause is missed.
        let mut paused = self.shared.paused.subscribe();
        let mut waited_for = 0;
        let waits = self.begin_waits(namespace, &mut waited_for);
        let is_in_vain = |paused: &BTreeMap<String, Timestamp>| match namespace {
            None => !paused.is_empty(),
            Some(namespace) => paused.contains_key(namespace),
        };
        let in_vain = async { paused.wait_for(is_in_vain).await.map(drop) };
        tokio::select! {
            biased;
            // The other end is ours.
            Ok(()) = in_vain => {
                let message = "the drain is paused, so what is pending stays: resume it first";
                Err(Error::new(ErrorKind::Paused, message))
            }
            ended = end_all(waits, deadline) => ended.map(|()| waited_for),
        }
    }

    /// Waits in all shards, all of them begun before the first await: what is accepted later is not waited for.
    fn begin_waits(&self, namespace: Option<&str>, waited_for: &mut u64) -> Vec<Wait<'_, ()>> {
        let begin = |index| {
            Wait::begin(&self.shared, index, None, |pending, _| {
                let (watch, left) = pending.await_all(namespace)?;
                *waited_for += left as u64;
                Some(watch)
            })
        };
        let waits = (0..self.shared.shards.len()).filter_map(begin).collect();
        self.shared.wake_all();
        waits
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

async fn end_all(waits: Vec<Wait<'_, ()>>, deadline: Instant) -> Result<(), Error> {
    for wait in waits {
        wait.end(deadline).await?;
    }
    Ok(())
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
