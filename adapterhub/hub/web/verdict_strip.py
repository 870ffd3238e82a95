"""The verdicts about a version in one line, which is in the first screen of a phone; the sections below have the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlencode

from adapterhub.index.queries import VersionRow
from adapterhub.registry.signature_policy import SignatureSummary
from adapterhub_converters.display import format_plural
from adapterhub_converters.runtime_rules import APPLIED, REFUSED, WRONG

from .facts import Facts

if TYPE_CHECKING:
    from adapterhub.checks import Group


class StripItem(NamedTuple):
    """An item of the strip.

    Attributes:
        verdict: The verdict whose color it has; empty for none.
        url: Where the reasons are; empty if there is nothing more to read.
    """

    label: str
    text: str
    verdict: str = ""
    url: str = ""


def items(row: VersionRow, facts: Facts, signatures: Iterable[SignatureSummary]) -> Sequence[StripItem]:
    """Return the items: checks, runtimes, scan, signature, license and base."""
    runs = [verdict.verdict == APPLIED for verdict in facts.verdicts.values()]
    strip = [
        StripItem("Checks", "not read") if facts.unread else _findings("Checks", facts.problems, "passed", "#findings"),
        StripItem(
            "Runs in", f"{sum(runs)} of {format_plural(len(runs), 'runtime')}", APPLIED if all(runs) else "", "#runtimes"
        ),
        StripItem("Scan", "not done", "", "#scan") if facts.unscanned else _findings("Scan", facts.scanned, "clear", "#scan"),
        _signed(signatures),
        StripItem("License", row.license or "not stated"),
    ]
    if row.base:
        strip.append(StripItem("Base", row.base, "", f"/-/bases?{urlencode({'name': row.base})}"))
    return [item for item in strip if runs or item.label != "Runs in"]


def _findings(label: str, groups: Sequence[Group], clear: str, url: str) -> StripItem:
    from adapterhub.checks.report import CODES, ERROR, WARNING

    counts = Counter(CODES[group.code][0] for group in groups)
    for severity, verdict in ((ERROR, REFUSED), (WARNING, WRONG)):
        if count := counts[severity]:
            return StripItem(label, format_plural(count, severity), verdict, url)
    return StripItem(label, clear, APPLIED, url if groups else "")


def _signed(signatures: Iterable[SignatureSummary]) -> StripItem:
    """Return the item about signatures of the files; attestations say something else."""
    of_files = [signature for signature in signatures if signature.what == "files" and signature.is_about]
    if any(signature.verified for signature in of_files):
        return StripItem("Signed", "verified", APPLIED, "#signatures")
    return StripItem("Signed", "not verified here", "", "#signatures") if of_files else StripItem("Signed", "no")
