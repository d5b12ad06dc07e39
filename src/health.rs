//! Health: what orchestrators are told, by gRPC and by HTTP.
//!
//! Owns the meaning of healthy. The gateway itself (`""` and `tidegate.v1.Gateway`) is serving unless it is shutting down, cannot
//! stamp versions, or has a journal that failed, which only a restart mends: a dead store must not take every replica out of rotation
//! while caches and write-behind can serve, nor must a full disk, for reads and write-through go on. What it depends on has names of its
//! own, `tidegate.store`, `tidegate.cache` and `tidegate.journal`; so has the clock, `tidegate.clock`: where it and the store's are too far apart
//! writes are refused, and reads go on, on every replica if it is the store's that is wrong. That L1 is off because others are not heard is
//! said by `/readyz` alone. Does not own the probing: the store's breaker, the Redis link, the journal and the clock know.

use std::{
    borrow::Cow,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Mutex, time::sleep};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    clock::{Clock, ClockOffset},
    gateway::{Gateway, JournalState},
    store::Store,
};

/// The gateway's own services, as health checks name them.
const OWN_SERVICES: [&str; 2] = ["", "tidegate.v1.Gateway"];
const STORE_SERVICE: &str = "tidegate.store";
const CACHE_SERVICE: &str = "tidegate.cache";
const JOURNAL_SERVICE: &str = "tidegate.journal";
const CLOCK_SERVICE: &str = "tidegate.clock";

/// How many paused namespaces are told by name.
const PAUSED_TOLD_MAX: usize = 10;

/// How long a change may take to show.
const INTERVAL: Duration = Duration::from_millis(200);

/// The state of the gateway and of what it depends on.
#[derive(Clone)]
pub struct Health {
    store: Store,
    /// The background runtime's, for its connection to Redis.
    background: Gateway,
    clock: Arc<Clock>,
    stopping: Arc<AtomicBool>,
    reporter: HealthReporter,
    /// What the reporter was told last. Held from looking to telling, so that what is told last is what was seen last.
    reported: Arc<Mutex<Vec<(&'static str, bool)>>>,
}

/// What `/readyz` says.
#[derive(Debug, Clone)]
pub struct Readiness {
    /// Whether calls should be sent here.
    pub ready: bool,
    store: bool,
    cache: Option<bool>,
    invalidation: Option<bool>,
    journal: JournalState,
    clock: ClockOffset,
    /// The namespaces whose drain is paused.
    paused: Vec<String>,
}

impl Readiness {
    /// Each service that a health check can name, and whether it is serving.
    fn services(&self) -> Vec<(&'static str, bool)> {
        let parts = [
            (STORE_SERVICE, self.store),
            (JOURNAL_SERVICE, self.journal == JournalState::Up),
            (CLOCK_SERVICE, !self.clock.is_off()),
        ];
        let own = OWN_SERVICES.map(|service| (service, self.ready));
        let cache = self.cache.map(|up| (CACHE_SERVICE, up));
        own.into_iter().chain(parts).chain(cache).collect()
    }
}

/// The state of one of the gateway's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartState {
    /// Which, as `/readyz` names it.
    pub part: &'static str,
    /// How it is, in a word or a few.
    pub state: Cow<'static, str>,
    /// Whether that is as it should be: what is not configured is.
    pub good: bool,
}

impl Readiness {
    /// The state of each part.
    pub fn parts(&self) -> [PartState; 5] {
        let word = |up: bool| if up { "up" } else { "down" };
        let journal = match self.journal {
            JournalState::Up => "up",
            JournalState::Full => "full",
            JournalState::DiskFull => "disk full",
            JournalState::Failed => "failed",
        };
        let clock = if self.clock.is_off() {
            format!("{} the store", self.clock).into()
        } else {
            "ok".into()
        };
        let said = |part, state: &'static str, good| PartState {
            part,
            state: state.into(),
            good,
        };
        let optional = |part, up: Option<bool>| said(part, up.map_or("none", word), up.unwrap_or(true));
        [
            said("store", word(self.store), self.store),
            optional("cache", self.cache),
            optional("invalidation", self.invalidation),
            said("journal", journal, self.journal == JournalState::Up),
            PartState {
                part: "clock",
                state: clock,
                good: !self.clock.is_off(),
            },
        ]
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", if self.ready { "ready" } else { "not ready" })?;
        let mut parts = self.parts().into_iter();
        parts.try_for_each(|PartState { part, state, .. }| writeln!(f, "{part}: {state}"))?;
        // Said only where it is so: what a pause holds back is no fault of the gateway.
        match self.paused.len() {
            0 => Ok(()),
            count @ 1..=PAUSED_TOLD_MAX => writeln!(f, "paused: {count} ({})", self.paused.join(", ")),
            count => writeln!(f, "paused: {count} ({}, …)", self.paused[..PAUSED_TOLD_MAX].join(", ")),
        }
    }
}

impl Health {
    /// Health of a gateway over a store.
    pub fn new(store: Store, background: Gateway, clock: Arc<Clock>) -> Health {
        Health {
            store,
            background,
            clock,
            stopping: Arc::new(AtomicBool::new(false)),
            reporter: HealthReporter::new(),
            reported: Arc::default(),
        }
    }

    /// Where the gRPC health service gets its answers.
    pub fn reporter(&self) -> &HealthReporter {
        &self.reporter
    }

    /// The state now.
    pub fn readiness(&self) -> Readiness {
        let journal = self.background.journal_state();
        let stopping = self.stopping.load(Ordering::Relaxed);
        Readiness {
            ready: !stopping && self.clock.is_leased() && journal != JournalState::Failed,
            store: !self.store.breaker().is_open(),
            cache: self.background.redis_is_up(),
            invalidation: self.background.invalidation_is_up(),
            journal,
            clock: self.clock.offset(),
            paused: self.background.paused().into_keys().collect(),
        }
    }

    /// Says for good that the gateway is going: at once, and to those who watch.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.report().await;
    }

    /// Keeps the gRPC health service current, for ever.
    pub async fn keep(self) {
        loop {
            self.report().await;
            sleep(INTERVAL).await;
        }
    }

    /// Tells the reporter what has changed: it passes on to those who watch whatever it is told.
    pub async fn report(&self) {
        let mut reported = self.reported.lock().await;
        let services = self.readiness().services();
        if *reported == services {
            return;
        }
        for (service, up) in &services {
            self.reporter.set_service_status(*service, status(*up)).await;
        }
        *reported = services;
    }
}

fn status(serving: bool) -> ServingStatus {
    if serving {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    }
}

#[cfg(test)]
mod tests {
    use tonic::Request;
    use tonic_health::{
        pb::{HealthCheckRequest, health_check_response::ServingStatus as Wire, health_server::Health as _},
        server::HealthService,
    };

    use super::*;
    use crate::{
        gateway::tests::{Rig, rig},
        store::StoreErrorKind,
    };

    fn health(rig: &Rig) -> Health {
        Health::new(rig.store.clone(), rig.gateway.clone(), Arc::clone(rig.clock()))
    }

    /// What a health check is answered; `None`: the service is not known.
    async fn told(health: &Health, service: &str) -> Option<Wire> {
        health.report().await;
        let request = Request::new(HealthCheckRequest {
            service: service.to_owned(),
        });
        let service = HealthService::from_health_reporter(health.reporter().clone());
        let answer = service.check(request).await;
        answer.ok().map(|answer| answer.into_inner().status())
    }

    #[tokio::test(start_paused = true)]
    async fn a_gateway_whose_lease_has_lapsed_is_not_serving_until_it_is_renewed() {
        let rig = rig(|_| ());
        let health = health(&rig);
        let minute = Duration::from_secs(60);
        rig.clock().lease_until(rig.clock().now().after(minute));
        for (wait, wanted) in [(Duration::ZERO, Wire::Serving), (minute, Wire::NotServing)] {
            tokio::time::advance(wait).await;
            for service in OWN_SERVICES {
                assert_eq!(told(&health, service).await, Some(wanted), "{service:?}");
            }
            assert_eq!(health.readiness().ready, wanted == Wire::Serving);
            assert_eq!(told(&health, STORE_SERVICE).await, Some(Wire::Serving));
        }
        rig.clock().lease_until(rig.clock().now().after(minute));
        assert_eq!(told(&health, "").await, Some(Wire::Serving));
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_is_down_takes_itself_out_of_rotation_and_not_the_gateway() {
        let rig = rig(|_| ());
        let health = health(&rig);
        rig.store.breaker().failed(StoreErrorKind::Unreachable);
        assert_eq!(told(&health, STORE_SERVICE).await, Some(Wire::NotServing));
        assert_eq!(told(&health, "").await, Some(Wire::Serving));
        assert_eq!(told(&health, CACHE_SERVICE).await, None, "there is no Redis");
        assert_eq!(
            health.readiness().to_string(),
            "ready\nstore: down\ncache: none\ninvalidation: none\njournal: up\nclock: ok\n"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_off_is_said_and_leaves_the_gateway_in_rotation() {
        let rig = rig(|_| ());
        let health = health(&rig);
        for (millis, wanted, said) in [
            (12_345, Wire::NotServing, "clock: 12 s ahead of the store\n"),
            (-40_000, Wire::NotServing, "clock: 40 s behind the store\n"),
            (9_999, Wire::Serving, "clock: ok\n"),
        ] {
            rig.clock().set_offset(ClockOffset(millis));
            assert_eq!(told(&health, CLOCK_SERVICE).await, Some(wanted), "{millis}");
            assert_eq!(told(&health, "").await, Some(Wire::Serving));
            let readiness = health.readiness();
            assert!(readiness.ready && readiness.to_string().ends_with(said), "{readiness}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_gateway_that_stops_says_so_for_good() {
        let rig = rig(|_| ());
        let health = health(&rig);
        health.stop().await;
        for service in OWN_SERVICES {
            assert_eq!(told(&health, service).await, Some(Wire::NotServing), "{service:?}");
        }
        assert!(!health.readiness().ready);
    }
}
