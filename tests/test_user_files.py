"""Small files of people: who may read them, and what a change leaves alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from adapterhub import user_files
from adapterhub_converters.errors import LocalIOError

fcntl = pytest.importorskip("fcntl")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no modes of files")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(path: Path, *, private: bool = False) -> None:
    user_files.change(path, lambda _: "text\n", private=private)


def test_the_umask_which_all_threads_share_is_not_changed_to_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that set and restore it at once could leave it at 077 for good."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)
        write(tmp_path / "file")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert mode(tmp_path / "file") == 0o640


@pytest.mark.parametrize(("private", "expected"), [(False, 0o640), (True, 0o600)])
def test_a_changed_file_keeps_its_mode_unless_it_is_private(tmp_path: Path, private: bool, expected: int) -> None:
    path = tmp_path / "file"
    write(path, private=private)
    if not private:
        path.chmod(0o640)
    user_files.change(path, lambda old: old + "more\n", private=private)
    assert (path.read_text(), mode(path)) == ("text\nmore\n", expected)


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LocalIOError, match="No space left"):
        write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_lock_that_somebody_keeps_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To read a folder is enough to lock it: of a shared machine, anybody could have `login` hang."""
    monkeypatch.setattr(user_files, "_TRIES", 3)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        with pytest.raises(LocalIOError, match="another process keeps this folder locked. Wait for that process, or end it"):
            write(tmp_path / "file")
    finally:
        os.close(handle)
    write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text\n"
