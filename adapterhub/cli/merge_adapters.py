"""The merge of adapters into an adapter, shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub import combining, picture

from . import inputs, output
from .environment import workspace
from .options import Settings
from .views import merged

if TYPE_CHECKING:
    from adapterhub.manifest.document import Recipe
    from adapterhub.ref import Ref


def into_adapter(
    settings: Settings,
    found: Sequence[inputs.Source],
    weights: Sequence[float],
    target: Path | Ref,
    how: Recipe,
    *,
    plot: str | None = None,
    replace: bool = False,
) -> None:
    """Merge into a folder or a ref, and show the report."""
    from adapterhub_converters.containers import atomic

    if plot:
        picture.check()
        atomic.check_free(Path(plot), folder=False)
    made = combining.merge_adapters(found, weights, target, how, workspace(settings), replace=replace)
    where = str(made.version.ref if made.version else target)
    if plot:
        from .views import merge_plot

        merge_plot.draw(made.report, Path(plot), title=where)
    document = merged.document(where, made.version, made.report, made.manifest.to_dict()["parents"])
    text = merged.lines(where, made.manifest, made.report)
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_lines(text))
