"""Tuners with few trained numbers, against peft and torch: their places and their bases."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub_converters.adapter import sparse_tuners
from tests.conftest import need_module


@pytest.mark.parametrize("family", ["haar", *(f"db{order}" for order in range(1, 11))])
def test_wavelets_are_those_of_peft(family: str) -> None:
    need_module("peft")
    from peft.tuners.waveft.wavelet import Wavelet

    ours = sparse_tuners._daubechies(sparse_tuners._DAUBECHIES[family])
    np.testing.assert_allclose(ours, Wavelet(family).rec_lo, rtol=0, atol=2e-9)


@pytest.mark.parametrize("seed", [0, 777, 2**32 + 5, 2**64 - 1, -1, -(2**63)])
def test_places_are_those_that_torch_draws(seed: int) -> None:
    need_module("torch")
    import torch

    drawn = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:50].tolist()
    assert sparse_tuners._permutation(1000, 50, seed).tolist() == drawn
