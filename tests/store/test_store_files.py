"""Files of a store: whole or absent, claimed by one writer, and temporary ones go with their writer or a day later."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from adapterhub.store import store_files
from adapterhub.store.leases import ABANDONED
from adapterhub.store.store_files import StoreFiles
from adapterhub_converters.errors import LocalIOError, RefusedError


@pytest.fixture
def files(tmp_path: Path) -> StoreFiles:
    (tmp_path / "tmp").mkdir()
    return StoreFiles(tmp_path)


def test_a_temporary_file_is_removed_unless_it_got_a_name(files: StoreFiles) -> None:
    with files.temporary() as (path, file):
        file.write(b"x")
        assert path.exists()
    with files.temporary() as (path, file):
        file.write(b"x")
        files.move(path, files.root / "kept")
    assert files.exists(files.root / "kept")
    assert files.list_folder(files.root / "tmp") == []


def test_a_document_is_replaced_in_one_step_or_stays(files: StoreFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    files.replace(files.root / "a.json", b"one")
    files.replace(files.root / "a.json", b"two")

    def full(_file: object, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_files, "write_all", full)
    with pytest.raises(LocalIOError, match="No space left") as caught:
        files.replace(files.root / "a.json", b"three")
    assert caught.value.hint == "Free some space and try again"
    assert (files.root / "a.json").read_bytes() == b"two"
    assert files.list_folder(files.root / "tmp") == []


@pytest.mark.parametrize("can_link", [True, False])
def test_a_name_is_claimed_once(files: StoreFiles, monkeypatch: pytest.MonkeyPatch, can_link: bool) -> None:
    def no_link(*_args: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not can_link:
        monkeypatch.setattr(StoreFiles, "link", no_link)
    claims = []
    for data in (b"first", b"second"):
        with files.temporary() as (path, file):
            file.write(data)
            claims.append(files.claim(path, files.root / "00000001.json"))
    assert claims == [True, False]
    assert (files.root / "00000001.json").read_bytes() == b"first"


def test_leftovers_go_after_a_day_and_younger_ones_stay(files: StoreFiles) -> None:
    for name, age in (("old", ABANDONED + 60), ("young", 60)):
        (files.root / "tmp" / name).write_text("x")
        os.utime(files.root / "tmp" / name, (time.time() - age,) * 2)
    files.sweep()
    assert [path.name for path in files.list_folder(files.root / "tmp")] == ["young"]


def test_links_are_not_followed_anywhere(files: StoreFiles, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    (files.root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(RefusedError, match="link"):
        store_files.open_regular(files.root / "link")
    with pytest.raises(RefusedError, match="link"):
        files.read(files.root / "link")
