"""Files for those who write: what may come is said before it moves, and a commit makes a tree of it.

A commit of a whole adapter becomes the next version, and its id is that of the version. Any other tree moves the branch and has
no number. A commit whose answer was lost is sent again, and finds itself made.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest, is_hex
from adapterhub.hub import commits, publishing
from adapterhub.hub.commits import Commit, View
from adapterhub.hub.git import REGULAR_LIMIT, is_lfs
from adapterhub.hub.hub import Hub
from adapterhub.hub.people.tokens import Identity
from adapterhub.hub.workers import Worker
from adapterhub.manifest.package_files import MAX_FILES, check_file, check_names, divide_names
from adapterhub.ref import LATEST, is_tag
from adapterhub.registry.moves import ABSENT, now
from adapterhub.registry.repositories import MAIN, CommitRecord, Head, Repository, commit_id
from adapterhub.registry.versions import Version
from adapterhub_converters.adapter_files import ADAPTER_JSON, decides
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import MAX_PATH
from adapterhub_converters.display import printable
from adapterhub_converters.errors import FormatError, RefusedError, UsageError

from .answers import AnswerError
from .reading import at, found, name_of, part
from .repositories import document

_MAX_LINE = 2 * REGULAR_LIMIT  # bytes: a small file in base64, and some for those who do not ask first
_MAX_COMMIT = 1 << 30  # bytes of all lines
_MAX_HISTORY = (
    64 << 20
)  # bytes of the documents of a repository's commits, all of which a list of them reads, were all like the last
_Tree = dict[str, tuple[Digest, int]]


async def preupload(hub: Hub, request: Request) -> Response:
    """POST …/preupload/{rev}: how each file is to be sent, or why it may not come."""
    who, name, revision, fields = hub.identify(request), name_of(request), part(request, "revision"), await document(request)
    files = fields.get("files")
    listed = [one for one in files if isinstance(one, dict)] if isinstance(files, list) else []
    paths = [str(one.get("path", "")) for one in listed]

    def work(worker: Worker) -> list[dict[str, Any]]:
        of = found(hub, worker, who, name)
        hub.access.check_write(who, name)
        there = at(worker, of, revision).files if revision in commits.branches(of) or revision == MAIN else {}
        ignored = set(divide_names({*paths, *there})[1])
        offered = [one.get("size") for path, one in zip(paths, listed, strict=True) if path not in ignored]
        hub.quotas.check_sizes(worker, name, [size for size in offered if type(size) is int])
        answers = []
        for path, one in zip(paths, listed, strict=True):
            size = one["size"] if type(one.get("size")) is int else 0
            if path not in ignored:
                _check_offered(hub, name, path, size, str(one.get("sample", "")))
            mode = "lfs" if is_lfs(path, size) and size else "regular"
            oid = hub.git.file(path, *there[path]).oid if path in there else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, "oid": oid})
        return answers

    return JSONResponse({"files": await hub.workers.run(work)})


def _check_offered(hub: Hub, name: str, path: str, size: int, sample: str) -> None:
    try:
        head = base64.b64decode(sample)
    except ValueError as error:
        raise UsageError(f"{name}: {path[:80]}", "the sample of its bytes is not base64") from error
    check_names([path], name)
    if head:
        check_file(path, head, name)
    if size > hub.settings.max_file:
        raise RefusedError(f"{name}: {path[:80]}", f"a file may have at most {hub.settings.max_file:,} bytes")


# ---- a commit


@dataclass
class _Changes:
    """What a commit changes: the files that it brings, and the paths that it removes.

    Attributes:
        within: Paths of the files whose bytes are in the commit itself.
    """

    title: str = ""
    description: str = ""
    parent: str = ""
    files: _Tree = field(default_factory=dict)
    within: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    removed_folders: set[str] = field(default_factory=set)

    def applied(self, tree: Mapping[str, tuple[Digest, int]]) -> _Tree:
        """The tree after the commit. A manifest that is not about the new weights is left out: it is derived again."""
        kept = {path: file for path, file in tree.items() if path not in self.removed and not self._is_below(path)}
        changed = any(decides(path) and tree.get(path) != file for path, file in self.files.items())
        if changed and ADAPTER_JSON not in self.files:
            kept.pop(ADAPTER_JSON, None)
        return {**kept, **self.files}

    def _is_below(self, path: str) -> bool:
        above = {path[:at] for at, letter in enumerate(path) if letter == "/"}
        return not self.removed_folders.isdisjoint({"", ".", *above})


async def commit(hub: Hub, request: Request) -> Response:
    """POST …/commit/{rev}: one JSON document a line."""
    who, name, branch = hub.identify(request), name_of(request), part(request, "revision") or MAIN
    if request.query_params.get("create_pr", "").lower() in ("1", "true"):
        raise AnswerError(501, "NotImplemented", "this hub has no pull requests: commit to a branch")
    await hub.workers.run(_check_writer, hub, who, name)
    changes = await _received(hub, request, name)
    async with hub.turn(name):
        made, notes = await hub.workers.run(_commit, hub, who, f"{name}@{branch}", changes)
    url = f"{hub.url(request)}/{name}/commit/{made.id}"
    answer = {"success": True, "commitUrl": url, "commitOid": made.id, "hookOutput": ""}
    headers = (
        {"x-hf-warning": printable(f"adapterhub; {notes}").encode("latin-1", "replace").decode("latin-1")} if notes else None
    )
    return JSONResponse(answer, headers=headers)


def _check_writer(worker: Worker, hub: Hub, who: Identity | None, name: str) -> None:
    found(hub, worker, who, name)
    hub.access.check_write(who, name)


async def _received(hub: Hub, request: Request, name: str) -> _Changes:
    """Read the lines of a commit; small files are stored as they come."""
    changes = _Changes()
    async for line in _lines(request.stream()):
        one = json_file.parse_object(line, "commit", memory=4 * _MAX_LINE)
        key, value = one.get("key"), one.get("value")
        if not isinstance(value, dict):
            raise FormatError("commit", "the value of a line is not an object")
        path = str(value.get("path", ""))
        if key == "header":
            changes.title, changes.description = str(value.get("summary", ""))[:500], str(value.get("description", ""))[:10_000]
            changes.parent = str(value.get("parentCommit") or "")
        elif key == "file":
            changes.files[path] = await hub.workers.read(_stored, hub, path, value)
            changes.within.add(path)
        elif key == "lfsFile":
            changes.files[path] = _uploaded_file(path, value)
            changes.within.discard(path)
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
    """The lines of a body, each of bounded length."""
    pieces: list[bytes] = []
    length = total = 0
    async for piece in body:
        total += len(piece)
        if total > _MAX_COMMIT:
            raise AnswerError(413, "", f"a commit of more than {_MAX_COMMIT:,} bytes: upload large files on their own")
        *ended, rest = piece.split(b"\n")
        for line in ended:
            if whole := b"".join([*pieces, line]).strip():
                yield whole
            pieces, length = [], 0
        pieces.append(rest)
        length += len(rest)
        if length > _MAX_LINE:
            raise AnswerError(413, "", f"a line of more than {_MAX_LINE:,} bytes: upload large files on their own")
    if whole := b"".join(pieces).strip():
        yield whole


def _stored(hub: Hub, path: str, value: dict[str, Any]) -> tuple[Digest, int]:
    """Store a small file, which the hub's lease keeps from a gc until the commit is made."""
    if value.get("encoding", "base64") != "base64":
        raise FormatError("commit", f"{path[:80]}: the encoding {str(value['encoding'])[:40]!r} is not known")
    try:
        data = base64.b64decode(str(value.get("content", "")), validate=True)
    except ValueError as error:
        raise FormatError("commit", f"{path[:80]}: not base64") from error
    return hub.store.put_bytes(data)


def _uploaded_file(path: str, value: dict[str, Any]) -> tuple[Digest, int]:
    oid, size = value.get("oid"), value.get("size")
    if not isinstance(oid, str) or not is_hex(oid):
        raise FormatError("commit", f"{path[:80]}: {str(oid)[:80]!r} is not a sha256")
    return f"sha256:{oid}", size if type(size) is int else -1


def _commit(worker: Worker, hub: Hub, who: Identity | None, where: str, changes: _Changes) -> tuple[Commit, str]:
    """Make a commit on `name@branch`; return it, and what its author should know."""
    name, _, branch = where.partition("@")
    of = found(hub, worker, who, name)
    head = _head(worker, of, branch)
    files = _with_sizes(hub, worker, of, changes)
    if changes.parent and changes.parent != head.id:
        again = commits.by_id(worker, of, changes.parent)
        if _same(files.applied(again.files), head.files):
            return head, ""
        raise AnswerError(412, "", f"{name}@{branch} has moved to {head.id} since {changes.parent}: commit to that again")
    tree = files.applied(head.files)
    if _same(tree, head.files):
        return head, ""
    kept, left_out = divide_names(tree)
    tree = {path: tree[path] for path in kept}
    publishing.check_tree(tree, name)
    hub.quotas.check(worker, name, {tree[path][0]: tree[path][1] for path in files.files if path in tree}, take=True)
    record = CommitRecord(tree, head.id, changes.title, changes.description, who.account if who else "", now())
    _check_history(of, record)
    if not publishing.is_whole(tree):
        publishing.check_contents(worker.registry.store, {path: tree[path] for path in files.files if path in tree}, name)
        return _keep(worker, of, branch, record), "not a whole adapter yet, so that it has no version number"
    version = _publish(worker, hub, of, branch, record)
    made = _keep(worker, of, branch, replace(record, became=version.digest))
    notes = [f"{name}:v{version.number}" if version.new else f"has the content of {name}:v{version.number}"]
    notes += [f"left out: {', '.join(left_out[:6])}"] if left_out else []
    return made, "; ".join(notes)


def _check_history(of: View, record: CommitRecord) -> None:
    count = len(of.repository.commits) + 1 if of.repository else 1
    if count * len(record.dump()) > _MAX_HISTORY:
        what = f"{count:,} commits of {len(record.files):,} files are more than can be listed"
        raise RefusedError(of.name, what, "Squash the branch (`super_squash_history`)")


def _head(worker: Worker, of: View, branch: str) -> Commit:
    if branch not in commits.branches(of):
        if not is_tag(branch) or branch == LATEST or branch in commits.tags(worker, of):
            raise RefusedError(f"{of.name}@{branch}", "is not a branch", "Commit to main, or create a branch first")
        raise AnswerError(404, "RevisionNotFound", f"{of.name}@{branch}: no such branch")
    return at(worker, of, branch)


def _with_sizes(hub: Hub, worker: Worker, of: View, changes: _Changes) -> _Changes:
    """The changes, whose files that were uploaded before are blobs that this repository may use."""
    files = {}
    for path, (digest, size) in changes.files.items():
        there = size if path in changes.within else hub.has_blob(worker, of, of.name, digest)
        if there is None or size not in (there, -1):
            raise UsageError(f"{of.name}: {path[:80]}", f"{digest} was not uploaded", "Upload it again")
        files[path] = digest, there
    return replace(changes, files=files)


def _same(tree: Mapping[str, tuple[Digest, int]], other: Mapping[str, tuple[Digest, int]]) -> bool:
    """Whether a tree has the files of another one, from which it gets its manifest if it has none of its own."""
    derived = {ADAPTER_JSON: other[ADAPTER_JSON]} if ADAPTER_JSON in other else {}
    return {**derived, **tree} == dict(other)


def _publish(worker: Worker, hub: Hub, of: View, branch: str, record: CommitRecord) -> Version:
    tags = (LATEST,) if branch == MAIN else (branch,) if of.newest else (LATEST, branch)
    expect = (of.newest.digest if of.newest else ABSENT) if branch == MAIN else None
    more: dict[str, Any] = {"tags": tags, "expect": expect, "policy": hub.settings.policy, "message": record.title}
    more["signatures"] = partial(publishing.attached_signatures, worker, of.name)
    return publishing.publish_tree(worker.registry, of.name, record.files, **more)


def _keep(worker: Worker, of: View, branch: str, record: CommitRecord, *, only: Collection[str] | None = None) -> Commit:
    """Record a commit, and move its branch there; `only`: the earlier commits that stay, None for all."""
    document_digest, _ = worker.registry.store.put_bytes(record.dump())
    ident = commit_id(record.became or document_digest)

    before = of.repository.heads if of.repository else {}

    def edit(state: Repository) -> Repository:
        moved = state.heads.get(branch) != before.get(branch) if only is None else state.heads != before
        # By another process of the hub. What became a version was next in its log, and main follows that.
        if moved and not (record.became and branch == MAIN and only is None):
            raise AnswerError(412, "", f"{of.name}@{branch} has moved meanwhile: commit again")
        kept = {key: digest for key, digest in state.commits.items() if only is None or key in only}
        known = {**kept, ident: document_digest}
        latest = of.latest if not record.became or branch != MAIN else ident
        heads = {**state.heads, branch: Head(ident, latest)}
        return replace(state, commits=known, heads=heads)

    with worker.registry.store.lease("hub"):
        worker.registry.store.put_bytes(record.dump())
        worker.repositories.change(of.name, edit)
    after = commits.view(worker, of.name)
    return commits.by_id(worker, after or of, ident)


# ---- a squash


async def squash(hub: Hub, request: Request) -> Response:
    """POST …/super-squash/{b}: one commit in place of those of a branch; versions, and what other branches have, stay."""
    who, name, branch, fields = hub.identify(request), name_of(request), part(request, "branch"), await document(request)
    title = str(fields.get("message", ""))[:500]

    def work(worker: Worker) -> None:
        of = found(hub, worker, who, name)
        hub.access.check_write(who, name)
        head = at(worker, of, branch)
        if branch not in commits.branches(of):
            raise UsageError(f"{name}@{branch}", "is not a branch", "Squash a branch")
        if of.repository and of.repository.commits:
            author, became = who.account if who else "", head.row.digest if head.row else ""
            record = CommitRecord(head.files, title=title, author=author, time=now(), became=became)
            _keep(worker, of, branch, record, only=_of_others(worker, of.repository, branch))

    async with hub.turn(name):
        await hub.workers.run(work)
    return JSONResponse({})


def _of_others(worker: Worker, repository: Repository, branch: str) -> set[str]:
    """The commits that branches other than `branch` are at, or came from."""
    found: set[str] = set()
    for other, head in repository.heads.items():
        ident = "" if other == branch else head.commit
        while ident not in found and (record := worker.repositories.commit(repository, ident)):
            found.add(ident)
            ident = record.parent
    return found
