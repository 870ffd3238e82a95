"""A conversion refuses what a push refuses, unless it is forced to or mends it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterhub as ah
from adapterhub.checks import CODES, ERROR
from adapterhub.registry.packaging import MENDED_BY_CONVERSION
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import WRITTEN, peft
from tests.conftest import need_module
from tests.converters import trained
from tests.converters.trained import LLAMA
from tests.support import tiny


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _edit_tensors(folder: Path, edit: Callable[[str, np.ndarray], tuple[str, np.ndarray]]) -> None:
    path = folder / peft.WEIGHTS
    tensors = load_file(path)
    save_file(dict(edit(name, array) for name, array in tensors.items()), path)


def _set_nan(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    return name, np.full_like(array, np.nan) if name.endswith("lora_B.weight") else array


def _change(folder: Path) -> None:
    ah.describe(folder, base=LLAMA)
    _edit_tensors(folder, lambda name, array: (name, array + 1))


DEFECTS: dict[str, Callable[[Path], object]] = {
    "non-finite": lambda folder: _edit_tensors(folder, _set_nan),
    "rank-config": lambda folder: _edit_config(folder, r=3),
    "not-targeted": lambda folder: _edit_config(folder, target_modules=["k_proj"]),
    "bias-flag": lambda folder: _edit_tensors(folder, lambda name, array: (name, array)) or _add_bias(folder),
    "missing-tensor": lambda folder: _edit_config(folder, modules_to_save=["lm_head"]),
    "files-changed": _change,
}


def _add_bias(folder: Path) -> None:
    path = folder / peft.WEIGHTS
    tensors = load_file(path)
    for name, array in list(tensors.items()):
        if name.endswith("lora_B.weight"):
            tensors[name.replace(".weight", ".bias")] = np.zeros(array.shape[0], np.float32)
    save_file(tensors, path)


@pytest.fixture
def workspace(tmp_path: Path) -> ah.Workspace:
    return ah.Workspace(registry=tmp_path / "registry")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return trained.folder(trained.full("q_proj"), tmp_path / "adapter")


@pytest.mark.parametrize("code", DEFECTS)
def test_what_a_push_refuses_is_not_converted_unless_forced(
    code: str, adapter: Path, tmp_path: Path, workspace: ah.Workspace
) -> None:
    DEFECTS[code](adapter)
    with pytest.raises(RefusedError, match=code):
        ah.push(adapter, "team/a", workspace=workspace)
    for to in ("peft", "raw"):
        out = tmp_path / f"{to}.safetensors"
        with pytest.raises(RefusedError, match=code) as refusal:
            ah.convert(adapter, out, to=to, workspace=workspace)
        assert refusal.value.code == "check-failed-to-convert"
        assert not out.exists()
    report = ah.convert(adapter, tmp_path / "forced", to="peft", force=True, workspace=workspace)
    assert any(code in note for note in report.notes)


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in ("kohya", "diffusers")])
def test_numbers_that_are_none_are_refused_in_every_format(name: Any, adapter: Path, tmp_path: Path) -> None:
    _edit_tensors(adapter, _set_nan)
    source = tmp_path / "source"
    ah.convert(adapter, source, to=name, base=LLAMA, force=True)
    with pytest.raises(RefusedError, match="non-finite") as refusal:
        ah.convert(source, tmp_path / "out", to="peft", base=LLAMA)
    assert refusal.value.code == "check-failed-to-convert-on-base"


def test_names_that_a_conversion_writes_anew_are_no_reason_to_refuse(adapter: Path, tmp_path: Path) -> None:
    _edit_tensors(adapter, lambda name, array: (name.replace(".lora_A.", ".lora_A.sql."), array))
    report = ah.check(adapter)
    assert {problem.code for problem in report.problems if problem.severity == ERROR} <= MENDED_BY_CONVERSION
    assert ah.convert(adapter, tmp_path / "out.safetensors", to="raw").worst.name == "EXACT"
    with pytest.raises(RefusedError, match="key-prefix"):  # a copy would have them
        ah.convert(adapter, tmp_path / "copy", to="peft")


def test_a_module_that_the_base_lacks_is_left_out_if_that_is_allowed(tmp_path: Path) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny.model().save_pretrained(base)
    tiny.adapter(tiny.model(num_hidden_layers=3), adapter)
    assert {problem.code for problem in ah.check(adapter, base=base).problems if problem.severity == ERROR} == {
        "base-shallower"
    }
    with pytest.raises(RefusedError, match="only 2 layers"):
        ah.convert(adapter, tmp_path / "a.gguf", to="gguf", base=base)
    assert ah.convert(adapter, tmp_path / "a.gguf", to="gguf", base=base, allow_drop=["model.layers.2.*"]).summary["dropped"]


def test_what_is_dropped_by_consent_needs_no_second_for_its_errors(adapter: Path, tmp_path: Path) -> None:
    path, norm = adapter / peft.WEIGHTS, "base_model.model.model.norm.weight"
    save_file(load_file(path) | {norm: np.full(16, np.nan, np.float32)}, path)
    _edit_config(adapter, modules_to_save=["norm"])
    with pytest.raises(RefusedError, match="non-finite"):
        ah.convert(adapter, tmp_path / "a.gguf", to="gguf", base=LLAMA)
    report = ah.convert(adapter, tmp_path / "a.gguf", to="gguf", base=LLAMA, allow_drop=["norms"])
    assert report.summary["dropped"] == 1
    assert not [note for note in report.notes if "despite" in note]


def test_a_tensor_that_is_allowed_to_drop_and_kept_is_refused_for_its_errors(adapter: Path, tmp_path: Path) -> None:
    path, norm = adapter / peft.WEIGHTS, "base_model.model.model.norm.weight"
    save_file(load_file(path) | {norm: np.full(16, np.nan, np.float32)}, path)
    _edit_config(adapter, modules_to_save=["norm"])
    with pytest.raises(RefusedError, match="non-finite") as refusal:  # the format has norms, and nothing is dropped
        ah.convert(adapter, tmp_path / "a.safetensors", to="raw", allow_drop=["norms"])
    assert refusal.value.code == "check-failed-to-convert"
    assert not (tmp_path / "a.safetensors").exists()
    _edit_tensors(adapter, _set_nan)
    with pytest.raises(RefusedError, match="non-finite"):  # neither are pairs
        ah.convert(adapter, tmp_path / "a.gguf", to="gguf", base=LLAMA, allow_drop=["norms"])
    assert not (tmp_path / "a.gguf").exists()


def test_embeddings_that_onetrainer_bundles_are_checked_stored_and_left_out_if_that_is_allowed(
    tmp_path: Path, workspace: ah.Workspace
) -> None:
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    sizes = {f"{stem}.lora_down.weight": (4, 16), f"{stem}.lora_up.weight": (16, 4), "bundle_emb.cat.clip_l": (2, 8)}
    source = tmp_path / "a.safetensors"
    save_file({name: np.ones(size, np.float32) for name, size in sizes.items()}, source)
    assert not [problem for problem in ah.check(source).problems if problem.severity == ERROR]
    ah.push(source, "team/a", workspace=workspace)
    with pytest.raises(RefusedError, match="bundle_emb") as refusal:
        ah.convert(source, tmp_path / "peft", to="peft")
    assert refusal.value.code == "loss-not-allowed"
    assert ah.convert(source, tmp_path / "peft", to="peft", allow_drop=["embeddings"]).summary["dropped"] == 1


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_kinds_of_lycoris_are_checked_stored_and_converted(tmp_path: Path, workspace: ah.Workspace, kind: str) -> None:
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    loha = {f"hada_w{number}_{half}": size for number in (1, 2) for half, size in (("a", (16, 2)), ("b", (2, 16)))}
    sizes = loha if kind == "loha" else {"lokr_w1": (4, 4), "lokr_w2": (4, 4)}
    source = tmp_path / "a.safetensors"
    save_file({f"{stem}.{name}": np.ones(size, np.float32) for name, size in {**sizes, "alpha": ()}.items()}, source)
    assert not [problem for problem in ah.check(source).problems if problem.severity == ERROR]
    ah.push(source, "team/a", workspace=workspace)
    ah.convert(source, tmp_path / "peft", to="peft")


def test_bytes_between_the_tensors_of_a_gguf_are_left_behind(adapter: Path, tmp_path: Path) -> None:
    source, hidden = tmp_path / "a.gguf", b"y" * 64
    ah.convert(adapter, source, to="gguf", base=LLAMA)
    raw = bytearray(source.read_bytes())
    with GGUFFile(source) as file:
        start, last = file.header.data_start, max(file.header.tensors.values(), key=lambda info: info.offset)
    offset = last.offset - start
    place = raw.find(struct.pack("<Q", offset), raw.rfind(last.name.encode(), 0, start))
    raw[place : place + 8] = struct.pack("<Q", offset + len(hidden))
    source.write_bytes(raw[: last.offset] + hidden + raw[last.offset :])
    assert "hidden-data" in str(ah.scan(source))
    ah.convert(source, tmp_path / "out", to="peft", base=LLAMA)
    assert not any(hidden in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_mended_codes_are_errors() -> None:
    assert {CODES[code][0] for code in MENDED_BY_CONVERSION} == {ERROR}
