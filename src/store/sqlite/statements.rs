//! The SQL for SQLite.
//!
//! Owns the texts, each constant, so that a connection prepares it once: SQLite has no arrays, so statements of several rows come in a few
//! fixed sizes. Does not own how they are called ([`super::connection`]). Invariants: rows of the entries are reached by their primary key or
//! by the index for collection, and their keys by the table of tags; only the upsert moves one, and only forward.

use std::{
    iter,
    sync::{Arc, LazyLock},
};

/// How many rows a statement has: a batch is cut into the largest that fit.
const ROWS: [usize; 4] = [256, 32, 4, 1];

/// The clock of the machine in milliseconds, the same throughout a statement.
macro_rules! now {
    () => {
        "cast(round(unixepoch('subsec') * 1000) as integer)"
    };
}

/// A row under a key of its own.
pub(super) const PROBE: &str = "
    insert into tidegate_entries (namespace, key, version, value) values ('tidegate.probe', 'probe', 1, x'')
        on conflict (namespace, key) do update set version = excluded.version";

/// A dead letter, once.
pub(super) const BURY: &str = "
    insert into tidegate_dead_letters (namespace, key, version, value, expires_at, code, reason, tags)
    values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
        on conflict (namespace, key, version) do nothing";

/// Dead letters by their ids, with their values where they are asked for.
pub(super) const LETTERS: &str = "
    select id, namespace, key, version, length(value), case when ?5 then value end, expires_at, tags, code, reason, attempts,
           buried_at, retried_at
      from tidegate_dead_letters
     where id > ?1 and id <= ?2 and (?3 is null or namespace = ?3)
     order by id limit ?4";

/// The highest id of all.
pub(super) const LAST_LETTER: &str = "select coalesce(max(id), 0) from tidegate_dead_letters";

/// Dead letters that are dealt with: a JSON array of their ids.
pub(super) const DROP_LETTERS: &str = "delete from tidegate_dead_letters where id in (select value from json_each(?1))";

/// A dead letter that was refused once more.
pub(super) const REFUSE_LETTER: &str = concat!(
    "update tidegate_dead_letters set code = ?2, reason = ?3, attempts = attempts + 1, retried_at = ",
    now!(),
    " where id = ?1 returning attempts, retried_at"
);

/// There is one node, and the last to start has it.
pub(super) const LEASE_NODE: &str = concat!(
    "insert into tidegate_nodes (node, directory, start, renewed_at) values (0, ?1, ?2, ",
    now!(),
    ") on conflict (node) do update
       set directory = excluded.directory, start = excluded.start, renewed_at = excluded.renewed_at
    returning high_water"
);

/// The lease is the claimant's while the row has its marks.
pub(super) const RENEW_NODE: &str = concat!(
    "update tidegate_nodes set renewed_at = ",
    now!(),
    ", high_water = coalesce(max(high_water, ?4), high_water, ?4)
     where node = ?1 and directory = ?2 and start = ?3 and renewed_at is not null"
);

/// The row stays, for its mark.
pub(super) const RELEASE_NODE: &str = "
    update tidegate_nodes set renewed_at = null, high_water = coalesce(max(high_water, ?4), high_water, ?4)
     where node = ?1 and directory = ?2 and start = ?3 and renewed_at is not null";

/// The horizon.
pub(super) const HORIZON: &str = "select gc_horizon from tidegate_control where id = 1";

/// The keys of one tag.
pub(super) const TAGGED: &str = "
    select key from tidegate_tags where namespace = ?1 and tag = ?2 and key > ?3 order by key limit ?4";

/// The keys of a range of the primary key: from the second parameter on, but not the third. The `+` leaves the choice of the index's bound no
/// question.
pub(super) const KEYS_WITHIN: &str = "
    select key from tidegate_entries
     where namespace = ?1 and key >= ?2 and +key > ?3 and key < ?5 order by key limit ?4";

/// The same without an end.
pub(super) const KEYS_FROM: &str = "
    select key from tidegate_entries where namespace = ?1 and key >= ?2 and +key > ?3 order by key limit ?4";

/// The rows of a range of the primary key, as [`KEYS_WITHIN`], with the length of their values.
pub(super) const ROWS_WITHIN: &str = "
    select key, version, expires_at, length(value), tags from tidegate_entries
     where namespace = ?1 and key >= ?2 and +key > ?3 and key < ?5 order by key limit ?4";

/// The same without an end.
pub(super) const ROWS_FROM: &str = "
    select key, version, expires_at, length(value), tags from tidegate_entries
     where namespace = ?1 and key >= ?2 and +key > ?3 order by key limit ?4";

/// Live records by their versions.
pub(super) const NEWEST: &str = concat!(
    "select key from tidegate_entries
      where namespace = ?1 and value is not null and (expires_at is null or expires_at > ",
    now!(),
    ") order by version desc, key limit ?2"
);

/// The control row.
pub(super) const CONTROL: &str = concat!(
    "select epoch, cache_server, gc_horizon, ",
    now!(),
    ", moved_at from tidegate_control where id = 1"
);

/// The namespaces that have epochs of their own.
pub(super) const NAMESPACE_EPOCHS: &str = "select namespace, epoch, moved_at from tidegate_namespace_epochs";

/// The epoch, moved on from the one that is expected.
pub(super) const MOVE_EPOCH: &str = concat!(
    "update tidegate_control
        set epoch = ?2, cache_server = coalesce(?3, cache_server), moved_at = case when epoch = ?2 then moved_at else ",
    now!(),
    " end where id = 1 and epoch = ?1"
);

/// The epoch of all, for a namespace that finds no room for its own.
pub(super) const MOVE_ALL_EPOCHS: &str = concat!(
    "update tidegate_control set epoch = ?1, moved_at = ",
    now!(),
    " where id = 1"
);

/// What the namespaces had is of the time before.
pub(super) const END_NAMESPACE_EPOCHS: &str = "delete from tidegate_namespace_epochs";

/// A namespace's own epoch, where there is room for one more.
pub(super) const MOVE_NAMESPACE_EPOCH: &str = concat!(
    "insert into tidegate_namespace_epochs (namespace, epoch, moved_at)
     select ?1, ?2, ",
    now!(),
    "  where exists (select 1 from tidegate_namespace_epochs where namespace = ?1)
         or (select count(*) from tidegate_namespace_epochs) < ?3
         on conflict (namespace) do update set epoch = excluded.epoch, moved_at = excluded.moved_at"
);

/// The horizon, raised to the highest version of what is due; no row when nothing is. A row that was stamped after the retention began, by
/// a clock that is ahead, is not due.
pub(super) const RAISE_HORIZON: &str = concat!(
    "update tidegate_control set gc_horizon = max(gc_horizon, due.version)
       from (select max(version) as version from (
             select version from tidegate_entries where collectable_at < ",
    now!(),
    " - ?1 and version <= max(",
    now!(),
    " - ?1 - 1704067200000, 0) << 21 order by collectable_at limit ?2)) as due
      where id = 1 and due.version is not null
     returning gc_horizon"
);

/// What is due at or below the horizon: tombstones and expired rows whose retention is over, oldest first.
pub(super) const COLLECT: &str = concat!(
    "delete from tidegate_entries where rowid in (
        select rowid from tidegate_entries where collectable_at < ",
    now!(),
    " - ?1 and version <= ?2 order by collectable_at limit ?3)"
);

/// What is over for a while: the gateway's clock is not quite the machine's.
pub(super) const FORGET_REQUESTS: &str = concat!(
    "delete from tidegate_requests where (namespace, request_id) in (
        select namespace, request_id from tidegate_requests where ends_at < ",
    now!(),
    " - 60000 order by ends_at limit ?1)"
);

/// A statement in each of the sizes of [`ROWS`].
pub(super) type Sized = [Arc<str>; ROWS.len()];

/// The one rule. Whatever is not above the horizon may move a row and never make one.
pub(super) static UPSERT: LazyLock<Sized> = LazyLock::new(|| {
    sized(
        concat!(
            "insert into tidegate_entries as stored (namespace, key, version, value, expires_at, tags, collectable_at)
             select column1, column2, column3, column4, column5, column6,
                    case when column4 is null or column5 is not null then max(coalesce(column5, 0), ",
            now!(),
            ") end from (values "
        ),
        |_| "(?,?,?,?,?,?)".to_owned(),
        ") where column3 > (select gc_horizon from tidegate_control where id = 1)
              or exists (select 1 from tidegate_entries known where known.namespace = column1 and known.key = column2)
         on conflict (namespace, key) do update
            set version = excluded.version, value = excluded.value,
                expires_at = excluded.expires_at, tags = excluded.tags, collectable_at = excluded.collectable_at
          where stored.version < excluded.version
         returning namespace, key",
    )
});

/// The entries of keys, each with its place in the question. `cross join` fixes the order: each key is looked up by the primary key.
pub(super) static LOAD: LazyLock<Sized> = LazyLock::new(|| {
    sized(
        "with wanted (position, namespace, key) as (values ",
        |place| format!("({place},?,?)"),
        ") select wanted.position, e.version, e.value, e.expires_at from wanted
             cross join tidegate_entries e on e.namespace = wanted.namespace and e.key = wanted.key",
    )
});

/// What stands on keys, the same way.
pub(super) static STANDING: LazyLock<Sized> = LazyLock::new(|| {
    sized(
        "with wanted (position, namespace, key) as (values ",
        |place| format!("({place},?,?)"),
        ") select wanted.position, e.version from wanted
             cross join tidegate_entries e on e.namespace = wanted.namespace and e.key = wanted.key",
    )
});

/// The rows of keys as [`LOAD`] finds them, with what they hold where it is asked for.
pub(super) static FOUND: LazyLock<Sized> = LazyLock::new(|| {
    sized(
        "with wanted (position, namespace, key, content) as (values ",
        |place| format!("({place},?,?,?)"),
        ") select wanted.position, e.version, e.value is not null, e.expires_at,
                  case when wanted.content then e.value end, case when wanted.content then e.tags end
             from wanted cross join tidegate_entries e on e.namespace = wanted.namespace and e.key = wanted.key",
    )
});

/// What is remembered of requests, the same way.
pub(super) static ANSWERS: LazyLock<Sized> = LazyLock::new(|| {
    sized(
        "with wanted (position, namespace, id) as (values ",
        |place| format!("({place},?,?)"),
        ") select wanted.position, r.fingerprint, r.version, r.counter, r.expires_at, r.ends_at from wanted
             cross join tidegate_requests r on r.namespace = wanted.namespace and r.request_id = wanted.id",
    )
});

/// Whether dead letters are kept of keys, from a version on. A row for each question.
pub(super) static ARE_BURIED: LazyLock<Sized> = LazyLock::new(|| {
    sized(
        "with wanted (position, namespace, key, version) as (values ",
        |place| format!("({place},?,?,?)"),
        ") select wanted.position,
                  exists (select 1 from tidegate_dead_letters letter
                           where letter.namespace = wanted.namespace and letter.key = wanted.key
                             and letter.version >= wanted.version)
             from wanted",
    )
});

macro_rules! remember {
    ($unless:expr) => {
        sized(
            "insert into tidegate_requests as stored (namespace, request_id, fingerprint, version, counter, expires_at, ends_at)
             select column1, column2, column3, column4, column5, column6, column7 from (values ",
            |_| "(?,?,?,?,?,?,?)".to_owned(),
            concat!(
                ") where true on conflict (namespace, request_id) do update
                    set fingerprint = excluded.fingerprint, version = excluded.version, counter = excluded.counter,
                        expires_at = excluded.expires_at, ends_at = excluded.ends_at",
                $unless
            ),
        )
    };
}

/// What requests are answered with. One that is known stays as it is, unless its window is over.
pub(super) static REMEMBER: LazyLock<Sized> = LazyLock::new(|| remember!(concat!(" where stored.ends_at < ", now!())));

/// The same, in the place of what is known: of those that were decided it is known to be over.
pub(super) static REMEMBER_DECIDED: LazyLock<Sized> = LazyLock::new(|| remember!(""));

fn sized(beginning: &str, row: impl Fn(usize) -> String, end: &str) -> Sized {
    ROWS.map(|rows| {
        let rows: Vec<String> = (0..rows).map(&row).collect();
        format!("{beginning}{}{end}", rows.join(",")).into()
    })
}

/// Cuts items into pieces of the sizes of [`ROWS`]: each piece, its offset, and its statement.
pub(super) fn pieces<'a, T>(
    statements: &'static Sized,
    items: &'a [T],
) -> impl Iterator<Item = (usize, &'a [T], Arc<str>)> {
    let mut offset = 0;
    iter::from_fn(move || {
        let left = &items[offset..];
        let size = ROWS.iter().position(|rows| *rows <= left.len())?;
        let piece = (offset, &left[..ROWS[size]], Arc::clone(&statements[size]));
        offset += ROWS[size];
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_in_order() {
        for len in [0, 1, 3, 4, 35, 256, 1_000, 5_000] {
            let items: Vec<usize> = (0..len).collect();
            let mut seen = Vec::new();
            for (offset, piece, statement) in pieces(&LOAD, &items) {
                assert_eq!(offset, seen.len());
                assert_eq!(statement.matches('?').count(), 2 * piece.len());
                seen.extend_from_slice(piece);
            }
            assert_eq!(seen, items);
        }
    }
}
