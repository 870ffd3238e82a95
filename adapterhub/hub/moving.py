"""Move a repository to another name: its versions with their numbers, and everything else that is kept by the name.

Branches, commits and manifests that are no versions are in the repository's document, which moves as it is. Tags are moved with
the versions. What is kept by namespace, such as roles and webhooks, stays with the namespace, and the audit log keeps the old
name.
"""

from __future__ import annotations

from adapterhub.index import queries
from adapterhub.maintenance import retention
from adapterhub.manifest import measurement
from adapterhub.ref import Ref
from adapterhub.registry import measurements
from adapterhub.registry.registry import Registry
from adapterhub.store.ref_log import in_force

from . import origins
from .database import HubDatabase
from .workers import Desk


def push_versions(desk: Desk, old: str, new: str) -> None:
    """Push the versions of a name under one that has none, with their numbers, messages and marks."""
    registry = desk.registry
    pushed, _ = in_force(registry.store.log.entries(old))
    messages = {entry.number: entry.message for entry in pushed if entry.op == "push"}
    for row in reversed(queries.versions(registry.index, name=old)):
        message = messages.get(row.number, "")
        registry.admit(desk.manifest(row), Ref(new), tags=row.tags, message=message, number=row.number)
    _set_marks(registry, old, new)


def _set_marks(registry: Registry, old: str, new: str) -> None:
    """Set deprecations, measurements and retention of one name for another."""
    for number, reason in queries.marks(registry.index, "deprecate", old).items():
        registry.deprecate(Ref(new, number=int(number) or None), reason)
    for key, text in queries.marks(registry.index, "evaluate", old).items():
        if measured := measurement.parse(text):
            measurements.record(registry, Ref(new, number=int(key.partition(" ")[0])), measured)
    for last in queries.marks(registry.index, "keep", old).values():
        retention.keep(registry, Ref(new), int(last))


def move_rows(database: HubDatabase, old: str, new: str) -> None:
    """Rename a repository in hub.db: uploads that nothing uses yet, pins of a mirror, and its publishers.

    A publisher was trusted by the operator for one namespace, and is not trusted in another.
    """
    with database.transaction():
        sql = "INSERT INTO uploaded SELECT ?, digest, time FROM uploaded WHERE name = ? ON CONFLICT (name, digest) DO NOTHING"
        database.execute(sql, new, old)
        database.execute("DELETE FROM uploaded WHERE name = ?", old)
        origins.move(database, old, new)
        if old.partition("/")[0] == new.partition("/")[0]:
            database.execute("UPDATE publishers SET scope = ? WHERE scope = ?", new, old)
