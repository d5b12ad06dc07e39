//! Proves that operators see what is pending, pause and resume the drain of a namespace, and flush it, and that a pause loses nothing.

use std::time::Duration;

use tidegate::rpc::proto::{
    DrainState, FlushRequest, FlushResponse, PauseRequest, PauseResponse, QueueRequest, QueueResponse, ResumeRequest,
    ResumeResponse,
};
use tonic::{Code, Request, Status};

use crate::harness::{
    Database, Gateway, Mode, SOON, Setup,
    client::{assert_come_back, assert_do_not_come_back},
    eventually, expect,
};

async fn pause(gateway: &Gateway, namespace: &str) -> Result<PauseResponse, Status> {
    let request = PauseRequest {
        namespace: namespace.to_owned(),
        unused: false,
    };
    gateway
        .admin()
        .await
        .pause(request)
        .await
        .map(tonic::Response::into_inner)
}

async fn resume(gateway: &Gateway, namespace: &str) -> Result<ResumeResponse, Status> {
    let request = ResumeRequest {
        namespace: namespace.to_owned(),
    };
    gateway
        .admin()
        .await
        .resume(request)
        .await
        .map(tonic::Response::into_inner)
}

async fn flush(gateway: &Gateway, namespace: &str, wait: Duration) -> Result<FlushResponse, Status> {
    let mut request = Request::new(FlushRequest {
        namespace: namespace.to_owned(),
    });
    request.set_timeout(wait);
    gateway
        .admin()
        .await
        .flush(request)
        .await
        .map(tonic::Response::into_inner)
}

async fn queue(gateway: &Gateway, namespace: &str, oldest: u32) -> Result<QueueResponse, Status> {
    let request = QueueRequest {
        namespace: namespace.to_owned(),
        oldest,
    };
    gateway
        .admin()
        .await
        .queue(request)
        .await
        .map(tonic::Response::into_inner)
}

async fn put(gateway: &Gateway, namespace: &str, key: &str) {
    let client = gateway.client.namespace(namespace);
    client.put(key, b"value", Mode::Behind).await.expect("accepted");
}

#[tokio::test]
async fn a_pause_holds_one_namespace_back_and_shows() {
    let database = Database::postgres().await;
    let gateway = Setup::new().store(database.url()).start().await;
    put(&gateway, "orders", "before").await;
    gateway.drained().await;
    assert!(!pause(&gateway, "orders").await.unwrap().was_paused);
    for key in ["a", "b"] {
        put(&gateway, "orders", key).await;
        put(&gateway, "sessions", key).await;
    }
    // A worker has both namespaces: what is paused must not stand in the way of the other.
    for key in ["a", "b"] {
        database.await_value("sessions", key, b"value").await;
    }
    // Not even somebody who waits for all of it has it drained.
    let refused = flush(&gateway, "", SOON).await.expect_err("it would wait in vain");
    assert_do_not_come_back(&refused, Code::FailedPrecondition, "PAUSED");
    let refused = flush(&gateway, "orders", SOON)
        .await
        .expect_err("it would wait in vain");
    assert_do_not_come_back(&refused, Code::FailedPrecondition, "PAUSED");
    flush(&gateway, "sessions", SOON).await.expect("that one is not paused");
    assert_eq!(database.row("orders", "a").await, None);
    gateway.client.assert_everywhere("a", Some(b"value")).await;

    let again = pause(&gateway, "orders").await.unwrap();
    let pending = again.pending.unwrap();
    assert!(
        again.was_paused && pending.entries == 2 && pending.paused_since.is_some(),
        "{again:?}"
    );
    let told = queue(&gateway, "orders", 10).await.unwrap();
    assert_eq!(told.pending, Some(told.namespaces[0].pending.unwrap()));
    assert_eq!(told.pending.unwrap().entries, 2);
    let stats = gateway.stats("orders").await;
    assert_eq!(stats.pending_writes.unwrap().entries, 2);
    assert_eq!(gateway.metric("tidegate_queue_paused_namespaces", &[]).await, 1.0);
    gateway.await_readiness("paused: 1 (orders)").await;

    assert!(resume(&gateway, "orders").await.unwrap().was_paused);
    gateway.drained().await;
    database.await_value("orders", "b", b"value").await;
    assert!(!resume(&gateway, "orders").await.unwrap().was_paused);
    assert_eq!(gateway.metric("tidegate_queue_paused_namespaces", &[]).await, 0.0);
    let ready = gateway.page("/readyz").await.body;
    assert!(!ready.contains("paused"), "{ready}");
}

#[tokio::test]
async fn a_paused_namespace_fills_the_queue_and_no_more() {
    let setup = Setup::new().config("[queue]\nentries_max = 3\n[namespaces.orders]\nqueue_full = \"reject\"");
    let gateway = setup.start().await;
    pause(&gateway, "orders").await.unwrap();
    for key in ["a", "b", "c"] {
        put(&gateway, "orders", key).await;
    }
    let refused = gateway
        .client
        .put("d", b"value", Mode::Behind)
        .await
        .expect_err("it is full");
    assert_come_back(&refused, Code::ResourceExhausted);
    gateway
        .client
        .put("a", b"newer", Mode::Through)
        .await
        .expect("written through");
    resume(&gateway, "orders").await.unwrap();
    gateway.drained().await;
    gateway
        .client
        .put("d", b"value", Mode::Behind)
        .await
        .expect("there is room again");
    gateway.client.assert_everywhere("a", Some(b"newer")).await;
}

#[tokio::test]
async fn a_shutdown_drains_what_is_paused() {
    let database = Database::sqlite();
    let mut gateway = Setup::new().store(database.url()).start().await;
    put(&gateway, "orders", "a").await;
    pause(&gateway, "orders").await.unwrap();
    put(&gateway, "orders", "b").await;
    gateway.terminate();
    let exit = gateway.wait_exit(SOON).await;
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert_eq!(database.value("orders", "b").await.as_deref(), Some(&b"value"[..]));
}

#[tokio::test]
async fn a_restart_knows_nothing_of_a_pause_and_everything_of_the_writes() {
    let database = Database::sqlite();
    let mut gateway = Setup::new().store(database.url()).start().await;
    put(&gateway, "orders", "a").await;
    pause(&gateway, "orders").await.unwrap();
    put(&gateway, "orders", "b").await;
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    database.await_value("orders", "b", b"value").await;
    assert_eq!(gateway.metric("tidegate_queue_paused_namespaces", &[]).await, 0.0);
}

#[tokio::test]
async fn a_flush_waits_for_no_delay_and_for_the_store() {
    let database = Database::postgres().await;
    let setup = Setup::new().config("[namespace_defaults]\nwrite_delay = \"1h\"");
    let gateway = setup.store(database.url()).start().await;
    for key in ["a", "b"] {
        put(&gateway, "orders", key).await;
    }
    put(&gateway, "sessions", "a").await;
    let flushed = flush(&gateway, "orders", SOON).await.unwrap();
    assert_eq!((flushed.waited_for, flushed.dead_lettered), (2, 0));
    assert_eq!(database.value("orders", "b").await.as_deref(), Some(&b"value"[..]));
    flush(&gateway, "", SOON).await.unwrap();
    assert_eq!(database.value("sessions", "a").await.as_deref(), Some(&b"value"[..]));
    assert_eq!(flush(&gateway, "", SOON).await.unwrap().waited_for, 0);

    let hold = database.hold_writes().await;
    put(&gateway, "orders", "late").await;
    let late = flush(&gateway, "orders", Duration::from_secs(1)).await;
    let late = late.expect_err("the store is held");
    assert_eq!(late.code(), Code::Unavailable, "{late:?}");
    assert_come_back(&late, Code::Unavailable);
    // A pause ends the wait of whoever waits in vain from then on.
    let waiting = flush(&gateway, "orders", SOON);
    let pausing = async {
        eventually("the worker has it", SOON, async || {
            let told = queue(&gateway, "orders", 1).await.unwrap();
            expect(told.oldest.iter().any(|key| key.in_flight), told)
        })
        .await;
        pause(&gateway, "orders").await.unwrap();
    };
    let (ended, ()) = tokio::join!(waiting, pausing);
    assert_do_not_come_back(&ended.expect_err("paused"), Code::FailedPrecondition, "PAUSED");
    hold.release().await;
    resume(&gateway, "orders").await.unwrap();
    assert_eq!(flush(&gateway, "orders", SOON).await.unwrap().dead_lettered, 0);
    assert_eq!(database.value("orders", "late").await.as_deref(), Some(&b"value"[..]));
}

#[tokio::test]
async fn the_queue_tells_what_its_workers_do_and_what_is_oldest() {
    let database = Database::postgres().await;
    let setup = Setup::new().config("[queue]\ndrain_workers = 2\nretry_backoff_min = \"10s\"");
    let gateway = setup.store(database.url()).start().await;
    let told = queue(&gateway, "", 10).await.unwrap();
    assert_eq!((told.workers.len(), told.oldest.len()), (2, 0));
    assert_eq!((told.entries_max, told.pending.unwrap().entries), (100_000, 0));
    assert!(
        told.workers
            .iter()
            .all(|worker| worker.state() == DrainState::Idle && worker.last_failure.is_none())
    );

    database
        .execute("alter table tidegate_entries rename to elsewhere")
        .await;
    for number in 0..12 {
        put(&gateway, "orders", &format!("{number:02}")).await;
    }
    gateway
        .client
        .namespace("sessions")
        .delete("gone", Mode::Behind)
        .await
        .unwrap();
    let told = eventually("both workers have failed", SOON, async || {
        let told = queue(&gateway, "", 100).await.unwrap();
        let have_failed = told.workers.iter().all(|worker| worker.failures > 0);
        expect(have_failed && told.workers[0].state() == DrainState::BackingOff, &told).map(|()| told.clone())
    })
    .await;
    let failure = told.workers[0].last_failure.clone().expect("it failed");
    assert_eq!(failure.code, "42P01", "{failure:?}");
    assert!(
        failure.time.is_some() && failure.message.contains("tidegate_entries"),
        "{failure:?}"
    );
    assert_eq!(told.workers.iter().map(|worker| worker.entries).sum::<u64>(), 13);
    let keys: Vec<&str> = told.oldest.iter().map(|pending| pending.key.as_str()).collect();
    let ages: Vec<_> = told
        .oldest
        .iter()
        .map(|pending| pending.age.map(|age| (age.seconds, age.nanos)))
        .collect();
    assert_eq!(keys.len(), 13);
    assert!(ages.is_sorted_by(|a, b| a >= b), "{ages:?}");
    let last = told.oldest.last().unwrap();
    assert!(
        last.deletes && last.namespace == "sessions" && last.version > 0,
        "{last:?}"
    );
    let oldest = queue(&gateway, "orders", 3).await.unwrap().oldest;
    assert_eq!(oldest.len(), 3);
    assert!(
        oldest.iter().all(|pending| keys[..4].contains(&pending.key.as_str())),
        "{oldest:?}"
    );
    database
        .execute("alter table elsewhere rename to tidegate_entries")
        .await;
}

#[tokio::test]
async fn a_namespace_that_nobody_knows_is_not_steered_by_mistake() {
    let gateway = Setup::new()
        .config("[namespaces.configured]\nwrite_delay = \"1s\"")
        .start()
        .await;
    for refused in [
        pause(&gateway, "ordres").await.err(),
        resume(&gateway, "ordres").await.err(),
        flush(&gateway, "ordres", SOON).await.err(),
        queue(&gateway, "ordres", 0).await.err(),
    ] {
        assert_do_not_come_back(&refused.expect("not known"), Code::NotFound, "NOT_FOUND");
    }
    pause(&gateway, "configured").await.expect("that one is");
    let ahead = PauseRequest {
        namespace: "ordres".to_owned(),
        unused: true,
    };
    gateway.admin().await.pause(ahead).await.expect("it was meant");
    resume(&gateway, "ordres").await.expect("known by now");
    for namespace in ["", "Orders"] {
        let refused = pause(&gateway, namespace).await.expect_err("no namespace");
        assert_do_not_come_back(&refused, Code::InvalidArgument, "INVALID");
    }
    let refused = queue(&gateway, "", 101).await.expect_err("too many");
    assert_do_not_come_back(&refused, Code::InvalidArgument, "INVALID");
}
