//! Writing: stamp, make it durable at its level, and tell every tier above.
//!
//! Owns the two ways of a write and the order in which tiers are told. Does not own commits (`store::commit`), admission and draining
//! (the queue). A write's future may be dropped until it is admitted, and nothing has happened; from then on it runs to its end, waited for or
//! not. What most writes behind do not do has its state in a place of its own: it would be moved with each of them.

use std::{future::Future, pin::Pin, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::{
    Durability, Gateway, WriteRequest, Written,
    decide::Undecided,
    failed,
    outlive::{Died, Outliving},
    requests::{Done, Lead, Turned, fingerprint_of_write, reused},
};
use crate::{
    cache::{
        memory::Token,
        redis::{Entered, Hold, Published},
    },
    clock::NoStamp,
    error::{Error, ErrorKind, Outcome},
    model::{
        Answer, Answered, ChangeKind, Condition, Entry, Fingerprint, Key, Request, Tags, Timestamp, Version, Write,
        content_bytes,
    },
    namespace::{QueueFull, WriteMode},
    queue::{Admission, Claim, Held},
    store::{Committed, operation::Change},
};

/// How long after its deadline a write's own, more exact, word about it is waited for.
pub(super) const LAST_WORD_WAIT: Duration = Duration::from_millis(50);

/// A write that has no version yet.
struct Draft {
    key: Key,
    value: Option<Bytes>,
    tags: Tags,
    expires_at: Option<Timestamp>,
    deadline: Instant,
}

impl Draft {
    fn kind(&self) -> ChangeKind {
        if self.value.is_some() {
            ChangeKind::Put
        } else {
            ChangeKind::Delete
        }
    }

    fn stamped(&self, version: Version, request: Option<&Request>) -> Write {
        let entry = Entry {
            version,
            value: self.value.clone(),
            expires_at: self.expires_at,
        };
        let answered = |request: &Request| Answered {
            request: request.clone(),
            answer: answer_of(&entry),
        };
        Write {
            key: self.key.clone(),
            tags: self.tags.clone(),
            requests: request.map(answered).into_iter().collect(),
            entry,
        }
    }
}

impl Gateway {
    /// Writes a key, or deletes it.
    ///
    /// # Errors
    /// `Invalid` for a request id that was used for something else, `Conflict` and `Absent` when the condition does not hold, `Rejected` when
    /// the store refuses the record for good, `DeadLettered` when it does so while that is awaited, `Overloaded` when the queue is full and the
    /// namespace rejects, `Unavailable`, `Timeout`; each says whether the write may still take effect.
    pub async fn write(&self, request: WriteRequest, deadline: Instant) -> Result<Written, Error> {
        let (started, key, await_persisted) = (Instant::now(), request.key.clone(), request.await_persisted);
        let mut written = self.write_as_asked(request, deadline).await;
        if let (true, Ok(accepted)) = (await_persisted, &written) {
            written = Box::pin(self.persisted(&key, *accepted, deadline)).await;
        }
        self.count_write(&key, &written, started);
        written
    }

    pub(super) fn count_write<T>(&self, key: &Key, written: &Result<T, Error>, started: Instant) {
        let counters = &self.inner.counters.namespaces;
        counters.write(key.namespace(), written.is_err(), started.elapsed());
    }

    async fn write_as_asked(&self, mut request: WriteRequest, deadline: Instant) -> Result<Written, Error> {
        let parts = self.parts();
        parts.clock.can_stamp().map_err(not_stamped)?;
        let settings = parts.namespaces.get(request.key.namespace());
        let mode = match request.condition {
            Some(_) => WriteMode::Through,
            None => request.mode.unwrap_or(settings.write_mode),
        };
        let id = request.request.take();
        let print = match (&id, request.condition) {
            (None, None) => None,
            _ => Some(fingerprint_of_write(&request)),
        };
        let lead = match (id, print) {
            (Some(id), Some(print)) => match Box::pin(self.turn(&request.key, id, print, deadline)).await? {
                Turned::Lead(lead) => Some(lead),
                Turned::Answered(done) => return Ok(written(done)),
            },
            _ => None,
        };
        let draft = Draft {
            expires_at: request.ttl.map(|ttl| parts.clock.now().after(ttl)),
            key: request.key,
            value: request.value,
            tags: request.tags,
            deadline,
        };
        if mode == WriteMode::Through {
            return Box::pin(self.write_through(draft, request.condition, print, lead)).await;
        }
        let lead = match lead {
            None => None,
            Some(lead) if self.may_be_on_its_way(&lead, settings.queue_full) => {
                let written = Box::pin(self.write_through(draft, None, print, Some(lead))).await;
                return written.map_err(needs_store);
            }
            Some(lead) => match Box::pin(self.answered_before(&draft, lead)).await? {
                Turned::Lead(lead) => Some(lead),
                Turned::Answered(done) => return Ok(written(done)),
            },
        };
        // Nothing has happened before this is granted: a caller that goes away while it waits has written nothing.
        let id_bytes = lead.as_ref().map_or(0, |lead| lead.request().bytes());
        let bytes = content_bytes(draft.value.as_ref(), &draft.tags) + id_bytes;
        let admission = (parts.queue).admit(&draft.key, bytes, settings.durability, settings.queue_full, deadline);
        match admission.await? {
            Admission::Granted(claim) => self.write_behind(draft, claim, settings.write_delay, lead).await,
            Admission::WriteThrough => Box::pin(self.write_through(draft, None, print, lead)).await,
        }
    }

    /// Whether an earlier try of a write-behind write may have gone through to the store, and be on its way there: one that this process knows of, or
    /// one of an earlier process whose queue was full.
    fn may_be_on_its_way(&self, lead: &Lead, full: QueueFull) -> bool {
        let parts = self.parts();
        lead.is_in_doubt() || (full == QueueFull::WriteThrough && parts.requests.is_young(parts.clock.now()))
    }

    /// A write-behind write with an id that this process does not know, and an earlier one on this data directory may have answered: the store
    /// has what that one drained.
    async fn answered_before(&self, draft: &Draft, lead: Lead) -> Result<Turned, Error> {
        let parts = self.parts();
        parts.requests.has_room()?;
        let now = parts.clock.now();
        if !parts.requests.is_young(now) {
            return Ok(Turned::Lead(lead));
        }
        let request = lead.request();
        let (namespace, id) = (draft.key.namespace(), &request.id);
        let known = parts.decisions.answer_of(namespace, id, draft.deadline).await;
        let known = known.map_err(needs_store)?.filter(|known| now < known.request.ends_at);
        let Some(known) = known else {
            return Ok(Turned::Lead(lead));
        };
        if known.request.fingerprint != request.fingerprint {
            return Err(reused());
        }
        let done = Done {
            answer: known.answer,
            durability: Durability::Store,
            deduplicated: true,
        };
        parts.clock.observe(done.answer.version);
        lead.end(&Ok(done));
        Ok(Turned::Answered(done))
    }

    /// Through to the store: which decides where there is a condition, or a request that is to be done once.
    async fn write_through(
        &self,
        draft: Draft,
        condition: Option<Condition>,
        print: Option<Fingerprint>,
        lead: Option<Lead>,
    ) -> Result<Written, Error> {
        let Some(print) = print else {
            let (gateway, deadline) = (self.clone(), draft.deadline);
            return self
                .to_its_end(deadline, Box::pin(async move { gateway.commit(draft).await }))
                .await;
        };
        let request = match &lead {
            Some(lead) => lead.request().clone(),
            None => self.parts().requests.made_up(print, self.parts().clock.now()),
        };
        let undecided = Undecided {
            key: draft.key,
            condition,
            change: match draft.value {
                Some(value) => Change::Put {
                    value,
                    tags: draft.tags,
                    expires_at: draft.expires_at,
                },
                None => Change::Delete,
            },
            request,
            deadline: draft.deadline,
        };
        self.decide_as(undecided, lead).await.map(written)
    }

    /// Stamp, commit, and stamp anew while something newer stands: then tell the tiers above the store.
    async fn commit(&self, draft: Draft) -> Result<Written, Error> {
        // Before the stamp: what lands from now on may be newer, even if it is gone when this lands.
        let token = self.parts().memory.leave_token(&draft.key);
        let entered = self.enter_shared(&draft.key).await;
        let standing = entered.and_then(|entered| entered.standing);
        let committed = self.commit_above(&draft, standing).await;
        let write = match committed {
            Ok(write) => write,
            Err((error, tried)) => {
                self.not_committed(&draft.key, entered, &error, tried).await;
                return Err(error);
            }
        };
        let version = write.entry.version;
        self.land_through(write, token, entered).await;
        Ok(Written {
            version,
            durability: Durability::Store,
            deduplicated: false,
        })
    }

    /// Tells the tiers above the store of a write that it has.
    pub(super) async fn land_through(&self, write: Write, token: Token, entered: Option<Entered>) {
        let parts = self.parts();
        parts.queue.overtake(&write.key, write.entry.version);
        let copy = self.copy_of(&write.key, Some(write.entry.clone()), parts.clock.now());
        let hold = entered.map_or(Hold::Nothing, |entered| Hold::Token(entered.token));
        if self.publish(&write, &copy, hold).await.is_some() {
            self.told(&write.key, write.entry.version);
        }
        parts.flights.detach(&write.key);
        token.land_write(copy);
        parts
            .watches
            .note(&write.key, write.entry.version, ChangeKind::of(&write.entry));
    }

    /// Nobody is to wait for a write that failed; and if the store may have it, what is older must not go on answering, here or elsewhere.
    pub(super) async fn not_committed(
        &self,
        key: &Key,
        entered: Option<Entered>,
        error: &Error,
        tried: Option<Version>,
    ) {
        if let Some(entered) = entered {
            self.release(key, entered.token).await;
        }
        if let Some(version) = tried.filter(|_| error.outcome() == Outcome::Unknown) {
            self.remember(key, version);
            self.parts().flights.detach(key);
            self.parts().memory.invalidate(key, version);
            self.parts().watches.note(key, version, ChangeKind::Invalidate);
        }
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
            let write = draft.stamped(version, None);
            #[cfg(feature = "planted-faults")]
            super::planted::publish(self, &write).await;
            let committed = self.parts().commits.commit(write.clone(), draft.deadline).await;
            match committed.map_err(|error| (error, tried))? {
                Committed::Superseded { standing: higher } => standing = Some(higher),
                _ => return Ok(write),
            }
        }
    }

    async fn write_behind(
        &self,
        draft: Draft,
        claim: Claim,
        write_delay: Duration,
        lead: Option<Lead>,
    ) -> Result<Written, Error> {
        let (gateway, deadline) = (self.clone(), draft.deadline);
        let write = Box::pin(async move {
            let request = lead.as_ref().map(|lead| lead.request().clone());
            let outcome = gateway.accept(draft, claim, write_delay, request).await;
            if let Some(lead) = lead {
                lead.end(&outcome);
            }
            outcome.map(written)
        });
        self.to_its_end(deadline, write).await
    }

    /// Stamp, append, publish, and stamp and append anew while another replica's newer write stands in Redis, or when it came there too late
    /// to be sure that none had: then it is pending, and so accepted. No reader can see it before it is as durable as it is to be.
    async fn accept(
        &self,
        draft: Draft,
        claim: Claim,
        write_delay: Duration,
        request: Option<Request>,
    ) -> Result<Done, Error> {
        let (parts, lane) = (self.parts(), &self.inner.lane);
        let token = parts.memory.leave_token(&draft.key);
        let mut passage = parts.queue.enter(&draft.key);
        let mut write = draft.stamped(self.stamp(&draft.key, None)?, request.as_ref());
        let mut held = parts.queue.append(lane, claim, &write, draft.deadline).await?;
        kill_point!(WriteAppended);
        // Once it is in the journal, a restart may bring it back.
        let journaled = held.is_journaled();
        let given_up = |error: Error| if journaled { error.unknown() } else { error };
        let mut copy = self.copy_of(&write.key, Some(write.entry.clone()), parts.clock.now());
        let under = parts.sharing.epochs.adopted();
        let (mut late, mut stands) = (false, self.inner.redis.is_none());
        let recalls = parts.watches.recalls_heard();
        while let Some(published) = self.publish(&write, &copy, Hold::Fresh).await {
            let standing = match published {
                Published::Nothing => break,
                // A newer write of this replica was concurrent with this one, which is thus written and superseded.
                Published::Stands(standing)
                    if standing <= write.entry.version || parts.clock.stamped_since(standing) =>
                {
                    // What is higher may be a floor, which answers nobody.
                    stands = standing == write.entry.version;
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
            write = match self.stamp_in_time(&draft, standing) {
                Ok(version) => draft.stamped(version, request.as_ref()),
                Err(error) => {
                    held.release();
                    return Err(given_up(error));
                }
            };
            let appended = Box::pin(parts.queue.append_anew(lane, held, &write, draft.deadline)).await;
            held = appended.map_err(given_up)?;
            copy = self.copy_of(&write.key, Some(write.entry.clone()), parts.clock.now());
        }
        kill_point!(WritePublished);
        let durability = rests_on(&held);
        let (key, answer, version) = (write.key.clone(), answer_of(&write.entry), write.entry.version);
        // Under an epoch that may be over it may have been published where nobody looks.
        let known = under == parts.sharing.epochs.adopted() && parts.sharing.is_known(parts.clock.now());
        if self.inner.redis.is_some() && !(stands && known) {
            passage.unpublished();
        }
        let accepted = parts.queue.accept(write, held, passage, write_delay);
        parts.flights.detach(&key);
        token.land_write(copy);
        parts.watches.note(&key, version, draft.kind());
        // Superseded at once, or drained by now: then the store may have refused it before it was in L1 to be removed, and before watchers were
        // told of it to be told otherwise.
        if parts.queue.pending_version(&key) < Some(version) {
            parts.memory.drop_version(&key, version);
            parts.watches.note(&key, version, ChangeKind::Invalidate);
        }
        if !accepted {
            // What superseded it may have found nothing in Redis and left nothing, and then this entered the empty slot after it.
            Box::pin(self.withdraw(&key, version)).await;
        } else if recalls != parts.watches.recalls_heard() {
            Box::pin(self.tell_once_more(&key, version, draft.kind())).await;
        }
        kill_point!(WritePending);
        Ok(Done {
            answer,
            durability,
            deduplicated: false,
        })
    }

    /// A version above everything known to stand on the key.
    pub(super) fn stamp(&self, key: &Key, standing: Option<Version>) -> Result<Version, Error> {
        let parts = self.parts();
        let pending = parts.queue.pending_version(key);
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

    /// Runs an admitted write: a client that hangs up cancels its wait, not the write.
    pub(super) async fn to_its_end<T: Send + 'static>(
        &self,
        deadline: Instant,
        write: Pin<Box<impl Future<Output = Result<T, Error>> + Send + 'static>>,
    ) -> Result<T, Error> {
        let write = Outliving::new(write, &self.inner.tasks);
        match timeout_at(deadline + LAST_WORD_WAIT, write).await {
            Ok(ended) => ended.map_err(|Died| failed().unknown())?,
            Err(_) => {
                let message = "the deadline passed while the write was under way";
                Err(Error::new(ErrorKind::Timeout, message).unknown())
            }
        }
    }
}

fn rests_on(held: &Held) -> Durability {
    if held.is_journaled() {
        Durability::Journal
    } else {
        Durability::Memory
    }
}

/// What a write that became this entry is answered with.
fn answer_of(entry: &Entry) -> Answer {
    Answer {
        version: entry.version,
        counter: None,
        expires_at: entry.expires_at,
    }
}

fn written(done: Done) -> Written {
    Written {
        version: done.answer.version,
        durability: done.durability,
        deduplicated: done.deduplicated,
    }
}

/// A write-behind write whose request id only the store can know of.
fn needs_store(error: Error) -> Error {
    if error.kind() != ErrorKind::Unavailable || error.outcome() == Outcome::Unknown {
        return error;
    }
    let message = "the store cannot take the write, and it alone knows whether one with this request id was written before this gateway started, \
                   or when it was tried last: try again, or send a write that may be written twice without an id";
    Error::new(ErrorKind::Unavailable, message).because(error)
}

pub(super) fn not_stamped(why: NoStamp) -> Error {
    Error::new(ErrorKind::Unavailable, why.to_string())
}
