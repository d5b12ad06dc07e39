//! What the replicas share, as reads and writes use it: copies in Redis, tokens that say who loads, and writes that are published.
//!
//! Owns when Redis is asked, how long a load of another replica is waited for, what lands there, and that a write of which Redis could not
//! be told is remembered. Does not own the slots (`cache::redis`) nor the repair (`mend`). Cancellation: dropped at any await, a token
//! that was left is given back.

use std::{future::ready, time::Duration};

use futures_util::stream::{self, StreamExt as _};
use tokio::time::{Instant, sleep};

use super::Gateway;
use crate::{
    cache::{
        Copy, Loaded,
        redis::{Claimed, Entered, Hold, Peeked, Published, RedisCache, SlotToken},
    },
    model::{Key, Source, Timestamp, Version, Write},
};

/// Between two looks at whether another's load has landed: first, and at most.
const LOOK_FIRST: Duration = Duration::from_millis(2);
const LOOK_MAX: Duration = Duration::from_millis(20);

/// How many copies of a batch are on their way to Redis at a time: each is held once more for that.
const FILLS_AT_A_TIME: usize = 64;

/// What a read that missed is to do.
pub(super) enum Claim {
    /// Answer with what another replica has put there meanwhile.
    Found(Loaded),
    /// Wait for the load of another replica.
    Wait {
        /// What stands in Redis, and does not answer by itself.
        above: Option<Loaded>,
    },
    /// Ask the store, then land what it says with the token, if there is one.
    Load {
        token: Option<FillToken>,
        /// What stands in Redis, and does not answer by itself.
        above: Option<Loaded>,
        /// Whether Redis could not say what stands there.
        blind: bool,
    },
}

/// The duty to fill a key's slot in Redis, or to give the token back: dropped, it does.
pub(super) struct FillToken {
    gateway: Gateway,
    key: Key,
    token: Option<SlotToken>,
}

impl FillToken {
    /// Offers what a load found to Redis, in the background: only what the store itself said.
    pub(super) fn fill(self, loaded: &Loaded) {
        let gateway = self.gateway.clone();
        if let Some(fill) = self.offer(loaded) {
            let landing = gateway.clone();
            gateway.inner.tasks.spawn(async move { fill.land(&landing).await });
        }
    }

    /// The same, to be landed with others. `None`: the store did not say it, and the token is given back.
    pub(super) fn offer(mut self, loaded: &Loaded) -> Option<Fill> {
        let (Source::Store, false) = (loaded.source, loaded.stale) else {
            return None;
        };
        Some(Fill {
            token: self.token.take()?,
            key: self.key.clone(),
            copy: loaded.copy.clone(),
        })
    }
}

/// What the store said, on its way to Redis.
pub(super) struct Fill {
    key: Key,
    token: SlotToken,
    copy: Copy,
}

impl Fill {
    async fn land(self, gateway: &Gateway) {
        let Fill { key, token, copy } = self;
        if let Some(redis) = gateway.readable(&key) {
            // A failure leaves Redis without the copy; the link has counted it.
            let _ = redis.land_load(&key, token, &copy, gateway.grace(&key)).await;
        }
    }
}

impl Drop for FillToken {
    fn drop(&mut self) {
        if let Some(token) = self.token.take() {
            let (gateway, key) = (self.gateway.clone(), self.key.clone());
            self.gateway
                .inner
                .tasks
                .spawn(async move { gateway.release(&key, token).await });
        }
    }
}

impl Gateway {
    /// The newer of what is pending and what Redis holds, which may be past its lifetime.
    pub(super) async fn look_above_store(&self, key: &Key) -> Option<Loaded> {
        let pending = self.look_in_pending(key);
        let shared = match self.readable(key) {
            // A failure is a miss; the link has counted it.
            Some(redis) => redis.get(key).await.ok().flatten(),
            None => None,
        };
        let shared = shared.and_then(|copy| self.trusted(key, copy));
        super::read::newest_of(pending, shared)
    }

    /// The same of many keys, with one question to Redis; `None` of a copy that is too large to be had with others.
    pub(super) async fn look_above_store_all(&self, keys: &[&Key]) -> Vec<Option<Option<Loaded>>> {
        let mut above: Vec<_> = keys.iter().map(|key| Some(self.look_in_pending(key))).collect();
        let places = self.readable_places(keys);
        let Some(redis) = self.inner.redis.as_ref().filter(|_| !places.is_empty()) else {
            return above;
        };
        let asked: Vec<&Key> = places.iter().map(|place| keys[*place]).collect();
        // A failure is a miss; the link has counted it.
        for (place, peeked) in places.iter().zip(redis.peek_all(&asked).await.unwrap_or_default()) {
            let shared = match peeked {
                Peeked::Nothing => continue,
                Peeked::Copy(copy) => self.trusted(keys[*place], copy),
                Peeked::Large => {
                    above[*place] = None;
                    continue;
                }
            };
            above[*place] = above[*place]
                .take()
                .map(|pending| super::read::newest_of(pending, shared));
        }
        above
    }

    /// Which of these keys have copies in Redis that may be read and filled.
    fn readable_places(&self, keys: &[&Key]) -> Vec<usize> {
        let mut places = Vec::with_capacity(keys.len());
        let mut last: Option<(&str, bool)> = None;
        for (place, key) in keys.iter().enumerate() {
            let is_readable = match last {
                // Mostly they are all of one namespace.
                Some((namespace, is_readable)) if namespace == key.namespace() => is_readable,
                _ => self.readable(key).is_some(),
            };
            last = Some((key.namespace(), is_readable));
            if is_readable {
                places.push(place);
            }
        }
        places
    }

    /// Lands what loads found in Redis, in the background, and so many at a time.
    pub(super) fn land_all(&self, fills: Vec<Fill>) {
        if fills.is_empty() {
            return;
        }
        let gateway = self.clone();
        self.inner.tasks.spawn(async move {
            let landing = stream::iter(fills).map(|fill| fill.land(&gateway));
            landing.buffer_unordered(FILLS_AT_A_TIME).for_each(|()| ready(())).await;
        });
    }

    /// A load without a word from Redis.
    pub(super) fn unclaimed(&self) -> Claim {
        Claim::Load {
            token: None,
            above: None,
            blind: self.inner.redis.is_some(),
        }
    }

    /// Asks Redis for the load of a key. Where another replica has it, its landing is waited for, for a moment: until what stands is
    /// `wanted`.
    pub(super) async fn claim(&self, key: &Key, wanted: impl Fn(&Loaded, Timestamp) -> bool) -> Claim {
        let Some(redis) = self.readable(key) else {
            return self.unclaimed();
        };
        let end = Instant::now() + redis.load_wait();
        let mut pause = LOOK_FIRST;
        loop {
            // Before the call, which may be cut off and leave the token all the same.
            let token = SlotToken::random();
            let mut fill = FillToken {
                gateway: self.clone(),
                key: key.clone(),
                token: Some(token),
            };
            let Ok(claimed) = redis.claim(key, token).await else {
                // Nobody is there to take it back.
                fill.token = None;
                return self.unclaimed();
            };
            match self.heed_claim(claimed, fill, &wanted) {
                Claim::Wait { above } if Instant::now() >= end => {
                    return Claim::Load {
                        token: None,
                        above,
                        blind: false,
                    };
                }
                Claim::Wait { .. } => {}
                claim => return claim,
            }
            sleep(pause).await;
            pause = LOOK_MAX.min(pause * 2);
        }
    }

    /// The same of many keys, with one question to Redis. For another's landing nobody waits here: that is [`Claim::Wait`].
    pub(super) async fn claim_all(&self, keys: &[&Key], wanted: impl Fn(&Loaded, Timestamp) -> bool) -> Vec<Claim> {
        let mut claims: Vec<Claim> = keys.iter().map(|_| self.unclaimed()).collect();
        let places = self.readable_places(keys);
        let Some(redis) = self.inner.redis.as_ref().filter(|_| !places.is_empty()) else {
            return claims;
        };
        // As for one.
        let mut fills: Vec<FillToken> = places
            .iter()
            .map(|place| FillToken {
                gateway: self.clone(),
                key: keys[*place].clone(),
                token: Some(SlotToken::random()),
            })
            .collect();
        let asked: Vec<(&Key, SlotToken)> = fills.iter().filter_map(|fill| Some((&fill.key, fill.token?))).collect();
        let claimed = redis.claim_all(&asked).await;
        let Ok(claimed) = claimed else {
            fills.iter_mut().for_each(|fill| fill.token = None);
            return claims;
        };
        for ((place, mut fill), claimed) in places.into_iter().zip(fills).zip(claimed) {
            match claimed {
                Ok(claimed) => claims[place] = self.heed_claim(claimed, fill, &wanted),
                Err(_) => fill.token = None,
            }
        }
        claims
    }

    /// What comes of a claim that Redis has answered.
    fn heed_claim(&self, claimed: Claimed, mut fill: FillToken, wanted: impl Fn(&Loaded, Timestamp) -> bool) -> Claim {
        fill.token = claimed.token;
        match claimed.copy.and_then(|copy| self.trusted(&fill.key, copy)) {
            Some(shared) if wanted(&shared, self.parts().clock.now()) => Claim::Found(shared),
            above if fill.token.is_some() => Claim::Load {
                token: Some(fill),
                above,
                blind: false,
            },
            above => Claim::Wait { above },
        }
    }

    /// Leaves the token of a write at a key in Redis, and learns what stands. `None`: there is no Redis, or no answer.
    pub(super) async fn enter_shared(&self, key: &Key) -> Option<Entered> {
        let entered = self.inner.redis.as_ref()?.enter(key).await.ok()?;
        if let Some(standing) = entered.standing {
            self.parts().clock.observe(standing);
        }
        Some(entered)
    }

    /// Gives the token of a write back that will not be published: nobody is to wait for it. Who shares it lands nowhere, and that is safe.
    pub(super) async fn release(&self, key: &Key, token: SlotToken) {
        if let Some(redis) = &self.inner.redis {
            // A failure leaves it until it ends.
            let _ = redis.release(key, token).await;
        }
    }

    /// Offers a write to Redis, and tells the other replicas. What came of it; `None` where there is no Redis, or no answer: then it is
    /// remembered that something older may stand there.
    pub(super) async fn publish(&self, write: &Write, copy: &Copy, hold: Hold) -> Option<Published> {
        let redis = self.inner.redis.as_ref()?;
        let published = redis.publish(write, copy, hold, self.grace(&write.key)).await;
        if published.is_err() {
            self.remember(&write.key, write.entry.version);
        }
        published.ok()
    }

    /// Redis was told of a version: once more, if the epoch may have moved since anybody looked.
    pub(super) fn told(&self, key: &Key, version: Version) {
        let now = self.parts().clock.now();
        self.parts().sharing.published(key, version, now);
    }

    /// Remembers that something older than `version` may stand in Redis, if there is one.
    pub(super) fn remember(&self, key: &Key, version: Version) {
        if self.inner.redis.is_none() {
            return;
        }
        let now = self.parts().clock.now();
        self.parts().sharing.repairs.add(key, version, now);
        self.parts().metrics.redis_unpublished.inc();
    }

    /// Redis, where copies of a key may be read and filled.
    pub(super) fn readable(&self, key: &Key) -> Option<&RedisCache> {
        let redis = self.inner.redis.as_ref()?;
        let (parts, now) = (self.parts(), self.parts().clock.now());
        let readable = parts.sharing.is_readable(key.namespace(), now) && self.goes_by_the_epoch(now);
        readable.then_some(redis)
    }

    /// Whether the epoch is known to hold, or nobody can move it: the store is held to be down.
    pub(super) fn goes_by_the_epoch(&self, now: Timestamp) -> bool {
        self.parts().sharing.is_current(now) || self.parts().store.breaker().is_open()
    }

    /// A copy from Redis as far as this replica can trust it: not below what L1 knows to stand, however old that knowledge is; and not for
    /// longer than a copy made now, for another replica's clock set its end.
    fn trusted(&self, key: &Key, mut copy: Copy) -> Option<Loaded> {
        self.observe(Some(&copy));
        if copy.version() < self.parts().memory.version(key) {
            return None;
        }
        let now = self.parts().clock.now();
        let most = self.copy_of(key, copy.entry.clone(), now).fresh_until;
        copy.fresh_until = copy.fresh_until.min(most);
        Some(Loaded {
            copy,
            source: Source::L2,
            stale: false,
        })
    }

    /// A place in Redis from which a write may have been read that the store did not take.
    pub(super) async fn withdraw(&self, key: &Key, version: Version) {
        let Some(redis) = &self.inner.redis else {
            return;
        };
        if redis.drop_version(key, version).await.is_err()
            && let Some(above) = version.get().checked_add(1).and_then(Version::new)
        {
            self.remember(key, above);
        }
    }

    /// For how long beyond its lifetime a copy of a key is kept, to answer while the store cannot.
    pub(super) fn grace(&self, key: &Key) -> Duration {
        self.parts().namespaces.get(key.namespace()).stale_if_error
    }
}
