"""The norms of an adapter by layer and kind of module: a picture on a terminal, numbers in a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.cli.output import Column
from adapterhub_converters.display import printable

from . import groups

if TYPE_CHECKING:
    from adapterhub.analysis.norms import NormHeatMap

_ROWS = 40  # rows of a picture; more layers are averaged into these
_GAP = "·"


def document(norms: NormHeatMap | str) -> dict[str, Any]:
    """Return the norms as JSON; `missing` has the reason if there are none."""
    return {"missing": norms} if isinstance(norms, str) else {"missing": None, **asdict(norms)}


def lines(norms: NormHeatMap | str | None) -> Iterator[str]:
    """Yield the lines of the norms."""
    if norms is None:
        return
    if isinstance(norms, str):
        yield from output.wrap(f"norms: {norms}", output.width(), indent=2)
        return
    from adapterhub.analysis.norms import subtitle

    yield ""
    yield subtitle(norms)
    if norms.layers:
        yield from _picture(norms) if output.has_blocks() else _numbers(norms)
    for name, value in list(norms.others.items())[:_ROWS]:
        yield output.one_line(f"{name} {value:.4g}")
    yield from groups.lines((groups.Item("left out:", *item) for item in norms.left_out.items()), output.width())


def _numbers(norms: NormHeatMap) -> list[str]:
    columns = (Column("LAYER"), *(Column(kind, right=True) for kind in norms.short_kinds))
    rows = [
        [layer, *("-" if value is None else f"{value:.4g}" for value in row)]
        for layer, row in zip(norms.layers, norms.values, strict=True)
    ]
    return output.table(columns, rows)


def _picture(norms: NormHeatMap) -> Iterator[str]:
    """Yield the picture: rows are layers, columns kinds of modules, colors go from the least to the greatest norm."""
    visible, screen = norms.fold(_ROWS), output.width() or 80
    label = max(len("layer"), *(len(printable(layer)) for layer in visible.layers))
    names = list(map(printable, visible.short_kinds))
    available = (screen - label) // len(names) - 1
    if max(map(len, names)) > available:  # numbers replace the names, which are listed below
        names = [str(number + 1) for number in range(len(names))]
    column_width = max(1, min(available, max(4, *map(len, names))))
    per_row = max(1, (screen - label) // (column_width + 1))
    least, greatest = visible.scale
    for start in range(0, len(names), per_row):
        columns = range(start, min(start + per_row, len(names)))
        yield " ".join(["layer".ljust(label), *(names[i].ljust(column_width) for i in columns)]).rstrip()
        for layer, row in zip(visible.layers, visible.values, strict=True):
            yield " ".join([printable(layer).ljust(label), *(_cell(row[i], least, greatest, column_width) for i in columns)])
    if names[0] == "1":
        listed = ", ".join(f"{number + 1} {kind}" for number, kind in enumerate(visible.short_kinds))
        yield from output.wrap(listed, screen, indent=2)
    ramp = "".join(output.heat(step / 7, 1) for step in range(8))
    folded = f"; a row is the mean of {-(-len(norms.layers) // _ROWS)} layers" if visible is not norms else ""
    yield f"{least:.3g} {ramp} {greatest:.3g}{folded}"
    if visible.outlier_note:
        yield from output.wrap(visible.outlier_note, screen, indent=2)


def _cell(value: float | None, least: float, greatest: float, width: int) -> str:
    if value is None:
        return _GAP.ljust(width)
    return output.heat((value - least) / (greatest - least) if greatest > least else 1.0, width)
