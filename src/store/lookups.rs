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
    /// Whether a write, or a higher one of its key, is among the dead letters.
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

    type Context = ();

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

    /// One query for all requests, and one for all dead letters.
    async fn send(&self, session: &mut Session, (): &()) -> Result<Vec<Found>, StoreError> {
        let questions = || self.0.iter().map(|caller| &caller.question);
        let requests: Vec<(&str, &RequestId)> = questions().filter_map(Lookup::request).collect();
        let writes: Vec<(&Key, Version)> = questions().filter_map(Lookup::write).collect();
        let mut answers = Vec::new();
        if !requests.is_empty() {
            answers = session.answers(&requests).await?;
        }
        let mut buried = Vec::new();
        if !writes.is_empty() {
            buried = session.are_buried(&writes).await?;
        }
        let (mut answers, mut buried) = (answers.into_iter(), buried.into_iter());
        let found = questions().map(|question| match question {
            Lookup::Answer { .. } => Found::Answer(answers.next().flatten()),
            Lookup::Buried { .. } => Found::Buried(buried.next().unwrap_or_default()),
        });
        Ok(found.collect())
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

    fn write(&self) -> Option<(&Key, Version)> {
        match self {
            Lookup::Buried { key, version } => Some((key, *version)),
            Lookup::Answer { .. } => None,
        }
    }
}
