"""`adapterhub rebuild`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Settings, base_option, command, output_option
from adapterhub.cli.registry_choice import workspace
from adapterhub.operations import merge

if TYPE_CHECKING:
    from adapterhub.registry.adapter_recipe import RebuildDifference


@command(
    "rebuild",
    example="""
    adapterhub rebuild team/both:v1
    adapterhub rebuild team/sql-gguf --base ./Qwen3-0.6B""",
)
@click.argument("ref")
@base_option("the one it was converted with, if any.")
@output_option("folder for the rebuilt adapter. [default: temporary]")
@click.pass_obj
def rebuild(settings: Settings, *, ref: str, base: str | None, out: str | None) -> int:
    """Rebuild a merged or converted adapter from its recipe and its parents, and compare.

    The parents must be in the registry. Exits 0 when every byte matches, else 1: then it lists the tensors that differ and by
    how many units in the last place at most, as another kind of CPU can cause.
    """
    spec = inputs.read_base(base, settings) if base else None
    result = merge.rebuild(ref, workspace(settings), out=out, base=spec)
    name, differences = str(result.version.ref), result.differences
    output.emit(
        {
            "ref": name,
            "digest": result.version.digest,
            "same": not differences,
            "differences": [
                {"name": difference.name, "what": difference.what, "ulps": difference.ulps} for difference in differences
            ],
        },
        as_json=settings.as_json,
        text=lambda: output.write_lines(_verdict(name, differences)),
    )
    return 1 if differences else 0


def _verdict(ref: str, differences: Sequence[RebuildDifference]) -> Iterator[str]:
    if not differences:
        yield f"{ref}: rebuilt, every byte matches"
        return
    ulps = [difference.ulps for difference in differences if difference.ulps is not None]
    largest = f", at most {output.plural(max(ulps), 'unit')} in the last place" if len(ulps) == len(differences) else ""
    yield f"{ref}: {output.plural(len(differences), 'difference')}{largest}"
    for difference in differences[:10]:
        count = f" (at most {output.plural(difference.ulps, 'unit')} in the last place)" if difference.ulps is not None else ""
        yield f"  {difference.name}: {difference.what}{count}"
    if len(differences) > 10:
        yield f"  {output.remainder_line(len(differences) - 10)}"
