"""Signatures of versions, stored as they came: `signatures/sha256/<hex of the manifest>/<hex of the signature>`.

Nothing refers to them and they prove themselves, so no log mentions them; `adapterhub.trust` verifies them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path

from adapterhub.digest import Digest, is_hex, parse_digest, sha256_bytes
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError

from .store_files import StoreFiles, local_errors

MAX_SIGNATURES, MAX_SIGNATURE_BYTES = 1000, 64 << 20
"""Signatures of one version that are looked at, and their bytes that are read."""
MAX_UNREQUESTED = 100
"""Signatures of one version that are stored with it unasked, so that there is room for those of its user."""

UNREADABLE = (FormatError, IntegrityError, NotFoundError, RefusedError)
"""What reading a signature raises that somebody stored wrong, or that lies about itself."""
Sized = tuple[int, Callable[[], bytes]]
"""The bytes of a signature, and what reads it."""


def read_bounded(candidates: Iterable[Sized]) -> list[bytes]:
    """Read signatures, the smallest first, within the limits.

    Anybody who can write to a place can attach something there. Each of the first MAX_SIGNATURES is read if it has at most 64
    kB, whatever the others are: a thousand of that size fit the limit of bytes. A signature that cannot be read is left out.
    """
    contents: list[bytes] = []
    budget = MAX_SIGNATURE_BYTES
    # Anybody may attach large ones: they must not crowd out the others.
    for size, read in sorted(islice(candidates, MAX_SIGNATURES), key=itemgetter(0)):
        budget -= size
        if budget < 0:
            break
        with suppress(*UNREADABLE):
            contents.append(read())
    return contents


class Signatures:
    """The signatures below a folder, which is created with the first one."""

    def __init__(self, folder: Path, files: StoreFiles) -> None:
        self.folder = folder
        self._files = files

    def read(self, digest: Digest, limit: int) -> list[bytes]:
        """Return the signatures of a manifest, in a stable order, each cut off after `limit` bytes."""
        with local_errors(self.folder):
            paths = self._paths(digest)
            return read_bounded((self._files.status(path).st_size, partial(self._files.read, path, limit)) for path in paths)

    def add(self, digest: Digest, signature: bytes, limit: int = MAX_SIGNATURES) -> bool:
        """Store a signature of a manifest; return False if it is stored already, RefusedError if there are `limit` others."""
        path = self._folder(digest) / sha256_bytes(signature).removeprefix("sha256:")
        with local_errors(path):
            stored_paths = self._paths(digest)
            if path in stored_paths:
                return False
            # Counted without a lock: two writers at once may exceed the limit by one, which does no harm.
            if len(stored_paths) >= limit:
                raise RefusedError(digest, f"has {len(stored_paths)} signatures already, as many as are kept")
            self._files.make_dir(path.parent)
            self._files.replace(path, signature)
        return True

    def signatures_of_others(self, existing: Container[Digest]) -> list[tuple[Digest, Path]]:
        """Return the path of each signature of a manifest that is not among `existing`, with the digest of that manifest."""
        try:
            folders = self._files.list_subfolders(self.folder)
        except FileNotFoundError:
            return []
        manifest_folders = [(f"sha256:{folder.name}", folder) for folder in folders if is_hex(folder.name)]
        return [
            (digest, path)
            for digest, folder in manifest_folders
            if digest not in existing
            for path in self._files.list_folder(folder)
        ]

    def _folder(self, digest: Digest) -> Path:
        return self.folder / parse_digest(digest, "store").removeprefix("sha256:")

    def _paths(self, digest: Digest) -> list[Path]:
        try:
            # Files with other names are not adapterhub's.
            return [path for path in self._files.list_folder(self._folder(digest)) if is_hex(path.name)]
        except FileNotFoundError:
            return []
