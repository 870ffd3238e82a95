"""Parquet and Arrow files of strangers as training data: damaged, or a few kilobytes that unpack to any size."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.training.data import compressed_files, document_files, table_files
from adapterhub_converters.errors import FormatError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def parquet(table: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", **options)
    return out.getvalue()


def arrow(table: Any) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


KINDS = {"parquet": parquet, "arrow": arrow}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_table_is_a_format_error(tmp_path: Path, kind: str) -> None:
    good, path = KINDS[kind](pa.table({"text": ["abc", "de"], "n": [1, 2]})), tmp_path / f"d.{kind}"
    for seed in range(300):
        rng, raw = random.Random(seed), bytearray(good)
        for _ in range(rng.choice([1, 2, 8])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw[: rng.choice([len(raw), rng.randrange(len(raw))])])
        with contextlib.suppress(FormatError):
            document_files.read(path)


BOMBS: dict[str, Callable[[], Any]] = {
    "one text again and again": lambda: pa.table({"text": pa.array(["a" * 10_000] * 20_000).dictionary_encode()}),
    "rows of nothing": lambda: pa.table({"text": pa.nulls(2_000_000, pa.string())}),
    "lists": lambda: pa.table({"messages": pa.array([[{"role": "user", "content": "a" * 10_000}] * 10] * 2000)}),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_table_that_unpacks_to_any_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: Any) -> None:
    monkeypatch.setattr(compressed_files, "_ALWAYS_ALLOWED", 16 << 20)
    path = tmp_path / "d.parquet"
    path.write_bytes(parquet(bomb()))
    assert path.stat().st_size < 250_000
    rows = iter(table_files.parquet(path.read_bytes(), path))
    with pytest.raises(FormatError, match="bytes unpack to more than"):
        list(itertools.islice(rows, 300_000))


@pytest.fixture
def decoded() -> Iterator[Any]:
    """The memory that pyarrow takes from when `pa.set_memory_pool` gets it."""
    default = pa.default_memory_pool()
    yield pa.proxy_memory_pool(default)
    pa.set_memory_pool(default)


def test_a_page_that_unpacks_to_any_size_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: Any) -> None:
    monkeypatch.setattr(compressed_files, "_ALWAYS_ALLOWED", 16 << 20)
    raw = parquet(pa.table({"text": ["a" * (128 << 20)]}), use_dictionary=False)
    assert len(raw) < 20_000
    pa.set_memory_pool(decoded)
    with pytest.raises(FormatError, match="bytes unpack to more than"):
        list(table_files.parquet(raw, tmp_path / "d.parquet"))
    assert decoded.max_memory() < 16 << 20


def test_a_text_of_a_dictionary_is_not_decoded_for_each_cell_that_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: Any
) -> None:
    monkeypatch.setattr(compressed_files, "_ALWAYS_ALLOWED", 16 << 20)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * 1_000_000]))
    raw = parquet(pa.table({"messages": pa.ListArray.from_arrays([0, 1, 1000], texts)}), store_schema=False)
    assert len(raw) < 1000
    pa.set_memory_pool(decoded)
    rows = table_files.parquet(raw, tmp_path / "d.parquet")
    assert next(rows)[1] == {"messages": ["a" * 1_000_000]}
    assert decoded.max_memory() < 16 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"d.{kind}"
    path.write_bytes(KINDS[kind](pa.table([["a"], ["b"]], names=["text", "text"])))
    with pytest.raises(FormatError, match="two columns have one name"):
        document_files.read(path)
