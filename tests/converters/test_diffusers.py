"""diffusers' files: the names of now and of before, peft's config in the header, and the way back exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import bases
from adapterhub_converters.adapter import Adapter, Loss, LowRank, Meta
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.formats.image import diffusers, kohya
from tests.support.images import FLUX, SDXL, Numbers, dense, files, pair, peft_folder

IN_UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
A, B = pair(Numbers(), (6, 8), 2)


def save(path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(config)} if config is not None else {})
    safetensors_file.write(path, tensors, header)
    return path


def named(form: str, down: str, up: str) -> dict[str, np.ndarray]:
    return {form.format(down): A, form.format(up): B}


NOW = (".lora_A.weight", ".lora_B.weight")


@pytest.mark.parametrize(
    ("form", "halves", "target"),
    [
        (f"unet.{IN_UNET}.to_q{{}}", NOW, f"unet.{IN_UNET}.to_q"),
        (f"unet.{IN_UNET}.processor.to_q_lora{{}}.weight", (".down", ".up"), f"unet.{IN_UNET}.to_q"),
        (f"{IN_UNET}.processor.to_out_lora{{}}.weight", (".down", ".up"), f"unet.{IN_UNET}.to_out.0"),
        (f"unet.{IN_UNET}.to_out.0.lora{{}}.weight", (".down", ".up"), f"unet.{IN_UNET}.to_out.0"),
        ("unet.mid_block.resnets.0.conv1.lora{}.weight", (".down", ".up"), "unet.mid_block.resnets.0.conv1"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer{}.weight", (".down", ".up"),
         "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.to_out_lora{}.weight", (".down", ".up"),
         "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj"),
        ("transformer.transformer_blocks.0.attn.to_q{}", NOW, "transformer.transformer_blocks.0.attn.to_q"),
        ("transformer.any_other.0.to_out.0{}", NOW, "transformer.any_other.0.to_out.0"),
        ("transformer_2.blocks.0.attn1.to_q{}", NOW, "transformer_2.blocks.0.attn1.to_q"),
        ("transformer.blocks.0.ffn.net.2{}", NOW, "transformer.blocks.0.ffn.net.2"),
    ],
)  # fmt: skip
def test_names_of_now_and_of_before_are_read(tmp_path: Path, form: str, halves: tuple[str, str], target: str) -> None:
    path = save(tmp_path / "x.safetensors", named(form, *halves))
    assert convert.sniff(path) == "diffusers"
    adapter = convert.read(path)
    (target_and_delta,) = adapter.deltas.items()
    assert target_and_delta[0] == target
    assert (target_and_delta[1].lora_A.tobytes(), target_and_delta[1].lora_B.tobytes(), target_and_delta[1].scaling) == (
        A.tobytes(),
        B.tobytes(),
        1,
    )  # type: ignore[union-attr]
    assert "its alpha is not recorded: it is the rank, as in diffusers" in adapter.notes[0]


@pytest.mark.parametrize(
    "name",
    ["transformer.h.0.attn.c_attn", "transformer.blocks.0.attn.Wqkv", "model.layers.0.self_attn.q_proj", "base_model.model.x"],
)
def test_a_language_model_is_no_image_model(tmp_path: Path, name: str) -> None:
    assert convert.sniff(save(tmp_path / "x", named(f"{name}{{}}", *NOW))) == "raw"


def test_an_alpha_next_to_the_factors_is_their_alpha(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = named(f"{stem}{{}}", *NOW)
    adapter = convert.read(save(tmp_path / "x", {**tensors, f"{stem}.alpha": np.asarray(3.0)}))
    assert (adapter.deltas[stem].alpha, adapter.notes) == (3, ())
    both_alphas = save(tmp_path / "y", {**tensors, f"{stem}.alpha": np.asarray(3.0)}, {"transformer.lora_alpha": 4})
    with pytest.raises(RefusedError, match="has an alpha, and there is a config in the header, which may contradict it"):
        convert.read(both_alphas)


def test_the_config_of_each_model_is_its_own(tmp_path: Path) -> None:
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors = named(f"unet.{IN_UNET}.to_q{{}}", *NOW) | named(f"{text}{{}}", *NOW)
    config = {"unet.r": 2, "unet.lora_alpha": 8, "unet.use_rslora": True, "text_encoder.r": 2, "text_encoder.lora_alpha": 3}
    adapter = convert.read(save(tmp_path / "x", tensors, config))
    assert sorted((d.alpha, d.rslora) for d in adapter.deltas.values()) == [(3, False), (8, True)]
    assert adapter.meta.parts == ("text_encoder", "unet")


def test_what_one_model_saves_by_itself_is_read_as_peft_computes(tmp_path: Path) -> None:
    path = save(tmp_path / "x", named(f"{IN_UNET}.to_q{{}}", *NOW), {"r": 2, "lora_alpha": 5})
    assert {target: delta.alpha for target, delta in convert.read(path).deltas.items()} == {f"{IN_UNET}.to_q": 5}


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"lora_alpha": 0}, {"use_dora": True}, {"alpha_pattern": {"to_q": 5, "conv1": 0.3}}],
    ids=str,
)
@pytest.mark.parametrize("modules", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_peft_to_diffusers_and_back_is_the_same_bytes(
    tmp_path: Path, modules: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    source = peft_folder(tmp_path / "a", modules, **config)
    report = convert.convert(source, tmp_path / "x.safetensors", to="diffusers")
    assert report.worst == Loss.EXACT
    convert.convert(tmp_path / "x.safetensors", tmp_path / "b", to="peft")
    assert files(tmp_path / "b") == files(source)


def test_diffusers_to_peft_and_back_is_the_same_tensors(tmp_path: Path) -> None:
    source = save(tmp_path / "x", named(f"unet.{IN_UNET}.processor.to_q_lora{{}}.weight", ".down", ".up"))
    convert.convert(source, tmp_path / "p", to="peft")
    convert.convert(tmp_path / "p", tmp_path / "y", to="diffusers")
    convert.convert(tmp_path / "y", tmp_path / "q", to="peft")
    assert files(tmp_path / "p") == files(tmp_path / "q")


def test_a_text_encoder_alone_finds_its_place_again(tmp_path: Path) -> None:
    stem = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    convert.convert(save(tmp_path / "x", named(f"{stem}{{}}", *NOW)), tmp_path / "p", to="peft")
    assert list(peft.read(tmp_path / "p").deltas) == [stem.removeprefix("text_encoder_2.")]
    convert.convert(tmp_path / "p", tmp_path / "y", to="diffusers")
    assert list(convert.read(tmp_path / "y").deltas) == [stem]


def test_a_convolution_that_pefts_loha_flattens_has_its_kernel_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    numbers, target = Numbers(np.float32), "mid_block.resnets.0.conv1"
    shapes = {"w1_a": (6, 2), "w1_b": (2, 36), "w2_a": (6, 2), "w2_b": (2, 36)}
    factors = {name: numbers(*shape) for name, shape in shapes.items()}
    tensors = {f"base_model.model.{target}.hada_{name}": array for name, array in factors.items()}
    safetensors_file.write(tmp_path / "a" / peft.WEIGHTS, tensors)
    (tmp_path / "a" / peft.CONFIG).write_text(
        json.dumps({"peft_type": "LOHA", "r": 2, "alpha": 3, "target_modules": ["conv1"]})
    )
    convert.convert(tmp_path / "a", tmp_path / "x", to="diffusers")
    (delta,) = convert.read(tmp_path / "x").deltas.values()
    expected = 1.5 * (factors["w1_a"] @ factors["w1_b"]) * (factors["w2_a"] @ factors["w2_b"])
    np.testing.assert_allclose(dense(delta), expected.reshape(6, 4, 3, 3), rtol=1e-4, atol=1e-5)


def test_kohya_records_the_true_alpha(tmp_path: Path) -> None:
    """diffusers' own conversion to kohya writes the rank."""
    source = save(tmp_path / "x", named(f"unet.{IN_UNET}.to_q{{}}", *NOW), {"unet.r": 2, "unet.lora_alpha": 7})
    spec = bases.BaseSpec("sdxl", "hf", "StableDiffusionXLPipeline", "", {})
    convert.convert(source, tmp_path / "k", to="kohya", base=spec)
    with safetensors_file.SafetensorsFile(tmp_path / "k") as file:
        (alpha,) = (float(file.tensor(name)) for name in file.tensors if name.endswith(".alpha"))
    assert alpha == 7
    np.testing.assert_array_equal(
        dense(convert.read(tmp_path / "k").deltas[f"unet.{IN_UNET}.to_q"]), 3.5 * B.astype(np.float64) @ A
    )


@pytest.mark.parametrize(
    ("tensors", "config", "error", "says"),
    [
        ({f"unet.{IN_UNET}.to_q.lora_A.weight": A}, None, FormatError, "its counterpart is missing"),
        ({**named("unet.x{}", *NOW), "x.lora_A.weight": A}, None, RefusedError, "x: does not begin with a model of a pipeline"),
        ({**named("unet.x{}", *NOW), "unet.y": A}, None, RefusedError, "tensor 'unet.y': this kind of tensor is not supported"),
        ({**named("unet.x{}", *NOW), "unet.x.lora.down.weight": A}, None, FormatError, "exists under two names"),
        (named("unet.x{}", *NOW), {"unet.use_bdlora": True}, RefusedError, "use_bdlora"),
        (named("unet.x{}", *NOW), {"unet.r": "two"}, FormatError, '"r" is "two"'),
        (named("unet.x{}", *NOW), {"unet.init_lora_weights": []}, FormatError, "init_lora_weights"),
    ],
)
def test_malformed_ones_are_refused_in_one_line(
    tmp_path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None, error: type[AdapterhubError], says: str
) -> None:
    with pytest.raises(AdapterhubError) as caught:
        convert.read(save(tmp_path / "x", tensors, config))
    assert says in str(caught.value)
    assert isinstance(caught.value, error)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"unet.r": 1', "null"])
def test_a_header_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    safetensors_file.write(tmp_path / "x", named("unet.x{}", *NOW), {"lora_adapter_metadata": text})
    with pytest.raises(FormatError):
        convert.read(tmp_path / "x")


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (Adapter({}), "there is no low-rank delta to write"),
        (Adapter({"unet.x": LowRank(A, B, 1.0)}, meta=Meta(init="pissa")), "its factors were initialized with pissa"),
        (Adapter({"unet.x": LowRank(A, B, 1.0)}, {"unet.y": A}), "unet.y: a replaced parameter cannot be expressed"),
        (Adapter({"unet.x": LowRank(A, B, 1.0, transposed_base=True)}), "unet.x: its weight is stored transposed"),
        (Adapter({"x": LowRank(A, B, 1.0)}), "x: not a known module of an image model"),
    ],
)
@pytest.mark.parametrize("writer", [diffusers, kohya], ids=["diffusers", "kohya"])
def test_what_has_no_word_is_refused_by_name(tmp_path: Path, writer: Any, adapter: Adapter, says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        writer.write(adapter, tmp_path / "x")
    assert says in str(caught.value)
    assert not (tmp_path / "x").exists()
