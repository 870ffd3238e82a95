"""Methods in subspaces, against their formulas on dense matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub.merging.adapters.methods import Random
from adapterhub.merging.adapters.methods.element_rules import draw_mask
from tests.merging.factored import Dense, close, dense, elect, merged, trim, two_deltas


def test_knots_merges_the_right_vectors_of_the_concatenated_deltas() -> None:
    deltas, weights = two_deltas(), [0.7, -0.4]
    u, s, vt = np.linalg.svd(np.concatenate([dense(delta) for delta in deltas], axis=1), full_matrices=False)
    u, s, vt = u[:, :8], s[:8], vt[:8]
    parts = [trim(vt[:, :9], 0.4), trim(vt[:, 9:], 0.4)]
    close(merged(deltas, weights, "knots", density=0.4, **{"lambda": 1.5}), 1.5 * u * s @ elect(parts, weights))


@pytest.mark.parametrize("rule", ["ties", "linear", "dare_ties", "dare_linear"])
def test_core_space_merges_cores_between_common_bases(rule: str) -> None:
    deltas, weights = two_deltas((2, 3)), [0.7, 0.6]
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
    merged_delta = merged(deltas, weights, "core_space", rule=rule, density=0.4)
    if rule.startswith("dare"):  # signs of singular vectors are free, and a mask is not turned with them: up to those
        close(np.sort(np.abs(u.T @ merged_delta @ v), axis=None), np.sort(np.abs(core), axis=None))
    else:
        close(merged_delta, u @ core @ v.T)


def whiten(x: Dense) -> Dense:
    p, d, qt = np.linalg.svd(x, full_matrices=False)
    keep = d > 1e-7 * d[0]
    return p[:, keep] @ qt[keep]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_tsv_turns_the_first_vectors_of_all_until_they_do_not_overlap(share: float) -> None:
    deltas, weights = two_deltas((3, 5)), [1.0, 0.5]
    u, s, v = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        decomposition = np.linalg.svd(dense(delta), full_matrices=False)
        k = max(1, round(share * delta.r))
        u, s, v = [*u, decomposition[0][:, :k]], [*s, weight * decomposition[1][:k]], [*v, decomposition[2][:k].T]
    expected = whiten(np.concatenate(u, axis=1)) * np.concatenate(s) @ whiten(np.concatenate(v, axis=1)).T
    close(merged(deltas, weights, "tsv", share=share, **{"lambda": 2.0}), 2 * expected)


def test_iso_c_makes_the_singular_values_of_the_sum_equal() -> None:
    deltas = two_deltas((2, 3))
    u, s, vt = np.linalg.svd(dense(deltas[0]) - 0.5 * dense(deltas[1]), full_matrices=False)
    close(merged(deltas, [1, -0.5], "iso_c"), s[:5].mean() * u[:, :5] @ vt[:5])
