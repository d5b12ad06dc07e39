-- The requests that were answered: a write that is sent twice under one request id is written once.

create table tidegate_requests (
    namespace   text collate "C" not null,
    request_id  text collate "C" not null,
    fingerprint bytea not null,
    version     bigint not null check (version > 0),
    counter     bigint,
    expires_at  timestamptz,
    ends_at     timestamptz not null,
    primary key (namespace, request_id)
) with (
    -- Rows come and go within minutes, in the order of the index below: clear them before the dead outnumber the living.
    autovacuum_vacuum_scale_factor = 0.05
);

-- Serves the forgetting. An id is written once, so no overwrite has to touch it.
create index tidegate_requests_ended on tidegate_requests (ends_at);

comment on table tidegate_requests is
    'Request ids of writes, each kept for its window with the answer to the write: the same id again gets the same answer. Whoever deletes a row lets the write be written again.';
comment on column tidegate_requests.namespace is 'The namespace, within which an id is unique.';
comment on column tidegate_requests.request_id is 'The id: 1 to 64 bytes, as its caller sent it; one that begins with "tidegate:" is the gateway''s own.';
comment on column tidegate_requests.fingerprint is 'A hash of what was asked for: the id with another one is refused.';
comment on column tidegate_requests.version is 'The version of the write.';
comment on column tidegate_requests.counter is 'What the counter became, of an increment.';
comment on column tidegate_requests.expires_at is 'When the record that was written ceases to exist; null for never.';
comment on column tidegate_requests.ends_at is 'When the window is over, by the clock of the gateway that took the request. Then the row is deleted.';
