-- What a dead letter needs to be tried again as it was, and to tell how that went.

alter table tidegate_dead_letters
    add column tags text[],
    add column attempts integer not null default 1,
    add column retried_at timestamptz;

comment on column tidegate_dead_letters.code is
    'The SQLSTATE of the last refusal; TG001 for a write at or below tidegate_control.gc_horizon.';
comment on column tidegate_dead_letters.reason is 'The message of the last refusal.';
comment on column tidegate_dead_letters.tags is
    'What the write tagged the record with; null for nothing, and for what was put here before tags were kept.';
comment on column tidegate_dead_letters.attempts is 'How often the write was refused: once to be put here, and once for each retry that failed.';
comment on column tidegate_dead_letters.retried_at is 'When a retry failed last; null while none did.';
