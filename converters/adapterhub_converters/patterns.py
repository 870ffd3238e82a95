"""Match regular expressions from adapters' configs as peft does, in bounded time.

`rank_pattern` and `alpha_pattern` map a regular expression to a number; peft uses the first key for which
`re.match(rf"(.*\\.)?({key})$", module_path)` succeeds (peft 0.21, `utils/other.py`, `get_pattern_key`); a string in
`target_modules` has to match the whole path. Nearly all keys are plain paths, their dots escaped or not: those are looked up,
so that thousands of them, one for each expert, take no time. The others are matched by RE2, all in one pass over a path,
in time linear in it. Features that RE2 lacks (lookaround, backreferences) or interprets differently go to the `regex` package,
which supports a deadline.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from .errors import FormatError, RefusedError

MAX_PATTERN = 1_000  # characters
_STEPS_PER_SECOND = 10_000_000
# A path: letters as they are, escaped or not; a dot that is not escaped stands for any character.
_PATH = re.compile(r"(?:[\w.-]|\\[.-])+", re.ASCII)
_PIECE = re.compile(r"\\(.)|([\w-])|(\.)")
_COMPILING = 2_000  # steps to compile an expression
_LOOKUP = 8  # steps to look up a path
_EACH = 200  # steps for each text: a match of fifty expressions together takes ten
_SLOWER = 500_000  # steps
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
        self.text = rf"(.*\.)?({key})$" if below else key
        try:
            with warnings.catch_warnings(action="ignore"):  # FutureWarning: possible nested set
                re.compile(self.text)
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(where, f"pattern {key[:80]!r} is not a regular expression ({error})") from error
        self._linear = _compiled_by_re2(self.text)
        self._backtracking: Any = None

    @property
    def is_linear(self) -> bool:
        """True if RE2 can match `text`, the expression as a whole, against printable ASCII."""
        return self._linear is not None

    def matches(self, text: str, budget: Budget) -> bool:
        """Match a text.

        Raises:
            RefusedError: The budget was spent before the match was decided.
        """
        if self._linear is not None and _is_plain(text):
            if not budget.spend(_steps(text)):
                raise self._too_long()
            return self._linear.fullmatch(text) is not None
        return self._backtracked(text, budget)

    def _backtracked(self, text: str, budget: Budget) -> bool:
        import regex

        begun = time.monotonic()
        try:
            if self._backtracking is None:
                self._backtracking = regex.compile(self.text, regex.VERSION0)
            match = self._backtracking.match if self._below else self._backtracking.fullmatch
            found = match(text, timeout=max(budget.left, 1) / _STEPS_PER_SECOND) is not None
        except (TimeoutError, MemoryError, RecursionError, regex.error) as error:
            raise self._too_long() from error
        if not budget.spend(1 + int((time.monotonic() - begun) * _STEPS_PER_SECOND)):
            raise self._too_long()
        return found

    def _too_long(self) -> RefusedError:
        return RefusedError(self._where, f"pattern {self.key[:80]!r} could take forever to match: it has too many repeats")


def _steps(text: str) -> int:
    """The steps that RE2 takes for an expression and a text."""
    return 5 + len(text) // 50


def _is_plain(text: str) -> bool:
    """True for printable ASCII, which RE2 and `re` match alike.

    RE2's classes are those of ASCII, its `$` does not match before a line feed, its `\\s` lacks some control characters.
    """
    return text.isascii() and text.isprintable()


def _compiled_by_re2(text: str) -> Any:
    """The expression compiled by RE2; None if RE2 does not support it, or interprets it differently."""
    if not text.isascii() or "{," in text:  # `{,n}` is plain text to RE2
        return None
    import re2

    try:
        return re2.compile(text, _re2_options())
    except re2.error:
        return None


def _re2_options() -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    return options


class _Together:
    """Expressions that RE2 matches together, in one pass over a text."""

    def __init__(self, numbered: Mapping[int, Expression]) -> None:
        import re2

        self.numbers = tuple(numbered)
        self._set = re2.Set.FullMatchSet(_re2_options())
        try:
            for one in numbered.values():
                self._set.Add(one.text)
            self._set.Add(".*")  # which matches every text: one without any match was not matched, for lack of memory
            self._set.Compile()
        except re2.error:  # too large
            self._set = None

    def matching(self, text: str) -> tuple[list[int] | None, int]:
        """The numbers of the expressions that match printable ASCII, None if that cannot be told; and the steps it took."""
        begun = time.monotonic()
        places = self._set.Match(text) if self._set is not None else None
        found = [self.numbers[place] for place in places if place < len(self.numbers)] if places else None
        return found, 1 + int((time.monotonic() - begun) * _STEPS_PER_SECOND)


class Patterns:
    """The keys of a mapping of patterns, in their order."""

    def __init__(self, keys: Iterable[str], where: str) -> None:
        self._keys, self._where, self._budget = list(keys), where, Budget(each=_EACH)
        # Length of a path, and positions of its dots that stand for anything; then the rest of its text, to its keys' numbers.
        self._paths: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self._others: dict[int, Expression] = {}
        for number, key in enumerate(self._keys):
            if len(key) < MAX_PATTERN and _PATH.fullmatch(key):
                text, free = _read(key)
                group = self._paths.setdefault(len(text), {}).setdefault(free, {})
                group.setdefault(_without(text, free), []).append(number)
            else:
                self._spend(_COMPILING)
                self._others[number] = Expression(key, where, below=True)
        linear = {number: one for number, one in self._others.items() if one.is_linear}
        self._together = _Together(linear) if len(linear) > 1 else None
        self._slower = 0  # steps that they took together, less those that they would have taken one by one

    def matching(self, target: str) -> list[str]:
        """The patterns that match a module path, in their order; peft uses the first."""
        self._budget.next_text()
        found = self._looked_up(target) if self._paths else []
        if self._others:
            found += self._tried(target)
        return [self._keys[number] for number in sorted(found)]

    def _looked_up(self, target: str) -> list[int]:
        """The numbers of the paths that match."""
        found: list[int] = []
        for length, groups in self._paths.items():
            start = len(target) - length
            if start == 0 or (start > 0 and target[start - 1] == "."):
                self._spend(_LOOKUP * len(groups))
                for free, group in groups.items():
                    found += group.get(_without(target[start:], free), ())
        self._spend((len(self._paths) + len(found)) // 2)
        return found

    def _tried(self, target: str) -> list[int]:
        """The numbers of the other expressions that match."""
        together = self._together
        if together is None or not _is_plain(target):
            return self._one_by_one(self._others, target)
        found, steps = together.matching(target)
        self._spend(steps)
        self._slower += steps - _steps(target) * len(together.numbers)
        if found is None or self._slower > _SLOWER:
            self._together = None
        if found is None:
            return self._one_by_one(self._others, target)
        return found + self._one_by_one(self._others.keys() - together.numbers, target)

    def _one_by_one(self, numbers: Iterable[int], target: str) -> list[int]:
        return [number for number in numbers if self._others[number].matches(target, self._budget)]

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
