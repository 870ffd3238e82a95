"""The command's merge of adapters into a base, from options to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.operations import merge_into, source_names
from adapterhub_converters.errors import UsageError

from . import environment, inputs, output
from .options import Settings
from .progress import bytes_bar
from .registry_choice import workspace
from .views import model_merge_report, recipes

if TYPE_CHECKING:
    from adapterhub.manifest.document import Recipe


def weights_of(text: str | None, count: int) -> list[float]:
    """Return the numbers of --weights, one per adapter; 1 each without the option."""
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError("--weights", f"{text!r} is not a list of numbers", "Write it like 0.7,-0.4") from error
    if len(weights) != count:
        problem = f"{output.plural(len(weights), 'weight')} for {output.plural(count, 'adapter')}"
        raise UsageError("--weights", problem, "Write one for each adapter, in their order")
    return weights


def run(
    settings: Settings,
    adapters: Sequence[inputs.Source],
    weights: Sequence[float],
    places: tuple[str, str],
    into: Mapping[str, Any],
    *,
    method: Recipe | None = None,
    replace: bool = False,
) -> None:
    """Merge into a base by `method`, as a sum if it is None, or show the plan; `places` are the base and the output."""
    from adapterhub.merging import Options
    from adapterhub_converters.containers import atomic

    base, out = inputs.weights(places[0], settings), source_names.output_path(places[1])
    size = into["shard_size"]
    options = Options(
        dtype=into["dtype"],
        requantize=into["requantize"],
        shard_size=inputs.byte_count(size, "--shard-size") if size else None,
        dequantize=into["dequantize"],
        as_trained=into["onto"] == "as-trained",
        force=into["force"],
    )
    if not into["recipe_only"]:
        merge_into.check_place(out, base)
    if into["no_digest"] and not into["recipe_only"]:
        raise UsageError("--no-digest", "is for a recipe", "Add --recipe-only", code="conflicting-options")
    if method and into["recipe_only"]:
        raise UsageError("--recipe-only", "records a sum of adapters, and no method", "Leave one of the two out")
    # A folder merged into a .gguf is also converted; a GGUF base stays one by itself.
    gguf = base.is_dir() and out.suffix == ".gguf" and not into["recipe_only"]
    # Refuse an output that exists before the merge is prepared, which reads all weights.
    if not into["dry_run"] and not into["recipe_only"]:
        atomic.check_free(out, folder=not gguf and (base.is_dir() or bool(options.shard_size)), replace=replace)
    merge, options = merge_into.prepare_merge_into(adapters, weights, base, options, gguf=gguf, method=method)
    for warning in merge.report.warnings:
        output.say(output.one_line(f"warning: {warning}"))
    if into["recipe_only"] and not into["dry_run"]:
        from adapterhub.operations import model_recipes

        settings_workspace = workspace(settings)
        digests = not into["no_digest"]
        recipe = model_recipes.write_recipe(
            merge, options, base, places[1], settings_workspace, source=places[0], digests=digests, replace=replace
        )
        for address in filter(source_names.is_address, (adapter.ref or "" for adapter in recipe.recipe.adapters)):
            environment.remember_host(address)
        recipes.show_written(recipe, merge.report.size, as_json=settings.as_json)
        return
    report = merge.report
    if not into["dry_run"]:
        with bytes_bar("merging") as progress:
            report = merge.write(out, progress, replace=replace)
    output.emit(model_merge_report.document(report), as_json=settings.as_json, text=lambda: model_merge_report.text(report))
