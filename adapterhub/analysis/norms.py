"""The norm of every module's delta by layer and kind of module, as numbers and as a PNG: a map of where an adapter acts."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub import picture
from adapterhub_converters.adapter import Adapter, StackedLowRank, refuse_tuned
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .low_rank import delta_norm
from .low_rank import norm_cost as work_of

if TYPE_CHECKING:
    from adapterhub_converters.formats.base_weights import BaseWeights

_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")  # in the order of computation
_COLUMNS = 80  # of a picture; further columns are only counted
_CELLS = 1 << 20
_A_SECOND = 5 * 10**9  # multiplications; one core does 3 to 13 of 10**9, depending on the rank
_BELOW = 2.2  # inches of what is drawn below a picture
_A_MODULE = 50e-6  # seconds for each, whatever its size


@dataclass(frozen=True)
class NormHeatMap:
    """Frobenius norms of deltas, scalings included; under DoRA of the low-rank part.

    Attributes:
        layers: Rows: the number of the layer, with its prefix if there are several stacks of layers.
        kinds: Columns: the path of the module in its layer, `self_attn.q_proj`; experts are combined, `experts.*.up_proj`.
        values: `values[row][column]`, None if the layer has no such module.
        others: The norms of modules outside of layers, such as `lm_head`.
        left_out: Modules without a norm, with the reason.
        relative: Whether the norms are divided by those of the base's weights.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    others: Mapping[str, float]
    left_out: Mapping[str, str]
    relative: bool = False

    @property
    def short_kinds(self) -> tuple[str, ...]:
        """The kinds by the last part of their names, or else by what follows their common beginning, if these are distinct."""
        paths = [kind.split(".") for kind in self.kinds]
        last_parts = [path[-1] for path in paths]
        short = [part.removesuffix("_proj") for part in last_parts]
        folders = zip(*(path[:-1] for path in paths), strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, folders))
        tails = [".".join(path[common:]).removesuffix(".*") for path in paths]
        return tuple(next(names for names in (short, last_parts, tails, self.kinds) if len(set(names)) == len(names)))

    @property
    def scale(self) -> tuple[float, float]:
        """The ends of a scale of colors; zeros if there are no values.

        From the least value of a layer to the greatest, or to the 99th percentile if the greatest is more than twice that,
        because one outlier would make all others look alike.
        """
        present = sorted(value for row in self.values for value in row if value is not None)
        if not present:
            return 0.0, 0.0
        least, high, greatest = present[0], present[int(0.99 * (len(present) - 1))], present[-1]
        return least, high if greatest > 2 * high > 2 * least else greatest

    @property
    def outlier_note(self) -> str:
        """A note on the values beyond the scale; empty if there are none."""
        end = self.scale[1]
        cells = [
            (value, f"{kind} in layer {layer}")
            for layer, row in zip(self.layers, self.values, strict=True)
            for kind, value in zip(self.short_kinds, row, strict=True)
            if value is not None and value > end
        ]
        if not cells:
            return ""
        value, cell = max(cells)
        return f"scale ends at the 99th percentile; {len(cells):,} above, the largest {value:.3g}: {cell}"

    def fold(self, row_limit: int) -> NormHeatMap:
        """Return at most `row_limit` rows, each the mean of neighboring ones."""
        step = math.ceil(len(self.layers) / row_limit)
        if step < 2:
            return self
        groups = [range(start, min(start + step, len(self.layers))) for start in range(0, len(self.layers), step)]
        layers = [_folded_name([self.layers[i] for i in group]) for group in groups]
        values = [
            tuple(_mean([self.values[i][column] for i in group]) for column in range(len(self.kinds))) for group in groups
        ]
        return NormHeatMap(tuple(layers), self.kinds, tuple(values), self.others, self.left_out, self.relative)


def _folded_name(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}-{names[-1].rpartition('.')[2]}"


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def estimated_seconds(adapter: Adapter) -> float:
    """Estimate the seconds that a heat map takes from the shapes of an adapter, so that it is the same everywhere."""
    return sum(map(work_of, adapter.deltas.values())) / _A_SECOND + len(adapter.deltas) * _A_MODULE


def build_heat_map(
    adapter: Adapter, *, base: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> NormHeatMap:
    """Return the norms of an adapter's deltas.

    Args:
        adapter: The adapter.
        base: A Hugging Face folder; its weights' norms divide those of the deltas.
        progress: Called with modules done and modules in all.
    """
    refuse_tuned(adapter)
    with contextlib.ExitStack() as stack:
        weights: BaseWeights | None = None
        if base:
            from adapterhub_converters.formats.base_weights import BaseWeights  # late: it imports the tables of architectures

            weights = stack.enter_context(BaseWeights(base))
        norms: dict[str, tuple[float, float]] = {}  # experts of a kind in a layer share a key
        left_out: dict[str, str] = {}
        for count, (target, delta) in enumerate(adapter.deltas.items()):
            if progress:
                progress(count, len(adapter.deltas))
            norm_of_delta, key = delta_norm(delta), _key(target)
            if norm_of_delta is None:
                left_out[target] = f"a {type(delta).__name__} with a core, too large, or with a NaN"
                continue
            name = target if isinstance(delta, StackedLowRank) else f"{target}.weight"
            try:
                base_norm = _norm(weights.tensor(name)) if weights else 1.0
            except RefusedError as error:
                left_out[target] = error.what
                continue
            totals = norms.get(key, (0.0, 0.0))
            norms[key] = math.hypot(totals[0], norm_of_delta), math.hypot(totals[1], base_norm) if weights else 1.0
    left_out |= {key: "the base's weight is all zeros" for key, (_, base_total) in norms.items() if not base_total}
    cells = {key: delta_total / base_total for key, (delta_total, base_total) in norms.items() if base_total}
    return _arrange(cells, left_out, relative=base is not None)


def _key(target: str) -> str:
    """Return a module's cell: experts, whose numbers come after the layer's, share one."""
    split = split_layer(target)
    if not split:
        return target
    kind = ".".join("*" if _is_number(part) else part for part in split[2].split("."))
    return f"{split[0]}.{split[1]}.{kind}"


def split_layer(target: str) -> tuple[str, str, str] | None:
    """Split a module's path: the list of layers, the layer's number and the path in it; None outside of all layers."""
    parts = target.split(".")
    at = next((at for at, part in enumerate(parts) if 0 < at < len(parts) - 1 and _is_number(part)), 0)
    return (".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])) if at else None


def _is_number(part: str) -> bool:
    return part.isdecimal() and len(part) < 10


def _norm(weight: np.ndarray) -> float:
    """Return the Frobenius norm of a base's weight; RefusedError if it is quantized or not finite."""
    if weight.dtype.kind in "iub":
        raise RefusedError("base", "its weight is quantized", "Name the base in 16 or 32 bits")
    norm = float(np.linalg.norm(weight.astype(np.float32).astype(np.float64)))
    if not math.isfinite(norm):
        raise RefusedError("base", "its weight contains NaN or Inf", code="non-finite")
    return norm


def _arrange(cells: Mapping[str, float], left_out: Mapping[str, str], *, relative: bool) -> NormHeatMap:
    """Arrange the norms in rows of layers and columns of kinds."""
    places = {key: split for key in cells if (split := split_layer(key))}
    stacks = list(dict.fromkeys(stack for stack, _, _ in places.values()))
    # Several stacks, such as an encoder and a decoder, follow one another in the map.
    layers = sorted({(stacks.index(stack), int(number)) for stack, number, _ in places.values()})
    kinds = tuple(sorted({kind for _, _, kind in places.values()}, key=_sort_key))
    if len(layers) * len(kinds) > max(_CELLS, 2 * len(cells)):  # hardly any cell has a number: no picture of a transformer
        return NormHeatMap((), (), (), dict(cells), dict(left_out), relative)
    names = tuple(f"{stacks[stack]}.{number}" if len(stacks) > 1 else str(number) for stack, number in layers)
    values = tuple(tuple(cells.get(f"{stacks[stack]}.{number}.{kind}") for kind in kinds) for stack, number in layers)
    outside_layers = {key: value for key, value in cells.items() if key not in places}
    return NormHeatMap(names, kinds, values, outside_layers, dict(left_out), relative)


def _sort_key(kind: str) -> tuple[int, str]:
    """Return a key that sorts kinds of modules by the order of computation."""
    last = kind.rpartition(".")[2].removesuffix("_proj")
    return _ORDER.index(last) if last in _ORDER else len(_ORDER), kind


def plot(heat_map: NormHeatMap, path: Path, *, title: str, draw_below: Callable[[Any], None] | None = None) -> None:
    """Write the heat map as a PNG, completely or not at all; needs matplotlib but no display.

    Args:
        heat_map: The norms.
        path: The PNG.
        title: Its title.
        draw_below: Draws on further axes below the heat map.
    """
    folded = heat_map.fold(80)
    kinds = [picture.fit_label(kind, 3, size=10) for kind in folded.short_kinds[:_COLUMNS]]
    longest = max((picture.extent(kind, size=10)[0] for kind in kinds), default=0.0)
    label_height = longest if longest > 0.6 else 0.0  # inches, if they are too long to stand side by side
    height = min(9.0, max(3.0, 1.8 + 0.2 * len(folded.layers)) + label_height)
    heights = [height, _BELOW] if draw_below else [height]
    with picture.figure(path, max(5.5, 2.4 + 0.75 * len(kinds)), sum(heights)) as figure:
        axes, *further_axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        if draw_below:
            draw_below(*further_axes)
        axes.set_xticks(range(len(kinds)), kinds, rotation=90 if label_height else 0)
        _draw(figure, axes, heat_map, folded, title)


def _draw(figure: Any, axes: Any, heat_map: NormHeatMap, folded: NormHeatMap, title: str) -> None:
    rows, columns = len(folded.layers), min(len(folded.kinds), _COLUMNS)
    fold_note = f"a row is the mean of {math.ceil(len(heat_map.layers) / 80)} layers" if folded is not heat_map else ""
    picture.heading(axes, title, subtitle(heat_map), "; ".join(filter(None, (fold_note, folded.outlier_note))))
    if rows and columns:
        _draw_cells(figure, axes, folded, columns)
    axes.set_facecolor(picture.LIGHT)
    step = max(1, math.ceil(rows / 40))
    axes.set_yticks(range(0, rows, step), [picture.fit_label(layer, 2, size=10) for layer in folded.layers[::step]])
    axes.set_ylabel("layer", color=picture.GRAY)
    notes = [f"{len(folded.kinds) - columns:,} more kinds of modules"] if columns < len(folded.kinds) else []
    if heat_map.others:
        outside_layers = ", ".join(f"{name} {value:.3g}" for name, value in list(heat_map.others.items())[:4])
        notes.append(f"outside of layers: {outside_layers}")
    axes.set_xlabel(picture.fit_label("; ".join(notes), figure.get_figwidth() - 1.2, size=9), color=picture.GRAY, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=picture.GRAY, length=0)


def _draw_cells(figure: Any, axes: Any, folded: NormHeatMap, columns: int) -> None:
    from matplotlib import colormaps

    grid = np.array([[math.nan if value is None else value for value in row[:columns]] for row in folded.values])
    least, greatest = folded.scale
    colors = colormaps["viridis"].with_extremes(over=picture.ORANGE)
    image = axes.imshow(grid, aspect="auto", cmap=colors, vmin=least, vmax=greatest, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend="max" if folded.outlier_note else "neither")
    bar.outline.set_visible(False)
    bar.set_label("relative norm" if folded.relative else "norm", color=picture.GRAY)
    bar.ax.tick_params(colors=picture.GRAY, length=0)


def subtitle(heat_map: NormHeatMap) -> str:
    """Return a description of the numbers."""
    return (
        "norm of the delta over that of the base's weight"
        if heat_map.relative
        else "Frobenius norm of the delta, scale included"
    )
