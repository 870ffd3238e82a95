"""Documents of a registry under a name: base models, merge recipes, and a hub's records of repositories.

    bases/<name>/<seq>.json     one file per move: `push` points the name at a document, `delete` frees it
    merges/<name>/<seq>.json    likewise
    hub/<ns>/<name>/<seq>.json  likewise

A document is a blob: the record of a base model (`adapterhub.bases.registered_bases`), a merge recipe
(`adapterhub.registry.merge_recipe`) or a repository (`adapterhub.registry.repository_records`). Only one thing in them is read
here: the adapters that a recipe needs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from adapterhub.digest import Digest, parse_digest
from adapterhub.ref import parse_name
from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import FormatError, IntegrityError
from adapterhub_converters.lazy_dataclass import dataclass

from .store import BASES, Entry, Store


@dataclass(frozen=True, slots=True)
class NamedDocument:
    """The state of a name: the last entry of its log (None for an empty log) and that entry's digest."""

    name: str
    entry: Entry | None = None
    head: Digest = ""

    @property
    def exists(self) -> bool:
        """Whether the name points at a document."""
        return self.entry is not None and self.entry.op == "push"

    def next(self, op: str, time: str, digest: Digest = "", size: int = 0) -> Entry:
        """Return the entry that follows."""
        seq = self.entry.seq + 1 if self.entry else 1
        return Entry(self.name, seq, op, time, digest, size, previous=self.head)


def parse_document_name(name: str, location: str) -> str:
    """Return `name` if it is a valid name of a document: one word, following the rules for each part of a ref."""
    parse_name(f"base/{name}", location)
    return name


def current(store: Store, name: str, *, log: str = BASES, known_state: NamedDocument | None = None) -> NamedDocument:
    """Return the state of a name; IntegrityError if its log was changed. Only entries after `known_state` are read."""
    state = known_state or NamedDocument(name)
    while step := store.log.entry(name, (state.entry.seq if state.entry else 0) + 1, log=log):
        entry, digest = step
        if entry.previous != state.head or entry.op not in ("push", "delete"):
            location = str(store.log.path(name, entry.seq, log=log))
            problem = "does not follow the entry before it: the log was changed"
            raise IntegrityError(location, problem, "Check the registry", code="check-registry")
        state = NamedDocument(name, entry, digest)
    return state


def move(
    store: Store,
    locked: Callable[[], AbstractContextManager[None]],
    name: str,
    decide: Callable[[NamedDocument], Entry | None],
    *,
    log: str = BASES,
    known_state: NamedDocument | None = None,
) -> None:
    """Commit the entry that `decide` returns for the state of a name; call it again if another writer committed first."""
    while True:
        with locked():  # the compare-and-swap of the log needs hard links; on file systems without them, only the lock protects
            entry = decide(current(store, name, log=log, known_state=known_state))
            if entry is None or store.log.append(entry, log=log):
                return


def adapters(store: Store, document: Digest) -> dict[Digest, str]:
    """Return the manifests that a merge recipe needs, each with the ref it came from; FormatError if it is not a recipe."""
    raw = store.read_document(document)
    listed = parse_object(raw.decode("utf-8", "replace"), document).get("adapters")
    if not isinstance(listed, list) or not all(isinstance(adapter, dict) for adapter in listed):
        raise FormatError(document, "not a merge recipe")
    return {parse_digest(adapter.get("digest"), document): str(adapter.get("ref", "")) for adapter in listed}
