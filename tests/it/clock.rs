//! Proves what a gateway does whose clock and the store's are too far apart, with a PostgreSQL whose clock a test can set.

use tidegate::rpc::proto::ReadConsistency;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::{EVERY, assert_come_back},
    eventually, expect,
};

/// A PostgreSQL of which the clock, as its sessions of a changed search path see it, is off by what a table says.
struct Skewed {
    database: Database,
    url: String,
}

impl Skewed {
    async fn by(seconds: i32) -> Skewed {
        let database = Database::postgres().await;
        database
            .execute(&format!(
                "create table clock_skew (by interval not null);
                 insert into clock_skew values (interval '{seconds} seconds');
                 create function public.clock_timestamp() returns timestamptz language sql volatile as
                     'select pg_catalog.clock_timestamp() + by from public.clock_skew'"
            ))
            .await;
        // Named so late, the server's own functions are found after ours.
        let url = format!("{}?options=-csearch_path%3Dpublic,pg_catalog", database.url());
        Skewed { database, url }
    }

    async fn set(&self, seconds: i32) {
        self.database
            .execute(&format!("update clock_skew set by = interval '{seconds} seconds'"))
            .await;
    }

    async fn gateway(&self) -> Gateway {
        Setup::new().store(&self.url).start().await
    }
}

async fn assert_refused(gateway: &Gateway, side: &str) {
    for mode in [Mode::Through, Mode::Behind] {
        let put = gateway.client.put("one", b"refused", mode).await.expect_err("no stamp");
        let delete = gateway.client.delete("one", mode).await.expect_err("no stamp");
        for refused in [put, delete] {
            assert_come_back(&refused, Code::Unavailable);
            assert!(refused.message().contains(side), "{refused:?}");
        }
    }
}

#[tokio::test]
async fn a_gateway_whose_clock_is_off_writes_nothing_until_it_is_not() {
    for (seconds, side) in [(20, "behind"), (-20, "ahead of")] {
        let store = Skewed::by(0).await;
        let gateway = store.gateway().await;
        gateway.client.put("one", b"value", Mode::Through).await.unwrap();
        store.set(seconds).await;
        gateway.await_health("tidegate.clock", ServingStatus::NotServing).await;
        assert_refused(&gateway, side).await;
        // Reads go on, and calls still come here: if it is the store's clock, no other replica is better off.
        for consistency in EVERY {
            let read = gateway.client.value("one", consistency).await;
            assert_eq!(read.as_deref(), Some(&b"value"[..]));
        }
        assert_eq!(gateway.health("").await.unwrap(), ServingStatus::Serving);
        let readiness = gateway.page("/readyz").await;
        assert_eq!(readiness.status, 200);
        let said = readiness.body.lines().find(|line| line.starts_with("clock: "));
        let said = said.expect("it speaks of the clock");
        assert!(said.ends_with(&format!("{side} the store")), "{said}");
        let offset = gateway.metric("tidegate_store_clock_offset_seconds", &[]).await;
        assert!((offset + f64::from(seconds)).abs() < 2.0, "{offset}");
        assert_eq!(
            store.database.value("orders", "one").await.as_deref(),
            Some(&b"value"[..])
        );

        store.set(0).await;
        gateway.await_readiness("clock: ok").await;
        gateway.await_health("tidegate.clock", ServingStatus::Serving).await;
        for mode in [Mode::Through, Mode::Behind] {
            gateway.client.put("one", b"again", mode).await.unwrap();
        }
        gateway.drained().await;
        assert_eq!(
            gateway.client.value("one", ReadConsistency::Store).await.as_deref(),
            Some(&b"again"[..])
        );
    }
}

#[tokio::test]
async fn a_gateway_that_starts_with_a_clock_that_is_off_refuses_its_first_write() {
    let store = Skewed::by(60).await;
    let gateway = store.gateway().await;
    assert_refused(&gateway, "behind").await;
    assert_eq!(store.database.entries().await, 0);
    store.set(9).await;
    eventually("writes are taken", SOON, async || {
        let put = gateway.client.put("one", b"value", Mode::Through).await;
        expect(put.is_ok(), put)
    })
    .await;
}
