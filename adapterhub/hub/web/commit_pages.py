"""The history of an adapter, and what a commit has changed: files, and the lines of those that are text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

from adapterhub.hub import commits, file_differences
from adapterhub.hub.commits import EMPTY, Commit
from adapterhub.hub.file_differences import FileDifference
from adapterhub.hub.workers import Worker
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
