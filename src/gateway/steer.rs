//! Steering the drain, and looking into it and into the settings: what operators ask of the queue and of namespaces.
//!
//! Owns which namespaces this gateway knows, and that nothing is steered by a mistyped name. Does not own the queue. Cancellation: nothing here
//! waits but a flush, and dropping that changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::{Gateway, freshness::last_word_at, persisted::not_persisted, stats::QueueStats};
pub use crate::queue::{Doing, Failure, PendingKey, Report, WorkerReport};
use crate::{
    error::{Error, ErrorKind},
    model::Timestamp,
    namespace::Setting,
    telemetry::{calls::CallMetrics, namespaces::OTHERS},
};

/// What a namespace has pending, and whether its drain is paused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NamespaceQueue {
    /// What is pending.
    pub pending: QueueStats,
    /// Since when it is paused.
    pub paused_since: Option<Timestamp>,
}

/// What is told of the queue.
#[derive(Debug, Clone)]
pub struct QueueView {
    /// Of one namespace, or of all.
    pub all: NamespaceQueue,
    /// By name.
    pub namespaces: BTreeMap<String, NamespaceQueue>,
    /// The bounds, the workers, the oldest keys.
    pub report: Report,
    /// How many writes have gone to the dead letters since the start.
    pub dead_lettered: u64,
}

/// What holds for a namespace.
#[derive(Debug, Clone)]
pub struct NamespaceView {
    /// Its name.
    pub namespace: String,
    /// Whether it is configured by name.
    pub configured: bool,
    /// Whether it was used, or has something pending.
    pub used: bool,
    /// Since when its drain is paused.
    pub paused_since: Option<Timestamp>,
    /// All settings.
    pub settings: Vec<Setting>,
}

/// How a flush ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flushed {
    /// How many pending writes were waited for.
    pub waited_for: u64,
    /// How many writes went to the dead letters meanwhile.
    pub dead_lettered: u64,
}

impl Gateway {
    /// What the queue has and does, of a namespace or of all, with up to `oldest` keys.
    ///
    /// # Errors
    /// `NotFound`: the namespace is not known.
    pub fn queue(&self, calls: &CallMetrics, namespace: Option<&str>, oldest: usize) -> Result<QueueView, Error> {
        if let Some(namespace) = namespace {
            self.check_known(calls, namespace)?;
        }
        let queue = &self.parts().queue;
        let mut namespaces = self.namespace_queues();
        let all = match namespace {
            Some(namespace) => {
                namespaces.retain(|name, _| name == namespace);
                namespaces.get(namespace).copied().unwrap_or_default()
            }
            None => NamespaceQueue {
                pending: queue.stats(),
                paused_since: None,
            },
        };
        Ok(QueueView {
            all,
            namespaces,
            report: queue.report(namespace, oldest),
            dead_lettered: queue.dead_lettered(),
        })
    }

    /// Pauses the drain of a namespace. Since when it was paused before, and what it has; `unused`: whether it need not be known.
    ///
    /// # Errors
    /// `NotFound`; `Overloaded`: too many are paused; `Unavailable`: the gateway is shutting down.
    pub fn pause(
        &self,
        calls: &CallMetrics,
        namespace: &str,
        unused: bool,
    ) -> Result<(Option<Timestamp>, NamespaceQueue), Error> {
        if !unused {
            self.check_known(calls, namespace)?;
        }
        let before = self.parts().queue.pause(namespace)?;
        Ok((before, self.namespace_queue(namespace)))
    }

    /// Lets the drain of a namespace go on. Whether it was paused, and what it has.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn resume(&self, calls: &CallMetrics, namespace: &str) -> Result<(bool, NamespaceQueue), Error> {
        self.check_known(calls, namespace)?;
        let before = self.parts().queue.resume(namespace);
        Ok((before, self.namespace_queue(namespace)))
    }

    /// Drains what was accepted before the call, of a namespace or of all, at once.
    ///
    /// # Errors
    /// `NotFound`; `Paused`; `NotPersisted` shortly before the deadline.
    pub async fn flush(
        &self,
        calls: &CallMetrics,
        namespace: Option<&str>,
        deadline: Instant,
    ) -> Result<Flushed, Error> {
        if let Some(namespace) = namespace {
            self.check_known(calls, namespace)?;
        }
        let queue = &self.parts().queue;
        let before = queue.dead_lettered();
        let flushed = queue.flush(namespace, last_word_at(deadline)).await;
        let waited_for = flushed.map_err(|error| match error.kind() {
            ErrorKind::Timeout => not_persisted(),
            _ => error,
        })?;
        Ok(Flushed {
            waited_for,
            dead_lettered: queue.dead_lettered() - before,
        })
    }

    /// The namespaces whose drain is paused, and since when.
    pub fn paused(&self) -> BTreeMap<String, Timestamp> {
        self.parts().queue.paused()
    }

    /// What holds for a namespace, known or not.
    pub fn namespace(&self, calls: &CallMetrics, namespace: &str) -> NamespaceView {
        self.view_of(namespace.to_owned(), &self.used_namespaces(calls))
    }

    /// What holds for each namespace that this gateway knows, by name, up to `limit`; and whether there are more.
    pub fn namespaces(&self, calls: &CallMetrics, limit: usize) -> (Vec<NamespaceView>, bool) {
        let used = self.used_namespaces(calls);
        let configured = self.parts().namespaces.configured().map(|(name, _)| name.to_owned());
        let mut names: BTreeSet<String> = configured.chain(self.paused().into_keys()).collect();
        names.extend(used.iter().filter(|name| *name != OTHERS).cloned());
        let more = names.len() > limit;
        let views = names.into_iter().take(limit).map(|name| self.view_of(name, &used));
        (views.collect(), more)
    }

    /// What holds for every namespace that is not configured by name.
    pub fn default_settings(&self) -> Vec<Setting> {
        self.parts().namespaces.default_settings()
    }

    fn view_of(&self, namespace: String, used: &BTreeSet<String>) -> NamespaceView {
        let parts = self.parts();
        NamespaceView {
            configured: parts.namespaces.configured().any(|(name, _)| name == namespace),
            used: used.contains(&namespace),
            paused_since: parts.queue.paused().get(&namespace).copied(),
            settings: parts.namespaces.settings(&namespace),
            namespace,
        }
    }

    /// Those that have been used since the start, or have something pending. With [`OTHERS`] there are more.
    fn used_namespaces(&self, calls: &CallMetrics) -> BTreeSet<String> {
        let counted = calls
            .namespaces()
            .into_iter()
            .filter(|(_, counted)| counted.calls() > 0);
        let pending = self.parts().queue.stats_by_namespace();
        counted.map(|(name, _)| name).chain(pending.into_keys()).collect()
    }

    /// Refuses a name that nothing is known of: it may be mistyped.
    fn check_known(&self, calls: &CallMetrics, namespace: &str) -> Result<(), Error> {
        let is_configured = self.parts().namespaces.configured().any(|(name, _)| name == namespace);
        if is_configured || self.parts().queue.paused().contains_key(namespace) {
            return Ok(());
        }
        let used = self.used_namespaces(calls);
        if used.contains(namespace) || used.contains(OTHERS) {
            return Ok(());
        }
        let message =
            "this gateway does not know the namespace: it is not configured, and was not used here since the start";
        Err(Error::new(ErrorKind::NotFound, message))
    }

    fn namespace_queue(&self, namespace: &str) -> NamespaceQueue {
        self.namespace_queues().remove(namespace).unwrap_or_default()
    }

    fn namespace_queues(&self) -> BTreeMap<String, NamespaceQueue> {
        let queue = &self.parts().queue;
        let mut queues = BTreeMap::<String, NamespaceQueue>::new();
        for (name, pending) in queue.stats_by_namespace() {
            queues.entry(name).or_default().pending = pending;
        }
        for (name, since) in queue.paused() {
            queues.entry(name).or_default().paused_since = Some(since);
        }
        queues
    }
}
