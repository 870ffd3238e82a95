"""A local registry: versions, refs that move, and the bytes of the versions.

    with Registry.init(Path(".")) as registry:
        version = registry.push(Path("out/sql"), Ref.parse("team/sql"))

Versions are immutable and are numbered by the push that creates them. Refs move, one log entry per move, and only ever point
at complete manifests. Every method that takes a ref may raise RefError, NotFoundError or IntegrityError.

`registry.moves` decides each move, `registry.version_lookup` resolves refs, and `registry.ledger` keeps the store and its index
in step.
"""

from __future__ import annotations

# `Registry.list` hides the built-in `list` in the annotations of the class.
import builtins
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from adapterhub.digest import Digest
from adapterhub.index import queries, tensor_search, version_extract
from adapterhub.index.index_database import Index
from adapterhub.index.queries import LogState, VersionRow
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.existing_folder import ExistingFolder
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.project import PROJECT
from adapterhub.ref import Ref
from adapterhub.store import ingest
from adapterhub.store.export import export
from adapterhub.store.store import Entry, Progress, Store, counter
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import AdapterhubError, IntegrityError

from . import moves, shown_version, signature_policy, version_facts, withdrawals
from .ledger import Ledger, find
from .releases.tag_gate import TagGate
from .shown_version import VersionDocument
from .version_lookup import RestoreResult, Version, find_row, find_row_with, find_version, never_set

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy
    from adapterhub.project.policy_rules import Measurements
    from adapterhub_converters.bases import BaseSpec

    from .packaging import Package
    from .releases.tag_requirements import Assessment

__all__ = ["Registry", "Version", "find"]

_MAX_ATTEMPTS = 5  # attempts of a push whose blobs a gc keeps removing


def policy_of(folder: Path) -> Policy | None:
    """Return the policy in the adapterhub.toml of a registry's folder, whoever owns that file; None without one."""
    file = folder.absolute() / PROJECT
    # A dangling link is an error, not a registry without a policy.
    if not os.path.lexists(file):
        return None
    from adapterhub.project import settings_file

    return settings_file.read(file, follow=False).policy


class Registry:
    """An open registry; a context manager. Create one with `Registry.init`, open one with `Registry.open`.

    Attributes:
        ledger: Its store and index.
        gate: Decides which version a tag may be moved to.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.gate = TagGate(ledger, lambda: self.policy)
        ledger.check_entry = self.gate.check
        ledger.has_requirements = lambda tag: bool(self.gate.rules(tag))

    @classmethod
    def init(cls, root: Path, store: Store | None = None) -> Self:
        """Open the registry in the folder `root`, creating it if there is none. `store` is as in `open`."""
        return cls(Ledger.create(root, store))

    @classmethod
    def open(cls, path: Path, store: Store | None = None) -> Self:
        """Open a registry.

        Args:
            path: The folder of the registry, or its registry.db.
            store: The store with its blobs and logs; None for the one in the folder.
        """
        return cls(Ledger.open(path, store))

    @classmethod
    def open_with_new_index(cls, path: Path) -> tuple[Registry, builtins.list[AdapterhubError]]:
        """Rebuild a registry's index from the logs, and open the registry; also return the errors of unreadable logs.

        A damaged registry.db is renamed to registry.db.old.
        """
        ledger, errors = Ledger.open_with_new_index(path)
        return cls(ledger), errors

    def close(self) -> None:
        """Close the registry."""
        self.ledger.close()

    def refresh(self) -> None:
        """Open the index that another program has put in the place of this one's, if any."""
        self.ledger.reopen_if_replaced()

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
        """The index of the logs; a new object once registry.db was replaced."""
        return self.ledger.index

    @property
    def author(self) -> str:
        """The user that the log names as the author of each move; empty to name nobody."""
        return self.ledger.author

    @author.setter
    def author(self, name: str) -> None:
        self.ledger.author = name

    def write_lock(self) -> AbstractContextManager[None]:
        """Hold the write lock, under which refs move and blobs are removed."""
        return self.ledger.write_lock()

    def move(self, name: str, decide: Callable[[LogState], Entry | None]) -> None:
        """Commit the entry that `decide` returns for the state of a name; call it again if another writer committed first."""
        self.ledger.move(name, decide)

    def rebuild_index(self) -> builtins.list[AdapterhubError]:
        """Rebuild registry.db and index.json from the logs; return the errors of logs that could not be replayed."""
        return self.ledger.rebuild()

    @cached_property
    def policy(self) -> Policy | None:
        """The registry's own policy, which everything stored or pulled must meet; None without one."""
        return policy_of(self.root)

    # ---- reading

    def resolve(self, ref: Ref) -> Version:
        """Return the version that `ref` names now: by tag, number, digest or range; the newest one for a bare name."""
        return find_version(self.ledger, ref)

    def row(self, ref: Ref) -> VersionRow:
        """Return the version that `ref` names now as a row, the form in which lists show it."""
        return find_row(self.ledger, ref)

    def list(self, prefix: str | None = None) -> list[VersionRow]:
        """Return all versions, or those of one name or namespace, sorted by name, newest first."""
        return queries.versions(self.index, prefix=prefix)

    def show(self, ref: Ref) -> VersionDocument:
        """Return a version as JSON: its refs, its adapter.json upgraded to the current schema, and its OCI manifest."""
        return shown_version.show(self.ledger, ref)

    def deprecations(self, names: Collection[str]) -> dict[tuple[str, int], str]:
        """Return the reason of each deprecation of some names by name and number; number 0 means the whole name."""
        return queries.deprecations(self.index, names)

    def versions_with(self, digest: Digest) -> Sequence[VersionRow]:
        """Return the versions with this manifest: one for each name that it was pushed to."""
        return queries.versions(self.index, digest=digest)

    def measurements(self, digest: Digest) -> Measurements:
        """Return the metrics recorded for a manifest, under the names that a search uses, and who recorded each."""
        return version_facts.measurements(self.index, digest)

    def children(self, digest: Digest) -> Sequence[VersionRow]:
        """Return the versions that were made from the manifest `digest`."""
        return queries.versions(self.index, parent=digest)

    def adapter_manifest(self, digest: Digest) -> AdapterManifest | None:
        """Return the usable part of a version's adapter.json, given its OCI manifest `digest`; None without adapter.json."""
        return version_extract.adapter_manifest(self.store, oci_manifest.parse(self.store.read_document(digest), digest))

    def oci_manifest(self, version: Version) -> Manifest:
        """Return the OCI manifest of a version."""
        return oci_manifest.parse(self.store.read_document(version.digest), str(version.ref))

    def files(self, version: Version) -> tuple[Descriptor, ...]:
        """Return the files of a version, sorted by path; each file is the blob with its digest."""
        return self.oci_manifest(version).layers

    @contextmanager
    def lease_version(self, ref: Ref) -> Iterator[Version]:
        """Resolve a ref and protect its blobs: until the context ends, gc removes none of them, even if the name is removed."""
        with self.store.lease("read", required=False) as lease:
            version = self.resolve(ref)
            lease.note(version.digest)
            # Resolve again, now that the lease lists the version: if it was removed before that, this raises; if it is
            # removed later, gc sees the lease and keeps the blobs.
            yield replace(self.resolve(Ref(version.name, digest=version.digest)), tag=version.tag)

    def pull(self, ref: Ref, out: Path, progress: Progress | None = None, *, present: ExistingFolder | None = None) -> Version:
        """Write the files of a version into `out`, a new or empty folder: all of them, verified, or none.

        Args:
            ref: The version.
            out: The folder.
            progress: Called with bytes written and total bytes.
            present: The current contents of `out`, to be replaced; None if `out` must be new or empty.
        """
        with self.lease_version(ref) as version, atomic.pending_output(out, replace=present is not None) as folder:
            export(self.store, self.files(version), folder, progress, present=present)
        return version

    def pull_digest(self, digest: Digest, out: Path) -> bool:
        """Write the files of the version with this manifest, even if no name has it anymore; False if it is not stored."""
        if holders := self.versions_with(digest):
            usable = [row for row in holders if digest not in withdrawals.reasons(self.index, row.name)] or holders
            self.pull(Ref(usable[0].name, digest=digest), out)
            return True
        # No name has the manifest, but its blobs may not have been collected yet.
        if self.store.size(digest) is None:
            return False
        with self.store.lease("read", required=False) as lease, atomic.pending_output(out) as folder:
            lease.note(digest)
            export(self.store, oci_manifest.parse(self.store.read_document(digest), digest).layers, folder)
        return True

    def log(self, ref: Ref) -> builtins.list[Entry]:
        """Return the log of a name, deleted or not, newest entry first; for a tag or a version, only the entries about it."""
        entries, _ = self.log_page(ref)
        if ref.tag and not any(entry.tags for entry in entries):
            raise never_set(ref)
        return entries

    def log_page(
        self,
        ref: Ref,
        *,
        before: int = 0,
        limit: int | None = None,
        most_read: int | None = None,
        most_characters: int | None = None,
    ) -> tuple[builtins.list[Entry], int]:
        """Return a part of what `log` returns, and what to give as `before` for the next part; 0 at the end.

        Args:
            ref: The name, tag or version.
            before: Only entries before this one; 0 for all.
            limit: The most entries; None for all.
            most_read: The most entries that are read, some of which may be about others.
            most_characters: The most characters of messages that are read, beyond those of the last entry.
        """
        # A name without a log has never existed; a removed name still has one.
        last = self.ledger.current(ref.name).seq
        if last == 0:
            self.row(ref)  # raises NotFoundError
        number = self.row(ref).number if ref.number or ref.digest or ref.range else 0

        def is_about(entry: Entry) -> bool:
            if ref.tag:
                return entry.op == "delete" or ref.tag in entry.tags
            return not number or entry.op == "delete" or number in (entry.number, *entry.numbers)

        entries: builtins.list[Entry] = []
        first, characters = min(last, before - 1) if before else last, 0
        for seq in range(first, 0, -1):
            if len(entries) == limit or first - seq == most_read or (most_characters and characters > most_characters):
                return entries, seq + 1
            if logged := self.store.log.entry(ref.name, seq):
                entry, _ = logged
                characters += len(entry.message)
                if is_about(entry):
                    entries.append(entry)
        return entries, 0

    def list_tensors(self, progress: Progress | None = None, *, prefix: str | None = None) -> None:
        """Create the missing tensor lists, which `find`, disk usage and packing need; this reads the weights once.

        Args:
            progress: Called with bytes read and total bytes.
            prefix: Only versions of this name or namespace.
        """
        missing = tensor_search.unlisted_files(self.index, prefix)
        if not missing:
            return
        with self.store.lease("list", required=False) as lease:
            count_bytes = counter(progress, sum(missing.values()))
            for digest in missing:
                lease.note(digest)
                # The lock is taken for each file anew, so that reading many gigabytes does not hold up pushes.
                if self.store.list_tensors(digest, count_bytes) is not None:
                    with self.write_lock():
                        tensor_search.add(self.index, digest, self.store.tensors.read)

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
            policy: Requirements on adapters; None for no requirements.
            force: Store the adapter even if its check finds errors.
            expect: The digest that `ref` must still have, or `moves.ABSENT`; ConflictError names the one it has instead.
            progress: Called with bytes stored and total bytes.

        Raises:
            RefusedError: The check finds errors, or the policy does not allow the adapter.
        """
        from . import packaging  # needs numpy, which commands that only read do without

        if policy is not None:
            policy.check_name(ref.name)
        package = packaging.package(folder, base=base, policy=policy, force=force)
        return self.publish(package, ref, expect=expect, progress=progress)

    def publish(
        self,
        package: Package,
        ref: Ref,
        *,
        expect: Digest | None = None,
        progress: Progress | None = None,
        message: str = "",
        tags: Sequence[str] = (),
    ) -> Version:
        """Store an adapter that `packaging.package` has checked; the arguments not listed here are those of `push`.

        Args:
            package: The adapter.
            ref: A name, or a name and a tag.
            message: Why it is pushed, for the log.
            tags: More tags that move to the version.
        """
        package = self.check_publish(package, ref, expect)
        tags_to_move = (*moves.latest_tags(ref.tag), *moves.checked_tags(ref, tags))
        message = moves.checked_message(message, ref)
        self.gate.check_new(ref.name, tags_to_move, lambda: ingest.digest_of(package.folder, package.draft))
        # A gc may remove blobs between storing them and moving the ref; `moves.push` then returns None and they are stored
        # again.
        for _ in range(_MAX_ATTEMPTS):
            with self.store.lease("push"):
                manifest, skipped = ingest.ingest(self.store, package.folder, progress, draft=package.draft)
                read_signatures = partial(signature_policy.all_signatures, self.store, manifest, package.signatures)
                # Verified before any ref leads to the version.
                signature_policy.check(package.policy, manifest, read_signatures, name=ref.name, location=package.where)
                version = moves.push(self.ledger, ref, manifest, expect=expect, tags=tags_to_move, message=message)
            if version is not None:
                signature_policy.store_signatures(self.store, manifest, package.signatures, package.policy, ref.name)
                return replace(version, skipped=skipped, overridden=tuple(problem.code for problem in package.overridden))
        raise IntegrityError(
            str(ref), "its blobs were removed while it was pushed", "Try again when no gc is running", code="changed-meanwhile"
        )

    def check_publish(self, package: Package, ref: Ref, expect: Digest | None) -> Package:
        """Raise the error that `publish` would end with before it stores a byte; return the package with the joined policy."""
        from . import packaging  # needs numpy

        # `moves.push` checks the same again under the lock.
        moves.check_push(self.ledger, ref, expect)
        # The registry's own policy applies in addition to the project's, which the package has met already.
        if self.policy is not None:
            self.policy.check_name(ref.name)
            package = replace(package, read_parent=partial(version_facts.read_parent, self.store))
            package = packaging.apply_policy(package, self.policy)
        return package

    def check_new_version(self, ref: Ref) -> None:
        """Raise the error that a push of a new version to `ref` would end with, whatever its files are."""
        tags = moves.latest_tags(ref.tag)
        moves.check_push(self.ledger, ref, None)
        moves.check_protected(self.ledger, ref.name, *tags)
        self.gate.check_new(ref.name, tags, str)  # no version has an empty digest

    def push_manifest(
        self,
        manifest: Manifest,
        ref: Ref,
        *,
        expect: Digest | None = None,
        tags: tuple[str, ...] | None = None,
        message: str = "",
        number: int = 0,
        time: str = "",
    ) -> Version:
        """Push a manifest that was checked and whose blobs were stored under a lease that is still held.

        Args:
            manifest: The manifest.
            ref: A name, or a name and a tag.
            expect: As in `push`.
            tags: The tags to move, where `latest` may also move back to an earlier version with the same content; None for the
                tags of a push.
            message: Why it is pushed, for the log.
            number: The number of the version, higher than any that the name has had; 0 for the next one.
            time: When a new version was pushed under another name, as in the log there; empty for now.
        """
        move_latest_back, message = tags is not None, moves.checked_message(message, ref)
        version = moves.push(
            self.ledger,
            ref,
            manifest,
            expect=expect,
            tags=tags,
            message=message,
            move_latest_back=move_latest_back,
            number=number,
            time=time,
        )
        if version is None:
            raise IntegrityError(str(ref), "some of its blobs are missing", "Try again")
        return version

    def tag(self, ref: Ref, tag: str, *, expect: Digest | None = None) -> Version:
        """Point `tag` at the version that `ref` names, wherever it pointed before; `expect` is as in `push`."""
        return moves.tag(self.ledger, ref, tag, expect=expect)

    def assess(self, ref: Ref, tag: str) -> Assessment:
        """Compare a version with the requirements on a tag; nothing is moved."""
        moves.checked_tags(ref, (tag,))
        self.resolve(ref)  # refuses a withdrawn version
        row, position = find_row_with(self.ledger, ref, lambda row: self.gate.position(row.name, tag))
        return self.gate.assess(row.name, row.number, row.digest, tag, mover=self.author, position=position)

    def promote(self, ref: Ref, tag: str, message: str = "", *, expect: Digest | None = None) -> tuple[Assessment, Version]:
        """Point a tag at a version that meets its requirements, unless the tag moves in the meantime; `expect` is as in `push`.

        Raises:
            RefusedError: A requirement is not met (code `requirements-unmet`).
            ConflictError: Another writer moved the tag first.
        """
        assessment = self.assess(ref, tag)
        assessment.check()
        candidate = assessment.candidate
        rows = queries.versions(self.index, name=ref.name, number=candidate.current)
        expect = expect or (rows[0].digest if rows else moves.ABSENT)
        version_ref = Ref(candidate.name, number=candidate.number)
        return assessment, moves.tag(self.ledger, version_ref, tag, expect=expect, message=message)

    def restore_tag(self, ref: Ref, seq: int | None = None) -> Version:
        """Point the tag of `ref` where it pointed before its last move or removal, or after entry `seq` of the log."""
        return moves.restore_tag(self.ledger, ref, seq)

    def protect(self, ref: Ref, *, on: bool = True) -> Version:
        """Keep the tag of `ref` from being moved or removed, or lift that protection (`on=False`)."""
        return moves.protect(self.ledger, ref, on=on)

    def deprecate(self, ref: Ref, message: str = "", *, undo: bool = False) -> int:
        """Mark a version, or all versions of a bare name, as deprecated; return its number, 0 for all."""
        return moves.deprecate(self.ledger, ref, message, undo=undo)

    def rm(self, ref: Ref, *, expect: Digest | None = None, force: bool = False, message: str = "") -> None:
        """Remove a tag, or a name with all its versions, until `restore`.

        Args:
            ref: A tag or a name.
            expect: As in `push`.
            force: Remove a name even if other adapters in the registry were made from its versions; without them, those could
                not be made again, so that the default is a RefusedError.
            message: Why, for the log.
        """
        moves.remove(self.ledger, ref, expect=expect, force=force, message=message)

    def restore(self, name: str) -> RestoreResult:
        """Undo the removal of a name: restore its versions, tags and settings, except for versions whose bytes gc has removed.

        The name can be pushed to again, even if no version is left. Raises RefusedError for a name that was not removed.
        """
        return moves.restore(self.ledger, name)
