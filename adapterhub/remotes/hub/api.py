"""The endpoints of a hub that an adapter takes, as huggingface_hub asks them (`hf_api.py`, `_commit_api.py`, `lfs.py`).

What comes back is checked before it means anything: a commit is 40 hex digits, a size a number, a name text. The token goes to
the hub's own origin, with every request, as a private repository says of itself only that it isn't there.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from adapterhub.digest import Digest
from adapterhub.manifest.oci_manifest import parse_json
from adapterhub.remotes.wire import PAUSES, Answer, Body, DeniedError, Wire, resolved
from adapterhub_converters.errors import ConflictError, FormatError, IntegrityError, NotFoundError, RemoteError

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_LISTING = 64_000_000  # bytes
_MAX_ANSWER = 4 << 20  # bytes
_MAX_PAGES = 20
_JSON = {"Content-Type": "application/json"}
_LFS = {"Content-Type": "application/vnd.git-lfs+json", "Accept": "application/vnd.git-lfs+json"}
_NDJSON = {"Content-Type": "application/x-ndjson"}
_SAMPLE = 512  # bytes of a file by which the hub decides how it is kept
LOGIN = "Set HF_TOKEN, or log in with `hf auth login`"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit: `size` in bytes; `digest` of its bytes if it is a large one; `oid` is git's name of the blob."""

    size: int | None
    digest: Digest | None
    oid: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """A commit, and the files of it by their paths, none of which is checked."""

    commit: str
    files: Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Refs:
    """Branches and tags, each with its commit."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


class HubWire(Wire):
    """HTTP with a hub's own words for what went wrong."""

    def _refusal(self, answer: Answer, where: str) -> Exception:
        code = answer.headers.get("x-error-code", "")
        anonymous = not self._known
        if code in ("RepoNotFound", "RevisionNotFound", "EntryNotFound") and answer.status in (401, 403, 404):
            kind = {"RepoNotFound": "repository", "RevisionNotFound": "revision"}.get(code, "file")
            return NotFoundError(
                where, f"no such {kind} on the hub", f"A private one needs a login. {LOGIN}" if anonymous else ""
            )
        if code == "GatedRepo":
            hint = f"Ask for access on its page{f'. {LOGIN}' if anonymous else ''}"
            return DeniedError(where, f"HTTP {answer.status}: a gated repository", hint)
        if answer.status == 401 and not anonymous:
            return DeniedError(where, "HTTP 401: the token was refused, or there is no such repository", LOGIN)
        if answer.status == 412:
            return ConflictError(where, "somebody else committed to it meanwhile", "Look at what came, and push again")
        return super()._refusal(answer, where)

    def _said(self, answer: Answer) -> str:
        """`X-Error-Message`, else the `error` of its body, without anything secret."""
        text = answer.headers.get("x-error-message", "")
        if not text:
            try:
                text = str(json.loads(answer.body)["error"])
            except (ValueError, KeyError, TypeError, RecursionError):
                return ""
        text = "".join(char if char.isprintable() else " " for char in text[:200]).rstrip(". ")
        secrets = [value.partition(" ")[2] for value in self._known.values()]
        return "" if not text or any(secret in text for secret in secrets) else f": {text}"


@dataclass
class Api:
    """One repository through its hub's endpoints."""

    endpoint: str
    repo: str
    where: str
    token: str | None = field(default=None, repr=False)
    pauses: Sequence[float] = PAUSES

    def __post_init__(self) -> None:
        known = {"": f"Bearer {self.token}"} if self.token else {}
        self.wire = HubWire(self.endpoint, None, LOGIN, lambda: [self.token] if self.token else [], self.pauses, _known=known)
        self._models = f"{self.endpoint}/api/models/{self.repo}"

    # ---- reading

    def listing(self, revision: str) -> Listing:
        """The commit that a revision is now, and its files."""
        where = f"{self.where}@{revision}"
        document = self._object(
            "GET", f"{self._models}/revision/{quote(revision, safe='')}?blobs=true", where, limit=_MAX_LISTING
        )
        commit, siblings = document.get("sha"), document.get("siblings")
        entries: list[Any] = siblings if isinstance(siblings, list) else [None]
        named = all(isinstance(entry, dict) and isinstance(entry.get("rfilename"), str) for entry in entries)
        if not named or not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise RemoteError(where, f"{self.endpoint} does not answer as a hub does", "Is HF_ENDPOINT right?")
        if COMMIT.fullmatch(revision) and commit != revision:
            raise IntegrityError(where, f"the hub answers with another commit, {commit}")
        return Listing(commit, {entry["rfilename"]: _entry(entry) for entry in entries})

    def refs(self) -> Refs:
        """Branches and tags."""
        document = self._object("GET", f"{self._models}/refs", self.where)
        return Refs(*(_named(document.get(kind)) for kind in ("branches", "tags")))

    def titles(self, revision: str) -> Iterator[tuple[str, str]]:
        """The commits that led to a revision and what each is called, newest first."""
        url: str | None = f"{self._models}/commits/{quote(revision, safe='')}"
        for _ in range(_MAX_PAGES):
            if url is None:
                return
            answer = self.wire.ask("GET", url, self.where, good=(200,), limit=_MAX_ANSWER)
            try:
                page = json.loads(answer.body)
                yield from ((str(entry["id"]), str(entry["title"])) for entry in page if COMMIT.fullmatch(str(entry["id"])))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise FormatError(self.where, "the hub does not answer with a list of commits") from error
            following = re.match(r'\s*<([^>]*)>\s*;\s*rel="?next', answer.headers.get("link", ""))
            url = resolved(answer.url, following[1], self.where) if following else None

    @contextmanager
    def file(self, commit: str, path: str, start: int = 0) -> Iterator[Body]:
        """The bytes of a file of a commit, from `start` on if the hub knows ranges (206), else all (200)."""
        where = f"{self.where}: {path}"
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self.wire.stream(self._resolve(commit, path), where, headers=headers) as body:
            _check_commit(body.headers, commit, where)
            yield body

    def small(self, commit: str, path: str, limit: int) -> bytes:
        """A whole file of a commit, of at most `limit` bytes."""
        where = f"{self.where}: {path}"
        answer = self.wire.ask("GET", self._resolve(commit, path), where, good=(200,), limit=limit)
        _check_commit(answer.headers, commit, where)
        return answer.body

    # ---- writing

    def create(self, *, private: bool = False) -> bool:
        """Make the repository as huggingface_hub does, which says nothing of who may read it by default; whether it is new."""
        organization, name = self.repo.split("/")
        body = _dump({"name": name, "organization": organization, **({"visibility": "private"} if private else {})})
        return self._post(f"{self.endpoint}/api/repos/create", body, good=(200, 201, 409)).status != 409

    def branch(self, name: str, start: str) -> None:
        """Make a branch at a commit; ConflictError when there is one."""
        url = f"{self._models}/branch/{quote(name, safe='')}"
        if self._post(url, _dump({"startingPoint": start}), good=(200, 201, 409)).status == 409:
            raise ConflictError(f"{self.where}@{name}", "somebody else made this branch meanwhile", "Push again")

    def drop_branch(self, name: str) -> None:
        """Remove a branch."""
        self.wire.ask("DELETE", f"{self._models}/branch/{quote(name, safe='')}", self.where, good=(200, 204, 404))

    def modes(self, revision: str, files: Mapping[str, bytes]) -> set[str]:
        """Which of these files the hub wants kept as large ones."""
        asked = [
            {"path": path, "size": len(data), "sample": base64.b64encode(data[:_SAMPLE]).decode()}
            for path, data in files.items()
        ]
        large: set[str] = set()
        for n in range(0, len(asked), 256):
            url = f"{self._models}/preupload/{quote(revision, safe='')}"
            answer = self._post(url, _dump({"files": asked[n : n + 256]}))
            found = parse_json(answer.body, self.where).get("files")
            for entry in found if isinstance(found, list) else []:
                if isinstance(entry, dict) and entry.get("uploadMode") == "lfs":
                    large.add(str(entry.get("path")))
        return {path for path in large if files.get(path)}  # an empty file is never a large one

    def batch(self, digest: Digest, size: int) -> Mapping[str, Any] | None:
        """How a large file is to be sent (git-lfs, `docs/api/batch.md`); None where the hub has it."""
        body = {
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": [{"oid": digest[7:], "size": size}],
            "hash_algo": "sha256",
        }
        answer = self._post(f"{self.endpoint}/{self.repo}.git/info/lfs/objects/batch", _dump(body), headers=_LFS)
        found = parse_json(answer.body, self.where).get("objects")
        entry = found[0] if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict) else {}
        if isinstance(error := entry.get("error"), dict):
            raise RemoteError(self.where, f"the hub does not take a file of {size} bytes: {str(error.get('message'))[:200]}")
        if entry.get("oid") != digest[7:]:
            raise RemoteError(self.where, "the hub does not say how a large file is sent")
        actions = entry.get("actions")
        return actions if isinstance(actions, dict) and "upload" in actions else None

    def commit(self, branch: str, parent: str, title: str, operations: Sequence[Mapping[str, Any]]) -> str:
        """One commit on a branch that still is at `parent`; its id. ConflictError when it isn't."""
        header = {"key": "header", "value": {"summary": title, "description": "", "parentCommit": parent}}
        body = b"".join(_dump(line) + b"\n" for line in (header, *operations))
        answer = self._post(f"{self._models}/commit/{quote(branch, safe='')}", body, headers=_NDJSON)
        oid = parse_json(answer.body, self.where).get("commitOid")
        if not isinstance(oid, str) or not COMMIT.fullmatch(oid):
            raise RemoteError(self.where, "the hub does not say which commit was made")
        return oid

    def _post(self, url: str, body: bytes, *, good: Sequence[int] = (200, 201), headers: Mapping[str, str] = _JSON) -> Answer:
        return self.wire.ask("POST", url, self.where, good=good, headers=headers, body=body, limit=_MAX_ANSWER)

    def _resolve(self, commit: str, path: str) -> str:
        return f"{self.endpoint}/{self.repo}/resolve/{commit}/{quote(path)}"

    def _object(self, method: str, url: str, where: str, *, limit: int = _MAX_ANSWER) -> dict[str, Any]:
        answer = self.wire.ask(method, url, where, good=(200,), limit=limit)
        try:
            return parse_json(answer.body, where)
        except FormatError as error:
            raise RemoteError(where, f"{self.endpoint} does not answer as a hub does", "Is HF_ENDPOINT right?") from error


def _check_commit(headers: Mapping[str, str], commit: str, where: str) -> None:
    said = headers.get("x-repo-commit", commit)
    if said != commit:
        raise IntegrityError(where, f"the hub sends it of another commit, {said[:60]}", "Try again")


def _entry(entry: Mapping[str, Any]) -> Entry:
    lfs = entry.get("lfs")
    large = lfs if isinstance(lfs, dict) else {}
    size, digest, oid = large.get("size", entry.get("size")), large.get("sha256"), entry.get("blobId")
    return Entry(
        size if isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 else None,
        f"sha256:{digest}" if isinstance(digest, str) and _SHA256.fullmatch(digest) else None,
        oid if isinstance(oid, str) and COMMIT.fullmatch(oid) else None,
    )


def _named(value: object) -> dict[str, str]:
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    pairs = [(entry.get("name"), entry.get("targetCommit")) for entry in entries]
    return {
        name: commit
        for name, commit in pairs
        if isinstance(name, str) and name and name.isprintable() and isinstance(commit, str) and COMMIT.fullmatch(commit)
    }


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
