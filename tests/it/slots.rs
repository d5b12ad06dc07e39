//! The slot of a key in Redis: who may land there, what stands, and what the other replicas are told.
//!
//! A model says it, and a real Redis is asked: whatever two replicas do in whatever order, and whatever Redis forgets meanwhile, both agree
//! after each step. What the model leaves out (a full Redis, another server, prefixes) has tests of its own.

use std::{
    cell::RefCell,
    collections::HashSet,
    future::poll_fn,
    iter,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_core::Stream;
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    test_runner::{Config as Cases, TestCaseError, TestRunner},
};
use redis::{aio::MultiplexedConnection, cmd};
use tidegate::{
    cache::{
        Copy,
        message::{Message, Origin},
        redis::{Claimed, Hold, Published, RedisFailure, SlotToken},
    },
    model::{Entry, Epoch, Key, VERSION_EPOCH_MILLIS, Version},
};
use tokio::{task::JoinSet, time::timeout};

use crate::{
    cache_redis::{LONG, NOW, Replica, edges, key, put, slot, standing, version},
    harness::{SOON, redis as redis_server, until},
};

/// The least for which a tombstone, and what is not in the store yet, is kept.
const KEPT_MIN: Duration = Duration::from_secs(60);

/// A case that took longer says nothing: tokens end after ten seconds.
const CASE_MAX: Duration = Duration::from_secs(8);

/// Two replicas on one Redis, and somebody who meddles and hears all that is told.
struct Bench {
    replicas: [Replica; 2],
    connection: MultiplexedConnection,
    heard: redis::aio::PubSubStream,
    server: redis_server::Server,
}

/// A slot's bytes, as far as they are not the copy's.
#[derive(Debug, Default, PartialEq, Eq)]
struct Raw {
    /// Nothing at all, or a token, or eight zeros.
    token: Option<[u8; 8]>,
    /// For how long Redis keeps it.
    kept: Duration,
}

impl Bench {
    async fn start() -> Bench {
        let server = redis_server::start().await;
        let client = redis::Client::open(server.url()).expect("a valid URL");
        let mut listening = client.get_async_pubsub().await.expect("Redis can be reached");
        listening.subscribe("tidegate:changes").await.expect("SUBSCRIBE");
        Bench {
            replicas: [Replica::of(&server).await, Replica::of(&server).await],
            connection: server.connect().await,
            heard: listening.into_on_message(),
            server,
        }
    }

    async fn run(&mut self, command: &mut redis::Cmd) {
        command.exec_async(&mut self.connection).await.expect("Redis does it");
    }

    async fn raw(&mut self, name: &str) -> Raw {
        let place = slot(name);
        let (head, kept): (Vec<u8>, i64) = redis::pipe()
            .cmd("GETRANGE")
            .arg(&place)
            .arg(34)
            .arg(41)
            .cmd("PTTL")
            .arg(&place)
            .query_async(&mut self.connection)
            .await
            .expect("Redis answers");
        Raw {
            token: head.try_into().ok(),
            kept: Duration::from_millis(kept.try_into().unwrap_or(0)),
        }
    }

    /// All that was told since the last call.
    async fn heard(&mut self) -> Vec<(Origin, Message)> {
        const MARK: &[u8] = b"mark";
        self.run(cmd("PUBLISH").arg("tidegate:changes").arg(MARK)).await;
        let mut heard = Vec::new();
        loop {
            let next = poll_fn(|context| Pin::new(&mut self.heard).poll_next(context));
            let next = timeout(SOON, next).await.expect("in time").expect("subscribed");
            if next.get_payload_bytes() == MARK {
                return heard;
            }
            heard.push(Message::decode(next.get_payload_bytes()).expect("a message of ours"));
        }
    }
}

/// Offers what a load found.
async fn load(replica: &Replica, name: &str, token: SlotToken, found: Option<Entry>) -> Result<bool, RedisFailure> {
    let copy = Copy::new(found, NOW, LONG);
    replica.land_load(&key(name), token, &copy, Duration::ZERO).await
}

fn written(key: &Key, version: Version) -> Message {
    Message::Written {
        key: key.clone(),
        version,
    }
}

/// A version by its place, as those of write-behind writes are judged by when they were stamped.
#[derive(Debug, Clone, std::marker::Copy)]
enum Number {
    Is(i64),
    /// Stamped when the case begins.
    Now(u8),
    /// Stamped too long before to enter an empty slot.
    Ago(u8),
    /// The next after the one before it.
    Next,
}

#[derive(Debug, Clone)]
enum Act {
    Claim,
    Enter,
    Release(Index),
    /// What a load found: one of the entries, or an absence.
    Load(Index, Option<Index>, Duration),
    Write(Index, With, Duration),
    Drop(Index),
    Purge(Index),
    Invalidate,
    /// As when Redis needs the room.
    Evict,
    Flush,
    /// The ten seconds of the token that stands are over.
    End,
}

#[derive(Debug, Clone)]
enum With {
    Token(Index),
    Nothing,
    Fresh,
}

#[derive(Debug, Clone)]
struct Plan {
    entries: Vec<(Number, Option<Vec<u8>>, Option<u64>)>,
    /// Which replica does what.
    acts: Vec<(bool, Act)>,
}

fn plans() -> impl Strategy<Value = Plan> {
    let number = prop_oneof![
        3 => select(edges()).prop_map(Number::Is),
        1 => (1..=i64::MAX).prop_map(Number::Is),
        1 => (1..=9_i64).prop_map(Number::Is),
        2 => any::<u8>().prop_map(Number::Now),
        2 => any::<u8>().prop_map(Number::Ago),
        3 => Just(Number::Next),
    ];
    let value = proptest::option::weighted(0.7, vec(any::<u8>(), 0..20));
    let expires_in = proptest::option::weighted(0.3, select(vec![0, 40_000, 1 << 40]));
    let entries = vec((number, value, expires_in), 1..5);
    let lifetime = || select(vec![Duration::from_secs(30), LONG]);
    let with = prop_oneof![
        any::<Index>().prop_map(With::Token),
        Just(With::Nothing),
        Just(With::Fresh)
    ];
    let index = any::<Index>;
    let act = prop_oneof![
        4 => Just(Act::Claim),
        3 => Just(Act::Enter),
        1 => index().prop_map(Act::Release),
        4 => (index(), proptest::option::weighted(0.8, index()), lifetime()).prop_map(|(t, e, l)| Act::Load(t, e, l)),
        6 => (index(), with, lifetime()).prop_map(|(e, with, l)| Act::Write(e, with, l)),
        1 => index().prop_map(Act::Drop),
        1 => index().prop_map(Act::Purge),
        1 => Just(Act::Invalidate),
        1 => Just(Act::Evict),
        1 => Just(Act::Flush),
        1 => Just(Act::End),
    ];
    (entries, vec((any::<bool>(), act), 1..30)).prop_map(|(entries, acts)| Plan { entries, acts })
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(now.as_millis()).expect("not so far in the future")
}

/// The writes of a plan, each of another version.
fn entries(plan: &Plan) -> Vec<Entry> {
    let now = now();
    let stamp = |millis: i64, counter: u8| ((millis - VERSION_EPOCH_MILLIS) << 21) + i64::from(counter);
    let mut seen = HashSet::new();
    let mut last = 0_i64;
    let numbered = plan.entries.iter().map(|(number, value, expires_in)| {
        last = match number {
            Number::Is(number) => *number,
            Number::Now(counter) => stamp(now, *counter),
            Number::Ago(counter) => stamp(now - 10_500, *counter),
            Number::Next => last.saturating_add(1),
        };
        Entry {
            version: version(last),
            value: value.clone().map(Bytes::from),
            expires_at: expires_in.map(|millis| NOW.after(Duration::from_millis(millis))),
        }
    });
    numbered.filter(|entry| seen.insert(entry.version)).collect()
}

/// What the slot is to hold, by the rule of slots and nothing of how it is kept.
#[derive(Debug, Default)]
struct Model {
    copy: Option<Copy>,
    token: Option<Token>,
    /// For how long the copy is kept, and from when on at the earliest.
    kept: Option<(Duration, Instant)>,
    /// When the act began.
    now: Option<Instant>,
}

#[derive(Debug, Clone, std::marker::Copy, PartialEq)]
struct Token {
    token: SlotToken,
    bytes: [u8; 8],
    ended: bool,
}

impl Model {
    fn version(&self) -> Option<Version> {
        self.copy.as_ref().and_then(Copy::version)
    }

    fn holds(&self, token: SlotToken) -> bool {
        self.token.is_some_and(|standing| standing.token == token)
    }

    fn land(&mut self, copy: &Copy, least: Duration) {
        let refuses = |lifetime: Duration| lifetime.max(KEPT_MIN);
        let kept = match &copy.entry {
            None => copy.lifetime(),
            Some(Entry { value: None, .. }) => refuses(copy.lifetime()),
            // What will have expired is a tombstone from then on.
            Some(Entry {
                expires_at: Some(at), ..
            }) if *at < copy.fresh_until => at.since(copy.loaded_at) + KEPT_MIN,
            Some(_) => copy.lifetime(),
        };
        self.copy = Some(copy.clone());
        self.token = None;
        self.kept = self.now.map(|now| (kept.max(least), now));
    }

    fn load(&mut self, token: SlotToken, copy: &Copy) -> bool {
        if !self.holds(token) {
            return false;
        }
        self.token = None;
        let lands = self.version() <= copy.version();
        if lands {
            self.land(copy, Duration::ZERO);
        }
        lands
    }

    fn write(&mut self, copy: &Copy, hold: Hold) -> Published {
        let version = copy.version().expect("a write has a version");
        let least = if hold == Hold::Fresh { KEPT_MIN } else { Duration::ZERO };
        let is_empty = self.version().is_none();
        let may_enter = match hold {
            Hold::Token(token) => self.holds(token) || self.copy.is_some(),
            Hold::Nothing => self.copy.is_some(),
            Hold::Fresh if is_empty && now() - version.stamped_at().0 > 10_000 => return Published::Late,
            Hold::Fresh => true,
        };
        match self.version() {
            // Whoever holds a token beside it lands nothing older.
            Some(standing) if standing > version => Published::Stands(standing),
            Some(_) => {
                self.land(copy, least);
                Published::Stands(version)
            }
            None if may_enter => {
                self.land(copy, least);
                Published::Stands(version)
            }
            None => {
                self.clear();
                Published::Nothing
            }
        }
    }

    fn clear(&mut self) {
        *self = Model {
            now: self.now,
            ..Model::default()
        };
    }
}

/// A case under way.
struct Case<'a> {
    bench: &'a mut Bench,
    name: String,
    key: Key,
    entries: Vec<Entry>,
    model: Model,
    /// Every token that was ever given out, the latest last.
    held: Vec<Token>,
    /// Those that stood and do no more.
    cleared: HashSet<[u8; 8]>,
    /// As Redis had it before the act.
    before: (Option<Copy>, Raw),
}

impl Case<'_> {
    /// One of the latest tokens.
    fn held(&self, index: &Index) -> Option<Token> {
        self.held.iter().rev().nth(index.index(3)).or(self.held.last()).copied()
    }

    fn entry(&self, index: &Index) -> Entry {
        index.get(&self.entries).clone()
    }

    /// Does an act, to both, and compares what they answer.
    async fn act(&mut self, replica: usize, act: &Act) -> Result<Option<Message>, TestCaseError> {
        let key = self.key.clone();
        let replica = &self.bench.replicas[replica];
        self.model.now = Some(Instant::now());
        let told = match act {
            Act::Claim => {
                let claimed = replica.claim(&key).await;
                let wanted = self.model.token.is_none_or(|token| token.ended);
                let Ok(Claimed { token, copy }) = claimed else {
                    return Err(TestCaseError::fail(format!("{claimed:?}")));
                };
                prop_assert_eq!(copy, self.model.copy.clone());
                prop_assert_eq!(token.is_some(), wanted);
                if let Some(token) = token {
                    self.left(token).await;
                }
                None
            }
            Act::Enter => {
                let entered = replica.enter(&key).await.expect("Redis answers");
                prop_assert_eq!(entered.standing, self.model.version());
                match self.model.token {
                    Some(standing) => prop_assert_eq!(entered.token, standing.token, "it is shared"),
                    None => prop_assert!(self.held.iter().all(|held| held.token != entered.token)),
                }
                self.left(entered.token).await;
                None
            }
            Act::Release(index) => {
                if let Some(held) = self.held(index) {
                    replica.release(&key, held.token).await.expect("Redis answers");
                    if self.model.holds(held.token) {
                        self.model.token = None;
                    }
                }
                None
            }
            Act::Load(index, found, lifetime) => {
                if let Some(held) = self.held(index) {
                    let copy = Copy::new(found.as_ref().map(|entry| self.entry(entry)), NOW, *lifetime);
                    let landed = replica.land_load(&key, held.token, &copy, Duration::ZERO).await;
                    let lands = self.model.load(held.token, &copy);
                    prop_assert_eq!(landed, Ok(lands));
                    if lands {
                        prop_assert_eq!(self.before.1.token, Some(held.bytes), "its own token stood");
                        prop_assert!(!self.cleared.contains(&held.bytes), "and had never gone");
                    }
                }
                None
            }
            Act::Write(entry, with, lifetime) => {
                let entry = self.entry(entry);
                let hold = match with {
                    With::Token(index) => self.held(index).map_or(Hold::Nothing, |held| Hold::Token(held.token)),
                    With::Nothing => Hold::Nothing,
                    With::Fresh => Hold::Fresh,
                };
                let answer = replica.publish_entry(&key, &entry, NOW, *lifetime, hold).await;
                let copy = Copy::new(Some(entry.clone()), NOW, *lifetime);
                let published = self.model.write(&copy, hold);
                prop_assert_eq!(answer, Ok(published), "{:?}", hold);
                (published != Published::Late).then(|| written(&key, entry.version))
            }
            Act::Drop(entry) => {
                let version = self.entry(entry).version;
                let stood = self.model.version() == Some(version);
                prop_assert_eq!(replica.drop_version(&key, version).await, Ok(stood));
                self.model.token = None;
                if stood {
                    self.model.clear();
                }
                Some(Message::Dropped { key, version })
            }
            Act::Purge(entry) => {
                let version = self.entry(entry).version;
                prop_assert_eq!(replica.purge(&key, version).await, Ok(()));
                self.model.token = None;
                if self.model.version() < Some(version) {
                    self.model.clear();
                }
                Some(written(&key, version))
            }
            Act::Invalidate => {
                let stood = self.model.copy.is_some();
                prop_assert_eq!(replica.invalidate(&key).await, Ok(stood));
                self.model.clear();
                Some(Message::Invalidated { key })
            }
            Act::Evict => {
                self.bench.run(cmd("DEL").arg(slot(&self.name))).await;
                self.model.clear();
                None
            }
            Act::Flush => {
                self.bench.run(&mut cmd("FLUSHALL")).await;
                self.bench.run(cmd("SCRIPT").arg("FLUSH")).await;
                self.model.clear();
                None
            }
            Act::End => {
                if let Some(token) = &mut self.model.token {
                    token.ended = true;
                    let past = 1_i64.to_be_bytes();
                    let mut end = cmd("SETRANGE");
                    self.bench.run(end.arg(slot(&self.name)).arg(42).arg(&past)).await;
                }
                None
            }
        };
        Ok(told)
    }

    /// A token stands now.
    async fn left(&mut self, token: SlotToken) {
        let raw = self.bench.raw(&self.name).await;
        let token = Token {
            token,
            bytes: raw.token.expect("a token stands"),
            ended: false,
        };
        self.model.token = Some(token);
        if self.held.last() != Some(&token) {
            self.held.push(token);
        }
    }

    /// Compares what stands, and holds it against what stood before.
    async fn compare(&mut self) -> Result<(), TestCaseError> {
        let raw = self.bench.raw(&self.name).await;
        let mut seen = Vec::new();
        for replica in &self.bench.replicas {
            seen.push(replica.get(&self.key).await.expect("Redis answers"));
        }
        prop_assert_eq!(&seen[0], &self.model.copy);
        prop_assert_eq!(&seen[1], &self.model.copy);
        let token = match (&self.model.token, &self.model.copy) {
            (Some(token), _) => Some(token.bytes),
            (None, Some(_)) => Some([0; 8]),
            (None, None) => None,
        };
        prop_assert_eq!(raw.token, token);
        match self.model.kept {
            // Landed a moment ago, or before a token was left beside it, or taken away.
            Some((kept, since)) => {
                let least = kept.saturating_sub(since.elapsed() + Duration::from_millis(2));
                prop_assert!((least..=kept).contains(&raw.kept), "{:?} of {:?}", raw.kept, kept);
                let entry = self.model.copy.as_ref().and_then(|copy| copy.entry.as_ref());
                if entry.is_some_and(|entry| entry.value.is_none()) {
                    prop_assert!(kept >= KEPT_MIN, "a tombstone is kept for {:?}", kept);
                }
            }
            None => prop_assert!(raw.kept <= Duration::from_secs(10), "a token alone ends"),
        }
        self.compare_with_before(&raw)?;
        self.before = (seen.swap_remove(0), raw);
        Ok(())
    }

    fn compare_with_before(&mut self, raw: &Raw) -> Result<(), TestCaseError> {
        let (before, raw_before) = &self.before;
        if let (Some(before), Some(after)) = (before, &self.model.copy)
            && before.entry.is_some()
        {
            prop_assert!(before.version() <= after.version(), "{:?} after {:?}", after, before);
        }
        if let Some(token) = raw_before.token
            && raw.token != Some(token)
        {
            self.cleared.insert(token);
        }
        let stands = raw.token.filter(|token| *token != [0; 8]);
        prop_assert!(
            stands.is_none_or(|token| !self.cleared.contains(&token)),
            "a token came back"
        );
        Ok(())
    }
}

async fn agree(bench: &mut Bench, name: String, plan: Plan) -> Result<(), TestCaseError> {
    let began = Instant::now();
    let mut case = Case {
        key: key(&name),
        entries: entries(&plan),
        name,
        model: Model::default(),
        held: Vec::new(),
        cleared: HashSet::new(),
        before: (None, Raw::default()),
        bench,
    };
    for (step, (first, act)) in plan.acts.iter().enumerate() {
        let replica = usize::from(*first);
        let outcome = async {
            let told = case.act(replica, act).await?;
            case.compare().await?;
            let told: Vec<_> = told
                .map(|told| (case.bench.replicas[replica].origin, told))
                .into_iter()
                .collect();
            prop_assert_eq!(case.bench.heard().await, told, "the others are told");
            Ok(())
        };
        let outcome: Result<(), TestCaseError> = outcome.await;
        if began.elapsed() > CASE_MAX {
            return Ok(());
        }
        outcome.map_err(|error| TestCaseError::fail(format!("step {step}, {act:?}: {error}")))?;
    }
    Ok(())
}

#[test]
fn whatever_two_replicas_do_and_redis_forgets_the_slot_is_as_its_model() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let bench = RefCell::new(runtime.block_on(Bench::start()));
    let cases = AtomicU64::new(0);
    let mut runner = TestRunner::new(Cases {
        cases: 300,
        failure_persistence: None,
        ..Cases::default()
    });
    let outcome = runner.run(&plans(), |plan| {
        let name = cases.fetch_add(1, Ordering::Relaxed).to_string();
        runtime.block_on(agree(&mut bench.borrow_mut(), name, plan))
    });
    drop(bench);
    outcome.expect("Redis and the model agree");
}

#[tokio::test]
async fn of_many_who_ask_for_the_load_one_gets_it() {
    let server = redis_server::start().await;
    let mut asking = JoinSet::new();
    let replicas = [Replica::of(&server).await, Replica::of(&server).await].map(Arc::new);
    for asker in 0..64 {
        let replica = Arc::clone(&replicas[asker % 2]);
        asking.spawn(async move { replica.claim(&key("k")).await.expect("Redis answers") });
    }
    let claimed = asking.join_all().await;
    let tokens: Vec<SlotToken> = claimed.iter().filter_map(|claimed| claimed.token).collect();
    assert_eq!(tokens.len(), 1);
    // Given back, it is to be had again.
    replicas[0].release(&key("k"), tokens[0]).await.expect("Redis answers");
    let again = replicas[1].claim(&key("k")).await.expect("Redis answers").token;
    assert!(again.is_some_and(|again| again != tokens[0]));
}

#[tokio::test]
async fn where_redis_was_emptied_between_a_claim_and_its_fill_nothing_lands() {
    let mut bench = Bench::start().await;
    for empty in ["FLUSHALL", "DEL", "UNLINK"] {
        let token = bench.replicas[0].claim(&key("k")).await.expect("Redis answers").token;
        let token = token.expect("nobody else has it");
        let mut command = cmd(empty);
        if empty != "FLUSHALL" {
            command.arg(slot("k"));
        }
        bench.run(&mut command).await;
        let landed = load(&bench.replicas[0], "k", token, Some(put(1))).await;
        assert_eq!(landed, Ok(false), "after {empty}");
        assert_eq!(bench.raw("k").await.token, None, "after {empty}");
    }
}

#[tokio::test]
async fn a_write_behind_write_that_comes_too_late_enters_no_empty_slot_and_nobody_is_told() {
    let mut bench = Bench::start().await;
    let stamped = |ago: i64| version(((now() - ago - VERSION_EPOCH_MILLIS) << 21) + 1);
    let (old, new) = (put(stamped(10_500).get()), put(stamped(0).get()));
    let fresh = async |bench: &Bench, entry: &Entry| {
        let published = bench.replicas[0]
            .publish_entry(&key("k"), entry, NOW, LONG, Hold::Fresh)
            .await;
        published.expect("Redis answers")
    };
    assert_eq!(fresh(&bench, &old).await, Published::Late);
    assert_eq!(standing(&bench.replicas[0], &key("k")).await, None);
    assert_eq!(bench.heard().await, []);
    // Nor does it end a load.
    let token = bench.replicas[1].claim(&key("k")).await.expect("Redis answers").token;
    assert_eq!(fresh(&bench, &old).await, Published::Late);
    let token = token.expect("nobody else has it");
    assert_eq!(load(&bench.replicas[1], "k", token, None).await, Ok(true));
    // What stands there tells nothing of what had stood before.
    assert_eq!(fresh(&bench, &old).await, Published::Late);
    assert_eq!(fresh(&bench, &new).await, Published::Stands(new.version));
    assert_eq!(standing(&bench.replicas[1], &key("k")).await, Some(new.clone()));
    assert_eq!(
        bench.heard().await,
        [(bench.replicas[0].origin, written(&key("k"), new.version))]
    );
    // Where something older stands, there is no doubt.
    bench.run(cmd("DEL").arg(slot("k"))).await;
    bench.replicas[1]
        .write(&key("k"), &put(1), NOW, LONG)
        .await
        .expect("lands");
    assert_eq!(fresh(&bench, &old).await, Published::Stands(old.version));
}

#[tokio::test]
async fn a_full_redis_still_forgets_and_tells() {
    let mut bench = Bench::start().await;
    let replica = &bench.replicas[0];
    let mut tokens = Vec::new();
    for name in ["dropped", "purged", "loaded", "alone"] {
        if name != "alone" {
            replica.write(&key(name), &put(5), NOW, LONG).await.expect("lands");
        }
        let claimed = replica.claim(&key(name)).await.expect("Redis answers");
        tokens.push(claimed.token.expect("nobody else has it"));
    }
    bench.heard().await;
    bench.run(cmd("CONFIG").arg("SET").arg("maxmemory").arg(1)).await;
    let replica = &bench.replicas[0];
    assert_eq!(replica.drop_version(&key("dropped"), version(4)).await, Ok(false));
    assert_eq!(replica.purge(&key("purged"), version(5)).await, Ok(()));
    assert_eq!(load(replica, "loaded", tokens[2], None).await, Ok(false));
    assert_eq!(replica.release(&key("alone"), tokens[3]).await, Ok(()));
    assert_eq!(replica.invalidate(&key("alone")).await, Ok(false));
    let dropped = Message::Dropped {
        key: key("dropped"),
        version: version(4),
    };
    let invalidated = Message::Invalidated { key: key("alone") };
    let told = [dropped, written(&key("purged"), version(5)), invalidated].map(|told| (replica.origin, told));
    assert_eq!(bench.heard().await, told);
    // What was told to go is gone, when there is room again, too: no token is left to land by.
    bench.run(cmd("CONFIG").arg("SET").arg("maxmemory").arg(0)).await;
    for (name, token) in iter::zip(["dropped", "purged", "loaded", "alone"], tokens) {
        let landed = load(&bench.replicas[0], name, token, Some(put(9))).await;
        assert_eq!(landed, Ok(false), "{name}");
    }
}

#[tokio::test]
async fn nothing_is_said_to_a_server_for_which_the_epoch_does_not_hold() {
    let mut bench = Bench::start().await;
    bench.replicas[0]
        .write(&key("k"), &put(1), NOW, LONG)
        .await
        .expect("lands");
    // As after a restart: the connection is another one, and leads to what is empty or old.
    let before = bench.replicas[0].server().expect("it is up");
    bench.server.kill();
    bench.server.start_again().await;
    let replica = &bench.replicas[0];
    until("it is found again", async || {
        replica.server().is_some_and(|server| server != before)
    })
    .await;
    assert!(!replica.is_usable());
    assert_eq!(replica.get(&key("k")).await, Err(RedisFailure::NoEpoch));
    assert_eq!(replica.claim(&key("k")).await, Err(RedisFailure::NoEpoch));
    assert_eq!(
        replica.write(&key("k"), &put(2), NOW, LONG).await,
        Err(RedisFailure::NoEpoch)
    );
    assert_eq!(replica.invalidate(&key("k")).await, Err(RedisFailure::NoEpoch));
    let keys: i64 = cmd("DBSIZE")
        .query_async(&mut bench.server.connect().await)
        .await
        .expect("DBSIZE");
    assert_eq!(keys, 0);
    replica.up().await;
    assert!(replica.is_usable());
    assert_eq!(replica.get(&key("k")).await, Ok(None));
}

#[tokio::test]
async fn a_prefix_goes_with_its_wildcards_taken_at_their_word() {
    let mut bench = Bench::start().await;
    let replica = &bench.replicas[0];
    let names = ["a*1", "a*2", "ab", "a?", "a[b]", "a\\b", "b", "é", "éa"];
    for (number, name) in iter::zip(1.., names) {
        replica.write(&key(name), &put(number), NOW, LONG).await.expect("lands");
    }
    let other = Key::new("test.b", "a*1").expect("valid");
    replica.write(&other, &put(1), NOW, LONG).await.expect("lands");
    let remove = async |prefix: &str| {
        let (mut removed, mut cursor) = (0, Some(0));
        while let Some(from) = cursor {
            let step = replica
                .remove_prefix("test", prefix, from)
                .await
                .expect("Redis answers");
            removed += step.0;
            cursor = step.1;
        }
        removed
    };
    for (prefix, expected) in [("a*", 2), ("a?", 1), ("a[b", 1), ("a\\", 1), ("x", 0), ("é", 2)] {
        assert_eq!(remove(prefix).await, expected, "{prefix}");
    }
    assert_eq!(standing(replica, &key("ab")).await, Some(put(3)));
    assert_eq!(remove("").await, 2, "ab and b");
    assert_eq!(
        standing(replica, &other).await,
        Some(put(1)),
        "another namespace's stays"
    );
    bench.heard().await;
}

#[tokio::test]
async fn the_sentinel_of_an_epoch_goes_with_what_was_flushed() {
    let mut bench = Bench::start().await;
    let (epoch, other) = (Epoch(7), Epoch(8));
    let replica = &bench.replicas[0];
    assert_eq!(replica.has_sentinel(epoch).await, Ok(false));
    replica.set_sentinel(epoch).await.expect("Redis answers");
    assert_eq!(replica.has_sentinel(epoch).await, Ok(true));
    assert_eq!(replica.has_sentinel(other).await, Ok(false));
    replica.announce(Message::EpochMoved).await.expect("Redis answers");
    let told = (replica.origin, Message::EpochMoved);
    assert_eq!(bench.heard().await, [told]);
    bench.run(&mut cmd("FLUSHALL")).await;
    assert_eq!(bench.replicas[1].has_sentinel(epoch).await, Ok(false));
}
