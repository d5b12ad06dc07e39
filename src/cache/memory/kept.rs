//! A copy as L1 keeps it: small, for there are millions.
//!
//! Owns how a copy and the text of its key lie in memory. Most are *together*: head, text and value in one allocation, which is made for
//! them and counts its own holders, so that a read takes a share of it and allocates nothing. A large value stays in its own allocation,
//! *apart*: to copy it would cost more than it saves, and larger allocations are rounded up further. Does not own what may be kept, nor the
//! bound. Invariant: what is taken out is what was put in.

use std::{mem, str, sync::Arc};

use bytes::{Buf, BufMut, Bytes};

use crate::{
    cache::Copy,
    model::{Entry, Key, Timestamp, Version},
};

/// What stands before the text: the version (0: a known absence), when it was loaded, until when it is fresh, the length of the text, the
/// flags.
const HEAD_BYTES: usize = 3 * 8 + 2 + 1;
/// After the head, where there is one: when the record ceases to exist.
const EXPIRY_BYTES: usize = 8;

/// There is a value, be it empty.
const HAS_VALUE: u8 = 1;
const HAS_EXPIRY: u8 = 2;

/// The most that lies together: the largest of the [`block`]s.
const TOGETHER_BYTES_MAX: usize = 504;

/// What it takes to keep a copy together, beyond the key's text and the value. In the cache: a slot with its links and marks, and its
/// share of the hash table, which is half full to full. In the allocation: the head, the count of holders, and the rounding up.
const TOGETHER_OVERHEAD_BYTES: usize = mem::size_of::<Kept>() + 88;

/// The same of one that is apart, which takes three more allocations: for both, for the key's text, for the count of the value's holders.
const APART_OVERHEAD_BYTES: usize = TOGETHER_OVERHEAD_BYTES + mem::size_of::<(Key, Copy)>() + 64;

/// A copy and its key.
#[derive(Debug, Clone)]
pub(super) enum Kept {
    /// The head, the expiry, the text of the key, the value.
    Together(Bytes),
    Apart(Arc<(Key, Copy)>),
}

impl Kept {
    pub(super) fn new(key: &Key, copy: Copy) -> Kept {
        let entry = copy.entry.as_ref();
        let value = entry.and_then(|entry| entry.value.as_deref());
        let expires_at = entry.and_then(|entry| entry.expires_at);
        let text = key.text().as_bytes();
        let expiry_bytes = expires_at.map_or(0, |_| EXPIRY_BYTES);
        let bytes = HEAD_BYTES + expiry_bytes + text.len() + value.map_or(0, <[u8]>::len);
        if bytes > TOGETHER_BYTES_MAX {
            return Kept::Apart(Arc::new((key.clone(), copy)));
        }
        Kept::Together(block(bytes, |mut block| {
            block.put_i64_le(copy.version().map_or(0, Version::get));
            block.put_i64_le(copy.loaded_at.0);
            block.put_i64_le(copy.fresh_until.0);
            // Shorter than a block.
            block.put_u16_le(text.len() as u16);
            block.put_u8(value.map_or(0, |_| HAS_VALUE) | expires_at.map_or(0, |_| HAS_EXPIRY));
            if let Some(at) = expires_at {
                block.put_i64_le(at.0);
            }
            block.put_slice(text);
            block.put_slice(value.unwrap_or_default());
        }))
    }

    /// Whether it is a copy of this key, and not of another that has the same place.
    pub(super) fn is_of(&self, key: &Key) -> bool {
        self.text() == key.text().as_bytes()
    }

    /// The version that stands; `None` of a known absence.
    pub(super) fn version(&self) -> Option<Version> {
        match self {
            Kept::Together(bytes) => Version::new(bytes.as_ref().get_i64_le()),
            Kept::Apart(both) => both.1.version(),
        }
    }

    /// The copy, with a share of what is kept.
    pub(super) fn into_copy(self) -> Copy {
        let mut bytes = match self {
            Kept::Together(bytes) => bytes,
            Kept::Apart(both) => return both.1.clone(),
        };
        let version = Version::new(bytes.get_i64_le());
        let (loaded_at, fresh_until) = (Timestamp(bytes.get_i64_le()), Timestamp(bytes.get_i64_le()));
        let (text_len, flags) = (bytes.get_u16_le(), bytes.get_u8());
        let expires_at = (flags & HAS_EXPIRY != 0).then(|| Timestamp(bytes.get_i64_le()));
        bytes.advance(usize::from(text_len));
        let value = (flags & HAS_VALUE != 0).then_some(bytes);
        Copy {
            entry: version.map(|version| Entry {
                version,
                value,
                expires_at,
            }),
            loaded_at,
            fresh_until,
        }
    }

    /// Its key.
    pub(super) fn key(&self) -> Key {
        match self {
            Kept::Together(_) => {
                let (namespace, key) = self.parts();
                Key::new(namespace, key).expect("a key was put in")
            }
            Kept::Apart(both) => both.0.clone(),
        }
    }

    /// The namespace of its key.
    pub(super) fn namespace(&self) -> &str {
        self.parts().0
    }

    /// What it takes, with all that keeps it.
    pub(super) fn weight(&self) -> usize {
        match self {
            Kept::Together(bytes) => bytes.len() + TOGETHER_OVERHEAD_BYTES - HEAD_BYTES,
            Kept::Apart(both) => {
                let value = both.1.entry.as_ref().map_or(0, Entry::value_bytes);
                both.0.text().len() + value + APART_OVERHEAD_BYTES
            }
        }
    }

    /// The namespace, and the key within it.
    fn parts(&self) -> (&str, &str) {
        let text = str::from_utf8(self.text()).ok();
        text.and_then(|text| text.split_once('\0'))
            .expect("the text of a key was put in")
    }

    fn text(&self) -> &[u8] {
        match self {
            Kept::Together(bytes) => {
                let mut rest: &[u8] = bytes;
                rest.advance(3 * 8);
                let (text_len, flags) = (rest.get_u16_le(), rest.get_u8());
                if flags & HAS_EXPIRY != 0 {
                    rest.advance(EXPIRY_BYTES);
                }
                &rest[..usize::from(text_len)]
            }
            Kept::Apart(both) => both.0.text().as_bytes(),
        }
    }
}

/// `bytes` bytes as `write` fills them, in one allocation with the count of their holders (8 bytes): of the sizes in which jemalloc gives
/// out memory, so that none is made larger than it has to be.
fn block(bytes: usize, write: impl FnOnce(&mut [u8])) -> Bytes {
    match bytes {
        0..=40 => sized::<40>(bytes, write),
        41..=56 => sized::<56>(bytes, write),
        57..=72 => sized::<72>(bytes, write),
        73..=88 => sized::<88>(bytes, write),
        89..=104 => sized::<104>(bytes, write),
        105..=120 => sized::<120>(bytes, write),
        121..=152 => sized::<152>(bytes, write),
        153..=184 => sized::<184>(bytes, write),
        185..=216 => sized::<216>(bytes, write),
        217..=248 => sized::<248>(bytes, write),
        249..=312 => sized::<312>(bytes, write),
        313..=376 => sized::<376>(bytes, write),
        377..=440 => sized::<440>(bytes, write),
        _ => sized::<TOGETHER_BYTES_MAX>(bytes, write),
    }
}

fn sized<const SIZE: usize>(bytes: usize, write: impl FnOnce(&mut [u8])) -> Bytes {
    let mut array = [0; SIZE];
    write(&mut array);
    let mut block = Bytes::from_owner(array);
    block.truncate(bytes);
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new("test", name).expect("valid")
    }

    fn copies() -> Vec<Copy> {
        let version = |number| Version::new(number).expect("positive");
        let values = [0, 1, 100, 400, 470, 480, 5_000].map(|bytes| Some(Bytes::from(vec![b'v'; bytes])));
        let times = [
            Timestamp(i64::MIN),
            Timestamp(-1),
            Timestamp(1_700_000_000_000),
            Timestamp(i64::MAX),
        ];
        let mut copies = Vec::new();
        for at in times {
            let (loaded_at, fresh_until) = (at, Timestamp(at.0.wrapping_add(7)));
            let copy = |entry| Copy {
                entry,
                loaded_at,
                fresh_until,
            };
            copies.push(copy(None));
            for value in [None].into_iter().chain(values.clone()) {
                for expires_at in [None, Some(at)] {
                    copies.push(copy(Some(Entry {
                        version: version(if at.0 > 0 { at.0 } else { 1 }),
                        value: value.clone(),
                        expires_at,
                    })));
                }
            }
        }
        copies
    }

    #[test]
    fn what_is_taken_out_is_what_was_put_in() {
        let (mut together, mut apart) = (0, 0);
        for copy in copies() {
            for name in ["k", "é:1", &"n".repeat(1024)] {
                let kept = Kept::new(&key(name), copy.clone());
                match kept {
                    Kept::Together(_) => together += 1,
                    Kept::Apart(_) => apart += 1,
                }
                assert_eq!(kept.version(), copy.version());
                assert!(kept.is_of(&key(name)) && !kept.is_of(&key("another")));
                assert_eq!((kept.key(), kept.namespace()), (key(name), "test"));
                assert_eq!(kept.into_copy(), copy);
            }
        }
        assert!(together > 20 && apart > 20, "{together} {apart}");
    }

    #[test]
    fn a_copy_that_lies_together_shares_its_value_and_not_the_buffer_that_it_came_in() {
        let buffer = Bytes::from(vec![b'v'; 8192]);
        let value = buffer.slice(10..110);
        let entry = Entry {
            version: Version::new(1).expect("positive"),
            value: Some(value.clone()),
            expires_at: None,
        };
        let kept = Kept::new(
            &key("k"),
            Copy::new(Some(entry), Timestamp(0), std::time::Duration::ZERO),
        );
        drop(value);
        assert!(buffer.is_unique(), "the buffer is pinned");
        let value = |kept: &Kept| kept.clone().into_copy().entry.and_then(|entry| entry.value);
        let (first, second) = (value(&kept).expect("there is one"), value(&kept).expect("there is one"));
        assert_eq!(first.as_ptr(), second.as_ptr(), "a read copies");
    }

    #[test]
    fn it_weighs_key_value_and_what_keeps_them() {
        let weight = |bytes: usize, expires_at| {
            let entry = Entry {
                version: Version::new(1).expect("positive"),
                value: Some(Bytes::from(vec![0; bytes])),
                expires_at,
            };
            let copy = Copy::new(Some(entry), Timestamp(0), std::time::Duration::ZERO);
            Kept::new(&key("k"), copy).weight()
        };
        let text = key("k").text().len();
        assert_eq!(weight(100, None), text + 100 + TOGETHER_OVERHEAD_BYTES);
        assert_eq!(weight(100, Some(Timestamp(5))), text + 108 + TOGETHER_OVERHEAD_BYTES);
        assert_eq!(weight(5_000, None), text + 5_000 + APART_OVERHEAD_BYTES);
        assert_eq!((mem::size_of::<Kept>(), TOGETHER_OVERHEAD_BYTES), (32, 120));
    }
}
