"""peft's patterns, matched as peft matches them, without the power to hang the process.

`rank_pattern` and `alpha_pattern` map a regular expression to a number; peft takes the first key for which
`re.match(rf"(.*\\.)?({key})$", module_path)` succeeds (`utils/other.py`, `get_pattern_key`). An adapter comes from
strangers, and Python's `re` backtracks, so expressions that can take exponential time are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from .errors import FormatError, RefusedError

MAX_PATTERN = 1_000  # characters
MAX_REPEATS = 3  # unbounded repeats in one pattern: time is at most the module path's length to this power

_REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT}


def matching_keys(patterns: Iterable[str], target: str, where: str) -> list[str]:
    """The patterns that match a module path, in their order; peft uses the first."""
    return [key for key in patterns if _compiled(key, where).match(target)]


def fullmatch(pattern: str, target: str, where: str) -> bool:
    """Whether a `target_modules` or `exclude_modules` string matches, as peft matches it: the whole path."""
    return _compiled(pattern, where, "{}").fullmatch(target) is not None


@lru_cache(maxsize=4096)
def _compiled(key: str, where: str, frame: str = r"(.*\.)?({})$") -> re.Pattern[str]:
    if len(key) > MAX_PATTERN:
        raise RefusedError(where, f"a pattern of {len(key)} characters is over the limit of {MAX_PATTERN}")
    try:
        if _unbounded_repeats(_parser.parse(key)) > MAX_REPEATS:
            raise RefusedError(where, f"pattern {key[:80]!r} could take for ever to match: it has too many repeats")
        return re.compile(frame.replace("{}", key))
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(where, f"pattern {key[:80]!r} is not a regular expression ({error})") from error


def _unbounded_repeats(parsed: Any) -> int:
    """How many repeats a match may have to try; a repeat inside a repeat counts as hopeless."""
    count = 0
    for opcode, argument in parsed:
        if opcode in _REPEATS:
            _, most, inner = argument
            inside = _unbounded_repeats(inner)
            branching = any(op is _constants.BRANCH for op, _ in inner)
            if most > 1 and (inside or branching):
                return MAX_REPEATS + 1
            count += inside + (1 if most > 8 else 0)
        else:
            count += sum(_unbounded_repeats(child) for child in _children(opcode, argument))
    return count


def _children(opcode: Any, argument: Any) -> list[Any]:
    if opcode is _constants.SUBPATTERN:
        return [argument[-1]]
    if opcode is _constants.BRANCH:
        return list(argument[1])
    if opcode in (_constants.ASSERT, _constants.ASSERT_NOT):
        return [argument[1]]
    return []
