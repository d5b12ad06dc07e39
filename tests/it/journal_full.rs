//! Proves that a full journal, and a full disk below it, are felt as waiting or as a refusal before anything is applied; that what was
//! answered is kept, reads and write-through go on, and room that comes back is used.

use std::time::Duration;

use tidegate::rpc::proto::{Durability, ReadConsistency};
use tokio::{task::JoinHandle, time::timeout};
use tonic::{Code, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{
    Client, Database, Gateway, Mode, SOON, Setup,
    client::{assert_come_back, outcome},
    disk::Disk,
    eventually, expect,
    gateway::data_dir,
    process::Directory,
    wire::{Wire, message},
};

/// How long something must not happen to be taken for held.
const A_WHILE: Duration = Duration::from_millis(300);

const NAMESPACES: &str = "[namespaces.waits]\nqueue_full = \"wait\"\n\
     [namespaces.rejects]\nqueue_full = \"reject\"\n\
     [namespaces.through]\nqueue_full = \"write_through\"\n";

static VALUE: [u8; 60_000] = [b'x'; 60_000];

/// Puts until the journal takes no more, and says so in this line. How many it took, under the keys from 0 on.
async fn fill(gateway: &Gateway, client: &Client, from: usize, line: &str) -> usize {
    let mut index = from;
    loop {
        match client.put(&index.to_string(), &VALUE, Mode::Behind).await {
            Ok(answer) => {
                assert_eq!(answer.durability(), Durability::Journal);
                index += 1;
            }
            Err(status) => {
                assert_come_back(&status, Code::ResourceExhausted);
                // It may have been out of room for a moment only.
                if gateway.page("/readyz").await.body.lines().any(|said| said == line) {
                    return index;
                }
            }
        }
        assert!(index < 1_000, "the journal has no bound");
    }
}

/// A Put over the bare wire, with a deadline that the server keeps: the generated client gives up by itself at the same moment, and the
/// answer would not be seen.
async fn put_within(gateway: &Gateway, client: &Client, key: &str, deadline: &str) -> Status {
    let request = client.put_request(key, &VALUE, Mode::Behind);
    let wire = Wire::connect(gateway.address).await;
    let answer = wire
        .call(
            "/tidegate.v1.Gateway/Put",
            &[("grpc-timeout", deadline)],
            message(&request),
        )
        .await;
    answer.status.expect("a status")
}

type Waiting<T> = JoinHandle<Result<Response<T>, Status>>;

fn put_patiently(client: &Client, key: &str) -> Waiting<tidegate::rpc::proto::PutResponse> {
    let client = client.clone();
    let mut request = tonic::Request::new(client.put_request(key, &VALUE, Mode::Behind));
    request.set_timeout(SOON);
    tokio::spawn(async move { client.stub().put(request).await })
}

async fn answered<T>(waiting: Waiting<T>) -> T {
    let answer = timeout(SOON, waiting).await.expect("it is answered").unwrap();
    answer.expect("it is accepted").into_inner()
}

/// Everything that a full journal does to writes, as each namespace says; until `make_room` makes room.
async fn assert_policies<F: Future<Output = ()>>(
    gateway: &Gateway,
    through_waits: bool,
    make_room: impl FnOnce() -> F,
) {
    let client = |namespace: &str| gateway.client.namespace(namespace);
    let refused = client("rejects").put("refused", &VALUE, Mode::Behind).await;
    assert_come_back(&refused.expect_err("there is no room"), Code::ResourceExhausted);
    let late = put_within(gateway, &client("waits"), "late", "300m").await;
    assert_eq!(
        (late.code(), outcome(&late).as_str()),
        (Code::DeadlineExceeded, "not_applied"),
        "{late:?}"
    );
    let mut waiting = put_patiently(&client("waits"), "patient");
    let mut through = put_patiently(&client("through"), "through");
    assert!(timeout(A_WHILE, &mut waiting).await.is_err(), "there is no room");
    if through_waits {
        assert!(
            timeout(A_WHILE, &mut through).await.is_err(),
            "nothing can be committed"
        );
        client("through").assert_everywhere("through", None).await;
    }
    for (namespace, key) in [("rejects", "refused"), ("waits", "late"), ("waits", "patient")] {
        client(namespace).assert_everywhere(key, None).await;
    }
    if !through_waits {
        assert_eq!(answered(through).await.durability(), Durability::Store);
        make_room().await;
        assert_eq!(answered(waiting).await.durability(), Durability::Journal);
        return;
    }
    make_room().await;
    assert_eq!(answered(through).await.durability(), Durability::Store);
    assert_eq!(answered(waiting).await.durability(), Durability::Journal);
}

#[tokio::test]
async fn a_full_journal_does_as_the_namespace_says() {
    let database = Database::postgres().await;
    let mut gateway = Setup::new()
        .store(database.url())
        .config("[rpc]\nvalue_bytes_max = 100000\n[journal]\nsegment_bytes = 1048576\nbytes_max = 5242880")
        .config(NAMESPACES)
        .start()
        .await;
    gateway.client.put("stored", b"value", Mode::Through).await.unwrap();
    let hold = database.hold_writes().await;
    let filled = fill(&gateway, &gateway.client.namespace("rejects"), 0, "journal: full").await;
    assert!(filled >= 10, "the journal takes a megabyte or so, not {filled} records");
    // What was taken away is a restart's business, too.
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    assert_eq!(
        gateway.metric("tidegate_queue_pending_entries", &[]).await,
        filled as f64
    );
    let rejects = gateway.client.namespace("rejects");
    let filled = fill(&gateway, &rejects, filled, "journal: full").await;

    let readiness = gateway.await_readiness("journal: full").await;
    assert_eq!(
        readiness.status, 200,
        "reads and write-through can be served: {readiness:?}"
    );
    gateway
        .await_health("tidegate.journal", ServingStatus::NotServing)
        .await;
    assert_eq!(gateway.health("").await.unwrap(), ServingStatus::Serving);
    assert!(gateway.metric("tidegate_journal_files_bytes", &[]).await <= 5_242_880.0);
    gateway.client.assert_everywhere("stored", Some(b"value")).await;
    rejects.assert_everywhere("0", Some(&VALUE)).await;

    assert_policies(&gateway, true, || hold.release()).await;
    gateway.drained().await;
    gateway.await_readiness("journal: up").await;
    gateway.await_health("tidegate.journal", ServingStatus::Serving).await;
    assert_eq!(database.records("rejects").await.len(), filled);
    assert_eq!(database.records("waits").await, ["patient"]);
    assert_eq!(database.records("through").await, ["through"]);
    assert_eq!(database.dead_letters().await, []);
    rejects
        .put("refused", &VALUE, Mode::Behind)
        .await
        .expect("there is room again");
}

/// A gateway whose data lies on a disk that is smaller than its journal may become.
async fn on_a_small_disk(database: &Database) -> (Disk, Gateway) {
    let directory = Directory::new("gateway");
    std::fs::create_dir(data_dir(&directory)).unwrap();
    let disk = Disk::mount(&data_dir(&directory), 8 << 20);
    disk.take(3 << 20);
    let gateway = Setup::new()
        .store(database.url())
        .config("[rpc]\nvalue_bytes_max = 100000\n[journal]\nsegment_bytes = 1048576\nbytes_max = 67108864")
        .config("[store]\ncall_timeout = \"60s\"")
        .config(NAMESPACES);
    (disk, gateway.start_in(directory).await)
}

#[tokio::test]
async fn a_full_disk_holds_writes_behind_and_nothing_else() {
    let database = Database::postgres().await;
    let (disk, mut gateway) = on_a_small_disk(&database).await;
    gateway.client.put("stored", b"value", Mode::Through).await.unwrap();
    let hold = database.hold_namespace("rejects").await;
    let filled = fill(&gateway, &gateway.client.namespace("rejects"), 0, "journal: disk full").await;
    assert!(filled >= 10, "the disk takes some megabytes, not {filled} records");
    // A start needs no more of the disk than is there.
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    assert_eq!(
        gateway.metric("tidegate_queue_pending_entries", &[]).await,
        filled as f64
    );
    let rejects = gateway.client.namespace("rejects");
    let filled = fill(&gateway, &rejects, filled, "journal: disk full").await;

    let readiness = gateway.await_readiness("journal: disk full").await;
    assert_eq!(readiness.status, 200, "{readiness:?}");
    gateway
        .await_health("tidegate.journal", ServingStatus::NotServing)
        .await;
    gateway.client.assert_everywhere("stored", Some(b"value")).await;
    rejects.assert_everywhere("0", Some(&VALUE)).await;
    gateway
        .client
        .put("stored", b"newer", Mode::Through)
        .await
        .expect("write-through goes on");
    gateway
        .client
        .delete("other", Mode::Through)
        .await
        .expect("write-through goes on");

    assert_policies(&gateway, false, async || disk.give_back()).await;
    gateway.await_readiness("journal: up").await;
    gateway.await_health("tidegate.journal", ServingStatus::Serving).await;
    rejects
        .put("roomy", &VALUE, Mode::Behind)
        .await
        .expect("there is room again");

    // Nothing that was answered before, during and after is lost.
    let mut gateway = gateway;
    gateway.kill().await;
    let gateway = gateway.start_again().await;
    let rejects = gateway.client.namespace("rejects");
    for key in (0..filled).map(|index| index.to_string()).chain(["roomy".to_owned()]) {
        let read = rejects.value(&key, ReadConsistency::Cached).await;
        assert!(read.as_deref() == Some(&VALUE[..]), "{key}");
    }
    hold.release().await;
    eventually("everything is drained", SOON, async || {
        let records = database.records("rejects").await.len();
        expect(records == filled + 1, records)
    })
    .await;
    gateway.client.assert_everywhere("stored", Some(b"newer")).await;
    gateway
        .client
        .namespace("waits")
        .assert_everywhere("patient", Some(&VALUE))
        .await;
    assert_eq!(database.records("waits").await, ["patient"]);
    assert_eq!(database.records("through").await, ["through"]);
    assert_eq!(database.dead_letters().await, []);
}
