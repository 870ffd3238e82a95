"""A registry.db that anybody may have written: refused in one line, never run, never believed against the log."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import sqlite3
import struct
from pathlib import Path

import pytest

from adapterhub.index.index_database import fts5_is_safe_in_triggers
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.conftest import Run
from tests.support.adapters import Make

SQL = Ref.parse("team/sql")


@pytest.fixture
def root(make: Make, tmp_path: Path) -> Path:
    """Three versions, the first of which is `prod`, and another name."""
    with Registry.init(tmp_path / "r") as registry:
        for seed in (1, 2, 3):
            registry.push(make(f"a{seed}", seed), Ref.parse(f"team/sql:{'prod' if seed == 1 else 'gone'}"))
        registry.rm(Ref.parse("team/sql:gone"))
        registry.push(make("b", 4), Ref.parse("team/other"))
    return tmp_path / "r"


def change(root: Path, *statements: str, schema: bool = False) -> None:
    with contextlib.closing(sqlite3.connect(root / "registry.db", isolation_level=None)) as db:
        if schema:
            db.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            db.execute(statement)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
VIEW = f"CREATE VIEW names AS {ENDLESS} SELECT 'a/b' AS name, i AS seq, '' AS head, i AS number, 0 AS deleted FROM n"
FOREIGN = {
    "an endless view in place of a table": ("PRAGMA foreign_keys = OFF", "DROP TABLE names", VIEW),
    "a view of its own": ("CREATE VIEW more AS SELECT 1",),
    "a trigger": ("CREATE TRIGGER evil AFTER INSERT ON unwritten BEGIN DELETE FROM versions; END",),
    "a missing table": ("DROP TABLE marks",),
    "a missing index": ("DROP INDEX versions_time",),
    "a table of its own": ("CREATE TABLE extra (x)",),
    "a virtual table": ("CREATE VIRTUAL TABLE more USING fts5 (x)",),
    "a generated column": ("ALTER TABLE marks ADD COLUMN more TEXT AS (name || value)",),
    "another collation": ("DROP TABLE index_file", "CREATE TABLE index_file (stamp TEXT NOT NULL COLLATE NOCASE) STRICT"),
    "thousands of tables": ("BEGIN", *(f"CREATE TABLE t{n} (x)" for n in range(3000)), "COMMIT"),
}
COMMANDS = (("list",), ("verify", "team/sql:v1"), ("search", "test", "--facets"), ("gc", "--dry-run"))


@pytest.mark.parametrize("statements", FOREIGN.values(), ids=FOREIGN)
def test_a_schema_that_is_not_ours_is_refused_and_does_not_survive_a_rebuild(
    root: Path, run: Run, statements: tuple[str, ...]
) -> None:
    change(root, *statements)
    for command in (("list",), ("push", root.parent / "a1", "team/new"), ("fsck",)):
        result = run(*command, "--registry", root, code=4)
        assert "does not have exactly adapterhub's tables" in result.stderr
        assert "fsck --rebuild-index" in result.stderr
    rebuilt(root, run)


def rebuilt(root: Path, run: Run) -> None:
    assert "clean" in run("fsck", "--rebuild-index", "--registry", root, code=0).stdout
    with Registry.open(root) as registry:
        assert [(row.name, row.number) for row in registry.list()] == [
            ("team/other", 1), ("team/sql", 3), ("team/sql", 2), ("team/sql", 1),
        ]  # fmt: skip
        assert registry.resolve(Ref.parse("team/sql:prod")).number == 1


NINTH = (
    "INSERT INTO versions (name, number, digest, manifest_size, time, parents)"
    " SELECT name, 9, 'x', 1, time, '[]' FROM versions WHERE number = 2"
)
LIES = {
    "a tag": ("UPDATE tags SET number = 3 WHERE tag = 'prod'", "team/sql:prod"),
    "the newest": ("UPDATE tags SET number = 1 WHERE tag = 'latest' AND name = 'team/sql'", "team/sql"),
    "the digest of a version": (
        "UPDATE versions SET digest = (SELECT digest FROM versions WHERE name = 'team/other') WHERE number = 2", "team/sql:v2",
    ),
    "the size of a manifest": ("UPDATE versions SET manifest_size = 3 WHERE number = 2", "team/sql:v2"),
    "a tag that the log has not": ("INSERT INTO tags VALUES ('team/sql', 'live', 2)", "team/sql:live"),
    "a version that the log has not": (
        NINTH,
        "team/sql:v9",
    ),
    "the entry that pushed a version": ("UPDATE versions SET seq = 1 WHERE number = 2", "team/sql:v2"),
    "a removed tag": ("INSERT INTO tags VALUES ('team/sql', 'gone', 2)", "team/sql:gone"),
    "the head": ("UPDATE names SET head = 'sha256:00' WHERE name = 'team/sql'", "team/sql"),
}  # fmt: skip


@pytest.mark.parametrize(("statement", "ref"), LIES.values(), ids=LIES)
def test_the_log_alone_decides_what_a_ref_means(root: Path, run: Run, statement: str, ref: str) -> None:
    change(root, "PRAGMA foreign_keys = OFF", statement)
    for command in (("show", ref), ("pull", ref, "-o", "out"), ("verify", ref)):
        text = run(*command, "--registry", root, code=None)
        assert (text.returncode, "the log" in text.stdout + text.stderr) in ((4, True), (1, True)), text
    assert not (root.parent / "out").exists()
    result = run("fsck", "--registry", root, code=1)
    assert "catalog-wrong" in result.stdout or "catalog-behind" in result.stdout
    rebuilt(root, run)


@pytest.mark.parametrize("ref", ["team/sql", "team/sql:prod", "team/sql:v1"])
def test_a_removed_name_does_not_come_back_with_its_rows(root: Path, run: Run, ref: str) -> None:
    with contextlib.closing(sqlite3.connect(root / "registry.db")) as db:
        tables = {table: db.execute(f"SELECT * FROM {table}").fetchall() for table in ("versions", "tags")}
    with Registry.open(root) as registry:
        registry.rm(SQL)
    with contextlib.closing(sqlite3.connect(root / "registry.db")) as db, db:
        for table, rows in tables.items():
            db.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
        db.execute("UPDATE names SET deleted = 0")
    assert "the log" in run("show", ref, "--registry", root, code=4).stderr
    assert "catalog-wrong" in run("fsck", "--registry", root, code=1).stdout


ROWS = {
    "a facet": "UPDATE facets SET value = 'other' WHERE kind = 'base'",
    "a missing facet": "DELETE FROM facets WHERE kind = 'method'",
    "a searched text": "UPDATE texts SET card = 'buy'",
    "a file": "UPDATE files SET size = size + 1",
    "a parent": "INSERT INTO made_from SELECT 'sha256:00', id FROM versions",
    "a base": "UPDATE versions SET base = 'other/base'",
    "a rank": "UPDATE versions SET r = 1",
    "a count": "UPDATE facet_counts SET n = n + 1",
    "a setting": "INSERT INTO marks VALUES ('team/sql', 'protect', 'prod', '')",
    "a deprecation": "INSERT INTO marks VALUES ('team/sql', 'deprecate', '1', 'use mine')",
    "a row of no version": "INSERT INTO facets VALUES (99, 'base', 'x')",
    "a setting of no name": "INSERT INTO marks VALUES ('team/none', 'protect', 'prod', '')",
    "a tensor of no file": "INSERT INTO tensors VALUES (1, 99, 5)",
    "the full-text index": "DELETE FROM texts_fts_data WHERE id > 100",
    "parents that are not a list": "UPDATE versions SET parents = '{\"a\": [1, 2'",
    "parents of numbers": "UPDATE versions SET parents = '[1, 2]'",
    "a name that is a path": "INSERT INTO names VALUES ('../../x', 1, '', 0, 0)",
    "a name with a NUL": "INSERT INTO names VALUES (char(97, 0, 98), 1, '', 0, 0)",
}


@pytest.mark.parametrize("statement", ROWS.values(), ids=ROWS)
def test_every_row_that_is_not_the_logs_is_a_finding(root: Path, run: Run, statement: str) -> None:
    change(root, "PRAGMA foreign_keys = OFF", statement)
    assert "catalog-wrong" in run("fsck", "--registry", root, code=1).stdout
    for command in COMMANDS:
        assert run(*command, "--registry", root, code=None).returncode in (0, 1, 3, 4)
    rebuilt(root, run)


def without_strict(root: Path, statement: str) -> None:
    """Write values that a STRICT table would not take, and leave the schema as it was."""
    with contextlib.closing(sqlite3.connect(root / "registry.db", isolation_level=None)) as db:
        before = db.execute("SELECT sql, name FROM sqlite_master WHERE sql LIKE '%STRICT%'").fetchall()
    lax = "UPDATE sqlite_master SET sql = replace(replace(sql, 'STRICT, WITHOUT', 'WITHOUT'), ' STRICT', '')"
    change(root, f"{lax} WHERE type = 'table'", schema=True)
    change(root, "PRAGMA foreign_keys = OFF", statement)
    with contextlib.closing(sqlite3.connect(root / "registry.db", isolation_level=None)) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.executemany("UPDATE sqlite_master SET sql = ? WHERE name = ? AND type = 'table'", before)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


TYPES = {
    "a number that is text": "UPDATE versions SET number = 'x' WHERE number = 3",
    "a name that is bytes": "UPDATE versions SET name = x'00ff' WHERE number = 3",
    "a digest that is a number": "UPDATE versions SET digest = 5 WHERE number = 3",
    "text that is not UTF-8": "UPDATE versions SET base = CAST(x'ff' AS TEXT)",
    "a rank that is text": "UPDATE versions SET r = 'x'",
    "a sequence that is text": "UPDATE names SET seq = 'x'",
}


@pytest.mark.parametrize("statement", TYPES.values(), ids=TYPES)
def test_values_of_other_types_than_their_columns_are_one_line(root: Path, run: Run, statement: str) -> None:
    without_strict(root, statement)
    for command in COMMANDS:
        assert run(*command, "--registry", root, code=None).returncode in (0, 1, 3, 4)
    assert run("fsck", "--registry", root, code=None).returncode in (1, 4)
    rebuilt(root, run)


@pytest.mark.parametrize("version", [0, 3, 7])
def test_a_hostile_database_that_claims_to_be_older_is_rebuilt(root: Path, run: Run, version: int) -> None:
    change(root, *FOREIGN["a trigger"], *FOREIGN["a missing table"], f"PRAGMA user_version = {version}")
    assert "team/other" in run("list", "--registry", root).stdout
    assert "clean" in run("fsck", "--registry", root).stdout


def test_a_tree_of_pages_without_an_end_is_given_up(root: Path, run: Run) -> None:
    """Pages that have the next page as a child a hundred times over have more rows than any disk."""
    with contextlib.closing(sqlite3.connect(root / "registry.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        size = db.execute("PRAGMA page_size").fetchone()[0]
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_versions_1'").fetchone()[0]
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    raw = bytearray((root / "registry.db").read_bytes())
    leaf = raw[(page - 1) * size : page * size]
    at = int.from_bytes(leaf[8:10], "big")  # the first cell: the length of a record, and the record
    record = leaf[at : at + 1 + leaf[at]]

    def interior(child: int, count: int = 100) -> bytes:
        """A page of a tree (sqlite.org/fileformat.html, "B-tree Pages")."""
        cell = child.to_bytes(4, "big") + record
        start = size - count * len(cell)
        head = b"\x02" + bytes(2) + count.to_bytes(2, "big") + start.to_bytes(2, "big") + b"\0" + child.to_bytes(4, "big")
        places = b"".join((start + len(cell) * n).to_bytes(2, "big") for n in range(count))
        return (head + places).ljust(start, b"\0") + cell * count

    for level in range(8):
        raw += interior(pages + level + 2)
    raw += leaf
    raw[(page - 1) * size : page * size] = interior(pages + 1)
    raw[28:32] = (len(raw) // size).to_bytes(4, "big")
    (root / "registry.db").write_bytes(raw)
    assert "a query does not end" in run("list", "--registry", root, code=4).stderr
    assert "a query does not end" in run("fsck", "--quick", "--registry", root, code=1).stdout
    rebuilt(root, run)


@pytest.mark.parametrize("seed", range(5))
def test_noise_in_pages_is_one_line(root: Path, run: Run, seed: int) -> None:
    change(root)
    rng, path = random.Random(seed), root / "registry.db"
    raw = bytearray(path.read_bytes())
    for _ in range(40):
        raw[rng.randrange(100, len(raw))] = rng.randrange(256)
    path.write_bytes(raw)
    for command in (*COMMANDS, ("fsck",)):
        assert run(*command, "--registry", root, code=None).returncode in (0, 1, 3, 4)
    rebuilt(root, run)


def test_a_database_cannot_load_attach_or_run_anything(root: Path, tmp_path: Path) -> None:
    with Registry.open(root) as registry:
        db = registry.index.connection
        for statement in (f"ATTACH '{tmp_path / 'other.db'}' AS other", "SELECT load_extension('x')"):
            with pytest.raises(sqlite3.OperationalError):
                db.execute(statement)
        pragmas = ("trusted_schema", "cell_size_check", "mmap_size", "foreign_keys")
        trusted = int(not fts5_is_safe_in_triggers())  # only where search needs it, and after the schema was compared
        assert [db.execute(f"PRAGMA {pragma}").fetchone() for pragma in pragmas] == [(trusted,), (1,), (0,), (1,)]
    assert not (tmp_path / "other.db").exists()


def journal_naming(database: Path, other_database: Path) -> bytes:
    """A rollback journal without pages, as a transaction over several databases leaves it: its end names another journal."""
    raw, name = database.read_bytes(), os.fsencode(other_database)
    magic, page = bytes.fromhex("d9d505f920a163d7"), struct.unpack(">H", raw[16:18])[0] or 65536
    head = (magic + struct.pack(">IIIII", 0, 0, len(raw) // page, 512, page)).ljust(512, b"\0")
    checksum = sum(byte if byte < 128 else byte - 256 for byte in name) & 0xFFFFFFFF
    return head + struct.pack(">I", 0x40000000 // page + 1) + name + struct.pack(">II", len(name), checksum) + magic


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_journal_that_names_a_file_of_the_user_s_has_it_deleted_by_no_command(
    root: Path, run: Run, tmp_path: Path, make: Make, mode: str
) -> None:
    with contextlib.closing(sqlite3.connect(root / "registry.db")) as db:
        db.execute(f"PRAGMA journal_mode = {mode}")
    for suffix in ("-wal", "-shm"):
        (root / f"registry.db{suffix}").unlink(missing_ok=True)
    adapter, victim, journal = shlex.quote(str(make("mine", 9))), tmp_path / "victim", root / "registry.db-journal"
    victim.write_text("kept")
    journal.write_bytes(journal_naming(root / "registry.db", victim))
    for command in ("list", "show team/sql", f"push {adapter} team/new", "gc", "fsck", "info", "search x", "rm team/sql -y"):
        result = run(*shlex.split(command), cwd=root, code=None)
        assert result.returncode in (1, 4), command
        assert victim.read_text() == "kept", command
    assert "its journal names another file" in run("list", cwd=root, code=4).stderr
    run("fsck", "--rebuild-index", cwd=root, code=None)
    assert victim.read_text() == "kept"
    assert "team/sql:v3" in run("list", cwd=root).stdout
