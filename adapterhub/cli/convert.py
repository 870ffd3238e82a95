"""`adapterhub convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import output, sources
from .app import Settings, command

if TYPE_CHECKING:
    from adapterhub_converters.adapter import LossReport

_FORMATS = ("peft", "gguf", "mlx", "hf")
_SHOWN = 5  # tensors of one loss that the text names


@command(
    "convert",
    short="Write an adapter in another format.",
    example="""
    adapterhub convert ./sql sql.gguf --to gguf --base ./Qwen3-0.6B
    adapterhub convert team/sql:v2 ./sql-mlx --to mlx
    adapterhub convert base.gguf ./base --to hf""",
)
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--to", "style", required=True, type=click.Choice(_FORMATS), help="The format to write.")
@click.option("--base", metavar="BASE", help="The model it is for, where names or shapes are needed: a folder or a .gguf file.")
@click.pass_obj
def convert(settings: Settings, source: str, target: str, style: str, base: str | None) -> None:
    """Write an adapter in another format, and say what became of every tensor.

    SRC is a folder, a file or a ref; DST must not be there yet, and appears whole or not at all. What the format cannot
    express is refused by name, never dropped. `--to hf` turns a GGUF base model into a Hugging Face folder.
    """
    if style == "hf":
        _to_hf(settings, source, target)
        return
    from adapterhub_converters import formats

    spec = sources.read_base(base) if base else None
    with sources.opened(source, settings) as found:
        report = formats.convert(found.path, Path(target), to=style, base=spec)
    document = {"source": source, "target": target, "format": style, **loss_document(report)}
    output.emit(document, as_json=settings.as_json, text=lambda: _text(target, report))


def _to_hf(settings: Settings, source: str, target: str) -> None:
    from adapterhub_converters import gguf_model

    path = sources.existing(source)
    gguf_model.to_hf(path, Path(target))
    files = sorted(item.name for item in Path(target).iterdir())
    size = sum(item.stat().st_size for item in Path(target).iterdir())
    text = f"{target}: {len(files)} files, {output.size(size)}"
    output.emit(
        {"source": source, "target": target, "format": "hf", "files": files, "size": size},
        as_json=settings.as_json,
        text=lambda: output.write(text),
    )


def _text(target: str, report: LossReport) -> None:
    output.write(f"{target}: {loss_line(report)}")
    write_losses(report, output.write)


def loss_document(report: LossReport) -> dict[str, object]:
    """A loss report with stable keys."""
    return {
        "worst": report.worst.name.lower(),
        "tensors": [{"name": line.name, "loss": line.loss.name.lower(), "note": line.note} for line in report.kept],
        "notes": list(report.notes),
    }


def loss_line(report: LossReport) -> str:
    """`420 tensors: 418 exact, 2 rounded`."""
    counts: dict[str, int] = {}
    for line in sorted(report.kept, key=lambda line: line.loss):
        counts[line.loss.name.lower()] = counts.get(line.loss.name.lower(), 0) + 1
    parts = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{output.plural(len(report.kept), 'tensor')}: {parts}"


def write_losses(report: LossReport, write: Callable[[str], None]) -> None:
    """A line for each tensor that is not exact, but not for hundreds of them, and the notes."""
    groups: dict[tuple[str, str], list[str]] = {}
    for line in report.kept:
        if line.loss > 0:
            groups.setdefault((line.loss.name.lower(), line.note), []).append(line.name)
    for (loss, note), names in groups.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        write(output.one_line(f"  {loss}: {', '.join(names[:_SHOWN])}{more}" + (f": {note}" if note else "")))
    for note in report.notes:
        write(output.one_line(f"  note: {note}"))
