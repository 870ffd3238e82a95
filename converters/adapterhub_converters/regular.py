"""Regular expressions of strangers, matched in time that is bounded and known beforehand.

Python's `re` backtracks. Where the ways it can go are few, by a count that is never too low, it is asked; otherwise all ways
are gone at once, a letter at a time (Thompson, 1968), with the sets of places reached kept for the next text. Both give `re`'s
answer; what the second cannot do (lookaround, backreferences, flags) is refused where the first could take for ever.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Only `re` itself knows how it reads an expression, and has no public word for it; typeshed leaves these out.
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from .errors import FormatError, RefusedError

MAX_PATTERN = 1_000  # characters
_FEW = 20_000  # ways that `re` goes in well under a millisecond
_MANY = 10**9
_MAX_PLACES = 2_000  # of one expression, its counted repeats written out
_MAX_KEPT = 5_000  # sets of places that are kept

_GREEDY = {_constants.MAX_REPEAT, _constants.MIN_REPEAT}
_REPEATS = _GREEDY | {_constants.POSSESSIVE_REPEAT}
_INSIDE = {_constants.SUBPATTERN, _constants.ASSERT, _constants.ASSERT_NOT}  # what is inside comes last


@dataclass
class Budget:
    """How much work may be done for all texts together, in steps of about a tenth of a microsecond."""

    left: int = 10_000_000
    each: int = 1_000
    """What every further text adds."""

    def spend(self, steps: int) -> bool:
        """Whether there is so much left; it is spent."""
        self.left -= steps
        return self.left >= 0


def hopeless(where: str, pattern: str) -> RefusedError:
    """The error for an expression that would take too long."""
    return RefusedError(where, f"pattern {pattern[:80]!r} could take for ever to match: it has too many repeats")


class Regular:
    """An expression `key`, matched against the whole of a text; `below`: or against its end, after a dot."""

    def __init__(self, key: str, where: str, *, below: bool = False) -> None:
        if len(key) > MAX_PATTERN:
            raise RefusedError(where, f"a pattern of {len(key)} characters is over the limit of {MAX_PATTERN}")
        self.key, self._where, self._below = key, where, below
        text = rf"(.*\.)?({key})$" if below else key
        try:
            with warnings.catch_warnings(action="ignore"):  # of syntax that a later Python reads otherwise
                self._parsed = _parser.parse(text)
                self._re = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(where, f"pattern {key[:80]!r} is not a regular expression ({error})") from error
        self._ways: dict[tuple[int, int], int] = {}
        self._machine: _Machine | None = None

    def matches(self, text: str, budget: Budget) -> bool:
        """Whether the whole of `text` matches, or, `below`, its end."""
        # Rounded up, so that the count is made a few times and not for each text.
        size = -(-len(text) // 32) * 32, -(-(text.count(".") + 1) // 4) * 4 if self._below else 1
        if size not in self._ways:
            self._ways[size] = ways(self._parsed, *size)
        if self._ways[size] <= _FEW:
            if not budget.spend(1 + self._ways[size] // 50):
                raise hopeless(self._where, self.key)
            return (self._re.match(text) if self._below else self._re.fullmatch(text)) is not None
        if self._machine is None:
            self._machine = _Machine(self._parsed, self._where, self.key)
        return self._machine.matches(text, budget)


def ways(parsed: Iterable[Any], length: int, dots: int = 0) -> int:
    """At most how many ways a backtracking matcher can go through `parsed` in a text of `length` characters.

    `dots`: the first part is `(.*\\.)?`, which can end at so many places only.
    """
    total = 1
    for number, (opcode, argument) in enumerate(parsed):
        if number == 0 and dots > 1:
            total = dots + 1
            continue
        total = min(_MANY, total * _ways_of(opcode, argument, length))
    return total


def _ways_of(opcode: Any, argument: Any, length: int) -> int:
    if opcode in _REPEATS:
        return _ways_of_repeat(length, *argument)
    if opcode is _constants.BRANCH:
        return min(_MANY, sum(ways(branch, length) for branch in argument[1]))
    if opcode is _constants.GROUPREF_EXISTS:
        return sum(ways(branch, length) for branch in argument[1:] if branch)
    inner = argument if opcode is _constants.ATOMIC_GROUP else argument[-1] if opcode in _INSIDE else ()
    return ways(inner, length)


def _ways_of_repeat(length: int, least: int, most: int, inner: Any) -> int:
    once, (width, _) = ways(inner, length), inner.getwidth()
    most = min(int(most), length // width + 1 if width else length + 1)
    if most <= least:
        return _power(once, int(least))
    # Each number of rounds, and each way in every one of them.
    return min(_MANY, (most - least + 1) * once) if most <= 1 or once == 1 else _power(once + 1, most)


def _power(base: int, exponent: int) -> int:
    return min(_MANY, base ** min(exponent, 32)) if base > 1 else 1


Test = Callable[[str], bool]
Condition = Callable[[str, str], bool]
"""Of the characters before and after a place in the text, empty at its ends."""


class _Machine:
    """A parsed expression as places with steps between them; place 0 is the end."""

    def __init__(self, parsed: Any, where: str, key: str) -> None:
        self._where, self._key = where, key
        self._letters: dict[int, tuple[Test, int]] = {}
        self._free: dict[int, tuple[tuple[Condition | None, int], ...]] = {0: ()}
        if parsed.state.flags & ~_constants.SRE_FLAG_UNICODE:
            raise hopeless(where, key)
        self._start = self._sequence(parsed, 0)
        self._kept: dict[tuple[frozenset[int], str, str], tuple[frozenset[int], bool]] = {}

    def matches(self, text: str, budget: Budget) -> bool:
        """Whether a way leads from the start through the whole of `text`."""
        places, before = frozenset([self._start]), ""
        budget.left += budget.each
        for at in range(len(text) + 1):
            letter = text[at] if at < len(text) else ""
            key = (places, before, letter)
            if key not in self._kept:
                if len(self._kept) >= _MAX_KEPT:
                    self._kept.clear()
                self._kept[key] = self._step(places, before, letter, budget)
            places, ended = self._kept[key]
            if not letter:
                return ended
            if not places:
                return False
            before = letter
        raise AssertionError

    def _step(self, places: frozenset[int], before: str, letter: str, budget: Budget) -> tuple[frozenset[int], bool]:
        """Where a letter leads from `places` and all that is free from there; and whether the end is among those."""
        seen, left = set(places), list(places)
        while left:
            for condition, place in self._free.get(left.pop(), ()):
                if place not in seen and (condition is None or condition(before, letter)):
                    seen.add(place)
                    left.append(place)
        if not budget.spend(2 * len(seen) + 5):
            raise hopeless(self._where, self._key)
        found = (self._letters[place] for place in seen if place in self._letters)
        return frozenset(place for test, place in found if letter and test(letter)), 0 in seen

    def _new(self) -> int:
        place = len(self._free) + len(self._letters)
        if place > _MAX_PLACES:
            raise hopeless(self._where, self._key)
        return place

    def _fork(self, *to: int) -> int:
        place = self._new()
        self._free[place] = tuple((None, other) for other in to)
        return place

    def _sequence(self, parsed: Iterable[Any], then: int) -> int:
        """The place where `parsed` begins that leads to `then`."""
        for opcode, argument in reversed(list(parsed)):
            then = self._one(opcode, argument, then)
        return then

    def _one(self, opcode: Any, argument: Any, then: int) -> int:
        if opcode in _GREEDY:
            return self._repeat(then, *argument)
        if opcode is _constants.BRANCH:
            return self._fork(*(self._sequence(branch, then) for branch in argument[1]))
        if opcode is _constants.SUBPATTERN:
            _, added, removed, inner = argument
            if added or removed:
                raise hopeless(self._where, self._key)
            return self._sequence(inner, then)
        place = self._new()
        if opcode is _constants.AT:
            condition = _CONDITIONS.get(argument)
            if condition is None:
                raise hopeless(self._where, self._key)
            self._free[place] = ((condition, then),)
        else:
            test = _test(opcode, argument)
            if test is None:
                raise hopeless(self._where, self._key)
            self._letters[place] = (test, then)
        return place

    def _repeat(self, then: int, least: int, most: int, inner: Any) -> int:
        if most is _constants.MAXREPEAT:
            loop = self._fork()
            self._free[loop] = ((None, self._sequence(inner, loop)), (None, then))
            then = loop
        else:
            end = then
            for _ in range(int(most) - int(least)):
                then = self._fork(self._sequence(inner, then), end)
        for _ in range(int(least)):
            then = self._sequence(inner, self._fork(then))
        return then


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CONDITIONS: dict[Any, Condition] = {
    _constants.AT_BEGINNING: lambda before, _: not before,
    _constants.AT_BEGINNING_STRING: lambda before, _: not before,
    _constants.AT_END: lambda _, after: not after,
    _constants.AT_END_STRING: lambda _, after: not after,
    _constants.AT_BOUNDARY: lambda before, after: _is_word(before) != _is_word(after),
    _constants.AT_NON_BOUNDARY: lambda before, after: bool(before or after) and _is_word(before) == _is_word(after),
}
_CATEGORIES: dict[Any, Test] = {
    _constants.CATEGORY_DIGIT: str.isdecimal,
    _constants.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    _constants.CATEGORY_SPACE: str.isspace,
    _constants.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    _constants.CATEGORY_WORD: _is_word,
    _constants.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}


def _test(opcode: Any, argument: Any) -> Test | None:
    """Whether a character is one that a part of an expression stands for; None for a part that stands for something else."""
    if opcode is _constants.CATEGORY:
        return _CATEGORIES.get(argument)
    if opcode is not _constants.IN:
        made = _TESTS.get(opcode)
        return made(argument) if made else None
    negated = argument[0][0] is _constants.NEGATE
    tests = [_test(*item) for item in argument[negated:]]
    known = [test for test in tests if test is not None]
    return (lambda char: any(test(char) for test in known) != negated) if len(known) == len(tests) else None


_TESTS: dict[Any, Callable[[Any], Test]] = {
    _constants.ANY: lambda _: lambda char: char != "\n",
    _constants.LITERAL: lambda code: lambda char: ord(char) == code,
    _constants.NOT_LITERAL: lambda code: lambda char: ord(char) != code,
    _constants.RANGE: lambda ends: lambda char: ends[0] <= ord(char) <= ends[1],
}
