"""One name in the local registry as a source and a target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.package_files import check_file
from adapterhub.ref import LATEST, Ref
from adapterhub.registry.registry import Registry, Version
from adapterhub.registry.version_facts import read_parent
from adapterhub.store.export import linked_folder
from adapterhub.store.store import local_errors
from adapterhub_converters.adapter_files import ADAPTER_JSON, HEAD_SIZE
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError

from .download import receive_concurrently, skip_bytes
from .protocol import PutResult, Reader, Source, check_complete

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy


class LocalName:
    """One name in an open registry. Write to it inside `lease_for_push`, or a concurrent gc could remove the blobs.

    Attributes:
        version: The version that the manifest stored last has become.
        policy: The project's policy; a manifest that it does not allow is refused.
    """

    def __init__(self, registry: Registry, name: str, policy: Policy | None = None) -> None:
        self.registry, self.name, self.policy = registry, name, policy
        self.version: Version | None = None

    @property
    def location(self) -> str:
        """The name."""
        return self.name

    @contextmanager
    def lease_for_push(self) -> Iterator[LocalName]:
        """Keep blobs that are stored in this context until a manifest names them."""
        self.registry.store.files.sweep()
        with self.registry.store.lease("push"):
            yield self

    def manifest(self, reference: str) -> Manifest:
        """Return the manifest of a version, by tag, number or digest."""
        separator = "@" if ":" in reference else ":"
        version = self.registry.resolve(Ref.parse(f"{self.name}{separator}{reference}"))
        return oci_manifest.parse(self.registry.store.read_document(version.digest), str(version.ref))

    @contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a blob for reading from `start` on."""
        if not self.registry.store.has_blob(blob.digest, blob.size):
            raise NotFoundError(self.name, f"the registry has no blob {blob.digest} of {blob.size} bytes")
        with self.registry.store.open_blob(blob.digest) as file:
            reader = cast(Reader, file)
            if start and file.seekable():
                file.seek(start)
            else:  # a compressed blob can only be read from its start
                skip_bytes(reader, start)
            yield reader

    def tags(self) -> list[str]:
        """Return all tags that point to a version now, sorted."""
        self.registry.resolve(Ref(self.name))
        return sorted({tag for row in self.registry.list(self.name) if row.name == self.name for tag in row.tags})

    def stop(self, *, on: bool = True) -> None:
        """Do nothing: files are read at once."""

    def has_blob(self, blob: Descriptor) -> bool:
        """Return whether the store has a blob."""
        return self.registry.store.retain_if_present(blob.digest, blob.size)

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Receive a blob in the store's tmp/, where the next run can resume it."""
        store = self.registry.store
        with receive_concurrently(source, blob, store.files, store.part_path(blob.digest)) as (path, file):
            store.adopt(path, file, blob.digest)
        return blob.size

    def put_manifest(self, manifest: Manifest, tag: str | None) -> PutResult:
        """Make a manifest the next version of the name, if its adapter.json matches its files and the checks find no errors."""
        store = self.registry.store
        # `latest` moves with every version, so it is not a tag to set.
        ref = Ref(self.name, tag=None if tag == LATEST else tag)
        check_complete((*manifest.layers, manifest.config), lambda blob: store.has_blob(blob.digest, blob.size), str(ref))
        if not store.has_blob(manifest.digest, len(manifest.raw)):  # the files of one in the store were checked before
            self._check_files(manifest)
        self.check_version(manifest, str(ref))
        store.put_bytes(manifest.raw)
        with local_errors(store.root):
            # The blobs must be on disk before the index of the registry names them.
            store.sync_blobs()
        self.version = version = self.registry.push_manifest(manifest, ref)
        return PutResult(new=version.new, moved=version.moved, number=version.number)

    def check_version(
        self, manifest: Manifest, location: str, *, force: bool = False, facts_only: bool = False
    ) -> tuple[str, ...]:
        """Refuse a version that a push would refuse; with `force`, return the codes of its errors instead.

        With `facts_only`, its adapter.json is compared with the headers of the weights and with the policy, but no weights are
        read.
        """
        from adapterhub.registry import packaging  # needs numpy

        with linked_folder(self.registry.store, manifest.layers) as folder:
            try:
                errors = packaging.check_received(
                    folder,
                    manifest,
                    location=location,
                    policy=self.policy,
                    force=force,
                    check=not facts_only,
                    measurements=self.registry.measurements(manifest.digest),
                    read_parent=partial(read_parent, self.registry.store),
                )
            # The files were linked into a temporary folder, whose name means nothing to the user.
            except AdapterhubError as error:
                error.rename(str(folder), location)
                raise
        return tuple(problem.code for problem in errors)

    def _check_files(self, manifest: Manifest) -> None:
        """Check what a push checks of a folder, as far as names and documents show it."""
        from adapterhub.registry import packaging  # needs numpy

        for layer in manifest.layers:
            with self.open_blob(layer) as file:
                head = bytearray(HEAD_SIZE)
                count = file.readinto(head)
            check_file(layer.path, bytes(head[:count]), self.name)
        if manifest.adapter_json is None:
            raise RefusedError(self.name, f"there is no {ADAPTER_JSON} in it", "Pull it into a folder, and push that")
        packaging.check_listed(self.registry.store, manifest, self.name)
