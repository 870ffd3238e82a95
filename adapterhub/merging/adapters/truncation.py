"""Truncate merged matrices to a rank, to a share of their energy, or to a budget of bytes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adapterhub.analysis.low_rank import Factors, Spectrum, spectrum
from adapterhub_converters.errors import ParameterError, RefusedError

from .dense import Tiled, sketched
from .methods import Matrix, Random

_ITEM = 4  # bytes of a number in the result


@dataclass(frozen=True)
class Cut:
    """The truncation to apply: at most one of these; with none the method decides.

    Attributes:
        rank: The rank of every module.
        energy: The least share of its sum of squares that every module keeps.
        budget: The largest number of bytes of the adapter's tensors, spent where a rank keeps most for its bytes.
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None

    def check(self) -> None:
        """Raise a ParameterError for values that are out of range or exclude each other."""
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise ParameterError(given[1], f"cannot be combined with a {given[0]}", "Give one of them")
        if self.rank is not None and self.rank < 1:
            raise ParameterError("rank", f"{self.rank} is below 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ParameterError("energy", f"{self.energy} is not a share above 0 and up to 1", "Write it like 0.99")
        if self.budget is not None and self.budget < 1:
            raise ParameterError("budget", f"{self.budget} is below 1")

    @property
    def asked(self) -> bool:
        """Whether any is set."""
        return self != Cut()


@dataclass(frozen=True, eq=False)
class Spectra:
    """The singular values of a module's matrices (one, or one for each expert of a stack), and their whole energy."""

    parts: tuple[Spectrum, ...]
    energy: float

    @property
    def rank(self) -> int:
        """The least rank that holds all known singular values."""
        return max(part.rank for part in self.parts)

    def kept(self) -> np.ndarray:
        """The energy of the first 0, 1, 2 … ranks of all parts together."""
        squares = np.zeros(max(len(part.s) for part in self.parts))
        for part in self.parts:
            squares[: len(part.s)] += part.s**2
        return np.concatenate([[0.0], np.cumsum(squares)])

    def rank_for(self, energy: float) -> int | None:
        """The least rank that keeps a share of the energy; None if more singular values are needed to tell."""
        enough = np.nonzero(self.kept() >= energy * self.energy * (1 - 1e-12))[0]
        return max(1, int(enough[0])) if len(enough) else None

    def truncated(self, rank: int) -> list[Factors]:
        """Each part at that rank, padded with zeros if its own is lower."""
        return [_padded(part.truncated(min(rank, len(part.s))), rank) for part in self.parts]

    @property
    def bytes_for_one(self) -> int:
        """Bytes of one rank."""
        return _ITEM * sum(int(part.u.shape[0] + part.vt.shape[1]) for part in self.parts)


def _padded(factors: Factors, rank: int) -> Factors:
    short = rank - factors.r
    if not short:
        return factors
    left, right = factors.left, factors.right
    return Factors(np.pad(left, ((0, 0), (0, short))), np.pad(right, ((0, short), (0, 0))))


def spectra(matrices: Sequence[Matrix], *, ranks: Sequence[int], cut: Cut, random: Random) -> Spectra:
    """The singular values that the cut needs; `ranks` are the adapters' ranks."""
    wanted = cut.rank or (max(ranks) if not cut.asked else sum(ranks))
    found = _spectra(matrices, wanted, random)
    while cut.energy is not None and found.rank_for(cut.energy) is None:
        widest = max(min(matrix.shape) for matrix in matrices if isinstance(matrix, Tiled))
        if wanted >= widest:  # all of them, up to rounding
            return Spectra(found.parts, float(found.kept()[-1]))
        wanted = min(2 * wanted, widest)
        found = _spectra(matrices, wanted, random)
    return found


def _spectra(matrices: Sequence[Matrix], wanted: int, random: Random) -> Spectra:
    parts, energy = [], 0.0
    for index, matrix in enumerate(matrices):
        if isinstance(matrix, Tiled):
            found = sketched(matrix, wanted, random.generator(index))
            parts.append(Spectrum(found.u[:, :wanted], found.s[:wanted], found.vt[:wanted]))
            energy += matrix.energy
            if len(matrices) > 1:
                matrix.forget()
        else:
            parts.append(spectrum(matrix))
            energy += float(np.sum(parts[-1].s ** 2))
    return Spectra(tuple(parts), energy)


def within(budget: int, modules: Mapping[str, Spectra]) -> dict[str, int]:
    """The rank of every module, at least 1, that keeps the most energy within a number of bytes.

    One rank after another goes to the module where it keeps most energy for its bytes. Singular values decrease, so this greedy
    choice is optimal, up to the last rank that does not fit.
    """
    ranks = dict.fromkeys(modules, 1)
    left = budget - sum(found.bytes_for_one for found in modules.values())
    if left < 0:
        raise RefusedError("rank budget", f"{budget} bytes are not enough: rank 1 of all modules takes {budget - left}")
    gains = {name: np.diff(found.kept()) for name, found in modules.items()}
    queue = [(-_gain(gains[name], 1, found), name) for name, found in modules.items()]
    heapq.heapify(queue)
    while queue:
        gain, name = heapq.heappop(queue)
        found = modules[name]
        if gain == 0 or found.bytes_for_one > left:
            continue
        ranks[name] += 1
        left -= found.bytes_for_one
        heapq.heappush(queue, (-_gain(gains[name], ranks[name], found), name))
    return ranks


def _gain(gains: np.ndarray, rank: int, found: Spectra) -> float:
    """The energy that one more rank than `rank` keeps, over its bytes."""
    return float(gains[rank]) / found.bytes_for_one if rank < found.rank else 0.0


def lost(found: Spectra, rank: int) -> float:
    """The share of the energy that truncation to a rank leaves out."""
    kept = found.kept()
    rest = found.energy - float(kept[min(rank, len(kept) - 1)])
    return max(0.0, rest / found.energy) if found.energy and math.isfinite(found.energy) else 0.0
