"""The packs of a store: `packs/sha256/<hex>`, named by the digest of the blob they contain."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from adapterhub.digest import is_hex
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError

from .pack_chains import READ_DEPTH

if TYPE_CHECKING:
    from .container import PackHead, PackReader

Open = Callable[[str, int], "PackReader | BinaryIO"]
"""Opens a blob for reading, given its digest and the number of differences that lead to it."""


class Packs:
    """The packs of a store, in a folder that is created with the first one."""

    def __init__(self, files: ConfinedFiles) -> None:
        self._files = files
        self.folder = files.root / "packs" / "sha256"
        self._heads: dict[str, tuple[tuple[int, ...], str | None]] = {}

    def path(self, digest: str) -> Path:
        """Return the path of a blob's pack; the caller has checked `digest`."""
        return self.folder / digest.removeprefix("sha256:")

    def files(self) -> list[Path]:
        """Return every file in the folder, sorted."""
        try:
            return self._files.list_folder(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LocalIOError(str(self.folder), error.strerror or str(error)) from error

    def digests(self) -> Iterator[str]:
        """Yield the digest of every blob that has a pack."""
        for path in self.files():
            if is_hex(path.name) and self._files.is_file(path):
                yield f"sha256:{path.name}"

    def head(self, digest: str) -> PackHead | None:
        """Return the head of a blob's pack; None if it has no pack."""
        path = self.path(digest)
        try:
            raw = self._files.read(path, 64)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LocalIOError(str(path), error.strerror or str(error)) from error
        from .container import read_head

        return read_head(raw, str(path))

    def parents(self) -> dict[str, str]:
        """Return the parent of each pack; packs without a parent, and unreadable ones, are left out."""
        return {digest: parent for digest, parent in self.heads().items() if parent}

    def heads(self) -> dict[str, str | None]:
        """Return the parent of every pack: empty if it has none, None if the pack is unreadable."""
        parent_by_digest = {}
        for digest in self.digests():
            with contextlib.suppress(OSError):  # removed just now
                status = self._files.status(self.path(digest))
                # Packs are immutable: an unchanged file has the same parent as before.
                stamp = status.st_ino, status.st_size, status.st_mtime_ns
                if self._heads.get(digest, ((),))[0] != stamp:
                    self._heads[digest] = stamp, self._parent(digest)
                parent_by_digest[digest] = self._heads[digest][1]
        return parent_by_digest

    def _parent(self, digest: str) -> str | None:
        try:
            head = self.head(digest)
        except AdapterhubError:
            return None
        return head.parent if head else None

    def open(self, digest: str, blob: Open, depth: int = 0) -> PackReader | None:
        """Open the blob in a pack for reading; `blob` opens its parents. Return None if it has no pack."""
        path = self.path(digest)
        try:
            file = self._files.open(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LocalIOError(str(path), error.strerror or str(error)) from error
        try:
            from .container import HEAD_SIZE, PackReader, read_head  # needs numpy, which commands that only read do without

            head = read_head(file.read(HEAD_SIZE), str(path))
            if head.parent and depth >= READ_DEPTH:
                problem = f"a chain of more than {READ_DEPTH} differences"
                raise FormatError(str(path), problem, "Check the registry", code="check-registry")
            return PackReader(file, str(path), blob(head.parent, depth + 1) if head.parent else None)
        except BaseException:  # no reader owns the file yet
            file.close()
            raise
