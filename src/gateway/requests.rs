//! Writes that are to be written once: which request ids this replica has under way, and which it has answered.
//!
//! Owns the table of this process, its bound and its window, and the joining of calls that send one id at the same time. Does not own what is
//! remembered beyond the process: the store has the ids of what it decided and of what was drained, the journal those of what is pending.
//! Invariants: of the calls with one id at most one is under way; what is answered here was written; an id stays until its window is over, or
//! until it is known that nothing was written.
//!
//! Where the table alone does not say enough, the store does. For what is written through it decides always, in the transaction of the write.
//! While the process is younger than the window an earlier one on this data directory may have answered a write-behind write: then the store is
//! asked first. And after a try that went through, and of which nobody knows whether it was written, the next try goes through, too, whatever its
//! mode: a look would not do, for the first may still be on its way.

mod fingerprint;

pub(super) use self::fingerprint::{fingerprint_of_increment, fingerprint_of_touch, fingerprint_of_write};

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{Durability, Gateway};
use crate::{
    error::{Error, ErrorKind, FieldViolation, Outcome},
    model::{Answer, Answered, Fingerprint, Key, KeyedAnswer, Request, RequestId, Timestamp, Version},
    queue::PendingEntry,
    settings::{DAY, Unfit, count, within},
};

/// When to come back to a full table: some windows will have ended.
const RETRY_AFTER_FULL: Duration = Duration::from_secs(1);

/// For how long beyond the longest call an id that the gateway made up is remembered: its tries end with the call, give or take the store's.
const MADE_UP_SLACK: Duration = Duration::from_secs(60);

/// How many ids whose windows are over are forgotten by one call.
const FORGOTTEN_MAX: usize = 64;

/// How request ids are remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// For how long the answer to a request id is remembered. Default: 10 minutes. Longer covers clients that try again later, and keeps more.
    #[serde(with = "humantime_serde")]
    pub window: Duration,
    /// How many ids this gateway remembers that the store need not know, those of write-behind writes; a write-behind write with one more is refused
    /// until some have ended. As many of other writes are remembered beside them, for as long as there is room. Default: 1,000,000, which is some
    /// 200 MB of each at most.
    pub remembered_max: NonZeroUsize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            window: Duration::from_secs(600),
            remembered_max: count::<1_000_000>(),
        }
    }
}

impl Config {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn validate(&self) -> Result<(), Unfit> {
        within("window", self.window, DAY)
    }
}

/// How a request ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Done {
    /// What the caller is told.
    pub(super) answer: Answer,
    /// What the write rests on.
    pub(super) durability: Durability,
    /// Whether an earlier call did it.
    pub(super) deduplicated: bool,
}

/// The requests that this replica knows. Shared by its threads.
#[derive(Debug)]
pub struct Requests {
    table: Mutex<Table>,
    window: Duration,
    made_up_window: Duration,
    remembered_max: usize,
    started_at: Timestamp,
}

#[derive(Debug)]
struct Table {
    /// Up to when ids were forgotten.
    now: Timestamp,
    known: HashMap<Name, Known, RandomState>,
    /// The answered ones by the end of their windows.
    ending: BTreeMap<(Timestamp, u64), Name>,
    /// Ids that were put there.
    filed: u64,
    /// How many of them the store knows.
    in_store: usize,
}

/// The namespace, NUL, the id.
type Name = Arc<str>;

/// What is known of an id.
#[derive(Debug)]
struct Known {
    fingerprint: Fingerprint,
    state: State,
}

#[derive(Debug)]
enum State {
    /// A call has it; whoever joins learns how it ends.
    UnderWay(watch::Receiver<Option<Result<Done, Error>>>),
    /// It was written; until when that is remembered.
    Answered(Done, Timestamp),
    /// It was tried, and may have been written: the store decides what becomes of the next try. Until when.
    Doubtful(Timestamp),
}

impl State {
    fn is_under_way(&self) -> bool {
        matches!(self, State::UnderWay(_))
    }

    /// Whether the store knows as much.
    fn is_in_store(&self) -> bool {
        matches!(self, State::Answered(done, _) if done.durability == Durability::Store)
    }

    fn is_over(&self, now: Timestamp) -> bool {
        match self {
            State::UnderWay(_) => false,
            State::Answered(_, ends_at) | State::Doubtful(ends_at) => *ends_at <= now,
        }
    }
}

/// What a call with a request id is to do now.
#[derive(Debug)]
enum Turn {
    /// Write, and tell how it ended.
    Lead(Lead),
    /// Wait for the call that does.
    Join(watch::Receiver<Option<Result<Done, Error>>>),
    /// Answer as the first call was answered.
    Known(Done),
}

/// What a call with a request id is to do once no other is under way.
#[derive(Debug)]
pub(super) enum Turned {
    /// Write, and tell how it ended.
    Lead(Lead),
    /// Answer as the first call was answered.
    Answered(Done),
}

/// The duty to tell how a request ended. Dropped without a word, the next call with its id leads.
#[derive(Debug)]
pub(super) struct Lead {
    requests: Arc<Requests>,
    name: Name,
    sender: watch::Sender<Option<Result<Done, Error>>>,
    request: Request,
    /// Until when an earlier try is in doubt.
    doubtful: Option<Timestamp>,
}

impl Requests {
    /// An empty table of a process that starts now, and whose calls take no longer than `call_max`.
    pub fn new(config: &Config, call_max: Duration, now: Timestamp) -> Requests {
        Requests {
            table: Mutex::new(Table {
                now,
                known: HashMap::default(),
                ending: BTreeMap::new(),
                filed: 0,
                in_store: 0,
            }),
            window: config.window,
            made_up_window: call_max + MADE_UP_SLACK,
            remembered_max: config.remembered_max.get(),
            started_at: now,
        }
    }

    /// Takes in what an earlier process had answered, whose writes the store may not have yet.
    pub fn restore(&self, recovered: impl IntoIterator<Item = KeyedAnswer>) {
        let mut table = self.table.lock();
        for KeyedAnswer { key, answered } in recovered {
            let Answered { request, answer } = answered;
            let name = name(key.namespace(), &request.id);
            // Of one that was tried again within the earlier process the last try was answered.
            let newest = table.known.get(&name).is_none_or(|known| match &known.state {
                State::Answered(done, _) => done.answer.version < answer.version,
                State::UnderWay(_) | State::Doubtful(_) => false,
            });
            if newest {
                let done = Done {
                    answer,
                    durability: Durability::Journal,
                    deduplicated: true,
                };
                let state = State::Answered(done, request.ends_at);
                table.file(name, request.fingerprint, state, request.ends_at);
            }
        }
    }

    /// A request as it is remembered from `now` on.
    fn request(&self, id: RequestId, fingerprint: Fingerprint, now: Timestamp) -> Request {
        Request {
            id,
            fingerprint,
            ends_at: now.after(self.window),
        }
    }

    /// A request that the gateway names by itself.
    pub(super) fn made_up(&self, fingerprint: Fingerprint, now: Timestamp) -> Request {
        Request {
            id: RequestId::made_up(),
            fingerprint,
            ends_at: now.after(self.made_up_window),
        }
    }

    /// Whether an earlier process may have answered what this one does not know.
    pub(super) fn is_young(&self, now: Timestamp) -> bool {
        now < self.started_at.after(self.window)
    }

    /// What a call with this request is to do.
    ///
    /// # Errors
    /// `Invalid`: the id was used for something else.
    fn turn(self: &Arc<Self>, key: &Key, request: Request, now: Timestamp) -> Result<Turn, Error> {
        let mut table = self.table.lock();
        table.forget_ended(now);
        let name = name(key.namespace(), &request.id);
        let known = table.known.get(&name).filter(|known| !known.state.is_over(now));
        if known.is_some_and(|known| known.fingerprint != request.fingerprint) {
            return Err(reused());
        }
        let doubtful = match known.map(|known| &known.state) {
            Some(State::UnderWay(outcome)) => return Ok(Turn::Join(outcome.clone())),
            Some(State::Answered(done, _)) => return Ok(Turn::Known(*done)),
            Some(State::Doubtful(ends_at)) => Some(*ends_at),
            None => None,
        };
        let (sender, outcome) = watch::channel(None);
        table.set(Arc::clone(&name), request.fingerprint, State::UnderWay(outcome));
        Ok(Turn::Lead(Lead {
            requests: Arc::clone(self),
            name,
            sender,
            request,
            doubtful,
        }))
    }

    /// Forgets the answer of this version to an id.
    fn forget(&self, key: &Key, id: &RequestId, version: Version) {
        let is_it = |state: &State| matches!(state, State::Answered(done, _) if done.answer.version == version);
        self.table.lock().remove_if(&name(key.namespace(), id), is_it);
    }

    /// Checks that one more write-behind write can be remembered.
    ///
    /// # Errors
    /// `Overloaded`.
    pub(super) fn has_room(&self) -> Result<(), Error> {
        let table = self.table.lock();
        // Those under way count: they will be answered.
        if table.known.len() - table.in_store <= self.remembered_max {
            return Ok(());
        }
        let message = "as many request ids are remembered as requests.remembered_max allows: write it through, send it without an id, or come back \
                       once earlier ones have ended";
        Err(Error::new(ErrorKind::Overloaded, message).retry_after(RETRY_AFTER_FULL))
    }
}

impl Table {
    /// Files what is known of an id, until its window is over.
    fn file(&mut self, name: Name, fingerprint: Fingerprint, state: State, ends_at: Timestamp) {
        let number = self.filed;
        self.filed += 1;
        self.ending.insert((ends_at, number), Arc::clone(&name));
        self.set(name, fingerprint, state);
    }

    fn set(&mut self, name: Name, fingerprint: Fingerprint, state: State) {
        self.in_store += usize::from(state.is_in_store());
        if let Some(before) = self.known.insert(name, Known { fingerprint, state }) {
            self.in_store -= usize::from(before.state.is_in_store());
        }
    }

    fn remove_if(&mut self, name: &Name, is_it: impl Fn(&State) -> bool) {
        if self.known.get(name).is_some_and(|known| is_it(&known.state))
            && let Some(removed) = self.known.remove(name)
        {
            self.in_store -= usize::from(removed.state.is_in_store());
        }
    }

    fn forget_ended(&mut self, now: Timestamp) {
        self.now = self.now.max(now);
        for _ in 0..FORGOTTEN_MAX {
            let Some(first) = self.ending.first_entry().filter(|first| first.key().0 <= now) else {
                return;
            };
            let name = first.remove();
            // It may have been taken up anew since.
            self.remove_if(&name, |state| state.is_over(now));
        }
    }
}

impl Lead {
    /// Whether an earlier try may have been written: then the store has to decide what becomes of this one.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.doubtful.is_some()
    }

    /// The request.
    pub(super) fn request(&self) -> &Request {
        &self.request
    }

    /// Tells those who joined how it ended, and remembers it: for as long as its window, if it was written now, where there is room, and there is
    /// for what the store does not know ([`Requests::has_room`]); and that it may have been. What the store remembers of an earlier call is its to
    /// say, for it knows when that ends.
    pub(super) fn end(self, outcome: &Result<Done, Error>) {
        let Request {
            fingerprint, ends_at, ..
        } = self.request;
        let mut table = self.requests.table.lock();
        match outcome {
            Ok(done) if !done.deduplicated => {
                let has_room = done.durability != Durability::Store || table.in_store < self.requests.remembered_max;
                if has_room {
                    let done = Done {
                        deduplicated: true,
                        ..*done
                    };
                    let state = State::Answered(done, ends_at);
                    table.file(Arc::clone(&self.name), fingerprint, state, ends_at);
                }
            }
            Err(error) if error.outcome() == Outcome::Unknown => {
                table.file(Arc::clone(&self.name), fingerprint, State::Doubtful(ends_at), ends_at);
            }
            Ok(_) | Err(_) => {}
        }
        drop(table);
        let told = outcome.clone().map(|done| Done {
            deduplicated: true,
            ..done
        });
        self.sender.send_replace(Some(told));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        let mut table = self.requests.table.lock();
        match self.doubtful {
            // Nothing has become of this try, and as little is known of the earlier one as before.
            Some(ends_at)
                if ends_at > table.now
                    && table
                        .known
                        .get(&self.name)
                        .is_some_and(|known| known.state.is_under_way()) =>
            {
                let fingerprint = self.request.fingerprint;
                // It is filed under its end already.
                table.set(Arc::clone(&self.name), fingerprint, State::Doubtful(ends_at));
            }
            _ => table.remove_if(&self.name, State::is_under_way),
        }
    }
}

impl Gateway {
    /// Whether a request is for this call to do. Where another call with its id is under way, its outcome is this one's.
    ///
    /// # Errors
    /// `Invalid`: the id was used for something else. As the call that was joined; `Timeout`, of unknown outcome, where that goes on until the
    /// deadline.
    pub(super) async fn turn(
        &self,
        key: &Key,
        id: RequestId,
        print: Fingerprint,
        deadline: Instant,
    ) -> Result<Turned, Error> {
        let parts = self.parts();
        loop {
            let now = parts.clock.now();
            let request = parts.requests.request(id.clone(), print, now);
            match parts.requests.turn(key, request, now)? {
                Turn::Lead(lead) => return Ok(Turned::Lead(lead)),
                Turn::Known(done) => match self.as_it_is_now(key, done, deadline).await? {
                    Some(done) => return Ok(Turned::Answered(done)),
                    None => parts.requests.forget(key, &id, done.answer.version),
                },
                Turn::Join(outcome) => match joined(outcome, deadline).await {
                    None => {}
                    // It had less time than this call.
                    Some(Err(error)) if error.kind() == ErrorKind::Timeout && Instant::now() < deadline => {}
                    Some(outcome) => return outcome.map(Turned::Answered),
                },
            }
        }
    }

    /// An earlier answer, and what its write rests on by now. `None`: the store rejected it for good, so it was not written after all.
    async fn as_it_is_now(&self, key: &Key, done: Done, deadline: Instant) -> Result<Option<Done>, Error> {
        let (parts, version) = (self.parts(), done.answer.version);
        let is_pending = |pending: PendingEntry| pending.entry.version >= version;
        if done.durability == Durability::Store || parts.queue.pending(key).is_some_and(is_pending) {
            return Ok(Some(done));
        }
        let Ok(stored) = parts.loads.load(key, deadline).await else {
            // It was acknowledged as this.
            return Ok(Some(done));
        };
        let standing = stored.map(|entry| entry.version).or(parts.sharing.known_horizon());
        if standing >= Some(version) {
            let durability = Durability::Store;
            return Ok(Some(Done { durability, ..done }));
        }
        let is_buried = parts.decisions.is_buried(key, version, deadline).await?;
        Ok((!is_buried).then_some(done))
    }
}

/// How the call that is under way ends. `None`: it was given up, and somebody has to lead anew.
///
/// # Errors
/// As that one; `Timeout`, of unknown outcome, at the deadline.
async fn joined(
    mut outcome: watch::Receiver<Option<Result<Done, Error>>>,
    deadline: Instant,
) -> Option<Result<Done, Error>> {
    match timeout_at(deadline, outcome.wait_for(Option::is_some)).await {
        Ok(Ok(told)) => told.clone(),
        Ok(Err(_gone)) => None,
        Err(_) => {
            let message = "the deadline passed while an earlier call with this request id was under way";
            Some(Err(Error::new(ErrorKind::Timeout, message).unknown()))
        }
    }
}

/// The refusal of an id that was used for something else.
pub(super) fn reused() -> Error {
    Error::invalid(vec![FieldViolation {
        field: "request_id".into(),
        description: "was used within its window by a request with another content: take one that is new".into(),
    }])
}

fn name(namespace: &str, id: &RequestId) -> Name {
    // NUL is in neither.
    format!("{namespace}\0{}", id.as_str()).into()
}

#[cfg(test)]
mod tests;
