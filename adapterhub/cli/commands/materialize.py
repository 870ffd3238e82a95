"""`adapterhub materialize`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output, recipes
from adapterhub.cli.environment import open_registry, workspace
from adapterhub.cli.options import Settings, adapter_option, base_option, command, output_option
from adapterhub_converters.errors import AdapterhubError, NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.merging import Merge
    from adapterhub.registry.merge_recipe import MergeRecipe
    from adapterhub.registry.merge_recipes import StoredRecipe
    from adapterhub.registry.recipe import Difference

_SHOWN = 10  # files that differ


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
@output_option("new folder or .gguf. [default: the recipe's name]")
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
        raise UsageError("NAME", "or a recipe file is required", "See `adapterhub materialize --list`")
    if remove:
        _remove(settings, source)
        return 0
    found, name = _recipe(source, settings)
    return _materialize(settings, found, base, adapters, (out, name))


def _materialize(
    settings: Settings, found: MergeRecipe, base: str | None, adapters: Sequence[str], names: tuple[str | None, str]
) -> int:
    """Write the model, as the first of two names or else the second, and report the comparison."""
    from adapterhub.merging import prepared, read_base
    from adapterhub.registry import merge_recipe
    from adapterhub_converters.formats import convert

    out, name = names
    folder = _base(found, base, settings)
    model = read_base(folder)
    merge_recipe.check_base(found, folder, model.spec)
    options = merge_recipe.options_of(found)
    with ExitStack() as stack:
        read = [(convert.read(path, base=model.spec), weight) for path, weight in _adapters(stack, settings, found, adapters)]
        merge = prepared(read, model, options)
        target = Path(out or (f"{name}.gguf" if merge.single else name))
        differences = _made(merge, found, folder, target)
    document = {
        "output": str(target),
        "compared": found["output"]["files"] is not None,
        "same": not differences if found["output"]["files"] is not None else None,
        "differences": [{"name": one.name, "what": one.what, "ulps": one.ulps} for one in differences],
        "made_by": found.get("made_by", {}),
    }
    text = "\n".join(_verdict(target, found, differences))
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
    return 1 if differences else 0


def _recipe(source: str, settings: Settings) -> tuple[MergeRecipe, str]:
    """The recipe, and the default name of the model."""
    from adapterhub.registry import merge_recipe, merge_recipes
    from adapterhub.store import named_documents
    from adapterhub_converters.containers import json_file

    path, name = Path(source), _kept_name(source)
    if name and not path.exists():
        with open_registry(settings) as registry:
            return merge_recipes.get(registry, name).recipe, name
    if name and _known(name, settings):
        hint = f"Write ./{source} for the file, {merge_recipes.EXPLICIT}{name} for the name"
        raise UsageError(source, "both a file and a recipe in the registry", hint)
    return merge_recipe.parse(json_file.read_text(path, named_documents.MAX_RECIPE), source), path.name.removesuffix(".json")


def _kept_name(text: str) -> str | None:
    """The registry name that `text` may be; None for what can only be a file."""
    from adapterhub.registry import merge_recipes
    from adapterhub.store import named_documents

    if text.endswith(".json"):
        return None
    try:
        return named_documents.parse_document_name(text.removeprefix(merge_recipes.EXPLICIT), text)
    except UsageError:
        return None


def _known(name: str, settings: Settings) -> bool:
    from adapterhub.registry import merge_recipes

    try:
        with open_registry(settings) as registry:
            return name in merge_recipes.names(registry)
    except AdapterhubError:
        return False


def _remove(settings: Settings, source: str) -> None:
    from adapterhub.registry import merge_recipes

    name = source.removeprefix(merge_recipes.EXPLICIT)
    with open_registry(settings) as registry:
        merge_recipes.remove(registry, name)
    document = {"removed": name, "kind": "merge"}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"removed {name}; its adapters stay"))


_LIST = (
    output.Column("NAME"),
    output.Column("BASE"),
    output.Column("ADAPTERS"),
    output.Column("MODEL", right=True, drop=1),
    output.Column("STORED", drop=2),
)


def _list(settings: Settings) -> int:
    """List the recipes in the registry; an unreadable one is reported and hides no other."""
    from adapterhub.registry import merge_recipes

    found, damaged = [], []
    with open_registry(settings) as registry:
        for name in merge_recipes.names(registry):
            try:
                found.append(merge_recipes.get(registry, name))
            except AdapterhubError as error:
                damaged.append((name, error))
    for name, wrong in damaged:
        output.say(output.one_line(f"error: {name}: {wrong}"))
    document = {
        "merges": [{"name": one.name, "digest": one.digest, "time": one.time, **_short(one.recipe)} for one in found],
        "damaged": [{"name": name, "where": wrong.where, "what": wrong.what} for name, wrong in damaged],
    }

    def text() -> None:
        if not found and not damaged:
            output.say("no recipes yet; store one with `adapterhub merge … --into BASE --recipe-only -o NAME`")
        elif found:
            rows = [_row(one) for one in found]
            output.write_table(_LIST, rows)

    output.emit(document, as_json=settings.as_json, text=text)
    return 1 if damaged else 0


def _short(recipe: MergeRecipe) -> dict[str, Any]:
    files = recipe["output"]["files"]
    size = None if files is None else sum(file["size"] for file in files)
    return {"base": recipe["base"], "adapters": recipe["adapters"], "options": recipe["options"], "model_size": size}


def _row(one: StoredRecipe) -> list[str]:
    from adapterhub.registry.merge_recipe import base_name

    size = _short(one.recipe)["model_size"]
    adapters = [
        f"{adapter['weight']:g} × {adapter.get('ref') or output.digest(adapter['digest'])}"
        for adapter in one.recipe["adapters"]
    ]
    base = base_name(one.recipe)
    return [
        one.name,
        base,
        ", ".join(adapters),
        output.size(size) if size else "-",
        one.time[:10],
    ]


def _made(merge: Merge, found: MergeRecipe, base: Path, out: Path) -> list[Difference]:
    """Write the model as `out`, unless the result shows that this is not the recipe's base."""
    from adapterhub.registry import merge_recipe
    from adapterhub_converters.containers import atomic

    compared = found["output"]["files"] is not None
    with atomic.whole(out, folder=not merge.single) as inside:
        if not compared and not merge_recipe.check_weights(found, base):
            output.say("note: the recipe has no digests; only names, shapes and sizes of the base were compared")
        made = recipes.ran(merge, inside)
        differences = merge_recipe.differences(found, made) if compared else []
        if differences:
            merge_recipe.check_weights(found, base)
    return differences


def _base(found: MergeRecipe, given: str | None, settings: Settings) -> Path:
    from adapterhub.registry.merge_recipe import base_name

    if given:
        return inputs.weights(given, settings)
    path = Path(found["base"].get("source", found["base"]["name"]))
    if not path.exists():
        raise NotFoundError(base_name(found), f"the base of the recipe is not at {path}", "Pass its path with --base")
    return path


def _adapters(stack: ExitStack, settings: Settings, found: MergeRecipe, given: Sequence[str]) -> Iterator[tuple[Path, float]]:
    """The files of every adapter of the recipe, digests verified, and their weights."""
    by_digest: dict[str, Path] = {}
    wanted = {adapter["digest"] for adapter in found["adapters"]}
    for text in given:
        one = stack.enter_context(inputs.opened(text, settings))
        digest = inputs.parent(one).digest
        if digest not in wanted:
            raise UsageError(
                text, f"is {output.digest(digest)}, which is not an adapter of the recipe", "Name another, or leave it out"
            )
        by_digest[digest] = one.path
    for adapter in found["adapters"]:
        digest = adapter["digest"]
        if digest not in by_digest:
            by_digest[digest] = stack.enter_context(_fetched(settings, adapter))
        yield by_digest[digest], adapter["weight"]


@contextmanager
def _fetched(settings: Settings, adapter: Mapping[str, Any]) -> Iterator[Path]:
    """An adapter from the registry, else from the address in the recipe."""
    from adapterhub_converters.adapter_files import adapter_in

    digest, ref = adapter["digest"], adapter.get("ref", "")
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / "adapter"
        held = False
        try:
            with open_registry(settings) as registry:
                held = registry.pull_digest(digest, folder)
        except NotFoundError:  # no registry
            pass
        if not held and inputs.is_elsewhere(ref):
            with _from_address(ref, settings, digest) as path:
                yield path
            return
        if not held:
            hint = "Push or pull it here first, or pass it with --adapter"
            which = f"an adapter of the recipe, {output.digest(digest)}," if ref else "an adapter of the recipe"
            raise NotFoundError(ref or digest, f"{which} is not in the registry", hint)
        with inputs.naming(folder, ref or digest):
            yield adapter_in(folder)


@contextmanager
def _from_address(ref: str, settings: Settings, digest: str) -> Iterator[Path]:
    """The adapter at an address, if it still has that digest and the project allows it."""
    from adapterhub import sharing

    sharing.check_address(ref, workspace(settings))
    with inputs.opened(ref, settings) as one:
        if one.digest != digest:
            what = f"is now another adapter: {output.digest(one.digest or '')}, not {output.digest(digest)}"
            raise NotFoundError(ref, what, "Pass the right one with --adapter")
        yield one.path


def _verdict(out: Path, found: MergeRecipe, differences: Sequence[Difference]) -> Iterator[str]:
    files = found["output"]["files"]
    if files is None:
        yield output.one_line(f"{out}: written; the recipe has no digests to compare with")
        return
    if not differences:
        yield output.one_line(f"{out}: matches the recipe byte for byte, {output.plural(len(files), 'file')}")
        return
    far = [one.ulps for one in differences if one.ulps is not None]
    most = f", by {output.plural(max(far), 'unit')} in the last place at most" if far else ""
    yield output.one_line(f"{out}: {output.plural(len(differences), 'file')} of {len(files)} not as in the recipe{most}")
    for one in differences[:_SHOWN]:
        by = f", by {one.ulps} units in the last place at most" if one.ulps is not None else ""
        yield output.one_line(f"  {one.name}: {one.what}{by}")
    if len(differences) > _SHOWN:
        yield f"  {output.more(len(differences) - _SHOWN)}"
    made_by = ", ".join(f"{key} {value}" for key, value in found.get("made_by", {}).items())
    yield output.one_line(f"  the recipe was made with {made_by}; another kind of CPU rounds differently")
