"""A registry is found, opened and shared: by several writers, by those who may only read, and after its folder was away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry, find
from adapterhub.store.ingest import ingest
from adapterhub.store.ref_log import RefLog
from adapterhub.store.store import Entry
from adapterhub_converters.errors import (
    LocalIOError,
    NotFoundError,
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


def errors(registry: Registry) -> list[str]:
    return [str(finding) for finding in fsck(registry) if finding.severity == "error"]


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


def test_two_writers_at_once_lose_nothing(registry: Registry, make: Make) -> None:
    folders = [make(f"a{n}", n) for n in range(6)]
    numbers: list[int] = []

    def push(folder: Path) -> None:
        with Registry.open(registry.root) as mine:
            numbers.append(mine.push(folder, SQL).number)

    threads = [threading.Thread(target=push, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
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
            entry = Entry(
                name, 1, "push", "2026-01-01T00:00:00Z", other_manifest.digest, len(other_manifest.raw), 1, ("latest",)
            )
            assert log.append(entry)
        return begin(log, name)

    other_manifest = ingest(registry.store, make("b", 1))[0]
    monkeypatch.setattr(RefLog, "begin_move", race)
    assert registry.push(make("a"), SQL).number == 2
    assert registry.resolve(ref("team/sql:v1")).digest == other_manifest.digest
    assert fsck(registry) == []


def test_an_unwritable_place_is_a_local_error(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make(), SQL)
    with pytest.raises(LocalIOError):
        registry.pull(SQL, Path("/proc/nowhere/out"))
    with pytest.raises(LocalIOError):
        Registry.init(Path("/proc/nowhere"))
