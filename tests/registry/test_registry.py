"""One contract for every registry, and what is particular to the local one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import broken_log_findings, fsck
from adapterhub.maintenance.gc import gc
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref, RefError
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.registry import Registry, find
from adapterhub.registry.version_lookup import RestoreResult
from adapterhub.store.ingest import ingest
from adapterhub.store.ref_log import RefLog
from adapterhub.store.store import Entry
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    LocalIOError,
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
    for text, found in [
        ("team/sql", two),
        ("team/sql:v1", version),
        ("team/sql:prod", two),
        (f"team/sql@{version.digest[:13]}", version),
    ]:
        assert registry.resolve(ref(text)).digest == found.digest
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
    before, shown = registry.list(), registry.show(ref("team/sql:prod"))
    for _ in range(2):
        registry.rm(SQL)
        assert registry.restore("team/sql").numbers == (1, 2, 3)
    assert [(row.ref, row.digest, row.tags, row.time) for row in registry.list()] == [
        (row.ref, row.digest, row.tags, row.time) for row in before
    ]
    assert registry.show(ref("team/sql:prod")) == shown
    assert registry.resolve(ref("team/sql:v1")).deprecated == "use v3"
    kept = registry.list()
    assert registry.rebuild_index() == []
    assert registry.list() == kept
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
    shown = registry.show(SQL)
    assert (shown["ref"], shown["digest"], shown["tags"]) == ("team/sql:v1", version.digest, ["latest"])
    assert shown["manifest"]["base"]["repo"] == "org/base"
    assert len(shown["oci_manifest"]["layers"]) == len(registry.files(version)) == 4


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


def test_a_registry_whose_folder_was_away_goes_on_when_it_is_back(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make("a"), SQL)
    folder = make("b", 1)
    registry.root.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(LocalIOError):
            registry.push(folder, SQL)
        with pytest.raises(LocalIOError), registry.write_lock():
            pass
    assert not registry.root.exists()
    (tmp_path / "away").rename(registry.root)
    registry.push(folder, SQL)
    assert [version.number for version in registry.list("team/sql")] == [2, 1]
    assert errors(registry) == []


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


def test_the_nearest_registry_of_ours_is_found(tmp_path: Path) -> None:
    Registry.init(tmp_path).close()
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "a" / "registry.db").write_text("some other program's")
    assert find(inner) == tmp_path
    assert find(inner, explicit=tmp_path / "x" / "registry.db") == tmp_path / "x"
    (tmp_path / "registry.db").write_text("broken")
    assert find(inner) == tmp_path  # to be told so, rather than to use another registry
    (tmp_path / "registry.db").unlink()
    assert find(inner) == tmp_path  # the store is still there


def test_without_a_registry_the_default_is_taken(tmp_path: Path) -> None:
    assert find(tmp_path, default=tmp_path / "data") == tmp_path / "data"
    with pytest.raises(NotFoundError, match="no registry.db here or above. Create a registry"):
        find(tmp_path)
    with pytest.raises(NotFoundError, match="no registry there"):
        Registry.open(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_a_registry_owned_by_another_user_is_skipped(tmp_path: Path) -> None:
    Registry.init(tmp_path).close()
    os.chown(tmp_path / "registry.db", 12345, -1)
    with pytest.raises(NotFoundError, match="no registry.db here or above"):
        find(tmp_path)


def test_init_twice_keeps_what_is_there(registry: Registry, make: Make) -> None:
    registry.push(make(), SQL)
    with Registry.init(registry.root) as again:
        assert again.resolve(SQL).number == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_who_may_only_read_sees_all_and_moves_nothing(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(make("b", 1), SQL)  # in the write-ahead log only, as `registry` is still open
    for folder in (registry.root, *registry.root.parents[:-2]):  # all below /tmp: how many depends on pytest-xdist
        folder.chmod(folder.stat().st_mode | 0o055)
    child = os.fork()
    if child == 0:
        os.setuid(12345)
        try:
            with Registry.open(registry.root) as mine:
                assert mine.resolve(SQL).number == 2
                assert fsck(mine) == []
                with pytest.raises(LocalIOError, match="Permission denied"):
                    mine.tag(SQL, "prod")
            os._exit(0)
        except BaseException as error:
            print(repr(error))
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


# ---- several writers


def test_two_writers_at_once_lose_nothing(registry: Registry, make: Make) -> None:
    folders = [make(f"a{n}", n) for n in range(6)]
    found: list[int] = []

    def push(folder: Path) -> None:
        with Registry.open(registry.root) as mine:
            found.append(mine.push(folder, SQL).number)

    threads = [threading.Thread(target=push, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert errors(registry) == []


def test_two_processes_at_once_make_v1_and_v2(registry: Registry, make: Make) -> None:
    code = (
        "import sys, pathlib; from adapterhub.registry.registry import Registry; from adapterhub.ref import Ref\n"
        "with Registry.open(pathlib.Path(sys.argv[1])) as r: r.push(pathlib.Path(sys.argv[2]), Ref.parse('team/sql'))"
    )
    folders = [make("a", 1), make("b", 2)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, "-c", code, registry.root, folder], env=env) for folder in folders]
    assert [process.wait(30) for process in started] == [0, 0]
    assert [row.number for row in registry.list()] == [2, 1]
    assert {row.digest for row in registry.list()} == {oci_manifest.build(folder).digest for folder in folders}
    assert errors(registry) == []


def test_a_lost_compare_and_swap_is_tried_again(registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system whose locks do nothing: another writer commits between our look and our move."""
    begin, pushed = RefLog.begin_move, []

    def race(log: RefLog, name: str) -> Path:
        if not pushed:
            pushed.append(1)
            entry = Entry(name, 1, "push", "2026-01-01T00:00:00Z", other.digest, len(other.raw), 1, ("latest",))
            assert log.append(entry)
        return begin(log, name)

    other = ingest(registry.store, make("b", 1))[0]
    monkeypatch.setattr(RefLog, "begin_move", race)
    assert registry.push(make("a"), SQL).number == 2
    assert registry.resolve(ref("team/sql:v1")).digest == other.digest
    assert fsck(registry) == []


def test_an_unwritable_place_is_a_local_error(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make(), SQL)
    with pytest.raises(LocalIOError):
        registry.pull(SQL, Path("/proc/nowhere/out"))
    with pytest.raises(LocalIOError):
        Registry.init(Path("/proc/nowhere"))


def test_who_only_reads_starts_without_numpy() -> None:
    code = "import sys, adapterhub.registry.registry; sys.exit(bool({'numpy', 'sqlite_utils'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
