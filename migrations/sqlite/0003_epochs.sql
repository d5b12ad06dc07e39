-- What migrations/postgres/0003_epochs.sql adds, in SQLite's types. The table is made anew, for a column that is added may have no random
-- default.

create table tidegate_control_next (
    id           integer primary key default 1 check (id = 1),
    -- A version, or 0. Every row of tidegate_entries that was ever collected had a version at or below it, so a write at or below it
    -- that finds no row is refused: it might bring back what was deleted. Only ever rises. Never delete the row.
    gc_horizon   integer not null default 0 check (gc_horizon >= 0),
    -- The epoch of the shared cache: part of every key of it. Random; never set it back to a value it had.
    epoch        integer not null default (1 + abs(random() / 2)) check (epoch > 0),
    -- When it was moved last; null while it never was.
    moved_at     integer,
    -- The run_id of the Redis for which the epoch holds; null until the gateway has seen one.
    cache_server text
) strict;

insert into tidegate_control_next (id, gc_horizon) select id, gc_horizon from tidegate_control;
drop table tidegate_control;
alter table tidegate_control_next rename to tidegate_control;

-- Namespaces of which the cached copies were invalidated since tidegate_control.epoch began; emptied when that moves.
create table tidegate_namespace_epochs (
    namespace text primary key,
    -- Part of the keys of the namespace in the shared cache. Random; never set it back to a value it had.
    epoch     integer not null check (epoch > 0),
    moved_at  integer not null
) strict;
