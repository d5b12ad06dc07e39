//! Invalidation on request: cached copies go, here, in Redis and with every replica that listens; records and pending writes stay.
//!
//! Owns which tiers are told and in which order: Redis before L1, as a write lands, so that a load that has found an old copy in Redis
//! loses its token. Does not own how a namespace is left behind as a whole (`epoch`), nor what a replica does that hears of it
//! (`coherence`).
//!
//! Invariant: L1 is emptied whatever became of Redis. Cancellation: dropped at any await, some keys are invalidated and others not;
//! nothing else is changed, and the same request does the rest.

use tokio::task::JoinSet;

use super::{Gateway, died, warm::PAGE_KEYS, watch::RescanReason};
use crate::{
    cache::{message::Message, redis::RedisFailure},
    error::{Error, ErrorKind},
    model::{ChangeKind, Key},
};

/// How many keys Redis is told of at a time: more would compete with the calls.
const KEYS_AT_A_TIME: usize = 64;

/// What is invalidated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// These keys.
    Keys(Vec<Key>),
    /// Every key of a namespace that begins so.
    Prefix {
        /// The namespace.
        namespace: String,
        /// The beginning.
        prefix: String,
    },
    /// Every key of a namespace whose record in the store has this tag.
    Tag {
        /// The namespace.
        namespace: String,
        /// The tag.
        tag: String,
    },
    /// Every key of a namespace.
    Namespace(String),
}

/// What was invalidated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Invalidated {
    /// Keys that were invalidated one by one.
    pub keys: u64,
    /// Copies that this replica's L1 held.
    pub memory_copies: u64,
}

impl Gateway {
    /// Drops the copies of `target` from all caches: no read that begins on this replica when this returns is answered by one made
    /// before the call.
    ///
    /// # Errors
    /// `Unavailable`, of an unknown outcome: Redis could not be told, and other replicas may still have copies; or the store could not be
    /// asked for the keys of a tag, or to leave a namespace behind.
    pub async fn invalidate(&self, target: Target) -> Result<Invalidated, Error> {
        match target {
            Target::Keys(keys) => self.invalidate_keys(keys).await,
            Target::Prefix { namespace, prefix } => self.invalidate_prefix(namespace, prefix).await,
            Target::Tag { namespace, tag } => self.invalidate_tag(&namespace, &tag).await,
            Target::Namespace(namespace) => {
                let memory_copies = self.invalidate_namespace(&namespace).await?;
                Ok(Invalidated { keys: 0, memory_copies })
            }
        }
    }

    async fn invalidate_keys(&self, mut keys: Vec<Key>) -> Result<Invalidated, Error> {
        keys.sort_unstable();
        keys.dedup();
        let mut invalidated = Invalidated::default();
        let mut failure = None;
        let mut under_way = JoinSet::new();
        let mut waiting = keys.into_iter();
        loop {
            for key in waiting.by_ref().take(KEYS_AT_A_TIME - under_way.len()) {
                let gateway = self.clone();
                under_way.spawn(async move { gateway.invalidate_key(&key).await });
            }
            let Some(ended) = under_way.join_next().await else {
                break;
            };
            let (had_copy, told) = ended.map_err(died)?;
            invalidated.keys += 1;
            invalidated.memory_copies += u64::from(had_copy);
            failure = failure.or(told.err());
        }
        failure.map_or(Ok(invalidated), |failure| Err(untold(failure)))
    }

    /// Whether L1 had a copy, and whether Redis was told.
    async fn invalidate_key(&self, key: &Key) -> (bool, Result<(), RedisFailure>) {
        let told = match &self.inner.redis {
            Some(redis) => redis.invalidate(key).await.map(drop),
            None => Ok(()),
        };
        self.parts().flights.detach(key);
        let had_copy = self.parts().memory.invalidate_key(key);
        self.parts().watches.note(key, None, ChangeKind::Invalidate);
        // What is pending is no copy: Redis gets it back.
        self.republish_later(key.clone());
        (had_copy, told)
    }

    async fn invalidate_prefix(&self, namespace: String, prefix: String) -> Result<Invalidated, Error> {
        let told = self.invalidate_prefix_in_redis(&namespace, &prefix).await;
        let below = (namespace.clone(), prefix.clone());
        let matches = move |key: &Key| key.namespace() == below.0 && key.key().starts_with(&below.1);
        self.parts().queue.note_lost(&matches);
        self.parts().flights.detach_where(&matches);
        let removing = self.in_memory(move |memory| memory.invalidate_where(matches)).await;
        let memory_copies = removing.map_err(died)? as u64;
        self.parts()
            .watches
            .note_gap(RescanReason::Invalidated, Some((&namespace, &prefix)));
        // What is pending was removed from Redis with the rest.
        self.parts().sharing.renewal.notify_one();
        told.map_err(untold)?;
        Ok(Invalidated { keys: 0, memory_copies })
    }

    /// First the copies there, then word to the other replicas: they could take what they drop from there again.
    async fn invalidate_prefix_in_redis(&self, namespace: &str, prefix: &str) -> Result<(), RedisFailure> {
        let Some(redis) = &self.inner.redis else {
            return Ok(());
        };
        let mut cursor = Some(0);
        while let Some(from) = cursor {
            (_, cursor) = redis.remove_prefix(namespace, prefix, from).await?;
        }
        let message = Message::InvalidatedPrefix {
            namespace: namespace.to_owned(),
            prefix: prefix.to_owned(),
        };
        redis.announce(&[message]).await.map(drop)
    }

    async fn invalidate_tag(&self, namespace: &str, tag: &str) -> Result<Invalidated, Error> {
        let mut session = self.session()?;
        let mut invalidated = Invalidated::default();
        let mut after: Option<Key> = None;
        loop {
            let page = session
                .tagged(namespace, tag, after.as_ref().map(Key::key), PAGE_KEYS)
                .await;
            let page = page.map_err(|error| {
                let message = "the store does not tell which keys have the tag, so not all of them are invalidated";
                Error::new(ErrorKind::Unavailable, message).because(error).unknown()
            })?;
            let is_last = page.len() < PAGE_KEYS as usize;
            after = page.last().cloned();
            let of_page = self.invalidate_keys(page).await?;
            invalidated.keys += of_page.keys;
            invalidated.memory_copies += of_page.memory_copies;
            if is_last {
                return Ok(invalidated);
            }
        }
    }
}

fn untold(failure: RedisFailure) -> Error {
    let message =
        "Redis could not be told, so it and other gateways may still hold copies; this gateway's memory does not";
    Error::new(ErrorKind::Unavailable, message).because(failure).unknown()
}
