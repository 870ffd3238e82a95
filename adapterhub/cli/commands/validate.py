"""`adapterhub validate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from adapterhub.cli import inputs
from adapterhub.cli.options import Settings, command
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON, MLX_WEIGHTS, PEFT_WEIGHTS

# Spelled out here so that help and completion need not import the checks (numpy); a test compares.
_FORMATS = ("text", "json", "sarif", "junit", "github")
_RUNTIMES = ("peft", "transformers", "vllm", "llama.cpp", "mlx", "sglang")
# Files of an adapter that is a folder (peft, mlx-lm).
_PARTS = (ADAPTER_CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS, ADAPTER_JSON)


@command(
    "validate",
    short="Say all that is wrong with adapters.",
    example="""
    adapterhub validate ./sql --base ./Qwen3-0.6B
    adapterhub validate ./sql --base hf://Qwen/Qwen3-0.6B
    adapterhub validate adapters/* --strict
    adapterhub validate team/sql:v2 --base base.gguf --for llama.cpp --format sarif > sql.sarif""",
)
@click.argument("given", metavar="SRC...", nargs=-1, required=True)
@click.option("--base", metavar="BASE", help="The model it is for: a folder, a file, hf://org/model or a URL.")
@click.option(
    "--for",
    "runtimes",
    multiple=True,
    type=click.Choice(_RUNTIMES),
    help="Fail unless this runtime would apply it; repeatable.",
)
@click.option("--format", "style", type=click.Choice(_FORMATS), default="text", show_default=True, help="How to report.")
@click.option("--max-rank", type=click.IntRange(min=1), metavar="N", help="Fail on a rank above N, as vLLM's --max-lora-rank.")
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
@click.option("--headers-only", is_flag=True, help="Read no values: misses NaNs and zeros, takes no time.")
@click.pass_obj
def validate(
    settings: Settings,
    *,
    given: tuple[str, ...],
    base: str | None,
    runtimes: tuple[str, ...],
    style: str,
    max_rank: int | None,
    strict: bool,
    headers_only: bool,
) -> int:
    """Say all that is wrong with adapters, alone or on a base.

    SRC is a folder, a file or a ref. Without --base its files and its own consistency are checked; with it also
    whether every tensor meets its module in the base, and the other way round. The table says what each runtime would do.
    Exits 0 when there is no error, 1 when there is one. The codes are in docs/validate.md.
    """
    from adapterhub import check
    from adapterhub.cli import output
    from adapterhub.cli.views import reports

    spec = inputs.read_base(base, settings, notes=False) if base else None
    done = []
    for source in _adapters(given):
        with inputs.opened(source, settings) as found:
            report = check.check(
                found.path,
                base=spec,
                runtimes=runtimes,
                max_rank=max_rank,
                headers_only=headers_only,
                strict=strict,
                where=found.where,
            )
        done.append(report)
    if settings.as_json:
        style = "json"
    output.write(reports.text(done, screen=output.width()) if style == "text" else reports.RENDERERS[style](done))
    return 0 if all(report.ok for report in done) else 1


def _adapters(given: Iterable[str]) -> list[str]:
    """Each adapter once: hooks name the files that changed, and two may be of one folder."""
    folders = {
        text: str(Path(text).parent)
        for text in given
        if Path(text).name in _PARTS and (Path(text).parent / ADAPTER_CONFIG).is_file()
    }
    return list(dict.fromkeys(folders.get(text, text) for text in given))
