"""A merge in tiles is the merge of the whole, whatever their size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adapterhub.merging import METHODS
from adapterhub.merging.adapters import tiled_matrix as dense_tiles
from tests.merging.adapters.methods.test_elementwise import ELEMENTWISE
from tests.merging.factored import close, low_rank, merged


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_the_size_of_tiles_is_no_matter(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, _ = ELEMENTWISE[method]
    deltas = [low_rank(3, 70, 40, seed) for seed in range(2)]
    whole = merged(deltas, [1, 1], method, rank=40, **parameters)
    monkeypatch.setattr(dense_tiles, "_TILE", 400)
    monkeypatch.setattr(dense_tiles, "_KEEP", 0)
    if not METHODS[method].random:
        close(merged(deltas, [1, 1], method, rank=40, **parameters), whole, 1e-5)
    else:  # the masks are drawn for each tile, so they are others; the share that is kept is the same
        tiled = merged(deltas, [1, 1], method, rank=40, **parameters)
        assert np.count_nonzero(np.abs(tiled) > 1e-4) == pytest.approx(np.count_nonzero(np.abs(whole) > 1e-4), rel=0.1)


@pytest.mark.parametrize("counts", [[1], [57, 3], [0, 4000], [2000]])
def test_the_magnitude_that_so_many_elements_reach_is_exact(counts: list[int]) -> None:
    rng = np.random.default_rng(3)
    array = (rng.normal(size=(80, 50)) * 10.0 ** rng.integers(-8, 8, (80, 50))).astype(np.float32)
    array[:10] = 0
    array[10:13] = 1.5
    thresholds = dense_tiles.magnitude_thresholds(dense_tiles.TiledMatrix(array.shape, array.__getitem__), counts)
    order = np.sort(np.abs(array), axis=None)[::-1]
    assert thresholds == [float(order[count - 1]) if count else math.inf for count in counts]


@pytest.mark.parametrize("rank", [1, 6, 40])
def test_a_sketch_is_as_good_as_the_decomposition_of_the_whole(rank: int) -> None:
    rng = np.random.default_rng(4)
    array = rng.normal(size=(120, 70)).astype(np.float32)
    matrix = dense_tiles.TiledMatrix(array.shape, array.__getitem__)
    truncated = dense_tiles.sketch(matrix, rank, rng).truncate(rank)
    values = np.linalg.svd(array.astype(np.float64), compute_uv=False)
    best = math.sqrt(float(np.sum(values[rank:] ** 2)))
    error = float(np.linalg.norm(array - truncated.left @ truncated.right))
    assert best * (1 - 1e-5) <= error <= 1.03 * best  # of noise, whose singular values fall as slowly as can be
    assert dense_tiles.residual(matrix, truncated) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 4), (900, 16, 700), (64, 4000, 26), (4000, 64, 26), (300, 300, 300), (1, 9000, 900)])
def test_a_product_in_pieces_is_the_product(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(5)
    left_factor, right_factor = rng.normal(size=shape[:2]).astype(np.float32), rng.normal(size=shape[1:]).astype(np.float32)
    close(
        dense_tiles.product(left_factor, right_factor), left_factor.astype(np.float64) @ right_factor.astype(np.float64), 1e-4
    )
