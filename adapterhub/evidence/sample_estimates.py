"""How many samples would tell, where those at hand do not: an estimate, and so shown with two digits."""

from __future__ import annotations

from collections.abc import Callable

_MAX_NEEDED = 100_000


def two_digits(count: int) -> int:
    """Return a count rounded up to two digits."""
    unit: int = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit


def needed_text(count: int, suffices: Callable[[int], bool]) -> str:
    """Return about how many samples suffice, `about 300`, if `count` do not: the first that does, in steps of a twentieth."""
    while count <= _MAX_NEEDED:
        count += max(1, count // 20)
        if suffices(count):
            return f"about {two_digits(count):,}"
    return f"over {_MAX_NEEDED:,}"
