"""Requirements on the version that a tag may be moved to: the tables `[promote.TAG]` of a settings file.

Only their form is known here; `adapterhub/registry/releases/tag_requirements.py` decides whether a version meets them.
"""

from __future__ import annotations

from pathlib import Path

from adapterhub.identity import Identity
from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = safe_regex.Pattern(r"[1-9][0-9]{0,8}[smhd]")
UNMET = "requirements-unmet"
"""The code of the error for a version that does not meet the requirements of a tag."""
CLEAN = "clean"
"""The only scan that can be required: one that finds no error and no warning."""


@dataclass(frozen=True, slots=True)
class TagRules:
    """The requirements of one file on a tag; empty values require nothing.

    Attributes:
        tag: The tag.
        file: The file that has them.
        source: A tag that must mean the version, or have meant it.
        gates: Names of evaluations, each with a bound of one of its metrics, as `eval --gate` takes them.
        attestations: The required kinds of attestations, each by one of `signers`.
        signers: Files or folders of public keys, and identities: one of them must have signed the version.
        approvals: The number of people who must have approved it for this tag.
        approvers: Files or folders of public keys, and identities, whose signed approvals count; accounts of a hub always do.
        from_others: Neither who pushed the version nor who moves the tag counts among them.
        scan: `clean`, or empty.
        age: Seconds since it was pushed.
        keep_previous: A gc keeps the version that the tag meant before.
    """

    tag: str
    file: str
    source: str = ""
    gates: tuple[tuple[str, str], ...] = ()
    attestations: tuple[str, ...] = ()
    signers: tuple[Path | Identity, ...] = ()
    approvals: int = 0
    approvers: tuple[Path | Identity, ...] = ()
    from_others: bool = False
    scan: str = ""
    age: int = 0
    keep_previous: bool = False

    def where(self, key: str) -> str:
        """Return the name of one of its keys."""
        return f"promote.{self.tag}.{key}"


def parse_duration(text: str) -> int:
    """Return the seconds of a duration such as `90s`, `30m`, `1h` or `7d`; 0 for a text of another form."""
    return int(text[:-1]) * _UNITS[text[-1]] if _DURATION.fullmatch(text) else 0
