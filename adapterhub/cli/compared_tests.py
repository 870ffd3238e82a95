"""`adapterhub eval --tests --against`: two versions on the same golden tests, and the gates that compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import output

if TYPE_CHECKING:
    from adapterhub.evidence.paired_tests import Claim, PairedTests
    from adapterhub.operations.golden_tests import TestedVersion

BASE = "base"
"""The word for the base alone."""
_MAX_FLIPPED = 10  # names in a line


@dataclass(frozen=True)
class Comparison:
    """A version beside another, with the verdict of each claim: whether it holds, and why."""

    against: str
    digest: str
    pair: PairedTests
    verdicts: tuple[tuple[Claim, bool, str], ...]

    @property
    def ok(self) -> bool:
        """Whether all claims hold."""
        return all(holds for _, holds, _ in self.verdicts)

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {"ref": self.against, "digest": self.digest, **self.pair.document()}

    def gate_documents(self) -> list[dict[str, Any]]:
        """Return the verdicts as JSON."""
        return [
            {"gate": claim.text, "metric": "difference", "value": self.pair.difference, "ok": holds, "reason": reason}
            for claim, holds, reason in self.verdicts
        ]

    def write(self) -> None:
        """Write the flipped tests and the verdicts."""
        pair = self.pair
        for title, names in (("better", pair.better), ("worse", pair.worse)):
            if names:
                unlisted = f" and {len(names) - _MAX_FLIPPED} more" if names[_MAX_FLIPPED:] else ""
                output.write(output.one_line(f"{title}: {', '.join(names[:_MAX_FLIPPED])}{unlisted}"))
        flips = f"{len(pair.better)} better, {len(pair.worse)} worse, McNemar p = {pair.p_value:.2g}"
        output.write(output.one_line(f"against {self.against}: {pair.interval_text}; {flips}"))
        for claim, holds, reason in self.verdicts:
            output.write(output.one_line(f"{'passed' if holds else 'FAILED'}: {claim.text} ({reason})"))


def split_gates(texts: Sequence[str], against: str | None) -> tuple[list[Claim], list[str]]:
    """Return the gates that compare two versions, and the others. UsageError for one that has nothing to compare with."""
    from adapterhub.evidence import paired_tests

    claims = {text: paired_tests.parse_claim(text) for text in texts}
    others = [text for text, claim in claims.items() if claim is None]
    malformed = next((text for text in others if "against" in text), "")
    if malformed:
        hint = "Write pass>=against, pass>=against-0.05 or pass>against"
        raise UsageError("--gate", f"{malformed[:60]!r} is no comparison", hint)
    accepted = [claim for claim in claims.values() if claim is not None]
    if accepted and against is None:
        raise UsageError("--gate", f"{accepted[0].text!r} compares two versions", "Name the other with --against")
    return accepted, others


def compare(
    tested: TestedVersion, against: str, claims: Sequence[Claim], run: Callable[[str | None], TestedVersion]
) -> Comparison:
    """Run the same tests with another version, or with the base alone, and compare; `run` answers them."""
    from adapterhub.evidence import paired_tests

    reference = run(None if against == BASE else against)
    pair = paired_tests.compare(tested.report, reference.report)
    verdicts = tuple((claim, *claim.verdict(pair)) for claim in claims)
    return Comparison(reference.ref or against, reference.digest, pair, verdicts)
