"""Move a repository to another name: its versions with their numbers, and everything else that is kept by the name.

Branches, commits and manifests that are no versions are in the repository's document, which moves as it is. Tags are moved with
the versions. What is kept by namespace, such as roles and webhooks, stays with the namespace, and the audit log keeps the old
name.

Those who read have the repository under one name at any time. The new name is hidden (`commits.is_arriving`) until everything
is there; then one entry of a log, which makes the old name lead to it, is the move. A process that is killed leaves a row in
hub.db and the new name's document with `moved_from`, by which the next one goes on: each step is done only if it was not.
"""

from __future__ import annotations

from dataclasses import replace

from adapterhub.index import queries
from adapterhub.maintenance import retention
from adapterhub.manifest import measurement
from adapterhub.ref import Ref
from adapterhub.registry import measurements
from adapterhub.registry.moves import now
from adapterhub.registry.registry import Registry
from adapterhub.registry.repositories import Repository
from adapterhub.store.ref_log import in_force

from . import asking, commits, origins, publishing
from .commits import View
from .database import HubDatabase
from .people.accounts import Namespace
from .uploads import stored
from .workers import Worker


def begun(worker: Worker, *names: str) -> list[tuple[str, str]]:
    """The old and the new names of moves that have begun and not ended; all, or those from or to some names."""
    rows = worker.database.select("SELECT old, new FROM moves ORDER BY new")
    return [(old, new) for old, new in rows if not names or not {old, new}.isdisjoint(names)]


def check_attached(worker: Worker, of: View, new: str, settled: Namespace) -> None:
    """Refuse to move manifests that are no adapters to a namespace that would not take them (`publishing.check_attached`)."""
    manifests = of.repository.manifests if of.repository else {}
    there = {row.digest for row in queries.versions(worker.registry.index, name=of.name)} | manifests.keys()
    for digest, one in manifests.items():
        publishing.check_attached(settled, f"{new}@{digest}", attached=stored(worker.database, one.subject) in there)


def begin(worker: Worker, old: str, new: str) -> None:
    """Begin a move that was checked: from here on, `finish` may be called by any process."""
    worker.database.execute("INSERT INTO moves VALUES (?, ?, ?)", new, old, asking.now().account)
    state = worker.repositories.get(old) or Repository(created=now())
    worker.repositories.change(new, lambda _: replace(state, moved_from=old))


def finish(worker: Worker, old: str, new: str) -> None:
    """Take a move to its end, wherever it was left; one of a name that was removed meanwhile is undone."""
    target = worker.repositories.get(new)
    if target and target.moved_from == old:
        worker.registry.author = str(worker.database.select("SELECT account FROM moves WHERE new = ?", new)[0][0])
        source = worker.repositories.get(old)
        if source and source.moved_to == new:
            _leave(worker, old, new)
        elif commits.view(worker, old) and not (source and source.moved_to):
            _push_versions(worker, old, new)
            _lead_on(worker, old, new)
            _leave(worker, old, new)
        else:
            _remove_versions(worker.registry, new)
            worker.repositories.remove(new)
    worker.database.execute("DELETE FROM moves WHERE new = ?", new)


def _push_versions(worker: Worker, old: str, new: str) -> None:
    """Push the versions of a name under one that has none, with their numbers, messages and marks."""
    registry = worker.registry
    pushed, _ = in_force(registry.store.log.entries(old))
    messages = {entry.number: entry.message for entry in pushed if entry.op == "push"}
    with registry.store.lease("move"):
        for row in reversed(queries.versions(registry.index, name=old)):
            message = messages.get(row.number, "")
            registry.admit(worker.manifest(row), Ref(new), tags=row.tags, message=message, number=row.number)
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


def _lead_on(worker: Worker, old: str, new: str) -> None:
    """Give the new name the document as it is now, and have the old name lead there: the move for all who read."""
    worker.repositories.change(new, lambda state: replace(worker.repositories.get(old) or state, moved_from=old))
    worker.repositories.change(old, lambda state: Repository(private=state.private, created=state.created, moved_to=new))


def _leave(worker: Worker, old: str, new: str) -> None:
    """Have what else is kept by the name follow, and end the versions of the old one."""
    _move_rows(worker.database, old, new)
    _remove_versions(worker.registry, old)
    worker.repositories.change(new, lambda state: replace(state, moved_from=""))


def _remove_versions(registry: Registry, name: str) -> None:
    state = registry.ledger.current(name)
    if state.seq and not state.deleted:
        registry.rm(Ref(name), force=True)


def _move_rows(database: HubDatabase, old: str, new: str) -> None:
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
