"""Folders of served versions: whole, never changed, and there as long as somebody holds them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.serve import prepared_versions
from adapterhub.serve.prepared_versions import FolderRecord, PreparedVersion, ServedFolder
from adapterhub_converters.errors import AdapterhubError, NotFoundError
from tests.registry.forks import finished, fork, under_strace

DIGEST = "sha256:" + "5f" * 32
MADE = FolderRecord(4, ("q_proj", "v_proj"), ("folded",), "adapter.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> ServedFolder:
    return ServedFolder(tmp_path / "served")


def write_version(place: Path) -> FolderRecord:
    (place / "adapter.gguf").write_bytes(b"weights" * 10_000)
    return MADE


def served_path(folder: ServedFolder, form: str = "vllm-1") -> Path:
    return folder.make(DIGEST, form, write_version)[0]


def at(path: Path) -> PreparedVersion:
    return PreparedVersion("team/sql:v1", "team/sql", DIGEST, "vllm", path, 4)


def aged(path: Path, hours: float = 10_000) -> Path:
    time_of_use = time.time() - hours * 3600
    os.utime(path, (time_of_use, time_of_use))
    return path


def test_what_is_made_is_found_and_cannot_be_written(folder: ServedFolder) -> None:
    assert folder.find(DIGEST, "vllm-1") is None
    path = served_path(folder)
    assert folder.find(DIGEST, "vllm-1") == (path, MADE)
    assert folder.find(DIGEST, "vllm-2") is None
    assert {oct(entry.stat().st_mode & 0o222) for entry in (path, *path.iterdir())} == {"0o0"}
    assert at(path).model == f"team/sql@{DIGEST}"


@pytest.mark.parametrize("harm", ["changed", "removed", "added", "record", "entries", "linked"])
def test_a_damaged_folder_is_made_anew_beside_it(folder: ServedFolder, harm: str) -> None:
    path = served_path(folder)
    path.chmod(0o755)
    weights = path / "adapter.gguf"
    if harm in ("removed", "linked"):
        weights.unlink()
    if harm == "linked":
        weights.symlink_to("/etc/passwd")
    if harm == "added":
        (path / "more").write_text("")
    if harm in ("changed", "record", "entries"):
        entry = weights if harm == "changed" else path / "served.json"
        entry.chmod(0o644)
        of_another_version = json.dumps({**json.loads((path / "served.json").read_text()), "newer": 1})
        entry.write_text({"changed": "weighty" * 10_000, "record": "{}", "entries": of_another_version}[harm])
    before = sorted((entry.name, entry.lstat().st_ino, entry.lstat().st_mtime_ns) for entry in path.iterdir())
    assert folder.find(DIGEST, "vllm-1") is None
    new_path = served_path(folder)
    assert new_path != path
    assert folder.find(DIGEST, "vllm-1") == (new_path, MADE)
    assert sorted((entry.name, entry.lstat().st_ino, entry.lstat().st_mtime_ns) for entry in path.iterdir()) == before


def test_of_processes_that_make_it_at_once_all_get_the_same(folder: ServedFolder) -> None:
    def work() -> None:
        assert served_path(folder).name == "vllm-1"

    assert finished([fork(work) for _ in range(6)]) == [0] * 6
    assert folder.find(DIGEST, "vllm-1") is not None
    assert [path.name for path in (folder.root / DIGEST.replace(":", "-")).iterdir()] == ["vllm-1"]


@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC"])
@pytest.mark.parametrize("call", ["write", "mkdir", "fsync", "rename", "fchmodat"])
def test_a_process_that_ends_anywhere_leaves_nothing_that_is_half(folder: ServedFolder, call: str, fault: str) -> None:
    folder.root.mkdir()
    code = under_strace(f"{call}:{fault}:when=1", lambda: served_path(folder))
    assert code in (0, 8, -signal.SIGKILL)
    version = folder.find(DIGEST, "vllm-1")
    assert version is None or version[1] == MADE
    assert folder.find(DIGEST, "vllm-1") or served_path(folder)
    parent = folder.root / DIGEST.replace(":", "-")
    for leftover in parent.iterdir():
        aged(leftover)
    assert folder.sweep(unused=prepared_versions.UNUSED).folders >= 1
    assert list(parent.iterdir()) == []


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        folder = ServedFolder(disk / "served")
        with pytest.raises(AdapterhubError, match="No space left") as caught:
            served_path(folder)
        assert caught.value.exit_code == 8
        assert folder.find(DIGEST, "vllm-1") is None
        assert list((folder.root / DIGEST.replace(":", "-")).iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_only_what_nobody_holds_and_nobody_resolved_lately_is_removed(folder: ServedFolder) -> None:
    path, recent = aged(served_path(folder)), served_path(folder, "sglang-1")
    with folder.open_lease() as lease:
        lease.add(at(path / "adapter.gguf"))
        swept = folder.sweep()
        assert (swept.folders, swept.in_use) == (0, 1)
    assert folder.sweep(dry_run=True).folders == 1
    assert path.exists()
    swept = folder.sweep()
    assert (swept.folders, swept.size > 70_000, swept.in_use) == (1, True, 0)
    assert not path.exists()
    assert recent.exists()
    aged(recent)
    folder.find(DIGEST, "sglang-1")
    assert folder.sweep().folders == 0


def test_what_is_held_no_longer_is_removed_unless_another_name_of_it_is_held(folder: ServedFolder) -> None:
    first, second = aged(served_path(folder)), aged(served_path(folder, "sglang-1"))
    served = {name: replace(at(first), name=name) for name in ("team/a", "team/b")}  # the same files
    with folder.open_lease() as lease:
        for path in (*served.values(), at(second)):
            lease.add(path)
        lease.add(served["team/a"])  # twice is once
        lease.drop(served["team/a"])
        lease.drop(served["team/a"])
        assert folder.sweep().in_use == 2
        lease.drop(served["team/b"])
        swept = folder.sweep()
        assert (swept.folders, swept.in_use) == (1, 1)
        assert not first.exists()
        with pytest.raises(NotFoundError, match="no longer there. Resolve the version again"):
            lease.add(served["team/a"])
    assert folder.sweep().folders == 1


def test_what_a_killed_server_held_is_known_at_once(folder: ServedFolder) -> None:
    path = aged(served_path(folder))

    def serve() -> None:
        with folder.open_lease() as lease:
            lease.add(at(path))
            (folder.root / "ready").touch()
            signal.pause()

    child = fork(serve)
    while not (folder.root / "ready").exists():
        time.sleep(0.01)
    assert folder.sweep().in_use == 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert folder.sweep().folders == 1
    assert list((folder.root / "leases").iterdir()) == []


def test_a_folder_that_is_gone_cannot_be_held(folder: ServedFolder) -> None:
    path = served_path(folder)
    path.chmod(0o755)
    shutil.rmtree(path)
    with folder.open_lease() as lease, pytest.raises(NotFoundError, match="no longer there. Resolve the version again"):
        lease.add(at(path))


def test_a_link_in_the_place_of_a_version_is_refused_and_not_followed(folder: ServedFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere/vllm-1").mkdir(parents=True)
    folder.root.mkdir()
    (folder.root / DIGEST.replace(":", "-")).symlink_to(tmp_path / "elsewhere")
    for act in (lambda: folder.find(DIGEST, "vllm-1"), folder.sweep):
        with pytest.raises(AdapterhubError, match="a link"):
            act()
    assert (tmp_path / "elsewhere/vllm-1").exists()


def test_a_name_that_a_remote_has_for_a_version_is_known_until_nobody_asks_for_it(folder: ServedFolder) -> None:
    assert not folder.is_confirmed("team/sql", DIGEST)
    for _ in range(2):
        folder.confirm("team/sql", DIGEST)
    assert folder.is_confirmed("team/sql", DIGEST)
    assert not folder.is_confirmed("team/other", DIGEST)
    assert not folder.is_confirmed("team/sql", "sha256:" + "00" * 32)
    (note,) = (folder.root / "names").iterdir()
    aged(note)
    assert folder.is_confirmed("team/sql", DIGEST)  # which counts as used
    folder.sweep()
    assert note.exists()
    aged(note)
    folder.sweep(dry_run=True)
    assert note.exists()
    folder.sweep()
    assert not folder.is_confirmed("team/sql", DIGEST)


def test_where_nothing_can_be_written_names_are_asked_for_again(folder: ServedFolder) -> None:
    folder.root.write_text("a file in its place")
    folder.confirm("team/sql", DIGEST)
    assert not folder.is_confirmed("team/sql", DIGEST)
