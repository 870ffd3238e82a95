"""Where packs lie in a store: `packs/sha256/<hex>`, under the digest of the blob that they hold."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError

from .chains import READ_DEPTH

if TYPE_CHECKING:
    from .container import Head, Reader

Open = Callable[[str, int], "Reader | BinaryIO"]
"""A blob open for reading, given its digest and how many differences deep we are."""


class Packs:
    """The packs below a folder, which need not be there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._heads: dict[str, tuple[tuple[int, ...], str | None]] = {}

    def path(self, digest: str) -> Path:
        """Where the pack of a blob lies, or would; `digest` has been checked."""
        return self.folder / digest.removeprefix("sha256:")

    def files(self) -> list[Path]:
        """Every file where packs lie, sorted."""
        try:
            return sorted(self.folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LocalIOError(str(self.folder), error.strerror or str(error)) from error

    def digests(self) -> Iterator[str]:
        """Of every blob that has a pack."""
        for path in self.files():
            if re.fullmatch(r"[0-9a-f]{64}", path.name) and path.is_file():
                yield f"sha256:{path.name}"

    def head(self, digest: str) -> Head | None:
        """The head of a blob's pack; None when there is no pack."""
        path = self.path(digest)
        try:
            with open(path, "rb", buffering=0) as file:
                raw = file.read(64)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LocalIOError(str(path), error.strerror or str(error)) from error
        from .container import read_head

        return read_head(raw, str(path))

    def parents(self) -> dict[str, str]:
        """What every pack is a difference to; those that are none are left out, and so are those that can't be read."""
        return {digest: parent for digest, parent in self.heads().items() if parent}

    def heads(self) -> dict[str, str | None]:
        """Every pack with what it is a difference to: empty for nothing, None where it can't be read."""
        found = {}
        for digest in self.digests():
            with contextlib.suppress(OSError):  # it went just now
                status = self.path(digest).stat()
                stamp = status.st_ino, status.st_size, status.st_mtime_ns
                if self._heads.get(digest, ((),))[0] != stamp:
                    self._heads[digest] = stamp, self._parent(digest)
                found[digest] = self._heads[digest][1]
        return found

    def _parent(self, digest: str) -> str | None:
        try:
            head = self.head(digest)
        except AdapterhubError:
            return None
        return head.parent if head else None

    def open(self, digest: str, blob: Open, depth: int = 0) -> Reader | None:
        """The blob in a pack, open for reading, its parents opened by `blob`; None when there is no pack."""
        path = self.path(digest)
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by the reader
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LocalIOError(str(path), error.strerror or str(error)) from error
        try:
            from .container import HEAD_SIZE, Reader, read_head

            head = read_head(file.read(HEAD_SIZE), str(path))
            if head.parent and depth >= READ_DEPTH:
                raise FormatError(str(path), f"a difference over {READ_DEPTH} deep", "Run `adapterhub fsck`")
            return Reader(file, str(path), blob(head.parent, depth + 1) if head.parent else None)
        except BaseException:
            file.close()
            raise
