"""Reading a registry: which version a ref names now, and what there is to know of it.

Every method that takes a ref may raise RefError, NotFoundError or IntegrityError.
"""

from __future__ import annotations

import builtins
import contextlib
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from adapterhub import semver
from adapterhub.digest import Digest
from adapterhub.index import rows
from adapterhub.index.database import FILE, Catalog, Name, Row
from adapterhub.manifest import measurement, oci_manifest
from adapterhub.manifest.document import AdapterManifest, upgrade
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import LATEST, Ref, RefError
from adapterhub.store.store import Entry, Store
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import AdapterhubError, NotFoundError


@dataclass(frozen=True, repr=False)
class Version:
    """One version of a name.

    Attributes:
        digest: Of its manifest; the version's identity anywhere.
        size: Bytes of its files; None where its manifest can't be read.
        tags: That point to it now.
        tag: The tag that was asked for, if one was.
        deprecated: Why it should not be used any more, perhaps empty; None where it may be.
        new: Whether this push made it; False when the name had the same content already.
        skipped: Names in the pushed folder that were left out.
        overridden: Codes of the errors of its check that `force` accepted.
    """

    name: str
    number: int
    digest: Digest
    size: int | None
    tags: tuple[str, ...] = ()
    tag: str | None = None
    deprecated: str | None = None
    new: bool = False
    skipped: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()

    @property
    def ref(self) -> Ref:
        """The name with the running number."""
        return Ref(self.name, number=self.number)

    def __repr__(self) -> str:
        return f"<Version {self.ref} {self.digest[:19]}{''.join(f' {tag}' for tag in self.tags)}>"


class Reading:
    """An open registry, as far as it is read; under its lock the catalog alone changes, to what the logs say."""

    def __init__(self, root: Path, store: Store, catalog: Catalog) -> None:
        self.root = root
        self.store = store
        self.catalog = catalog

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The write lock, on the database that is there now: one deleted meanwhile is made and opened anew."""
        if self.catalog.in_transaction:
            yield
            return
        while True:
            with self.store.lease("move", required=False), self.catalog.transaction():
                if not self.catalog.is_replaced():
                    yield
                    return
            self.catalog.close()
            if not (self.root / FILE).exists():
                Catalog.create(self.root / FILE, self.store)
            self.catalog = Catalog.open(self.root / FILE, self.store)

    def _replay(self) -> None:
        """Bring a catalog that is behind its logs, as one from a backup, up to them; a log that cannot be read stays behind."""
        if self.catalog.is_level(self.store):
            return
        with self.locked():
            if not self.catalog.is_level(self.store):
                self._catch_up_all()
                self.catalog.adopt_index(self.store)

    def _catch_up_all(self) -> None:
        for name in self.store.names():
            with contextlib.suppress(AdapterhubError):
                self.catalog.catch_up(self.store, name)

    def close(self) -> None:
        """Close the catalog."""
        self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resolve(self, ref: Ref) -> Version:
        """The version that `ref` names now: by tag, number or digest; without any of them the newest."""
        return self._version(self.row(ref), ref.tag)

    def deprecations(self) -> dict[tuple[str, int], str]:
        """Why versions, and with the number 0 whole names, should not be used any more."""
        return self.catalog.deprecations()

    def list(self, prefix: str | None = None) -> list[Row]:
        """Every version, by name and newest first; those of one name or namespace if `prefix` is one."""
        if prefix is None:
            return self.catalog.rows()
        # All that begins with `prefix/`, in a form that the index answers: 0 follows the slash.
        return self.catalog.rows("name = ?1 OR (name > ?1 || '/' AND name < ?1 || '0')", prefix.rstrip("/"))

    def show(self, ref: Ref) -> dict[str, Any]:
        """A version as JSON: its refs, its manifest (adapter.json as it is stored, in today's schema) and its OCI manifest."""
        row = self.row(ref)
        raw = self.store.read_document(row.digest)
        made = oci_manifest.parse(raw, str(row.ref))
        manifest = self.store.read_document(made.adapter_json.digest) if made.adapter_json else b"{}"
        return {
            "ref": str(row.ref),
            "name": row.name,
            "number": row.number,
            "tags": list(row.tags),
            "protected": sorted(set(row.tags) & set(self.catalog.marks("protect", row.name))),
            "deprecated": self._deprecated(row),
            "digest": row.digest,
            "size": made.size,
            "time": row.time,
            "evaluations": measurement.of_version(self.catalog.marks("evaluate", row.name), row.number),
            "manifest": upgrade(oci_manifest.parse_json(manifest, f"{row.ref}/{ADAPTER_JSON}")),
            "oci_manifest": oci_manifest.parse_json(raw, str(row.ref)),
        }

    def holding(self, digest: Digest) -> Sequence[Row]:
        """The versions that have this manifest: one of each name that it was pushed to."""
        return self.catalog.rows("digest = ?", digest)

    def children(self, digest: Digest) -> Sequence[Row]:
        """The versions that name `digest` among their parents."""
        return self.catalog.rows("id IN (SELECT version FROM made_from WHERE parent = ?)", digest)

    def adapter_manifest(self, digest: Digest) -> AdapterManifest | None:
        """What can be used of the adapter.json of the version whose OCI manifest is `digest`; None if it has none."""
        return rows.adapter_manifest(self.store, oci_manifest.parse(self.store.read_document(digest), digest))

    def files(self, version: Version) -> tuple[Descriptor, ...]:
        """The files of a version, sorted by path; the bytes of each are the blob of its digest."""
        return self._manifest(version).layers

    @contextmanager
    def reading(self, ref: Ref) -> Iterator[Version]:
        """The version that `ref` names; no gc removes a blob of it until the context ends, whatever becomes of its name."""
        with self.store.lease("read", required=False) as lease:
            found = self.resolve(ref)
            lease.note(found.digest)
            # Looked at again: had it gone before it was noted, this says so; if it goes now, a gc finds it noted.
            yield replace(self.resolve(Ref(found.name, digest=found.digest)), tag=found.tag)

    def _manifest(self, version: Version) -> Manifest:
        return oci_manifest.parse(self.store.read_document(version.digest), str(version.ref))

    def _version(self, row: Row, tag: str | None = None) -> Version:
        return Version(row.name, row.number, row.digest, row.size, row.tags, tag, self._deprecated(row))

    def _deprecated(self, row: Row) -> str | None:
        found = self.catalog.marks("deprecate", row.name)
        return found.get(str(row.number), found.get("0"))

    def log(self, ref: Ref) -> builtins.list[Entry]:
        """The log of a name, deleted or not, the newest entry first; of a tag or a version what is about it."""
        if self._current(ref.name).seq == 0:
            self.row(ref)  # says so
        number = self.row(ref).number if ref.number or ref.digest or ref.range else 0

        def is_about(entry: Entry) -> bool:
            if ref.tag:
                return entry.op == "delete" or ref.tag in entry.tags
            return not number or entry.op == "delete" or number in (entry.number, *entry.numbers)

        found = [entry for entry in self.store.log(ref.name) if is_about(entry)]
        if ref.tag and not any(entry.tags for entry in found):
            raise NotFoundError(str(ref), "this tag was never set", f"Run `adapterhub log {ref.name}`")
        return found[::-1]

    def row(self, ref: Ref) -> Row:
        """The version that `ref` names now, as lists show it."""
        state = self._current(ref.name)
        if state.seq == 0:
            close = difflib.get_close_matches(ref.name, [name.name for name in self.catalog.names()], 1)
            hint = f"Did you mean {close[0]}?" if close else "Run `adapterhub list`"
            raise NotFoundError(str(ref), "no such adapter", hint)
        if state.deleted:
            raise NotFoundError(str(ref), "was deleted")
        if ref.digest:
            rows = self.catalog.rows("name = ? AND substr(digest, 1, length(?)) = ?", ref.name, ref.digest, ref.digest)
            if len(rows) > 1:
                raise RefError(
                    str(ref), f"{len(rows)} versions begin so: {rows[0].ref}, {rows[1].ref}", "Write more of the digest"
                )
        else:
            number = ref.number or self._tagged(ref)
            rows = self.catalog.rows("name = ? AND number = ?", ref.name, number)
        if not rows:
            raise self._no_such(ref)
        return rows[0]

    def _tagged(self, ref: Ref) -> int:
        """The number that a tag or a range means, 0 for none. A tag that isn't there, like `1.2`, may be a range."""
        tags = self.catalog.tags(ref.name)
        if not ref.range and (ref.tag or LATEST) in tags:
            return tags[ref.tag or LATEST]
        wanted = semver.parse_range(ref.range or ref.tag or "")
        found = semver.highest(list(tags), wanted) if wanted else []
        if len({tags[tag] for tag in found}) > 1:
            raise RefError(str(ref), f"{' and '.join(found)} are one version and point to different ones", "Name one of them")
        return tags[found[0]] if found else 0

    def _exact(self, ref: Ref) -> Row:
        """The version of a ref that is about to change: a range, or a tag that isn't there, never means another one here."""
        if ref.range or (ref.tag and self._current(ref.name).number and ref.tag not in self.catalog.tags(ref.name)):
            raise self._no_such(ref)
        return self.row(ref)

    def _no_such(self, ref: Ref) -> NotFoundError:
        if ref.range:
            versions = [tag for tag in self.catalog.tags(ref.name) if semver.parse(tag)]
            what = f"no tag is in this range; versions here are {', '.join(versions[-10:]) or 'none'}"
            return NotFoundError(str(ref), what, "A range looks at tags like 1.2.0")
        what = "tag" if ref.tag else "version"
        there = [*self.catalog.tags(ref.name), *(f"v{row.number}" for row in self.catalog.rows("name = ?", ref.name)[:5])]
        hint = f"Run `adapterhub list {ref.name}`"
        return NotFoundError(str(ref), f"no such {what}; the registry has {', '.join(there[:10]) or 'none'}", hint)

    def _current(self, name: str) -> Name:
        """Where a name stands, the catalog brought up to its log if that has gone on without it."""
        state = self.catalog.name(name)
        if self.store.entry_path(name, state.seq + 1).exists():
            with self.locked():
                state = self.catalog.catch_up(self.store, name)
        return state
