"""`adapterhub eval --data`: perplexities of data sets, alone or against another version, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import gate_options, output, signed_results
from .environment import prepare_torch
from .options import Settings
from .output import Column
from .registry_choice import workspace

if TYPE_CHECKING:
    from adapterhub.evaluation import EvaluationResult, PairComparison
    from adapterhub.evidence.paired_losses import RatioClaim
    from adapterhub.manifest.measurement import Evaluation
    from adapterhub.registry.releases.metric_gates import Gate

    from .signing_options import SignerOption


def run(
    settings: Settings,
    source: str,
    *,
    files: Sequence[str],
    base: str | None,
    against: str | None,
    gate_texts: Sequence[str],
    name: str | None,
    no_record: bool,
    signer: SignerOption | None,
    **settings_of_evaluation: Any,
) -> int:
    """Evaluate each data set and report.

    Returns:
        0 if every gate holds, else 1.
    """
    from adapterhub.manifest.measurement import check_name
    from adapterhub.operations import train

    if base is None:
        raise UsageError("--base", "is required for --data", "Name the model that the adapter is for", code="base-required")
    prepare_torch()
    # Checked before the evaluation, which can take minutes.
    data = data_sets(files, name)
    for set_name in data:
        check_name(set_name, "--name" if set_name == name else "--data")
    gates = {set_name: _SetGates.parse(gate_texts, set_name, data, against) for set_name in data}
    results = train.evaluate_sets(
        source, data=data, base=base, against=against, record=not no_record, workspace=workspace(settings),
        **settings_of_evaluation,
    )  # fmt: skip
    for note in dict.fromkeys(note for result in results.values() for note in result.notes):
        output.say(output.one_line(f"note: {note}"))
    reports = [_SetReport.judge(set_name, result, gates[set_name]) for set_name, result in results.items()]
    ok, first = all(report.ok for report in reports), reports[0].result
    signed = signed_results.sign(
        settings,
        signer,
        first.ref,
        first.digest,
        [report.evaluation for report in reports],
        ok=ok,
        gates=[gate for report in reports for gate in report.gate_documents()],
    )
    # One set has its facts beside those of the version, as it always had.
    documents = [report.document(against) for report in reports]
    measured = documents[0] if len(documents) == 1 else {"evaluations": documents}
    version = {"ok": ok, "source": source, "ref": first.ref, "digest": first.digest}
    recorded = first.ref if first.recorded else None
    document = {**version, **measured, "recorded": recorded, "attestations": signed}
    output.emit(document, as_json=settings.as_json, text=lambda: _text(reports, against, recorded, signed))
    return 0 if ok else 1


def data_sets(files: Sequence[str], name: str | None) -> dict[str, list[str]]:
    """Return the files of each data set: those written as NAME=FILE by name, the others together as `name`, or `eval`."""
    from adapterhub.manifest.measurement import DEFAULT

    sets: dict[str, list[str]] = {}
    for file in files:
        set_name, equals, path = file.partition("=")
        # A file may have `=` in its name, and a folder before it is no name of a set.
        is_named = bool(equals) and "/" not in set_name and not Path(file).exists()
        sets.setdefault(set_name if is_named else name or DEFAULT, []).append(path if is_named else file)
    if name is not None and name not in sets:
        raise UsageError("--name", "is for --data without a name", "Leave it out", code="conflicting-options")
    return sets


@dataclass(frozen=True)
class _SetGates:
    """The gates on a data set: its metrics, and claims against another version."""

    gates: Sequence[Gate]
    claims: Sequence[RatioClaim]

    @classmethod
    def parse(cls, texts: Sequence[str], name: str, names: Mapping[str, object], against: str | None) -> _SetGates:
        """Parse the gates that are for a data set: those that begin with its name and `_`, and those with no set's name."""
        from adapterhub.evidence import paired_losses
        from adapterhub.registry.releases.metric_gates import DATA_GATES

        set_texts = [text.removeprefix(prefix) for text in texts if (prefix := _set_prefix(text, names)) in ("", f"{name}_")]
        parsed = [(text, paired_losses.parse_claim(text)) for text in set_texts]
        claims = [claim for _, claim in parsed if claim is not None]
        others = [text for text, claim in parsed if claim is None]
        if malformed := next((text for text in others if "against" in text), ""):
            raise UsageError("--gate", f"{malformed[:60]!r} is no comparison of perplexities", "Write ppl/against<1.01")
        if claims and against is None:
            raise UsageError("--gate", f"{claims[0].text!r} compares two versions", "Name the other with --against")
        return cls(gate_options.parse(others, DATA_GATES), claims)


def _set_prefix(text: str, names: Mapping[str, object]) -> str:
    """Return the name of the data set that a gate begins with, and `_`; empty if it has none. The longest name counts."""
    return max((f"{name}_" for name in names if text.strip().startswith(f"{name}_")), key=len, default="")


@dataclass(frozen=True)
class _SetReport:
    """The result of a data set with the verdicts of its gates."""

    name: str
    result: EvaluationResult
    verdicts: gate_options.Verdicts
    claims: Sequence[tuple[RatioClaim, bool, str]]

    @classmethod
    def judge(cls, name: str, result: EvaluationResult, gates: _SetGates) -> _SetReport:
        """Judge a result by its gates."""
        pair = result.against
        claims = [(claim, *claim.verdict(pair)) for claim in gates.claims] if pair else []
        return cls(name, result, gate_options.verdicts(gates.gates, result.metrics), claims)

    @property
    def ok(self) -> bool:
        """Whether every gate holds."""
        return all(passed for _, passed in self.verdicts) and all(holds for _, holds, _ in self.claims)

    @property
    def evaluation(self) -> Evaluation:
        """The result as a log has it."""
        from adapterhub.manifest.measurement import Evaluation

        return Evaluation(self.name, self.result.metrics, self.result.data, self.result.base)

    def gate_documents(self) -> list[dict[str, Any]]:
        """Return the verdicts as JSON."""
        value = self.result.against.ratio if self.result.against else None
        return [
            *gate_options.documents(self.verdicts, self.result.metrics),
            *(
                {"gate": claim.text, "metric": "perplexity_against", "value": value, "ok": holds, "reason": reason}
                for claim, holds, reason in self.claims
            ),
        ]

    def document(self, against: str | None) -> dict[str, Any]:
        """Return the result as JSON."""
        pairs, pair = self.result.pairs, self.result.against
        return {
            **self.evaluation.document(),
            "sequence": self.result.sequence,
            "preference": {"method": pairs.method, "beta": pairs.beta} if pairs else None,
            "against": {"ref": against, **pair.document()} if pair else None,
            "gates": self.gate_documents(),
        }

    def write(self, against: str | None) -> None:
        """Write the perplexities, the comparison and the verdicts."""
        result, metrics = self.result, self.result.metrics
        columns = (Column(""), Column("LOSS", right=True), Column("PERPLEXITY", right=True), Column("TOKENS", right=True))
        tokens = str(result.tokens)
        rows = [
            ["base", f"{result.base_loss:.4f}", f"{metrics['base_perplexity']:.3f}", tokens],
            ["with the adapter", f"{result.loss:.4f}", f"{metrics['perplexity']:.3f}", tokens],
        ]
        output.write_table(columns, rows)
        output.write(f"perplexity relative to the base: {metrics['perplexity_ratio']:.3f}")
        if result.against:
            count = output.plural(result.against.documents, "document")
            output.write(output.one_line(f"perplexity relative to {against}: {result.against.interval_text}, {count}"))
        if result.pairs:
            output.write(_pairs_line(result.pairs))
        gate_options.write(self.verdicts, metrics)
        for claim, holds, reason in self.claims:
            output.write(output.one_line(f"{'passed' if holds else 'FAILED'}: {claim.text} ({reason})"))


def _text(reports: Sequence[_SetReport], against: str | None, recorded: str | None, signed: Sequence[object]) -> None:
    for number, report in enumerate(reports):
        if len(reports) > 1:
            output.write(f"{chr(10) if number else ''}{report.name}:")
        report.write(against)
    if recorded:
        output.write(f"recorded for {recorded}")
    signed_results.write(signed)


def _pairs_line(pairs: PairComparison) -> str:
    base = "" if pairs.method == "dpo" else f" (base: {pairs.base_accuracy:.1%}, {pairs.base_margin:.3f})"
    preferred = f"{pairs.accuracy:.1%} preferred, margin {pairs.margin:.3f}{base}"
    return f"{output.plural(pairs.count, 'pair')}: {preferred}, by {pairs.method} with beta = {pairs.beta:g}"
