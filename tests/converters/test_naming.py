"""Names of modules in kohya files: their dots again, the families that they show, and what only the base settles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_converters import bases
from adapterhub_converters.adapter import LowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert
from adapterhub_converters.formats.image import family_tables, name_table
from tests.converters.test_kohya import read_file, the_delta, unet
from tests.support.images import Numbers, kohya_file, peft_folder

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
OURS = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TE = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


def scalar(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(value, dtype)


@pytest.mark.parametrize(
    ("stem", "target"),
    [
        (Q, OURS),
        ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0",
         "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"),
        ("lora_unet_mid_block_resnets_1_time_emb_proj", "unet.mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_up_blocks_3_resnets_2_conv_shortcut", "unet.up_blocks.3.resnets.2.conv_shortcut"),
        ("lora_unet_output_blocks_5_2_conv", "unet.up_blocks.1.upsamplers.0.conv"),
        ("lora_unet_output_blocks_8_0_skip_connection", "unet.up_blocks.2.resnets.2.conv_shortcut"),
        ("lora_unet_input_blocks_3_0_op", "unet.down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_middle_block_2_in_layers_2", "unet.mid_block.resnets.1.conv1"),
        ("lora_unet_label_emb_0_2", "unet.add_embedding.linear_2"),
        ("lora_unet_time_embed_0", "unet.time_embedding.linear_1"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text_encoder.text_model.encoder.layers.11.mlp.fc1"),
        (TE, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
        ("lora_te2_text_projection", "text_encoder_2.text_projection"),
        ("diffusion_model.llm_adapter.blocks.0.self_attn.o_proj", "text_conditioner.blocks.0.self_attn.o_proj"),
        ("lora_unet_llm_adapter_blocks_3_mlp_2", "text_conditioner.blocks.3.mlp.2"),
        ("text_embedding_projection.aggregate_embed", "connectors.text_proj_in"),
        ("lora_unet_blocks_3_cross_attn_k_img", "transformer.blocks.3.attn2.add_k_proj"),
        ("diffusion_model.blocks.3.ffn.2", "transformer.blocks.3.ffn.net.2"),
        ("diffusion_model.time_projection.1", "transformer.condition_embedder.time_proj"),
        ("lora_unet_transformer_blocks_1_img_mlp_net_0_proj", "transformer.transformer_blocks.1.img_mlp.net.0.proj"),
        ("lora_transformer_transformer_blocks_1_attn_to_add_out", "transformer.transformer_blocks.1.attn.to_add_out"),
        ("lora_unet_double_blocks_7_img_mod_lin", "transformer.transformer_blocks.7.norm1.linear"),
        ("lora_unet_single_blocks_7_modulation_lin", "transformer.single_transformer_blocks.7.norm.linear"),
        ("lora_unet_vector_in_out_layer", "transformer.time_text_embed.text_embedder.linear_2"),
        ("lycoris_transformer_blocks_3_ff_context_net_0_proj", "transformer.transformer_blocks.3.ff_context.net.0.proj"),
        ("lycoris_mid_block_attentions_0_proj_out", "unet.mid_block.attentions.0.proj_out"),
        ("double_blocks.2.processor.proj_lora2", "transformer.transformer_blocks.2.attn.to_add_out"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc2",
         "text_encoder_2.text_model.encoder.layers.0.mlp.fc2"),
    ],
)  # fmt: skip
def test_a_module_has_its_dots_again(tmp_path: Path, stem: str, target: str) -> None:
    numbers = Numbers()
    adapter = read_file(tmp_path / "x.safetensors", {"lora_down.weight": numbers(2, 8), "lora_up.weight": numbers(6, 2)}, stem)
    assert convert.sniff(tmp_path / "x.safetensors") == "kohya"
    assert list(adapter.deltas) == [target]
    assert adapter.meta.parts == (target.partition(".")[0],)


@pytest.mark.parametrize("table", [table for table in family_tables.TABLES if table.part], ids=lambda table: table.name)
@settings(max_examples=12)
@given(st.integers(0, 59), st.integers(0, 59))
def test_every_name_of_a_table_goes_there_and_back(table: name_table.Table, first: int, second: int) -> None:
    for path, reading in table.modules.items():
        numbers = iter((first, second, 7))
        stem = ".".join(str(next(numbers)) if word == "N" else word for word in path.split("."))
        reading_of_stem = table.read(stem)
        assert reading_of_stem is not None
        assert reading_of_stem == table.read(stem.replace(".", "_"))
        assert len(reading_of_stem.targets) == len(reading.targets)
        assert all(table.trainer_path(target) == (stem, reading_of_stem) for target in reading_of_stem.targets)


def test_two_modules_of_a_base_with_one_name_are_refused(tmp_path: Path) -> None:
    spec = unet(tmp_path, {"a.b_c": (6, 8), "a_b.c": (6, 8), "d": (6, 8)})
    path = kohya_file(tmp_path / "x.safetensors", {"lora_unet_a_b_c": (6, 8)})
    with pytest.raises(RefusedError, match=r"'lora_unet_a_b_c' may be a\.b_c or a_b\.c of the base"):
        convert.read(path, base=spec)


def test_the_base_gives_names_that_no_table_has(tmp_path: Path) -> None:
    spec = unet(tmp_path, {"odd_block.to_q": (6, 8)}, "OddTransformer2DModel")
    path = kohya_file(tmp_path / "x.safetensors", {"lora_unet_odd_block_to_q": (6, 8)})
    with pytest.raises(RefusedError, match="not a known module of an image model .* Name its base model"):
        convert.read(path)
    assert list(convert.read(path, base=spec).deltas) == ["odd_block.to_q"]
    unnamed = kohya_file(tmp_path / "y.safetensors", {"lora_unet_other": (6, 8)})
    with pytest.raises(
        RefusedError, match="'lora_unet_other' matches no module of the base. Was the adapter made for this base"
    ):
        convert.read(unnamed, base=spec)


def test_what_fits_two_models_is_refused_unless_the_header_names_one(tmp_path: Path) -> None:
    modules = {"lora_unet_single_blocks_0_linear2": (8, 24)}
    with pytest.raises(RefusedError, match=r"its names match FLUX\.1 and FLUX\.2, whose modules differ"):
        convert.read(kohya_file(tmp_path / "a.safetensors", modules))
    targets = {"flux-1-dev": "proj_out", "chroma": "proj_out", "hunyuan-video": "proj_out", "Flux.2-klein-4b": "attn.to_out"}
    for architecture, target in targets.items():
        path = kohya_file(tmp_path / f"{architecture}.safetensors", modules, {"modelspec.architecture": f"{architecture}/lora"})
        assert list(convert.read(path).deltas) == [f"transformer.single_transformer_blocks.0.{target}"]
    for architecture in ("hunyuan-video-1.5", "Flux.3", "HiDream-O1-Image"):
        path = kohya_file(tmp_path / f"{architecture}.safetensors", modules, {"modelspec.architecture": f"{architecture}/lora"})
        with pytest.raises(RefusedError, match="not a known module"):
            convert.read(path)


@pytest.mark.parametrize(
    ("stem", "shapes"),
    [
        ("lora_unet_single_blocks_0_linear1", {(56, 8): "FLUX.1", (72, 8): "FLUX.2"}),
        ("lora_unet_single_blocks_0_linear2", {(8, 40): "FLUX.1", (8, 32): "FLUX.2"}),
        ("lora_unet_double_blocks_0_txt_mlp_0", {(32, 8): "FLUX.1", (48, 8): "FLUX.2"}),
        ("lora_unet_double_blocks_0_img_mlp_2", {(8, 32): "FLUX.1", (8, 24): "FLUX.2"}),
        ("lora_unet_layers_0_feed_forward_w1", {(64, 24): "Z-Image by musubi-tuner", (96, 24): "Lumina 2"}),
        ("lora_unet_layers_0_attention_qkv", {(72, 24): "Z-Image by ComfyUI", (40, 24): "Lumina 2"}),
    ],
)
def test_families_are_distinguished_by_the_rows_of_a_module_for_each_column(
    tmp_path: Path, stem: str, shapes: dict[tuple[int, int], str]
) -> None:
    for shape, name in shapes.items():
        adapter = convert.read(kohya_file(tmp_path / f"{shape}.safetensors", {stem: shape}))
        assert adapter.meta.header["adapterhub.names"] == name


def test_the_name_of_pefts_adapter_may_be_in_a_tensor_s(tmp_path: Path) -> None:
    numbers, stem = Numbers(np.float32), "diffusion_model.layers.0.attention.to_q"
    factors = {"lora_A.default.weight": numbers(2, 8), "lora_B.default.weight": numbers(8, 2), "alpha": scalar(1)}
    delta = the_delta(tmp_path / "x", factors, stem)
    assert delta.scaling == 0.5


def test_the_third_encoder_is_the_second_of_flux(tmp_path: Path) -> None:
    stem = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    says = r"may be in FLUX\.1's second text encoder or in Stable Diffusion 3's third\. Name the pipeline's folder as its base"
    with pytest.raises(RefusedError, match=says):
        convert.read(kohya_file(tmp_path / "x.safetensors", {stem: (8, 8)}))
    for model_version, part in {"flux1": "text_encoder_2", "stable-diffusion-3-m": "text_encoder_3"}.items():
        path = kohya_file(tmp_path / f"{model_version}.safetensors", {stem: (8, 8)}, {"ss_base_model_version": model_version})
        assert list(convert.read(path).deltas) == [f"{part}.encoder.block.0.layer.0.SelfAttention.q"]


@pytest.mark.parametrize(
    ("stem", "target"),
    [
        ("blocks.0.cross_attn.k", "blocks.0.attn2.to_k"),
        ("pipe.dit.blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"),
        ("transformer.single_blocks.3.linear2", "single_transformer_blocks.3.proj_out"),
        ("conditional_transformer.layers.0.attention.o", "layers.0.attention.to_out.0"),
        ("blocks.0.attn.out_proj", "transformer_blocks.0.attn.to_out.0"),
    ],
)
def test_names_without_a_model_are_those_of_the_makers(tmp_path: Path, stem: str, target: str) -> None:
    numbers = Numbers()
    for infix in ("", ".default"):
        names = (f"lora_A{infix}.weight", f"lora_B{infix}.weight")
        path = tmp_path / f"x{infix}.safetensors"
        tensors = {f"{stem}.{name}": array for name, array in zip(names, (numbers(2, 40), numbers(8, 2)), strict=True)}
        safetensors_file.write(path, tensors)
        assert convert.sniff(path) == "kohya"
        assert list(convert.read(path).deltas) == [f"transformer.{target}"]


@pytest.mark.parametrize(
    ("stem", "says"),
    [
        ("lora_unet_joint_blocks_0_y_block_attn_qkv", "not a known module"),
        ("lora_unet_input_blocks_11_0_in_layers_2", "not a known module"),
        ("lora_te1_pooler", "not a known module of a text encoder"),
        ("lora_unet_blocks_0_ffn_0", "'lora_unet_blocks_0_ffn_0' is a module of Wan and .* of SDXL, but no model has both"),
        ("lycoris_model_diffusion_to_q", "not a known module"),
    ],
)
def test_names_that_are_not_known_are_refused_by_name(tmp_path: Path, stem: str, says: str) -> None:
    modules = {Q: (6, 8), stem: (6, 8)} if "both" in says else {stem: (6, 8)}
    with pytest.raises(RefusedError, match=says) as caught:
        convert.read(kohya_file(tmp_path / "x.safetensors", modules))
    assert stem in str(caught.value)


def test_a_module_of_an_unknown_model_needs_the_base(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", {"down_blocks.1.attentions.0.proj_in": (8, 8)})
    with pytest.raises(
        RefusedError, match="may be those of Stable Diffusion and SDXL or of another model, which have different names in kohya"
    ):
        convert.convert(folder, tmp_path / "x", to="kohya")
    spec = unet(tmp_path, {"down_blocks.1.attentions.0.proj_in": (8, 8), "add_embedding.linear_1": (8, 8)})
    convert.convert(folder, tmp_path / "x", to="kohya", base=spec)
    with safetensors_file.SafetensorsFile(tmp_path / "x") as file:
        assert "lora_unet_input_blocks_4_1_proj_in.alpha" in file.tensors
    text = peft_folder(tmp_path / "t", {"text_model.encoder.layers.0.mlp.fc1": (8, 8)})
    with pytest.raises(RefusedError, match="may be in any text encoder of a pipeline. Name the folder"):
        convert.convert(text, tmp_path / "y", to="kohya")


def test_a_model_that_shares_names_with_another_needs_the_base_too(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", {"transformer_blocks.0.attn2.to_q": (8, 8)})
    with pytest.raises(RefusedError, match="may be those of Stable Diffusion 3 and Qwen-Image and LTX-Video or of another"):
        convert.convert(folder, tmp_path / "x", to="kohya")
    spec = bases.BaseSpec("x", "hf", "PixArtTransformer2DModel", "", {})
    with pytest.raises(RefusedError, match="the names in kohya of PixArtTransformer2DModel's modules are not known"):
        convert.convert(folder, tmp_path / "x", to="kohya", base=spec)
    qwen = peft_folder(tmp_path / "b", {"transformer_blocks.0.img_mlp.net.2": (8, 8)})
    convert.convert(qwen, tmp_path / "y", to="kohya")


def test_a_pipeline_is_a_base_and_settles_kernels_and_names(tmp_path: Path) -> None:
    unet(tmp_path / "p", {"mid_block.attentions.0.proj_in": (8, 8), "add_embedding.linear_1": (8, 8)})
    (tmp_path / "p/model").rename(tmp_path / "p/unet")
    unet(tmp_path / "p", {"text_model.encoder.layers.0.mlp.fc1": (8, 8)}, "CLIPTextModel")
    (tmp_path / "p/model").rename(tmp_path / "p/text_encoder")
    (tmp_path / "p/model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    spec = bases.read_base(tmp_path / "p")
    assert spec.architecture == "StableDiffusionXLPipeline"
    path = kohya_file(
        tmp_path / "x",
        {"lora_unet_middle_block_1_proj_in": (8, 8, 1, 1), "lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 8)},
    )
    deltas = convert.read(path, base=spec).deltas
    assert set(deltas) == {"unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"}
    assert isinstance(deltas["unet.mid_block.attentions.0.proj_in"], LowRank)
    alone = bases.read_base(tmp_path / "p/unet")
    with pytest.raises(
        RefusedError, match="acts on text_encoder and unet, but the base is a UNet2DConditionModel. Name the pipe"
    ):
        convert.read(path, base=alone)


def test_a_model_of_diffusers_in_parts_is_a_base(tmp_path: Path) -> None:
    spec = unet(tmp_path, {"odd_block.to_q": (6, 8)})
    folder = tmp_path / "model"
    first = folder / "diffusion_pytorch_model-00001-of-00001.safetensors"
    (folder / "diffusion_pytorch_model.safetensors").rename(first)
    index = {"weight_map": {"odd_block.to_q.weight": first.name}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    again = bases.read_base(folder)
    assert (again.architecture, again.fingerprint) == ("UNet2DConditionModel", spec.fingerprint)
    assert bases.weight_files(folder) == [first]


def test_bfl_s_dotted_names_have_biases_too(tmp_path: Path) -> None:
    numbers, stem = Numbers(), "double_blocks.0.img_attn.qkv"
    parts_of = {"lora_A.weight": numbers(2, 8), "lora_B.weight": numbers(24, 2), "lora_B.bias": numbers(24)}
    safetensors_file.write(
        tmp_path / "x", {f"{stem}.{n}": a for n, a in parts_of.items()}, {"modelspec.architecture": "flux-1-dev"}
    )
    deltas: Any = convert.read(tmp_path / "x").deltas
    np.testing.assert_array_equal(np.concatenate([delta.bias for delta in deltas.values()]), parts_of["lora_B.bias"])


def test_a_text_encoder_that_transformers_5_saved_has_other_names(tmp_path: Path) -> None:
    spec = unet(tmp_path, {"encoder.layers.0.self_attn.q_proj": (8, 8)}, "CLIPTextModel")
    path = kohya_file(tmp_path / "x.safetensors", {TE: (8, 8)})
    assert list(convert.read(path, base=spec).deltas) == ["encoder.layers.0.self_attn.q_proj"]
    folder = peft_folder(tmp_path / "a", {"encoder.layers.0.self_attn.q_proj": (8, 8)})
    convert.convert(folder, tmp_path / "y.safetensors", to="kohya", base=spec)
    with safetensors_file.SafetensorsFile(tmp_path / "y.safetensors") as file:
        assert f"{TE.replace('te1', 'te')}.alpha" in file.tensors
    (tmp_path / "model").rename(tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text("{}")
    whole = bases.read_base(tmp_path)
    assert list(whole.tensors) == ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"]
