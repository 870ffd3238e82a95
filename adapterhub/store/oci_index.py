"""The index.json of an OCI image layout: one line per ref of the registry, so that skopeo and oras find them.

It must be complete after every move of a ref, and it grows with the registry: 17 MB at 50,000 versions. A move therefore
replaces the lines of one name in the existing text, a search and a copy, instead of building the whole text again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from adapterhub.digest import Digest
from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import AdapterhubError

from .store_files import StoreFiles, local_errors

Line = tuple[str, Digest, int]
"""`namespace/name:tag`, digest and size of the manifest. Lines are sorted by name; those of one name are contiguous."""

_HEAD = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":['
_END = b"]}"
# Lines are always written in this form, so that those of a name can be found as text.
_START = (
    '{"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/vnd.cncf.model.manifest.v1+json",'
    '"digest":'
)
_NAME = '"annotations":{"org.opencontainers.image.ref.name":'


class IndexFile:
    """The index.json of a store."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self.path = files.root / "index.json"

    def write(self, lines: Iterable[Line]) -> str:
        """Replace the file with one that has these lines; return its new stamp."""
        return self._write(build(lines))

    def change(self, changes: Iterable[tuple[str, list[Line], str | None]]) -> str:
        """Replace the lines of some names; return the new stamp.

        Args:
            changes: For each name, the name, all its lines, and the next name in the file, as for `replace`.

        Returns:
            An empty string if the file is not one that `write` made; it is then left alone.
        """
        with local_errors(self.path):
            text = self._files.read(self.path)
        try:
            for name, lines, before in changes:
                text = replace(text, name, lines, before=before)
        except ValueError:  # another program wrote the file: the caller builds it again
            return ""
        return self._write(text)

    def _write(self, text: bytes) -> str:
        with local_errors(self.path):
            self._files.replace(self.path, text)
        return self.stamp()

    def stamp(self) -> str:
        """Return inode, size and modification time of the file, which every write changes; empty if there is no file."""
        try:
            status = self._files.status(self.path)
        except OSError:
            return ""
        # Each write makes a new file, so the inode differs even if size and time are the same.
        return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"

    def is_written(self, lines: Iterable[Line]) -> bool:
        """Return True if the file is what `write` makes of these lines, byte for byte."""
        try:
            return self._files.read(self.path) == build(lines)
        except OSError:
            return False

    def has_exactly(self, lines: Iterable[Line]) -> bool:
        """Return True if the file has these refs and no others."""
        try:
            return has_exactly(self._files.read(self.path), lines)
        except OSError:
            return False


def build(lines: Iterable[Line]) -> bytes:
    """Return the text of an index with these lines."""
    text = ",\n".join(map(_dump, lines)).encode()
    return _HEAD + b"\n" + (text + b"\n" if text else b"") + _END


def replace(text: bytes, name: str, lines: Iterable[Line], *, before: str | None) -> bytes:
    """Return an index with `lines` in place of those of `name`; ValueError for a text that `build` did not make.

    Args:
        text: A text made by `build` or by this function.
        name: `namespace/name`.
        lines: All lines of `name`.
        before: The next name in the text, needed if `name` has no lines yet; None if `name` is the last one.
    """
    start, end = _lines_of(text, name)
    if start < 0:  # a new name
        start = end = _lines_of(text, before)[0] if before else len(text) - len(_END)
    if start < len(_HEAD) or not text.startswith(_HEAD) or not text.endswith(_END):
        raise ValueError("not an index.json that adapterhub wrote")
    new_lines = b"".join(_dump(line).encode() + b",\n" for line in lines)
    head, tail = text[:start], text[end:]
    # Every line but the last ends with a comma, so replacing the last lines moves the place without one.
    if tail != _END:
        return head + new_lines + tail
    if head.endswith(b"}\n"):
        head = head[:-1] + b",\n"
    body = head + new_lines
    return (body[:-2] + b"\n" if body.endswith(b",\n") else body) + _END


def has_exactly(text: bytes, lines: Iterable[Line]) -> bool:
    """Return True if an index.json, however it is formatted, has these refs and no others."""
    try:
        refs = [
            (entry["annotations"]["org.opencontainers.image.ref.name"], entry["digest"], entry["size"])
            for entry in parse_object(text.decode(), "")["manifests"]
        ]
        return sorted(refs) == sorted(lines)
    except (AdapterhubError, UnicodeDecodeError, LookupError, TypeError):
        return False


def _dump(line: Line) -> str:
    name, digest, size = line
    return f'{_START}"{digest}","size":{size},{_NAME}{json.dumps(name)}}}}}'


def _lines_of(text: bytes, name: str) -> tuple[int, int]:
    """Return the start and the end of the lines of `name`; (-1, -1) if it has none."""
    # The colon ends the name: without it, `team/sql` would also match `team/sql2`.
    needle = (_NAME + json.dumps(name + ":")[:-1]).encode()
    name_start = text.find(needle)
    if name_start < 0:
        return -1, -1
    start = end = text.rfind(b"\n", 0, name_start) + 1
    while (line_end := text.find(b"\n", end)) > 0 and text.find(needle, end, line_end) > 0:
        end = line_end + 1
    return start, end
