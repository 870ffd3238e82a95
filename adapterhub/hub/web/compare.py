"""Compare two versions of an adapter, as functions if their weights are small enough to read for a page."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub.policy_gate import check_not_withdrawn
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import measurement
from adapterhub.ref import Ref
from adapterhub_converters.errors import AdapterhubError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import facts
from .adapter_pages import Version, facts_of, version_with_tags
from .site import Page, PageRequest, Site, answer_page, render_page

if TYPE_CHECKING:
    from adapterhub.analysis.diff_result import Difference, KeyChange, ModuleChange, TensorChange
    from adapterhub.evidence.paired_tests import PairedTests

_PATIENCE = 20.0  # seconds; a longer comparison is cached for the next visit
_MAX_MODULES = 40


@dataclass(frozen=True)
class FileChange:
    """A file that differs; a digest is empty if the file is missing."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class EvaluationChange:
    """An evaluation that both versions have, the older one first.

    Attributes:
        name: Its name.
        metrics: The metrics that both have.
        pair: The newer version against the older one, test by test; None if they ran no tests, or other ones.
    """

    name: str
    metrics: Mapping[str, tuple[float, float]]
    pair: PairedTests | None


@dataclass(frozen=True)
class ComparePage(Page):
    """The differences between two versions.

    Attributes:
        version: The newer version.
        before: The older version.
        rows: All versions, to choose from.
        files: Files that differ.
        numbers: Facts that differ: name to both values.
        evaluations: How they differ in what was measured of both.
        functions: The differences in what the versions compute; or why that is not known.
    """

    version: Version
    before: VersionRow
    rows: Sequence[VersionRow]
    files: Sequence[FileChange]
    numbers: Mapping[str, tuple[object, object]]
    evaluations: Sequence[EvaluationChange]
    functions: Difference | str
    template: ClassVar[str] = "compare.html"

    @property
    def modules(self) -> list[ModuleChange]:
        """Modules that differ, the most changed first."""
        from adapterhub.analysis.diff_result import CHANGED, REMOVED, ROUNDED, SAME

        if isinstance(self.functions, str):
            return []
        changed = [module for module in self.functions.modules if module.status not in (SAME, ROUNDED)]
        changed.sort(key=lambda module: (module.status == CHANGED, module.status == REMOVED, -(module.change or 0.0)))
        return changed[:_MAX_MODULES]

    @property
    def others(self) -> list[TensorChange]:
        """Tensors outside of modules that differ."""
        from adapterhub.analysis.diff_result import ROUNDED, SAME

        tensors = () if isinstance(self.functions, str) else self.functions.tensors
        return [tensor for tensor in tensors if tensor.status not in (SAME, ROUNDED)][:_MAX_MODULES]

    @property
    def keys(self) -> list[KeyChange]:
        """Keys of the config, and conditions, that differ."""
        changes = () if isinstance(self.functions, str) else (*self.functions.config, *self.functions.conditions)
        return list({change.key: change for change in changes}.values())


async def compare_page(request: Request) -> Response:
    """GET …/compare?from=v1&to=v2."""
    result = await answer_page(
        request, lambda page_request, worker: (page_request, _document_differences(page_request, worker))
    )
    if isinstance(result, Response):
        return result
    page_request, page = result
    if not page.functions:
        work = page_request.site.start_slowly(lambda worker: _function_differences(page_request.site, worker, page))
        functions: Difference | str
        try:
            # Shielded: the comparison goes on after the timeout, and the next visit finds it.
            functions = "too many comparisons wait; look again in a minute"
            if work is not None:
                functions = await asyncio.wait_for(asyncio.shield(work), _PATIENCE)
        except TimeoutError:
            functions = "that takes longer than a page may; look again in a minute"
        page = replace(page, functions=functions)
    # Rendering belongs in a thread, too: a page may list thousands of keys.
    return await page_request.hub.workers.run(lambda _worker: render_page(page_request, page))


def _document_differences(page_request: PageRequest, worker: Worker) -> ComparePage:
    """Return the differences in manifests and documents; `functions` is empty if the weights may be compared."""
    view = page_request.repository(worker)
    after = worker.registry.row(
        Ref(view.name, number=_number(page_request, "to") or (view.newest.number if view.newest else 1))
    )
    rows = queries.versions(worker.registry.index, name=view.name)
    older = next((row.number for row in rows if row.number < after.number), after.number)
    before = worker.registry.row(Ref(view.name, number=_number(page_request, "from") or older))
    for row in (before, after):
        check_not_withdrawn(worker, row)
    layers = [{layer.path: layer.digest for layer in worker.manifest(row).layers} for row in (before, after)]
    changed = [path for path in sorted({*layers[0], *layers[1]}) if layers[0].get(path) != layers[1].get(path)]
    files = [FileChange(path, layers[0].get(path, ""), layers[1].get(path, "")) for path in changed]
    names = ("base", "revision", "method", "r", "alpha", "format", "dtype", "parameters", "license", "size")
    shown = {**{name: name for name in names}, "r": "rank"}
    pairs = {name: (getattr(before, field), getattr(after, field)) for name, field in shown.items()}
    numbers = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    reasons = [facts.unmeasured_reason(facts_of(page_request, worker, row), worker.manifest(row)) for row in (before, after)]
    reason = next(filter(None, reasons), "")
    evaluations = _evaluation_changes(worker, before, after)
    return ComparePage(version_with_tags(worker, view, after), before, rows, files, numbers, evaluations, reason)


def _evaluation_changes(worker: Worker, before: VersionRow, after: VersionRow) -> list[EvaluationChange]:
    from adapterhub.evidence import paired_tests  # with the statistics, which most pages do without

    marks = queries.marks(worker.registry.index, "evaluate", after.name)
    earlier = {evaluation.name: evaluation for evaluation in measurement.evaluations_of(marks, before.number)}
    changes = []
    for evaluation in measurement.evaluations_of(marks, after.number):
        reference = earlier.get(evaluation.name)
        if reference is not None:
            metrics = {
                name: (reference.metrics[name], value)
                for name, value in evaluation.metrics.items()
                if name in reference.metrics
            }
            is_paired = evaluation.has_same_tests(reference)
            pair = paired_tests.compare_rates(evaluation.cases, reference.cases) if is_paired else None
            changes.append(EvaluationChange(evaluation.name, metrics, pair))
    return changes


def _number(page_request: PageRequest, key: str) -> int:
    text = page_request.query(key).removeprefix("v")
    if text and not (text.isdecimal() and len(text) < 10):
        raise UsageError(page_request.query(key)[:80], "is not the number of a version", "Write it like v2")
    return int(text or 0)


def _function_differences(site: Site, worker: Worker, page: ComparePage) -> Difference | str:
    from adapterhub.analysis import diff

    before, after = page.before, page.version.row

    def work() -> Difference | str:
        try:
            with facts.folder_of(worker, before) as before_folder, facts.folder_of(worker, after) as after_folder:
                return diff.diff(before_folder, after_folder)
        except AdapterhubError as error:
            return error.what

    return site.differences.get((before.digest, after.digest), work)
