"""Numbers of weights: those of the dense matrices, and places among those of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapterhub.analysis import spectra
from adapterhub.analysis.spectra import SpectralSummary
from adapterhub_converters.adapter import LowRank
from adapterhub_converters.formats import convert
from tests.support.adapters import write_adapter


def test_the_numbers_are_those_of_the_dense_matrices(tmp_path: Path) -> None:
    adapter = convert.read(write_adapter(tmp_path / "a"))
    summaries, left_out = spectra.spectra(adapter)
    assert left_out == {}
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LowRank)
        values = np.linalg.svd(delta.scaling * delta.lora_B.astype(float) @ delta.lora_A.astype(float), compute_uv=False)
        energy = float(np.sum(values**2))
        assert summaries[target].norm == pytest.approx(energy**0.5)
        assert summaries[target].top == pytest.approx(values[0])
        assert summaries[target].share == pytest.approx(values[0] ** 2 / energy)


def test_modules_of_a_kind_count_together_and_experts_as_one_kind() -> None:
    three, four = SpectralSummary(3, 3, 1.0), SpectralSummary(4, 2, 0.25)
    kinds = spectra.by_kind({"m.layers.0.mlp.experts.0.up": three, "m.layers.1.mlp.experts.7.up": four, "lm_head": three})
    count, together = kinds["mlp.experts.*.up"]
    assert (count, together.norm, together.top) == (2, 5.0, 3)
    assert together.share == pytest.approx((9 + 4) / 25)
    assert kinds["lm_head"] == (1, three)


def test_a_percentile_counts_smaller_ones_and_half_of_the_equal_ones() -> None:
    own_summaries = {"m.layers.0.q": SpectralSummary(2, 1, 0.25)}
    other_summaries = [{"m.layers.0.q": SpectralSummary(norm, norm / 2, 0.25)} for norm in (1, 2, 3, 4)] + [
        {"m.layers.0.k": SpectralSummary(1, 1, 1)}
    ]
    (kind,), (module,) = spectra.rank_among(own_summaries, other_summaries)
    assert (module.n, kind.n) == (4, 4)
    assert module.percentiles == kind.percentiles == SpectralSummary(37.5, 37.5, 50.0)


def test_nothing_to_compare_with_gives_no_percentile() -> None:
    _, (module,) = spectra.rank_among({"q": SpectralSummary(1, 1, 1)}, [])
    assert (module.n, module.percentiles) == (0, None)


def test_zeros_have_no_share_and_a_nan_has_no_numbers(tmp_path: Path) -> None:
    adapter = convert.read(write_adapter(tmp_path / "a"))
    first, second, *_ = adapter.deltas.values()
    assert isinstance(first, LowRank)
    assert isinstance(second, LowRank)
    first.lora_B[:] = 0
    second.lora_B[0, 0] = np.nan
    summaries, left_out = spectra.spectra(adapter)
    assert next(iter(summaries.values())) == SpectralSummary(0, 0, 0)
    assert list(left_out.values()) == ["a NaN or an infinity"]
