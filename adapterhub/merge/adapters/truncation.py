"""How much of a merged matrix is kept: a rank, a share of its energy, or what fits in so many bytes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adapterhub.analysis.low_rank import Factors, Spectrum, spectrum
from adapterhub_converters.errors import RefusedError, UsageError

from .dense import Tiled, sketched
from .methods import Matrix, Random

_ITEM = 4  # bytes of a number in the result


@dataclass(frozen=True)
class Cut:
    """At most one of them; none leaves it to the method.

    Attributes:
        rank: Of every module.
        energy: The share of the sum of the squares that every module keeps at least.
        budget: Bytes that the tensors of the whole adapter may have; spent where a rank keeps most for its bytes.
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None

    def check(self) -> None:
        """UsageError unless it can be asked for."""
        given = {"--rank": self.rank, "--energy": self.energy, "--rank-budget": self.budget}
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) > 1:
            raise UsageError(asked[1], f"says how much to keep, as {asked[0]} does", "Give one of them")
        if self.rank is not None and self.rank < 1:
            raise UsageError("--rank", f"{self.rank} is below 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError("--energy", f"{self.energy} is no share above 0 and up to 1", "Write it like 0.99")
        if self.budget is not None and self.budget < 1:
            raise UsageError("--rank-budget", f"{self.budget} is below 1")

    @property
    def asked(self) -> bool:
        """Whether anything is."""
        return self != Cut()


@dataclass(frozen=True, eq=False)
class Spectra:
    """The singular values of one module's matrices, one or one for each expert of a stack, and all energy there is."""

    parts: tuple[Spectrum, ...]
    energy: float

    @property
    def rank(self) -> int:
        """The least that holds what is known of all of them."""
        return max((part.rank for part in self.parts), default=1)

    def kept(self) -> np.ndarray:
        """The energy of the first 0, 1, 2 … ranks, all parts together."""
        squares = np.zeros(max(len(part.s) for part in self.parts))
        for part in self.parts:
            squares[: len(part.s)] += part.s**2
        return np.concatenate([[0.0], np.cumsum(squares)])

    def rank_for(self, energy: float) -> int | None:
        """The least that keeps the share; None if more singular values would have to be known."""
        enough = np.nonzero(self.kept() >= energy * self.energy * (1 - 1e-12))[0]
        return max(1, int(enough[0])) if len(enough) else None

    def truncated(self, rank: int) -> list[Factors]:
        """Each part in that rank, with zeros where it has a lower one."""
        return [_padded(part.truncated(min(rank, len(part.s))), rank) for part in self.parts]

    @property
    def bytes_for_one(self) -> int:
        """What a rank takes."""
        return _ITEM * sum(int(part.u.shape[0] + part.vt.shape[1]) for part in self.parts)


def _padded(factors: Factors, rank: int) -> Factors:
    short = rank - factors.r
    if not short:
        return factors
    left, right = factors.left, factors.right
    return Factors(np.pad(left, ((0, 0), (0, short))), np.pad(right, ((0, short), (0, 0))))


def spectra(matrices: Sequence[Matrix], *, ranks: Sequence[int], cut: Cut, random: Random) -> Spectra:
    """As many singular values as the cut needs; `ranks` are those of the adapters."""
    wanted = cut.rank or (max(ranks) if not cut.asked else sum(ranks))
    found = _spectra(matrices, wanted, random)
    while cut.energy is not None and found.rank_for(cut.energy) is None:
        widest = max(min(matrix.shape) for matrix in matrices if isinstance(matrix, Tiled))
        if wanted >= widest:  # all there are, but for rounding
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
    """The rank of every module, at least 1, so that all take no more bytes and keep as much energy as those can.

    A rank after the other goes to the module where it keeps most energy for its bytes (singular values fall, so that
    this greedy choice is the best there is, up to the last rank that does not fit).
    """
    ranks = dict.fromkeys(modules, 1)
    left = budget - sum(found.bytes_for_one for found in modules.values())
    if left < 0:
        raise RefusedError("--rank-budget", f"{budget} bytes are not enough: rank 1 of all modules takes {budget - left}")
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
    """The energy that a rank beyond `rank` keeps, over its bytes."""
    more = rank < min(found.rank, len(gains))
    return float(gains[rank]) / found.bytes_for_one if more else 0.0


def lost(found: Spectra, rank: int) -> float:
    """The share of the energy that a rank leaves out."""
    kept = found.kept()
    rest = found.energy - float(kept[min(rank, len(kept) - 1)])
    return max(0.0, rest / found.energy) if found.energy and math.isfinite(found.energy) else 0.0
