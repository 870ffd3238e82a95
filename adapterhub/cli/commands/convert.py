"""`adapterhub convert`."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import (
    Settings,
    alpha_option,
    base_option,
    command,
    dropped,
    loss_options,
    model_option,
    rank_option,
    rslora_option,
    to_option,
)
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.views import fused, losses
from adapterhub_converters import formats
from adapterhub_converters.adapter_files import ADAPTER_CONFIG
from adapterhub_converters.errors import UsageError


@command(
    "convert",
    example="""
    adapterhub convert ./sql sql.gguf --to gguf --base ./Qwen3-0.6B
    adapterhub convert team/sql:v2 ./sql-mlx --to mlx
    adapterhub convert base.gguf ./base --to hf
    adapterhub convert ./Qwen3-0.6B qwen3.gguf --to gguf --dtype q8_0""",
)
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@to_option((*formats.names(), *formats.MODELS), required=True)
@base_option("needed by formats that require its names or shapes: a folder, a file or a URL.")
@loss_options
@rank_option("an approximation. [default: the adapter's]")
@alpha_option
@rslora_option
@click.option("--unsafe-pickle", is_flag=True, help="Load a pickle, in a separate process with limits (needs torch).")
@model_option
@click.option("-v", "--verbose", is_flag=True, help="Print a line for every tensor.")
@click.pass_obj
def convert(
    settings: Settings,
    *,
    source: str,
    target: str,
    style: str,
    base: str | None,
    dtype: str,
    allow_approx: bool,
    allow_drop: tuple[str, ...],
    rank: int | None,
    alpha: float | None,
    rslora: bool,
    unsafe_pickle: bool,
    model: str | None,
    verbose: bool,
) -> None:
    """Convert an adapter to another format, and report the loss of every tensor.

    SRC is a folder, a file or a ref; DST must not exist, and appears whole or not at all. What the format cannot express is
    refused by name, never dropped, unless you allow it: --allow-approx writes DoRA and replaced weights as plain LoRA and
    reports the error (it needs the weights of --base); --allow-drop takes norms, biases, weights, rows, magnitudes, copies, or
    names and patterns like 'lm_head*', separated by commas. `--to hf` turns a GGUF base model into a Hugging Face folder, and
    `--to gguf` a whole Hugging Face model into a GGUF.
    """
    if style == "hf":
        _to_hf(settings, source, target)
        return
    if style == "gguf" and _is_model(Path(source)):
        meant = {"base": base, "allow-approx": allow_approx, "allow-drop": allow_drop, "rank": rank, "alpha": alpha}
        meant |= {"rslora": rslora, "unsafe-pickle": unsafe_pickle, "model": model}
        given = next((name for name, value in meant.items() if value), None)
        if given:
            raise UsageError(f"--{given}", "is for adapters, and SRC is a whole model", "Leave it out")
        _model_to_gguf(settings, Path(source), Path(target), dtype)
        return
    from adapterhub_converters.formats import convert as conversion
    from adapterhub_converters.formats.lossy import Allowed

    allowed = Allowed(approx=allow_approx, drop=dropped(allow_drop), rank=rank)
    spec = inputs.read_base(base, settings) if base else None
    with inputs.opened(source, settings) as found:
        report = conversion.convert(
            found.path,
            Path(target),
            to=style,
            base=spec,
            allowed=allowed,
            alpha=alpha,
            rslora=rslora,
            unsafe_pickle=unsafe_pickle,
            dtype=dtype,
            model=model or (inputs.here(base) if style == "ollama" else None),
        )
    document = {"source": source, "target": target, "format": style, **losses.document(report)}

    def text() -> None:
        output.write(f"{target}: {losses.summary(report)}")
        losses.write(report, output.write, verbose=verbose)

    output.emit(document, as_json=settings.as_json, text=text)


def _to_hf(settings: Settings, source: str, target: str) -> None:
    from adapterhub_converters.formats.gguf_model import to_folder

    path = inputs.existing(source)
    if path.is_dir():
        raise UsageError(source, "is a folder, and --to hf converts a GGUF base model", "Name the .gguf file")
    to_folder.to_hf(path, Path(target))
    files = sorted(item.name for item in Path(target).iterdir())
    size = sum(item.stat().st_size for item in Path(target).iterdir())
    text = f"{target}: {len(files)} files, {output.size(size)}"
    output.emit(
        {"source": source, "target": target, "format": "hf", "files": files, "size": size},
        as_json=settings.as_json,
        text=lambda: output.write(text),
    )


def _is_model(path: Path) -> bool:
    """True for a folder with a whole model and no adapter."""
    from adapterhub_converters import bases

    if not (path / "config.json").is_file() or (path / ADAPTER_CONFIG).exists():
        return False
    return bool(bases.weight_files(path))


def _model_to_gguf(settings: Settings, source: Path, target: Path, dtype: str) -> None:
    from adapterhub.merging import Options, prepared
    from adapterhub_converters.containers import atomic

    atomic.check_free(target, folder=False)
    floats = dtype if dtype in ("f32", "f16", "bf16") else None
    blocks = None if floats or dtype == "source" else dtype
    conversion = prepared([], source, Options(dtype=floats, requantize=blocks, dequantize=True), gguf=True)
    with bytes_bar("converting") as progress:
        report = conversion.write(target, progress)
    document = {"source": str(source), "target": str(target), "format": "gguf", **fused.document(report)}
    output.emit(document, as_json=settings.as_json, text=lambda: fused.text(report))
