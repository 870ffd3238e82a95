"""The codes of errors and findings with their explanations, as `adapterhub explain` and the reference show them."""

from __future__ import annotations

from typing import NamedTuple

from .errors import HINTS
from .explanations import ERRORS, FINDINGS, STORED


class Explanation(NamedTuple):
    """The explanation of a code; `kind` is the severity of a finding, or `error` for an error of any command.

    Attributes:
        meaning: One line; empty if `text` says it all.
        text: The reason, and what to do.
        fix: The hint of the error itself, with the names of its fields in capitals; empty for a finding.
        reported_by: The command that reports it as a finding, such as `validate`; empty for an error of any command.
    """

    code: str
    kind: str
    meaning: str
    text: str
    fix: str
    reported_by: str


class _Capitals(dict[str, str]):
    """A stand-in for the fields of an error, in which each field is its own name in capitals."""

    def __missing__(self, key: str) -> str:
        return key.upper()


def codes() -> tuple[str, ...]:
    """Return all codes: findings in the order of the checks, those of stored bytes, then errors by name."""
    from adapterhub.checks import CODES

    return (*CODES, *STORED, *sorted(set(ERRORS) - set(CODES) - set(STORED)))


def explanation(code: str) -> Explanation | None:
    """Return the explanation of a code; None for an unknown one."""
    from adapterhub.checks import CODES, SCAN

    fix = HINTS.get(code, "").format_map(_Capitals())
    if code in CODES:
        severity, meaning = CODES[code]
        return Explanation(code, severity, meaning, FINDINGS.get(code, ""), fix, "scan" if code in SCAN else "validate")
    if code in STORED:
        stored_severity, text = STORED[code]
        return Explanation(code, stored_severity, "", text, fix, "audit verify" if code in ("changed", "reordered") else "fsck")
    return Explanation(code, "error", "", ERRORS[code], fix, "") if code in ERRORS else None
