//! What Redis has yet to be told: writes whose publishing failed, and pending writes whose copies there end or were left behind.
//!
//! Owns when and in which order it is told. Does not own which writes those are (`repairs`, the queue). Invariant: a pending write enters an
//! empty slot only after the store was asked since its token was left: something newer may have stood there and be in the store by now.

use std::{future::Future, time::Duration};

use tokio::{
    select,
    task::JoinSet,
    time::{Instant, interval, sleep},
};

use super::Gateway;
use crate::{
    cache::redis::{Hold, KEPT_MIN, Published, RedisFailure},
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
        let mut more = false;
        loop {
            if !more {
                sleep(REPAIR_INTERVAL).await;
            }
            more = false;
            let repairs = &self.parts().sharing.repairs;
            if repairs.is_settled() || self.redis_is_up() != Some(true) {
                continue;
            }
            // What is known now is known of the epoch under which the repairs are made.
            let (now, known_at) = (self.parts().clock.now(), self.parts().sharing.known_at());
            let some = repairs.some(AT_A_TIME, now, known_at);
            let so_many = some.len();
            at_a_time(some, |(key, version)| {
                let gateway = self.clone();
                async move { gateway.repair(&key, version, now, known_at).await }
            })
            .await;
            more = so_many == AT_A_TIME && repairs.some(AT_A_TIME, now, known_at).len() == AT_A_TIME;
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
        if self.redis_is_up() != Some(true) {
            return;
        }
        let keys = self.parts().queue.pending_for(long_ago, RENEWED_MAX);
        at_a_time(keys, |key| {
            let gateway = self.clone();
            // A failure leaves it to the next renewal.
            async move { drop(gateway.republish(&key).await) }
        })
        .await;
    }

    /// Tells of a write that is in the store, and of which Redis had no copy while it was pending: what is older may stand there, and in other
    /// replicas' memory.
    pub(super) async fn tell_of(&self, key: &Key, version: Version) {
        if let Some(redis) = &self.inner.redis
            && redis.purge(key, version).await.is_err()
        {
            self.remember(key, version);
        }
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

    async fn repair(&self, key: &Key, version: Version, now: Timestamp, known_at: Timestamp) {
        let Some(redis) = &self.inner.redis else {
            return;
        };
        let mended = match self.republish(key).await {
            // It is in the store by now, if it ever was pending.
            Ok(Republished::Gone) => redis.purge(key, version).await,
            Ok(Republished::Done) => Ok(()),
            Err(failure) => Err(failure),
        };
        if mended.is_ok() {
            self.parts().sharing.repairs.done(key, version, now, known_at);
        }
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
        };
        let grace = self.grace(key).max(KEPT_MIN);
        let published = redis.publish(&write, &copy, hold, grace).await?;
        // Under another epoch it would have to be published once more.
        if published == Published::Stands(version) && under == parts.sharing.epochs.adopted() {
            parts.queue.note_published(key, version);
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
