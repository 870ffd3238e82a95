"""The exact merged delta of a module, row by row: for a merge into a base, where it need not fit into thin factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from adapterhub.analysis.low_rank import Factors
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.errors import ParameterError

from .matrices import check_size, zeros_like
from .methods import Matrix, Random, method_named
from .other_parts import check_unmerged
from .tiled_matrix import F32Array, TiledMatrix, product, row_tiles

RowsOf = Callable[[int, int], F32Array]
"""`(start, stop)`: these rows of a matrix, in float32."""
_CACHED = 8  # tiles of all matrices: the rows that a caller asks for may end within one


class UntruncatedMerge:
    """A method with its parameters and the weights of the adapters.

    Args:
        name: A method of `METHODS`, but none of those that merge `lora_A` and `lora_B` separately.
        parameters: All of its parameters.
        weights: One for each adapter.
        seed: The seed of random numbers.

    Raises:
        ParameterError: The method works on factors.
    """

    def __init__(self, name: str, parameters: Mapping[str, float | str], weights: Sequence[float], seed: int) -> None:
        self.method = method_named(name)
        if self.method.on_factors:
            raise ParameterError("method", f"{name} merges lora_A and lora_B separately", "Merge into an adapter first")
        self.parameters, self._weights, self._seed = parameters, list(weights), seed
        self._tile = lru_cache(_CACHED)(_tile)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Refuse adapters with parts that the method cannot merge; the error names the part."""
        check_unmerged(adapters, self.method, into_base=True)

    def __call__(self, target: str, terms: Sequence[Factors | None]) -> RowsOf:
        """Return a function that computes rows of the merged matrix.

        Args:
            target: The name of the matrix, for errors and for random numbers.
            terms: The delta of each adapter with its scale; None from one that does not change the matrix.
        """
        present = [term for term in terms if term is not None]
        weights = [weight for term, weight in zip(terms, self._weights, strict=True) if term is not None]
        check_size(target, present, weights, dense=self.method.dense)
        if self.method.missing == "zeros" and len(present) < len(terms):
            present, weights = [term or zeros_like(present[0]) for term in terms], self._weights
        random = Random(self._seed, target)
        merged = self.method(present, weights, scales=[1.0] * len(present), random=random, parameters=self.parameters)
        return self._rows_of(merged)

    def _rows_of(self, matrix: Matrix) -> RowsOf:
        if not isinstance(matrix, TiledMatrix):
            left, right = matrix.left.astype(np.float32), matrix.right.astype(np.float32)
            return lambda start, stop: product(left[start:stop], right)
        # Random numbers are drawn by tile, so a tile is always computed as a whole.
        bounds = [(rows.start, rows.stop) for rows in row_tiles(matrix.shape)]
        step = bounds[0][1]

        def rows(start: int, stop: int) -> F32Array:
            tile_bounds = bounds[start // step : -(-stop // step)]
            parts = [self._tile(matrix, *tile)[max(0, start - tile[0]) : stop - tile[0]] for tile in tile_bounds]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        return rows


def _tile(matrix: TiledMatrix, start: int, stop: int) -> F32Array:
    return matrix.make(slice(start, stop))
