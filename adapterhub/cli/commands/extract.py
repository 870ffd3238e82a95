"""`adapterhub extract`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from adapterhub import combining
from adapterhub.cli import inputs, output
from adapterhub.cli.environment import workspace
from adapterhub.cli.options import (
    Settings,
    command,
    dtype_option,
    energy_option,
    max_rank_option,
    output_option,
    rank_option,
    replace_option,
)
from adapterhub.cli.output import Column
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.merging.into_base.extract import Extracted, Extraction

_SHOWN = 12  # rows of a table


@command(
    "extract",
    example="""
    adapterhub extract ./Qwen3-0.6B ./qwen3-finetuned --rank 32 -o ./adapter
    adapterhub extract ./base ./tuned --energy 0.9 --max-rank 128 --rest -o ./adapter""",
)
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="FINETUNED")
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
    base: str,
    tuned: str,
    out: str,
    replace: bool,
    rank: int | None,
    energy: float | None,
    max_rank: int,
    rest: bool,
    dtype: str,
) -> None:
    """Extract an adapter from a full fine-tune: for every weight, the nearest low-rank matrix to its change.

    BASE and FINETUNED are Hugging Face folders with the same weights in 16 or 32 bits. The reported error is
    computed from the adapter as written. Changes that no low-rank matrix can express are named, or stored whole with --rest.
    """
    from adapterhub.merging.into_base.extract import Wanted

    if (rank is None) == (energy is None):
        raise UsageError("extract", "requires either --rank or --energy", "Add --rank 32, for example")
    folder, other = inputs.weights(base, settings), inputs.weights(tuned, settings)
    wanted = Wanted(rank, energy, max_rank, rest, dtype.upper())
    target = combining.destination(out)
    adapter, report, version = combining.extract(folder, other, target, wanted, workspace(settings), replace=replace)
    out = str(version.ref if version else target)
    document = _document(out, report)
    output.emit(document, as_json=settings.as_json, text=lambda: _text(out, report, adapter.parameters))


def _document(out: str, report: Extraction) -> dict[str, Any]:
    return {
        "output": out,
        "error": report.error,
        "unchanged": report.unchanged,
        "weights": {
            one.name: {
                "rank": one.rank,
                "change": one.change if math.isfinite(one.change) else None,
                "error": one.error,
                "left_out": one.why or None,
            }
            for one in report.weights
        },
        "notes": list(report.notes),
    }


def _text(out: str, report: Extraction, parameters: int) -> None:
    from adapterhub.merging.into_base.extract import ranks

    kept, lost = [one for one in report.weights if not one.why], [one for one in report.weights if one.why]
    found = ranks(report.weights)
    shown = f"r {found[0]}" if len(found) == 1 else f"r {found[0]} to {found[-1]}" if found else "no low-rank delta"
    output.write(f"{out}: {output.plural(len(kept), 'weight')}, {shown}, {output.number(parameters)} parameters")
    output.write(f"  relative error over all changes {report.error:.3g}; {report.unchanged} weights unchanged")
    if lost:
        most = max(lost, key=lambda one: one.change)
        output.write(
            output.one_line(
                f"  left out: {output.plural(len(lost), 'tensor')} ({', '.join(sorted({one.why for one in lost}))}), "
                f"largest {most.name}: {_change(most)} of its norm; --rest stores them whole"
            )
        )
    output.write()
    columns = (Column("WEIGHT"), Column("RANK", right=True), Column("CHANGE", right=True), Column("ERROR", right=True))
    worst = sorted(kept, key=lambda one: -one.error)
    output.write_table(
        columns,
        [[one.name, str(one.rank) if one.rank else "whole", _change(one), f"{one.error:.3g}"] for one in worst[:_SHOWN]],
    )
    if len(worst) > _SHOWN:
        output.write(output.more(len(worst) - _SHOWN, "with smaller errors"))


def _change(one: Extracted) -> str:
    return f"{one.change:.2%}" if math.isfinite(one.change) else "all"
