"""A local registry: versions, refs that move, and their bytes.

    with Registry.init(Path(".")) as registry:
        version = registry.push(Path("out/sql"), Ref.parse("team/sql"))

Versions are immutable and numbered by the push that creates them. Refs move, one log entry per move, and only ever point at
complete manifests. Every method that takes a ref may raise RefError, NotFoundError or IntegrityError.
"""

from __future__ import annotations

import builtins
import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adapterhub.digest import Digest
from adapterhub.index import queries, rows, tensors
from adapterhub.index.database import Index
from adapterhub.index.queries import Name, Row
from adapterhub.manifest import measurement, oci_manifest
from adapterhub.manifest.document import AdapterManifest, upgrade
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.present import Present
from adapterhub.ref import LATEST, Ref, RefError, parse_prefix, parse_tag
from adapterhub.store import ingest
from adapterhub.store.export import export
from adapterhub.store.ref_log import MAX_RESTORES
from adapterhub.store.store import Entry, Progress, Store, counter
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import AdapterhubError, ConflictError, IntegrityError, RefusedError

from .ledger import Ledger, find
from .versions import (
    Restored,
    Version,
    deprecation,
    find_exact_row,
    find_row,
    never_set,
    number_before,
    removed_versions,
    version_of,
)

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy
    from adapterhub_converters.bases import BaseSpec

    from .publish import Package

__all__ = ["ABSENT", "Registry", "Version", "find", "latest_tags", "now"]

ABSENT = "absent"
"""`expect` of a ref that must not exist yet."""
_MAX_MESSAGE = 1000
_TRIES = 5


def now() -> str:
    """Return the time for an entry of a log."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def latest_tags(tag: str | None) -> tuple[str, ...]:
    """Return the tags that a push to `tag` moves."""
    return (LATEST,) if tag in (None, LATEST) else (LATEST, str(tag))


class Registry:
    """An open registry; a context manager. Create one with `Registry.init`, open one with `Registry.open`."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @classmethod
    def init(cls, root: Path) -> Registry:
        """Open the registry in the folder `root`; create it if there is none."""
        return cls(Ledger.create(root))

    @classmethod
    def open(cls, path: Path) -> Registry:
        """Open the registry in a folder, or of a registry.db."""
        return cls(Ledger.open(path))

    @classmethod
    def rebuilt(cls, path: Path) -> tuple[Registry, builtins.list[AdapterhubError]]:
        """Open a registry with its index rebuilt from the logs; the errors are of logs that could not be replayed.

        A damaged registry.db is renamed to registry.db.old.
        """
        ledger, errors = Ledger.rebuilt(path)
        return cls(ledger), errors

    def close(self) -> None:
        """Close the registry."""
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def root(self) -> Path:
        """The folder that contains registry.db and .adapterhub."""
        return self.ledger.root

    @property
    def store(self) -> Store:
        """Blobs and logs."""
        return self.ledger.store

    @property
    def index(self) -> Index:
        """The index of the logs; another object after registry.db was replaced."""
        return self.ledger.index

    def locked(self) -> AbstractContextManager[None]:
        """Hold the write lock, under which refs move and blobs are removed."""
        return self.ledger.locked()

    def move(self, name: str, decide: Callable[[Name], Entry | None]) -> None:
        """Commit the entry that `decide` returns for the state of a name; call it again when another writer was first."""
        self.ledger.move(name, decide)

    def rebuild_index(self) -> builtins.list[AdapterhubError]:
        """Rebuild registry.db and index.json from the logs; return the errors of logs that could not be replayed."""
        return self.ledger.rebuild()

    # ---- reading

    def resolve(self, ref: Ref) -> Version:
        """Return the version that `ref` names now: by tag, number, digest or range; without any of them, the newest."""
        return version_of(self.ledger, self.row(ref), ref.tag)

    def row(self, ref: Ref) -> Row:
        """Return the version that `ref` names now, as lists show it."""
        return find_row(self.ledger, ref)

    def list(self, prefix: str | None = None) -> list[Row]:
        """Return every version, or those of a name or namespace, sorted by name, newest first."""
        return queries.versions(self.index, prefix=prefix)

    def show(self, ref: Ref) -> dict[str, Any]:
        """Return a version as JSON: its refs, its manifest (adapter.json in today's schema) and its OCI manifest."""
        row = self.row(ref)
        raw = self.store.read_document(row.digest)
        made = oci_manifest.parse(raw, str(row.ref))
        manifest = self.store.read_document(made.adapter_json.digest) if made.adapter_json else b"{}"
        return {
            "ref": str(row.ref),
            "name": row.name,
            "number": row.number,
            "tags": list(row.tags),
            "protected": sorted(set(row.tags) & set(queries.marks(self.index, "protect", row.name))),
            "deprecated": deprecation(self.ledger, row),
            "digest": row.digest,
            "size": made.size,
            "time": row.time,
            "evaluations": measurement.of_version(queries.marks(self.index, "evaluate", row.name), row.number),
            "manifest": upgrade(oci_manifest.parse_json(manifest, f"{row.ref}/{ADAPTER_JSON}")),
            "oci_manifest": oci_manifest.parse_json(raw, str(row.ref)),
        }

    def deprecations(self) -> dict[tuple[str, int], str]:
        """Return the reasons for which versions, or whole names under the number 0, are deprecated."""
        return queries.deprecations(self.index)

    def holding(self, digest: Digest) -> Sequence[Row]:
        """Return the versions with this manifest: one of each name that it was pushed to."""
        return queries.versions(self.index, digest=digest)

    def children(self, digest: Digest) -> Sequence[Row]:
        """Return the versions that were made from the manifest `digest`."""
        return queries.versions(self.index, parent=digest)

    def adapter_manifest(self, digest: Digest) -> AdapterManifest | None:
        """Return the usable part of the adapter.json of a version, by its OCI manifest `digest`; None if it has none."""
        return rows.adapter_manifest(self.store, oci_manifest.parse(self.store.read_document(digest), digest))

    def oci_manifest(self, version: Version) -> Manifest:
        """Return the OCI manifest of a version."""
        return oci_manifest.parse(self.store.read_document(version.digest), str(version.ref))

    def files(self, version: Version) -> tuple[Descriptor, ...]:
        """Return the files of a version, sorted by path; each file is the blob of its digest."""
        return self.oci_manifest(version).layers

    @contextmanager
    def reading(self, ref: Ref) -> Iterator[Version]:
        """Resolve a ref; until the context ends no gc removes a blob of the version, even if its name is removed."""
        with self.store.lease("read", required=False) as lease:
            found = self.resolve(ref)
            lease.note(found.digest)
            # Resolved again: a version removed before it was noted is reported, and one removed from now on stays.
            yield replace(self.resolve(Ref(found.name, digest=found.digest)), tag=found.tag)

    def pull(self, ref: Ref, out: Path, progress: Progress | None = None, *, there: Present | None = None) -> Version:
        """Write the files of a version into `out`, a new or empty folder: all of them, verified, or none.

        `progress` is called with bytes written and total bytes. `there` is what is in `out` and to be replaced.
        """
        with self.reading(ref) as version, atomic.whole(out, replace=there is not None) as folder:
            export(self.store, self.files(version), folder, progress, there=there)
        return version

    def pull_digest(self, digest: Digest, out: Path) -> bool:
        """Write the files of the version with this manifest, even if no name has it any more; False if it is not here."""
        if held := self.holding(digest):
            self.pull(Ref(held[0].name, digest=digest), out)
            return True
        if self.store.size(digest) is None:
            return False
        with self.store.lease("read", required=False) as lease, atomic.whole(out) as folder:
            lease.note(digest)
            export(self.store, oci_manifest.parse(self.store.read_document(digest), digest).layers, folder)
        return True

    def log(self, ref: Ref) -> builtins.list[Entry]:
        """Return the log of a name, deleted or not, newest entry first; of a tag or a version, the entries about it."""
        if self.ledger.current(ref.name).seq == 0:
            self.row(ref)  # raises NotFoundError
        number = self.row(ref).number if ref.number or ref.digest or ref.range else 0

        def is_about(entry: Entry) -> bool:
            if ref.tag:
                return entry.op == "delete" or ref.tag in entry.tags
            return not number or entry.op == "delete" or number in (entry.number, *entry.numbers)

        found = [entry for entry in self.store.log.entries(ref.name) if is_about(entry)]
        if ref.tag and not any(entry.tags for entry in found):
            raise never_set(ref)
        return found[::-1]

    def list_tensors(self, progress: Progress | None = None, *, prefix: str | None = None) -> None:
        """Make the tensor lists that are missing, which reads the weights once; `find`, disk usage and packing need them.

        Args:
            progress: Called with bytes read and total bytes.
            prefix: Only versions of this name or namespace.
        """
        missing = tensors.unlisted(self.index, prefix)
        if not missing:
            return
        with self.store.lease("list", required=False) as lease:
            more = counter(progress, sum(missing.values()))
            for digest in missing:
                lease.note(digest)
                if self.store.list_tensors(digest, more) is not None:
                    with self.locked():
                        tensors.add(self.index, digest, self.store.tensors.read)

    # ---- moving refs

    def push(
        self,
        folder: Path,
        ref: Ref,
        *,
        base: BaseSpec | None = None,
        policy: Policy | None = None,
        force: bool = False,
        expect: Digest | None = None,
        progress: Progress | None = None,
    ) -> Version:
        """Check the adapter in `folder` and store it as a new version of `ref.name`; `latest` and `ref.tag` move to it.

        The same content again makes no new version: the existing one is returned, and `ref.tag` moves to it.

        Args:
            folder: An adapter.
            ref: A name, or a name and a tag; numbers are assigned.
            base: The model it was trained on, to pin.
            policy: Requirements on adapters, None for none.
            force: Store an adapter whose check finds errors.
            expect: The digest that `ref` must still have, or ABSENT; ConflictError names the one it has instead.
            progress: Called with bytes stored and total bytes.

        Raises:
            RefusedError: The check finds errors, or the policy does not allow the adapter.
        """
        from . import publish  # needs numpy, which commands that only read do without

        if policy is not None:
            policy.check_name(ref.name)
        package = publish.package(folder, base=base, policy=policy, force=force)
        return self.publish(package, ref, expect=expect, progress=progress)

    def publish(
        self,
        package: Package,
        ref: Ref,
        *,
        expect: Digest | None = None,
        progress: Progress | None = None,
    ) -> Version:
        """Push an adapter that was checked; the arguments are those of `push`."""
        _check_no_number(ref)
        self._check_push(ref, self.ledger.current(ref.name), expect)
        for _ in range(_TRIES):
            with self.store.lease("push"):
                made, skipped = ingest.ingest(self.store, package.folder, progress, draft=package.draft)
                version = self._name(ref, made, expect)
            if version is not None:
                return replace(version, skipped=skipped, overridden=tuple(problem.code for problem in package.overridden))
        raise IntegrityError(str(ref), "its blobs were removed while it was pushed", "Try again when no gc is running")

    def admit(self, made: Manifest, ref: Ref, *, expect: Digest | None = None) -> Version:
        """Push a manifest whose blobs were stored under a lease that is still held."""
        _check_no_number(ref)
        version = self._name(ref, made, expect)
        if version is None:
            raise IntegrityError(str(ref), "some of its blobs are missing", "Try again")
        return version

    def _name(self, ref: Ref, made: Manifest, expect: Digest | None) -> Version | None:
        """Move `ref` to a manifest whose blobs were stored; None if a gc has removed any of them since."""
        new = complete = moved = False

        def decide(state: Name) -> Entry | None:
            nonlocal new, complete, moved
            self._check_push(ref, state, expect)
            there = queries.versions(self.index, name=ref.name, digest=made.digest)
            new = not there
            complete = self._is_complete(made)
            if not complete:
                return None
            moved = new or bool(ref.tag and ref.tag not in (*there[0].tags, LATEST))
            if new:
                self._check_protected(ref.name, ref.tag)
                number, tags = state.number + 1, latest_tags(ref.tag)
                return Entry(ref.name, state.seq + 1, "push", now(), made.digest, len(made.raw), number, tags, state.head)
            return self._tag_entry(state, there[0], str(ref.tag)) if moved else None

        self.move(ref.name, decide)
        if not complete:
            return None
        (row,) = queries.versions(self.index, name=ref.name, digest=made.digest)
        return replace(version_of(self.ledger, row, ref.tag), new=new, moved=moved)

    def _is_complete(self, made: Manifest) -> bool:
        blobs = (Descriptor(oci_manifest.MANIFEST_TYPE, made.digest, len(made.raw)), made.config, *made.layers)
        return all(self.store.has(blob.digest, blob.size) for blob in blobs)

    def _check_push(self, ref: Ref, state: Name, expect: Digest | None) -> None:
        if state.deleted:
            raise ConflictError(str(ref), "this name was removed", "Restore it first", code="removed-name", name=ref.name)
        self._check_expect(ref.name, ref.tag, expect)

    def _check_expect(self, name: str, tag: str | None, expect: Digest | None) -> None:
        """Raise ConflictError, which names the winner, unless a tag (None: `latest`) still points to `expect`."""
        if expect is None:
            return
        wanted = expect if expect == ABSENT else parse_prefix(expect, f"{Ref(name, tag=tag)}: expect")
        number = queries.tags(self.index, name).get(tag or LATEST, 0)
        rows = queries.versions(self.index, name=name, number=number)
        found = rows[0].digest if rows else ABSENT
        if not found.startswith(wanted):
            what = f"moved meanwhile: it is {found}, not {expect}"
            raise ConflictError(str(Ref(name, tag=tag)), what, "Look at that version, then try again")

    def _check_protected(self, name: str, tag: str | None) -> None:
        if tag and tag in queries.marks(self.index, "protect", name):
            raise RefusedError(f"{name}:{tag}", "is protected", "Unprotect it first", code="protected", ref=f"{name}:{tag}")

    def _tag_entry(self, state: Name, row: Row, tag: str) -> Entry:
        self._check_protected(row.name, tag)
        return Entry(row.name, state.seq + 1, "tag", now(), row.digest, row.manifest_size, row.number, (tag,), state.head)

    def tag(self, ref: Ref, tag: str, *, expect: Digest | None = None) -> Version:
        """Point `tag` at the version that `ref` names, wherever it pointed before; `expect` as in `push`."""
        parse_tag(tag, f"{ref.name}:{tag}")
        _check_not_latest(ref.name, tag)
        row = self.row(ref)

        def decide(state: Name) -> Entry | None:
            self._check_expect(ref.name, tag, expect)
            return None if tag in self.row(row.ref).tags else self._tag_entry(state, row, tag)

        self.move(ref.name, decide)
        return version_of(self.ledger, self.row(row.ref), tag)

    def restore_tag(self, ref: Ref, seq: int | None = None) -> Version:
        """Point the tag of `ref` where it pointed before its last move or removal, or after entry `seq` of the log."""
        tag = _tag_of(ref)
        state = self.ledger.current(ref.name)
        if state.deleted or not state.seq:
            self.row(ref)  # raises NotFoundError

        def decide(state: Name) -> Entry | None:
            row = self.row(Ref(ref.name, number=number_before(self.ledger, ref, state.seq, seq)))
            return None if tag in row.tags else self._tag_entry(state, row, tag)

        self.move(ref.name, decide)
        return version_of(self.ledger, find_exact_row(self.ledger, ref), tag)

    def protect(self, ref: Ref, *, on: bool = True) -> Version:
        """Keep the tag of `ref` from being moved or removed until it is unprotected (`on=False`)."""
        tag = _tag_of(ref)
        find_exact_row(self.ledger, ref)

        def decide(state: Name) -> Entry | None:
            find_exact_row(self.ledger, ref)
            if (tag in queries.marks(self.index, "protect", ref.name)) == on:
                return None
            op = "protect" if on else "unprotect"
            return Entry(ref.name, state.seq + 1, op, now(), tags=(tag,), previous=state.head)

        self.move(ref.name, decide)
        return version_of(self.ledger, find_exact_row(self.ledger, ref), tag)

    def deprecate(self, ref: Ref, message: str = "", *, undo: bool = False) -> int:
        """Mark a version, or all versions of a bare name, as deprecated; return its number, 0 for all."""
        row = self.row(ref)
        number = row.number if ref != Ref(ref.name) else 0
        message = message.encode(errors="replace").decode()
        if len(message) > _MAX_MESSAGE:
            raise RefError(str(ref), f"the message is over {_MAX_MESSAGE} characters", "Shorten it, or link to a longer one")

        def decide(state: Name) -> Entry | None:
            self.row(Ref(ref.name, number=row.number))
            found = queries.marks(self.index, "deprecate", ref.name).get(str(number))
            if found == (None if undo else message):
                return None
            op, text = ("undeprecate", "") if undo else ("deprecate", message)
            return Entry(ref.name, state.seq + 1, op, now(), number=number, previous=state.head, message=text)

        self.move(ref.name, decide)
        return number

    def rm(self, ref: Ref, *, expect: Digest | None = None, force: bool = False) -> None:
        """Remove a tag, or a whole name with all its versions, until `restore`. `expect` as in `push`.

        Without `force`, RefusedError for a name from whose versions others in the registry were made: those could not be made
        again.
        """
        if ref.number or ref.digest:
            raise RefusedError(str(ref), "a version cannot be removed alone", f"Remove the name {ref.name}, or a tag")
        if ref.tag:
            _check_not_latest(ref.name, ref.tag)
        find_exact_row(self.ledger, ref)

        def decide(state: Name) -> Entry:
            self._check_expect(ref.name, ref.tag, expect)
            find_exact_row(self.ledger, ref)
            for tag in (ref.tag,) if ref.tag else queries.marks(self.index, "protect", ref.name):
                self._check_protected(ref.name, tag)
            if not (ref.tag or force):
                self._check_childless(ref.name)
            tags = (ref.tag,) if ref.tag else ()
            return Entry(ref.name, state.seq + 1, "untag" if tags else "delete", now(), tags=tags, previous=state.head)

        self.move(ref.name, decide)

    def restore(self, name: str) -> Restored:
        """Undo the removal of a name: its versions, tags and settings, except for versions whose bytes gc has removed.

        The name can be pushed to again, even if no version is left. RefusedError for a name that was not removed.
        """
        found = Restored(name, (), ())

        def decide(state: Name) -> Entry:
            nonlocal found
            if not state.deleted:
                if not state.seq:
                    self.row(Ref(name))  # raises NotFoundError
                raise RefusedError(name, "was not removed")
            entries = list(self.store.log.entries(name))
            if sum(entry.op == "restore" for entry in entries) >= MAX_RESTORES:
                raise RefusedError(name, f"was restored {MAX_RESTORES} times, which is the limit", "Push to another name")
            pushed = removed_versions(entries)
            whole = {number for number, digest in pushed.items() if self._is_stored(digest)}
            found = Restored(name, tuple(sorted(whole)), tuple(sorted(pushed.keys() - whole)))
            return Entry(name, state.seq + 1, "restore", now(), numbers=found.numbers, previous=state.head)

        self.move(name, decide)
        return found

    def _is_stored(self, digest: Digest) -> bool:
        """Return True if a version's manifest can be read and all its blobs are here."""
        try:
            return self._is_complete(oci_manifest.parse(self.store.read_document(digest), digest))
        except AdapterhubError:
            return False

    def _check_childless(self, name: str) -> None:
        """Raise RefusedError if versions of other names were made from those of `name`, unless another name has the same."""
        made = {
            row.ref: parent.ref
            for parent in queries.versions(self.index, name=name)
            for row in self.children(parent.digest)
            if row.name != name and all(held.name == name for held in self.holding(parent.digest))
        }
        for child, parent in sorted(made.items(), key=lambda item: str(item[0]))[:1]:
            more = f" ({len(made) - 1} more like it)" if len(made) > 1 else ""
            what = f"{child} was made from {parent} and could not be made again{more}"
            raise RefusedError(name, what, "Force it to remove it all the same", code="has-children")


def _check_no_number(ref: Ref) -> None:
    if ref.number or ref.digest or ref.range:
        raise RefError(str(ref), "a push assigns the number itself", f"Push to {ref.name}, or to {ref.name}:TAG")


def _tag_of(ref: Ref) -> str:
    if ref.tag is None:
        raise RefError(str(ref), "has no tag", f"Write {ref.name}:TAG")
    _check_not_latest(ref.name, ref.tag)
    return ref.tag


def _check_not_latest(name: str, tag: str) -> None:
    if tag == LATEST:
        raise RefusedError(f"{name}:{tag}", "is always the newest push", "Choose another tag")
