"""Files of any size and form, read no further than a result can reasonably be: documents, lines, and archives of documents."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError

from .imported_result import CODE

MAX_DOCUMENT = 64 << 20
"""Bytes of a document."""
MAX_TOTAL = 1 << 30
"""Bytes of all lines of a file, or of all documents of an archive, unpacked."""
_MAX_LINE = 16 << 20
_MAX_MEMBERS = 100_000
_MEMORY = 1 << 30  # bytes of the objects of a document
_ZSTANDARD = 93  # the method in APPNOTE.TXT, 4.4.5, which zipfile reads only since Python 3.14
_LOCAL_HEADER = 30  # bytes before the name of a member (APPNOTE.TXT, 4.3.7)


def open_results(path: Path, limit: int) -> IO[bytes]:
    """Open a regular file of at most `limit` bytes."""
    location = str(path)
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise NotFoundError(location, "no such file", code="no-such-file") from error
    except OSError as error:
        raise LocalIOError(location, (error.strerror or str(error)).lower()) from error
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        file.close()
        problem = f"has {size >> 20:,} MB, and at most {limit >> 20:,} MB are read"
        raise FormatError(location, problem, "Write it without transcripts", code="too-large")
    return file


def read_start(path: Path) -> bytes:
    """Return the first bytes of a file, which tell its form."""
    with open_results(path, 1 << 60) as file:
        return file.read(64)


def document_bytes(path: Path) -> bytes:
    """Return the bytes of a document."""
    with open_results(path, MAX_DOCUMENT) as file:
        return file.read(MAX_DOCUMENT)


def parse(raw: bytes, location: str) -> dict[str, Any]:
    """Parse the JSON object of a document; NaN, which tools write for what has no value, is read as null."""
    return json_file.parse_object(raw, location, memory=_MEMORY, nan_as_null=True)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each line."""
    with open_results(path, MAX_TOTAL) as file:
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise FormatError(str(path), f"line {number} has over {_MAX_LINE >> 20} MB", code="too-large")
            if line.strip():
                yield parse(line, f"{path}: line {number}")


class Archive:
    """A zip archive, in which no member is read beyond `MAX_DOCUMENT`, nor all of them beyond `MAX_TOTAL`."""

    def __init__(self, path: Path) -> None:
        self._location = str(path)
        self._file = open_results(path, MAX_TOTAL)
        self._left = MAX_TOTAL
        try:
            with zipfile.ZipFile(self._file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            self._file.close()
            raise FormatError(self._location, f"not a readable zip archive ({str(error)[:80]})", code=CODE) from error
        if len(members) > _MAX_MEMBERS:
            self._file.close()
            raise FormatError(self._location, f"has over {_MAX_MEMBERS:,} members", code="too-large")
        self.members = {member.filename: member for member in members}

    def document(self, name: str) -> dict[str, Any]:
        """Return the JSON object of a member."""
        limit, location = min(MAX_DOCUMENT, self._left), f"{self._location}: {name[:100]!r}"
        member = self.members.get(name)
        if member is None:
            raise FormatError(self._location, f"has no {name}", code=CODE)
        try:
            raw = self._raw(member, limit)
        except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OSError) as error:
            raise FormatError(location, f"is damaged ({str(error)[:80]})", code=CODE) from error
        if len(raw) > limit:
            raise FormatError(location, f"unpacks to more than {limit >> 20:,} MB", code="too-large")
        self._left -= len(raw)
        return parse(raw, location)

    def _raw(self, member: zipfile.ZipInfo, limit: int) -> bytes:
        """Return the unpacked bytes of a member, at most one more than `limit`."""
        if member.compress_type != _ZSTANDARD:
            with zipfile.ZipFile(self._file) as archive, archive.open(member) as file:
                return file.read(limit + 1)
        import zlib

        import zstandard

        self._file.seek(member.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise ValueError("no header where the index says")
        self._file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
        packed = io.BytesIO(self._file.read(min(member.compress_size, MAX_DOCUMENT)))
        try:
            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed, read_across_frames=True) as reader:
                raw = reader.read(limit + 1)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        if len(raw) <= limit and zlib.crc32(raw) != member.CRC:
            raise ValueError("has another checksum")
        return raw

    def close(self) -> None:
        """Close the file."""
        self._file.close()
