"""The names that a request may write as its `model`: a version of an adapter, a blend of several, or the base.

A version is `name`, `name:tag` or `name@sha256:…`, optionally preceded by the name of the remote where it is looked up. A blend
is `legal:v1*0.7+tone:v3*0.3`. The characters `*` and `+` occur in no ref, and commas in no name, because vLLM's gauge of
running adapters separates names by commas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from adapterhub.digest import is_hex
from adapterhub.ref import Ref, RefError, is_pattern
from adapterhub_converters.errors import RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

MAX_LENGTH = 1024
"""The largest number of characters in a `model`."""
PARTS = 8
"""The largest number of versions in a blend."""
HEAVIEST = 1000.0
"""The largest weight in a blend; larger weights produce no meaningful text."""
NOT_SERVED = "not-served"
"""The code of the error for a name that no pattern allows."""
_NUMBER = frozenset("0123456789-.eE ")  # float() would also take underscores and the digits of all scripts


@dataclass(frozen=True, slots=True)
class BlendPart:
    """A version in a blend, and the factor of its delta."""

    ref: Ref
    weight: float = 1.0


def parse(model: str, *, namespace: str = "", remote: str = "") -> tuple[BlendPart, ...]:
    """Parse a `model` that is not the base's own name.

    Args:
        model: The text of the request.
        namespace: The namespace of names without one, such as `legal:v1`; empty to require one.
        remote: The name of the remote where names are looked up, which may precede them: `hub/team/legal:v1`; empty for none.

    Raises:
        RefError: It is malformed, or too long.
    """
    if len(model) > MAX_LENGTH:
        raise RefError(f"{model[:40]}…", f"longer than {MAX_LENGTH:,} characters")
    texts = model.split("+")
    if len(texts) > PARTS:
        raise RefError(model[:80], f"a blend of {len(texts)} versions; at most {PARTS} are supported")
    return tuple(_parse_part(text.strip(" ") if len(texts) > 1 else text, model, namespace, remote) for text in texts)


def _parse_part(text: str, model: str, namespace: str, remote: str) -> BlendPart:
    """Parse one version of a blend, with its weight."""
    name, star, factor = text.partition("*")
    name = name.rstrip(" ") if star else name
    bare = name.partition("@")[0].partition(":")[0]
    if namespace and bare and "/" not in bare:
        name = f"{namespace}/{name}"
    if bare.count("/") == 2:
        first, _, name = name.partition("/")
        if first != remote:
            Ref.parse(name)  # reports a malformed name before an unknown remote
            raise RefError(model[:80], f"{first[:40]!r} is not the remote that is served here", f"Write {name[:80]}")
    ref = Ref.parse(name)
    if not star:
        return BlendPart(ref)
    try:
        weight = float(factor) if set(factor) <= _NUMBER else math.nan
    except ValueError:
        weight = math.nan
    # Written as `not … <=`, so that NaN is refused too.
    if not abs(weight) <= HEAVIEST:
        problem = f"{factor[:20]!r} is not a weight from -{HEAVIEST:,.0f} to {HEAVIEST:,.0f}"
        raise RefError(model[:80], problem, "Write a blend like legal:v1*0.7+tone:v3*0.3")
    return BlendPart(ref, weight)


def is_moving(ref: Ref) -> bool:
    """Return whether a ref may mean another version later: a tag, a range, the newest. A number or a full digest never does."""
    return ref.number is None and not is_full_digest(ref.digest)


def is_full_digest(digest: str | None) -> bool:
    """Return whether a digest has all its digits, and so means exactly one version."""
    return is_hex((digest or "").removeprefix("sha256:"))


@dataclass(frozen=True, slots=True)
class AllowedNames:
    """The names that are served, by patterns such as `team/*`; without patterns, all names.

    Attributes:
        patterns: Patterns (`fnmatch`) of names without a version.
    """

    patterns: tuple[str, ...] = ()

    @classmethod
    def from_patterns(cls, patterns: Sequence[str]) -> AllowedNames:
        """Read patterns from texts, each with one or several that are separated by commas.

        Raises:
            UsageError: The texts contain no pattern; this must not silently mean all names.
        """
        stripped = tuple(part.strip() for text in patterns for part in text.split(",") if part.strip())
        if patterns and not stripped:
            raise UsageError("patterns of names", "none was given", "Write some like team/*, or leave them out to allow all")
        return cls(stripped)

    @property
    def namespace(self) -> str:
        """The namespace that all patterns share; empty if they have several, or a pattern in place of one."""
        namespaces = {pattern.partition("/")[0] for pattern in self.patterns}
        common = namespaces.pop() if len(namespaces) == 1 else ""
        return "" if is_pattern(common) else common

    def __contains__(self, name: str) -> bool:
        return not self.patterns or any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def check(self, ref: Ref) -> None:
        """Raise RefusedError for a name that no pattern allows."""
        if ref.name not in self:
            raise RefusedError(ref.name, "is not served here", code=NOT_SERVED)
