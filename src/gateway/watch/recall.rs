//! Recalls: what is pending on other gateways is told once more, to somebody who may have missed it.
//!
//! A write-behind write that another gateway has acknowledged and not drained yet is in no scan of this one. Whoever begins to watch, or may have
//! missed something, would never hear of it: it was told before, and the drain tells nobody. So that it has been recorded by then, all other
//! gateways are asked to tell what they have pending below the prefix, and each says when it has; as many as Redis says have heard the question.
//!
//! Owns who waits for how many answers. Does not own the messages nor how they travel. Limits: a few questions of one gateway at a time, one
//! second for each of them; and a few answers, in pages. Invariant: an answer comes over the channel behind what it is about.

use std::{collections::HashMap, sync::Arc, time::Duration};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, mpsc},
    time::timeout,
};

use super::{Filter, Watches};
use crate::{
    cache::{message::Message, redis::RedisFailure},
    gateway::Gateway,
    model::{ChangeKind, Key},
    queue::PendingEntry,
};

/// How long a question may take, with the wait for its turn. A gateway that does not listen for so long has lost its own subscription, or is
/// about to.
const RECALL_WAIT: Duration = Duration::from_secs(1);

/// How many questions of this gateway are under way at a time: each has every other one tell all that it has pending below a prefix.
const ASKED_AT_A_TIME: usize = 4;

/// How many questions are answered at a time, those of several gateways; one more is not, and whoever asked goes on after its wait.
const ANSWERED_AT_A_TIME: usize = 16;

/// How many pending writes are told in one message.
const PAGE_KEYS: usize = 256;

/// How many answers may wait to be counted: those of so many gateways at once.
const ANSWERS_MAX: usize = 1_024;

/// The questions of this gateway that wait for answers, and room for those of others.
#[derive(Debug)]
pub(super) struct Recalls {
    waiting: Mutex<HashMap<i64, mpsc::Sender<()>, RandomState>>,
    asking: Semaphore,
    answering: Arc<Semaphore>,
}

impl Default for Recalls {
    fn default() -> Recalls {
        Recalls {
            waiting: Mutex::default(),
            asking: Semaphore::new(ASKED_AT_A_TIME),
            answering: Arc::new(Semaphore::new(ANSWERED_AT_A_TIME)),
        }
    }
}

/// A question that waits. Dropped, it waits no more.
struct Waiting<'a> {
    recalls: &'a Recalls,
    number: i64,
    answers: mpsc::Receiver<()>,
}

impl Recalls {
    fn begin(&self) -> Waiting<'_> {
        let number = rand::random_range(1..=i64::MAX);
        let (answered, answers) = mpsc::channel(ANSWERS_MAX);
        self.waiting.lock().insert(number, answered);
        Waiting {
            recalls: self,
            number,
            answers,
        }
    }

    fn answered(&self, number: i64) {
        if let Some(waiting) = self.waiting.lock().get(&number) {
            // More than so many are not waited for.
            let _ = waiting.try_send(());
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.recalls.waiting.lock().remove(&self.number);
    }
}

impl Watches {
    /// Another gateway has told all that was asked for under this number.
    pub(in crate::gateway) fn recalled(&self, number: i64) {
        self.recalls.answered(number);
    }
}

impl Gateway {
    /// Has other gateways tell what they have pending, and waits until they have, for a moment.
    pub(super) async fn recall_pending(&self, filter: &Filter) {
        let Some(redis) = &self.inner.redis else {
            return;
        };
        let recalls = &self.parts().watches.recalls;
        let answered = async {
            // Nobody closes it.
            let _asking = recalls.asking.acquire().await;
            let mut waiting = recalls.begin();
            let question = Message::Recall {
                namespace: filter.namespace.clone(),
                prefix: filter.prefix.clone(),
                number: waiting.number,
            };
            // Without an answer Redis is being lost, and that will be told.
            let heard_by = redis.announce(&[question]).await.unwrap_or(0);
            // One of them is this gateway.
            for _ in 1..heard_by {
                if waiting.answers.recv().await.is_none() {
                    return;
                }
            }
        };
        // Who is late is heard all the same, if what it tells is still pending there by then.
        let _ = timeout(RECALL_WAIT, answered).await;
    }

    /// Tells what is pending here below a prefix, in the background, and then that this is all.
    pub(in crate::gateway) fn answer_recall(&self, namespace: String, prefix: String, number: i64) {
        let answering = Arc::clone(&self.parts().watches.recalls.answering);
        let Ok(room) = answering.try_acquire_owned() else {
            return;
        };
        let gateway = self.clone();
        self.inner.tasks.spawn(async move {
            // Nobody relies on an answer that is not heard.
            let _ = gateway.tell_pending(&namespace, &prefix, number).await;
            drop(room);
        });
    }

    async fn tell_pending(&self, namespace: &str, prefix: &str, number: i64) -> Result<(), RedisFailure> {
        let Some(redis) = &self.inner.redis else {
            return Ok(());
        };
        let mut after: Option<Key> = None;
        loop {
            let queue = &self.parts().queue;
            let page = queue.pending_range(namespace, prefix, after.as_ref().map(Key::key), PAGE_KEYS);
            let is_last = page.len() < PAGE_KEYS;
            after = page.last().map(|(key, ..)| key.clone());
            let mut messages: Vec<Message> = page.into_iter().map(|(key, entry, _)| pending((key, entry))).collect();
            if is_last {
                messages.push(Message::Recalled { number });
            }
            redis.announce(&messages).await?;
            if is_last {
                return Ok(());
            }
        }
    }
}

fn pending((key, PendingEntry { entry, unconfirmed }): (Key, PendingEntry)) -> Message {
    // Something newer may stand in the store than what an earlier process had accepted.
    let kind = if unconfirmed {
        ChangeKind::Invalidate
    } else {
        ChangeKind::of(&entry)
    };
    Message::Written {
        key,
        version: entry.version,
        kind,
    }
}
