//! Warming: records are loaded into the caches before anybody asks for them.
//!
//! Owns which keys are loaded, in which order and how many at a time. Each is read as a caller's `CACHED` read is, so that what the caches
//! hold is not asked for, one load of a key runs at a time, and nothing old lands. Does not count as reads. Cancellation: dropped at any
//! await, loads that have begun end by themselves, and no more begin.

use std::{error::Error as _, future::pending, time::Duration};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{Freshness, Gateway, died};
use crate::{
    error::{Error, ErrorKind},
    model::Key,
    namespace::WARM_RECORDS_MAX,
    store::{Session, StoreError},
};

/// How many keys are loaded at a time: more would compete with the calls for the store.
const KEYS_AT_A_TIME: usize = 64;

/// How long the loading at the start waits for L1 to be on, and between two looks at that.
const HEARING_WAIT: Duration = Duration::from_secs(10);
const HEARING_LOOK: Duration = Duration::from_millis(50);

/// How many keys the store is asked for at a time.
pub(super) const PAGE_KEYS: u32 = 1_000;

/// How many keys of a prefix are loaded.
pub const PREFIX_KEYS_MAX: u64 = 1_000_000;

/// What is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// These keys.
    Keys(Vec<Key>),
    /// The keys of a namespace that begin so, up to [`PREFIX_KEYS_MAX`] in the order of their bytes.
    Prefix {
        /// The namespace.
        namespace: String,
        /// The beginning.
        prefix: String,
    },
    /// The records of a namespace that were written last.
    Newest {
        /// The namespace.
        namespace: String,
        /// How many, up to [`WARM_RECORDS_MAX`].
        records: u32,
    },
}

/// How far a warming is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Keys of which a copy, or the absence, is cached now, as far as there was room.
    pub done: u64,
    /// How many keys there are; `None` as long as that is not known.
    pub total: Option<u64>,
    /// Keys that could not be loaded.
    pub failed: u64,
    /// Whether there are more keys than are loaded.
    pub limit_reached: bool,
}

impl Gateway {
    /// Loads what is wanted, and keeps `progress` current. A key that cannot be loaded is counted, and the next one is tried.
    ///
    /// # Errors
    /// `Unavailable`: the store does not tell which keys there are, or no cache takes what is loaded.
    pub async fn warm(&self, wanted: Wanted, progress: &watch::Sender<Progress>) -> Result<(), Error> {
        match wanted {
            Wanted::Keys(mut keys) => {
                keys.sort_unstable();
                keys.dedup();
                progress.send_modify(|progress| progress.total = Some(keys.len() as u64));
                self.warm_keys(keys, progress).await
            }
            Wanted::Newest { namespace, records } => {
                let records = records.min(WARM_RECORDS_MAX);
                let keys = self
                    .session()?
                    .newest(&namespace, records)
                    .await
                    .map_err(unknown_keys)?;
                progress.send_modify(|progress| progress.total = Some(keys.len() as u64));
                self.warm_keys(keys, progress).await
            }
            Wanted::Prefix { namespace, prefix } => self.warm_prefix(&namespace, &prefix, progress).await,
        }
    }

    /// Loads the newest records of the namespaces that ask for it, one namespace after the other, and says so. Never ends, as a task of the
    /// background must not.
    pub async fn warm_at_start(self) {
        let (started, mut sum) = (Instant::now(), Progress::default());
        let asking = self.parts().namespaces.configured();
        let asking: Vec<_> = asking.filter(|(_, settings)| settings.warm_at_start > 0).collect();
        if !asking.is_empty() {
            // Until other gateways are heard, L1 takes nothing.
            let heard = async {
                while self.invalidation_is_up() == Some(false) {
                    sleep(HEARING_LOOK).await;
                }
            };
            // If that lasts, Redis at least is filled.
            let _ = timeout(HEARING_WAIT, heard).await;
        }
        for (namespace, settings) in &asking {
            let (progress, seen) = watch::channel(Progress::default());
            let wanted = Wanted::Newest {
                namespace: (*namespace).to_owned(),
                records: settings.warm_at_start,
            };
            if let Err(error) = self.warm(wanted, &progress).await {
                let cause = error.source().map(ToString::to_string);
                tracing::warn!(%error, cause, namespace, "gave up loading the newest records into the caches: reads load what they need");
                return pending().await;
            }
            sum.done += seen.borrow().done;
            sum.failed += seen.borrow().failed;
        }
        if !asking.is_empty() {
            let (seconds, namespaces) = (started.elapsed().as_secs_f64(), asking.len());
            let Progress { done, failed, .. } = sum;
            tracing::info!(
                namespaces,
                done,
                failed,
                seconds,
                "loaded the newest records into the caches"
            );
        }
        pending().await
    }

    async fn warm_prefix(
        &self,
        namespace: &str,
        prefix: &str,
        progress: &watch::Sender<Progress>,
    ) -> Result<(), Error> {
        let mut session = self.session()?;
        let mut after: Option<Key> = None;
        let mut found = 0;
        loop {
            let page = session
                .keys_below(namespace, prefix, after.as_ref().map(Key::key), PAGE_KEYS)
                .await;
            let page = page.map_err(unknown_keys)?;
            let is_last = page.len() < PAGE_KEYS as usize;
            found += page.len() as u64;
            let limit_reached = !is_last && found >= PREFIX_KEYS_MAX;
            if is_last || limit_reached {
                progress.send_modify(|progress| progress.total = Some(found));
            }
            after = page.last().cloned();
            self.warm_keys(page, progress).await?;
            if limit_reached {
                progress.send_modify(|progress| progress.limit_reached = true);
            }
            if is_last || limit_reached {
                return Ok(());
            }
        }
    }

    async fn warm_keys(&self, keys: Vec<Key>, progress: &watch::Sender<Progress>) -> Result<(), Error> {
        let l1_takes = self.parts().memory.is_on(self.parts().clock.now());
        if !l1_takes && !self.redis_is_usable() {
            let message = "neither this gateway's memory nor Redis takes copies now, so nothing more is loaded";
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        let mut under_way = JoinSet::new();
        let mut waiting = keys.into_iter();
        loop {
            for key in waiting.by_ref().take(KEYS_AT_A_TIME - under_way.len()) {
                let gateway = self.clone();
                under_way.spawn(async move { gateway.warm_key(&key).await });
            }
            let Some(ended) = under_way.join_next().await else {
                return Ok(());
            };
            let loaded = ended.map_err(died)?;
            progress.send_modify(|progress| {
                if loaded {
                    progress.done += 1;
                } else {
                    progress.failed += 1;
                }
            });
        }
    }

    /// Whether the caches know the key now.
    async fn warm_key(&self, key: &Key) -> bool {
        let deadline = Instant::now() + self.parts().load_wait;
        // The load has a word of its own on why it failed, a moment later.
        let patience = deadline + Duration::from_millis(50);
        let loading = self.get_cached(key, self.demand(Freshness::default()), deadline);
        matches!(timeout_at(patience, loading).await, Ok(Ok(_)))
    }

    /// A connection to the store for an operator's question.
    ///
    /// # Errors
    /// `Unavailable`: the store is held to be down.
    pub(super) fn session(&self) -> Result<Session, Error> {
        let store = &self.parts().store;
        if store.breaker().is_open() {
            return Err(Error::new(ErrorKind::Unavailable, "the store cannot be reached"));
        }
        Ok(store.session())
    }
}

fn unknown_keys(error: StoreError) -> Error {
    let message = "the store does not tell which keys there are, so the rest is not loaded";
    Error::new(ErrorKind::Unavailable, message).because(error)
}
