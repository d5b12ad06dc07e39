//! Writing: stamp, make it durable at its level, and tell every tier above.
//!
//! Owns the two ways of a write and the order in which tiers are told. Does not own commits (`store::commit`), admission and draining
//! (the queue). A write's future may be dropped until it is admitted, and nothing has happened; from then on it runs in a task of its
//! own, to its end.

use std::{future::Future, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::{Durability, Gateway, WriteRequest, Written, died};
use crate::{
    cache::redis::{Hold, Published},
    clock::NoStamp,
    error::{Error, ErrorKind, Outcome},
    model::{Entry, Key, Tags, Timestamp, Version, Write, content_bytes},
    namespace::WriteMode,
    queue::{Admission, Claim},
    store::Committed,
};

/// How long after its deadline a write's own, more exact, word about it is waited for.
const LAST_WORD_WAIT: Duration = Duration::from_millis(50);

/// A write that has no version yet.
struct Draft {
    key: Key,
    value: Option<Bytes>,
    tags: Tags,
    expires_at: Option<Timestamp>,
    deadline: Instant,
}

impl Draft {
    fn stamped(&self, version: Version) -> Write {
        Write {
            key: self.key.clone(),
            entry: Entry {
                version,
                value: self.value.clone(),
                expires_at: self.expires_at,
            },
            tags: self.tags.clone(),
        }
    }
}

impl Gateway {
    /// Writes a key, or deletes it.
    ///
    /// # Errors
    /// `Rejected` when the store refuses the record for good, `Overloaded` when the queue is full and the namespace rejects,
    /// `Unavailable`, `Timeout`; each says whether the write may still take effect.
    pub async fn write(&self, request: WriteRequest, deadline: Instant) -> Result<Written, Error> {
        let (started, key) = (Instant::now(), request.key.clone());
        let written = self.write_as_asked(request, deadline).await;
        let counters = &self.inner.counters.namespaces;
        counters.write(key.namespace(), written.is_err(), started.elapsed());
        written
    }

    async fn write_as_asked(&self, request: WriteRequest, deadline: Instant) -> Result<Written, Error> {
        let settings = self.parts().namespaces.get(request.key.namespace());
        let mode = request.mode.unwrap_or(settings.write_mode);
        let draft = Draft {
            expires_at: request.ttl.map(|ttl| self.parts().clock.now().after(ttl)),
            key: request.key,
            value: request.value,
            tags: request.tags,
            deadline,
        };
        self.parts().clock.can_stamp().map_err(not_stamped)?;
        if mode == WriteMode::Through {
            return self.write_through(draft).await;
        }
        // Nothing has happened before this is granted: a caller that goes away while it waits has written nothing.
        let (key, bytes) = (&draft.key, content_bytes(draft.value.as_ref(), &draft.tags));
        let admission = (self.parts().queue).admit(key, bytes, settings.durability, settings.queue_full, deadline);
        match admission.await? {
            Admission::Granted(claim) => self.write_behind(draft, claim, settings.write_delay).await,
            Admission::WriteThrough => self.write_through(draft).await,
        }
    }

    async fn write_through(&self, draft: Draft) -> Result<Written, Error> {
        let (gateway, deadline) = (self.clone(), draft.deadline);
        self.detached(deadline, async move { gateway.commit(draft).await })
            .await
    }

    /// Stamp, commit, and stamp anew while something newer stands: then tell the tiers above the store.
    async fn commit(&self, draft: Draft) -> Result<Written, Error> {
        let parts = self.parts();
        // Before the stamp: what lands from now on may be newer, even if it is gone when this lands.
        let token = parts.memory.leave_token(&draft.key);
        let entered = self.enter_shared(&draft.key).await;
        let standing = entered.and_then(|entered| entered.standing);
        let committed = self.commit_above(&draft, standing).await;
        let write = match committed {
            Ok(write) => write,
            Err((error, tried)) => {
                if let Some(entered) = entered {
                    self.release(&draft.key, entered.token).await;
                }
                if let Some(version) = tried.filter(|_| error.outcome() == Outcome::Unknown) {
                    // If the store has it, what is older must not go on answering.
                    self.remember(&draft.key, version);
                }
                return Err(error);
            }
        };
        parts.queue.overtake(&write.key, write.entry.version);
        let copy = self.copy_of(&write.key, Some(write.entry.clone()), parts.clock.now());
        let hold = entered.map_or(Hold::Nothing, |entered| Hold::Token(entered.token));
        if self.publish(&write, &copy, hold).await.is_some() {
            self.told(&write.key, write.entry.version);
        }
        parts.flights.detach(&write.key);
        token.land_write(copy);
        Ok(Written {
            version: write.entry.version,
            durability: Durability::Store,
        })
    }

    /// Commits above everything that is known to stand, or turns out to. What was committed; or why nothing was, and the version that was
    /// tried last.
    async fn commit_above(
        &self,
        draft: &Draft,
        mut standing: Option<Version>,
    ) -> Result<Write, (Error, Option<Version>)> {
        let mut tried = None;
        loop {
            let version = self.stamp(&draft.key, standing).map_err(|error| (error, tried))?;
            tried = Some(version);
            let write = draft.stamped(version);
            #[cfg(feature = "planted-faults")]
            super::planted::publish(self, &write).await;
            let committed = self.parts().commits.commit(write.clone(), draft.deadline).await;
            match committed.map_err(|error| (error, tried))? {
                Committed::Superseded { standing: higher } => standing = Some(higher),
                _ => return Ok(write),
            }
        }
    }

    async fn write_behind(&self, draft: Draft, claim: Claim, write_delay: Duration) -> Result<Written, Error> {
        let (gateway, deadline) = (self.clone(), draft.deadline);
        self.detached(deadline, async move { gateway.accept(draft, claim, write_delay).await })
            .await
    }

    /// Stamp, append, publish, and stamp and append anew while another replica's newer write stands in Redis, or when it came there too late
    /// to be sure that none had: then it is pending, and so accepted. No reader can see it before it is as durable as it is to be.
    async fn accept(&self, draft: Draft, claim: Claim, write_delay: Duration) -> Result<Written, Error> {
        let (parts, lane) = (self.parts(), &self.inner.lane);
        let token = parts.memory.leave_token(&draft.key);
        let mut passage = parts.queue.enter(&draft.key);
        let mut write = draft.stamped(self.stamp(&draft.key, None)?);
        let mut held = parts.queue.append(lane, claim, &write, draft.deadline).await?;
        kill_point!(WriteAppended);
        // Once it is in the journal, a restart may bring it back.
        let journaled = held.is_journaled();
        let given_up = |error: Error| if journaled { error.unknown() } else { error };
        let mut copy = self.copy_of(&write.key, Some(write.entry.clone()), parts.clock.now());
        let under = parts.sharing.epochs.adopted();
        let (mut late, mut stands) = (false, self.inner.redis.is_none());
        while let Some(published) = self.publish(&write, &copy, Hold::Fresh).await {
            let standing = match published {
                Published::Nothing => break,
                // A newer write of this replica was concurrent with this one, which is thus written and superseded.
                Published::Stands(standing)
                    if standing <= write.entry.version || parts.clock.stamped_since(standing) =>
                {
                    stands = true;
                    break;
                }
                Published::Stands(standing) => Some(standing),
                Published::Late if !late => {
                    late = true;
                    None
                }
                // Redis's clock is ahead, and every stamp is late: it is published as what was not.
                Published::Late => {
                    self.remember(&write.key, write.entry.version);
                    break;
                }
            };
            write.entry.version = match self.stamp_in_time(&draft, standing) {
                Ok(version) => version,
                Err(error) => {
                    held.release();
                    return Err(given_up(error));
                }
            };
            let appended = parts.queue.append_anew(lane, held, &write, draft.deadline).await;
            held = appended.map_err(given_up)?;
            copy = self.copy_of(&write.key, Some(write.entry.clone()), parts.clock.now());
        }
        kill_point!(WritePublished);
        let durability = if held.is_journaled() {
            Durability::Journal
        } else {
            Durability::Memory
        };
        let (key, version) = (write.key.clone(), write.entry.version);
        // Under an epoch that may be over it may have been published where nobody looks.
        let known = under == parts.sharing.epochs.adopted() && parts.sharing.is_known(parts.clock.now());
        if self.inner.redis.is_some() && !(stands && known) {
            passage.unpublished();
        }
        let accepted = parts.queue.accept(write, held, passage, write_delay);
        parts.flights.detach(&key);
        token.land_write(copy);
        // Superseded at once, or drained by now: then the store may have refused it before it was in L1 to be removed.
        if parts.queue.pending(&key).map(|pending| pending.entry.version) < Some(version) {
            parts.memory.drop_version(&key, version);
        }
        if !accepted {
            // What superseded it may have found nothing in Redis and left nothing, and then this entered the empty slot after it.
            self.withdraw(&key, version).await;
        }
        kill_point!(WritePending);
        Ok(Written { version, durability })
    }

    /// A version above everything known to stand on the key.
    fn stamp(&self, key: &Key, standing: Option<Version>) -> Result<Version, Error> {
        let parts = self.parts();
        let pending = parts.queue.pending(key).map(|pending| pending.entry.version);
        let known = standing.max(pending).max(parts.memory.version(key));
        parts.clock.stamp(known).map_err(not_stamped)
    }

    /// The same for one more try, while there is time for it.
    fn stamp_in_time(&self, draft: &Draft, standing: Option<Version>) -> Result<Version, Error> {
        if Instant::now() < draft.deadline {
            return self.stamp(&draft.key, standing);
        }
        let message = "the deadline passed before the write was accepted";
        Err(Error::new(ErrorKind::Timeout, message))
    }

    /// Runs an admitted write in a task of its own: a client that hangs up cancels its wait, not the write.
    async fn detached(
        &self,
        deadline: Instant,
        write: impl Future<Output = Result<Written, Error>> + Send + 'static,
    ) -> Result<Written, Error> {
        let write = self.inner.tasks.spawn(write);
        match timeout_at(deadline + LAST_WORD_WAIT, write).await {
            Ok(ended) => ended.map_err(|error| died(error).unknown())?,
            Err(_) => {
                let message = "the deadline passed while the write was under way";
                Err(Error::new(ErrorKind::Timeout, message).unknown())
            }
        }
    }
}

fn not_stamped(why: NoStamp) -> Error {
    Error::new(ErrorKind::Unavailable, why.to_string())
}
