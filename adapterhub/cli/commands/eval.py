"""`adapterhub eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output
from adapterhub.cli.environment import complete_ref, prepare_torch, workspace
from adapterhub.cli.options import Settings, base_option, command, dtype_option
from adapterhub.cli.output import Column
from adapterhub_converters import formats

if TYPE_CHECKING:
    from adapterhub.evaluation import EvaluationResult, PairComparison
    from adapterhub.registry.measurement_log import Gate


@command(
    "eval",
    example="""
    adapterhub eval team/sql:prod --data heldout.jsonl --base ./Qwen3-0.6B
    adapterhub eval ./sql --data heldout.jsonl --base ./Qwen3-0.6B --gate 'ppl<12' --gate 'ppl/base<0.9'""",
)
@click.argument("source", metavar="SRC", shell_complete=complete_ref)
@click.option("--data", "files", metavar="FILE", multiple=True, required=True, help="Data: held out, as in [data] heldout.")
@base_option("its folder with the weights, or a GGUF file.", required=True)
@click.option(
    "--trained-on",
    metavar="FILE",
    multiple=True,
    help="Data of the training: a note shows what --data has in common with them.",
)
@click.option("--gate", "gates", metavar="BOUND", multiple=True, help="Exit 1 unless it holds: 'ppl<12', 'accuracy>0.7'.")
@click.option(
    "--name", metavar="NAME", default="eval", show_default=True, help="Name of the result: NAME_perplexity in a search."
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
    **settings_of_evaluation: Any,
) -> int:
    """Measure the perplexity of held-out data under the base with and without an adapter.

    For a version in the registry the result is recorded in its log (the version does not change): `show` prints it and
    `search --metric 'eval_perplexity<12'` finds it; the latest result of a name counts. A gate compares ppl, loss, tokens,
    ppl/base, the perplexity relative to the base alone, or of preference pairs accuracy, the share of them whose chosen side
    is preferred, and margin. Exits 1 when a gate fails.
    Needs the extra: pip install 'adapterhub[train]'.
    """
    from adapterhub.manifest.measurement import Evaluation, check_name
    from adapterhub.operations import train
    from adapterhub.registry.measurement_log import parse_gate

    prepare_torch()
    # Parsed before the evaluation, which can take minutes.
    parsed_gates = [parse_gate(text, "--gate") for text in gates]
    check_name(name, "--name")
    record = None if no_record else name
    measured = train.evaluate(
        source, data=files, base=base, record=record, workspace=workspace(settings), **settings_of_evaluation
    )
    for note in measured.notes:
        output.say(output.one_line(f"note: {note}"))
    verdicts = [(gate, gate.passes(measured.metrics)) for gate in parsed_gates]
    ok = all(passed for _, passed in verdicts)
    recorded = measured.ref if measured.recorded else None
    document = {
        "ok": ok,
        "source": source,
        "ref": measured.ref,
        "digest": measured.digest,
        **Evaluation(name, measured.metrics, measured.data, measured.base).document(),
        "sequence": measured.sequence,
        "preference": {"method": pairs.method, "beta": pairs.beta} if (pairs := measured.pairs) else None,
        "recorded": recorded,
        "gates": [
            {"gate": gate.text, "metric": gate.metric, "value": measured.metrics[gate.metric], "ok": passed}
            for gate, passed in verdicts
        ],
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _text(measured, verdicts, recorded))
    return 0 if ok else 1


def _text(measured: EvaluationResult, verdicts: Sequence[tuple[Gate, bool]], recorded: str | None) -> None:
    metrics = measured.metrics
    columns = (Column(""), Column("LOSS", right=True), Column("PERPLEXITY", right=True), Column("TOKENS", right=True))
    tokens = str(measured.tokens)
    rows = [
        ["base", f"{measured.base_loss:.4f}", f"{metrics['base_perplexity']:.3f}", tokens],
        ["with the adapter", f"{measured.loss:.4f}", f"{metrics['perplexity']:.3f}", tokens],
    ]
    output.write_table(columns, rows)
    output.write(f"perplexity relative to the base: {metrics['perplexity_ratio']:.3f}")
    if measured.pairs:
        output.write(_pairs_line(measured.pairs))
    for gate, passed in verdicts:
        output.write(f"{'passed' if passed else 'FAILED'}: {output.one_line(gate.text)} ({metrics[gate.metric]:.4g})")
    if recorded:
        output.write(f"recorded for {recorded}")


def _pairs_line(pairs: PairComparison) -> str:
    base = "" if pairs.method == "dpo" else f" (base: {pairs.base_accuracy:.1%}, {pairs.base_margin:.3f})"
    preferred = f"{pairs.accuracy:.1%} preferred, margin {pairs.margin:.3f}{base}"
    return f"{output.plural(pairs.count, 'pair')}: {preferred}, by {pairs.method} with beta = {pairs.beta:g}"
