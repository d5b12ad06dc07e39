//! Following what other gateways write: their messages, and the trust in L1 that rests on hearing them.
//!
//! Owns what each message does here, and until when L1 may answer. Does not own the subscription (`cache/redis/channel`), nor who publishes.
//!
//! Invariants:
//! - L1 answers only while a beat was heard that was sent less than [`TRUST`] ago. Messages and beats are heard in one order and heeded in it,
//!   so all that was told before that beat has been heeded; and trust ends by itself, also of a process that was paused.
//! - When messages may have been missed, L1 is off and empty before anything else is heard; the loads under way land nowhere. They are joined
//!   by nobody: not while L1 is off, for then each read leads its own, nor later, for they are detached before it is on again.
//! - A message does to the caches what a write of this replica does: it detaches the key's load first, and then L1's copy and token go.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::{JoinError, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{Gateway, watch::RescanReason};
use crate::{
    cache::{
        memory::Memory,
        message::Message,
        redis::channel::{Beats, Channel, Heard},
    },
    model::{ChangeKind, Key, Timestamp},
};

/// How long a beat lets L1 answer, from when it was sent.
const TRUST: Duration = Duration::from_secs(1);

/// How often a beat is sent: two may be lost or late before L1 stops to answer.
const BEAT_INTERVAL: Duration = Duration::from_millis(250);

impl Gateway {
    /// Heeds what other gateways write, and sends the beats that this needs, for ever. Ends if the channel's keeper or the clearing of
    /// L1 failed: then nobody else turns L1 on, and the process should stop.
    pub async fn follow_channel(&self, channel: Channel) {
        let beats = channel.beats();
        tokio::select! {
            () = self.listen(channel) => {}
            () = self.beat(beats) => {}
        }
    }

    /// Whether L1 answers because what others write is heard; `None` where no Redis is configured, so that nobody tells anything.
    pub fn invalidation_is_up(&self) -> Option<bool> {
        let parts = self.parts();
        parts.redis.as_ref().map(|_| parts.memory.is_on(parts.clock.now()))
    }

    async fn beat(&self, beats: Beats) {
        let mut ticks = interval(BEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Some(redis) = &self.inner.redis {
                // A beat that is not heard is seen by who listens for it.
                let _ = redis.beat(beats.number()).await;
            }
        }
    }

    async fn listen(&self, mut channel: Channel) {
        let parts = self.parts();
        while let Some(heard) = channel.next().await {
            let heeded = match heard {
                // Nothing is known to have been heard until a beat was; but from here on everything will be.
                Heard::Subscribed => {
                    parts.watches.hear_all(true);
                    Ok(())
                }
                Heard::Message(message) => {
                    let heeded = self.heed_message(message).await;
                    parts.metrics.messages_heeded.inc();
                    heeded
                }
                Heard::Beat(sent_at) => {
                    self.trust_since(sent_at);
                    Ok(())
                }
                Heard::Lost => {
                    let distrusted = self.distrust().await;
                    parts.watches.hear_all(false);
                    distrusted
                }
            };
            if heeded.is_err() {
                return;
            }
        }
    }

    /// Lets L1 answer: all that others told before `sent_at` has been heeded.
    pub(super) fn trust_since(&self, sent_at: Instant) {
        let parts = self.parts();
        let now = parts.clock.now();
        if !self.goes_by_the_epoch(now) {
            // Another may hold by now, and what others could not tell of counts under that one.
            return;
        }
        if !parts.memory.is_on(now) {
            // Nobody joins a load from before, or from a time of which messages may have been missed.
            parts.flights.detach_all();
        }
        // Rounded against us.
        let elapsed = sent_at.elapsed() + Duration::from_millis(1);
        let left = i64::try_from(TRUST.saturating_sub(elapsed).as_millis()).unwrap_or(0);
        if left > 0 {
            parts.memory.trust_until(Timestamp(now.0.saturating_add(left)));
        }
    }

    /// Turns L1 off, and forgets all that messages may have been missed about.
    pub(super) async fn distrust(&self) -> Result<(), JoinError> {
        #[cfg(feature = "planted-faults")]
        if super::planted::keeps_memory(self) {
            return Ok(());
        }
        self.in_memory(|memory| {
            memory.gate();
            memory.drop_all();
        })
        .await
    }

    pub(super) async fn heed_message(&self, message: Message) -> Result<(), JoinError> {
        let parts = self.parts();
        match message {
            Message::Written { key, version, kind } => {
                parts.flights.detach(&key);
                parts.memory.invalidate(&key, version);
                parts.clock.observe(version);
                parts.watches.note(&key, version, kind);
            }
            Message::Dropped { key, version } => {
                parts.flights.detach(&key);
                parts.memory.drop_version(&key, version);
                parts.watches.note(&key, version, ChangeKind::Invalidate);
            }
            Message::Invalidated { key } => {
                parts.flights.detach(&key);
                parts.memory.invalidate_key(&key);
                parts.watches.note(&key, None, ChangeKind::Invalidate);
                self.republish_later(key);
            }
            Message::InvalidatedPrefix { namespace, prefix } => {
                let below = (namespace.clone(), prefix.clone());
                let matches = move |key: &Key| key.namespace() == below.0 && key.key().starts_with(&below.1);
                parts.flights.detach_where(&matches);
                // What is pending here was removed from Redis with the rest.
                parts.queue.note_lost(&matches);
                parts.sharing.renewal.notify_one();
                self.in_memory(move |memory| {
                    memory.invalidate_where(matches);
                })
                .await?;
                let below = Some((namespace.as_str(), prefix.as_str()));
                parts.watches.note_gap(RescanReason::Invalidated, below);
            }
            Message::EpochMoved => parts.sharing.control_changed.notify_one(),
            Message::Recall {
                namespace,
                prefix,
                number,
            } => self.answer_recall(namespace, prefix, number),
            Message::Recalled { number } => parts.watches.recalled(number),
        }
        Ok(())
    }

    /// Does to L1 what looks at every copy, where it holds up nothing else of the background.
    ///
    /// Dropped, it is still done.
    pub(super) async fn in_memory<R: Send + 'static>(
        &self,
        act: impl FnOnce(&Memory) -> R + Send + 'static,
    ) -> Result<R, JoinError> {
        let memory = Arc::clone(&self.parts().memory);
        spawn_blocking(move || act(&memory)).await
    }
}
