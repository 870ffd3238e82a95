"""What a request may write as its `model`: a version of an adapter, a blend of several, or the base.

A version is `name`, `name:tag` or `name@sha256:…`; the name of the remote where it is looked up may precede it. A blend is
`legal:v1*0.7+tone:v3*0.3`. The characters `*` and `+` occur in no ref, and commas in no name: vLLM's gauge of running adapters
separates names by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from adapterhub.digest import is_hex
from adapterhub.ref import Ref, RefError
from adapterhub_converters.errors import RefusedError, UsageError

LONGEST = 1024
"""Characters of a `model`."""
PARTS = 8
"""Versions in a blend."""
HEAVIEST = 1000.0
"""The largest weight in a blend; what larger ones compute is no text."""
NOT_SERVED = "not-served"
"""The code of the error for a name that no pattern allows."""
_NUMBER = frozenset("0123456789-.eE ")  # float() takes underscores and the digits of all scripts, too


@dataclass(frozen=True, slots=True)
class Part:
    """A version in a blend, and what its delta is multiplied by."""

    ref: Ref
    weight: float = 1.0


def parse(model: str, *, namespace: str = "", remote: str = "") -> tuple[Part, ...]:
    """Parse a `model` that is not the base's own name.

    Args:
        model: The text of the request.
        namespace: That of names without one, such as `legal:v1`; empty to require one.
        remote: The name of the remote where names are looked up, which may precede them: `hub/team/legal:v1`; empty for none.

    Raises:
        RefError: It is malformed, or too long.
    """
    if len(model) > LONGEST:
        raise RefError(f"{model[:40]}…", f"longer than {LONGEST:,} characters")
    texts = model.split("+")
    if len(texts) > PARTS:
        raise RefError(model[:80], f"a blend of {len(texts)} versions; at most {PARTS} are supported")
    return tuple(_part(text.strip(" ") if len(texts) > 1 else text, model, namespace, remote) for text in texts)


def _part(text: str, model: str, namespace: str, remote: str) -> Part:
    name, star, factor = text.partition("*")
    name = name.rstrip(" ") if star else name
    bare = name.partition("@")[0].partition(":")[0]
    if namespace and bare and "/" not in bare:
        name = f"{namespace}/{name}"
    if bare.count("/") == 2:
        first, _, name = name.partition("/")
        if first != remote:
            Ref.parse(name)  # what is no name in itself is refused for that
            raise RefError(model[:80], f"{first[:40]!r} is not the remote that is served here", f"Write {name[:80]}")
    ref = Ref.parse(name)
    if not star:
        return Part(ref)
    try:
        weight = float(factor) if set(factor) <= _NUMBER else math.nan
    except ValueError:
        weight = math.nan
    if not abs(weight) <= HEAVIEST:
        what = f"{factor[:20]!r} is not a weight from -{HEAVIEST:,.0f} to {HEAVIEST:,.0f}"
        raise RefError(model[:80], what, "Write a blend like legal:v1*0.7+tone:v3*0.3")
    return Part(ref, weight)


def is_moving(ref: Ref) -> bool:
    """Whether a ref may mean another version later: a tag, a range, the newest. A version number or a digest never does."""
    return ref.number is None and not is_whole(ref.digest)


def is_whole(digest: str | None) -> bool:
    """Whether a digest has all its digits, and so means one version."""
    return is_hex((digest or "").removeprefix("sha256:"))


@dataclass(frozen=True, slots=True)
class Allowed:
    """The names that are served, by patterns such as `team/*`; without patterns, all.

    Attributes:
        patterns: Of names without a version (`fnmatch`).
    """

    patterns: tuple[str, ...] = ()

    @classmethod
    def of(cls, patterns: Sequence[str]) -> Allowed:
        """Read patterns, several of which may be in one text, separated by commas.

        Raises:
            UsageError: There are texts, but no pattern in them; that is not to mean all names.
        """
        found = tuple(part.strip() for text in patterns for part in text.split(",") if part.strip())
        if patterns and not found:
            raise UsageError("patterns of names", "there are none", "Write some like team/*, or leave them out to allow all")
        return cls(found)

    @property
    def namespace(self) -> str:
        """The namespace of all patterns; empty if they have several, or a pattern for one."""
        found = {pattern.partition("/")[0] for pattern in self.patterns}
        only = found.pop() if len(found) == 1 else ""
        return "" if set("*?[") & set(only) else only

    def __contains__(self, name: str) -> bool:
        return not self.patterns or any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def check(self, ref: Ref) -> None:
        """RefusedError for a name that no pattern allows."""
        if ref.name not in self:
            raise RefusedError(ref.name, "is not served here", code=NOT_SERVED)
