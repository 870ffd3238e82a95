"""Stored tensors read by rows, and weights that are computed from several of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from adapterhub.merging import merge_into_base
from adapterhub.merging.into_base.stored_weights import PackedWeight, StoredTensor
from adapterhub.merging.into_base.tensor_files import OpenFiles
from adapterhub_converters.adapter import Adapter, StackedLowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import RefusedError
from tests.merging.into_base.test_dequantize import FLOATS, RNG, written


def stored(path: Path, values: np.ndarray) -> StoredTensor:
    safetensors_file.write(path, {"first": np.ones(3, np.uint8), "weight": values})
    with SafetensorsFile(path) as file:
        return StoredTensor(path, file.tensors["weight"])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8])
def test_any_rows_of_a_stored_tensor_are_those_of_the_whole(tmp_path: Path, dtype: type) -> None:
    values = np.arange(30).reshape(5, 6).astype(dtype)
    tensor = stored(tmp_path / "x.safetensors", values)
    with OpenFiles() as opened:
        assert tensor.load(opened).tobytes() == values.tobytes()
        for start, stop in ((0, 5), (1, 3), (4, 5)):
            assert tensor.rows(opened, start, stop).tobytes() == values[start:stop].tobytes()


def test_numbers_without_a_type_to_compute_with_are_refused(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "x.safetensors", np.zeros((2, 2), np.uint8))
    packed = StoredTensor(tensor.path, tensor.info._replace(dtype="F4"))
    with OpenFiles() as opened, pytest.raises(RefusedError, match="weight: is F4, a type that cannot be computed with"):
        packed.load(opened)


def test_a_packed_weight_is_prepared_once_for_all_its_tiles(tmp_path: Path) -> None:
    values, count = np.arange(12, dtype=np.float32).reshape(4, 3), []

    def prepare(_: OpenFiles) -> Any:
        count.append(1)
        return lambda start, stop: values[start:stop]

    weight, out = PackedWeight("weight", 4, 3, prepare), np.empty((2, 3), np.float32)
    with OpenFiles() as opened:
        for start in (0, 2):
            weight.read(opened, start, start + 2, out, lambda _, size: np.empty(size, np.uint8))
            np.testing.assert_array_equal(out, values[start : start + 2])
    assert len(count) == 1


@pytest.mark.peer
def test_experts_of_gpt_oss_in_mxfp4(torch: Any, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = RNG.integers(0, 256, size=(3, 24, 2, 16)).astype(np.uint8)
    scales = RNG.integers(120, 130, size=(3, 24, 2)).astype(np.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors: dict[str, np.ndarray] = {
        f"{name}_blocks": blocks,
        f"{name}_scales": scales,
        f"{name}_bias": np.ones((3, 24), np.float32),
    }
    tensors["model.norm.weight"] = np.ones(64, np.float32)
    base = written(tmp_path / "base", tensors, {"quant_method": "mxfp4"})
    config_fields = {
        **json.loads((base / "config.json").read_text()),
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
    }
    (base / "config.json").write_text(json.dumps(config_fields))
    lora_A, lora_B = RNG.normal(size=(3, 2, 64)).astype(np.float32), RNG.normal(size=(3, 24, 2)).astype(np.float32)
    adapter = Adapter({name: StackedLowRank(lora_A, lora_B, alpha=2, transposed_base=True)})
    merge_into_base([(adapter, 1.0)], base, tmp_path / "out", options=FLOATS)
    exact = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32).numpy()
    expected = exact + (lora_B @ lora_A).swapaxes(1, 2)
    with SafetensorsFile(tmp_path / "out" / "model.safetensors") as file:
        assert sorted(file.tensors) == ["model.layers.0.mlp.experts.down_proj", f"{name}_bias", "model.norm.weight"]
        np.testing.assert_allclose(file.tensor(name), expected, rtol=1e-6, atol=1e-6)
