"""Names of tensors in PEFT files: what trainers add to them is taken off, and comes back."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft import tensor_keys
from tests.converters.test_peft_reader import PAIR, folder


@pytest.mark.parametrize(
    ("key", "read_as"),
    [
        ("base_model.model.l.q.lora_{}.default.weight", "l.q"),
        ("base_model.model.l.q.lora_{}.my-adapter.weight", "l.q"),
        ("base_model.model.base_model.model.l.q.lora_{}.weight", "l.q"),
        ("module.base_model.model.l.q.lora_{}.weight", "l.q"),
        ("base_model.model._orig_mod.l.q.lora_{}.weight", "l.q"),
        ("_orig_mod.base_model.model.l._checkpoint_wrapped_module.q.lora_{}.weight", "l.q"),
    ],
)
def test_what_trainers_leave_in_names_is_taken_off_and_comes_back(tmp_path: Path, key: str, read_as: str) -> None:
    source = tmp_path / "a"
    source.mkdir()
    arrays = {key.format("A"): np.ones((2, 8), np.float32), key.format("B"): np.ones((6, 2), np.float32)}
    safetensors_file.write(source / peft.WEIGHTS, arrays, {"format": "pt"})
    (source / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    adapter = peft.read(source)
    assert list(adapter.deltas) == [read_as]
    assert "names that peft would skip" in adapter.notes[0]
    assert list(peft.state_dict(adapter)) == [f"base_model.model.{read_as}.lora_{half}.weight" for half in "AB"]
    (tmp_path / "b").mkdir()
    peft.write(adapter, tmp_path / "b")
    assert (tmp_path / "b" / peft.WEIGHTS).read_bytes() == (source / peft.WEIGHTS).read_bytes()


def test_the_magnitudes_of_older_files_keep_their_names(tmp_path: Path) -> None:
    tensors = {**PAIR, "l.0.q.lora_magnitude_vector.weight": (6,)}
    source = folder(tmp_path / "a", tensors, use_dora=True)
    (tmp_path / "b").mkdir()
    adapter = peft.read(source)
    assert not adapter.notes
    peft.write(adapter, tmp_path / "b")
    assert (tmp_path / "b" / peft.WEIGHTS).read_bytes() == (source / peft.WEIGHTS).read_bytes()


WORDS = (
    "base_model", "model", "module", "_orig_mod", "lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_magnitude_vector",
    "modules_to_save", "token_adapter", "trainable_tokens_delta", "vera_A", "hada_w1_a", "lokr_x", "weight", "bias", "default",
    "x", "0", "", "base_layer", "original_module", "lora_other", tensor_keys.PREFIX[:-1],
)  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(".".join))
def test_a_tensor_is_identified_by_its_module_and_end_as_by_its_whole_name(key: str) -> None:
    full = tensor_keys.native_name(key)
    assert tensor_keys.identify(key) == (full, *tensor_keys._classify(full, key))
    assert tensor_keys.identify(tensor_keys.PREFIX + key)[0] == tensor_keys.native_name(tensor_keys.PREFIX + key)


_STARTS = (
    "",
    tensor_keys.PREFIX,
    tensor_keys.PREFIX * 2,
    "module.",
    "module.module.",
    "_orig_mod.",
    "base_model.",
    f"_fsdp_wrapped_module.{tensor_keys.PREFIX}",
)
_MODULES = (
    "",
    "model.layers.0.q",
    "a",
    "lora_A",
    "a.lora_A",
    "vera_x",
    "a.base_layer",
    "a.modules_to_save",
    "a._orig_mod",
    "module",
)
_ENDS = (
    "", ".lora_A", ".lora_A.weight", ".lora_A.default.weight", ".lora_A..weight", ".lora_A.a.b", ".lora_A._orig_mod.weight",
    ".lora_B.default.bias", ".lora_embedding_A.default", ".lora_magnitude_vector.default.weight", ".vera_A", ".vera_A.default",
    ".vera_lambda_b.default", ".hada_w1_a.x", ".lokr_w1", ".weight", ".base_layer.weight", ".modules_to_save.default.weight",
    ".token_adapter.trainable_tokens_delta.default", ".original_module.weight",
)  # fmt: skip


def test_a_name_that_is_analyzed_in_two_parts_has_the_identity_that_it_has_as_a_whole() -> None:
    for parts in product(_STARTS, _MODULES, _ENDS):
        key = "".join(parts).lstrip(".") or "x"
        full, kind, name, _ = tensor_keys.identify(key)
        assert full == tensor_keys.native_name(key)
        if not full.startswith(tensor_keys.PREFIX) and full not in tensor_keys.SHARED:
            assert (kind, name) == ("unknown", key)
