"""Semantic versions in tags, `1.2.3` or `v1.2.3-rc.1`, and ranges of them, `^1.2`.

Order and grammar are those of semver.org 2.0.0 without build metadata, which a tag cannot contain; ranges are npm's
(node-semver, README, "Ranges"): a prerelease matches only a range that names a prerelease of the same three numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass

_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_WORD = r"(?:0|[1-9][0-9]{0,8}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_VERSION = safe_regex.Pattern(rf"v?({_NUMBER})\.({_NUMBER})\.({_NUMBER})(?:-({_WORD}(?:\.{_WORD})*))?")
_RANGE = safe_regex.Pattern(rf"([\^~]?)v?({_NUMBER})(?:\.({_NUMBER})(?:\.({_NUMBER})(?:-({_WORD}(?:\.{_WORD})*))?)?)?")

Release = tuple[int, int, int]
# A release sorts after its prereleases; among the identifiers of a prerelease, numbers sort before names.
_Pre = tuple[int, tuple[tuple[int, int, str], ...]]


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """Three numbers and the prerelease after the dash, in a form that sorts."""

    release: Release
    pre: _Pre = (1, ())

    @property
    def is_pre(self) -> bool:
        """Whether it is a prerelease."""
        return self.pre[0] == 0


@dataclass(frozen=True, slots=True)
class Range:
    """A range of versions from `low` up to, not including, the release `high`."""

    low: Version
    high: Release

    def __contains__(self, version: Version) -> bool:
        if version.is_pre and not (self.low.is_pre and version.release == self.low.release):
            return False
        return self.low <= version and version.release < self.high


def parse(text: str) -> Version | None:
    """Parse a tag; return None if it is not a version."""
    match = _VERSION.fullmatch(text)
    return Version((int(match[1]), int(match[2]), int(match[3])), _pre(match[4])) if match else None


def parse_range(text: str) -> Range | None:
    """Parse `^1.2`, `~1.2` or `1.2`; return None if the text is not a range."""
    match = _RANGE.fullmatch(text)
    if not match:
        return None
    numbers = [int(part) for part in match.group(2, 3, 4) if part is not None]
    major, minor, patch = (*numbers, 0, 0)[:3]
    return Range(Version((major, minor, patch), _pre(match[5])), _end(match[1], numbers))


def _end(kind: str, numbers: list[int]) -> Release:
    """Return the end of a range: `^` keeps the leftmost number that is not 0, `~` the first two, a plain range all."""
    if kind == "^":
        length = next((index for index, number in enumerate(numbers) if number), len(numbers) - 1) + 1
    elif kind == "~":
        length = min(len(numbers), 2)
    else:
        length = len(numbers)
    prefix = numbers[:length]
    prefix[-1] += 1
    major, minor, patch = (*prefix, 0, 0)[:3]
    return major, minor, patch


def _pre(text: str | None) -> _Pre:
    if text is None:
        return (1, ())
    # Numbers compare as numbers and sort before words.
    return (0, tuple((0, int(word), "") if word.isdecimal() else (1, 0, word) for word in text.split(".")))


def highest(tags: list[str], range_: Range) -> list[str]:
    """Return the tags of the highest version in a range: several if it has two spellings, none if no tag is in the range."""
    matches = [(version, tag) for tag in tags if (version := parse(tag)) and version in range_]
    top = max((version for version, _ in matches), default=None)
    return [tag for version, tag in matches if version == top]


def highest_in(text: str, tags: Iterable[str]) -> list[str]:
    """Return the tags of the highest version in the range `text`, as `highest` does; none if `text` is not a range."""
    range_ = parse_range(text)
    return highest(list(tags), range_) if range_ else []
