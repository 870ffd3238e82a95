"""The tables of image and video transformers against diffusers: its converters of checkpoints, and its models' modules."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub
from adapterhub_converters import bases
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.formats import image_targets
from adapterhub_converters.formats.image import family_tables, name_table
from tests.converters.image_checkpoints import FAMILIES, LONG, H, hunyuan, linears, lumina, table_of
from tests.support.images import Numbers, dense, kohya_file, peft_folder

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


def z_image() -> Iterator[tuple[str, int]]:
    for layer in ("layers.0", "noise_refiner.1", "context_refiner.0"):
        yield from ((f"{layer}.attention.{end}", k * H) for end, k in (("qkv", 3), ("out", 1)))
        yield from ((f"{layer}.feed_forward.{end}", rows) for end, rows in (("w1", 40), ("w2", H), ("w3", 40)))
        yield from () if layer.startswith("context") else ((f"{layer}.adaLN_modulation.0", 4 * H),)
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


# Under other names of the same model, or its modules in other pieces.
OTHER_NAMES = {"FLUX.1 by XLabs", "FLUX.2 by SimpleTuner", "Z-Image by ComfyUI"}


def test_every_family_has_a_row() -> None:
    names = {table.name for table in family_tables.TRANSFORMERS if not re.search("by (musubi|sd-scripts)", table.name)}
    assert names == set(FAMILIES) | OTHER_NAMES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_has_every_linear_module_of_diffusers_model_and_its_shape(family: str) -> None:
    names, shapes = table_of(family), linears(family)
    assert re.match(names.classes, FAMILIES[family].model)
    for target, shape in shapes.items():
        path_and_reading = names.trainer_path(target)
        assert path_and_reading, target
        path, reading = path_and_reading
        assert names.read(path.replace(".", "_")) == reading
        out = sum(shapes[target][0] for target in reading.targets)
        assert not reading.excludes((out, shape[1])), (target, out, shape, reading.ratio)
        if reading.shares:
            assert [shapes[target][0] * sum(reading.shares) for target in reading.targets] == [s * out for s in reading.shares]


def small(reading: name_table.Reading, target: str, columns: int) -> tuple[int, int]:
    """A shape for a module of the base, in the proportions by which modules of several families are told apart."""
    share = Fraction(reading.shares[reading.targets.index(target)], sum(reading.shares)) if reading.shares else 1
    return int(columns * (reading.ratio or 2) * share), columns


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.convert])
def test_a_module_of_its_makers_is_the_one_that_diffusers_makes_of_it(family: str, tmp_path: Path) -> None:
    import torch

    row, names, numbers = FAMILIES[family], table_of(family), Numbers(np.float32)
    readings = dict(
        path_and_reading
        for target in linears(family)
        if (path_and_reading := names.trainer_path(target)) and path_and_reading[0].startswith(row.only)
    )
    pairs = {
        path: (numbers(1, 24), numbers(sum(small(r, target, 24)[0] for target in r.targets), 1)) for path, r in readings.items()
    }
    module, _, function = row.convert.partition(".")
    # A converter of checkpoints renames, cuts and turns rows: it is given the rows of each lora_B as a weight.
    ends = ("lora_A.weight", "lora_B.weight") if module.startswith("lora") else ("", "weight")
    tensors_of_makers = {f"{row.prefix}{path}.{end}": torch.from_numpy(array)
             for path, pair in pairs.items() for end, array in zip(ends, pair, strict=True) if end}  # fmt: skip
    convert = getattr(importlib.import_module(f"diffusers.loaders.{module}"), function)
    theirs = {
        name.removeprefix("transformer."): rows for name, rows in convert(tensors_of_makers | row.required_zeros()).items()
    }
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
        path_and_reading = formats.read(path).deltas if tensors else {}
        assert path_and_reading or kind == "bare"
        for target, delta in path_and_reading.items():
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
    deltas, expected = formats.read(tmp_path / "y.safetensors").deltas, formats.read(source).deltas
    assert set(deltas) == {f"transformer.{target}" for target in expected}
    for target, delta in expected.items():
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


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_names_without_a_model_are_read_too(tmp_path: Path, prefix: str) -> None:
    path = kohya_file(tmp_path / "x.safetensors", {f"{prefix}double_blocks.0.img_attn_qkv": (48, 16)})
    assert formats.sniff(path) == "kohya"
    assert list(formats.read(path).deltas) == [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"]
