//! Proves that what can be turned off is off: server reflection, and the migration of the store at start.

use bytes::Bytes;
use tonic::Code;

use crate::harness::{
    Database, Gateway, Mode, Setup,
    client::seen,
    postgres,
    wire::{Answer, Wire, frame},
};

/// Asks server reflection for the list of services, in both of its versions.
async fn list_services(gateway: &Gateway) -> [Answer; 2] {
    let wire = Wire::connect(gateway.address).await;
    // Field 7, `list_services`, empty.
    let request: Bytes = frame(0, 2, &[0x3a, 0x00]);
    let list = async |version: &str| {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        wire.call(&path, &[], request.clone()).await
    };
    [list("v1").await, list("v1alpha").await]
}

#[tokio::test]
async fn reflection_is_on_unless_turned_off() {
    let gateway = Setup::new().start().await;
    for answer in list_services(&gateway).await {
        assert_eq!(answer.code(), Some(Code::Ok), "{answer:?}");
        let body = String::from_utf8_lossy(&answer.body);
        for service in ["tidegate.v1.Gateway", "grpc.health.v1.Health"] {
            assert!(body.contains(service), "{service} is not in {body:?}");
        }
    }
    let gateway = Setup::new().config("[rpc]\nreflection = false").start().await;
    for answer in list_services(&gateway).await {
        assert_eq!(answer.code(), Some(Code::Unimplemented), "{answer:?}");
        assert!(answer.body.is_empty(), "{answer:?}");
    }
    gateway.client.put("key", b"value", Mode::Through).await.unwrap();
}

#[tokio::test]
async fn without_migration_a_store_without_tables_is_refused_and_left_alone() {
    const TABLES: &str = "select tablename::text from pg_tables where schemaname = 'public'";
    let database = Database::postgres().await;
    let exit = Setup::new()
        .store(database.url())
        .config("[store]\nmigrate = false\nconnect_wait = \"1s\"")
        .run_to_end()
        .await;
    assert_eq!(exit.code, Some(69), "{exit:?}");
    assert!(exit.log.contains("42P01"), "undefined_table: {exit:?}");
    assert_eq!(database.texts(TABLES).await, Vec::<String>::new());
}

#[tokio::test]
async fn without_migration_no_right_to_change_the_schema_is_needed() {
    let (plain, superuser) = postgres::database_of_plain_role().await;
    let database = Database::at(&superuser);
    // Somebody else, who may, has made the tables.
    let migrated = Setup::new().store(&superuser).start().await;
    drop(migrated);
    let role = plain.rsplit('/').next().expect("the role has the name of its database");
    database
        .execute(&format!(
            "alter schema public owner to current_user;
             revoke create on schema public from public, {role};
             grant select, insert, update, delete on all tables in schema public to {role}"
        ))
        .await;
    let gateway = Setup::new()
        .store(&plain)
        .config("[store]\nmigrate = false")
        .start()
        .await;
    gateway.client.put("through", b"value", Mode::Through).await.unwrap();
    gateway.client.put("behind", b"value", Mode::Behind).await.unwrap();
    gateway.drained().await;
    assert_eq!(database.records("orders").await, ["behind", "through"]);
    assert_eq!(seen(&gateway.client.read("through").await).0, Some(&b"value"[..]));
}
