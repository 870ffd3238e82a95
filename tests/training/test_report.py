"""What a training on a graphics card is compared with: its data sheet, or nothing."""

from __future__ import annotations

import dataclasses
import time

import pytest

from adapterhub.cli.views import training as view
from adapterhub.training import Report
from adapterhub.training.cost.peaks import peak_rate

REPORT = Report(
    parameters=1, base_parameters=9, predicted=1, peak=1, full_fine_tuning=2, seconds=2.0, tokens_per_second=1.0,
    flops=int(400e12), matmul=7e14, utilization=0.3, card="NVIDIA H100 80GB HBM3", peak_rate=989e12,
)  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "rate"), [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
    ("NVIDIA H100 80GB HBM3", "float16", 989e12),
    ("NVIDIA H100 80GB HBM3", "float32", 67e12),
    ("NVIDIA A10G", "bfloat16", 70e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
    (None, "bfloat16", None),
])  # fmt: skip
def test_a_rate_is_that_of_exactly_this_card_or_unknown(name: str | None, dtype: str, rate: float | None) -> None:
    assert peak_rate(name, dtype) == rate


def test_the_share_of_an_unknown_rate_is_unknown() -> None:
    assert REPORT.mfu == pytest.approx(200 / 989)
    assert view._cost_pairs(REPORT)["MFU"] == "20.2% of the 989 TFLOP/s of the data sheet of NVIDIA H100 80GB HBM3"
    unknown = dataclasses.replace(REPORT, card="Some Card", peak_rate=None)
    assert unknown.mfu is None
    assert view._cost_pairs(unknown)["MFU"] == "unknown, since Some Card is not among the cards whose data sheets are known"
    assert "MFU" not in view._cost_pairs(dataclasses.replace(unknown, card=None))


def test_seconds_in_which_another_program_has_the_core_do_not_lower_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from adapterhub.training.cost import meter

    monkeypatch.setattr(torch, "mm", lambda *_: time.sleep(0.5))
    assert meter._seconds(torch.ones(1, 1), torch.ones(1, 1)) < 0.25
