"""`adapterhub merge`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adapterhub.cli import inputs, merge_adapters, merge_into
from adapterhub.cli.merge_into import weights_of
from adapterhub.cli.options import Settings, command
from adapterhub.cli.views import merged
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    pass


_OWN = ("method", "rank", "energy", "rank_budget", "seed", "plot")  # of adapters into an adapter


_PARAMETERS = ("density", "epsilon", "gamma", "lambda_", "t", "share", "rule", "by", "sign")


def _parameters(function: Any) -> Any:
    """The options that some methods have; which, `--method list` says."""
    described = {
        "density": (float, "D", "What share of the elements is kept (ties, dare_*, della, breadcrumbs, sce, knots …)."),
        "epsilon": (float, "E", "How far probabilities go from --density (della)."),
        "gamma": (float, "G", "What share of the largest elements is dropped (breadcrumbs)."),
        "lambda": (float, "L", "What the merged delta is multiplied by (ties, tsv, iso_c …)."),
        "t": (float, "T", "How far from the first adapter to the second (slerp)."),
        "share": (float, "S", "What share of each adapter's singular vectors is taken (tsv)."),
        "rule": (str, "R", "How cores are merged: ties, linear, dare_ties, dare_linear (core_space)."),
        "by": (str, "B", "all, rows or columns (nuslerp)."),
        "sign": (str, "S", "How signs are elected: total or frequency (peft_ties …)."),
    }
    for name, (kind, metavar, text) in reversed(described.items()):
        argument = f"{name}_" if name == "lambda" else name
        function = click.option(f"--{name}", argument, type=kind, metavar=metavar, help=text)(function)
    return function


F = TypeVar("F", bound=Callable[..., Any])


_INTO = (
    click.option("--dtype", type=click.Choice(("bf16", "f16", "f32")), help="With --into: floats to write. [default: BASE's]"),
    click.option(
        "--requantize",
        type=click.Choice(("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "nf4")),
        help="With --into, into a GGUF: the type that floats, and quantized tensors that change, get. nf4: linear layers of a "
        "Hugging Face folder, as bitsandbytes has them.",
    ),
    click.option("--shard-size", metavar="SIZE", help="With --into: files of at most so much, like 5GB."),
    click.option(
        "--onto",
        type=click.Choice(("original", "as-trained")),
        help="With --into: BASE as it is, or first rounded as training saw it (adapter.json says how). [default: original]",
    ),
    click.option("--dequantize", is_flag=True, help="With --into: let a quantized Hugging Face model become one in floats."),
    click.option("--force", is_flag=True, help="With --into: write it even if a quantized target swallows the adapter."),
    click.option(
        "--recipe-only",
        is_flag=True,
        help="With --into: keep no model but a recipe of a few kilobytes for `adapterhub materialize`. OUT is a .json file, or "
        "a word, its name in the registry. The merge runs once, into a temporary place beside, for the digests of its files.",
    ),
    click.option("--no-digest", is_flag=True, help="With --recipe-only: don't run the merge; nothing to compare with later."),
    click.option("--dry-run", "--plan", "dry_run", is_flag=True, help="With --into: say what would be, and write nothing."),
)


_INTO_NAMES = ("dtype", "requantize", "shard_size", "onto", "dequantize", "force", "recipe_only", "no_digest", "dry_run")


def _into_options(command: F) -> F:
    """The options of a merge into a base, as one argument `into`."""

    @functools.wraps(command)
    def call(*args: Any, **given: Any) -> Any:
        return command(*args, into={name: given.pop(name) for name in _INTO_NAMES}, **given)

    made: Any = call
    for option in reversed(_INTO):
        made = option(made)
    found: F = made
    return found


def _refuse(into: Mapping[str, Any]) -> None:
    """UsageError for options that mean nothing without --into."""
    given = next((name for name, value in into.items() if value), None)
    if given:
        raise UsageError(f"--{given.replace('_', '-')}", "is for a merge into a base", "Add --into BASE")


@command(
    "merge",
    short="Merge adapters, or adapters into a base.",
    example="""
    adapterhub merge team/sql:v2 --into ./Qwen3-0.6B -o ./qwen3-sql
    adapterhub merge team/sql:v2 --into ./Qwen3-0.6B --requantize q8_0 -o qwen3-sql.gguf
    adapterhub merge ./sql ./french --weights 0.7,0.3 --method svd --rank 16 -o ./both
    adapterhub merge team/sql team/french --method ties --density 0.2 -o team/both:ties
    adapterhub merge --method list""",
)
@click.argument("source", metavar="SRC...", nargs=-1)
@click.option(
    "-o",
    "--output",
    "out",
    metavar="OUT",
    help="The folder or .gguf to make, or the ref to push to: namespace/name or namespace/name:tag.",
)
@click.option("--into", "base", metavar="BASE", help="Merge into this model (a Hugging Face folder or a GGUF file) instead.")
@click.option("--weights", metavar="W,W…", help="What each SRC is multiplied by, like 0.7,-0.4. [default: 1 each]")
@click.option(
    "--method",
    metavar="M",
    help="Adapters into an adapter: cat (exact, ranks add up), linear (exact, least rank), svd (rank K), ties …; "
    "`list` says which there are. [default: cat]",
)
@click.option("--explain", metavar="M", help="Say what a method does, by which formula and paper, and what it costs.")
@click.option("--rank", metavar="K", type=click.IntRange(min=1), help="The rank of every module of the result.")
@click.option("--energy", metavar="E", type=float, help="The least ranks that keep this share of the energy, like 0.99.")
@click.option(
    "--rank-budget", metavar="BYTES", type=click.IntRange(min=1), help="The ranks that keep most in so many bytes of tensors."
)
@click.option("--seed", metavar="N", type=click.IntRange(0, 2**63 - 1), help="Of the random numbers. [default: 0]")
@_parameters
@click.option("--plot", metavar="PNG", help="Draw how far the adapters disagree, by module (needs matplotlib).")
@_into_options
@click.pass_obj
def merge(
    settings: Settings,
    /,
    *,
    source: tuple[str, ...],
    out: str | None,
    base: str | None,
    weights: str | None,
    explain: str | None,
    into: dict[str, Any],
    **given: Any,
) -> None:
    """Make one adapter of several, or a model of a base and adapters.

    Every SRC is a folder, a file or a ref. With --into, each tensor is the base's plus what the adapters add, as peft's
    merge_and_unload has it bit for bit; memory stays small whatever the model's size. OUT appears whole or not at all; a
    folder merged into a .gguf is what llama.cpp's own conversion makes of the merged folder.
    What was merged how is recorded in the result, so that `adapterhub rebuild` makes it again.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if explain or asked.get("method") == "list":
        merged.explain(settings, explain)
        return
    if not source or not out:
        raise UsageError("SRC" if not source else "-o", "is missing", "Write `adapterhub merge SRC… -o OUT`")
    factors = weights_of(weights, len(source))
    if base and asked:
        name = next(iter(asked)).rstrip("_").replace("_", "-")
        raise UsageError(f"--{name}", "is for adapters into an adapter", "Leave it out with --into")
    if not base:
        _refuse(into)
        if out.endswith(".gguf"):
            hint = "Add --into BASE for a model, or merge into a folder and convert that with `adapterhub convert --to gguf`"
            raise UsageError(out, "is a GGUF file, and a merge of adapters makes a folder", hint)
    with ExitStack() as stack:
        if base:
            found = [stack.enter_context(inputs.opened(text, settings)) for text in source]
            merge_into.run(settings, found, factors, (base, out), into)
            return
        target = merge_adapters.destination(out, settings)
        found = [stack.enter_context(inputs.opened(text, settings)) for text in source]
        how = {name: asked[name] for name in _OWN if name in asked}
        parameters = {name.rstrip("_"): asked[name] for name in _PARAMETERS if name in asked}
        merge_adapters.into_adapter(settings, found, factors, target, parameters=parameters, **how)
