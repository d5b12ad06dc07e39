//! What the store in memory decides and remembers.
//!
//! Owns the effects, made with the decision that the real backends share. Does not own the faults.

use std::collections::HashMap;

use super::{Row, State};
use crate::{
    model::{Answered, RequestId, Timestamp, Write},
    store::{
        LOCK_NOT_AVAILABLE, StoreError, StoreErrorKind,
        decide::{Standing, decide, wanted},
        operation::{Decided, Operation},
        requests::{Named, of_answers, of_writes},
    },
};

/// What is remembered, by namespace and id.
pub(super) type Requests = HashMap<(String, RequestId), Answered>;

impl State {
    /// Decides operations and applies those that can be: all, or none when one of them writes poison.
    pub(super) fn decide(&mut self, operations: &[Operation], now: Timestamp) -> Result<Vec<Decided>, StoreError> {
        if operations
            .iter()
            .any(|operation| Some(&operation.key) == self.held.as_ref())
        {
            return Err(StoreError {
                code: Some(LOCK_NOT_AVAILABLE.to_owned()),
                ..StoreError::new(StoreErrorKind::Transient, "scripted hold")
            });
        }
        let rows: Vec<Option<Standing>> = wanted(operations)
            .iter()
            .map(|wanted| self.rows.get(wanted.key).map(Row::standing))
            .collect();
        let known: Vec<Option<Answered>> = operations
            .iter()
            .map(|operation| self.answer_of(operation.key.namespace(), &operation.request.id))
            .collect();
        let plan = decide(operations, &rows, &known, self.horizon, now);
        let writes: Vec<Write> = plan.changed.into_iter().map(|changed| changed.write).collect();
        if writes.iter().any(|write| (self.reject)(write)) {
            return Err(StoreError::new(StoreErrorKind::Rejected, "scripted refusal"));
        }
        self.apply(&writes);
        for (namespace, answered) in of_answers(&plan.remembered) {
            self.insert(namespace, answered);
        }
        Ok(plan.decided)
    }

    pub(super) fn answer_of(&self, namespace: &str, id: &RequestId) -> Option<Answered> {
        self.requests.get(&(namespace.to_owned(), id.clone())).cloned()
    }

    /// Remembers what writes answer.
    pub(super) fn remember_writes(&mut self, writes: &[Write]) {
        self.remember(&of_writes(writes));
    }

    /// Remembers answers. One that is known stays as it is, unless its window is over.
    pub(super) fn remember(&mut self, named: &[Named<'_>]) {
        let now = self.now();
        for (namespace, answered) in named {
            let known = self.answer_of(namespace, &answered.request.id);
            if known.is_none_or(|known| known.request.ends_at < now) {
                self.insert(namespace, answered);
            }
        }
    }

    pub(super) fn forget_requests(&mut self, rows_max: u32) -> u64 {
        let now = self.now();
        let over = self.requests.iter().filter(|(_, answered)| {
            let over = answered.request.ends_at.after(std::time::Duration::from_secs(60));
            over < now
        });
        let names: Vec<(String, RequestId)> = over.map(|(name, _)| name.clone()).take(rows_max as usize).collect();
        for name in &names {
            self.requests.remove(name);
        }
        names.len() as u64
    }

    fn insert(&mut self, namespace: &str, answered: &Answered) {
        let name = (namespace.to_owned(), answered.request.id.clone());
        self.requests.insert(name, answered.clone());
    }
}

impl Row {
    fn standing(&self) -> Standing {
        Standing {
            entry: self.entry.clone(),
            tags: self.tags.clone(),
        }
    }
}
