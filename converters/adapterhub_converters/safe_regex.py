"""Regular expressions for untrusted text, matched by RE2 in time linear in the text.

Python's `re` backtracks: a space in the wrong place of a pattern lets somebody write a README, a header or the name of a tensor
that takes hours to match. RE2 cannot backtrack (github.com/google/re2/wiki/WhyRE2): it has neither lookaround nor
backreferences, its classes are those of ASCII, and its `$` is the end of the text. It is imported with the first match. A match
takes RE2 some 5 µs, where `re` takes 0.3, so anything that is done for every tensor is better split by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Protocol


class Match(Protocol):
    """A match of a pattern, with the interface of `re.Match`."""

    def __getitem__(self, group: int | str) -> str: ...

    def group(self, *groups: int | str) -> Any:
        """Return one group, or a tuple of several."""

    def groups(self) -> tuple[str, ...]:
        """Return all groups; None for one that did not take part."""

    def start(self) -> int:
        """Return the position of the match."""


class Pattern:
    """A pattern in RE2's syntax. It never matches a text that is not valid Unicode (one with half of a surrogate pair)."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def _re2_pattern(self) -> Any:
        import re2

        options = re2.Options()
        options.log_errors = False  # an expression of a stranger is an error of ours, not a line of RE2's log on stderr
        return re2.compile(self.text, options)

    def fullmatch(self, text: str) -> Match | None:
        """Match the complete `text`."""
        return self._re2_pattern.fullmatch(text) if _encodes(text) else None

    def match(self, text: str) -> Match | None:
        """Match at the start of `text`."""
        return self._re2_pattern.match(text) if _encodes(text) else None

    def search(self, text: str) -> Match | None:
        """Find the first match in `text`."""
        return self._re2_pattern.search(text) if _encodes(text) else None

    def finditer(self, text: str) -> Iterator[Match]:
        """Find all matches in `text`."""
        return self._re2_pattern.finditer(text) if _encodes(text) else iter(())

    def sub(self, new: str | Callable[[Match], str], text: str) -> str:
        """Replace all matches in `text`."""
        return self._re2_pattern.sub(new, text) if _encodes(text) else text


def _encodes(text: str) -> bool:
    # RE2 works on UTF-8, which half of a surrogate pair does not have.
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
