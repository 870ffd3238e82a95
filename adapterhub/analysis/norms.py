"""The norm of every module's delta by layer and kind of module, as numbers and as a PNG: where an adapter acts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub import picture
from adapterhub_converters.adapter import Adapter, StackedLowRank
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats.base_weights import BaseWeights

from .low_rank import size

_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")  # the order of computation
_GRAY = "#6b7280"
_COLUMNS = 80  # of a picture; the others are counted
_CELLS = 1 << 20


@dataclass(frozen=True)
class Heat:
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
        """The kinds by the last part of their names, if these are distinct."""
        last = [kind.rpartition(".")[2].removesuffix("_proj") for kind in self.kinds]
        whole = [kind.rpartition(".")[2] for kind in self.kinds]
        return tuple(next(names for names in (last, whole, self.kinds) if len(set(names)) == len(names)))

    @property
    def span(self) -> tuple[float, float]:
        """The least and the greatest value of a layer; zeros without any."""
        known = [value for row in self.values for value in row if value is not None]
        return (min(known), max(known)) if known else (0.0, 0.0)

    def folded(self, most: int) -> Heat:
        """At most `most` rows, each the mean of neighboring ones."""
        step = math.ceil(len(self.layers) / most)
        if step < 2:
            return self
        groups = [range(start, min(start + step, len(self.layers))) for start in range(0, len(self.layers), step)]
        layers = [_folded_name([self.layers[i] for i in group]) for group in groups]
        values = [
            tuple(_mean([self.values[i][column] for i in group]) for column in range(len(self.kinds))) for group in groups
        ]
        return Heat(tuple(layers), self.kinds, tuple(values), self.others, self.left_out, self.relative)


def _folded_name(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}-{names[-1].rpartition('.')[2]}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def heat(adapter: Adapter, *, base: Path | None = None) -> Heat:
    """The norms of an adapter's deltas, divided by those of the weights in the Hugging Face folder `base` if given."""
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(BaseWeights(base)) if base else None
        norms: dict[str, tuple[float, float]] = {}  # experts of a kind in a layer share a key
        left_out: dict[str, str] = {}
        for target, delta in adapter.deltas.items():
            found, key = size(delta), _key(target)
            if found is None:
                left_out[target] = f"a {type(delta).__name__} with a core, or with a NaN"
                continue
            name = target if isinstance(delta, StackedLowRank) else f"{target}.weight"
            try:
                under = _norm(weights.tensor(name)) if weights else 1.0
            except RefusedError as error:
                left_out[target] = error.what
                continue
            before = norms.get(key, (0.0, 0.0))
            norms[key] = math.hypot(before[0], found), math.hypot(before[1], under) if weights else 1.0
    left_out |= {key: "the base's weight is all zeros" for key, (_, two) in norms.items() if not two}
    cells = {key: one / two for key, (one, two) in norms.items() if two}
    return _arranged(cells, left_out, relative=base is not None)


def _key(target: str) -> str:
    """A module's cell: experts, whose numbers come after the layer's, share one."""
    found = _split(target)
    if not found:
        return target
    kind = ".".join("*" if _is_number(part) else part for part in found[2].split("."))
    return f"{found[0]}.{found[1]}.{kind}"


def _split(target: str) -> tuple[str, str, str] | None:
    """The list of layers, the layer's number and the path in it; None for a module outside of all."""
    parts = target.split(".")
    at = next((at for at, part in enumerate(parts) if 0 < at < len(parts) - 1 and _is_number(part)), 0)
    return (".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])) if at else None


def _is_number(part: str) -> bool:
    return part.isdecimal() and len(part) < 10


def _norm(weight: np.ndarray) -> float:
    if weight.dtype.kind in "iub":
        raise RefusedError("base", "its weight is quantized", "Name the base in 16 or 32 bits")
    norm = float(np.linalg.norm(weight.astype(np.float32).astype(np.float64)))
    if not math.isfinite(norm):
        raise RefusedError("base", "its weight contains NaN or Inf")
    return norm


def _arranged(cells: Mapping[str, float], left_out: Mapping[str, str], *, relative: bool) -> Heat:
    places = {key: found for key in cells if (found := _split(key))}
    stacks = list(dict.fromkeys(stack for stack, _, _ in places.values()))
    layers = sorted({(stacks.index(stack), int(number)) for stack, number, _ in places.values()})
    kinds = tuple(sorted({kind for _, _, kind in places.values()}, key=_in_order))
    if len(layers) * len(kinds) > max(_CELLS, 2 * len(cells)):  # hardly any cell has a number: no picture of a transformer
        return Heat((), (), (), dict(cells), dict(left_out), relative)
    names = tuple(f"{stacks[stack]}.{number}" if len(stacks) > 1 else str(number) for stack, number in layers)
    values = tuple(tuple(cells.get(f"{stacks[stack]}.{number}.{kind}") for kind in kinds) for stack, number in layers)
    others = {key: value for key, value in cells.items() if key not in places}
    return Heat(names, kinds, values, others, dict(left_out), relative)


def _in_order(kind: str) -> tuple[int, str]:
    last = kind.rpartition(".")[2].removesuffix("_proj")
    return _ORDER.index(last) if last in _ORDER else len(_ORDER), kind


def plot(found: Heat, path: Path, *, title: str) -> None:
    """Write the heat map as a PNG, completely or not at all; needs matplotlib but no display."""
    shown = found.folded(80)
    rows, columns = len(shown.layers), min(len(shown.kinds), _COLUMNS)
    size = max(5.0, 2.2 + 0.75 * columns), min(9.0, max(3.0, 1.8 + 0.2 * rows))
    with picture.figure(path, *size) as figure:
        figure.suptitle(picture.label(title), x=0.02, ha="left", fontsize=13, fontweight="bold")
        _draw(figure, found, shown, columns)


def _draw(figure: Any, found: Heat, shown: Heat, columns: int) -> None:
    rows, axes = len(shown.layers), figure.add_subplot()
    axes.annotate(subtitle(found), (0, 1), (0, 8), "axes fraction", textcoords="offset points", color=_GRAY, fontsize=9)
    if rows and columns:
        grid = np.array([[math.nan if value is None else value for value in row[:columns]] for row in shown.values])
        image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axes, pad=0.02).outline.set_visible(False)
    axes.set_facecolor("#e5e7eb")
    kinds = list(map(picture.label, shown.short_kinds[:columns]))
    axes.set_xticks(range(columns), kinds, rotation=0 if columns < 9 else 90)
    step = max(1, math.ceil(rows / 40))
    axes.set_yticks(range(0, rows, step), list(map(picture.label, shown.layers[::step])))
    axes.set_ylabel("layer", color=_GRAY)
    notes = [f"{len(shown.kinds) - columns:,} more kinds of modules"] if columns < len(shown.kinds) else []
    if found.others:
        others = ", ".join(f"{picture.label(name)} {value:.3g}" for name, value in list(found.others.items())[:4])
        notes.append(f"outside of layers: {others}")
    axes.set_xlabel("; ".join(notes), color=_GRAY, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=_GRAY, length=0)


def subtitle(found: Heat) -> str:
    """A description of the numbers."""
    return (
        "norm of the delta over that of the base's weight" if found.relative else "Frobenius norm of the delta, scale included"
    )
