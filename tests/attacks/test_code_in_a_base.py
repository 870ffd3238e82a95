"""A base may bring Python, kernels of a hub and other configs: none of it runs, is fetched or is asked about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub.training.model import transformers_api  # noqa: E402
from adapterhub.training.model.base_model import Base  # noqa: E402
from adapterhub.training.train_config import BaseConfig, LoRAConfig  # noqa: E402
from adapterhub_converters.errors import FormatError, RefusedError  # noqa: E402
from tests.conftest import Run  # noqa: E402
from tests.training.conftest import load_base, tiny_base  # noqa: E402

__all__ = ["tiny_base"]
# Whatever is imported of the base leaves this file.
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').write_text('')\nraise SystemExit\n"
MODULES = {f"Auto{auto_class}": f"own.Own{auto_class}" for auto_class in ("Config", "Model", "ModelForCausalLM")}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base, with Python in every place where transformers looks for some."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "own.py").write_text(CODE)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(CODE)
    return folder


def change(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def loaded(folder: Path) -> Base:
    return load_base(folder, BaseConfig(str(folder), quantize="none"), LoRAConfig(r=2, targets=("q_proj",)))


def test_a_model_type_that_only_the_base_knows_is_refused_by_name_and_nothing_is_asked(
    run: Run, base: Path, tmp_path: Path
) -> None:
    change(base, model_type="own", auto_map=MODULES)
    (tmp_path / "d.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "c.toml").write_text('[base]\npath = "base"\n[data]\ntrain = ["d.jsonl"]\n[lora]\ntargets = ["q_proj"]\n')
    for options in ([], ["--json"]):
        result = run("train", "c.toml", *options, code=6)
        assert "base: config.json: transformers has no model of type 'own'; the base brings code" in result.stderr
        assert "custom code" not in result.stdout + result.stderr
        assert "trust_remote_code" not in result.stdout + result.stderr
    assert not list(base.rglob("ran"))


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": MODULES},
        {"auto_map": {**MODULES, "AutoConfig": "evil/repo--own.OwnConfig"}},
        {"auto_map": 1},
        {"custom_generate": "evil/repo"},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
        {"configuration_files": ["config.4.0.0.json"]},
        {"_name_or_path": "evil/repo"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_known_model_is_built_by_transformers_alone(base: Path, changes: dict[str, Any]) -> None:
    change(base, **changes)
    (base / "config.4.0.0.json").write_text('{"model_type": "own"}')
    loaded_model = loaded(base)
    assert type(loaded_model.model).__module__.startswith("transformers.")
    assert not list(base.rglob("ran"))


def test_a_known_tokenizer_is_made_by_transformers_alone(base: Path) -> None:
    change(base, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    assert loaded(base).tokenizer("ab")["input_ids"]
    assert not list(base.rglob("ran"))


def test_a_tokenizer_of_its_own_is_refused_without_advice_to_trust_it(base: Path) -> None:
    change(base, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.A", "own.B"]}, tokenizer_class="OwnTokenizer")
    with pytest.raises(RefusedError, match="tokenizer_config.json: needs code of its own, which is not run") as caught:
        loaded(base)
    assert caught.value.hint == "Use a base whose tokenizer is part of transformers"
    assert "trust_remote_code" not in str(caught.value)
    assert not list(base.rglob("ran"))


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("config.json", {"model_type": ["llama"]}, "config.json: transformers has no model of type"),
        ("config.json", {"model_type": None}, "config.json: transformers has no model of type 'None'"),
        ("config.json", {"hidden_size": "64"}, r"base: transformers cannot build it \(.*'hidden_size': \w+"),
        ("config.json", {"rope_parameters": 3}, r"base: transformers cannot build it \(.*'rope_parameters': \w+"),
        ("tokenizer_config.json", {"auto_map": [1, 2, 3]}, r"base: transformers cannot build it \("),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}, r"cannot build it \(.*`added_tokens_decoder`"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, r"base: transformers cannot build it \("),
    ],
)
def test_configs_that_transformers_cannot_read_are_refused_in_one_line(
    base: Path, name: str, changes: dict[str, Any], says: str
) -> None:
    change(base, name, **changes)
    with pytest.raises((FormatError, RefusedError), match=says) as caught:
        loaded(base)
    assert "\n" not in str(caught.value)


def test_weights_of_an_unknown_quantizer_are_refused(base: Path) -> None:
    change(base, quantization_config={"quant_method": "own"})
    with pytest.raises(RefusedError, match="quantized with own"):
        loaded(base)


def test_while_a_model_is_built_the_hub_is_out_of_reach_and_afterwards_as_before() -> None:
    from huggingface_hub import constants, is_offline_mode

    before = constants.HF_HUB_OFFLINE
    with transformers_api._offline():
        assert is_offline_mode()
    assert before == constants.HF_HUB_OFFLINE
