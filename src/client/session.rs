//! A session: whoever has written or read a record sees at least that version from then on, whichever gateway answers.
//!
//! Owns the versions that it has seen, by key, and hands them to reads as `min_version`. Invariant: it remembers the [`SESSION_KEYS_MAX`] keys
//! that it has met last, and forgets those before them; a read of a forgotten key promises what one outside of a session does.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use parking_lot::Mutex;

use super::{
    Client, Error,
    proto::{
        BatchWriteRequest, BatchWriteResponse, DeleteRequest, DeleteResponse, GetRequest, GetResponse,
        IncrementRequest, IncrementResponse, PutRequest, PutResponse, TouchRequest, TouchResponse,
        write_item::Operation, write_result::Outcome,
    },
};

/// How many keys a session remembers.
pub const SESSION_KEYS_MAX: usize = 10_000;

/// A client that reads its own writes. Cheap to clone; clones are one session.
#[derive(Debug, Clone)]
pub struct Session {
    client: Client,
    seen: Arc<Mutex<Seen>>,
}

impl Session {
    pub(super) fn new(client: Client) -> Session {
        Session {
            client,
            seen: Arc::default(),
        }
    }

    /// The client below, for what no session is needed for.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Reads a record, of the version that this session has seen of it or a later one.
    ///
    /// # Errors
    /// As of [`Client::get`]; [`super::Reason::NotVisible`] where that version could not be seen within the deadline.
    pub async fn get(&self, mut request: GetRequest) -> Result<GetResponse, Error> {
        let (namespace, key) = (request.namespace.clone(), request.key.clone());
        request.min_version = request.min_version.max(self.min_version(&namespace, &key));
        let answer = self.client.get(request).await?;
        if let Some(entry) = &answer.entry {
            self.saw(namespace, key, entry.version);
        }
        Ok(answer)
    }

    /// Writes a record.
    ///
    /// # Errors
    /// As of [`Client::put`].
    pub async fn put(&self, request: PutRequest) -> Result<PutResponse, Error> {
        let (namespace, key) = (request.namespace.clone(), request.key.clone());
        let answer = self.client.put(request).await?;
        self.saw(namespace, key, answer.version);
        Ok(answer)
    }

    /// Makes a key absent.
    ///
    /// # Errors
    /// As of [`Client::delete`].
    pub async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse, Error> {
        let (namespace, key) = (request.namespace.clone(), request.key.clone());
        let answer = self.client.delete(request).await?;
        self.saw(namespace, key, answer.version);
        Ok(answer)
    }

    /// Adds to a counter.
    ///
    /// # Errors
    /// As of [`Client::increment`].
    pub async fn increment(&self, request: IncrementRequest) -> Result<IncrementResponse, Error> {
        let (namespace, key) = (request.namespace.clone(), request.key.clone());
        let answer = self.client.increment(request).await?;
        self.saw(namespace, key, answer.version);
        Ok(answer)
    }

    /// Sets when a record expires.
    ///
    /// # Errors
    /// As of [`Client::touch`].
    pub async fn touch(&self, request: TouchRequest) -> Result<TouchResponse, Error> {
        let (namespace, key) = (request.namespace.clone(), request.key.clone());
        let answer = self.client.touch(request).await?;
        self.saw(namespace, key, answer.version);
        Ok(answer)
    }

    /// Writes many records.
    ///
    /// # Errors
    /// As of [`Client::batch_write`].
    pub async fn batch_write(&self, request: BatchWriteRequest) -> Result<BatchWriteResponse, Error> {
        let keys: Vec<Option<(String, String)>> = request
            .items
            .iter()
            .map(|item| match item.operation.as_ref()? {
                Operation::Put(put) => Some((put.namespace.clone(), put.key.clone())),
                Operation::Delete(delete) => Some((delete.namespace.clone(), delete.key.clone())),
            })
            .collect();
        let answer = self.client.batch_write(request).await?;
        for (key, result) in keys.into_iter().zip(&answer.results) {
            if let (Some((namespace, key)), Some(Outcome::Written(written))) = (key, &result.outcome) {
                self.saw(namespace, key, written.version);
            }
        }
        Ok(answer)
    }

    /// The version that this session has seen of a key; 0 if it has seen none, or has forgotten it. To be handed on, as to another process
    /// that goes on with the same user's work.
    pub fn min_version(&self, namespace: &str, key: &str) -> i64 {
        let seen = self.seen.lock();
        // The tuple of references would need a borrowed form of the pair.
        let key = (namespace.to_owned(), key.to_owned());
        seen.versions.get(&key).map_or(0, |(version, _)| *version)
    }

    /// Takes up a version that was seen elsewhere, as by the process before this one.
    pub fn saw(&self, namespace: impl Into<String>, key: impl Into<String>, version: i64) {
        self.seen.lock().note((namespace.into(), key.into()), version);
    }
}

/// The versions, and in which order their keys were met last.
#[derive(Debug, Default)]
struct Seen {
    /// By namespace and key: the version, and when the key was met.
    versions: HashMap<(String, String), (i64, u64)>,
    order: BTreeMap<u64, (String, String)>,
    now: u64,
}

impl Seen {
    fn note(&mut self, key: (String, String), version: i64) {
        self.now += 1;
        let now = self.now;
        let (highest, met) = self.versions.entry(key.clone()).or_insert((version, now));
        *highest = version.max(*highest);
        self.order.remove(met);
        *met = now;
        self.order.insert(now, key);
        if self.versions.len() > SESSION_KEYS_MAX
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.versions.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> (String, String) {
        ("orders".to_owned(), n.to_string())
    }

    #[test]
    fn the_highest_version_of_a_key_counts() {
        let mut seen = Seen::default();
        for version in [5, 7, 6] {
            seen.note(key(1), version);
        }
        assert_eq!(seen.versions[&key(1)].0, 7);
        assert_eq!(seen.order.len(), 1);
    }

    #[test]
    fn it_forgets_the_keys_that_it_has_not_met_for_longest() {
        let mut seen = Seen::default();
        for n in 0..SESSION_KEYS_MAX {
            seen.note(key(n), 1);
        }
        seen.note(key(0), 1);
        seen.note(key(SESSION_KEYS_MAX), 1);
        assert_eq!(
            (seen.versions.len(), seen.order.len()),
            (SESSION_KEYS_MAX, SESSION_KEYS_MAX)
        );
        assert!(seen.versions.contains_key(&key(0)) && !seen.versions.contains_key(&key(1)));
    }
}
