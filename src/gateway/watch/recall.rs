//! A write-behind write that another gateway has acknowledged and not drained yet is in no scan of this one. Whoever begins to watch, or may have
//! missed something, would never hear of it: it was told before, and the drain tells nobody. So that it has been recorded by then, all other
//! gateways are asked to tell what they have pending below the prefix, and each says when it has; as many as Redis says have heard the question.
//! One that has too much pending for that answers at once, and tells each of those writes when it renews or drains it instead: what drained
//! before the answer is found by a scan behind it.
//!
//! Owns who waits for which answers, and what an answer is. Does not own the messages nor how they travel. Limits: [`ASKED_AT_A_TIME`] questions
//! of one gateway at a time, about [`ASKED_MAX`] prefixes, each asked [`TRIES_MAX`] times at most; [`TOLD_MAX`] writes told in an answer, and
//! [`TOLD_IN_A_SECOND`] in all answers of a second. Invariants: an answer comes over the channel behind what it is about; a question serves those
//! whose watch had begun when it was asked, and nobody else.

use std::{
    collections::{HashMap, hash_map},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::{Instant, sleep, timeout},
};

use super::{Filter, Watches};
use crate::{
    cache::{
        message::Message,
        redis::{RedisCache, RedisFailure},
    },
    gateway::Gateway,
    model::{ChangeKind, Key, Version},
    queue::PendingEntry,
};

/// How long a watcher waits for its answers, and how long a try to have them takes at most. A gateway that does not listen for so long has lost
/// its own subscription, or is about to.
const RECALL_WAIT: Duration = Duration::from_secs(1);

/// Between a try that some did not answer and the next one. Also how long a gateway that stops may wait for this.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// How often it is tried to have all answers. Redis counts everybody who listens to the channel, and not everybody is a gateway.
const TRIES_MAX: usize = 6;

/// How many questions of this gateway are under way at a time: each has every other one look for what it has pending below a prefix.
const ASKED_AT_A_TIME: usize = 4;

/// About how many prefixes there may be questions, under way or to be asked; about one more nothing is asked.
const ASKED_MAX: usize = 1_024;

/// How many questions are answered at a time, those of several gateways; one more is not, and comes again.
const ANSWERED_AT_A_TIME: usize = 16;

/// How many pending writes an answer tells at most, if the log holds four times as many.
const TOLD_MAX: usize = 1_024;

/// How many the answers of a second tell: what is told for each question is heard by all gateways, and must not outrun them.
const TOLD_IN_A_SECOND: usize = 8_192;

/// How many pending writes are told in one message.
const PAGE_KEYS: usize = 256;

/// How many answers may wait to be counted: those of so many gateways at once.
const ANSWERS_MAX: usize = 1_024;

/// The questions of this gateway, and what it answers to those of others.
#[derive(Debug)]
pub(super) struct Recalls {
    waiting: Mutex<HashMap<i64, mpsc::Sender<()>, RandomState>>,
    asked: Mutex<HashMap<Filter, Asked, RandomState>>,
    asking: Semaphore,
    answering: Arc<Semaphore>,
    /// How many questions of others were heard.
    heard: AtomicU64,
    told: Mutex<Told>,
}

/// What is asked about one prefix: by a task, until all have answered whoever wants to know.
#[derive(Debug)]
struct Asked {
    /// The latest beginning of those who want to know, as a position in the log.
    wanted: u64,
    /// The position in the log at which the last question was asked that all have answered.
    answered: watch::Sender<Option<u64>>,
}

/// What was told in answers since the last second began.
#[derive(Debug)]
struct Told {
    since: Instant,
    writes: usize,
}

impl Told {
    /// Whether so many more may be told.
    fn take(&mut self, writes: usize, now: Instant) -> bool {
        if now >= self.since + Duration::from_secs(1) {
            *self = Told { since: now, writes: 0 };
        }
        let fits = self.writes + writes <= TOLD_IN_A_SECOND;
        if fits {
            self.writes += writes;
        }
        fits
    }
}

impl Default for Recalls {
    fn default() -> Recalls {
        Recalls {
            waiting: Mutex::default(),
            asked: Mutex::default(),
            asking: Semaphore::new(ASKED_AT_A_TIME),
            answering: Arc::new(Semaphore::new(ANSWERED_AT_A_TIME)),
            heard: AtomicU64::new(0),
            told: Mutex::new(Told {
                since: Instant::now(),
                writes: 0,
            }),
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

    /// Somebody who began at a position wants to know. What tells how far all have answered, and whether a task is to see to it; `None`: too much
    /// is asked already.
    fn want(&self, filter: &Filter, position: u64) -> Option<(watch::Receiver<Option<u64>>, bool)> {
        let mut asked = self.asked.lock();
        let has_room = asked.len() < ASKED_MAX;
        match asked.entry(filter.clone()) {
            hash_map::Entry::Occupied(mut known) => {
                let known = known.get_mut();
                known.wanted = known.wanted.max(position);
                Some((known.answered.subscribe(), false))
            }
            hash_map::Entry::Vacant(slot) if has_room => {
                let (answered, answers) = watch::channel(None);
                slot.insert(Asked {
                    wanted: position,
                    answered,
                });
                Some((answers, true))
            }
            hash_map::Entry::Vacant(_) => None,
        }
    }

    /// All have answered the question that was asked at a position. Whether nobody wants to know more; then it is forgotten.
    fn settle(&self, filter: &Filter, asked_at: u64) -> bool {
        let mut asked = self.asked.lock();
        let Some(known) = asked.get(filter) else {
            return true;
        };
        known.answered.send_replace(Some(asked_at));
        let settled = known.wanted <= asked_at;
        if settled {
            asked.remove(filter);
        }
        settled
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.recalls.waiting.lock().remove(&self.number);
    }
}

/// The duty to forget what is asked about a prefix, however its task ends.
struct Asking<'a>(&'a Recalls, &'a Filter);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.asked.lock().remove(self.1);
    }
}

impl Watches {
    /// Another gateway has told all that was asked for under this number.
    pub(in crate::gateway) fn recalled(&self, number: i64) {
        self.recalls.answered(number);
    }

    /// How many questions of other gateways were heard: one that is heard between the publishing of a write and its acceptance may have been
    /// answered without it, for somebody who did not listen yet when it was published. What has been accepted is in the answer to every question
    /// that is not counted here yet: both take the lock of the key's pending writes.
    #[inline]
    pub(in crate::gateway) fn recalls_heard(&self) -> u64 {
        self.recalls.heard.load(Ordering::Relaxed)
    }
}

impl Gateway {
    /// Has other gateways tell what they have pending, and waits until they have, for a moment. Who is late is asked again in the background: what
    /// is told then is recorded behind `position`, where the watch begins.
    ///
    /// Dropped, it is asked all the same.
    pub(super) async fn recall_pending(&self, filter: &Filter, position: u64) {
        if self.inner.redis.is_none() {
            return;
        }
        let Some((mut answered, is_first)) = self.parts().watches.recalls.want(filter, position) else {
            return;
        };
        if is_first {
            let (gateway, filter) = (self.clone(), filter.clone());
            self.inner.tasks.spawn(async move { gateway.ask(&filter).await });
        }
        let served = answered.wait_for(|asked_at| *asked_at >= Some(position));
        let _ = timeout(RECALL_WAIT, served).await;
    }

    /// Asks about a prefix until all who want to know have been answered by all, or it was tried often enough.
    async fn ask(&self, filter: &Filter) {
        let watches = &self.parts().watches;
        let recalls = &watches.recalls;
        let Some(redis) = &self.inner.redis else {
            return;
        };
        let _asking = Asking(recalls, filter);
        for failures in 0.. {
            // Nobody closes it.
            let turn = recalls.asking.acquire().await;
            loop {
                if self.inner.tasks.is_closed() {
                    return;
                }
                // Before the question: what is told in answer to it is recorded there or later.
                let asked_at = watches.log.read().head();
                if !matches!(timeout(RECALL_WAIT, recalls.ask(redis, filter)).await, Ok(Ok(()))) {
                    break;
                }
                if recalls.settle(filter, asked_at) {
                    return;
                }
            }
            drop(turn);
            if failures + 1 == TRIES_MAX {
                return;
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    /// Answers another gateway's question, in the background.
    pub(in crate::gateway) fn answer_recall(&self, namespace: String, prefix: String, number: i64) {
        // Before the look at what is pending.
        let recalls = &self.parts().watches.recalls;
        recalls.heard.fetch_add(1, Ordering::Relaxed);
        let Ok(room) = Arc::clone(&recalls.answering).try_acquire_owned() else {
            return;
        };
        let gateway = self.clone();
        self.inner.tasks.spawn(async move {
            // Who has no answer asks again.
            let _ = gateway.tell_pending(&namespace, &prefix, number).await;
            drop(room);
        });
    }

    /// Tells what is pending here below a prefix, or sees to it that all of that is told when it is renewed or drained; then, that this is all.
    async fn tell_pending(&self, namespace: &str, prefix: &str, number: i64) -> Result<(), RedisFailure> {
        let Some(redis) = &self.inner.redis else {
            return Ok(());
        };
        let watches = &self.parts().watches;
        let most = TOLD_MAX.min(watches.config.log_entries_max.get() / 4);
        let queue = &self.parts().queue;
        let mut pending = queue.pending_range(namespace, prefix, None, most + 1);
        if pending.len() > most || !watches.recalls.told.lock().take(pending.len(), Instant::now()) {
            // As if Redis had lost them: the store has what drained before, and whoever drains the others tells.
            queue.note_all_lost();
            pending.clear();
        }
        let mut messages = pending.into_iter().map(|(key, entry, _)| told_again(key, &entry));
        loop {
            let mut page: Vec<Message> = messages.by_ref().take(PAGE_KEYS).collect();
            let is_last = page.len() < PAGE_KEYS;
            if is_last {
                page.push(Message::Recalled { number });
            }
            redis.announce(&page).await?;
            if is_last {
                return Ok(());
            }
        }
    }

    /// Tells the other gateways of a pending write once more.
    pub(in crate::gateway) async fn tell_once_more(&self, key: &Key, version: Version, kind: ChangeKind) {
        let Some(redis) = &self.inner.redis else {
            return;
        };
        let key = key.clone();
        let message = [Message::Written { key, version, kind }];
        if redis.announce(&message).await.is_err()
            && let [Message::Written { key, .. }] = &message
        {
            self.remember(key, version);
        }
    }
}

impl Recalls {
    /// Asks once, and waits for as many answers as there are listeners.
    async fn ask(&self, redis: &RedisCache, filter: &Filter) -> Result<(), RedisFailure> {
        let mut waiting = self.begin();
        let question = Message::Recall {
            namespace: filter.namespace.clone(),
            prefix: filter.prefix.clone(),
            number: waiting.number,
        };
        let heard_by = redis.announce(&[question]).await?;
        // One of them is this gateway.
        for _ in 1..heard_by {
            if waiting.answers.recv().await.is_none() {
                break;
            }
        }
        Ok(())
    }
}

fn told_again(key: Key, PendingEntry { entry, unconfirmed }: &PendingEntry) -> Message {
    // Something newer may stand in the store than what an earlier process had accepted.
    let kind = if *unconfirmed {
        ChangeKind::Invalidate
    } else {
        ChangeKind::of(entry)
    };
    Message::Written {
        key,
        version: entry.version,
        kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_question_serves_those_who_began_before_it_and_nobody_else() {
        let recalls = Recalls::default();
        let filter = Filter {
            namespace: "test".to_owned(),
            prefix: "k".to_owned(),
        };
        let (first, is_first) = recalls.want(&filter, 3).expect("there is room");
        assert!(is_first);
        let (later, is_first) = recalls.want(&filter, 7).expect("there is room");
        assert!(!is_first, "one task sees to both");
        assert!(
            !recalls.settle(&filter, 5),
            "who began at 7 is to be asked for once more"
        );
        for answered in [&first, &later] {
            assert_eq!(*answered.borrow(), Some(5));
        }
        assert!(recalls.settle(&filter, 7));
        assert_eq!(*later.borrow(), Some(7));
        assert!(recalls.want(&filter, 8).expect("there is room").1, "it was forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_is_told_in_a_second_than_the_bound() {
        let recalls = Recalls::default();
        let take = |writes| recalls.told.lock().take(writes, Instant::now());
        assert!(take(TOLD_IN_A_SECOND));
        assert!(take(0) && !take(1));
        sleep(Duration::from_secs(1)).await;
        assert!(take(1));
    }
}
