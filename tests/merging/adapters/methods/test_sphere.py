"""Methods on the sphere, against their formulas on dense matrices in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from adapterhub.merging import combine
from tests.merging.factored import Dense, adapter, close, dense, low_rank, merged, two_deltas


def arc(a: Dense, b: Dense, t: float) -> Dense:
    angle = math.acos(float(np.sum(a * b)) / float(np.linalg.norm(a) * np.linalg.norm(b)))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_the_point_of_the_great_circle(t: float) -> None:
    first, second = two_deltas()
    close(merged([first, second], [1, 1], "slerp", t=t), arc(dense(first), dense(second), t))


def test_slerp_of_what_is_parallel_or_zero_is_a_straight_line() -> None:
    first = low_rank(3)
    for parallel in (low_rank(3, alpha=6.0), low_rank(3, alpha=-3.0), low_rank(3, alpha=0.0)):
        close(merged([first, parallel], [1, 1], "slerp", t=0.25), 0.75 * dense(first) + 0.25 * dense(parallel))


@pytest.mark.parametrize("by", ["all", "rows", "columns"])
def test_nuslerp_goes_by_the_weights_for_all_rows_or_columns(by: str) -> None:
    first, second = two_deltas()
    a, b, t = dense(first), dense(second), 3 / 4
    expected = {
        "all": lambda: arc(a, b, t),
        "rows": lambda: np.stack([arc(x, y, t) for x, y in zip(a, b, strict=True)]),
        "columns": lambda: np.stack([arc(x, y, t) for x, y in zip(a.T, b.T, strict=True)]).T,
    }[by]()
    close(merged([first, second], [0.5, 1.5], "nuslerp", by=by), expected)


def test_karcher_is_the_point_with_no_way_to_go_and_the_mean_length() -> None:
    deltas, shares = two_deltas((3, 5, 2)), np.array([0.2, 0.5, 0.3])
    mean = merged(deltas, [0.4, 1.0, 0.6], "karcher")
    lengths = np.array([np.linalg.norm(dense(delta)) for delta in deltas])
    assert np.linalg.norm(mean) == pytest.approx(float(shares @ lengths), rel=1e-6)
    point = mean / np.linalg.norm(mean)
    step = np.zeros_like(point)
    for share, delta, length in zip(shares, deltas, lengths, strict=True):
        unit = dense(delta) / length
        angle = math.acos(float(np.sum(unit * point)))
        step += share * angle / math.sin(angle) * (unit - math.cos(angle) * point)
    assert np.linalg.norm(step) < 1e-6


def test_karcher_of_two_is_the_middle_of_the_arc() -> None:
    first, second = low_rank(3), low_rank(3, seed=1)
    a, b = dense(first), dense(second)
    middle = arc(a / np.linalg.norm(a), b / np.linalg.norm(b), 0.5) * (np.linalg.norm(a) + np.linalg.norm(b)) / 2
    close(merged([first, second], [1, 1], "karcher"), middle)


def test_model_stock_draws_the_mean_back_by_the_mean_cosine() -> None:
    deltas = [low_rank(4), *(low_rank(4, seed=seed) for seed in (1, 2))]
    deltas = [low_rank(9, 12, 9, 7), *(low_rank(9, 12, 9, 7, alpha=5.0), low_rank(9, 12, 9, 8))]
    matrices = [dense(delta) for delta in deltas]
    units = [matrix / np.linalg.norm(matrix) for matrix in matrices]
    cosine = np.mean([np.sum(a * b) for a, b in itertools.combinations(units, 2)])
    t = 3 * cosine / (1 + 2 * cosine)
    close(merged(deltas, [1, 1, 1], "model_stock"), t * np.mean(matrices, axis=0))


def test_karcher_of_what_is_zero_counts_in_the_mean_length_alone() -> None:
    first, second, zero = low_rank(3), low_rank(3, seed=1), low_rank(3, seed=2, alpha=0.0)
    expected = merged([first, second], [1, 1], "karcher") / 2
    close(merged([first, second, zero], [1, 1, 2], "karcher"), expected)
    assert not merged([zero, zero], [1, 1], "karcher").any()


def test_karcher_of_short_deltas_is_that_of_long_ones_shortened() -> None:
    long, short = ([low_rank(3, alpha=alpha), low_rank(3, seed=1, alpha=alpha)] for alpha in (3.0, 0.003))
    close(merged(short, [1, 3], "karcher"), merged(long, [1, 3], "karcher") / 1000)


def test_karcher_of_what_is_parallel_is_that_direction_and_of_opposites_the_first_one_s() -> None:
    direction, opposite = low_rank(3, alpha=3.0), low_rank(3, alpha=-3.0)
    close(merged([direction, low_rank(3, alpha=9.0)], [1, 1], "karcher"), 2 * dense(direction))
    close(merged([direction, opposite], [1, 1], "karcher"), dense(direction))
    close(merged([opposite, direction], [1, 1], "karcher"), dense(opposite))


def test_model_stock_keeps_what_one_adapter_alone_changes() -> None:
    shared, alone = low_rank(4), low_rank(4, seed=3)
    result, _ = combine([adapter(q=shared, k=alone), adapter(q=low_rank(4, seed=1))], [1, 1], method="model_stock")
    close(dense(result.deltas["k"]), dense(alone))
