"""Files of a base in a local folder: bytes at any offset, limits of small files, and errors with the name of the file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from adapterhub_converters.bases.model_files import LocalFiles, read_object
from adapterhub_converters.errors import FormatError

CONTENT = bytes(range(256)) * 1024  # more than is read at first


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    return LocalFiles(tmp_path)


@pytest.mark.parametrize(("offset", "count"), [(0, 8), (65_530, 12), (200_000, 100), (5, 70_000), (len(CONTENT) - 3, 3)])
def test_bytes_at_any_offset_are_those_of_the_file(files: LocalFiles, offset: int, count: int) -> None:
    ranged = files.open_ranged("model.safetensors")
    assert ranged is not None
    assert ranged.size == len(CONTENT)
    assert ranged.read_at(offset, count) == CONTENT[offset : offset + count]
    assert ranged.read_at(0, 4) == CONTENT[:4]  # after a later part


def test_a_missing_file_is_none(files: LocalFiles) -> None:
    assert (files.read_whole("none", 10), files.open_ranged("none"), files.sha256("none")) == (None, None, None)
    assert read_object(files, "none") is None


def test_a_small_file_has_a_limit(files: LocalFiles) -> None:
    assert files.read_whole("model.safetensors", len(CONTENT)) == CONTENT
    with pytest.raises(FormatError, match=f"more than {len(CONTENT) - 1} bytes: not a config file"):
        files.read_whole("model.safetensors", len(CONTENT) - 1)


def test_a_digest_is_that_of_the_bytes(files: LocalFiles) -> None:
    assert files.sha256("model.safetensors") == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"[]", b"{"])
def test_a_config_that_is_no_object_is_named(files: LocalFiles, tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(FormatError, match=r"config\.json"):
        read_object(files, "config.json")
