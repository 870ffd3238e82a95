"""`adapterhub du`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import (
    open_registry,
)
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import bytes_bar
from adapterhub_converters.errors import AdapterhubError

if TYPE_CHECKING:
    from adapterhub.maintenance.disk_usage import BaseUsage, Report, Usage
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
    short="Say what versions take on the disk.",
    example="""
    adapterhub du
    adapterhub du team --base ./SmolLM2-135M""",
)
@click.argument("prefix", metavar="[PREFIX]", required=False)
@click.option(
    "--base", "bases", metavar="BASE", multiple=True, help="A model to compare with: what each version as a whole one takes."
)
@click.pass_obj
def du(settings: Settings, prefix: str | None, bases: Sequence[str]) -> None:
    """Say what versions take on the disk: their files, what equal files and packing save, what is left.

    How much of it is tensors that several files have is said as well: `pack` stores such once.

    PREFIX is a namespace or a name. What as many whole models would take is said of bases that `adapterhub base add` keeps, and
    of those named with --base, which is what validate takes.
    """
    from adapterhub.maintenance import disk_usage
    from adapterhub_converters.errors import NotFoundError

    known = [_known(base, settings) for base in bases]
    with open_registry(settings) as registry:
        with bytes_bar("listing tensors") as progress:
            report = disk_usage.usage(registry, prefix, progress=progress)
        kept = _kept(registry)
    if prefix and not report.names:
        raise NotFoundError(prefix, "no adapter of this name or namespace", "Run `adapterhub list`")
    for model in known:
        if not any(model.fits(base) for base in report.bases):
            output.say(output.one_line(f"{model.where}: no version here says that it was trained on this"))
    known += kept  # what was named comes first
    output.emit(_document(report, known), as_json=settings.as_json, text=lambda: _usage_text(report, known))


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model to compare with: where it is, what names it, bytes of its weights."""

    where: str
    repo: str | None
    fingerprint: str | None
    size: int

    def fits(self, base: BaseUsage) -> bool:
        if base.fingerprint:
            return base.fingerprint == self.fingerprint
        return base.repo is not None and base.repo == self.repo


def _known(text: str, settings: Settings) -> _Model:
    from adapterhub_converters.errors import UsageError

    spec = inputs.read_base(text, settings)
    if not spec.size:
        raise UsageError(text, "its weight files are not there, so their size is not known", "Name it with its weights")
    return _Model(text, spec.repo, spec.fingerprint, spec.size)


def _kept(registry: Registry) -> list[_Model]:
    """The bases that the registry knows by name, and their sizes; `fsck` speaks of those that can't be read."""
    from adapterhub.bases import registered

    found = []
    for name in registry.store.log.document_names():
        with contextlib.suppress(AdapterhubError):
            spec = registered.get(registry, name).spec
            found.append(_Model(name, spec.repo, spec.fingerprint, spec.size))
    return [model for model in found if model.size]


def _whole(base: BaseUsage, known: Sequence[_Model]) -> int | None:
    """What the versions on a base would take as whole models; None where nobody said how large one is."""
    size = next((model.size for model in known if model.fits(base)), None)
    return None if size is None else size * base.usage.versions


def _document(report: Report, known: Sequence[_Model]) -> dict[str, Any]:
    return {
        "names": [{"name": usage.name, **_numbers(usage)} for usage in report.names],
        "bases": [
            {"repo": base.repo, "fingerprint": base.fingerprint, **_numbers(base.usage), "whole_models": _whole(base, known)}
            for base in report.bases
        ],
        "total": _numbers(report.total),
        "tensors": {"repeated": report.repeated, "unlisted": report.unlisted},
    }


def _numbers(usage: Usage) -> dict[str, int]:
    return {key: getattr(usage, key) for key in ("versions", "adapters", "files", "shared", "distinct", "saved", "stored")}


def _usage_text(report: Report, known: Sequence[_Model]) -> None:
    if not report.names:
        output.say("no adapters yet; `adapterhub push SRC namespace/name` stores one")
        return
    rows = [_cells(usage.name, usage) for usage in report.names]
    if len(rows) > 1:
        rows.append(_cells("all", report.total))
    for line in output.table(_NAMES, rows, screen=output.width()):
        output.write(line)
    output.write()
    if report.repeated:
        output.write(f"tensors in files that differ otherwise: {output.size(report.repeated)} more than once")
    if report.unlisted:
        files = output.plural(report.unlisted, "file")
        output.say(f"the tensors of {files} are unknown, missing or damaged; `adapterhub fsck` shows which")
    for base in report.bases:
        for line in output.wrapped(_base_line(base, _whole(base, known)), output.width(), indent=2):
            output.write(line)


def _cells(name: str, usage: Usage) -> list[str]:
    saved = [f"-{output.size(count)}" if count else "-" for count in (usage.shared, usage.saved)]
    return [name, str(usage.versions), output.size(usage.files), *saved, output.size(usage.stored)]


def _base_line(base: BaseUsage, whole: int | None) -> str:
    usage = base.usage
    name = base.repo or (f"base {base.fingerprint[:_SHORT]}" if base.fingerprint else "no base recorded")
    count = f"{output.plural(usage.versions, 'version')} of {output.plural(usage.adapters, 'adapter')}"
    line = f"{name}: {count} in {output.size(usage.stored)}"
    if whole is None:
        return line
    return f"{line}; as whole models {output.size(whole)}, {whole / max(1, usage.stored):,.0f} times as much"
