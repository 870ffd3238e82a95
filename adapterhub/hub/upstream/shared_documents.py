"""Copies of the upstream's documents that all processes of a hub share: each is written to the bucket too, and read from it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from adapterhub.store.store_files import local_errors
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError

from .cached_files import CachedFiles
from .shared_files import SharedFiles

_log = logging.getLogger("adapterhub.hub")
_CHECK_SECONDS = 30.0  # between two looks for a newer document in the bucket
_MAX_CHECKED = 10_000  # documents whose last look is remembered


class SharedDocuments(CachedFiles):
    """Kept files, whose documents are those of all processes."""

    def __init__(self, root: Path, max_bytes: int, shared: SharedFiles) -> None:
        super().__init__(root, max_bytes)
        self._shared = shared
        self._checked: dict[str, float] = {}

    def read_document(self, name: str) -> tuple[bytes, float] | None:
        """Return the newest document of a name and the time at which it was written; None without any."""
        local = super().read_document(name)
        now = time.monotonic()
        if local and self._checked.get(name, -_CHECK_SECONDS) + _CHECK_SECONDS > now:
            return local
        if len(self._checked) >= _MAX_CHECKED:
            self._checked.clear()
        self._checked[name] = now
        try:
            shared = self._shared.read_document(name)
        except AdapterhubError as error:
            _log.warning("a document of a model is not read from the bucket: %s", printable(str(error)))
            return local
        if shared is None or (local and local[1] > shared[1]):
            return local
        super().write_document(name, shared[0])
        with local_errors(self._document(name)):
            os.utime(self._document(name), (shared[1], shared[1]))
        return shared

    def revisions(self, limit: int) -> list[tuple[str, str]]:
        """Return the models and revisions whose commits are kept, by any process, those used last first."""
        return self._shared.revisions(limit)

    def write_document(self, name: str, data: bytes) -> None:
        """Write a document, here and for the other processes."""
        super().write_document(name, data)
        try:
            self._shared.write_document(name, data)
        except AdapterhubError as error:
            _log.warning("a document of a model is not kept in the bucket: %s", printable(str(error)))
