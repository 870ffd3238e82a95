r"""Regular expressions from adapters' configs, matched as peft does, in bounded time.

`rank_pattern` and `alpha_pattern` map a regular expression to a number; peft uses the first key for which
`re.match(rf"(.*\\.)?({key})$", module_path)` succeeds (peft 0.21, `utils/other.py`, `get_pattern_key`); a string in
`target_modules` must match the complete path. Nearly all keys are plain paths, with their dots escaped or not: those are looked
up, so that thousands of them, one for each expert, take no time. The others are matched by RE2, all in one pass over a path, in
time linear in it. Features that RE2 lacks (lookaround, backreferences) or interprets differently go to the `regex` package,
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
# A path: characters as they are, escaped or not; a dot that is not escaped matches any character.
_PATH = re.compile(r"(?:[\w.-]|\\[.-])+", re.ASCII)
_PATH_PIECE = re.compile(r"\\(.)|([\w-])|(\.)")
_COMPILE_STEPS = 2_000  # steps to compile an expression
_LOOKUP_STEPS = 8  # steps to look up a path
_STEPS_PER_TEXT = 200  # steps for each text: a match of fifty expressions together takes ten
_MAX_EXCESS = 500_000  # steps
_POSIX_CLASS = re.compile(r"\[:.*:\]", re.DOTALL)  # a set of characters to `re`, a class to RE2 and `regex`


class Budget:
    """The work allowed for all texts together, in steps of about a tenth of a microsecond: a second, and more for each text."""

    def __init__(self, steps_left: int = _STEPS_PER_SECOND, steps_per_text: int = 1_000) -> None:
        self.steps_left, self.steps_per_text = steps_left, steps_per_text

    def next_text(self) -> None:
        """Allow the work for one more text."""
        self.steps_left += self.steps_per_text

    def spend(self, steps: int) -> bool:
        """Spend steps; return False if fewer were left."""
        self.steps_left -= steps
        return self.steps_left >= 0


class Expression:
    """A regular expression, matched against a complete text, or with `below` against its end after a dot.

    Raises:
        FormatError: Python's `re` does not accept it.
        RefusedError: It is longer than `MAX_PATTERN`, or has a POSIX class.
    """

    def __init__(self, key: str, location: str, *, below: bool = False) -> None:
        if len(key) > MAX_PATTERN:
            raise RefusedError(location, f"a pattern of {len(key)} characters exceeds the limit of {MAX_PATTERN}")
        if _POSIX_CLASS.search(key):
            raise RefusedError(
                location, f"pattern {key[:80]!r} has [: and :], which programs read differently", "Write the set out"
            )
        self.key, self._label, self._below = key, location, below
        self.text = rf"(.*\.)?({key})$" if below else key
        try:
            with warnings.catch_warnings(action="ignore"):  # FutureWarning: possible nested set
                re.compile(self.text)
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(location, f"pattern {key[:80]!r} is not a regular expression ({error})") from error
        self._linear = _compiled_by_re2(self.text)
        self._backtracking: Any = None

    @property
    def is_linear(self) -> bool:
        """Whether RE2 can match the expression against printable ASCII."""
        return self._linear is not None

    def matches(self, text: str, budget: Budget) -> bool:
        """Return whether the expression matches a text.

        Raises:
            RefusedError: The budget was spent before the match was decided.
        """
        # RE2 and `re` agree only on printable ASCII.
        if self._linear is not None and _is_plain(text):
            if not budget.spend(_steps(text)):
                raise self._time_error()
            return self._linear.fullmatch(text) is not None
        return self._match_backtracking(text, budget)

    def _match_backtracking(self, text: str, budget: Budget) -> bool:
        import regex

        start_time = time.monotonic()
        try:
            if self._backtracking is None:
                self._backtracking = regex.compile(self.text, regex.VERSION0)
            match = self._backtracking.match if self._below else self._backtracking.fullmatch
            is_match = match(text, timeout=max(budget.steps_left, 1) / _STEPS_PER_SECOND) is not None
        except (TimeoutError, MemoryError, RecursionError, regex.error) as error:
            raise self._time_error() from error
        if not budget.spend(1 + int((time.monotonic() - start_time) * _STEPS_PER_SECOND)):
            raise self._time_error()
        return is_match

    def _time_error(self) -> RefusedError:
        return RefusedError(self._label, f"pattern {self.key[:80]!r} could take forever to match: it has too many repeats")


def _steps(text: str) -> int:
    """Return the steps that RE2 takes for an expression and a text."""
    return 5 + len(text) // 50


def _is_plain(text: str) -> bool:
    r"""Return whether a text is printable ASCII, which RE2 and `re` match alike.

    RE2's classes are those of ASCII, its `$` does not match before a line feed, and its `\\s` lacks some control characters.
    """
    return text.isascii() and text.isprintable()


def _compiled_by_re2(text: str) -> Any:
    """Return the expression compiled by RE2; None if RE2 does not support it, or interprets it differently."""
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


class _ExpressionSet:
    """Expressions that RE2 matches together, in one pass over a text."""

    def __init__(self, numbered: Mapping[int, Expression]) -> None:
        import re2

        self.numbers = tuple(numbered)
        self._set = re2.Set.FullMatchSet(_re2_options())
        try:
            for expression in numbered.values():
                self._set.Add(expression.text)
            # Matches every text: if a text has no match at all, RE2 ran out of memory.
            self._set.Add(".*")
            self._set.Compile()
        except re2.error:  # too large
            self._set = None

    def matching(self, text: str) -> tuple[list[int] | None, int]:
        """Return the numbers of the expressions that match printable ASCII, None if RE2 cannot tell; and the steps it took."""
        start_time = time.monotonic()
        places = self._set.Match(text) if self._set is not None else None
        matching_numbers = [self.numbers[place] for place in places if place < len(self.numbers)] if places else None
        return matching_numbers, 1 + int((time.monotonic() - start_time) * _STEPS_PER_SECOND)


class Patterns:
    """The keys of a mapping of patterns, in their order."""

    def __init__(self, keys: Iterable[str], location: str) -> None:
        self._keys, self._label, self._budget = list(keys), location, Budget(steps_per_text=_STEPS_PER_TEXT)
        # The length of a path, then the positions of its wildcard dots, then the rest of its text, to the numbers of its keys.
        self._paths: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self._expressions: dict[int, Expression] = {}
        for number, key in enumerate(self._keys):
            # A plain path is looked up in a dict; anything else is compiled.
            if len(key) < MAX_PATTERN and _PATH.fullmatch(key):
                text, wildcards = _parse_path(key)
                group = self._paths.setdefault(len(text), {}).setdefault(wildcards, {})
                group.setdefault(_without_wildcards(text, wildcards), []).append(number)
            else:
                self._spend(_COMPILE_STEPS)
                self._expressions[number] = Expression(key, location, below=True)
        linear = {number: expression for number, expression in self._expressions.items() if expression.is_linear}
        self._expression_set = _ExpressionSet(linear) if len(linear) > 1 else None
        self._excess_steps = 0  # steps that matching them together took beyond matching them one by one

    def matching(self, target: str) -> list[str]:
        """Return the patterns that match a module path, in their order; peft uses the first."""
        self._budget.next_text()
        numbers = self._matching_paths(target) if self._paths else []
        if self._expressions:
            numbers += self._matching_expressions(target)
        return [self._keys[number] for number in sorted(numbers)]

    def _matching_paths(self, target: str) -> list[int]:
        """Return the numbers of the paths that match."""
        numbers: list[int] = []
        for length, groups in self._paths.items():
            start = len(target) - length
            if start == 0 or (start > 0 and target[start - 1] == "."):
                self._spend(_LOOKUP_STEPS * len(groups))
                for wildcards, group in groups.items():
                    numbers += group.get(_without_wildcards(target[start:], wildcards), ())
        self._spend((len(self._paths) + len(numbers)) // 2)
        return numbers

    def _matching_expressions(self, target: str) -> list[int]:
        """Return the numbers of the other expressions that match."""
        expression_set = self._expression_set
        if expression_set is None or not _is_plain(target):
            return self._one_by_one(self._expressions, target)
        matching_numbers, steps = expression_set.matching(target)
        self._spend(steps)
        self._excess_steps += steps - _steps(target) * len(expression_set.numbers)
        # RE2's set falls back to slow paths on some texts: give it up once it costs more than single expressions.
        if matching_numbers is None or self._excess_steps > _MAX_EXCESS:
            self._expression_set = None
        if matching_numbers is None:
            return self._one_by_one(self._expressions, target)
        return matching_numbers + self._one_by_one(self._expressions.keys() - expression_set.numbers, target)

    def _one_by_one(self, numbers: Iterable[int], target: str) -> list[int]:
        return [number for number in numbers if self._expressions[number].matches(target, self._budget)]

    def _spend(self, steps: int) -> None:
        if not self._budget.spend(steps):
            raise RefusedError(self._label, "too many patterns to match in bounded time", "Write them as whole paths")


def _parse_path(key: str) -> tuple[str, tuple[int, ...]]:
    """Return the path that a key matches, and the positions of its wildcards."""
    pieces = [piece.groups() for piece in _PATH_PIECE.finditer(key)]
    text = "".join(escaped or plain or free for escaped, plain, free in pieces)
    return text, tuple(number for number, (_, _, free) in enumerate(pieces) if free)


def _without_wildcards(text: str, wildcards: tuple[int, ...]) -> str:
    """Return `text` without the characters at the positions `wildcards`."""
    bounds = (-1, *wildcards, len(text))
    return "\0".join(text[bounds[n] + 1 : bounds[n + 1]] for n in range(len(bounds) - 1))


def fullmatch(pattern: str, target: str, location: str) -> bool:
    """Match a string of `target_modules` or `exclude_modules` against a complete module path, as peft does."""
    expression, budget = _cached_expression(pattern, location)
    budget.next_text()
    return expression.matches(target, budget)


def escape(path: str) -> str:
    """Return the pattern that matches only this module path, as peft's users write it."""
    return re.escape(path)


@lru_cache(maxsize=64)
def _cached_expression(pattern: str, location: str) -> tuple[Expression, Budget]:
    # One budget for all matches of a pattern, as many as a model has modules.
    return Expression(pattern, location), Budget()
