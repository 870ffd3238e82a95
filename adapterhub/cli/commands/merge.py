"""`adapterhub merge`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, merge_adapters, merge_into
from adapterhub.cli.completions import completions
from adapterhub.cli.merge_into import weights_of
from adapterhub.cli.options import (
    Choice,
    Settings,
    command,
    dry_run_option,
    dtype_option,
    energy_option,
    explain_option,
    force_option,
    onto_option,
    output_option,
    plot_option,
    rank_option,
    replace_option,
    set_option,
    weights_option,
)
from adapterhub.cli.views import merge_report
from adapterhub.operations import merge as merge_operation
from adapterhub_converters import formats
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from adapterhub.manifest.document import Recipe

# Options that decide the factors of a merged adapter, or show them; a merge into a base has no factors.
_ADAPTER_OPTIONS = ("rank", "energy", "rank_budget", "plot")
_REQUANTIZE = (*formats.QUANTIZED, "nf4")
# Options of a merge into a base.
_MODEL_OPTIONS = (
    dtype_option(formats.FLOATS, "floats, with --into", default_text="BASE's"),
    click.option(
        "--requantize",
        metavar="TYPE",
        type=Choice(_REQUANTIZE),
        help="With --into: quantize floats and changed tensors of a GGUF to q8_0, q6_k, q5_k, q4_k or the like, a Hugging Face "
        "folder to a GGUF in a mixture such as q4_k_m, or its linear layers to nf4, as bitsandbytes does.",
    ),
    click.option("--shard-size", metavar="SIZE", help="With --into: maximum size of a file, like 5GB."),
    onto_option,
    click.option("--dequantize", is_flag=True, help="With --into: write a quantized Hugging Face model in floats."),
    force_option("with --into, write a quantized model that loses the adapter to rounding."),
    click.option(
        "--recipe-only",
        is_flag=True,
        help="With --into: write only a recipe of a few kilobytes for `adapterhub rebuild`. OUT is a .json file, or a "
        "word to name it in the registry. The merge runs once, in a temporary folder, to record the digests of its files.",
    ),
    click.option("--no-digest", is_flag=True, help="With --recipe-only: do not run the merge; nothing to compare later."),
    dry_run_option,
)
_MODEL_OPTION_NAMES = (
    "dtype",
    "requantize",
    "shard_size",
    "onto",
    "dequantize",
    "force",
    "recipe_only",
    "no_digest",
    "dry_run",
)


def _complete_method(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    from adapterhub.merging import METHODS

    return completions(METHODS, typed)


def _complete_parameter(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from adapterhub.merging import METHODS

    method = METHODS.get(context.params.get("method") or "cat")
    return [CompletionItem(f"{name}=") for name in method.parameters if f"{name}=".startswith(typed)] if method else []


def _into_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a merge into a base, as one argument `into`."""

    @functools.wraps(function)
    def call(*args: Any, **values: Any) -> Any:
        return function(*args, into={name: values.pop(name) for name in _MODEL_OPTION_NAMES}, **values)

    decorated: Callable[..., Any] = call
    for option in reversed(_MODEL_OPTIONS):
        decorated = option(decorated)
    return decorated


@command(
    "merge",
    example="""
    adapterhub merge team/sql:v2 --into ./Qwen3-0.6B -o ./qwen3-sql
    adapterhub merge team/sql:v2 --into ./Qwen3-0.6B --requantize q8_0 -o qwen3-sql.gguf
    adapterhub merge ./sql ./french --weights 0.7,0.3 --method svd --rank 16 -o ./both
    adapterhub merge team/sql team/french --method ties --set density=0.2 -o team/both:ties
    adapterhub merge team/sql team/french --into ./Qwen3-0.6B --method ties -o ./qwen3-both
    adapterhub merge --method ties --explain
    adapterhub merge --explain""",
)
@click.argument("source", metavar="SRC...", nargs=-1)
@output_option("folder or .gguf, or a ref to push to: namespace/name or namespace/name:tag.")
@replace_option
@click.option("--into", "base", metavar="BASE", help="Merge into this model, a Hugging Face folder or a GGUF file.")
@weights_option
@click.option(
    "--method",
    metavar="METHOD",
    shell_complete=_complete_method,
    help="Method for several adapters: cat (exact, ranks add up), linear (exact, least rank), svd (rank R), ties …; --explain "
    "lists all. [default: cat]",
)
@set_option("a parameter of METHOD, like density=0.2", shell_complete=_complete_parameter)
@explain_option(
    "method, by default METHOD: its formula, paper, cost and parameters. Without METHOD, list all.",
    is_flag=False,
    flag_value="",
    shell_complete=_complete_method,
)
@rank_option("every module.")
@energy_option
@click.option(
    "--rank-budget", metavar="BYTES", type=click.IntRange(min=1), help="Distribute ranks to keep most within BYTES of tensors."
)
@click.option("--seed", metavar="N", type=click.IntRange(0, 2**53 - 1), help="Random seed. [default: 0]")
@plot_option("how far the adapters disagree, by module")
@_into_options
@click.pass_obj
def merge(
    settings: Settings,
    /,
    *,
    source: tuple[str, ...],
    out: str | None,
    replace: bool,
    base: str | None,
    weights: str | None,
    about: str | None,
    changes: tuple[str, ...],
    into: dict[str, Any],
    **options: Any,
) -> None:
    """Merge several adapters into one, or adapters into a base model.

    Every SRC is a folder, a file or a ref. With --into, each tensor is the base's plus the adapters' deltas, bit for bit like
    peft's merge_and_unload, or with --method plus what the method makes of them, without truncation to a rank; memory use does
    not grow with the model. OUT appears whole or not at all. A folder merged into a
    .gguf equals llama.cpp's conversion of the merged folder.
    The result records how it was made, so that `adapterhub rebuild` can repeat it.
    """
    given_options = {name: value for name, value in options.items() if value is not None}
    method = given_options.get("method")
    if about is not None or method == "list":
        merge_report.explain(settings, about or (method if method != "list" else None))
        return
    if not source or not out:
        raise UsageError("SRC" if not source else "-o", "is missing", "Write `adapterhub merge SRC… -o OUT`")
    factors = weights_of(weights, len(source))
    if base and (name := next((name for name in _ADAPTER_OPTIONS if name in given_options), None)):
        raise UsageError(
            f"--{name.replace('_', '-')}", "is for a merge of adapters", "Leave it out with --into", code="conflicting-options"
        )
    if not base:
        model_option = next((key for key, value in into.items() if value), None)
        if model_option:
            raise UsageError(
                f"--{model_option.replace('_', '-')}",
                "is for a merge into a base",
                f"Add --into {inputs.recorded_base_option(source[0], settings)}",
                code="conflicting-options",
            )
        if out.endswith(".gguf"):
            name = inputs.recorded_base_option(source[0], settings)
            hint = (
                f"For a model, add --into {name}; or merge into a folder and convert that with `adapterhub convert --to gguf`"
            )
            raise UsageError(out, "is a GGUF file, and a merge of adapters writes a folder", hint)
    recipe = _recipe(given_options, changes)
    with ExitStack() as stack:
        if base:
            sources = [stack.enter_context(inputs.open_source(text, settings)) for text in source]
            merge_into.run(
                settings,
                sources,
                factors,
                (base, out),
                into,
                method=recipe if given_options or changes else None,
                replace=replace,
            )
            return
        target = merge_operation.merge_destination(out)
        sources = [stack.enter_context(inputs.open_source(text, settings)) for text in source]
        merge_adapters.merge_into_adapter(
            settings, sources, factors, target, recipe, plot=given_options.get("plot"), replace=replace
        )


def _recipe(given_options: Mapping[str, Any], changes: Sequence[str]) -> Recipe:
    """Return the method, its options and its parameters."""
    from adapterhub.manifest.document import Recipe
    from adapterhub.merging.adapters.methods import method_named

    options = {name: given_options[name] for name in ("method", "rank", "energy", "seed") if name in given_options}
    parameters = method_named(given_options.get("method", "cat")).parse_parameters(changes)
    return Recipe(kind="merge", **options, budget=given_options.get("rank_budget"), parameters=parameters)
