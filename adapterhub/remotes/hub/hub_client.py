"""The address of a repository on a hub, and a client that reads the repository.

Reads do not go through huggingface_hub. Importing its `HfApi` takes 0.2 s, so with it a pull that has nothing to do took 0.41 s
instead of 0.20, and `list` 0.38 instead of 0.16 (medians on loopback, huggingface_hub 2.4.0); and its downloads are not
verified. The requests are those of its `HfApi.model_info`, `list_repo_refs` and `list_repo_commits`. All writes go through it:
see `writer`.

Answers are untrusted until checked: a commit is 40 hexadecimal digits, a size is a number, a name is text. The token is sent
only to the hub's own origin, but with every request: to an anonymous client, a private repository does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from itertools import islice
from typing import Any, Self
from urllib.parse import quote

from adapterhub.bases.hub_address import MAIN, SCHEME, HubPath
from adapterhub.digest import Digest, is_hex, parse_digest
from adapterhub.http.client import PAUSES, Client
from adapterhub.http.http_errors import DeniedError
from adapterhub.http.responses import Body, Response
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub.ref import parse_prefix
from adapterhub.registry import withdrawals
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RemoteError,
    UsageError,
)
from adapterhub_converters.lazy_dataclass import dataclass

COMMIT = 40  # hexadecimal digits
MAX_ANSWER = 4 << 20  # bytes
LOGIN = "Set HF_TOKEN, or log in with `hf auth login`"
_MAX_PAGES = 20
_SCHEMES = {"hf": "", "hub+https": "https", "hub+http": "http"}
_HOST = safe_regex.Pattern(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?|\[[0-9a-f:.]+\](:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository on a hub, optionally at a version: a branch, tag or commit (`tag`), or a digest.

    `hf://org/name[@revision]` and `hf://org/name@sha256:…` are on the hub that HF_ENDPOINT names; their `endpoint` is empty.
    `hub+https://HOST/org/name` is on another hub with the same API. A plain `https://` address is one of files, for a base
    model.
    """

    scheme: str
    endpoint: str
    name: str
    tag: str | None = None
    digest: Digest | None = None

    mark = "@"  # before a version

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Parse an address.

        Raises:
            UsageError: It is invalid. The message never repeats a password.
        """
        scheme, _, remainder = text.partition("://")
        scheme, host = scheme.lower(), ""
        if _SCHEMES.get(scheme):
            host, _, remainder = remainder.partition("/")
            if "@" in host:
                redacted = f"{scheme}://…@{host.rpartition('@')[2]}/{remainder}"
                raise UsageError(redacted, "credentials in an address end up in logs", "Remove them; use HF_TOKEN")
            if not _HOST.fullmatch(host):
                raise UsageError(text, f"invalid host {host[:80]!r}", f"Write it like {scheme}://hub.example/org/name")
        # Split off a digest first: its colon is not allowed in a revision.
        repo, at, digest = remainder.partition("@sha256:")
        path_on_hub = HubPath.parse(SCHEME + repo)
        if path_on_hub.path or "/" not in path_on_hub.repo:
            hint = "Write it like hf://org/name or hf://org/name@revision"
            raise UsageError(text, "an adapter on a hub is a repository, org/name", hint)
        if at and "@" in repo:
            raise UsageError(text, "both a revision and a digest", "Remove one of them")
        return cls(
            scheme,
            f"{_SCHEMES[scheme]}://{host}" if host else "",
            path_on_hub.repo,
            path_on_hub.revision if "@" in repo else None,
            parse_prefix(digest, text) if at else None,
        )

    @property
    def host(self) -> str:
        """The host, or `hf`."""
        return self.endpoint.partition("://")[2] or "hf"

    @property
    def owner(self) -> str:
        """The endpoint."""
        return self.endpoint.lower()

    @property
    def reference(self) -> str:
        """The digest, else the revision, else `main`."""
        return self.digest or self.tag or MAIN

    @property
    def login(self) -> str:
        """The address to log in at; empty for the user's own hub, whose logins belong to huggingface_hub."""
        return f"{self.scheme}://{self.host}" if self.endpoint else ""

    @property
    def title(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def repository(self) -> str:
        """The address without a version."""
        host = f"{self.host}/" if self.endpoint else ""
        return f"{self.scheme}://{host}{self.name}"

    @property
    def version(self) -> str:
        """The address with its version, `main` by default."""
        return self.with_reference(self.reference)

    def with_reference(self, reference: str) -> str:
        """Return the address with another version."""
        return f"{self.repository}@{quote(reference, safe=':')}"

    def __str__(self) -> str:
        return self.version if self.tag or self.digest else self.repository


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit: its size in bytes, its digest if it is a large file, and git's name of the blob (`oid`)."""

    size: int | None
    digest: Digest | None
    oid: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """A commit and its files by path; the paths are not checked.

    Attributes:
        ours: The hub runs adapterhub: a version has the same files there as everywhere, so no card is completed or written.
        digest: The digest of the version that the commit is, if the hub tells it, as one that runs adapterhub does.
    """

    commit: str
    files: Mapping[str, Entry]
    ours: bool = False
    digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits on how much of a repository is held in memory.

    Attributes:
        listing: Maximum size in bytes of the answer that lists the files.
        plain: Maximum total size in bytes of the files without a digest in the listing; they are read to compute it.
    """

    listing: int = 64_000_000
    plain: int = 256 << 20


COMMAND_BOUNDS = Bounds()
"""Limits for a command, which reads one repository at a time."""


@dataclass(frozen=True, slots=True)
class Refs:
    """The branches and tags of a repository, each with its commit."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


class HubWire(Client):
    """An HTTP connection to a hub, which knows the error codes of its API."""

    @classmethod
    def open(
        cls,
        endpoint: str,
        token: str | None,
        pauses: Sequence[float] = PAUSES,
        proxy: ProxyOf = no_proxy,
        login_host: str = "",
    ) -> Self:
        """Open a connection that sends a token only to the hub's origin; `login_host` is as in `Client`."""
        authorizations = {"": f"Bearer {token}"} if token else {}
        hint, secrets = "" if login_host else LOGIN, [token] if token else []
        return cls(
            endpoint, None, hint, lambda: secrets, pauses, proxy=proxy, authorizations=authorizations, login_host=login_host
        )

    def clean(self, text: str) -> str:
        """Return `text` as one printable line of at most 200 characters, or an empty one if it contains the token."""
        line = "".join(char if char.isprintable() else " " for char in text[:200]).rstrip(". ")
        return line if self.unless_secret(text) else ""

    def _refusal(self, response: Response, location: str) -> Exception:
        code = response.headers.get("x-error-code", "")
        anonymous = not self.authorizations
        # A hub answers 401 or 403 for repositories that do not exist, so that nobody can probe for private ones.
        if code in ("RepoNotFound", "RevisionNotFound", "EntryNotFound") and response.status in (401, 403, 404):
            kind = {"RepoNotFound": "repository", "RevisionNotFound": "revision"}.get(code, "file")
            hint = f"A private one needs a login. {self.login_hint}".rstrip() if anonymous else ""
            return NotFoundError(location, f"no such {kind} on the hub", hint)
        if code == "GatedRepo":
            hint = f"Request access on its page{f'. {self.login_hint}' if anonymous and self.login_hint else ''}"
            return DeniedError(location, f"HTTP {response.status}: a gated repository", hint)
        if response.status == 401 and not anonymous:
            return DeniedError(
                location,
                "HTTP 401: the token was refused, or there is no such repository",
                self.login_hint,
                host=self.login_host,
                refuses_login=True,
            )
        details = self._details(response)
        errors: dict[int, AdapterhubError] = {
            409: ConflictError(location, f"exists already{details}", "Push again"),
            410: withdrawals.error_elsewhere(location, details),
            412: ConflictError(location, "somebody else committed in the meantime", "Review their commit, then push again"),
        }
        return errors.get(response.status) or super()._refusal(response, location)

    def _details(self, response: Response) -> str:
        """Return the error message of an answer: `X-Error-Message`, else `error` or the first of `errors` in its body."""
        text = response.headers.get("x-error-message", "")
        if not text:
            try:
                document = json_file.parse_object(response.body, "")
                text = str(document.get("error") or document["errors"][0]["message"])
            except (FormatError, LookupError, TypeError):
                return ""
        line = self.clean(text)
        return f": {line}" if line else ""


@dataclass
class HubClient:
    """A read-only client of one repository on a hub; the caller closes its `wire`."""

    endpoint: str
    repo: str
    location: str
    token: str | None = field(default=None, repr=False)
    pauses: Sequence[float] = PAUSES
    proxy: ProxyOf = no_proxy
    login_host: str = ""
    bounds: Bounds = COMMAND_BOUNDS

    def __post_init__(self) -> None:
        self.wire = HubWire.open(self.endpoint, self.token, self.pauses, self.proxy, self.login_host)
        self.url = f"{self.endpoint}/api/models/{self.repo}"

    def listing(self, revision: str) -> Listing:
        """Return the commit that a revision points at, with its files."""
        label = f"{self.location}@{revision}"
        url = f"{self.url}/revision/{quote(revision, safe='')}?blobs=true"
        document = self._get_object(url, label, limit=self.bounds.listing)
        commit, siblings = document.get("sha"), document.get("siblings")
        entries: list[Any] = siblings if isinstance(siblings, list) else [None]
        named = all(isinstance(entry, dict) and isinstance(entry.get("rfilename"), str) for entry in entries)
        if not named or not isinstance(commit, str) or not is_hex(commit, COMMIT):
            raise self._not_a_hub(label)
        if is_hex(revision, COMMIT) and commit != revision:
            # A full commit id names its content, so a hub must not answer it with another commit.
            raise IntegrityError(label, f"the hub answers with another commit, {commit}")
        own_fields = document.get("adapterhub")
        digest = own_fields.get("digest") if isinstance(own_fields, dict) else None
        files = {entry["rfilename"]: _parse_entry(entry) for entry in entries}
        return Listing(commit, files, "adapterhub" in document, parse_digest(digest, label) if digest else None)

    def refs(self) -> Refs:
        """Return the branches and tags."""
        document = self._get_object(f"{self.url}/refs", self.location)
        return Refs(*(_commits_by_name(document.get(kind)) for kind in ("branches", "tags")))

    def commit_titles(self, revision: str) -> Iterator[tuple[str, str]]:
        """Yield each commit reachable from a revision with its title, newest first."""
        url = f"{self.url}/commits/{quote(revision, safe='')}"
        # A hub could link its pages in a circle: stop after 20.
        for response in islice(self.wire.pages(url, self.location, limit=MAX_ANSWER), _MAX_PAGES):
            try:
                page = json_file.parse(response.body, self.location)
                yield from ((str(entry["id"]), str(entry["title"])) for entry in page if is_hex(str(entry["id"]), COMMIT))
            except (FormatError, KeyError, TypeError) as error:
                raise FormatError(self.location, "the hub's answer is not a list of commits") from error

    @contextmanager
    def open_file(self, commit: str, path: str, start: int = 0) -> Iterator[Body]:
        """Open a file for reading, from `start` on if the hub supports ranges (206), else from the beginning (200)."""
        label = f"{self.location}: {path}"
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self.wire.stream(self._file_url(commit, path), label, headers=headers) as body:
            _check_commit(body.headers, commit, label)
            yield body

    def read_small_file(self, commit: str, path: str, limit: int) -> bytes:
        """Return the content of a file of at most `limit` bytes."""
        label = f"{self.location}: {path}"
        response = self.wire.request("GET", self._file_url(commit, path), label, good=(200,), limit=limit)
        _check_commit(response.headers, commit, label)
        return response.body

    def _file_url(self, commit: str, path: str) -> str:
        return f"{self.endpoint}/{self.repo}/resolve/{commit}/{quote(path)}"

    def _get_object(self, url: str, location: str, *, limit: int = MAX_ANSWER) -> dict[str, Any]:
        response = self.wire.request("GET", url, location, good=(200,), limit=limit)
        try:
            return json_file.parse_object(response.body, location)
        except FormatError as error:
            raise self._not_a_hub(location) from error

    def _not_a_hub(self, location: str) -> RemoteError:
        """Return the error for an answer that does not follow the API of hubs."""
        return RemoteError(location, f"{self.endpoint} does not answer like a hub", "Check HF_ENDPOINT")


def _check_commit(headers: Mapping[str, str], commit: str, location: str) -> None:
    """Raise an IntegrityError if an answer names another commit than `commit`."""
    answered_commit = headers.get("x-repo-commit", commit)
    if answered_commit != commit:
        raise IntegrityError(location, f"the hub sends the file of another commit, {answered_commit[:60]}", "Try again")


def _parse_entry(entry: Mapping[str, Any]) -> Entry:
    """Return the file that an entry of `siblings` describes, without the values that are malformed."""
    lfs = entry.get("lfs")
    large = lfs if isinstance(lfs, dict) else {}
    size, digest, oid = large.get("size", entry.get("size")), large.get("sha256"), entry.get("blobId")
    return Entry(
        size if json_file.is_integer(size) and 0 <= size < 2**63 else None,
        f"sha256:{digest}" if isinstance(digest, str) and is_hex(digest) else None,
        oid if isinstance(oid, str) and is_hex(oid, COMMIT) else None,
    )


def _commits_by_name(value: object) -> dict[str, str]:
    """Return the commit of each well-formed branch or tag in a list from the hub, by name."""
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    pairs = [(entry.get("name"), entry.get("targetCommit")) for entry in entries]
    return {
        name: commit
        for name, commit in pairs
        if isinstance(name, str) and name and name.isprintable() and isinstance(commit, str) and is_hex(commit, COMMIT)
    }
