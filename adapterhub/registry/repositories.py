"""What a hub keeps of a repository besides its versions: branches, commits, other manifests and their tags.

    hub/<ns>/<name>/<seq>.json    one file per move: `push` points the name at a document, `delete` removes the repository

The document is a blob, small JSON that each change writes anew; a commit is a blob too. Versions and their tags stay where they
are, in the log of refs: this is what the protocols of others need beyond that. A repository on the Hugging Face Hub has commits
of incomplete trees, branches and a visibility; an OCI repository has manifests that are no adapters, such as signatures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from adapterhub.digest import Digest, is_hex, parse_digest
from adapterhub.store import named_documents
from adapterhub.store.named_documents import NamedDocument
from adapterhub.store.store import HUB, Entry, Store
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError

from .moves import now
from .registry import Registry

MAIN = "main"
MAX_DOCUMENT = 4 << 20  # bytes
_VERSION = 1


@dataclass(frozen=True, slots=True)
class OtherManifest:
    """A manifest that is no version: an image, an index, a signature.

    Attributes:
        subject: The digest of the manifest that it is about, by sha256 or sha512, be that there or not; empty without one.
        blobs: What it refers to, manifests of an index among them; kept as long as the manifest.
    """

    media_type: str
    size: int
    artifact_type: str = ""
    subject: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    blobs: tuple[Digest, ...] = ()


@dataclass(frozen=True, slots=True)
class Head:
    """Where a branch is: a commit, and that of the version that was `latest` when it was moved there, if there was one."""

    commit: str
    after: str = ""


@dataclass(frozen=True, slots=True)
class Repository:
    """The state of a repository.

    Attributes:
        private: Hide it from those who have no role in its namespace.
        created: ISO 8601 in UTC.
        heads: Branch to commit. `main` is at `latest` if that has moved since its head was set, or if it has none.
        commits: Id, 40 hexadecimal digits, to the digest of its document; the oldest first.
        manifests: Manifests that are no versions, by digest.
        tags: Tags of those, to the digest that each was given with, by sha256 or sha512.
        moved_to: The name that it was moved to.
        moved_from: The name that it is being moved from: until that leads here, nobody sees it; empty otherwise.
    """

    private: bool = False
    created: str = ""
    heads: Mapping[str, Head] = field(default_factory=dict)
    commits: Mapping[str, Digest] = field(default_factory=dict)
    manifests: Mapping[Digest, OtherManifest] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    moved_to: str = ""
    moved_from: str = ""

    @property
    def is_bare(self) -> bool:
        """Whether it has nothing but its visibility, as of a name that was removed."""
        return self == Repository(private=self.private, created=self.created)

    def dump(self) -> bytes:
        """The bytes of the document."""
        return _dump(self)

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Repository:
        """The state in a document; FormatError for anything else."""
        document = _parsed(raw, where)
        try:
            return cls(
                private=bool(document["private"]),
                created=str(document["created"]),
                heads={
                    str(name): Head(
                        _commit_id(head["commit"], where), _commit_id(head["after"], where) if head["after"] else ""
                    )
                    for name, head in document["heads"].items()
                },
                commits={_commit_id(key, where): parse_digest(digest, where) for key, digest in document["commits"].items()},
                manifests={parse_digest(key, where): _manifest(one, where) for key, one in document["manifests"].items()},
                tags={str(tag): str(digest) for tag, digest in document["tags"].items()},
                moved_to=str(document["moved_to"]),
                moved_from=str(document.get("moved_from", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(where, f"not the document of a repository ({error})") from error


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A commit: a tree of files, and who made it.

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
        """The bytes of the document; RefusedError for one that would be too large to be read again."""
        raw = _dump(self)
        if len(raw) > MAX_DOCUMENT:
            what = f"the names of {len(self.files)} files make a document of {len(raw):,} bytes"
            raise RefusedError("commit", f"{what}, over the {MAX_DOCUMENT:,} of a commit", "Use shorter names, or fewer files")
        return raw

    @classmethod
    def parse(cls, raw: bytes, where: str) -> CommitRecord:
        """The commit in a document; FormatError for anything else."""
        document = _parsed(raw, where)
        try:
            files = {
                str(path): (parse_digest(digest, where), int(size)) for path, (digest, size) in document.pop("files").items()
            }
            texts = {key: str(document[key]) for key in ("parent", "title", "description", "author", "time", "became")}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(where, f"not the document of a commit ({error})") from error
        return cls(files, **texts)


def commit_id(digest: Digest) -> str:
    """The id of the commit with this document, or of the commit of the version with this manifest: 40 digits, as git has."""
    return digest.removeprefix("sha256:")[:40]


class Repositories:
    """The repositories of a registry. One object keeps what it has read, so that a second look costs one `stat`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: dict[str, tuple[NamedDocument, Repository | None]] = {}

    @property
    def _store(self) -> Store:
        return self._registry.store

    def get(self, name: str) -> Repository | None:
        """The state of a repository; None if there is none, be there versions of that name or not."""
        return self._state(name)[1]

    def current(self, name: str) -> tuple[Digest, Repository | None]:
        """The state of a repository, and the digest of the log's last entry; empty for an empty log."""
        document, repository = self._state(name)
        return document.head, repository

    def change(self, name: str, edit: Callable[[Repository], Repository]) -> Repository:
        """Change a repository, which is created if it is missing; `edit` is called again when another writer was first."""
        made = Repository()

        def decide(state: NamedDocument) -> Entry | None:
            nonlocal made
            before = self._read(state)
            made = edit(before or Repository(created=now()))
            if made == before:
                return None
            raw = made.dump()
            if len(raw) > MAX_DOCUMENT:
                raise RefusedError(name, "has too many commits or manifests", "Squash its commits, or remove manifests")
            digest, size = self._store.put_bytes(raw)
            self._store.sync_blobs()
            return state.next("push", now(), digest, size)

        with self._store.lease("hub"):
            self._move(name, decide)
        return made

    def remove(self, name: str) -> None:
        """Remove a repository; its versions are the registry's to remove."""
        self._move(name, lambda state: state.next("delete", now()) if state.there else None)

    def names(self) -> list[str]:
        """Every name that there is a repository of, sorted."""
        return [name for name in self._store.log.names(HUB) if self.get(name) is not None]

    def commit(self, repository: Repository, commit: str) -> CommitRecord | None:
        """The commit with an id; None if the repository has none of it."""
        digest = repository.commits.get(commit)
        return None if digest is None else CommitRecord.parse(self._store.read_document(digest, limit=MAX_DOCUMENT), digest)

    def _move(self, name: str, decide: Callable[[NamedDocument], Entry | None]) -> None:
        known = self._state(name)[0]
        named_documents.move(self._store, self._registry.locked, name, decide, log=HUB, known=known)

    def _state(self, name: str) -> tuple[NamedDocument, Repository | None]:
        known = self._known.get(name)
        state = named_documents.current(self._store, name, log=HUB, known=known[0] if known else None)
        if known is None or known[0] is not state:
            known = state, self._read(state)
            if state.entry is not None:  # anybody may ask for any name
                self._known[name] = known
        return known

    def _read(self, state: NamedDocument) -> Repository | None:
        if not state.there or state.entry is None:
            return None
        return Repository.parse(self._store.read_document(state.entry.digest, limit=MAX_DOCUMENT), f"hub/{state.name}")


def needs(store: Store, document: Digest) -> set[Digest]:
    """Return the blobs that a repository needs besides its document: commits with their files, manifests with their blobs."""
    found = Repository.parse(store.read_document(document, limit=MAX_DOCUMENT), document)
    needed: set[Digest] = {*found.commits.values(), *found.manifests}
    for manifest in found.manifests.values():
        needed.update(manifest.blobs)
    for digest in found.commits.values():
        record = CommitRecord.parse(store.read_document(digest, limit=MAX_DOCUMENT), digest)
        needed.update(file for file, _ in record.files.values())
    return needed


def head_of(repository: Repository | None, branch: str, latest: str) -> str:
    """The commit of a branch; empty where `main` is at the version `latest`, and for a branch that does not exist.

    Args:
        repository: Its state, None without one.
        branch: Its name.
        latest: The commit of the version `latest`, empty without one.
    """
    head = repository.heads.get(branch) if repository else None
    return head.commit if head and (branch != MAIN or head.after == latest) else ""


def with_head(repository: Repository, branch: str, commit: str, *, after: str, document: Digest = "") -> Repository:
    """The repository with a branch at a commit, whose document is added."""
    commits = {**repository.commits, commit: document} if document else repository.commits
    return replace(repository, heads={**repository.heads, branch: Head(commit, after)}, commits=commits)


def without_head(repository: Repository, branch: str) -> Repository:
    """The repository without a branch."""
    return replace(repository, heads={name: head for name, head in repository.heads.items() if name != branch})


def with_manifest(repository: Repository, digest: Digest, manifest: OtherManifest, tags: Mapping[str, str]) -> Repository:
    """The repository with a manifest that is no version, and with tags to its digest, by sha256 or sha512."""
    return replace(repository, manifests={**repository.manifests, digest: manifest}, tags={**repository.tags, **tags})


def without_manifest(repository: Repository, digest: Digest, also: str = "") -> Repository:
    """The repository without a manifest that is no version, and without its tags; `also` is its sha512."""
    manifests = {key: manifest for key, manifest in repository.manifests.items() if key != digest}
    tags = {tag: of for tag, of in repository.tags.items() if of not in (digest, also)}
    return replace(repository, manifests=manifests, tags=tags)


def without_tags(repository: Repository, tags: Collection[str]) -> Repository:
    """The repository without some tags of manifests that are no versions."""
    return replace(repository, tags={tag: digest for tag, digest in repository.tags.items() if tag not in tags})


def _manifest(one: Any, where: str) -> OtherManifest:
    subject = str(one["subject"])
    annotations = {str(key): str(value) for key, value in one["annotations"].items()}
    blobs = tuple(parse_digest(blob, where) for blob in _listed(one["blobs"]))
    return OtherManifest(str(one["media_type"]), int(one["size"]), str(one["artifact_type"]), subject, annotations, blobs)


def _listed(value: Any) -> Iterable[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _commit_id(text: Any, where: str) -> str:
    if not isinstance(text, str) or not is_hex(text, 40):
        raise FormatError(where, f"{str(text)[:80]!r} is not the id of a commit")
    return text


def _dump(value: Repository | CommitRecord) -> bytes:
    document = {"version": _VERSION, **asdict(value)}
    if not document.get("moved_from", "-"):
        del document["moved_from"]  # as in documents that were written before there was such a field
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    document = json_file.parse_object(raw, where)
    version = document.pop("version", None)
    if isinstance(version, int) and version > _VERSION:
        raise RefusedError(
            where, f"version {version} is newer than {_VERSION}, the last supported", "Upgrade adapterhub", code="newer-version"
        )
    return document
