"""`adapterhub convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.conversion_options import MODEL_DTYPES, any_format_option, loss_options_with, split_drops
from adapterhub.cli.options import (
    Settings,
    alpha_option,
    base_option,
    command,
    force_option,
    model_option,
    rank_option,
    replace_option,
    rslora_option,
)
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.views import conversion_report
from adapterhub_converters import formats, runtime_commands
from adapterhub_converters.errors import UsageError
from adapterhub_converters.formats import AdapterFormat, ModelDtype


@command(
    "convert",
    example="""
    adapterhub convert ./sql sql.gguf --base ./Qwen3-0.6B
    adapterhub convert team/sql:v2 ./sql-mlx --to mlx
    adapterhub convert base.gguf ./base --to hf
    adapterhub convert ./Qwen3-0.6B qwen3.gguf --dtype q8_0
    adapterhub convert --list""",
)
@click.argument("source", metavar="SRC", required=False)
@click.argument("target", metavar="DST", required=False)
@any_format_option
@base_option("needed by formats that require its names or shapes: a folder, a file or a URL.")
@loss_options_with(MODEL_DTYPES)
@rank_option("an approximation. [default: the adapter's]")
@alpha_option
@rslora_option
@click.option("--imatrix", metavar="FILE", help="Quantize a whole model by an importance matrix of llama-imatrix.")
@click.option("--unsafe-pickle", is_flag=True, help="Load a pickle, in a separate process with limits (needs torch).")
@model_option
@force_option("convert even if `adapterhub validate` reports errors.")
@replace_option
@click.option("-v", "--verbose", is_flag=True, help="Print a line for every tensor; with --list, every model.")
@click.option("--list", "listed", is_flag=True, help="List the formats, and which round trips are exact.")
@click.pass_obj
def convert(
    settings: Settings,
    *,
    source: str | None,
    target: str | None,
    style: AdapterFormat | Literal["hf"] | None,
    base: str | None,
    dtype: ModelDtype,
    allow_approx: bool,
    allow_drop: tuple[str, ...],
    rank: int | None,
    alpha: float | None,
    rslora: bool,
    imatrix: str | None,
    unsafe_pickle: bool,
    model: str | None,
    force: bool,
    replace: bool,
    verbose: bool,
    listed: bool,
) -> None:
    """Convert an adapter to another format, and report the loss of every tensor.

    An adapter that `push` would refuse is refused here too, unless the conversion mends its errors or you pass --force.
    SRC is a folder, a file or a ref; DST appears whole or not at all, and must not exist unless you pass --replace. A DST
    that ends with .gguf, or with the suffix of a format that another package adds, needs no --to. What the format cannot
    express is refused by name, never dropped, unless you allow it: --allow-approx writes DoRA and whole weights as plain
    LoRA and reports the error (it needs the weights of --base); --allow-drop takes norms, biases, weights, rows,
    magnitudes, copies, embeddings, or names and patterns like 'lm_head*', separated by commas. `--to hf` turns a GGUF base
    model into a Hugging Face folder, and `--to gguf` a whole Hugging Face model into a GGUF, which --dtype may quantize: to
    one type such as q4_k, or to a mixture such as q4_k_m, both as llama-quantize does.

    --list shows which formats are read and written, and which need a base. In its second table, a file of the row's format is
    converted to the column's format and back: = gives the same file byte for byte, ~ the same function in other numbers, - is
    not possible.
    """
    if listed:
        if source:
            raise UsageError("--list", "converts nothing", "Leave out SRC and DST", code="conflicting-options")
        from adapterhub.cli.views.format_table import show_formats

        show_formats(as_json=settings.as_json, verbose=verbose)
        return
    if source is None or target is None:
        hint = "See `adapterhub convert --help`"
        raise UsageError("convert", f"Missing argument '{'DST' if source else 'SRC'}'", hint)
    from adapterhub_converters import bases

    style = style or _format_of_name(target)
    # A whole model has options of its own; those of an adapter would be ignored silently.
    if style == "hf" or (style == "gguf" and bases.is_model(Path(source))):
        adapters_only = {"base": base, "allow-approx": allow_approx, "allow-drop": allow_drop, "rank": rank, "alpha": alpha}
        adapters_only |= {"rslora": rslora, "unsafe-pickle": unsafe_pickle, "model": model, "force": force}
        _check_model_options(style, adapters_only, imatrix)
        _convert_model(settings, source, target, "hf" if style == "hf" else "gguf", dtype, imatrix=imatrix, replace=replace)
        return
    if imatrix or dtype not in formats.DTYPES:
        name = "--imatrix" if imatrix else f"--dtype {dtype}"
        raise UsageError(name, "is for whole models, and SRC is an adapter", "Leave it out", code="conflicting-options")
    from adapterhub.operations import convert as convert_operation

    spec = inputs.read_base(base, settings) if base else None
    report = convert_operation.convert(
        source,
        target,
        to=style,
        base=spec,
        dtype=dtype,
        allow_approx=allow_approx,
        allow_drop=split_drops(allow_drop),
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        unsafe_pickle=unsafe_pickle,
        model=model,
        replace=replace,
        force=force,
        workspace=workspace(settings),
    )
    run_command = runtime_commands.adapter_command(style, Path(target), spec)
    document = {"source": source, "target": target, "format": style, "run": run_command, **conversion_report.document(report)}

    def text() -> None:
        output.write(f"{target}: {conversion_report.summary(report)}")
        conversion_report.write(report, output.write, verbose=verbose)
        if run_command:
            output.say(f"run it: {run_command}", whole=True)

    output.emit(document, as_json=settings.as_json, text=text)


def _format_of_name(target: str) -> formats.InstalledFormat:
    """Return the format that the suffix of a file implies: GGUF, or one of another package. Others share theirs."""
    if implied := formats.format_of_suffix(Path(target).suffix.lower()):
        return formats.InstalledFormat(implied)
    choices = ", ".join((*formats.names(), *formats.MODELS))
    raise UsageError("--to", "is required unless DST ends with .gguf", f"Choose from: {choices}")


def _check_model_options(style: str, adapters_only: Mapping[str, object], imatrix: str | None) -> None:
    """Raise UsageError for an option that does not apply to a whole model; `adapters_only` has those of adapters by name."""
    adapter_option = next((name for name, value in adapters_only.items() if value and style == "gguf"), None)
    if adapter_option:
        raise UsageError(
            f"--{adapter_option}", "is for adapters, and SRC is a whole model", "Leave it out", code="conflicting-options"
        )
    if style == "hf" and imatrix:
        raise UsageError(
            "--imatrix", "is for a quantized GGUF, and the result is a folder", "Leave it out", code="conflicting-options"
        )


def _convert_model(
    settings: Settings,
    source: str,
    target: str,
    style: Literal["gguf", "hf"],
    dtype: ModelDtype,
    *,
    imatrix: str | None,
    replace: bool,
) -> None:
    from adapterhub.cli.views import model_merge_report
    from adapterhub.operations.base_models import convert_model

    model = convert_model(
        source, target, to=style, dtype=dtype, imatrix=imatrix, replace=replace, workspace=workspace(settings)
    )
    run_command = runtime_commands.model_command(style, Path(target))
    document: dict[str, object] = {"source": source, "target": target, "format": style, "run": run_command}
    report = model.report
    document |= model_merge_report.document(report) if report else {"files": list(model.files), "size": model.size}

    def text() -> None:
        if report is not None:
            model_merge_report.text(report)
        else:
            output.write(f"{target}: {len(model.files)} files, {output.size(model.size)}")
        output.say(f"run it: {run_command}", whole=True)

    output.emit(document, as_json=settings.as_json, text=text)
