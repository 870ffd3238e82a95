"""kohya's, LyCORIS' and ComfyUI's files: true alphas, names with their dots again or none, and the way back exact."""

from __future__ import annotations

import contextlib
import json
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_converters import bases
from adapterhub_converters.adapter import Adapter, Loss, LowRank, refuse_bundled
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.formats.image import diffusers, factors, family_tables, joined_modules, kohya, name_table
from adapterhub_converters.formats.lossy import LossAllowance
from tests.conftest import Run
from tests.support.images import FLUX, SDXL, Numbers, dense, files, kohya_file, pair, peft_folder

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
OURS = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TE = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
FLUX_BASE = bases.BaseSpec("flux", "hf", "FluxTransformer2DModel", "", {})


def one(path: Path, parts: dict[str, np.ndarray], stem: str = Q) -> Adapter:
    """The adapter of one module."""
    safetensors_file.write(path, {f"{stem}.{name}": array for name, array in parts.items()})
    return convert.read(path)


def the_delta(path: Path, parts: dict[str, np.ndarray], stem: str = Q) -> Any:
    (delta,) = one(path, parts, stem).deltas.values()
    return delta


def scalar(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(value, dtype)


# ---- names


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
    adapter = one(tmp_path / "x.safetensors", {"lora_down.weight": numbers(2, 8), "lora_up.weight": numbers(6, 2)}, stem)
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
        found = table.read(stem)
        assert found is not None
        assert found == table.read(stem.replace(".", "_"))
        assert len(found.targets) == len(reading.targets)
        assert all(table.trainer_path(target) == (stem, found) for target in found.targets)


def test_two_modules_of_a_base_with_one_name_are_refused(tmp_path: Path) -> None:
    spec = unet(tmp_path, {"a.b_c": (6, 8), "a_b.c": (6, 8), "d": (6, 8)})
    path = kohya_file(tmp_path / "x.safetensors", {"lora_unet_a_b_c": (6, 8)})
    with pytest.raises(RefusedError, match=r"'lora_unet_a_b_c' may be a\.b_c or a_b\.c of the base"):
        convert.read(path, base=spec)


def unet(tmp_path: Path, modules: dict[str, tuple[int, ...]], name: str = "UNet2DConditionModel") -> bases.BaseSpec:
    folder = tmp_path / "model"
    folder.mkdir(parents=True)
    weights = {f"{module}.weight": np.zeros(shape, np.float16) for module, shape in modules.items()}
    safetensors_file.write(folder / "diffusion_pytorch_model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps({"_class_name": name}))
    return bases.read_base(folder)


def test_the_base_gives_names_that_no_table_has(tmp_path: Path) -> None:
    spec = unet(tmp_path, {"odd_block.to_q": (6, 8)}, "OddTransformer2DModel")
    path = kohya_file(tmp_path / "x.safetensors", {"lora_unet_odd_block_to_q": (6, 8)})
    with pytest.raises(RefusedError, match="not a known module of an image model .* Name its base model"):
        convert.read(path)
    assert list(convert.read(path, base=spec).deltas) == ["odd_block.to_q"]
    other = kohya_file(tmp_path / "y.safetensors", {"lora_unet_other": (6, 8)})
    with pytest.raises(
        RefusedError, match="'lora_unet_other' matches no module of the base. Was the adapter made for this base"
    ):
        convert.read(other, base=spec)


def test_what_fits_two_models_is_refused_unless_the_header_names_one(tmp_path: Path) -> None:
    modules = {"lora_unet_single_blocks_0_linear2": (8, 24)}
    with pytest.raises(RefusedError, match=r"its names match FLUX\.1 and FLUX\.2, whose modules differ"):
        convert.read(kohya_file(tmp_path / "a.safetensors", modules))
    targets = {"flux-1-dev": "proj_out", "chroma": "proj_out", "hunyuan-video": "proj_out", "Flux.2-klein-4b": "attn.to_out"}
    for said, target in targets.items():
        path = kohya_file(tmp_path / f"{said}.safetensors", modules, {"modelspec.architecture": f"{said}/lora"})
        assert list(convert.read(path).deltas) == [f"transformer.single_transformer_blocks.0.{target}"]
    for said in ("hunyuan-video-1.5", "Flux.3", "HiDream-O1-Image"):
        path = kohya_file(tmp_path / f"{said}.safetensors", modules, {"modelspec.architecture": f"{said}/lora"})
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


@pytest.mark.parametrize("end", ["a1.weight", "oft_blocks", "q_layer.weight", "reshape_weight", "on_input"])
def test_kinds_that_are_not_read_are_refused_by_name(tmp_path: Path, end: str) -> None:
    safetensors_file.write(tmp_path / "x.safetensors", {f"{Q}.{end}": np.ones((2, 2), np.float32)})
    with pytest.raises(RefusedError, match=f"tensor '{Q}.{end}': this kind of tensor is not supported"):
        convert.read(tmp_path / "x.safetensors")


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
    for said, part in {"flux1": "text_encoder_2", "stable-diffusion-3-m": "text_encoder_3"}.items():
        path = kohya_file(tmp_path / f"{said}.safetensors", {stem: (8, 8)}, {"ss_base_model_version": said})
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


def test_rows_that_diffsynth_interleaves_are_refused(tmp_path: Path) -> None:
    numbers, stem = Numbers(np.float32), "blocks.0.attn.qkv_proj"
    for infix in ("", ".default"):
        pair_of = {f"lora_A{infix}.weight": numbers(2, 12), f"lora_B{infix}.weight": numbers(48, 2)}
        if not infix:
            assert len(one(tmp_path / "x", pair_of, stem).deltas) == 3
            continue
        with pytest.raises(RefusedError, match="are interleaved by heads"):
            one(tmp_path / "y", pair_of, stem)


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


# ---- what it computes


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1), (0, 1), (2, 0.5), (0.5, 0.125), (-4, -1)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_alpha_of_none_or_zero_is_the_rank(
    tmp_path: Path, alpha: float | None, scaling: float, shape: tuple[int, ...]
) -> None:
    numbers = Numbers()
    parts = {"lora_down.weight": numbers(4, 8), "lora_up.weight": numbers(6, 4)}
    parts |= {} if alpha is None else {"alpha": np.full(shape, alpha, np.float32)}
    adapter = one(tmp_path / "x.safetensors", parts)
    assert adapter.deltas[OURS].scaling == scaling
    assert bool(adapter.notes) == (not alpha)


def test_lycoris_kinds_are_what_lycoris_computes(tmp_path: Path) -> None:
    numbers = Numbers(np.float64)
    conv = "lora_unet_middle_block_0_in_layers_2"
    a1, b1, a2, b2 = numbers(6, 2), numbers(2, 8 * 9), numbers(6, 2), numbers(2, 8 * 9)
    loha = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": scalar(1)}
    delta = the_delta(tmp_path / "1", loha, conv)
    assert delta.shape == (6, 8, 3, 3)
    np.testing.assert_allclose(dense(delta), 0.5 * ((a1 @ b1) * (a2 @ b2)).reshape(6, 8, 3, 3), rtol=1e-4, atol=1e-4)

    w1, w2a, w2b = numbers(2, 4), numbers(3, 2), numbers(2, 2 * 9)
    delta = the_delta(tmp_path / "2", {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": scalar(1)}, conv)
    w2 = (w2a @ w2b).reshape(3, 2, 3, 3)
    np.testing.assert_allclose(dense(delta), 0.5 * np.kron(w1[:, :, None, None], w2), rtol=1e-4, atol=1e-4)

    tensors = {f"{Q}.{name}": array for name, array in {"lokr_w1": w1, "lokr_w2": numbers(3, 2), "alpha": scalar(8)}.items()}
    for said in ('{"rs_lora": "True"}', "{}"):
        safetensors_file.write(tmp_path / "3", tensors, {"ss_network_args": said})
        whole = convert.read(tmp_path / "3")
        assert whole.deltas[OURS].scaling == 1
        assert ["without the factor of rs_lora" in note for note in whole.notes] == [True] * ("rs_lora" in said)

    down, mid, up = numbers(4, 8, 1, 1), numbers(4, 4, 3, 3), numbers(6, 4, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": scalar(2)}
    expected = 0.5 * np.einsum("or,rjkl,ji->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    np.testing.assert_allclose(dense(the_delta(tmp_path / "4", parts, conv)), expected, rtol=1e-4, atol=1e-4)

    for n, shape in enumerate([(6, 8), (8, 6), (6, 8, 3, 3), (40, 2, 3, 3)]):
        diff = numbers(*shape)
        np.testing.assert_array_equal(dense(the_delta(tmp_path / f"d{n}", {"diff": diff})), diff)


def test_dora_scales_of_outputs_are_magnitudes_and_those_of_inputs_refused(tmp_path: Path) -> None:
    numbers = Numbers()
    parts = {"lora_down.weight": numbers(2, 8), "lora_up.weight": numbers(6, 2), "alpha": scalar(2)}
    delta = the_delta(tmp_path / "x", {**parts, "dora_scale": numbers(6, 1)})
    assert delta.magnitude.shape == (6,)
    with pytest.raises(RefusedError, match=r"a DoRA scale of shape \(1, 8\) .* scales of inputs"):
        the_delta(tmp_path / "y", {**parts, "dora_scale": numbers(1, 8)})
    conv = {"lora_down.weight": numbers(2, 8, 3, 3), "lora_up.weight": numbers(6, 2, 1, 1), "dora_scale": numbers(6, 1, 1, 1)}
    assert the_delta(tmp_path / "z", conv).magnitude.shape == (1, 6, 1, 1)


def test_a_bias_difference_counts_and_zeros_are_reported(tmp_path: Path) -> None:
    numbers = Numbers()
    parts = {"lora_down.weight": numbers(2, 8), "lora_up.weight": numbers(6, 2), "alpha": scalar(1), "diff_b": numbers(6)}
    delta = the_delta(tmp_path / "x", parts)
    np.testing.assert_allclose(delta.scaling * delta.bias, parts["diff_b"], rtol=1e-6)
    zeros = one(tmp_path / "y", {**parts, "diff_b": np.zeros(6, np.float16)})
    assert zeros.notes == ("1 differences are all zeros and have no effect",)
    alone = {"diff_b": numbers(6)}
    assert one(tmp_path / "z", alone).added[f"{OURS}.bias"].tobytes() == alone["diff_b"].tobytes()


# ---- FLUX: several modules in one


def test_rows_of_one_module_are_those_of_several(tmp_path: Path) -> None:
    numbers = Numbers()
    stem = "lora_unet_single_blocks_0_linear1"
    parts = {"lora_down.weight": numbers(3, 8), "lora_up.weight": numbers(56, 3), "alpha": scalar(6)}
    safetensors_file.write(tmp_path / "x", {f"{stem}.{n}": a for n, a in parts.items()}, {"ss_base_model_version": "flux1"})
    deltas = convert.read(tmp_path / "x").deltas
    single = "transformer.single_transformer_blocks.0"
    assert list(deltas) == [*(f"{single}.attn.to_{name}" for name in "qkv"), f"{single}.proj_mlp"]
    whole = 2.0 * parts["lora_up.weight"].astype(np.float64) @ parts["lora_down.weight"].astype(np.float64)
    np.testing.assert_allclose(np.concatenate([dense(delta) for delta in deltas.values()]), whole, rtol=1e-12)


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr in halves"])
def test_products_of_one_module_are_those_of_several(tmp_path: Path, kind: str) -> None:
    numbers = Numbers(np.float32)
    a, b, c, d = numbers(24, 2), numbers(2, 8), numbers(24, 2), numbers(2, 8)
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": scalar(1)}
    whole = 0.5 * (a @ b) * (c @ d)
    if kind != "loha":
        w1, w2 = numbers(6, 2), numbers(4, 4)
        parts = {"lokr_w1": w1, "lokr_w2": w2}
        if kind == "lokr in halves":
            parts = {"lokr_w1_a": numbers(6, 2), "lokr_w1_b": numbers(2, 2), "lokr_w2": w2, "alpha": scalar(2)}
            w1 = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        whole = np.kron(w1, w2)
    stem = "diffusion_model.double_blocks.0.txt_attn.qkv"
    deltas = one(tmp_path / "x", parts, stem).deltas
    assert [target.rpartition(".")[2] for target in deltas] == ["add_q_proj", "add_k_proj", "add_v_proj"]
    np.testing.assert_allclose(np.concatenate([dense(delta) for delta in deltas.values()]), whole, rtol=1e-5, atol=1e-6)
    report = convert.convert(tmp_path / "x", tmp_path / "y", to="peft")
    assert report.worst == Loss.ROUNDED


@pytest.mark.parametrize("stem", ["double_blocks_0_img_attn_qkv", "final_layer_adaLN_modulation_1"])
def test_a_product_that_cannot_be_cut_or_turned_is_the_pair_that_it_equals(tmp_path: Path, stem: str) -> None:
    numbers = Numbers(np.float32)
    rows = 24 if "qkv" in stem else 16
    w1, w2, scales = numbers(4, 2), numbers(rows // 4, 4), numbers(rows, 1)
    parts = {"lokr_w1": w1, "lokr_w2": w2, "dora_scale": scales}
    path = tmp_path / "x"
    safetensors_file.write(path, {f"lora_unet_{stem}.{n}": a for n, a in parts.items()}, {"ss_base_model_version": "flux1"})
    deltas: Any = convert.read(path).deltas.values()
    found = np.concatenate([dense(delta) for delta in deltas])
    magnitude = np.concatenate([delta.magnitude for delta in deltas])
    expected = np.kron(w1, w2)
    if "final" in stem:
        expected, scales = (np.concatenate([rows[8:], rows[:8]]) for rows in (expected, scales))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(magnitude, scales[:, 0])


def test_products_that_would_be_far_too_large_as_pairs_are_refused(tmp_path: Path) -> None:
    numbers = Numbers()
    parts = {"lokr_w1": numbers(128, 128), "lokr_w2_a": numbers(144, 16), "lokr_w2_b": numbers(16, 48), "alpha": scalar(16)}
    stems = [f"lora_unet_double_blocks_{n}_{kind}_attn_qkv" for n in range(6) for kind in ("img", "txt")]
    safetensors_file.write(tmp_path / "x", {f"{stem}.{name}": array for stem in stems for name, array in parts.items()})
    with pytest.raises(RefusedError, match="numbers are to become low-rank pairs of"):
        convert.read(tmp_path / "x")


@pytest.mark.parametrize("kind", ["shared", "own", "dora"])
@given(st.permutations("qkv"))
def test_apart_and_together_again_is_the_same_function(kind: str, order: list[str]) -> None:
    numbers = Numbers(np.float32)
    reading = name_table.Reading(("q", "k", "v"), ratio=Fraction(3), shares=(1, 1, 1))
    lora_A = numbers(2, 8)
    deltas = {
        name: LowRank(
            lora_A if kind != "own" else numbers(2, 8), numbers(8, 2), 3.0, magnitude=numbers(8) if kind == "dora" else None
        )
        for name in "qkv"
    }
    whole: Any = joined_modules.join_deltas("x", {name: deltas[name] for name in order}, reading)
    np.testing.assert_allclose(dense(whole), np.concatenate([dense(deltas[name]) for name in "qkv"]), rtol=1e-6, atol=1e-6)
    again = joined_modules.split_delta("x", whole, reading, "x")
    for name, delta in deltas.items():
        found: Any = again[name]
        assert (found.lora_A.tobytes(), found.lora_B.tobytes()) == (delta.lora_A.tobytes(), delta.lora_B.tobytes())
        assert found.scaling == delta.scaling
        assert kind != "dora" or found.magnitude.tobytes() == delta.magnitude.tobytes()


def test_halves_that_diffusers_has_the_other_way_round_are_turned(tmp_path: Path) -> None:
    numbers = Numbers()
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    parts = {"lora_down.weight": numbers(2, 8), "lora_up.weight": numbers(16, 2)}
    tensors = {f"{stem}.{name}": array for name, array in parts.items()}
    safetensors_file.write(tmp_path / "x", tensors, {"ss_base_model_version": "flux1"})
    delta: Any = convert.read(tmp_path / "x").deltas["transformer.norm_out.linear"]
    np.testing.assert_array_equal(delta.lora_B, np.roll(parts["lora_up.weight"], 8, axis=0))


def test_another_model_with_flux_names_is_refused_by_its_rows(tmp_path: Path) -> None:
    path = kohya_file(tmp_path / "x", {"lora_unet_single_blocks_0_linear1": (72, 8)}, {"ss_base_model_version": "flux1"})
    with pytest.raises(RefusedError, match=r"72 rows and 8 columns do not match .*to_q and 3 more"):
        convert.read(path)


def test_modules_with_scales_of_their_own_are_not_one_module(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", FLUX, alpha_pattern={"transformer_blocks.0.attn.to_k": 5})
    with pytest.raises(RefusedError, match="are one module in this format, with one scale, but have several"):
        convert.convert(folder, tmp_path / "x", to="kohya", base=FLUX_BASE)


# ---- there and back


@pytest.mark.parametrize(
    "config",
    [
        {}, {"use_rslora": True}, {"lora_alpha": 0}, {"lora_alpha": 1e-3}, {"use_dora": True},
        {"alpha_pattern": {"to_q": 5, "conv1": 0.3}}, {"ranks": {f"{next(iter(SDXL))}": 2}}, {"peft_version": "0.19.0"},
    ],
    ids=str,
)  # fmt: skip
def test_peft_to_kohya_and_back_is_the_same_bytes(tmp_path: Path, config: dict[str, Any]) -> None:
    source = peft_folder(tmp_path / "a", SDXL, **config)
    report = convert.convert(source, tmp_path / "x.safetensors", to="kohya")
    assert report.worst == Loss.EXACT
    assert len(report.losses) == len(list(peft.read(source).tensors()))
    convert.convert(tmp_path / "x.safetensors", tmp_path / "b", to="peft")
    assert files(tmp_path / "b") == files(source)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_peft_s_lycoris_kinds_come_back_too(tmp_path: Path, kind: str) -> None:
    numbers, stem = Numbers(), f"base_model.model.{OURS.removeprefix('unet.')}"
    shapes = {f"hada_w{n}_{half}": shape for n in (1, 2) for half, shape in (("a", (16, 2)), ("b", (2, 16)))}
    if kind == "LOKR":
        shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}
    (tmp_path / "a").mkdir()
    safetensors_file.write(tmp_path / "a" / peft.WEIGHTS, {f"{stem}.{name}": numbers(*shape) for name, shape in shapes.items()})
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps({"peft_type": kind, "r": 2, "alpha": 3}))
    spec = bases.BaseSpec("sdxl", "hf", "StableDiffusionXLPipeline", "", {})
    convert.convert(tmp_path / "a", tmp_path / "x.safetensors", to="kohya", base=spec)
    convert.convert(tmp_path / "x.safetensors", tmp_path / "b", to="peft")
    assert files(tmp_path / "b") == files(tmp_path / "a")
    without_source_config(tmp_path / "x.safetensors")
    np.testing.assert_allclose(
        dense(convert.read(tmp_path / "x.safetensors").deltas[OURS]),
        dense(peft.read(tmp_path / "a").deltas[OURS[5:]]),
        rtol=1e-6,
    )


@pytest.mark.parametrize("ranks", [{}, {"transformer_blocks.0.attn.to_k": 2, "single_transformer_blocks.1.proj_mlp": 7}])
@pytest.mark.parametrize("without", ["", "to_k"])
def test_flux_and_back_is_the_same_bytes(tmp_path: Path, ranks: dict[str, int], without: str) -> None:
    modules = {target: shape for target, shape in FLUX.items() if not without or without not in target}
    source = peft_folder(tmp_path / "a", modules, {t: r for t, r in ranks.items() if t in modules}, use_rslora=not ranks)
    if ranks:  # one scale for what is one module: alpha as the rank
        config = json.loads((source / peft.CONFIG).read_text()) | {"lora_alpha": 4, "alpha_pattern": dict(ranks)}
        (source / peft.CONFIG).write_text(json.dumps(config))
    convert.convert(source, tmp_path / "x.safetensors", to="kohya", base=FLUX_BASE)
    convert.convert(tmp_path / "x.safetensors", tmp_path / "b", to="peft")
    assert files(tmp_path / "b") == files(source)
    adapter = peft.read(source)
    without_source_config(tmp_path / "x.safetensors")
    again = convert.read(tmp_path / "x.safetensors")
    assert {target.removeprefix("transformer.") for target in again.deltas} == set(adapter.deltas)
    for target, delta in adapter.deltas.items():
        np.testing.assert_allclose(dense(again.deltas[f"transformer.{target}"]), dense(delta), rtol=1e-6, atol=1e-6)


def without_source_config(path: Path) -> None:
    with safetensors_file.SafetensorsFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        metadata = {key: text for key, text in file.header.metadata.items() if not key.startswith("adapterhub.")}
    safetensors_file.write(path, tensors, metadata)


@pytest.mark.parametrize(
    "modules",
    [
        {Q: (16, 16), "lora_unet_input_blocks_1_0_in_layers_2": (8, 8, 3, 3), "lora_unet_label_emb_0_0": (8, 8)},
        {"lora_unet_up_blocks_3_attentions_0_proj_in": (8, 8, 1, 1), "lora_unet_down_blocks_0_resnets_0_conv1": (8, 8, 3, 3)},
        {"lora_unet_double_blocks_0_img_attn_qkv": (48, 16), "lora_unet_double_blocks_0_img_mlp_0": (64, 16)},
        {"lora_unet_blocks_0_self_attn_q": (8, 8), "lora_unet_blocks_0_ffn_0": (16, 8)},
    ],
)
def test_kohya_to_peft_and_back_is_the_same_bytes_and_header(tmp_path: Path, modules: dict[str, tuple[int, ...]]) -> None:
    header = {"ss_network_dim": "4", "ss_tag_frequency": '{"a": {"b": 1}}', "ss_base_model_version": "", "format": "pt"}
    header["modelspec.architecture"] = "flux-1-dev/lora" if "lora_unet_double_blocks_0_img_mlp_0" in modules else ""
    source = kohya_file(tmp_path / "a.safetensors", modules, header)
    for to, end in (("peft", ""), ("diffusers", ".safetensors")):
        convert.convert(source, tmp_path / f"{to}{end}", to=to)
        convert.convert(tmp_path / f"{to}{end}", tmp_path / f"{to}-again.safetensors", to="kohya")
        assert (tmp_path / f"{to}-again.safetensors").read_bytes() == source.read_bytes()


def test_hashes_of_other_bytes_are_left_out(tmp_path: Path) -> None:
    import hashlib

    path = kohya_file(tmp_path / "a", {Q: (16, 16), "lora_unet_label_emb_0_0": (8, 8)})
    raw = path.read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    header = {"sshs_model_hash": digest, "sshs_legacy_hash": "12345678", "ss_a": "b"}
    for n, said in enumerate((header, {**header, "sshs_model_hash": "0" * 64})):
        source = kohya_file(tmp_path / f"k{n}", {Q: (16, 16), "lora_unet_label_emb_0_0": (8, 8)}, said)
        convert.convert(source, tmp_path / f"p{n}", to="peft")
        notes = convert.convert(tmp_path / f"p{n}", tmp_path / f"n{n}", to="kohya").notes
        assert ((tmp_path / f"n{n}").read_bytes() == source.read_bytes()) == (n == 0)
        assert bool(notes) == (n == 1)


def test_several_models_are_several_adapters_to_peft(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a", {Q: (16, 16), TE: (8, 8), TE.replace("te1", "te2"): (8, 8)})
    with pytest.raises(
        RefusedError, match=r"acts on text_encoder and text_encoder_2 and unet, but PEFT has one model"
    ) as caught:
        convert.convert(source, tmp_path / "b", to="peft")
    assert (caught.value.code, caught.value.fields) == ("several-models", {"drop": "text_encoder.*"})
    drop = LossAllowance(drop=["text_encoder.*", "text_encoder_2.*"])
    report = convert.convert(source, tmp_path / "b", to="peft", allowed=drop)
    assert report.summary["dropped"] == 4
    assert list(peft.read(tmp_path / "b").deltas) == [OURS.removeprefix("unet.")]


def test_lycoris_kinds_stay_what_they_are(tmp_path: Path) -> None:
    numbers = Numbers()
    loha = {f"hada_w{n}_{half}": numbers(*shape) for n in (1, 2) for half, shape in (("a", (16, 2)), ("b", (2, 16)))}
    adapter = one(tmp_path / "x", {**loha, "alpha": scalar(1)})
    report = kohya.write(adapter, tmp_path / "y")
    assert report.worst == Loss.EXACT
    np.testing.assert_array_equal(dense(convert.read(tmp_path / "y").deltas[OURS]), dense(adapter.deltas[OURS]))
    assert convert.convert(tmp_path / "x", tmp_path / "z", to="peft").worst == Loss.ROUNDED
    assert convert.convert(tmp_path / "x", tmp_path / "w", to="diffusers").worst == Loss.ROUNDED


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


@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_formats_of_language_models_refuse_it_by_name(tmp_path: Path, to: str) -> None:
    with pytest.raises(AdapterhubError) as caught:
        convert.convert(kohya_file(tmp_path / "x", {Q: (16, 16)}), tmp_path / "y", to=to)
    assert "\n" not in str(caught.value)


def test_the_bytes_are_golden(tmp_path: Path) -> None:
    numbers = Numbers()
    lora_A, lora_B = pair(numbers, (6, 8), 2)
    deltas = {f"unet.{target}": LowRank(lora_A, lora_B, 3.0) for target in list(SDXL)[3:]}
    meta = Adapter({}).meta
    adapter = Adapter(deltas, meta=type(meta)(parts=("unet",)))
    kohya.write(adapter, tmp_path / "x")
    golden = Path(__file__).parent / "golden" / "tiny_kohya.safetensors"
    assert (tmp_path / "x").read_bytes() == golden.read_bytes()


# ---- hostile


A, B = np.ones((2, 8), np.float32), np.ones((6, 2), np.float32)


@pytest.mark.parametrize(
    ("parts", "error", "says"),
    [
        ({"lora_down.weight": A}, FormatError, "lora_down alone; its counterpart is missing"),
        ({"lora_up.weight": B}, FormatError, "lora_up alone; its counterpart is missing"),
        ({"alpha": scalar(1)}, RefusedError, "without a pair of factors"),
        ({"lora_down.weight": A, "lora_up.weight": B.T}, FormatError, "are not a pair"),
        ({"lora_down.weight": np.ones((2, 4, 3, 3), np.float32), "lora_up.weight": np.ones((6, 2, 3, 3), np.float32)},
         FormatError, "and lora_up (6, 2, 3, 3): the second of two convolutions must be 1 by 1"),
        ({"lora_down.weight": A, "lora_up.weight": B, "alpha": scalar(np.nan)}, FormatError, "not a number in range"),
        ({"lora_down.weight": A, "lora_up.weight": B, "alpha": scalar(1e30)}, FormatError, "not a number in range"),
        ({"lora_down.weight": A, "lora_up.weight": B, "alpha": np.ones(2)}, FormatError, "not a number in range"),
        ({"lora_down.weight": A.astype(np.int8), "lora_up.weight": B}, FormatError, "which is not a factor"),
        ({"lora_down.weight": A[:0], "lora_up.weight": B[:, :0]}, FormatError, "which is not a factor"),
        ({"lora_down.weight": A, "lora_up.weight": B, "lora_mid.weight": A}, FormatError, "does not fit"),
        ({"lora_down.weight": A, "lora_up.weight": B, "diff": A}, RefusedError, "diff with a pair"),
        ({"lora_down.weight": A, "lora_up.weight": B, "diff_b": A}, FormatError, "is not one number for each"),
        ({"hada_w1_a": A, "hada_w1_b": B}, FormatError, "not make a LoHa delta"),
        ({"hada_w1_a": A, "hada_w1_b": B, "hada_w2_a": A, "hada_w2_b": B, "hada_t1": A}, FormatError, "not make a LoHa delta"),
        (
            {"lora_down.weight": A, "lora_up.weight": B, "dora_scale": np.ones((1, 8), np.float32)}, RefusedError,
            "is not one number for each of 6 outputs; scales of inputs, as in early LyCORIS, are a different function",
        ),
        ({"lokr_w1": A}, FormatError, "do not make a LoKr delta"),
        ({"lokr_w1": A, "lokr_w2": A, "lokr_w2_a": A}, FormatError, "do not make a LoKr delta"),
        ({"lora_down.weight": A, "lora_up.weight": B, "oft_blocks": A}, RefusedError, "oft_blocks': this kind of tensor"),
    ],
)  # fmt: skip
def test_malformed_ones_are_refused_in_one_line(
    tmp_path: Path, parts: dict[str, np.ndarray], error: type[AdapterhubError], says: str
) -> None:
    with pytest.raises(AdapterhubError) as caught:
        one(tmp_path / "x", parts)
    assert says in str(caught.value)
    assert isinstance(caught.value, error)
    assert "\n" not in str(caught.value)


@given(st.dictionaries(st.sampled_from(sorted(
    ["lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "diff_b", "hada_w1_a", "hada_w1_b",
     "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_t2",
     "scalar"]
)), st.lists(st.integers(0, 3), max_size=4), min_size=1))  # fmt: skip
def test_any_parts_of_any_shapes_are_read_or_refused(given_parts: dict[str, list[int]]) -> None:

    named = {factors.split_name(f"x.{name}"): np.ones(shape, np.float32) for name, shape in given_parts.items()}
    for kernel in ((), (3, 3)):
        try:
            delta = factors.delta_of("x", {key[1]: array for key, array in named.items() if key}, kernel, "x")
        except AdapterhubError:
            continue
        assert all(size > 0 for size in delta.shape)
        assert np.isfinite(delta.scaling)


NAMES = st.lists(
    st.sampled_from([
        Q, TE, "lora_unet_single_blocks_0_linear1", "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_img_in", "lora_te_",
        "lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_unet_joint_blocks_0_context_block_adaLN_modulation_1",
        "lora_unet_layers_0_attention_qkv", "diffusion_model.layers.0.attention.to_q", "lycoris_", "transformer.",
        "double_blocks.0.img_attn_qkv", "lora_unet_final_layer_adaLN_modulation_1", "lora_te3_encoder_final_layer_norm",
        "double_blocks.0.processor.qkv_lora1", "unet.mid_block.attentions.0.proj_in", "text_encoder.x", "lora_unet_",
        "transformer.transformer_blocks.0.attn.to_q",
    ]), max_size=4,
)  # fmt: skip
ENDS = ["lora_down.weight", "lora_up.weight", "alpha", "lora_A.weight", "lora_B.weight", "dora_scale", "diff_b", "x", ""]


@given(NAMES, st.lists(st.sampled_from(ENDS), min_size=1, max_size=5), st.integers(0, 60), st.integers(0, 8))
def test_any_file_is_read_or_refused(stems: list[str], ends: list[str], rows: int, columns: int) -> None:
    shapes = {"lora_down.weight": (2, columns), "lora_A.weight": (2, columns), "alpha": (), "dora_scale": (rows, 1)}
    tensors = {f"{stem}.{end}": np.ones(shapes.get(end, (rows, 2)), np.float32) for stem in stems for end in ends}
    with tempfile.TemporaryDirectory() as folder:
        safetensors_file.write(Path(folder) / "x.safetensors", tensors, {"lora_adapter_metadata": "{}"} if rows == 1 else {})
        for reader in (convert.read, kohya.read, diffusers.read):
            try:
                adapter = reader(Path(folder) / "x.safetensors")
            except AdapterhubError:
                continue
            for to, writer in (("k", kohya), ("d", diffusers)):
                with contextlib.suppress(RefusedError):
                    writer.write(adapter, Path(folder) / to)


AGAIN = "Convert the adapter from its source again"


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("targets", "[]", "adapterhub.source.targets: not a JSON object"),
        ("targets", '{"x": ["y", 1]}', f"adapterhub.source.targets has the malformed line 'x': ['y', 1]. {AGAIN}"),
        ("targets", "{}", f"adapterhub.source.targets lacks 'unet.down_blocks.0.resnets.0.conv1', which has a delta. {AGAIN}"),
        ("config", "{}", '"peft_type" is null'),
        ("config", "[", "not valid JSON"),
        ("metadata", '{"a": 1}', "adapterhub.source.metadata is not a map of text to text"),
        ("config", '{"peft_type": "LORA", "lora_alpha": 99}', "the scale is 0.75 in the file and 24.75 in the source's config"),
    ],
)
def test_a_forged_source_config_is_refused(tmp_path: Path, key: str, text: str, says: str) -> None:
    convert.convert(peft_folder(tmp_path / "a", SDXL), tmp_path / "x", to="kohya")
    with safetensors_file.SafetensorsFile(tmp_path / "x") as file:
        tensors, metadata = {name: file.tensor(name) for name in file.tensors}, dict(file.header.metadata)
    safetensors_file.write(tmp_path / "y", tensors, metadata | {f"adapterhub.source.{key}": text})
    with pytest.raises(FormatError) as caught:
        convert.read(tmp_path / "y")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_config_of_other_tensors_is_ignored_and_reported(tmp_path: Path) -> None:
    convert.convert(peft_folder(tmp_path / "a", SDXL), tmp_path / "x", to="kohya")
    with safetensors_file.SafetensorsFile(tmp_path / "x") as file:
        tensors, metadata = {name: file.tensor(name) for name in file.tensors}, dict(file.header.metadata)
    safetensors_file.write(tmp_path / "y", {name: array * 2 for name, array in tensors.items()}, metadata)
    adapter = convert.read(tmp_path / "y")
    assert "the source's config in the file was ignored" in adapter.notes[0]
    assert adapter.deltas[OURS].alpha == 6


# ---- where it comes from


@pytest.mark.parametrize(
    ("stem", "header", "wanted"),
    [
        (Q, {"ss_network_module": "networks.lora", "ss_sd_model_name": "org/sdxl"}, ("org/sdxl", "SDXL", "sd-scripts")),
        (Q, {"ss_network_module": "lycoris.kohya", "ss_sd_model_name": "sd_xl.safetensors"}, (None, "SDXL", "LyCORIS")),
        ("lora_unet_blocks_0_ffn_0", {"ss_network_module": "networks.lora_wan"}, (None, "Wan", "musubi-tuner")),
        ("diffusion_model.blocks.0.attn.wq", {"software": '{"name": "ai-toolkit"}'}, (None, "Krea 2", "ai-toolkit")),
        ("lora_unet_transformer_blocks_0_attn_to_q", {"modelspec.architecture": "Qwen-Image/lora", "ot_branch": "master"},
         (None, "Qwen-Image", "OneTrainer")),
        ("lora_unet_transformer_blocks_0_attn_to_q", {"software": "{", "ss_base_model_version": "\x1b[31m"}, (None, "", "")),
        ("transformer.blocks.0.attn1.to_q", {}, (None, "Wan", "")),
    ],
)  # fmt: skip
def test_the_family_the_base_and_the_program_are_those_of_names_and_header(
    tmp_path: Path, stem: str, header: dict[str, str], wanted: tuple[str | None, str, str]
) -> None:
    path = kohya_file(tmp_path / "x.safetensors", {stem: (24, 24)}, header)
    meta = convert.read(path).meta
    assert (meta.base_model, meta.family, meta.program) == wanted


# ---- the commands


def test_the_commands_take_it(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "style"
    folder.mkdir()
    header = {"ss_network_module": "networks.lora", "ss_sd_model_name": "org/sdxl"}
    modules = {Q: (16, 16), TE: (8, 8), "lora_unet_input_blocks_1_0_in_layers_2": (8, 8, 3, 3)}
    kohya_file(folder / "style.safetensors", modules, header)
    document = json.loads(run("convert", "style/style.safetensors", "d.safetensors", "--to", "diffusers", "--json").stdout)
    assert document["worst"] == "exact"
    run("init")
    run("push", "style", "me/style")
    shown = json.loads(run("show", "me/style", "--json").stdout)
    assert shown["manifest"]["format"] == "kohya"
    assert (shown["manifest"]["r"], shown["manifest"]["alpha"]) == (4, 3)
    base = shown["manifest"]["base"]
    assert (base["repo"], base["model_type"], base["architecture"]) == ("org/sdxl", "SDXL", None)
    assert ["family", "SDXL"] in [line.split() for line in run("show", "me/style").stdout.splitlines()]
    [report] = json.loads(run("validate", "style", "--json", code=None).stdout)["reports"]
    assert not [problem for problem in report["problems"] if problem["severity"] == "error"], report
    assert "an adapter of SDXL, saved by sd-scripts" in [problem["what"] for problem in report["problems"]]


def test_an_adapter_with_differences_of_norms_is_checked_and_stored(run: Run, tmp_path: Path) -> None:
    numbers, block = Numbers(), "diffusion_model.blocks.0"
    tensors = {f"{block}.self_attn.q.lora_down.weight": numbers(4, 24), f"{block}.self_attn.q.lora_up.weight": numbers(24, 4)}
    tensors |= {f"{block}.norm3.diff": numbers(24), f"{block}.norm3.diff_b": numbers(24), f"{block}.ffn.0.diff_b": numbers(32)}
    (tmp_path / "wan").mkdir()
    safetensors_file.write(tmp_path / "wan/wan.safetensors", tensors)
    [report] = json.loads(run("validate", "wan", "--json").stdout)["reports"]
    assert {one["verdict"] for one in report["runtimes"].values()} == {"refused"}
    run("push", "wan", "me/wan")
    manifest = json.loads(run("show", "me/wan", "--json").stdout)["manifest"]
    assert manifest["replaced"] == [
        f"transformer.blocks.0.{name}" for name in ("ffn.net.0.proj.bias", "norm2.bias", "norm2.weight")
    ]
    assert "cannot be expressed here" in run("merge", "me/wan", "me/wan", "-o", "both", code=6).stderr


@pytest.mark.parametrize("names", ["flattened", "dotted", "diffusers"])
def test_embeddings_that_onetrainer_bundles_are_named_and_dropped_only_as_allowed(tmp_path: Path, names: str) -> None:
    numbers = Numbers(np.float32)
    lora_A, lora_B = pair(numbers, (16, 16), 4)
    stem = {"flattened": Q, "dotted": f"diffusion_model.{OURS.removeprefix('unet.')}", "diffusers": OURS}[names]
    down, up = ("lora_down", "lora_up") if names == "flattened" else ("lora_A", "lora_B")
    tensors = {f"{stem}.{down}.weight": lora_A, f"{stem}.{up}.weight": lora_B, f"{stem}.alpha": np.asarray(4, np.float32)}
    plain = tmp_path / "plain.safetensors"
    safetensors_file.write(plain, tensors)
    embeddings = {f"bundle_emb.cat.{encoder}": numbers(2, 8) for encoder in ("clip_l", "clip_g")}
    source = tmp_path / "a.safetensors"
    safetensors_file.write(source, tensors | embeddings)
    adapter = convert.read(source)
    assert adapter.replaced.keys() == embeddings.keys()
    assert any("2 embeddings are bundled" in note for note in adapter.notes)
    own_format = "diffusers" if names == "diffusers" else "kohya"
    convert.convert(source, tmp_path / "copy", to=own_format)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    for style in {"peft", "diffusers"} - {own_format}:
        with pytest.raises(RefusedError, match=r"bundle_emb\.cat\.clip_g") as caught:
            convert.convert(source, tmp_path / f"no-{style}", to=style)
        assert (caught.value.code, caught.value.fields) == ("loss-not-allowed", {"options": ("drop embeddings",)})
        report = convert.convert(source, tmp_path / style, to=style, allowed=LossAllowance(drop=["embeddings"]))
        assert report.summary["dropped"] == 2
        convert.convert(plain, tmp_path / f"plain-{style}", to=style)
        ours, theirs = (convert.read(tmp_path / name) for name in (style, f"plain-{style}"))
        assert ours.deltas.keys() == theirs.deltas.keys()
        assert not ours.replaced
    with pytest.raises(RefusedError) as caught:
        refuse_bundled(adapter)
    assert caught.value.code == "bundled-embeddings"
