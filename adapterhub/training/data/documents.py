"""Read documents: JSON Lines or a JSON array, plain text, Parquet, and folders that `datasets` saved.

A file or folder becomes records, each with its place for messages, and one digest of the bytes that were read. Parquet and
`save_to_disk` need pyarrow only: the latter's folder is Arrow streams that `state.json` names.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import read_bytes
from adapterhub_converters.errors import FormatError, LocalIOError, MissingExtraError, NotFoundError, RefusedError

_TABLES = {".csv", ".tsv"}
_TABLES_HINT = 'Write JSON Lines with "text", "prompt" and "completion", or "messages"'

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """One record, its place in messages, and a digest of its content."""

    record: Record
    where: str

    @property
    def digest(self) -> bytes:
        """SHA-256 of the record as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True, default=str).encode()).digest()


@dataclass(frozen=True, eq=False)
class DataFile:
    """A file or folder that was read: `size` in bytes, `digest` as `sha256:…`."""

    name: str
    digest: str
    size: int
    documents: tuple[Document, ...]


def read(path: Path) -> DataFile:
    """Read the documents at `path`.

    Raises:
        FormatError: A line or a file does not have the format of its suffix.
        MissingExtraError: It is Parquet or a folder of `datasets`, and pyarrow is not installed.
    """
    if path.is_dir():
        return _saved(path)
    raw = _bytes(path)
    found = _parquet(raw, path) if path.suffix == ".parquet" else _text(raw, path)
    documents = tuple(Document(record, where) for where, record in found)
    return DataFile(path.name, f"sha256:{hashlib.sha256(raw).hexdigest()}", len(raw), documents)


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, pipe=True)
    except FileNotFoundError as error:
        raise NotFoundError(str(path), "no such file") from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def _text(raw: bytes, path: Path) -> Iterator[tuple[str, Record]]:
    """Yield every line of a .jsonl, every item of a .json; any other file as one `text`."""
    if path.suffix in _TABLES:
        raise FormatError(str(path), f"{path.suffix} is a table, and its columns have no known meaning", _TABLES_HINT)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(str(path), "not UTF-8 text") from error
    if path.suffix == ".json" and text.lstrip()[:1] == "[":
        yield from _array(text, path)
        return
    if path.suffix not in (".jsonl", ".json"):
        yield str(path), {"text": text}
        return
    # Not splitlines(): a JSON string may contain U+2028, which does not end a line here.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, json_file.parse_object(line, where, memory=None)


def _array(text: str, path: Path) -> Iterator[tuple[str, Record]]:
    for number, record in enumerate(json_file.parse(text, str(path), memory=None), 1):
        if not isinstance(record, dict):
            raise FormatError(f"{path}: item {number}", "not a JSON object")
        yield f"{path}: item {number}", record


def _parquet(raw: bytes, path: Path) -> Iterator[tuple[str, Record]]:
    pyarrow = _pyarrow(path)
    try:
        batches = pyarrow.parquet.ParquetFile(io.BytesIO(raw)).iter_batches()
        yield from _rows(batches, path)
    except pyarrow.ArrowException as error:
        raise FormatError(str(path), f"not a Parquet file ({str(error)[:200]})") from error


def _saved(folder: Path) -> DataFile:
    """Read a folder that `Dataset.save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(part.name for part in folder.iterdir() if (part / "state.json").is_file()))
        raise RefusedError(str(folder), "contains several splits", f"Use one of its folders: {splits}")
    if not (folder / "state.json").is_file():
        raise FormatError(str(folder), "a folder that `datasets` did not save: there is no state.json")
    state = _bytes(folder / "state.json")
    try:
        names = [str(item["filename"]) for item in json_file.parse_object(state, str(folder))["_data_files"]]
    except (FormatError, KeyError, TypeError) as error:
        raise FormatError(str(folder / "state.json"), "does not name the data files") from error
    if any(Path(name).name != name for name in names):
        raise FormatError(str(folder / "state.json"), "names files outside its folder")
    pyarrow = _pyarrow(folder)
    whole, size, found = hashlib.sha256(), 0, []
    for name in names:
        raw = _bytes(folder / name)
        size += len(raw)
        whole.update(f"{name} {hashlib.sha256(raw).hexdigest()}\n".encode())
        try:
            found += list(_rows(pyarrow.ipc.open_stream(io.BytesIO(raw)), folder / name))
        except pyarrow.ArrowException as error:
            raise FormatError(str(folder / name), f"not an Arrow stream ({str(error)[:200]})") from error
    documents = tuple(Document(record, where) for where, record in found)
    return DataFile(folder.name, f"sha256:{whole.hexdigest()}", size, documents)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        hint = 'pip install "adapterhub[data]"'
        raise MissingExtraError(str(path), "needs the package pyarrow, which is not installed", hint) from error
    return pyarrow


def _rows(batches: Any, path: Path) -> Iterator[tuple[str, Record]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Remove keys that are null: a column of structs gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
