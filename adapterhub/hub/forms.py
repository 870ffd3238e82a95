"""Versions in other formats, as repositories of their own have them: made when first asked for, one at a time, by one process.

A form is a manifest like that of a version, whose blobs are in the store, so that it is served as a version is. hub.db says
which one it is. Nothing else needs the blobs: the hub's lease keeps them while it runs, and what a gc removes later is taken
from the conversion cache of the registry, or made again.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import Row
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import BaseInfo
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, Descriptor, Manifest
from adapterhub.project.policy import Policy
from adapterhub.registry.registry import Registry
from adapterhub.store import ingest
from adapterhub.store.export import linked
from adapterhub_converters.adapter_files import adapter_in
from adapterhub_converters.errors import AdapterhubError, RefusedError

from .jobs import Jobs
from .storage.folder import Storage

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_REMEMBERED = 60.0  # seconds until a conversion that failed is tried again
_MOST = 1000  # failures that are remembered
_MAX_NUMBERS = 1 << 26  # of the low-rank pairs that stand for an adapter of another kind: 1 kB may ask for any number of them


class Forms:
    """The forms of a hub; `close` it in the end."""

    def __init__(self, storage: Storage, policy: Policy | None) -> None:
        self._storage, self._store, self._database, self._policy = storage, storage.store(), storage.database, policy
        self._jobs = Jobs(storage.database)
        self._pool = ThreadPoolExecutor(1, "hub-form")
        self._failed: dict[tuple[Digest, str], tuple[float, AdapterhubError]] = {}

    def close(self) -> None:
        """Wait for the conversion that has begun."""
        self._pool.shutdown(cancel_futures=True)

    def find(self, source: Digest, form: str) -> Digest:
        """The manifest of a version in a format; empty if it was not made, or is not whole any more."""
        rows = self._database.select("SELECT digest FROM forms WHERE source = ? AND form = ?", source, form)
        return str(rows[0][0]) if rows and self._is_whole(rows[0][0]) else ""

    def held(self, registry: Registry, namespace: str) -> dict[Digest, int]:
        """The blobs of the forms that the versions of a namespace have: digest to bytes."""
        sources = {row.digest for row in queries.versions(registry.index, prefix=namespace)}
        rows = self._database.select("SELECT source, digest FROM forms")
        made = {digest for source, digest in rows if source in sources and self._is_whole(digest)}
        found = (oci_manifest.parse(self._store.read_document(digest), digest) for digest in made)
        return {blob.digest: blob.size for one in found for blob in _blobs(one)}

    def _is_whole(self, digest: Digest) -> bool:
        if self._store.size(digest) is None:
            return False
        made = oci_manifest.parse(self._store.read_document(digest), digest)
        return all(self._store.has(blob.digest, blob.size) for blob in _blobs(made))

    async def make(self, row: Row, form: str) -> None:
        """Convert a version, unless that was done meanwhile.

        Raises:
            RefusedError: It has no such form, or needs a base model that the registry does not know.
        """
        until, error = self._failed.get((row.digest, form), (0.0, None))
        if error and until > time.monotonic():
            raise error
        try:
            async with self._jobs.claimed(f"{row.digest} as {form}"):
                await asyncio.get_running_loop().run_in_executor(self._pool, self._make, row, form)
        except AdapterhubError as failed:
            if len(self._failed) >= _MOST:
                self._failed.clear()
            self._failed[row.digest, form] = time.monotonic() + _REMEMBERED, failed
            raise

    def _make(self, row: Row, form: str) -> None:
        if self.find(row.digest, form):
            return
        with self._storage.registry() as registry:
            self._storage.refresh(registry)
            try:
                made = self._converted(registry, row, form, None)
            except RefusedError as error:
                if error.code != "base-required":
                    raise
                made = self._converted(registry, row, form, _base(registry, row))
        for blob in _blobs(made):
            self._store.holds(blob.digest, blob.size)
        sql = "INSERT INTO forms VALUES (?, ?, ?) ON CONFLICT (source, form) DO UPDATE SET digest = excluded.digest"
        self._database.execute(sql, row.digest, form, made.digest)

    def _converted(self, registry: Registry, row: Row, form: str, base: BaseSpec | None) -> Manifest:
        from adapterhub.registry import conversion_cache, publish
        from adapterhub.registry.recipe import Conversion

        version = registry.resolve(row.ref)
        with linked(registry.store, registry.files(version)) as source:
            check_numbers(adapter_in(source), str(row.ref), base)
        with conversion_cache.converted(registry, version, Conversion(form), base=base, policy=self._policy) as (folder, *_):
            package = publish.package(folder, where=f"{row.ref} as {form}", checked=True)
            with registry.store.lease("convert"):
                made, _ = ingest.ingest(registry.store, folder, draft=package.draft)
                registry.store.sync_blobs()
        return made


def check_numbers(path: Path, where: str, base: BaseSpec | None = None) -> None:
    """Refuse an adapter that takes too much memory as low-rank pairs."""
    from adapterhub_converters.adapter import pair_numbers
    from adapterhub_converters.formats import convert

    numbers = pair_numbers(convert.read(path, base=base, mapped=True).deltas.values())
    if numbers > _MAX_NUMBERS:
        raise RefusedError(where, f"as low-rank pairs it has {numbers:,} numbers, more than this hub computes with")


def _blobs(made: Manifest) -> tuple[Descriptor, ...]:
    return (Descriptor(MANIFEST_TYPE, made.digest, len(made.raw)), made.config, *made.layers)


def _base(registry: Registry, row: Row) -> BaseSpec:
    """The base model of a version, of those in the registry: the one that it is pinned to, else one of the name that it has."""
    from adapterhub.bases import registered

    manifest = registry.adapter_manifest(row.digest)
    wanted = manifest.base if manifest else BaseInfo()
    for one in registered.every(registry)[0]:
        if one.spec.fingerprint == wanted.fingerprint if wanted.fingerprint else wanted.repo and one.spec.repo == wanted.repo:
            return one.spec
    what = f"this form depends on the base model, {wanted.repo or 'which it does not name'}, and the hub does not know that"
    raise RefusedError(str(row.ref), what, "Have the base added to the hub's registry")
