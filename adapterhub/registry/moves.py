"""Moves of refs: each is decided for the state of a name that no other writer can change, and is one entry of its log."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import Name, Row
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import LATEST, Ref, RefError, parse_prefix, parse_tag
from adapterhub.store.ref_log import MAX_RESTORES, Entry
from adapterhub.store.store import Store
from adapterhub_converters.errors import AdapterhubError, ConflictError, RefusedError

from .ledger import Ledger
from .versions import Restored, Version, find_exact_row, find_row, number_before, removed_versions, version_of

ABSENT = "absent"
"""`expect` of a ref that must not exist yet."""
_MAX_MESSAGE = 1000


def now() -> str:
    """Return the time for an entry of a log."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# ---- push


def latest_tags(tag: str | None) -> tuple[str, ...]:
    """Return the tags that a push to `tag` moves."""
    return (LATEST,) if tag in (None, LATEST) else (LATEST, str(tag))


def check_pushable(ref: Ref) -> None:
    """Raise RefError for a ref with a number, a digest or a range."""
    if ref.number or ref.digest or ref.range:
        raise RefError(
            str(ref), "a push assigns the number itself", f"Push to {ref.name}, or to {ref.name}:TAG", code="version-number"
        )


def checked_tags(ref: Ref, tags: Sequence[str]) -> tuple[str, ...]:
    """Return tags that can be set by hand; RefError or RefusedError for others."""
    for tag in tags:
        _check_not_latest(ref.name, parse_tag(tag, f"{ref.name}:{tag}"))
    return tuple(tags)


def checked_message(message: str, ref: Ref) -> str:
    """Return a message for the log, with what cannot be encoded replaced; RefError for one that is too long."""
    message = message.encode(errors="replace").decode()
    if len(message) > _MAX_MESSAGE:
        raise RefError(str(ref), f"the message is over {_MAX_MESSAGE} characters", "Shorten it, or link to a longer one")
    return message


def check_push(ledger: Ledger, ref: Ref, expect: Digest | None) -> None:
    """Raise the error that a push to `ref` ends with in the present state, before its files are stored."""
    check_pushable(ref)
    _check_push(ledger, ref, ledger.current(ref.name), expect)


def push(
    ledger: Ledger,
    ref: Ref,
    made: Manifest,
    *,
    expect: Digest | None,
    tags: tuple[str, ...] | None = None,
    message: str = "",
    back: bool = False,
    number: int = 0,
) -> Version | None:
    """Make a version of a manifest whose blobs were stored, and move tags; None if a gc has removed any of them since.

    Args:
        ledger: The registry's.
        ref: A name, or a name and a tag.
        made: The manifest.
        expect: The digest that `ref` must still have, or ABSENT.
        tags: Tags to move; None for those of a push to `ref`.
        message: Why, for the log.
        back: Move `latest` also to an earlier version with the same content.
        number: That of the version, above all that the name has had; 0 for the next one.
    """
    check_pushable(ref)
    new = complete = moved = False
    wanted = tuple(dict.fromkeys(latest_tags(ref.tag) if tags is None else tags))

    def decide(state: Name) -> Entry | None:
        nonlocal new, complete, moved
        _check_push(ledger, ref, state, expect)
        there = queries.versions(ledger.index, name=ref.name, digest=made.digest)
        new = not there
        complete = _is_complete(ledger.store, made)
        if not complete:
            return None
        moving = wanted if new else tuple(tag for tag in wanted if tag not in there[0].tags and (back or tag != LATEST))
        moved = new or bool(moving)
        if not moved:
            return None
        check_protected(ledger, ref.name, *moving)
        op, of = ("push", max(number, state.number + 1)) if new else ("tag", there[0].number)
        moves = (made.digest, len(made.raw), of, moving, state.head)
        return Entry(ref.name, state.seq + 1, op, now(), *moves, message=message)

    ledger.move(ref.name, decide)
    if not complete:
        return None
    (row,) = queries.versions(ledger.index, name=ref.name, digest=made.digest)
    named = ref.tag or next((tag for tag in wanted if tag != LATEST), None)
    return replace(version_of(ledger, row, named), new=new, moved=moved)


def _is_complete(store: Store, made: Manifest) -> bool:
    blobs = (Descriptor(oci_manifest.MANIFEST_TYPE, made.digest, len(made.raw)), made.config, *made.layers)
    return all(store.has(blob.digest, blob.size) for blob in blobs)


def _check_push(ledger: Ledger, ref: Ref, state: Name, expect: Digest | None) -> None:
    if state.deleted:
        raise ConflictError(str(ref), "this name was removed", "Restore it first", code="removed-name", name=ref.name)
    _check_expect(ledger, ref.name, ref.tag, expect)


def _check_expect(ledger: Ledger, name: str, tag: str | None, expect: Digest | None) -> None:
    """Raise ConflictError, which names the winner, unless a tag (None: `latest`) still points to `expect`."""
    if expect is None:
        return
    wanted = expect if expect == ABSENT else parse_prefix(expect, f"{Ref(name, tag=tag)}: expect")
    number = queries.tags(ledger.index, name).get(tag or LATEST, 0)
    rows = queries.versions(ledger.index, name=name, number=number)
    found = rows[0].digest if rows else ABSENT
    if not found.startswith(wanted):
        what = f"moved in the meantime: it is {found}, not {expect}"
        raise ConflictError(str(Ref(name, tag=tag)), what, "Review that version, then try again")


# ---- tags


def tag(ledger: Ledger, ref: Ref, tag: str, *, expect: Digest | None = None) -> Version:
    """Point `tag` at the version that `ref` names."""
    parse_tag(tag, f"{ref.name}:{tag}")
    _check_not_latest(ref.name, tag)
    row = find_row(ledger, ref)

    def decide(state: Name) -> Entry | None:
        _check_expect(ledger, ref.name, tag, expect)
        return None if tag in find_row(ledger, row.ref).tags else _tag_entry(ledger, state, row, tag)

    ledger.move(ref.name, decide)
    return version_of(ledger, find_row(ledger, row.ref), tag)


def restore_tag(ledger: Ledger, ref: Ref, seq: int | None) -> Version:
    """Point the tag of `ref` where it pointed before its last move or removal, or after entry `seq` of the log."""
    tag = _tag_of(ref)
    state = ledger.current(ref.name)
    if state.deleted or not state.seq:
        find_row(ledger, ref)  # raises NotFoundError

    def decide(state: Name) -> Entry | None:
        row = find_row(ledger, Ref(ref.name, number=number_before(ledger, ref, state.seq, seq)))
        return None if tag in row.tags else _tag_entry(ledger, state, row, tag)

    ledger.move(ref.name, decide)
    return version_of(ledger, find_exact_row(ledger, ref), tag)


def protect(ledger: Ledger, ref: Ref, *, on: bool) -> Version:
    """Protect the tag of `ref`, or unprotect it."""
    tag = _tag_of(ref)
    find_exact_row(ledger, ref)

    def decide(state: Name) -> Entry | None:
        find_exact_row(ledger, ref)
        if (tag in queries.marks(ledger.index, "protect", ref.name)) == on:
            return None
        op = "protect" if on else "unprotect"
        return Entry(ref.name, state.seq + 1, op, now(), tags=(tag,), previous=state.head)

    ledger.move(ref.name, decide)
    return version_of(ledger, find_exact_row(ledger, ref), tag)


def _tag_entry(ledger: Ledger, state: Name, row: Row, *tags: str) -> Entry:
    check_protected(ledger, row.name, *tags)
    return Entry(row.name, state.seq + 1, "tag", now(), row.digest, row.manifest_size, row.number, tags, state.head)


def check_protected(ledger: Ledger, name: str, *tags: str) -> None:
    """Raise RefusedError if one of these tags of a name is protected."""
    protected = queries.marks(ledger.index, "protect", name)
    for tag in tags:
        if tag in protected:
            raise RefusedError(f"{name}:{tag}", "is protected", "Unprotect it first", code="protected", ref=f"{name}:{tag}")


def _tag_of(ref: Ref) -> str:
    if ref.tag is None:
        raise RefError(str(ref), "has no tag", f"Write {ref.name}:TAG")
    _check_not_latest(ref.name, ref.tag)
    return ref.tag


def _check_not_latest(name: str, tag: str) -> None:
    if tag == LATEST:
        raise RefusedError(f"{name}:{tag}", "is always the newest push", "Choose another tag", code="latest-tag")


# ---- deprecation and removal


def deprecate(ledger: Ledger, ref: Ref, message: str, *, undo: bool) -> int:
    """Mark a version, or all versions of a bare name, as deprecated; return its number, 0 for all."""
    row = find_row(ledger, ref)
    number = row.number if ref != Ref(ref.name) else 0
    message = checked_message(message, ref)

    def decide(state: Name) -> Entry | None:
        find_row(ledger, Ref(ref.name, number=row.number))
        found = queries.marks(ledger.index, "deprecate", ref.name).get(str(number))
        if found == (None if undo else message):
            return None
        op, text = ("undeprecate", "") if undo else ("deprecate", message)
        return Entry(ref.name, state.seq + 1, op, now(), number=number, previous=state.head, message=text)

    ledger.move(ref.name, decide)
    return number


def remove(ledger: Ledger, ref: Ref, *, expect: Digest | None, force: bool) -> None:
    """Remove a tag, or a whole name with all its versions; `force` also a name that others were made from."""
    if ref.number or ref.digest:
        raise RefusedError(str(ref), "a version cannot be removed alone", f"Remove the name {ref.name}, or a tag")
    if ref.tag:
        _check_not_latest(ref.name, ref.tag)
    find_exact_row(ledger, ref)

    def decide(state: Name) -> Entry:
        _check_expect(ledger, ref.name, ref.tag, expect)
        find_exact_row(ledger, ref)
        for tag in (ref.tag,) if ref.tag else queries.marks(ledger.index, "protect", ref.name):
            check_protected(ledger, ref.name, tag)
        if not (ref.tag or force):
            _check_childless(ledger, ref.name)
        tags = (ref.tag,) if ref.tag else ()
        return Entry(ref.name, state.seq + 1, "untag" if tags else "delete", now(), tags=tags, previous=state.head)

    ledger.move(ref.name, decide)


def _check_childless(ledger: Ledger, name: str) -> None:
    """Raise RefusedError if versions of other names were made from those of `name`, unless another name has the same."""
    made = {
        row.ref: parent.ref
        for parent in queries.versions(ledger.index, name=name)
        for row in queries.versions(ledger.index, parent=parent.digest)
        if row.name != name and all(held.name == name for held in queries.versions(ledger.index, digest=parent.digest))
    }
    if made:
        child, parent = min(made.items(), key=lambda item: str(item[0]))
        more = f" ({len(made) - 1} more like it)" if len(made) > 1 else ""
        what = f"{child} was made from {parent} and could not be made again{more}"
        raise RefusedError(name, what, "Force it to remove it all the same", code="has-children")


def restore(ledger: Ledger, name: str) -> Restored:
    """Undo the removal of a name, except for versions whose bytes gc has removed."""
    found = Restored(name, (), ())

    def decide(state: Name) -> Entry:
        nonlocal found
        if not state.deleted:
            if not state.seq:
                find_row(ledger, Ref(name))  # raises NotFoundError
            raise RefusedError(name, "was not removed")
        entries = list(ledger.store.log.entries(name))
        if sum(entry.op == "restore" for entry in entries) >= MAX_RESTORES:
            raise RefusedError(name, f"was restored {MAX_RESTORES} times, which is the limit", "Push to another name")
        pushed = removed_versions(entries)
        whole = {number for number, digest in pushed.items() if _is_stored(ledger.store, digest)}
        found = Restored(name, tuple(sorted(whole)), tuple(sorted(pushed.keys() - whole)))
        return Entry(name, state.seq + 1, "restore", now(), numbers=found.numbers, previous=state.head)

    ledger.move(name, decide)
    return found


def _is_stored(store: Store, digest: Digest) -> bool:
    """Return True if a version's manifest can be read and all its blobs are here."""
    try:
        return _is_complete(store, oci_manifest.parse(store.read_document(digest), digest))
    except AdapterhubError:
        return False
