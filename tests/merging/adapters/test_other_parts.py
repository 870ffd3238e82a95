"""Biases, replaced weights and rows beside the pairs, merged by weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import combine
from adapterhub_converters.adapter import (
    Adapter,
    Rows,
)
from tests.merging.adapters.test_combine_kinds import SUMS, numbers
from tests.merging.factored import adapter, low_rank


@pytest.mark.parametrize("method", SUMS)
def test_biases_are_summed_with_their_scales(method: str) -> None:
    first, second = low_rank(2, bias=numbers(12)), low_rank(3, seed=1, rslora=True, bias=numbers(12, seed=3))
    result, _ = combine([adapter(q=first, k=low_rank(2)), adapter(q=second)], [0.7, -0.4], method=method)
    delta: Any = result.deltas["q"]
    np.testing.assert_allclose(
        delta.scaling * delta.bias, 0.7 * first.scaling * first.bias - 0.4 * second.scaling * second.bias, atol=1e-6
    )
    lacking: Any = result.deltas["k"]
    assert not lacking.bias.any()  # peft has lora_bias for all modules or for none


@pytest.mark.parametrize("method", SUMS)
def test_replaced_weights_and_rows_are_averaged_by_weights_that_sum_to_one(method: str) -> None:
    def replacing(seed: int, ids: tuple[int, ...]) -> Adapter:
        rows = {"embed": Rows(ids, numbers(len(ids), 4, seed=seed + 9))}
        return dataclasses.replace(adapter(q=low_rank(2)), replaced={"head.weight": numbers(5, 4, seed=seed)}, rows=rows)

    first, second = replacing(0, (3, 7)), replacing(1, (7, 3))
    result, _ = combine([first, second], [0.7, 0.3], method=method)
    expected = 0.7 * first.replaced["head.weight"] + 0.3 * second.replaced["head.weight"]
    np.testing.assert_allclose(result.replaced["head.weight"], expected, atol=1e-6)
    rows = result.rows["embed"]
    assert rows.ids == (3, 7)
    np.testing.assert_allclose(
        rows.values, 0.7 * first.rows["embed"].values + 0.3 * second.rows["embed"].values[::-1], atol=1e-6
    )


def test_what_one_adapter_alone_replaces_stays_to_the_bit_at_weight_one() -> None:
    replaced = dataclasses.replace(adapter(q=low_rank(2)), replaced={"head.weight": numbers(5, 4).astype(np.float16)})
    result, _ = combine([replaced, adapter(q=low_rank(2, seed=1))], [1, -0.5], method="svd")
    assert result.replaced["head.weight"].tobytes() == replaced.replaced["head.weight"].tobytes()
