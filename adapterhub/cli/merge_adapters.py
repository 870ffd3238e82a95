"""The command's merge of adapters into an adapter, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub import picture
from adapterhub.operations import merge

from . import inputs, output
from .options import Settings
from .registry_choice import workspace
from .views import merge_report

if TYPE_CHECKING:
    from adapterhub.manifest.document import Recipe
    from adapterhub.ref import Ref


def merge_into_adapter(
    settings: Settings,
    adapters: Sequence[inputs.Source],
    weights: Sequence[float],
    target: Path | Ref,
    recipe: Recipe,
    *,
    plot: str | None = None,
    replace: bool = False,
) -> None:
    """Merge adapters into a folder or a ref, and show the report."""
    from adapterhub_converters.containers import atomic

    # Fail before the merge if the picture cannot be drawn or written after it.
    if plot:
        picture.check()
        atomic.check_free(Path(plot), folder=False)
    result = merge.merge_adapters(adapters, weights, target, recipe, workspace(settings), replace=replace)
    label = str(result.version.ref if result.version else target)
    if plot:
        from .views import merge_plot

        merge_plot.draw(result.report, Path(plot), title=label)
    document = merge_report.document(label, result.version, result.report, result.manifest.to_dict()["parents"])
    text = merge_report.lines(label, result.manifest, result.report)
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_lines(text))
