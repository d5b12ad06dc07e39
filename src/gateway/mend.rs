//! What Redis has yet to be told: writes whose publishing failed, and pending writes whose copies there end or were left behind.
//!
//! Owns when and in which order it is told. Does not own which writes those are (`repairs`, the queue). Invariant: a pending write enters an
//! empty slot only after the store was asked since its token was left: something newer may have stood there and be in the store by now.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    select,
    task::JoinSet,
    time::{Instant, interval, sleep},
};

use super::Gateway;
use crate::{
    cache::redis::{Hold, KEPT_MIN, Published, RedisCache, RedisFailure},
    model::{Key, Tags, Timestamp, Version, Write},
    queue::PendingEntry,
};

/// Between two tries to repair.
const REPAIR_INTERVAL: Duration = Duration::from_millis(100);
/// How many keys are told of at a time: more would compete with the calls.
const AT_A_TIME: usize = 64;
/// How long a write may be pending before its copy in Redis is renewed, and between two renewals: a third of the least that it is kept.
const RENEWAL: Duration = Duration::from_secs(20);
/// Between the two renewals that follow a new epoch: the second catches what was on its way during the first.
const SECOND_RENEWAL: Duration = Duration::from_secs(2);
/// How many pending writes are renewed at most in one go, the oldest or not.
const RENEWED_MAX: usize = 100_000;

impl Gateway {
    /// Tells Redis what it was not told. For ever.
    pub async fn mend(self) {
        // After what was mended in full there is no rest; after a failure there is.
        let mut rest = true;
        loop {
            if std::mem::replace(&mut rest, true) {
                sleep(REPAIR_INTERVAL).await;
            }
            let repairs = &self.parts().sharing.repairs;
            if repairs.is_settled() || !self.redis_is_usable() {
                continue;
            }
            // What is known now is known of the epoch under which the repairs are made.
            let (now, known_at) = (self.parts().clock.now(), self.parts().sharing.known_at());
            let some = repairs.some(AT_A_TIME, now, known_at);
            let so_many = some.len();
            let failed = Arc::new(AtomicBool::new(false));
            at_a_time(some, |(key, version)| {
                let gateway = self.clone();
                let failed = Arc::clone(&failed);
                async move {
                    if gateway.repair(&key, version, now, known_at).await.is_err() {
                        failed.store(true, Ordering::Relaxed);
                    }
                }
            })
            .await;
            let left = repairs.some(AT_A_TIME, now, known_at);
            rest = so_many < AT_A_TIME || left.len() < AT_A_TIME || failed.load(Ordering::Relaxed);
        }
    }

    /// Renews the copies of writes that are pending for long, and publishes all that are pending anew under a new epoch. For ever.
    pub async fn renew(self) {
        let mut ticks = interval(RENEWAL);
        loop {
            let long_ago = select! {
                _ = ticks.tick() => RENEWAL,
                () = self.parts().sharing.renewal.notified() => {
                    self.renew_pending(Duration::ZERO).await;
                    sleep(SECOND_RENEWAL).await;
                    Duration::ZERO
                }
            };
            self.renew_pending(long_ago).await;
        }
    }

    /// Publishes what has been pending for `long_ago`.
    async fn renew_pending(&self, long_ago: Duration) {
        if !self.redis_is_usable() {
            // Their copies end, and nobody sees whether they were evicted.
            self.parts().queue.note_all_lost();
            return;
        }
        let keys = self.parts().queue.pending_for(long_ago, RENEWED_MAX);
        at_a_time(keys, |key| {
            let gateway = self.clone();
            async move {
                if gateway.republish(&key).await.is_err() {
                    gateway.parts().queue.note_lost_key(&key);
                }
            }
        })
        .await;
    }

    pub(super) fn redis_is_usable(&self) -> bool {
        self.inner.redis.as_ref().is_some_and(RedisCache::is_usable)
    }

    /// Tells of writes that are in the store, and of which Redis had no copy while they were pending: what is older may stand there, and in
    /// other replicas' memory.
    pub(super) async fn tell_of(&self, writes: Vec<(Key, Version)>) {
        at_a_time(writes, |(key, version)| {
            let gateway = self.clone();
            async move {
                let Some(redis) = &gateway.inner.redis else {
                    return;
                };
                match redis.purge(&key, version).await {
                    Ok(()) => gateway.told(&key, version),
                    Err(_) => gateway.remember(&key, version),
                }
            }
        })
        .await;
    }

    /// Publishes what is pending of a key again, which somebody has removed from Redis.
    pub(super) fn republish_later(&self, key: Key) {
        self.parts().queue.note_lost_key(&key);
        if self.parts().queue.pending(&key).is_some() {
            let gateway = self.clone();
            // A failure leaves it to the next renewal.
            self.inner
                .tasks
                .spawn(async move { drop(gateway.republish(&key).await) });
        }
    }

    /// # Errors
    /// It is still to be repaired.
    async fn repair(
        &self,
        key: &Key,
        version: Version,
        now: Timestamp,
        known_at: Timestamp,
    ) -> Result<(), RedisFailure> {
        let Some(redis) = &self.inner.redis else {
            return Ok(());
        };
        let pending = self.parts().queue.pending_version(key);
        let republished = self.republish(key).await?;
        // It is in the store by now, or that is not known of it; if it ever was pending.
        if republished == Republished::Gone || pending < Some(version) {
            redis.purge(key, version).await?;
        }
        self.parts().sharing.repairs.done(key, version, now, known_at);
        Ok(())
    }

    /// Publishes what is pending of a key, unless something newer stands: nothing older does afterwards.
    ///
    /// # Errors
    /// Redis was not told, and something older may stand there.
    pub(super) async fn republish(&self, key: &Key) -> Result<Republished, RedisFailure> {
        let parts = self.parts();
        let (Some(redis), Some(PendingEntry { entry, unconfirmed })) = (&self.inner.redis, parts.queue.pending(key))
        else {
            return Ok(Republished::Gone);
        };
        let under = parts.sharing.epochs.adopted();
        let entered = redis.enter(key).await?;
        if entered.standing > Some(entry.version) {
            return Ok(Republished::Done);
        }
        let version = entry.version;
        let mut hold = Hold::Nothing;
        if entered.standing < Some(version) {
            match parts.loads.load(key, Instant::now() + parts.load_wait).await {
                Ok(stored) if stored.as_ref().map(|stored| stored.version) >= Some(version) => {
                    return redis.purge(key, version).await.map(|()| Republished::Done);
                }
                Ok(_) => hold = Hold::Token(entered.token),
                // What is older goes all the same.
                Err(_) => {}
            }
        }
        if unconfirmed {
            return redis.purge(key, version).await.map(|()| Republished::Done);
        }
        let copy = self.copy_of(key, Some(entry.clone()), parts.clock.now());
        let write = Write {
            key: key.clone(),
            entry,
            // Of no concern to Redis.
            tags: Tags::default(),
            requests: Vec::new(),
        };
        let grace = self.grace(key).max(KEPT_MIN);
        let recalls = parts.watches.recalls_heard();
        let published = redis.publish(&write, &copy, hold, grace).await?;
        // Under another epoch it would have to be published once more.
        if published == Published::Stands(version) && under == parts.sharing.epochs.adopted() {
            parts.queue.note_published(key, version);
            // Somebody may have begun to listen after it was told, and is to be told at its drain.
            if recalls != parts.watches.recalls_heard() {
                parts.queue.note_lost_key(key);
            }
        }
        Ok(Republished::Done)
    }
}

/// What became of a write that was to be published again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Republished {
    /// Nothing older stands in Redis.
    Done,
    /// It is not pending any more, and Redis was not told anything.
    Gone,
}

/// Does `work` on every item, on [`AT_A_TIME`] of them at a time.
async fn at_a_time<T, F>(items: Vec<T>, work: impl Fn(T) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut under_way = JoinSet::new();
    for item in items {
        if under_way.len() >= AT_A_TIME {
            under_way.join_next().await;
        }
        under_way.spawn(work(item));
    }
    while under_way.join_next().await.is_some() {}
}
