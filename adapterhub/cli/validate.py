"""`adapterhub validate`."""

from __future__ import annotations

import click

from . import sources
from .app import Settings, command

# Spelt out here so that help and completion need not import the checks (numpy); a test compares.
_FORMATS = ("text", "json", "sarif", "junit", "github")
_RUNTIMES = ("peft", "transformers", "vllm", "llama.cpp", "mlx", "sglang")


@command(
    "validate",
    short="Say all that is wrong with an adapter.",
    example="""
    adapterhub validate ./sql --base ./Qwen3-0.6B
    adapterhub validate team/sql:v2 --base base.gguf --for llama.cpp --format sarif > sql.sarif""",
)
@click.argument("source", metavar="SRC")
@click.option("--base", metavar="BASE", help="The model it is for: a Hugging Face folder or a .gguf file.")
@click.option(
    "--for",
    "runtimes",
    multiple=True,
    type=click.Choice(_RUNTIMES),
    help="Fail unless this runtime would apply it; repeatable.",
)
@click.option("--format", "style", type=click.Choice(_FORMATS), default="text", show_default=True, help="How to report.")
@click.option("--headers-only", is_flag=True, help="Read no values: misses NaNs and zeros, takes no time.")
@click.pass_obj
def validate(
    settings: Settings, *, source: str, base: str | None, runtimes: tuple[str, ...], style: str, headers_only: bool
) -> int:
    """Say all that is wrong with an adapter, alone or on a base.

    SRC is a folder, a file or a ref. Without --base its files and its own consistency are checked; with it also
    whether every tensor meets its module in the base, and the other way round. The table says what each runtime would do.
    Exits 0 when there is no error, 1 when there is one. The codes are in docs/validate.md.
    """
    from adapterhub import compat

    from . import output, reports

    spec = sources.read_base(base) if base else None
    with sources.opened(source, settings) as found:
        report = compat.check(found.path, base=spec, runtimes=runtimes, headers_only=headers_only, where=found.where)
    if settings.as_json:
        style = "json"
    rendered = reports.text(report, screen=output.width()) if style == "text" else reports.RENDERERS[style](report)
    output.write(rendered)
    return 0 if report.ok else 1
