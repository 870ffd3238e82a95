"""The history of an adapter, and what a commit has changed: files, and the lines of those that are text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

from adapterhub.digest import Digest
from adapterhub.hub import commits
from adapterhub.hub.access_control import GatedError
from adapterhub.hub.commits import EMPTY, Commit, View
from adapterhub.hub.downloads import PAGES
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .site import Page, PageRequest

_PER_PAGE = 50
_MAX_TEXT, _MAX_LINES = 128 << 10, 1000  # bytes and lines of a file that is compared
_MAX_LINE = 400  # characters of a line that is shown
_MAX_COMPARED = 10  # files of a commit
_File = tuple[Digest, int]


@dataclass(frozen=True)
class CommitsPage(Page):
    """Commits that led to `main`, the newest first, and the address of those before them."""

    name: str
    commits: Sequence[Commit]
    following: str
    template: ClassVar[str] = "commits.html"


@dataclass(frozen=True)
class FileDifference:
    """A file that a commit has changed: sizes in bytes, None where it is missing, and its lines; empty if it is no text."""

    path: str
    before: int | None
    after: int | None
    lines: Sequence[str]


@dataclass(frozen=True)
class CommitPage(Page):
    """A commit, the one before it, and what has changed."""

    name: str
    commit: Commit
    parent: str
    files: Sequence[FileDifference]
    more: int
    template: ClassVar[str] = "commit.html"


def commits_page(page_request: PageRequest, worker: Worker) -> CommitsPage:
    """GET …/commits, with ?from=ID for those from a commit on."""
    view = page_request.current_repository(worker, "/commits")
    listed = list(islice(commits.history(worker, view, page_request.query("from") or commits.HEAD), _PER_PAGE + 1))
    following = f"/{view.name}/commits?from={listed[-1].id}" if len(listed) > _PER_PAGE else ""
    return CommitsPage(view.name, listed[:_PER_PAGE], following)


def commit_page(page_request: PageRequest, worker: Worker) -> CommitPage:
    """GET …/commit/{revision}."""
    view = page_request.current_repository(worker)
    commit = commits.find(worker, view, page_request.part("revision"))
    earlier = next(islice(commits.history(worker, view, commit.id), 1, 2), None)
    parent = commits.by_id(worker, view, earlier.id) if earlier else EMPTY
    paths = sorted(path for path in {*commit.files, *parent.files} if commit.files.get(path) != parent.files.get(path))
    compared = [
        _difference(page_request, worker, view, path, (parent.files.get(path), commit.files.get(path)))
        for path in paths[:_MAX_COMPARED]
    ]
    return CommitPage(view.name, commit, earlier.id if earlier else "", compared, len(paths) - len(compared))


def _difference(
    page_request: PageRequest, worker: Worker, view: View, path: str, files: tuple[_File | None, _File | None]
) -> FileDifference:
    """Return what has changed of a file, which is missing before or after if that is None."""
    before, after = (_lines(page_request, worker, view, file) for file in files)
    lines: list[str] = []
    if before is not None and after is not None:
        changed = islice(difflib.unified_diff(before, after, lineterm="", n=3), 2, None)
        lines = [line[:_MAX_LINE] for line in changed]
    sizes = [file[1] if file else None for file in files]
    return FileDifference(path, sizes[0], sizes[1], lines)


def _lines(page_request: PageRequest, worker: Worker, view: View, file: _File | None) -> list[str] | None:
    """Return the lines of a file, none if it is missing; None if it is no text, too large, or the client may not read it."""
    if file is None:
        return []
    digest, size = file
    if size > _MAX_TEXT:
        return None
    try:
        page_request.hub.policy_gate.check_blob(worker, page_request.who, view, digest)
    except (GatedError, RefusedError):
        return None
    page_request.hub.record_read(view, digest, PAGES)
    raw = worker.registry.store.read_document(digest)
    if b"\0" in raw:
        return None
    lines = raw.decode("utf-8", "replace").splitlines()
    return lines if len(lines) <= _MAX_LINES else None
