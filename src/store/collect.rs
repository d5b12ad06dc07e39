//! Collects what nobody can read any more: tombstones and expired rows, once their retention is over. And forgets requests, once their window is.
//!
//! Owns when and in what steps. Does not own which rows (the backends, by the store's clock), nor the horizon that each step raises before
//! it deletes (the backends, too). A collected tombstone no longer refuses an older write; the horizon does so in its stead, and refuses
//! along with it every other write that is as old and finds no row. So the retention bounds how late a write may come.

use std::time::Duration;

use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    store::{Config, Session, Store, StoreError},
    telemetry::StoreMetrics,
};

/// Rows of one step: few enough that its locks and its log are no burden to the commits beside it.
const STEP_ROWS_MAX: u32 = 1_000;

/// Starts the collection, on the current runtime. Ends when `stop` is cancelled; a step that is cut off is undone or done as a whole.
#[must_use = "a task that ends before it was told to has died"]
pub fn start(store: Store, config: &Config, metrics: StoreMetrics, stop: &CancellationToken) -> JoinHandle<()> {
    let (retention, interval, stop) = (config.tombstone_retention, config.collect_interval, stop.clone());
    tokio::spawn(async move {
        stop.run_until_cancelled(collect(&store, retention, interval, &metrics))
            .await;
    })
}

async fn collect(store: &Store, retention: Duration, interval: Duration, metrics: &StoreMetrics) {
    let mut session = store.session();
    loop {
        // Spread, so that replicas that started together do not collect together.
        sleep(interval.mul_f64(rand::random_range(0.9..=1.1))).await;
        if store.breaker().is_open() {
            continue;
        }
        match round(&mut session, retention, metrics).await {
            Ok(0) => {}
            Ok(rows) => tracing::info!(rows, "tombstones and expired rows are collected"),
            Err(error) => tracing::warn!(%error, "collecting old rows failed; it is tried again at the next interval"),
        }
        // By itself: what keeps rows from being collected, as a transaction without end, keeps no request.
        if let Err(error) = forget(&mut session).await {
            tracing::warn!(%error, "forgetting old requests failed; it is tried again at the next interval");
        }
    }
}

async fn round(session: &mut Session, retention: Duration, metrics: &StoreMetrics) -> Result<u64, StoreError> {
    let mut rows = 0;
    loop {
        let step = session.collect(retention, STEP_ROWS_MAX).await?;
        metrics.collected.inc_by(step);
        rows += step;
        if step < u64::from(STEP_ROWS_MAX) {
            return Ok(rows);
        }
    }
}

async fn forget(session: &mut Session) -> Result<(), StoreError> {
    while session.forget_requests(STEP_ROWS_MAX).await? >= u64::from(STEP_ROWS_MAX) {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use prometheus_client::registry::Registry;
    use tokio::time::advance;

    use super::*;
    use crate::{
        model::{Answer, Answered, Entry, Fingerprint, Key, KeyedAnswer, Request, RequestId, Tags, Version, Write},
        store::{
            StoreErrorKind,
            fake::{Call, FakeBackend, Fault},
        },
    };

    fn put(fake: &FakeBackend, number: i64, value: Option<&'static [u8]>) {
        fake.put(Write {
            key: Key::new("orders", &number.to_string()).expect("valid"),
            entry: Entry {
                version: Version::new(number + 1).expect("positive"),
                value: value.map(Bytes::from_static),
                expires_at: None,
            },
            tags: Tags::default(),
            requests: Vec::new(),
        });
    }

    #[tokio::test(start_paused = true)]
    async fn old_tombstones_go_in_steps_and_a_failure_is_tried_again() {
        let fake = FakeBackend::new();
        for number in 0..2_500 {
            put(&fake, number, None);
        }
        put(&fake, 2_500, Some(b"live"));
        advance(Duration::from_secs(7 * 24 * 3600)).await;
        put(&fake, 2_501, None);

        fake.inject(Call::Collect, Fault::fail(StoreErrorKind::Transient));
        let metrics = StoreMetrics::register(&mut Registry::default());
        let stop = CancellationToken::new();
        let task = start(fake.store(), &Config::default(), metrics.clone(), &stop);
        // Past the second interval, and short of the third.
        sleep(Duration::from_secs(25 * 60)).await;
        assert_eq!(fake.rows(), 2, "the live row, and the young tombstone");
        assert_eq!(metrics.collected.get(), 2_500);
        assert_eq!(fake.calls(Call::Collect), 4, "one that failed, and three steps");
        assert_eq!(
            fake.horizon(),
            Version::new(2_500),
            "the highest version collected, and no higher"
        );
        stop.cancel();
        task.await.expect("no panic");
    }

    #[tokio::test(start_paused = true)]
    async fn requests_are_forgotten_in_steps_even_while_nothing_can_be_collected() {
        let fake = FakeBackend::new();
        let request = |number: i64, ends_at| KeyedAnswer {
            key: Key::new("orders", "any").expect("valid"),
            answered: Answered {
                request: Request {
                    id: RequestId::new(&number.to_string()).expect("valid"),
                    fingerprint: Fingerprint([0; 16]),
                    ends_at,
                },
                answer: Answer {
                    version: Version::new(1).expect("positive"),
                    counter: None,
                    expires_at: None,
                },
            },
        };
        let mut session = fake.store().session();
        let now = session.control().await.expect("answers").now;
        let over = (0..2_500).map(|number| request(number, now));
        let stays = request(2_500, now.after(Duration::from_secs(3_600)));
        let requests: Vec<KeyedAnswer> = over.chain([stays.clone()]).collect();
        session.remember(&requests).await.expect("remembered");
        fake.script(|call| (call == Call::Collect).then(|| Fault::fail(StoreErrorKind::Transient)));
        let metrics = StoreMetrics::register(&mut Registry::default());
        let stop = CancellationToken::new();
        let task = start(fake.store(), &Config::default(), metrics, &stop);
        // Past the first interval, and short of the second.
        sleep(Duration::from_secs(15 * 60)).await;
        assert_eq!(fake.calls(Call::ForgetRequests), 3);
        assert_eq!(fake.answer_of("orders", &requests[0].answered.request.id), None);
        let id = &stays.answered.request.id;
        assert_eq!(fake.answer_of("orders", id), Some(stays.answered.clone()));
        stop.cancel();
        task.await.expect("no panic");
    }
}
