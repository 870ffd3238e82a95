"""Files of tensors: opened once, read at offsets by several threads, and copied whole."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from adapterhub.merging.into_base import tensor_files
from adapterhub.merging.into_base.tensor_files import OpenFiles, copy_range, new_buffer
from adapterhub_converters.errors import FormatError, LocalIOError


def test_a_file_is_opened_once_by_many_threads_and_closed_by_the_outermost_block(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(256)) * 64)

    def read(offset: int) -> tuple[int, bytes]:
        buffer = new_buffer("raw", 16)
        opened.read(path, buffer, offset)
        return opened.fd(path), buffer.tobytes()

    with OpenFiles() as opened, ThreadPoolExecutor(8) as threads:
        with opened:
            results = list(threads.map(read, range(256)))
        descriptor = opened.fd(path)
        assert {fd for fd, _ in results} == {descriptor}
        assert [data for _, data in results] == [(bytes(range(256)) * 2)[offset : offset + 16] for offset in range(256)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_file_that_ends_in_a_tensor_and_one_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    with OpenFiles() as opened:
        with pytest.raises(FormatError, match="ends at byte 10"):
            opened.read(tmp_path / "short", new_buffer("raw", 8), 4)
        with pytest.raises(LocalIOError, match="No such file"):
            opened.fd(tmp_path / "none")


def test_a_few_values_are_cached_and_the_one_used_least_lately_goes_first() -> None:
    loads: list[str] = []
    opened = OpenFiles()
    for key in ("a", "b", "c", "a", "d", "a", "b"):
        assert opened.cached(key, lambda key=key: loads.append(key) or np.zeros(1)) is not None  # type: ignore[misc,func-returns-value]
    assert loads == ["a", "b", "c", "d", "b"]


@pytest.mark.parametrize("in_kernel", [True, False])
def test_ranges_are_copied_to_the_byte_and_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(tensor_files, "_CHUNK", 100)
    data = np.random.default_rng(0).bytes(1000)
    (tmp_path / "source").write_bytes(data)
    (tmp_path / "target").write_bytes(bytes(1000))
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("r+b") as target:
        copy_range(source.fileno(), target.fileno(), 10, 750, 200)
        with pytest.raises(FormatError, match="ends at byte 1000"):
            copy_range(source.fileno(), target.fileno(), 900, 101, 0)
    assert (tmp_path / "target").read_bytes()[200:950] == data[10:760]
    assert (tmp_path / "target").read_bytes()[950:] == bytes(50)
