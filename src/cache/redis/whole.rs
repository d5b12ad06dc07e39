//! What is asked of Redis that concerns no single slot: the marks of an epoch, what replicas tell each other about more than a key, and what the
//! server counts.
//!
//! Owns those commands. Does not own when they are given (the gateway) nor the connection ([`super`]). Invariant: every answer is a bulk
//! string, a number, or nothing, as of every other command here.

use std::{sync::Arc, time::Duration};

use redis::Cmd;

use super::{RedisCache, RedisFailure};
use crate::{
    cache::{epochs::Adopted, message::Message},
    model::{Epoch, Timestamp},
};

/// How long the sentinel of an epoch outlives the last gateway that looked at it.
const SENTINEL_KEPT: Duration = Duration::from_secs(24 * 3600);

impl RedisCache {
    /// Tells the other replicas what concerns no single slot, at once: at least one message. How many are subscribed, this replica among them.
    ///
    /// # Errors
    /// [`RedisFailure`]: whether they heard is not known.
    pub async fn announce(&self, messages: &[Message]) -> Result<u64, RedisFailure> {
        let told = async {
            let standing = self.slots.link.current().ok_or(RedisFailure::Down)?;
            let mut command = Cmd::new();
            command
                .arg("PUBLISH")
                .arg(&self.slots.channel)
                .arg(Message::told_together(messages, self.slots.origin));
            self.slots.tell_over(standing, &command).await
        };
        told.await.inspect_err(|failure| self.slots.link.count(failure))
    }

    /// Removes the slots of a namespace's keys that begin with `prefix`, a step at a time: from `cursor` on, which is 0 at first. How many,
    /// and where to go on; `None`: at the end. What is claimed after the first step began may stay.
    ///
    /// # Errors
    /// [`RedisFailure`]: some may still stand.
    pub async fn remove_prefix(
        &self,
        namespace: &str,
        prefix: &str,
        cursor: u64,
    ) -> Result<(u64, Option<u64>), RedisFailure> {
        let step = async {
            let adopted = self.slots.adopted()?;
            let mut pattern = Vec::new();
            for byte in self
                .slots
                .epochs
                .namespace_place(&adopted, namespace, 0)
                .iter()
                .chain(prefix.as_bytes())
            {
                if matches!(byte, b'*' | b'?' | b'[' | b']' | b'\\') {
                    pattern.push(b'\\');
                }
                pattern.push(*byte);
            }
            pattern.push(b'*');
            // One step of a scan, and all that it found, in one go; the answer is one string.
            let script = "local step = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', 1000)
                          for _, slot in ipairs(step[2]) do redis.call('UNLINK', slot) end
                          return step[1] .. ' ' .. #step[2]";
            let mut command = Cmd::new();
            command.arg("EVAL").arg(script).arg(0).arg(cursor).arg(pattern);
            let answer = self.slots.exchange(&adopted, &command, self.slots.deadline()).await?;
            let answer = answer.and_then(|answer| String::from_utf8(answer).ok());
            let numbers = answer.as_deref().and_then(|answer| answer.split_once(' '));
            let (next, removed) = numbers.ok_or(RedisFailure::Foreign)?;
            let next: u64 = next.parse().map_err(|_| RedisFailure::Foreign)?;
            let removed = removed.parse().map_err(|_| RedisFailure::Foreign)?;
            Ok((removed, (next != 0).then_some(next)))
        };
        step.await.inspect_err(|failure| self.slots.link.count(failure))
    }

    /// How many keys the server has evicted since it runs.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn evictions(&self) -> Result<u64, RedisFailure> {
        let mut info = Cmd::new();
        info.arg("INFO").arg("stats");
        let told = self
            .slots
            .ask_any(&info)
            .await
            .inspect_err(|failure| self.slots.link.count(failure))?;
        let told = told.and_then(|told| String::from_utf8(told).ok()).unwrap_or_default();
        let evicted = told.lines().find_map(|line| line.strip_prefix("evicted_keys:"));
        evicted
            .and_then(|number| number.trim().parse().ok())
            .ok_or(RedisFailure::Foreign)
    }

    /// Whether the sentinel of an epoch is there, whose absence means that Redis was emptied. It is renewed by looking.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn has_sentinel(&self, epoch: Epoch) -> Result<bool, RedisFailure> {
        let mut command = Cmd::new();
        command.arg("GETEX").arg(self.slots.epochs.sentinel(epoch));
        command.arg("EX").arg(SENTINEL_KEPT.as_secs());
        let found = self.slots.ask_any(&command).await;
        Ok(found.inspect_err(|failure| self.slots.link.count(failure))?.is_some())
    }

    /// Sets the sentinel of an epoch.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn set_sentinel(&self, epoch: Epoch) -> Result<(), RedisFailure> {
        let mut command = Cmd::new();
        // With GET the answer is a bulk string or nothing, as of every other command here.
        command.arg("SET").arg(self.slots.epochs.sentinel(epoch)).arg("1");
        command.arg("EX").arg(SENTINEL_KEPT.as_secs()).arg("GET");
        let set = self.slots.ask_any(&command).await;
        set.inspect_err(|failure| self.slots.link.count(failure)).map(drop)
    }

    /// Writes the epochs that hold to where a gateway finds them that starts while the store is down.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn post_notice(&self) -> Result<(), RedisFailure> {
        let post = async {
            let adopted = self.slots.adopted()?;
            let notice = adopted.notice().ok_or(RedisFailure::NoEpoch)?;
            let mut command = Cmd::new();
            command.arg("SET").arg(self.slots.epochs.noticeboard()).arg(notice);
            command.arg("EX").arg(SENTINEL_KEPT.as_secs()).arg("GET");
            self.slots.exchange(&adopted, &command, self.slots.deadline()).await
        };
        post.await
            .inspect_err(|failure| self.slots.link.count(failure))
            .map(drop)
    }

    /// The epochs that hold for the run of the server that answers, as other gateways found them in the store; `None` if they wrote none
    /// since it runs.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn notice(&self, now: Timestamp) -> Result<Option<Adopted>, RedisFailure> {
        let read = async {
            let standing = self.slots.link.current().ok_or(RedisFailure::Down)?;
            let server = Arc::clone(&standing.server);
            let mut command = Cmd::new();
            command.arg("GET").arg(self.slots.epochs.noticeboard());
            let notice = self.slots.ask_over(standing, &command, self.slots.deadline()).await?;
            let notice = notice.and_then(|notice| String::from_utf8(notice).ok());
            let told = notice.and_then(|notice| Adopted::from_notice(&notice, now));
            Ok(told.filter(|told| told.server.as_deref() == Some(&*server)))
        };
        read.await.inspect_err(|failure| self.slots.link.count(failure))
    }

    /// Publishes a beat of this process, for its own [`channel`](super::channel), on the server for which the epoch holds.
    ///
    /// Dropped or failed, it may be heard or not, and either is harmless.
    ///
    /// # Errors
    /// [`RedisFailure`]: it may not be heard. Not counted, for no call depends on it.
    pub async fn beat(&self, number: u64) -> Result<(), RedisFailure> {
        let adopted = self.slots.adopted()?;
        let standing = self.slots.link_to(&adopted)?;
        let mut command = Cmd::new();
        command.arg("PUBLISH");
        command.arg(&self.beats).arg(number);
        self.slots.tell_over(standing, &command).await.map(drop)
    }
}
