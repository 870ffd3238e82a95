"""Which pack needs which blob. A difference can't be read without its parent, so nobody may remove that before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MAX_DEPTH = 4  # differences to differences: each makes a read as much longer
READ_DEPTH = 16  # two writers at once may have made a longer chain than either meant to

Parents = Mapping[str, str]
"""Digest of a packed blob to that of the one it is a difference to."""


def chain(digest: str, parents: Parents) -> list[str]:
    """What `digest` needs, nearest first; cut short where it would go in a circle."""
    found: list[str] = []
    while (digest := parents.get(digest, "")) and digest not in found:
        found.append(digest)
    return found


def with_parents(needed: Iterable[str], parents: Parents) -> set[str]:
    """`needed`, and every blob without which one of them could not be read."""
    return {other for digest in needed for other in (digest, *chain(digest, parents))}


def children_first(digests: Iterable[str], parents: Parents) -> list[str]:
    """`digests` in an order in which they may be removed: killed in between, whatever is left can still be read."""
    return sorted(digests, key=lambda digest: (-len(chain(digest, parents)), digest))


def may_follow(child: str, parent: str, parents: Parents) -> bool:
    """Whether `child` may become a difference to `parent`: no circle, and no chain longer than MAX_DEPTH."""
    above = [parent, *chain(parent, parents)]
    below = max((len(chain(other, parents)) for other in parents if child in chain(other, parents)), default=0)
    height = max(0, below - len(chain(child, parents)))
    return child not in above and len(above) + height <= MAX_DEPTH
