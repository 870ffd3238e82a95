"""`adapterhub verify-merge`."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.merge_into import weights_of
from adapterhub.cli.options import Settings, adapter_option, base_option, command, onto_option, weights_option
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import workspace
from adapterhub.operations import merge_into

if TYPE_CHECKING:
    from adapterhub.merging.into_base.merge_proof import Proof, Proofs
    from adapterhub.operations.merge_into import BaseWeights

_SHOWN = 12  # the most rows of a table


@command(
    "verify-merge",
    example="""
    adapterhub verify-merge ./qwen3-sql --base ./Qwen3-0.6B --adapter team/sql:v2
    adapterhub verify-merge ./merged.gguf --base ./base --adapter ./a --adapter ./b --weights 0.7,0.3""",
)
@click.argument("merged", metavar="MODEL")
@base_option("the Hugging Face folder that was merged into.", required=True)
@adapter_option("a folder, file or ref that was merged", required=True)
@weights_option
@onto_option
@click.pass_obj
def verify_merge(
    settings: Settings, *, merged: str, base: str, adapters: tuple[str, ...], weights: str | None, onto: BaseWeights | None
) -> int:
    """Prove, tensor by tensor, that a merged model is its base plus its adapters, at full strength.

    MODEL is a Hugging Face folder or a .gguf file, by any tool. Every tensor is compared with the result the merge should
    have: exactly, up to the rounding of its dtype, or, in a quantized model, by the strength of the adapter in it. Exits 0
    when all are right, 1 when one is not or could not be compared.
    """
    factors = weights_of(weights, len(adapters))
    folder, model = inputs.weights(base, settings), inputs.weights(merged, settings)
    with ExitStack() as stack:
        sources = [stack.enter_context(inputs.open_source(text, settings, for_report=True)) for text in adapters]
        proofs = merge_into.verify_merge(model, folder, sources, factors, workspace(settings), onto=onto or "original")
    output.emit(_document(merged, adapters, proofs), as_json=settings.as_json, text=lambda: _text(merged, adapters, proofs))
    return 0 if proofs.good else 1


def _document(merged: str, adapters: tuple[str, ...], proofs: Proofs) -> dict[str, Any]:
    return {
        "ok": proofs.good,
        "merged": merged,
        "verdicts": dict(sorted(Counter(proof.verdict for proof in proofs.tensors).items())),
        "strengths": {
            name: None if strength is None else {"least": strength[0], "median": strength[1], "largest": strength[2]}
            for name, strength in zip(adapters, _strengths(proofs, len(adapters)), strict=True)
        },
        "tensors": {
            proof.name: {
                "verdict": proof.verdict,
                "ok": proof.good,
                "strength": None if proof.strength is None else [None if math.isnan(s) else s for s in proof.strength],
                "rest": proof.residual if proof.residual is None or math.isfinite(proof.residual) else None,
                "note": proof.note,
            }
            for proof in proofs.tensors
        },
        "notes": list(proofs.notes),
    }


def _strengths(proofs: Proofs, count: int) -> list[tuple[float, float, float] | None]:
    strengths = list(proofs.strengths())
    return strengths + [None] * (count - len(strengths))


def _text(merged: str, adapters: tuple[str, ...], proofs: Proofs) -> None:
    counts = Counter(proof.verdict for proof in proofs.tensors)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts, key=lambda v: -counts[v]))
    output.write(output.one_line(f"{merged}: {output.plural(len(proofs.tensors), 'tensor')}: {summary}"))
    for name, strength in zip(adapters, _strengths(proofs, len(adapters)), strict=True):
        strength_text = (
            "not found in any tensor" if strength is None else f"{strength[1]:.3f} ({strength[0]:.3f} to {strength[2]:.3f})"
        )
        output.write(output.one_line(f"  strength of {name}: {strength_text}"))
    for note in proofs.notes:
        output.write(output.one_line(f"  note: {note}"))
    failed = [proof for proof in proofs.tensors if not proof.good]
    if failed:
        output.write()
        columns = (Column("TENSOR"), Column("VERDICT"), Column("STRENGTH", right=True, drop=1), Column("WHY", wrap=True))
        output.write_table(columns, [_row(proof) for proof in failed[:_SHOWN]])
        if len(failed) > _SHOWN:
            output.write(output.remainder_line(len(failed) - _SHOWN))
    conclusion = (
        "ok: base plus adapters, nothing else" if not failed else f"{output.plural(len(failed), 'tensor')} not as expected"
    )
    output.write()
    output.write(output.color(conclusion, "red" if failed else "green"))


def _row(proof: Proof) -> list[str]:
    strength = "-" if proof.strength is None else " ".join(f"{s:.3f}" for s in proof.strength if not math.isnan(s))
    unexplained = f"{proof.residual:.1%} unexplained" if proof.strength and proof.residual is not None else ""
    return [proof.name, proof.verdict, strength, proof.note or unexplained]
