"""`adapterhub verify-merge`."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.merge_into import trained_in, weights_of
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import count_bar

if TYPE_CHECKING:
    from adapterhub.merge.into_base.verify import Proof, Proofs


_SHOWN = 12  # rows of a table


@command(
    "verify-merge",
    short="Prove that a merged model holds its adapter.",
    example="""
    adapterhub verify-merge --base ./Qwen3-0.6B --adapter team/sql:v2 --merged ./qwen3-sql
    adapterhub verify-merge --base ./base --adapter ./a --adapter ./b --weights 0.7,0.3 --merged ./merged.gguf""",
)
@click.option("--base", metavar="BASE", required=True, help="What it was merged into: a Hugging Face folder.")
@click.option(
    "--adapter", "adapters", metavar="SRC", multiple=True, required=True, help="A folder, file or ref; again for more."
)
@click.option("--merged", metavar="MODEL", required=True, help="A Hugging Face folder or a .gguf, made by whatever tool.")
@click.option("--weights", metavar="W,W…", help="What each adapter was to be multiplied by. [default: 1 each]")
@click.option(
    "--onto",
    type=click.Choice(("original", "as-trained")),
    default="original",
    help="What it was merged into: BASE as it is, or rounded as training saw it. [default: original]",
)
@click.pass_obj
def verify_merge(
    settings: Settings, *, base: str, adapters: tuple[str, ...], merged: str, weights: str | None, onto: str
) -> int:
    """Prove, tensor by tensor, that a merged model is its base plus its adapters, at their full strength.

    Every tensor is compared with what the merge should have made of it: to the bit, up to the rounding of its dtype, or, in
    a quantized model, by the strength at which the adapter is in it. Exits 0 when all are right, 1 when one is not, or could
    not be compared.
    """
    from adapterhub.merge import Options
    from adapterhub.merge.into_base import verify
    from adapterhub_converters import bases as base_model
    from adapterhub_converters.formats import convert

    factors = weights_of(weights, len(adapters))
    folder, model = inputs.weights(base, settings), inputs.weights(merged, settings)
    with ExitStack() as stack:
        found = [stack.enter_context(inputs.opened(text, settings)) for text in adapters]
        spec = base_model.read_hf(folder) if folder.is_dir() else None
        read = [convert.read(source.path, base=spec) for source in found]
        options = Options(as_trained=onto == "as-trained", trained_in=trained_in(found))
        with count_bar("comparing tensors") as progress:
            proofs = verify.prove(list(zip(read, factors, strict=True)), folder, model, options=options, progress=progress)
    output.emit(_document(merged, adapters, proofs), as_json=settings.as_json, text=lambda: _text(merged, adapters, proofs))
    return 0 if proofs.good else 1


def _document(merged: str, adapters: tuple[str, ...], proofs: Proofs) -> dict[str, Any]:
    return {
        "ok": proofs.good,
        "merged": merged,
        "verdicts": dict(sorted(Counter(one.verdict for one in proofs.tensors).items())),
        "strengths": {
            name: None if found is None else {"least": found[0], "median": found[1], "largest": found[2]}
            for name, found in zip(adapters, _strengths(proofs, len(adapters)), strict=True)
        },
        "tensors": {
            one.name: {
                "verdict": one.verdict,
                "ok": one.good,
                "strength": None if one.strength is None else [None if math.isnan(s) else s for s in one.strength],
                "rest": one.rest if one.rest is None or math.isfinite(one.rest) else None,
                "note": one.note,
            }
            for one in proofs.tensors
        },
        "notes": list(proofs.notes),
    }


def _strengths(proofs: Proofs, count: int) -> list[tuple[float, float, float] | None]:
    found = list(proofs.strengths())
    return found + [None] * (count - len(found))


def _text(merged: str, adapters: tuple[str, ...], proofs: Proofs) -> None:
    counts = Counter(one.verdict for one in proofs.tensors)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts, key=lambda v: -counts[v]))
    output.write(output.one_line(f"{merged}: {output.plural(len(proofs.tensors), 'tensor')}: {summary}"))
    for name, strength in zip(adapters, _strengths(proofs, len(adapters)), strict=True):
        said = "in no tensor" if strength is None else f"{strength[1]:.3f} ({strength[0]:.3f} to {strength[2]:.3f})"
        output.write(output.one_line(f"  strength of {name}: {said}"))
    for note in proofs.notes:
        output.write(output.one_line(f"  note: {note}"))
    bad = [one for one in proofs.tensors if not one.good]
    if bad:
        output.write()
        columns = (Column("TENSOR"), Column("VERDICT"), Column("STRENGTH", right=True, drop=1), Column("WHY", wrap=True))
        for line in output.table(columns, [_row(one) for one in bad[:_SHOWN]], screen=output.width()):
            output.write(line)
        if len(bad) > _SHOWN:
            output.write(f"… and {len(bad) - _SHOWN} more; --json has all")
    good = "ok: base and adapters, nothing else" if not bad else f"{output.plural(len(bad), 'tensor')} not as they should be"
    output.write()
    output.write(output.color(good, "red" if bad else "green"))


def _row(one: Proof) -> list[str]:
    strength = "-" if one.strength is None else " ".join(f"{s:.3f}" for s in one.strength if not math.isnan(s))
    rest = f"{one.rest:.1%} unexplained" if one.strength and one.rest is not None else ""
    return [one.name, one.verdict, strength, one.note or rest]
