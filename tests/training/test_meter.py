"""What a training run measures of the machine: a product of matrices, without waiting for a CPU that is slow at it."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from adapterhub.training.cost import meter


@pytest.mark.parametrize(("seconds", "rows"), [(1e-4, 512), (0.01, 200), (0.125, 16), (0.4, 5), (0.5, 4), (30.0, 4)])
def test_a_product_has_the_rows_that_there_is_time_for(seconds: float, rows: int) -> None:
    assert meter.rows_in(0.5, 4, seconds, most=512) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_has_a_rate(dtype: torch.dtype) -> None:
    assert meter.matmul_rate(dtype, torch.device("cpu")) > 0
