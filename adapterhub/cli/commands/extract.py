"""`adapterhub extract`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import count_bar
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.merge.into_base.extract import Extracted, Extraction


_SHOWN = 12  # rows of a table


@command(
    "extract",
    short="Make an adapter of a full fine-tune.",
    example="""
    adapterhub extract ./Qwen3-0.6B ./qwen3-finetuned --rank 32 -o ./adapter
    adapterhub extract ./base ./tuned --energy 0.9 --max-rank 128 --rest -o ./adapter""",
)
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="FINETUNED")
@click.option("-o", "--output", "out", metavar="OUT", required=True, help="The folder to make; it must not be there yet.")
@click.option("--rank", metavar="K", type=click.IntRange(min=1), help="The rank of every module.")
@click.option(
    "--energy",
    metavar="E",
    type=click.FloatRange(0, 1, min_open=True),
    help="The least ranks that keep this share of each change.",
)
@click.option(
    "--max-rank", "limit", metavar="K", type=click.IntRange(min=1), default=256, help="What --energy may use. [default: 256]"
)
@click.option("--rest", is_flag=True, help="Keep norms, biases and the like as whole tensors (modules_to_save).")
@click.option("--dtype", type=click.Choice(["f32", "bf16", "f16"]), default="f32", help="What to store. [default: f32]")
@click.pass_obj
def extract(
    settings: Settings,
    *,
    base: str,
    tuned: str,
    out: str,
    rank: int | None,
    energy: float | None,
    limit: int,
    rest: bool,
    dtype: str,
) -> None:
    """Make an adapter of what a full fine-tune changed: of every weight the nearest matrix of a low rank.

    BASE and FINETUNED are Hugging Face folders with the same weights in 16 or 32 bits. The error that is reported is the
    true one, of the adapter as it is written; what no low-rank matrix holds is named, or kept whole with --rest.
    """
    from adapterhub.manifest import describe
    from adapterhub.merge.into_base import extract as difference
    from adapterhub_converters import bases as base_model
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import peft

    if (rank is None) == (energy is None):
        raise UsageError("--rank", "or --energy says how much to keep; one of them", "Add --rank 32, for one")
    folder, other, target = inputs.weights(base, settings), inputs.weights(tuned, settings), Path(out)
    atomic.check_free(target)
    wanted = difference.Wanted(rank, energy, limit, rest, dtype.upper())
    with count_bar("extracting weights") as progress:
        adapter, report = difference.extract(folder, other, wanted, progress=progress)
    with atomic.whole(target) as made:
        peft.write(adapter, made)
        describe.describe(made, base=base_model.read_hf(folder)).write(made)
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
    from adapterhub.merge.into_base.extract import ranks

    kept, lost = [one for one in report.weights if not one.why], [one for one in report.weights if one.why]
    found = ranks(report.weights)
    said = f"r {found[0]}" if len(found) == 1 else f"r {found[0]} to {found[-1]}" if found else "no low-rank delta"
    output.write(f"{out}: {output.plural(len(kept), 'weight')}, {said}, {output.number(parameters)} parameters")
    output.write(f"  relative error of all changes together {report.error:.3g}; {report.unchanged} weights did not change")
    if lost:
        most = max(lost, key=lambda one: one.change)
        output.write(
            output.one_line(
                f"  left out: {output.plural(len(lost), 'tensor')} ({', '.join(sorted({one.why for one in lost}))}), "
                f"{most.name} most: {_change(most)} of its norm; --rest keeps them whole"
            )
        )
    output.write()
    columns = (Column("WEIGHT"), Column("RANK", right=True), Column("CHANGE", right=True), Column("ERROR", right=True))
    worst = sorted(kept, key=lambda one: -one.error)
    for line in output.table(columns, [_row(one) for one in worst[:_SHOWN]], screen=output.width()):
        output.write(line)
    if len(worst) > _SHOWN:
        output.write(f"… and {len(worst) - _SHOWN} with less error; --json has all")


def _row(one: Extracted) -> list[str]:
    return [one.name, str(one.rank) if one.rank else "whole", _change(one), f"{one.error:.3g}"]


def _change(one: Extracted) -> str:
    return f"{one.change:.2%}" if math.isfinite(one.change) else "all"
