//! Scans: the live records of a range of keys, page by page.
//!
//! Owns what a page holds, and where it ends. Does not own the rows (`store::ranges`), the values ([`crate::store::load`]), nor what is pending
//! (the queue). A page reads the store and this replica's pending writes, as a `STORE` read does, and no cache; nor does it fill one, for it would
//! sweep out what is read again and again for what is read once.
//!
//! Invariants: what is pending is looked at before the store is asked, so what drains in between is found in one of them; a page goes no further
//! than both looks do; it is bounded in records, in bytes, and in what it looks at. Safe to drop at any await.

mod merge;
mod token;

use bytes::Bytes;
use tokio::time::Instant;

use self::merge::{Newest, Stretch, merge};
use super::Gateway;
use crate::{
    error::{Error, ErrorKind},
    model::{Entry, Key, Tags, Timestamp},
    store::ranges::Range,
};

/// How many keys a page looks at, live or not, before it ends, however few records it has: give or take a stretch.
const EXAMINED_MAX: usize = 5_000;

/// How many rows, and how many pending writes, are looked at in one go.
const STRETCH_MAX: usize = 1_000;

/// How many times a record that is being written is looked at for a value and tags of one version.
const LOOKS_MAX: usize = 5;

/// A checked request for a page.
#[derive(Debug)]
pub struct ScanRequest {
    /// Whose records.
    pub namespace: String,
    /// What their keys begin with; may be empty.
    pub prefix: String,
    /// The most records.
    pub records_max: usize,
    /// The most bytes of keys, values, and tags where they are wanted; the first record is there in any case.
    pub bytes_max: usize,
    /// Where to go on: the token of the page before, as the caller sent it.
    pub page_token: Option<String>,
    /// Whether values are left out.
    pub keys_only: bool,
    /// Whether tags are wanted.
    pub with_tags: bool,
}

impl ScanRequest {
    /// What tags take of a page.
    fn bytes_of(&self, tags: &Tags) -> usize {
        if self.with_tags { tags.bytes() } else { 0 }
    }
}

/// A page of records.
#[derive(Debug)]
pub struct Page {
    /// Live records in the order of their keys.
    pub records: Vec<(Key, Entry)>,
    /// The tags of each record, where they were asked for; else none.
    pub tags: Vec<Tags>,
    /// Where the next one begins, if there is one.
    pub next_page_token: Option<String>,
}

/// A page as it is being gathered.
struct Gathered {
    records: Vec<Newest>,
    bytes: usize,
    /// The last key that was looked at, and is in the page if it belongs there.
    last: Option<Key>,
    is_full: bool,
}

impl Gateway {
    /// Reads a page of the records of a namespace.
    ///
    /// # Errors
    /// `Invalid` for a token that is none of this scan, `Unavailable`, `Overloaded`, `Timeout`.
    pub async fn scan(&self, request: ScanRequest, deadline: Instant) -> Result<Page, Error> {
        let ScanRequest { namespace, prefix, .. } = &request;
        let after = match &request.page_token {
            Some(token) => Some(token::read(namespace, prefix, token)?),
            None => None,
        };
        let now = self.parts().clock.now();
        let mut page = Gathered {
            records: Vec::new(),
            bytes: 0,
            last: None,
            is_full: false,
        };
        // One more than is wanted shows whether that is all.
        let mut limit = request.records_max.saturating_add(1).min(STRETCH_MAX);
        let mut examined = 0;
        let has_more = loop {
            let after = page.last.as_ref().map(Key::key).or(after.as_deref());
            let stretch = self.stretch(&request, after, limit, deadline).await?;
            examined += stretch.newest.len();
            let end = page.add(stretch, &request, now);
            if page.is_full || end.is_none() {
                break page.is_full;
            }
            page.last = end;
            if examined >= EXAMINED_MAX || page.records.len() >= request.records_max {
                break true;
            }
            limit = STRETCH_MAX;
        };
        let Gathered { records, last, .. } = page;
        let (records, cut_after) = self.with_values(records, &request, now, deadline).await?;
        let (records, tags) = records
            .into_iter()
            .map(|(key, entry, tags)| ((key, entry), tags))
            .unzip();
        let next = cut_after.or(last.filter(|_| has_more));
        Ok(Page {
            records,
            tags: if request.with_tags { tags } else { Vec::new() },
            next_page_token: next.map(|last| token::write(namespace, prefix, last.key())),
        })
    }

    /// What is newest from one key on.
    async fn stretch(
        &self,
        request: &ScanRequest,
        after: Option<&str>,
        limit: usize,
        deadline: Instant,
    ) -> Result<Stretch, Error> {
        let ScanRequest { namespace, prefix, .. } = request;
        // First: what drains from now on is in the store.
        let pending = self.parts().queue.pending_range(namespace, prefix, after, limit);
        let range = Range {
            namespace: namespace.clone(),
            prefix: prefix.clone(),
            after: after.map(str::to_owned),
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
        };
        let rows = self.parts().ranges.rows(range, deadline).await?;
        for row in &rows {
            self.parts().clock.observe(row.version);
        }
        Ok(merge(pending, rows, limit))
    }

    /// The records with their values; and the last of them where the values have grown meanwhile, so that not all find room.
    async fn with_values(
        &self,
        records: Vec<Newest>,
        request: &ScanRequest,
        now: Timestamp,
        deadline: Instant,
    ) -> Result<(Vec<(Key, Entry, Tags)>, Option<Key>), Error> {
        let wanted = records.iter().filter_map(|newest| match newest {
            Newest::Stored(row) if !request.keys_only => Some(&row.key),
            Newest::Stored(_) | Newest::Pending(..) => None,
        });
        let loads = &self.parts().loads;
        let mut asked = loads.ask_all(wanted, deadline).into_iter();
        let mut page: Vec<(Key, Entry, Tags)> = Vec::with_capacity(records.len());
        let mut bytes = 0;
        for newest in records {
            let (key, entry, tags) = match newest {
                Newest::Pending(key, entry, tags) if request.keys_only => (key, without_value(entry), tags),
                Newest::Pending(key, entry, tags) => (key, entry, tags),
                Newest::Stored(row) if request.keys_only => {
                    let entry = Entry {
                        version: row.version,
                        value: Some(Bytes::new()),
                        expires_at: row.expires_at,
                    };
                    (row.key, entry, row.tags)
                }
                Newest::Stored(row) => {
                    let Some(question) = asked.next() else { break };
                    // What is newer than the row is as good; what has gone since is left out.
                    let mut found = loads.answer(question?, deadline).await?.map(|entry| (entry, row.tags));
                    if request.with_tags && found.as_ref().is_some_and(|(entry, _)| entry.version != row.version) {
                        found = self.of_one_version(&row.key, deadline).await?;
                    }
                    let Some((entry, tags)) = found.filter(|(entry, _)| entry.is_live(now)) else {
                        continue;
                    };
                    self.parts().clock.observe(entry.version);
                    (row.key, entry, tags)
                }
            };
            bytes += key.key().len() + entry.value_bytes() + request.bytes_of(&tags);
            if bytes > request.bytes_max
                && let Some((last, ..)) = page.last()
            {
                let last = Key::clone(last);
                return Ok((page, Some(last)));
            }
            page.push((key, entry, tags));
        }
        Ok((page, None))
    }

    /// What the store has of a key that was written while the page was read: its value and its tags, which are found apart, as one version has them.
    async fn of_one_version(&self, key: &Key, deadline: Instant) -> Result<Option<(Entry, Tags)>, Error> {
        let (loads, ranges) = (&self.parts().loads, &self.parts().ranges);
        for _ in 0..LOOKS_MAX {
            let range = Range {
                namespace: key.namespace().to_owned(),
                // The first key that begins with it is the key itself.
                prefix: key.key().to_owned(),
                after: None,
                limit: 1,
            };
            let rows = ranges.rows(range, deadline).await?;
            let Some(row) = rows.into_iter().find(|row| row.key == *key) else {
                return Ok(None);
            };
            let mut asked = loads.ask_all([key], deadline).into_iter();
            let Some(question) = asked.next() else { break };
            match loads.answer(question?, deadline).await? {
                Some(entry) if entry.version == row.version => return Ok(Some((entry, row.tags))),
                Some(_) => {}
                None => return Ok(None),
            }
        }
        let message = "a record of the page is written faster than it can be read with its tags";
        Err(Error::new(ErrorKind::Unavailable, message))
    }
}

impl Gathered {
    /// Takes the live records of a stretch for as long as there is room. Where the stretch ends, if there is more behind it.
    fn add(&mut self, stretch: Stretch, request: &ScanRequest, now: Timestamp) -> Option<Key> {
        for newest in stretch.newest {
            let value_bytes = match &newest {
                Newest::Pending(_, entry, _) if entry.is_live(now) => entry.value_bytes(),
                Newest::Stored(row) if row.is_live(now) => row.value_bytes.unwrap_or(0),
                Newest::Pending(..) | Newest::Stored(_) => {
                    self.last = Some(newest.key().clone());
                    continue;
                }
            };
            let value_bytes = if request.keys_only { 0 } else { value_bytes };
            let bytes = newest.key().key().len() + value_bytes + request.bytes_of(newest.tags());
            let has_room = self.records.len() < request.records_max && self.bytes + bytes <= request.bytes_max;
            if !has_room && !self.records.is_empty() {
                self.is_full = true;
                return None;
            }
            self.bytes += bytes;
            self.last = Some(newest.key().clone());
            self.records.push(newest);
        }
        stretch.end
    }
}

fn without_value(entry: Entry) -> Entry {
    Entry {
        value: entry.value.map(|_| Bytes::new()),
        ..entry
    }
}
