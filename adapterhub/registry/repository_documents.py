"""What a hub keeps of a repository besides its versions: branches, commits, proposals, other manifests and their tags.

A document is small JSON, with the commits, manifests and proposals of the past in pages (`paged_mapping`), so that n commits
write O(n) bytes. Versions and their tags stay in the log of refs; these documents add what other protocols need. A repository
on the Hugging Face Hub has commits of incomplete trees, branches and a visibility; an OCI repository has manifests that are
not adapters, such as signatures. `repository_records` stores them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, field, replace
from typing import Any

from adapterhub.digest import Digest, is_hex, parse_digest
from adapterhub.store.store_files import MAX_DOCUMENT
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import paged_mapping
from .paged_mapping import Pages

MAIN = "main"
# Of documents, of those of repositories with pages, and of those with proposals, which an earlier release would drop.
_VERSION, _PAGED_VERSION, _PROPOSALS_VERSION = 1, 2, 3
_PAGED = ("commits", "manifests", "proposals")
OPEN, ACCEPTED, REFUSED, WITHDRAWN = "open", "accepted", "refused", "withdrawn"
"""States of a proposal."""


@dataclass(frozen=True, slots=True)
class OtherManifest:
    """A manifest that is not a version: an image, an index, a signature.

    Attributes:
        subject: The digest (sha256 or sha512) of the manifest that it is about, which need not exist here; empty without one.
        blobs: The blobs it refers to, including the manifests of an index; kept as long as the manifest.
    """

    media_type: str
    size: int
    artifact_type: str = ""
    subject: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    blobs: tuple[Digest, ...] = ()


@dataclass(frozen=True, slots=True)
class BranchHead:
    """The position of a branch.

    Attributes:
        commit: The id of its commit.
        after: The commit id of the version that was `latest` when the branch moved there; empty if there was none.
    """

    commit: str
    after: str = ""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A commit that somebody has proposed for `main`.

    Attributes:
        commit: The id of the commit, which the repository keeps while the proposal is open.
        author: The account that has opened it.
        opened: ISO 8601 in UTC.
        objection: Why the policy would have refused it when it was opened; empty if it would not.
        state: One of OPEN, ACCEPTED, REFUSED, WITHDRAWN.
        closed_by: The account that has closed it; empty while it is open, as all that follow.
        closed: ISO 8601 in UTC.
        reason: Why.
        became: The id of the commit on `main` that it became.
        co_authors: Other accounts that have added commits to it.
    """

    commit: str
    author: str
    title: str
    opened: str
    objection: str = ""
    state: str = OPEN
    closed_by: str = ""
    closed: str = ""
    reason: str = ""
    became: str = ""
    co_authors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Repository:
    """The state of a repository.

    Attributes:
        private: Whether it is hidden from everybody without a role in its namespace.
        created: ISO 8601 in UTC.
        heads: Branch to commit. `main` follows `latest` if that has moved since the head was set, or if there is no head.
        commits: Commit id, 40 hexadecimal digits, to the digest of its document; oldest first.
        manifests: Manifests that are not versions, by digest.
        tags: Tags of those manifests, to the digest (sha256 or sha512) that each tag was set with.
        proposals: Proposals by their number as a text, oldest first.
        moved_to: The name it was moved to; empty if it was not moved.
        moved_from: The name it is being moved from; empty otherwise. It is invisible until that name redirects here.
        pages: What its document has in pages, by the name of the field; those of an earlier state while it is changed.
    """

    private: bool = False
    created: str = ""
    heads: Mapping[str, BranchHead] = field(default_factory=dict)
    commits: Mapping[str, Digest] = field(default_factory=dict)
    manifests: Mapping[Digest, OtherManifest] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    proposals: Mapping[str, Proposal] = field(default_factory=dict)
    moved_to: str = ""
    moved_from: str = ""
    pages: Mapping[str, Pages] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_bare(self) -> bool:
        """Whether it has nothing but its visibility, as after its name was removed."""
        return self == Repository(private=self.private, created=self.created)

    def dump(self, before: Repository | None) -> tuple[bytes, Repository, dict[Digest, bytes]]:
        """Return the document, the repository with its pages, and the blobs of these that the state before does not have."""
        before = before or Repository()
        commit_pages, manifest_pages, proposal_pages = (before.pages.get(name, Pages()) for name in _PAGED)
        splits = {
            "commits": paged_mapping.split(self.commits, before.commits, commit_pages),
            "manifests": paged_mapping.split(self.manifests, before.manifests, manifest_pages, asdict),
            "proposals": paged_mapping.split(self.proposals, before.proposals, proposal_pages, asdict),
        }
        pages = {name: split_mapping.pages for name, split_mapping in splits.items()}
        document = asdict(replace(self, commits={}, manifests={}, proposals={}, pages={}))
        document |= {name: split_mapping.rest for name, split_mapping in splits.items()}
        document["pages"] = {name: field_pages.last for name, field_pages in pages.items() if field_pages.last}
        new_blobs = {digest: raw for split_mapping in splits.values() for digest, raw in split_mapping.new_blobs.items()}
        is_divided = any(field_pages.blobs for field_pages in pages.values())
        version = _PROPOSALS_VERSION if self.proposals else _PAGED_VERSION if is_divided else _VERSION
        raw = _dump_document(document, version=version)
        return raw, replace(self, pages=pages), new_blobs

    @property
    def pages_size(self) -> int:
        """The bytes of its pages."""
        return sum(field_pages.size for field_pages in self.pages.values())

    @classmethod
    def parse(cls, raw: bytes, location: str, read: Callable[[Digest], bytes]) -> Repository:
        """Parse a document whose pages `read` returns; FormatError if it is not that of a repository."""
        document = {"proposals": {}, **_parse_document(raw, location, _PROPOSALS_VERSION)}
        try:
            last_pages, pages = dict(document.get("pages", {})), {}
            for name in _PAGED:
                last = str(last_pages.get(name, ""))
                document[name], pages[name] = paged_mapping.join(document[name], last, read, location, MAX_DOCUMENT)
            return cls(
                pages=pages,
                private=bool(document["private"]),
                created=str(document["created"]),
                heads={
                    str(name): BranchHead(
                        _parse_commit_id(head["commit"], location),
                        _parse_commit_id(head["after"], location) if head["after"] else "",
                    )
                    for name, head in document["heads"].items()
                },
                commits={
                    _parse_commit_id(key, location): parse_digest(digest, location)
                    for key, digest in document["commits"].items()
                },
                manifests={
                    parse_digest(key, location): _parse_manifest(manifest, location)
                    for key, manifest in document["manifests"].items()
                },
                tags={str(tag): str(digest) for tag, digest in document["tags"].items()},
                proposals={
                    str(int(number)): _parse_proposal(proposal, location) for number, proposal in document["proposals"].items()
                },
                moved_to=str(document["moved_to"]),
                moved_from=str(document.get("moved_from", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(location, f"not the document of a repository ({error})") from error


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A commit: a tree of files, its author and its message.

    Attributes:
        files: Path to digest and size in bytes.
        became: The digest of the version that the tree became; empty for an incomplete tree.
    """

    files: Mapping[str, tuple[Digest, int]]
    parent: str = ""
    title: str = ""
    description: str = ""
    author: str = ""
    time: str = ""
    became: Digest = ""

    def dump(self) -> bytes:
        """Return the bytes of the document; RefusedError if it would be too large to be read again."""
        raw = _dump_document(asdict(self))
        if len(raw) > MAX_DOCUMENT:
            problem = f"the names of {len(self.files)} files make a document of {len(raw):,} bytes"
            raise RefusedError(
                "commit", f"{problem}, over the {MAX_DOCUMENT:,} of a commit", "Use shorter names, or fewer files"
            )
        return raw

    @classmethod
    def parse(cls, raw: bytes, location: str) -> CommitRecord:
        """Parse a document; FormatError if it is not that of a commit."""
        document = _parse_document(raw, location)
        try:
            files = {
                str(path): (parse_digest(digest, location), int(size)) for path, (digest, size) in document.pop("files").items()
            }
            texts = {key: str(document[key]) for key in ("parent", "title", "description", "author", "time", "became")}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(location, f"not the document of a commit ({error})") from error
        return cls(files, **texts)


def commit_id(digest: Digest) -> str:
    """Return the commit id, 40 digits as in git, for the digest of a commit's document or of a version's manifest."""
    return digest.removeprefix("sha256:")[:40]


def head_of(repository: Repository | None, branch: str, latest: str) -> str:
    """Return the commit of a branch; empty if `main` is at the version `latest`, and for a branch that does not exist.

    Args:
        repository: Its state; None if there is none.
        branch: The name of the branch.
        latest: The commit of the version `latest`; empty without one.
    """
    head = repository.heads.get(branch) if repository else None
    return head.commit if head and (branch != MAIN or head.after == latest) else ""


def with_head(repository: Repository, branch: str, commit: str, *, after: str) -> Repository:
    """Return the repository with a branch at a commit."""
    return replace(repository, heads={**repository.heads, branch: BranchHead(commit, after)})


def without_head(repository: Repository, branch: str) -> Repository:
    """Return the repository without a branch."""
    return replace(repository, heads={name: head for name, head in repository.heads.items() if name != branch})


def with_manifest(repository: Repository, digest: Digest, manifest: OtherManifest, tags: Mapping[str, str]) -> Repository:
    """Return the repository with a manifest that is not a version, and with tags that point to its sha256 or sha512 digest."""
    return replace(repository, manifests={**repository.manifests, digest: manifest}, tags={**repository.tags, **tags})


def without_manifest(repository: Repository, digest: Digest, sha512: str = "") -> Repository:
    """Return the repository without a manifest that is not a version, and without its tags.

    Args:
        repository: The repository.
        digest: The sha256 digest of the manifest.
        sha512: Its sha512 digest, which tags may point to as well; empty if there is none.
    """
    manifests = {key: manifest for key, manifest in repository.manifests.items() if key != digest}
    tags = {tag: target for tag, target in repository.tags.items() if target not in (digest, sha512)}
    return replace(repository, manifests=manifests, tags=tags)


def open_proposals(repository: Repository | None) -> dict[str, Proposal]:
    """Return the open proposals of a repository by their numbers."""
    proposals = repository.proposals if repository else {}
    return {number: proposal for number, proposal in proposals.items() if proposal.state == OPEN}


def without_tags(repository: Repository, tags: Collection[str]) -> Repository:
    """Return the repository without some tags of manifests that are not versions."""
    return replace(repository, tags={tag: digest for tag, digest in repository.tags.items() if tag not in tags})


def _parse_manifest(document: Any, location: str) -> OtherManifest:
    subject = str(document["subject"])
    annotations = {str(key): str(value) for key, value in document["annotations"].items()}
    blobs = tuple(parse_digest(blob, location) for blob in _require_list(document["blobs"]))
    return OtherManifest(
        str(document["media_type"]), int(document["size"]), str(document["artifact_type"]), subject, annotations, blobs
    )


def _parse_proposal(document: Any, location: str) -> Proposal:
    texts = {key: str(document[key]) for key in ("author", "title", "opened", "objection", "closed_by", "closed", "reason")}
    state = document["state"]
    if state not in (OPEN, ACCEPTED, REFUSED, WITHDRAWN):
        raise FormatError(location, f"{str(state)[:40]!r} is not the state of a proposal")
    became = _parse_commit_id(document["became"], location) if document["became"] else ""
    co_authors = tuple(str(account) for account in document.get("co_authors", ()))
    commit = _parse_commit_id(document["commit"], location)
    return Proposal(commit, state=state, became=became, co_authors=co_authors, **texts)


def _require_list(value: Any) -> Iterable[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _parse_commit_id(text: Any, location: str) -> str:
    if not isinstance(text, str) or not is_hex(text, 40):
        raise FormatError(location, f"{str(text)[:80]!r} is not the id of a commit")
    return text


def _dump_document(document: dict[str, Any], version: int = _VERSION) -> bytes:
    document = {"version": version, **document}
    # Older documents lack these fields: leaving them out keeps their bytes, and with them their digests, unchanged.
    for name in ("moved_from", "pages", "proposals"):
        if not document.get(name, "-"):
            del document[name]
    # Always in the same form, so that the same state has the same digest.
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def _parse_document(raw: bytes, location: str, last_version: int = _VERSION) -> dict[str, Any]:
    document = json_file.parse_object(raw, location)
    version = document.pop("version", None)
    if isinstance(version, int) and version > last_version:
        raise RefusedError(
            location,
            f"version {version} is newer than {last_version}, the last supported",
            "Upgrade adapterhub",
            code="newer-store",
        )
    return document
