"""Documents of JSON Lines, JSON, plain text and tables, read from a file or a folder of them in the shapes of `record_shapes`.

A file or folder becomes records, each with its location for messages, and one digest of the bytes that were read. All problems
with its lines are reported at once.
"""

from __future__ import annotations

import array
import collections
import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

import numpy as np

from adapterhub.digest import Digest, sha256_bytes
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, Problems, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import record_checks, record_shapes, table_files
from .compressed_files import data_suffix, decompress
from .table_files import LocatedRecords

if TYPE_CHECKING:
    from adapterhub.training.train_config import TrainConfig

_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
_JSON_SUFFIXES = (".json", *_JSON_LINES_SUFFIXES)
_TEXT_SUFFIX = ".txt"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some programs of Windows begin UTF-8 with it
# Files that `datasets` and the Hub put next to data.
_IGNORED_FILES = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_SPLITS = {"train": "train", "test": "test", **dict.fromkeys(("dev", "eval", "val", "valid"), "validation")}


@dataclass(frozen=True)
class Options:
    """How to read files: `columns` and `split_text` as in a config, and whether documents are pairs of answers."""

    columns: Mapping[str, str] | None = None
    split_text: str = "no"
    pairs: bool = False

    @classmethod
    def of_training(cls, config: TrainConfig) -> Options:
        """Return the options for the data of a training run."""
        return cls(config.data.columns, config.data.split_text, bool(config.preference))


@dataclass(frozen=True)
class Document:
    """One record in the form that is encoded, with its location in messages, its original shape, and its digest.

    `remarks` are what notes say about it (`record_checks`).
    """

    record: record_shapes.Record
    location: str
    shape: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the record as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True, default=str).encode()).digest()

    @property
    def length(self) -> int:
        """The approximate number of characters."""
        return len(json.dumps(self.record, ensure_ascii=False, default=str))


class Lines(Sequence[Document]):
    """The documents of a JSON Lines file, parsed again at each access: sixteen bytes of memory per document.

    Raises:
        RefusedError: The file has changed since it was read.
    """

    def __init__(self, path: Path, options: Options, state: tuple[int, int], places: np.ndarray) -> None:
        self._path, self._options, self._state, self._positions = path, options, state, places

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Lines: ...
    def __getitem__(self, index: int | slice) -> Document | Lines:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return next(iter(self.take(np.array([index]))))

    def take(self, numbers: np.ndarray) -> Lines:
        """Return the documents with these numbers."""
        return Lines(self._path, self._options, self._state, self._positions[numbers])

    def __iter__(self) -> Iterator[Document]:
        with _open_file(self._path, buffering=io.DEFAULT_BUFFER_SIZE) as file:
            # Positions of lines are only valid for the bytes that were read.
            if _file_state(file) != self._state:
                raise RefusedError(str(self._path), "changed while it was read", "Start again", code="changed-meanwhile")
            for start, number in self._positions.tolist():
                file.seek(start)
                location = f"{self._path}:{number}"
                record = json_file.parse_object(file.readline(), location, memory=None, nan_as_null=True)
                yield _document(record, location, self._options)


@dataclass(frozen=True, eq=False)
class DataFile:
    """A file or folder that was read.

    `size` is in bytes, `digest` is `sha256:…`; `shapes` counts the documents of each shape, and `remarks` those of each remark.
    """

    name: str
    digest: str
    size: int
    documents: Sequence[Document]
    shapes: Mapping[str, int]
    remarks: Mapping[str, int] = field(default_factory=dict)

    def part(self, keep: Callable[[Document], bool]) -> DataFile:
        """Return the file with only the documents for which `keep` is true."""
        shapes, remarks = collections.Counter[str](), collections.Counter[str]()
        kept_numbers = []
        for number, document in enumerate(self.documents):
            if keep(document):
                kept_numbers.append(number)
                shapes[document.shape] += 1
                remarks.update(document.remarks)
        all_documents = self.documents
        kept_documents = (
            all_documents.take(np.array(kept_numbers, int))
            if isinstance(all_documents, Lines)
            else tuple(all_documents[number] for number in kept_numbers)
        )
        return replace(self, documents=kept_documents, shapes=shapes, remarks=remarks)

    @property
    def contents(self) -> str:
        """The kind and number of the documents, for people: `Alpaca, 52,002 examples`."""
        counts = collections.Counter(self.shapes).most_common()
        if len(counts) > 1:
            return ", ".join(f"{count:,} {shape}" for shape, count in counts)
        return "".join(f"{shape}, {count:,} example{'s' if count != 1 else ''}" for shape, count in counts)

    @property
    def notes(self) -> list[str]:
        """Notes on how the documents are understood, if that is not obvious, and the remarks."""
        plain = set(self.shapes) <= record_shapes.UNCONVERTED
        return [*([] if plain else [f"{self.name}: {self.contents}"]), *self.remark_notes]

    @property
    def remark_notes(self) -> list[str]:
        """A note for each remark, with the number of documents that it is about."""
        return [
            f"{self.name}: {count:,} of {len(self.documents):,} examples {remark}" for remark, count in self.remarks.items()
        ]


def read(path: Path, options: Options | None = None) -> DataFile:
    """Read the documents at `path`; those of a JSON Lines file stay on disk.

    Raises:
        FormatError: Lines or files do not have the format of their suffix, or examples have no known shape.
        RefusedError: A folder has several splits, or files of several kinds.
        MissingExtraError: It is Parquet or Arrow, and pyarrow is not installed.
    """
    options = options or Options()
    if path.suffix in _JSON_LINES_SUFFIXES and path.is_file():
        return _read_lines(path, options)
    if not path.is_dir():
        raw = _read_bytes(path)
        return _data_file(
            path, sha256_bytes(raw), len(raw), tuple(_documents(_file_records(raw, path, options), path, options))
        )
    # The digest of a folder is that of a list of its files with their digests.
    folder_hash, size, documents = hashlib.sha256(), 0, list[Document]()
    for file_path, reader in _folder_files(path, options):
        raw = _read_bytes(file_path, follow=False)
        size += len(raw)
        folder_hash.update(_digest_line(file_path, sha256_bytes(raw)))
        documents += _documents(reader(raw, file_path), file_path, options)
    return _data_file(path, f"sha256:{folder_hash.hexdigest()}", size, tuple(documents))


def _data_file(path: Path, digest: Digest, size: int, documents: Sequence[Document]) -> DataFile:
    shapes = collections.Counter(document.shape for document in documents)
    remarks = collections.Counter(remark for document in documents for remark in document.remarks)
    return DataFile(path.name, digest, size, documents, shapes, remarks)


def _read_lines(path: Path, options: Options) -> DataFile:
    file_hash, positions = hashlib.sha256(), array.array("q")
    shapes, remarks = collections.Counter[str](), collections.Counter[str]()

    def read_records(file: BinaryIO) -> LocatedRecords:
        start = 0
        for number, line in enumerate(file, 1):
            file_hash.update(line)
            mark = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
            if line[mark:].strip():
                # Start and line number, 8 bytes each, are all that is kept of a document.
                positions.extend((start + mark, number))
                yield _line_of_json(line[mark:], f"{path}:{number}")
            start += len(line)

    with _open_file(path, buffering=io.DEFAULT_BUFFER_SIZE) as file:
        state = _file_state(file)
        for document in _documents(read_records(file), path, options):
            shapes[document.shape] += 1
            remarks.update(document.remarks)
    lines = Lines(path, options, state, np.frombuffer(positions, np.int64).reshape(-1, 2))
    return DataFile(path.name, f"sha256:{file_hash.hexdigest()}", state[0], lines, shapes, remarks)


def _file_state(file: BinaryIO) -> tuple[int, int]:
    """Return the size of an open file, and its modification time."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _digest_line(file_path: Path, digest: Digest) -> bytes:
    """Return the line of a file that the digest of its folder is computed from."""
    return f"{file_path.name} {digest.removeprefix('sha256:')}\n".encode()


def _read_bytes(path: Path, *, follow: bool = True) -> bytes:
    """Read a file; a file inside a data folder must not be a link (`follow=False`)."""
    with _open_file(path, follow=follow, pipe=follow) as file:
        return file.read()


@contextlib.contextmanager
def _open_file(path: Path, **options: Any) -> Iterator[BinaryIO]:
    try:
        with open_regular(path, **options) as file:
            yield file
    except FileNotFoundError as error:
        raise NotFoundError(str(path), "no such file", code="no-such-file") from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def _documents(records: LocatedRecords, path: Path, options: Options) -> Iterator[Document]:
    """Yield the records in the forms that are encoded; raise all problems at once, after the last record."""
    problems: Problems[FormatError] = Problems()
    count = 0
    column_problems: set[tuple[type[record_shapes.ColumnsError], str, str] | None] = set()
    for location, record in records:
        try:
            if isinstance(record, FormatError):
                raise record
            yield _document(record, location, options)
            count += 1
        except FormatError as error:
            problems.add(error)
            column_problems.add(
                (type(error), error.what, error.hint) if isinstance(error, record_shapes.ColumnsError) else None
            )
    if problems.count > 1 and not count and len(column_problems) == 1 and (column_problem := column_problems.pop()):
        problem_class, what, hint = column_problem
        raise problem_class(str(path), what, hint)  # the columns are wrong, not single lines
    problems.check(more="more lines like them")


def _document(record: Mapping[str, Any], location: str, options: Options) -> Document:
    if options.pairs:
        sides = record_shapes.pair(record, location, options.columns)
        for side in sides.values():
            record_checks.check_messages(side, location)
        is_empty = any(map(record_checks.has_empty_answer, sides.values()))
        return Document(sides, location, record_shapes.PAIRS, (record_checks.EMPTY_ANSWER,) if is_empty else ())
    shape, canonical = record_shapes.canonical(record, location, options.columns)
    record_checks.check_messages(canonical, location)
    # A config that names its columns has decided about the others.
    remarks = record_checks.remarks({} if options.columns else record, canonical)
    return Document(canonical, location, shape, tuple(remarks))


# ---- files


def _file_records(raw: bytes, path: Path, options: Options) -> LocatedRecords:
    """Yield the records of a file by its suffix: lines, items or rows; a file with another suffix is text."""
    raw, suffix = decompress(raw, path), data_suffix(path)
    if suffix in table_files.READERS:
        return table_files.READERS[suffix](raw, path)
    try:
        # Files with an unknown suffix may be anything, such as images: only UTF-8 is text.
        text = raw.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FormatError(f"{path}:{line}", "not UTF-8 text") from error
    if suffix in _JSON_SUFFIXES:
        return _json_records(text, path)
    return _text_records(text, path, options.split_text)


def _json_records(text: str, path: Path) -> LocatedRecords:
    """Yield the lines of JSON Lines, or the items of one JSON document or of the only list in it."""
    if data_suffix(path) == ".json":
        # Some data sets have JSON Lines with the suffix .json: then the first line is a complete object and others follow.
        first_line, _, remainder = text.strip().partition("\n")
        if first_line[:1] == "[" or not remainder or not first_line.rstrip().endswith("}"):
            return _json_items(text, path)
    return _json_lines(text, path)


def _json_lines(text: str, path: Path) -> LocatedRecords:
    # Not splitlines(): a JSON string may contain U+2028, which does not end a line here.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _line_of_json(line, f"{path}:{number}")


def _line_of_json(line: str | bytes, location: str) -> tuple[str, dict[str, Any] | FormatError]:
    try:
        return location, json_file.parse_object(line, location, memory=None, nan_as_null=True)
    except FormatError as error:
        return location, error


def _json_items(text: str, path: Path) -> LocatedRecords:
    if not text.strip():
        return
    document = json_file.parse(text, str(path), memory=None, nan_as_null=True)
    if isinstance(document, dict):
        # A common layout of data sets is an object with metadata and a single list of records.
        lists = [value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        document = lists[0] if len(lists) == 1 and not record_shapes.is_known(document) else [document]
    if not isinstance(document, list):
        raise FormatError(str(path), "neither an array of examples nor an example")
    for number, record in enumerate(document, 1):
        location = f"{path}: item {number}"
        yield location, record if isinstance(record, dict) else FormatError(location, "not a JSON object")


def _text_records(text: str, path: Path, split: str) -> LocatedRecords:
    """Yield a text as one document, or its lines, or its paragraphs between blank lines."""
    if split == "no":
        yield str(path), {"text": text}
        return
    start, lines = 0, list[str]()
    # The additional empty line ends the last paragraph.
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            start = start or number
            lines.append(line.rstrip("\r"))
        if lines and (split == "lines" or not line.strip()):
            yield f"{path}:{start}", {"text": "\n".join(lines)}
            start, lines = 0, []


# ---- folders


def _folder_files(folder: Path, options: Options) -> Iterator[tuple[Path, Callable[[bytes, Path], LocatedRecords]]]:
    """Yield the data files of a folder, in order, each with its reader."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file()))
        raise RefusedError(str(folder), "contains several splits", f"Use one of its folders: {splits}")
    if (folder / "state.json").is_file():
        for name in _saved_dataset_files(folder):
            yield folder / name, table_files.arrow
        return
    suffixes = (*_JSON_SUFFIXES, *table_files.READERS, _TEXT_SUFFIX)
    paths = sorted(path for path in folder.iterdir() if data_suffix(path) in suffixes and path.name not in _IGNORED_FILES)
    # The Hub's data sets have their files in a folder of this name, beside a README.md.
    if not paths and (data_folder := folder / "data").is_dir() and not data_folder.is_symlink():
        yield from _folder_files(data_folder, options)
        return
    if not paths:
        raise FormatError(str(folder), f"a folder without data: no {', '.join(suffixes)}")
    found_suffixes = sorted({data_suffix(path) for path in paths})
    if len(found_suffixes) > 1:
        raise RefusedError(
            str(folder), f"contains files of several kinds: {', '.join(found_suffixes)}", "Name the files to use"
        )
    # A word such as "train" at the start of the file names tells the split; mixing splits would train on test data.
    splits = ", ".join(sorted({_SPLITS[word] for path in paths if (word := _first_word(path.name)) in _SPLITS}))
    if ", " in splits:
        raise RefusedError(str(folder), f"contains several splits: {splits}", "Name the files to use")
    for path in paths:
        yield path, partial(_file_records, options=options)


def _first_word(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-").partition("-")[0]


def _saved_dataset_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that `Dataset.save_to_disk` wrote."""
    state_path = folder / "state.json"
    state = _read_bytes(state_path, follow=False)
    try:
        names = [str(item["filename"]) for item in json_file.parse_object(state, str(state_path))["_data_files"]]
    except (FormatError, KeyError, TypeError) as error:
        raise FormatError(str(state_path), "does not name the data files") from error
    # state.json comes with the data and must not name files elsewhere on the disk.
    if any(Path(name).name != name for name in names):
        raise FormatError(str(state_path), "names files outside its folder")
    return names
