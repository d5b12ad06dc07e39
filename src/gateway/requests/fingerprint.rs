//! What a request asks for, as a hash: the same in every build and on every gateway, for it lies in journals and in the store.
//!
//! Owns which parts of a request count, and in which order: all but when it is answered. Changing that makes every repeat of a request from before the
//! change another one.

use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::{
    gateway::{IncrementRequest, TouchRequest, WriteRequest},
    model::{Condition, Fingerprint, Key},
};

/// Hashes what a request asks for, part by part, each with its length, so that no two contents are one text.
struct Print(Sha256);

impl Print {
    fn new(kind: u8, key: &Key) -> Print {
        let mut print = Print(Sha256::new());
        print.part(&[kind]);
        print.part(key.key().as_bytes());
        print
    }

    fn part(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_be_bytes());
        self.0.update(bytes);
    }

    fn ttl(&mut self, ttl: Option<Duration>) {
        self.part(&ttl.map_or(0, |ttl| ttl.as_millis()).to_be_bytes());
    }

    fn finish(self) -> Fingerprint {
        let hash = self.0.finalize();
        let mut print = [0; 16];
        print.copy_from_slice(&hash[..16]);
        Fingerprint(print)
    }
}

/// What a write asks for: all but when it is answered.
pub(in crate::gateway) fn fingerprint_of_write(request: &WriteRequest) -> Fingerprint {
    let mut print = Print::new(if request.value.is_some() { b'p' } else { b'd' }, &request.key);
    print.part(request.value.as_deref().unwrap_or_default());
    print.ttl(request.ttl);
    let (kind, version) = match request.condition {
        None => (0, 0),
        Some(Condition::Absent) => (1, 0),
        Some(Condition::Present) => (2, 0),
        Some(Condition::Version(version)) => (3, version.get()),
    };
    print.part(&[kind]);
    print.part(&version.to_be_bytes());
    for tag in request.tags.iter() {
        print.part(tag.as_bytes());
    }
    print.finish()
}

/// What a touch asks for.
pub(in crate::gateway) fn fingerprint_of_touch(request: &TouchRequest) -> Fingerprint {
    let mut print = Print::new(b't', &request.key);
    print.ttl(request.ttl);
    print.finish()
}

/// What an increment asks for.
pub(in crate::gateway) fn fingerprint_of_increment(request: &IncrementRequest) -> Fingerprint {
    let mut print = Print::new(b'i', &request.key);
    print.part(&request.delta.to_be_bytes());
    print.ttl(request.ttl);
    print.finish()
}
