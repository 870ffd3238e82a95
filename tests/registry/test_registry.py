"""One contract for every registry, and what is particular to the local one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import broken_log_findings, fsck
from adapterhub.maintenance.gc import gc
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref, RefError
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.registry import Registry
from adapterhub.registry.version_lookup import RestoreResult
from adapterhub.store.store import Entry
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    NotFoundError,
    OutputExistsError,
    RefusedError,
)
from tests.support.registries import new_registry

Make = Callable[..., Path]
SQL = Ref.parse("team/sql")


def ref(text: str) -> Ref:
    return Ref.parse(text)


@pytest.fixture(params=["local", "packed"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with new_registry(request.param, tmp_path / "registry", monkeypatch) as opened:
        yield opened


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def errors(registry: Registry) -> list[str]:
    return [str(finding) for finding in fsck(registry) if finding.severity == "error"]


# ---- the contract


def test_what_was_pushed_is_pulled_byte_for_byte(registry: Registry, make: Make, tmp_path: Path) -> None:
    source = make()
    (source / "sub").mkdir()
    (source / "sub" / "notes.txt").write_text("x")
    version = registry.push(source, SQL)
    assert registry.pull(SQL, tmp_path / "out").digest == version.digest == oci_manifest.build(source).digest
    pulled = bytes_of(tmp_path / "out")
    assert json.loads(pulled.pop("adapter.json"))["r"] == 2
    assert pulled == bytes_of(source)
    assert oci_manifest.build(tmp_path / "out").digest == version.digest


def test_versions_are_numbered_and_latest_is_the_newest(registry: Registry, make: Make) -> None:
    version = registry.push(make("a"), SQL)
    two = registry.push(make("b", 1), ref("team/sql:prod"))
    assert (version.number, version.new, version.tags) == (1, True, ("latest",))
    assert (two.number, two.new, two.tags, two.tag) == (2, True, ("latest", "prod"), "prod")
    for text, expected in [
        ("team/sql", two),
        ("team/sql:v1", version),
        ("team/sql:prod", two),
        (f"team/sql@{version.digest[:13]}", version),
    ]:
        assert registry.resolve(ref(text)).digest == expected.digest
    assert [(row.number, row.tags, row.base, row.r) for row in registry.list()] == [
        (2, ("latest", "prod"), "org/base", 2),
        (1, (), "org/base", 2),
    ]


def test_the_same_content_again_makes_no_version_but_moves_the_tag(registry: Registry, make: Make) -> None:
    version = registry.push(make("a"), SQL)
    registry.push(make("b", 1), SQL)
    again = registry.push(make("a"), ref("team/sql:old"))
    assert (again.digest, again.number, again.new, again.tags) == (version.digest, 1, False, ("old",))
    assert len(registry.list()) == 2
    assert errors(registry) == []


def test_tags_move_and_go(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(make("b", 1), SQL)
    registry.tag(ref("team/sql:v1"), "prod")
    assert registry.tag(SQL, "prod").number == 2
    assert registry.tag(SQL, "prod").tags == ("latest", "prod")
    registry.rm(ref("team/sql:prod"))
    with pytest.raises(
        NotFoundError, match="team/sql:prod: no such tag; the registry has latest, v2, v1. List the versions of team/sql"
    ):
        registry.resolve(ref("team/sql:prod"))
    assert errors(registry) == []


def test_a_removed_name_is_refused_until_it_is_restored(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.rm(SQL)
    assert registry.list() == []
    with pytest.raises(NotFoundError, match="team/sql: was removed"):
        registry.resolve(SQL)
    with pytest.raises(ConflictError, match="this name was removed") as caught:
        registry.push(make("a"), SQL)
    assert caught.value.code == "removed-name"
    assert {finding.code for finding in fsck(registry)} == {"orphans"}
    assert registry.restore("team/sql") == RestoreResult("team/sql", (1,), ())
    assert registry.push(make("a"), SQL).number == 1
    assert errors(registry) == []


def test_a_restored_name_has_its_versions_tags_and_settings(registry: Registry, make: Make, tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        registry.push(make(name, number), ref("team/sql:prod") if name == "b" else SQL)
    registry.protect(ref("team/sql:prod"))
    registry.protect(ref("team/sql:prod"), on=False)
    registry.deprecate(ref("team/sql:v1"), "use v3")
    before, details = registry.list(), registry.show(ref("team/sql:prod"))
    for _ in range(2):
        registry.rm(SQL)
        assert registry.restore("team/sql").numbers == (1, 2, 3)
    assert [(row.ref, row.digest, row.tags, row.time) for row in registry.list()] == [
        (row.ref, row.digest, row.tags, row.time) for row in before
    ]
    assert registry.show(ref("team/sql:prod")) == details
    assert registry.resolve(ref("team/sql:v1")).deprecated == "use v3"
    rows = registry.list()
    assert registry.rebuild_index() == []
    assert registry.list() == rows
    assert registry.pull(ref("team/sql:v1"), tmp_path / "out").digest == before[-1].digest
    assert errors(registry) == []


def test_versions_whose_data_a_gc_removed_are_lost_by_name(registry: Registry, make: Make) -> None:
    for number, name in enumerate("ab"):
        registry.push(make(name, number), ref("team/sql:prod") if name == "a" else SQL)
    registry.tag(ref("team/sql:v1"), "old")
    registry.push(make("b", 1), ref("other/copy"))
    registry.rm(SQL)
    gc(registry, grace=0)
    assert registry.restore("team/sql") == RestoreResult("team/sql", (2,), (1,))
    assert [(row.number, row.tags) for row in registry.list("team/sql")] == [(2, ("latest",))]
    assert registry.push(make("c", 2), SQL).number == 3
    assert errors(registry) == []


def test_a_name_without_any_version_left_can_be_pushed_to_again(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.rm(SQL)
    gc(registry, grace=0)
    assert registry.restore("team/sql") == RestoreResult("team/sql", (), (1,))
    with pytest.raises(NotFoundError, match="no such version"):
        registry.resolve(SQL)
    assert registry.push(make("a"), SQL).number == 2
    assert errors(registry) == []


def test_where_the_newest_version_is_gone_latest_is_the_newest_that_came_back(registry: Registry, make: Make) -> None:
    for name, seeds in (("team/kept", "ab"), ("team/sql", "abc")):
        versions = [registry.push(make(f"{name}-{seed}", ord(seed)), ref(name)) for seed in seeds]
    for _ in range(2):
        registry.rm(SQL)
        gc(registry, grace=0)
        assert registry.restore("team/sql").numbers == (1, 2)
        assert registry.resolve(SQL).digest == registry.resolve(ref("team/sql:latest")).digest == versions[1].digest
        assert ("restore", ("latest",)) in {(entry.op, entry.tags) for entry in registry.log(SQL)}
        assert registry.rebuild_index() == []
        assert registry.resolve(SQL).number == 2
    assert registry.push(make("d", 3), SQL).number == 4
    assert errors(registry) == []


def test_what_a_restore_needs_is_kept_from_then_on(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.rm(SQL)
    registry.restore("team/sql")
    gc(registry, grace=0)
    assert errors(registry) == []
    assert registry.resolve(SQL).number == 1


def test_only_a_removed_name_can_be_restored(registry: Registry, make: Make) -> None:
    with pytest.raises(NotFoundError, match="no such adapter"):
        registry.restore("team/sql")
    registry.push(make("a"), SQL)
    with pytest.raises(RefusedError, match="was not removed"):
        registry.restore("team/sql")


def test_a_name_is_restored_a_limited_number_of_times(registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub.registry.moves.MAX_RESTORES", 4)
    registry.push(make("a"), SQL)
    for _ in range(4):
        registry.rm(SQL)
        registry.restore("team/sql")
    registry.rm(SQL)
    with pytest.raises(RefusedError, match="was restored 4 times"):
        registry.restore("team/sql")
    monkeypatch.setattr("adapterhub.index.replay.MAX_RESTORES", 3)  # a log by somebody else
    (error,) = registry.rebuild_index()
    assert "restores team/sql more than 3 times" in str(error)


def test_a_tag_s_value_before_a_removal_is_known_after_a_restore(registry: Registry, make: Make) -> None:
    registry.push(make("a"), ref("team/sql:prod"))
    registry.push(make("b", 1), SQL)
    registry.rm(SQL)
    registry.restore("team/sql")
    registry.tag(ref("team/sql:v2"), "prod")
    assert registry.restore_tag(ref("team/sql:prod")).number == 1


def test_what_cannot_be_done_is_refused_by_name(registry: Registry, make: Make) -> None:
    registry.push(make(), SQL)
    for call in (
        lambda: registry.push(make(), ref("team/sql:v7")),
        lambda: registry.tag(SQL, "v7"),
        lambda: registry.tag(SQL, "a/b"),
    ):
        with pytest.raises(RefError):
            call()
    for call in (
        lambda: registry.tag(SQL, "latest"),
        lambda: registry.rm(ref("team/sql:v1")),
        lambda: registry.rm(ref("team/sql:latest")),
    ):
        with pytest.raises(RefusedError):
            call()
    with pytest.raises(NotFoundError, match="no such adapter. Did you mean team/sql?"):
        registry.resolve(ref("team/sq1"))
    with pytest.raises(NotFoundError, match="no such version"):
        registry.resolve(ref("team/sql@000000"))


def test_a_push_that_expects_something_else_learns_who_won(registry: Registry, make: Make) -> None:
    first = registry.push(make("a"), SQL, expect=ABSENT)
    second = registry.push(make("b", 1), SQL, expect=first.digest)
    with pytest.raises(ConflictError, match=f"it is {second.digest}, not {first.digest}"):
        registry.push(make("c", 2), SQL, expect=first.digest)
    with pytest.raises(ConflictError, match=f"it is {second.digest}, not absent"):
        registry.push(make("c", 2), SQL, expect=ABSENT)
    registry.push(make("c", 2), ref("team/sql:prod"), expect=ABSENT)


def test_a_digest_that_two_versions_begin_with_is_ambiguous(registry: Registry) -> None:
    head = ""
    for number, end in enumerate("01", 1):
        digest = "sha256:" + "a" * 63 + end
        assert registry.store.log.append(Entry("team/sql", number, "push", "t", digest, 1, number, (), head))
        entry = registry.store.log.entry("team/sql", number)
        head = entry[1] if entry else ""
    with pytest.raises(RefError, match="ambiguous digest prefix: 2 versions, such as team/sql:v2, team/sql:v1"):
        registry.resolve(ref("team/sql@aaaaaa"))
    assert {finding.code for finding in fsck(registry)} >= {"missing"}


def test_show_has_both_manifests(registry: Registry, make: Make) -> None:
    version = registry.push(make(), SQL)
    details = registry.show(SQL)
    assert (details["ref"], details["digest"], details["tags"]) == ("team/sql:v1", version.digest, ["latest"])
    assert details["manifest"]["base"]["repo"] == "org/base"
    assert len(details["oci_manifest"]["layers"]) == len(registry.files(version)) == 4


def test_list_takes_a_name_or_a_namespace(registry: Registry, make: Make) -> None:
    for name in ("team/sql", "team/sqlx", "other/sql"):
        registry.push(make(), ref(name))
    assert [row.name for row in registry.list("team/sql")] == ["team/sql"]
    assert [row.name for row in registry.list("team/")] == ["team/sql", "team/sqlx"]


def test_a_folder_that_is_no_adapter_leaves_nothing_behind(registry: Registry, make: Make) -> None:
    source = make()
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterhubError):
        registry.push(source, SQL)
    assert fsck(registry) == []


def test_skipped_files_are_named(registry: Registry, make: Make) -> None:
    source = make()
    (source / ".gitattributes").write_text("x")
    Registry.init(source).close()
    assert registry.push(source, SQL).skipped == (".adapterhub", ".gitattributes", "registry.db")


# ---- wrong bytes


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)


def test_pull_goes_into_an_empty_folder_but_not_over_anything(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make(), SQL)
    out = tmp_path / "out"
    out.mkdir()
    registry.pull(SQL, out)
    before = bytes_of(out)
    for target in (out, out / "README.md"):
        with pytest.raises(OutputExistsError, match="already exists"):
            registry.pull(SQL, target)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError):
        registry.pull(SQL, link)
    assert bytes_of(out) == before


# ---- the catalog


def test_a_changed_log_is_found(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(make("b", 1), SQL)
    path = registry.store.log.path("team/sql", 1)
    path.write_text(path.read_text().replace('"time":"2', '"time":"1'))
    assert [finding.code for finding in fsck(registry) if finding.severity == "error"] == ["broken-log"]
    assert [finding.code for finding in broken_log_findings(registry.rebuild_index())] == ["broken-log"]
    path.unlink()
    assert "broken-log" in {finding.code for finding in fsck(registry)}


# ---- finding it


# ---- several writers


def test_who_only_reads_starts_without_numpy() -> None:
    code = "import sys, adapterhub.registry.registry; sys.exit(bool({'numpy', 'sqlite_utils'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
