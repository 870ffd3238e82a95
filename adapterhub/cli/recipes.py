"""Recipes of a few kilobytes for merged models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterhub.sources import is_address
from adapterhub_converters.errors import UsageError

from . import output
from .environment import open_registry, used
from .options import Settings
from .progress import bytes_bar

if TYPE_CHECKING:
    from adapterhub.merging import Merge, Options
    from adapterhub.registry.merge_recipe import Made


class Place(NamedTuple):
    """The base, the base as typed, and the output of the recipe."""

    base: Path
    typed: str
    out: str


def keep(settings: Settings, merge: Merge, options: Options, place: Place, *, digest: bool) -> None:
    """Write the recipe of a merge; with `digest`, run it once into a temporary folder for the digests of its files."""
    from adapterhub.registry import merge_recipe, merge_recipes
    from adapterhub_converters.containers import atomic, json_file

    name = _name(place.out)
    with ExitStack() as stack:
        adapters = options.lineage["adapters"]
        for ref in filter(is_address, (adapter.get("ref") or "" for adapter in adapters)):
            used(ref)
        if name:
            registry = stack.enter_context(open_registry(settings, make=True))
            merge_recipes.check_free(registry, name)
            merge_recipes.check_adapters(registry, adapters)
        else:
            atomic.check_free(Path(place.out), folder=False)
            _tell_of_folders(adapters)
        beside = registry.root / name if name else Path(place.out)
        with atomic.beside(beside) as temporary:
            made = ran(merge, temporary / "model") if digest else None
            found = merge_recipe.document(place.base, merge.base.spec, place.typed, options, made, single=merge.single)
        raw = merge_recipe.dump(found)
        if name:
            merge_recipes.store(registry, name, found)
        else:
            with atomic.whole(beside, folder=False) as inside:
                json_file.write_text(inside, raw.decode())
    files, out = found["output"]["files"], name or place.out
    document = {"output": out, "size": len(raw), "model_size": merge.report.size, "files": files, "base": found["base"]}
    of = f"{output.plural(len(files), 'file')} with digests" if files is not None else "without digests"
    text = f"{out}: a recipe of {output.size(len(raw))} for a model of {output.size(merge.report.size)}, {of}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(output.one_line(text)))


def _name(text: str) -> str | None:
    """The name in the registry that OUT is; None for a file."""
    from adapterhub.store.named_documents import parse_document_name

    if text.endswith(".json"):
        return None
    try:
        return parse_document_name(text, text)
    except UsageError as error:
        hint = f"Write {text}.json, or one word for a name in the registry"
        raise UsageError(text, "is neither a .json file nor a name of one word", hint) from error


def _tell_of_folders(adapters: Sequence[Mapping[str, Any]]) -> None:
    for adapter in adapters:
        if "ref" not in adapter:
            what = f"adapter {output.digest(adapter['digest'])} is a folder, which the recipe cannot contain"
            output.say(f"note: {what}. Push it, or pass it to `materialize --adapter`")


def ran(merge: Merge, out: Path) -> Made:
    """Write a merged model, for the digests of its files."""
    from adapterhub.registry.merge_recipe import Made

    with bytes_bar("merging") as progress:
        merge.write(out, progress)
    return Made(out, merge.single, tuple(merge.report.touched))
