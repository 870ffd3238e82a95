"""What a GGUF adapter contains: names, orientation, alpha, metadata, and types of numbers, each worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, Loss, LowRank, LowRankEmbedding, Meta
from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.containers import gguf_output
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import ParameterError, RefusedError
from adapterhub_converters.formats import gguf
from adapterhub_converters.formats.gguf import writer

Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.10.mlp.up_proj"


def llama(*, repo: str | None = None) -> BaseSpec:
    """A base known from its config alone: four heads of eight, two of them for keys."""
    numbers = {"num_hidden_layers": 12, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    return BaseSpec("base", "hf", "LlamaForCausalLM", "llama", numbers, repo=repo)


def delta(rows: int = 32, *, seed: int = 0, dtype: Any = np.float32, alpha: float = 4, r: int = 2, **fields: Any) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.normal(size=(r, 32)).astype(dtype), rng.normal(size=(rows, r)).astype(dtype), alpha, **fields)


def written(
    adapter: Adapter, path: Path, base: BaseSpec | None = None, **options: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """The metadata and the arrays of the file, and the report."""
    report = gguf.write(adapter, path / "a.gguf", base=base or llama(), **options)
    with GGUFFile(path / "a.gguf") as file:
        return dict(file.header.metadata), {name: np.array(file.tensor(name)) for name in file.tensors}, report


# ---- tensors


def test_factors_are_stored_as_llama_cpp_multiplies_them(tmp_path: Path) -> None:
    low = delta(16, alpha=4)
    metadata, arrays, report = written(Adapter({V: low}), tmp_path)
    assert set(arrays) == {"blk.1.attn_v.weight.lora_a", "blk.1.attn_v.weight.lora_b"}
    assert np.array_equal(arrays["blk.1.attn_v.weight.lora_a"], low.lora_A)
    assert np.array_equal(arrays["blk.1.attn_v.weight.lora_b"], low.lora_B)
    assert metadata["adapter.lora.alpha"] == 4.0
    assert [(line.name, line.loss, line.note) for line in report.losses] == [
        (f"{V}.lora_A", Loss.EXACT, ""), (f"{V}.lora_B", Loss.EXACT, ""),
    ]  # fmt: skip


def test_the_rows_of_q_are_in_the_order_of_llama_cpp_s_rotary_embedding(tmp_path: Path) -> None:
    low = delta()
    _, arrays, _ = written(Adapter({Q: low}), tmp_path)
    order = np.arange(32).reshape(4, 2, 4).swapaxes(1, 2).reshape(32)  # of each head, halves to pairs
    assert np.array_equal(arrays["blk.0.attn_q.weight.lora_b"], low.lora_B[order])


def test_the_table_of_tokens_has_its_first_factor_turned(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = LowRankEmbedding(rng.normal(size=(2, 64)).astype(np.float32), rng.normal(size=(32, 2)).astype(np.float32), 4.0)
    _, arrays, _ = written(Adapter({"model.embed_tokens": table}), tmp_path)
    assert np.array_equal(arrays["token_embd.weight.lora_a"], table.lora_A.T)
    assert np.array_equal(arrays["token_embd.weight.lora_b"], table.lora_B)


def test_tensors_are_in_the_order_of_the_layers_as_numbers(tmp_path: Path) -> None:
    head = "lm_head"
    adapter = Adapter({UP: delta(48), V: delta(16), head: delta(64), Q: delta()})
    _, arrays, _ = written(adapter, tmp_path)
    assert [name.removesuffix(".weight.lora_a") for name in arrays if name.endswith("a")] == [
        "output", "blk.0.attn_q", "blk.1.attn_v", "blk.10.ffn_up",
    ]  # fmt: skip


# ---- alpha


def scaled(arrays: dict[str, np.ndarray], stem: str, alpha: float) -> np.ndarray:
    """The delta that llama.cpp computes: alpha / r, or 1 for an alpha of 0 (`get_scale`)."""
    lora_a, lora_b = (arrays[f"{stem}.weight.lora_{half}"].astype(np.float64) for half in "ab")
    result: np.ndarray = (alpha / len(lora_a) if alpha else 1.0) * lora_b @ lora_a
    return result


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (delta(16, alpha=4), delta(48, alpha=7, seed=1)),
        (delta(16, alpha=4, r=3), delta(48, alpha=4, seed=1)),
        (delta(16, alpha=4, rslora=True), delta(48, alpha=4, seed=1, rslora=True, r=3)),
        (delta(16, alpha=-4), delta(48, alpha=4, seed=1)),
    ],
)
def test_the_one_alpha_of_a_file_gives_every_module_its_own_scale(tmp_path: Path, first: LowRank, second: LowRank) -> None:
    metadata, arrays, _ = written(Adapter({V: first, UP: second}), tmp_path)
    for stem, delta_written in (("blk.1.attn_v", first), ("blk.10.ffn_up", second)):
        product = scaled(arrays, stem, metadata["adapter.lora.alpha"])
        exact = delta_written.scaling * delta_written.lora_B.astype(np.float64) @ delta_written.lora_A
        np.testing.assert_allclose(product, exact, atol=1e-5 * np.abs(exact).max())


def test_an_alpha_of_0_is_an_alpha_without_effect_and_is_reported(tmp_path: Path) -> None:
    low = delta(16, alpha=0)
    metadata, arrays, report = written(Adapter({V: low}), tmp_path)
    assert np.array_equal(arrays["blk.1.attn_v.weight.lora_b"], low.lora_B)
    assert metadata["adapter.lora.alpha"] == pytest.approx(1e-38, rel=1e-6)
    assert report.notes[0] == "alpha is 0: the file has 1e-38, which has no effect"


def test_a_number_that_is_folded_in_is_told_in_the_report(tmp_path: Path) -> None:
    _, arrays, report = written(Adapter({V: delta(16, alpha=4), UP: delta(48, alpha=8, dtype=np.float16)}), tmp_path)
    notes = {line.name: (line.loss, line.note) for line in report.losses}
    assert notes[f"{V}.lora_B"] == (Loss.EXACT, "times 0.5, recoverable bit for bit")
    assert notes[f"{UP}.lora_B"] == (Loss.EXACT, "")
    assert arrays["blk.10.ffn_up.weight.lora_b"].dtype == np.float16


def test_each_half_of_a_pair_has_its_own_line_in_the_report(tmp_path: Path) -> None:
    _, _, report = written(Adapter({V: delta(16)}), tmp_path, dtype="q8_0")
    a, b = report.losses
    assert (a.name, a.loss, a.note.partition(",")[0]) == (f"{V}.lora_A", Loss.ROUNDED, "as Q8_0")
    assert (b.name, b.loss, b.note.partition(":")[0]) == (
        f"{V}.lora_B",
        Loss.ROUNDED,
        "rows of 2 are not a multiple of Q8_0's blocks (32)",
    )


# ---- the way back


@pytest.mark.parametrize("dtype", ["source", "f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("own_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_way_back_has_types_scales_and_what_was_not_rounded(tmp_path: Path, dtype: str, own_dtype: Any) -> None:
    adapter = Adapter(
        {
            Q: delta(dtype=own_dtype, alpha=5),
            V: delta(16, seed=1, alpha=7, dtype=own_dtype),
            UP: delta(48, dtype=own_dtype, alpha=7),
        }
    )
    _, _, report = written(adapter, tmp_path, dtype=dtype)
    again = gguf.read(tmp_path / "a.gguf", base=llama())
    lost = {line.name for line in report.losses if line.loss is not Loss.EXACT}
    for target, written_delta in adapter.deltas.items():
        read_delta = again.deltas[target]
        assert (read_delta.r, read_delta.scaling) == (2, written_delta.scaling)  # type: ignore[union-attr]
        for half in ("lora_A", "lora_B"):
            written_factor, read_factor = getattr(written_delta, half), getattr(read_delta, half)
            if f"{target}.{half}" not in lost:
                assert (read_factor.dtype, read_factor.tobytes()) == (written_factor.dtype, written_factor.tobytes())
                continue
            folded = half == "lora_B" and target == Q  # whose alpha is not that of the file, so that it was multiplied
            stored = {"bf16": ml_dtypes.bfloat16, "q8_0": np.float32 if half == "lora_A" else np.float16}.get(dtype, np.float16)
            assert read_factor.dtype == (np.float32 if folded else stored)
            np.testing.assert_allclose(read_factor.astype(np.float64), written_factor.astype(np.float64), rtol=2**-7, atol=0.02)
    if dtype == "source":
        assert lost == set()


def test_what_blocks_hold_exactly_comes_back_in_its_own_type(tmp_path: Path) -> None:
    low = LowRank(np.full((2, 32), 127 / 128, np.float16), np.ones((16, 2), np.float16), 4)
    _, _, report = written(Adapter({V: low}), tmp_path, dtype="q8_0")
    assert {line.loss for line in report.losses} == {Loss.EXACT}
    again = gguf.read(tmp_path / "a.gguf", base=llama()).deltas[V]
    assert isinstance(again, LowRank)
    assert (again.lora_A.dtype, again.lora_A.tobytes()) == (np.float16, low.lora_A.tobytes())


# ---- metadata


def test_the_metadata_name_the_base_and_its_page(tmp_path: Path) -> None:
    base = dataclasses.replace(llama(repo="a/b"), tensors={f"{V}.weight": BaseTensor((16, 32), "F32")})
    metadata, _, _ = written(Adapter({V: delta(16)}, meta=Meta(base_model="org/model")), tmp_path, base)
    assert {key: value for key, value in metadata.items() if not key.startswith("adapterhub.source")} == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0,
        "general.base_model.count": 1, "general.base_model.0.name": "org/model",
        "general.base_model.0.repo_url": "https://huggingface.co/org/model", "adapterhub.base.fingerprint": base.fingerprint,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["./model", "/srv/model", "~/model", "a/b/c", "model", "a/", "/b"])
def test_a_name_that_is_no_repository_has_no_page(tmp_path: Path, name: str) -> None:
    metadata, _, _ = written(Adapter({V: delta(16)}, meta=Meta(base_model=name)), tmp_path)
    assert metadata["general.base_model.0.name"] == name
    assert "general.base_model.0.repo_url" not in metadata


def test_a_base_without_a_name_is_not_named_and_that_of_the_base_is_taken_before_none(tmp_path: Path) -> None:
    metadata, _, _ = written(Adapter({V: delta(16)}), tmp_path)
    assert [key for key in metadata if "base" in key] == []
    (tmp_path / "a.gguf").unlink()
    metadata, _, _ = written(Adapter({V: delta(16)}), tmp_path, llama(repo="a/b"))
    assert metadata["general.base_model.0.name"] == "a/b"


def test_invocation_tokens_are_stored_and_their_meaning_is_reported(tmp_path: Path) -> None:
    metadata, _, report = written(Adapter({V: delta(16)}, meta=Meta(invocation=(3, 5))), tmp_path)
    assert list(metadata["adapter.alora.invocation_tokens"]) == [3, 5]
    assert any("aLoRA" in note for note in report.notes)


def test_without_a_base_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        gguf.write(Adapter({V: delta(16)}), tmp_path / "a.gguf")
    assert caught.value.code == "base-required"


# ---- types of numbers

ROW = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)


def test_the_same_type_is_the_same_array() -> None:
    for dtype in ("source", "f32"):
        rounded = writer.as_dtype("x", ROW, dtype)
        assert (rounded.data is ROW, rounded.read_back is ROW, rounded.error, rounded.note) == (True, True, 0.0, "")


@pytest.mark.parametrize(("dtype", "kind"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_a_narrower_type_has_the_largest_error_of_any_element(dtype: str, kind: Any) -> None:
    rounded = writer.as_dtype("x", ROW, dtype)
    error = np.abs(ROW.astype(np.float64) - ROW.astype(kind).astype(np.float64)).max()
    assert (rounded.error, rounded.note) == (error, f"as {dtype.upper()}, largest error {error:.3g}")
    assert rounded.read_back.dtype == kind
    exact = writer.as_dtype("x", np.array([[0.5, -2.0]], np.float32), dtype)
    assert (exact.error, exact.note) == (0.0, f"as {dtype.upper()}, exactly")


def test_a_number_that_would_become_infinite_is_refused_and_an_infinite_one_stays() -> None:
    with pytest.raises(RefusedError, match="x: 70000 does not fit into F16"):
        writer.as_dtype("x", np.array([[1, -70000, np.inf]], np.float32), "f16")
    rounded = writer.as_dtype("x", np.array([[1, np.inf, np.nan]], np.float32), "f16")
    assert (rounded.error, rounded.read_back.tolist()[0][:2]) == (0.0, [1.0, np.inf])


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_whole_blocks_are_quantized(dtype: str) -> None:
    rounded = writer.as_dtype("x", ROW, dtype)
    assert isinstance(rounded.data, gguf_output.QuantizedTensor)
    assert rounded.data.type_name == dtype.upper()
    assert rounded.error == np.abs(ROW.astype(np.float64) - rounded.read_back).max()
    assert 0 < rounded.error < {"q8_0": 0.005, "q4_0": 0.14}[dtype]


def test_rows_that_are_no_whole_blocks_stay_in_floats() -> None:
    odd = ROW[:, :31].copy()
    rounded = writer.as_dtype("x", odd, "q8_0")
    assert rounded.read_back.dtype == np.float16
    assert rounded.note.startswith("rows of 31 are not a multiple of Q8_0's blocks (32): as F16, largest error ")
    odd[0, 0] = 70000
    wide = writer.as_dtype("x", odd, "q8_0")
    assert (wide.data is odd, wide.error) == (True, 0.0)
    assert wide.note == "rows of 31 are not a multiple of Q8_0's blocks (32): stays F32"


def test_what_blocks_cannot_hold_and_types_that_are_none_are_refused() -> None:
    with pytest.raises(RefusedError, match="Q8_0 cannot hold NaN or Inf"):
        writer.as_dtype("x", np.full((1, 32), np.nan, np.float32), "q8_0")
    with pytest.raises(ParameterError, match="GGUF has no 'q9'"):
        writer.as_dtype("x", ROW, "q9")
