"""peft's patterns, matched as peft matches them, without the power to hang the process.

`rank_pattern` and `alpha_pattern` map a regular expression to a number; peft takes the first key for which
`re.match(rf"(.*\\.)?({key})$", module_path)` succeeds (`utils/other.py`, `get_pattern_key`). Nearly all there are, and all
that are written here, are paths, a dot in them escaped or not: these are looked up, so that thousands of them, one for
each expert, take no time. The others are `regular`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from .errors import RefusedError
from .regular import Budget, Regular

# A path: letters as they are, escaped or not; a dot that is not escaped stands for any character.
_PATH = re.compile(r"(?:[\w.-]|\\[.-])+", re.ASCII)
_PIECE = re.compile(r"\\(.)|([\w-])|(\.)")
_PARSING = 2_000  # what an expression costs that must be parsed


class Patterns:
    """The keys of a map of patterns, in their order."""

    def __init__(self, keys: Iterable[str], where: str) -> None:
        self._where, self._budget = where, Budget()
        # Length and places of the dots that stand for anything; then what is left, to the keys and their places in the order.
        self._paths: dict[tuple[int, tuple[int, ...]], dict[str, list[tuple[int, str]]]] = {}
        self._others: list[tuple[int, Regular]] = []
        for number, key in enumerate(keys):
            if len(key) < 1000 and _PATH.fullmatch(key):
                text, free = _read(key)
                group = self._paths.setdefault((len(text), free), {})
                group.setdefault(_without(text, free), []).append((number, key))
            else:
                self._spend(_PARSING)
                self._others.append((number, Regular(key, where, below=True)))

    def matching(self, target: str) -> list[str]:
        """The patterns that match a module path, in their order; peft uses the first."""
        self._budget.left += self._budget.each
        found: list[tuple[int, str]] = []
        for (length, free), group in self._paths.items():
            start = len(target) - length
            if start == 0 or (start > 0 and target[start - 1] == "."):
                found += group.get(_without(target[start:], free), [])
        self._spend(4 * len(self._paths))
        found += [(number, one.key) for number, one in self._others if one.matches(target, self._budget)]
        return [key for _, key in sorted(found)]

    def _spend(self, steps: int) -> None:
        if not self._budget.spend(steps):
            raise RefusedError(self._where, "so many patterns could take for ever to match", "Write them as whole paths")


def _read(key: str) -> tuple[str, tuple[int, ...]]:
    """The path that a key is, and where in it any character may stand."""
    pieces = [piece.groups() for piece in _PIECE.finditer(key)]
    text = "".join(escaped or plain or free for escaped, plain, free in pieces)
    return text, tuple(number for number, (_, _, free) in enumerate(pieces) if free)


def _without(text: str, free: tuple[int, ...]) -> str:
    """`text` without the characters at those places."""
    bounds = (-1, *free, len(text))
    return "\0".join(text[bounds[n] + 1 : bounds[n + 1]] for n in range(len(bounds) - 1))


def fullmatch(pattern: str, target: str, where: str) -> bool:
    """Whether a `target_modules` or `exclude_modules` string matches, as peft matches it: the whole path."""
    regular, budget = _regular(pattern, where)
    budget.left += budget.each
    return regular.matches(target, budget)


@lru_cache(maxsize=64)
def _regular(pattern: str, where: str) -> tuple[Regular, Budget]:
    return Regular(pattern, where), Budget()
