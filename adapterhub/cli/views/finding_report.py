"""Findings about stored bytes, for `verify` and `fsck`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adapterhub.cli import output
from adapterhub.cli.errors import hint_of
from adapterhub.cli.options import Settings

from . import groups

if TYPE_CHECKING:
    from adapterhub.maintenance.findings import Finding


def show(
    settings: Settings,
    location: str,
    findings: Sequence[Finding],
    *,
    success_text: str,
    extra: Mapping[str, object] | None = None,
) -> int:
    """Print the findings, or a document of them that also has the keys of `extra`. Return 1 if one is an error, else 0."""
    errors = sum(finding.severity == "error" for finding in findings)
    document = {
        "ok": not errors,
        "source": location,
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "where": finding.where,
                "what": finding.what,
                "hint": hint_of(finding),
            }
            for finding in findings
        ],
        **(extra or {}),
    }

    def text() -> None:
        for line in groups.lines(map(_item, findings), output.width()):
            output.write(line)
        output.write(f"{location}: {success_text if not errors else output.plural(errors, 'error')}")

    output.emit(document, as_json=settings.as_json, text=text)
    return 1 if errors else 0


def _item(finding: Finding) -> groups.Item:
    return groups.Item(f"{finding.severity}[{finding.code}]", finding.where, finding.what, hint_of(finding))
