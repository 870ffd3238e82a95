"""NF4 in numpy against bitsandbytes' own operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adapterhub.merge.into.nf4 import CODE, dynamic_map, magnitudes, restored, through
from tests.conftest import need_module

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("shape", [(64, 64), (96, 200), (33, 77), (300, 512)])
def test_what_comes_back_is_what_bitsandbytes_gives_back(torch: Any, shape: tuple[int, int]) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    rng = np.random.default_rng(0)
    weight = (rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))).astype(np.float32)
    packed, state = functional.quantize_4bit(torch.from_numpy(weight), quant_type="nf4", compress_statistics=True)
    wanted = functional.dequantize_4bit(packed, state).numpy()
    largest = magnitudes(weight)
    found = through(weight.reshape(-1), largest, restored(largest)).reshape(shape)
    # The mean's last bit, relative to the largest magnitude.
    assert np.abs(found - wanted).max() <= 4 * 2.0**-23 * largest.max()
    assert np.array_equal(functional.create_dynamic_map().numpy(), dynamic_map())
    assert np.array_equal(functional.get_4bit_type("nf4", device="cpu").numpy(), CODE)
