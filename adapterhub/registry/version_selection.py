"""Selection of a version, here and on remotes: by a range of tags such as `^1.2`, or by the first digits of a digest.

A tag takes precedence: `1.2` is a range only if there is no such tag, and `v3` is never one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from adapterhub import semver
from adapterhub.digest import Digest
from adapterhub.ref import RefError
from adapterhub_converters import safe_regex

_NUMBER = safe_regex.Pattern(r"v([1-9][0-9]{0,8})")
_DIGEST = "sha256:"
_DIGEST_LENGTH = len(_DIGEST) + 64


def number(tag: str) -> int | None:
    """Return the number of a tag like `v3`; None for any other tag."""
    match = _NUMBER.fullmatch(tag)
    return int(match[1]) if match else None


def is_range(reference: str) -> bool:
    """Return whether a reference is a range, and cannot be a tag."""
    return reference.startswith(("^", "~"))


def is_prefix(reference: str) -> bool:
    """Return whether a reference is the first digits of a digest."""
    return reference.startswith(_DIGEST) and len(reference) < _DIGEST_LENGTH


def highest_tag_in_range(
    reference: str, tags: Callable[[], Iterable[str]], version_of: Callable[[str], object], location: str
) -> str | None:
    """Return the tag of the highest version in a range; None if no tag is in it, or if the reference is not a range.

    Args:
        reference: The range.
        tags: Returns all tags; called only if the reference may be a range.
        version_of: Returns what identifies the version that a tag points to.
        location: The name for an error.

    Raises:
        RefError: The highest one has two spellings, `1.2.0` and `v1.2.0`, which point to different versions.
    """
    # v3 is a version number, although the grammar of ranges accepts it.
    candidates = [] if number(reference) else semver.highest_in(reference, tags())
    if len(candidates) > 1 and len({version_of(tag) for tag in candidates}) > 1:
        problem = f"{' and '.join(candidates)} are the same version number and point to different versions"
        raise RefError(location, problem, "Name one of them")
    return candidates[0] if candidates else None


def matching_digest(prefix: str, digests: Iterable[Digest], location: str) -> Digest | None:
    """Return the digest that begins with `prefix`; None if there is none. Raise RefError if there are several."""
    matches = sorted({digest for digest in digests if digest.startswith(prefix)})
    if len(matches) > 1:
        raise ambiguous_prefix_error(location, matches)
    return matches[0] if matches else None


def ambiguous_prefix_error(location: str, versions: Sequence[object]) -> RefError:
    """Return the error for the first digits of the digests of several versions."""
    problem = f"ambiguous digest prefix: {len(versions)} versions, such as {versions[0]}, {versions[1]}"
    return RefError(location, problem, "Use more digits")
