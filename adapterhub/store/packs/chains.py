"""Chains of packs: a difference cannot be read without its parent, which therefore must not be removed first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MAX_DEPTH = 4  # differences to differences; each makes a read that much slower
READ_DEPTH = 16  # two writers at once may make a longer chain than either intends

Parents = Mapping[str, str]
"""Digest of a packed blob to the digest of its parent."""


def chain(digest: str, parents: Parents) -> list[str]:
    """Return the parents that `digest` needs, nearest first; a circle is cut short, and so is what is too deep to be read."""
    found: list[str] = []
    while (digest := parents.get(digest, "")) and digest not in found and len(found) <= READ_DEPTH:
        found.append(digest)
    return found


def with_parents(needed: Iterable[str], parents: Parents) -> set[str]:
    """Return `needed` and all parents they need."""
    return {other for digest in needed for other in (digest, *chain(digest, parents))}


def children_first(digests: Iterable[str], parents: Parents) -> list[str]:
    """Sort `digests` so that they may be removed in this order: after a kill, all that are left can still be read."""
    return sorted(digests, key=lambda digest: (-len(chain(digest, parents)), digest))


def may_follow(child: str, parent: str, parents: Parents) -> bool:
    """Return True if `child` may become a difference to `parent`, without a circle or a chain longer than MAX_DEPTH."""
    above = [parent, *chain(parent, parents)]
    chains = (chain(other, parents) for other in parents)
    below = max((len(one) for one in chains if child in one), default=0)
    height = max(0, below - len(chain(child, parents)))
    return child not in above and len(above) + height <= MAX_DEPTH
