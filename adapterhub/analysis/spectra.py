"""The norm and the largest singular value of each module's delta, and their percentiles among other adapters.

Three numbers of ΔW: its Frobenius norm, its largest singular value, and the share of its energy (the sum of squares) in that
value. Methods that look for backdoors in weights start from these (arXiv 2602.15195); they need many labeled adapters, and fail
on kinds of poisoning that they were not fitted to. So there is no threshold and no verdict here: only the percentile among
adapters of the same base, and the number of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple

import numpy as np

from adapterhub_converters.adapter import Adapter, refuse_tuned
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .low_rank import singular_values, terms
from .norms import split_layer


@dataclass(frozen=True, slots=True)
class SpectralSummary:
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
class RankedSummary:
    """The numbers of a module, or of all modules of a kind, and their percentiles among those of other adapters.

    Attributes:
        name: The path of the module, or its kind: `self_attn.q_proj`.
        modules: The number of modules that are counted together.
        n: The number of other adapters that have such modules.
        percentiles: For each number, the share of smaller ones among theirs, equal ones counted half; None where `n` is 0.
    """

    name: str
    modules: int
    spectrum: SpectralSummary
    n: int
    percentiles: SpectralSummary | None


SpectralSummaries = Mapping[str, SpectralSummary]
"""Module to the numbers of its delta."""


def spectra(
    adapter: Adapter, *, progress: Callable[[int, int], None] | None = None
) -> tuple[SpectralSummaries, Mapping[str, str]]:
    """Return the numbers of every module, and the modules without numbers, with the reason.

    The experts of a stack count as one matrix with blocks on its diagonal; under DoRA, the low-rank part is measured.

    Raises:
        RefusedError: The adapter is by a tuner that adds no matrices.
    """
    refuse_tuned(adapter)
    summaries: dict[str, SpectralSummary] = {}
    left_out: dict[str, str] = {}
    for count, (target, delta) in enumerate(adapter.deltas.items()):
        if progress:
            progress(count, len(adapter.deltas))
        try:
            values = np.concatenate([singular_values(term) for term in terms(delta)])
        except (RefusedError, np.linalg.LinAlgError) as error:
            left_out[target] = error.what if isinstance(error, RefusedError) else "a NaN or an infinity"
            continue
        if not np.isfinite(values).all():
            left_out[target] = "a NaN or an infinity"
            continue
        summaries[target] = _spectrum(float(np.linalg.norm(values)), float(values.max(initial=0.0)))
    return summaries, left_out


def _spectrum(norm: float, top: float) -> SpectralSummary:
    return SpectralSummary(norm, top, (top / norm) ** 2 if norm else 0.0)


def kind_of(target: str) -> str:
    """Return the path of a module in its layer, with the numbers of experts as `*`; outside of all layers, its own path."""
    split = split_layer(target)
    return ".".join("*" if part.isdecimal() else part for part in split[2].split(".")) if split else target


def by_kind(summaries: SpectralSummaries) -> dict[str, tuple[int, SpectralSummary]]:
    """Return, for each kind, the number of its modules and their numbers as of one matrix."""
    groups: dict[str, list[SpectralSummary]] = {}
    for target, summary in summaries.items():
        groups.setdefault(kind_of(target), []).append(summary)
    return {kind: (len(group), _combine(group)) for kind, group in groups.items()}


def _combine(group: Sequence[SpectralSummary]) -> SpectralSummary:
    """Return the numbers of a matrix with the modules as blocks on its diagonal."""
    norm, energy = math.hypot(*(summary.norm for summary in group)), math.hypot(*(summary.top for summary in group))
    return SpectralSummary(norm, max(summary.top for summary in group), (energy / norm) ** 2 if norm else 0.0)


def rank_among(
    summaries: SpectralSummaries, other_adapters: Iterable[SpectralSummaries]
) -> tuple[list[RankedSummary], list[RankedSummary]]:
    """Return the kinds of modules, and the modules, of an adapter with their percentiles among those of others."""
    of_modules: dict[str, list[SpectralSummary]] = {}
    of_kinds: dict[str, list[SpectralSummary]] = {}
    for other_summaries in other_adapters:
        for target in summaries.keys() & other_summaries.keys():
            of_modules.setdefault(target, []).append(other_summaries[target])
        for kind, (_, summary) in by_kind(other_summaries).items():
            of_kinds.setdefault(kind, []).append(summary)
    kinds = [_rank(kind, count, summary, of_kinds.get(kind, [])) for kind, (count, summary) in by_kind(summaries).items()]
    return kinds, [_rank(target, 1, summary, of_modules.get(target, [])) for target, summary in summaries.items()]


def _rank(name: str, modules: int, summary: SpectralSummary, others_summaries: Sequence[SpectralSummary]) -> RankedSummary:
    if not others_summaries:
        return RankedSummary(name, modules, summary, 0, None)
    # One column for each of the three numbers.
    columns = zip(astuple(summary), zip(*map(astuple, others_summaries), strict=True), strict=True)
    percentiles = (
        100 * sum((x < value) + (x == value) / 2 for x in column) / len(others_summaries) for value, column in columns
    )
    return RankedSummary(name, modules, summary, len(others_summaries), SpectralSummary(*percentiles))
