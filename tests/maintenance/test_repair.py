"""The ways out: bytes restored, a database that cannot be used, media that cannot be written, file systems without locks."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.maintenance import disk_usage
from adapterhub.maintenance.fsck import fsck, open_rebuilt
from adapterhub.maintenance.gc import gc
from adapterhub.maintenance.repair import repair
from adapterhub.maintenance.verify import verify
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import AdapterhubError, LocalIOError, NotFoundError
from tests.conftest import Run
from tests.registry.test_registry import bytes_of, errors, flip
from tests.support.adapters import Make

SQL, PROD = Ref.parse("team/sql"), Ref.parse("team/sql:prod")


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        opened.push(make("a", 1), SQL)
        opened.push(make("b", 2), PROD)
        yield opened


# ---- bytes


def broken(registry: Registry, *, flipped: bool) -> None:
    for path in registry.store.blobs():
        path.chmod(0o644)
        flip(path) if flipped else path.unlink()
    assert errors(registry)


@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("kind", ["registry", "database", "layout"])
def test_blobs_are_put_back_from_another_registry(registry: Registry, tmp_path: Path, flipped: bool, kind: str) -> None:
    shutil.copytree(registry.root, tmp_path / "copy")
    before, rows = bytes_of(registry.store.root / "blobs"), registry.list()
    broken(registry, flipped=flipped)
    source = {"registry": ".", "database": "registry.db", "layout": ".adapterhub"}[kind]
    assert len(repair(registry, tmp_path / "copy" / source)) == len(before)
    assert fsck(registry) == []
    assert (bytes_of(registry.store.root / "blobs"), registry.list()) == (before, rows)
    assert repair(registry, tmp_path / "copy") == []


def test_blobs_are_put_back_from_the_adapters_own_folder(registry: Registry, tmp_path: Path) -> None:
    registry.rebuild_index()
    rows = registry.list()
    broken(registry, flipped=False)
    registry.rebuild_index()  # what lists show is lost with the bytes
    assert registry.list()[0].size is None
    assert len(repair(registry, tmp_path / "a")) == 6
    assert len(repair(registry, tmp_path / "b")) == 4  # README.md and the config are in both
    assert registry.list() == rows
    assert fsck(registry) == []


def test_files_of_what_is_no_whole_adapter_do_as_well(registry: Registry, tmp_path: Path) -> None:
    weights = next(layer for layer in registry.files(registry.resolve(SQL)) if layer.path.endswith(".safetensors"))
    flip(registry.store.blob_path(weights.digest))
    (tmp_path / "some").mkdir()
    shutil.copy(tmp_path / "b" / "adapter_model.safetensors", tmp_path / "some" / "anything.safetensors")
    assert repair(registry, tmp_path / "some") == [weights.digest]
    assert fsck(registry) == []


def test_wrong_bytes_put_nothing_back(registry: Registry, tmp_path: Path) -> None:
    shutil.copytree(registry.root, tmp_path / "copy")
    with Registry.open(tmp_path / "copy") as copy:
        broken(copy, flipped=True)
    broken(registry, flipped=False)
    assert repair(registry, tmp_path / "copy") == []
    assert not list(registry.store.blobs())
    assert not list((registry.store.root / "tmp").iterdir())
    with pytest.raises(NotFoundError, match="no such file or folder"):
        repair(registry, tmp_path / "nowhere")


def test_the_command_reports_how_many(run: Run, registry: Registry, tmp_path: Path) -> None:
    broken(registry, flipped=True)
    registry.close()
    at = ("--registry", registry.root)
    assert "fsck --repair --from" in run("fsck", *at, code=1).stdout
    run("fsck", "--repair", "--from", tmp_path / "a", *at, code=1)
    result = run("fsck", "--repair", "--from", tmp_path / "b", *at)
    assert result.stderr == f"restored 4 blobs from {tmp_path / 'b'}\n"
    error = "error: --repair: requires --from SRC. Pass --from SRC too  [conflicting-options]\n"
    assert run("fsck", "--repair", *at, code=2).stderr == error
    assert "--from: requires --repair" in run("fsck", "--from", "a", *at, code=2).stderr
    assert "no such option" in run("fsck", "--rebuild", *at, code=2).stderr.lower()


# ---- the database


def damage(path: Path, kind: str) -> None:
    if kind == "newer":
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
    elif kind == "foreign":
        path.unlink()
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE t (x)")
        db.close()
    else:
        raw = bytearray(path.read_bytes())
        start = 4096 if kind == "pages" else 0
        raw[start:] = b"\xff" * (len(raw) - start)
        path.write_bytes(raw if kind != "empty" else b"")


@pytest.mark.parametrize("kind", ["newer", "foreign", "pages", "garbage", "empty"])
def test_an_unusable_database_is_set_aside_and_rebuilt(registry: Registry, kind: str) -> None:
    rows = registry.list()
    registry.close()
    path = registry.root / "registry.db"
    damage(path, kind)
    raw = path.read_bytes()
    with pytest.raises(AdapterhubError, match="[Rr]ebuild the index"), Registry.open(path) as opened:
        opened.list()
    again, findings = open_rebuilt(path)
    with again:
        assert (again.list(), findings, fsck(again)) == (rows, [], [])
    assert (registry.root / "registry.db.old").read_bytes() == raw or kind == "pages"


# ---- places that cannot be written


@pytest.fixture
def read_only(registry: Registry, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Copy the registry to a file system that is then mounted for reading only."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount() -> Path:
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False, capture_output=True)
        if result.returncode:
            pytest.skip("only root can mount a file system")
        shutil.copytree(registry.root, disk / "registry")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        return disk / "registry"

    yield mount
    subprocess.run(["umount", disk], check=False, capture_output=True)


@pytest.mark.parametrize("state", ["at rest", "in use", "no database", "garbage", "newer", "older", "behind"])
def test_every_reading_command_works_on_read_only_media(
    registry: Registry, read_only: Callable[[], Path], tmp_path: Path, state: str
) -> None:
    path, rows = registry.root / "registry.db", registry.list()
    if state != "in use":  # then some of it is in the write-ahead log only
        registry.close()
    if state == "no database":
        path.unlink()
    elif state == "behind":
        shutil.copy(path, tmp_path / "old.db")
        with Registry.open(registry.root) as later:
            later.tag(Ref.parse("team/sql:v1"), "dev")
            rows = later.list()
        shutil.copy(tmp_path / "old.db", path)
    elif state not in ("at rest", "in use"):
        damage(path, state)
    with Registry.open(read_only()) as read_only_registry:
        assert read_only_registry.list() == rows
        assert read_only_registry.resolve(PROD).number == 2
        assert read_only_registry.show(PROD)["tags"] == ["latest", "prod"]
        assert [finding for finding in fsck(read_only_registry) if finding.severity == "error"] == []
        assert verify(read_only_registry, SQL) == []
        assert [entry.op for entry in read_only_registry.log(PROD)] == ["push"]
        assert gc(read_only_registry, dry_run=True).blobs == 0
        assert disk_usage.usage(read_only_registry).unlisted == 0  # whose lists cannot be kept
        read_only_registry.pull(SQL, tmp_path / "out")
        for call in (
            lambda: read_only_registry.tag(SQL, "new"),
            lambda: read_only_registry.rm(PROD),
            lambda: read_only_registry.push(tmp_path / "a", PROD),
        ):
            with pytest.raises(LocalIOError, match="Read-only file system"):
                call()
        assert read_only_registry.list() == rows


def test_a_file_system_without_shared_memory_gets_a_rollback_journal(
    registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own `unix-dotfile` locks by files and has no shared memory, as on a network file system."""
    connect, rows = sqlite3.connect, registry.list()
    registry.close()

    def without(database: str, **options: object) -> sqlite3.Connection:
        uri = str(database).startswith("file:")
        return connect(f"{database}&vfs=unix-dotfile" if uri else database, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(sqlite3, "connect", without)
    for _ in range(2):
        with Registry.open(registry.root) as first:
            assert first.list() == rows
    with Registry.open(registry.root) as first, Registry.open(registry.root) as second:
        assert first.push(make("c", 3), SQL).number == 3
        assert second.push(make("d", 4), SQL).number == 4
        assert fsck(first) == fsck(second) == []
    header = (registry.root / "registry.db").read_bytes()[:20]
    assert header[18:] == b"\1\1"
    with Registry.init(registry.root.parent / "new") as new:
        assert new.push(make("c", 3), SQL).number == 1
