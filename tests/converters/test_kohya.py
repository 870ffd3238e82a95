"""kohya's, LyCORIS' and ComfyUI's files: true alphas, names with their dots again or none, and the way back exact."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters import bases
from adapterhub_converters.adapter import Adapter, Loss, LowRank, refuse_bundled
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.formats.image import diffusers, factors, kohya
from adapterhub_converters.formats.lossy import LossAllowance
from tests.conftest import Run
from tests.support.images import FLUX, SDXL, Numbers, dense, files, kohya_file, pair, peft_folder

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
OURS = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TE = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
FLUX_BASE = bases.BaseSpec("flux", "hf", "FluxTransformer2DModel", "", {})


def read_file(path: Path, parts: dict[str, np.ndarray], stem: str = Q) -> Adapter:
    """The adapter of one module."""
    safetensors_file.write(path, {f"{stem}.{name}": array for name, array in parts.items()})
    return convert.read(path)


def the_delta(path: Path, parts: dict[str, np.ndarray], stem: str = Q) -> Any:
    (delta,) = read_file(path, parts, stem).deltas.values()
    return delta


def scalar(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(value, dtype)


# ---- names


def unet(tmp_path: Path, modules: dict[str, tuple[int, ...]], name: str = "UNet2DConditionModel") -> bases.BaseSpec:
    folder = tmp_path / "model"
    folder.mkdir(parents=True)
    weights = {f"{module}.weight": np.zeros(shape, np.float16) for module, shape in modules.items()}
    safetensors_file.write(folder / "diffusion_pytorch_model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps({"_class_name": name}))
    return bases.read_base(folder)


@pytest.mark.parametrize("end", ["a1.weight", "oft_blocks", "q_layer.weight", "reshape_weight", "on_input"])
def test_kinds_that_are_not_read_are_refused_by_name(tmp_path: Path, end: str) -> None:
    safetensors_file.write(tmp_path / "x.safetensors", {f"{Q}.{end}": np.ones((2, 2), np.float32)})
    with pytest.raises(RefusedError, match=f"tensor '{Q}.{end}': this kind of tensor is not supported"):
        convert.read(tmp_path / "x.safetensors")


# ---- what it computes


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1), (0, 1), (2, 0.5), (0.5, 0.125), (-4, -1)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_alpha_of_none_or_zero_is_the_rank(
    tmp_path: Path, alpha: float | None, scaling: float, shape: tuple[int, ...]
) -> None:
    numbers = Numbers()
    parts = {"lora_down.weight": numbers(4, 8), "lora_up.weight": numbers(6, 4)}
    parts |= {} if alpha is None else {"alpha": np.full(shape, alpha, np.float32)}
    adapter = read_file(tmp_path / "x.safetensors", parts)
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
    for network_args in ('{"rs_lora": "True"}', "{}"):
        safetensors_file.write(tmp_path / "3", tensors, {"ss_network_args": network_args})
        whole = convert.read(tmp_path / "3")
        assert whole.deltas[OURS].scaling == 1
        assert ["without the factor of rs_lora" in note for note in whole.notes] == [True] * ("rs_lora" in network_args)

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
    zeros = read_file(tmp_path / "y", {**parts, "diff_b": np.zeros(6, np.float16)})
    assert zeros.notes == ("1 differences are all zeros and have no effect",)
    alone = {"diff_b": numbers(6)}
    assert read_file(tmp_path / "z", alone).added[f"{OURS}.bias"].tobytes() == alone["diff_b"].tobytes()


# ---- FLUX: several modules in one


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
    adapter = read_file(tmp_path / "x", {**loha, "alpha": scalar(1)})
    report = kohya.write(adapter, tmp_path / "y")
    assert report.worst == Loss.EXACT
    np.testing.assert_array_equal(dense(convert.read(tmp_path / "y").deltas[OURS]), dense(adapter.deltas[OURS]))
    assert convert.convert(tmp_path / "x", tmp_path / "z", to="peft").worst == Loss.ROUNDED
    assert convert.convert(tmp_path / "x", tmp_path / "w", to="diffusers").worst == Loss.ROUNDED


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
        read_file(tmp_path / "x", parts)
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
    shown_version = json.loads(run("show", "me/style", "--json").stdout)
    assert shown_version["manifest"]["format"] == "kohya"
    assert (shown_version["manifest"]["r"], shown_version["manifest"]["alpha"]) == (4, 3)
    base = shown_version["manifest"]["base"]
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
    assert {runtime["verdict"] for runtime in report["runtimes"].values()} == {"refused"}
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
