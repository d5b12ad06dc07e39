//! Which records are live: appended, and not released.
//!
//! Owns the numbers of records, and the lowest live one. Pure: no lock (the journal's), no I/O. One bit for each record from the lowest
//! live one on, so its size is bounded by the journal's. Invariants: numbers rise by one; a record that was moved keeps the handle
//! that it was appended under, while its number is the one of its newest copy.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
};

use foldhash::fast::RandomState;

/// The live records.
#[derive(Debug)]
pub(super) struct Live {
    /// The number of the first bit.
    base: u64,
    /// One bit for each number from `base` up to `next`; the first word is not zero, unless it is the last.
    words: VecDeque<u64>,
    /// The number that the next record gets.
    next: u64,
    /// What the live records are charged.
    bytes: u64,
    /// Records that were moved: from the handle's number to the one of the copy.
    moved: HashMap<u64, u64, RandomState>,
    /// The same, from the copy's number to the handle's.
    origins: HashMap<u64, u64, RandomState>,
}

impl Live {
    /// No live records: the next one has the number `next`.
    pub(super) fn new(next: u64) -> Live {
        Live {
            base: next,
            words: VecDeque::new(),
            next,
            bytes: 0,
            moved: HashMap::default(),
            origins: HashMap::default(),
        }
    }

    /// Of the records `numbers`, those in `live`, each with its charge.
    pub(super) fn restored(numbers: Range<u64>, live: impl Iterator<Item = (u64, u32)>) -> Live {
        let mut restored = Live::new(numbers.start);
        restored.next = numbers.end;
        // As many as fit in memory beforehand: they lie in the journal's files.
        let words = (numbers.end - numbers.start).div_ceil(64) as usize;
        restored.words.resize(words, 0);
        for (number, bytes) in live {
            restored.set(number);
            restored.bytes += u64::from(bytes);
        }
        restored.trim();
        restored
    }

    /// A new record, live from now on: its number.
    pub(super) fn add(&mut self, bytes: u32) -> u64 {
        self.bytes += u64::from(bytes);
        self.take_number()
    }

    /// Moves a live record to a new number, under which a copy of it is about to be written.
    pub(super) fn relocate(&mut self, number: u64) {
        let copy = self.take_number();
        self.clear(number);
        let handle = self.origins.remove(&number).unwrap_or(number);
        self.moved.insert(handle, copy);
        self.origins.insert(copy, handle);
    }

    /// Releases the record of a handle.
    pub(super) fn release(&mut self, handle: u64, bytes: u32) {
        let number = match self.moved.remove(&handle) {
            None => handle,
            Some(copy) => {
                self.origins.remove(&copy);
                copy
            }
        };
        self.bytes -= u64::from(bytes);
        self.clear(number);
    }

    /// Whether the record that was written under this number is live, and this is its newest copy.
    pub(super) fn is_live(&self, number: u64) -> bool {
        let Some(at) = number.checked_sub(self.base) else {
            return false;
        };
        let word = self.words.get((at / 64) as usize);
        word.is_some_and(|word| word & (1 << (at % 64)) != 0)
    }

    /// The lowest live number; the next one, if none is live.
    pub(super) fn low(&self) -> u64 {
        match self.words.front() {
            Some(word) if *word != 0 => self.base + u64::from(word.trailing_zeros()),
            _ => self.next,
        }
    }

    /// The number that the next record gets.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// What the live records are charged.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn take_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.set(number);
        number
    }

    fn set(&mut self, number: u64) {
        let at = number - self.base;
        let word = (at / 64) as usize;
        if word == self.words.len() {
            self.words.push_back(0);
        }
        self.words[word] |= 1 << (at % 64);
    }

    fn clear(&mut self, number: u64) {
        let at = number - self.base;
        self.words[(at / 64) as usize] &= !(1 << (at % 64));
        self.trim();
    }

    /// Drops the leading words that have nothing live and get nothing more.
    fn trim(&mut self) {
        while self.words.front() == Some(&0) && self.base + 64 <= self.next {
            self.words.pop_front();
            self.base += 64;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is added, moved and released, it counts as a plain list of live records does.
        #[test]
        fn does_as_a_list(steps in proptest::collection::vec((0..4u8, any::<u16>()), 0..600), start in 0..200u64) {
            let mut live = Live::new(start);
            // Handle, current number.
            let mut list: Vec<(u64, u64)> = Vec::new();
            let mut next = start;
            for (step, pick) in steps {
                let picked = (!list.is_empty()).then(|| usize::from(pick) % list.len().max(1));
                match (step, picked) {
                    (0 | 1, _) | (_, None) => {
                        prop_assert_eq!(live.add(3), next);
                        list.push((next, next));
                        next += 1;
                    }
                    (2, Some(at)) => {
                        let (handle, _) = list.swap_remove(at);
                        live.release(handle, 3);
                    }
                    (_, Some(at)) => {
                        live.relocate(list[at].1);
                        list[at].1 = next;
                        next += 1;
                    }
                }
                prop_assert_eq!(live.low(), list.iter().map(|(_, number)| *number).min().unwrap_or(next));
                prop_assert_eq!(live.next(), next);
                prop_assert_eq!(live.bytes(), 3 * list.len() as u64);
                for number in start.saturating_sub(2)..next + 2 {
                    prop_assert_eq!(live.is_live(number), list.iter().any(|(_, current)| *current == number));
                }
            }
            let restored = Live::restored(start..next, list.iter().map(|(_, number)| (*number, 3)));
            prop_assert_eq!((restored.low(), restored.next(), restored.bytes()), (live.low(), live.next(), live.bytes()));
        }
    }
}
