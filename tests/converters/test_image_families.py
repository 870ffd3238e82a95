"""The tables of image and video transformers against diffusers: its converters of checkpoints, and its models' modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import bases
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.formats.image import tables
from tests.conftest import need_module
from tests.support.images import Numbers, dense, kohya_file, peft_folder

for _peer in ("diffusers", "torch"):
    need_module(_peer)

H, LONG = 16, 3072  # the width of most, and that of HunyuanVideo, which diffusers' converter has written into it
R = 4


def flux2() -> Iterator[tuple[str, int]]:
    for n in range(2):
        for kind in ("img", "txt"):
            yield from ((f"double_blocks.{n}.{kind}_{end}", k * H) for end, k in (
                ("attn.qkv", 3), ("attn.proj", 1), ("mlp.0", 6), ("mlp.2", 1)))  # fmt: skip
        yield from ((f"single_blocks.{n}.{end}", k * H) for end, k in (("linear1", 9), ("linear2", 1)))
    for name in ("time_in", "guidance_in"):
        yield from ((f"{name}.{end}", H) for end in ("in_layer", "out_layer"))
    yield from (("img_in", H), ("txt_in", H), ("final_layer.linear", 8), ("final_layer.adaLN_modulation.1", 2 * H))
    yield from ((f"double_stream_modulation_{kind}.lin", 6 * H) for kind in ("img", "txt"))
    yield "single_stream_modulation.lin", 3 * H


def sd3() -> Iterator[tuple[str, int]]:
    for n in range(2):
        for block in ("x_block", "context_block"):
            last = block == "context_block" and n == 1
            yield f"joint_blocks.{n}.{block}.attn.qkv", 3 * H
            yield f"joint_blocks.{n}.{block}.adaLN_modulation.1", (2 if last else 6) * H
            ends = () if last else (("attn.proj", H), ("mlp.fc1", 4 * H), ("mlp.fc2", H))
            yield from ((f"joint_blocks.{n}.{block}.{end}", rows) for end, rows in ends)
    yield from (("joint_blocks.0.x_block.attn2.qkv", 3 * H), ("joint_blocks.0.x_block.attn2.proj", H))
    yield from ((f"{name}.mlp.{n}", H) for name in ("t_embedder", "y_embedder") for n in (0, 2))
    yield from (("context_embedder", H), ("final_layer.linear", 8), ("final_layer.adaLN_modulation.1", 2 * H))


def hunyuan() -> Iterator[tuple[str, int]]:
    for kind in ("img", "txt"):
        yield from ((f"double_blocks.0.{kind}_{end}", k * LONG) for end, k in (
            ("attn_qkv", 3), ("attn_proj", 1), ("mlp.fc1", 4), ("mlp.fc2", 1), ("mod.linear", 6)))  # fmt: skip
    yield from ((f"single_blocks.0.{end}", k * LONG) for end, k in (("linear1", 7), ("linear2", 1), ("modulation.linear", 3)))
    token = "txt_in.individual_token_refiner.blocks.1"
    yield from ((f"{token}.{end}", k * LONG) for end, k in (
        ("self_attn_qkv", 3), ("self_attn_proj", 1), ("mlp.fc1", 4), ("mlp.fc2", 1), ("adaLN_modulation.1", 2)))  # fmt: skip
    yield from ((f"txt_in.{end}", H) for end in (
        "input_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "c_embedder.linear_1", "c_embedder.linear_2"))  # fmt: skip
    ends = {"time_in": "mlp.0 mlp.2", "guidance_in": "mlp.0 mlp.2", "vector_in": "in_layer out_layer"}
    yield from ((f"{name}.{end}", H) for name, several in ends.items() for end in several.split())
    yield from (("final_layer.linear", 8), ("final_layer.adaLN_modulation.1", 2 * H))


def z_image() -> Iterator[tuple[str, int]]:
    for layer in ("layers.0", "noise_refiner.1", "context_refiner.0"):
        yield from ((f"{layer}.attention.{end}", k * H) for end, k in (("qkv", 3), ("out", 1)))
        yield from ((f"{layer}.feed_forward.{end}", rows) for end, rows in (("w1", 40), ("w2", H), ("w3", 40)))
        yield from () if layer.startswith("context") else ((f"{layer}.adaLN_modulation.0", 4 * H),)
    yield from (("t_embedder.mlp.0", H), ("t_embedder.mlp.2", H), ("cap_embedder.1", H), ("x_embedder", H))
    yield from (("final_layer.linear", 8), ("final_layer.adaLN_modulation.1", H))


def lumina() -> Iterator[tuple[str, int]]:
    for layer in ("layers.0", "noise_refiner.1", "context_refiner.0"):
        yield from ((f"{layer}.attention.{end}", rows) for end, rows in (("qkv", 2304 + 2 * 768), ("out", 2304)))
        yield from ((f"{layer}.feed_forward.{end}", rows) for end, rows in (("w1", 9216), ("w2", 2304), ("w3", 9216)))
        yield from () if layer.startswith("context") else ((f"{layer}.adaLN_modulation.1", 9216),)
    yield from (("t_embedder.mlp.0", H), ("t_embedder.mlp.2", H), ("cap_embedder.1", H), ("x_embedder", H))
    yield from (("final_layer.linear", 8), ("final_layer.adaLN_modulation.1", H))


def ltx() -> Iterator[tuple[str, int]]:
    for name in ("attn1", "attn2"):
        yield from ((f"transformer_blocks.0.{name}.{end}", H) for end in ("to_q", "to_k", "to_v", "to_out.0"))
    yield from (("transformer_blocks.0.ff.net.0.proj", 4 * H), ("transformer_blocks.0.ff.net.2", H))
    ends = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
    yield from ((f"adaln_single.{end}", H) for end in ends)
    yield from (("patchify_proj", H), ("proj_out", H), ("caption_projection.linear_1", H), ("caption_projection.linear_2", H))


def ltx2() -> Iterator[tuple[str, int]]:
    for name in ("audio_attn1", "audio_to_video_attn", "video_to_audio_attn"):
        yield from ((f"transformer_blocks.0.{name}.{end}", H) for end in ("to_q", "to_out.0"))
    yield from ((f"{name}.linear", H) for name in ("adaln_single", "audio_adaln_single"))
    for name in ("video_scale_shift", "audio_scale_shift", "a2v_gate", "v2a_gate"):
        yield f"av_ca_{name}_adaln_single.emb.timestep_embedder.linear_1", H
    yield from (("audio_patchify_proj", H), ("audio_caption_projection.linear_2", H), ("audio_proj_out", H))


# By the table: what its trainers save, diffusers' converter of the whole checkpoint, and how wide each module is.
CHECKPOINTS: dict[str, tuple[Any, str, int]] = {
    "FLUX.2": (flux2, "convert_flux2_transformer_checkpoint_to_diffusers", H),
    "Stable Diffusion 3": (sd3, "convert_sd3_transformer_checkpoint_to_diffusers", H),
    "HunyuanVideo": (hunyuan, "convert_hunyuan_video_transformer_to_diffusers", LONG),
    "Z-Image by ComfyUI": (z_image, "convert_z_image_transformer_checkpoint_to_diffusers", H),
    "Lumina 2": (lumina, "convert_lumina2_to_diffusers", 2304),
    "LTX-Video": (ltx, "convert_ltx_transformer_checkpoint_to_diffusers", H),
    "LTX-2": (ltx2, "convert_ltx2_transformer_to_diffusers", H),
}
SAYS = {"FLUX.2": "flux_2_dev", "Stable Diffusion 3": "stable-diffusion-3-m", "HunyuanVideo": "hunyuan-video"}
SAYS |= {"Z-Image by ComfyUI": "z_image", "Lumina 2": "lumina-2", "LTX-Video": "ltx", "LTX-2": "ltx"}


@pytest.mark.parametrize("flat", [True, False], ids=["lora_unet_", "diffusion_model."])
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_each_module_is_what_diffusers_makes_of_the_checkpoint_s(tmp_path: Path, family: str, *, flat: bool) -> None:
    import torch
    from diffusers.loaders import single_file_utils

    modules, convert, width = CHECKPOINTS[family]
    numbers, factors, tensors = Numbers(np.float32), {}, {}
    for name, rows in modules():
        columns = {"mlp.2": 48, "single_blocks.linear2": 64}.get(name, width)
        factors[name] = (numbers(R, columns), numbers(rows, R))
        stem = f"lora_unet_{name.replace('.', '_')}" if flat else f"diffusion_model.{name}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = factors[name]
    safetensors_file.write(tmp_path / "x.safetensors", tensors, {"modelspec.architecture": f"{SAYS[family]}/lora"})
    # The converter renames and cuts rows: it is given the rows of each lora_B as a weight.
    weights = {f"{name}.weight": torch.from_numpy(up) for name, (_, up) in factors.items()}
    extra = {name: torch.zeros(up.shape[0]) for name, (_, up) in factors.items()}
    if family == "Stable Diffusion 3":
        weights |= {f"{name}.bias": bias for name, bias in extra.items()}
        weights |= {name: torch.zeros(2) for name in ("pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias")}
    wanted = getattr(single_file_utils, convert)(weights)
    found = formats.read(tmp_path / "x.safetensors").deltas
    theirs = {name.removesuffix(".weight"): w for name, w in wanted.items() if name.endswith(".weight") and w.ndim > 1}
    assert {target.removeprefix("transformer.") for target in found} == set(theirs)
    for target, delta in found.items():
        rows = theirs[target.removeprefix("transformer.")]
        np.testing.assert_array_equal(getattr(delta, "lora_B"), rows.numpy(), err_msg=target)  # noqa: B009


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1": ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}),
    "FLUX.2": ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
    "Stable Diffusion 3": ("SD3Transformer2DModel", {"num_layers": 2, "dual_attention_layers": (0,)}),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    ),
    "Wan": ("WanTransformer3DModel", {"num_layers": 1, "image_dim": 8, "added_kv_proj_dim": 8}),
    "LTX-Video": ("LTX2VideoTransformer3DModel", {"num_layers": 1}),
    "Z-Image": ("ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}),
    "Lumina 2": ("Lumina2Transformer2DModel", {"num_layers": 1, "num_refiner_layers": 1}),
}  # fmt: skip


def linears(family: str) -> dict[str, tuple[int, int]]:
    """The linear modules of diffusers' own model, in its own size, and their shapes."""
    import diffusers
    import torch

    name, numbers = MODELS[family]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**numbers)
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("family", MODELS)
def test_a_table_has_every_linear_module_of_diffusers_model_and_its_shape(family: str) -> None:
    table = next(table for table in tables.TRANSFORMERS if table.name == family)
    shapes = linears(family)
    for target, shape in shapes.items():
        found = table.written(target)
        assert found, target
        path, reading = found
        assert table.read(path.replace(".", "_")) == reading
        out = sum(shapes[each][0] for each in reading.targets)
        assert not reading.excludes((out, shape[1])), (target, out, shape, reading.ratio)
        if reading.shares:
            assert [shapes[each][0] * sum(reading.shares) for each in reading.targets] == [s * out for s in reading.shares]


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
    found = formats.read(tmp_path / "y.safetensors").deltas
    layers = {n: module for n, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    assert set(found) == {f"transformer.{n}" for n in layers}
    for target, module in layers.items():
        wanted = module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(dense(found[f"transformer.{target}"]), wanted, rtol=1e-4, atol=1e-5, err_msg=target)


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
    spec = bases.BaseSpec("x", "hf", MODELS[family][0], "", {})
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
    ("stems", "said"),
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
    tmp_path: Path, stems: dict[str, tuple[int, ...]], said: str
) -> None:
    source = kohya_file(tmp_path / "a.safetensors", stems, {"modelspec.architecture": said} if said else {"ss_tag": "x"})
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


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_names_without_a_model_are_read_too(tmp_path: Path, prefix: str) -> None:
    path = kohya_file(tmp_path / "x.safetensors", {f"{prefix}double_blocks.0.img_attn_qkv": (48, 16)})
    assert formats.sniff(path) == "kohya"
    assert list(formats.read(path).deltas) == [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"]
