//! Pausing the drain of a namespace.
//!
//! Owns which namespaces are paused, here and in the tables of all shards alike. Does not own what a pause does to a table (`pending/order`). A
//! pause lives in memory: neither a shutdown nor a restart knows it, for what was accepted is to reach the store. Invariant: what is told to
//! be paused is what the tables keep out of their order, for both change under one lock.

use std::collections::BTreeMap;

use super::Queue;
use crate::{
    error::{Error, ErrorKind},
    model::Timestamp,
};

/// How many namespaces may be paused.
const PAUSED_MAX: usize = 1_000;

impl Queue {
    /// Takes no write of a namespace into a batch from now on. Since when it was paused already; `None`: it was not.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`]: the queue is closed. [`ErrorKind::Overloaded`]: as many are paused as may be.
    pub fn pause(&self, namespace: &str) -> Result<Option<Timestamp>, Error> {
        let shared = &self.shared;
        let _steering = shared.steering.lock();
        if shared.budget.is_closed() {
            let message = "the gateway is shutting down, and drains whatever is pending";
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        let (since, count) = {
            let paused = shared.paused.borrow();
            (paused.get(namespace).copied(), paused.len())
        };
        if since.is_some() {
            return Ok(since);
        }
        if count >= PAUSED_MAX {
            let message = format!("{PAUSED_MAX} namespaces are paused, as many as may be");
            return Err(Error::new(ErrorKind::Overloaded, message));
        }
        for shard in &shared.shards {
            shard.pending.lock().pause(namespace);
        }
        let now = shared.clock.now();
        shared.paused.send_modify(|paused| {
            paused.insert(namespace.to_owned(), now);
        });
        tracing::warn!(namespace, "the drain of a namespace is paused by an operator");
        Ok(None)
    }

    /// Lets the drain of a namespace go on. Whether it was paused.
    pub fn resume(&self, namespace: &str) -> bool {
        let shared = &self.shared;
        let _steering = shared.steering.lock();
        if !shared.paused.borrow().contains_key(namespace) {
            return false;
        }
        self.resume_in_shards(namespace);
        shared.paused.send_modify(|paused| {
            paused.remove(namespace);
        });
        tracing::info!(namespace, "the drain of a namespace goes on");
        true
    }

    /// The namespaces that are paused, and since when.
    pub fn paused(&self) -> BTreeMap<String, Timestamp> {
        self.shared.paused.borrow().clone()
    }

    /// Ends every pause: the queue is closed, and none begins any more.
    pub(super) fn resume_all(&self) {
        let shared = &self.shared;
        let _steering = shared.steering.lock();
        let paused = shared.paused.send_replace(BTreeMap::new());
        for namespace in paused.keys() {
            self.resume_in_shards(namespace);
        }
        if !paused.is_empty() {
            tracing::info!(
                namespaces = paused.len(),
                "the drain of paused namespaces goes on, for the gateway stops"
            );
        }
    }

    fn resume_in_shards(&self, namespace: &str) {
        for shard in &self.shared.shards {
            shard.pending.lock().resume(namespace);
            shard.changed.notify_one();
        }
    }
}
