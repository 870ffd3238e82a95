"""What a training run measures of the machine: the rate of its matrix products."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapterhub.training.cost import meter  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rate", "sizes"), [(1, [256]), (100, [256, 512]), (1e15, [256, 512, 1024, 2048])])
def test_a_product_that_would_take_too_long_is_not_begun(
    rate: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def seconds(x: Any, weight: Any) -> float:
        measured.append(len(weight))
        return float(2 * x.numel() * len(weight) / rate)

    monkeypatch.setattr(meter, "_seconds", seconds)
    monkeypatch.setattr(meter, "_SECONDS", 1e6)  # beside which those that pass here are nothing
    assert meter.matmul_rate(torch.float32, CPU) == pytest.approx(rate)
    assert sorted(set(measured)) == sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_is_measured(dtype: str) -> None:
    assert meter.matmul_rate(getattr(torch, dtype), CPU) > 0
