//! The guarded connection that everything but the backends uses.
//!
//! Owns the bound on each call's time, and that the breaker hears how each one ended. Does not own what a call does ([`Connection`]), nor
//! trying again. Invariant: a connection whose call was cut off is dropped before it is used again.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{
    Backend, Claimant, Committed, Connection, Control, DeadLetter, NodeGrant, StoreError, StoreErrorKind,
    breaker::Breaker,
};
use crate::{
    model::{Answered, Entry, Epoch, Key, KeyedAnswer, RequestId, Timestamp, Version, Write},
    store::{
        letters::{KeptLetter, LetterRange},
        operation::{Decided, Operation, RangeRow},
    },
};

/// The store as the rest of the gateway has it: a backend, and one breaker for all sessions.
#[derive(Clone)]
pub struct Store {
    backend: Arc<dyn Backend>,
    breaker: Arc<Breaker>,
    call_timeout: Duration,
}

impl Store {
    /// A store over a backend. `call_timeout` bounds each call of each session, connecting included.
    pub fn new(backend: Arc<dyn Backend>, breaker: Arc<Breaker>, call_timeout: Duration) -> Store {
        Store {
            backend,
            breaker,
            call_timeout,
        }
    }

    /// How many sessions can commit at once with profit.
    pub fn writers_max(&self) -> usize {
        self.backend.writers_max()
    }

    /// Whether the store is held to be down: callers that can fail fast should.
    pub fn breaker(&self) -> &Breaker {
        &self.breaker
    }

    /// A session with a connection of its own; connects when first used.
    pub fn session(&self) -> Session {
        self.session_within(self.call_timeout)
    }

    /// The same, with another bound on each call.
    pub fn session_within(&self, call_timeout: Duration) -> Session {
        Session {
            connection: self.backend.connection(),
            breaker: Arc::clone(&self.breaker),
            call_timeout,
        }
    }
}

/// A connection whose calls are bounded in time and known to the breaker. Owned by one task.
pub struct Session {
    connection: Box<dyn Connection>,
    breaker: Arc<Breaker>,
    call_timeout: Duration,
}

impl Session {
    /// [`Connection::load`].
    pub async fn load(&mut self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let call = self.connection.load(keys);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::commit`].
    pub async fn commit(&mut self, writes: &[Write]) -> Result<Vec<Committed>, StoreError> {
        let call = self.connection.commit(writes);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::decide`].
    pub async fn decide(&mut self, operations: &[Operation], now: Timestamp) -> Result<Vec<Decided>, StoreError> {
        let call = self.connection.decide(operations, now);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::remember`].
    pub async fn remember(&mut self, answers: &[KeyedAnswer]) -> Result<(), StoreError> {
        let call = self.connection.remember(answers);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::answers`].
    pub async fn answers(&mut self, requests: &[(&str, &RequestId)]) -> Result<Vec<Option<Answered>>, StoreError> {
        let call = self.connection.answers(requests);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::forget_requests`].
    pub async fn forget_requests(&mut self, rows_max: u32) -> Result<u64, StoreError> {
        let call = self.connection.forget_requests(rows_max);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::rows_below`].
    pub async fn rows_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<RangeRow>, StoreError> {
        let call = self.connection.rows_below(namespace, prefix, after, limit);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::are_buried`].
    pub async fn are_buried(&mut self, writes: &[(&Key, Version)]) -> Result<Vec<bool>, StoreError> {
        let call = self.connection.are_buried(writes);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::probe`].
    pub async fn probe(&mut self) -> Result<(), StoreError> {
        let call = self.connection.probe();
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::bury`].
    pub async fn bury(&mut self, letter: &DeadLetter) -> Result<(), StoreError> {
        let call = self.connection.bury(letter);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::letters`].
    pub async fn letters(&mut self, range: LetterRange<'_>) -> Result<Vec<KeptLetter>, StoreError> {
        let call = self.connection.letters(range);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::last_letter`].
    pub async fn last_letter(&mut self) -> Result<i64, StoreError> {
        let call = self.connection.last_letter();
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::drop_letters`].
    pub async fn drop_letters(&mut self, ids: &[i64]) -> Result<u64, StoreError> {
        let call = self.connection.drop_letters(ids);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::refuse_letter`].
    pub async fn refuse_letter(
        &mut self,
        id: i64,
        code: Option<&str>,
        reason: &str,
    ) -> Result<Option<(u32, Timestamp)>, StoreError> {
        let call = self.connection.refuse_letter(id, code, reason);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::ping`].
    pub async fn ping(&mut self) -> Result<(), StoreError> {
        let call = self.connection.ping();
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::lease_node`].
    pub async fn lease_node(&mut self, claimant: &Claimant) -> Result<NodeGrant, StoreError> {
        let call = self.connection.lease_node(claimant);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::renew_node`].
    pub async fn renew_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<bool, StoreError> {
        let call = self.connection.renew_node(claimant, node, high_water);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::release_node`].
    pub async fn release_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<(), StoreError> {
        let call = self.connection.release_node(claimant, node, high_water);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::collect`].
    pub async fn collect(&mut self, retention: Duration, rows_max: u32) -> Result<u64, StoreError> {
        let call = self.connection.collect(retention, rows_max);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::control`].
    pub async fn control(&mut self) -> Result<Control, StoreError> {
        let call = self.connection.control();
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::move_epoch`].
    pub async fn move_epoch(&mut self, from: Epoch, to: Epoch, cache_server: Option<&str>) -> Result<bool, StoreError> {
        let call = self.connection.move_epoch(from, to, cache_server);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::move_namespace_epoch`].
    pub async fn move_namespace_epoch(&mut self, namespace: &str, to: Epoch) -> Result<(), StoreError> {
        let call = self.connection.move_namespace_epoch(namespace, to);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::tagged`].
    pub async fn tagged(
        &mut self,
        namespace: &str,
        tag: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError> {
        let call = self.connection.tagged(namespace, tag, after, limit);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::keys_below`].
    pub async fn keys_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError> {
        let call = self.connection.keys_below(namespace, prefix, after, limit);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// [`Connection::newest`].
    pub async fn newest(&mut self, namespace: &str, limit: u32) -> Result<Vec<Key>, StoreError> {
        let call = self.connection.newest(namespace, limit);
        let result = bounded(self.call_timeout, call).await;
        self.note(result)
    }

    /// Tells the breaker, and drops a connection that a cut-off call left in the middle of something.
    fn note<T>(&mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        match &result {
            Ok(_) => self.breaker.succeeded(),
            Err(error) => {
                if error.kind == StoreErrorKind::Unknown {
                    self.connection.reset();
                }
                self.breaker.failed(error.kind);
            }
        }
        result
    }
}

async fn bounded<T>(limit: Duration, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(limit, call).await.unwrap_or_else(|_| {
        Err(StoreError::new(
            StoreErrorKind::Unknown,
            "the store did not answer in time",
        ))
    })
}
