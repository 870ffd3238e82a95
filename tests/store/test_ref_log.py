"""What the log of a name can say and undo: protection, deprecation, every move, and who was first."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.index import queries
from adapterhub.maintenance.fsck import fsck
from adapterhub.ref import Ref, RefError
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.registry import Registry
from adapterhub.store.oci_index import IndexFile
from adapterhub.store.ref_log import BASES, HUB, RefLog, entries_in_force
from adapterhub.store.store import Entry, Store
from adapterhub_converters.errors import AdapterhubError, ConflictError, FormatError, LocalIOError, NotFoundError, RefusedError
from tests.conftest import Run
from tests.support.adapters import Make

SQL, PROD = Ref.parse("team/sql"), Ref.parse("team/sql:prod")


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Iterator[Registry]:
    """Three versions, `prod` at the first."""
    with Registry.init(tmp_path / "registry") as opened:
        opened.push(make("a", 1), PROD)
        for seed in (2, 3):
            opened.push(make(f"a{seed}", seed), SQL)
        yield opened


def v(number: int) -> Ref:
    return Ref("team/sql", number=number)


def replayed(registry: Registry) -> None:
    """What the catalog says is what the log says."""
    before = (
        registry.list(),
        registry.deprecations(["team/sql"]),
        [queries.marks(registry.index, kind, "team/sql") for kind in ("protect", "keep")],
    )
    assert registry.rebuild_index() == []
    after = (
        registry.list(),
        registry.deprecations(["team/sql"]),
        [queries.marks(registry.index, kind, "team/sql") for kind in ("protect", "keep")],
    )
    assert before == after
    assert {finding.code for finding in fsck(registry)} <= {"orphans"}


def test_a_protected_tag_neither_moves_nor_goes(registry: Registry, make: Make) -> None:
    assert registry.protect(PROD).number == 1
    newest, says = registry.list()[-1], r"team/sql:prod: is protected. Unprotect it first"
    for call in (
        lambda: registry.tag(v(2), "prod"),
        lambda: registry.push(make("new", 9), PROD),
        lambda: registry.push(make("a2", 2), PROD),
        lambda: registry.rm(PROD),
        lambda: registry.rm(SQL),
        lambda: registry.restore_tag(PROD, 1) and registry.tag(v(2), "prod"),
    ):
        with pytest.raises(RefusedError, match=says):
            call()
    assert registry.tag(v(1), "prod").number == 1  # no move
    assert registry.push(make("a", 1), PROD).number == 1
    assert registry.show(PROD)["protected"] == ["prod"]
    assert registry.list()[-1] == newest
    replayed(registry)
    registry.protect(PROD, on=False)
    registry.rm(PROD)
    registry.tag(v(2), "prod")
    assert [entry.op for entry in registry.log(PROD)] == ["tag", "untag", "unprotect", "protect", "push"]
    replayed(registry)


def test_only_a_tag_that_is_there_can_be_protected(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="no such tag"):
        registry.protect(Ref.parse("team/sql:dev"))
    with pytest.raises(RefusedError, match="is always the newest push") as caught:
        registry.protect(Ref.parse("team/sql:latest"))
    assert caught.value.code == "latest-tag"
    with pytest.raises(RefError, match="has no tag. Write team/sql:TAG"):
        registry.protect(v(1))


def test_the_last_move_of_a_tag_is_undone_and_so_is_the_undoing(registry: Registry) -> None:
    registry.tag(v(2), "prod")
    assert registry.restore_tag(PROD).number == 1
    assert registry.restore_tag(PROD).number == 2
    registry.rm(PROD)
    assert registry.restore_tag(PROD).number == 2
    assert registry.restore_tag(PROD, 1).number == 1
    assert [(entry.op, entry.number) for entry in registry.log(PROD)] == [
        ("tag", 1), ("tag", 2), ("untag", 0), ("tag", 2), ("tag", 1), ("tag", 2), ("push", 1)
    ]  # fmt: skip
    replayed(registry)


def test_what_cannot_be_restored_is_reported(registry: Registry) -> None:
    registry.tag(v(2), "dev")
    for text, seq, says in [
        ("team/sql:dev", None, "team/sql:dev: did not exist before entry 4"),
        ("team/sql:dev", 2, "did not exist at entry 2"),
        ("team/sql:dev", 99, "there is no entry 99; the log has 1 to 4"),
        ("team/sql:never", None, "this tag was never set"),
        ("team/none:prod", None, "no such adapter"),
    ]:
        with pytest.raises(NotFoundError, match=says):
            registry.restore_tag(Ref.parse(text), seq)
    registry.rm(SQL)
    with pytest.raises(NotFoundError, match="was removed"):
        registry.restore_tag(PROD)


def test_a_deprecation_is_of_a_version_or_of_all(registry: Registry) -> None:
    assert registry.deprecate(v(1), "old") == 1
    assert registry.deprecate(SQL, "moved to team/sql2") == 0
    assert [registry.resolve(v(n)).deprecated for n in (1, 2)] == ["old", "moved to team/sql2"]
    assert registry.show(PROD)["deprecated"] == "old"
    replayed(registry)
    registry.deprecate(SQL, undo=True)
    assert registry.deprecations(["team/sql"]) == {("team/sql", 1): "old"}
    registry.deprecate(PROD, undo=True)
    registry.deprecate(PROD, undo=True)
    assert registry.deprecations(["team/sql"]) == {}
    assert [entry.op for entry in registry.log(SQL)][:4] == ["undeprecate", "undeprecate", "deprecate", "deprecate"]
    registry.deprecate(v(2), "\udcff\x1b[31m")
    assert registry.resolve(v(2)).deprecated == "?\x1b[31m"
    with pytest.raises(RefError, match="over 1000 characters"):
        registry.deprecate(v(2), "x" * 1001)
    replayed(registry)


def test_the_log_outlives_the_name(registry: Registry) -> None:
    registry.rm(SQL)
    assert [entry.op for entry in registry.log(SQL)] == ["delete", "push", "push", "push"]
    with pytest.raises(NotFoundError, match="no such adapter"):
        registry.log(Ref.parse("team/none"))
    with pytest.raises(NotFoundError, match="this tag was never set"):
        registry.log(Ref.parse("team/sql:never"))


def test_who_expects_something_else_learns_who_won(registry: Registry, make: Make) -> None:
    first, second = (registry.resolve(v(n)).digest for n in (1, 2))
    for call in (
        lambda: registry.tag(v(3), "prod", expect=second),
        lambda: registry.rm(PROD, expect=second),
        lambda: registry.push(make("new", 9), PROD, expect=second[:20]),
        lambda: registry.tag(v(3), "prod", expect=ABSENT),
    ):
        with pytest.raises(ConflictError, match=f"team/sql:prod: moved in the meantime: it is {first}, not "):
            call()
    with pytest.raises(ConflictError, match="it is absent, not sha256"):
        registry.tag(v(1), "dev", expect=first)
    with pytest.raises(ConflictError, match="team/sql: moved in the meantime"):
        registry.rm(SQL, expect=first)
    with pytest.raises(RefError, match="is not a digest"):
        registry.rm(PROD, expect="v1")
    registry.tag(v(2), "prod", expect=first[:13])
    registry.tag(v(2), "dev", expect=ABSENT)
    registry.rm(PROD, expect=second)
    assert queries.tags(registry.index, "team/sql") == {"dev": 2, "latest": 3}


NEWER: list[dict[str, Any]] = [
    {"op": "push"},
    {"numbers": [-1]},
    {"numbers": ["1"]},
    {"numbers": [True]},
    {"keep": -1},
    {"number": 2**53},
    {"message": 1},
]


@pytest.mark.parametrize("change", NEWER)
def test_a_malformed_entry_of_the_second_version_is_refused(change: dict[str, Any]) -> None:
    entry = Entry("team/sql", 1, "deprecate", "t", number=1, message="x")
    assert Entry.parse(entry.dump(), "") == entry
    with pytest.raises(AdapterhubError):
        Entry.parse(json.dumps({**json.loads(entry.dump()), **change}).encode(), "")


def test_entries_that_older_programs_know_are_written_as_they_were() -> None:
    assert Entry("team/sql", 1, "untag", "t", tags=("prod",)).dump() == (
        b'{"digest":"","name":"team/sql","number":0,"op":"untag","previous":"","seq":1,"size":0,"tags":["prod"],"time":"t",'
        b'"version":1}\n'
    )


def test_a_number_is_as_large_as_every_json_parser_reads_exactly() -> None:
    entry = Entry("team/sql", 1, "keep", "t", keep=2**53 - 1, numbers=(2**53 - 1,))
    assert Entry.parse(entry.dump(), "") == entry


def test_a_removal_is_undone_for_the_versions_that_the_restore_lists() -> None:
    pushes = [Entry("team/sql", number, "push", "t", number=number) for number in (1, 2)]
    tagged, removed = Entry("team/sql", 3, "tag", "t", number=1), Entry("team/sql", 4, "delete", "t")
    restored, pushed = Entry("team/sql", 5, "restore", "t", numbers=(2,)), Entry("team/sql", 6, "push", "t", number=3)
    assert entries_in_force([*pushes, tagged]) == ([*pushes, tagged], [])
    assert entries_in_force([*pushes, tagged, removed]) == ([], [*pushes, tagged])
    current, undone = entries_in_force([*pushes, tagged, removed, restored, pushed])
    assert (current, undone) == ([pushes[1], tagged, pushed], [*pushes, tagged])


# ---- the files


@pytest.fixture
def log(tmp_path: Path) -> RefLog:
    store = Store(tmp_path / "store")
    store.create()
    return store.log


def test_an_entry_whose_number_is_taken_is_not_written(log: RefLog) -> None:
    first, second = Entry("team/sql", 1, "delete", "first"), Entry("team/sql", 1, "delete", "second")
    assert (log.append(first), log.append(second)) == (True, False)
    assert list(log.entries("team/sql")) == [first]


def test_a_log_ends_at_its_last_entry(log: RefLog) -> None:
    assert log.ends_at("team/sql", 0)
    log.append(Entry("team/sql", 1, "delete", "t"))
    assert (log.ends_at("team/sql", 0), log.ends_at("team/sql", 1)) == (False, True)


def test_entries_beyond_a_gap_are_found(log: RefLog) -> None:
    for seq in (1, 3, 4):
        log.append(Entry("team/sql", seq, "delete", "t"))
    (log.path("team/sql", 1).parent / "00000009.txt").touch()
    assert log.files_after("team/sql", 3) == [log.path("team/sql", 4)]
    assert [log.has_entry_after("team/sql", seq) for seq in (1, 4)] == [True, False]


def test_names_are_listed_by_log_and_by_namespace(log: RefLog) -> None:
    for name, kind in [("b/x", HUB), ("a/y", HUB), ("a/x", HUB), ("llama", BASES)]:
        log.append(Entry(name, 1, "tag", "t"), log=kind)
    assert (log.names(HUB), log.names(HUB, "a"), log.names(HUB, "c"), log.names()) == (
        ["a/x", "a/y", "b/x"],
        ["a/x", "a/y"],
        [],
        [],
    )
    assert (log.document_names(HUB), log.document_names(BASES)) == (["a/x", "a/y", "b/x"], ["llama"])


def test_an_entry_that_cannot_be_read_is_an_error_with_its_path(log: RefLog) -> None:
    path = log.path("team/sql", 1)
    path.mkdir(parents=True)
    with pytest.raises(LocalIOError) as caught:
        log.entry("team/sql", 1)
    assert (caught.value.where, caught.value.what) == (str(path), "Is a directory")


def test_a_damaged_entry_is_told_from_one_of_another_number(log: RefLog) -> None:
    log.append(Entry("team/sql", 1, "delete", "t"))
    for raw, code in [(b"{}", "check-registry"), (Entry("team/sql", 2, "delete", "t").dump(), "misplaced")]:
        log.path("team/sql", 1).write_bytes(raw)
        with pytest.raises(FormatError) as caught:
            log.entry("team/sql", 1)
        assert (caught.value.code, caught.value.hint) == (code, "Check the registry")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["tag", "team/sql:v1"], "TAG is missing. Write `adapterhub tag team/sql:v1 TAG --registry "),
        (["tag", "team/sql:v1", "prod", "--restore"], "--restore: takes NAME:TAG only"),
        (["tag", "team/sql:v1", "--restore"], "has no tag. Write team/sql:TAG"),
        (
            ["deprecate", "team/sql:v1", "why", "--undo"],
            "--undo: cannot be combined with MESSAGE. Leave one out",
        ),
    ],
)
def test_usage(run: Run, registry: Registry, args: list[str], says: str) -> None:
    assert says in run(*args, "--registry", registry.root, code=2).stderr


def test_a_move_whose_index_cannot_follow_reports_that_it_is_done(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(IndexFile, "_write", full)
        with pytest.raises(LocalIOError, match="No space left on device; team/sql has moved nevertheless"):
            registry.tag(v(2), "prod")
    with Registry.open(registry.root) as again:
        assert again.resolve(PROD).number == 2
        assert fsck(again) == []


def test_an_entry_is_in_the_oldest_format_that_can_express_it(registry: Registry) -> None:
    push = Entry("team/sql", 1, "push", "2026-01-01T00:00:00Z", "sha256:" + "a" * 64, 3, 1, ("latest",))
    entries_and_versions = [
        (push, 1),
        (Entry("team/sql", 2, "deprecate", "", number=1, message="old"), 2),
        (dataclasses.replace(push, message="twice the data"), 5),
        (dataclasses.replace(push, author="ada"), 5),
        (Entry("team/sql", 2, "delete", "", author="ada"), 5),
    ]
    for entry, version in entries_and_versions:
        raw = entry.dump()
        assert json.loads(raw)["version"] == version
        assert Entry.parse(raw, "x") == entry
    assert "author" not in json.loads(entries_and_versions[1][0].dump())


def test_every_move_names_its_author(registry: Registry) -> None:
    registry.author = "ada"
    registry.tag(v(2), "stage")
    registry.rm(Ref.parse("team/sql:stage"))
    registry.deprecate(v(1), "old")
    assert [(entry.op, entry.author) for entry in registry.log(SQL)[:4]] == [
        ("deprecate", "ada"),
        ("untag", "ada"),
        ("tag", "ada"),
        ("push", ""),
    ]
    replayed(registry)
