"""Tar files as archives of blobs: the position of each member, and reproducible headers.

Reading is one pass over the untrusted headers. Only plain files and folders with plain names are accepted: links, devices,
sparse files, names or sizes that a second header changes, duplicate names and members beyond the end of the file are a
FormatError, because two programs could read two different archives from it (POSIX.1-2017, pax, "ustar Interchange Format"). In
headers that are written, time and owner are 0, and nothing depends on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from adapterhub_converters.errors import FormatError

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_MEMBERS = 200_000
_MAX_PAX = 1 << 16  # bytes of a header about the next one
_FILE, _FOLDER, _PAX, _GLOBAL = b"0", b"5", b"x", b"g"
_KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}
# Records of other programs, in addition to ustar's own fields, that change nothing here.
_HARMLESS = ("mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment")


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: the position of its first byte, and its size in bytes."""

    offset: int
    size: int


def scan(file: BinaryIO, length: int, where: str) -> dict[str, Member]:
    """The plain files of a tar of `length` bytes by name; only headers are read."""
    found: dict[str, Member] = {}
    folders: set[str] = set()
    at = 0
    for _ in range(MAX_MEMBERS):
        block = _read(file, at, BLOCK, length, where)
        if at == 0 and block[:2] == b"\x1f\x8b":
            raise FormatError(where, "compressed; blobs cannot be read from the middle of it", "Decompress it with gunzip")
        if not any(block):
            return found
        kind, name, size = _parse(block, where)
        data = at + BLOCK
        if data + size > length:
            raise FormatError(where, f"{name[:80]!r} has {size} bytes, but the archive ends before: it is truncated")
        if kind in (_PAX, _GLOBAL):
            _check_pax(file, data, size, length, where)
        elif name in found or (kind == _FILE and name in folders):
            raise FormatError(where, f"{name[:80]!r} appears twice")
        elif kind == _FOLDER:
            folders.add(name)
        else:
            found[name] = Member(data, size)
        at = data + _padded(size)
    raise FormatError(where, f"more than {MAX_MEMBERS} members")


def _read(file: BinaryIO, at: int, size: int, length: int, where: str) -> bytes:
    if at + size > length:
        raise FormatError(where, "not a tar, or a truncated one" if at else "not a tar")
    file.seek(at)
    data = file.read(size)
    if len(data) != size:
        raise FormatError(where, "changed while it was read", code="changed-meanwhile")
    return data


def _parse(block: bytes, where: str) -> tuple[bytes, str, int]:
    """The type, name and size in a header."""
    if _number(block[148:156], where) != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
        raise FormatError(where, "not a tar, or one of its headers is damaged")
    kind = _FILE if block[156:157] in (b"0", b"\0", b"7") else block[156:157]
    raw = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345:346] != b"\0":
        raw = block[345:500].split(b"\0", 1)[0] + b"/" + raw
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(where, "one of its names is not UTF-8 text") from error
    if kind in (_PAX, _GLOBAL):
        return kind, name, _number(block[124:136], where)
    if kind not in (_FILE, _FOLDER):
        what = _KINDS.get(kind, f"of the type {kind!r}")
        raise FormatError(where, f"{name[:80]!r} is {what}, not a plain file")
    size = _number(block[124:136], where)
    if kind == _FOLDER and size:
        raise FormatError(where, f"the folder {name[:80]!r} has {size} bytes")
    return kind, _plain(name, where), size


def _plain(name: str, where: str) -> str:
    """A normalized name: `./x` is x; FormatError for one outside the archive."""
    parts = [part for part in name.rstrip("/").split("/") if part != "."]
    if name.startswith("/") or "\\" in name or not all(map(str.isprintable, parts)) or {"", ".."} & set(parts):
        raise FormatError(where, f"the name {name[:80]!r} leads out of the archive")
    return "/".join(parts)


def _number(field: bytes, where: str) -> int:
    """A number in octal digits between spaces and NULs, or in GNU's base 256 for large ones."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
        if value < 2**63:
            return value
    text = field.strip(b"\0 ")
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise FormatError(where, "not a tar, or one of its headers has an invalid number")
    return int(text, 8)


def _check_pax(file: BinaryIO, at: int, size: int, length: int, where: str) -> None:
    """FormatError for an extended header that is invalid, or changes the name or size of the next member."""
    if size > _MAX_PAX:
        raise FormatError(where, f"an extended header of {size} bytes, over the limit of {_MAX_PAX}")
    text, begin = _read(file, at, size, length, where), 0
    while begin < size:
        number, space, _ = text[begin : begin + 8].partition(b" ")
        record = text[begin : begin + int(number)] if space and number.isdigit() else b""
        key, equals, _ = record[len(number) + 1 :].partition(b"=")
        if not equals or not record.endswith(b"\n") or int(number) != len(record):
            raise FormatError(where, "one of its extended headers is damaged")
        if key.decode("latin-1") not in _HARMLESS:
            raise FormatError(where, f"an extended header changes {key[:40].decode('latin-1')!r}: it could be read in two ways")
        begin += len(record)


def header(name: str, size: int = 0, *, folder: bool = False) -> bytes:
    """The header of a member, with mode 0644, or 0755 for a folder. A name that is too long for ustar takes a second header."""
    import tarfile  # imports the compressors; reading starts faster without

    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o755 if folder else 0o644
    info.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def padding(size: int) -> bytes:
    """The padding after a member of `size` bytes."""
    return bytes(_padded(size) - size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
