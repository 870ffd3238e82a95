"""Tar files as archives of blobs: the position of each member, and reproducible headers.

Reading is one pass over the untrusted headers. Only plain files and folders with plain names are accepted. Links, devices,
sparse files, names or sizes that a second header changes, duplicate names and members beyond the end of the file raise a
FormatError, because two programs could read two different archives from it (POSIX.1-2017, pax, "ustar Interchange Format").
Written headers have 0 as time and owner, and nothing in them depends on the machine.
"""

from __future__ import annotations

from typing import BinaryIO

from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_MEMBERS = 200_000
_MAX_PAX = 1 << 16  # bytes of a header about the next one
_FILE, _FOLDER, _PAX, _GLOBAL = b"0", b"5", b"x", b"g"
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
# Records that other programs write, and that change nothing here.
_HARMLESS = ("mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment")


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: the position of its first byte, and its size in bytes."""

    offset: int
    size: int


def scan_members(file: BinaryIO, length: int, location: str) -> dict[str, Member]:
    """Return the plain files of a tar of `length` bytes by name, reading only headers."""
    members: dict[str, Member] = {}
    folders: set[str] = set()
    offset = 0
    for _ in range(MAX_MEMBERS):
        block = _read_block(file, offset, BLOCK, length, location)
        if offset == 0 and block[:2] == b"\x1f\x8b":
            raise FormatError(location, "compressed; blobs cannot be read from the middle of it", "Decompress it with gunzip")
        # A block of zeros ends the archive; the second one need not be there (POSIX.1-2017, pax).
        if not any(block):
            return members
        member_type, name, size = _parse_header(block, location)
        data_offset = offset + BLOCK
        if data_offset + size > length:
            raise FormatError(location, f"{name[:80]!r} has {size} bytes, but the archive ends before: it is truncated")
        if member_type in (_PAX, _GLOBAL):
            _check_pax(file, data_offset, size, length, location)
        elif name in members or (member_type == _FILE and name in folders):
            raise FormatError(location, f"{name[:80]!r} appears twice")
        elif member_type == _FOLDER:
            folders.add(name)
        else:
            members[name] = Member(data_offset, size)
        offset = data_offset + _padded_size(size)
    raise FormatError(location, f"more than {MAX_MEMBERS} members")


def _read_block(file: BinaryIO, offset: int, size: int, length: int, location: str) -> bytes:
    if offset + size > length:
        raise FormatError(location, "not a tar, or a truncated one" if offset else "not a tar")
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise FormatError(location, "changed while it was read", code="changed-meanwhile")
    return data


def _parse_header(block: bytes, location: str) -> tuple[bytes, str, int]:
    """Return the type, name and size in a header."""
    # The checksum counts its own eight bytes as spaces.
    if _parse_number(block[148:156], location) != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
        raise FormatError(location, "not a tar, or one of its headers is damaged")
    member_type = _FILE if block[156:157] in (b"0", b"\0", b"7") else block[156:157]
    name_bytes = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345:346] != b"\0":
        name_bytes = block[345:500].split(b"\0", 1)[0] + b"/" + name_bytes
    try:
        name = name_bytes.decode()
    except UnicodeDecodeError as error:
        raise FormatError(location, "one of its names is not UTF-8 text") from error
    if member_type in (_PAX, _GLOBAL):
        return member_type, name, _parse_number(block[124:136], location)
    if member_type not in (_FILE, _FOLDER):
        problem = _REFUSED_TYPES.get(member_type, f"of the type {member_type!r}")
        raise FormatError(location, f"{name[:80]!r} is {problem}, not a plain file")
    size = _parse_number(block[124:136], location)
    if member_type == _FOLDER and size:
        raise FormatError(location, f"the folder {name[:80]!r} has {size} bytes")
    return member_type, _plain_name(name, location), size


def _plain_name(name: str, location: str) -> str:
    """Return a name without `.` parts; FormatError for one outside the archive."""
    parts = [part for part in name.rstrip("/").split("/") if part != "."]
    if name.startswith("/") or "\\" in name or not all(map(str.isprintable, parts)) or {"", ".."} & set(parts):
        raise FormatError(location, f"the name {name[:80]!r} leads out of the archive")
    return "/".join(parts)


def _parse_number(field: bytes, location: str) -> int:
    """Return a number in octal digits between spaces and NULs, or in GNU's base 256 for large ones."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
        if value < 2**63:
            return value
    text = field.strip(b"\0 ")
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise FormatError(location, "not a tar, or one of its headers has an invalid number")
    return int(text, 8)


def _check_pax(file: BinaryIO, offset: int, size: int, length: int, location: str) -> None:
    """Raise a FormatError for an extended header that is invalid, or that changes the name or size of the next member."""
    if size > _MAX_PAX:
        raise FormatError(location, f"an extended header of {size} bytes, over the limit of {_MAX_PAX}")
    text, record_start = _read_block(file, offset, size, length, location), 0
    while record_start < size:
        length_digits, space, _ = text[record_start : record_start + 8].partition(b" ")
        record = text[record_start : record_start + int(length_digits)] if space and length_digits.isdigit() else b""
        key, equals, _ = record[len(length_digits) + 1 :].partition(b"=")
        if not equals or not record.endswith(b"\n") or int(length_digits) != len(record):
            raise FormatError(location, "one of its extended headers is damaged")
        if key.decode("latin-1") not in _HARMLESS:
            raise FormatError(
                location, f"an extended header changes {key[:40].decode('latin-1')!r}: it could be read in two ways"
            )
        record_start += len(record)


def header(name: str, size: int = 0, *, folder: bool = False) -> bytes:
    """Return the header of a member, with mode 0644, or 0755 for a folder; a name too long for ustar takes a second header."""
    import tarfile  # imports the compressors; reading starts faster without

    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o755 if folder else 0o644
    info.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def padding(size: int) -> bytes:
    """Return the padding after a member of `size` bytes."""
    return bytes(_padded_size(size) - size)


def _padded_size(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
