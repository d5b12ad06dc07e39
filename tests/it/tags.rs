//! Proves that the tags of a Put are kept with the record: through, behind, coalesced, and over a crash.

use tidegate::rpc::proto::PutRequest;

use crate::harness::{Database, Gateway, Mode, Setup};

/// Writes wait longer than any test for others to join them.
const LONG_DELAYS: &str = "[namespace_defaults]\nwrite_delay = \"1h\"";

async fn put(gateway: &Gateway, key: &str, mode: Mode, tags: &[&str]) {
    let request = PutRequest {
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        ..gateway.client.put_request(key, b"value", mode)
    };
    gateway
        .client
        .stub()
        .put(request)
        .await
        .expect("a Put with tags succeeds");
}

/// The keys that have tags, with them.
async fn tagged(database: &Database) -> Vec<String> {
    let sql = if database.url().starts_with("sqlite:") {
        "select key || ' ' || group_concat(tag, ' ' order by tag) from tidegate_tags group by key order by key"
    } else {
        "select key || ' ' || array_to_string(tags, ' ') from tidegate_entries where tags is not null order by key"
    };
    database.texts(sql).await
}

async fn databases() -> [Database; 2] {
    [Database::sqlite(), Database::postgres().await]
}

#[tokio::test]
async fn the_tags_of_the_last_write_are_in_the_store() {
    for database in databases().await {
        let gateway = Setup::new().store(database.url()).start().await;
        for (mode, name) in [(Mode::Through, "through"), (Mode::Behind, "behind")] {
            for kept in ["kept", "retagged", "untagged", "deleted"] {
                put(&gateway, &format!("{name} {kept}"), mode, &["red", "blue", "red"]).await;
            }
            put(&gateway, &format!("{name} retagged"), mode, &["green"]).await;
            put(&gateway, &format!("{name} untagged"), mode, &[]).await;
            gateway.client.delete(&format!("{name} deleted"), mode).await.unwrap();
        }
        gateway.drained().await;
        assert_eq!(
            tagged(&database).await,
            [
                "behind kept blue red",
                "behind retagged green",
                "through kept blue red",
                "through retagged green"
            ]
        );
    }
}

#[tokio::test]
async fn tags_outlive_the_process_with_their_write() {
    for database in databases().await {
        let mut gateway = Setup::new().store(database.url()).config(LONG_DELAYS).start().await;
        put(&gateway, "plain", Mode::Behind, &[]).await;
        put(&gateway, "tagged", Mode::Behind, &["before"]).await;
        put(&gateway, "tagged", Mode::Behind, &["red", "a \"quoted\" one"]).await;
        assert_eq!(tagged(&database).await, [""; 0], "nothing is drained yet");
        gateway.kill().await;
        let gateway = gateway.start_again().await;
        gateway.drained().await;
        assert_eq!(tagged(&database).await, ["tagged a \"quoted\" one red"]);
    }
}
