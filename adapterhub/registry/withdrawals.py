"""Withdrawn versions: their bytes stay, and nobody may use them.

A withdrawal is an entry of the name's log and holds for a digest, so that the same bytes cannot be pushed under the name again.
`version_lookup.find_version`, which opens a version for use, and `tag_gate`, which lets tags move, refuse by this module.
"""

from __future__ import annotations

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.index_database import Index
from adapterhub.store.ref_log import RefLog
from adapterhub_converters.errors import RefusedError

_HINT = "Use another version"
_HINT_OF_WEIGHTS = "Use other weights, or ask an admin of the namespace to push these"
CODE = "withdrawn"
"""The code of the error for a version that was withdrawn, for which servers answer 410."""


def reasons(index: Index, name: str) -> dict[Digest, str]:
    """Return why versions of a name were withdrawn, by their digests."""
    return queries.marks(index, "withdraw", name)


def last_author(log: RefLog, name: str, digest: Digest) -> str:
    """Return who withdrew a version of a name last, as the log has it; empty if that is not known."""
    authors = [entry.author for entry in log.entries(name) if entry.op == "withdraw" and entry.digest == digest]
    return authors[-1] if authors else ""


def error(location: str, name: str, number: int, reason: str) -> RefusedError:
    """Return the error for a version that was withdrawn."""
    return RefusedError(location, f"v{number} was withdrawn: {reason}", _HINT, code=CODE, name=name)


def error_of_weights(error: RefusedError) -> RefusedError:
    """Return the error for another version with the weights of the one that `error` is about."""
    return RefusedError(error.where, error.what, _HINT_OF_WEIGHTS, code=CODE)


def error_elsewhere(location: str, details: str) -> RefusedError:
    """Return the error for a version that a server says was withdrawn, with its own words after a colon."""
    hint = _HINT_OF_WEIGHTS if details.endswith(_HINT_OF_WEIGHTS) else _HINT
    return RefusedError(location, f"was withdrawn{details.removesuffix(f'. {hint}')}", hint, code=CODE)


def check(index: Index, name: str, number: int, digest: Digest) -> None:
    """Raise RefusedError if a version of a name was withdrawn."""
    reason = reasons(index, name).get(digest)
    if reason is not None:
        raise error(name, name, number, reason)
