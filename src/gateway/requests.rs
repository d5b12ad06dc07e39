//! Writes that are to be written once: which request ids this replica has under way, and which it has answered.
//!
//! Owns the table of this process, its bound and its window, and the joining of calls that send one id at the same time. Does not own what is
//! remembered beyond the process: the store has the ids of what it decided and of what was drained, the journal those of what is pending.
//! Invariants: of the calls with one id at most one is under way; what is answered here was written; an id stays until its window is over, or
//! until it is known that nothing was written.
//!
//! Where the table alone does not say enough, the store does: for what it decides always, in the transaction of the write; for a write-behind
//! write while the process is younger than the window, for an earlier one on this data directory may have answered it.

use std::{
    collections::{BTreeMap, HashMap, hash_map},
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
    error::{Error, ErrorKind, FieldViolation},
    model::{Answer, Answered, Condition, Fingerprint, Key, KeyedAnswer, Request, RequestId, Timestamp},
    settings::{DAY, Unfit, count, within},
};

/// When to come back to a full table: some windows will have ended.
const RETRY_AFTER_FULL: Duration = Duration::from_secs(1);

/// For how long an id that the gateway made up is remembered: longer than any call takes.
const MADE_UP_WINDOW: Duration = Duration::from_secs(120);

/// How request ids are remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// For how long the answer to a request id is remembered. Default: 10 minutes. Longer covers clients that try again later, and keeps more.
    #[serde(with = "humantime_serde")]
    pub window: Duration,
    /// How many ids of write-behind writes this gateway remembers; a write-behind write with one more is refused until some have ended. Default:
    /// 1,000,000, which is some 200 MB at most.
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
    remembered_max: usize,
    started_at: Timestamp,
}

#[derive(Debug, Default)]
struct Table {
    known: HashMap<Name, Known, RandomState>,
    /// The answered ones by the end of their windows.
    ending: BTreeMap<(Timestamp, u64), Name>,
    answered: u64,
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
    /// It was written.
    Answered(Done),
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
}

impl Requests {
    /// An empty table of a process that starts now.
    pub fn new(config: &Config, now: Timestamp) -> Requests {
        Requests {
            table: Mutex::default(),
            window: config.window,
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
                State::Answered(done) => done.answer.version < answer.version,
                State::UnderWay(_) => false,
            });
            if newest {
                let done = Done {
                    answer,
                    durability: Durability::Journal,
                    deduplicated: true,
                };
                table.answer(name, &request, done);
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
    pub(super) fn made_up(fingerprint: Fingerprint, now: Timestamp) -> Request {
        Request {
            id: RequestId::made_up(),
            fingerprint,
            ends_at: now.after(MADE_UP_WINDOW),
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
        match table.known.entry(name(key.namespace(), &request.id)) {
            hash_map::Entry::Occupied(known) => {
                let Known { fingerprint, state } = known.get();
                if *fingerprint != request.fingerprint {
                    return Err(reused());
                }
                Ok(match state {
                    State::UnderWay(outcome) => Turn::Join(outcome.clone()),
                    State::Answered(done) => Turn::Known(*done),
                })
            }
            hash_map::Entry::Vacant(vacant) => {
                let (sender, outcome) = watch::channel(None);
                let name = Arc::clone(vacant.key());
                vacant.insert(Known {
                    fingerprint: request.fingerprint,
                    state: State::UnderWay(outcome),
                });
                Ok(Turn::Lead(Lead {
                    requests: Arc::clone(self),
                    name,
                    sender,
                    request,
                }))
            }
        }
    }

    /// Checks that one more write-behind write can be remembered.
    ///
    /// # Errors
    /// `Overloaded`.
    pub(super) fn has_room(&self) -> Result<(), Error> {
        // Those under way count: they will be answered.
        if self.table.lock().known.len() <= self.remembered_max {
            return Ok(());
        }
        let message = "as many request ids are remembered as may be: send the write without one, or write it through";
        Err(Error::new(ErrorKind::Overloaded, message).retry_after(RETRY_AFTER_FULL))
    }
}

impl Table {
    fn answer(&mut self, name: Name, request: &Request, done: Done) {
        let number = self.answered;
        self.answered += 1;
        self.ending.insert((request.ends_at, number), Arc::clone(&name));
        let known = Known {
            fingerprint: request.fingerprint,
            state: State::Answered(Done {
                deduplicated: true,
                ..done
            }),
        };
        self.known.insert(name, known);
    }

    fn forget_ended(&mut self, now: Timestamp) {
        while let Some(first) = self.ending.first_entry()
            && first.key().0 <= now
        {
            let name = first.remove();
            // It may have been taken up anew since.
            if let hash_map::Entry::Occupied(known) = self.known.entry(name)
                && matches!(known.get().state, State::Answered(_))
            {
                known.remove();
            }
        }
    }
}

impl Lead {
    /// The request.
    pub(super) fn request(&self) -> &Request {
        &self.request
    }

    /// Tells those who joined how it ended, and remembers it if it ended well: for as long as its window, where there is room. There is, for what
    /// the store does not know ([`Requests::has_room`]).
    pub(super) fn end(self, outcome: &Result<Done, Error>) {
        if let Ok(done) = outcome {
            let mut table = self.requests.table.lock();
            if done.durability != Durability::Store || table.known.len() <= self.requests.remembered_max {
                table.answer(Arc::clone(&self.name), &self.request, *done);
            }
        }
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
        if let hash_map::Entry::Occupied(known) = table.known.entry(Arc::clone(&self.name))
            && matches!(known.get().state, State::UnderWay(_))
        {
            known.remove();
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
                Turn::Known(done) => return Ok(Turned::Answered(done)),
                Turn::Join(outcome) => {
                    if let Some(outcome) = joined(outcome, deadline).await {
                        return outcome.map(Turned::Answered);
                    }
                }
            }
        }
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
    use crate::model::{Tags, Version};

    const NOW: Timestamp = Timestamp(1_000_000);

    fn requests(remembered_max: usize) -> Arc<Requests> {
        let config = Config {
            window: Duration::from_secs(10),
            remembered_max: NonZeroUsize::new(remembered_max).expect("not zero"),
        };
        Arc::new(Requests::new(&config, NOW))
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
    fn what_the_store_knows_is_let_go_of_first_and_what_it_does_not_is_refused_in_time() {
        let requests = requests(2);
        for id in ["a", "b"] {
            lead(&requests, id, NOW).end(&Ok(done(1, Durability::Journal)));
        }
        assert!(requests.has_room().is_ok(), "the one that asks is not counted yet");
        let third = lead(&requests, "c", NOW);
        assert_eq!(requests.has_room().expect_err("full").kind(), ErrorKind::Overloaded);
        third.end(&Ok(done(2, Durability::Store)));
        assert!(known(&requests, "c", NOW).is_none() && known(&requests, "a", NOW).is_some());
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
