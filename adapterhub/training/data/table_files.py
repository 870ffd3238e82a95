"""Readers of tables: CSV and TSV with the standard library, Parquet and Arrow with pyarrow.

Each row is a record whose keys are the names of the columns.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import FormatError, MissingExtraError

from .compressed_files import data_suffix, max_size, too_large_error

LocatedRecords = Iterator[tuple[str, Mapping[str, Any] | FormatError]]
"""Records with their locations; an error in place of a record that could not be read."""

_BATCH_ROWS = 64  # small, because a page of a few kilobytes may repeat one long text in every row
_ROW_BYTES = 64  # counted for each row in addition to its values
_DELIMITERS = (",", ";", "\t")
_MAX_CELL = 1 << 30  # characters; csv's own limit of 131,072 is less than a long document
_LIMIT_LOCK = threading.Lock()  # csv has one global limit for all readers


def delimited_rows(raw: bytes, path: Path) -> LocatedRecords:
    """Yield the rows of a CSV (RFC 4180) or TSV file, whose first row has the names of the columns."""
    try:
        text = raw.decode("utf-8-sig")  # Excel begins with a byte order mark
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FormatError(f"{path}:{line}", "not UTF-8 text", "Export it as UTF-8") from error
    # All rows are read under the lock, because a lazy reader would get the limit that another one has set.
    with _LIMIT_LOCK:
        previous_limit = csv.field_size_limit(_MAX_CELL)
        try:
            rows = _delimited_rows(text, path)
        finally:
            csv.field_size_limit(previous_limit)
    yield from rows


def _delimited_rows(text: str, path: Path) -> list[tuple[str, Mapping[str, Any] | FormatError]]:
    delimiter = "\t" if data_suffix(path) == ".tsv" else _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    rows: list[tuple[str, Mapping[str, Any] | FormatError]] = []
    start = 1
    try:
        for cells in reader:
            location, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = cells
                if len(set(names)) < len(names):
                    raise FormatError(location, "two columns have one name")
            elif len(cells) == len(names):
                rows.append((location, dict(zip(names, cells, strict=True))))
            else:
                rows.append((location, FormatError(location, f"{len(cells)} cells, but there are {len(names)} columns")))
    except csv.Error as error:
        location = f"{path}:{start}"
        rows.append((location, FormatError(location, f"not a table ({error})")))
    return rows


def _delimiter(text: str) -> str:
    """Return the first of the usual delimiters that divides the names of the columns: in many countries Excel writes `;`."""
    for delimiter in _DELIMITERS:
        names = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        with suppress(csv.Error):
            if len(next(filter(None, names), [])) > 1:
                return delimiter
    return _DELIMITERS[0]


def parquet(raw: bytes, path: Path) -> LocatedRecords:
    """Yield the rows of a Parquet file."""
    pyarrow = _pyarrow(path)
    with _format_errors(pyarrow, path, "a Parquet file"):
        metadata = pyarrow.parquet.read_metadata(io.BytesIO(raw))
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        # Checked beforehand: a page is unpacked at once, when it is too late to count its rows.
        if sum(chunk.total_uncompressed_size for chunk in chunks) > max_size(len(raw)):
            raise too_large_error(path, len(raw))
        # Read as dictionaries, a text that is stored once is in memory once, no matter how many cells of a batch repeat it.
        texts = {chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"}
        file = pyarrow.parquet.ParquetFile(io.BytesIO(raw), metadata=metadata, read_dictionary=sorted(texts))
        yield from _batch_rows(file.iter_batches(_BATCH_ROWS), path, len(raw))


def arrow(raw: bytes, path: Path) -> LocatedRecords:
    """Yield the rows of an Arrow file: a stream, as `datasets` writes, or a file with an index."""
    pyarrow = _pyarrow(path)
    with _format_errors(pyarrow, path, "an Arrow file"):
        if raw.startswith(b"ARROW1"):
            file = pyarrow.ipc.open_file(io.BytesIO(raw))
            yield from _batch_rows((file.get_batch(number) for number in range(file.num_record_batches)), path, len(raw))
        else:
            yield from _batch_rows(pyarrow.ipc.open_stream(io.BytesIO(raw)), path, len(raw))


READERS: dict[str, Callable[[bytes, Path], LocatedRecords]] = {
    ".csv": delimited_rows, ".tsv": delimited_rows, ".parquet": parquet, ".arrow": arrow,
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
def _format_errors(pyarrow: Any, path: Path, format_name: str) -> Iterator[None]:
    """Turn anything that pyarrow raises about a damaged file into a FormatError; with the file in memory, no OSError is I/O."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise FormatError(str(path), f"not {format_name} ({' '.join(str(error).split())[:200]})") from error


def _batch_rows(batches: Iterable[Any], path: Path, size: int) -> LocatedRecords:
    number, remaining = 0, max_size(size)
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise FormatError(str(path), "two columns have one name")
        for cells in zip(*batch.columns, strict=True):
            number += 1
            row = {name: cell.as_py() for name, cell in zip(names, cells, strict=True)}
            remaining -= _ROW_BYTES + _approximate_size(row)
            if remaining < 0:
                raise too_large_error(path, size)
            yield f"{path}: row {number}", _without_nulls(row)


def _approximate_size(value: Any) -> int:
    """Return the approximate number of bytes of a value."""
    if isinstance(value, dict):
        return sum(map(_approximate_size, value.values()))
    if isinstance(value, list):
        return sum(map(_approximate_size, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _without_nulls(value: Any) -> Any:
    """Return a value without keys that are null or NaN: a column of structs gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None and item == item}  # noqa: PLR0124
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
