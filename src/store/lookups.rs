//! What callers ask of the tables beside the entries: requests, and dead letters.
//!
//! Owns how look-ups share queries. Does not own what is made of the answers. They change nothing, so a lost connection is no obstacle: a query
//! is tried a few times.

use tokio::time::Instant;

use crate::{
    error::Error,
    model::{Answered, Key, RequestId, Version},
    store::{
        Session, StoreError,
        tries::{self, Callers, Metrics, TRIES_MAX, refused_for_now},
    },
    telemetry::CommitPath,
};

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Lookup {
    /// What is remembered of a request.
    Answer {
        /// The namespace in which it is named.
        namespace: String,
        /// Its name.
        id: RequestId,
    },
    /// Whether a write is among the dead letters.
    Buried {
        /// Its key.
        key: Key,
        /// Its version.
        version: Version,
    },
}

/// The answer to a question of the same kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// Of a request.
    Answer(Option<Answered>),
    /// Of a dead letter.
    Buried(bool),
}

type Caller = tries::Caller<Lookup, Found>;

/// Look-ups that are made together.
pub(super) struct Lookups(Vec<Caller>);

impl Callers for Lookups {
    type Question = Lookup;
    type Result = Found;

    const REFUSED: &str = "the store answers no reads at present";
    const PATH: Option<CommitPath> = None;

    fn gather(callers: Vec<Caller>) -> Lookups {
        Lookups(callers)
    }

    fn parts(&self) -> usize {
        self.0.len()
    }

    fn split_off_half(&mut self) -> Lookups {
        Lookups(self.0.split_off(self.0.len() / 2))
    }

    /// One query for all requests, and one for each dead letter: these are asked for by those who wait for a write that never comes.
    async fn send(&self, session: &mut Session) -> Result<Vec<Found>, StoreError> {
        let requests: Vec<(&str, &RequestId)> = self.0.iter().filter_map(|caller| caller.question.request()).collect();
        let mut answers = if requests.is_empty() {
            Vec::new()
        } else {
            session.answers(&requests).await?
        }
        .into_iter();
        let mut found = Vec::with_capacity(self.0.len());
        for caller in &self.0 {
            found.push(match &caller.question {
                Lookup::Answer { .. } => Found::Answer(answers.next().flatten()),
                Lookup::Buried { key, version } => Found::Buried(session.is_buried(key, *version).await?),
            });
        }
        Ok(found)
    }

    fn answer(self, results: Vec<Found>, _: Option<&Metrics>) {
        for (caller, found) in self.0.into_iter().zip(results) {
            caller.succeed(found);
        }
    }

    fn lost(&mut self, error: &StoreError, tries: u32) {
        if tries >= TRIES_MAX {
            self.fail_if(|_, _| Some(refused_for_now(Self::REFUSED, error)));
        }
    }

    fn reject(&mut self, refusal: StoreError) {
        self.fail_if(|_, _| Some(refused_for_now(Self::REFUSED, &refusal)));
    }

    fn fail_if(&mut self, mut error: impl FnMut(&Caller, Instant) -> Option<Error>) {
        tries::fail_if(&mut self.0, Instant::now(), &mut error);
    }
}

impl Lookup {
    fn request(&self) -> Option<(&str, &RequestId)> {
        match self {
            Lookup::Answer { namespace, id } => Some((namespace, id)),
            Lookup::Buried { .. } => None,
        }
    }
}
