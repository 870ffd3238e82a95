"""The editor of the card or another text file, for who may commit to `main` or propose a change."""

from __future__ import annotations

from typing import ClassVar
from urllib.parse import quote

from adapterhub.hub import commits, proposals
from adapterhub.hub.access_control import may_write
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import Commit, View
from adapterhub.hub.downloads import PAGES
from adapterhub.hub.hub import Hub
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from .site import Page, PageRequest

CARD, MAX_TEXT = "README.md", 256 << 10
"""The file with the card, and bytes of a file that is edited on a page."""


@dataclass(frozen=True)
class EditorPage(Page):
    """A text file in an editor.

    Attributes:
        parent: The commit with the file that was read.
        text: The text read, or the one written so far.
        may_commit: Whether the client may commit it, too, besides proposing it.
        title: What has changed, as far as written.
        wrong: Why the last attempt was refused.
        newer_text: The file in `parent`, if `text` was written for an earlier commit.
    """

    name: str
    path: str
    parent: str
    text: str
    may_commit: bool
    title: str = ""
    wrong: str = ""
    newer_text: str = ""
    template: ClassVar[str] = "editor.html"


def editor_page(page_request: PageRequest, worker: Worker) -> EditorPage:
    """GET /-/adapters/{namespace}/{repo}/edit/{path}."""
    hub, who, path = page_request.hub, page_request.who, page_request.part("path")
    view = page_request.current_repository(worker, f"/edit/{quote(path)}", root="/-/adapters")
    proposals.upload_name(hub.access, who, view.name)
    commit = commits.find(worker, view, commits.HEAD)
    text = read_text(worker, hub, who, view, commit=commit, path=path)
    if path in commit.files:
        hub.record_read(view, commit.row.digest if commit.row else commit.files[path][0], PAGES)
    return EditorPage(view.name, path, commit.id, text, may_write(who, view.name))


def read_text(worker: Worker, hub: Hub, identity: Identity | None, view: View, *, commit: Commit, path: str) -> str:
    """Return the text of a file to edit, empty for a card that is missing.

    Raises:
        GatedError: The client may not read the files of the repository.
        NotFoundError: There is no such file, or no page edits it: it is too large, or no text.
        RefusedError: It was withdrawn.
    """
    if path not in commit.files:
        if path == CARD:
            return ""
        raise NotFoundError(f"{view.name}@main", f"has no file {path[:200]}")
    digest, size = commit.files[path]
    hub.policy_gate.check_file(worker, identity, view, commit, digest)
    if size > MAX_TEXT:
        raise NotFoundError(f"{view.name}: {path}", f"has more than {MAX_TEXT >> 10} KiB, which no page edits")
    raw = worker.registry.store.read_document(digest)
    try:
        if b"\0" not in raw:
            return raw.decode()
    except UnicodeDecodeError:
        pass
    raise NotFoundError(f"{view.name}: {path}", "is no text in UTF-8, which no page edits")
