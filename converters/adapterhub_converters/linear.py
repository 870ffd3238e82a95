"""Regular expressions over text from elsewhere, matched in time linear in the text.

Python's `re` backtracks: a space in the wrong place of a pattern, and a README, a header or the name of a tensor that somebody
wrote for it takes hours. RE2 cannot (github.com/google/re2/wiki/WhyRE2): it has neither lookaround nor backreferences, its
classes are those of ASCII, and its `$` is the end of the text. It is imported with the first match. A match takes it some 5 µs,
where `re` takes 0.3, so what is asked of every tensor is better split by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Protocol


class Match(Protocol):
    """Where a pattern was found, as `re.Match` has it."""

    def __getitem__(self, group: int | str) -> str: ...

    def group(self, *groups: int | str) -> Any:
        """One group, or a tuple of several."""

    def groups(self) -> tuple[str, ...]:
        """Every group; None for one that has no part in it."""

    def start(self) -> int:
        """Its position."""


class Pattern:
    """A pattern in RE2's syntax. A text that is not Unicode, with half of a surrogate pair, does not match any."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def _compiled(self) -> Any:
        import re2

        return re2.compile(self.text)

    def fullmatch(self, text: str) -> Match | None:
        """Match the whole of `text`."""
        return self._compiled.fullmatch(text) if _encodes(text) else None

    def match(self, text: str) -> Match | None:
        """Match at the start of `text`."""
        return self._compiled.match(text) if _encodes(text) else None

    def search(self, text: str) -> Match | None:
        """Find the first place in `text` that matches."""
        return self._compiled.search(text) if _encodes(text) else None

    def finditer(self, text: str) -> Iterator[Match]:
        """Find all places that match."""
        return self._compiled.finditer(text) if _encodes(text) else iter(())

    def sub(self, new: str | Callable[[Match], str], text: str) -> str:
        """Replace all places that match."""
        return self._compiled.sub(new, text) if _encodes(text) else text


def _encodes(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
