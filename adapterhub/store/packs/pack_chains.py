"""Chains of packs: a difference cannot be read without its parent, so the parent must not be removed first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MAX_DEPTH = 4  # differences from differences that are written; each makes a read that much slower
READ_DEPTH = 16  # those that are read: two writers at once may make a longer chain than either intends

Parents = Mapping[str, str]
"""Digest of a packed blob to the digest of its parent."""


def chain(digest: str, parents: Parents) -> list[str]:
    """Return the parents that `digest` needs, nearest first; a circle is cut short, and so is a chain too long to be read."""
    ancestors: list[str] = []
    while (digest := parents.get(digest, "")) and digest not in ancestors and len(ancestors) <= READ_DEPTH:
        ancestors.append(digest)
    return ancestors


def with_parents(needed: Iterable[str], parents: Parents) -> set[str]:
    """Return `needed` and all parents they need."""
    return {member for digest in needed for member in (digest, *chain(digest, parents))}


def children_first(digests: Iterable[str], parents: Parents) -> list[str]:
    """Sort `digests` for removal: if the process is killed on the way, all remaining packs can still be read."""
    return sorted(digests, key=lambda digest: (-len(chain(digest, parents)), digest))


def may_follow(child: str, parent: str, parents: Parents) -> bool:
    """Return True if `child` may become a difference from `parent` without a circle or a chain longer than MAX_DEPTH."""
    above = [parent, *chain(parent, parents)]
    chains = (chain(packed, parents) for packed in parents)
    below = max((len(ancestors) for ancestors in chains if child in ancestors), default=0)
    height = max(0, below - len(chain(child, parents)))
    return child not in above and len(above) + height <= MAX_DEPTH
