"""`adapterhub rebuild`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import errors, inputs, output
from adapterhub.cli.environment import prepare_torch
from adapterhub.cli.options import Settings, adapter_option, base_option, command, output_option, replace_option
from adapterhub.cli.registry_choice import open_registry, workspace
from adapterhub.cli.views import recipes as view
from adapterhub_converters.errors import AdapterhubError, UsageError

if TYPE_CHECKING:
    from adapterhub.operations.rebuild import RebuildResult


@command(
    "rebuild",
    example="""
    adapterhub rebuild team/both:v1
    adapterhub rebuild team/sql-gguf --base ./Qwen3-0.6B
    adapterhub rebuild team/sql:v1 --base ./Qwen3-0.6B --data train.jsonl
    adapterhub rebuild team/sql:v1 --base ./Qwen3-0.6B --data train.jsonl --steps 500 --checkpoints ./sql.checkpoints
    adapterhub merge team/sql:v2 --into ./Qwen3-0.6B --recipe-only -o qwen3-sql.json
    adapterhub rebuild qwen3-sql.json -o ./qwen3-sql
    adapterhub rebuild qwen3-sql.json --base /models/Qwen3-0.6B --adapter ./sql
    adapterhub merge team/sql:v2 --into ./Qwen3-0.6B --recipe-only -o qwen3-sql
    adapterhub rebuild qwen3-sql -o ./qwen3-sql""",
)
@click.argument("source", metavar="[REF|NAME|FILE]", required=False)
@output_option("folder or .gguf. [default: the recipe's name; for an adapter, temporary]")
@replace_option
@base_option("the one it was made with. [default: the path in a model's recipe]")
@adapter_option("one that a model's recipe names, and the registry lacks")
@click.option("--data", metavar="FILE", multiple=True, help="Data: a file that it was trained on; repeatable.")
@click.option(
    "--steps", metavar="K|A-B", help="Training: repeat at most K steps, or those from A to B, between kept checkpoints."
)
@click.option("--checkpoints", metavar="DIR", help="Training: the folder of the checkpoints that were kept.")
@click.option("--list", "listed", is_flag=True, help="List the recipes of models in the registry.")
@click.option("--remove", is_flag=True, help="Remove the recipe NAME from the registry.")
@click.pass_obj
def rebuild(
    settings: Settings,
    *,
    source: str | None,
    out: str | None,
    replace: bool,
    base: str | None,
    adapters: tuple[str, ...],
    data: tuple[str, ...],
    steps: str | None,
    checkpoints: str | None,
    listed: bool,
    remove: bool,
) -> int:
    """Rebuild an adapter that was merged, converted or trained, or a merged model, from its record, and compare.

    REF is an adapter, whose parents must be in the registry. With --data, it is trained again, and its weights and config are
    compared; data and base are those of the record by their digests. The same versions and kind of machine give the same bytes.
    With --steps, a part of the training is repeated that was not announced: from one of the checkpoints that `[train]
    keep_every` kept to the next, whose bytes are compared, or from the last one to the weights.
    NAME or FILE is the recipe of a merged model, as `adapterhub merge
    --into --recipe-only` wrote it; write merge:NAME where a file of that name exists too. Its adapters come from the registry,
    by digest, or from the addresses in it. Exits 0 when every byte matches, else 1: then it lists what differs and by how many
    units in the last place at most, as another kind of CPU can cause. Another base or adapter is refused, and nothing is
    written.
    """
    if listed:
        return _list(settings)
    if source is None:
        raise UsageError("REF", "is missing, and so is a recipe", "`adapterhub rebuild --list` shows the recipes of models")
    if remove:
        _remove(settings, source)
        return 0
    if data and not _is_ref(source):
        raise UsageError("--data", f"is for a trained adapter, and {source} is a recipe of a model", "Leave it out")
    if not _is_ref(source):
        return _rebuild_model(settings, source, out, base=base, adapters=adapters, replace=replace)
    if adapters:
        problem = f"is for the recipe of a model, and {source} is an adapter, whose parents are in the registry"
        raise UsageError("--adapter", problem, "Leave it out", code="conflicting-options")
    _check_training_options(out, base=base, data=data, steps=steps, checkpoints=checkpoints)
    if steps is not None:
        return _replay(settings, source, _step_range(steps), base=base or "", data=data, checkpoints=checkpoints)
    return _rebuild_adapter(settings, source, out, base=base, data=data, replace=replace)


def _check_training_options(
    out: str | None, *, base: str | None, data: tuple[str, ...], steps: str | None, checkpoints: str | None
) -> None:
    if checkpoints is not None and steps is None:
        raise UsageError("--checkpoints", "requires --steps, which says how many to repeat", "Pass it too")
    if steps is not None and not data:
        raise UsageError("--steps", "requires --data and --base, which it was trained on", "Pass them too")
    if data and base is None:
        raise UsageError("--data", "requires --base, the model that it was trained on", "Pass it too")
    if steps is not None and out is not None:
        problem = "writes no adapter, as it repeats a part of a training"
        raise UsageError("--steps", problem, "Leave out -o", code="conflicting-options")


def _step_range(text: str) -> int | tuple[int, int]:
    first, dash, last = text.partition("-")
    if not all(part.isdecimal() and part.isascii() and len(part) < 10 for part in ((first, last) if dash else (first,))):
        raise UsageError("--steps", f"{text[:40]!r} is no number of steps", "Write it like 500, or like 500-1000")
    return (int(first), int(last)) if dash else int(first)


def _is_ref(text: str) -> bool:
    """Return whether a text names an adapter: names of recipes have no slash, and their files exist or end with .json."""
    return "/" in text and not text.endswith(".json") and not Path(text).is_file()


def _rebuild_adapter(
    settings: Settings, ref: str, out: str | None, *, base: str | None, data: tuple[str, ...], replace: bool
) -> int:
    from adapterhub.operations import rebuild as rebuild_operation
    from adapterhub.operations import retrain

    if data:
        prepare_torch()
        result = retrain.rebuild(ref, workspace(settings), base=base or "", data=data, out=out, replace=replace)
    else:
        spec = inputs.read_base(base, settings) if base else None
        result = rebuild_operation.rebuild(ref, workspace(settings), out=out, base=spec, replace=replace)
    return _emit(result, settings)


def _replay(
    settings: Settings,
    ref: str,
    steps: int | tuple[int, int],
    *,
    base: str,
    data: tuple[str, ...],
    checkpoints: str | None,
) -> int:
    from adapterhub.operations import training_replay

    prepare_torch()
    result = training_replay.replay(ref, workspace(settings), base=base, data=data, steps=steps, checkpoints=checkpoints)
    return _emit(result, settings)


def _emit(result: RebuildResult, settings: Settings) -> int:
    name, differences = str(result.version.ref), result.differences
    document = {
        "ref": name,
        "digest": result.version.digest,
        "steps": list(result.steps) if result.steps else None,
        "same": not differences,
        "differences": [
            {"name": difference.name, "what": difference.what, "ulps": difference.ulps} for difference in differences
        ],
    }
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_lines(_verdict(result)))
    return 1 if differences else 0


def _verdict(result: RebuildResult) -> Iterator[str]:
    ref, differences = str(result.version.ref), result.differences
    part = f"steps {result.steps[0]:,} to {result.steps[1]:,} repeated" if result.steps else ""
    if not differences:
        yield f"{ref}: {part or 'rebuilt'}, every byte matches"
        return
    ulps = [difference.ulps for difference in differences if difference.ulps is not None]
    largest = f", at most {output.plural(max(ulps), 'unit')} in the last place" if len(ulps) == len(differences) else ""
    yield f"{ref}: {part + ', ' if part else ''}{output.plural(len(differences), 'difference')}{largest}"
    for difference in differences[:10]:
        count = f" (at most {output.plural(difference.ulps, 'unit')} in the last place)" if difference.ulps is not None else ""
        yield f"  {difference.name}: {difference.what}{count}"
    if len(differences) > 10:
        yield f"  {output.remainder_line(len(differences) - 10)}"


def _rebuild_model(
    settings: Settings, source: str, out: str | None, *, base: str | None, adapters: tuple[str, ...], replace: bool
) -> int:
    from adapterhub.operations import model_recipes

    model = model_recipes.rebuild_model(source, out, workspace(settings), base=base, adapters=adapters, replace=replace)
    text = "\n".join(view.rebuilt_lines(model))
    output.emit(view.rebuilt_document(model), as_json=settings.as_json, text=lambda: output.write(text))
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
