//! What the calls of one thread ask of Redis at the same moment, asked as one.
//!
//! Owns the gathering: whoever asks first begins a turn, which asks for all who have joined it by the time the runtime comes to it. Nobody
//! waits for company, for whatever else was ready to run has run by then: the writes that one sync of the journal woke, or the reads that
//! one segment of a connection brought. Does not own what is asked (`questions`). Limits: [`TOGETHER_MAX`] and
//! [`TOGETHER_BYTES_MAX`] in one command. Invariants: every question is answered, with what Redis says of it or with what befell all of
//! its command; one that nobody awaits any more is asked all the same.
//!
//! One command for twenty writes costs Redis less than half of twenty, and the other replicas one message instead of twenty
//! (docs/decisions/0023-redis-is-asked-together.md has the figures).

use std::{mem, sync::Arc};

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{RedisFailure, Slots};

/// How many questions one command asks: a script holds Redis up for as long as it runs.
const TOGETHER_MAX: usize = 32;

/// With how many bytes of values a command takes no further question: what brings more is answered late, or not in time, and then all of it.
const TOGETHER_BYTES_MAX: usize = 256 * 1024;

/// Something that can be asked of many slots in one command.
pub(super) trait Question: Sized + Send + 'static {
    /// What is answered of one slot.
    type Answer: Send;

    /// The bytes of the value that it sends, or is likely to be answered with.
    fn bytes(&self, slots: &Slots) -> usize;

    /// Asks all of them. As many answers as questions, in their order.
    fn ask(slots: &Slots, questions: &[Self]) -> impl Future<Output = Result<Answers<Self>, RedisFailure>> + Send;
}

/// What is answered of each slot.
pub(super) type Answers<Q> = Vec<Result<<Q as Question>::Answer, RedisFailure>>;

/// The questions of one kind that the next turn asks.
pub(super) struct Gather<Q: Question>(Arc<Mutex<Vec<Asked<Q>>>>);

struct Asked<Q: Question> {
    question: Q,
    answer: oneshot::Sender<Result<Q::Answer, RedisFailure>>,
}

impl<Q: Question> Gather<Q> {
    pub(super) fn new() -> Gather<Q> {
        Gather(Arc::default())
    }

    /// Asks, on the runtime of the connection.
    ///
    /// Cancel-safe: it may be asked all the same.
    pub(super) async fn ask(&self, slots: &Arc<Slots>, question: Q) -> Result<Q::Answer, RedisFailure> {
        let (answer, answered) = oneshot::channel();
        let begins = {
            let mut asked = self.0.lock();
            asked.push(Asked { question, answer });
            asked.len() == 1
        };
        if begins {
            let (asked, slots) = (Arc::clone(&self.0), Arc::clone(slots));
            tokio::spawn(async move {
                let asked = mem::take(&mut *asked.lock());
                turn(&slots, asked).await;
            });
        }
        // A turn is cut off with its runtime alone.
        answered.await.unwrap_or(Err(RedisFailure::Lost))
    }
}

async fn turn<Q: Question>(slots: &Slots, asked: Vec<Asked<Q>>) {
    let mut commands = Vec::with_capacity(asked.len().div_ceil(TOGETHER_MAX));
    let mut asked = asked.into_iter().peekable();
    while asked.peek().is_some() {
        let (mut questions, mut waiting, mut bytes) = (Vec::new(), Vec::new(), 0);
        while questions.len() < TOGETHER_MAX
            && bytes < TOGETHER_BYTES_MAX
            && let Some(Asked { question, answer }) = asked.next()
        {
            bytes += question.bytes(slots);
            questions.push(question);
            waiting.push(answer);
        }
        commands.push(async move {
            // Whoever went away hears nothing.
            match Q::ask(slots, &questions).await {
                Ok(answers) => {
                    let answered = waiting.into_iter().zip(answers);
                    answered.for_each(|(waiting, answer)| drop(waiting.send(answer)));
                }
                Err(failure) => waiting
                    .into_iter()
                    .for_each(|waiting| drop(waiting.send(Err(failure.clone())))),
            }
        });
    }
    join_all(commands).await;
}
