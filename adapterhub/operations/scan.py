"""Scans of an adapter by path, ref or address: its files, and the norms of its weights among adapters of the same base.

The checks of files are in `adapterhub.checks.scan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters import display
from adapterhub_converters.errors import AdapterhubError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import source_names, sources
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.analysis.spectra import RankedSummary, SpectralSummaries
    from adapterhub.checks import Report
    from adapterhub.manifest.document import BaseInfo


@dataclass(frozen=True)
class Weights:
    """The norms of an adapter's weights compared with those of other adapters: numbers, without a verdict.

    Attributes:
        base: The name of the base whose adapters they are compared with; None if it is not known.
        population: The number of other adapters.
        kinds: The numbers of each kind of module, such as `self_attn.q_proj`, in all layers.
        modules: The numbers of each module.
        left_out: Modules without numbers, with the reason.
        missing: The reason why there are no numbers at all; empty if there are.
    """

    base: str | None = None
    population: int = 0
    kinds: tuple[RankedSummary, ...] = ()
    modules: tuple[RankedSummary, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True, repr=False)
class Scan:
    """The result of a scan.

    Attributes:
        report: The problems; its `ok` is about the codes of docs/scan.md alone.
        weights: The numbers of the weights.
    """

    report: Report
    weights: Weights

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {code}" for code, count in self.report.counted().items())
        return f"<Scan {self.report.where}: {counts or 'nothing found'}>"

    def _repr_html_(self) -> str:
        rows = [(problem.severity, problem.code, problem.where, problem.what) for problem in self.report.problems]
        return display.table(rows, head=("severity", "code", "where", "what"), caption=repr(self))


def scan(
    source: StrPath,
    *,
    weights: bool = True,
    strict: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Scan:
    """Scan an adapter for what could run code or mislead; nothing in it is run or loaded.

    Args:
        source: A folder, a file, a ref or an address; a folder or a file need not be an adapter.
        weights: Read the weights for their numbers, and compare these with those of the registry's adapters of the same base.
        strict: Let warnings fail it as errors do.
        limit: The most problems of each code to list; the report counts all. None lists all.
        progress: Called with modules done and modules in all.
        workspace: Where names are looked up.

    Example:
        >>> result = ah.scan("./sql")
        >>> result.report.problems
        ()
        >>> result.weights.kinds[0].name, result.weights.kinds[0].modules, result.weights.kinds[0].percentiles
        ('self_attn.q_proj', 2, None)
    """
    workspace = (workspace or Workspace()).with_progress(progress)
    from adapterhub.checks.scan import scan as scan_files

    with _open_files(source, workspace) as (path, label, name):
        report = replace(scan_files(path, display_name=label, limit=limit), strict=strict)
        if not weights:
            return Scan(report, Weights(missing="not asked for"))
        try:
            return Scan(report, _rank_weights(path, workspace, name))
        except AdapterhubError as error:
            return Scan(report, Weights(missing=error.what))


@contextmanager
def _open_files(source: StrPath, workspace: Workspace) -> Iterator[tuple[Path, str, str]]:
    """Yield the folder or file, its name for messages, and its name in the registry (empty for a path)."""
    # A path is scanned as it is, whatever it contains; only a ref or an address must be an adapter to be read.
    path = None if source_names.is_address(source) else source_names.resolve(source, workspace)[0]
    if path is not None:
        yield path, str(source), ""
        return
    with sources.open_source(source, workspace, for_report=True) as adapter_source:
        yield adapter_source.folder, adapter_source.location, (adapter_source.ref or "").partition(":")[0].partition("@")[0]


def _rank_weights(path: Path, workspace: Workspace, name: str) -> Weights:
    from adapterhub.analysis import spectra
    from adapterhub.manifest.document import AdapterManifest, BaseInfo
    from adapterhub_converters.adapter_files import resolve_adapter
    from adapterhub_converters.formats import convert

    adapter = convert.read(resolve_adapter(path))
    with workspace.steps("computing norms") as progress:
        spectra_, left_out = spectra.spectra(adapter, progress=progress)
    manifest = AdapterManifest.read(path if path.is_dir() else path.parent)
    base = manifest.base if manifest else BaseInfo(adapter.meta.base_model)
    other_spectra = _other_spectra(workspace, base, name, spectra_)
    kinds, modules = spectra.rank_among(spectra_, other_spectra)
    return Weights(base.repo, len(other_spectra), tuple(kinds), tuple(modules), left_out)


def _other_spectra(workspace: Workspace, base: BaseInfo, name: str, own_spectra: SpectralSummaries) -> list[SpectralSummaries]:
    """Return the numbers of other adapters, leaving out the same adapter under another name."""
    from adapterhub.registry import spectra_cache

    try:
        with workspace.open_registry() as registry:
            return [other for other in spectra_cache.spectra_on_base(registry, base, without=name) if other != own_spectra]
    except NotFoundError:  # no registry
        return []
