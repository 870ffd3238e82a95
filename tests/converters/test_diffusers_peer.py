"""What diffusers itself makes of our files, and we of its: the same outputs of tiny random models, the same deltas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import bases
from adapterhub_converters.adapter import LowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.formats import peft
from tests.conftest import need_module
from tests.support.images import Numbers, dense, kohya_file

for _peer in ("diffusers", "peft", "torch"):
    need_module(_peer)

EVERYWHERE = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "ff.net.0.proj",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "conv_in",
]


def unet(*, sdxl: bool) -> Any:
    """A random UNet with the modules of SDXL, or of Stable Diffusion 1.5, a few channels wide."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    common: dict[str, Any] = {"sample_size": 8, "cross_attention_dim": 16, "norm_num_groups": 4}
    if not sdxl:
        return UNet2DConditionModel(attention_head_dim=2, block_out_channels=(8, 16, 16, 16), **common).eval()
    return UNet2DConditionModel(
        attention_head_dim=2,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        **common,
    ).eval()


def flux() -> Any:
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, axes_dims_rope=(2, 2, 4), guidance_embeds=True, **sizes
    )
    return model.eval()


def output(model: Any) -> Any:
    """What a model makes of the same random inputs every time."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        if type(model).__name__.startswith("Flux"):
            ids = torch.zeros(4, 3), torch.zeros(3, 3)
            return model(random(1, 4, 4), random(1, 3, 8), random(1, 8), torch.tensor([0.5]), *ids, torch.tensor([1.0])).sample
        added = {"text_embeds": random(1, 8), "time_ids": torch.ones(1, 6)}
        return model(random(1, 4, 8, 8), 3, random(1, 5, 16), added_cond_kwargs=added).sample


def adapter(model: Any, path: Path, **config: Any) -> Any:
    """Save a random LoRA on `model` with peft; returns what the model with it computes."""
    import torch
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    wrapped.save_pretrained(str(path))
    return output(wrapped.base_model.model)


def loaded(model: Any, path: Path, *, sdxl: bool = True) -> Any:
    """What diffusers computes once it has loaded our file."""
    from diffusers.loaders.lora_pipeline import (
        FluxLoraLoaderMixin,
        StableDiffusionLoraLoaderMixin,
        StableDiffusionXLLoraLoaderMixin,
    )

    if type(model).__name__.startswith("Flux"):
        state, alphas, config = FluxLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True, return_alphas=True)
        FluxLoraLoaderMixin.load_lora_into_transformer(state, network_alphas=alphas, transformer=model, metadata=config)
    else:
        mixin: Any = StableDiffusionXLLoraLoaderMixin if sdxl else StableDiffusionLoraLoaderMixin
        state, alphas, config = mixin.lora_state_dict(str(path), return_lora_metadata=True, unet_config=model.config)
        mixin.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=config)
    return output(model)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("sdxl", [True, False])
def test_diffusers_computes_with_our_file_what_peft_computes(tmp_path: Path, *, sdxl: bool, to: str) -> None:
    plain = output(unet(sdxl=sdxl))
    expected = adapter(unet(sdxl=sdxl), tmp_path / "a", target_modules=EVERYWHERE)
    formats.convert(tmp_path / "a", tmp_path / "x.safetensors", to=to)
    loaded_model = loaded(unet(sdxl=sdxl), tmp_path / "x.safetensors", sdxl=sdxl)
    assert (expected - plain).abs().max() > 0.1
    assert (loaded_model - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 1.5}}, {"use_dora": True},
        {"lora_bias": True},
    ],
    ids=str,
)  # fmt: skip
def test_diffusers_reads_all_of_pefts_config_in_our_header(tmp_path: Path, config: dict[str, Any]) -> None:
    expected = adapter(unet(sdxl=True), tmp_path / "a", target_modules=["to_q", "to_k", "proj_in"], **config)
    formats.convert(tmp_path / "a", tmp_path / "x.safetensors", to="diffusers")
    loaded_model = loaded(unet(sdxl=True), tmp_path / "x.safetensors")
    assert (loaded_model - expected).abs().max() < 1e-5


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("targets", [["to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "ff.net.2", "norm1.linear"], ["to_q"]])
def test_flux_too(tmp_path: Path, to: str, targets: list[str]) -> None:
    model = flux()
    model.save_pretrained(str(tmp_path / "transformer"))
    plain = output(model)
    expected = adapter(flux(), tmp_path / "a", target_modules=targets, exclude_modules="single.*")
    spec = bases.read_base(tmp_path / "transformer")
    formats.convert(tmp_path / "a", tmp_path / "x.safetensors", to=to, base=spec)
    assert (expected - plain).abs().max() > 0.01
    assert (loaded(flux(), tmp_path / "x.safetensors") - expected).abs().max() < 1e-5


def test_we_read_what_diffusers_saves(tmp_path: Path) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = unet(sdxl=True)
    config = LoraConfig(r=4, lora_alpha=7, use_rslora=True, target_modules=["to_q", "conv1"], alpha_pattern={"conv1": 2})
    model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    state = get_peft_model_state_dict(model)
    StableDiffusionXLPipeline.save_lora_weights(
        str(tmp_path), state, unet_lora_adapter_metadata=model.peft_config["default"].to_dict()
    )
    adapter = formats.read(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(adapter.deltas) == len(state) / 2
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            expected = module.get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(dense(adapter.deltas[f"unet.{name}"]), expected, rtol=1e-4, atol=1e-4)


FAMILIES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "sdxl": ("_convert_non_diffusers_lora_to_diffusers", {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (8, 8),
        "lora_unet_mid_block_resnets_0_conv1": (8, 8, 3, 3), "lora_te1_text_model_encoder_layers_0_self_attn_k_proj": (8, 8),
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (8, 8),
        "lora_te2_text_model_encoder_layers_0_self_attn_out_proj": (8, 8),
        "lora_te2_text_model_encoder_layers_0_mlp_fc2": (8, 16),
        "lora_unet_down_blocks_0_resnets_0_conv_shortcut": (8, 8, 1, 1),
        "lora_unet_up_blocks_0_attentions_2_proj_in": (8, 8),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": (8, 32),
    }),
    "flux": ("_convert_kohya_flux_lora_to_diffusers", {
        "lora_unet_double_blocks_3_img_attn_qkv": (9216, 3072), "lora_unet_double_blocks_3_txt_attn_qkv": (9216, 3072),
        "lora_unet_double_blocks_3_img_attn_proj": (8, 8), "lora_unet_double_blocks_3_txt_attn_proj": (8, 8),
        "lora_unet_double_blocks_3_txt_mlp_2": (8, 8), "lora_unet_double_blocks_3_img_mod_lin": (8, 8),
        "lora_unet_single_blocks_9_linear1": (21504, 3072), "lora_unet_single_blocks_9_linear2": (8, 8),
        "lora_unet_single_blocks_9_modulation_lin": (8, 8),
    }),
    "wan": ("_convert_non_diffusers_wan_lora_to_diffusers", {
        **{f"diffusion_model.blocks.0.{kind}_attn.{name}": (8, 8) for kind in ("self", "cross") for name in "qkvo"},
        "diffusion_model.blocks.0.cross_attn.k_img": (8, 8), "diffusion_model.blocks.0.cross_attn.v_img": (8, 8),
        "diffusion_model.blocks.0.ffn.0": (16, 8), "diffusion_model.blocks.0.ffn.2": (8, 16),
    }),
    "musubi": ("_convert_musubi_wan_lora_to_diffusers", {
        **{f"lora_unet_blocks_0_{kind}_attn_{name}": (8, 8) for kind in ("self", "cross") for name in "qkvo"},
        "lora_unet_blocks_0_ffn_0": (16, 8), "lora_unet_blocks_0_ffn_2": (8, 16),
    }),
    "qwen": ("_convert_non_diffusers_qwen_lora_to_diffusers", {
        "lora_unet_transformer_blocks_2_attn_add_q_proj": (8, 8), "lora_unet_transformer_blocks_2_attn_to_out_0": (8, 8),
        "lora_unet_transformer_blocks_2_img_mlp_net_0_proj": (8, 8), "lora_unet_transformer_blocks_2_txt_mod_1": (8, 8),
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trainers_file_is_to_us_what_it_is_to_diffusers(tmp_path: Path, family: str) -> None:
    convert, modules = FAMILIES[family]
    path = kohya_file(tmp_path / "x.safetensors", modules, {"ss_base_model_version": "flux1"} if family == "flux" else None)
    same_as_diffusers(path, convert)


def test_xlabs_file_is_to_us_what_it_is_to_diffusers(tmp_path: Path) -> None:
    numbers, tensors = Numbers(np.float32), {}
    shapes = {"qkv_lora1": 24, "qkv_lora2": 24, "proj_lora1": 8, "proj_lora2": 8}
    stems = {f"double_blocks.4.processor.{name}": rows for name, rows in shapes.items()}
    stems |= {"single_blocks.5.processor.qkv_lora": 24, "single_blocks.5.processor.proj_lora": 8}
    for stem, rows in stems.items():
        tensors |= {f"{stem}.down.weight": numbers(2, 8), f"{stem}.up.weight": numbers(rows, 2)}
    safetensors_file.write(tmp_path / "x.safetensors", tensors)
    same_as_diffusers(tmp_path / "x.safetensors", "_convert_xlabs_flux_lora_to_diffusers")


def test_the_last_layers_halves_are_turned_as_diffusers_turns_them(tmp_path: Path) -> None:
    import torch
    from diffusers.loaders.lora_conversion_utils import swap_scale_shift

    header = {"ss_base_model_version": "flux1"}
    path = kohya_file(tmp_path / "x.safetensors", {"lora_unet_final_layer_adaLN_modulation_1": (12, 8)}, header)
    with safetensors_file.SafetensorsFile(path) as file:
        (up,) = (file.tensor(name) for name in file.tensors if "up" in name)
    expected = swap_scale_shift(torch.from_numpy(up)).numpy()
    np.testing.assert_array_equal(formats.read(path).deltas["transformer.norm_out.linear"].lora_B, expected)  # type: ignore[union-attr]


def same_as_diffusers(path: Path, convert: str) -> None:
    """Every delta as that of diffusers' own conversion, in float32."""
    import safetensors.torch
    from diffusers.loaders import lora_conversion_utils
    from diffusers.utils import state_dict_utils

    state = {name: tensor.float() for name, tensor in safetensors.torch.load_file(str(path)).items()}
    converted = getattr(lora_conversion_utils, convert)(state)
    state, alphas = converted if isinstance(converted, tuple) else (converted, {})
    ours = formats.read(path).deltas
    theirs: dict[str, dict[str, Any]] = {}
    for part in {name.partition(".")[0] for name in state}:
        inner = {name: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
        if part.startswith("text_encoder") and not any(".lora_A" in name for name in inner):
            inner = state_dict_utils.convert_state_dict_to_peft(inner)
        elif not any(".lora_A" in name for name in inner):
            inner = state_dict_utils.convert_unet_state_dict_to_peft(inner)
        for name, tensor in inner.items():
            target, _, half = name.removesuffix(".weight").rpartition(".")
            theirs.setdefault(target, {})[half] = tensor.numpy().astype(np.float64)
    assert set(ours) == set(theirs)
    for target, pair in theirs.items():
        lora_A, lora_B = pair["lora_A"], pair["lora_B"]
        scale = 3 / len(lora_A) if alphas else 1.0
        converted = ours[target]
        if len(lora_B) * lora_A.shape[1] > 1 << 20:  # as wide as a real FLUX: on four vectors, and not element by element
            assert isinstance(converted, LowRank)
            vectors = np.random.default_rng(0).normal(size=(lora_A.shape[1], 4))
            wide = converted.scaling * converted.lora_B.astype(np.float64) @ (converted.lora_A.astype(np.float64) @ vectors)
            np.testing.assert_allclose(wide, scale * lora_B @ (lora_A @ vectors), rtol=1e-5, atol=1e-4)
            continue
        expected = scale * lora_B.reshape(len(lora_B), -1) @ lora_A.reshape(len(lora_A), -1)
        np.testing.assert_allclose(dense(converted).reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_diffusers_own_kohya_export_loses_the_alpha_and_ours_does_not(tmp_path: Path) -> None:
    import torch
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    names = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {
        f"base_model.model.{names}.lora_A.weight": torch.ones(2, 8),
        f"base_model.model.{names}.lora_B.weight": torch.ones(8, 2),
    }
    theirs = convert_state_dict_to_kohya(dict(pair))
    assert [float(tensor) for name, tensor in theirs.items() if name.endswith("alpha")] == [2.0]
    (tmp_path / "a").mkdir()
    safetensors_file.write(tmp_path / "a" / peft.WEIGHTS, {name: tensor.numpy() for name, tensor in pair.items()})
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 7}))
    spec = bases.BaseSpec("sd", "hf", "StableDiffusionPipeline", "", {})
    formats.convert(tmp_path / "a", tmp_path / "x", to="kohya", base=spec)
    with safetensors_file.SafetensorsFile(tmp_path / "x") as file:
        assert [float(file.tensor(name)) for name in file.tensors if name.endswith("alpha")] == [7.0]
