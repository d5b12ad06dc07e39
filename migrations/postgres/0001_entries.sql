-- The tables of the gateway. They live in the first schema of the connection's search_path.
--
-- Keys are compared byte by byte (collate "C"), as the gateway compares them: batches sorted by it take row locks in one order.

create table tidegate_entries (
    namespace      text collate "C" not null,
    key            text collate "C" not null,
    version        bigint not null check (version > 0),
    value          bytea,
    expires_at     timestamptz,
    collectable_at timestamptz,
    primary key (namespace, key)
) with (
    -- Room on each page for the next version of a row, so that an update stays on its page and touches no index (HOT).
    fillfactor = 80,
    -- Every overwrite leaves a dead row: clear them before a fifth of a large table is dead.
    autovacuum_vacuum_scale_factor = 0.05
);

-- Values are mostly compressed or encrypted by those who send them; trying again costs more than it saves.
alter table tidegate_entries alter column value set storage external;

-- Serves the collection of tombstones and expired rows. It is on a column of its own, null for a live row that never expires: an index
-- or an index predicate on value or expires_at would make every overwrite touch it, and forbid HOT updates to all of them.
create index tidegate_entries_collectable on tidegate_entries (collectable_at) where collectable_at is not null;

comment on table tidegate_entries is
    'One row per key, the newest write; tombstones included. Read tidegate_records for live records. Whoever writes past the gateway raises the version, and is seen once cached copies have ended.';
comment on column tidegate_entries.namespace is 'The namespace: [a-z][a-z0-9_.-]{0,62}.';
comment on column tidegate_entries.key is 'The key within its namespace: 1 to 1024 bytes.';
comment on column tidegate_entries.version is 'The place of the write among all writes of its key. Only ever rises: 42 bits of milliseconds since 2024-01-01, 11 bits of counter, 10 bits of node.';
comment on column tidegate_entries.value is 'The value; null is a tombstone, what a delete leaves.';
comment on column tidegate_entries.expires_at is 'When the record ceases to exist, to the millisecond; null for never.';
comment on column tidegate_entries.collectable_at is 'From when a tombstone or expiring row counts its retention: the later of expiry and commit. Null for a live row that never expires.';

create view tidegate_records as
    select namespace,
           key,
           value,
           version,
           timestamptz 'epoch' + ((version >> 21) + 1704067200000) * interval '1 millisecond' as stamped_at,
           expires_at
      from tidegate_entries
     where value is not null
       and (expires_at is null or expires_at > now());

comment on view tidegate_records is 'What a reader of the gateway sees: live records only.';
comment on column tidegate_records.stamped_at is 'When the write was stamped, by the clock of the gateway that did.';

create table tidegate_dead_letters (
    id         bigint generated always as identity primary key,
    namespace  text collate "C" not null,
    key        text collate "C" not null,
    version    bigint not null,
    value      bytea,
    expires_at timestamptz,
    code       text,
    reason     text not null,
    buried_at  timestamptz not null default now(),
    unique (namespace, key, version)
);

alter table tidegate_dead_letters alter column value set storage external;

comment on table tidegate_dead_letters is
    'Acknowledged writes that tidegate_entries refuses for what they hold. Add no constraint here: it must take what the other table refused.';
comment on column tidegate_dead_letters.code is 'The SQLSTATE of the refusal.';
comment on column tidegate_dead_letters.reason is 'The message of the refusal.';
comment on column tidegate_dead_letters.buried_at is 'When the write was put here.';

create table tidegate_nodes (
    node       smallint primary key check (node between 1 and 1023),
    directory  text not null unique,
    start      text not null,
    renewed_at timestamptz,
    high_water bigint
);

comment on table tidegate_nodes is
    'Who stamps versions with which node id. Never delete a row: its high_water keeps a later holder of the id from stamping a version twice.';
comment on column tidegate_nodes.directory is 'The random mark kept with the holder''s data directory: a restart gets its node back.';
comment on column tidegate_nodes.start is 'The random mark of the start of the process that holds the lease.';
comment on column tidegate_nodes.renewed_at is 'When the lease was last renewed; null once it was given back.';
comment on column tidegate_nodes.high_water is 'The highest version that the holders of the id reported.';
