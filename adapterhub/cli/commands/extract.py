"""`adapterhub extract`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import (
    Settings,
    base_option,
    command,
    dtype_option,
    energy_option,
    max_rank_option,
    output_option,
    rank_option,
    replace_option,
)
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import workspace
from adapterhub.operations import extract as extract_operation
from adapterhub.operations import merge
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.merging.into_base.extraction import Extraction, WeightExtraction

_SHOWN = 12  # the most rows of a table


@command(
    "extract",
    example="""
    adapterhub extract ./qwen3-finetuned --base ./Qwen3-0.6B --rank 32 -o ./adapter
    adapterhub extract ./tuned --base ./base --energy 0.9 --max-rank 128 --rest -o ./adapter""",
)
@click.argument("tuned", metavar="FINETUNED")
@base_option("the Hugging Face folder that was tuned.", required=True)
@output_option("folder for the adapter, or a ref to push it to.", required=True)
@replace_option
@rank_option("every module.")
@energy_option
@max_rank_option("the limit of --energy. [default: 256]", default=256)
@click.option("--rest", is_flag=True, help="Store norms, biases and other tensors whole (modules_to_save).")
@dtype_option(("f32", "bf16", "f16"), "the adapter", default="f32", show_default=True)
@click.pass_obj
def extract(
    settings: Settings,
    *,
    tuned: str,
    base: str,
    out: str,
    replace: bool,
    rank: int | None,
    energy: float | None,
    max_rank: int,
    rest: bool,
    dtype: str,
) -> None:
    """Extract an adapter from a full fine-tune: for every weight, the nearest low-rank matrix to its change.

    FINETUNED and BASE are Hugging Face folders with the same weights in 16 or 32 bits. The reported error is
    computed from the adapter as written. Changes that no low-rank matrix can express are named, or stored whole with --rest.
    """
    from adapterhub.merging.into_base.extraction import ExtractionOptions

    if (rank is None) == (energy is None):
        raise UsageError("extract", "requires either --rank or --energy", "Add --rank 32, for example")
    folder, tuned_folder = inputs.weights(base, settings), inputs.weights(tuned, settings)
    options = ExtractionOptions(rank, energy, max_rank, rest, dtype.upper())
    target = merge.merge_destination(out)
    adapter, report, version = extract_operation.extract(
        folder, tuned_folder, target, options, workspace(settings), replace=replace
    )
    out = str(version.ref if version else target)
    document = _document(out, report)
    output.emit(document, as_json=settings.as_json, text=lambda: _text(out, report, adapter.parameters))


def _document(out: str, report: Extraction) -> dict[str, Any]:
    return {
        "output": out,
        "error": report.error,
        "unchanged": report.unchanged,
        "weights": {
            weight.name: {
                "rank": weight.rank,
                "change": weight.change if math.isfinite(weight.change) else None,
                "error": weight.error,
                "left_out": weight.reason or None,
            }
            for weight in report.weights
        },
        "notes": list(report.notes),
    }


def _text(out: str, report: Extraction, parameters: int) -> None:
    from adapterhub.merging.into_base.extraction import ranks

    extracted, left_out = (
        [weight for weight in report.weights if not weight.reason],
        [weight for weight in report.weights if weight.reason],
    )
    all_ranks = ranks(report.weights)
    rank_text = (
        f"r {all_ranks[0]}"
        if len(all_ranks) == 1
        else f"r {all_ranks[0]} to {all_ranks[-1]}"
        if all_ranks
        else "no low-rank delta"
    )
    output.write(f"{out}: {output.plural(len(extracted), 'weight')}, {rank_text}, {output.number(parameters)} parameters")
    output.write(f"  relative error over all changes {report.error:.3g}; {report.unchanged} weights unchanged")
    if left_out:
        largest = max(left_out, key=lambda weight: weight.change)
        output.write(
            output.one_line(
                f"  left out: {output.plural(len(left_out), 'tensor')} "
                f"({', '.join(sorted({weight.reason for weight in left_out}))}), "
                f"largest {largest.name}: {_change_text(largest)} of its norm; --rest stores them whole"
            )
        )
    output.write()
    columns = (Column("WEIGHT"), Column("RANK", right=True), Column("CHANGE", right=True), Column("ERROR", right=True))
    worst = sorted(extracted, key=lambda weight: -weight.error)
    output.write_table(
        columns,
        [
            [weight.name, str(weight.rank) if weight.rank else "whole", _change_text(weight), f"{weight.error:.3g}"]
            for weight in worst[:_SHOWN]
        ],
    )
    if len(worst) > _SHOWN:
        output.write(output.remainder_line(len(worst) - _SHOWN, "with smaller errors"))


def _change_text(weight: WeightExtraction) -> str:
    return f"{weight.change:.2%}" if math.isfinite(weight.change) else "all"
