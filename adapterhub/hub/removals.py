"""Removal of a repository, which can be undone until a gc has removed its data."""

from __future__ import annotations

from collections.abc import Callable

from adapterhub.digest import Digest
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry.repository_records import Repository
from adapterhub.registry.version_lookup import removed_versions
from adapterhub_converters.errors import AdapterhubError, RefusedError

from .commits import View
from .workers import Worker


def remove(
    worker: Worker, view: View, sees: Callable[[str], bool], *, expect: Digest | None = None, force: bool = False
) -> None:
    """Remove a repository with its versions.

    Args:
        worker: The worker of this thread.
        view: The repository.
        sees: Returns whether the client may see a name, for an error that would name it.
        expect: As in `Registry.rm`.
        force: Remove it even if other adapters were made from its versions.
    """
    if view.newest:
        try:
            worker.registry.rm(Ref(view.name), expect=expect, force=force)
        except RefusedError as error:
            if error.code != "has-children" or sees(str(error.fields["child"])):
                raise
            problem = "an adapter was made from it that you may not see, and could not be made again"
            raise RefusedError(view.name, problem, error.hint, code=error.code) from None
    repository = worker.repositories.get(view.name)
    if repository and repository.private and worker.registry.ledger.current(view.name).seq:
        # A restored name must be as private as it was, even if this ends a removal that was cut off after the versions.
        worker.repositories.change(view.name, lambda state: Repository(private=True, created=state.created))
    else:
        worker.repositories.remove(view.name)


def restorable_files(worker: Worker, name: str) -> dict[Digest, int]:
    """Return the stored files of the versions that the last removal of a name deleted: digest to bytes."""
    store, files = worker.registry.store, dict[Digest, int]()
    for digest in removed_versions(list(store.log.entries(name))).values():
        try:
            layers = oci_manifest.parse(store.read_document(digest), digest).layers
        except AdapterhubError:  # a gc has removed it, or it is damaged
            continue
        files |= {layer.digest: layer.size for layer in layers if store.has_blob(layer.digest, layer.size)}
    return files
