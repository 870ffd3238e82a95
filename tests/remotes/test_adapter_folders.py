"""The hashing of an adapter's large files while it is checked."""

from __future__ import annotations

import os
from concurrent.futures import CancelledError  # codespell:ignore
from pathlib import Path

import pytest

from adapterhub.digest import sha256_file
from adapterhub.remotes.adapter_folders import MIN_SENT_AHEAD, HashingAhead


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a large file, a small one and a link to a large one."""
    (tmp_path / "large").write_bytes(os.urandom(MIN_SENT_AHEAD))
    (tmp_path / "small").write_bytes(b"small")
    (tmp_path / "link").symlink_to(tmp_path / "large")
    return tmp_path


def test_large_files_are_hashed_and_no_others(folder: Path) -> None:
    with HashingAhead(folder, lambda: True) as ahead:
        assert ahead.digest(folder / "large") == sha256_file(folder / "large")
        assert [ahead.digest(folder / name) for name in ("small", "link", "absent")] == [None] * 3


def test_nothing_is_hashed_that_is_sent_before_its_digest_is_known(folder: Path) -> None:
    with HashingAhead(folder, lambda: False) as ahead:
        assert ahead.digest(folder / "large") is None


def test_an_error_of_the_question_is_raised_where_a_digest_is_asked_for(folder: Path) -> None:
    def is_wanted() -> bool:
        raise OSError("no network")

    with HashingAhead(folder, is_wanted) as ahead, pytest.raises(OSError, match="no network"):
        ahead.digest(folder / "large")


def test_the_hashing_ends_with_its_context(folder: Path) -> None:
    os.truncate(folder / "large", 1 << 40)  # a hole
    with HashingAhead(folder, lambda: True) as ahead:
        pass
    with pytest.raises(CancelledError):  # codespell:ignore
        ahead.digest(folder / "large")
