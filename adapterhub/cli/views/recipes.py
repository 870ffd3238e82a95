"""Recipes of merged models: one that was written, those of a registry, and a model that was made from one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.materializing import Materialized, WrittenRecipe
    from adapterhub.registry.merge_recipe import MergeRecipe
    from adapterhub.registry.merge_recipes import StoredRecipe
    from adapterhub.registry.recipe import Difference

_SHOWN = 10  # files that differ
_LIST = (
    Column("NAME"),
    Column("BASE"),
    Column("ADAPTERS"),
    Column("MODEL", right=True, drop=1),
    Column("STORED", drop=2),
)


def written(made: WrittenRecipe, model_size: int, *, as_json: bool) -> None:
    """Show a recipe that was written; notes on its folders go to stderr."""
    for adapter in made.recipe.adapters:
        if adapter.ref is None and made.out.endswith(".json"):
            what = f"adapter {output.digest(adapter.digest)} is a folder, which the recipe cannot contain"
            output.say(f"note: {what}. Push it, or pass it to `materialize --adapter`")
    plain = made.recipe.to_dict()
    files = plain["output"]["files"]
    document = {
        "output": made.out,
        "size": made.size,
        "model_size": model_size,
        "files": files,
        "base": plain["base"],
    }
    of = f"{output.plural(len(files), 'file')} with digests" if files is not None else "without digests"
    text = f"{made.out}: a recipe of {output.size(made.size)} for a model of {output.size(model_size)}, {of}"
    output.emit(document, as_json=as_json, text=lambda: output.write(output.one_line(text)))


def stored_document(one: StoredRecipe) -> dict[str, Any]:
    """A recipe of the registry with stable keys."""
    plain = {key: value for key, value in one.recipe.to_dict().items() if key in ("base", "adapters", "options")}
    return {"name": one.name, "digest": one.digest, "time": one.time, **plain, "model_size": one.recipe.size}


def write_list(found: Sequence[StoredRecipe]) -> None:
    """Print the table of the recipes of a registry."""
    output.write_table(_LIST, [_row(one) for one in found])


def _row(one: StoredRecipe) -> list[str]:
    adapters = [f"{one.weight:g} × {one.ref or output.digest(one.digest)}" for one in one.recipe.adapters]
    size = one.recipe.size
    return [one.name, str(one.recipe.base), ", ".join(adapters), output.size(size) if size else "-", one.time[:10]]


def materialized_document(made: Materialized) -> dict[str, Any]:
    """A model that was made from its recipe, with stable keys."""
    return {
        "output": str(made.path),
        "compared": made.compared,
        "same": not made.differences if made.compared else None,
        "differences": [{"name": one.name, "what": one.what, "ulps": one.ulps} for one in made.differences],
        "made_by": dict(made.recipe.made_by),
    }


def materialized_lines(made: Materialized) -> Iterator[str]:
    """The comparison of a model with its recipe."""
    out, recipe = made.path, made.recipe
    if recipe.files is None:
        yield output.one_line(f"{out}: written; the recipe has no digests to compare with")
        return
    if not made.differences:
        yield output.one_line(f"{out}: matches the recipe byte for byte, {output.plural(len(recipe.files), 'file')}")
        return
    yield from _different(made, recipe, len(recipe.files))


def _different(made: Materialized, recipe: MergeRecipe, count: int) -> Iterator[str]:
    differences: Sequence[Difference] = made.differences
    far = [one.ulps for one in differences if one.ulps is not None]
    most = f", by {output.plural(max(far), 'unit')} in the last place at most" if far else ""
    yield output.one_line(f"{made.path}: {output.plural(len(differences), 'file')} of {count} not as in the recipe{most}")
    for one in differences[:_SHOWN]:
        by = f", by {one.ulps} units in the last place at most" if one.ulps is not None else ""
        yield output.one_line(f"  {one.name}: {one.what}{by}")
    if len(differences) > _SHOWN:
        yield f"  {output.more(len(differences) - _SHOWN)}"
    made_by = ", ".join(f"{key} {value}" for key, value in recipe.made_by.items())
    yield output.one_line(f"  the recipe was made with {made_by}; another kind of CPU rounds differently")
