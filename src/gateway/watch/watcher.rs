//! One who watches: a position in the log, and what is told next.
//!
//! Owns the order of what is told, and the looking up of records. Does not own the log. Invariant: a token is that of the entry which it is told with,
//! so whoever comes back with it is told what follows, and nothing twice but what he had not handled.

use std::{collections::VecDeque, future::Future, pin::Pin, pin::pin, sync::Arc, time::Duration};

use futures_util::stream::{FuturesOrdered, StreamExt as _};
use tokio::{
    sync::OwnedSemaphorePermit,
    task::yield_now,
    time::{Instant, sleep_until},
};

use super::{Beginning, Change, Event, Filter, Gateway, LOOKUPS_MAX, Read, Recorded, RescanReason, Scope, Told};
use crate::{
    gateway::{Freshness, ReadConsistency, ReadOptions},
    model::ChangeKind,
};

/// How long a record is looked up, before its change is told without it.
const LOOKUP_WAIT: Duration = Duration::from_secs(1);

/// Something to tell, with the position behind it.
type Numbered = (u64, Event);

/// A record on its way.
type Lookup = Pin<Box<dyn Future<Output = (Numbered, Option<OwnedSemaphorePermit>)> + Send>>;

/// A watch. Dropping it ends it.
pub struct Watcher {
    gateway: Gateway,
    filter: Filter,
    with_values: bool,
    /// Said before anything else.
    opening: VecDeque<Event>,
    /// Up to where the log was read.
    position: u64,
    /// What was read and is to be told next.
    ready: VecDeque<(u64, Recorded)>,
    /// What comes before that, each with the room that it takes among those of all watchers; the first of a watcher needs none.
    lookups: FuturesOrdered<Lookup>,
    told_at: Instant,
}

impl Watcher {
    pub(super) fn new(
        gateway: Gateway,
        filter: Filter,
        with_values: bool,
        beginning: Beginning,
        asked_to_resume: bool,
    ) -> Watcher {
        let Beginning {
            position,
            resumed,
            scope,
        } = beginning;
        let mut opening = VecDeque::from([Event::Started { scope, resumed }]);
        if asked_to_resume && !resumed {
            let reason = RescanReason::TokenExpired;
            opening.push_back(Event::Rescan { reason, scope });
        }
        Watcher {
            gateway,
            filter,
            with_values,
            opening,
            position,
            ready: VecDeque::new(),
            lookups: FuturesOrdered::new(),
            told_at: Instant::now(),
        }
    }

    /// Waits for what is to be told next, for as long as it takes: but no longer than until a word of progress is due.
    ///
    /// Dropped, what it was about to tell is lost with the watch.
    pub async fn next(&mut self) -> Told {
        let (position, event) = match self.opening.pop_front() {
            Some(event) => (self.position, event),
            None => self.next_event().await,
        };
        // Whoever scans now would not find what is pending elsewhere; and that was told before, if at all.
        match event {
            Event::Started { scope, resumed: false } if self.opening.is_empty() => self.recall(scope, position).await,
            Event::Rescan { scope, .. } => self.recall(scope, position).await,
            _ => {}
        }
        let watches = &self.gateway.parts().watches;
        watches.count(&event);
        self.told_at = Instant::now();
        Told {
            resume_token: watches.token(&self.filter, position),
            event,
        }
    }

    async fn next_event(&mut self) -> Numbered {
        let gateway = self.gateway.clone();
        let watches = &gateway.parts().watches;
        let progress_at = self.told_at + watches.config.progress_interval;
        loop {
            if let Some(next) = self.next_ready().await {
                return next;
            }
            // Before the look: what is recorded after it is not slept through.
            let mut grown = pin!(watches.grown.notified());
            grown.as_mut().enable();
            match watches.read(self.position, &self.filter) {
                Read::Behind { position, scope } => {
                    self.position = position;
                    let reason = RescanReason::FellBehind;
                    return (position, Event::Rescan { reason, scope });
                }
                Read::Found { found, position } => {
                    let has_read = position > self.position;
                    self.position = position;
                    self.ready.extend(found);
                    if !self.ready.is_empty() {
                        continue;
                    }
                    if Instant::now() >= progress_at {
                        return (self.position, Event::Progress);
                    }
                    if has_read {
                        // There may be more, which concerns others as well.
                        yield_now().await;
                        continue;
                    }
                }
            }
            tokio::select! {
                () = grown => {}
                () = sleep_until(progress_at) => {}
            }
        }
    }

    /// The next of what was read; the records of those behind it are looked up meanwhile.
    async fn next_ready(&mut self) -> Option<Numbered> {
        while self.lookups.len() < LOOKUPS_MAX
            && let Some((position, recorded)) = self.ready.pop_front()
        {
            match recorded {
                Recorded::Change(change) if self.with_values && change.kind == ChangeKind::Put => {
                    let ahead = &self.gateway.parts().watches.looked_up_ahead;
                    let room = match Arc::clone(ahead).try_acquire_owned() {
                        Ok(room) => Some(room),
                        Err(_) if self.lookups.is_empty() => None,
                        Err(_) => {
                            self.ready.push_front((position, Recorded::Change(change)));
                            break;
                        }
                    };
                    let gateway = self.gateway.clone();
                    let lookup = async move { ((position, looked_up(&gateway, change).await), room) };
                    self.lookups.push_back(Box::pin(lookup));
                }
                recorded if self.lookups.is_empty() => return Some((position, told(recorded))),
                recorded => {
                    let told = (position, told(recorded));
                    self.lookups.push_back(Box::pin(std::future::ready((told, None))));
                }
            }
        }
        let (next, _room) = self.lookups.next().await?;
        Some(next)
    }

    /// Has other gateways tell what is pending there, to be recorded behind what is told now.
    async fn recall(&mut self, scope: Scope, position: u64) {
        if scope == Scope::AllGateways {
            self.gateway.recall_pending(&self.filter, position).await;
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.gateway.parts().watches.leave();
    }
}

fn told(recorded: Recorded) -> Event {
    match recorded {
        Recorded::Change(Change { key, version, kind }) => Event::Changed {
            key,
            version,
            kind,
            entry: None,
        },
        Recorded::Gap(gap) => Event::Rescan {
            reason: gap.reason,
            scope: gap.scope,
        },
    }
}

/// A write with the record that it left, or a newer one.
async fn looked_up(gateway: &Gateway, change: Change) -> Event {
    let Change { key, version, .. } = change;
    let options = ReadOptions {
        consistency: ReadConsistency::Cached,
        freshness: Freshness {
            max_staleness: None,
            min_version: version,
        },
    };
    let (version, kind, entry) = match gateway.get(&key, options, Instant::now() + LOOKUP_WAIT).await {
        Ok(found) => match found.entry {
            Some(entry) => (Some(entry.version), ChangeKind::Put, Some(entry)),
            None => (version, ChangeKind::Delete, None),
        },
        Err(_) => (version, ChangeKind::Invalidate, None),
    };
    Event::Changed {
        key,
        version,
        kind,
        entry,
    }
}
