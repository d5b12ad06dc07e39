//! Dead letters, for operators: looking at them, trying them again, throwing them away.
//!
//! Owns what a retry is: the write is offered to the store as the drain would, under its own version, so that the one rule decides; then
//! the letter goes, or notes why it was refused. Does not own the table (the store's). Invariants: a letter goes only after the store has its write, or something
//! newer, or because somebody discards it; what is older than what a retry has stored, or may have, is dropped from all caches before it is
//! told of, and what is newer stays there. Cancellation: the retry of one letter runs to its end in a task of its own, each of its calls
//! bounded by the store's timeout, and no other begins. A process that ends in between may leave a letter that is stored and still there, with
//! caches that do not know: the next retry finds that out, and tells them.
//!
//! A discard does not wait for a retry: the letter that a retry has at hand may be stored although it was discarded. The retry says so.

use tokio::sync::mpsc;

use super::{Gateway, died};
pub use crate::store::letters::KeptLetter;
use crate::{
    error::{Error, ErrorKind},
    model::{ChangeKind, Key, Version},
    store::{Committed, DeadLetter, LOAD_BYTES_MAX, Session, StoreError, StoreErrorKind, letters::LetterRange},
};

/// How many letters the store is asked for at a time.
const PAGE_LETTERS: u32 = 1_000;

/// How many with their values.
const VALUES_MAX: usize = 64;

/// Which letters are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chosen {
    /// These.
    Ids(Vec<i64>),
    /// Those of a namespace, or of all, with ids up to this.
    UpTo {
        /// The namespace.
        namespace: Option<String>,
        /// The last id.
        id: i64,
    },
}

/// What became of a letter that was retried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Retried {
    /// The store has it.
    Stored(KeptLetter),
    /// The store has something newer; of a delete that came too late, nothing at all.
    Superseded {
        /// The letter, as it was.
        letter: KeptLetter,
        /// What stands.
        standing: Option<Version>,
    },
    /// It was refused again, and says why.
    Refused(KeptLetter),
    /// There is none of this id.
    Gone(i64),
}

/// A connection, and where a walk through the letters is.
struct Walk {
    session: Session,
    namespace: Option<String>,
    after: i64,
    up_to: i64,
}

impl Gateway {
    /// Up to `limit` letters after an id, without their values, of a namespace or of all. If they are fewer there are no more.
    ///
    /// # Errors
    /// `Unavailable`: the store does not answer.
    pub async fn letters(&self, namespace: Option<&str>, after: i64, limit: u32) -> Result<Vec<KeptLetter>, Error> {
        let range = LetterRange {
            namespace,
            after,
            up_to: i64::MAX,
            limit,
            values: false,
        };
        self.session()?.letters(range).await.map_err(untold)
    }

    /// Tells letters with their values, in order, those that were there when this began and still are. Ends early where nobody listens.
    ///
    /// # Errors
    /// `Unavailable`: the store does not answer.
    pub async fn export_letters(
        &self,
        namespace: Option<String>,
        after: i64,
        told: &mpsc::Sender<KeptLetter>,
    ) -> Result<(), Error> {
        let mut walk = Walk::new(self.session()?, namespace, after, i64::MAX);
        walk.up_to = walk.last().await?;
        while let Some(page) = walk.page().await? {
            let mut rest = &page[..];
            while let Some((wanted, others)) = split_by_bytes(rest) {
                rest = others;
                for letter in walk.with_values(wanted).await? {
                    if told.send(letter).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Tries letters again, one after the other, and tells what became of each. Ends early where nobody listens.
    ///
    /// # Errors
    /// `Unavailable`: the store does not answer, or takes nothing.
    pub async fn retry_letters(&self, chosen: Chosen, told: &mpsc::Sender<Retried>) -> Result<(), Error> {
        match chosen {
            Chosen::Ids(ids) => {
                let mut session = self.session()?;
                for id in ids {
                    let retried;
                    (session, retried) = self.retry_to_its_end(session, id).await?;
                    if told.send(retried).await.is_err() {
                        return Ok(());
                    }
                }
            }
            Chosen::UpTo { namespace, id } => {
                let mut walk = Walk::new(self.session()?, namespace, 0, id);
                walk.up_to = id.min(walk.last().await?);
                while let Some(page) = walk.page().await? {
                    for letter in page {
                        let retried;
                        (walk.session, retried) = self.retry_to_its_end(walk.session, letter.id).await?;
                        if told.send(retried).await.is_err() {
                            return Ok(());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Deletes letters for good: how many.
    ///
    /// # Errors
    /// `Unavailable`, of an unknown outcome: the store does not answer.
    pub async fn discard_letters(&self, chosen: Chosen) -> Result<u64, Error> {
        let discarded = match chosen {
            Chosen::Ids(ids) => self.session()?.drop_letters(&ids).await.map_err(undone)?,
            Chosen::UpTo { namespace, id } => {
                let mut walk = Walk::new(self.session()?, namespace, 0, id);
                let mut discarded = 0;
                while let Some(page) = walk.page().await? {
                    let ids: Vec<i64> = page.iter().map(|letter| letter.id).collect();
                    discarded += walk.session.drop_letters(&ids).await.map_err(undone)?;
                }
                discarded
            }
        };
        tracing::warn!(discarded, "dead letters were discarded by an operator");
        Ok(discarded)
    }

    /// Offers one letter to the store again, and tells the caches, whether anybody waits or not.
    async fn retry_to_its_end(&self, mut session: Session, id: i64) -> Result<(Session, Retried), Error> {
        let gateway = self.clone();
        let retrying = self.inner.tasks.spawn(async move {
            let retried = gateway.retry_letter(&mut session, id).await;
            retried.map(|retried| (session, retried))
        });
        retrying.await.map_err(|error| died(error).unknown())?
    }

    /// Offers one letter to the store again.
    async fn retry_letter(&self, session: &mut Session, id: i64) -> Result<Retried, Error> {
        let one = LetterRange {
            namespace: None,
            after: id.saturating_sub(1),
            up_to: id,
            limit: 1,
            values: true,
        };
        let mut found = session.letters(one).await.map_err(untold)?;
        let Some(mut letter) = found.pop() else {
            return Ok(Retried::Gone(id));
        };
        let write = letter.write();
        // Nobody who is told of it needs it.
        letter.value = None;
        let committed = match session.commit(std::slice::from_ref(&write)).await {
            Ok(committed) => committed.first().copied().unwrap_or(Committed::Skipped),
            Err(error) if error.kind == StoreErrorKind::Rejected => {
                return self
                    .refused(session, letter, error.code.as_deref(), &error.message)
                    .await;
            }
            Err(error) => {
                if error.kind == StoreErrorKind::Unknown {
                    // The store may have it, or yet take it: what is older must not go on answering, and may come back until that is known.
                    self.drop_older(&letter.key, letter.version, ChangeKind::Invalidate)
                        .await;
                    self.remember(&letter.key, letter.version);
                }
                return Err(undone(error));
            }
        };
        let standing = match committed {
            Committed::Applied => {
                self.parts().queue.overtake(&letter.key, letter.version);
                self.drop_older(&letter.key, letter.version, ChangeKind::of(&write.entry))
                    .await;
                None
            }
            Committed::Superseded { standing } => {
                // Or an earlier retry has stored it, and did not come to tell.
                self.parts().queue.overtake(&letter.key, standing);
                self.drop_older(&letter.key, standing, ChangeKind::Invalidate).await;
                Some(standing)
            }
            // What a delete asks for is so already.
            Committed::BelowHorizon { .. } if write.entry.value.is_none() => None,
            Committed::BelowHorizon { horizon } => {
                let DeadLetter { code, reason, .. } = DeadLetter::below_horizon(write, horizon);
                return self.refused(session, letter, code.as_deref(), &reason).await;
            }
            Committed::Skipped => {
                let reason = "a trigger or a rule of the table swallowed it";
                return self.refused(session, letter, None, reason).await;
            }
        };
        if session.drop_letters(&[id]).await.map_err(undone)? == 0 {
            tracing::warn!(
                id,
                stored = committed == Committed::Applied,
                "a dead letter was discarded, or retried, by another while it was retried"
            );
        }
        Ok(if committed == Committed::Applied {
            Retried::Stored(letter)
        } else {
            Retried::Superseded { letter, standing }
        })
    }

    /// Notes that a letter was refused again.
    async fn refused(
        &self,
        session: &mut Session,
        mut letter: KeptLetter,
        code: Option<&str>,
        reason: &str,
    ) -> Result<Retried, Error> {
        let noted = session.refuse_letter(letter.id, code, reason).await.map_err(undone)?;
        let Some((attempts, at)) = noted else {
            return Ok(Retried::Gone(letter.id));
        };
        letter.code = code.map(str::to_owned);
        letter.reason = reason.to_owned();
        letter.attempts = attempts;
        letter.retried_at = Some(at);
        Ok(Retried::Refused(letter))
    }

    /// The store holds a version, or may, long after it was acknowledged: what the caches have of the key may be older, and goes. What is newer
    /// stays: it may be another gateway's pending write, which stands in Redis alone. From the slower tier to the faster, as a write lands.
    async fn drop_older(&self, key: &Key, version: Version, kind: ChangeKind) {
        let parts = self.parts();
        parts.clock.observe(version);
        if let Some(redis) = &self.inner.redis {
            match redis.purge(key, version).await {
                Ok(()) => self.told(key, version),
                Err(_) => self.remember(key, version),
            }
        }
        parts.flights.detach(key);
        parts.memory.invalidate(key, version);
        parts.watches.note(key, version, kind);
    }
}

impl Walk {
    fn new(session: Session, namespace: Option<String>, after: i64, up_to: i64) -> Walk {
        Walk {
            session,
            namespace,
            after,
            up_to,
        }
    }

    /// The highest id that there is.
    async fn last(&mut self) -> Result<i64, Error> {
        self.session.last_letter().await.map_err(untold)
    }

    /// The next letters, without their values; `None`: there are no more.
    async fn page(&mut self) -> Result<Option<Vec<KeptLetter>>, Error> {
        let range = LetterRange {
            namespace: self.namespace.as_deref(),
            after: self.after,
            up_to: self.up_to,
            limit: PAGE_LETTERS,
            values: false,
        };
        let page = self.session.letters(range).await.map_err(untold)?;
        let Some(last) = page.last() else { return Ok(None) };
        self.after = last.id;
        Ok(Some(page))
    }

    /// These letters with their values, but those that have gone meanwhile.
    async fn with_values(&mut self, letters: &[KeptLetter]) -> Result<Vec<KeptLetter>, Error> {
        let (Some(first), Some(last)) = (letters.first(), letters.last()) else {
            return Ok(Vec::new());
        };
        let range = LetterRange {
            namespace: self.namespace.as_deref(),
            after: first.id.saturating_sub(1),
            up_to: last.id,
            limit: PAGE_LETTERS,
            values: true,
        };
        self.session.letters(range).await.map_err(untold)
    }
}

/// As many letters as are had with their values together, at least one; and the others.
fn split_by_bytes(letters: &[KeptLetter]) -> Option<(&[KeptLetter], &[KeptLetter])> {
    let mut bytes = 0;
    let within = |letter: &&KeptLetter| {
        bytes += letter.value_bytes.unwrap_or_default();
        bytes <= LOAD_BYTES_MAX
    };
    let fitting = letters.iter().take(VALUES_MAX).take_while(within).count();
    letters.split_at_checked(fitting.max(1))
}

fn untold(error: StoreError) -> Error {
    let message = "the store does not tell of its dead letters";
    Error::new(ErrorKind::Unavailable, message).because(error)
}

fn undone(error: StoreError) -> Error {
    let message = "the store does not take what is to become of a dead letter: ask again once it does";
    Error::new(ErrorKind::Unavailable, message).because(error).unknown()
}
