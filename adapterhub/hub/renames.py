"""Rename a repository: its versions with their numbers, and everything else stored under its name.

Branches, commits and manifests that are not versions are in the repository's document, which moves as it is. Tags move with the
versions. What is stored by namespace, such as roles and webhooks, stays with the namespace, and the audit log keeps the old
name.

Readers see the repository under exactly one name at any time. The new name is hidden (`commits.is_arriving`) until everything
is there; then a single log entry, which redirects the old name, makes the move. A killed process leaves a row in hub.db, and
the new name's document with `moved_from`, from which the next process goes on: each step is skipped if it was already done.
"""

from __future__ import annotations

from dataclasses import replace

from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.maintenance import name_moves
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.registry.moves import now
from adapterhub.registry.repository_documents import Repository
from adapterhub.registry.repository_records import needed_blobs

from . import commits, downloads, gates, mirror_origin, publishing, request_context, stars
from .accounts.accounts import Namespace
from .commits import View
from .hub_database import HubDatabase
from .uploads import sha256_of, sha512_key
from .workers import Worker


def pending_moves(worker: Worker, *names: str) -> list[tuple[str, str]]:
    """Return the old and new names of unfinished moves; if `names` are given, only those from or to one of them."""
    rows = worker.database.select("SELECT old, new FROM moves ORDER BY new")
    return [(old, new) for old, new in rows if not names or not {old, new}.isdisjoint(names)]


def check_attached(worker: Worker, view: View, new: str, namespace: Namespace) -> None:
    """Refuse to move manifests to a namespace that would not accept them (`publishing.check_attached`)."""
    manifests = view.repository.manifests if view.repository else {}
    version_digests = {row.digest for row in queries.versions(worker.registry.index, name=view.name)} | manifests.keys()
    for digest, manifest in manifests.items():
        publishing.check_attached(
            namespace, f"{new}@{digest}", attached=sha256_of(worker.database, manifest.subject, view.name) in version_digests
        )


def begin(worker: Worker, old: str, new: str) -> None:
    """Begin a move that has been checked; from here on, any process may call `finish`."""
    # First the row, then the document: a process killed in between leaves a move that `finish` undoes or completes.
    account = request_context.current().account
    worker.database.execute("INSERT INTO moves (new, old, account) VALUES (?, ?, ?)", new, old, account)
    state = worker.repositories.get(old) or Repository(created=now())
    worker.repositories.change(new, lambda _: replace(state, moved_from=old))


def finish(worker: Worker, old: str, new: str) -> None:
    """Finish a move from wherever it stopped; undo it if the old name was removed meanwhile."""
    target = worker.repositories.get(new)
    if target and target.moved_from == old:
        worker.registry.author = str(worker.database.select("SELECT account FROM moves WHERE new = ?", new)[0][0])
        source = worker.repositories.get(old)
        # The redirect is in place: only the cleanup was interrupted.
        if source and source.moved_to == new:
            _finish_rename(worker, old, new)
        elif commits.find_view(worker, old) and not (source and source.moved_to):
            name_moves.push_versions(worker.registry, old, new)
            _redirect_old_name(worker, old, new)
            _finish_rename(worker, old, new)
        else:
            name_moves.remove_versions(worker.registry, new)
            with worker.database.transaction():
                gates.remove(worker.database, new)
            # The old name is gone or leads elsewhere: undo.
            worker.repositories.remove(new)
    worker.database.execute("DELETE FROM moves WHERE new = ?", new)


def _redirect_old_name(worker: Worker, old: str, new: str) -> None:
    """Give the new name the current document and redirect the old name: for readers, this is the move."""
    _copy_sha512(worker, old, new)
    with worker.database.transaction():  # before anybody sees the new name
        gates.copy(worker.database, old, new)
    is_redirected = False
    while not is_redirected:
        source = worker.repositories.get(old)
        worker.repositories.change(new, lambda state, source=source: replace(source or state, moved_from=old))  # type: ignore[misc]

        def redirect(state: Repository, source: Repository | None = source) -> Repository:
            nonlocal is_redirected
            # What another process has changed since, such as who may see it, is copied first.
            is_redirected = state == (source or Repository(created=state.created))
            return Repository(private=state.private, created=state.created, moved_to=new) if is_redirected else state

        worker.repositories.change(old, redirect)


def _copy_sha512(worker: Worker, old: str, new: str) -> None:
    """Let the new name's namespace know the sha512 of what is in the repository, and of nothing else of the old one."""
    digests = {file.digest for row in queries.versions(worker.registry.index, name=old) for file in _blobs(worker, row)}
    digests |= {digest for (digest,) in worker.database.select("SELECT digest FROM uploaded WHERE name = ?", old)}
    if repository := worker.repositories.get(old):
        digests |= needed_blobs(worker.registry.store, repository)
    prefix = sha512_key(old, "")
    rows = worker.database.select("SELECT digest, sha256 FROM sha512 WHERE substr(digest, 1, ?) = ?", len(prefix), prefix)
    copies = [(sha512_key(new, key.removeprefix(prefix)), sha256) for key, sha256 in rows if sha256 in digests]
    worker.database.execute_many("INSERT INTO sha512 (digest, sha256) VALUES (?, ?) ON CONFLICT DO NOTHING", copies)


def _blobs(worker: Worker, row: VersionRow) -> list[Descriptor]:
    """Return the manifest of a version, its config and its layers."""
    manifest = worker.manifest(row)
    return [Descriptor("", row.digest, row.manifest_size), manifest.config, *manifest.layers]


def _finish_rename(worker: Worker, old: str, new: str) -> None:
    """Move the remaining rows, and delete the old name's versions."""
    _move_rows(worker.database, old, new)
    name_moves.remove_versions(worker.registry, old)
    worker.repositories.change(new, lambda state: replace(state, moved_from=""))


def _move_rows(database: HubDatabase, old: str, new: str) -> None:
    """Rename a repository in hub.db: unused uploads, proposals, pins of a mirror, downloads, stars, its gate, its publishers.

    A publisher was trusted by an operator for one namespace, and is not trusted in another.
    """
    with database.transaction():
        sql = (
            "INSERT INTO uploaded (name, digest, time) SELECT ?, digest, time FROM uploaded WHERE name = ?"
            " ON CONFLICT (name, digest) DO NOTHING"
        )
        database.execute(sql, new, old)
        database.execute("DELETE FROM uploaded WHERE name = ?", old)
        downloads.rename(database, old, new)
        stars.rename(database, old, new)
        gates.copy(database, old, new)  # once more: another process may have gated the old name before it led here
        gates.remove(database, old)
        database.execute("UPDATE proposals SET name = ? WHERE name = ?", new, old)
        mirror_origin.copy_pins(database, old, new)
        if old.partition("/")[0] == new.partition("/")[0]:
            database.execute("UPDATE publishers SET scope = ? WHERE scope = ?", new, old)
