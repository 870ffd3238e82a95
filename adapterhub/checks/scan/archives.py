"""Archives and programs by their structure, at the start of a file, after its end, or between its bytes.

Four bytes occur by chance in any gigabyte of weights, so each signature is checked together with fields around it that must
agree: the checksum of a tar header, the offsets of a zip's directory, the machine of a program.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator

from adapterhub_converters.containers.open_file import MAX_PATH
from adapterhub_converters.lazy_dataclass import dataclass

from . import pickle_opcodes
from .scanned_file import ScannedFile

_ARCHIVES = (
    (b"\x1f\x8b\x08", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"Rar!\x1a\x07", "RAR"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4"), (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"MSCF", "cabinet"), (b"xar!", "xar"), (b"!<arch>\n", "ar"),
)  # fmt: skip
_PROGRAMS = (
    (b"\xfe\xed\xfa\xce", "Mach-O"), (b"\xfe\xed\xfa\xcf", "Mach-O"), (b"\xce\xfa\xed\xfe", "Mach-O"),
    (b"\xcf\xfa\xed\xfe", "Mach-O"), (b"\xca\xfe\xba\xbe", "Mach-O or Java"), (b"\0asm\x01\0\0\0", "WebAssembly"),
    (b"dex\n", "Android"), (b"#!", "script"),
)  # fmt: skip
CODE_SUFFIXES = frozenset(
    {".bat", ".cmd", ".com", ".dll", ".dylib", ".exe", ".hta", ".jar", ".js", ".lnk", ".mjs", ".msi", ".php", ".pl", ".ps1",
     ".py", ".pyc", ".pyd", ".pyz", ".rb", ".scr", ".sh", ".so", ".vbs", ".wasm", ".whl"}
)  # fmt: skip
_ZLIB = (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")
_END = 65_557  # bytes in which a zip's directory must end: 22, and a comment of up to 65,535
_MAX_MEMBERS, _MAX_DIRECTORY = 10_000, 4 << 20
_BROKEN = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, ValueError, OSError, RuntimeError, EOFError, MemoryError, struct.error,
)  # fmt: skip
_MEMBER = 1 << 20  # bytes of a member that are looked at
_LOOKED_INTO = 100  # members
_TAR = 512
_MACHINES = {0x14C, 0x1C0, 0x1C4, 0x200, 0x5032, 0x5064, 0x8664, 0xAA64, 0xA64E}
_SNIFFED = 2048  # bytes: browsers look at 512 to 1,445, readers of PDF at 1,024
_MAX_TRIES = 10_000  # beginnings of a kind: by chance a gigabyte has one of four bytes in a quarter of cases
_OVERLAP = 4096  # bytes: no structure that is looked for is longer


@dataclass(frozen=True, slots=True)
class EmbeddedFile:
    """Something that another program would find in a file: its kind, its offset, and the pickle in it, if there is one."""

    kind: str
    offset: int
    pickle: pickle_opcodes.Pickle | None = None


def archive_at_start(file: ScannedFile, head: bytes) -> EmbeddedFile | None:
    """Return the archive, or the stream of compressed bytes, that a file is; None for any other file."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return zip_in(file) or EmbeddedFile("zip", 0)
    if _is_tar(head):
        return EmbeddedFile("tar", 0)
    if head[:2] in _ZLIB and _inflates(head):
        return EmbeddedFile("zlib", 0)
    return next((EmbeddedFile(kind, 0) for magic, kind in _ARCHIVES if head.startswith(magic)), None)


def program_at_start(head: bytes) -> str:
    """Return the kind of program that a file is; empty for any other file."""
    if head.startswith(b"\x7fELF") and _is_elf(head, 0):
        return "ELF"
    if head.startswith(b"MZ") and (at := int.from_bytes(head[60:64], "little")) < _OVERLAP and head[at : at + 4] == b"PE\0\0":
        return "PE"
    return next((kind for magic, kind in _PROGRAMS if head.startswith(magic)), "")


def zip_in(file: ScannedFile) -> EmbeddedFile | None:
    """Return the zip archive that ends a file, wherever it begins: other programs look for its directory from the end."""
    start = max(0, file.size - _END)
    tail = file.read_at(start, _END)
    at = tail.rfind(b"PK\x05\x06")
    # The record may be imitated in the comment behind it: try each from the end.
    while at >= 0:
        if len(tail) - at >= 22:
            count, size = struct.unpack_from("<HI", tail, at + 10)
            position = start + at - size
            has_directory = position >= 0 and (not count or file.read_at(position, 4) == b"PK\x01\x02")
            # A directory of zip64 is only located by another record in front of this one.
            if has_directory or tail[max(0, at - 20) : at].startswith(b"PK\x06\x07"):
                small = count <= _MAX_MEMBERS and size <= _MAX_DIRECTORY
                return EmbeddedFile("zip", max(position, 0), _pickle_in(file) if small and has_directory else None)
        at = tail.rfind(b"PK\x05\x06", 0, at)
    return None


def _pickle_in(file: ScannedFile) -> pickle_opcodes.Pickle | None:
    """Return the first member of a zip that is a pickle, such as `data.pkl` of torch."""
    try:
        with zipfile.ZipFile(_Seekable(file)) as archive:  # which asks for these four methods only
            for member in archive.infolist()[:_LOOKED_INTO]:
                with archive.open(member) as inner:
                    pickle = pickle_opcodes.find(inner.read(_MEMBER))
                if pickle is not None:
                    return pickle
    except _BROKEN:
        pass  # broken on purpose, perhaps: it is an archive all the same
    return None


class _Seekable:
    """A scanned file as zipfile reads it."""

    def __init__(self, file: ScannedFile) -> None:
        self._file, self._at = file, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        if self._at < 0:
            raise OSError("before the start")
        return self._at

    def read(self, n: int = -1) -> bytes:
        n = min(n if n >= 0 else self._file.size, max(self._file.size - self._at, 0))
        if n > _MAX_DIRECTORY:  # another directory than the one that was found, as by a record of zip64
            raise OSError("a directory over the limit")
        data = self._file.read_at(self._at, n)
        self._at += len(data)
        return data


def find_embedded(file: ScannedFile) -> Iterator[EmbeddedFile]:
    """Yield archives and programs anywhere after the start of a file, and pages near it; one of each kind."""
    reported: set[str] = set()
    head = file.read_at(0, _SNIFFED)
    for needle, kind in _PAGES.items():
        if kind not in reported and (at := head.find(needle)) >= 0:
            reported.add(kind)
            yield EmbeddedFile(kind, at)
    tries: Counter[str] = Counter()
    for begin, piece in file.pieces(_OVERLAP):
        for needle, (kind, is_real) in _NEEDLES.items():
            at = -1 if kind in reported else piece.find(needle, 1)
            while at >= 0 and kind not in reported:
                tries[kind] += 1
                # Countless imitations are suspicious themselves, and would make the scan slow.
                if is_real(piece, at) or tries[kind] > _MAX_TRIES:
                    reported.add(kind)
                    tries_note = f" (or {_MAX_TRIES:,} times how one begins)" if tries[kind] > _MAX_TRIES else ""
                    yield EmbeddedFile(f"{kind}{tries_note}", begin + at)
                at = piece.find(needle, at + 1)


def _is_zip_member(data: bytes, at: int) -> bool:
    """Return whether plausible fields of a local header follow the magic."""
    if len(data) < at + 31:
        return False
    version, _, method = struct.unpack_from("<HHH", data, at + 4)
    length, extra = struct.unpack_from("<HH", data, at + 26)
    name = data[at + 30 : at + 30 + length]
    plausible = version <= 63 and method in (0, 8, 9, 12, 14, 93, 95) and extra < 1024
    return plausible and 0 < length <= MAX_PATH and name.isascii() and name.decode().isprintable()


def _is_elf(data: bytes, at: int) -> bool:
    return len(data) > at + 18 and data[at + 4] in (1, 2) and data[at + 5] in (1, 2) and data[at + 6] == 1


def _is_pe(data: bytes, at: int) -> bool:
    """Return whether a known machine follows the magic, and a DOS header in front points at it."""
    if len(data) < at + 6 or struct.unpack_from("<H", data, at + 4)[0] not in _MACHINES:
        return False
    start = data.rfind(b"MZ", max(0, at - _OVERLAP), at)
    return start >= 0 and int.from_bytes(data[start + 60 : start + 64], "little") == at - start


def _is_tar(data: bytes, at: int = 257) -> bool:
    """Return whether the magic at `at` belongs to a header whose checksum is right (POSIX.1-1988)."""
    header = data[at - 257 : at - 257 + _TAR]
    if at < 257 or len(header) < _TAR or header[257:262] != b"ustar":
        return False
    try:
        checksum = int(header[148:156].strip(b"\0 ") or b"-", 8)
    except ValueError:
        return False
    return checksum == sum(header) - sum(header[148:156]) + 8 * 32


def _always(_data: bytes, _at: int) -> bool:
    return True


_NEEDLES = {
    b"PK\x03\x04": ("zip", _is_zip_member), b"\x7fELF": ("ELF", _is_elf), b"PE\0\0": ("PE", _is_pe),
    b"ustar": ("tar", _is_tar), b"7z\xbc\xaf\x27\x1c": ("7-Zip", _always), b"\xfd7zXZ\x00": ("xz", _always),
}  # fmt: skip
# What browsers and readers look for near the start; further on, the vocabulary of a model has these as tokens.
_PAGES = {b"<script": "HTML", b"<html": "HTML", b"<!DOCTYPE html": "HTML", b"<?php": "PHP", b"%PDF-1.": "PDF"}


def _inflates(head: bytes) -> bool:
    """Return whether bytes are the beginning of a zlib stream."""
    try:
        zlib.decompressobj().decompress(head, 1024)
    except zlib.error:
        return False
    return True
