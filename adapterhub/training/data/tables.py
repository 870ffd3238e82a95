"""Read tables: CSV and TSV with the standard library, Parquet and Arrow with pyarrow.

A row is a record under the names of its columns.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import FormatError, MissingExtraError

Found = Iterator[tuple[str, Mapping[str, Any] | FormatError]]
"""Places, each with its record or with what is wrong there."""

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
    try:
        yield from _rows(pyarrow.parquet.ParquetFile(io.BytesIO(raw)).iter_batches(), path)
    except pyarrow.ArrowException as error:
        raise FormatError(str(path), f"not a Parquet file ({str(error)[:200]})") from error


def arrow(raw: bytes, path: Path) -> Found:
    """Yield the rows of an Arrow file, be it a stream, as `datasets` writes, or one with an index."""
    pyarrow = _pyarrow(path)
    try:
        if raw.startswith(b"ARROW1"):
            file = pyarrow.ipc.open_file(io.BytesIO(raw))
            yield from _rows((file.get_batch(number) for number in range(file.num_record_batches)), path)
        else:
            yield from _rows(pyarrow.ipc.open_stream(io.BytesIO(raw)), path)
    except pyarrow.ArrowException as error:
        raise FormatError(str(path), f"not an Arrow file ({str(error)[:200]})") from error


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
        hint = 'pip install "adapterhub[data]"'
        raise MissingExtraError(str(path), "needs the package pyarrow, which is not installed", hint) from error
    return pyarrow


def _rows(batches: Iterable[Any], path: Path) -> Found:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}: row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Remove keys that are null: a column of structs gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
