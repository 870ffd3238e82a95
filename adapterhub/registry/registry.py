"""A local registry: a store that is the truth, and a catalog that finds things in it.

    with Registry.init(Path(".")) as registry:
        version = registry.push(Path("out/sql"), Ref.parse("team/sql"))

Versions are immutable and numbered by the push that makes them; refs move, one log entry a move, and only ever point at
complete manifests. Every method that takes a ref may raise RefError, NotFoundError or IntegrityError.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import Digest
from adapterhub.index.database import FILE, Catalog, Name, Row, is_ours, latest_tags
from adapterhub.maintenance import fsck
from adapterhub.maintenance.fsck import Finding, Findings
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import LATEST, Ref, RefError, parse_prefix, parse_tag
from adapterhub.store import ingest
from adapterhub.store.store import FOLDER, Entry, Progress, Store, told
from adapterhub_converters.adapter_files import is_weights
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    IntegrityError,
    LocalIOError,
    NotFoundError,
    RefusedError,
)

from .reading import Reading, Version

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy
    from adapterhub_converters.bases import BaseSpec

    from .publish import Package

__all__ = ["ABSENT", "Registry", "Version", "find", "now"]

ABSENT = "absent"
"""What `expect` says of a ref that must not be there yet."""
_MAX_MESSAGE = 1000
_TRIES = 5


def find(start: Path, *, explicit: Path | None = None, default: Path | None = None) -> Path:
    """The folder of the registry to use.

    `explicit` (a registry.db or the folder that holds it) if given; else the nearest folder at or above `start` with a
    registry that is ours and the user's own, as git asks of `.git`; else `default`, which need not exist yet.
    """
    if explicit is not None:
        return explicit.parent if explicit.name == FILE else explicit
    start = start.absolute()
    for folder in (start, *start.parents):
        if _is_registry(folder):
            return folder
    if default is None:
        raise NotFoundError(str(start), f"no {FILE} here or above", "Run `adapterhub init`")
    return default


def _is_registry(folder: Path) -> bool:
    database, layout = folder / FILE, folder / FOLDER / "oci-layout"
    # A store with a broken database is found too, so that opening it says so: the next one up would be another registry.
    found = database if is_ours(database) else layout if layout.is_file() else None
    if found is None:
        return False
    # A registry that somebody else laid in a shared folder above is not to be trusted unasked.
    return not hasattr(os, "geteuid") or found.stat().st_uid == os.geteuid()


class Registry(Reading):
    """An open registry; a context manager. Make one with `Registry.init` or `Registry.open`."""

    @classmethod
    def init(cls, root: Path) -> Registry:
        """The registry in the folder `root`, made if there is none."""
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalIOError(str(root), error.strerror or str(error)) from error
        store = Store.create(root / FOLDER)
        if not (root / FILE).exists():
            Catalog.create(root / FILE, store)
            with cls.open(root) as made, made.locked():
                made.catalog.write_index(made.store)
        return cls.open(root)

    @classmethod
    def open(cls, path: Path) -> Registry:
        """The registry in a folder, or of a registry.db; what a killed writer left undone in the catalog is done first."""
        root = path.parent if path.name == FILE else path
        store = Store(root / FOLDER)
        if not store.exists():
            if (root / FILE).exists():
                raise IntegrityError(
                    str(store.root), f"the store is missing, {FILE} alone holds nothing", "Restore it from a backup"
                )
            raise NotFoundError(str(root), "no registry there", "Run `adapterhub init`")
        there = (root / FILE).exists()
        if not (os.access(root, os.W_OK) and os.access(store.root, os.W_OK) and (not there or os.access(root / FILE, os.W_OK))):
            return cls._open_read_only(root, store)
        if not there:
            return cls.init(root)
        registry = cls(root, store, Catalog.open(root / FILE, store))
        registry._finish_moves()
        registry._replay()
        return registry

    @classmethod
    def _open_read_only(cls, root: Path, store: Store) -> Registry:
        """For who may not write: a copy of the catalog in memory, brought up to the logs there."""
        registry = cls(root, store, Catalog.in_memory(root / FILE, store))
        if store.pending() or not registry.catalog.is_level(store):
            with registry.catalog.transaction():
                registry._catch_up_all()
        return registry

    @classmethod
    def rebuilt(cls, path: Path, progress: Progress | None = None) -> tuple[Registry, Findings]:
        """The registry, its database made anew from the logs; what could not be replayed. One that is broken is set aside."""
        root = path.parent if path.name == FILE else path
        for last in (False, True):
            try:
                registry = cls.open(root)
                return registry, registry.rebuild_index(progress)
            except (IntegrityError, RefusedError) as error:
                if last or error.where != str(root / FILE):
                    raise
                Catalog.set_aside(root / FILE)
        raise AssertionError

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
        restore: bool = False,
        progress: Progress | None = None,
    ) -> Version:
        """Check the adapter in `folder` and store it as a new version of `ref.name`; `latest` and `ref.tag` move to it.

        The same content again makes no new version: the existing one is returned, and `ref.tag` moves to it.

        Args:
            folder: An adapter.
            ref: A name, or a name and a tag; numbers are assigned.
            base: The model it was trained on, to pin.
            policy: The project's, None where it has none.
            force: Store an adapter whose check finds errors.
            expect: The digest that `ref` must still have, or ABSENT; ConflictError names the one it has instead.
            restore: Give new versions to a name that was deleted; its old ones stay gone.
            progress: Called with bytes stored and bytes in all.

        Raises:
            RefusedError: The check finds errors, or the policy does not allow the adapter.
        """
        from . import publish  # needs numpy, which commands that only read do without

        if policy is not None:
            policy.check_name(ref.name)
        package = publish.package(folder, base=base, policy=policy, force=force)
        return self.publish(package, ref, expect=expect, restore=restore, progress=progress)

    def publish(
        self,
        package: Package,
        ref: Ref,
        *,
        expect: Digest | None = None,
        restore: bool = False,
        progress: Progress | None = None,
    ) -> Version:
        """As `push`, of an adapter that was checked."""
        if ref.number or ref.digest or ref.range:
            raise RefError(str(ref), "a push allots the number itself", f"Push to {ref.name}, or to {ref.name}:TAG")
        self._check_push(ref, self._current(ref.name), expect, restore=restore)
        for _ in range(_TRIES):
            with self.store.lease("push"):
                made, skipped = ingest.take_in(self.store, package.folder, progress, package.draft)
                version = self._name(ref, made, expect, restore=restore)
            if version is not None:
                return replace(version, skipped=skipped, overridden=tuple(problem.code for problem in package.overridden))
        raise IntegrityError(str(ref), "its blobs went while it was pushed", "Try again when `adapterhub gc` has ended")

    def admit(self, made: Manifest, ref: Ref, *, expect: Digest | None = None) -> Version:
        """As `push`, of a manifest from elsewhere whose blobs were put under a lease that is still held."""
        if ref.number or ref.digest or ref.range:
            raise RefError(str(ref), "the number is allotted here", f"Name {ref.name}, or {ref.name}:TAG")
        for layer in made.layers:
            if is_weights(layer.path):
                self.store.list_tensors(layer.digest)
        version = self._name(ref, made, expect, restore=False)
        if version is None:
            raise IntegrityError(str(ref), "not all of its blobs are there", "Try again")
        return version

    def _name(self, ref: Ref, made: Manifest, expect: Digest | None, *, restore: bool) -> Version | None:
        """Move `ref` to a version whose blobs were put; None if any went since, as a gc may have it until there is a name."""
        new = there_is_all = False

        def decide(state: Name) -> Entry | None:
            nonlocal new, there_is_all
            self._check_push(ref, state, expect, restore=restore)
            there = self.catalog.rows("name = ? AND digest = ?", ref.name, made.digest)
            new = not there
            blobs = (Descriptor(oci_manifest.MANIFEST_TYPE, made.digest, len(made.raw)), made.config, *made.layers)
            there_is_all = all(self.store.has(blob.digest, blob.size) for blob in blobs)
            if not there_is_all:
                return None
            if new:
                self._check_protected(ref.name, ref.tag)
                number, tags = state.number + 1, latest_tags(ref.tag)
                return Entry(ref.name, state.seq + 1, "push", now(), made.digest, len(made.raw), number, tags, state.head)
            return self._tag_entry(state, there[0], ref.tag) if ref.tag and ref.tag not in (*there[0].tags, LATEST) else None

        self.move(ref.name, decide)
        if not there_is_all:
            return None
        return replace(self._version(self.catalog.rows("name = ? AND digest = ?", ref.name, made.digest)[0], ref.tag), new=new)

    def _check_push(self, ref: Ref, state: Name, expect: Digest | None, *, restore: bool) -> None:
        if state.deleted and not restore:
            raise ConflictError(str(ref), "this name was deleted, and deleted names are not reused", "Choose another name")
        self._check_expect(ref.name, ref.tag, expect)

    def _check_expect(self, name: str, tag: str | None, expect: Digest | None) -> None:
        """ConflictError, which names the winner, unless a tag (None: `latest`) still points to what was expected."""
        if expect is None:
            return
        ref = Ref(name, tag=tag)
        wanted = expect if expect == ABSENT else parse_prefix(expect, f"{ref}: --expect")
        number = self.catalog.tags(name).get(tag or LATEST, 0)
        rows = self.catalog.rows("name = ? AND number = ?", name, number)
        found = rows[0].digest if rows else ABSENT
        if not found.startswith(wanted):
            raise ConflictError(
                str(ref), f"moved meanwhile: it is {found}, not {expect}", "Look at that version, then try again"
            )

    def _check_protected(self, name: str, tag: str | None) -> None:
        if tag and tag in self.catalog.marks("protect", name):
            raise RefusedError(f"{name}:{tag}", "is protected", f"Run `adapterhub tag {name}:{tag} --unprotect` first")

    def tag(self, ref: Ref, tag: str, *, expect: Digest | None = None) -> Version:
        """Point `tag` at the version that `ref` names, whatever it pointed at before; `expect` as in `push`."""
        parse_tag(tag, f"{ref.name}:{tag}")
        _check_not_latest(ref.name, tag)
        row = self.row(ref)

        def decide(state: Name) -> Entry | None:
            self._check_expect(ref.name, tag, expect)
            return None if tag in self.row(row.ref).tags else self._tag_entry(state, row, tag)

        self.move(ref.name, decide)
        return self._version(self.row(row.ref), tag)

    def put_back(self, ref: Ref, seq: int | None = None) -> Version:
        """Point the tag of `ref` where it pointed before it last moved or went, or after entry `seq` of the log."""
        tag = _its_tag(ref)
        _check_not_latest(ref.name, tag)
        if self._current(ref.name).deleted or not self._current(ref.name).seq:
            self.row(ref)  # says so

        def decide(state: Name) -> Entry | None:
            row = self.row(Ref(ref.name, number=self._stood(ref, tag, state.seq, seq)))
            return None if tag in row.tags else self._tag_entry(state, row, tag)

        self.move(ref.name, decide)
        return self._version(self._exact(ref), tag)

    def _stood(self, ref: Ref, tag: str, end: int, seq: int | None) -> int:
        """The number that a tag had after entry `seq`, or before its last move."""
        if seq is not None and not 1 <= seq <= end:
            raise NotFoundError(
                str(ref), f"there is no entry {seq}; the log has 1 to {end}", f"Run `adapterhub log {ref.name}`"
            )
        moves: list[tuple[int, int]] = [(0, 0)]  # entry, and the number that the tag has from there on; 0 for none
        for entry in self.store.log(ref.name):
            if entry.op == "delete" or (entry.op in ("push", "tag", "untag") and tag in entry.tags):
                moves.append((entry.seq, 0 if entry.op in ("delete", "untag") else entry.number))
        if len(moves) == 1:
            raise NotFoundError(str(ref), "this tag was never set", f"Run `adapterhub log {ref.name}`")
        before = moves[-1][0] - 1 if seq is None else seq
        number = [number for at, number in moves if at <= before][-1]
        if not number:
            when = f"at entry {seq}" if seq is not None else f"before entry {before + 1}"
            raise NotFoundError(str(ref), f"was not there {when}", f"`adapterhub log {ref}` says when it was")
        return number

    def protect(self, ref: Ref, *, on: bool = True) -> Version:
        """Have the tag of `ref` neither move nor go until it is unprotected again (`on=False`)."""
        tag = _its_tag(ref)
        _check_not_latest(ref.name, tag)
        self._exact(ref)

        def decide(state: Name) -> Entry | None:
            self._exact(ref)
            if (tag in self.catalog.marks("protect", ref.name)) == on:
                return None
            op = "protect" if on else "unprotect"
            return Entry(ref.name, state.seq + 1, op, now(), tags=(tag,), previous=state.head)

        self.move(ref.name, decide)
        return self._version(self._exact(ref), tag)

    def deprecate(self, ref: Ref, message: str = "", *, undo: bool = False) -> int:
        """Say that a version, or with a bare name all of them, should not be used any more; its number, 0 for all."""
        row = self.row(ref)
        number = row.number if ref != Ref(ref.name) else 0
        message = message.encode(errors="replace").decode()
        if len(message) > _MAX_MESSAGE:
            raise RefError(str(ref), f"the message is over {_MAX_MESSAGE} characters", "Say it shorter, or link to it")

        def decide(state: Name) -> Entry | None:
            self.row(Ref(ref.name, number=row.number))
            found = self.catalog.marks("deprecate", ref.name).get(str(number))
            if found == (None if undo else message):
                return None
            op, said = ("undeprecate", "") if undo else ("deprecate", message)
            return Entry(ref.name, state.seq + 1, op, now(), number=number, previous=state.head, message=said)

        self.move(ref.name, decide)
        return number

    def rm(self, ref: Ref, *, expect: Digest | None = None, force: bool = False) -> None:
        """Remove a tag, or a whole name with all its versions; the name is then never used again. `expect` as in `push`.

        A name is refused from whose versions others in the registry were made, unless `force`: those could not be made again.
        """
        if ref.number or ref.digest:
            raise RefusedError(str(ref), "a version is never removed alone", f"Remove the name {ref.name}, or a tag")
        if ref.tag:
            _check_not_latest(ref.name, ref.tag)
        self._exact(ref)

        def decide(state: Name) -> Entry:
            self._check_expect(ref.name, ref.tag, expect)
            self._exact(ref)
            for tag in (ref.tag,) if ref.tag else self.catalog.marks("protect", ref.name):
                self._check_protected(ref.name, tag)
            if not (ref.tag or force):
                self._check_childless(ref.name)
            tags = (ref.tag,) if ref.tag else ()
            return Entry(ref.name, state.seq + 1, "untag" if tags else "delete", now(), tags=tags, previous=state.head)

        self.move(ref.name, decide)

    def _check_childless(self, name: str) -> None:
        """RefusedError where versions of other names were made from those of `name`, and no other name has the same."""
        made = {
            row.ref: parent.ref
            for parent in self.catalog.rows("name = ?", name)
            for row in self.children(parent.digest)
            if row.name != name and all(held.name == name for held in self.holding(parent.digest))
        }
        for child, parent in sorted(made.items(), key=lambda item: str(item[0]))[:1]:
            more = f", as {len(made) - 1} more were" if len(made) > 1 else ""
            what = f"{child} was made from {parent}{more}, and could not be made again"
            raise RefusedError(name, what, "--force removes it all the same")

    def _tag_entry(self, state: Name, row: Row, tag: str) -> Entry:
        self._check_protected(row.name, tag)
        return Entry(row.name, state.seq + 1, "tag", now(), row.digest, row.manifest_size, row.number, (tag,), state.head)

    def move(self, name: str, decide: Callable[[Name], Entry | None]) -> None:
        """Commit the entry that `decide` makes of where the log stands; decide again when another writer was first."""
        committed = False
        while not committed:
            try:
                with self.locked():
                    entry = decide(self.catalog.catch_up(self.store, name))
                    if entry is None:
                        return
                    intent = self.store.begin(name)
                    committed = self.store.append(entry)
                    self.catalog.catch_up(self.store, name)
                    self.catalog.write_index(self.store)
            except LocalIOError as error:
                if not committed:
                    raise
                done = f"{error.what}; but {name} has moved, and the next command that can write tells the index"
                raise LocalIOError(error.where, done, error.hint) from error
            with contextlib.suppress(OSError):  # it is done; whoever finds the intent does nothing more
                intent.unlink()

    # ---- checks

    def _finish_moves(self) -> None:
        """Replay the names whose writers were killed before they told the catalog. Live writers hold the lock meanwhile."""
        pending = self.store.pending()
        if not pending:
            return
        done = []
        for intent, name in pending:
            with contextlib.suppress(AdapterhubError), self.locked():
                self.catalog.catch_up(self.store, name)
                self.catalog.write_index(self.store)
                done.append(intent)
        for intent in done:
            intent.unlink(missing_ok=True)

    def rebuild_index(self, progress: Progress | None = None) -> Findings:
        """Make catalog and index.json anew from the logs; what could not be replayed is returned.

        Weights of which no list says what tensors they have, as an older adapterhub put them there, are read for one.
        """
        with self.locked():
            errors = self.catalog.rebuild(self.store)
            self.catalog.write_index(self.store)
        self._list_tensors(progress)
        return [Finding("broken-log", "error", error.where, error.what, error.hint) for error in errors]

    def _list_tensors(self, progress: Progress | None) -> None:
        with self.store.lease("list") as lease:
            unlisted = self.catalog.unlisted()
            more = told(progress, sum(unlisted.values()))
            for digest in unlisted:
                lease.note(digest)
                if self.store.list_tensors(digest, more) is not None:
                    with self.locked():
                        self.catalog.add_tensors(self.store, digest)

    def fsck(self, *, quick: bool = False, progress: Progress | None = None) -> Findings:
        """What is wrong with the registry; `quick` trusts the bytes of blobs that have the right size."""
        return fsck.fsck(self.store, self.catalog, quick=quick, progress=progress)

    def verify(self, ref: Ref, progress: Progress | None = None) -> Findings:
        """The bytes of a version against its manifest."""
        version = self.resolve(ref)
        made = self._manifest(version)
        return fsck.verify(self.store, (made.config, *made.layers), str(version.ref), progress)


def _its_tag(ref: Ref) -> str:
    if ref.tag is None:
        raise RefError(str(ref), "names no tag", f"Write {ref.name}:TAG")
    return ref.tag


def _check_not_latest(name: str, tag: str) -> None:
    if tag == LATEST:
        raise RefusedError(f"{name}:{tag}", "is always the newest push", "Choose another tag")


def now() -> str:
    """The time for an entry of a log."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
