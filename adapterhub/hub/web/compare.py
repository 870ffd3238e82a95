"""Two versions of an adapter, compared as functions where their weights are small enough to be read for a page."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import Row
from adapterhub.ref import Ref
from adapterhub_converters.errors import AdapterhubError, UsageError

from . import facts
from .adapters import Version, described, facts_of
from .site import Asked, Page, Site, answered, rendered

if TYPE_CHECKING:
    from adapterhub.analysis.diff import Difference, KeyChange, ModuleChange, TensorChange

_WAIT = 20.0  # seconds; what takes longer is there at the next visit
_MODULES = 40


@dataclass(frozen=True)
class FileChange:
    """A file that is not the same in both; a digest is empty where it is missing."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class ComparePage(Page):
    """The differences between two versions.

    Attributes:
        version: The newer one.
        before: The older one.
        rows: All versions, to choose from.
        files: Files that differ.
        numbers: Facts that differ: name to both values.
        functions: What they compute; or why that is not known.
    """

    version: Version
    before: Row
    rows: Sequence[Row]
    files: Sequence[FileChange]
    numbers: Mapping[str, tuple[object, object]]
    functions: Difference | str
    template: ClassVar[str] = "compare.html"

    @property
    def modules(self) -> list[ModuleChange]:
        """Modules that differ, those that changed most first."""
        from adapterhub.analysis.diff import CHANGED, REMOVED, ROUNDED, SAME

        if isinstance(self.functions, str):
            return []
        found = [module for module in self.functions.modules if module.status not in (SAME, ROUNDED)]
        found.sort(key=lambda module: (module.status == CHANGED, module.status == REMOVED, -(module.change or 0.0)))
        return found[:_MODULES]

    @property
    def others(self) -> list[TensorChange]:
        """Other tensors that differ."""
        from adapterhub.analysis.diff import ROUNDED, SAME

        found = () if isinstance(self.functions, str) else self.functions.tensors
        return [tensor for tensor in found if tensor.status not in (SAME, ROUNDED)][:_MODULES]

    @property
    def keys(self) -> list[KeyChange]:
        """Keys of the config, and conditions, that differ."""
        found = () if isinstance(self.functions, str) else (*self.functions.config, *self.functions.conditions)
        return list({one.key: one for one in found}.values())


async def compare_page(request: Request) -> Response:
    """GET …/compare?from=v1&to=v2."""
    found = await answered(request, lambda asked, worker: (asked, _by_documents(asked, worker)))
    if isinstance(found, Response):
        return found
    asked, page = found
    if not page.functions:
        work = asyncio.ensure_future(asked.site.slow.run(lambda worker: _functions(asked.site, worker, page)))
        try:
            functions = await asyncio.wait_for(asyncio.shield(work), _WAIT)
        except TimeoutError:
            functions = "that takes longer than a page may; look again in a minute"
        page = replace(page, functions=functions)
    return await asked.hub.workers.run(lambda _worker: rendered(asked, page))


def _by_documents(asked: Asked, worker: Worker) -> ComparePage:
    """The differences that manifests and documents show; `functions` is empty if the weights may be compared."""
    of = asked.repository(worker)
    after = worker.registry.row(Ref(of.name, number=_number(asked, "to") or (of.newest.number if of.newest else 1)))
    rows = queries.versions(worker.registry.index, name=of.name)
    older = next((row.number for row in rows if row.number < after.number), after.number)
    before = worker.registry.row(Ref(of.name, number=_number(asked, "from") or older))
    layers = [{layer.path: layer.digest for layer in worker.manifest(row).layers} for row in (before, after)]
    changed = [path for path in sorted({*layers[0], *layers[1]}) if layers[0].get(path) != layers[1].get(path)]
    files = [FileChange(path, layers[0].get(path, ""), layers[1].get(path, "")) for path in changed]
    names = ("base", "revision", "method", "r", "alpha", "format", "dtype", "parameters", "license", "size")
    numbers = {name: pair for name in names if (pair := (getattr(before, name), getattr(after, name)))[0] != pair[1]}
    reasons = [facts.unmeasured(facts_of(asked, worker, row), worker.manifest(row)) for row in (before, after)]
    why = next(filter(None, reasons), "")
    return ComparePage(described(worker, of, after), before, rows, files, numbers, why)


def _number(asked: Asked, key: str) -> int:
    text = asked.query(key).removeprefix("v")
    if text and not (text.isdecimal() and len(text) < 10):
        raise UsageError(asked.query(key)[:80], "is not the number of a version", "Write it like v2")
    return int(text or 0)


def _functions(site: Site, worker: Worker, page: ComparePage) -> Difference | str:
    from adapterhub.analysis import diff

    before, after = page.before, page.version.row

    def work() -> Difference | str:
        try:
            with facts.folder_of(worker, before) as one, facts.folder_of(worker, after) as other:
                return diff.diff(one, other)
        except AdapterhubError as error:
            return error.what

    return site.differences.get((before.digest, after.digest), work)
