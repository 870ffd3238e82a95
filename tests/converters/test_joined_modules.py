"""Modules of a trainer that are several of the base's: cut and joined as the same function, or kept as the pair they equal."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters import bases
from adapterhub_converters.adapter import Loss, LowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert
from adapterhub_converters.formats.image import joined_modules, name_table
from tests.converters.test_kohya import read_file
from tests.support.images import FLUX, Numbers, dense, kohya_file, peft_folder

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
FLUX_BASE = bases.BaseSpec("flux", "hf", "FluxTransformer2DModel", "", {})


def scalar(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(value, dtype)


def test_rows_that_diffsynth_interleaves_are_refused(tmp_path: Path) -> None:
    numbers, stem = Numbers(np.float32), "blocks.0.attn.qkv_proj"
    for infix in ("", ".default"):
        pair_of = {f"lora_A{infix}.weight": numbers(2, 12), f"lora_B{infix}.weight": numbers(48, 2)}
        if not infix:
            assert len(read_file(tmp_path / "x", pair_of, stem).deltas) == 3
            continue
        with pytest.raises(RefusedError, match="are interleaved by heads"):
            read_file(tmp_path / "y", pair_of, stem)


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
    deltas = read_file(tmp_path / "x", parts, stem).deltas
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
    product = np.concatenate([dense(delta) for delta in deltas])
    magnitude = np.concatenate([delta.magnitude for delta in deltas])
    expected = np.kron(w1, w2)
    if "final" in stem:
        expected, scales = (np.concatenate([rows[8:], rows[:8]]) for rows in (expected, scales))
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-6)
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
        split_delta: Any = again[name]
        assert (split_delta.lora_A.tobytes(), split_delta.lora_B.tobytes()) == (delta.lora_A.tobytes(), delta.lora_B.tobytes())
        assert split_delta.scaling == delta.scaling
        assert kind != "dora" or split_delta.magnitude.tobytes() == delta.magnitude.tobytes()


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
