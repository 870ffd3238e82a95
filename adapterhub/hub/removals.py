"""Removal of a repository, which can be undone until a gc has removed its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from adapterhub.digest import Digest
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry import repository_records
from adapterhub.registry.repository_documents import Repository
from adapterhub.registry.version_lookup import RestoreResult, removed_versions
from adapterhub.store.store import HUB
from adapterhub_converters.errors import AdapterhubError, RefusedError

from . import gates, stars
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
    _remove_record(worker, view.name)
    if not view.newest:  # it cannot be restored, and others may take its name
        with worker.database.transaction():
            gates.remove(worker.database, view.name)
            stars.remove(worker.database, view.name)


def _remove_record(worker: Worker, name: str) -> None:
    repository = worker.repositories.get(name)
    if repository and repository.private and worker.registry.ledger.current(name).seq:
        # A restored name must be as private as it was, even if this ends a removal that was cut off after the versions.
        worker.repositories.change(name, lambda state: Repository(private=True, created=state.created))
    else:
        worker.repositories.remove(name)


def restore(worker: Worker, name: str) -> RestoreResult:
    """Undo the removal of a name, with its branches, commits and other manifests unless a gc has removed any of their data."""
    # The record first: a request whose process is killed in between can be sent again.
    has_record = _restore_record(worker, name)
    try:
        return worker.registry.restore(name)
    except RefusedError:
        if has_record:
            _remove_record(worker, name)
        raise


def _restore_record(worker: Worker, name: str) -> bool:
    """Restore the record of a removed name, as private as either was; return whether there is one with all of its data."""
    removed, store = _removed_record(worker, name), worker.registry.store
    if removed is None:
        return False
    record, blobs = removed
    with store.lease("hub"):
        if not all(store.retain_if_present(digest, size) for digest, size in blobs.items()):
            return False
        is_private = record.private
        worker.repositories.change(name, lambda state: replace(record, private=is_private or state.private), has_room=True)
    return True


def _removed_record(worker: Worker, name: str) -> tuple[Repository, dict[Digest, int]] | None:
    """Return the record that the removal of a name ended, and the sizes of the blobs that it needs; None if there is none."""
    store, repository, entry = worker.registry.store, worker.repositories.get(name), worker.repositories.document(name).entry
    if entry is None or not worker.registry.ledger.current(name).deleted or (repository and not repository.is_bare):
        return None
    before = store.log.entry(name, entry.seq - 1, log=HUB) if entry.seq > 1 else None
    # An entry from before the removal is not its own: the record was that empty already.
    if before is None or before[0].op != "push" or entry.time < worker.registry.log_page(Ref(name), limit=1)[0][0].time:
        return None
    try:
        digest = before[0].digest
        record = Repository.parse(store.read_document(digest), f"hub/{name}", store.read_document)
        blobs = repository_records.required_blobs(store, digest)
    except AdapterhubError:  # a gc has removed some of it, or it is damaged
        return None
    if record.moved_to or record.moved_from:
        return None
    return record, {blob: store.size(blob) or 0 for blob in blobs}


def restorable_files(worker: Worker, name: str) -> dict[Digest, int]:
    """Return the stored files of what a restore of a removed name brings back: digest to bytes."""
    store, record = worker.registry.store, _removed_record(worker, name)
    files = record[1] if record else {}
    for digest in removed_versions(list(store.log.entries(name))).values():
        try:
            layers = oci_manifest.parse(store.read_document(digest), digest).layers
        except AdapterhubError:  # a gc has removed it, or it is damaged
            continue
        files |= {layer.digest: layer.size for layer in layers if store.has_blob(layer.digest, layer.size)}
    return files
