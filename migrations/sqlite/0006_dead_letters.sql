-- What migrations/postgres/0006_dead_letters.sql adds, in SQLite's types.

-- A JSON array; null for nothing.
alter table tidegate_dead_letters add column tags text;
-- How often the write was refused: once to be put here, and once for each retry that failed.
alter table tidegate_dead_letters add column attempts integer not null default 1;
-- When a retry failed last; null while none did.
alter table tidegate_dead_letters add column retried_at integer;
