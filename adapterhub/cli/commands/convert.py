"""`adapterhub convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import DTYPES, FORMATS, Settings, command
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.views import fused, losses
from adapterhub_converters.adapter_files import ADAPTER_CONFIG
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub_converters.adapter import LossReport


@command(
    "convert",
    short="Write an adapter in another format.",
    example="""
    adapterhub convert ./sql sql.gguf --to gguf --base ./Qwen3-0.6B
    adapterhub convert team/sql:v2 ./sql-mlx --to mlx
    adapterhub convert base.gguf ./base --to hf
    adapterhub convert ./Qwen3-0.6B qwen3.gguf --to gguf --dtype q8_0""",
)
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--to", "style", required=True, type=click.Choice((*FORMATS, "ollama", "hf")), help="The format to write.")
@click.option(
    "--base", metavar="BASE", help="The model it is for, where names or shapes are needed: a folder, a file or a URL."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="source", help="What a GGUF stores its numbers as.")
@click.option("--allow-approx", is_flag=True, help="Replace deltas the format cannot say by the nearest of low rank.")
@click.option("--allow-drop", metavar="WHAT", multiple=True, help="Leave out norms, biases, weights, rows, … or names.")
@click.option("--rank", type=click.IntRange(1), help="The rank of an approximation; by default the adapter's own.")
@click.option("--alpha", type=float, help="The alpha of a lone .safetensors file that doesn't say it.")
@click.option("--rslora", is_flag=True, help="… and that it scales by alpha / sqrt(r).")
@click.option("--unsafe-pickle", is_flag=True, help="Take a pickle, loaded in a process of its own under limits (needs torch).")
@click.option("--from", "model", metavar="MODEL", help="What Ollama calls the base, with --to ollama; else the path of --base.")
@click.option("-v", "--verbose", is_flag=True, help="A line for every tensor.")
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
    """Write an adapter in another format, and say what became of every tensor.

    SRC is a folder, a file or a ref; DST must not be there yet, and appears whole or not at all. What the format cannot
    express is refused by name, never dropped, unless you allow it: --allow-approx writes DoRA and replaced weights as plain
    LoRA and says how far off that is (it needs the weights of --base); --allow-drop takes norms, biases, weights, rows,
    magnitudes, copies, or names and patterns like 'lm_head*', with commas between. `--to hf` turns a GGUF base model into a
    Hugging Face folder, and `--to gguf` a whole Hugging Face model into a GGUF.
    """
    if style == "hf":
        _to_hf(settings, source, target)
        return
    if style == "gguf" and _is_model(Path(source)):
        meant = {"base": base, "allow-approx": allow_approx, "allow-drop": allow_drop, "rank": rank, "alpha": alpha}
        _refuse({**meant, "rslora": rslora, "unsafe-pickle": unsafe_pickle, "from": model})
        _model_to_gguf(settings, Path(source), Path(target), dtype)
        return
    from adapterhub_converters.formats import convert as formats
    from adapterhub_converters.formats.lossy import Allowed

    words = [word.strip() for given in allow_drop for word in given.split(",") if word.strip()]
    allowed = Allowed(approx=allow_approx, drop=words, rank=rank)
    spec = inputs.read_base(base, settings) if base else None
    with inputs.opened(source, settings) as found:
        report = formats.convert(
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
    document = {"source": source, "target": target, "format": style, **losses.loss_document(report)}
    output.emit(document, as_json=settings.as_json, text=lambda: _text(target, report, verbose=verbose))


def _to_hf(settings: Settings, source: str, target: str) -> None:
    from adapterhub_converters.formats.gguf_model import to_folder

    path = inputs.existing(source)
    if path.is_dir():
        raise UsageError(source, "is a folder, and --to hf makes one of a GGUF base model", "Name the .gguf file")
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
    """Whether a folder has a whole model in it, and no adapter."""
    from adapterhub_converters import bases

    if not (path / "config.json").is_file() or (path / ADAPTER_CONFIG).exists():
        return False
    return bool(bases.weight_files(path))


def _refuse(options: Mapping[str, object]) -> None:
    given = next((name for name, value in options.items() if value), None)
    if given:
        raise UsageError(f"--{given}", "is for adapters, and SRC is a whole model", "Leave it out")


def _model_to_gguf(settings: Settings, source: Path, target: Path, dtype: str) -> None:
    from adapterhub.merge import Options, prepared
    from adapterhub_converters.containers import atomic

    atomic.check_free(target, folder=False)
    floats = dtype if dtype in ("f32", "f16", "bf16") else None
    blocks = None if floats or dtype == "source" else dtype
    conversion = prepared([], source, Options(dtype=floats, requantize=blocks, dequantize=True), gguf=True)
    with bytes_bar("converting") as progress:
        report = conversion.write(target, progress)
    document = {"source": str(source), "target": str(target), "format": "gguf", **fused.document(report)}
    output.emit(document, as_json=settings.as_json, text=lambda: fused.text(report))


def _text(target: str, report: LossReport, *, verbose: bool) -> None:
    output.write(f"{target}: {losses.loss_line(report)}")
    losses.write_losses(report, output.write, verbose=verbose)
