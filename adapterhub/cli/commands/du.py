"""`adapterhub du`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from adapterhub.cli import catalogs, inputs, output
from adapterhub.cli.options import Settings, base_option, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.remote_choice import remote_option
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.maintenance.disk_usage import BaseUsage, Usage, UsageReport
    from adapterhub.remotes.catalog import SizedModel

_SHORT = 12 + len("sha256:")

_NAMES = (
    Column("NAME"),
    Column("VERSIONS", right=True),
    Column("FILES", right=True),
    Column("SHARED", right=True, drop=2),
    Column("PACKED", right=True, drop=1),
    Column("STORED", right=True),
)


@command(
    "du",
    example="""
    adapterhub du
    adapterhub du team --base ./SmolLM2-135M""",
)
@click.argument("prefix", metavar="[PREFIX]", required=False)
@base_option("compare with whole models of this size; repeatable.", multiple=True)
@remote_option
@click.pass_obj
def du(settings: Settings, prefix: str | None, base: Sequence[str], remote: str | None) -> None:
    """Show disk usage: the files of versions, what shared files and packing save, and what is stored.

    PREFIX is a namespace or a name, of a hub of adapterhub with --remote. Tensors that several files contain are counted too:
    `adapterhub pack` stores them once. The size of as many whole models is shown for bases added with `adapterhub base add`
    and those in --base.
    """
    from adapterhub.remotes.content_documents import usage_document

    models = [_model_of_option(text, settings) for text in base]
    with catalogs.catalog_below(settings, prefix, remote, "record of disk usage") as (catalog, prefix_there):
        usage = catalog.usage(prefix_there, bytes_bar)
        report = usage.report
        if prefix_there and not report.names:
            raise catalogs.no_such_prefix(catalog, prefix_there)
    for model in models:
        if not any(model.fits(base) for base in report.bases):
            output.say(output.one_line(f"{model.location}: no version here was trained on it"))
    models += usage.models  # --base comes first
    document = usage_document(replace(usage, models=models))
    output.emit(document, as_json=settings.as_json, text=lambda: _usage_text(report, models))


def _model_of_option(text: str, settings: Settings) -> SizedModel:
    """Return the model that --base names; raise UsageError if its size is unknown."""
    from adapterhub.remotes.catalog import SizedModel

    spec = inputs.read_base(text, settings)
    if not spec.size:
        raise UsageError(text, "the weight files are missing, so their size is unknown", "Name a folder with weights")
    return SizedModel(text, spec.repo, spec.fingerprint, spec.size)


def _usage_text(report: UsageReport, models: Sequence[SizedModel]) -> None:
    if not report.names:
        output.say("no adapters yet; store one with `adapterhub push SRC namespace/name`")
        return
    rows = [_cells(usage.name, usage) for usage in report.names]
    if len(rows) > 1:
        # The sum is not that of the rows: names can share files.
        rows.append(_cells("all", report.total))
    output.write_table(_NAMES, rows)
    output.write()
    if report.repeated:
        output.write(f"repeated tensors in different files: {output.size(report.repeated)}")
    if report.unlisted:
        files = output.plural(report.unlisted, "file")
        output.say(f"the tensors of {files} are unknown, missing or damaged; `adapterhub fsck` shows which")
    from adapterhub.remotes.content_documents import whole_models_size

    repos = [base.repo for base in report.bases]
    for base in report.bases:
        distinction = (
            f" ({base.fingerprint[:_SHORT] if base.fingerprint else 'not pinned'})" if repos.count(base.repo) > 1 else ""
        )
        for line in output.wrap(_base_line(base, whole_models_size(base, models), distinction), output.width(), indent=2):
            output.write(line)


def _cells(name: str, usage: Usage) -> list[str]:
    saved = [f"-{output.size(count)}" if count else "-" for count in (usage.shared_size, usage.saved_size)]
    return [name, str(usage.versions), output.size(usage.files), *saved, output.size(usage.stored)]


def _base_line(base: BaseUsage, whole_size: int | None, distinction: str) -> str:
    """Return the line of a base; `distinction` tells it from another of the same name."""
    usage = base.usage
    name = base.repo or (f"base {base.fingerprint[:_SHORT]}" if base.fingerprint else "no base recorded")
    count = f"{output.plural(usage.versions, 'version')} of {output.plural(usage.adapters, 'adapter')}"
    line = f"{name}{distinction if base.repo else ''}: {count} in {output.size(usage.stored)}"
    if whole_size is None:
        return line
    return f"{line}; as whole models {output.size(whole_size)}, {whole_size / max(1, usage.stored):,.0f} times as large"
