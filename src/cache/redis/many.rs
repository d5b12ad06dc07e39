//! What is asked of many slots at once: one write to the socket, and the answers in their order.
//!
//! Owns those pipelines, and how much one answer may bring. Does not own what a slot holds, nor what a failure means ([`super`]). Invariant: one
//! slot's error is that of its slot alone, and everything else is of the connection.

use redis::{Cmd, Pipeline, Value};
use tokio::time::{Instant, timeout_at};

use super::{
    Claimed, RedisCache, RedisFailure, SCRIPT, SlotToken,
    link::{Standing, failure_of},
};
use crate::{
    cache::{Copy, epochs::Adopted, layout::HEADER_BYTES},
    model::Key,
};

/// The largest value that is had with others: so a thousand of them take no longer than the link waits for an answer, and no more memory
/// than a few of the largest.
const VALUE_BYTES_MAX: usize = 16 * 1024;

/// What a look at a slot among others shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peeked {
    /// No copy.
    Nothing,
    /// As of [`RedisCache::get`].
    Copy(Copy),
    /// A value that is to be had by itself.
    Large,
}

type Answer = Result<Option<Vec<u8>>, RedisFailure>;

impl RedisCache {
    /// The copies of keys, each as [`RedisCache::get`] has it, in one exchange.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// [`RedisFailure`]: to a reader a miss of all.
    pub async fn peek_all(&self, keys: &[&Key]) -> Result<Vec<Peeked>, RedisFailure> {
        let peek = async {
            let adopted = self.slots.adopted()?;
            let mut commands = Pipeline::with_capacity(keys.len());
            for key in keys {
                let mut command = Cmd::with_capacity(4, 96 + key.bytes());
                // One byte more than is wanted, which tells a larger one.
                let last = HEADER_BYTES + VALUE_BYTES_MAX;
                command
                    .arg("GETRANGE")
                    .arg(self.slots.epochs.place(&adopted, key))
                    .arg(0)
                    .arg(last);
                commands.add_command(command);
            }
            self.exchange_all(&adopted, &commands).await
        };
        let slots = peek.await.inspect_err(|failure| self.slots.link.count(failure))?;
        Ok(slots.into_iter().map(|slot| self.peeked(slot)).collect())
    }

    fn peeked(&self, slot: Answer) -> Peeked {
        match slot {
            Ok(Some(slot)) if slot.len() > HEADER_BYTES + VALUE_BYTES_MAX => Peeked::Large,
            Ok(Some(slot)) if !slot.is_empty() => self.slots.decoded(slot).map_or(Peeked::Nothing, Peeked::Copy),
            // An empty range is that of no slot.
            Ok(_) => Peeked::Nothing,
            Err(failure) => {
                self.slots.link.count(&failure);
                Peeked::Nothing
            }
        }
    }

    /// Leaves the tokens of loads, each as [`RedisCache::claim`] does, in one exchange; or in three, where Redis does not know the script yet.
    ///
    /// Dropped or failed, it may leave tokens, which end after ten seconds.
    ///
    /// # Errors
    /// [`RedisFailure`]: the loads are to land nowhere; the same of one key.
    pub async fn claim_all(
        &self,
        claims: &[(&Key, SlotToken)],
    ) -> Result<Vec<Result<Claimed, RedisFailure>>, RedisFailure> {
        let claim = async {
            let adopted = self.slots.adopted()?;
            let mut commands = Pipeline::with_capacity(claims.len());
            for (key, token) in claims {
                let mut command = Cmd::with_capacity(6, 160 + key.bytes());
                command.arg("EVALSHA").arg(self.slots.script.get_hash()).arg(1);
                command
                    .arg(self.slots.epochs.place(&adopted, key))
                    .arg("claim")
                    .arg(&token.0);
                commands.add_command(command);
            }
            let answers = self.exchange_all(&adopted, &commands).await?;
            if !answers.iter().any(is_unknown_script) {
                return Ok(answers);
            }
            let mut learn = Cmd::new();
            learn.arg("SCRIPT").arg("LOAD").arg(SCRIPT);
            self.slots.exchange(&adopted, &learn, self.slots.deadline()).await?;
            // Some may have been answered: they find their own token, which another's claim would; so it is asked for by those alone that were not.
            let again = answers.iter().zip(commands.cmd_iter());
            let again = again.filter(|(answer, _)| is_unknown_script(answer));
            let mut commands = Pipeline::new();
            again.for_each(|(_, command)| {
                commands.add_command(command.clone());
            });
            let mut late = self.exchange_all(&adopted, &commands).await?.into_iter();
            let answers = answers.into_iter().map(|answer| {
                if is_unknown_script(&answer) {
                    late.next().unwrap_or(Err(RedisFailure::Lost))
                } else {
                    answer
                }
            });
            Ok(answers.collect())
        };
        let answers: Vec<Answer> = claim.await.inspect_err(|failure| self.slots.link.count(failure))?;
        let claimed = answers
            .into_iter()
            .zip(claims)
            .map(|(answer, (_, token))| match answer {
                Ok(answer) => self.claimed(&answer.unwrap_or_default(), *token),
                Err(failure) => {
                    self.slots.link.count(&failure);
                    Err(failure)
                }
            });
        Ok(claimed.collect())
    }

    /// Many commands and the answer of each, over the link that stands, if it leads to the server for which the epoch holds.
    async fn exchange_all(&self, adopted: &Adopted, commands: &Pipeline) -> Result<Vec<Answer>, RedisFailure> {
        let mut standing = self.slots.link_to(adopted)?;
        let answers = ask_all(&mut standing, commands, self.slots.deadline()).await;
        answers.inspect_err(|failure| self.slots.note(&standing, failure))
    }
}

/// Cancel-safe for the connection: answers that come later are thrown away.
async fn ask_all(standing: &mut Standing, commands: &Pipeline, deadline: Instant) -> Result<Vec<Answer>, RedisFailure> {
    let asking = standing.connection.send_packed_commands(commands, 0, commands.len());
    let values = match timeout_at(deadline, asking).await {
        Ok(Ok(values)) if values.len() == commands.len() => values,
        Ok(Ok(_)) => return Err(RedisFailure::Lost),
        Ok(Err(error)) => return Err(failure_of(&error)),
        Err(_) => return Err(RedisFailure::TimedOut),
    };
    values
        .into_iter()
        .map(|value| match value {
            Value::BulkString(bytes) => Ok(Ok(Some(bytes))),
            Value::Nil => Ok(Ok(None)),
            Value::ServerError(error) => Ok(Err(failure_of(&error.into()))),
            _ => Err(RedisFailure::Lost),
        })
        .collect()
}

fn is_unknown_script(answer: &Answer) -> bool {
    matches!(answer, Err(RedisFailure::Refused { code }) if code == "NOSCRIPT")
}
