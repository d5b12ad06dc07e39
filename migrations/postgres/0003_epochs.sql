-- The epochs of the shared cache, and which cache server they hold for.

-- Random by default, so that two stores never share one, nor one store that lost and got back its row.
alter table tidegate_control
    add column epoch bigint not null default (1 + floor(random() * 9007199254740991)::bigint) check (epoch > 0),
    add column moved_at timestamptz,
    add column cache_server text;

comment on column tidegate_control.epoch is
    'The epoch of the shared cache: part of every key of it, so that whoever changes it empties the cache for all gateways. Random; never set it back to a value it had.';
comment on column tidegate_control.moved_at is
    'When the epoch was moved last; null while it never was. For some seconds after that not every gateway knows, and nobody fills the cache.';
comment on column tidegate_control.cache_server is
    'The run_id of the Redis for which the epoch holds; null until a gateway has seen one. A Redis with another run_id makes the epoch move.';

create table tidegate_namespace_epochs (
    namespace text collate "C" primary key,
    epoch     bigint not null check (epoch > 0),
    moved_at  timestamptz not null
);

comment on table tidegate_namespace_epochs is
    'Namespaces of which the cached copies were invalidated since tidegate_control.epoch began; emptied when that moves, which invalidates all of them.';
comment on column tidegate_namespace_epochs.epoch is
    'The epoch of the namespace: part of its keys in the shared cache. Random; never set it back to a value it had.';
comment on column tidegate_namespace_epochs.moved_at is 'When it was moved.';
