"""Signatures of versions, as they came: `signatures/sha256/<hex of the manifest>/<hex of the signature>`.

Nothing refers to them and they prove themselves, so that no log has them; `adapterhub.trust` tells what one is worth.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import islice
from pathlib import Path

from adapterhub.digest import Digest, is_hex, parse_digest, sha256_bytes
from adapterhub_converters.errors import RefusedError

from .atomic import Files, local_errors

MOST, MOST_BYTES = 100, 64 << 20
"""Signatures of one version, and their bytes, that are read; those of one version that are stored."""


def bounded(found: Iterable[bytes]) -> list[bytes]:
    """Return the first signatures, within the limits: anybody who can write to a place can fill it."""
    kept: list[bytes] = []
    size = 0
    for signature in islice(found, MOST):
        size += len(signature)
        if size > MOST_BYTES:
            break
        kept.append(signature)
    return kept


class Signatures:
    """The signatures below a folder, which is created with the first one."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder
        self._files = files

    def read(self, digest: Digest, limit: int) -> list[bytes]:
        """Return the signatures of a manifest, in a stable order, each cut off after `limit` bytes."""
        with local_errors(self.folder):
            return bounded(self._files.read(path, limit) for path in self._paths(digest))

    def add(self, digest: Digest, signature: bytes) -> bool:
        """Store a signature of a manifest; return False if it was there."""
        path = self._folder(digest) / sha256_bytes(signature).removeprefix("sha256:")
        with local_errors(path):
            there = self._paths(digest)
            if path in there:
                return False
            if len(there) >= MOST:
                raise RefusedError(digest, f"has {len(there)} signatures already")
            self._files.make_dir(path.parent)
            self._files.replace(path, signature)
        return True

    def of_others(self, there: Container[Digest]) -> list[tuple[Digest, Path]]:
        """List the manifests that are not `there`, each with the path of a signature."""
        try:
            folders = self._files.folders(self.folder)
        except FileNotFoundError:
            return []
        gone = [(f"sha256:{folder.name}", folder) for folder in folders if is_hex(folder.name)]
        return [(digest, path) for digest, folder in gone if digest not in there for path in self._files.listed(folder)]

    def _folder(self, digest: Digest) -> Path:
        return self.folder / parse_digest(digest, "store").removeprefix("sha256:")

    def _paths(self, digest: Digest) -> list[Path]:
        try:
            return [path for path in self._files.listed(self._folder(digest)) if is_hex(path.name)]
        except FileNotFoundError:
            return []
