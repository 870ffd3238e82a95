"""Names, tags and digests of a path, and what they lead to.

Bytes are kept by their sha256. A client may name them by sha512 too, once something was sent under that: hub.db has the pairs.
"""

from __future__ import annotations

import hashlib

from starlette.requests import Request

from adapterhub.digest import Digest, is_hex, sha256_bytes
from adapterhub.hub import uploads
from adapterhub.hub.access import NoTokenError
from adapterhub.hub.commits import View, view
from adapterhub.hub.hub import Hub
from adapterhub.hub.people.tokens import Identity
from adapterhub.hub.uploads import SHA512
from adapterhub.hub.workers import Worker
from adapterhub.ref import RefError, is_name, is_tag, parse_name

from .answers import OciError

_MOVES = 5  # that are followed


def name_of(request: Request) -> str:
    """The repository of a path; one whose name cannot be here is unknown, as one that is not here."""
    name = str(request.path_params["name"])
    if not is_name(name):
        try:
            parse_name(name, name)
        except RefError as error:
            raise OciError(404, "NAME_UNKNOWN", str(error)) from error
    return name


def writer_of(hub: Hub, who: Identity | None, request: Request) -> str:
    """The repository of a path, for an account that may write to it.

    Raises:
        AdapterhubError: It may not (`Access.check_write`).
    """
    name = str(request.path_params["name"])
    try:
        parse_name(name, name)
    except RefError as error:
        raise OciError(400, "NAME_INVALID", str(error)) from error
    hub.access.check_write(who, name)
    if hub.settings.policy is not None:
        hub.settings.policy.check_name(name)
    return name


def found(hub: Hub, worker: Worker, who: Identity | None, name: str) -> View:
    """A repository that `who` may see, under its new name if it was moved.

    Raises:
        NoTokenError: Perhaps a token would help.
        OciError: There is none, or `who` may not see it.
    """
    of = hub.visible(worker, who, name)
    for _ in range(_MOVES):
        if of is None or of.repository is None or not of.repository.moved_to:
            break
        of = hub.visible(worker, who, of.repository.moved_to)
    if of is not None:
        return of
    if who is None:
        raise NoTokenError
    raise OciError(404, "NAME_UNKNOWN", f"{name}: no such repository")


def check_open(worker: Worker, name: str) -> View | None:
    """The repository that is about to be written to, None for a new one; OciError for a name that was removed or moved."""
    of = view(worker, name)
    if of is None and worker.registry.ledger.current(name).deleted:
        raise OciError(400, "NAME_INVALID", f"{name}: this name was removed. Have it restored, or choose another name")
    if of and of.repository and of.repository.moved_to:
        raise OciError(400, "NAME_INVALID", f"{name}: was moved to {of.repository.moved_to}. Push to that")
    if of and of.repository and of.repository.moved_from:
        raise OciError(400, "NAME_INVALID", f"{name}: {of.repository.moved_from} is being moved here. Try again in a minute")
    return of


def check_tag(tag: str) -> str:
    """Return what can be a tag; OciError for anything else."""
    if not is_tag(tag):
        raise OciError(400, "MANIFEST_INVALID", f"{tag[:80]!r} is not a tag: use up to 128 of A-Z a-z 0-9 . _ -")
    return tag


# ---- digests


def parse_digest(text: str) -> str:
    """Return a whole digest by sha256 or sha512; OciError for anything else."""
    algorithm, _, digits = text.partition(":")
    if not is_hex(digits, {"sha256": 64, "sha512": 128}.get(algorithm, -1)):
        raise OciError(400, "DIGEST_INVALID", f"{text[:80]!r} is not a digest: write sha256: or sha512: and all of its digits")
    return text


def digest_of(data: bytes, like: str = "") -> str:
    """The digest of bytes in memory, by the algorithm of `like`."""
    return SHA512 + hashlib.sha512(data).hexdigest() if like.startswith(SHA512) else sha256_bytes(data)


def stored(hub: Hub, digest: str) -> Digest:
    """The sha256 of a digest; empty for a sha512 that nothing was sent under."""
    return uploads.stored(hub.database, digest)


def remember(hub: Hub, digest: str, of: Digest) -> None:
    """Record the sha256 of what was sent under a sha512; nothing for other digests."""
    if digest.startswith(SHA512):
        hub.database.execute("INSERT INTO sha512 VALUES (?, ?) ON CONFLICT DO NOTHING", digest, of)


def known_as(hub: Hub, digest: Digest) -> str:
    """The sha512 of a digest, if something was sent under that; else empty."""
    rows = hub.database.select("SELECT digest FROM sha512 WHERE sha256 = ?", digest)
    return str(rows[0][0]) if rows else ""
