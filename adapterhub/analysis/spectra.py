"""The norm and the largest singular value of each module's delta, and their percentiles among other adapters.

Three numbers of ΔW: its Frobenius norm, its largest singular value, and the share of its energy (the sum of squares) that this
one has. Methods that look for backdoors in weights start from these (arXiv 2602.15195); they need many labeled adapters, and
fail on kinds of poisoning that they were not fitted to. So there is no threshold and no verdict here: only the percentile among
adapters of the same base, and the number of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from adapterhub_converters.adapter import Adapter, refuse_tuned
from adapterhub_converters.errors import RefusedError

from .low_rank import singular_values, terms
from .norms import split_layer


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Three numbers of a matrix, or their percentiles, from 0 to 100.

    Attributes:
        norm: The Frobenius norm, scaling included.
        top: The largest singular value.
        share: The square of `top` over that of `norm`, from 1 / rank to 1; 0 for a matrix of zeros.
    """

    norm: float
    top: float
    share: float


@dataclass(frozen=True, slots=True)
class Ranked:
    """The numbers of a module, or of all modules of a kind, and their places among those of other adapters.

    Attributes:
        name: The path of the module, or its kind: `self_attn.q_proj`.
        modules: How many modules it stands for.
        n: How many other adapters have it.
        percentiles: Of each number among theirs: the share of smaller ones, equal ones counted half; None where `n` is 0.
    """

    name: str
    modules: int
    spectrum: Spectrum
    n: int
    percentiles: Spectrum | None


Spectra = Mapping[str, Spectrum]
"""Module to the numbers of its delta."""


def spectra(adapter: Adapter, *, progress: Callable[[int, int], None] | None = None) -> tuple[Spectra, Mapping[str, str]]:
    """Return the numbers of every module, and the modules without, with the reason.

    The experts of a stack count as one matrix with blocks on its diagonal; under DoRA it is the low-rank part.

    Raises:
        RefusedError: It is by a tuner that adds no matrices.
    """
    refuse_tuned(adapter)
    found: dict[str, Spectrum] = {}
    left_out: dict[str, str] = {}
    for done, (target, delta) in enumerate(adapter.deltas.items()):
        if progress:
            progress(done, len(adapter.deltas))
        try:
            values = np.concatenate([singular_values(term) for term in terms(delta)])
        except (RefusedError, np.linalg.LinAlgError) as error:
            left_out[target] = error.what if isinstance(error, RefusedError) else "a NaN or an infinity"
            continue
        if not np.isfinite(values).all():
            left_out[target] = "a NaN or an infinity"
            continue
        found[target] = _spectrum(float(np.linalg.norm(values)), float(values.max(initial=0.0)))
    return found, left_out


def _spectrum(norm: float, top: float) -> Spectrum:
    return Spectrum(norm, top, (top / norm) ** 2 if norm else 0.0)


def kind_of(target: str) -> str:
    """The path of a module in its layer, the numbers of experts as `*`; of a module outside of all layers its own."""
    found = split_layer(target)
    return ".".join("*" if part.isdecimal() else part for part in found[2].split(".")) if found else target


def by_kind(found: Spectra) -> dict[str, tuple[int, Spectrum]]:
    """Kind to the number of its modules, and their norm, largest singular value and share of energy as of one matrix."""
    groups: dict[str, list[Spectrum]] = {}
    for target, one in found.items():
        groups.setdefault(kind_of(target), []).append(one)
    return {kind: (len(group), _together(group)) for kind, group in groups.items()}


def _together(group: Sequence[Spectrum]) -> Spectrum:
    norm, energy = math.hypot(*(one.norm for one in group)), math.hypot(*(one.top for one in group))
    return Spectrum(norm, max(one.top for one in group), (energy / norm) ** 2 if norm else 0.0)


def ranked(found: Spectra, others: Iterable[Spectra]) -> tuple[list[Ranked], list[Ranked]]:
    """Return the kinds of modules, and the modules, of an adapter with their percentiles among those of others."""
    of_modules: dict[str, list[Spectrum]] = {}
    of_kinds: dict[str, list[Spectrum]] = {}
    for other in others:
        for target in found.keys() & other.keys():
            of_modules.setdefault(target, []).append(other[target])
        for kind, (_, one) in by_kind(other).items():
            of_kinds.setdefault(kind, []).append(one)
    kinds = [_ranked(kind, count, one, of_kinds.get(kind, [])) for kind, (count, one) in by_kind(found).items()]
    return kinds, [_ranked(target, 1, one, of_modules.get(target, [])) for target, one in found.items()]


def _ranked(name: str, modules: int, one: Spectrum, others: Sequence[Spectrum]) -> Ranked:
    if not others:
        return Ranked(name, modules, one, 0, None)
    columns = zip(astuple(one), zip(*map(astuple, others), strict=True), strict=True)
    percentiles = (100 * sum((x < value) + (x == value) / 2 for x in column) / len(others) for value, column in columns)
    return Ranked(name, modules, one, len(others), Spectrum(*percentiles))
