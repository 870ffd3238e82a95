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
        found = {}
        for digest in self.digests():
            with contextlib.suppress(AdapterhubError):
                head = self.head(digest)
                if head and head.parent:
                    found[digest] = head.parent
        return found

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
