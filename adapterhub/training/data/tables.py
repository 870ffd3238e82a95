"""Read tables: CSV and TSV with the standard library, Parquet and Arrow with pyarrow.

A row is a record under the names of its columns.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import FormatError, MissingExtraError

Found = Iterator[tuple[str, Mapping[str, Any] | FormatError]]
"""Places, each with its record or with what is wrong there."""

_AT_ONCE = 64  # rows of a batch: a page of a few kilobytes may repeat one long text for every row of it
# Bytes of all rows, in relation to those of the file, and in any case: a few kilobytes unpack to any size.
_UNPACKED, _UNPACKED_FREE = 64, 256 << 20
_ROW = 64  # bytes that a row of nothing counts
_CELL = 1 << 30  # characters of a cell; csv's own limit of 131,072 is less than a long document
_LIMIT = threading.Lock()  # csv has one limit for all its readers


def delimited(raw: bytes, path: Path) -> Found:
    """Yield the rows of a CSV (RFC 4180) or TSV file, whose first row has the names of the columns."""
    try:
        text = raw.decode("utf-8-sig")  # Excel begins with a byte order mark
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FormatError(f"{path}:{line}", "not UTF-8 text", "Export it as UTF-8") from error
    # Read whole, because what is read lazily would meet the limit of another reader.
    with _LIMIT:
        before = csv.field_size_limit(_CELL)
        try:
            rows = _rows_of_text(text, path)
        finally:
            csv.field_size_limit(before)
    yield from rows


def _rows_of_text(text: str, path: Path) -> list[tuple[str, Mapping[str, Any] | FormatError]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    names: list[str] = []
    rows: list[tuple[str, Mapping[str, Any] | FormatError]] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = cells
                if len(set(names)) < len(names):
                    raise FormatError(where, "two columns have one name")
            elif len(cells) == len(names):
                rows.append((where, dict(zip(names, cells, strict=True))))
            else:
                rows.append((where, FormatError(where, f"{len(cells)} cells, but there are {len(names)} columns")))
    except csv.Error as error:
        where = f"{path}:{start}"
        rows.append((where, FormatError(where, f"not a table ({error})")))
    return rows


def parquet(raw: bytes, path: Path) -> Found:
    """Yield the rows of a Parquet file."""
    pyarrow = _pyarrow(path)
    with _refusing(pyarrow, path, "a Parquet file"):
        metadata = pyarrow.parquet.read_metadata(io.BytesIO(raw))
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        # A page is unpacked as a whole, so it is too late to count its rows.
        if sum(chunk.total_uncompressed_size for chunk in chunks) > _most(len(raw)):
            raise _too_large(path, len(raw))
        # As a dictionary, a text that is stored once is in memory once, however many cells of a batch repeat it.
        texts = {chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"}
        file = pyarrow.parquet.ParquetFile(io.BytesIO(raw), metadata=metadata, read_dictionary=sorted(texts))
        yield from _rows(file.iter_batches(_AT_ONCE), path, len(raw))


def arrow(raw: bytes, path: Path) -> Found:
    """Yield the rows of an Arrow file, be it a stream, as `datasets` writes, or one with an index."""
    pyarrow = _pyarrow(path)
    with _refusing(pyarrow, path, "an Arrow file"):
        if raw.startswith(b"ARROW1"):
            file = pyarrow.ipc.open_file(io.BytesIO(raw))
            yield from _rows((file.get_batch(number) for number in range(file.num_record_batches)), path, len(raw))
        else:
            yield from _rows(pyarrow.ipc.open_stream(io.BytesIO(raw)), path, len(raw))


READERS: dict[str, Callable[[bytes, Path], Found]] = {
    ".csv": delimited, ".tsv": delimited, ".parquet": parquet, ".arrow": arrow,
}  # fmt: skip
"""Suffixes of tables, each with its reader."""


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        hint = "Run `pip install 'adapterhub[data]'`"
        raise MissingExtraError(str(path), "needs the package pyarrow, which is not installed", hint) from error
    return pyarrow


@contextmanager
def _refusing(pyarrow: Any, path: Path, kind: str) -> Iterator[None]:
    """FormatError for whatever pyarrow raises about a damaged file; of the system's own errors there are none in memory."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise FormatError(str(path), f"not {kind} ({' '.join(str(error).split())[:200]})") from error


def _rows(batches: Iterable[Any], path: Path, size: int) -> Found:
    number, left = 0, _most(size)
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise FormatError(str(path), "two columns have one name")
        for cells in zip(*batch.columns, strict=True):
            number += 1
            row = {name: cell.as_py() for name, cell in zip(names, cells, strict=True)}
            left -= _ROW + _size(row)
            if left < 0:
                raise _too_large(path, size)
            yield f"{path}: row {number}", _without_nulls(row)


def _most(size: int) -> int:
    """The bytes that a file of `size` bytes may unpack to."""
    return max(_UNPACKED_FREE, _UNPACKED * size)


def _too_large(path: Path, size: int) -> FormatError:
    return FormatError(str(path), f"its {size:,} bytes unpack to more than {_most(size):,}")


def _size(value: Any) -> int:
    """About the bytes of a value."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _without_nulls(value: Any) -> Any:
    """Remove keys that are null: a column of structs gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
