"""Truncate merged matrices to a rank, to a share of their energy, or to a budget of bytes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np

from adapterhub.analysis.low_rank import Factors, Spectrum, spectrum
from adapterhub_converters.errors import ParameterError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .methods import Matrix, Random
from .tiled_matrix import TiledMatrix, sketch

_ITEM = 4  # bytes of a number in the result


@dataclass(frozen=True)
class Truncation:
    """The truncation to apply: at most one of these; if none is set, the method decides.

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
        set_names = [name for name, value in vars(self).items() if value is not None]
        if len(set_names) > 1:
            raise ParameterError(set_names[1], f"cannot be combined with a {set_names[0]}", "Give one of them")
        if self.rank is not None and self.rank < 1:
            raise ParameterError("rank", f"{self.rank} is below 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ParameterError("energy", f"{self.energy} is not a share above 0 and up to 1", "Write it like 0.99")
        if self.budget is not None and self.budget < 1:
            raise ParameterError("budget", f"{self.budget} is below 1")

    @property
    def is_set(self) -> bool:
        """Whether any of them is set."""
        return self != Truncation()


@dataclass(frozen=True, eq=False)
class ModuleSpectra:
    """The singular values of a module's matrices (one, or one for each expert of a stack), and their total energy."""

    parts: tuple[Spectrum, ...]
    energy: float

    @property
    def rank(self) -> int:
        """The least rank that holds all known singular values."""
        return max(part.rank for part in self.parts)

    def cumulative_energy(self) -> np.ndarray:
        """Return the energy of the first 0, 1, 2 … ranks of all parts together."""
        squares = np.zeros(max(len(part.s) for part in self.parts))
        for part in self.parts:
            squares[: len(part.s)] += part.s**2
        return np.concatenate([[0.0], np.cumsum(squares)])

    def rank_for(self, energy: float) -> int | None:
        """Return the least rank that keeps a share of the energy; None if more singular values are needed to tell."""
        # The tolerance absorbs the rounding of the sum, so that a share of 1 can be reached.
        enough = np.nonzero(self.cumulative_energy() >= energy * self.energy * (1 - 1e-12))[0]
        return max(1, int(enough[0])) if len(enough) else None

    def truncate(self, rank: int) -> list[Factors]:
        """Return each part at that rank, padded with zeros if its own is lower."""
        return [_pad(part.truncate(min(rank, len(part.s))), rank) for part in self.parts]

    @property
    def bytes_for_one(self) -> int:
        """The number of bytes of one rank."""
        return _ITEM * sum(int(part.u.shape[0] + part.vt.shape[1]) for part in self.parts)


def _pad(factors: Factors, rank: int) -> Factors:
    short = rank - factors.r
    if not short:
        return factors
    left, right = factors.left, factors.right
    return Factors(np.pad(left, ((0, 0), (0, short))), np.pad(right, ((0, short), (0, 0))))


def spectra(matrices: Sequence[Matrix], *, ranks: Sequence[int], cut: Truncation, random: Random) -> ModuleSpectra:
    """Return the singular values that the truncation needs; `ranks` are the adapters' ranks."""
    # Nothing is asked for: as large as the largest adapter. An energy or a budget may need up to the rank of the exact sum.
    rank = cut.rank or (max(ranks) if not cut.is_set else sum(ranks))
    module_spectra = _spectra(matrices, rank, random)
    # A sketch has only the leading values: double its rank until they hold the energy.
    while cut.energy is not None and module_spectra.rank_for(cut.energy) is None:
        widest = max(min(matrix.shape) for matrix in matrices if isinstance(matrix, TiledMatrix))
        if rank >= widest:  # all of them, up to rounding
            return ModuleSpectra(module_spectra.parts, float(module_spectra.cumulative_energy()[-1]))
        rank = min(2 * rank, widest)
        module_spectra = _spectra(matrices, rank, random)
    return module_spectra


def _spectra(matrices: Sequence[Matrix], rank: int, random: Random) -> ModuleSpectra:
    """Return the leading singular values of dense matrices, and all of factored ones."""
    parts, energy = [], 0.0
    for index, matrix in enumerate(matrices):
        if isinstance(matrix, TiledMatrix):
            leading = sketch(matrix, rank, random.generator(index))
            parts.append(Spectrum(leading.u[:, :rank], leading.s[:rank], leading.vt[:rank]))
            energy += matrix.energy
            # The tiles of all experts together would not fit into the cache.
            if len(matrices) > 1:
                matrix.forget()
        else:
            parts.append(spectrum(matrix))
            energy += float(np.sum(parts[-1].s ** 2))
    return ModuleSpectra(tuple(parts), energy)


def ranks_within(budget: int, modules: Mapping[str, ModuleSpectra]) -> dict[str, int]:
    """Return the rank of every module, at least 1, that keeps the most energy within a number of bytes.

    One rank after another goes to the module where it keeps most energy for its bytes. Singular values decrease, so this greedy
    choice is optimal, up to the last rank that does not fit.
    """
    ranks = dict.fromkeys(modules, 1)
    remaining = budget - sum(module_spectra.bytes_for_one for module_spectra in modules.values())
    if remaining < 0:
        raise RefusedError("rank budget", f"{budget} bytes are not enough: rank 1 of all modules takes {budget - remaining}")
    gains = {name: np.diff(module_spectra.cumulative_energy()) for name, module_spectra in modules.items()}
    queue = [(-_gain(gains[name], 1, module_spectra), name) for name, module_spectra in modules.items()]
    heapq.heapify(queue)
    while queue:
        gain, name = heapq.heappop(queue)
        module_spectra = modules[name]
        # A rank too large for the rest of the budget ends this module, not the others.
        if gain == 0 or module_spectra.bytes_for_one > remaining:
            continue
        ranks[name] += 1
        remaining -= module_spectra.bytes_for_one
        heapq.heappush(queue, (-_gain(gains[name], ranks[name], module_spectra), name))
    return ranks


def _gain(gains: np.ndarray, rank: int, module_spectra: ModuleSpectra) -> float:
    """Return the energy that one more rank than `rank` keeps, over its bytes."""
    return float(gains[rank]) / module_spectra.bytes_for_one if rank < module_spectra.rank else 0.0


def lost_share(module_spectra: ModuleSpectra, rank: int) -> float:
    """Return the share of the energy that truncation to a rank leaves out."""
    energies = module_spectra.cumulative_energy()
    lost_energy = module_spectra.energy - float(energies[min(rank, len(energies) - 1)])
    return (
        max(0.0, lost_energy / module_spectra.energy) if module_spectra.energy and math.isfinite(module_spectra.energy) else 0.0
    )
