"""NF4 in numpy against bitsandbytes' own operators, and its mean against torch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from adapterhub.merging.into_base.nf4 import CODE, codes_of, dynamic_map, magnitudes, mean, packed, quantized, through
from adapterhub_converters import dtypes
from tests.conftest import need_module

pytestmark = pytest.mark.peer


@pytest.fixture
def one_thread(torch: Any) -> Iterator[Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


def random_weight(shape: tuple[int, ...], kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))).astype(np.float32)
    if kind == "zeros":
        weight[: shape[0] // 2] = 0
    elif kind == "tiny":
        weight *= np.float32(1e-38)
    return weight


@pytest.mark.parametrize("kind", ["normal", "zeros", "tiny"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (1, 130), (5, 13), (64, 64), (96, 200), (33, 77), (300, 512), (530, 515)])
def test_every_byte_is_bitsandbytes_own(one_thread: Any, shape: tuple[int, int], kind: str) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    weight = random_weight(shape, kind)
    codes, state = functional.quantize_4bit(one_thread.from_numpy(weight), quant_type="nf4", compress_statistics=True)
    largest = magnitudes(weight)
    found = quantized(largest)
    np.testing.assert_array_equal(packed(codes_of(weight.reshape(-1), largest)), codes.numpy().reshape(-1))
    np.testing.assert_array_equal(found.codes, state.absmax.numpy())
    np.testing.assert_array_equal(found.scales, state.state2.absmax.numpy())
    assert found.offset == state.offset.numpy()
    back = through(weight.reshape(-1), largest, found.restored()).reshape(shape)
    np.testing.assert_array_equal(back, functional.dequantize_4bit(codes, state).numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_comes_back_in_16_bits_is_what_bitsandbytes_gives_back(one_thread: Any, dtype: str) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    weight = one_thread.from_numpy(random_weight((96, 200), "normal")).to(getattr(one_thread, dtype))
    wanted = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    wide = weight.float().numpy()
    largest = magnitudes(wide)
    back = through(wide.reshape(-1), largest, quantized(largest).restored()).reshape(wide.shape)
    rounded = back.astype(dtypes.BF16 if dtype == "bfloat16" else dtypes.F16).astype(np.float32)
    np.testing.assert_array_equal(rounded, wanted.float().numpy())


def test_the_tables_are_bitsandbytes_own(torch: Any) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    assert np.array_equal(functional.create_dynamic_map().numpy(), dynamic_map())
    assert np.array_equal(functional.get_4bit_type("nf4", device="cpu").numpy(), CODE)


def sizes() -> list[int]:
    rng = np.random.default_rng(0)
    powers = [2**power + off for power in range(7, 22) for off in (-1, 0, 1)]
    return [*range(1, 140), *powers, *(int(2**power) for power in rng.uniform(7, 21, size=60))]


def test_the_mean_has_every_bit_of_torch_in_one_thread(one_thread: Any) -> None:
    values = np.abs(np.random.default_rng(0).normal(size=max(sizes()))).astype(np.float32)
    other = [size for size in sizes() if mean(values[:size]) != one_thread.from_numpy(values[:size]).mean().numpy()]
    assert not other


def test_the_mean_in_two_threads_is_that_of_one_below_32768_numbers_and_two_units_off_at_most_above(torch: Any) -> None:
    values = np.abs(np.random.default_rng(0).normal(size=max(sizes()))).astype(np.float32)
    for size in sizes():
        found, theirs = mean(values[:size]), torch.from_numpy(values[:size]).mean().numpy()
        assert abs(int(found.view(np.int32)) - int(theirs.view(np.int32))) <= (0 if size < 32_768 else 2)
