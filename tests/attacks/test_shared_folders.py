"""Folders that others can write to: what a stranger put there is neither trusted nor written through."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterhub.registry.registry import Registry, find
from adapterhub.remotes import adapter_folders, download
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.download import receive
from adapterhub.user_files import is_mine
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import ConflictError, LocalIOError, OutputExistsError, RefusedError
from tests.support.adapters import write_adapter

OLD = 1_000_000_000  # seconds since 1970
STRANGER = 65534  # nobody
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")


@as_root
@pytest.mark.parametrize("linked", ["oci-layout", "registry.db", ""])
def test_a_link_to_a_file_of_mine_does_not_make_a_foreign_store_mine(tmp_path: Path, linked: str) -> None:
    mine, shared = tmp_path / "mine", tmp_path / "shared"
    Registry.init(mine).close()
    Registry.init(shared).close()
    if linked:
        place = shared / linked if linked == "registry.db" else shared / ".adapterhub" / linked
        place.unlink()
        place.symlink_to(mine / linked if linked == "registry.db" else mine / ".adapterhub" / linked)
    for path in (shared / "registry.db", shared / ".adapterhub", shared / ".adapterhub" / "oci-layout"):
        os.lchown(path, STRANGER, STRANGER)
    (shared / "below").mkdir()
    assert find(shared / "below", default=tmp_path / "default") == tmp_path / "default"
    assert find(mine, default=tmp_path / "default") == mine


@as_root
def test_the_owner_of_a_link_is_who_made_it(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    os.lchown(tmp_path / "link", STRANGER, STRANGER)
    assert is_mine(tmp_path / "mine")
    assert not is_mine(tmp_path / "link")


def test_a_file_that_another_process_receives_is_left_to_it(tmp_path: Path) -> None:
    source, files, part = AdapterFolder(write_adapter(tmp_path / "sql")), ConfinedFiles(tmp_path), tmp_path / "x.part"
    blob = source.manifest("latest").layers[0]
    with receive(source, blob, files, part), pytest.raises(ConflictError) as error, receive(source, blob, files, part):
        pass
    assert str(error.value) == f"{part}: another process is receiving it. Wait for that process"
    assert error.value.code == "in-use"


def test_incomplete_files_are_not_kept_where_others_can_write(tmp_path: Path) -> None:
    waiting = tmp_path / ".sql.pull-0123456789ab"
    waiting.mkdir()
    waiting.chmod(0o777)
    with pytest.raises(LocalIOError) as error:
        adapter_folders._make_scratch(waiting)
    reason = "is not a folder, or others own it or can write to it"
    assert str(error.value) == f"{waiting}: {reason}. Remove it, or write to another folder"
    waiting.chmod(0o700)
    adapter_folders._make_scratch(waiting)
    (waiting / "x.part").write_text("")
    (waiting / "x.part").chmod(0o666)
    with (
        pytest.raises(ConflictError, match="others can write to it"),
        download._open_locked(ConfinedFiles(waiting), waiting / "x.part"),
    ):
        pass


def test_leftovers_of_killed_runs_go_when_they_are_old_and_nothing_behind_links_goes_with_them(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "id").write_text("precious")
    old, young, behind = (tmp_path / f".out.new-{name}" for name in ("old", "young", "link"))
    old.mkdir()
    young.mkdir()
    behind.symlink_to(victim)
    (tmp_path / ".out.partial-link").symlink_to(victim)
    os.mkfifo(tmp_path / ".out.partial-pipe")
    os.utime(old, (OLD, OLD))
    os.utime(victim, (OLD, OLD))
    with atomic.pending_output(tmp_path / "out") as out:
        (out / "file").write_text("x")
    assert not old.exists()
    assert young.is_dir()
    assert (victim / "id").read_text() == "precious"
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_a_folder_is_locked_once_and_not_through_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lock = atomic.lock_folder(folder)
    assert lock is not None
    assert atomic.lock_folder(folder) is None
    os.close(lock)
    (tmp_path / "link").symlink_to(folder)
    assert atomic.lock_folder(tmp_path / "link") is None


def test_no_operation_follows_a_link_and_each_names_it(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").write_text("precious")
    (root / "real" / "file").write_text("x")
    (root / "link").symlink_to(outside)
    files = ConfinedFiles(root)
    behind, real_file = root / "link" / "file", root / "real" / "file"
    for attempt in (
        lambda: files.open(behind),
        lambda: files.create(root / "link" / "new"),
        lambda: files.resume(behind),
        lambda: files.status(behind),
        lambda: files.list_folder(root / "link"),
        lambda: files.list_subfolders(root),
        lambda: files.make_dir(root / "link" / "new"),
        lambda: files.touch(behind),
        lambda: files.move(real_file, root / "link" / "new"),
        lambda: files.move(behind, root / "real" / "new"),
        lambda: files.link(real_file, root / "link" / "new"),
        lambda: files.remove(behind),
        lambda: files.remove_tree(behind),
    ):
        with pytest.raises(RefusedError, match="a link") as caught:
            attempt()
        assert caught.value.where == str(root / "link")
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "precious"
    files.remove_tree(root / "link")
    assert outside.is_dir()
    assert not (root / "link").is_symlink()


def test_folders_that_are_kept_open_are_opened_once_and_not_through_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand small files took as many walks from the root for each of their names."""
    files, opened = ConfinedFiles(tmp_path), list[str]()
    open_path = ConfinedFiles._open_path

    def counted(self: ConfinedFiles, folder: str) -> int | None:
        opened.append(folder)
        return open_path(self, folder)

    monkeypatch.setattr(ConfinedFiles, "_open_path", counted)
    (tmp_path / "a").mkdir()
    (tmp_path / "away").symlink_to(tmp_path / "a")
    open_handles = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with files.folders_kept_open(), files.folders_kept_open():
        for n in range(9):
            files.create(tmp_path / "a" / f"{n}").close()
            files.move(tmp_path / "a" / f"{n}", tmp_path / f"{n}")
        with pytest.raises(RefusedError, match="a link"):
            files.create(tmp_path / "away" / "file")
        with pytest.raises(FileNotFoundError, match="missing"):
            files.create(tmp_path / "missing" / "file")
    assert opened[:2] == [str(tmp_path / "a"), str(tmp_path)]
    assert len(opened) == 4
    assert not open_handles or len(os.listdir("/proc/self/fd")) == open_handles
    assert files.exists(tmp_path / "8")
    assert len(opened) == 5


def test_a_folder_that_another_run_published_first_is_an_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "pending").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(OutputExistsError):
        atomic._publish(tmp_path / "pending", tmp_path / "out", folder=True)
