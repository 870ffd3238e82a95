"""What a commit asks for: the files that it adds or replaces, and the paths that it removes; one JSON document per line."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import field, replace
from typing import Any

from starlette.requests import Request

from adapterhub.digest import Digest, is_hex
from adapterhub.hub import request_texts
from adapterhub.hub.commits import View
from adapterhub.hub.git_objects import REGULAR_LIMIT
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import stream_body
from adapterhub.hub.staged_files import StagedFiles
from adapterhub.hub.workers import Worker
from adapterhub.manifest.package_files import MAX_FILES
from adapterhub.registry.repository_documents import CommitRecord
from adapterhub.registry.repository_records import ENTRY_SIZE
from adapterhub_converters.adapter_files import ADAPTER_JSON, determines_function
from adapterhub_converters.containers.open_file import MAX_PATH
from adapterhub_converters.errors import FormatError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .hf_errors import ResponseError

_MAX_LINE = 2 * REGULAR_LIMIT  # bytes: a small file in base64, with reserve for clients that skip the preupload request
_MAX_LINES = 4 * MAX_FILES  # of a commit: files added and removed, and its header
_MAX_COMMIT = 1 << 30  # bytes of all lines
# Bytes of a repository's commit documents, if all were as large as the last one: listing commits reads them all.
_MAX_HISTORY = 64 << 20
Tree = dict[str, tuple[Digest, int]]
"""Digest and size in bytes by path."""


@dataclass
class Changes:
    """The changes of a commit: files added or replaced, and paths removed.

    Attributes:
        staged: The files whose bytes are in the commit itself.
        inline: Their paths.
        author: Whose changes they are; empty for the account that commits them.
    """

    staged: StagedFiles
    title: str = ""
    description: str = ""
    parent: str = ""
    author: str = ""
    files: Tree = field(default_factory=dict)
    inline: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    removed_folders: set[str] = field(default_factory=set)

    def apply_to(self, tree: Mapping[str, tuple[Digest, int]]) -> Tree:
        """Return the tree after the commit. An adapter.json that does not match new weights is dropped: it is derived again."""
        remaining = {path: file for path, file in tree.items() if path not in self.removed and not self._is_below(path)}
        changed = any(determines_function(path) and tree.get(path) != file for path, file in self.files.items())
        if changed and ADAPTER_JSON not in self.files:
            remaining.pop(ADAPTER_JSON, None)
        return {**remaining, **self.files}

    def _is_below(self, path: str) -> bool:
        above = {path[:at] for at, letter in enumerate(path) if letter == "/"}
        return not self.removed_folders.isdisjoint({"", ".", *above})


async def read_changes(hub: Hub, request: Request, name: str, staged: StagedFiles) -> Changes:
    """Read the lines of a commit; small files are staged as they arrive."""
    changes = Changes(staged)
    async for line in _lines(stream_body(request, _MAX_COMMIT, window=2 * _MAX_LINE)):
        fields = request_texts.parse_object(line, "commit", memory=4 * _MAX_LINE)
        key, value = fields.get("key"), fields.get("value")
        if not isinstance(value, dict):
            raise FormatError("commit", "the value of a line is not an object")
        path = str(value.get("path", ""))
        if key == "header":
            changes.title, changes.description = str(value.get("summary", ""))[:500], str(value.get("description", ""))[:10_000]
            changes.parent = str(value.get("parentCommit") or "")
        elif key == "file":
            changes.files[path] = await hub.workers.read(_stage_file, staged, path, value)
            changes.inline.add(path)
        elif key == "lfsFile":
            changes.files[path] = _lfs_file(path, value)
            changes.inline.discard(path)
        elif key == "deletedFile":
            changes.removed.add(path)
        elif key == "deletedFolder":
            changes.removed_folders.add(path.strip("/"))
        else:
            raise FormatError("commit", f"a line of the unknown kind {str(key)[:40]!r}")
        if len(path) > MAX_PATH:
            raise RefusedError(f"{name}: {path[:80]}", f"a path of more than {MAX_PATH} characters", "Rename the file")
        if max(len(changes.files), len(changes.removed), len(changes.removed_folders)) > MAX_FILES:
            raise RefusedError(name, f"more than {MAX_FILES} files")
    return changes


async def _lines(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of a body, each of limited length; RefusedError for too many."""
    pieces: list[bytes] = []
    length = count = 0
    async for piece in body:
        *complete, tail = piece.split(b"\n")
        if (count := count + len(complete)) > _MAX_LINES:
            raise RefusedError("commit", f"more than {_MAX_LINES:,} lines", "Make several commits")
        for line in complete:
            if text := b"".join([*pieces, line]).strip():
                yield text
            pieces, length = [], 0
        pieces.append(tail)
        length += len(tail)
        if length > _MAX_LINE:
            raise ResponseError(413, "", f"a line of more than {_MAX_LINE:,} bytes: upload large files on their own")
    if text := b"".join(pieces).strip():
        yield text


def _stage_file(staged: StagedFiles, path: str, value: dict[str, Any]) -> tuple[Digest, int]:
    """Keep a small file until the commit is made or refused."""
    if value.get("encoding", "base64") != "base64":
        raise FormatError("commit", f"{path[:80]}: the encoding {str(value['encoding'])[:40]!r} is not known")
    try:
        data = base64.b64decode(str(value.get("content", "")), validate=True)
    except ValueError as error:
        raise FormatError("commit", f"{path[:80]}: not base64") from error
    return staged.add(data)


def _lfs_file(path: str, value: dict[str, Any]) -> tuple[Digest, int]:
    oid, size = value.get("oid"), value.get("size")
    if not isinstance(oid, str) or not is_hex(oid):
        raise FormatError("commit", f"{path[:80]}: {str(oid)[:80]!r} is not a sha256")
    return f"sha256:{oid}", size if type(size) is int else -1


def check_history(view: View, record: CommitRecord) -> None:
    """Refuse a commit to a repository that has as many as can be listed."""
    count = len(view.repository.commits) + 1 if view.repository else 1
    if count * len(record.dump()) > _MAX_HISTORY:
        problem = f"{count:,} commits of {len(record.files):,} files are more than can be listed"
        raise RefusedError(view.name, problem, "Squash the branch (`super_squash_history`)")


def document_size(worker: Worker, name: str) -> int:
    """Return the bytes of the document of a repository, which a commit writes anew, with its entry in the log."""
    entry = worker.repositories.document(name).entry
    return ENTRY_SIZE + (entry.size if entry else 0)


def with_sizes(changes: Changes, name: str, stored_size: Callable[[Digest], int | None]) -> Changes:
    """Return the changes with the sizes of files uploaded earlier, which `stored_size` returns of those that may be used.

    Raises:
        UsageError: A file was not uploaded.
    """
    files = {}
    for path, (digest, size) in changes.files.items():
        actual = size if path in changes.inline else stored_size(digest)
        if actual is None or size not in (actual, -1):
            raise UsageError(f"{name}: {path[:80]}", f"{digest} was not uploaded", "Upload it again")
        files[path] = digest, actual
    return replace(changes, files=files)


def has_same_files(tree: Mapping[str, tuple[Digest, int]], current: Mapping[str, tuple[Digest, int]]) -> bool:
    """Return whether a tree has the same files as the current one, whose adapter.json it inherits if it has none."""
    derived = {ADAPTER_JSON: current[ADAPTER_JSON]} if ADAPTER_JSON in current else {}
    return {**derived, **tree} == dict(current)
