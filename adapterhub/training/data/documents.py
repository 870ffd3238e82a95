"""Read documents: JSON Lines, JSON, plain text and tables, one file or a folder of them, in the shapes that `shapes` knows.

A file or folder becomes records, each with its place for messages, and one digest of the bytes that were read. All that is
wrong with its lines is reported at once.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, Problems, RefusedError

from . import shapes, tables
from .tables import Found

_JSON = (".json", ".jsonl", ".ndjson")
_TEXT = ".txt"
# What `datasets` and the Hub put beside data.
_BESIDE = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_SPLITS = {
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "train": "train",
    "valid": "validation",
    "val": "validation",
}


@dataclass(frozen=True)
class Options:
    """How files are understood: `columns` and `split_text` as in a config."""

    columns: Mapping[str, str] | None = None
    split_text: str = "no"


@dataclass(frozen=True)
class Document:
    """One record as it is encoded, its place in messages, the shape it had, and a digest of its content."""

    record: shapes.Record
    where: str
    shape: str = ""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the record as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True, default=str).encode()).digest()

    @property
    def length(self) -> int:
        """About the number of its characters."""
        return len(json.dumps(self.record, ensure_ascii=False, default=str))


@dataclass(frozen=True, eq=False)
class DataFile:
    """A file or folder that was read: `size` in bytes, `digest` as `sha256:…`."""

    name: str
    digest: str
    size: int
    documents: tuple[Document, ...]

    @property
    def contents(self) -> str:
        """What the documents are, and how many, for people: `Alpaca, 52,002 examples`."""
        counts = collections.Counter(document.shape for document in self.documents).most_common()
        if len(counts) > 1:
            return ", ".join(f"{count:,} {shape}" for shape, count in counts)
        return "".join(f"{shape}, {count:,} example{'s' if count != 1 else ''}" for shape, count in counts)

    @property
    def notes(self) -> list[str]:
        """How the documents are understood, where that is not plain."""
        plain = {document.shape for document in self.documents} <= shapes.AS_THEY_ARE
        return [] if plain else [f"{self.name}: {self.contents}"]


def read(path: Path, options: Options | None = None) -> DataFile:
    """Read the documents at `path`.

    Raises:
        FormatError: Lines or files do not have the format of their suffix, or examples no known shape.
        RefusedError: A folder has several splits, or files of several kinds.
        MissingExtraError: It is Parquet or Arrow, and pyarrow is not installed.
    """
    options = options or Options()
    if not path.is_dir():
        raw = _bytes(path)
        found = _found(raw, path, options)
        return DataFile(path.name, _digest(raw), len(raw), _documents(found, path, options))
    whole, size, documents = hashlib.sha256(), 0, list[Document]()
    for part, reader in _parts(path, options):
        raw = _bytes(part, follow=False)
        size += len(raw)
        whole.update(f"{part.name} {hashlib.sha256(raw).hexdigest()}\n".encode())
        documents += _documents(reader(raw, part), part, options)
    return DataFile(path.name, f"sha256:{whole.hexdigest()}", size, tuple(documents))


def _digest(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def _bytes(path: Path, *, follow: bool = True) -> bytes:
    """Read a file; one that a folder brings may not be a link."""
    try:
        with open_regular(path, follow=follow, pipe=follow) as file:
            return file.read()
    except FileNotFoundError as error:
        raise NotFoundError(str(path), "no such file") from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def _documents(found: Found, path: Path, options: Options) -> tuple[Document, ...]:
    """Return the records in the forms that are encoded; all problems at once."""
    problems: Problems[FormatError] = Problems()
    documents: list[Document] = []
    misnamed: set[tuple[str, str] | None] = set()
    for where, record in found:
        try:
            if isinstance(record, FormatError):
                raise record
            shape, canonical = shapes.canonical(record, where, options.columns)
            documents.append(Document(canonical, where, shape))
        except FormatError as error:
            problems.add(error)
            misnamed.add((error.what, error.hint) if isinstance(error, shapes.ColumnsError) else None)
    if problems.count > 1 and not documents and len(misnamed) == 1 and (one := misnamed.pop()):
        raise shapes.ColumnsError(str(path), *one)  # it is the names of the columns, not the lines
    problems.check(more="more lines like them")
    return tuple(documents)


# ---- files


def _found(raw: bytes, path: Path, options: Options) -> Found:
    """Yield the records of a file by its suffix: lines, items, rows; any other file is text."""
    if path.suffix in tables.READERS:
        return tables.READERS[path.suffix](raw, path)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FormatError(f"{path}:{line}", "not UTF-8 text") from error
    if path.suffix in _JSON:
        return _json(text, path)
    return _text(text, path, options.split_text)


def _json(text: str, path: Path) -> Found:
    """Yield the lines of JSON Lines; of one JSON document the items, or those of the only list in it."""
    if path.suffix == ".json":
        first, _, rest = text.strip().partition("\n")
        if first[:1] == "[" or not rest or not first.rstrip().endswith("}"):
            return _items(text, path)
    return _lines(text, path)


def _lines(text: str, path: Path) -> Found:
    # Not splitlines(): a JSON string may contain U+2028, which does not end a line here.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json_file.parse_object(line, where, memory=None)
            except FormatError as error:
                yield where, error


def _items(text: str, path: Path) -> Found:
    if not text.strip():
        return
    document = json_file.parse(text, str(path), memory=None)
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        document = lists[0] if len(lists) == 1 and not shapes.is_known(document) else [document]
    if not isinstance(document, list):
        raise FormatError(str(path), "neither an array of examples nor an example")
    for number, record in enumerate(document, 1):
        where = f"{path}: item {number}"
        yield where, record if isinstance(record, dict) else FormatError(where, "not a JSON object")


def _text(text: str, path: Path, split: str) -> Found:
    """Yield a text as one document, or its lines, or what blank lines separate."""
    if split == "no":
        yield str(path), {"text": text}
        return
    start, lines = 0, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            start = start or number
            lines.append(line.rstrip("\r"))
        if lines and (split == "lines" or not line.strip()):
            yield f"{path}:{start}", {"text": "\n".join(lines)}
            start, lines = 0, []


# ---- folders


def _parts(folder: Path, options: Options) -> Iterator[tuple[Path, Callable[[bytes, Path], Found]]]:
    """Yield the data files of a folder, in order, each with its reader."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(part.name for part in folder.iterdir() if (part / "state.json").is_file()))
        raise RefusedError(str(folder), "contains several splits", f"Use one of its folders: {splits}")
    if (folder / "state.json").is_file():
        for name in _saved(folder):
            yield folder / name, tables.arrow
        return
    known = (*_JSON, *tables.READERS, _TEXT)
    paths = sorted(path for path in folder.iterdir() if path.suffix in known and path.name not in _BESIDE)
    if not paths:
        raise FormatError(str(folder), f"a folder without data: no {', '.join(known)}")
    kinds = sorted({path.suffix for path in paths})
    if len(kinds) > 1:
        raise RefusedError(str(folder), f"contains files of several kinds: {', '.join(kinds)}", "Name the files to use")
    splits = ", ".join(sorted({_SPLITS[word] for path in paths if (word := _first_word(path.name)) in _SPLITS}))
    if ", " in splits:
        raise RefusedError(str(folder), f"contains several splits: {splits}", "Name the files to use")
    for path in paths:
        yield path, partial(_found, options=options)


def _first_word(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-").partition("-")[0]


def _saved(folder: Path) -> list[str]:
    """Return the files of a folder that `Dataset.save_to_disk` wrote."""
    where = folder / "state.json"
    state = _bytes(where, follow=False)
    try:
        names = [str(item["filename"]) for item in json_file.parse_object(state, str(where))["_data_files"]]
    except (FormatError, KeyError, TypeError) as error:
        raise FormatError(str(where), "does not name the data files") from error
    if any(Path(name).name != name for name in names):
        raise FormatError(str(where), "names files outside its folder")
    return names
