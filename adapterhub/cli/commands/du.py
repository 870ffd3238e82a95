"""`adapterhub du`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Settings, base_option, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import bytes_bar

if TYPE_CHECKING:
    from adapterhub.maintenance.disk_usage import BaseUsage, Usage, UsageReport
    from adapterhub.registry.registry import Registry

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
@click.pass_obj
def du(settings: Settings, prefix: str | None, base: Sequence[str]) -> None:
    """Show disk usage: the files of versions, what shared files and packing save, and what is stored.

    PREFIX is a namespace or a name. Tensors that several files contain are counted too: `adapterhub pack` stores them once.
    The size of as many whole models is shown for bases added with `adapterhub base add` and those in --base.
    """
    from adapterhub.maintenance import disk_usage
    from adapterhub_converters.errors import NotFoundError

    models = [_model_of_option(text, settings) for text in base]
    with open_registry(settings) as registry:
        with bytes_bar("listing tensors") as progress:
            report = disk_usage.usage(registry, prefix, progress=progress)
        registered_models = _registered_models(registry)
    if prefix and not report.names:
        raise NotFoundError(prefix, "no adapter of this name or namespace", "Run `adapterhub list`")
    for model in models:
        if not any(model.fits(base) for base in report.bases):
            output.say(output.one_line(f"{model.location}: no version here was trained on it"))
    models += registered_models  # --base comes first
    output.emit(_document(report, models), as_json=settings.as_json, text=lambda: _usage_text(report, models))


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model to compare with: its path or name, its identity, the size of its weights in bytes."""

    location: str
    repo: str | None
    fingerprint: str | None
    size: int

    def fits(self, base: BaseUsage) -> bool:
        if base.fingerprint:
            return base.fingerprint == self.fingerprint
        return base.repo is not None and base.repo == self.repo


def _model_of_option(text: str, settings: Settings) -> _Model:
    """Return the model that --base names; raise UsageError if its size is unknown."""
    from adapterhub_converters.errors import UsageError

    spec = inputs.read_base(text, settings)
    if not spec.size:
        raise UsageError(text, "the weight files are missing, so their size is unknown", "Name a folder with weights")
    return _Model(text, spec.repo, spec.fingerprint, spec.size)


def _registered_models(registry: Registry) -> list[_Model]:
    """Return the registered bases with their sizes. Unreadable ones are ignored here; `fsck` reports them."""
    from adapterhub.bases import registered_bases

    specs = [(base.name, base.spec) for base in registered_bases.all_bases(registry)[0]]
    return [_Model(name, spec.repo, spec.fingerprint, spec.size) for name, spec in specs if spec.size]


def _whole_models_size(base: BaseUsage, models: Sequence[_Model]) -> int | None:
    """Return the size of the versions on a base as whole models; None if the size of the base is unknown."""
    size = next((model.size for model in models if model.fits(base)), None)
    return None if size is None else size * base.usage.versions


def _document(report: UsageReport, models: Sequence[_Model]) -> dict[str, Any]:
    return {
        "names": [{"name": usage.name, **_numbers(usage)} for usage in report.names],
        "bases": [
            {
                "repo": base.repo,
                "fingerprint": base.fingerprint,
                **_numbers(base.usage),
                "whole_models": _whole_models_size(base, models),
            }
            for base in report.bases
        ],
        "total": _numbers(report.total),
        "tensors": {"repeated": report.repeated, "unlisted": report.unlisted},
    }


def _numbers(usage: Usage) -> dict[str, int]:
    return {
        "versions": usage.versions,
        "adapters": usage.adapters,
        "files": usage.files,
        "shared": usage.shared_size,
        "distinct": usage.distinct,
        "saved": usage.saved_size,
        "stored": usage.stored,
    }


def _usage_text(report: UsageReport, models: Sequence[_Model]) -> None:
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
    repos = [base.repo for base in report.bases]
    for base in report.bases:
        distinction = (
            f" ({base.fingerprint[:_SHORT] if base.fingerprint else 'not pinned'})" if repos.count(base.repo) > 1 else ""
        )
        for line in output.wrap(_base_line(base, _whole_models_size(base, models), distinction), output.width(), indent=2):
            output.write(line)


def _cells(name: str, usage: Usage) -> list[str]:
    saved = [f"-{output.size(count)}" if count else "-" for count in (usage.shared_size, usage.saved_size)]
    return [name, str(usage.versions), output.size(usage.files), *saved, output.size(usage.stored)]


def _base_line(base: BaseUsage, whole_size: int | None, distinction: str) -> str:
    """Return the line of a base; `more` tells it from another of the same name."""
    usage = base.usage
    name = base.repo or (f"base {base.fingerprint[:_SHORT]}" if base.fingerprint else "no base recorded")
    count = f"{output.plural(usage.versions, 'version')} of {output.plural(usage.adapters, 'adapter')}"
    line = f"{name}{distinction if base.repo else ''}: {count} in {output.size(usage.stored)}"
    if whole_size is None:
        return line
    return f"{line}; as whole models {output.size(whole_size)}, {whole_size / max(1, usage.stored):,.0f} times as large"
