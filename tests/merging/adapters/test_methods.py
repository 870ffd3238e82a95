"""What holds of every merge method: its seed, the order and weights of adapters, the formula that it shows."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub.merging import METHODS, combine
from adapterhub_converters.adapter import Adapter
from tests.merging.factored import adapter, close, dense, low_rank, two_deltas

TWO = [name for name, method in METHODS.items() if method.count[0] <= 2 <= method.count[1]]
CHANCE = {name for name, method in METHODS.items() if method.random}


def parts(method: str) -> list[Adapter]:
    """Of two adapters, of one rank."""
    return [adapter(q=delta, k=low_rank(4, 20, 30, 9 + seed)) for seed, delta in enumerate(two_deltas((4, 4)))]


@pytest.mark.parametrize("method", TWO)
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    first, second = (combine(parts(method), [1, 1], method=method, seed=7)[0] for _ in range(2))
    for target, delta in first.deltas.items():
        for (_, x), (_, y) in zip(delta.parts(), second.deltas[target].parts(), strict=True):
            assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("method", sorted(CHANCE - {"core_space"}))
def test_another_seed_gives_another_result(method: str) -> None:
    first, second = (combine(parts(method), [1, 1], method=method, seed=seed)[0] for seed in (0, 1))
    assert np.abs(dense(first.deltas["q"]) - dense(second.deltas["q"])).max() > 1e-3


@pytest.mark.parametrize("method", [name for name in TWO if name not in CHANCE - {"core_space"} and name != "slerp"])
def test_the_order_of_the_adapters_is_no_matter(method: str) -> None:
    two = parts(method)
    weights = [1.0, 1.0] if METHODS[method].weights == "none" else [0.3, 0.6]
    first, swapped = combine(two, weights, method=method)[0], combine(two[::-1], weights[::-1], method=method)[0]
    for target in ("q", "k"):
        close(dense(swapped.deltas[target]), dense(first.deltas[target]), 2e-4)


KEEPS_ALL = {"density": 1.0, "gamma": 0.0, "epsilon": 0.0}


# tsv: the second's vectors are in the way of the first's, whatever its weight; some of peft's elect without the weights.
WEIGHED = [name for name in TWO if METHODS[name].weights != "none" and name not in ("iso_c", "tsv") and "peft" not in name]


@pytest.mark.parametrize("method", [*WEIGHED, "peft_linear", "peft_dare_linear", "peft_magnitude_prune"])
def test_all_weight_on_the_first_gives_the_first(method: str) -> None:
    two = parts(method)
    parameters = {name: value for name, value in KEEPS_ALL.items() if name in METHODS[method].parameters}
    result, _ = combine(two, [1.0, 0.0], method=method, parameters=parameters)
    first = dense(two[0].deltas["q"])
    close(dense(result.deltas["q"]), first, 1e-4)
