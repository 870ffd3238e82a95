"""LoRA and DoRA on convolutions, merged to what peft itself merges, whatever the size of the tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub.merging.into_base.edits import AddConvolution, TwoPasses
from adapterhub_converters.adapter import Adapter, LowRankConv
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft as format_peft
from tests.conftest import need_module

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
# A class, its numbers, and modules that are convolutions along one, two and three axes.
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "1": (
        "WhisperModel",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 64, "num_mel_bins": 8, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "max_source_positions": 16},
        ["conv1", "conv2", "q_proj"],
    ),
    "2": ("ViTModel", {**SMALL, "image_size": 12, "patch_size": 3}, ["projection"]),
    "3": (
        "Qwen2VLForConditionalGeneration",
        {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 2},
         "text_config": {**SMALL, "num_key_value_heads": 2, "vocab_size": 64,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}},
        ["proj"],
    ),
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("axes", MODELS)
def test_a_merge_is_that_of_peft(axes: str, dora: bool, tmp_path: Path) -> None:
    need_module("peft")
    import peft
    import torch
    import transformers

    name, numbers, modules = MODELS[axes]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    cls(cls.config_class(**numbers)).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=modules, use_dora=dora)
    peft_model = peft.get_peft_model(cls.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for key, parameter in peft_model.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    peft_model.save_pretrained(tmp_path / "a")
    peft_model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ah.merge_into(tmp_path / "a", tmp_path / "base", tmp_path / "ours")
    base, theirs, ours = (tensors(tmp_path / folder) for folder in ("base", "theirs", "ours"))
    changed = [key for key in theirs if not np.array_equal(theirs[key], base[key])]
    assert any(theirs[key].ndim == int(axes) + 2 for key in changed)
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=2e-6, err_msg=key)
    if dora:
        with pytest.raises(RefusedError, match="DoRA is not a sum"):
            ah.merge_into(tmp_path / "a", tmp_path / "base", tmp_path / "half", weights=[0.5])


def tensors(folder: Path) -> dict[str, np.ndarray]:
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        return {name: file.tensor(name) for name in file.tensors}


@pytest.mark.parametrize("rows", [1, 4, 5, 7, 100])
def test_tiles_may_divide_the_rows_of_an_output(rows: int) -> None:
    rng = np.random.default_rng(0)
    lora_A, lora_B, magnitude = (
        rng.normal(size=size).astype(np.float32) for size in ((2, 3, 2, 2), (5, 2, 1, 1), (1, 5, 1, 1))
    )
    delta = LowRankConv(lora_A, lora_B, 4.0, magnitude=magnitude)
    weight = rng.normal(size=delta.shape).astype(np.float32)
    whole = weight + 2 * (lora_B.reshape(5, 2) @ lora_A.reshape(2, -1)).reshape(delta.shape)
    expected = whole * (magnitude.reshape(-1) / np.sqrt(np.square(whole).sum(axis=(1, 2, 3))))[:, None, None, None]
    change, matrix, tiles = AddConvolution(delta, 2.0).ready(np.dtype(np.float32)), weight.reshape(-1, 2), []
    assert isinstance(change, TwoPasses)
    for step in (change.look, change.apply):
        tiles = [matrix[start : start + rows].copy() for start in range(0, len(matrix), rows)]
        for number, tile in enumerate(tiles):
            step(tile, number * rows, np.empty(0, np.float32))
    np.testing.assert_allclose(np.concatenate(tiles).reshape(delta.shape), expected, rtol=0, atol=1e-5)


def test_a_magnitude_of_another_length_is_refused(tmp_path: Path) -> None:
    lora_A, lora_B, magnitude = (np.ones(shape, np.float32) for shape in ((2, 3, 1, 1), (5, 2, 1, 1), (1, 4, 1, 1)))
    delta = LowRankConv(lora_A, lora_B, 4.0, magnitude=magnitude)
    for folder in ("base", "a"):
        (tmp_path / folder).mkdir()
    safetensors_file.write(tmp_path / "base/model.safetensors", {"proj.weight": np.ones((5, 3, 1, 1), np.float32)})
    (tmp_path / "base/config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    format_peft.write(Adapter({"proj": delta}), tmp_path / "a")
    with pytest.raises(RefusedError, match="magnitude"):
        ah.merge_into(tmp_path / "a", tmp_path / "base", tmp_path / "out")
