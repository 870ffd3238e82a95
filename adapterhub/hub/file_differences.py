"""What differs between two trees of files: sizes, and the lines of those that are text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import islice

from adapterhub.digest import Digest
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .access_control import ForbiddenError
from .accounts.access_tokens import Identity
from .commits import View
from .downloads import PAGES
from .hub import Hub
from .proposals import ProposedChange
from .publishing import Files
from .workers import Worker

MAX_TEXT = 128 << 10
"""Bytes of a file that is shown as text."""
_MAX_LINES = 1000  # of a file that is compared
_MAX_LINE = 400  # characters of a line that is shown
_MAX_COMPARED = 10  # files
_File = tuple[Digest, int]


@dataclass(frozen=True)
class FileDifference:
    """A file that has changed: sizes in bytes, None where it is missing, and its lines; empty if it is no text."""

    path: str
    before: int | None
    after: int | None
    lines: Sequence[str]


def of_proposal(
    worker: Worker, hub: Hub, identity: Identity | None, view: View, change: ProposedChange
) -> tuple[list[FileDifference], int]:
    """Return the first files that a proposal would change, and how many more there are, as `between` does."""
    return between(worker, hub, identity, view, before=change.before, after=change.record.files, commit=change.commit)


def between(
    worker: Worker, hub: Hub, identity: Identity | None, view: View, *, before: Files, after: Files, commit: str
) -> tuple[list[FileDifference], int]:
    """Return the first files of a repository that differ between two trees, and how many more there are.

    Lines are shown as far as the client may read the files, of which `after` are those of the commit with the id `commit`.
    """

    def lines(file: _File | None) -> list[str] | None:
        """Return the lines of a file, none for a missing one; None if it is no text, too large, or not for this client."""
        if file is None:
            return []
        digest, size = file
        if size > MAX_TEXT:
            return None
        if not may_read_file(worker, hub, identity, view, digest=digest, commit=commit):
            return None
        hub.record_read(view, digest, PAGES)
        text = read_lines(worker, file)
        return None if text is None or len(text) > _MAX_LINES else text

    paths = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    listed = []
    for path in paths[:_MAX_COMPARED]:
        files = before.get(path), after.get(path)
        sizes = [file[1] if file else None for file in files]
        listed.append(FileDifference(path, sizes[0], sizes[1], _changed_lines(*map(lines, files))))
    return listed, len(paths) - len(listed)


def read_lines(worker: Worker, file: _File) -> list[str] | None:
    """Return the lines of a file of at most MAX_TEXT bytes; None if it is larger, or no text."""
    digest, size = file
    if size > MAX_TEXT:
        return None
    raw = worker.registry.store.read_document(digest)
    return None if b"\0" in raw else raw.decode("utf-8", "replace").splitlines()


def may_read_file(worker: Worker, hub: Hub, identity: Identity | None, view: View, *, digest: Digest, commit: str) -> bool:
    """Return whether a client may read a file of a commit, which may be that of a proposal."""
    try:
        hub.policy_gate.check_proposal(identity, view, commit)
        hub.policy_gate.check_blob(worker, identity, view, digest)
    except (ForbiddenError, RefusedError):
        return False
    return True


def _changed_lines(before: list[str] | None, after: list[str] | None) -> list[str]:
    if before is None or after is None:
        return []
    changed = islice(difflib.unified_diff(before, after, lineterm="", n=3), 2, None)
    return [line[:_MAX_LINE] for line in changed]
