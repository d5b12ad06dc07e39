//! How a start gets its store and its clock, also where the store cannot be reached.
//!
//! Owns how long the store is waited for, and whether the start may go on without. Does not own what makes a store fit for use (the backends)
//! nor what a lease allows (`store::node`). Invariants: a store that refuses ends the start, whatever is saved; without a store it goes on
//! only with a lease of this store that an earlier process on this data directory saved.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::{StartError, Tasks};
use crate::{
    backoff::Backoff,
    clock::{Clock, wall_time},
    config::{Config, Url},
    data_dir::{DataDir, random_mark},
    model::Version,
    store::{
        Backend, Claimant, Store, StoreError, StoreErrorKind,
        breaker::Breaker,
        node::{LeaseFile, NodeLease, SavedLease},
        postgres::{Postgres, Tables},
        sqlite::Sqlite,
    },
};

/// Between two tries to reach a store that does not answer yet.
const CONNECT_RETRY_MIN: Duration = Duration::from_millis(100);
const CONNECT_RETRY_MAX: Duration = Duration::from_secs(2);

/// How long a start that can go on without the store waits for it, give or take the try that runs.
const OFFLINE_WAIT: Duration = Duration::from_secs(2);

/// A store, ready for use or on its way.
pub(super) struct Opened {
    /// As the rest of the gateway has it.
    pub(super) store: Store,
    /// Where the lease of a node id of it is saved.
    lease_file: Option<LeaseFile>,
    /// Whether the start goes on without it.
    offline: bool,
}

/// The store, with its tables up to date: waits for one that does not answer yet, unless the start can go on without it.
///
/// # Errors
/// [`StartError::Store`]: it refuses, or does not answer in time.
pub(super) async fn open(config: &Config, data_dir: &DataDir) -> Result<Opened, StartError> {
    let url = config.store_url();
    let (connect_wait, call_timeout) = (config.store.connect_wait, config.store.call_timeout);
    let store = |backend: Arc<dyn Backend>| Store::new(backend, Arc::new(Breaker::default()), call_timeout);
    let failed = |source| StartError::Store {
        url: url.clone(),
        source,
    };
    if url.reveal().starts_with("sqlite:") {
        let opening = until_open(&url, |_| connect_wait, || Sqlite::open(url.reveal(), call_timeout));
        return Ok(Opened {
            store: store(Arc::new(opening.await.map_err(failed)?)),
            lease_file: None,
            offline: false,
        });
    }
    let tables = if config.store.migrate {
        Tables::Migrate
    } else {
        Tables::Check
    };
    let postgres = Postgres::new(url.reveal(), call_timeout, tables).map_err(failed)?;
    let lease_file = LeaseFile::open(data_dir.lease_path(), data_dir.identity(), &postgres.identity());
    let saved = lease_file.found().filter(|saved| saved.is_usable(wall_time()));
    let is_away = |kind| matches!(kind, StoreErrorKind::Unreachable | StoreErrorKind::Unknown);
    let patience = |kind| match saved {
        Some(_) if is_away(kind) => connect_wait.min(OFFLINE_WAIT),
        _ => connect_wait,
    };
    let prepared = until_open(&url, patience, || postgres.prepare()).await;
    let mut opened = Opened {
        store: store(Arc::new(postgres)),
        lease_file: Some(lease_file),
        offline: false,
    };
    match (prepared, saved) {
        (Ok(()), _) => {}
        (Err(error), Some(saved)) if is_away(error.kind) => {
            say_offline(&url, &error, saved);
            opened.store.breaker().failed(StoreErrorKind::Unreachable);
            opened.offline = true;
        }
        (Err(error), _) => return Err(failed(error)),
    }
    Ok(opened)
}

impl Opened {
    /// A clock for as long as this process has a node id, above what earlier ones are known to have stamped.
    ///
    /// # Errors
    /// [`StartError::Node`]: there is no lease to be had.
    pub(super) async fn lease(
        self,
        config: &Config,
        data_dir: &DataDir,
        stamped: Option<Version>,
        tasks: &mut Tasks,
    ) -> Result<Arc<Clock>, StartError> {
        let claimant = Claimant {
            directory: data_dir.mark().to_owned(),
            start: random_mark(),
        };
        let deadline = Instant::now() + config.store.connect_wait;
        let lease = if self.offline {
            NodeLease::resume(&self.store, claimant, self.lease_file)
        } else {
            NodeLease::take(&self.store, claimant, self.lease_file, deadline).await
        };
        let mut lease = lease.map_err(StartError::Node)?;
        let clock = Arc::new(lease.clock(stamped));
        lease.reserve(&clock, deadline).await.map_err(StartError::Node)?;
        tasks.add([lease.start(Arc::clone(&clock), &tasks.stop)]);
        Ok(clock)
    }
}

/// Tries until it succeeds, is refused, or has taken longer than a failure of this kind is borne.
async fn until_open<T>(
    url: &Url,
    patience: impl Fn(StoreErrorKind) -> Duration,
    mut open: impl AsyncFnMut() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let begun = Instant::now();
    let mut backoff = Backoff::new(CONNECT_RETRY_MIN, CONNECT_RETRY_MAX);
    let mut said = String::new();
    loop {
        let error = match open().await {
            Ok(opened) => return Ok(opened),
            Err(error) => error,
        };
        let again = Instant::now() + backoff.delay();
        if error.kind == StoreErrorKind::Rejected || again >= begun + patience(error.kind) {
            return Err(error);
        }
        // Once for each reason, not for each try.
        let reason = error.to_string();
        if reason != said {
            tracing::warn!(reason, store = %url, "waiting for the store");
            said = reason;
        }
        sleep_until(again).await;
    }
}

fn say_offline(url: &Url, error: &StoreError, saved: SavedLease) {
    let confirmed_before = saved.confirmed_at.map_or(Duration::ZERO, |at| wall_time().since(at));
    tracing::warn!(
        reason = %error,
        store = %url,
        node = saved.node,
        lease_confirmed_seconds_ago = confirmed_before.as_secs(),
        "starting without the store, on the lease that it last confirmed: what the caches lack and what must be written through has to wait \
         for it"
    );
}
