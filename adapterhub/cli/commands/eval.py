"""`adapterhub eval`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import cache_folder, complete_ref, open_registry
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.manifest.measurement import Evaluation
    from adapterhub.registry.measurements import Gate
    from adapterhub.train import EvaluationResult


@command(
    "eval",
    short="Measure an adapter against its base.",
    example="""
    adapterhub eval team/sql:prod --data heldout.jsonl --base ./Qwen3-0.6B
    adapterhub eval ./sql --data heldout.jsonl --base ./Qwen3-0.6B --gate 'ppl<12' --gate 'ppl/base<0.9'""",
)
@click.argument("source", metavar="SRC", shell_complete=complete_ref)
@click.option(
    "--data", "files", metavar="FILE", multiple=True, required=True, help="What is asked about, as in [data] heldout."
)
@click.option("--base", metavar="BASE", required=True, help="The model's folder, with its weights, or a GGUF file.")
@click.option("--gate", "gates", metavar="BOUND", multiple=True, help="Exit 1 unless it holds: 'ppl<12', 'ppl/base<0.9'.")
@click.option("--name", default="eval", show_default=True, help="What the measurement is called: NAME_perplexity in a search.")
@click.option("--no-record", is_flag=True, help="Write nothing into the registry.")
@click.option("--tokens", metavar="N", type=click.IntRange(1), help="Ask about so many tokens, evenly. [default: all]")
@click.option("--sequence", metavar="N", type=click.IntRange(2), help="Tokens in a row. [default: as trained, else 512]")
@click.option(
    "--loss", type=click.Choice(["all", "completion"]), help="Tokens that count. [default: as trained, else completion]"
)
@click.option("--quantize", type=click.Choice(["nf4", "none"]), help="How the base is held. [default: as trained, else nf4]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="[default: as trained, else bfloat16]")
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Threads to compute with. [default: torch's]")
@click.pass_obj
def eval(  # noqa: A001 - the command's name
    settings: Settings,
    /,
    *,
    source: str,
    files: tuple[str, ...],
    base: str,
    gates: tuple[str, ...],
    name: str,
    no_record: bool,
    **asked: Any,
) -> int:
    """Measure the perplexity of held-out data under the base with and without an adapter.

    Of a version in the registry the result is said in its log (the version itself stays as it is), where `show` has it and
    `search --metric 'eval_perplexity<12'` finds it; measured again under the same name, the last one counts. A gate is about
    ppl, loss, tokens, or ppl/base: the perplexity over that of the base alone. Exits 1 when one fails.
    Needs the extra: pip install 'adapterhub[train]'.
    """
    from adapterhub import train as trainer
    from adapterhub.manifest.measurement import Evaluation, check_name
    from adapterhub.registry.measurements import parse_gate

    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in `train`
    passing = [parse_gate(text, "--gate") for text in gates]
    check_name(name, "--name")
    folder = inputs.existing(base)
    if not (folder.is_dir() or folder.suffix == ".gguf"):
        raise UsageError(base, "is not a folder", "Name the model's folder, with config.json and its weights, or a .gguf file")
    with inputs.opened(source, settings) as found:
        given = inputs.given(found)
        measured = trainer.evaluate(
            given, folder, [Path(file) for file in files], trainer.EvaluationOptions(**asked), cache=cache_folder()
        )
    for note in measured.notes:
        output.say(output.one_line(f"note: {note}"))
    evaluation = Evaluation(name, measured.metrics, measured.data, measured.base)
    recorded = None if no_record else _record(settings, found, evaluation)
    verdicts = [(gate, gate.passes(measured.metrics)) for gate in passing]
    ok = all(passed for _, passed in verdicts)
    document = {
        "ok": ok,
        "source": source,
        "ref": found.ref,
        "digest": given.digest,
        **evaluation.document(),
        "sequence": measured.sequence,
        "recorded": recorded,
        "gates": [
            {"gate": gate.text, "metric": gate.metric, "value": measured.metrics[gate.metric], "ok": passed}
            for gate, passed in verdicts
        ],
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _text(measured, verdicts, recorded))
    return 0 if ok else 1


def _record(settings: Settings, found: inputs.Source, evaluation: Evaluation) -> str | None:
    """The ref of the registry here whose log says it now; None for what is not in it."""
    from adapterhub.ref import Ref
    from adapterhub.registry import measurements
    from adapterhub.remotes.location import is_address

    if found.ref is None or is_address(found.ref):
        return None
    with open_registry(settings) as registry:
        measurements.record(registry, Ref.parse(found.ref), evaluation)
    return found.ref


def _text(measured: EvaluationResult, verdicts: Sequence[tuple[Gate, bool]], recorded: str | None) -> None:
    metrics = measured.metrics
    columns = (Column(""), Column("LOSS", right=True), Column("PERPLEXITY", right=True), Column("TOKENS", right=True))
    tokens = str(measured.tokens)
    rows = [
        ["base", f"{measured.base_loss:.4f}", f"{metrics['base_perplexity']:.3f}", tokens],
        ["with the adapter", f"{measured.loss:.4f}", f"{metrics['perplexity']:.3f}", tokens],
    ]
    for line in output.table(columns, rows, screen=output.width()):
        output.write(line)
    output.write(f"perplexity over the base's: {metrics['perplexity_ratio']:.3f}")
    for gate, passed in verdicts:
        output.write(f"{'passed' if passed else 'FAILED'}: {output.one_line(gate.text)} ({metrics[gate.metric]:.4g})")
    if recorded:
        output.write(f"recorded for {recorded}")
