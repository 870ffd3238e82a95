"""One name of the local registry as a source and a target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.package_files import check_file
from adapterhub.ref import LATEST, Ref
from adapterhub.registry.registry import Registry, Version
from adapterhub.store.export import linked
from adapterhub.store.store import local_errors
from adapterhub_converters.adapter_files import ADAPTER_JSON, HEAD
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError

from .download import pass_over, received_concurrently
from .protocol import Put, Reader, Source, check_complete

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy


class Local:
    """One name of an open registry. What is put needs `Local.at_work` around it, as a gc would take it otherwise.

    Attributes:
        version: The version that the last manifest which was put has become.
        policy: The project's; a manifest that it does not allow is not put.
    """

    def __init__(self, registry: Registry, name: str, policy: Policy | None = None) -> None:
        self.registry, self.name, self.policy = registry, name, policy
        self.version: Version | None = None

    @property
    def where(self) -> str:
        """The name."""
        return self.name

    @contextmanager
    def at_work(self) -> Iterator[Local]:
        """Blobs that are put in here stay until a manifest names them."""
        self.registry.store.files.sweep()
        with self.registry.store.lease("push"):
            yield self

    def manifest(self, reference: str) -> Manifest:
        """The manifest of a version, by tag, number or digest."""
        separator = "@" if ":" in reference else ":"
        version = self.registry.resolve(Ref.parse(f"{self.name}{separator}{reference}"))
        return oci_manifest.parse(self.registry.store.read_document(version.digest), str(version.ref))

    @contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a blob from `start` on."""
        if not self.registry.store.has(blob.digest, blob.size):
            raise NotFoundError(self.name, f"the registry has no blob {blob.digest} of {blob.size} bytes")
        with self.registry.store.open_blob(blob.digest) as file:
            reader = cast(Reader, file)
            if start and file.seekable():
                file.seek(start)
            else:  # a compressed blob is read from its start
                pass_over(reader, start)
            yield reader

    def tags(self) -> list[str]:
        """All tags that point to a version now, sorted."""
        self.registry.resolve(Ref(self.name))
        return sorted({tag for row in self.registry.list(self.name) if row.name == self.name for tag in row.tags})

    def stop(self, *, on: bool = True) -> None:
        """Do nothing: files are read at once."""

    def has(self, blob: Descriptor) -> bool:
        """Tell whether the store has a blob."""
        return self.registry.store.holds(blob.digest, blob.size)

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Receive a blob in the store's tmp/, where the next run can resume it."""
        store = self.registry.store
        with received_concurrently(source, blob, store.files, store.part_path(blob.digest)) as (path, file):
            store.adopt(path, file, blob.digest)
        return blob.size

    def put_manifest(self, made: Manifest, tag: str | None) -> Put:
        """Make it the next version of the name, if its adapter.json is true of its files and its check finds no errors."""
        store = self.registry.store
        ref = Ref(self.name, tag=None if tag == LATEST else tag)
        check_complete((*made.layers, made.config), lambda blob: store.has(blob.digest, blob.size), str(ref))
        if not store.has(made.digest, len(made.raw)):  # what is in the store has been looked at
            self._check(made)
        self.check(made, str(ref))
        store.put_bytes(made.raw)
        with local_errors(store.root):
            store.sync_blobs()
        self.version = version = self.registry.admit(made, ref)
        return Put(new=version.new, moved=version.moved, number=version.number)

    def check(self, made: Manifest, where: str, *, force: bool = False, facts_only: bool = False) -> tuple[str, ...]:
        """Refuse a version that a push would refuse; with `force` the codes of its errors.

        `facts_only`: Compare its adapter.json with the headers of the weights and with the policy; no weights are read.
        """
        from adapterhub.registry import publish  # needs numpy

        with linked(self.registry.store, made.layers) as folder:
            try:
                errors = publish.check_received(
                    folder,
                    made,
                    where=where,
                    policy=self.policy,
                    force=force,
                    check=not facts_only,
                    metrics=self.registry.metrics(made.digest),
                )
            except AdapterhubError as error:
                error.where = error.where.replace(str(folder), where)
                raise
        return tuple(problem.code for problem in errors)

    def _check(self, made: Manifest) -> None:
        """Check what a push checks of a folder, as far as names and documents show it."""
        from adapterhub.registry import publish  # needs numpy

        for layer in made.layers:
            with self.open_blob(layer) as file:
                head = bytearray(HEAD)
                n = file.readinto(head)
            check_file(layer.path, bytes(head[:n]), self.name)
        if made.adapter_json is None:
            raise RefusedError(self.name, f"there is no {ADAPTER_JSON} in it", "Pull it into a folder, and push that")
        publish.check_listed(self.registry.store, made, self.name)
