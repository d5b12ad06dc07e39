//! The questions that many calls ask at the same moment, as commands about several slots.
//!
//! Owns their bytes, both ways. Does not own when they are asked (`gather`). Invariant: what is wrong with one slot is said of that slot alone.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use redis::{Cmd, Value};

use super::{
    Entered, Published, RedisFailure, SlotToken, Slots,
    gather::{Answers, Question},
    link::ask_value,
    millis, write_joined,
};
use crate::{
    cache::{
        layout::{self, HEADER_BYTES},
        message::Message,
    },
    model::{ChangeKind, Key, Timestamp, Version},
};

/// What the script answers of one slot: a letter, and eight bytes.
const ANSWER_BYTES: usize = 9;

/// What stands in a slot.
#[derive(Debug)]
pub(super) struct Look(pub(super) Key);

impl Question for Look {
    type Answer = Option<Vec<u8>>;

    /// Nobody knows before: what the largest of the last answers had.
    fn bytes(&self, slots: &Slots) -> usize {
        slots.large_answer_bytes.load(Ordering::Relaxed)
    }

    async fn ask(slots: &Slots, looks: &[Look]) -> Result<Answers<Look>, RedisFailure> {
        let adopted = slots.adopted()?;
        let mut command = Cmd::new();
        // What is no string is nothing to it.
        command.arg("MGET");
        for Look(key) in looks {
            command.arg(slots.epochs.place(&adopted, key));
        }
        let standing = slots.link_to(&adopted)?;
        let answer = ask_value(&mut standing.connection.clone(), &command, slots.deadline()).await;
        let answer = answer.inspect_err(|failure| slots.note(&standing, failure))?;
        let Value::Array(values) = answer else {
            return Err(slots.unheard_of(&standing));
        };
        if values.len() != looks.len() {
            return Err(slots.unheard_of(&standing));
        }
        let largest = values.iter().map(|value| match value {
            Value::BulkString(bytes) => bytes.len(),
            _ => 0,
        });
        slots.note_answer_bytes(largest.max().unwrap_or(0));
        let read = |value| match value {
            Value::BulkString(bytes) => Ok(Some(bytes)),
            Value::Nil => Ok(None),
            _ => Err(RedisFailure::Foreign),
        };
        Ok(values.into_iter().map(read).collect())
    }
}

/// A write begins: its token is left.
#[derive(Debug)]
pub(super) struct Entrance(pub(super) Key, pub(super) SlotToken);

impl Question for Entrance {
    type Answer = Entered;

    fn bytes(&self, _slots: &Slots) -> usize {
        0
    }

    async fn ask(slots: &Slots, entrances: &[Entrance]) -> Result<Answers<Entrance>, RedisFailure> {
        let keys: Vec<&Key> = entrances.iter().map(|Entrance(key, _)| key).collect();
        let argue = |command: &mut Cmd| {
            for Entrance(_, token) in entrances {
                command.arg(&token.0);
            }
        };
        let answer = slots.run_on(&keys, "enter", argue).await?;
        let (standing, tokens) = answer
            .split_at_checked(ANSWER_BYTES * keys.len())
            .ok_or(RedisFailure::Foreign)?;
        // Of those slots alone that one can be left in.
        let mut tokens = tokens.chunks_exact(8);
        let read = |answer: &[u8]| {
            let (letter, version) = answer.split_first().ok_or(RedisFailure::Foreign)?;
            match letter {
                b'E' => Ok(Entered {
                    token: SlotToken(read_chunk(tokens.next())?),
                    standing: version_of(version)?,
                }),
                letter => Err(refused(*letter)),
            }
        };
        Ok(standing.chunks_exact(ANSWER_BYTES).map(read).collect())
    }
}

fn read_chunk(chunk: Option<&[u8]>) -> Result<[u8; 8], RedisFailure> {
    chunk
        .and_then(|chunk| chunk.try_into().ok())
        .ok_or(RedisFailure::Foreign)
}

/// A write is to be seen, and told of.
#[derive(Debug)]
pub(super) struct Publication {
    pub(super) key: Key,
    pub(super) version: Version,
    pub(super) token: Option<SlotToken>,
    /// Of one that is not in the store.
    pub(super) stamped_at: Option<Timestamp>,
    pub(super) header: [u8; HEADER_BYTES],
    pub(super) value: Option<Bytes>,
    /// How long Redis keeps it.
    pub(super) kept: Duration,
}

impl Question for Publication {
    type Answer = Published;

    fn bytes(&self, _slots: &Slots) -> usize {
        self.value.as_ref().map_or(0, Bytes::len)
    }

    async fn ask(slots: &Slots, publications: &[Publication]) -> Result<Answers<Publication>, RedisFailure> {
        let keys: Vec<&Key> = publications.iter().map(|publication| &publication.key).collect();
        let argue = |command: &mut Cmd| {
            command.arg(&slots.channel).arg(&slots.origin.encode()[..]);
            for publication in publications {
                publication.argue(command);
            }
        };
        let answer = slots.run_on(&keys, "write", argue).await?;
        if answer.len() != ANSWER_BYTES * keys.len() {
            return Err(RedisFailure::Foreign);
        }
        let read = |answer: &[u8]| {
            let (letter, version) = answer.split_first().ok_or(RedisFailure::Foreign)?;
            match letter {
                b'S' => Ok(version_of(version)?.map_or(Published::Nothing, Published::Stands)),
                b'L' => Ok(Published::Late),
                b'F' => {
                    slots.link.count(&RedisFailure::Refused { code: "OOM".to_owned() });
                    Ok(Published::Nothing)
                }
                letter => Err(refused(*letter)),
            }
        };
        Ok(answer.chunks_exact(ANSWER_BYTES).map(read).collect())
    }
}

impl Publication {
    fn argue(&self, command: &mut Cmd) {
        let message = Message::Written {
            key: self.key.clone(),
            version: self.version,
            kind: match self.value {
                Some(_) => ChangeKind::Put,
                None => ChangeKind::Delete,
            },
        };
        command.arg(message.encode());
        command.arg(self.token.as_ref().map_or(&[][..], |token| &token.0));
        match self.stamped_at {
            Some(at) => command.arg(at.0),
            None => command.arg(""),
        };
        write_joined(command, &[&self.header, self.value.as_deref().unwrap_or_default()]);
        command.arg(millis(self.kept));
    }
}

fn version_of(answer: &[u8]) -> Result<Option<Version>, RedisFailure> {
    layout::version(answer).map_err(|layout::Foreign| RedisFailure::Foreign)
}

fn refused(letter: u8) -> RedisFailure {
    match letter {
        b'W' => RedisFailure::Refused {
            code: "WRONGTYPE".to_owned(),
        },
        _ => RedisFailure::Foreign,
    }
}
