"""Every method against its formula, written out on dense matrices in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import METHODS, combine
from adapterhub.merging.adapters import tiled_matrix as dense_tiles
from adapterhub.merging.adapters.methods import Random
from adapterhub.merging.adapters.methods.element_rules import draw_mask, keep_probabilities
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.errors import ParameterError
from tests.merging.factored import Dense, adapter, dense, low_rank, some

FULL = 9  # the smaller side of the matrices here, so that nothing is truncated


def merged(deltas: Sequence[Any], weights: Sequence[float], method: str, *, rank: Any = FULL, **parameters: Any) -> Dense:
    cut: dict[str, Any] = {"rank": rank if METHODS[method].cuts else None}
    result, _ = combine([adapter(q=delta) for delta in deltas], weights, method=method, parameters=parameters, **cut)
    return dense(result.deltas["q"])


def close(found: np.ndarray, wanted: np.ndarray, most: float = 1e-5) -> None:
    np.testing.assert_allclose(found, wanted, atol=most * np.abs(wanted).max())


# ---- in factor space


def arc(a: Dense, b: Dense, t: float) -> Dense:
    angle = math.acos(float(np.sum(a * b)) / float(np.linalg.norm(a) * np.linalg.norm(b)))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_the_point_of_the_great_circle(t: float) -> None:
    one, two = some()
    close(merged([one, two], [1, 1], "slerp", t=t), arc(dense(one), dense(two), t))


def test_slerp_of_what_is_parallel_or_zero_is_a_straight_line() -> None:
    one = low_rank(3)
    for other in (low_rank(3, alpha=6.0), low_rank(3, alpha=-3.0), low_rank(3, alpha=0.0)):
        close(merged([one, other], [1, 1], "slerp", t=0.25), 0.75 * dense(one) + 0.25 * dense(other))


@pytest.mark.parametrize("by", ["all", "rows", "columns"])
def test_nuslerp_goes_by_the_weights_for_all_rows_or_columns(by: str) -> None:
    one, two = some()
    a, b, t = dense(one), dense(two), 3 / 4
    expected = {
        "all": lambda: arc(a, b, t),
        "rows": lambda: np.stack([arc(x, y, t) for x, y in zip(a, b, strict=True)]),
        "columns": lambda: np.stack([arc(x, y, t) for x, y in zip(a.T, b.T, strict=True)]).T,
    }[by]()
    close(merged([one, two], [0.5, 1.5], "nuslerp", by=by), expected)


def test_karcher_is_the_point_with_no_way_to_go_and_the_mean_length() -> None:
    deltas, shares = some((3, 5, 2)), np.array([0.2, 0.5, 0.3])
    found = merged(deltas, [0.4, 1.0, 0.6], "karcher")
    lengths = np.array([np.linalg.norm(dense(delta)) for delta in deltas])
    assert np.linalg.norm(found) == pytest.approx(float(shares @ lengths), rel=1e-6)
    point = found / np.linalg.norm(found)
    step = np.zeros_like(point)
    for share, delta, length in zip(shares, deltas, lengths, strict=True):
        unit = dense(delta) / length
        angle = math.acos(float(np.sum(unit * point)))
        step += share * angle / math.sin(angle) * (unit - math.cos(angle) * point)
    assert np.linalg.norm(step) < 1e-6


def test_karcher_of_two_is_the_middle_of_the_arc() -> None:
    one, two = low_rank(3), low_rank(3, seed=1)
    a, b = dense(one), dense(two)
    middle = arc(a / np.linalg.norm(a), b / np.linalg.norm(b), 0.5) * (np.linalg.norm(a) + np.linalg.norm(b)) / 2
    close(merged([one, two], [1, 1], "karcher"), middle)


def test_model_stock_draws_the_mean_back_by_the_mean_cosine() -> None:
    deltas = [low_rank(4), *(low_rank(4, seed=seed) for seed in (1, 2))]
    deltas = [low_rank(9, 12, 9, 7), *(low_rank(9, 12, 9, 7, alpha=5.0), low_rank(9, 12, 9, 8))]
    matrices = [dense(delta) for delta in deltas]
    units = [matrix / np.linalg.norm(matrix) for matrix in matrices]
    cosine = np.mean([np.sum(a * b) for a, b in itertools.combinations(units, 2)])
    t = 3 * cosine / (1 + 2 * cosine)
    close(merged(deltas, [1, 1, 1], "model_stock"), t * np.mean(matrices, axis=0))


def test_karcher_of_what_is_zero_counts_in_the_mean_length_alone() -> None:
    one, two, zero = low_rank(3), low_rank(3, seed=1), low_rank(3, seed=2, alpha=0.0)
    expected = merged([one, two], [1, 1], "karcher") / 2
    close(merged([one, two, zero], [1, 1, 2], "karcher"), expected)
    assert not merged([zero, zero], [1, 1], "karcher").any()


def test_karcher_of_short_deltas_is_that_of_long_ones_shortened() -> None:
    long, short = ([low_rank(3, alpha=alpha), low_rank(3, seed=1, alpha=alpha)] for alpha in (3.0, 0.003))
    close(merged(short, [1, 3], "karcher"), merged(long, [1, 3], "karcher") / 1000)


def test_karcher_of_what_is_parallel_is_that_direction_and_of_opposites_the_first_one_s() -> None:
    one, opposite = low_rank(3, alpha=3.0), low_rank(3, alpha=-3.0)
    close(merged([one, low_rank(3, alpha=9.0)], [1, 1], "karcher"), 2 * dense(one))
    close(merged([one, opposite], [1, 1], "karcher"), dense(one))
    close(merged([opposite, one], [1, 1], "karcher"), dense(opposite))


def test_model_stock_keeps_what_one_adapter_alone_changes() -> None:
    one, alone = low_rank(4), low_rank(4, seed=3)
    result, _ = combine([adapter(q=one, k=alone), adapter(q=low_rank(4, seed=1))], [1, 1], method="model_stock")
    close(dense(result.deltas["k"]), dense(alone))


def trim(x: Dense, density: float) -> Dense:
    least = np.sort(np.abs(x), axis=None)[::-1][int(density * x.size) - 1]
    return np.where(np.abs(x) >= least, x, 0)


def elect(parts: Sequence[Dense], weights: Sequence[float]) -> Dense:
    weighted = np.stack([weight * part for part, weight in zip(parts, weights, strict=True)])
    agrees = np.sign(weighted) == np.sign(weighted.sum(axis=0))
    agrees &= weighted != 0
    share = np.abs(np.array(weights))[:, None, None] * agrees
    return (weighted * agrees).sum(axis=0) / np.where(share.sum(axis=0) > 0, share.sum(axis=0), 1)


def test_knots_merges_the_right_vectors_of_the_concatenated_deltas() -> None:
    deltas, weights = some(), [0.7, -0.4]
    u, s, vt = np.linalg.svd(np.concatenate([dense(delta) for delta in deltas], axis=1), full_matrices=False)
    u, s, vt = u[:, :8], s[:8], vt[:8]
    parts = [trim(vt[:, :9], 0.4), trim(vt[:, 9:], 0.4)]
    close(merged(deltas, weights, "knots", density=0.4, **{"lambda": 1.5}), 1.5 * u * s @ elect(parts, weights))


@pytest.mark.parametrize("rule", ["ties", "linear", "dare_ties", "dare_linear"])
def test_core_space_merges_cores_between_common_bases(rule: str) -> None:
    deltas, weights = some((2, 3)), [0.7, 0.6]
    matrices = [dense(delta) for delta in deltas]
    u = np.linalg.svd(np.concatenate(matrices, axis=1))[0][:, :5]
    v = np.linalg.svd(np.concatenate(matrices))[2][:5].T
    cores = [u.T @ matrix @ v for matrix in matrices]
    if rule == "ties":
        cores = [trim(core, 0.4) for core in cores]
    elif rule.startswith("dare"):
        masks = [draw_mask(Random(0, "q").generator(index), (5, 5), 0.4) for index in range(2)]
        cores = [core * mask / 0.4 for core, mask in zip(cores, masks, strict=True)]
    core = elect(cores, weights) if rule.endswith("ties") else weights[0] * cores[0] + weights[1] * cores[1]
    found = merged(deltas, weights, "core_space", rule=rule, density=0.4)
    if rule.startswith("dare"):  # signs of singular vectors are free, and a mask is not turned with them: up to those
        close(np.sort(np.abs(u.T @ found @ v), axis=None), np.sort(np.abs(core), axis=None))
    else:
        close(found, u @ core @ v.T)


def whiten(x: Dense) -> Dense:
    p, d, qt = np.linalg.svd(x, full_matrices=False)
    keep = d > 1e-7 * d[0]
    return p[:, keep] @ qt[keep]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_tsv_turns_the_first_vectors_of_all_until_they_do_not_overlap(share: float) -> None:
    deltas, weights = some((3, 5)), [1.0, 0.5]
    u, s, v = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        found = np.linalg.svd(dense(delta), full_matrices=False)
        k = max(1, round(share * delta.r))
        u, s, v = [*u, found[0][:, :k]], [*s, weight * found[1][:k]], [*v, found[2][:k].T]
    expected = whiten(np.concatenate(u, axis=1)) * np.concatenate(s) @ whiten(np.concatenate(v, axis=1)).T
    close(merged(deltas, weights, "tsv", share=share, **{"lambda": 2.0}), 2 * expected)


def test_iso_c_makes_the_singular_values_of_the_sum_equal() -> None:
    deltas = some((2, 3))
    u, s, vt = np.linalg.svd(dense(deltas[0]) - 0.5 * dense(deltas[1]), full_matrices=False)
    close(merged(deltas, [1, -0.5], "iso_c"), s[:5].mean() * u[:, :5] @ vt[:5])


# ---- element by element


def masks(density: float, shape: tuple[int, int] = (12, 9)) -> list[Dense]:
    """What the seed 0 keeps of two adapters in the module q."""
    return [draw_mask(Random(0, "q").generator(index, 0), shape, density) for index in range(2)]


def dare(deltas: Sequence[Any], density: float) -> list[Dense]:
    return [dense(delta) * mask / density for delta, mask in zip(deltas, masks(density), strict=True)]


def della_parts(deltas: Sequence[Any], density: float, epsilon: float) -> list[Dense]:
    parts = []
    for index, delta in enumerate(deltas):
        matrix = dense(delta)
        ranks = np.argsort(np.argsort(np.abs(matrix), axis=1), axis=1)
        likely = density - epsilon + 2 * epsilon * ranks / (matrix.shape[1] - 1)
        mask = Random(0, "q").generator(index, 0).random(matrix.shape, dtype=np.float32) < likely
        parts.append(matrix * mask / likely)
    return parts


def breadcrumbs_part(delta: Any, density: float, gamma: float) -> Dense:
    matrix = dense(delta)
    order = np.argsort(-np.abs(matrix), axis=None)
    keep = np.zeros(matrix.size, bool)
    keep[order[int(gamma * matrix.size) : int(gamma * matrix.size) + int(density * matrix.size)]] = True
    return np.where(keep.reshape(matrix.shape), matrix, 0)


def sce_of(deltas: Sequence[Any], density: float) -> Dense:
    matrices = np.stack([dense(delta) for delta in deltas])
    variance = matrices.var(axis=0)
    chosen = variance >= np.sort(variance, axis=None)[::-1][int(density * variance.size) - 1]
    parts = matrices * chosen
    energies = (parts**2).mean(axis=(1, 2))
    shares = (energies / energies.sum())[:, None, None]
    agrees = (np.sign(parts) == np.sign(parts.sum(axis=0))) & (parts != 0)
    weight = (shares * agrees).sum(axis=0)
    return (shares * parts * agrees).sum(axis=0) / np.where(weight > 0, weight, 1)


ELEMENTWISE: dict[str, tuple[dict[str, Any], Callable[[list[Any], list[float]], Dense]]] = {
    "ties": ({"density": 0.3, "lambda": 2.0}, lambda d, w: 2 * elect([trim(dense(x), 0.3) for x in d], w)),
    "magnitude_prune": (
        {"density": 0.3}, lambda d, w: sum(weight * trim(dense(x), 0.3) for x, weight in zip(d, w, strict=True))
    ),
    "dare_linear": ({"density": 0.6}, lambda d, w: sum(weight * x for x, weight in zip(dare(d, 0.6), w, strict=True))),
    "dare_ties": ({"density": 0.6, "lambda": 0.5}, lambda d, w: 0.5 * elect(dare(d, 0.6), w)),
    "della": (
        {"density": 0.6, "epsilon": 0.2, "lambda": 0.5}, lambda d, w: 0.5 * elect(della_parts(d, 0.6, 0.2), w)
    ),
    "breadcrumbs": (
        {"density": 0.5, "gamma": 0.1, "lambda": 2.0},
        lambda d, w: sum(2 * weight * breadcrumbs_part(x, 0.5, 0.1) for x, weight in zip(d, w, strict=True)),
    ),
    "sce": ({"density": 0.4}, lambda d, _: sce_of(d, 0.4)),
}  # fmt: skip


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_what_is_done_element_by_element_is_done_to_the_dense_delta(method: str) -> None:
    parameters, formula = ELEMENTWISE[method]
    deltas = some()
    weights = [1.0, 1.0] if METHODS[method].weights == "none" else [0.7, -0.4]
    close(merged(deltas, weights, method, **parameters), formula(deltas, weights))


@pytest.mark.parametrize(
    ("method", "fits", "does_not"),
    [
        ("breadcrumbs", {"density": 0.9, "gamma": 0.1}, {"density": 0.9, "gamma": 0.11}),
        ("della", {"density": 0.5, "epsilon": 0.4}, {"density": 0.5, "epsilon": 0.5}),
        ("della", {"density": 0.75, "epsilon": 0.25}, {"density": 0.75, "epsilon": 0.26}),
    ],
)
def test_parameters_that_are_no_probabilities_together_are_refused(
    method: str, fits: dict[str, Any], does_not: dict[str, Any]
) -> None:
    merged(some(), [1, 1], method, **fits)
    with pytest.raises(ParameterError, match="sum to more than 1|is not a probability above 0. Use a smaller epsilon"):
        merged(some(), [1, 1], method, **does_not)


def test_sce_of_what_is_done_element_by_element_to_zeros_is_zero() -> None:
    zero = low_rank(3, alpha=0.0)
    assert not merged([zero, zero], [1, 1], "sce", density=0.4).any()


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
        other = merged(deltas, [1, 1], method, rank=40, **parameters)
        assert np.count_nonzero(np.abs(other) > 1e-4) == pytest.approx(np.count_nonzero(np.abs(whole) > 1e-4), rel=0.1)


def test_more_of_a_row_is_kept_of_what_is_larger_in_it() -> None:
    row = np.array([[0.1, -3.0, 0.0, 2.0, -1.0]], np.float32)
    np.testing.assert_allclose(keep_probabilities(row, 0.5, 0.2), [[0.4, 0.7, 0.3, 0.6, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("counts", [[1], [57, 3], [0, 4000], [2000]])
def test_the_magnitude_that_so_many_elements_reach_is_exact(counts: list[int]) -> None:
    rng = np.random.default_rng(3)
    array = (rng.normal(size=(80, 50)) * 10.0 ** rng.integers(-8, 8, (80, 50))).astype(np.float32)
    array[:10] = 0
    array[10:13] = 1.5
    found = dense_tiles.magnitude_thresholds(dense_tiles.TiledMatrix(array.shape, array.__getitem__), counts)
    order = np.sort(np.abs(array), axis=None)[::-1]
    assert found == [float(order[count - 1]) if count else math.inf for count in counts]


@pytest.mark.parametrize("rank", [1, 6, 40])
def test_a_sketch_is_as_good_as_the_decomposition_of_the_whole(rank: int) -> None:
    rng = np.random.default_rng(4)
    array = rng.normal(size=(120, 70)).astype(np.float32)
    matrix = dense_tiles.TiledMatrix(array.shape, array.__getitem__)
    found = dense_tiles.sketch(matrix, rank, rng).truncate(rank)
    values = np.linalg.svd(array.astype(np.float64), compute_uv=False)
    best = math.sqrt(float(np.sum(values[rank:] ** 2)))
    error = float(np.linalg.norm(array - found.left @ found.right))
    assert best * (1 - 1e-5) <= error <= 1.03 * best  # of noise, whose singular values fall as slowly as can be
    assert dense_tiles.residual(matrix, found) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 4), (900, 16, 700), (64, 4000, 26), (4000, 64, 26), (300, 300, 300), (1, 9000, 900)])
def test_a_product_in_pieces_is_the_product(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(5)
    one, two = rng.normal(size=shape[:2]).astype(np.float32), rng.normal(size=shape[1:]).astype(np.float32)
    close(dense_tiles.product(one, two), one.astype(np.float64) @ two.astype(np.float64), 1e-4)


# ---- of all methods

TWO = [name for name, method in METHODS.items() if method.count[0] <= 2 <= method.count[1]]
CHANCE = {name for name, method in METHODS.items() if method.random}


def parts(method: str) -> list[Adapter]:
    """Of two adapters, of one rank."""
    return [adapter(q=delta, k=low_rank(4, 20, 30, 9 + seed)) for seed, delta in enumerate(some((4, 4)))]


@pytest.mark.parametrize("method", TWO)
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    one, two = (combine(parts(method), [1, 1], method=method, seed=7)[0] for _ in range(2))
    for target, delta in one.deltas.items():
        for (_, x), (_, y) in zip(delta.parts(), two.deltas[target].parts(), strict=True):
            assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("method", sorted(CHANCE - {"core_space"}))
def test_another_seed_gives_another_result(method: str) -> None:
    one, two = (combine(parts(method), [1, 1], method=method, seed=seed)[0] for seed in (0, 1))
    assert np.abs(dense(one.deltas["q"]) - dense(two.deltas["q"])).max() > 1e-3


@pytest.mark.parametrize("method", [name for name in TWO if name not in CHANCE - {"core_space"} and name != "slerp"])
def test_the_order_of_the_adapters_is_no_matter(method: str) -> None:
    two = parts(method)
    weights = [1.0, 1.0] if METHODS[method].weights == "none" else [0.3, 0.6]
    first, other = combine(two, weights, method=method)[0], combine(two[::-1], weights[::-1], method=method)[0]
    for target in ("q", "k"):
        close(dense(other.deltas[target]), dense(first.deltas[target]), 2e-4)


KEEPS_ALL = {"density": 1.0, "gamma": 0.0, "epsilon": 0.0}


# tsv: the second's vectors are in the way of the first's, whatever its weight; some of peft's elect without the weights.
WEIGHED = [name for name in TWO if METHODS[name].weights != "none" and name not in ("iso_c", "tsv") and "peft" not in name]


@pytest.mark.parametrize("method", [*WEIGHED, "peft_linear", "peft_dare_linear", "peft_magnitude_prune"])
def test_all_weight_on_the_first_gives_the_first(method: str) -> None:
    two = parts(method)
    own = {name: value for name, value in KEEPS_ALL.items() if name in METHODS[method].parameters}
    result, _ = combine(two, [1.0, 0.0], method=method, parameters=own)
    first = dense(two[0].deltas["q"])
    close(dense(result.deltas["q"]), first, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_shows_its_formula_paper_rank_and_cost(method: str) -> None:
    text = METHODS[method].run.__doc__ or ""
    assert [part for part in ("Formula: ", "Rank: ", "Paper: ", "Cost: ") if part not in text] == []
    assert METHODS[method].summary.endswith(".")
