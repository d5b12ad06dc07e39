//! The lease of a node id: what makes two gateways' versions differ.
//!
//! Owns the lease from start to shutdown, and the [`Clock`]'s rights: to stamp, and to be moved by what it observes; both are extended at each
//! renewal. Does not own the claimant's marks (kept with the data directory), the file in which the lease is saved ([`LeaseFile`]) nor the leases' table
//! (the backends). Invariants: the clock may stamp for at most [`STAMP_LEASE`] after the last renewal that the store confirmed, counted from
//! before it was asked, in this process and in those that go on from the saved lease, which is long before the store lets anybody else have
//! the id; the clock is moved only up to what the next process of the node will know of, whichever of the two it asks; after
//! the final high-water mark is reported nothing is stamped.

mod saved;

use std::{io, sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

pub use self::saved::{LeaseFile, SavedLease};

use crate::{
    backoff::Backoff,
    clock::{Clock, wall_time},
    error::{Error, ErrorKind},
    model::{Timestamp, Version},
    store::{Claimant, NODE_LEASE, Session, Store, StoreError, StoreErrorKind},
};

/// How long the clock may stamp after a renewal.
pub const STAMP_LEASE: Duration = Duration::from_secs(12 * 3600);

// The half of the store's lease that is left pays for clocks that run at different rates or are set back, and for a process that was stopped.
const _: () = assert!(STAMP_LEASE.as_secs() * 2 <= NODE_LEASE.as_secs());

/// Between two renewals: how far the reported high-water mark can lag.
const RENEW_INTERVAL: Duration = Duration::from_secs(10);
/// Between two tries to take the lease from a store that was away when this process started, or to renew it after a failure.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// From a wish for a reservation to the renewal that brings it.
const RESERVE_PAUSE: Duration = Duration::from_millis(10);
/// Tries to give the lease back. A lease that is not given back is kept for this data directory, so no more than a courtesy.
const RELEASE_TRIES_MAX: u32 = 3;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// A node id that is this process's own.
pub struct NodeLease {
    store: Store,
    session: Session,
    claimant: Claimant,
    node: u16,
    /// At or above what earlier processes may have stamped with the node.
    floor: Option<Version>,
    /// Whether the store gave the lease to this start; otherwise it is that of an earlier one, as saved.
    taken: bool,
    /// When the store last confirmed it, by the wall clock before it was asked.
    confirmed_at: Option<Timestamp>,
    /// Where the store lies elsewhere and may be away at a start.
    file: Option<LeaseFile>,
    /// Whether the last try to save it failed.
    unsaved: bool,
}

impl NodeLease {
    /// Leases a node id, trying again until the deadline while the store does not answer.
    ///
    /// # Errors
    /// `Unavailable`: every id is leased, or the store did not answer until the deadline.
    pub async fn take(
        store: &Store,
        claimant: Claimant,
        file: Option<LeaseFile>,
        deadline: Instant,
    ) -> Result<NodeLease, Error> {
        let mut session = store.session();
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        loop {
            let error = match session.lease_node(&claimant).await {
                Ok(grant) => {
                    let saved = file.as_ref().and_then(LeaseFile::found);
                    let reserved_here = saved
                        .filter(|saved| saved.node == grant.node)
                        .map(|saved| saved.reserved);
                    return Ok(NodeLease {
                        store: store.clone(),
                        session,
                        claimant,
                        node: grant.node,
                        floor: grant.high_water.max(reserved_here),
                        taken: true,
                        confirmed_at: None,
                        file,
                        unsaved: false,
                    });
                }
                Err(error) => error,
            };
            if error.kind == StoreErrorKind::Rejected {
                let message = "no node id is free: as many gateways as there can be have used this store within a day";
                return Err(Error::new(ErrorKind::Unavailable, message).because(error));
            }
            let again = Instant::now() + backoff.delay();
            if again >= deadline {
                let message = "the store did not lease a node id in time";
                return Err(Error::new(ErrorKind::Unavailable, message).because(error));
            }
            tracing::info!(%error, "the store does not lease a node id yet; trying again");
            sleep_until(again).await;
        }
    }

    /// Goes on with the lease that an earlier process on the same data directory saved, until the store can be asked for it.
    ///
    /// # Errors
    /// `Unavailable`: none is saved on which stamps may rest now.
    pub fn resume(store: &Store, claimant: Claimant, file: Option<LeaseFile>) -> Result<NodeLease, Error> {
        let saved = file.as_ref().and_then(LeaseFile::found);
        let Some(saved) = saved.filter(|saved| saved.is_usable(wall_time())) else {
            let message = "no lease of a node id is saved that still lasts, and the store is not there to give one";
            return Err(Error::new(ErrorKind::Unavailable, message));
        };
        Ok(NodeLease {
            store: store.clone(),
            session: store.session(),
            claimant,
            node: saved.node,
            floor: Some(saved.reserved),
            taken: false,
            confirmed_at: saved.confirmed_at,
            file,
            unsaved: false,
        })
    }

    /// The node's clock, above all that earlier processes may have stamped with it, and above `stamped`, what they are known to have stamped.
    /// It must not stamp before [`NodeLease::reserve`].
    pub fn clock(&self, stamped: Option<Version>) -> Clock {
        Clock::new(self.node, self.floor.max(stamped))
    }

    /// Reserves versions for a new clock, and lets it stamp for as long as the lease lasts; tries again until the deadline.
    ///
    /// # Errors
    /// `Unavailable`: the store did not answer until the deadline, the lease is lost already, or a saved lease cannot be saved anew.
    pub async fn reserve(&mut self, clock: &Clock, deadline: Instant) -> Result<(), Error> {
        if !self.taken {
            let confirmed_at = self.confirmed_at.unwrap_or(Timestamp(0));
            clock.lease_until(confirmed_at.after(STAMP_LEASE));
            let reserved = self.reserve_here(clock).await;
            return reserved.map_err(|error| {
                let message = "the data directory does not take the reservation of versions, and the store is not there to take it";
                Error::new(ErrorKind::Unavailable, message).because(error)
            });
        }
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        loop {
            match self.renew(clock).await {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(Error::new(ErrorKind::Unavailable, "another process took the node id")),
                Err(error) if Instant::now() >= deadline => {
                    let message = "the store did not take the clock's reservation in time";
                    return Err(Error::new(ErrorKind::Unavailable, message).because(error));
                }
                Err(_) => sleep(backoff.delay()).await,
            }
        }
    }

    /// Starts keeping the lease, on the current runtime, and lets `clock` stamp for as long as it lasts. When `stop` is cancelled, which
    /// must be after the last write was stamped, the lease is given back with the final high-water mark. A task that ends before has
    /// lost the lease: the clock stamps no more, and the gateway should be restarted.
    #[must_use = "a task that ends before it was told to has lost the lease"]
    pub fn start(self, clock: Arc<Clock>, stop: &CancellationToken) -> JoinHandle<()> {
        tokio::spawn(self.keep(clock, stop.clone()))
    }

    async fn keep(mut self, clock: Arc<Clock>, stop: CancellationToken) {
        // A start without the store has said so.
        let mut failing = !self.taken;
        let mut reserved_at = Instant::now();
        loop {
            let interval = self.interval(failing);
            let due = async {
                tokio::select! {
                    () = sleep(interval) => {}
                    // Not one renewal for each of many that are observed in a row.
                    () = clock.reservation_wanted() => sleep(RESERVE_PAUSE).await,
                }
            };
            if stop.run_until_cancelled(due).await.is_none() {
                break;
            }
            // Not cut off by the stop: the session is needed for the release, and the call is bounded.
            match self.renew(&clock).await {
                Ok(true) => {
                    if failing {
                        tracing::info!(node = self.node, "the lease of the node id is renewed again");
                    }
                    failing = false;
                }
                Ok(false) => return self.lost(&clock).await,
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, node = self.node, "the lease of the node id is not renewed; trying on");
                    }
                    failing = true;
                    if reserved_at.elapsed() >= RENEW_INTERVAL {
                        reserved_at = Instant::now();
                        // A failure has been said; the clock is then moved by nothing but time.
                        let _ = self.reserve_here(&clock).await;
                    }
                }
            }
        }
        clock.lease_until(clock.now());
        self.give_back(&clock).await;
    }

    fn interval(&self, failing: bool) -> Duration {
        if self.taken && !failing {
            RENEW_INTERVAL
        } else {
            RETRY_INTERVAL
        }
    }

    /// Renews the lease, with what the clock may be moved to until the next time. Whether the lease is this process's.
    async fn renew(&mut self, clock: &Clock) -> Result<bool, StoreError> {
        if !self.taken {
            match self.session.lease_node(&self.claimant).await {
                Ok(grant) => self.taken = grant.node == self.node,
                Err(error) if error.kind == StoreErrorKind::Rejected => {}
                Err(error) => return Err(error),
            }
            if !self.taken {
                return Ok(false);
            }
        }
        let (asked, asked_at) = (clock.now(), wall_time());
        let reservation = clock.reservation();
        let renewed = self
            .session
            .renew_node(&self.claimant, self.node, Some(reservation))
            .await?;
        if renewed {
            clock.lease_until(asked.after(STAMP_LEASE));
            self.confirmed_at = Some(asked_at);
            if self.known_here(reservation).await {
                clock.reserve(reservation);
            }
        }
        Ok(renewed)
    }

    /// Makes a reservation that the store took known to a later start without the store, or makes such a start impossible.
    async fn known_here(&mut self, reservation: Version) -> bool {
        if self.save(self.confirmed_at, reservation).await.is_ok() {
            return true;
        }
        match &self.file {
            Some(file) => file.remove().await.is_ok(),
            None => true,
        }
    }

    /// Reserves versions with the data directory alone, which is enough for the processes to come on it: as long as the lease lasts there
    /// are no others of this node.
    async fn reserve_here(&mut self, clock: &Clock) -> io::Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let reservation = clock.reservation();
        self.save(self.confirmed_at, reservation).await?;
        clock.reserve(reservation);
        Ok(())
    }

    /// Saves the lease, where there is a file.
    async fn save(&mut self, confirmed_at: Option<Timestamp>, reserved: Version) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let lease = SavedLease {
            node: self.node,
            confirmed_at,
            reserved,
        };
        let saved = file.save(lease).await;
        if let Err(error) = &saved
            && !self.unsaved
        {
            tracing::warn!(
                %error,
                "the lease of the node id cannot be saved in the data directory: a start without the store is not possible until it can"
            );
        }
        self.unsaved = saved.is_err();
        saved
    }

    /// The store has it for somebody else.
    async fn lost(mut self, clock: &Clock) {
        clock.lease_until(clock.now());
        tracing::error!(
            node = self.node,
            "another process has this gateway's node id, by its data directory or after a day without renewal, or the store is not the one \
             that leased it: no more writes are taken; give each gateway a data directory and a store of its own and restart"
        );
        self.forget(clock).await;
    }

    /// Ends what a later start could do with the lease, and keeps what it must not stamp again. Whether that is certain.
    async fn forget(&mut self, clock: &Clock) -> bool {
        match clock.high_water() {
            Some(last) => self.save(None, last).await.is_ok(),
            None => true,
        }
    }

    /// Gives the lease back, or leaves it to this data directory where that cannot be done.
    async fn give_back(mut self, clock: &Clock) {
        if !self.taken || self.store.breaker().is_open() {
            tracing::info!(
                node = self.node,
                "the store is not there to take the node id back; it stays with this data directory"
            );
            return;
        }
        // Before the store is asked: from then on somebody else may have the node.
        if !self.forget(clock).await {
            return;
        }
        let Err(error) = self.release(clock.high_water()).await else {
            return;
        };
        tracing::warn!(%error, node = self.node, "the node id is not given back; it stays with this data directory");
        if let (Some(last), false) = (clock.high_water(), error.kind == StoreErrorKind::Unknown) {
            // It is held for certain. A failure to save that is said where it happens.
            let _ = self.save(self.confirmed_at, last).await;
        }
    }

    /// An error of the kind `Unknown` leaves open whether it is given back, any other does not.
    async fn release(&mut self, high_water: Option<Version>) -> Result<(), StoreError> {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        let mut tries = 0;
        loop {
            tries += 1;
            let released = self.session.release_node(&self.claimant, self.node, high_water);
            match released.await {
                Err(error) if tries < RELEASE_TRIES_MAX && error.kind == StoreErrorKind::Transient => {
                    tracing::debug!(%error, "giving back the node id failed; trying again");
                    sleep(backoff.delay()).await;
                }
                result => return result,
            }
        }
    }
}

#[cfg(test)]
mod tests;
