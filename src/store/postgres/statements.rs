//! The SQL for PostgreSQL.
//!
//! Owns the texts, each constant, so that a session prepares it once. Does not own how they are called ([`super::connection`]). Invariants:
//! rows of the entries are reached by their primary key or by the indexes for collection and of tags; only the upsert moves one, and only forward.

/// The entries of keys, each with its place in the question, and whether the values before it are more than the third parameter: then
/// its own is left out. No value is read for its length.
pub(super) const LOAD: &str = "
    select position, version, case when before <= $3 then value end, expires_at, before > $3
      from (select wanted.position, e.version, e.value, e.expires_at,
                   coalesce(sum(octet_length(e.value)) over (
                       order by wanted.position rows between unbounded preceding and 1 preceding), 0) as before
              from unnest($1::text[], $2::text[]) with ordinality as wanted (namespace, key, position)
              join tidegate_entries e on e.namespace = wanted.namespace and e.key = wanted.key) as found";

/// What stands on keys, the same way.
pub(super) const STANDING: &str = "
    select wanted.position, e.version
      from unnest($1::text[], $2::text[]) with ordinality as wanted (namespace, key, position)
      join tidegate_entries e on e.namespace = wanted.namespace and e.key = wanted.key";

/// The horizon: see [`super::collect`].
pub(super) const HORIZON: &str = "select gc_horizon from tidegate_control where id = 1";

/// The keys of one tag. What has the tag is found first, and apart, so that it is by the index of tags, whatever the planner thinks of the
/// primary key's order.
pub(super) const TAGGED: &str = "
    with found as materialized (
        select namespace, key from tidegate_entries where tags @> array[$2]
    )
    select key from found where namespace = $1 and key > $3 order by key limit $4";

/// The keys of a range of the primary key: from the second parameter on, but not the third.
pub(super) const KEYS_WITHIN: &str = "
    select key from tidegate_entries
     where namespace = $1 and key >= $2 and key > $3 and key < $5 order by key limit $4";

/// The same without an end.
pub(super) const KEYS_FROM: &str = "
    select key from tidegate_entries where namespace = $1 and key >= $2 and key > $3 order by key limit $4";

/// The rows of a range of the primary key, as [`KEYS_WITHIN`], with the length of their values.
pub(super) const ROWS_WITHIN: &str = "
    select key, version, expires_at, octet_length(value), tags from tidegate_entries
     where namespace = $1 and key >= $2 and key > $3 and key < $5 order by key limit $4";

/// The same without an end.
pub(super) const ROWS_FROM: &str = "
    select key, version, expires_at, octet_length(value), tags from tidegate_entries
     where namespace = $1 and key >= $2 and key > $3 order by key limit $4";

/// Live records by their versions.
pub(super) const NEWEST: &str = "
    select key from tidegate_entries
     where namespace = $1 and value is not null and (expires_at is null or expires_at > now())
     order by version desc, key limit $2";

/// The control row, with the namespaces that have epochs of their own: one statement, so all of one snapshot.
pub(super) const CONTROL: &str = "
    select epoch, cache_server, gc_horizon, clock_timestamp(),
           array(select namespace from tidegate_namespace_epochs order by namespace),
           array(select epoch from tidegate_namespace_epochs order by namespace),
           array(select moved_at from tidegate_namespace_epochs order by namespace), moved_at
      from tidegate_control where id = 1";

/// The epoch, moved on from the one that is expected. What the namespaces had is of the time before.
pub(super) const MOVE_EPOCH: &str = "
    with moved as (
        update tidegate_control
           set epoch = $2, cache_server = coalesce($3, cache_server),
               moved_at = case when epoch = $2 then moved_at else clock_timestamp() end
         where id = 1 and epoch = $1 returning id
    ), ended as (
        delete from tidegate_namespace_epochs where exists (select from moved)
    )
    select count(*) from moved";

/// A namespace's own epoch, where there is room for one more.
pub(super) const MOVE_NAMESPACE_EPOCH: &str = "
    insert into tidegate_namespace_epochs (namespace, epoch, moved_at)
    select $1, $2, clock_timestamp()
     where exists (select from tidegate_namespace_epochs where namespace = $1)
        or (select count(*) from tidegate_namespace_epochs) < $3
        on conflict (namespace) do update set epoch = excluded.epoch, moved_at = excluded.moved_at";

/// The epoch of all, for a namespace that finds no room.
pub(super) const MOVE_ALL_EPOCHS: &str = "
    with moved as (
        update tidegate_control set epoch = $1, moved_at = clock_timestamp() where id = 1 returning id
    ), ended as (
        delete from tidegate_namespace_epochs where exists (select from moved)
    )
    select count(*) from moved";

/// The requests to remember, sorted by their names: a common table expression over the parameters of these numbers. One that is known stays as
/// it is, unless its window is over.
macro_rules! remembered {
    ($namespace:literal, $id:literal, $fingerprint:literal, $version:literal, $counter:literal, $expires_at:literal, $ends_at:literal,
     $ended_before:literal) => {
        concat!(
            "remembered as (
        insert into tidegate_requests as stored (namespace, request_id, fingerprint, version, counter, expires_at, ends_at)
        select * from unnest(",
            $namespace,
            "::text[], ",
            $id,
            "::text[], ",
            $fingerprint,
            "::bytea[], ",
            $version,
            "::bigint[], ",
            $counter,
            "::bigint[], ",
            $expires_at,
            "::timestamptz[], ",
            $ends_at,
            "::timestamptz[])
            on conflict (namespace, request_id) do update
           set fingerprint = excluded.fingerprint, version = excluded.version, counter = excluded.counter,
               expires_at = excluded.expires_at, ends_at = excluded.ends_at
         where stored.ends_at < ",
            $ended_before,
            "
        returning 1
    )"
        )
    };
}

macro_rules! upsert {
    () => {
        "insert into tidegate_entries as stored (namespace, key, version, value, expires_at, tags, collectable_at)
    select namespace, key, version, value, expires_at, tags::text[],
           case when value is null or expires_at is not null then greatest(expires_at, now()) end
      from unnest($1::text[], $2::text[], $3::bigint[], $4::bytea[], $5::timestamptz[], $6::text[])
           as batch (namespace, key, version, value, expires_at, tags)
     where case when version > (select gc_horizon from tidegate_control where id = 1) then true
                else exists (select from tidegate_entries known
                              where known.namespace = batch.namespace and known.key = batch.key
                                for key share) end
        on conflict (namespace, key) do update
       set version = excluded.version, value = excluded.value,
           expires_at = excluded.expires_at, tags = excluded.tags, collectable_at = excluded.collectable_at
     where stored.version < excluded.version
 returning stored.namespace, stored.key"
    };
}

/// The one rule. The tags of a row come as the text of an array, for a parameter has no arrays of unequal arrays. `now()` is when the statement began, which is before its commit by at most `statement_timeout`. Whatever is not above the
/// horizon may move a row and never make one: the row is locked, so that it stays until this commits.
pub(super) const UPSERT: &str = upsert!();

/// The same, and what its writes' requests are answered with.
pub(super) const UPSERT_AND_REMEMBER: &str = concat!(
    "with upserted as (",
    upsert!(),
    "), ",
    remembered!("$7", "$8", "$9", "$10", "$11", "$12", "$13", "now()"),
    " select namespace, key from upserted"
);

/// What requests are answered with.
pub(super) const REMEMBER: &str = concat!(
    "with ",
    remembered!("$1", "$2", "$3", "$4", "$5", "$6", "$7", "now()"),
    " select count(*) from remembered"
);

/// The same by another clock, in a transaction that takes it back.
pub(super) const CLAIM: &str = concat!(
    "with ",
    remembered!("$1", "$2", "$3", "$4", "$5", "$6", "$7", "$8"),
    " select count(*) from remembered"
);

/// What is remembered of requests, each with its place in the question, and the horizon. A row for each question.
pub(super) const ANSWERS: &str = "
    select wanted.position, (select gc_horizon from tidegate_control where id = 1),
           known.fingerprint, known.version, known.counter, known.expires_at, known.ends_at
      from unnest($1::text[], $2::text[]) with ordinality as wanted (namespace, id, position)
      left join tidegate_requests known on known.namespace = wanted.namespace and known.request_id = wanted.id";

/// What is over for a while. Gateways' clocks are not the server's, nor each other's, so for somewhat longer than they may be apart. No row is
/// waited for.
pub(super) const FORGET_REQUESTS: &str = "
    delete from tidegate_requests
     where ctid = any (array(
           select ctid from tidegate_requests where ends_at < now() - interval '1 minute'
            order by ends_at limit $1
              for update skip locked))";

/// The rows of keys, locked in the order of the keys until the transaction ends, so that what is decided of them holds. What a row holds comes along
/// where it is asked for.
pub(super) const LOCK: &str = "
    select wanted.position, e.version, e.value is not null, e.expires_at,
           case when wanted.content then e.value end, case when wanted.content then e.tags end
      from unnest($1::text[], $2::text[], $3::boolean[]) with ordinality as wanted (namespace, key, content, position)
      join tidegate_entries e on e.namespace = wanted.namespace and e.key = wanted.key
     order by wanted.position
       for update of e";

/// What was decided, guarded by what was seen: the version of a row, which is locked, or that there is none. The horizon guards an insert as it does
/// that of [`UPSERT`], for the same reason. How many of each were written: whoever misses one has to roll back.
/// Once they are, the session waits for locks as it does otherwise: the commit is not hurried.
pub(super) const WRITE_DECIDED: &str = concat!(
    "with batch as materialized (
        select * from unnest($1::text[], $2::text[], $3::bigint[], $4::bytea[], $5::timestamptz[], $6::text[], $7::bigint[])
               as batch (namespace, key, version, value, expires_at, tags, seen)
    ), updated as (
        update tidegate_entries as stored
           set version = batch.version, value = batch.value, expires_at = batch.expires_at, tags = batch.tags::text[],
               collectable_at = case when batch.value is null or batch.expires_at is not null then greatest(batch.expires_at, now()) end
          from batch
         where stored.namespace = batch.namespace and stored.key = batch.key and stored.version = batch.seen
        returning 1
    ), inserted as (
        insert into tidegate_entries (namespace, key, version, value, expires_at, tags, collectable_at)
        select namespace, key, version, value, expires_at, tags::text[],
               case when value is null or expires_at is not null then greatest(expires_at, now()) end
          from batch
         where seen is null and version > (select gc_horizon from tidegate_control where id = 1)
            on conflict (namespace, key) do nothing
        returning 1
    ), ",
    remembered!("$8", "$9", "$10", "$11", "$12", "$13", "$14", "$15"),
    " select updated, inserted, remembered,
             set_config('lock_timeout', case when updated + inserted + remembered >= 0 then $16::text end, true)
        from (select (select count(*) from updated), (select count(*) from inserted), (select count(*) from remembered))
             as written (updated, inserted, remembered)"
);

/// Whether dead letters are kept of keys, from a version on, each with its place in the question. A row for each question.
pub(super) const ARE_BURIED: &str = "
    select wanted.position,
           exists (select from tidegate_dead_letters letter
                    where letter.namespace = wanted.namespace and letter.key = wanted.key and letter.version >= wanted.version)
      from unnest($1::text[], $2::text[], $3::bigint[]) with ordinality as wanted (namespace, key, version, position)";

/// A row under a key that no other session probes with.
pub(super) const PROBE: &str = "
    insert into tidegate_entries as stored (namespace, key, version, value)
    values ('tidegate.probe', 'probe-' || pg_backend_pid(), 1, '')
        on conflict (namespace, key) do update set version = excluded.version";

/// A dead letter, once. One at a time in the whole database, from before an id is taken until the letter can be seen: nobody sees an id while a
/// lower one is yet to come, so who deals with all up to one that was seen deals with none that was not. It is one statement, so that a gateway
/// that is stopped in the middle holds up no other.
pub(super) const BURY: &str = "
    with locked as materialized (select pg_advisory_xact_lock(6074304837911634)::text as lock)
    insert into tidegate_dead_letters (namespace, key, version, value, expires_at, code, reason, tags)
    select $1, $2, $3, $4, $5, $6, $7, $8::text::text[] from locked
        on conflict (namespace, key, version) do nothing";

/// Dead letters by their ids, with their values where they are asked for. No value is read for its length.
pub(super) const LETTERS: &str = "
    select id, namespace, key, version, octet_length(value), case when $5 then value end, expires_at, tags, code, reason, attempts,
           buried_at, retried_at
      from tidegate_dead_letters
     where id > $1 and id <= $2 and ($3::text is null or namespace = $3)
     order by id limit $4";

/// The highest id of all.
pub(super) const LAST_LETTER: &str = "select coalesce(max(id), 0) from tidegate_dead_letters";

/// Dead letters that are dealt with.
pub(super) const DROP_LETTERS: &str = "delete from tidegate_dead_letters where id = any ($1::bigint[])";

/// A dead letter that was refused once more.
pub(super) const REFUSE_LETTER: &str = "
    update tidegate_dead_letters set code = $2, reason = $3, attempts = attempts + 1, retried_at = clock_timestamp()
     where id = $1 returning attempts, retried_at";

/// Its own node, else one never used, else the one that was given back or lapsed longest ago: a node stays with its directory for as long
/// as it can.
pub(super) const LEASE_NODE: &str = "
    insert into tidegate_nodes as held (node, directory, start, renewed_at)
    select node, $1, $2, clock_timestamp()
      from (select coalesce(
                (select node from tidegate_nodes where directory = $1),
                (select min(free.node) from generate_series(1, 1023) as free (node)
                  where not exists (select from tidegate_nodes used where used.node = free.node)),
                (select node from tidegate_nodes
                  where renewed_at is null or renewed_at < clock_timestamp() - $3 * interval '1 millisecond'
                  order by renewed_at nulls first limit 1)
            ) as node) as chosen
     where node is not null
        on conflict (node) do update
       set directory = excluded.directory, start = excluded.start, renewed_at = excluded.renewed_at
 returning held.node::integer, held.high_water";

/// The lease is the claimant's while the row has its marks.
pub(super) const RENEW_NODE: &str = "
    update tidegate_nodes
       set renewed_at = clock_timestamp(), high_water = greatest(high_water, $4)
     where node = $1 and directory = $2 and start = $3 and renewed_at is not null";

/// The row stays, for its mark and its directory.
pub(super) const RELEASE_NODE: &str = "
    update tidegate_nodes
       set renewed_at = null, high_water = greatest(high_water, $4)
     where node = $1 and directory = $2 and start = $3 and renewed_at is not null";

/// The horizon, raised to the highest version of what is due; no row when nothing is. A row that was stamped after the retention began, by
/// a clock that is ahead, is not due: the horizon never comes near a version that a gateway stamps now.
pub(super) const RAISE_HORIZON: &str = "
    update tidegate_control
       set gc_horizon = greatest(gc_horizon, due.version)
      from (select max(version) as version
              from (select version from tidegate_entries
                     where collectable_at < now() - $1 * interval '1 millisecond'
                       and version <= greatest((extract(epoch from now()) * 1000)::bigint - $1 - 1704067200000, 0) << 21
                     order by collectable_at limit $2) as oldest) as due
     where id = 1 and due.version is not null
 returning gc_horizon";

/// The transactions of others that may write to the entries: all that do now, or those of an earlier answer that still do.
pub(super) const WRITERS: &str = "
    select virtualtransaction from pg_locks
     where locktype = 'relation' and mode = 'RowExclusiveLock' and granted
       and relation = 'tidegate_entries'::regclass
       and database = (select oid from pg_database where datname = current_database())
       and pid is distinct from pg_backend_pid()
       and ($1::text[] is null or virtualtransaction = any ($1))";

/// What is due at or below the horizon. The rows are locked before they are deleted, and none is waited for, so it deadlocks with no commit.
/// A row that a commit moved on meanwhile has another ctid, and stays.
pub(super) const COLLECT: &str = "
    delete from tidegate_entries
     where ctid = any (array(
           select ctid from tidegate_entries
            where collectable_at < now() - $1 * interval '1 millisecond' and version <= $2
            order by collectable_at limit $3
              for update skip locked))";
