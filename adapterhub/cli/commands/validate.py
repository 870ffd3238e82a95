"""`adapterhub validate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from adapterhub.cli import environment, inputs
from adapterhub.cli.options import Choice, Settings, base_option, command, headers_only_option, max_rank_option
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import remote_option, source_at_remote
from adapterhub_converters.adapter_files import adapters_at
from adapterhub_converters.errors import AdapterhubError, UsageError
from adapterhub_converters.runtime_rules import RUNTIMES, RuntimeName

if TYPE_CHECKING:
    from adapterhub.checks import Report

# Written out here so that help and completion need not import the checks (numpy); tests compare.
_FORMATS = ("text", "json", "sarif", "junit", "github", "markdown")


def _files(_context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return the path of each format in `FORMAT=PATH`."""
    paths = {}
    for text in values:
        style, equals, path = text.partition("=")
        if style not in _FORMATS[1:] or not equals or not path:
            raise UsageError("--output-file", f"{text[:80]!r} is not FORMAT=PATH", f"Formats: {', '.join(_FORMATS[1:])}")
        paths[style] = path
    return paths


@command(
    "validate",
    example="""
    adapterhub validate ./sql --base ./Qwen3-0.6B
    adapterhub validate ./sql --base hf://Qwen/Qwen3-0.6B
    adapterhub validate adapters --strict --ignore left-out
    adapterhub validate team/sql:v2 --base base.gguf --for llama.cpp --output-file sarif=sql.sarif""",
)
@click.argument("given", metavar="SRC...", nargs=-1, required=True)
@base_option("check names, shapes and identity against it: a folder, a file, hf://org/model or a URL.")
@click.option(
    "--for",
    "runtimes",
    multiple=True,
    type=Choice(tuple(RUNTIMES)),
    help="Runtime that must apply the adapter, or the check fails; repeatable.",
)
@click.option("--format", "style", type=Choice(_FORMATS), default="text", show_default=True, help="Report format.")
@click.option(
    "--output-file",
    "files",
    metavar="FORMAT=PATH",
    multiple=True,
    callback=_files,
    help="Also write the report to a file; repeatable.",
)
@max_rank_option("fail above it, like vLLM's --max-lora-rank.")
@click.option("--strict/--no-strict", default=None, help="Fail on warnings too.")
@click.option("--ignore", metavar="CODE", multiple=True, help="Count problems of this code, but ignore them; repeatable.")
@click.option("-v", "--verbose", is_flag=True, help="Print a report for every adapter, not only for those with problems.")
@headers_only_option("fast, but misses NaNs and zeros.")
@remote_option
@click.pass_obj
def validate(
    settings: Settings,
    *,
    given: tuple[str, ...],
    base: str | None,
    runtimes: tuple[RuntimeName, ...],
    style: str,
    files: Mapping[str, str],
    max_rank: int | None,
    strict: bool | None,
    ignore: tuple[str, ...],
    verbose: bool,
    headers_only: bool,
    remote: str | None,
) -> int:
    """Check adapters for problems, alone or against a base.

    SRC is a folder, a file, a ref or an address; a folder of adapters means all of them. Without --base the files and
    their consistency are checked; with it also that every tensor fits its module in the base, and vice versa. The table shows
    what each runtime does with the adapter. The table [validate] of adapterhub.toml has defaults for these options.
    Exits 0 without errors, else 1. `adapterhub explain CODE` explains a code.
    """
    from adapterhub.checks import check_codes
    from adapterhub.cli import output
    from adapterhub.cli.views import report_documents, reports
    from adapterhub.operations.check import check
    from adapterhub_converters.containers import json_file

    check_codes(ignore)
    style = "json" if settings.as_json else style
    command_workspace, project = workspace(settings), environment.project()
    rules = environment.validation(project) if project else None
    if project and base is None:
        base = command_workspace.admitted_base(project)
    spec = inputs.read_base(base, settings, notes=False) if base else None
    finished, failed = _check_all(
        _adapters([source_at_remote(text, remote) for text in given]),
        partial(
            check,
            base=spec,
            # `environment.validation` has refused every other name.
            runtimes=runtimes or (cast("tuple[RuntimeName, ...]", rules.runtimes) if rules else ()),
            max_rank=max_rank or (rules.max_rank if rules else None),
            headers_only=headers_only,
            strict=strict if strict is not None else bool(rules and rules.strict),
            ignore=(*ignore, *(rules.ignore if rules else ())),
            limit=reports.SHOWN,
            workspace=command_workspace,
        ),
    )
    for written, path in files.items():
        json_file.write_text(Path(path), report_documents.RENDERERS[written](finished) + "\n")
    if style == "text":
        output.write_lines(reports.lines(finished, screen=output.width(), verbose=verbose))
        if output.is_terminal() and any(report.problems for report in finished):
            output.write(output.color("`adapterhub explain CODE` explains a code", "dim"))
    else:
        output.write_document(report_documents.RENDERERS[style](finished))
    return _exit_code(finished, failed)


def _check_all(sources: Sequence[str], check_source: Callable[[str], Report]) -> tuple[list[Report], list[AdapterhubError]]:
    """Return the reports of all adapters, and the errors of those that could not be opened; one alone raises its error."""
    from adapterhub.checks import Problem, Report

    finished, failed = list[Report](), list[AdapterhubError]()
    for source in sources:
        try:
            report = check_source(source)
        except AdapterhubError as error:
            if len(sources) == 1:
                raise
            # Among several adapters, an error is a problem in a report, so that the others are still checked.
            failed.append(error)
            code = error.code if error.code == "whole-model" else "no-adapter"
            report = Report(source, None, None, (Problem(code, "", "", error.what, error.hint, cause=error),))
        finished.append(report)
    return finished, failed


def _exit_code(finished: Sequence[Report], failed: Sequence[AdapterhubError]) -> int:
    """Return 1 if a check found errors, else the code of the first adapter that could not be opened, else 0."""
    if sum(not report.ok for report in finished) > len(failed):
        return 1
    return failed[0].exit_code if failed else 0


def _adapters(texts: Iterable[str]) -> list[str]:
    """Return each adapter once: a folder may have several, and a hook may pass two changed files of one adapter."""
    adapters: dict[str, None] = {}
    for text in texts:
        path = Path(text)
        for adapter in adapters_at(path):
            adapters[text if adapter == path else str(adapter)] = None
    return list(adapters)
