-- The tags of records. While the index is made, which looks at every row once, writes wait.

alter table tidegate_entries add column tags text[];

-- Untagged rows are not in it, so an ordinary overwrite touches no index. Kept current by each commit that changes tags: no search has to go
-- through a list of what is not in it yet, and no commit has to clear that for others.
create index tidegate_entries_tags on tidegate_entries using gin (tags) with (fastupdate = off) where tags is not null;

comment on column tidegate_entries.tags is
    'What the write tagged the record with, by which the gateway finds it again; null for nothing.';
