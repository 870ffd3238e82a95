"""X-LoRA, as peft itself saves it: kept, described and checked, and never taken for one LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import WRITTEN, convert, peft
from tests.conftest import Run, need_module
from tests.support import tiny

CLASSIFIER = "base_model.internal_xlora_classifier.layers"
SIZES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "three layers": {"xlora_depth": 3, "xlora_size": 16, "layerwise_scalings": True},
    "without dropout": {"xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0},
}
SAVED = {"one layer": [], "three layers": [3, 6], "without dropout": [2]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two LoRA adapters, and an X-LoRA of each size, saved by peft; beside each one its whole classifier."""
    need_module("peft")
    import peft as pefts
    import transformers

    folder = tmp_path_factory.mktemp("xlora")
    tiny.model("LlamaForCausalLM").save_pretrained(folder / "base")
    for name in ("one", "two"):
        tiny.adapter(tiny.model("LlamaForCausalLM"), folder / name, target_modules=["q_proj", "v_proj"])
    for name, sizes in SIZES.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        model.config.use_cache = False
        adapters = {number: str(folder / name) for number, name in (("0", "one"), ("1", "two"))}
        mixed = pefts.get_peft_model(model, pefts.XLoraConfig("CAUSAL_LM", hidden_size=64, adapters=adapters, **sizes))
        mixed.save_pretrained(folder / name)
        whole = mixed.base_model.internal_xlora_classifier.state_dict()
        tensors = {f"base_model.internal_xlora_classifier.{key}": value.numpy() for key, value in whole.items()}
        safetensors_file.write(folder / name / "whole", tensors, {"format": "pt"})
    return folder


def copied(place: Path, name: str, folder: Path, *, whole: bool) -> Path:
    folder.mkdir()
    (folder / peft.CONFIG).write_bytes((place / name / peft.CONFIG).read_bytes())
    (folder / peft.WEIGHTS).write_bytes((place / name / ("whole" if whole else peft.WEIGHTS)).read_bytes())
    return folder


def problems(path: Path, base: Path | None = None) -> list[tuple[str, str]]:
    return [(problem.code, problem.name) for problem in ah.check(path, base=base).problems if problem.severity == "error"]


@pytest.mark.parametrize("name", SIZES)
def test_what_peft_leaves_out_of_the_classifier_is_an_error(name: str, place: Path, tmp_path: Path) -> None:
    source = copied(place, name, tmp_path / "a", whole=False)
    with safetensors_file.SafetensorsFile(source / peft.WEIGHTS) as file:
        assert set(file.tensors) == {f"{CLASSIFIER}.{n}.{part}" for n in SAVED[name] for part in ("bias", "weight")}
    assert problems(source) == [("classifier", "internal_xlora_classifier.layers.0")]
    assert ah.check(source).verdicts["peft"].verdict == "wrong"


@pytest.mark.parametrize("name", SIZES)
def test_a_whole_one_is_described_and_fits_its_base(name: str, place: Path, tmp_path: Path) -> None:
    source = copied(place, name, tmp_path / "a", whole=True)
    assert problems(source, place / "base") == []
    verdicts = ah.check(source, base=place / "base").verdicts
    assert {runtime for runtime, verdict in verdicts.items() if verdict.verdict == "applied"} == {"peft", "transformers"}
    facts = ah.load(source).manifest
    assert (facts.method, facts.r, facts.numbers["hidden_size"]) == ("xlora", None, 64)
    config = json.loads((source / peft.CONFIG).read_text())
    (source / peft.CONFIG).write_text(json.dumps(config | {"hidden_size": 32}))
    assert ("shape-mismatch", "hidden_size") in problems(source, place / "base")
    assert problems(source) == [("classifier", "internal_xlora_classifier.layers.0")]


def test_it_is_kept_with_the_adapters_it_mixes(place: Path, run: Run, tmp_path: Path) -> None:
    run("init")
    result = run("push", place / "three layers", "team/x:one", code=6)
    assert "classifier" in result.stderr
    run("push", place / "three layers", "team/x:one", "--force")
    run("pull", "team/x:one", "-o", "back")
    for file in ("adapter_model.safetensors", "0/adapter_model.safetensors", "1/adapter_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (place / "three layers" / file).read_bytes()


@pytest.mark.parametrize("name", ["one layer", "three layers"])
@pytest.mark.parametrize("whole", [True, False])
def test_it_is_converted_and_merged_to_nothing(name: str, whole: bool, place: Path, tmp_path: Path) -> None:
    source = copied(place, name, tmp_path / "a", whole=whole)
    for to in (format_name for format_name in WRITTEN if format_name != "peft"):
        with pytest.raises(RefusedError, match="xlora mixes LoRA adapters anew for each token"):
            convert.convert(source, tmp_path / "out", to=to)
    with pytest.raises(RefusedError, match="xlora mixes LoRA adapters anew for each token"):
        ah.merge_into(source, place / "base", tmp_path / "out")
    with pytest.raises(RefusedError, match="xlora mixes LoRA adapters anew for each token"):
        ah.merge([source, place / "one"], tmp_path / "out")


def test_other_tensors_and_sizes_are_named(place: Path, tmp_path: Path) -> None:
    source = copied(place, "one layer", tmp_path / "a", whole=True)
    safetensors_file.write(source / peft.WEIGHTS, {f"{CLASSIFIER}.9.weight": np.ones((2, 64), np.float32)})
    assert [code for code, _ in problems(source)] == ["malformed"]
    shapes = {f"{CLASSIFIER}.{n}.{part}": shape for n in (0, 9) for part, shape in (("weight", (3, 64)), ("bias", (3,)))}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    safetensors_file.write(source / peft.WEIGHTS, tensors)
    assert {code for code, _ in problems(source)} == {"classifier", "unknown-tensor"}
    (source / peft.CONFIG).write_text(json.dumps({"peft_type": "XLORA", "xlora_depth": 10**9, "adapters": {"0": "x"}}))
    assert ("classifier", "") in problems(source)
