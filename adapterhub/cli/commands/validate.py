"""`adapterhub validate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from adapterhub.cli import inputs
from adapterhub.cli.environment import on_remote, remote_option, workspace
from adapterhub.cli.options import Settings, base_option, command, headers_only_option, max_rank_option
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON, MLX_WEIGHTS, PEFT_WEIGHTS

# Spelled out here so that help and completion need not import the checks (numpy); tests compare.
_FORMATS = ("text", "json", "sarif", "junit", "github")
_RUNTIMES = ("peft", "transformers", "vllm", "llama.cpp", "mlx", "sglang")
# Files of an adapter folder (PEFT, mlx-lm).
_PARTS = (ADAPTER_CONFIG, PEFT_WEIGHTS, MLX_WEIGHTS, ADAPTER_JSON)


@command(
    "validate",
    example="""
    adapterhub validate ./sql --base ./Qwen3-0.6B
    adapterhub validate ./sql --base hf://Qwen/Qwen3-0.6B
    adapterhub validate adapters/* --strict
    adapterhub validate team/sql:v2 --base base.gguf --for llama.cpp --format sarif > sql.sarif""",
)
@click.argument("given", metavar="SRC...", nargs=-1, required=True)
@base_option("check names, shapes and identity against it: a folder, a file, hf://org/model or a URL.")
@click.option(
    "--for",
    "runtimes",
    multiple=True,
    type=click.Choice(_RUNTIMES),
    help="Fail unless this runtime can apply the adapter; repeatable.",
)
@click.option("--format", "style", type=click.Choice(_FORMATS), default="text", show_default=True, help="Report format.")
@max_rank_option("fail above it, like vLLM's --max-lora-rank.")
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
@headers_only_option("fast, but misses NaNs and zeros.")
@remote_option
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
    remote: str | None,
) -> int:
    """Check adapters for problems, alone or against a base.

    SRC is a folder, a file, a ref or an address. Without --base the files and their consistency are checked; with it also that
    every tensor fits its module in the base, and vice versa. The table shows what each runtime does with the adapter. Exits 0
    without errors, else 1. docs/validate.md lists the codes.
    """
    from adapterhub import api
    from adapterhub.cli import output
    from adapterhub.cli.views import reports

    style = "json" if settings.as_json else style
    spec = inputs.read_base(base, settings, notes=False) if base else None
    here = workspace(settings)
    done = [
        api.check(
            source,
            base=spec,
            runtimes=runtimes,
            max_rank=max_rank,
            headers_only=headers_only,
            strict=strict,
            limit=reports.SHOWN if style == "text" else None,
            workspace=here,
        )
        for source in _adapters([on_remote(text, remote) for text in given])
    ]
    if style == "text":
        output.write_lines(reports.lines(done, screen=output.width()))
    else:
        output.write_document(reports.RENDERERS[style](done))
    return 0 if all(report.ok for report in done) else 1


def _adapters(given: Iterable[str]) -> list[str]:
    """Each adapter once: hooks pass the files that changed, and two may belong to one folder."""
    folders = {
        text: str(Path(text).parent)
        for text in given
        if Path(text).name in _PARTS and (Path(text).parent / ADAPTER_CONFIG).is_file()
    }
    return list(dict.fromkeys(folders.get(text, text) for text in given))
