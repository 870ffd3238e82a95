"""Selection of a version, here and on remotes: by a range of tags such as `^1.2`, or by the first digits of a digest.

A tag comes first: `1.2` is a range only where there is no such tag, and `v3` is never one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from adapterhub import semver
from adapterhub.digest import Digest
from adapterhub.ref import RefError
from adapterhub_converters import linear

_NUMBER = linear.Pattern(r"v([1-9][0-9]{0,8})")
_DIGEST = "sha256:"
_WHOLE = len(_DIGEST) + 64


def number(tag: str) -> int | None:
    """The number of a tag like `v3`; None for any other."""
    found = _NUMBER.fullmatch(tag)
    return int(found[1]) if found else None


def is_range(reference: str) -> bool:
    """Tell whether a reference is a range, and cannot be a tag."""
    return reference.startswith(("^", "~"))


def is_prefix(reference: str) -> bool:
    """Tell whether a reference is the first digits of a digest."""
    return reference.startswith(_DIGEST) and len(reference) < _WHOLE


def in_range(reference: str, tags: Callable[[], Iterable[str]], version_of: Callable[[str], object], where: str) -> str | None:
    """The tag of the highest version in a range; None if no tag is in it, or for a reference that is no range.

    Raises:
        RefError: Two spellings of the highest one, `1.2.0` and `v1.2.0`, are at different versions by `version_of`.
    """
    found = [] if number(reference) else semver.highest_in(reference, tags())
    if len(found) > 1 and len({version_of(tag) for tag in found}) > 1:
        what = f"{' and '.join(found)} are the same version number and point to different versions"
        raise RefError(where, what, "Name one of them")
    return found[0] if found else None


def begins(prefix: str, digests: Iterable[Digest], where: str) -> Digest | None:
    """The digest that begins with `prefix`; None without one, RefError if several do."""
    found = sorted({digest for digest in digests if digest.startswith(prefix)})
    if len(found) > 1:
        raise ambiguous(where, found)
    return found[0] if found else None


def ambiguous(where: str, versions: Sequence[object]) -> RefError:
    """The error for the first digits of the digests of several versions."""
    what = f"ambiguous digest prefix: {len(versions)} versions, such as {versions[0]}, {versions[1]}"
    return RefError(where, what, "Use more digits")
