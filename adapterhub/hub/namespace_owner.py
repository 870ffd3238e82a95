"""The owner of a namespace: this hub, or another hub whose names can be read here too."""

from __future__ import annotations

from adapterhub.ref import is_name
from adapterhub.store.store import HUB, REFS

from . import mirror_origin
from .access_control import Access
from .workers import Worker


def is_own_namespace(worker: Worker, access: Access, namespace: str) -> bool:
    """Return whether a namespace is this hub's own: then its names must not be revealed to another hub, nor come from there.

    It is if somebody has a role in it, if only its members may read it, or if it has or had a name that was not mirrored.
    """
    if access.is_local_namespace(namespace):
        return True
    if not is_name(f"{namespace}/name"):  # nothing here can have such a name
        return False
    log = worker.registry.store.log
    mirrored_names = mirror_origin.names(worker.database, namespace)
    return not mirrored_names.issuperset(log.names(REFS, namespace) + log.names(HUB, namespace))
