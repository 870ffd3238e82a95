"""Versions converted to other formats: on first request, one at a time, by one process.

A converted version is a manifest like any other, with its blobs in the store, so it is served as a version is. Table `forms` of
hub.db maps a version and a format to that manifest. Nothing else refers to the blobs: the hub's lease keeps them while it runs,
and what a gc removes later is taken from the registry's conversion cache, or converted again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import BaseInfo
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, Descriptor, Manifest
from adapterhub.project.policy import Policy
from adapterhub.registry.registry import Registry
from adapterhub.store import ingest
from adapterhub.store.export import linked_folder
from adapterhub_converters.adapter_files import resolve_adapter
from adapterhub_converters.errors import AdapterhubError, RefusedError

from . import request_context
from .jobs import Jobs
from .storage.folder_storage import Storage

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.formats import WrittenFormat

_RETRY_AFTER = 60.0  # seconds until a failed conversion is tried again
_MAX_FAILURES = 1000  # failures kept in memory
_MAX_LOOKS = 1000  # rows of a look for removed ones
# Numbers in the low-rank pairs an adapter of another kind expands to: a file of 1 kB may declare any number of them.
_MAX_NUMBERS = 1 << 26


class ConvertedVersions:
    """The converted versions of a hub; `close` it when done."""

    def __init__(self, storage: Storage, policy: Policy | None) -> None:
        self._storage, self._store, self._database, self._policy = storage, storage.store(), storage.database, policy
        self._jobs = Jobs(storage.database)
        self._pool = ThreadPoolExecutor(1, "hub-form")
        # Finds the base of a version that no operator has added.
        self.find_base: Callable[[VersionRow, BaseInfo], BaseSpec | None] = lambda _row, _base: None
        self._place = ""  # in table `forms`, where the look for removed ones goes on
        self._failures: dict[tuple[Digest, str], tuple[float, AdapterhubError]] = {}

    def close(self) -> None:
        """Wait for the running conversion."""
        self._pool.shutdown(cancel_futures=True)

    def find(self, source: Digest, form: str) -> Digest:
        """Return the digest of a version's manifest in a format; empty if it was never converted, or blobs of it are gone."""
        rows = self._database.select("SELECT digest FROM forms WHERE source = ? AND form = ?", source, form)
        return str(rows[0][0]) if rows and self._is_complete(rows[0][0]) else ""

    def forget_removed(self) -> None:
        """Forget converted versions that a gc has removed, some of them at a time."""
        sql = "SELECT source, form, digest FROM forms WHERE source > ? ORDER BY source, form LIMIT ?"
        rows = self._database.select(sql, self._place, _MAX_LOOKS)
        gone = [row for row in rows if self._store.size(row[2]) is None]
        # Only if it was not converted again meanwhile.
        self._database.execute_many("DELETE FROM forms WHERE source = ? AND form = ? AND digest = ?", gone)
        self._place = rows[-1][0] if len(rows) == _MAX_LOOKS else ""

    def blob_sizes(self, registry: Registry, namespace: str) -> dict[Digest, int]:
        """Return the size in bytes of each blob of the converted versions of a namespace."""
        sources = {row.digest for row in queries.versions(registry.index, prefix=namespace)}
        rows = self._database.select("SELECT source, digest FROM forms")
        digests = {digest for source, digest in rows if source in sources and self._is_complete(digest)}
        manifests = (oci_manifest.parse(self._store.read_document(digest), digest) for digest in digests)
        return {blob.digest: blob.size for manifest in manifests for blob in _blobs(manifest)}

    def _is_complete(self, digest: Digest) -> bool:
        if self._store.size(digest) is None:
            return False
        manifest = oci_manifest.parse(self._store.read_document(digest), digest)
        return all(self._store.has_blob(blob.digest, blob.size) for blob in _blobs(manifest))

    async def make(self, row: VersionRow, form: str) -> None:
        """Convert a version, unless another request has done so meanwhile; its CPU counts for the client that asks.

        Raises:
            BodyError: The request has used up its time.
            RefusedError: It has no such format, or needs a base model the registry does not know.
        """
        until, error = self._failures.get((row.digest, form), (0.0, None))
        if error and until > time.monotonic():
            raise error
        try:
            async with self._jobs.claim(f"{row.digest} as {form}"):
                work = request_context.current().work.with_timer(lambda: self._make(row, form))
                await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except AdapterhubError as failure:
            if len(self._failures) >= _MAX_FAILURES:
                self._failures.clear()
            self._failures[row.digest, form] = time.monotonic() + _RETRY_AFTER, failure
            raise

    def _make(self, row: VersionRow, form: str) -> None:
        if self.find(row.digest, form):
            return
        with self._storage.registry() as registry:
            self._storage.refresh(registry)
            try:
                manifest = self._convert(registry, row, form, None)
            except RefusedError as error:
                # Only some formats need the base model, so find it only when asked to.
                if error.code != "base-required":
                    raise
                manifest = self._convert(registry, row, form, self._base(registry, row))
        for blob in _blobs(manifest):
            # Note each blob in the hub's lease before the row refers to it: a gc may run at any moment.
            self._store.retain_if_present(blob.digest, blob.size)
        sql = (
            "INSERT INTO forms (source, form, digest) VALUES (?, ?, ?)"
            " ON CONFLICT (source, form) DO UPDATE SET digest = excluded.digest"
        )
        self._database.execute(sql, row.digest, form, manifest.digest)

    def _convert(self, registry: Registry, row: VersionRow, form: str, base: BaseSpec | None) -> Manifest:
        from adapterhub.registry import conversion_cache, packaging
        from adapterhub.registry.adapter_recipe import Conversion

        version = registry.resolve(row.ref)
        with linked_folder(registry.store, registry.files(version)) as source:
            check_pair_numbers(resolve_adapter(source), str(row.ref), base)
        conversion = Conversion(cast("WrittenFormat", form))  # `aliases` knows two formats
        with conversion_cache.converted_folder(registry, version, conversion, base=base, policy=self._policy) as (
            folder,
            *_,
        ):
            package = packaging.package(folder, location=f"{row.ref} as {form}", already_checked=True)
            with registry.store.lease("convert"):
                manifest, _ = ingest.ingest(registry.store, folder, draft=package.draft)
                registry.store.sync_blobs()
        return manifest

    def _base(self, registry: Registry, row: VersionRow) -> BaseSpec:
        """Return the base model of a version: a registered one, else a whole model that was uploaded or is at the upstream."""
        manifest = registry.adapter_manifest(row.digest)
        base = manifest.base if manifest else BaseInfo()
        spec = _registered_base(registry, base) or self.find_base(row, base)
        if spec is None:
            name = base.repo or "which it does not name"
            problem = f"this format depends on the base model, {name}, and the hub does not have it"
            raise RefusedError(str(row.ref), problem, "Upload the base under that name, or ask the operator to add it")
        return spec


def check_pair_numbers(path: Path, location: str, base: BaseSpec | None = None) -> None:
    """Refuse an adapter that would take too much memory as low-rank pairs."""
    from adapterhub_converters.adapter import count_pair_numbers
    from adapterhub_converters.formats import convert

    numbers = count_pair_numbers(convert.read(path, base=base, mapped=True).deltas.values())
    if numbers > _MAX_NUMBERS:
        raise RefusedError(location, f"as low-rank pairs it has {numbers:,} numbers, more than this hub computes with")


def _blobs(manifest: Manifest) -> tuple[Descriptor, ...]:
    return (Descriptor(MANIFEST_TYPE, manifest.digest, len(manifest.raw)), manifest.config, *manifest.layers)


def _registered_base(registry: Registry, base: BaseInfo) -> BaseSpec | None:
    """Return the registered base model that is pinned by fingerprint, else one of the same name; None without one."""
    from adapterhub.bases import registered_bases

    for candidate in registered_bases.all_bases(registry)[0]:
        if (
            candidate.spec.has_fingerprint(base.fingerprint)
            if base.fingerprint
            else base.repo and candidate.spec.repo == base.repo
        ):
            return candidate.spec
    return None
