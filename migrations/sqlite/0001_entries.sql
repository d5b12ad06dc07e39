-- The tables of the gateway: those of migrations/postgres, in SQLite's types. Times are milliseconds since the Unix epoch.

-- 'TdGt': marks the file as the gateway's own, so that it never adopts the database of another program.
pragma application_id = 1415858036;

create table tidegate_entries (
    namespace      text not null,
    key            text not null,
    -- The place of the write among all writes of its key. Only ever rises.
    version        integer not null check (version > 0),
    -- Null is a tombstone, what a delete leaves.
    value          blob,
    -- When the record ceases to exist; null for never.
    expires_at     integer,
    -- From when a tombstone or expiring row counts its retention: the later of expiry and commit. Null for a live row without expiry,
    -- so that an ordinary overwrite does not touch the index below.
    collectable_at integer,
    primary key (namespace, key)
) strict;

create index tidegate_entries_collectable on tidegate_entries (collectable_at) where collectable_at is not null;

-- What a reader of the gateway sees: live records only.
create view tidegate_records as
    select namespace,
           key,
           value,
           version,
           (version >> 21) + 1704067200000 as stamped_at,
           expires_at
      from tidegate_entries
     where value is not null
       and (expires_at is null or expires_at > cast(round(unixepoch('subsec') * 1000) as integer));

-- Acknowledged writes that tidegate_entries refuses for what they hold. Add no constraint here: it must take what the other table refused.
create table tidegate_dead_letters (
    id         integer primary key autoincrement,
    namespace  text not null,
    key        text not null,
    version    integer not null,
    value      blob,
    expires_at integer,
    code       text,
    reason     text not null,
    buried_at  integer not null default (cast(round(unixepoch('subsec') * 1000) as integer)),
    unique (namespace, key, version)
) strict;

-- The clock's high-water mark. A file serves one gateway, node 0.
create table tidegate_nodes (
    node       integer primary key check (node = 0),
    directory  text not null,
    start      text not null,
    renewed_at integer,
    high_water integer
) strict;
