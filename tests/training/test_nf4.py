"""NF4: the bytes of bitsandbytes, and its numbers back."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

from adapterhub.training.layers import nf4_matrix  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from tests.conftest import need_module  # noqa: E402

SHAPES = [(64, 64), (192, 576), (3, 22), (1, 2), (7, 130), (1, 16_400), (520, 1024), (5, 3), (2048, 640)]


def weight(shape: tuple[int, ...], dtype: object) -> object:
    """Normal weights with blocks of zeros, tiny and huge values among them."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    flat = values.view(-1)
    flat[64:192] = 0
    flat[256:320] *= 1e-6
    flat[400:402] = 3.0
    return values.to(dtype)


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_bitsandbytes(shape: tuple[int, ...], dtype: object) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    original = weight(shape, dtype)
    ours = nf4_matrix.quantize(original)
    packed, state = functional.quantize_4bit(original, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax.view(-1))
    assert torch.equal(ours.nested, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(nf4_matrix.dynamic_map(), state.state2.code)


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_alone_dequantizes_to_what_bitsandbytes_does(shape: tuple[int, ...], dtype: object) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import functional

    original = weight(shape, torch.bfloat16)
    packed, state = functional.quantize_4bit(original, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    theirs = functional.dequantize_4bit(packed, state).reshape(shape)  # it transposes a single byte
    assert torch.equal(nf4_matrix.dequantize_reference(nf4_matrix.quantize(original), dtype), theirs)
    assert torch.equal(nf4_matrix.dequantize(nf4_matrix.quantize(original), dtype), theirs)


@pytest.mark.parametrize("shape", [*SHAPES, (600, 2048), (64, 96), (33, 80), (2, 48)])
def test_every_value_is_its_code_times_the_magnitude_of_its_block(shape: tuple[int, ...]) -> None:
    matrix = nf4_matrix.quantize(weight(shape, torch.float32))
    codes = torch.stack([matrix.packed >> 4, matrix.packed & 15], dim=1).view(-1)[: math.prod(shape)].int()
    scales = nf4_matrix.magnitudes(matrix).repeat_interleave(64)[: math.prod(shape)]
    expected = (nf4_matrix.CODE[codes] * scales).view(shape)
    assert torch.equal(nf4_matrix.dequantize_reference(matrix, torch.float32), expected)
    assert torch.equal(nf4_matrix.dequantize(matrix, torch.float32), expected)


def test_large_matrices_take_the_same_memory_in_turn_in_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_matrix, "MAX_NEW_BYTES", 4 * 64 * 64)
    small, large, larger = (nf4_matrix.quantize(weight(shape, torch.float32)) for shape in ((64, 64), (64, 128), (96, 128)))
    for dtype in (torch.float32, torch.bfloat16):
        for matrix in (small, large, larger, large):
            assert torch.equal(nf4_matrix.dense_for_one_product(matrix, dtype), nf4_matrix.dense(matrix, dtype))
    first, second = (nf4_matrix.dense_for_one_product(matrix, torch.float32) for matrix in (large, larger))
    assert first.data_ptr() == second.data_ptr() != nf4_matrix.dense_for_one_product(small, torch.float32).data_ptr()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(nf4_matrix.dense_for_one_product, large, torch.float32).result().data_ptr() != first.data_ptr()


def test_a_weight_takes_4_127_bits() -> None:
    matrix = nf4_matrix.quantize(weight((1024, 1024), torch.bfloat16))
    assert matrix.size * 8 / 1024**2 == pytest.approx(4.127, abs=0.001)


def test_a_value_that_is_not_finite_is_refused() -> None:
    bad = torch.ones(2, 64)
    bad[1, 3] = float("nan")
    with pytest.raises(RefusedError, match="q_proj: contains a value that is not finite"):
        nf4_matrix.quantize(bad, "q_proj")


def test_the_expression_that_a_gpu_compiles_to_one_kernel_gives_the_same_bits() -> None:
    """All of it but the kernel itself, which takes a compiler a minute: one graph, for all shapes of a dtype."""
    graphs = []

    def backend(graph: object, _: object) -> object:
        graphs.append(graph)
        return graph

    fused = nf4_matrix.compile_dequantize(backend)  # type: ignore[arg-type]
    for shape in [(192, 576), (520, 1024), (2048, 640), (3, 16_384)]:
        matrix = nf4_matrix.quantize(weight(shape, torch.bfloat16))
        assert nf4_matrix.fits_fused(matrix)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(fused(matrix, dtype), nf4_matrix.dequantize_reference(matrix, dtype))
    assert len(graphs) == 2
    assert not nf4_matrix.fits_fused(nf4_matrix.quantize(weight((3, 22), torch.bfloat16)))
