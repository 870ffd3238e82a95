"""`adapterhub eval --import`: results of other tools, as evaluations of a version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import gate_options, output, signed_results
from .options import Settings
from .output import Column
from .registry_choice import workspace

if TYPE_CHECKING:
    from adapterhub.operations.import_results import ImportedEvaluations

    from .signing_options import SignerOption


def run(
    settings: Settings,
    source: str,
    *,
    imports: Sequence[str],
    trust_name: bool,
    gate_texts: Sequence[str],
    name: str | None,
    no_record: bool,
    signer: SignerOption | None,
) -> int:
    """Import result files and report them; return 0 if every gate holds, else 1."""
    from adapterhub.operations import import_results

    parsed_gates = gate_options.parse(gate_texts, None)
    imported = import_results.import_results(
        source, imports, name=name, trust_name=trust_name, record=not no_record, workspace=workspace(settings)
    )
    verdicts = gate_options.verdicts(parsed_gates, imported.metrics)
    ok = all(passed for _, passed in verdicts)
    gate_documents = gate_options.documents(verdicts, imported.metrics)
    signed = signed_results.sign(
        settings, signer, imported.ref, imported.digest, imported.evaluations, ok=ok, gates=gate_documents
    )
    document = {
        "ok": ok,
        "source": source,
        "ref": imported.ref,
        "digest": imported.digest,
        "evaluations": [evaluation.document() for evaluation in imported.evaluations],
        "recorded": imported.ref if imported.recorded else None,
        "gates": gate_documents,
        "attestations": signed,
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _text(imported, verdicts, signed))
    return 0 if ok else 1


def _text(imported: ImportedEvaluations, verdicts: gate_options.Verdicts, signed: Sequence[object]) -> None:
    rows = [
        [evaluation.name, metric, f"{value:.6g}", " ".join(str(evaluation.base[key]) for key in ("tool", "version"))]
        for evaluation in imported.evaluations
        for metric, value in evaluation.metrics.items()
    ]
    columns = (Column("TASK"), Column("METRIC"), Column("VALUE", right=True), Column("TOOL", drop=1))
    output.write_table(columns, [[output.one_line(cell) for cell in row] for row in rows])
    gate_options.write(verdicts, imported.metrics)
    if imported.recorded:
        output.write(f"recorded for {imported.ref}")
    signed_results.write(signed)
