"""Match regular expressions from adapters' configs as peft does, in bounded time.

`rank_pattern` and `alpha_pattern` map a regular expression to a number; peft uses the first key for which
`re.match(rf"(.*\\.)?({key})$", module_path)` succeeds (peft 0.21, `utils/other.py`, `get_pattern_key`); a string in
`target_modules` has to match the whole path. Nearly all keys are plain paths, their dots escaped or not: those are looked up,
so that thousands of them, one for each expert, take no time. The others are matched by RE2, in time linear in the text.
Features that RE2 lacks (lookaround, backreferences) or interprets differently go to the `regex` package, which supports a
deadline.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from .errors import FormatError, RefusedError

MAX_PATTERN = 1_000  # characters
_STEPS_PER_SECOND = 10_000_000
# A path: letters as they are, escaped or not; a dot that is not escaped stands for any character.
_PATH = re.compile(r"(?:[\w.-]|\\[.-])+", re.ASCII)
_PIECE = re.compile(r"\\(.)|([\w-])|(\.)")
_COMPILING = 2_000  # steps to compile an expression
_POSIX_CLASS = re.compile(r"\[:.*:\]", re.DOTALL)  # a set of characters to `re`, a class to RE2 and `regex`


class Budget:
    """The work allowed for all texts together, in steps of about a tenth of a microsecond: a second, and more for each text."""

    def __init__(self, left: int = _STEPS_PER_SECOND, each: int = 1_000) -> None:
        self.left, self.each = left, each

    def next_text(self) -> None:
        """Allow the work for one more text."""
        self.left += self.each

    def spend(self, steps: int) -> bool:
        """Spend steps; return False if fewer were left."""
        self.left -= steps
        return self.left >= 0


class Expression:
    """A regular expression, matched against a whole text, or with `below` against its end after a dot.

    Raises:
        FormatError: Python's `re` does not accept it.
        RefusedError: It is longer than `MAX_PATTERN`, or has a POSIX class.
    """

    def __init__(self, key: str, where: str, *, below: bool = False) -> None:
        if len(key) > MAX_PATTERN:
            raise RefusedError(where, f"a pattern of {len(key)} characters exceeds the limit of {MAX_PATTERN}")
        if _POSIX_CLASS.search(key):
            raise RefusedError(
                where, f"pattern {key[:80]!r} has [: and :], which programs read differently", "Write the set out"
            )
        self.key, self._where, self._below = key, where, below
        self._text = rf"(.*\.)?({key})$" if below else key
        try:
            with warnings.catch_warnings(action="ignore"):  # FutureWarning: possible nested set
                re.compile(self._text)
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(where, f"pattern {key[:80]!r} is not a regular expression ({error})") from error
        self._linear = _compiled_by_re2(self._text)
        self._backtracking: Any = None

    def matches(self, text: str, budget: Budget) -> bool:
        """Match a text.

        Raises:
            RefusedError: The budget was spent before the match was decided.
        """
        # RE2's classes are those of ASCII, its `$` does not match before a line feed, its `\\s` lacks some control characters.
        if self._linear is not None and text.isascii() and text.isprintable():
            if not budget.spend(5 + len(text) // 50):
                raise self._too_long()
            return self._linear.fullmatch(text) is not None
        return self._backtracked(text, budget)

    def _backtracked(self, text: str, budget: Budget) -> bool:
        import regex

        begun = time.monotonic()
        try:
            if self._backtracking is None:
                self._backtracking = regex.compile(self._text, regex.VERSION0)
            match = self._backtracking.match if self._below else self._backtracking.fullmatch
            found = match(text, timeout=max(budget.left, 1) / _STEPS_PER_SECOND) is not None
        except (TimeoutError, MemoryError, RecursionError, regex.error) as error:
            raise self._too_long() from error
        if not budget.spend(1 + int((time.monotonic() - begun) * _STEPS_PER_SECOND)):
            raise self._too_long()
        return found

    def _too_long(self) -> RefusedError:
        return RefusedError(self._where, f"pattern {self.key[:80]!r} could take forever to match: it has too many repeats")


def _compiled_by_re2(text: str) -> Any:
    """The expression compiled by RE2; None if RE2 does not support it, or interprets it differently."""
    if not text.isascii() or "{," in text:  # `{,n}` is plain text to RE2
        return None
    import re2

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    try:
        return re2.compile(text, options)
    except re2.error:
        return None


class Patterns:
    """The keys of a mapping of patterns, in their order."""

    def __init__(self, keys: Iterable[str], where: str) -> None:
        self._where, self._budget = where, Budget()
        # Length and positions of the dots that stand for anything; then the rest of the text, to the keys and their order.
        self._paths: dict[tuple[int, tuple[int, ...]], dict[str, list[tuple[int, str]]]] = {}
        self._others: list[tuple[int, Expression]] = []
        for number, key in enumerate(keys):
            if len(key) < MAX_PATTERN and _PATH.fullmatch(key):
                text, free = _read(key)
                group = self._paths.setdefault((len(text), free), {})
                group.setdefault(_without(text, free), []).append((number, key))
            else:
                self._spend(_COMPILING)
                self._others.append((number, Expression(key, where, below=True)))

    def matching(self, target: str) -> list[str]:
        """The patterns that match a module path, in their order; peft uses the first."""
        self._budget.next_text()
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
            raise RefusedError(self._where, "too many patterns to match in bounded time", "Write them as whole paths")


def _read(key: str) -> tuple[str, tuple[int, ...]]:
    """The path that a key stands for, and the positions in it where any character may stand."""
    pieces = [piece.groups() for piece in _PIECE.finditer(key)]
    text = "".join(escaped or plain or free for escaped, plain, free in pieces)
    return text, tuple(number for number, (_, _, free) in enumerate(pieces) if free)


def _without(text: str, free: tuple[int, ...]) -> str:
    """`text` without the characters at those positions."""
    bounds = (-1, *free, len(text))
    return "\0".join(text[bounds[n] + 1 : bounds[n + 1]] for n in range(len(bounds) - 1))


def fullmatch(pattern: str, target: str, where: str) -> bool:
    """Match a string of `target_modules` or `exclude_modules` against a whole module path, as peft does."""
    expression, budget = _cached(pattern, where)
    budget.next_text()
    return expression.matches(target, budget)


def escape(path: str) -> str:
    """The pattern that matches a module path and nothing else, as peft's users write it."""
    return re.escape(path)


@lru_cache(maxsize=64)
def _cached(pattern: str, where: str) -> tuple[Expression, Budget]:
    return Expression(pattern, where), Budget()
