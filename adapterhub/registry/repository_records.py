"""A hub's record of each repository (`repository_documents`), in a log of its own.

    hub/<ns>/<name>/<seq>.json    one file per move: `push` points the name at a document, `delete` removes the repository

The document is a blob, rewritten by each change, and so are its pages and its commits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.index import repository_rows
from adapterhub.index.repository_rows import RepositoryRow
from adapterhub.store import named_documents
from adapterhub.store.named_documents import NamedDocument
from adapterhub.store.store import HUB, Entry, Store
from adapterhub.store.store_files import MAX_DOCUMENT
from adapterhub_converters.errors import RefusedError

from .moves import now
from .registry import Registry
from .repository_documents import CommitRecord, Repository, commit_id

ENTRY_SIZE = 512
"""Bytes that an entry of a log is counted as."""


_MAX_STATES = 10_000  # names whose last entry is remembered


class _Step(NamedTuple):
    """The next entry of a log, and the row of the repository after it."""

    entry: Entry
    row: RepositoryRow


class ParsedRepository(NamedTuple):
    """The state of a repository, and the bytes of the document and the pages that it was read from."""

    repository: Repository
    size: int


class Repositories:
    """The repositories of a registry.

    An object remembers the last entries of the logs that it has read, so that looking at one again costs one `stat`.

    Args:
        registry: The registry.
        check_size: Called with a name and the bytes that are about to be written for it; RefusedError if there is no room.
        parsed: Returns the document with a digest, by calling a function that reads it, unless it has a copy.
    """

    def __init__(
        self,
        registry: Registry,
        check_size: Callable[[str, int], object] = lambda _name, _size: None,
        parsed: Callable[[Digest, Callable[[], ParsedRepository]], ParsedRepository] = lambda _digest, read: read(),
    ) -> None:
        self._registry, self.check_size, self._parsed = registry, check_size, parsed
        self._states: dict[str, NamedDocument] = {}
        self._rehearsed_blobs: dict[Digest, bytes] | None = None

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Keep the documents of the block in memory, and forget them at its end; a rehearsal of the registry is around it."""
        states, self._rehearsed_blobs = dict(self._states), {}
        try:
            yield
        finally:
            self._states, self._rehearsed_blobs = states, None

    @property
    def _store(self) -> Store:
        return self._registry.store

    def get(self, name: str) -> Repository | None:
        """Return the state of a repository; None if there is none, whether or not the name has versions."""
        return self._state(name)[1]

    def current(self, name: str) -> tuple[Digest, Repository | None]:
        """Return the digest of the log's last entry, empty for an empty log, and the state of the repository."""
        document, repository = self._state(name)
        return document.head, repository

    def change(self, name: str, edit: Callable[[Repository], Repository], *, has_room: bool = False) -> Repository:
        """Change a repository, creating it if it is missing; `edit` is called again if another writer committed first.

        Each change writes the document anew and new pages, and those before stay until a gc. Room for them is asked for unless
        all becomes smaller, so that a removal is never refused, or the caller has asked before (`has_room`).
        """
        repository = Repository()

        def decide(state: NamedDocument) -> _Step | None:
            nonlocal repository
            before = self._read(state)
            repository = edit(before or Repository(created=now()))
            if repository == before:
                return None
            self._check_names(name, before or Repository(), repository)
            raw, repository, new_blobs = repository.dump(before)
            whole_size, pages_written = len(raw) + repository.pages_size, sum(map(len, new_blobs.values()))
            if whole_size > MAX_DOCUMENT:
                raise RefusedError(name, "has too many commits or manifests", "Squash its commits, or remove manifests")
            size_before = state.entry.size + before.pages_size if state.entry and before else 0
            if not has_room and whole_size >= size_before:
                self.check_size(name, len(raw) + pages_written + ENTRY_SIZE)
            for page in new_blobs.values():
                self._put_bytes(page)
            self._put_bytes(raw)
            # The blobs must be on the disk before the log entry that names them.
            self._store.sync_blobs()
            entry = replace(state.next("push", now(), sha256_bytes(raw), len(raw)), number=pages_written)
            return _Step(entry, RepositoryRow(name, repository.private, repository.moved_from))

        # Until the log entry names the new blob, only the lease keeps a gc from removing it.
        with self._store.lease("hub"):
            self._move(name, decide)
        return repository

    def _check_names(self, name: str, before: Repository, after: Repository) -> None:
        """Refuse a branch, or a tag of another manifest, with the name of a tag that has requirements, unless it follows that.

        A removed name is restored with its record first, as both were.
        """
        gate = self._registry.gate
        for tag in gate.gated_tags():
            head = after.heads.get(tag)
            moved = head is not None and (tag not in before.heads or before.heads[tag].commit != head.commit)
            retagged = tag in after.tags and after.tags[tag] != before.tags.get(tag)
            if (moved or retagged) and not self._registry.ledger.current(name).deleted:
                commit = head.commit if head and not retagged else ""
                gate.check_name(name, tag, lambda digest, commit=commit: commit_id(digest) == commit)  # type: ignore[misc]

    def remove(self, name: str) -> None:
        """Remove a repository, but not its versions: those belong to the registry."""
        removed = RepositoryRow(name, removed=True)
        self._move(name, lambda state: _Step(state.next("delete", now()), removed) if state.exists else None)

    def document(self, name: str) -> NamedDocument:
        """Return the last entry of the log of a repository."""
        return self._state(name)[0]

    def written_bytes(self, name: str, since: str) -> int:
        """Return the bytes of a repository's document and pages, and of those before them that were written since a time."""
        state, repository = self._state(name)
        total = 0
        for seq in range(state.entry.seq if state.entry else 0, 0, -1):
            logged = self._store.log.entry(name, seq, log=HUB)
            if logged is None or (total and logged[0].time < since):
                break
            # Its number is the bytes of its pages.
            total += logged[0].size + logged[0].number
        return total + (repository.pages_size if repository else 0)

    def names(self) -> list[str]:
        """Return the names of all repositories, sorted."""
        return repository_rows.names_after(self._registry.index, "", -1, ())

    def commit(self, repository: Repository, commit: str) -> CommitRecord | None:
        """Return the commit with an id; None if the repository does not have it."""
        digest = repository.commits.get(commit)
        return None if digest is None else CommitRecord.parse(self._store.read_document(digest), digest)

    def _move(self, name: str, decide: Callable[[NamedDocument], _Step | None]) -> None:
        """Commit the entry that `decide` returns for the state of a name, and write the row of the repository with it."""
        known_state, log = self._state(name)[0], self._store.log
        step: _Step | None = None
        pending: Path | None = None

        def decide_entry(state: NamedDocument) -> Entry | None:
            nonlocal step, pending
            step = decide(state)
            # The next process to open the registry finds the file of one that was killed, and brings the row up to the log.
            if step and not pending and repository_rows.row(self._registry.index, name) != step.row:
                pending = log.begin_move(name)
            return step.entry if step else None

        with self._registry.write_lock():
            lock = self._registry.write_lock
            named_documents.move(self._store, lock, name, decide_entry, log=HUB, known_state=known_state)
            if step:
                repository_rows.write(self._registry.index, step.row)
        if pending:
            with suppress(OSError):  # a process that finds the file only reads the log again
                self._store.files.remove(pending)

    def _state(self, name: str) -> tuple[NamedDocument, Repository | None]:
        state = named_documents.current(self._store, name, log=HUB, known_state=self._states.get(name))
        repository = self._read(state)
        # Names without a log are not remembered: anybody may ask for any name.
        if state.entry is not None:
            if len(self._states) >= _MAX_STATES:
                self._states.clear()
            self._states[name] = state
        return state, repository

    def _read(self, state: NamedDocument) -> Repository | None:
        if not state.exists or state.entry is None:
            return None
        digest = state.entry.digest

        def parse() -> ParsedRepository:
            raw = self._read_document(digest)
            repository = Repository.parse(raw, f"hub/{state.name}", self._read_document)
            return ParsedRepository(repository, len(raw) + repository.pages_size)

        return self._parsed(digest, parse).repository

    def _read_document(self, digest: Digest) -> bytes:
        if self._rehearsed_blobs and digest in self._rehearsed_blobs:
            return self._rehearsed_blobs[digest]
        return self._store.read_document(digest)

    def _put_bytes(self, raw: bytes) -> None:
        if self._rehearsed_blobs is None:
            self._store.put_bytes(raw)
        else:
            self._rehearsed_blobs[sha256_bytes(raw)] = raw


def required_blobs(store: Store, document: Digest) -> set[Digest]:
    """Return the blobs that the document of a repository needs: its pages, commits with their files, manifests with theirs."""
    repository = Repository.parse(store.read_document(document), document, store.read_document)
    pages = {blob for field_pages in repository.pages.values() for blob in field_pages.blobs}
    return needed_blobs(store, repository) | pages


def needed_blobs(store: Store, repository: Repository) -> set[Digest]:
    """Return the blobs that a repository needs besides its document and its pages."""
    needed: set[Digest] = {*repository.commits.values(), *repository.manifests}
    for manifest in repository.manifests.values():
        needed.update(manifest.blobs)
    for digest in repository.commits.values():
        record = CommitRecord.parse(store.read_document(digest), digest)
        needed.update(file for file, _ in record.files.values())
    return needed
