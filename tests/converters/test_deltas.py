"""Deltas of one module: shapes, ranks and scales come from the tensors, and a repr has no numbers of them."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub_converters.adapter.deltas import LowRank, LowRankConv, LowRankEmbedding, StackedLowRank, scaling


def filled_with_ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("delta", "r", "shape"),
    [
        (LowRank(filled_with_ones(2, 9), filled_with_ones(12, 2), 4), 2, (12, 9)),
        (LowRankEmbedding(filled_with_ones(2, 100), filled_with_ones(8, 2), 4), 2, (100, 8)),
        (StackedLowRank(filled_with_ones(3, 2, 9), filled_with_ones(3, 12, 2), 4), 2, (3, 12, 9)),
        (LowRankConv(filled_with_ones(2, 4, 3, 3), filled_with_ones(12, 2, 1, 1), 4), 2, (12, 4, 3, 3)),
    ],
)
def test_a_delta_has_the_shape_of_the_weight_that_it_changes(
    delta: LowRank | LowRankEmbedding | StackedLowRank | LowRankConv, r: int, shape: tuple[int, ...]
) -> None:
    assert (delta.r, delta.shape, delta.scaling) == (r, shape, 2.0)
    assert delta.plain


def test_a_scale_is_over_the_rank_or_its_root() -> None:
    assert (scaling(8, 4, rslora=False), scaling(8, 4, rslora=True)) == (2.0, 4.0)
    assert LowRank(filled_with_ones(4, 9), filled_with_ones(12, 4), 8, rslora=True).scaling == 4.0


def test_a_magnitude_or_a_bias_is_more_than_a_product() -> None:
    delta = LowRank(filled_with_ones(2, 9), filled_with_ones(12, 2), 4, magnitude=filled_with_ones(12))
    assert not delta.plain
    assert [name for name, _ in delta.parts()] == ["lora_A", "lora_B", "magnitude"]


def test_a_repr_has_shapes_and_what_is_not_the_default() -> None:
    text = repr(LowRank(filled_with_ones(2, 9), filled_with_ones(12, 2), 4.0, rslora=True))
    assert text == "<LowRank: lora_A (2, 9), lora_B (12, 2), alpha 4.0, rslora True>"
