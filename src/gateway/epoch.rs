//! The epoch of the copies in Redis: adopted as the control row says, and moved where those copies cannot be trusted.
//!
//! Owns what a moved epoch means for the tiers, and the reasons to move it: another server or another run of it answers (its content may be
//! old), it was emptied (what is pending is not in it any more), or writes could not be published for some time (what others read there is
//! old). While the store was never asked, as by a gateway that starts in its outage, what other gateways posted in Redis is gone by.
//!
//! Does not own the row (the store) nor the repair of single keys (`mend`). Invariant: an epoch is gone by before the copies of the
//! one before are dropped, so that nothing read under the old one lands after that.

use std::{collections::HashMap, sync::atomic::Ordering, time::Duration};

use tokio::{
    task::JoinError,
    time::{Instant, sleep},
};

use super::{Gateway, died, sharing::SETTLING, watch::RescanReason};
use crate::{
    cache::{
        epochs::{Adopted, NamespaceEpoch},
        memory::Memory,
        message::Message,
        redis::RedisCache,
    },
    error::{Error, ErrorKind},
    model::{Epoch, Timestamp, Version},
    store::{
        Session, Store,
        control::{Control, Follower, Known},
    },
};

/// For how long the sentinel of a new epoch may be missing: whoever moved it may not have reached Redis.
const SENTINEL_LATE: Duration = Duration::from_secs(10);

/// How far this replica's clock and the store's may come apart between a move of the epoch and its adoption.
const CLOCKS_DRIFT: Duration = Duration::from_millis(500);

/// How long a write may wait to be published before the epoch moves.
const UNPUBLISHED_MAX: Duration = Duration::from_secs(4);

/// The one reason to move the epoch that says nothing about Redis itself: it may be this replica alone that cannot reach it.
const UNPUBLISHED: &str = "writes could not be published";

/// Between two looks at Redis: while it answers, and while it is waited for.
const INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_UNSETTLED: Duration = Duration::from_millis(50);
/// The same while writes wait to be published, so that the epoch moves in time.
const INTERVAL_HURRIED: Duration = Duration::from_millis(200);

/// How long this replica may take to adopt an epoch that it has moved itself, and between two looks at whether it has.
const ADOPTION_WAIT: Duration = Duration::from_secs(3);
const ADOPTION_LOOK: Duration = Duration::from_millis(10);

/// What the watch over Redis remembers from look to look.
struct Watch {
    session: Session,
    /// The epoch whose sentinel was there.
    seen: Option<Epoch>,
    /// How many copies the Redis of the epoch had evicted.
    evicted: u64,
    /// Whether Redis was of use at the last look.
    usable: bool,
    /// What comes next: one until it has come, for each leaves a sentinel in Redis.
    next: Epoch,
    /// Whether it was said that the epoch moves, or should, since Redis was last in order: while it is away and writes go on the epoch moves
    /// again and again, which is no news.
    said: bool,
}

impl Gateway {
    /// Goes by what the control row says. Ends when nobody looks at it any more.
    pub async fn follow_control(self, mut control: Follower) {
        loop {
            let known = control.borrow_and_update().clone();
            if let Some(known) = known
                && self.adopt(&known).await.is_err()
            {
                return;
            }
            if control.changed().await.is_err() {
                return;
            }
        }
    }

    /// An error: L1 could not be cleared.
    async fn adopt(&self, known: &Known) -> Result<(), JoinError> {
        let (parts, sharing) = (self.parts(), &self.parts().sharing);
        let now = parts.clock.now();
        let horizon = known.control.gc_horizon.map_or(0, Version::get);
        sharing.horizon.fetch_max(horizon, Ordering::Relaxed);
        let next = adopted(&known.control, now);
        match sharing.epochs.adopted() {
            Some(current) if current.epoch == next.epoch => {
                let moved: Vec<String> = next
                    .namespaces
                    .iter()
                    .filter(|(name, own)| current.namespaces.get(*name).map(|own| own.epoch) != Some(own.epoch))
                    .map(|(name, _)| name.clone())
                    .collect();
                if !moved.is_empty() || current.server != next.server {
                    sharing.epochs.adopt(next);
                }
                if !moved.is_empty() {
                    let is_moved = |namespace: &str| moved.iter().any(|moved| moved == namespace);
                    parts.queue.note_lost(|key| is_moved(key.namespace()));
                    parts.flights.detach_where(|key| is_moved(key.namespace()));
                    let left_behind = moved.clone();
                    self.in_memory(move |memory| {
                        memory.invalidate_where(|key| left_behind.iter().any(|moved| moved == key.namespace()));
                    })
                    .await?;
                    for namespace in &moved {
                        parts.watches.note_gap(RescanReason::Invalidated, Some((namespace, "")));
                    }
                    sharing.renewal.notify_one();
                }
            }
            current => {
                #[cfg(feature = "planted-faults")]
                let (next, current) = super::planted::or_unmoved(next, current);
                sharing.epochs.adopt(next);
                parts.queue.note_all_lost();
                if current.is_some() {
                    sharing.repairs.forget_before(moved_at(known, now), now);
                    parts.flights.detach_all();
                    self.in_memory(Memory::drop_all).await?;
                }
                parts.watches.note_gap(RescanReason::EpochMoved, None);
                sharing.renewal.notify_one();
            }
        }
        let took = i64::try_from(known.asked_at.elapsed().as_millis()).unwrap_or(i64::MAX);
        sharing.asked(Timestamp(now.0.saturating_sub(took)));
        Ok(())
    }

    /// Looks at Redis each second, and moves the epoch when its copies cannot be trusted. For ever.
    pub async fn watch_redis(self, store: Store) {
        let Some(redis) = &self.inner.redis else {
            return std::future::pending().await;
        };
        let mut watch = Watch {
            session: store.session(),
            seen: None,
            evicted: 0,
            usable: false,
            next: Epoch::random(),
            said: false,
        };
        loop {
            let pause = match self.parts().sharing.epochs.adopted() {
                Some(adopted) => self.look_at_redis(redis, &adopted, &mut watch).await,
                None => {
                    self.adopt_posted(redis).await;
                    INTERVAL_UNSETTLED
                }
            };
            let usable = redis.is_usable();
            if usable && !std::mem::replace(&mut watch.usable, usable) {
                // What is pending was not published while it was not.
                self.parts().sharing.renewal.notify_one();
            }
            watch.usable = usable;
            let hurried = self.parts().sharing.repairs.since().is_some();
            sleep(if hurried { pause.min(INTERVAL_HURRIED) } else { pause }).await;
        }
    }

    /// Has what is pending told once more where Redis has evicted copies since the last look: they may have been its own.
    async fn heed_evictions(&self, redis: &RedisCache, watch: &mut Watch) {
        let Ok(evicted) = redis.evictions().await else {
            return;
        };
        if evicted != std::mem::replace(&mut watch.evicted, evicted) {
            self.parts().queue.note_all_lost();
        }
    }

    /// Goes by what other gateways posted, until the store says more.
    async fn adopt_posted(&self, redis: &RedisCache) {
        let now = self.parts().clock.now();
        let Ok(Some(posted)) = redis.notice(now).await else {
            return;
        };
        let sharing = &self.parts().sharing;
        // The store may have answered meanwhile, and knows better.
        if sharing.epochs.adopt_first(posted) {
            tracing::info!(
                "the store is not there to say which epoch holds; going by what other gateways posted in Redis"
            );
            sharing.renewal.notify_one();
        }
    }

    /// How long to wait before the next look.
    async fn look_at_redis(&self, redis: &RedisCache, adopted: &Adopted, watch: &mut Watch) -> Duration {
        let now = self.parts().clock.now();
        let answering = redis.server();
        let unpublished = self.parts().sharing.repairs.since();
        let why = match (&answering, &adopted.server) {
            _ if unpublished.is_some_and(|since| now.since(since) >= UNPUBLISHED_MAX) => UNPUBLISHED,
            // It may come back at any moment.
            (None, _) => return INTERVAL_UNSETTLED,
            (Some(server), None) => {
                // Nobody has used this epoch with any Redis yet.
                if redis.set_sentinel(adopted.epoch).await.is_ok() {
                    let epoch = adopted.epoch;
                    watch.seen = Some(epoch);
                    let claimed = watch.session.move_epoch(epoch, epoch, Some(&**server)).await;
                    self.moved(claimed.is_ok());
                }
                return INTERVAL;
            }
            (Some(server), Some(known)) if **server != **known => "another Redis answers, or it was restarted",
            (Some(_), Some(_)) => match redis.has_sentinel(adopted.epoch).await {
                Ok(true) => {
                    watch.seen = Some(adopted.epoch);
                    watch.said = false;
                    self.heed_evictions(redis, watch).await;
                    if self.parts().sharing.is_known(now) {
                        // Read only by a start without the store, which does without it.
                        let _ = redis.post_notice().await;
                    }
                    return INTERVAL;
                }
                Ok(false) if watch.seen != Some(adopted.epoch) && now < adopted.readable_from.after(SENTINEL_LATE) => {
                    // A failure is found again.
                    if redis.set_sentinel(adopted.epoch).await.is_ok() {
                        watch.seen = Some(adopted.epoch);
                    }
                    return INTERVAL;
                }
                Ok(false) => "Redis was emptied",
                Err(_) => return INTERVAL,
            },
        };
        self.move_epoch(redis, adopted.epoch, answering.as_deref(), why, watch)
            .await;
        INTERVAL
    }

    async fn move_epoch(
        &self,
        redis: &RedisCache,
        from: Epoch,
        answering: Option<&str>,
        why: &'static str,
        watch: &mut Watch,
    ) {
        // Before anybody goes by it.
        let sentinel = redis.set_sentinel(watch.next).await;
        if sentinel.is_err() && why != UNPUBLISHED {
            // Nobody is misled meanwhile; and without it the next epoch would not last.
            return;
        }
        match watch.session.move_epoch(from, watch.next, answering).await {
            Ok(true) => {
                if sentinel.is_ok() {
                    watch.seen = Some(watch.next);
                }
                watch.next = Epoch::random();
                if !std::mem::replace(&mut watch.said, true) {
                    tracing::warn!(why, "the copies in Redis are left behind: a new epoch begins");
                }
                self.parts().metrics.epochs_moved.inc();
                self.moved(true);
                // Those who do not hear it look within a second.
                let _ = redis.announce(&[Message::EpochMoved]).await;
            }
            // Somebody else was faster, or an earlier try was made whose answer was lost.
            Ok(false) => {
                watch.next = Epoch::random();
                self.moved(true);
            }
            Err(error) => {
                if !std::mem::replace(&mut watch.said, true) {
                    tracing::warn!(why, %error, "a new epoch should begin, and the store does not answer");
                }
            }
        }
    }

    /// Leaves all copies of a namespace behind, on all replicas; on this one when it returns. How many L1 had.
    ///
    /// # Errors
    /// `Unavailable` when the store does not answer: only L1 has changed, or all will within a second.
    pub async fn invalidate_namespace(&self, namespace: &str) -> Result<u64, Error> {
        // Adopting the epoch removes them, too, and does not count.
        let before = self.invalidate_namespace_in_memory(namespace).await?;
        let mut session = self.session()?;
        let moving = session.move_namespace_epoch(namespace, Epoch::random()).await;
        moving.map_err(|error| {
            let message = "the store does not answer, so the namespace may not be invalidated";
            Error::new(ErrorKind::Unavailable, message).because(error).unknown()
        })?;
        self.adopted_since(self.parts().clock.now()).await?;
        let since = self.invalidate_namespace_in_memory(namespace).await?;
        if let Some(redis) = &self.inner.redis {
            // Those who do not hear it look within a second.
            let _ = redis.announce(&[Message::EpochMoved]).await;
        }
        Ok(before + since)
    }

    async fn invalidate_namespace_in_memory(&self, namespace: &str) -> Result<u64, Error> {
        self.parts().flights.detach_where(|key| key.namespace() == namespace);
        let name = namespace.to_owned();
        let removing = self.in_memory(move |memory| memory.invalidate_where(|key| key.namespace() == name));
        Ok(removing.await.map_err(died)? as u64)
    }

    /// Waits until this replica goes by what the control row says since `then`: what it said before is not enough.
    async fn adopted_since(&self, then: Timestamp) -> Result<(), Error> {
        let end = Instant::now() + ADOPTION_WAIT;
        while !self.parts().sharing.was_asked_after(then) {
            if Instant::now() >= end {
                let message = "the namespace is left behind, and this gateway has not heard of it from the store yet";
                return Err(Error::new(ErrorKind::Unavailable, message).unknown());
            }
            // Again and again: a look may have begun before.
            self.moved(true);
            sleep(ADOPTION_LOOK).await;
        }
        Ok(())
    }

    /// Has the control row looked at.
    fn moved(&self, moved: bool) {
        if moved {
            self.parts().sharing.control_changed.notify_one();
        }
    }
}

/// When the epoch was moved at the earliest, by this replica's clock, where that is known.
fn moved_at(known: &Known, now: Timestamp) -> Timestamp {
    let Some(moved_at) = known.control.moved_at else {
        return Timestamp(0);
    };
    if known.control.now < moved_at {
        // The store's clock was set back since.
        return Timestamp(0);
    }
    let ago = known.asked_at.elapsed() + known.control.now.since(moved_at) + CLOCKS_DRIFT;
    Timestamp(now.0.saturating_sub(i64::try_from(ago.as_millis()).unwrap_or(i64::MAX)))
}

/// What a look at the control row says, at `now` or a moment before.
fn adopted(control: &Control, now: Timestamp) -> Adopted {
    let readable_from = |moved_at: Timestamp| {
        let ago = control.now.0.saturating_sub(moved_at.0);
        // The store's clock may have been set back since.
        Timestamp(now.0.saturating_sub(ago))
            .after(SETTLING)
            .min(now.after(SETTLING))
    };
    Adopted {
        epoch: control.epoch,
        server: control.cache_server.clone(),
        readable_from: control.moved_at.map_or(Timestamp(0), readable_from),
        namespaces: control
            .namespaces
            .iter()
            .map(|(name, moved)| {
                let own = NamespaceEpoch {
                    epoch: moved.epoch,
                    readable_from: readable_from(moved.moved_at),
                };
                (name.clone(), own)
            })
            .collect::<HashMap<_, _, _>>(),
    }
}
