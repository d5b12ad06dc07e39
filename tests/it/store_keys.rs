//! What every store must do about finding keys, by a tag, a prefix and their age, run against the real PostgreSQL and the real SQLite.
//!
//! Owns the contract of `Connection::tagged`, `Connection::keys_below`, `Connection::rows_below` and `Connection::newest`, of how much a load brings, and of the tags that a commit keeps. Does not own
//! what the keys are good for.

use tidegate::{
    model::{Key, TAGS_MAX, Tags, Timestamp, Write},
    store::{Connection, LOAD_BYTES_MAX, StoreErrorKind},
};

use crate::{
    harness::{Database, postgres::Server, until},
    store_contract::{Fixture, commit, contract, entry, key, kind, now, write},
};

fn tags(tags: &[&str]) -> Tags {
    Tags::new(tags).expect("valid tags")
}

fn tagged_write(name: &str, number: i64, of: &[&str]) -> Write {
    Write {
        tags: tags(of),
        requests: Vec::new(),
        ..write(name, number, Some("value"))
    }
}

fn names(keys: Vec<Key>) -> Vec<String> {
    keys.iter().map(|key| key.key().to_owned()).collect()
}

async fn tagged(connection: &mut dyn Connection, tag: &str) -> Vec<String> {
    names(connection.tagged("orders", tag, None, 1_000).await.expect("found"))
}

async fn below(connection: &mut dyn Connection, prefix: &str) -> Vec<String> {
    let found = connection.keys_below("orders", prefix, None, 10_000).await;
    names(found.expect("found"))
}

async fn a_record_has_the_tags_of_the_write_that_stands(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    commit(connection, vec![tagged_write("one", 5, &["red", "blue"])]).await;
    commit(
        connection,
        vec![tagged_write("two", 5, &["red"]), write("three", 5, Some("v"))],
    )
    .await;
    assert_eq!(tagged(connection, "red").await, ["one", "two"]);
    assert_eq!(tagged(connection, "blue").await, ["one"]);
    assert_eq!(tagged(connection, "re").await, [""; 0]);
    // An older write changes nothing, and the same one again neither.
    commit(
        connection,
        vec![tagged_write("one", 4, &["old"]), tagged_write("two", 5, &["other"])],
    )
    .await;
    assert_eq!(tagged(connection, "old").await, [""; 0]);
    assert_eq!(tagged(connection, "other").await, [""; 0]);
    assert_eq!(tagged(connection, "red").await, ["one", "two"]);
    // A newer one replaces all of them: with others, with none, with a tombstone.
    commit(
        connection,
        vec![tagged_write("one", 6, &["blue", "green"]), write("two", 6, Some("v"))],
    )
    .await;
    assert_eq!(tagged(connection, "red").await, [""; 0]);
    assert_eq!(tagged(connection, "green").await, ["one"]);
    commit(connection, vec![write("one", 7, None)]).await;
    assert_eq!(tagged(connection, "blue").await, [""; 0]);
    commit(connection, vec![tagged_write("one", 8, &["blue"])]).await;
    assert_eq!(tagged(connection, "blue").await, ["one"]);
}

async fn tags_are_kept_byte_for_byte(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let longest = "é".repeat(64);
    let awkward = [
        "'",
        "\"",
        "\\",
        "\\\"",
        "\"\\",
        "{",
        "}",
        "{}",
        "[",
        "]",
        "[]",
        ",",
        "\",\"",
        "a,b",
        "NULL",
        "null",
        " ",
        " a",
        "a ",
        "\u{1}",
        "\n",
        "\t",
        "\u{1f}",
        "\u{7f}",
        "\u{2028}",
        "%",
        "_",
        "$1",
        "?1",
        ":a",
        "A",
        "a",
        "ä",
        "a\u{308}",
        "\u{1f980}",
        "\u{10ffff}",
        "1",
        "1.0",
        "true",
        &longest,
    ];
    let singly = awkward
        .iter()
        .zip(0..)
        .map(|(tag, number)| tagged_write(&format!("{number:02}"), 1, &[tag]));
    let many = awkward.chunks(TAGS_MAX).zip(0..);
    let many = many.map(|(chunk, number)| tagged_write(&format!("many {number}"), 1, chunk));
    commit(connection, singly.chain(many).collect()).await;
    for (number, tag) in awkward.iter().enumerate() {
        let wanted = [format!("{number:02}"), format!("many {}", number / TAGS_MAX)];
        assert_eq!(tagged(connection, tag).await, wanted, "{tag:?}");
    }
}

async fn a_tag_is_of_its_namespace_and_goes_with_its_row(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let elsewhere = Write {
        key: key("carts", "one"),
        ..tagged_write("one", 1, &["red"])
    };
    let expired = Write {
        entry: tidegate::model::Entry {
            expires_at: Some(Timestamp(1)),
            ..entry(1, Some("v"))
        },
        ..tagged_write("expired", 1, &["red"])
    };
    commit(connection, vec![elsewhere, expired, tagged_write("two", 1, &["red"])]).await;
    // What has expired may still lie in a cache.
    assert_eq!(tagged(connection, "red").await, ["expired", "two"]);
    let delete = "delete from tidegate_entries where key = 'expired'";
    fixture.execute(delete, delete).await;
    assert_eq!(tagged(connection, "red").await, ["two"]);
    let carts = connection.tagged("carts", "red", None, 10).await.expect("found");
    assert_eq!(carts, [key("carts", "one")]);
}

async fn pages_follow_one_another(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let writes = (0..25).map(|number| tagged_write(&format!("k{number:02}"), 1, &["red", "blue"]));
    commit(
        connection,
        writes.chain([tagged_write("other", 1, &["green"])]).collect(),
    )
    .await;
    let (mut by_tag, mut by_prefix) = (Vec::new(), Vec::new());
    for (wanted, from) in [(10, 0), (10, 10), (5, 20)] {
        let after = by_tag.last().cloned();
        let page = connection.tagged("orders", "red", after.as_deref(), 10).await;
        by_tag.extend(names(page.expect("found")));
        let after = by_prefix.last().cloned();
        let page = connection.keys_below("orders", "k", after.as_deref(), 10).await;
        by_prefix.extend(names(page.expect("found")));
        assert_eq!((by_tag.len(), by_prefix.len()), (from + wanted, from + wanted));
    }
    let all: Vec<String> = (0..25).map(|number| format!("k{number:02}")).collect();
    assert_eq!((&by_tag, &by_prefix), (&all, &all));
    // From before the range, and from after it.
    let early = connection
        .keys_below("orders", "k2", Some("a"), 2)
        .await
        .expect("found");
    assert_eq!(names(early), ["k20", "k21"]);
    let late = connection
        .keys_below("orders", "k", Some("o"), 10)
        .await
        .expect("found");
    assert_eq!(late, []);
}

async fn a_prefix_is_one_byte_for_byte(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let characters = ["a", "B", "%", "_", "\u{d7ff}", "\u{e000}", "\u{10ffff}"];
    let mut texts = vec![String::new()];
    for _ in 0..3 {
        let longer = texts
            .iter()
            .flat_map(|text| characters.map(|character| format!("{text}{character}")));
        texts = longer.chain([String::new()]).collect();
    }
    texts.retain(|text| !text.is_empty());
    texts.sort();
    texts.dedup();
    let mut writes: Vec<Write> = texts.iter().map(|text| write(text, 1, Some("v"))).collect();
    writes.extend(["nothing", "orders.eu", "a"].map(|namespace| Write {
        key: key(namespace, "aa"),
        ..write("aa", 1, Some("v"))
    }));
    commit(connection, writes).await;
    let prefixes = texts.iter().filter(|text| text.chars().count() < 3);
    for prefix in prefixes.map(String::as_str).chain([""]) {
        let wanted: Vec<&String> = texts.iter().filter(|text| text.starts_with(prefix)).collect();
        assert_eq!(
            below(connection, prefix).await.iter().collect::<Vec<_>>(),
            wanted,
            "{prefix:?}"
        );
    }
    // A tombstone is a row, too.
    commit(connection, vec![write("a%", 2, None)]).await;
    assert!(below(connection, "a%").await.contains(&"a%".to_owned()));
}

async fn the_newest_live_records_come_first(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let mut writes: Vec<Write> = [("c", 10), ("a", 30), ("b", 20), ("e", 5)]
        .map(|(name, number)| write(name, number, Some("v")))
        .into();
    writes.push(write("deleted", 40, None));
    for (name, number, expires_at) in [("expired", 50, now() - 1_000), ("expiring", 25, now() + 3_600_000)] {
        let mut expiring = write(name, number, Some("v"));
        expiring.entry.expires_at = Some(Timestamp(expires_at));
        writes.push(expiring);
    }
    writes.push(Write {
        key: key("carts", "new"),
        ..write("new", 60, Some("v"))
    });
    commit(connection, writes).await;
    let newest =
        async |connection: &mut dyn Connection, limit| names(connection.newest("orders", limit).await.expect("found"));
    assert_eq!(newest(connection, 10).await, ["a", "expiring", "b", "c", "e"]);
    assert_eq!(newest(connection, 2).await, ["a", "expiring"]);
    assert_eq!(newest(connection, 0).await, [""; 0]);
    commit(connection, vec![write("e", 35, Some("v"))]).await;
    assert_eq!(newest(connection, 2).await, ["e", "a"]);
}

async fn a_key_that_is_none_is_said(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let empty = "insert into tidegate_entries (namespace, key, version) values ('orders', '', 1)";
    fixture.execute(empty, empty).await;
    // No range begins before the shortest key.
    assert_eq!(below(connection, "").await, [""; 0]);
    let long = format!(
        "insert into tidegate_entries (namespace, key, version) values ('orders', '{}', 1)",
        "k".repeat(1_025)
    );
    fixture.execute(&long, &long).await;
    let refused = connection.keys_below("orders", "k", None, 10).await;
    assert_eq!(kind(refused), StoreErrorKind::Transient);
    assert_eq!(connection.keys_below("orders", "o", None, 10).await.expect("found"), []);
}

async fn rows_of_a_range_tell_what_stands_but_no_value(fixture: Fixture) {
    let connection = &mut *fixture.connection();
    let mut expiring = write("k3", 30, Some("four"));
    expiring.entry.expires_at = Some(Timestamp(1_700_000_000_123));
    let writes = vec![
        write("j", 1, Some("v")),
        write("k1", 10, Some("")),
        write("k2", 20, None),
        expiring,
        write("k\u{e9}", 40, Some("v")),
        write("l", 1, Some("v")),
        Write {
            key: key("carts", "k1"),
            ..write("k1", 50, Some("v"))
        },
    ];
    commit(connection, writes).await;
    let rows = connection.rows_below("orders", "k", None, 10).await.expect("found");
    let told: Vec<_> = rows
        .iter()
        .map(|row| (row.key.key(), row.version.get(), row.expires_at, row.value_bytes))
        .collect();
    assert_eq!(
        told,
        [
            ("k1", 10, None, Some(0)),
            ("k2", 20, None, None),
            ("k3", 30, Some(Timestamp(1_700_000_000_123)), Some(4)),
            ("k\u{e9}", 40, None, Some(1)),
        ]
    );
    let page = connection
        .rows_below("orders", "k", Some("k1"), 2)
        .await
        .expect("found");
    assert_eq!(page, rows[1..3]);
    let all = connection
        .rows_below("orders", "", Some("k3"), 10)
        .await
        .expect("found");
    assert_eq!(
        all.iter().map(|row| row.key.key()).collect::<Vec<_>>(),
        ["k\u{e9}", "l"]
    );
}

async fn a_load_ends_where_its_values_are_more_than_it_may_bring(fixture: Fixture) {
    const MIB: usize = 1 << 20;
    let connection = &mut *fixture.connection();
    let value = "v".repeat(MIB);
    // Absent ones and tombstones between them.
    let wanted: Vec<Key> = (0..60).map(|number| key("orders", &format!("k{number:02}"))).collect();
    for chunk in (0..60).collect::<Vec<_>>().chunks(10) {
        let writes = chunk.iter().filter(|number| *number % 3 != 1).map(|number| {
            let value = (number % 3 == 0).then_some(value.as_str());
            write(&format!("k{number:02}"), 1, value)
        });
        commit(connection, writes.collect()).await;
    }
    let (mut loaded, mut calls) = (Vec::new(), 0);
    while loaded.len() < wanted.len() {
        let entries = connection.load(&wanted[loaded.len()..]).await.expect("loaded");
        let values = entries.iter().flatten().filter(|entry| entry.value.is_some()).count();
        assert!(values <= LOAD_BYTES_MAX / MIB + 1, "{values} MiB at once");
        assert!(!entries.is_empty());
        loaded.extend(entries);
        calls += 1;
    }
    assert_eq!(calls, 2, "20 MiB of values");
    for (number, entry) in loaded.iter().enumerate() {
        match (number % 3, entry) {
            (0, Some(entry)) => assert_eq!(entry.value_bytes(), MIB),
            (1, None) => {}
            (2, Some(entry)) => assert_eq!(entry.value, None),
            other => panic!("{number}: {other:?}"),
        }
    }
}

contract! {
    rows_of_a_range_tell_what_stands_but_no_value,
    a_load_ends_where_its_values_are_more_than_it_may_bring,
    a_record_has_the_tags_of_the_write_that_stands,
    tags_are_kept_byte_for_byte,
    a_tag_is_of_its_namespace_and_goes_with_its_row,
    pages_follow_one_another,
    a_prefix_is_one_byte_for_byte,
    the_newest_live_records_come_first,
    a_key_that_is_none_is_said,
}

// PostgreSQL alone.

/// What the server counted of the table of entries since the statistics were reset: rows fetched by an index, and the scans of each index and of
/// the table.
async fn counted(fixture: &Fixture) -> (i64, Vec<String>) {
    let fetched = fixture
        .texts("select idx_tup_fetch::text from pg_stat_user_tables where relname = 'tidegate_entries'")
        .await;
    let scans = fixture
        .texts(
            "select indexrelname::text from pg_stat_user_indexes where relname = 'tidegate_entries' and idx_scan > 0
              union all select 'whole' from pg_stat_user_tables where relname = 'tidegate_entries' and seq_scan > 0
              order by 1",
        )
        .await;
    (fetched[0].parse().expect("a number"), scans)
}

#[tokio::test]
async fn keys_are_found_by_an_index_and_no_row_beside_them_is_read() {
    // A server of its own: nobody else is counted.
    let server = Server::start().await;
    let fixture = Fixture::postgres_at(Database::at(&server.create_database().await)).await;
    let mut connection = fixture.connection();
    let mut writes: Vec<Write> = (0..3_000).map(|n| write(&format!("k{n:05}"), 1, Some("v"))).collect();
    writes.extend((0..40).map(|n| tagged_write(&format!("k{n:05}t"), 1, &["red"])));
    commit(&mut *connection, writes).await;
    for analysed in [false, true] {
        if analysed {
            fixture.execute("vacuum analyze tidegate_entries", "").await;
        }
        for (what, index, rows_max) in [
            ("tagged", "tidegate_entries_tags", 40),
            ("keys", "tidegate_entries_pkey", 20),
            ("rows", "tidegate_entries_pkey", 20),
        ] {
            // A session of its own, whose statistics are there when it has ended.
            connection.reset();
            until("earlier sessions have ended", async || {
                fixture
                    .texts("select count(*)::text from pg_stat_activity where application_name = 'tidegate'")
                    .await
                    == ["0"]
            })
            .await;
            fixture.execute("select pg_stat_reset()", "").await;
            let found = match what {
                "tagged" => connection.tagged("orders", "red", None, 20).await.expect("found").len(),
                "keys" => connection
                    .keys_below("orders", "k02", None, 20)
                    .await
                    .expect("found")
                    .len(),
                _ => connection
                    .rows_below("orders", "k02", None, 20)
                    .await
                    .expect("found")
                    .len(),
            };
            assert_eq!(found, 20);
            connection.reset();
            until("the statistics arrive", async || !counted(&fixture).await.1.is_empty()).await;
            let (fetched, scans) = counted(&fixture).await;
            assert_eq!(scans, [index], "analysed: {analysed}");
            assert!(fetched <= rows_max, "{fetched} rows by {index}, analysed: {analysed}");
        }
    }
}
