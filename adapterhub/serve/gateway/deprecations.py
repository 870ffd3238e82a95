"""The header of an answer from a deprecated version, whose reason somebody wrote into the registry."""

from __future__ import annotations

from collections.abc import Iterable

from .lookup import ResolvedVersion

HEADER = "x-adapterhub-deprecated"
_MAX_REASON = 200  # characters of a reason


def header_of(versions: Iterable[ResolvedVersion]) -> str:
    """Return why versions are deprecated, as the value of a header; empty if none of them is.

    A reason is anybody's text: what a terminal or a proxy could take for more than text becomes a space,
    and a letter that no header can have a question mark.
    """
    reasons = dict.fromkeys(version.deprecated for version in versions if version.deprecated is not None)
    texts = ("".join(letter if letter.isprintable() else " " for letter in reason).strip()[:_MAX_REASON] for reason in reasons)
    return "; ".join(text or "deprecated" for text in texts).encode("latin-1", "replace").decode("latin-1")
