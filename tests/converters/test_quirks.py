"""What unsloth, mergekit, torchtune's export, ai-toolkit and others leave in PEFT files: read right and said, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.checks import repair
from adapterhub.merging import combine
from adapterhub_converters.adapter import LowRank, plain_pairs, targets_without_magnitude
from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert, peft, raw

PREFIX, Q = "base_model.model.", "model.layers.0.self_attn.q_proj"
RNG = np.random.default_rng(0)
MINIMAL = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def pair(target: str = Q, r: int = 2) -> dict[str, np.ndarray]:
    factors = {"lora_A.weight": RNG.normal(size=(r, 16)), "lora_B.weight": RNG.normal(size=(16, r))}
    return {f"{PREFIX}{target}.{name}": array.astype(np.float32) for name, array in factors.items()}


def folder(path: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    path.mkdir()
    safetensors_file.write(path / peft.WEIGHTS, tensors, {"format": "pt"})
    (path / peft.CONFIG).write_text(json.dumps(MINIMAL | config))
    return path


def base(*modules: str, architecture: str = "LlamaForCausalLM") -> BaseSpec:
    tensors = {f"{module}.weight": BaseTensor((16, 16), "F32") for module in modules}
    return BaseSpec("base", "hf", architecture, "", {}, tensors)


def unchanged(source: Path, tmp_path: Path) -> bool:
    """Whether the file comes back as it was."""
    convert.convert(source, tmp_path / "raw.safetensors", to="raw")
    convert.convert(tmp_path / "raw.safetensors", tmp_path / "back", to="peft")
    return all((tmp_path / "back" / n).read_bytes() == (source / n).read_bytes() for n in (peft.CONFIG, peft.WEIGHTS))


@pytest.mark.parametrize("name", ["unsloth/Llama-3.2-1B-bnb-4bit", "unsloth/Llama-3.2-1B-unsloth-bnb-4bit"])
def test_a_base_in_4_bits_is_reported_with_its_16_bit_original(tmp_path: Path, name: str) -> None:
    adapter = peft.read(folder(tmp_path / "a", pair(), base_model_name_or_path=name))
    assert adapter.meta.base_model == name
    assert f"its base {name} is in 4 bits; unsloth/Llama-3.2-1B, or" in adapter.notes[0]


def test_dora_without_magnitudes_is_reported_and_converts_only_back(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", pair(), use_dora=True)
    adapter = peft.read(source)
    assert '"use_dora" is true and 1 modules have no magnitude: peft uses' in adapter.notes[0]
    assert unchanged(source, tmp_path)
    (tmp_path / "c").mkdir()
    peft.write(dataclasses.replace(adapter, source=None), tmp_path / "c")
    assert targets_without_magnitude(peft.read(tmp_path / "c")) == [Q]
    with pytest.raises(RefusedError, match="norms of the base's rows"):
        plain_pairs(adapter)
    with pytest.raises(RefusedError, match="norms of the base's rows"):
        combine([adapter, adapter], [1.0, 1.0], method="linear")


def test_dora_of_some_modules_is_not_written_as_that_of_all(tmp_path: Path) -> None:
    adapter = peft.read(folder(tmp_path / "a", pair() | pair("model.layers.1.self_attn.q_proj")))
    delta = adapter.deltas[Q]
    assert isinstance(delta, LowRank)
    dora_delta = dataclasses.replace(delta, magnitude=np.ones(16, np.float32))
    with pytest.raises(RefusedError, match="has no DoRA magnitude and others have one"):
        peft.write(dataclasses.replace(adapter, deltas={**adapter.deltas, Q: dora_delta}, source=None), tmp_path)


def test_a_bias_missing_from_the_config_is_read_reported_and_repaired(tmp_path: Path) -> None:
    tensors = pair() | {f"{PREFIX}{Q}.lora_B.bias": np.ones(16, np.float32)}
    source = folder(tmp_path / "a", tensors, alpha_pattern={"q_proj": 2}, rank_pattern={"q_proj": 2})
    adapter = peft.read(source)
    delta = adapter.deltas[Q]
    assert isinstance(delta, LowRank)
    assert delta.bias is not None
    assert delta.scaling == 1
    assert '1 modules have a lora_B.bias and "lora_bias" is not true' in adapter.notes[0]
    assert unchanged(source, tmp_path)
    mended = repair.fix(source, tmp_path / "mended")
    assert [mend.code for mend in mended.repairs] == ["bias-flag"]
    assert not peft.read(tmp_path / "mended").notes


def test_wrapped_modules_are_those_of_the_base(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", pair(f"{Q}.linear"))
    assert set(peft.read(source).deltas) == {f"{Q}.linear"}
    assert "which only some bases have: name the base" in peft.read(source).notes[0]
    assert set(peft.read(source, base=base(f"{Q}.linear")).deltas) == {f"{Q}.linear"}
    adapter = peft.read(source, base=base(Q))
    assert set(adapter.deltas) == {Q}
    assert "which the base does not have" in adapter.notes[0]
    convert.convert(source, tmp_path / "gguf", to="raw", base=base(Q))
    convert.convert(tmp_path / "gguf", tmp_path / "back", to="peft", base=base(Q))
    assert (tmp_path / "back" / peft.WEIGHTS).read_bytes() == (source / peft.WEIGHTS).read_bytes()


def test_fix_renames_wrapped_modules_that_the_base_has_not(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", pair(f"{Q}.linear"))
    mended = repair.fix(source, tmp_path / "mended", base=base(Q))
    assert "key-prefix" in [mend.code for mend in mended.repairs]
    assert set(peft.read(tmp_path / "mended").deltas) == {Q}
    assert not [
        mend for mend in repair.fix(source, tmp_path / "n", base=base(f"{Q}.linear")).repairs if mend.code == "key-prefix"
    ]


@pytest.mark.parametrize("act", ["read", "fix"])
def test_dora_as_torchtune_exports_it_is_refused(tmp_path: Path, act: str) -> None:
    source = folder(tmp_path / "a", pair() | {f"{PREFIX}{Q}.lora_magnitude_vector": np.ones(16, np.float32)})
    with pytest.raises(
        RefusedError, match=r"in another order than their rows. Convert the adapter_model.pt next to it"
    ) as caught:
        peft.read(source) if act == "read" else repair.fix(source, tmp_path / "mended")
    assert caught.value.code == "torchtune-export"


def test_other_dora_is_read(tmp_path: Path) -> None:
    tensors = pair() | {f"{PREFIX}{Q}.lora_magnitude_vector": np.ones(16, np.float32)}
    assert not peft.read(folder(tmp_path / "a", tensors, use_dora=True)).notes
    assert '"use_dora" is not true' in peft.read(folder(tmp_path / "b", tensors, bias="none")).notes[0]


def test_torchtunes_qwen2_is_recognized(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", pair())
    assert (
        "unlike in torchtune's own file of a Qwen2" in peft.read(source, base=base(Q, architecture="Qwen2ForCausalLM")).notes[0]
    )
    assert not peft.read(source, base=base(Q)).notes


def test_alpha_is_the_rank_in_a_file_of_ai_toolkits(tmp_path: Path) -> None:
    tensors = {name.removeprefix(PREFIX): array for name, array in (pair() | pair(Q.replace("q_", "k_"), r=3)).items()}
    software = json.dumps({"name": "ai-toolkit", "version": "0.7"})
    safetensors_file.write(tmp_path / "a.safetensors", tensors, {"format": "pt", "software": software})
    adapter = raw.read(tmp_path / "a.safetensors")
    assert {delta.scaling for delta in adapter.deltas.values()} == {1.0}
    assert "alpha is the rank, as always in files that ai-toolkit saves" in adapter.notes
    safetensors_file.write(tmp_path / "b.safetensors", tensors, {"format": "pt", "software": "other"})
    with pytest.raises(RefusedError, match="its alpha is not recorded"):
        raw.read(tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head.modules_to_save.default.weight"])
def test_a_whole_lm_head_as_axolotl_saves_it_is_read(tmp_path: Path, name: str) -> None:
    head = np.ones((20, 16), np.float32)
    source = folder(tmp_path / "a", pair() | {PREFIX + name: head}, modules_to_save=["lm_head"])
    np.testing.assert_array_equal(peft.read(source).replaced["lm_head.weight"], head)
    assert unchanged(source, tmp_path)


def test_other_files_next_to_an_adapter_are_left_alone(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", pair(), base_model_name_or_path="unsloth/x-bnb-4bit", arrow_config=None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (source / name).write_text("{}")
    assert set(peft.read(source).deltas) == {Q}
    assert unchanged(source, tmp_path)
