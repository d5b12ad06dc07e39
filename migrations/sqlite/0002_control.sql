-- What migrations/postgres/0002_control.sql adds, in SQLite's types.

create table tidegate_control (
    id         integer primary key default 1 check (id = 1),
    -- A version, or 0. Every row of tidegate_entries that was ever collected had a version at or below it, so a write at or below it
    -- that finds no row is refused: it might bring back what was deleted. Only ever rises. Never delete the row.
    gc_horizon integer not null default 0 check (gc_horizon >= 0)
) strict;

insert into tidegate_control default values;
