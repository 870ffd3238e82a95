"""Rename a name in a registry: its versions with their numbers, times, authors, messages, tags, marks and withdrawals.

The old name is whole until the new one is: `move` removes it last, by an entry that says where it went. A killed process leaves
both, and the same call goes on. A name can be moved back: its log is restored with the versions that are left, and goes on. A
hub moves more than this, and in other steps (`hub.renames`); it shares the parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from adapterhub.index import queries
from adapterhub.manifest import measurement, oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log, moves, signature_policy, withdrawals
from adapterhub.registry.moves import check_protected
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import release_moves
from adapterhub.registry.version_lookup import MOVED_TO, find_row, name_after_move
from adapterhub.store.ref_log import TAG_MOVES, entries_in_force
from adapterhub_converters.errors import ConflictError, RefusedError

from . import retention

_MOVED_BACK = "moved back from "


def move(registry: Registry, old: str, new: str) -> int:
    """Rename a name; return the number of its versions.

    Raises:
        NotFoundError: There is no such name.
        ConflictError: The new name exists, unless it is what an interrupted call left.
        RefusedError: The new name was removed, the policy does not allow it, a tag is protected or has requirements, or a hub
            has a repository of the old name.
    """
    from adapterhub.registry.repository_records import Repositories  # which every other command does without

    if Repositories(registry).document(old).exists:
        problem = "a hub in this folder has a repository of this name, whose visibility and gate would stay behind"
        raise RefusedError(old, problem, "Rename it at the hub", code="repository-of-hub")
    check(registry, old, new)
    while True:
        state = registry.ledger.current(old)
        push_versions(registry, old, new)
        with registry.ledger.write_lock():
            # Whatever another process has pushed or recorded under the old name meanwhile is not under the new one yet.
            if registry.ledger.current(old) == state:
                remove_versions(registry, old, message=f"{MOVED_TO}{new}")
                return len(queries.versions(registry.index, name=new))


def check(registry: Registry, old: str, new: str) -> None:
    """Raise the error that `move` would end with before it changes anything."""
    find_row(registry.ledger, Ref(old))  # raises NotFoundError
    rows = queries.versions(registry.index, name=old)
    _check_new_name(registry, old, new)
    check_protected(registry.ledger, old, *queries.marks(registry.index, "protect", old))
    check_requirements(registry, old, queries.tags(registry.index, old), leaves_evidence=True)
    for policy in registry.gate.policies():
        policy.check_name(new)
        for row in rows:
            manifest = oci_manifest.parse(registry.store.read_document(row.digest), str(row.ref))
            signatures = partial(signature_policy.all_signatures, registry.store, manifest, ())
            signature_policy.check(policy, manifest, signatures, name=new, location=str(row.ref))


def _check_new_name(registry: Registry, old: str, new: str) -> None:
    """Refuse a name that was removed, or that has anything which an interrupted move from `old` would not have left there.

    The name that was moved to `old` is not refused: this moves it back.
    """
    state = registry.ledger.current(new)
    if state.deleted:
        if name_after_move(registry.ledger, new, state) != old:
            raise RefusedError(new, "this name was removed", "Restore it first", code="removed-name", name=new)
    elif state.seq:
        sources = {row.number: row for row in queries.versions(registry.index, name=old)}
        for row in queries.versions(registry.index, name=new):
            source = sources.get(row.number)
            has_other_tags = not set(row.tags) <= set(source.tags if source else ()) and not _is_moving_back(registry, new, old)
            if old == new or source is None or row.digest != source.digest or has_other_tags:
                raise ConflictError(new, "exists already", "Choose another name")


def _is_moving_back(registry: Registry, name: str, old: str) -> bool:
    """Return whether an interrupted move from `old` has restored a name, and nothing else was done with it since."""
    for entry in reversed(list(registry.store.log.entries(name))):
        if entry.op == "restore":
            return entry.message == f"{_MOVED_BACK}{old}"
        if entry.op not in ("untag", "undeprecate"):
            return False
    return False


def check_requirements(registry: Registry, name: str, tags: Iterable[str], *, leaves_evidence: bool) -> None:
    """Refuse to rename a name one of whose tags has requirements: the evidence is in the log of the old name.

    So is what a removed tag meant, with which the next version is compared: that is left behind with `leaves_evidence` only.
    """
    gated_tags = registry.gate.gated_tags()
    for tag in sorted(gated_tags.intersection(tags)):
        problem = "has requirements, and the evidence for its version stays with the old name"
        raise RefusedError(f"{name}:{tag}", problem, "Remove that tag, and promote the version under the new name")
    if gated_tags and not leaves_evidence:
        entries, _ = entries_in_force(registry.store.log.entries(name))
        former_tags = gated_tags.intersection(tag for entry in entries if entry.op in TAG_MOVES for tag in entry.tags)
        for tag in sorted(former_tags):
            problem = "has requirements, and what it meant stays with the old name"
            raise RefusedError(f"{name}:{tag}", problem, "Ask an admin of the namespace")


def push_versions(registry: Registry, old: str, new: str) -> None:
    """Push the versions of a name under another, and copy their marks.

    The other name has no versions but those of an interrupted call, or was removed because it was moved to `old`.
    """
    _bring_back(registry, old, new)
    mover, entries = registry.author, list(registry.store.log.entries(old))
    pushes = {entry.number: entry for entry in entries_in_force(entries)[0] if entry.op == "push"}
    _undo_withdrawals(registry, new)
    try:
        with registry.store.lease("move"):
            for row in reversed(queries.versions(registry.index, name=old)):
                push = pushes.get(row.number)
                # By the author of the push: approvals by that author do not count, no matter who renames.
                registry.author, message = (push.author, push.message) if push else (mover, "")
                manifest = oci_manifest.parse(registry.store.read_document(row.digest), str(row.ref))
                # Oldest first: version numbers only grow. At the time of the push, from which rules by age count.
                registry.push_manifest(manifest, Ref(new), tags=row.tags, message=message, number=row.number, time=row.time)
        registry.author = mover
        _set_marks(registry, old, new)
        reasons = withdrawals.reasons(registry.index, old)
        for entry in {entry.digest: entry for entry in entries if entry.op == "withdraw" and entry.digest in reasons}.values():
            registry.author = entry.author
            release_moves.copy_withdrawal(registry.ledger, entry, new)
    finally:
        registry.author = mover


def _bring_back(registry: Registry, old: str, new: str) -> None:
    """Restore a removed name with those of its versions that `old` still has, and only with tags and marks that it still has.

    Raises:
        RefusedError: The name was restored as often as is possible.
    """
    if registry.ledger.current(new).deleted:
        digests = {row.number: row.digest for row in queries.versions(registry.index, name=old)}
        moves.restore(registry.ledger, new, among=digests, message=f"{_MOVED_BACK}{old}")
    for tag in queries.tags(registry.index, new).keys() - queries.tags(registry.index, old).keys():
        registry.rm(Ref(new, tag=tag))
    deprecations = queries.marks(registry.index, "deprecate", old)
    for number in queries.marks(registry.index, "deprecate", new).keys() - deprecations.keys():
        registry.deprecate(Ref(new, number=int(number) or None), undo=True)
    if queries.marks(registry.index, "keep", new) and not queries.marks(registry.index, "keep", old):
        retention.keep(registry, Ref(new), None)


def _undo_withdrawals(registry: Registry, new: str) -> None:
    """Undo the withdrawals that an interrupted move has copied: no version that is withdrawn could be pushed."""
    reasons = withdrawals.reasons(registry.index, new)
    for row in queries.versions(registry.index, name=new):
        if row.digest in reasons:
            release_moves.undo_withdrawal(registry.ledger, row.ref)


def _set_marks(registry: Registry, old: str, new: str) -> None:
    """Copy deprecations, measurements and retention from one name to another."""
    for number, reason in queries.marks(registry.index, "deprecate", old).items():
        registry.deprecate(Ref(new, number=int(number) or None), reason)
    for key, text in queries.marks(registry.index, "evaluate", old).items():
        if measured := measurement.parse(text):
            measurement_log.record(registry, Ref(new, number=int(key.partition(" ")[0])), measured)
    if rule := retention.setting(registry, old):
        retention.keep(registry, Ref(new), rule)
    if retention.keeps_all(registry, old):
        retention.keep(registry, Ref(new), None)


def remove_versions(registry: Registry, name: str, *, message: str = "") -> None:
    """Remove a name with its versions, if it has any, and say why in its log."""
    state = registry.ledger.current(name)
    if state.seq and not state.deleted:
        registry.rm(Ref(name), force=True, message=message)
