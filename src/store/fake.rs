//! A store in memory with scripted faults, for tests.
//!
//! Owns a max-register per key behind the same two traits as the real backends, the faults that a test asks for, and a record of
//! what was called. Does not own durability. Invariants: an entry only moves forward; a commit applies all of its writes or none;
//! it checks what callers owe (distinct keys, sorted writes, a reset after a call that was cut off) and panics where they fail to.
//!
//! What a call does, in order: [`FakeBackend::down`], then the faults queued with [`FakeBackend::inject`], then
//! [`FakeBackend::script`]; none of them: it takes effect at once. All time is tokio's, so tests may pause it.

mod decide;
mod letters;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, VecDeque},
    mem,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use crate::{
    clock::Clock,
    model::{Answered, Entry, Epoch, Key, KeyedAnswer, RequestId, Tags, Timestamp, Version, Write},
    store::{
        Backend, Claimant, Committed, Connection, Control, DeadLetter, LOAD_BYTES_MAX, NAMESPACE_EPOCHS_MAX,
        NODE_LEASE, NamespaceMoved, NodeGrant, Store, StoreError, StoreErrorKind,
        fake::{decide::Requests, letters::Letters},
        letters::{KeptLetter, LetterRange},
        operation::{Decided, Operation, RangeRow},
        requests::of_answers,
    },
};

/// The kinds of calls that faults are scripted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// [`Connection::load`].
    Load,
    /// [`Connection::commit`].
    Commit,
    /// [`Connection::probe`].
    Probe,
    /// [`Connection::bury`].
    Bury,
    /// [`Connection::letters`].
    Letters,
    /// [`Connection::drop_letters`].
    DropLetters,
    /// [`Connection::refuse_letter`].
    RefuseLetter,
    /// [`Connection::ping`].
    Ping,
    /// [`Connection::lease_node`].
    LeaseNode,
    /// [`Connection::renew_node`].
    RenewNode,
    /// [`Connection::release_node`].
    ReleaseNode,
    /// [`Connection::collect`].
    Collect,
    /// [`Connection::control`].
    Control,
    /// [`Connection::move_epoch`].
    MoveEpoch,
    /// [`Connection::move_namespace_epoch`].
    MoveNamespaceEpoch,
    /// [`Connection::tagged`].
    Tagged,
    /// [`Connection::keys_below`].
    KeysBelow,
    /// [`Connection::rows_below`].
    RowsBelow,
    /// [`Connection::newest`].
    Newest,
    /// [`Connection::decide`].
    Decide,
    /// [`Connection::remember`].
    Remember,
    /// [`Connection::answers`].
    Answers,
    /// [`Connection::forget_requests`].
    ForgetRequests,
    /// [`Connection::are_buried`].
    AreBuried,
}

/// What goes wrong in one call: first what it waits for, then how it ends.
#[derive(Debug, Clone, Default)]
pub struct Fault {
    delay: Duration,
    hang: Option<Arc<Notify>>,
    end: End,
    /// What the reply waits for, once the call has taken effect.
    late: Option<Arc<Notify>>,
}

#[derive(Debug, Clone, Copy, Default)]
enum End {
    #[default]
    Effect,
    Fail(StoreErrorKind),
    LoseReply,
    LandLater,
}

impl Fault {
    /// Fails without any effect. `Unknown` is a connection that was lost before the store read the request.
    pub fn fail(kind: StoreErrorKind) -> Fault {
        Fault {
            end: End::Fail(kind),
            ..Fault::default()
        }
    }

    /// Takes effect, and then the reply is lost: `Unknown`.
    pub fn lose_reply() -> Fault {
        Fault {
            end: End::LoseReply,
            ..Fault::default()
        }
    }

    /// A commit whose connection is lost (`Unknown`) while the store works on: it takes effect at [`FakeBackend::land`]. Other
    /// calls lose their reply.
    pub fn land_later() -> Fault {
        Fault {
            end: End::LandLater,
            ..Fault::default()
        }
    }

    /// Takes effect after a delay.
    pub fn delay(by: Duration) -> Fault {
        Fault {
            delay: by,
            ..Fault::default()
        }
    }

    /// Takes effect once released with `notify_one`; a caller that does not wait for it cuts it off without effect.
    pub fn hang() -> (Fault, Arc<Notify>) {
        let released = Arc::new(Notify::new());
        let fault = Fault {
            hang: Some(Arc::clone(&released)),
            ..Fault::default()
        };
        (fault, released)
    }

    /// Takes effect at once; the reply, which tells of the store as it was then, comes once released with `notify_one`.
    pub fn late_reply() -> (Fault, Arc<Notify>) {
        let released = Arc::new(Notify::new());
        let fault = Fault {
            late: Some(Arc::clone(&released)),
            ..Fault::default()
        };
        (fault, released)
    }

    /// The same, after a delay.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Fault {
        self.delay = delay;
        self
    }
}

/// One commit as the store saw it.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Its keys and versions, in the order of the statement.
    pub writes: Vec<(Key, Version)>,
    /// Which connection sent it, counted from 0.
    pub connection: usize,
    /// What the caller was told.
    pub result: Result<(), StoreErrorKind>,
}

type Script = Box<dyn FnMut(Call) -> Option<Fault> + Send>;
type Reject = Box<dyn Fn(&Write) -> bool + Send>;

struct Row {
    entry: Entry,
    tags: Tags,
    committed_at: Timestamp,
}

struct Lease {
    directory: String,
    start: String,
    high_water: Option<Version>,
    /// `None`: released.
    renewed: Option<Instant>,
}

struct State {
    clock: Clock,
    rows: HashMap<Key, Row>,
    /// At or above every version that was ever collected.
    horizon: Option<Version>,
    epoch: Epoch,
    cache_server: Option<String>,
    moved_at: Option<Timestamp>,
    namespace_epochs: HashMap<String, NamespaceMoved>,
    /// What the store's clock shows beyond tokio's, in milliseconds.
    clock_ahead: i64,
    /// Every version that ever stood, per key, in order.
    history: HashMap<Key, Vec<Version>>,
    /// Commits of [`Fault::land_later`].
    landing: Vec<Vec<Write>>,
    dead_letters: Letters,
    requests: Requests,
    /// The operations of every transaction that was begun.
    decisions: Vec<Vec<(Key, Version)>>,
    leases: BTreeMap<u16, Lease>,
    nodes_max: u16,
    down: bool,
    queued: HashMap<Call, VecDeque<Fault>>,
    script: Script,
    reject: Reject,
    /// The key whose row another session holds, for decisions.
    held: Option<Key>,
    calls: HashMap<Call, usize>,
    commits: Vec<Batch>,
    loads: Vec<Vec<Key>>,
    connections: usize,
    writers_max: usize,
}

/// The store in memory. Clones share it.
#[derive(Clone)]
pub struct FakeBackend {
    state: Arc<Mutex<State>>,
}

impl Default for FakeBackend {
    fn default() -> FakeBackend {
        let state = State {
            clock: Clock::new(0, None),
            rows: HashMap::new(),
            horizon: None,
            epoch: Epoch(1),
            cache_server: None,
            moved_at: None,
            namespace_epochs: HashMap::new(),
            clock_ahead: 0,
            history: HashMap::new(),
            landing: Vec::new(),
            dead_letters: Letters::default(),
            requests: Requests::new(),
            decisions: Vec::new(),
            leases: BTreeMap::new(),
            nodes_max: 1023,
            down: false,
            queued: HashMap::new(),
            script: Box::new(|_| None),
            reject: Box::new(|_| false),
            held: None,
            calls: HashMap::new(),
            commits: Vec::new(),
            loads: Vec::new(),
            connections: 0,
            writers_max: 64,
        };
        FakeBackend {
            state: Arc::new(Mutex::new(state)),
        }
    }
}

impl FakeBackend {
    /// An empty store without faults.
    pub fn new() -> FakeBackend {
        FakeBackend::default()
    }

    /// It as the rest of the gateway has it: a breaker of its own, calls bounded at 10 s.
    pub fn store(&self) -> Store {
        Store::new(Arc::new(self.clone()), Arc::default(), Duration::from_secs(10))
    }

    /// The next call of a kind that no earlier fault is queued for goes wrong so.
    pub fn inject(&self, call: Call, fault: Fault) {
        self.state.lock().queued.entry(call).or_default().push_back(fault);
    }

    /// What goes wrong in calls that no fault is queued for, until another script replaces it.
    pub fn script(&self, script: impl FnMut(Call) -> Option<Fault> + Send + 'static) {
        self.state.lock().script = Box::new(script);
    }

    /// While `true`, every call is `Unreachable`.
    pub fn down(&self, down: bool) {
        self.state.lock().down = down;
    }

    /// Which writes are poison: a commit that holds one is `Rejected`.
    pub fn reject(&self, reject: impl Fn(&Write) -> bool + Send + 'static) {
        self.state.lock().reject = Box::new(reject);
    }

    /// Another session holds the row of a key: a decision that wants it waits in vain.
    pub fn hold(&self, key: Option<Key>) {
        self.state.lock().held = key;
    }

    /// How many connections can commit at once with profit. 64 unless set.
    pub fn set_writers_max(&self, writers: usize) {
        self.state.lock().writers_max = writers;
    }

    /// How many node ids there are. 1,023 unless set.
    pub fn set_nodes_max(&self, nodes: u16) {
        self.state.lock().nodes_max = nodes;
    }

    /// Lets the commits of [`Fault::land_later`] take effect now.
    pub fn land(&self) {
        let mut state = self.state.lock();
        for writes in mem::take(&mut state.landing) {
            state.apply(&writes);
        }
    }

    /// Writes past any connection, as another gateway would.
    pub fn put(&self, write: Write) {
        self.state.lock().apply(std::slice::from_ref(&write));
    }

    /// The entry that stands on a key.
    pub fn entry(&self, key: &Key) -> Option<Entry> {
        self.state.lock().rows.get(key).map(|row| row.entry.clone())
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.state.lock().rows.len()
    }

    /// Raises the horizon, as another gateway's collection would.
    pub fn raise_horizon(&self, horizon: Version) {
        let mut state = self.state.lock();
        state.horizon = state.horizon.max(Some(horizon));
    }

    /// The horizon.
    pub fn horizon(&self) -> Option<Version> {
        self.state.lock().horizon
    }

    /// Moves the epoch of the shared cache, as another gateway would.
    pub fn set_epoch(&self, epoch: Epoch) {
        self.state.lock().set_epoch(epoch);
    }

    /// Sets the store's clock ahead of tokio's, or (negative) back, by milliseconds.
    pub fn set_clock_ahead(&self, millis: i64) {
        self.state.lock().clock_ahead = millis;
    }

    /// Every version that ever stood on a key, in order.
    pub fn history(&self, key: &Key) -> Vec<Version> {
        self.state.lock().history.get(key).cloned().unwrap_or_default()
    }

    /// The dead-letter table, in the order of burial.
    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        self.state.lock().dead_letters.all()
    }

    /// What is remembered of a request.
    pub fn answer_of(&self, namespace: &str, id: &RequestId) -> Option<Answered> {
        self.state.lock().answer_of(namespace, id)
    }

    /// The operations of every transaction that was begun, in order.
    pub fn decisions(&self) -> Vec<Vec<(Key, Version)>> {
        self.state.lock().decisions.clone()
    }

    /// How many calls of a kind were begun.
    pub fn calls(&self, call: Call) -> usize {
        self.state.lock().calls.get(&call).copied().unwrap_or_default()
    }

    /// Every commit that reached its end, in order; one that was cut off is not among them.
    pub fn commits(&self) -> Vec<Batch> {
        self.state.lock().commits.clone()
    }

    /// The keys of every load that was begun, in order.
    pub fn loads(&self) -> Vec<Vec<Key>> {
        self.state.lock().loads.clone()
    }

    /// The high-water mark that a node's holders reported last.
    pub fn node_high_water(&self, node: u16) -> Option<Version> {
        self.state.lock().leases.get(&node).and_then(|lease| lease.high_water)
    }

    /// Whether somebody holds a node.
    pub fn node_is_leased(&self, node: u16) -> bool {
        self.state.lock().leases.get(&node).is_some_and(Lease::is_held)
    }
}

impl Backend for FakeBackend {
    fn writers_max(&self) -> usize {
        self.state.lock().writers_max
    }

    fn connection(&self) -> Box<dyn Connection> {
        let mut state = self.state.lock();
        let number = state.connections;
        state.connections += 1;
        Box::new(FakeConnection {
            state: Arc::clone(&self.state),
            number,
            in_call: false,
        })
    }
}

impl Lease {
    fn is_held(&self) -> bool {
        self.renewed.is_some_and(|renewed| renewed.elapsed() < NODE_LEASE)
    }

    fn belongs_to(&self, claimant: &Claimant) -> bool {
        self.renewed.is_some() && self.directory == claimant.directory && self.start == claimant.start
    }
}

impl State {
    fn fault(&mut self, call: Call) -> Fault {
        *self.calls.entry(call).or_default() += 1;
        if self.down {
            return Fault::fail(StoreErrorKind::Unreachable);
        }
        let queued = self.queued.get_mut(&call).and_then(VecDeque::pop_front);
        queued.or_else(|| (self.script)(call)).unwrap_or_default()
    }

    fn apply(&mut self, writes: &[Write]) -> Vec<Committed> {
        let committed_at = self.clock.now();
        self.remember_writes(writes);
        let mut results = Vec::with_capacity(writes.len());
        for Write { key, entry, tags, .. } in writes {
            let standing = self.rows.get(key).map(|row| row.entry.version);
            results.push(match (standing, self.horizon) {
                (Some(standing), _) if standing > entry.version => Committed::Superseded { standing },
                (Some(standing), _) if standing == entry.version => Committed::Applied,
                (None, Some(horizon)) if entry.version <= horizon => Committed::BelowHorizon { horizon },
                _ => {
                    let (entry, tags) = (entry.clone(), tags.clone());
                    self.history.entry(key.clone()).or_default().push(entry.version);
                    self.rows.insert(
                        key.clone(),
                        Row {
                            entry,
                            tags,
                            committed_at,
                        },
                    );
                    Committed::Applied
                }
            });
        }
        results
    }

    fn lease(&mut self, claimant: &Claimant) -> Result<NodeGrant, StoreError> {
        let own = |lease: &Lease| lease.directory == claimant.directory;
        let free = |node: &u16| self.leases.get(node).is_none_or(|lease| !lease.is_held());
        let node = self.leases.iter().find(|(_, lease)| own(lease)).map(|(node, _)| *node);
        let node = node.or_else(|| (1..=self.nodes_max).find(free));
        let Some(node) = node else {
            return Err(StoreError::new(StoreErrorKind::Rejected, "every node id is leased"));
        };
        let high_water = self.leases.get(&node).and_then(|lease| lease.high_water);
        let lease = Lease {
            directory: claimant.directory.clone(),
            start: claimant.start.clone(),
            high_water,
            renewed: Some(Instant::now()),
        };
        self.leases.insert(node, lease);
        Ok(NodeGrant { node, high_water })
    }

    fn renew(&mut self, claimant: &Claimant, node: u16, high_water: Option<Version>, renewed: Option<Instant>) -> bool {
        match self.leases.get_mut(&node) {
            Some(lease) if lease.belongs_to(claimant) => {
                lease.high_water = lease.high_water.max(high_water);
                lease.renewed = renewed;
                true
            }
            _ => false,
        }
    }

    fn set_epoch(&mut self, epoch: Epoch) {
        if self.epoch != epoch {
            self.moved_at = Some(self.now());
        }
        self.epoch = epoch;
        self.namespace_epochs.clear();
    }

    fn now(&self) -> Timestamp {
        Timestamp(self.clock.now().0 + self.clock_ahead)
    }

    fn control(&self) -> Control {
        Control {
            epoch: self.epoch,
            cache_server: self.cache_server.clone(),
            moved_at: self.moved_at,
            namespaces: self.namespace_epochs.clone(),
            gc_horizon: self.horizon,
            now: self.now(),
        }
    }

    fn move_epoch(&mut self, from: Epoch, to: Epoch, cache_server: Option<String>) -> bool {
        let moved = self.epoch == from;
        if moved {
            self.set_epoch(to);
            self.cache_server = cache_server.or(self.cache_server.take());
        }
        moved
    }

    fn move_namespace_epoch(&mut self, namespace: String, to: Epoch) {
        let has_room = self.namespace_epochs.len() < NAMESPACE_EPOCHS_MAX as usize;
        if has_room || self.namespace_epochs.contains_key(&namespace) {
            let moved = NamespaceMoved {
                epoch: to,
                moved_at: self.now(),
            };
            self.namespace_epochs.insert(namespace, moved);
        } else {
            self.set_epoch(to);
        }
    }

    /// The keys of a namespace that have such a row, in order.
    fn keys(&self, namespace: &str, after: Option<&str>, limit: u32, wanted: impl Fn(&Key, &Row) -> bool) -> Vec<Key> {
        let rows = self.rows.iter().filter(|(key, row)| {
            key.namespace() == namespace && after.is_none_or(|after| key.key() > after) && wanted(key, row)
        });
        let mut keys: Vec<Key> = rows.map(|(key, _)| key.clone()).collect();
        keys.sort_unstable();
        keys.truncate(limit as usize);
        keys
    }

    fn newest(&self, namespace: &str, limit: u32) -> Vec<Key> {
        let now = self.control().now;
        let mut keys = self.keys(namespace, None, u32::MAX, |_, row| row.entry.is_live(now));
        keys.sort_by_key(|key| Reverse(self.rows.get(key).map(|row| row.entry.version)));
        keys.truncate(limit as usize);
        keys
    }

    fn collect(&mut self, retention: Duration, rows_max: u32) -> u64 {
        let now = self.clock.now();
        let old = |row: &Row| {
            let ended = row
                .entry
                .expires_at
                .map_or(row.committed_at, |at| at.max(row.committed_at));
            let latest = ended.max(row.entry.version.stamped_at());
            !row.entry.is_live(now) && latest.after(retention) < now
        };
        let due: Vec<(Key, Version)> = self
            .rows
            .iter()
            .filter(|(_, row)| old(row))
            .map(|(key, row)| (key.clone(), row.entry.version))
            .take(rows_max as usize)
            .collect();
        self.horizon = self.horizon.max(due.iter().map(|(_, version)| *version).max());
        for (key, _) in &due {
            self.rows.remove(key);
        }
        due.len() as u64
    }
}

struct FakeConnection {
    state: Arc<Mutex<State>>,
    number: usize,
    /// Set while a call runs, so it stands after one that was cut off.
    in_call: bool,
}

impl FakeConnection {
    /// One call: its fault, and its effect where the fault leaves it one.
    async fn call<T>(
        &mut self,
        call: Call,
        effect: impl FnOnce(&mut State) -> Result<T, StoreError> + Send,
    ) -> Result<T, StoreError> {
        let (end, late) = self.begin(call).await;
        let result = match end {
            End::Effect => effect(&mut self.state.lock()),
            End::Fail(kind) => Err(StoreError::new(kind, "scripted fault")),
            End::LoseReply | End::LandLater => {
                let _unheard = effect(&mut self.state.lock());
                Err(lost_reply())
            }
        };
        replied(late).await;
        self.in_call = false;
        result
    }

    async fn begin(&mut self, call: Call) -> (End, Option<Arc<Notify>>) {
        assert!(
            !self.in_call,
            "a connection was used after a call that was cut off, without a reset"
        );
        self.in_call = true;
        let fault = self.state.lock().fault(call);
        if !fault.delay.is_zero() {
            sleep(fault.delay).await;
        }
        if let Some(released) = fault.hang {
            released.notified().await;
        }
        (fault.end, fault.late)
    }

    /// What a commit does to the store, and what its caller is to be told.
    fn apply(&self, writes: &[Write], end: End) -> Result<Vec<Committed>, StoreError> {
        let state = &mut *self.state.lock();
        let poison = writes.iter().any(|write| (state.reject)(write));
        let result = match end {
            End::Fail(kind) => Err(StoreError::new(kind, "scripted fault")),
            End::LandLater => {
                if !poison {
                    state.landing.push(writes.to_vec());
                }
                Err(lost_reply())
            }
            End::Effect if poison => Err(StoreError::new(StoreErrorKind::Rejected, "scripted refusal")),
            End::LoseReply if poison => Err(lost_reply()),
            End::Effect => Ok(state.apply(writes)),
            End::LoseReply => {
                state.apply(writes);
                Err(lost_reply())
            }
        };
        state.commits.push(Batch {
            writes: writes
                .iter()
                .map(|write| (write.key.clone(), write.entry.version))
                .collect(),
            connection: self.number,
            result: result.as_ref().map(|_| ()).map_err(|error| error.kind),
        });
        result
    }
}

/// Waits until a late reply is released.
async fn replied(late: Option<Arc<Notify>>) {
    if let Some(released) = late {
        released.notified().await;
    }
}

/// Waits until something holds.
///
/// # Panics
/// When it does not within a minute of tokio's time.
pub async fn eventually(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !what() {
        assert!(Instant::now() < deadline, "it never came to be");
        sleep(Duration::from_millis(1)).await;
    }
}

fn lost_reply() -> StoreError {
    StoreError::new(StoreErrorKind::Unknown, "scripted loss of the reply")
}

#[async_trait]
impl Connection for FakeConnection {
    async fn load(&mut self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let mut distinct = keys.to_vec();
        distinct.sort_unstable();
        assert!(
            distinct.windows(2).all(|pair| pair[0] < pair[1]),
            "a key was loaded twice"
        );
        self.state.lock().loads.push(keys.to_vec());
        self.call(Call::Load, |state| {
            let mut bytes = 0;
            let within = |entry: &Option<Entry>| {
                let before = bytes;
                bytes += entry.as_ref().map_or(0, Entry::value_bytes);
                before <= LOAD_BYTES_MAX
            };
            let entries = keys.iter().map(|key| state.rows.get(key).map(|row| row.entry.clone()));
            Ok(entries.take_while(within).collect())
        })
        .await
    }

    async fn commit(&mut self, writes: &[Write]) -> Result<Vec<Committed>, StoreError> {
        assert!(
            writes.windows(2).all(|pair| pair[0].key < pair[1].key),
            "the writes of a commit are not sorted by distinct keys"
        );
        let (end, late) = self.begin(Call::Commit).await;
        let result = self.apply(writes, end);
        replied(late).await;
        self.in_call = false;
        result
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        self.call(Call::Probe, |_| Ok(())).await
    }

    async fn bury(&mut self, letter: &DeadLetter) -> Result<(), StoreError> {
        self.call(Call::Bury, |state| {
            let now = state.clock.now();
            state.dead_letters.bury(letter, now);
            Ok(())
        })
        .await
    }

    async fn letters(&mut self, range: LetterRange<'_>) -> Result<Vec<KeptLetter>, StoreError> {
        self.call(Call::Letters, |state| Ok(state.dead_letters.range(range)))
            .await
    }

    async fn last_letter(&mut self) -> Result<i64, StoreError> {
        self.call(Call::Letters, |state| Ok(state.dead_letters.last_id())).await
    }

    async fn drop_letters(&mut self, ids: &[i64]) -> Result<u64, StoreError> {
        self.call(Call::DropLetters, |state| Ok(state.dead_letters.drop_all(ids)))
            .await
    }

    async fn refuse_letter(
        &mut self,
        id: i64,
        code: Option<&str>,
        reason: &str,
    ) -> Result<Option<(u32, Timestamp)>, StoreError> {
        self.call(Call::RefuseLetter, |state| {
            let now = state.clock.now();
            Ok(state.dead_letters.refuse(id, code, reason, now))
        })
        .await
    }

    async fn ping(&mut self) -> Result<(), StoreError> {
        self.call(Call::Ping, |_| Ok(())).await
    }

    async fn lease_node(&mut self, claimant: &Claimant) -> Result<NodeGrant, StoreError> {
        self.call(Call::LeaseNode, |state| state.lease(claimant)).await
    }

    async fn renew_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<bool, StoreError> {
        self.call(Call::RenewNode, |state| {
            Ok(state.renew(claimant, node, high_water, Some(Instant::now())))
        })
        .await
    }

    async fn release_node(
        &mut self,
        claimant: &Claimant,
        node: u16,
        high_water: Option<Version>,
    ) -> Result<(), StoreError> {
        self.call(Call::ReleaseNode, |state| {
            state.renew(claimant, node, high_water, None);
            Ok(())
        })
        .await
    }

    async fn collect(&mut self, retention: Duration, rows_max: u32) -> Result<u64, StoreError> {
        self.call(Call::Collect, |state| Ok(state.collect(retention, rows_max)))
            .await
    }

    async fn control(&mut self) -> Result<Control, StoreError> {
        self.call(Call::Control, |state| Ok(state.control())).await
    }

    async fn move_epoch(&mut self, from: Epoch, to: Epoch, cache_server: Option<&str>) -> Result<bool, StoreError> {
        let cache_server = cache_server.map(str::to_owned);
        self.call(Call::MoveEpoch, |state| Ok(state.move_epoch(from, to, cache_server)))
            .await
    }

    async fn move_namespace_epoch(&mut self, namespace: &str, to: Epoch) -> Result<(), StoreError> {
        self.call(Call::MoveNamespaceEpoch, |state| {
            state.move_namespace_epoch(namespace.to_owned(), to);
            Ok(())
        })
        .await
    }

    async fn tagged(
        &mut self,
        namespace: &str,
        tag: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError> {
        let has_tag = |_: &Key, row: &Row| row.tags.iter().any(|own| own == tag);
        self.call(Call::Tagged, |state| Ok(state.keys(namespace, after, limit, has_tag)))
            .await
    }

    async fn keys_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Key>, StoreError> {
        let has_prefix = |key: &Key, _: &Row| key.key().starts_with(prefix);
        self.call(Call::KeysBelow, |state| {
            Ok(state.keys(namespace, after, limit, has_prefix))
        })
        .await
    }

    async fn newest(&mut self, namespace: &str, limit: u32) -> Result<Vec<Key>, StoreError> {
        self.call(Call::Newest, |state| Ok(state.newest(namespace, limit)))
            .await
    }

    async fn decide(&mut self, operations: &[Operation], now: Timestamp) -> Result<Vec<Decided>, StoreError> {
        assert!(
            operations.is_sorted_by(|a, b| (&a.key, a.version) <= (&b.key, b.version)),
            "the operations of a transaction are not sorted by key and version"
        );
        let sent = operations.iter().map(|one| (one.key.clone(), one.version)).collect();
        self.state.lock().decisions.push(sent);
        self.call(Call::Decide, |state| state.decide(operations, now)).await
    }

    async fn remember(&mut self, answers: &[KeyedAnswer]) -> Result<(), StoreError> {
        self.call(Call::Remember, |state| {
            state.remember(&of_answers(answers));
            Ok(())
        })
        .await
    }

    async fn answers(&mut self, requests: &[(&str, &RequestId)]) -> Result<Vec<Option<Answered>>, StoreError> {
        self.call(Call::Answers, |state| {
            let answer = |(namespace, id): &(&str, &RequestId)| state.answer_of(namespace, id);
            Ok(requests.iter().map(answer).collect())
        })
        .await
    }

    async fn forget_requests(&mut self, rows_max: u32) -> Result<u64, StoreError> {
        self.call(Call::ForgetRequests, |state| Ok(state.forget_requests(rows_max)))
            .await
    }

    async fn rows_below(
        &mut self,
        namespace: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<RangeRow>, StoreError> {
        let has_prefix = |key: &Key, _: &Row| key.key().starts_with(prefix);
        self.call(Call::RowsBelow, |state| {
            let keys = state.keys(namespace, after, limit, has_prefix);
            let row = |key: Key| {
                let Row { entry, tags, .. } = state.rows.get(&key)?;
                Some(RangeRow {
                    tags: tags.clone(),
                    version: entry.version,
                    expires_at: entry.expires_at,
                    value_bytes: entry.value.as_ref().map(bytes::Bytes::len),
                    key,
                })
            };
            Ok(keys.into_iter().filter_map(row).collect())
        })
        .await
    }

    async fn are_buried(&mut self, writes: &[(&Key, Version)]) -> Result<Vec<bool>, StoreError> {
        self.call(Call::AreBuried, |state| {
            let is_buried = |(key, version): &(&Key, Version)| state.dead_letters.has(key, *version);
            Ok(writes.iter().map(is_buried).collect())
        })
        .await
    }

    fn reset(&mut self) {
        self.in_call = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(namespace: &str, name: &str, number: i64, tags: &[&str]) -> Write {
        Write {
            key: Key::new(namespace, name).expect("valid"),
            entry: Entry {
                version: Version::new(number).expect("positive"),
                value: (number != 4).then(|| "v".into()),
                expires_at: (number == 3).then_some(Timestamp(1)),
            },
            tags: Tags::new(tags).expect("valid"),
            requests: Vec::new(),
        }
    }

    fn names(keys: &[Key]) -> Vec<&str> {
        keys.iter().map(Key::key).collect()
    }

    /// Their contract, in short: the real backends prove it at length.
    #[tokio::test]
    async fn keys_are_found_as_in_the_real_stores() {
        let fake = FakeBackend::new();
        for (namespace, name, number, tags) in [
            ("orders", "b", 1, &["red"][..]),
            ("orders", "a", 2, &["red", "blue"]),
            ("orders", "expired", 3, &["red"]),
            ("orders", "deleted", 4, &[]),
            ("orders", "bb", 5, &[]),
            ("carts", "a", 6, &["red"]),
        ] {
            fake.put(write(namespace, name, number, tags));
        }
        let mut session = fake.store().session();
        let tagged = session.tagged("orders", "red", Some("a"), 9).await.expect("found");
        assert_eq!(names(&tagged), ["b", "expired"]);
        let below = session.keys_below("orders", "", None, 3).await.expect("found");
        assert_eq!(names(&below), ["a", "b", "bb"]);
        let below = session.keys_below("orders", "b", None, 9).await.expect("found");
        assert_eq!(names(&below), ["b", "bb"]);
        let newest = session.newest("orders", 2).await.expect("found");
        assert_eq!(names(&newest), ["bb", "a"]);
    }

    #[tokio::test]
    async fn epochs_move_as_in_the_real_stores() {
        let fake = FakeBackend::new();
        let mut session = fake.store().session();
        session.move_namespace_epoch("orders", Epoch(5)).await.expect("moved");
        assert!(
            !session
                .move_epoch(Epoch(9), Epoch(2), Some("a"))
                .await
                .expect("answers")
        );
        let control = session.control().await.expect("read");
        assert_eq!(
            (control.epoch, control.cache_server, control.namespaces.len()),
            (Epoch(1), None, 1)
        );
        assert!(
            session
                .move_epoch(Epoch(1), Epoch(2), Some("a"))
                .await
                .expect("answers")
        );
        assert!(session.move_epoch(Epoch(2), Epoch(3), None).await.expect("answers"));
        let control = session.control().await.expect("read");
        assert_eq!((control.epoch, control.namespaces.len()), (Epoch(3), 0));
        assert_eq!(control.cache_server.as_deref(), Some("a"));
    }
}
