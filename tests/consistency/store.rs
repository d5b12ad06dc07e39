//! The store as an auditor sees it: a trigger notes what every row became, for good.
//!
//! Owns the trigger and the questions. Judges nothing.

use std::collections::BTreeMap;

use sqlx::PgConnection;

use crate::{
    harness::{SOON, eventually, expect, postgres},
    history::Record,
    keys,
    load::tell,
};

/// Rows of one key change one after the other, so their numbers rise as they do. What the gateway probes with is not of this. A row that is
/// deleted leaves a gap that shows: what stands then is not what came last.
const TRIGGER: &str = "
    create table audit (
        seq bigint generated always as identity primary key,
        namespace text not null,
        key text not null,
        version bigint not null,
        value bytea
    );
    create function note_change() returns trigger language plpgsql as $$
    begin
        if new.namespace in ('through', 'behind', 'mixed', 'counter') then
            insert into audit (namespace, key, version, value) values (new.namespace, new.key, new.version, new.value);
        end if;
        return null;
    end $$;
    create trigger note_change after insert or update on tidegate_entries
        for each row execute function note_change()";

type Row = (String, String, i64, Option<Vec<u8>>);

/// The database of the gateways.
pub struct Store {
    url: String,
}

impl Store {
    /// A database that a gateway has made its tables in.
    pub async fn watch(url: &str) -> Store {
        let store = Store { url: url.to_owned() };
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

    /// What every row became, in its order.
    pub async fn applied(&self) -> BTreeMap<usize, Vec<Record>> {
        let mut applied: BTreeMap<usize, Vec<Record>> = BTreeMap::new();
        const ALL: &str = "select namespace, key, version, value from audit order by seq";
        for row in self.rows_of(ALL).await {
            let (key, record) = read(row);
            applied.entry(key).or_default().push(record);
        }
        applied
    }

    /// What stands.
    pub async fn rows(&self) -> BTreeMap<usize, Record> {
        const ALL: &str = "
            select namespace, key, version, value from tidegate_entries
             where namespace in ('through', 'behind', 'mixed', 'counter')";
        self.rows_of(ALL).await.into_iter().map(read).collect()
    }

    async fn rows_of(&self, query: &'static str) -> Vec<Row> {
        sqlx::query_as(query)
            .fetch_all(&mut self.connect().await)
            .await
            .expect("the tables can be read")
    }

    /// How many writes were set aside.
    pub async fn dead_letters(&self) -> i64 {
        sqlx::query_scalar("select count(*) from tidegate_dead_letters")
            .fetch_one(&mut self.connect().await)
            .await
            .expect("the table of dead letters can be read")
    }
}

fn read((namespace, key, version, value): Row) -> (usize, Record) {
    let number =
        keys::parse(&namespace, &key).unwrap_or_else(|| panic!("a row of a key that nobody wrote: {namespace} {key}"));
    let value = value.map(|value| tell(number, &value));
    (number, Record { version, value })
}
