"""GGUF adapters of llama.cpp's own script, whose rows of q and k are permuted by the number of heads of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Run, need_module
from tests.support.llama_cpp_scripts import LoraConverter
from tests.support.torch_order import assert_same_merge

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = {"Llama": ALL, "Mistral": ALL, "SmolLM3": ALL, "Granite": ALL, "Mixtral": ["q_proj", "k_proj"]}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, lora_converted: LoraConverter) -> dict[str, Path]:
    """A folder for each family: `base`, peft's adapter `a`, the same as llama.cpp writes it, `x.gguf`, and peft's `merged`."""
    need_module("peft")
    folders = {name: adapted(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}
    for folder in folders.values():
        assert lora_converted(folder / "a", folder / "base", folder / "x.gguf") == ""
    return folders


@pytest.fixture(params=FAMILIES)
def place(request: pytest.FixtureRequest, places: dict[str, Path]) -> Path:
    """The folder of each family."""
    return places[request.param]


def adapted(name: str, at: Path) -> Path:
    """Save a base, an adapter of it and peft's merge."""
    import peft
    import torch
    import transformers

    def model() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))

    model().save_pretrained(at / "base")
    tuned = peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=FAMILIES[name], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in tuned.named_parameters():
        if "lora_B" in key:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(at / "a")
    peft.PeftModel.from_pretrained(model(), str(at / "a")).merge_and_unload().save_pretrained(at / "merged")
    return at


def test_a_merge_takes_the_heads_of_the_model_that_it_merges_into(place: Path, tmp_path: Path, run: Run) -> None:
    from safetensors.torch import load_file

    run("validate", place / "x.gguf", "--base", place / "base", "--for", "peft", "--for", "llama.cpp", "--strict")
    run("merge", place / "x.gguf", "--into", place / "base", "-o", "out")
    ours, by_peft = load_file(tmp_path / "out/model.safetensors"), load_file(place / "merged/model.safetensors")
    assert by_peft.keys() <= ours.keys()
    assert_same_merge(by_peft, ours)


@pytest.mark.parametrize("place", ["Llama"], indirect=True)
def test_a_registry_takes_it_with_its_base_and_without(place: Path, tmp_path: Path, run: Run) -> None:
    stdout = run("show", place / "x.gguf").stdout
    assert "lora, r 4, alpha 8" in stdout
    assert "order-unknown" in run("validate", place / "x.gguf").stdout
    run("push", place / "x.gguf", "team/plain")
    run("push", place / "x.gguf", "team/pinned", "--base", place / "base")
    run("push", "team/pinned", "layout://there:v1")
    # The base that adapter.json pins is at hand.
    run("convert", "team/pinned", "again", "--to", "peft")
    error = run("convert", "team/plain", "never", "--to", "peft", code=6).stderr
    assert "the order of its rows depends on the number of heads" in error


def test_a_difference_is_of_functions(place: Path, tmp_path: Path, run: Run) -> None:
    document = json.loads(run("diff", place / "x.gguf", place / "a", "--base", place / "base", "--json").stdout)
    assert document["same"] or all(module["status"] == "equal" for module in document["modules"]), document
    (tmp_path / "y.gguf").write_bytes(_scaled((place / "x.gguf").read_bytes()))
    run("diff", place / "x.gguf", "y.gguf")  # both in llama.cpp's order


def _scaled(raw: bytes) -> bytes:
    """The file with another last number."""
    return raw[:-4] + np.float32(0.5).tobytes()
