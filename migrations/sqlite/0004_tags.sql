-- What migrations/postgres/0004_tags.sql adds, in SQLite's way.

-- What the write tagged the record with: a JSON array; null for nothing.
alter table tidegate_entries add column tags text;

-- The same, one row for each, to find records by their tags. Kept by the triggers below, whoever writes.
create table tidegate_tags (
    namespace text not null,
    tag       text not null,
    key       text not null,
    primary key (namespace, tag, key)
) strict, without rowid;

create index tidegate_tags_of_keys on tidegate_tags (namespace, key);

create trigger tidegate_tags_inserted after insert on tidegate_entries when new.tags is not null
begin
    insert or ignore into tidegate_tags (namespace, tag, key) select new.namespace, value, new.key from json_each(new.tags);
end;

create trigger tidegate_tags_updated after update on tidegate_entries when old.tags is not new.tags
begin
    delete from tidegate_tags where namespace = old.namespace and key = old.key;
    insert or ignore into tidegate_tags (namespace, tag, key) select new.namespace, value, new.key from json_each(new.tags);
end;

create trigger tidegate_tags_deleted after delete on tidegate_entries when old.tags is not null
begin
    delete from tidegate_tags where namespace = old.namespace and key = old.key;
end;
