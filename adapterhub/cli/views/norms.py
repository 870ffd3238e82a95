"""Where an adapter acts: its norms as a picture on a terminal, as numbers in a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.cli.output import Column
from adapterhub_converters.display import printable

from . import groups

if TYPE_CHECKING:
    from adapterhub.analysis.norms import Heat

_ROWS = 40  # of a picture; more are folded
_GAP = "·"


def document(norms: Heat | str) -> dict[str, Any]:
    """The norms with stable keys; `missing` has the reason if there are none."""
    return {"missing": norms} if isinstance(norms, str) else {"missing": None, **asdict(norms)}


def lines(norms: Heat | str | None) -> Iterator[str]:
    """Lines of the norms."""
    if norms is None:
        return
    if isinstance(norms, str):
        yield from output.wrapped(f"norms: {norms}", output.width(), indent=2)
        return
    from adapterhub.analysis.norms import subtitle

    yield ""
    yield subtitle(norms)
    if norms.layers:
        yield from _picture(norms) if output.has_blocks() else _numbers(norms)
    for name, value in list(norms.others.items())[:_ROWS]:
        yield output.one_line(f"{name} {value:.4g}")
    yield from groups.lines((groups.Item("left out:", *item) for item in norms.left_out.items()), output.width())


def _numbers(norms: Heat) -> list[str]:
    columns = (Column("LAYER"), *(Column(kind, right=True) for kind in norms.short_kinds))
    rows = [
        [layer, *("-" if value is None else f"{value:.4g}" for value in row)]
        for layer, row in zip(norms.layers, norms.values, strict=True)
    ]
    return output.table(columns, rows)


def _picture(norms: Heat) -> Iterator[str]:
    """Rows are layers, columns kinds of modules, from the least to the greatest norm."""
    shown, screen = norms.folded(_ROWS), output.width() or 80
    label = max(len("layer"), *(len(printable(layer)) for layer in shown.layers))
    names = list(map(printable, shown.short_kinds))
    room = (screen - label) // len(names) - 1
    if max(map(len, names)) > room:  # numbers for names, which are then listed below
        names = [str(number + 1) for number in range(len(names))]
    wide = max(1, min(room, max(4, *map(len, names))))
    per_row = max(1, (screen - label) // (wide + 1))
    least, greatest = shown.scale
    for start in range(0, len(names), per_row):
        part = range(start, min(start + per_row, len(names)))
        yield " ".join(["layer".ljust(label), *(names[i].ljust(wide) for i in part)]).rstrip()
        for layer, row in zip(shown.layers, shown.values, strict=True):
            yield " ".join([printable(layer).ljust(label), *(_cell(row[i], least, greatest, wide) for i in part)])
    if names[0] == "1":
        listed = ", ".join(f"{number + 1} {kind}" for number, kind in enumerate(shown.short_kinds))
        yield from output.wrapped(listed, screen, indent=2)
    ramp = "".join(output.heat(step / 7, 1) for step in range(8))
    folded = f"; a row is the mean of {-(-len(norms.layers) // _ROWS)} layers" if shown is not norms else ""
    yield f"{least:.3g} {ramp} {greatest:.3g}{folded}"
    if shown.above:
        yield from output.wrapped(shown.above, screen, indent=2)


def _cell(value: float | None, least: float, greatest: float, wide: int) -> str:
    if value is None:
        return _GAP.ljust(wide)
    return output.heat((value - least) / (greatest - least) if greatest > least else 1.0, wide)
