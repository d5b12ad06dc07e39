-- What all gateways of a store share. One row, read by every upsert.

create table tidegate_control (
    id         smallint primary key default 1 check (id = 1),
    gc_horizon bigint not null default 0 check (gc_horizon >= 0)
);

insert into tidegate_control default values;

comment on table tidegate_control is
    'What all gateways share: one row. Never delete it, and never lower a value of it.';
comment on column tidegate_control.gc_horizon is
    'A version, or 0. Every row of tidegate_entries that was ever collected had a version at or below it, so a write at or below it that finds no row is refused: it might bring back what was deleted. Only ever rises.';

comment on table tidegate_dead_letters is
    'Acknowledged writes that tidegate_entries refuses: for what they hold, or because they come too late. Add no constraint here: it must take what the other table refused.';
comment on column tidegate_dead_letters.code is
    'The SQLSTATE of the refusal; TG001 for a write at or below tidegate_control.gc_horizon.';
comment on column tidegate_dead_letters.reason is 'The message of the refusal.';
