"""What a merge reports before anything is written: how much of the adapter is kept, and the error on each choice of base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base, prepare_merge
from adapterhub.merging.into_base.nf4_numpy import ThroughNF4, round_trip_sample
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import gguf_output, safetensors_file
from adapterhub_converters.containers.gguf_output import QuantizedTensor
from adapterhub_converters.containers.gguf_types import string_value, u32_value
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import AdapterhubError
from tests.conftest import need_module

Q = "model.layers.0.self_attn.q_proj"
OUT = "model.layers.0.self_attn.o_proj"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "tie_word_embeddings": False}


def base_in(folder: Path, **config: Any) -> Path:
    rng = np.random.default_rng(1)
    folder.mkdir()
    tensors = {f"{name}.weight": rng.normal(size=(512, 512)).astype(dtypes.BF16) for name in (Q, OUT)}
    tensors["model.norm.weight"] = np.ones(512, dtypes.BF16)
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def adapter(share: float) -> Adapter:
    """A delta of this share of the weight's norm."""
    rng = np.random.default_rng(2)
    lora_A, lora_B = rng.normal(size=(8, 512)), rng.normal(size=(512, 8))
    return Adapter({Q: LowRank(lora_A.astype(np.float32), (share * lora_B / 8**0.5).astype(np.float32), alpha=8)})


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile(folder / "model.safetensors") as file:
        return {name: file.tensor(name).astype(np.float32) for name in file.tensors}


@pytest.mark.parametrize(("share", "expected_share"), [(0.1, (0.99, 1.01)), (0.01, (0.99, 1.01)), (0.001, (0.4, 0.7))])
def test_kept_is_what_the_steps_of_bfloat16_leave(tmp_path: Path, share: float, expected_share: tuple[float, float]) -> None:
    merge = prepare_merge([(adapter(share), 1.0)], base_in(tmp_path / "base"))
    change = merge.report.touched[f"{Q}.weight"]
    assert change.relative == pytest.approx(share, rel=0.1)
    assert change.retained is not None
    assert expected_share[0] < change.retained < expected_share[1]
    assert bool(merge.report.warnings) == (expected_share[0] < 0.9)


def test_each_choice_of_base_has_its_error_and_as_trained_is_what_training_saw(tmp_path: Path) -> None:
    base, delta = base_in(tmp_path / "base"), adapter(0.03)
    reports = {}
    for onto in ("original", "as-trained"):
        options = Options(as_trained=onto == "as-trained", trained_in="nf4")
        reports[onto] = merge_into_base([(delta, 1.0)], base, tmp_path / onto, options=options)
    before = tensors_of(base)
    low = delta.deltas[Q]
    seen_in_training = round_trip_sample(before[f"{Q}.weight"]).astype(dtypes.BF16).astype(np.float32)
    expected = seen_in_training + low.scaling * (low.lora_B @ low.lora_A)
    for onto, name in (("original", "original"), ("as-trained", "as_trained")):
        merged_weight = tensors_of(tmp_path / onto)[f"{Q}.weight"]
        error = np.linalg.norm(merged_weight - expected) / np.linalg.norm(expected)
        for report in reports.values():  # both are predicted, whichever is chosen
            assert getattr(report.touched[f"{Q}.weight"], name) == pytest.approx(error, rel=0.05)
    change = reports["original"].touched[f"{Q}.weight"]
    assert change.original is not None
    assert change.as_trained is not None
    assert change.original > 0.08 > 0.005 > change.as_trained
    # A layer without a delta was seen quantized as well, a norm was not.
    after = tensors_of(tmp_path / "as-trained")
    np.testing.assert_array_equal(
        after[f"{OUT}.weight"], round_trip_sample(before[f"{OUT}.weight"]).astype(dtypes.BF16).astype(np.float32)
    )
    np.testing.assert_array_equal(after["model.norm.weight"], before["model.norm.weight"])
    np.testing.assert_array_equal(tensors_of(tmp_path / "original")[f"{OUT}.weight"], before[f"{OUT}.weight"])


@pytest.mark.parametrize(
    ("options", "config", "says"),
    [
        (Options(as_trained=True), {}, "no quantization is recorded"),
        (Options(as_trained=True, trained_in="gptq"), {}, "training saw the base in gptq"),
        (Options(as_trained=True, trained_in="nf4"), {"model_type": "gpt2"}, "stores its weights transposed"),
    ],
)
def test_what_training_saw_is_not_guessed(tmp_path: Path, options: Options, config: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterhubError, match=says) as caught:
        prepare_merge([(adapter(0.1), 1.0)], base_in(tmp_path / "base", **config), options)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("columns", [64, 96, 40])
def test_blocks_across_rows_are_read_whole(columns: int) -> None:
    from adapterhub.merging.into_base.output_files import OutputWriter
    from adapterhub.merging.into_base.tensor_files import OpenFiles
    from adapterhub.merging.into_base.tensor_types import Floats

    weight = np.random.default_rng(0).normal(size=(24, columns)).astype(np.float32)

    class Memory:
        rows, columns = weight.shape

        def read(self, opened: Any, start: int, stop: int, out: np.ndarray, buffer: Callable[..., Any]) -> None:
            out[...] = weight[start:stop]

    source = ThroughNF4("w", Memory(), Floats("F32", dtypes.F32))
    expected, run = round_trip_sample(weight), OutputWriter(None, 0)
    with OpenFiles() as opened:
        for start, stop in ((0, 24), (3, 8), (23, 24), (0, 1)):
            out = np.empty((stop - start, columns), np.float32)
            source.read(opened, start, stop, out, run.buffer)
            np.testing.assert_array_equal(out, expected[start:stop])


def quantized(path: Path, kind: str) -> Path:
    from adapterhub.merging.into_base.tensor_types import Blocks

    need_module("gguf")
    rows = np.random.default_rng(1).normal(size=(512, 512)).astype(np.float32)
    blocks = np.empty((512, Blocks(kind).row_size(512)), np.uint8)
    Blocks(kind).encode(rows, blocks)
    metadata = {
        "general.architecture": string_value("llama"),
        "llama.attention.head_count": u32_value(8),
        "llama.block_count": u32_value(1),
    }
    gguf_output.write(path, metadata, {"blk.0.attn_q.weight": QuantizedTensor(kind, (512, 512), blocks)})
    return path


@pytest.mark.peer
@pytest.mark.parametrize(("kind", "share", "lost"), [("Q8_0", 0.03, False), ("Q8_0", 0.003, True), ("Q4_0", 0.03, True)])
def test_a_quantized_target_that_swallows_the_adapter_is_refused(tmp_path: Path, kind: str, share: float, lost: bool) -> None:
    base, weighted = quantized(tmp_path / "base.gguf", kind), [(adapter(share), 1.0)]
    if lost:
        with pytest.raises(AdapterhubError, match=r"blk.0.attn_q.weight: .*% of the adapter's change would be kept") as caught:
            prepare_merge(weighted, base)
        assert (caught.value.code, caught.value.exit_code) == ("adapter-lost", 6)
    merge = prepare_merge(weighted, base, Options(force=True))
    assert bool(merge.report.warnings) == lost
    retained = prepare_merge(weighted, base, Options(dtype="f32")).report.touched["blk.0.attn_q.weight"].retained
    assert retained == pytest.approx(1, abs=1e-3)
