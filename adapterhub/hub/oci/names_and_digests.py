"""Names, tags and digests of a path, and what they refer to.

Bytes are stored by their sha256. A client may also name them by sha512, once something was uploaded under it: hub.db has the
pairs.
"""

from __future__ import annotations

import hashlib

from starlette.requests import Request

from adapterhub.digest import Digest, is_hex, sha256_bytes
from adapterhub.hub import uploads
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import View, find_view
from adapterhub.hub.hub import Hub
from adapterhub.hub.uploads import SHA512, sha512_key
from adapterhub.hub.workers import Worker
from adapterhub.ref import RefError, is_name, is_tag, parse_name

from .oci_errors import OciError

_MAX_MOVES = 5  # renames followed, one after another


def name_of(request: Request) -> str:
    """Return the repository of a path. A name that is not valid here is reported as unknown, like one that is missing."""
    name = str(request.path_params["name"])
    if not is_name(name):
        try:
            parse_name(name, name)
        except RefError as error:
            raise OciError(404, "NAME_UNKNOWN", str(error)) from error
    return name


def writable_name(hub: Hub, identity: Identity | None, request: Request) -> str:
    """Return the repository of a path, for an account that may write to it.

    Raises:
        AdapterhubError: It may not (`Access.check_write`).
    """
    name = str(request.path_params["name"])
    try:
        parse_name(name, name)
    except RefError as error:
        raise OciError(400, "NAME_INVALID", str(error)) from error
    hub.access.check_write(identity, name)
    if hub.settings.policy is not None:
        hub.settings.policy.check_name(name)
    return name


def visible_view(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> View:
    """Return a repository that a client may see, under its new name if it was renamed.

    Raises:
        NoTokenError: It is missing or hidden, and a token might help.
        OciError: It is missing, or hidden from this client.
    """
    current = hub.visible(worker, identity, name)
    # Bounded: renames back and forth could form a circle.
    for _ in range(_MAX_MOVES):
        if current is None or current.repository is None or not current.repository.moved_to:
            break
        current = hub.visible(worker, identity, current.repository.moved_to)
    if current is not None:
        return current
    if identity is None:
        raise NoTokenError
    raise OciError(404, "NAME_UNKNOWN", f"{name}: no such repository")


def check_pushable(worker: Worker, name: str) -> View | None:
    """Return the repository about to be pushed to, None for a new one. OciError for a name that was removed or renamed."""
    current = find_view(worker, name)
    if current is None and worker.registry.ledger.current(name).deleted:
        raise OciError(
            400, "NAME_INVALID", f"{name}: this name was removed. Ask the operator to restore it, or choose another name"
        )
    if current and current.repository and current.repository.moved_to:
        raise OciError(400, "NAME_INVALID", f"{name}: was moved to {current.repository.moved_to}. Push to that")
    if current and current.repository and current.repository.moved_from:
        raise OciError(
            400, "NAME_INVALID", f"{name}: {current.repository.moved_from} is being moved here. Try again in a minute"
        )
    return current


def check_tag(tag: str) -> str:
    """Return a valid tag. OciError for anything else."""
    if not is_tag(tag):
        raise OciError(400, "MANIFEST_INVALID", f"{tag[:80]!r} is not a tag: use up to 128 of A-Z a-z 0-9 . _ -")
    return tag


# ---- digests


def parse_digest(text: str) -> str:
    """Return a complete sha256 or sha512 digest. OciError for anything else."""
    algorithm, _, digits = text.partition(":")
    if not is_hex(digits, {"sha256": 64, "sha512": 128}.get(algorithm, -1)):
        raise OciError(400, "DIGEST_INVALID", f"{text[:80]!r} is not a digest: write sha256: or sha512: and all of its digits")
    return text


def digest_of(data: bytes, like: str = "") -> str:
    """Return the digest of bytes, by the algorithm of the digest `like`."""
    return SHA512 + hashlib.sha512(data).hexdigest() if like.startswith(SHA512) else sha256_bytes(data)


def sha256_of(hub: Hub, name: str, digest: str) -> Digest:
    """Return the sha256 for a digest; empty for a sha512 under which nothing was uploaded to the namespace of `name`."""
    return uploads.sha256_of(hub.database, digest, name)


def record_sha512(hub: Hub, name: str, digest: str, sha256: Digest) -> None:
    """Record the sha256 of a blob uploaded under a sha512 to the namespace of `name`; does nothing for other digests."""
    if digest.startswith(SHA512):
        sql = "INSERT INTO sha512 (digest, sha256) VALUES (?, ?) ON CONFLICT DO NOTHING"
        hub.database.execute(sql, sha512_key(name, digest), sha256)


def sha512_of(hub: Hub, name: str, digest: Digest) -> str:
    """Return the sha512 under which a blob was uploaded to the namespace of `name`, if any; else empty."""
    rows = hub.database.select("SELECT digest FROM sha512 WHERE sha256 = ?", digest)
    candidates = [str(key).rpartition(" ")[2] for (key,) in rows]
    return next((sha512 for sha512 in candidates if sha256_of(hub, name, sha512)), "")
