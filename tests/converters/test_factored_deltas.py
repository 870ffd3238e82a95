"""Deltas that are no pair of factors equal the pair that they give, and a small file does not become a huge one."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub_converters.adapter import LowRank
from adapterhub_converters.adapter.deltas import LowRankConv
from adapterhub_converters.adapter.factored_deltas import (
    AdaLora,
    CpConv,
    Hadamard,
    Kronecker,
    PooledLowRank,
    Vera,
    as_pairs,
    check_growth,
    count_pair_numbers,
)
from adapterhub_converters.errors import RefusedError

RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def matrix(pair: LowRank | LowRankConv) -> np.ndarray:
    """The product of a pair; a kernel is flattened into the columns."""
    product: np.ndarray = pair.lora_B.reshape(len(pair.lora_B), -1) @ pair.lora_A.reshape(len(pair.lora_A), -1)
    return product * np.float32(pair.scaling)


def test_adalora_has_a_number_for_each_direction() -> None:
    delta = AdaLora(numbers(2, 6), numbers(5, 2), numbers(2, 1), 4.0)
    dense = delta.lora_B @ (delta.lora_E * delta.lora_A) * (4 / (2 + 1e-5))
    np.testing.assert_allclose(matrix(delta.as_low_rank()), dense, rtol=1e-5)
    assert AdaLora(numbers(2, 6), numbers(5, 2), numbers(2, 1), 0.0).scaling == pytest.approx(1, rel=1e-5)


def test_qalora_sees_the_mean_of_each_group_of_inputs() -> None:
    delta, inputs = PooledLowRank(numbers(2, 3), numbers(5, 2), 4.0, group=4), numbers(12)
    pooled = inputs.reshape(3, 4).mean(axis=1) * 3
    np.testing.assert_allclose(matrix(delta.as_low_rank()) @ inputs, delta.lora_B @ (delta.lora_A @ pooled) * 2, rtol=1e-4)


def test_loha_is_the_product_of_two_matrices_entry_by_entry() -> None:
    halves = {f"hada_w{n}_{half}": numbers(*((5, 2) if half == "a" else (2, 6))) for n in (1, 2) for half in "ab"}
    first, second = (halves[f"hada_w{n}_a"] @ halves[f"hada_w{n}_b"] for n in (1, 2))
    delta = Hadamard(halves, 4.0)
    assert Hadamard.fits({name: half.shape for name, half in halves.items()})
    np.testing.assert_allclose(matrix(delta.as_low_rank()), first * second * 2, rtol=1e-4, atol=1e-5)
    assert (delta.pair_rank, delta.shape) == (4, (5, 6))


@pytest.mark.parametrize("second", ["whole", "pair"])
def test_lokr_is_a_kronecker_product_of_matrices_that_are_whole_or_pairs(second: str) -> None:
    small = numbers(2, 3)
    pair = {"lokr_w2_a": numbers(4, 2), "lokr_w2_b": numbers(2, 5)}
    whole = pair["lokr_w2_a"] @ pair["lokr_w2_b"]
    tensors = {"lokr_w1": small, **(pair if second == "pair" else {"lokr_w2": whole})}
    assert Kronecker.fits({name: tensor.shape for name, tensor in tensors.items()})
    delta = Kronecker(tensors, 6.0, 2)
    np.testing.assert_allclose(matrix(delta.as_low_rank()), np.kron(small, whole) * 3, rtol=1e-4, atol=1e-5)
    assert delta.shape == (8, 15)


def test_a_convolution_in_three_steps_is_one_with_the_kernel_in_the_first() -> None:
    delta = CpConv(numbers(2, 3, 1, 1), numbers(4, 2, 1, 1), numbers(2, 2, 3, 3), 4.0)
    dense = np.einsum("or,rqhw,qi->oihw", delta.lora_B[:, :, 0, 0], delta.lora_mid, delta.lora_A[:, :, 0, 0]) * 2
    np.testing.assert_allclose(matrix(delta.as_low_rank()), dense.reshape(4, -1), rtol=1e-4, atol=1e-5)
    assert delta.shape == (4, 3, 3, 3)


def test_vera_is_a_pair_only_where_the_width_of_its_module_is_known() -> None:
    vectors, projections = (numbers(4), numbers(2)), (numbers(2, 9), numbers(7, 2))
    with_width = Vera(*vectors, *projections, in_features=6)
    dense = vectors[0][:, None] * (projections[1][:4] @ (vectors[1][:, None] * projections[0][:, :6]))
    np.testing.assert_allclose(matrix(with_width.as_low_rank()), dense, rtol=1e-4, atol=1e-5)
    with pytest.raises(RefusedError) as refused:
        Vera(*vectors, *projections, None).as_low_rank()
    assert refused.value.code == "base-required"


def test_a_large_adapter_does_not_become_many_times_as_large() -> None:
    whole = Kronecker({"lokr_w1": numbers(2, 2), "lokr_w2": numbers(3, 3)}, 1.0, 1)
    assert as_pairs({"q": whole})["q"].shape == (6, 6)
    assert count_pair_numbers([whole, "other"]) == whole.pair_rank * 12
    check_growth(10, 1 << 24, "q")
    with pytest.raises(RefusedError, match="10 numbers are to become low-rank pairs of"):
        check_growth(10, (1 << 24) + 10_000, "q")
