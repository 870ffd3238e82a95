"""`adapterhub rebuild`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Settings, base_option, command, output_option
from adapterhub_converters.errors import NotFoundError

if TYPE_CHECKING:
    from adapterhub.registry.recipe import Difference, Parent
    from adapterhub.registry.registry import Registry


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
    from adapterhub.ref import Ref
    from adapterhub.registry import recipe

    spec = inputs.read_base(base, settings) if base else None
    with open_registry(settings) as registry, tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        kept = Path(temporary) / "kept"
        version = registry.pull(Ref.parse(ref), kept)
        output.deprecated(str(version.ref), version.deprecated)
        parents = list(_parents(registry, version.digest, Path(temporary)))
        made = Path(out) if out else Path(temporary) / "made"
        with inputs.naming(kept, str(version.ref)):
            recipe.again(kept, parents, made, base=spec)
        found = recipe.differences(kept, made)
    output.emit(
        {
            "ref": str(version.ref),
            "digest": version.digest,
            "same": not found,
            "differences": [{"name": one.name, "what": one.what, "ulps": one.ulps} for one in found],
        },
        as_json=settings.as_json,
        text=lambda: output.write_lines(_verdict(str(version.ref), found)),
    )
    return 1 if found else 0


def _parents(registry: Registry, digest: str, folder: Path) -> Iterator[Parent]:
    from adapterhub.registry import recipe
    from adapterhub_converters.adapter_files import adapter_in

    manifest = registry.adapter_manifest(digest)
    for number, parent in enumerate(manifest.parents if manifest else ()):
        held = registry.holding(parent.digest)
        if not held:
            raise NotFoundError(parent.ref or parent.digest, "this parent is not in the registry", "Push or pull it here first")
        place = folder / f"{number}"
        registry.pull(held[0].ref, place)
        weight = 1.0 if parent.weight is None else parent.weight
        yield recipe.Parent(place, adapter_in(place), parent.digest, parent.ref, weight)


def _verdict(ref: str, found: list[Difference]) -> Iterator[str]:
    if not found:
        yield f"{ref}: rebuilt, every byte matches"
        return
    ulps = [difference.ulps for difference in found if difference.ulps is not None]
    largest = f", at most {output.plural(max(ulps), 'unit')} in the last place" if len(ulps) == len(found) else ""
    yield f"{ref}: {output.plural(len(found), 'difference')}{largest}"
    for difference in found[:10]:
        count = f" (at most {output.plural(difference.ulps, 'unit')} in the last place)" if difference.ulps is not None else ""
        yield f"  {difference.name}: {difference.what}{count}"
    if len(found) > 10:
        yield f"  {output.more(len(found) - 10)}"
