"""The tables of image and video transformers against diffusers: its converters of checkpoints, and its models' modules."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
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
from adapterhub_converters.formats import image_targets
from adapterhub_converters.formats.image import family_tables, name_table, video_transformers
from adapterhub_converters.formats.lossy import LossAllowance
from tests.conftest import need_module
from tests.support.images import Numbers, dense, kohya_file, pair, peft_folder

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
    expected = getattr(single_file_utils, convert)(weights)
    deltas = formats.read(tmp_path / "x.safetensors").deltas
    theirs = {name.removesuffix(".weight"): w for name, w in expected.items() if name.endswith(".weight") and w.ndim > 1}
    assert {target.removeprefix("transformer.") for target in deltas} == set(theirs)
    for target, delta in deltas.items():
        rows = theirs[target.removeprefix("transformer.")]
        np.testing.assert_array_equal(getattr(delta, "lora_B"), rows.numpy(), err_msg=target)  # noqa: B009


@dataclass(frozen=True)
class Family:
    """diffusers' model of a family in its own size, with few layers.

    Attributes:
        model: The class.
        numbers: Its arguments.
        convert: The function in `diffusers.loaders` that renames the makers' modules one by one, if there is one.
        prefix: That of the names that it is given.
        only: The beginning of the names that it knows.
        others: Tensors that it asks for, and that no adapter has.
    """

    model: str
    numbers: dict[str, Any]
    convert: str = ""
    prefix: str = ""
    only: str = ""
    others: tuple[str, ...] = ()

    def more(self) -> dict[str, Any]:
        """`others`, as zeros."""
        import torch

        return {name: torch.zeros(1) for name in self.others}


CHECKPOINT, LORA = "single_file_utils.convert_", "lora_conversion_utils._convert_non_diffusers_"
# One row for each family of transformers, by the name of its table.
FAMILIES: dict[str, Family] = {
    "FLUX.1": Family("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}),
    "FLUX.2": Family("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
    "Stable Diffusion 3": Family("SD3Transformer2DModel", {"num_layers": 2, "dual_attention_layers": (0,)}),
    "diffusers' transformers": Family("QwenImageTransformer2DModel", {"num_layers": 1}),
    "HunyuanVideo": Family(
        "HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    ),
    "HunyuanVideo 1.5": Family(
        "HunyuanVideo15Transformer3DModel", {"num_layers": 1, "num_refiner_layers": 1, "use_meanflow": True},
    ),
    "HunyuanImage": Family(
        "HunyuanImageTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_2_dim": 8, "guidance_embeds": True},
    ),
    "Wan": Family("WanTransformer3DModel", {"num_layers": 1, "image_dim": 8, "added_kv_proj_dim": 8}),
    "LTX-Video": Family("LTX2VideoTransformer3DModel", {"num_layers": 1}),
    "Z-Image": Family("ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}),
    "Lumina 2": Family("Lumina2Transformer2DModel", {"num_layers": 1, "num_refiner_layers": 1}),
    "Krea 2": Family(
        "Krea2Transformer2DModel", {"num_layers": 1, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
        CHECKPOINT + "krea2_transformer_checkpoint_to_diffusers",
    ),
    "Ideogram 4": Family(
        "Ideogram4Transformer2DModel", {"num_layers": 1}, LORA + "ideogram4_lora_to_diffusers", "diffusion_model.", "layers.",
    ),
    "FLUX.3": Family(
        "Flux3Transformer2DModel", {"num_layers": 1, "num_single_layers": 1, "flow_map": True},
        CHECKPOINT + "flux3_transformer_checkpoint_to_diffusers",
    ),
    "AuraFlow": Family(
        "AuraFlowTransformer2DModel", {"num_mmdit_layers": 1, "num_single_dit_layers": 1},
        CHECKPOINT + "auraflow_transformer_checkpoint_to_diffusers", others=("positional_encoding", "init_x_linear.bias"),
    ),
    "HiDream": Family(
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "num_layers": 1, "num_single_layers": 1, "caption_channels": [8, 8], "llama_layers": [0]},
        CHECKPOINT + "hidream_transformer_to_diffusers",
    ),
    "ERNIE-Image": Family(
        "ErnieImageTransformer2DModel", {"num_layers": 1}, CHECKPOINT + "ernie_image_transformer_checkpoint_to_diffusers",
    ),
    "Cosmos and Anima": Family(
        "CosmosTransformer3DModel", {"num_layers": 1}, CHECKPOINT + "cosmos_transformer_checkpoint_to_diffusers", "net.",
    ),
    "Kandinsky 5": Family("Kandinsky5Transformer3DModel", {"num_text_blocks": 1, "num_visual_blocks": 1}),
    "MiniMax-H3": Family(
        "MiniMaxH3Transformer3DModel", {"num_layers": 1, "num_refiner_layers": 1}, LORA + "minimax_h3_lora_to_diffusers",
    ),
    "ACE-Step": Family("AceStepTransformer1DModel", {"num_hidden_layers": 1}, LORA + "ace_step_lora_to_diffusers"),
}  # fmt: skip
# Under other names of the same model, or its modules in other pieces.
OTHER_NAMES = {"FLUX.1 by XLabs", "FLUX.2 by SimpleTuner", "Z-Image by ComfyUI"}


def test_every_family_has_a_row() -> None:
    names = {each.name for each in family_tables.TRANSFORMERS if not re.search("by (musubi|sd-scripts)", each.name)}
    assert names == set(FAMILIES) | OTHER_NAMES


@functools.cache
def linears(family: str) -> dict[str, tuple[int, int]]:
    """The linear modules of diffusers' own model, in its own size, and their shapes."""
    import diffusers
    import torch

    row = FAMILIES[family]
    with torch.device("meta"):
        model = getattr(diffusers, row.model)(**row.numbers)
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def table_of(family: str) -> name_table.Table:
    return next(each for each in family_tables.TRANSFORMERS if each.name == family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_has_every_linear_module_of_diffusers_model_and_its_shape(family: str) -> None:
    names, shapes = table_of(family), linears(family)
    assert re.match(names.classes, FAMILIES[family].model)
    for target, shape in shapes.items():
        found = names.trainer_path(target)
        assert found, target
        path, reading = found
        assert names.read(path.replace(".", "_")) == reading
        out = sum(shapes[each][0] for each in reading.targets)
        assert not reading.excludes((out, shape[1])), (target, out, shape, reading.ratio)
        if reading.shares:
            assert [shapes[each][0] * sum(reading.shares) for each in reading.targets] == [s * out for s in reading.shares]


def small(reading: name_table.Reading, target: str, columns: int) -> tuple[int, int]:
    """A shape for a module of the base, in the proportions by which modules of several families are told apart."""
    share = Fraction(reading.shares[reading.targets.index(target)], sum(reading.shares)) if reading.shares else 1
    return int(columns * (reading.ratio or 2) * share), columns


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.convert])
def test_a_module_of_its_makers_is_the_one_that_diffusers_makes_of_it(family: str, tmp_path: Path) -> None:
    import torch

    row, names, numbers = FAMILIES[family], table_of(family), Numbers(np.float32)
    readings = dict(
        found for target in linears(family) if (found := names.trainer_path(target)) and found[0].startswith(row.only)
    )
    pairs = {path: (numbers(1, 24), numbers(sum(small(r, one, 24)[0] for one in r.targets), 1)) for path, r in readings.items()}
    module, _, function = row.convert.partition(".")
    # A converter of checkpoints renames, cuts and turns rows: it is given the rows of each lora_B as a weight.
    ends = ("lora_A.weight", "lora_B.weight") if module.startswith("lora") else ("", "weight")
    given = {f"{row.prefix}{path}.{end}": torch.from_numpy(array)
             for path, pair in pairs.items() for end, array in zip(ends, pair, strict=True) if end}  # fmt: skip
    convert = getattr(importlib.import_module(f"diffusers.loaders.{module}"), function)
    theirs = {name.removeprefix("transformer."): rows for name, rows in convert(given | row.more()).items()}
    for kind in ("flat", "dotted", "bare"):
        write = {"flat": lambda path: f"lora_unet_{path.replace('.', '_')}", "dotted": lambda path: f"diffusion_model.{path}"}
        tensors = {
            f"{write.get(kind, str)(path)}.{end}": array
            for path, pair in pairs.items()
            for end, array in zip(("lora_A.weight", "lora_B.weight"), pair, strict=True)
            if kind != "bare" or family_tables.is_foreign(path)
        }
        path = tmp_path / f"{kind}.safetensors"
        safetensors_file.write(path, tensors, {"modelspec.architecture": family.replace(" ", "-")})
        found = formats.read(path).deltas if tensors else {}
        assert found or kind == "bare"
        for target, delta in found.items():
            rows = theirs[f"{target.removeprefix('transformer.')}.{ends[1]}"]
            np.testing.assert_array_equal(getattr(delta, "lora_B"), rows.numpy(), err_msg=target)  # noqa: B009


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("FLUX.1", "diffusers' transformers")])
def test_an_adapter_of_all_its_modules_goes_to_kohya_and_back(family: str, tmp_path: Path) -> None:
    written = {target: table_of(family).trainer_path(target) for target in linears(family)}
    source = peft_folder(tmp_path / "a", {target: small(deltas[1], target, 24) for target, deltas in written.items() if deltas})
    spec = bases.BaseSpec("x", "hf", FAMILIES[family].model, "", {})
    formats.convert(source, tmp_path / "x.safetensors", to="kohya", base=spec)
    with safetensors_file.SafetensorsFile(tmp_path / "x.safetensors") as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        names = {key: text for key, text in file.header.metadata.items() if key == "adapterhub.names"}
    safetensors_file.write(tmp_path / "y.safetensors", tensors, names)  # without the source's config, which would ride along
    deltas, wanted = formats.read(tmp_path / "y.safetensors").deltas, formats.read(source).deltas
    assert set(deltas) == {f"transformer.{target}" for target in wanted}
    for target, delta in wanted.items():
        np.testing.assert_allclose(dense(deltas[f"transformer.{target}"]), dense(delta), rtol=1e-5, atol=1e-5)


def test_what_is_asked_of_every_adapter_without_the_tables_agrees_with_them() -> None:
    targets = {
        name_table.with_zeros(target)
        for table in family_tables.TABLES
        for reading in table.modules.values()
        for target in reading.targets
    }
    assert {target.partition(".")[0] for target in targets} == image_targets.FIRST
    in_both = {target for target in targets if image_targets.LANGUAGE_TOO.match(target)}
    assert all(".feed_forward." in target or ".mlp." in target for target in in_both)
    for table in family_tables.TABLES:
        for target in (name_table.with_zeros(name) for reading in table.modules.values() for name in reading.targets):
            expected = bool(table.part) and "." in target and target not in in_both
            assert image_targets.are_image_targets([target]) == expected, target


def test_names_of_language_models_alone_are_of_no_image_model() -> None:
    names = ["layers.0.self_attn.q_proj", "layers.0.mlp.gate_proj", "layers.0.cross_attn.o_proj"]
    assert not image_targets.are_image_targets(names)
    assert not any(map(family_tables.is_foreign, names))


def test_hidream_o1_which_diffusers_does_not_have_is_kept_and_refused_by_name(tmp_path: Path) -> None:
    import diffusers

    assert not any(name.startswith("HiDreamO1") for name in dir(diffusers))
    stem = "diffusion_model.language_model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_{half}.weight": np.ones(shape, np.float32) for half, shape in (("A", (2, 8)), ("B", (8, 2)))}
    safetensors_file.write(tmp_path / "o1.safetensors", tensors, {"modelspec.architecture": "hidream-o1"})
    with pytest.raises(RefusedError, match="language_model.layers.0.self_attn.q_proj': not a known module"):
        formats.convert(tmp_path / "o1.safetensors", tmp_path / "out", to="peft")
    report = adapterhub.check(tmp_path / "o1.safetensors")
    assert (report.ok, [problem.code for problem in report.problems]) == (True, ["not-understood"])


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


WAN = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 8, "text_dim": 8,
    "image_dim": 8, "added_kv_proj_dim": 24,
}  # fmt: skip


def distilled(model: Any, path: Path) -> dict[str, np.ndarray]:
    """A file as those of distilled Wan models: pairs, and differences of all else. The difference of each parameter."""
    numbers, tensors, wanted = Numbers(np.float32), {}, {}
    for name, value in model.state_dict().items():
        module, kind = (name, "") if name.endswith("scale_shift_table") else name.rpartition(".")[::2]
        written = video_transformers.WAN.trainer_path(module)
        assert written, name
        stem = f"diffusion_model.{written[0]}"
        if kind == "weight" and value.ndim == 2:
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = factors = pair(numbers, value.shape, R)
            wanted[name] = factors[1] @ factors[0]
        else:
            tensors[f"{stem}.{'diff_b' if kind == 'bias' else 'diff'}"] = wanted[name] = numbers(*value.shape)
    safetensors_file.write(path, tensors)
    return wanted


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
        many = 19 if path.startswith("double") else 38 if path.startswith("single") else 1
        for stem in () if "distilled" in path else [path.replace(".N.", f".{n}.") for n in range(many)]:
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
