"""NF4 in numpy against bitsandbytes' own operators, and its mean against torch's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging.into_base import nf4_numpy
from adapterhub.merging.into_base.nf4_numpy import (
    CODE,
    codes_of,
    dynamic_map,
    magnitudes,
    mean,
    pack_codes,
    quantize_magnitudes,
)
from adapterhub.merging.into_base.output_files import TILE
from adapterhub.merging.into_base.tensor_files import Buffer, OpenFiles, StoredRows, new_buffer
from adapterhub.merging.into_base.tensor_types import floats
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
    elif kind == "midway":  # between two codes, in blocks whose largest is 1
        weight.flat = np.resize([1, *(CODE[:-1] + CODE[1:]) / 2], weight.size)
    return weight


def assert_bitsandbytes_own(actual: np.ndarray, theirs: np.ndarray, tolerance: float = 4e-6) -> None:
    """Compare bits; where torch computes without AVX2, bitsandbytes' table of scales has other last bits, and so its values."""
    import torch

    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        np.testing.assert_allclose(actual, theirs, rtol=tolerance, atol=1e-43)  # numbers below 1e-38 have fewer bits
    else:
        np.testing.assert_array_equal(actual, theirs)


@pytest.mark.parametrize("kind", ["normal", "zeros", "tiny", "midway"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (1, 130), (5, 13), (64, 64), (96, 200), (33, 77), (300, 512), (530, 515)])
def test_every_byte_is_bitsandbytes_own(one_thread: Any, shape: tuple[int, int], kind: str) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    weight = random_weight(shape, kind)
    codes, state = functional.quantize_4bit(one_thread.from_numpy(weight), quant_type="nf4", compress_statistics=True)
    largest = magnitudes(weight)
    nested = quantize_magnitudes(largest)
    np.testing.assert_array_equal(pack_codes(codes_of(weight.reshape(-1), largest)), codes.numpy().reshape(-1))
    np.testing.assert_array_equal(nested.codes, state.absmax.numpy())
    np.testing.assert_array_equal(nested.scales, state.state2.absmax.numpy())
    assert nested.offset == state.offset.numpy()
    assert_bitsandbytes_own(nf4_numpy.round_trip_sample(weight), functional.dequantize_4bit(codes, state).numpy())


@pytest.mark.parametrize("kind", ["BF16", "F16"])
@pytest.mark.parametrize("shape", [(96, 200), (33, 77), (5500, 200)])
def test_any_rows_of_a_weight_in_16_bits_are_what_bitsandbytes_gives_back(
    one_thread: Any, tmp_path: Path, shape: tuple[int, int], kind: str
) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    stored = floats(kind, "weight")
    path, rows = tmp_path / "weight", shape[0]
    weight = random_weight(shape, "normal").astype(stored.dtype)
    path.write_bytes(weight.tobytes())
    theirs = one_thread.from_numpy(weight.astype(np.float32)).to(one_thread.bfloat16 if kind == "BF16" else one_thread.float16)
    expected = functional.dequantize_4bit(*functional.quantize_4bit(theirs, quant_type="nf4", compress_statistics=True))
    rows_through_nf4 = nf4_numpy.ThroughNF4("weight", StoredRows(path, 0, *shape, stored), stored)
    with OpenFiles() as opened:
        for start, stop in [(0, rows), (7, 20), (rows - 9, rows - 1), (rows - 1, rows)]:
            out = np.empty((stop - start, shape[1]), np.float32)
            rows_through_nf4.read(opened, start, stop, out, new_buffer)
            assert_bitsandbytes_own(out, expected[start:stop].float().numpy(), tolerance=2**-7)  # a last bit of bfloat16


@dataclass(frozen=True)
class Counted(StoredRows):
    """A tensor that remembers which rows were read."""

    reads: list[tuple[int, int]] = field(default_factory=list)

    def read(self, opened: OpenFiles, start: int, stop: int, out: nf4_numpy.F32Array, buffer: Buffer) -> None:
        """Read rows."""
        self.reads.append((start, stop))
        super().read(opened, start, stop, out, buffer)


def test_a_weight_is_read_once_in_tiles_and_then_only_rows_that_share_a_block(tmp_path: Path) -> None:
    path, (rows, columns), stored = tmp_path / "weight", (5500, 200), floats("F16", "weight")
    path.write_bytes(bytes(rows * columns * 2))
    source = Counted(path, 0, rows, columns, stored)
    pieces = [(8, 16), (9, 10), (15, 17), (5499, 5500)]
    with OpenFiles() as opened:
        for start, stop in pieces:
            out = np.empty((stop - start, columns), np.float32)
            nf4_numpy.ThroughNF4("weight", source, stored).read(opened, start, stop, out, new_buffer)
    tiles, read = source.reads[: -len(pieces)], source.reads[-len(pieces) :]
    assert read == [(8, 16), (8, 16), (8, 24), (5496, 5500)]  # eight rows are 25 blocks
    assert [start for start, _ in tiles] == [0, *(stop for _, stop in tiles[:-1])]
    assert tiles[-1][1] == rows
    assert all((stop - start) * columns <= TILE for start, stop in tiles)


def test_the_tables_are_bitsandbytes_own(torch: Any) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    assert_bitsandbytes_own(dynamic_map(), functional.create_dynamic_map().numpy())
    assert np.array_equal(functional.get_4bit_type("nf4", device="cpu").numpy(), CODE)


def sizes() -> list[int]:
    rng = np.random.default_rng(0)
    powers = [2**power + off for power in range(7, 22) for off in (-1, 0, 1)]
    return [*range(1, 140), *powers, *(int(2**power) for power in rng.uniform(7, 21, size=60))]


def test_the_mean_has_every_bit_of_torch_in_one_thread(one_thread: Any) -> None:
    values = np.abs(np.random.default_rng(0).normal(size=max(sizes()))).astype(np.float32)
    parts = [values[start : start + size] for size in sizes() for start in range(4 if size < 140 else 1)]
    differing = [len(part) for part in parts if mean(part) != one_thread.from_numpy(part).mean().numpy()]
    assert not differing


def test_the_mean_has_every_bit_of_torch_where_its_blocks_become_longer(one_thread: Any) -> None:
    values = np.abs(np.random.default_rng(2).standard_normal(2**24 + 32, np.float32))
    for part in (values[: 2**24], values):  # the last of blocks of 16, and the first of 32
        assert mean(part) == one_thread.from_numpy(part).mean().numpy()


def test_the_mean_in_two_threads_is_that_of_one_below_32768_numbers_and_two_units_off_at_most_above(torch: Any) -> None:
    values = np.abs(np.random.default_rng(0).normal(size=max(sizes()))).astype(np.float32)
    for size in sizes():
        our_mean, theirs = mean(values[:size]), torch.from_numpy(values[:size]).mean().numpy()
        assert abs(int(our_mean.view(np.int32)) - int(theirs.view(np.int32))) <= (0 if size < 32_768 else 2)
