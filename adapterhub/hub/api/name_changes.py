"""Changes of a name, its versions and its tags, each with its checks: the API and the forms of the pages make them.

Each looks the name and the rights up again, as they may be gone since the request began. Callers hold `Hub.change`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from adapterhub.digest import Digest
from adapterhub.hub import commits, removals, request_context
from adapterhub.hub.access_control import check_admin
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.hf import repositories
from adapterhub.hub.hf.hf_errors import MovedError
from adapterhub.hub.hub import Hub
from adapterhub.hub.oci.manifest_handlers import move_branches
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.maintenance import retention
from adapterhub.manifest.keep_rule import KeepRule
from adapterhub.ref import LATEST, Ref, is_tag
from adapterhub.registry.repository_documents import MAIN
from adapterhub.registry.repository_records import ENTRY_SIZE
from adapterhub.registry.version_lookup import Version
from adapterhub.remotes import version_documents
from adapterhub_converters.errors import RefusedError, UsageError

from .api_requests import check_known, ref_to, visible_view

RESERVED = (MAIN, commits.HEAD)
"""Names of the branch that every repository has."""
_MAX_KEPT = 1_000_000  # versions
_MAX_TTL = 100_000 * 86400  # seconds


def check_writer(worker: Worker, hub: Hub, identity: Identity | None, name: str, *, size: int = ENTRY_SIZE) -> commits.View:
    """Return a repository that a client sees and may write to, with room for `size` bytes of its log."""
    view = visible_view(worker, hub, identity, name)
    hub.access.check_write(identity, name)
    if size:
        hub.quotas.check_record(worker, name, size)
    return view


def checked_tag(name: str, tag: str) -> str:
    """Return a tag that a client may set by hand."""
    if tag in RESERVED:
        raise RefusedError(f"{name}:{tag}", "is the branch with the newest version", "Choose another tag")
    if not is_tag(tag) or ref_to(name, tag).tag is None:
        raise UsageError(f"{name}:{tag[:130]}", "is not a tag that can be set", "Use up to 128 of A-Z a-z 0-9 . _ -")
    if tag == LATEST:
        raise RefusedError(f"{name}:{tag}", "is always the newest push", "Choose another tag", code="latest-tag", name=name)
    return tag


def set_tag(
    worker: Worker,
    hub: Hub,
    identity: Identity | None,
    name: str,
    *,
    reference: str,
    tag: str,
    expect: Digest | None = None,
) -> Version:
    """Point a tag at a version, if it is where `expect` says."""
    check_writer(worker, hub, identity, name)
    version = worker.registry.tag(ref_to(name, reference), checked_tag(name, tag), expect=expect)
    move_branches(worker, name, version, (tag,))
    return version


def remove_tag(
    worker: Worker, hub: Hub, identity: Identity | None, name: str, tag: str, *, expect: Digest | None = None
) -> Ref:
    """Remove a tag, if it is where `expect` says; its version stays."""
    # It makes room, and is never refused for the lack of it.
    check_writer(worker, hub, identity, name, size=0)
    ref = Ref(name, tag=checked_tag(name, tag))
    worker.registry.rm(ref, expect=expect)
    return ref


def deprecate(
    worker: Worker,
    hub: Hub,
    identity: Identity | None,
    name: str,
    *,
    reference: str = "",
    message: str = "",
    undo: bool = False,
) -> dict[str, Any]:
    """Warn of a version, or of a name without a reference, or withdraw that."""
    check_writer(worker, hub, identity, name, size=ENTRY_SIZE + len(message))
    number = worker.registry.deprecate(ref_to(name, reference) if reference else Ref(name), message, undo=undo)
    return {"name": name, "number": number or None, "deprecated": None if undo else message}


def remove_name(
    worker: Worker, hub: Hub, identity: Identity | None, name: str, *, expect: Digest | None = None, force: bool = False
) -> None:
    """Remove a name with its versions; with `force` even one that others were made from."""
    view = check_writer(worker, hub, identity, name, size=0)
    removals.remove(worker, view, partial(hub.may_read_name, worker, identity), expect=expect, force=force)


def check_movable(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> None:
    """Raise NotFoundError unless a client may see a name, or the one that it was moved to."""
    with suppress(MovedError):
        visible_view(worker, hub, identity, name)


def move_name(worker: Worker, hub: Hub, identity: Identity | None, old: str, new: str) -> int:
    """Rename a name, which then leads to the new one; return the number of versions. The caller holds `Hub.locks.move`."""
    check_movable(worker, hub, identity, old)
    repositories.move_repository(worker, hub, identity, old, new)
    return len(queries.versions(worker.registry.index, name=new))


def restore_name(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> dict[str, Any]:
    """Undo the removal of a name."""
    check_known(worker, hub, identity, name)
    hub.access.check_write(identity, name)
    hub.quotas.check_record(worker, name, ENTRY_SIZE)
    if worker.registry.ledger.current(name).deleted:
        hub.quotas.check(worker, name, removals.restorable_files(worker, name), count=True)
    return version_documents.restore_document(removals.restore(worker, name))


def set_retention(worker: Worker, hub: Hub, identity: Identity | None, name: str, rule: KeepRule | None) -> None:
    """Set which versions of a name a gc keeps, besides those with tags; None for all. For admins."""
    request_context.current().record_detail(keep=rule.last if rule else "all", ttl=rule.ttl or None if rule else None)
    visible_view(worker, hub, identity, name)
    check_admin(identity, name.partition("/")[0])
    if rule is not None and not 0 <= rule.last <= _MAX_KEPT:
        raise UsageError("keep", f"{rule.last} is not a number of versions", "Choose 0, which keeps those with tags, or more")
    if rule is not None and not 0 <= rule.ttl <= _MAX_TTL:
        raise UsageError("ttl", f"{rule.ttl} is not a time from 0 to {_MAX_TTL} seconds")
    hub.quotas.check_record(worker, name, ENTRY_SIZE)
    retention.keep(worker.registry, Ref(name), rule)
