"""The history of an adapter, what a commit has changed, and a file of one: the lines of those that are text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import ClassVar
from urllib.parse import quote

from adapterhub.digest import Digest
from adapterhub.hub import commits, file_differences
from adapterhub.hub.commits import EMPTY, Commit
from adapterhub.hub.downloads import PAGES
from adapterhub.hub.file_differences import FileDifference
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from .site import Page, PageRequest

_PER_PAGE = 50


@dataclass(frozen=True)
class CommitsPage(Page):
    """Commits that led to `main`, the newest first, and the address of those before them."""

    name: str
    commits: Sequence[Commit]
    following: str
    template: ClassVar[str] = "commits.html"


@dataclass(frozen=True)
class CommitPage(Page):
    """A commit, the one before it, and what has changed."""

    name: str
    commit: Commit
    parent: str
    files: Sequence[FileDifference]
    more: int
    template: ClassVar[str] = "commit.html"


@dataclass(frozen=True)
class FilePage(Page):
    """A file of a commit.

    Attributes:
        revision: What its address names the commit by.
        lines: Its lines; None if it is no text, or too large for a page.
        is_current: Whether it is the same on `main`, where a client may change it.
    """

    name: str
    revision: str
    commit: Commit
    path: str
    digest: Digest
    size: int
    lines: Sequence[str] | None
    is_current: bool
    template: ClassVar[str] = "file.html"


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
    compared, more = file_differences.between(
        worker, page_request.hub, page_request.who, view, before=parent.files, after=commit.files, commit=commit.id
    )
    return CommitPage(view.name, commit, earlier.id if earlier else "", compared, more)


def file_page(page_request: PageRequest, worker: Worker) -> FilePage:
    """GET …/blob/{revision}/{path}: an address that clients of the Hugging Face Hub print, too."""
    path, revision = page_request.part("path"), page_request.part("revision")
    view = page_request.current_repository(worker, f"/blob/{revision}/{quote(path)}")
    commit = commits.find(worker, view, revision)
    if path not in commit.files:
        raise NotFoundError(f"{view.name}@{revision}", f"has no file {path[:200]}")
    digest, size = commit.files[path]
    page_request.hub.policy_gate.check_file(worker, page_request.who, view, commit, digest)
    lines = file_differences.read_lines(worker, (digest, size))
    if lines is not None:
        page_request.hub.record_read(view, commit.row.digest if commit.row else digest, PAGES)
    head = commits.find(worker, view, commits.HEAD)
    is_current = not view.frozen and head.files.get(path) == (digest, size)
    return FilePage(view.name, revision, commit, path, digest, size, lines, is_current)
