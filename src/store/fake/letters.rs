//! The fake's dead letters.
//!
//! Owns what the real tables do with them: each write is there once, ids only rise.

use std::collections::BTreeMap;

use crate::{
    model::{Key, Timestamp, Version},
    store::{
        DeadLetter,
        letters::{KeptLetter, LetterRange},
    },
};

#[derive(Default)]
pub(super) struct Letters {
    /// With their values, by their ids.
    kept: BTreeMap<i64, KeptLetter>,
    last: i64,
}

impl Letters {
    pub(super) fn bury(&mut self, letter: &DeadLetter, now: Timestamp) {
        let write = &letter.write;
        let same = |kept: &KeptLetter| kept.key == write.key && kept.version == write.entry.version;
        if self.kept.values().any(same) {
            return;
        }
        self.last += 1;
        let kept = KeptLetter {
            id: self.last,
            key: write.key.clone(),
            version: write.entry.version,
            value_bytes: write.entry.value.as_ref().map(|value| value.len()),
            value: write.entry.value.clone(),
            expires_at: write.entry.expires_at,
            tags: write.tags.clone(),
            code: letter.code.clone(),
            reason: letter.reason.clone(),
            attempts: 1,
            buried_at: now,
            retried_at: None,
        };
        self.kept.insert(self.last, kept);
    }

    pub(super) fn all(&self) -> Vec<DeadLetter> {
        let letter = |kept: &KeptLetter| DeadLetter {
            write: kept.write(),
            code: kept.code.clone(),
            reason: kept.reason.clone(),
        };
        self.kept.values().map(letter).collect()
    }

    pub(super) fn has(&self, key: &Key, version: Version) -> bool {
        self.kept
            .values()
            .any(|kept| kept.key == *key && kept.version >= version)
    }

    pub(super) fn range(&self, range: LetterRange<'_>) -> Vec<KeptLetter> {
        let of_namespace = |kept: &&KeptLetter| range.namespace.is_none_or(|name| kept.key.namespace() == name);
        let wanted = self.kept.values().filter(of_namespace);
        let wanted = wanted.filter(|kept| kept.id > range.after && kept.id <= range.up_to);
        let told = |kept: &KeptLetter| KeptLetter {
            value: kept.value.clone().filter(|_| range.values),
            ..kept.clone()
        };
        wanted.take(range.limit as usize).map(told).collect()
    }

    pub(super) fn last_id(&self) -> i64 {
        self.kept.last_key_value().map_or(0, |(id, _)| *id)
    }

    pub(super) fn drop_all(&mut self, ids: &[i64]) -> u64 {
        ids.iter().filter(|id| self.kept.remove(id).is_some()).count() as u64
    }

    pub(super) fn refuse(
        &mut self,
        id: i64,
        code: Option<&str>,
        reason: &str,
        now: Timestamp,
    ) -> Option<(u32, Timestamp)> {
        let kept = self.kept.get_mut(&id)?;
        kept.code = code.map(str::to_owned);
        kept.reason = reason.to_owned();
        kept.attempts += 1;
        kept.retried_at = Some(now);
        Some((kept.attempts, now))
    }
}
