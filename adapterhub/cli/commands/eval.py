"""`adapterhub eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import data_evaluation, golden_tests, imported_results, signing_options
from adapterhub.cli.options import Settings, base_option, command, dtype_option, sampling_options
from adapterhub_converters import formats
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.cli.signing_options import SignerOption


# The options that each kind of evaluation has, besides those of all.
_SIGNER = ("key", "keyless", "token", "trust_config", "from_stdin")
_ALL = ("source", "gates", "name", "no_record", *_SIGNER)
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "--data": ("files", "against", "base", "trained_on", "tokens", "sequence", "loss", "quantize", "dtype", "threads"),
    "--tests": (
        *("tests", "against", "base", "url", "served_as", "trust_name", "programs", "junit"),
        *("samples", "temperature", "seed", "max_tokens"),
    ),
    "--import": ("imports", "trust_name"),
}


@command(
    "eval",
    example="""
    adapterhub eval team/sql:prod --data heldout.jsonl --base ./Qwen3-0.6B
    adapterhub eval ./sql --data heldout.jsonl --base ./Qwen3-0.6B --gate 'ppl<12' --gate 'ppl/base<0.9'
    adapterhub eval team/sql:v2 --data heldout.jsonl --base ./Qwen3-0.6B --against team/sql:prod --gate 'ppl/against<1.01'
    adapterhub eval team/sql:v2 --tests golden.jsonl --base ./Qwen3-0.6B --junit golden.xml
    adapterhub eval team/sql:v2 --tests golden.jsonl --base ./Qwen3-0.6B --against team/sql:v1
    adapterhub eval team/sql:v2 --import results.json --gate 'exact_match>0.7' --key ci.key
    adapterhub eval team/sql:v2 --tests golden.yaml --url http://127.0.0.1:8000/v1 --samples 5 --temperature 0.7""",
)
@click.argument("source", metavar="SRC")
@click.option(
    "--data",
    "files",
    metavar="FILE",
    multiple=True,
    help="Data: held out, as in [data] heldout; NAME=FILE for a data set with a result of its own; repeatable.",
)
@click.option("--tests", metavar="FILE", help="Golden tests, in JSONL or YAML: prompts, and what must hold of the answers.")
@click.option(
    "--import",
    "imports",
    metavar="FILE",
    multiple=True,
    help="Results of another tool: lm-evaluation-harness, promptfoo, inspect_ai or JUnit; repeatable.",
)
@click.option(
    "--against", metavar="REF", help="Version to compare with, on the same --data or --tests; or `base`, the base alone."
)
@base_option("its folder with the weights, or a GGUF file. [default: for --tests, the one SRC records]")
@click.option(
    "--trained-on",
    metavar="FILE",
    multiple=True,
    help="Data of the training: a note shows what --data has in common with them.",
)
@click.option("--gate", "gates", metavar="BOUND", multiple=True, help="Exit 1 unless it holds: 'ppl<12', 'pass>=0.95'.")
@click.option(
    "--name", metavar="NAME", help="Name of the result: NAME_perplexity in a search. [default: eval, tests, or the task]"
)
@click.option("--no-record", is_flag=True, help="Do not record the result in the registry.")
@click.option("--tokens", metavar="N", type=click.IntRange(1), help="Use about N tokens, evenly spread. [default: all]")
@click.option("--sequence", metavar="N", type=click.IntRange(2), help="Sequence length. [default: as trained, else 512]")
@click.option(
    "--loss", type=click.Choice(["all", "completion"]), help="Tokens that count. [default: as trained, else completion]"
)
@click.option(
    "--quantize", type=click.Choice(["nf4", "none"]), help="Quantization of the base. [default: as trained, else nf4]"
)
@dtype_option(formats.FLOATS, "the computation", default_text="as trained, else bf16")
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Number of threads. [default: torch's]")
@click.option(
    "--url",
    metavar="URL",
    help="Address: an endpoint that answers --tests, like http://127.0.0.1:8000/v1; its key is in $ADAPTERHUB_ENGINE_KEY.",
)
@click.option("--served-as", metavar="NAME", help="Name of SRC at --url. [default: NAME@sha256:…, as a gateway takes it]")
@click.option("--trust-name", is_flag=True, help="Accept results that name SRC, and not its digest.")
@click.option(
    "--samples", metavar="N", type=click.IntRange(1, 1000), default=1, show_default=True, help="Answers to each of --tests."
)
@sampling_options(hottest=100)
@click.option(
    "--command",
    "programs",
    metavar="NAME=PROGRAM",
    multiple=True,
    help="Program that --tests may run as NAME, with the answer on stdin; repeatable.",
)
@click.option("--junit", metavar="FILE", help="Also write the results of --tests as JUnit's XML, replacing an earlier report.")
@signing_options.optional_signer
@click.pass_context
def eval(  # noqa: A001 - its name
    context: click.Context, /, *, gates: tuple[str, ...], name: str | None, signer: SignerOption | None, **values: Any
) -> int:
    """Measure an adapter: on held-out data, by golden tests, or by another tool's results.

    --data measures the perplexity under the base with and without the adapter. A gate compares ppl, loss, tokens, ppl/base,
    the perplexity relative to the base alone, or of preference pairs accuracy, the share of them whose chosen side is
    preferred, and margin. With --against, 'ppl/against<1.01' holds if the whole 95 % interval of the ratio does. A gate that
    begins with the name of a data set is for that one. Needs the extra: pip install 'adapterhub[train]'.

    --tests answers prompts and checks what must hold of the answers: in torch, in llama.cpp for a GGUF file, or at --url. A
    gate compares pass, the share of the right answers, or passed, the number of tests. Without a gate every test must pass.
    With --against, 'pass>=against' holds if the share is not lower by two points, as its 95 % interval shows.

    --import takes results that another tool wrote about SRC, if they name its digest. A gate compares any of their metrics.

    For a version in the registry, or at the address of a hub that you may write to, the result is recorded in its log (the
    version does not change): `show` prints it and `search --metric 'eval_perplexity<12'` finds it; the latest result of a name
    counts. Exits 1 when a gate or a test fails.
    """
    settings: Settings = context.obj
    kind = _kind(context)
    options = {key: values[key] for key in (*_ALL, *_OPTIONS[kind]) if key in values}
    if kind == "--tests":
        return golden_tests.run(settings, gate_texts=gates, name=name or "tests", signer=signer, **options)
    if kind == "--import":
        return imported_results.run(settings, gate_texts=gates, name=name, signer=signer, **options)
    return data_evaluation.run(settings, gate_texts=gates, name=name, signer=signer, **options)


def _kind(context: click.Context) -> str:
    """Return the kind of evaluation. UsageError for none or several, and for an option of another kind."""
    parameters = {
        str(parameter.name): parameter.opts[-1]
        for parameter in context.command.params
        # The options of every command have no value of their own here.
        if parameter.expose_value
        and context.get_parameter_source(str(parameter.name)) == click.core.ParameterSource.COMMANDLINE
    }
    kinds = [kind for kind, names in _OPTIONS.items() if names[0] in parameters]
    if len(kinds) != 1:
        raise UsageError(" or ".join(_OPTIONS), "exactly one of them is required", code="conflicting-options")
    foreign = [option for name, option in parameters.items() if name not in (*_ALL, *_OPTIONS[kinds[0]])]
    if foreign:
        raise UsageError(foreign[0], f"is not for {kinds[0]}", "Leave it out", code="conflicting-options")
    return kinds[0]
