CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
) STRICT

CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name")

CREATE TABLE names (name TEXT PRIMARY KEY, seq INTEGER NOT NULL, head TEXT NOT NULL, number INTEGER NOT NULL, deleted INTEGER NOT NULL) STRICT, WITHOUT ROWID

CREATE TABLE versions (id INTEGER PRIMARY KEY, name TEXT NOT NULL REFERENCES names, number INTEGER NOT NULL, digest TEXT NOT NULL, manifest_size INTEGER NOT NULL, time TEXT NOT NULL, size INTEGER, base TEXT, revision TEXT, method TEXT, r INTEGER, alpha REAL, format TEXT, dtype TEXT, parameters INTEGER, license TEXT, description TEXT, parents TEXT NOT NULL, seq INTEGER NOT NULL DEFAULT 0, least_r INTEGER, UNIQUE (name, number), UNIQUE (digest, name)) STRICT

CREATE TABLE tags (name TEXT NOT NULL, tag TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, tag), FOREIGN KEY (name, number) REFERENCES versions (name, number)) STRICT, WITHOUT ROWID

CREATE TABLE facets (version INTEGER NOT NULL, kind TEXT NOT NULL, value TEXT NOT NULL COLLATE NOCASE, PRIMARY KEY (version, kind, value)) STRICT, WITHOUT ROWID

CREATE INDEX facets_value ON facets (kind, value)

CREATE TABLE metrics (version INTEGER NOT NULL, name TEXT NOT NULL COLLATE NOCASE, value REAL NOT NULL, PRIMARY KEY (version, name)) STRICT, WITHOUT ROWID

CREATE INDEX metrics_value ON metrics (name, value)

CREATE TABLE files (digest TEXT NOT NULL, version INTEGER NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (digest, version, path)) STRICT, WITHOUT ROWID

CREATE TABLE index_file (stamp TEXT NOT NULL) STRICT

CREATE TABLE unwritten (name TEXT PRIMARY KEY) STRICT, WITHOUT ROWID

CREATE TABLE marks (name TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, name, key)) STRICT, WITHOUT ROWID

CREATE TABLE made_from (parent TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (parent, version)) STRICT, WITHOUT ROWID

CREATE INDEX made_from_version ON made_from (version)

CREATE INDEX files_version ON files (version)

CREATE TABLE weights (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE) STRICT

CREATE TABLE tensors (key INTEGER NOT NULL, file INTEGER NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (key, file)) STRICT, WITHOUT ROWID

CREATE TABLE facet_counts (kind TEXT NOT NULL, value TEXT NOT NULL COLLATE NOCASE, n INTEGER NOT NULL, PRIMARY KEY (kind, value)) STRICT, WITHOUT ROWID

CREATE TABLE "texts" (
   "version" INTEGER PRIMARY KEY NOT NULL,
   "name" TEXT NOT NULL,
   "title" TEXT NOT NULL,
   "tags" TEXT NOT NULL,
   "description" TEXT NOT NULL,
   "facts" TEXT NOT NULL,
   "card" TEXT NOT NULL
) STRICT

CREATE VIRTUAL TABLE "texts_fts" USING FTS5 ( "name", "title", "tags", "description", "facts", "card", tokenize='unicode61 remove_diacritics 2', prefix='1 2', content="texts" )

CREATE TRIGGER "texts_ai" AFTER INSERT ON "texts" BEGIN INSERT INTO "texts_fts" (rowid, "name", "title", "tags", "description", "facts", "card") VALUES (new.rowid, new."name", new."title", new."tags", new."description", new."facts", new."card"); END

CREATE TRIGGER "texts_ad" AFTER DELETE ON "texts" BEGIN INSERT INTO "texts_fts" ("texts_fts", rowid, "name", "title", "tags", "description", "facts", "card") VALUES('delete', old.rowid, old."name", old."title", old."tags", old."description", old."facts", old."card"); END

CREATE TRIGGER "texts_au" AFTER UPDATE ON "texts" BEGIN INSERT INTO "texts_fts" ("texts_fts", rowid, "name", "title", "tags", "description", "facts", "card") VALUES('delete', old.rowid, old."name", old."title", old."tags", old."description", old."facts", old."card"); INSERT INTO "texts_fts" (rowid, "name", "title", "tags", "description", "facts", "card") VALUES (new.rowid, new."name", new."title", new."tags", new."description", new."facts", new."card"); END

CREATE INDEX versions_time ON versions (time, name)

CREATE TABLE repositories (name TEXT PRIMARY KEY, private INTEGER NOT NULL, moved_from TEXT NOT NULL, removed INTEGER NOT NULL, changed INTEGER NOT NULL) STRICT, WITHOUT ROWID

CREATE INDEX repositories_changed ON repositories (changed)

CREATE INDEX repositories_restricted ON repositories (name) WHERE removed = 0 AND (private = 1 OR moved_from <> '')

INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES
    ('adapterhub', 'names_and_versions', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'finding', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'marks', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'made_from', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'tensors', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'common', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'license_spelling', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'searched_texts', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'pushed_by', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'rank_range', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'listing', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'short_beginnings', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')),
    ('adapterhub', 'repositories', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
