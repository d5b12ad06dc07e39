//! Several writes in one call: each is written as by itself, and answered by itself.
//!
//! Owns which of several writes of one key is written. A dropped call ends the waits of all its writes; those that were admitted go on.

use std::collections::HashSet;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::{Gateway, WriteRequest, Written, freshness::last_word_at, write::LAST_WORD_WAIT};
use crate::error::{Error, ErrorKind};

impl Gateway {
    /// Writes, each as [`Gateway::write`] would: an answer for each, in their order. Of several writes of one key the last is written, whatever
    /// its condition. They are under way together; the caller bounds how many there are.
    pub async fn write_all(&self, requests: Vec<WriteRequest>, deadline: Instant) -> Vec<Result<Written, Error>> {
        // So that what is answered in time is told, though another write is not.
        let deadline =
            last_word_at(deadline - LAST_WORD_WAIT.min(deadline.saturating_duration_since(Instant::now()) / 4));
        let stands = last_of_each_key(&requests);
        let writes = requests.into_iter().zip(stands).map(async |(request, stands)| {
            if stands {
                self.write(request, deadline).await
            } else {
                let message =
                    "a later item of the same batch has this key: this one was not written, whatever becomes of that";
                Err(Error::new(ErrorKind::Superseded, message))
            }
        });
        join_all(writes).await
    }
}

/// Of each write, whether no later one has its key.
fn last_of_each_key(requests: &[WriteRequest]) -> Vec<bool> {
    let mut seen = HashSet::with_capacity(requests.len());
    let mut last: Vec<bool> = requests.iter().rev().map(|request| seen.insert(&request.key)).collect();
    last.reverse();
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Key, Tags};

    #[test]
    fn the_last_write_of_a_key_stands() {
        let write = |name: &str| WriteRequest {
            key: Key::new("orders", name).expect("valid"),
            value: None,
            tags: Tags::default(),
            ttl: None,
            mode: None,
            condition: None,
            request: None,
            await_persisted: false,
        };
        let batch = ["a", "b", "a", "c", "a", "b"].map(write);
        assert_eq!(last_of_each_key(&batch), [false, false, false, true, true, true]);
        assert!(last_of_each_key(&[]).is_empty());
    }
}
