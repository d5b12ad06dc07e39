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

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{Durability, Gateway, IncrementRequest, TouchRequest, WriteRequest};
use crate::{
    error::{Error, ErrorKind, FieldViolation, Outcome},
    model::{Answer, Answered, Condition, Fingerprint, Key, KeyedAnswer, Request, RequestId, Timestamp, Version},
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
pub(super) fn fingerprint_of_write(request: &WriteRequest) -> Fingerprint {
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
pub(super) fn fingerprint_of_touch(request: &TouchRequest) -> Fingerprint {
    let mut print = Print::new(b't', &request.key);
    print.ttl(request.ttl);
    print.finish()
}

/// What an increment asks for.
pub(super) fn fingerprint_of_increment(request: &IncrementRequest) -> Fingerprint {
    let mut print = Print::new(b'i', &request.key);
    print.part(&request.delta.to_be_bytes());
    print.ttl(request.ttl);
    print.finish()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::model::Tags;

    const NOW: Timestamp = Timestamp(1_000_000);

    fn requests(remembered_max: usize) -> Arc<Requests> {
        let config = Config {
            window: Duration::from_secs(10),
            remembered_max: NonZeroUsize::new(remembered_max).expect("not zero"),
        };
        Arc::new(Requests::new(&config, Duration::from_secs(1), NOW))
    }

    fn key() -> Key {
        Key::new("orders", "k").expect("valid")
    }

    fn turn(requests: &Arc<Requests>, id: &str, print: u8, now: Timestamp) -> Result<Turn, Error> {
        let id = RequestId::new(id).expect("valid");
        let request = requests.request(id, Fingerprint([print; 16]), now);
        requests.turn(&key(), request, now)
    }

    fn lead(requests: &Arc<Requests>, id: &str, now: Timestamp) -> Lead {
        match turn(requests, id, 1, now) {
            Ok(Turn::Lead(lead)) => lead,
            other => panic!("nobody else leads: {other:?}"),
        }
    }

    fn done(version: i64, durability: Durability) -> Done {
        Done {
            answer: Answer {
                version: Version::new(version).expect("positive"),
                counter: None,
                expires_at: None,
            },
            durability,
            deduplicated: false,
        }
    }

    fn known(requests: &Arc<Requests>, id: &str, now: Timestamp) -> Option<Done> {
        match turn(requests, id, 1, now) {
            Ok(Turn::Known(done)) => Some(done),
            _ => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_while_one_is_under_way_gets_its_answer_and_who_comes_later_too() {
        let requests = requests(10);
        let first = lead(&requests, "a", NOW);
        let Ok(Turn::Join(outcome)) = turn(&requests, "a", 1, NOW) else {
            panic!("it is under way");
        };
        let soon = Instant::now() + Duration::from_secs(1);
        let joining = tokio::spawn(joined(outcome, soon));
        first.end(&Ok(done(7, Durability::Journal)));
        let told = joining.await.expect("no panic").expect("it ended").expect("well");
        assert!(told.deduplicated && told.answer.version.get() == 7);
        let later = known(&requests, "a", Timestamp(NOW.0 + 9_999)).expect("its window is not over");
        assert_eq!(later, told);
        assert!(known(&requests, "a", Timestamp(NOW.0 + 10_000)).is_none());
        assert!(requests.table.lock().ending.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_was_given_up_or_failed_is_led_anew() {
        let requests = requests(10);
        let first = lead(&requests, "a", NOW);
        let Ok(Turn::Join(outcome)) = turn(&requests, "a", 1, NOW) else {
            panic!("it is under way");
        };
        drop(first);
        let soon = Instant::now() + Duration::from_secs(1);
        assert!(joined(outcome, soon).await.is_none());

        let second = lead(&requests, "a", NOW);
        let Ok(Turn::Join(outcome)) = turn(&requests, "a", 1, NOW) else {
            panic!("it is under way");
        };
        second.end(&Err(Error::new(ErrorKind::Unavailable, "down")));
        let told = joined(outcome, soon).await.expect("it ended");
        assert_eq!(told.expect_err("badly").kind(), ErrorKind::Unavailable);

        let third = lead(&requests, "a", NOW);
        let Ok(Turn::Join(outcome)) = turn(&requests, "a", 1, NOW) else {
            panic!("it is under way");
        };
        let error = joined(outcome, soon).await.expect("it is told").expect_err("too late");
        assert_eq!(error.outcome(), crate::error::Outcome::Unknown);
        drop(third);
        assert!(requests.table.lock().known.is_empty());
    }

    #[test]
    fn an_id_is_of_one_content_and_of_one_namespace() {
        let requests = requests(10);
        let first = lead(&requests, "a", NOW);
        let refused = |print| turn(&requests, "a", print, NOW).expect_err("another content");
        assert_eq!(refused(2).violations()[0].field, "request_id");
        first.end(&Ok(done(7, Durability::Memory)));
        assert_eq!(refused(2).kind(), ErrorKind::Invalid);
        let request = requests.request(RequestId::new("a").expect("valid"), Fingerprint([2; 16]), NOW);
        let elsewhere = Key::new("other", "k").expect("valid");
        assert!(matches!(requests.turn(&elsewhere, request, NOW), Ok(Turn::Lead(_))));
    }

    #[test]
    fn what_the_store_knows_takes_no_room_from_what_it_does_not() {
        let requests = requests(2);
        for id in ["a", "b"] {
            lead(&requests, id, NOW).end(&Ok(done(1, Durability::Journal)));
        }
        assert!(requests.has_room().is_ok(), "the one that asks is not counted yet");
        let third = lead(&requests, "c", NOW);
        assert_eq!(requests.has_room().expect_err("full").kind(), ErrorKind::Overloaded);
        third.end(&Ok(done(2, Durability::Store)));
        lead(&requests, "d", NOW).end(&Ok(done(3, Durability::Store)));
        lead(&requests, "e", NOW).end(&Ok(done(4, Durability::Store)));
        for (id, is_known) in [("a", true), ("b", true), ("c", true), ("d", true), ("e", false)] {
            assert_eq!(known(&requests, id, NOW).is_some(), is_known, "{id}");
        }
        assert!(known(&requests, "a", Timestamp(NOW.0 + 10_000)).is_none() && requests.has_room().is_ok());
        assert_eq!(requests.table.lock().in_store, 0);
    }

    #[test]
    fn what_an_earlier_process_answered_is_known_by_its_last_try() {
        let requests = requests(10);
        let answered = |version| KeyedAnswer {
            key: key(),
            answered: Answered {
                request: Request {
                    id: RequestId::new("a").expect("valid"),
                    fingerprint: Fingerprint([1; 16]),
                    ends_at: Timestamp(NOW.0 + 5_000),
                },
                answer: done(version, Durability::Journal).answer,
            },
        };
        requests.restore([answered(3), answered(5), answered(4)]);
        let done = known(&requests, "a", NOW).expect("restored");
        assert!(done.deduplicated && done.answer.version.get() == 5);
        assert!(known(&requests, "a", Timestamp(NOW.0 + 5_000)).is_none());
    }

    #[test]
    fn two_contents_have_two_fingerprints() {
        let put = |value: &'static str, ttl, tags: &[&str], condition| {
            fingerprint_of_write(&WriteRequest {
                key: key(),
                value: Some(Bytes::from_static(value.as_bytes())),
                tags: Tags::new(tags).expect("valid"),
                ttl,
                mode: None,
                condition,
                request: None,
                await_persisted: false,
            })
        };
        let version = |number| Condition::Version(Version::new(number).expect("positive"));
        let second = Some(Duration::from_secs(1));
        let prints = [
            put("", None, &[], None),
            put("a", None, &[], None),
            put("a", second, &[], None),
            put("a", None, &["a"], None),
            put("", None, &["aa"], None),
            put("", None, &["a", "b"], None),
            put("a", None, &[], Some(Condition::Absent)),
            put("a", None, &[], Some(Condition::Present)),
            put("a", None, &[], Some(version(1))),
            put("a", None, &[], Some(version(2))),
        ];
        for (at, print) in prints.iter().enumerate() {
            assert!(!prints[..at].contains(print), "{at}");
        }
        assert_eq!(put("a", second, &["x"], None), put("a", second, &["x"], None));
    }
}
