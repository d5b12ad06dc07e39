//! The lease of a node id: what makes two gateways' versions differ.
//!
//! Owns the lease from start to shutdown, and the [`Clock`]'s right to stamp, which it extends at each renewal. Does not own the marks of
//! the claimant (kept with the data directory) nor the leases' table (the backends). Invariants: the clock may stamp for at most
//! [`STAMP_LEASE`] after the last renewal that the store confirmed, counted from before it was asked, which is long before the store
//! lets anybody else have the id; after the final high-water mark is reported nothing is stamped.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    clock::Clock,
    error::{Error, ErrorKind},
    store::{Claimant, NODE_LEASE, NodeGrant, Session, Store, StoreError, StoreErrorKind},
};

/// How long the clock may stamp after a renewal.
pub const STAMP_LEASE: Duration = Duration::from_secs(12 * 3600);

// The half of the store's lease that is left pays for clocks that run at different rates, and for a process that was stopped.
const _: () = assert!(STAMP_LEASE.as_secs() * 2 <= NODE_LEASE.as_secs());

/// Between two renewals: how far the reported high-water mark can lag.
const RENEW_INTERVAL: Duration = Duration::from_secs(10);
/// Tries to give the lease back. A lease that is not given back is kept for this data directory, so no more than a courtesy.
const RELEASE_TRIES_MAX: u32 = 3;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// A node id that is this process's own.
pub struct NodeLease {
    session: Session,
    claimant: Claimant,
    grant: NodeGrant,
    /// When it was last confirmed: the time before the store was asked.
    confirmed: Instant,
}

impl NodeLease {
    /// Leases a node id, trying again until the deadline while the store does not answer.
    ///
    /// # Errors
    /// `Unavailable`: every id is leased, or the store did not answer until the deadline.
    pub async fn take(store: &Store, claimant: Claimant, deadline: Instant) -> Result<NodeLease, Error> {
        let mut session = store.session();
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        loop {
            let confirmed = Instant::now();
            let error = match session.lease_node(&claimant).await {
                Ok(grant) => {
                    return Ok(NodeLease {
                        session,
                        claimant,
                        grant,
                        confirmed,
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

    /// The node, and the version that its clock must start above.
    pub fn grant(&self) -> NodeGrant {
        self.grant
    }

    /// Reserves versions for a new clock, so that it may begin to stamp; tries again until the deadline.
    ///
    /// # Errors
    /// `Unavailable`: the store did not answer until the deadline, or the lease is lost already.
    pub async fn reserve(&mut self, clock: &Clock, deadline: Instant) -> Result<(), Error> {
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

    /// Renews the lease, with what the clock may stamp until the next time. Whether the lease is still this process's.
    async fn renew(&mut self, clock: &Clock) -> Result<bool, StoreError> {
        let asked = Instant::now();
        let reservation = clock.reservation();
        let renewed = self
            .session
            .renew_node(&self.claimant, self.grant.node, Some(reservation))
            .await?;
        if renewed {
            clock.reserve(reservation);
            self.confirmed = asked;
        }
        Ok(renewed)
    }

    /// Starts keeping the lease, on the current runtime, and lets `clock` stamp for as long as it lasts. When `stop` is cancelled, which
    /// must be after the last write was stamped, the lease is given back with the final high-water mark. A task that ends before has
    /// lost the lease: the clock stamps no more, and the gateway should be restarted.
    #[must_use = "a task that ends before it was told to has lost the lease"]
    pub fn start(self, clock: Arc<Clock>, stop: &CancellationToken) -> JoinHandle<()> {
        allow_stamps(&clock, self.confirmed);
        tokio::spawn(self.keep(clock, stop.clone()))
    }

    async fn keep(mut self, clock: Arc<Clock>, stop: CancellationToken) {
        let mut failing = false;
        while stop.run_until_cancelled(sleep(RENEW_INTERVAL)).await.is_some() {
            // Not cut off by the stop: the session is needed for the release, and the call is bounded.
            match self.renew(&clock).await {
                Ok(true) => {
                    failing = false;
                    allow_stamps(&clock, self.confirmed);
                }
                Ok(false) => {
                    clock.lease_until(clock.now());
                    tracing::error!(
                        node = self.grant.node,
                        "another process has this gateway's node id, by its data directory or after a day without renewal: no more \
                         writes are taken; give each gateway a data directory of its own and restart"
                    );
                    return;
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, node = self.grant.node, "the lease of the node id is not renewed; trying on");
                    }
                    failing = true;
                }
            }
        }
        clock.lease_until(clock.now());
        if let Err(error) = self.release(&clock).await {
            tracing::warn!(%error, node = self.grant.node, "the node id is not given back; it stays with this data directory");
        }
    }

    async fn release(&mut self, clock: &Clock) -> Result<(), StoreError> {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        let mut tries = 0;
        loop {
            tries += 1;
            let released = self
                .session
                .release_node(&self.claimant, self.grant.node, clock.high_water());
            match released.await {
                Err(error) if tries < RELEASE_TRIES_MAX && error.kind != StoreErrorKind::Unreachable => {
                    tracing::debug!(%error, "giving back the node id failed; trying again");
                    sleep(backoff.delay()).await;
                }
                result => return result,
            }
        }
    }
}

/// Lets the clock stamp for [`STAMP_LEASE`] after `confirmed`.
fn allow_stamps(clock: &Clock, confirmed: Instant) {
    clock.lease_until(clock.now().after(STAMP_LEASE.saturating_sub(confirmed.elapsed())));
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::store::fake::{Call, FakeBackend, Fault, eventually};

    fn claimant(directory: &str, start: &str) -> Claimant {
        Claimant {
            directory: directory.to_owned(),
            start: start.to_owned(),
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    async fn taken(fake: &FakeBackend, who: Claimant) -> (Arc<Clock>, CancellationToken, JoinHandle<()>) {
        let lease = NodeLease::take(&fake.store(), who, soon()).await.expect("a free id");
        let clock = Arc::new(Clock::new(lease.grant().node, lease.grant().high_water));
        let stop = CancellationToken::new();
        let task = lease.start(Arc::clone(&clock), &stop);
        (clock, stop, task)
    }

    #[tokio::test(start_paused = true)]
    async fn the_start_waits_for_the_store_and_a_restart_gets_its_node_and_mark_back() {
        let fake = FakeBackend::new();
        fake.inject(Call::LeaseNode, Fault::fail(StoreErrorKind::Unreachable));
        fake.inject(Call::LeaseNode, Fault::lose_reply());
        let (clock, stop, task) = taken(&fake, claimant("a", "1")).await;
        let (other, ..) = taken(&fake, claimant("b", "1")).await;
        assert_ne!(clock.node(), other.node());

        let last = clock.stamp(None).expect("leased");
        stop.cancel();
        task.await.expect("no panic");
        assert!(clock.stamp(None).is_err(), "nothing is stamped after the final mark");
        assert_eq!(fake.node_high_water(clock.node()), Some(last));
        assert!(!fake.node_is_leased(clock.node()));

        let again = NodeLease::take(&fake.store(), claimant("a", "2"), soon())
            .await
            .expect("its own id");
        assert_eq!(again.grant().node, clock.node());
        assert_eq!(again.grant().high_water, Some(last));
    }

    #[tokio::test(start_paused = true)]
    async fn the_start_fails_when_no_id_is_free_and_when_the_store_stays_away() {
        let fake = FakeBackend::new();
        fake.set_nodes_max(1);
        let begun = Instant::now();
        let (_clock, ..) = taken(&fake, claimant("a", "1")).await;
        let refused = NodeLease::take(&fake.store(), claimant("b", "1"), soon()).await;
        assert!(refused.is_err_and(|error| error.message().contains("no node id is free")));
        assert_eq!(begun.elapsed(), Duration::ZERO, "waiting would not help");

        fake.down(true);
        let refused = NodeLease::take(&fake.store(), claimant("b", "1"), soon()).await;
        assert!(refused.is_err_and(|error| error.kind() == ErrorKind::Unavailable));
        assert!(begun.elapsed() > Duration::from_secs(25) && begun.elapsed() <= Duration::from_secs(30));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_another_start_took_ends_stamping() {
        let fake = FakeBackend::new();
        let (clock, _stop, task) = taken(&fake, claimant("a", "1")).await;
        let (copy, ..) = taken(&fake, claimant("a", "2")).await;
        assert_eq!(copy.node(), clock.node());
        task.await.expect("no panic");
        assert!(clock.stamp(None).is_err());
        assert!(copy.stamp(None).is_ok(), "the later start keeps it");
        assert!(fake.node_is_leased(copy.node()));
    }

    #[tokio::test(start_paused = true)]
    async fn without_renewal_stamping_ends_after_twelve_hours_and_resumes_with_it() {
        let fake = FakeBackend::new();
        let (clock, ..) = taken(&fake, claimant("a", "1")).await;
        eventually(|| fake.calls(Call::RenewNode) > 0).await;
        fake.down(true);
        advance(STAMP_LEASE - Duration::from_secs(60)).await;
        assert!(clock.stamp(None).is_ok());
        advance(Duration::from_secs(70)).await;
        assert!(clock.stamp(None).is_err());

        fake.down(false);
        eventually(|| clock.stamp(None).is_ok()).await;
        let reported = fake.node_high_water(clock.node());
        assert!(
            reported > clock.high_water(),
            "what it may stamp until the next renewal"
        );
    }
}
