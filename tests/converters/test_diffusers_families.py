"""Adapters that diffusers, peft and other trainers made of image and video models are to us what they are to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub
from adapterhub_converters import bases
from adapterhub_converters.adapter import Loss
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.formats.image import video_transformers
from adapterhub_converters.formats.lossy import LossAllowance
from tests.conftest import need_module
from tests.converters.image_checkpoints import FAMILIES, H, linears, table_of
from tests.support.images import Numbers, dense, kohya_file, pair, peft_folder

R = 4
# Each a few numbers wide, by the class in diffusers.
TINY: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        "num_layers": 2, "dual_attention_layers": (0,), "num_attention_heads": 2, "attention_head_dim": 8,
        "joint_attention_dim": 8, "caption_projection_dim": H, "pooled_projection_dim": 8,
    },
    "Flux2Transformer2DModel": {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8,
    },
    "HunyuanVideoTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
        "text_embed_dim": 8, "pooled_projection_dim": 8,
    },
    "LTXVideoTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": H, "num_layers": 1, "caption_channels": 8,
    },
    "ZImageTransformer2DModel": {
        "dim": 24, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 8,
        "axes_dims": [2, 2, 4],
    },
    "Lumina2Transformer2DModel": {
        "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1,
        "cap_feat_dim": 8, "axes_dim_rope": (2, 2, 4),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_what_peft_trained_on_diffusers_model_comes_back_of_a_kohya_file(tmp_path: Path, name: str) -> None:
    need_module("peft")
    import diffusers
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = getattr(diffusers, name)(**TINY[name])
    model.save_pretrained(tmp_path / "transformer")
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", use_rslora=True))
    for name_of, parameter in wrapped.named_parameters():
        parameter.data.normal_() if "lora_" in name_of else None
    wrapped.save_pretrained(str(tmp_path / "a"))
    formats.convert(tmp_path / "a", tmp_path / "x.safetensors", to="kohya", base=bases.read_base(tmp_path / "transformer"))
    with safetensors_file.SafetensorsFile(tmp_path / "x.safetensors") as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        names = {key: text for key, text in file.header.metadata.items() if key == "adapterhub.names"}
    safetensors_file.write(tmp_path / "y.safetensors", tensors, names)  # without the source's config, which would ride along
    deltas = formats.read(tmp_path / "y.safetensors").deltas
    layers = {n: module for n, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    assert set(deltas) == {f"transformer.{n}" for n in layers}
    for target, module in layers.items():
        expected = module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(dense(deltas[f"transformer.{target}"]), expected, rtol=1e-4, atol=1e-5, err_msg=target)


@pytest.mark.parametrize("family", ["FLUX.2", "Z-Image"])
def test_diffusers_own_reader_takes_what_we_write(tmp_path: Path, family: str) -> None:
    from diffusers.loaders import lora_conversion_utils
    from safetensors.torch import load_file

    modules = {
        target: (24 if "w" in target[-2:] else 16, 16)
        for target in linears(family)
        if re.search(r"\.0\.(attn|ff|at|fe)", target)
    }
    modules = {target: shape for target, shape in modules.items() if "noise" not in target and "context_r" not in target}
    folder = peft_folder(tmp_path / "a", modules)
    spec = bases.BaseSpec("x", "hf", FAMILIES[family].model, "", {})
    formats.convert(folder, tmp_path / "x.safetensors", to="kohya", base=spec)
    convert = {
        "FLUX.2": "_convert_kohya_flux2_lora_to_diffusers",
        "Z-Image": "_convert_non_diffusers_z_image_lora_to_diffusers",
    }
    state = {name: tensor.double() for name, tensor in load_file(str(tmp_path / "x.safetensors")).items()}
    theirs = getattr(lora_conversion_utils, convert[family])(state)
    for target, delta in formats.read(folder).deltas.items():
        lora_A, lora_B = (theirs[f"transformer.{target}.lora_{half}.weight"].numpy() for half in "AB")
        np.testing.assert_allclose(lora_B @ lora_A, dense(delta), rtol=1e-12, err_msg=target)
    assert len(theirs) == 2 * len(modules)


@pytest.mark.parametrize(
    ("stems", "architecture"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv": (48, 16), "lora_unet_single_blocks_0_linear1": (144, 16)}, "Flux.2-dev"),
        ({"lora_unet_single_blocks_0_linear1": (144, 16)}, ""),
        ({"lora_unet_joint_blocks_3_context_block_attn_qkv": (48, 16)}, ""),
        ({"lora_unet_double_blocks_0_img_mlp_fc1": (64, 16), "lora_unet_single_blocks_0_linear1": (112, 16)}, "hunyuan-video"),
        ({"diffusion_model.double_blocks.0.txt_mod.linear": (96, 16)}, ""),
        ({"lora_unet_layers_0_attention_to_q": (16, 16), "lora_unet_layers_0_attention_to_out_0": (16, 16)}, "Z-Image"),
        ({"lora_unet_layers_0_attention_qkv": (48, 16), "lora_unet_layers_0_attention_out": (16, 16)}, ""),
        ({"diffusion_model.layers.0.attention.to_q": (16, 16)}, ""),
        ({"diffusion_model.transformer_blocks.0.attn1.to_q": (16, 16), "diffusion_model.patchify_proj": (16, 16)}, ""),
        ({"lora_unet_layers_0_attention_qkv": (40, 24), "lora_unet_layers_0_feed_forward_w3": (96, 24)}, "lumina-2"),
        ({"lycoris_single_transformer_blocks_0_attn_to_qkv_mlp_proj": (144, 16)}, ""),
    ],
)
def test_a_trainer_s_file_to_peft_and_back_is_the_same_bytes(
    tmp_path: Path, stems: dict[str, tuple[int, ...]], architecture: str
) -> None:
    source = kohya_file(
        tmp_path / "a.safetensors", stems, {"modelspec.architecture": architecture} if architecture else {"ss_tag": "x"}
    )
    for to, end in (("peft", ""), ("diffusers", ".safetensors")):
        formats.convert(source, tmp_path / f"{to}{end}", to=to)
        formats.convert(tmp_path / f"{to}{end}", tmp_path / f"{to}-again.safetensors", to="kohya")
        assert (tmp_path / f"{to}-again.safetensors").read_bytes() == source.read_bytes()


def test_diffusers_turns_the_last_layer_of_flux_2_in_checkpoints_and_not_in_adapters(tmp_path: Path) -> None:
    import torch
    from diffusers.loaders import lora_conversion_utils

    stem = "diffusion_model.final_layer.adaLN_modulation.1"
    factors = {f"{stem}.lora_A.weight": np.ones((2, H), np.float32), f"{stem}.lora_B.weight": Numbers(np.float32)(2 * H, 2)}
    safetensors_file.write(tmp_path / "x.safetensors", factors, {"modelspec.architecture": "Flux.2-dev/lora"})
    state = {name: torch.from_numpy(array) for name, array in factors.items()}
    theirs = lora_conversion_utils._convert_non_diffusers_flux2_lora_to_diffusers(state)
    rows = theirs["transformer.norm_out.linear.lora_B.weight"].numpy()
    delta: Any = formats.read(tmp_path / "x.safetensors").deltas["transformer.norm_out.linear"]
    np.testing.assert_array_equal(delta.lora_B, np.roll(rows, H, axis=0))


WAN = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 8, "text_dim": 8,
    "image_dim": 8, "added_kv_proj_dim": 24,
}  # fmt: skip


def distilled(model: Any, path: Path) -> dict[str, np.ndarray]:
    """A file as those of distilled Wan models: pairs, and differences of all else. The difference of each parameter."""
    numbers, tensors, expected = Numbers(np.float32), {}, {}
    for name, value in model.state_dict().items():
        module, kind = (name, "") if name.endswith("scale_shift_table") else name.rpartition(".")[::2]
        written = video_transformers.WAN.trainer_path(module)
        assert written, name
        stem = f"diffusion_model.{written[0]}"
        if kind == "weight" and value.ndim == 2:
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = factors = pair(numbers, value.shape, R)
            expected[name] = factors[1] @ factors[0]
        else:
            tensors[f"{stem}.{'diff_b' if kind == 'bias' else 'diff'}"] = expected[name] = numbers(*value.shape)
    safetensors_file.write(path, tensors)
    return expected


def test_a_distilled_wan_is_merged_with_its_norms_and_biases(tmp_path: Path) -> None:
    import diffusers

    model = diffusers.WanTransformer3DModel(**WAN)
    model.save_pretrained(tmp_path / "transformer")
    expected = distilled(model, tmp_path / "x.safetensors")
    adapterhub.merge_into([tmp_path / "x.safetensors"], tmp_path / "transformer", tmp_path / "merged")
    state_dict = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(state_dict[name], value.numpy() + expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_what_of_a_distilled_wan_has_no_word_is_named_and_dropped_as_allowed(tmp_path: Path) -> None:
    import diffusers
    import safetensors.torch
    from diffusers.loaders import lora_conversion_utils

    path = tmp_path / "x.safetensors"
    expected = distilled(diffusers.WanTransformer3DModel(**WAN), path)
    beyond = {name for name in expected if "norm" in name or name.endswith("scale_shift_table")}
    for to in ("peft", "diffusers"):
        with pytest.raises(RefusedError, match="a difference to the base's own parameter cannot be expressed here") as caught:
            formats.convert(path, tmp_path / to, to=to)
        assert {item.partition(": ")[0].removeprefix("transformer.") for item in caught.value.items} == beyond
    drop = LossAllowance(drop=("norms", "*.scale_shift_table"))
    report = formats.convert(path, tmp_path / "y", to="diffusers", allowed=drop)
    assert {loss.name.removeprefix("transformer.") for loss in report.losses if loss.loss == Loss.DROPPED} == beyond
    # diffusers itself drops the same, without a word.
    state = {name: t for name, t in safetensors.torch.load_file(str(path)).items() if not re.search("patch|proj.[04]", name)}
    theirs = lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers(state)
    ours = formats.read(tmp_path / "y").deltas
    for target, delta in ours.items():
        if "patch_embedding" not in target and f"{target}.lora_B.bias" in theirs:
            np.testing.assert_allclose(delta.scaling * delta.bias, theirs[f"{target}.lora_B.bias"].numpy(), rtol=1e-6)


def test_a_control_lora_of_black_forest_labs_is_to_us_what_it_is_to_diffusers(tmp_path: Path) -> None:
    import torch
    from diffusers.loaders import lora_conversion_utils

    numbers, tensors = Numbers(np.float32), {}
    rows = {"qkv": 9216, "linear1": 21504}
    for path in table_of("FLUX.1").modules:
        block_count = 19 if path.startswith("double") else 38 if path.startswith("single") else 1
        for stem in () if "distilled" in path else [path.replace(".N.", f".{n}.") for n in range(block_count)]:
            if "_norm" in stem:
                tensors[f"{stem}.scale"] = numbers(4)
                continue
            width = 3072 if stem.endswith(tuple(rows)) else 4
            tensors[f"{stem}.lora_A.weight"] = numbers(2, width)
            tensors[f"{stem}.lora_B.weight"] = numbers(rows.get(stem.rpartition(".")[2], 8), 2)
    safetensors_file.write(tmp_path / "x.safetensors", tensors, {"modelspec.architecture": "flux-1-dev/lora"})
    adapter = formats.read(tmp_path / "x.safetensors")
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    theirs = lora_conversion_utils._convert_bfl_flux_control_lora_to_diffusers(state)
    ours = {f"{target}.lora_B.weight": getattr(delta, "lora_B") for target, delta in adapter.deltas.items()}  # noqa: B009
    ours |= adapter.replaced
    assert set(ours) == {name for name in theirs if "lora_A" not in name}
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].numpy(), err_msg=name)


def test_what_ai_toolkit_trains_on_krea_2_is_to_us_what_it_is_to_diffusers(tmp_path: Path) -> None:
    import torch
    from diffusers.loaders import lora_conversion_utils

    numbers, tensors = Numbers(np.float32), {}
    for path in table_of("Krea 2").modules:
        stem = f"base_model.model.{path.replace('N', '0')}"
        tensors |= {f"{stem}.lora_A.weight": numbers(2, 6), f"{stem}.lora_B.weight": numbers(8, 2)}
    safetensors_file.write(tmp_path / "x.safetensors", tensors, {"software": '{"name": "ai-toolkit"}'})
    formats.convert(tmp_path / "x.safetensors", tmp_path / "d.safetensors", to="diffusers")
    with safetensors_file.SafetensorsFile(tmp_path / "d.safetensors") as file:
        ours = {name: file.tensor(name) for name in file.tensors}
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    theirs = lora_conversion_utils._convert_non_diffusers_krea2_lora_to_diffusers(state)
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].numpy(), err_msg=name)
    formats.convert(tmp_path / "x.safetensors", tmp_path / "k.safetensors", to="kohya")
    deltas = formats.read(tmp_path / "k.safetensors").deltas
    assert {f"{target}.lora_B.weight" for target in deltas} == {name for name in theirs if "lora_B" in name}
