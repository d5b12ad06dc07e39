//! The store as an auditor sees it: a trigger notes every change of a row, for good.
//!
//! Owns the trigger and the questions. Judges nothing.

use std::collections::HashMap;

use sqlx::PgConnection;

use crate::{
    harness::{SOON, eventually, expect, postgres},
    ledger::{Change, Key},
};

/// Rows of one key change one after the other, so their numbers rise as they do. What the gateway probes with is not of this.
const TRIGGER: &str = "
    create table audit (
        seq bigint generated always as identity primary key,
        operation text not null,
        namespace text not null,
        key text not null,
        before bigint,
        version bigint,
        value bytea,
        expires_at timestamptz
    );
    create function note_change() returns trigger language plpgsql as $$
    begin
        if tg_op = 'DELETE' then
            insert into audit (operation, namespace, key, before) values (tg_op, old.namespace, old.key, old.version);
        elsif new.namespace <> 'tidegate.probe' then
            insert into audit (operation, namespace, key, before, version, value, expires_at)
            values (tg_op, new.namespace, new.key, case tg_op when 'UPDATE' then old.version end,
                    new.version, new.value, new.expires_at);
        end if;
        return null;
    end $$;
    create trigger note_change after insert or update or delete on tidegate_entries
        for each row execute function note_change()";

const CHANGES: &str = "
    select seq, namespace, key, before, version, value,
           (extract(epoch from expires_at) * 1000)::bigint as expires_millis
      from audit where seq > $1 order by seq";

/// The database of the gateway.
pub struct Store {
    url: String,
    /// The last row of the audit that was read.
    read: i64,
}

impl Store {
    /// A database that a gateway has made its tables in.
    pub async fn watch(url: &str) -> Store {
        let store = Store {
            url: url.to_owned(),
            read: 0,
        };
        let mut connection = store.connect().await;
        sqlx::raw_sql(TRIGGER)
            .execute(&mut connection)
            .await
            .expect("a superuser may");
        store
    }

    async fn connect(&self) -> PgConnection {
        postgres::connect(&self.url).await
    }

    /// The version of every key, as it stands now.
    pub async fn versions(&self) -> HashMap<Key, i64> {
        let rows: Vec<(String, String, i64)> = sqlx::query_as("select namespace, key, version from tidegate_entries")
            .fetch_all(&mut self.connect().await)
            .await
            .expect("the table of entries can be read");
        rows.into_iter()
            .filter_map(|(namespace, key, version)| Some((Key::parse(&namespace, &key)?, version)))
            .collect()
    }

    /// Waits until no session of a gateway, however dead that is, is in the middle of anything.
    pub async fn quiet(&self) {
        const BUSY: &str = "
            select count(*) from pg_stat_activity
             where datname = current_database() and application_name = 'tidegate' and state <> 'idle'";
        let mut connection = self.connect().await;
        eventually("no session of a gateway is busy", SOON, async || {
            let busy: i64 = sqlx::query_scalar(BUSY)
                .fetch_one(&mut connection)
                .await
                .expect("a superuser sees every session");
            expect(busy == 0, busy)
        })
        .await;
    }

    /// The changes since the last time. Nothing may be under way.
    pub async fn changes(&mut self) -> Vec<Change> {
        let changes: Vec<Change> = sqlx::query_as(CHANGES)
            .bind(self.read)
            .fetch_all(&mut self.connect().await)
            .await
            .expect("the audit can be read");
        self.read = changes.last().map_or(self.read, |last| last.seq);
        changes
    }

    /// How many writes were set aside.
    pub async fn dead_letters(&self) -> i64 {
        sqlx::query_scalar("select count(*) from tidegate_dead_letters")
            .fetch_one(&mut self.connect().await)
            .await
            .expect("the table of dead letters can be read")
    }

    /// The last changes of a key, for people.
    pub async fn history(&self, key: Key) -> Vec<String> {
        const LAST: &str = "
            select format('audit %s: %s from version %s to %s%s', seq, operation, before, version,
                          case when value is null then ', a tombstone' else '' end)
              from (select * from audit where namespace = $1 and key = $2 order by seq desc limit 8) as last order by seq";
        sqlx::query_scalar(LAST)
            .bind(key.namespace())
            .bind(key.name())
            .fetch_all(&mut self.connect().await)
            .await
            .expect("the audit can be read")
    }
}
