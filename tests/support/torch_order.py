"""What a merge of ours is held to beside one that torch computed: the same bits, where torch sums products in our order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapterhub.merging.into_base import product


@functools.cache
def sums_as_we_do() -> bool:
    """Return whether torch on this processor computes the bits that `product.product` defines, up to rank 16.

    It does with oneMKL's kernels for AVX2 and AVX-512, and not with those for older processors (MKL_CBWR=COMPATIBLE).
    """
    import torch

    generator = np.random.default_rng(0)
    for rows, r, columns in itertools.product((32, 96, 200), (2, 4, 8, 16), (64, 96, 200)):
        left_factor = generator.standard_normal((rows, r), np.float32)
        right = generator.standard_normal((r, columns), np.float32)
        expected = product.product(left_factor, right, np.empty((rows, columns), np.float32))
        if not np.array_equal((torch.from_numpy(left_factor) @ torch.from_numpy(right)).numpy(), expected):
            return False
    return True


def assert_same_merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Assert that two merges, of tensors of torch, are the same: in every bit, or up to the rounding of their sums.

    Args:
        theirs: What torch computed; `transformer.` may precede its names, and it may have other names for a tensor too.
    """
    import torch

    if sums_as_we_do():
        assert_same_bits(ours, theirs)
        return
    for name, tensor, expected in _pairs(ours, theirs):
        largest = float(expected.float().abs().max())
        rtol, atol = 2 * torch.finfo(tensor.dtype).eps, 2.0**-22 * largest
        torch.testing.assert_close(tensor, expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_bits(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Assert that tensors of torch are the same in every bit; the arguments are those of `assert_same_merge`."""
    different = {
        name: int((_bits(tensor) != _bits(expected)).sum())
        for name, tensor, expected in _pairs(ours, theirs)
        if not _bits(tensor).equal(_bits(expected))
    }
    assert different == {}, "the number of elements that differ, by tensor"


def _pairs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name, tensor in ours.items():
        expected = theirs[name] if name in theirs else theirs[f"transformer.{name}"]
        assert tensor.dtype == expected.dtype, name
        yield name, tensor, expected


def _bits(tensor: Any) -> Any:
    """Return the bits as integers, of which a zero is not its negative."""
    import torch

    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
