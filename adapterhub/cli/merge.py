"""`adapterhub merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub_converters.errors import RefusedError, UsageError

from . import merge_into, output, sources
from .app import Settings, command

if TYPE_CHECKING:
    from adapterhub.merge import MergeReport

_METHODS = ("cat", "linear", "svd")


@command(
    "merge",
    short="Merge adapters, or adapters into a base.",
    example="""
    adapterhub merge team/sql:v2 --into ./Qwen3-0.6B -o ./qwen3-sql
    adapterhub merge ./sql ./french --weights 0.7,0.3 --method svd --rank 16 -o ./both""",
)
@click.argument("source", metavar="SRC...", nargs=-1, required=True)
@click.option(
    "-o", "--output", "out", metavar="OUT", required=True, help="The folder or .gguf to make; it must not be there yet."
)
@click.option("--into", "base", metavar="BASE", help="Merge into this model (a Hugging Face folder or a GGUF file) instead.")
@click.option("--weights", metavar="W,W…", help="What each SRC is multiplied by, like 0.7,-0.4. [default: 1 each]")
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    help="Adapters into an adapter: cat (exact, ranks add up), linear (exact, least rank), svd (rank K). [default: cat]",
)
@click.option("--rank", metavar="K", type=click.IntRange(min=1), help="The rank of the result of svd.")
@click.pass_obj
@merge_into.options
def merge(
    settings: Settings,
    *,
    source: tuple[str, ...],
    out: str,
    base: str | None,
    weights: str | None,
    method: str | None,
    rank: int | None,
    into: dict[str, Any],
) -> None:
    """Make one adapter of several, or a model of a base and adapters.

    Every SRC is a folder, a file or a ref. With --into, each tensor is the base's plus what the adapters add, as peft's
    merge_and_unload has it bit for bit; memory stays small whatever the model's size. OUT appears whole or not at all.
    """
    factors = _weights(weights, len(source))
    if base and (method or rank):
        raise UsageError("--method" if method else "--rank", "is for adapters into an adapter", "Leave it out with --into")
    if not base:
        merge_into.refuse(into)
    with ExitStack() as stack:
        found = [stack.enter_context(sources.opened(text, settings)) for text in source]
        if base:
            merge_into.run(settings, found, factors, (base, out), into)
        else:
            _into_adapter(settings, found, factors, (method or "cat", rank), out)


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError("--weights", f"{text!r} is not numbers with commas between", "Write it like 0.7,-0.4") from error
    if len(weights) != count:
        raise UsageError("--weights", f"{output.plural(len(weights), 'weight')} for {output.plural(count, 'adapter')}")
    return weights


def _into_adapter(
    settings: Settings, found: Sequence[sources.Source], weights: Sequence[float], how: tuple[str, int | None], out: str
) -> None:
    from adapterhub import recipe

    method, rank = how
    parents = [sources.parent(source, weight) for source, weight in zip(found, weights, strict=True)]
    report, made = recipe.merge(parents, Path(out), method=method, rank=rank, base=_common_base(found))
    output.emit(
        _merge_document(out, report, made["parents"]), as_json=settings.as_json, text=lambda: _merge_text(out, made, report)
    )


def _common_base(found: Sequence[sources.Source]) -> dict[str, Any] | None:
    """The base that the adapters were trained on, by what their facts pin; RefusedError when they pin two."""
    from adapterhub import facts

    pinned: dict[str, dict[str, Any]] = {}
    for source in found:
        document = facts.read_facts(source.folder)
        if document and document["base"].get("fingerprint"):
            pinned.setdefault(document["base"]["fingerprint"], document["base"])
    if len(pinned) > 1:
        names = " and ".join(str(base.get("repo") or fingerprint[:19]) for fingerprint, base in pinned.items())
        raise RefusedError("base", f"the adapters were trained on different models: {names}", "Merge adapters of one base")
    return next(iter(pinned.values()), None)


def _merge_document(out: str, report: MergeReport, parents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "output": out,
        "method": report.method,
        "error": report.error,
        "parents": list(parents),
        "modules": {
            name: {
                "ranks": list(module.ranks),
                "rank": module.rank,
                "error": module.error,
                "cosines": [list(row) for row in module.cosines],
            }
            for name, module in report.modules.items()
        },
        "notes": list(report.notes),
    }


def _merge_text(out: str, made: Mapping[str, Any], report: MergeReport) -> None:
    ranks = sorted({module.rank for module in report.modules.values()})
    rank = f"r {ranks[0]}" if len(ranks) == 1 else f"r {ranks[0]} to {ranks[-1]}"
    count = output.plural(len(report.modules), "module")
    output.write(f"{out}: {report.method}, {count}, {rank}, {output.number(made['parameters'])} parameters")
    output.write(f"  relative error of the sum at most {report.error:.2e}")
    cosines = [row[j] for module in report.modules.values() for i, row in enumerate(module.cosines) for j in range(i)]
    if cosines:
        output.write(f"  cosines between the adapters' deltas {min(cosines):.2f} to {max(cosines):.2f}")
    for note in report.notes:
        output.write(output.one_line(f"  note: {note}"))
