//! A slot in Redis against a model of it: whatever two replicas do in whatever order, and whatever Redis forgets meanwhile, both agree after
//! each step on what stands, for how long, who may land, what is answered and what the others are told.
//!
//! The model owns the rule of slots and nothing of how they are kept. What holds of each step by itself is checked beside it: no lower version
//! replaces a higher one, no token comes back, and no load lands but by the token that stood.

use std::{
    cell::RefCell,
    collections::HashSet,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    test_runner::{Config as Cases, TestCaseError, TestRunner},
};
use redis::cmd;
use tidegate::{
    cache::{
        Copy,
        message::Message,
        redis::{Claimed, Hold, Published, SlotToken},
    },
    model::{ChangeKind, Entry, Key, VERSION_EPOCH_MILLIS, Version},
};
use tokio::time::Instant;

use super::{Bench, Raw, now, told, written};
use crate::cache_redis::{LONG, NOW, edges, key, slot, version};

/// The least for which a tombstone, and what is not in the store yet, is kept.
const KEPT_MIN: Duration = Duration::from_secs(60);

/// A case that took longer says nothing: tokens end after ten seconds.
const CASE_MAX: Duration = Duration::from_secs(8);

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
    /// What has gone, where nothing stands: no copy.
    floor: Option<Version>,
    token: Option<Token>,
    /// For how long the copy, or the floor, is kept, and from when on at the earliest.
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

    /// The version that nothing older may take the place of.
    fn known(&self) -> Option<Version> {
        self.version().or(self.floor)
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
        self.floor = None;
        self.token = None;
        self.kept = self.now.map(|now| (kept.max(least), now));
    }

    fn load(&mut self, token: SlotToken, copy: &Copy) -> bool {
        if !self.holds(token) {
            return false;
        }
        self.token = None;
        let lands = self.known() <= copy.version();
        if lands {
            self.land(copy, Duration::ZERO);
        }
        lands
    }

    fn write(&mut self, copy: &Copy, hold: Hold) -> Published {
        let version = copy.version().expect("a write has a version");
        let least = if hold == Hold::Fresh { KEPT_MIN } else { Duration::ZERO };
        let known = self.known();
        if let Some(higher) = known.filter(|known| *known > version) {
            // Whoever holds a token beside it lands nothing older.
            return Published::Stands(higher);
        }
        let may_enter = match hold {
            Hold::Token(token) => self.holds(token) || self.copy.is_some(),
            Hold::Nothing => self.copy.is_some(),
            Hold::Fresh if self.version().is_some() => true,
            // That very version has gone from here.
            Hold::Fresh if known == Some(version) => false,
            Hold::Fresh if now() - version.stamped_at().0 > 10_000 => return Published::Late,
            Hold::Fresh => true,
        };
        if may_enter {
            self.land(copy, least);
            return Published::Stands(version);
        }
        self.sink(version);
        Published::Nothing
    }

    fn sink(&mut self, version: Version) {
        let floor = self.floor.max(Some(version));
        self.clear();
        self.floor = floor;
        self.kept = self.now.map(|now| (KEPT_MIN, now));
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

    /// Does an act, to both, and compares what they answer. What the others are to be told.
    async fn act(&mut self, replica: usize, act: &Act) -> Result<Option<Message>, TestCaseError> {
        self.model.now = Some(Instant::now());
        match act {
            Act::Claim => self.claim(replica).await?,
            Act::Enter => self.enter(replica).await?,
            Act::Release(index) => {
                if let Some(held) = self.held(index) {
                    let released = self.bench.replicas[replica].release(&self.key, held.token).await;
                    prop_assert_eq!(released, Ok(()));
                    if self.model.holds(held.token) {
                        self.model.token = None;
                    }
                }
            }
            Act::Load(index, found, lifetime) => {
                if let Some(held) = self.held(index) {
                    let found = found.as_ref().map(|entry| self.entry(entry));
                    self.load(replica, held, Copy::new(found, NOW, *lifetime)).await?;
                }
            }
            Act::Write(entry, with, lifetime) => return self.write(replica, self.entry(entry), with, *lifetime).await,
            Act::Drop(entry) => return self.drop_version(replica, self.entry(entry).version).await.map(Some),
            Act::Purge(entry) => return self.purge(replica, self.entry(entry).version).await.map(Some),
            Act::Invalidate => {
                let stood = self.model.copy.is_some();
                let invalidated = self.bench.replicas[replica].invalidate(&self.key).await;
                prop_assert_eq!(invalidated, Ok(stood));
                match self.model.known() {
                    Some(known) => self.model.sink(known),
                    None => self.model.clear(),
                }
                return Ok(Some(Message::Invalidated { key: self.key.clone() }));
            }
            Act::Evict => {
                self.bench.run(cmd("DEL").arg(slot(&self.name))).await;
                self.model.clear();
            }
            Act::Flush => {
                self.bench.run(&mut cmd("FLUSHALL")).await;
                self.bench.run(cmd("SCRIPT").arg("FLUSH")).await;
                self.model.clear();
            }
            Act::End => {
                if let Some(token) = &mut self.model.token {
                    token.ended = true;
                    let (mut end, past) = (cmd("SETRANGE"), 1_i64.to_be_bytes());
                    self.bench.run(end.arg(slot(&self.name)).arg(42).arg(&past)).await;
                }
            }
        }
        Ok(None)
    }

    async fn claim(&mut self, replica: usize) -> Result<(), TestCaseError> {
        let claimed = self.bench.replicas[replica].claim(&self.key, SlotToken::random()).await;
        let Ok(Claimed { token, copy }) = claimed else {
            return Err(TestCaseError::fail(format!("{claimed:?}")));
        };
        prop_assert_eq!(&copy, &self.model.copy);
        prop_assert_eq!(token.is_some(), self.model.token.is_none_or(|token| token.ended));
        if let Some(token) = token {
            self.left(token).await;
        }
        Ok(())
    }

    async fn enter(&mut self, replica: usize) -> Result<(), TestCaseError> {
        let entered = self.bench.replicas[replica].enter(&self.key).await;
        let entered = entered.map_err(|failure| TestCaseError::fail(failure.to_string()))?;
        prop_assert_eq!(entered.standing, self.model.version());
        match self.model.token {
            Some(standing) => prop_assert_eq!(entered.token, standing.token, "it is shared"),
            None => prop_assert!(self.held.iter().all(|held| held.token != entered.token)),
        }
        self.left(entered.token).await;
        Ok(())
    }

    async fn load(&mut self, replica: usize, held: Token, copy: Copy) -> Result<(), TestCaseError> {
        let replica = &self.bench.replicas[replica];
        let landed = replica.land_load(&self.key, held.token, &copy, Duration::ZERO).await;
        let lands = self.model.load(held.token, &copy);
        prop_assert_eq!(landed, Ok(lands));
        if lands {
            prop_assert_eq!(self.before.1.token, Some(held.bytes), "its own token stood");
            prop_assert!(!self.cleared.contains(&held.bytes), "and had never gone");
        }
        Ok(())
    }

    async fn write(
        &mut self,
        replica: usize,
        entry: Entry,
        with: &With,
        lifetime: Duration,
    ) -> Result<Option<Message>, TestCaseError> {
        let hold = match with {
            With::Token(index) => self.held(index).map_or(Hold::Nothing, |held| Hold::Token(held.token)),
            With::Nothing => Hold::Nothing,
            With::Fresh => Hold::Fresh,
        };
        let replica = &self.bench.replicas[replica];
        let answer = replica.publish_entry(&self.key, &entry, NOW, lifetime, hold).await;
        let message = written(&self.key, &entry);
        let published = self.model.write(&Copy::new(Some(entry), NOW, lifetime), hold);
        prop_assert_eq!(answer, Ok(published), "{:?}", hold);
        Ok((published != Published::Late).then_some(message))
    }

    async fn drop_version(&mut self, replica: usize, version: Version) -> Result<Message, TestCaseError> {
        let stood = self.model.version() == Some(version);
        let dropped = self.bench.replicas[replica].drop_version(&self.key, version).await;
        prop_assert_eq!(dropped, Ok(stood));
        self.model.token = None;
        if stood || self.model.version().is_none() {
            self.model.sink(version);
        }
        let key = self.key.clone();
        Ok(Message::Dropped { key, version })
    }

    async fn purge(&mut self, replica: usize, version: Version) -> Result<Message, TestCaseError> {
        let purged = self.bench.replicas[replica].purge(&self.key, version).await;
        prop_assert_eq!(purged, Ok(()));
        self.model.token = None;
        if self.model.version() < Some(version) {
            self.model.sink(version);
        }
        Ok(told(&self.key, version, ChangeKind::Invalidate))
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
        let stands = self.model.copy.is_some() || self.model.floor.is_some();
        let token = match &self.model.token {
            Some(token) => Some(token.bytes),
            None => stands.then_some([0; 8]),
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
