"""`adapterhub materialize`."""

from __future__ import annotations

import click

from adapterhub.cli import errors, output
from adapterhub.cli.options import Settings, adapter_option, base_option, command, output_option, replace_option
from adapterhub.cli.registry_choice import open_registry, workspace
from adapterhub.cli.views import recipes as view
from adapterhub_converters.errors import AdapterhubError, UsageError


@command(
    "materialize",
    example="""
    adapterhub merge team/sql:v2 --into ./Qwen3-0.6B --recipe-only -o qwen3-sql.json
    adapterhub materialize qwen3-sql.json -o ./qwen3-sql
    adapterhub materialize qwen3-sql.json --base /models/Qwen3-0.6B --adapter ./sql
    adapterhub merge team/sql:v2 --into ./Qwen3-0.6B --recipe-only -o qwen3-sql
    adapterhub materialize qwen3-sql -o ./qwen3-sql""",
)
@click.argument("source", metavar="[NAME|FILE]", required=False)
@output_option("folder or .gguf. [default: the recipe's name]")
@replace_option
@base_option("its path. [default: the path in the recipe]")
@click.option("--list", "listed", is_flag=True, help="List the recipes in the registry.")
@click.option("--remove", is_flag=True, help="Remove the recipe NAME from the registry.")
@adapter_option("one that is not in the registry")
@click.pass_obj
def materialize(
    settings: Settings,
    *,
    source: str | None,
    out: str | None,
    replace: bool,
    base: str | None,
    adapters: tuple[str, ...],
    listed: bool,
    remove: bool,
) -> int:
    """Rebuild a merged model from its recipe, as `adapterhub merge --into --recipe-only` wrote it, and compare digests.

    The recipe is a file or a name in the registry; write merge:NAME where a file of that name exists too. Adapters come from
    the registry, by digest, or from the addresses in the recipe. Exits 0 when every byte matches, else 1: then it lists the
    files that differ and by how many units in the last place, as another kind of CPU can cause. Another base or adapter is
    refused, and nothing is written.
    """
    if listed:
        return _list(settings)
    if source is None:
        raise UsageError("NAME", "is missing, and so is a recipe file", "See `adapterhub materialize --list`")
    if remove:
        _remove(settings, source)
        return 0
    from adapterhub.operations import materialize as materialize_operation

    model = materialize_operation.materialize(source, out, workspace(settings), base=base, adapters=adapters, replace=replace)
    text = "\n".join(view.materialized_lines(model))
    output.emit(view.materialized_document(model), as_json=settings.as_json, text=lambda: output.write(text))
    return 1 if model.differences else 0


def _remove(settings: Settings, source: str) -> None:
    from adapterhub.registry import recipe_store

    name = source.removeprefix(recipe_store.NAME_PREFIX)
    with open_registry(settings) as registry:
        recipe_store.remove(registry, name)
    document = {"removed": name, "kind": "merge"}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"removed {name}; its adapters stay"))


def _list(settings: Settings) -> int:
    """List the recipes in the registry; report an unreadable one and go on to the others."""
    from adapterhub.registry import recipe_store

    recipes, damaged = [], []
    with open_registry(settings) as registry:
        for name in recipe_store.names(registry):
            try:
                recipes.append(recipe_store.get(registry, name))
            except AdapterhubError as error:
                damaged.append((name, error))
    for name, error_ in damaged:
        errors.say(error_, about=f"{name}: ")
    document = {
        "merges": [view.stored_document(stored) for stored in recipes],
        "damaged": [{"name": name, "where": error_.where, "what": error_.what} for name, error_ in damaged],
    }

    def text() -> None:
        if not recipes and not damaged:
            output.say("no recipes yet; store one with `adapterhub merge … --into BASE --recipe-only -o NAME`")
        elif recipes:
            view.write_list(recipes)

    output.emit(document, as_json=settings.as_json, text=text)
    return 1 if damaged else 0
