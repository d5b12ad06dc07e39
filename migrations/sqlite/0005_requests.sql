-- What migrations/postgres/0005_requests.sql adds, in SQLite's types.

-- The requests that were answered: a write that is sent twice under one request id is written once.
create table tidegate_requests (
    namespace   text not null,
    request_id  text not null,
    -- A hash of what was asked for: the id with another one is refused.
    fingerprint blob not null,
    -- The answer: the version, what the counter became (of an increment), and when the record ceases to exist.
    version     integer not null check (version > 0),
    counter     integer,
    expires_at  integer,
    -- When the window is over. Then the row is deleted.
    ends_at     integer not null,
    primary key (namespace, request_id)
) strict, without rowid;

create index tidegate_requests_ended on tidegate_requests (ends_at);
