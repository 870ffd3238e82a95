"""Promotions, approvals, rollbacks and withdrawals as JSON, and back: that of `--json`, and of a hub's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest
from adapterhub.registry.releases.release_moves import Withdrawal
from adapterhub_converters.lazy_dataclass import dataclass

from .answer_fields import Fields

if TYPE_CHECKING:
    from adapterhub.registry.releases.tag_requirements import Assessment, Requirement


@dataclass(frozen=True)
class PromotionReport:
    """A version beside the requirements of a tag.

    Attributes:
        current: The number of the version that the tag means; 0 for none.
        moved: Whether the tag moved to the version.
    """

    name: str
    number: int
    digest: Digest
    tag: str
    current: int
    requirements: Sequence[Requirement]
    moved: bool = False

    @property
    def missing(self) -> list[Requirement]:
        """The requirements that are not met."""
        return [requirement for requirement in self.requirements if not requirement.is_met]


def report_of(assessment: Assessment, *, moved: bool = False) -> PromotionReport:
    """Return the report of an assessment, and whether the tag moved after it."""
    candidate = assessment.candidate
    number = candidate.number if moved else candidate.current
    about = (candidate.name, candidate.number, candidate.digest, candidate.tag)
    return PromotionReport(*about, number, assessment.requirements, moved)


def promotion_document(report: PromotionReport) -> dict[str, Any]:
    """Return the document of a promotion, made or only asked about."""
    return {
        "name": report.name,
        "number": report.number,
        "digest": report.digest,
        "tag": report.tag,
        "current": report.current or None,
        "ok": not report.missing,
        "moved": report.moved,
        "requirements": [
            {
                "rule": requirement.rule,
                "needed": requirement.needed,
                "value": requirement.value,
                "ok": requirement.is_met,
                "evidence": requirement.evidence or None,
                "file": requirement.file,
            }
            for requirement in report.requirements
        ],
    }


def read_promotion(document: object, location: str) -> PromotionReport:
    """Read the document of a promotion."""
    from adapterhub.registry.releases.tag_requirements import (
        Requirement,  # with the statistics, which other commands do without
    )

    fields = Fields(document, location)
    requirements = [
        Requirement(
            entry.text("rule"),
            entry.text("needed"),
            entry.text("value"),
            entry.value("ok", bool),
            entry.optional_text("evidence") or "",
            entry.text("file"),
        )
        for entry in fields.objects("requirements")
    ]
    return PromotionReport(
        fields.name("name"),
        fields.count("number"),
        fields.digest("digest"),
        fields.text("tag"),
        fields.optional_count("current") or 0,
        requirements,
        fields.value("moved", bool),
    )


def withdrawal_document(withdrawal: Withdrawal) -> dict[str, Any]:
    """Return the document of a withdrawn version."""
    return {
        "name": withdrawal.name,
        "number": withdrawal.number,
        "digest": withdrawal.digest,
        "reason": withdrawal.reason,
        "tags": list(withdrawal.tags),
        "latest": withdrawal.latest or None,
        "moved_latest": withdrawal.moved_latest,
    }


def read_withdrawal(fields: Fields) -> Withdrawal:
    """Read the document of a withdrawn version."""
    return Withdrawal(
        fields.name("name"),
        fields.count("number"),
        fields.digest("digest"),
        fields.text("reason"),
        fields.tags("tags"),
        fields.optional_count("latest") or 0,
        fields.value("moved_latest", bool),
    )
