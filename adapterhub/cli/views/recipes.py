"""Recipes of merged models: a new one, those of a registry, and a model that was made from one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.operations.model_recipes import RebuiltModel, WrittenRecipe
    from adapterhub.registry.adapter_recipe import RebuildDifference
    from adapterhub.registry.merge_recipe import MergeRecipe
    from adapterhub.registry.recipe_store import StoredRecipe

_SHOWN = 10  # files that differ
_LIST = (
    Column("NAME"),
    Column("BASE"),
    Column("ADAPTERS"),
    Column("MODEL", right=True, drop=1),
    Column("STORED", drop=2),
)


def show_written(result: WrittenRecipe, model_size: int, *, as_json: bool) -> None:
    """Show a recipe that was written; notes about its folders go to stderr."""
    for adapter in result.recipe.adapters:
        if adapter.ref is None and result.out.endswith(".json"):
            problem = f"adapter {output.digest(adapter.digest)} is a folder, which the recipe cannot contain"
            output.say(f"note: {problem}. Push it, or pass it to `rebuild --adapter`")
    fields = result.recipe.to_dict()
    files = fields["output"]["files"]
    document = {
        "output": result.out,
        "size": result.size,
        "model_size": model_size,
        "files": files,
        "base": fields["base"],
    }
    digest_note = f"{output.plural(len(files), 'file')} with digests" if files is not None else "without digests"
    text = f"{result.out}: a recipe of {output.size(result.size)} for a model of {output.size(model_size)}, {digest_note}"
    output.emit(document, as_json=as_json, text=lambda: output.write(output.one_line(text)))


def stored_document(stored: StoredRecipe) -> dict[str, Any]:
    """Return a recipe of the registry as JSON; the keys are stable."""
    fields = {key: value for key, value in stored.recipe.to_dict().items() if key in ("base", "adapters", "options")}
    return {"name": stored.name, "digest": stored.digest, "time": stored.time, **fields, "model_size": stored.recipe.size}


def write_list(recipes: Sequence[StoredRecipe]) -> None:
    """Print the table of the recipes of a registry."""
    output.write_table(_LIST, [_row(recipe) for recipe in recipes])


def _row(stored: StoredRecipe) -> list[str]:
    adapters = [f"{stored.weight:g} × {stored.ref or output.digest(stored.digest)}" for stored in stored.recipe.adapters]
    size = stored.recipe.size
    return [stored.name, str(stored.recipe.base), ", ".join(adapters), output.size(size) if size else "-", stored.time[:10]]


def rebuilt_document(model: RebuiltModel) -> dict[str, Any]:
    """Return a model that was made from its recipe as JSON; the keys are stable."""
    return {
        "output": str(model.path),
        "compared": model.has_digests,
        "same": not model.differences if model.has_digests else None,
        "differences": [
            {"name": difference.name, "what": difference.what, "ulps": difference.ulps} for difference in model.differences
        ],
        "made_by": dict(model.recipe.made_by),
    }


def rebuilt_lines(model: RebuiltModel) -> Iterator[str]:
    """Yield the comparison of a model with its recipe."""
    out, recipe = model.path, model.recipe
    if recipe.files is None:
        yield output.one_line(f"{out}: written; the recipe has no digests to compare with")
        return
    if not model.differences:
        yield output.one_line(f"{out}: matches the recipe byte for byte, {output.plural(len(recipe.files), 'file')}")
        return
    yield from _difference_lines(model, recipe, len(recipe.files))


def _difference_lines(model: RebuiltModel, recipe: MergeRecipe, count: int) -> Iterator[str]:
    differences: Sequence[RebuildDifference] = model.differences
    ulps = [difference.ulps for difference in differences if difference.ulps is not None]
    largest = f", by {output.plural(max(ulps), 'unit')} in the last place at most" if ulps else ""
    yield output.one_line(f"{model.path}: {output.plural(len(differences), 'file')} of {count} not as in the recipe{largest}")
    for difference in differences[:_SHOWN]:
        distance = f", by {difference.ulps} units in the last place at most" if difference.ulps is not None else ""
        yield output.one_line(f"  {difference.name}: {difference.what}{distance}")
    if len(differences) > _SHOWN:
        yield f"  {output.remainder_line(len(differences) - _SHOWN)}"
    made_by = ", ".join(f"{key} {value}" for key, value in recipe.made_by.items())
    yield output.one_line(f"  the recipe was made with {made_by}; another kind of CPU rounds differently")
