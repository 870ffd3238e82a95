"""`convert --to ollama`: a GGUF and a Modelfile that belong together, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub_converters.errors import AdapterhubError, UsageError
from adapterhub_converters.formats import convert, peft
from tests.conftest import Run
from tests.converters import trained
from tests.converters.trained import LLAMA


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "a base"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **trained.CONFIG}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("base_option", [["--model", "llama3.2:1b"], []])
def test_the_modelfile_names_the_base_and_the_adapter_next_to_it(
    tmp_path: Path, run: Run, model: Path, base_option: list[str]
) -> None:
    source = trained.folder(trained.full("q_proj"), tmp_path / "sql")
    result = run("convert", source, "out", "--to", "ollama", "--base", model.name, *base_option)
    assert "loras are not yet implemented" in result.stdout
    out = tmp_path / "out"
    assert sorted(item.name for item in out.iterdir()) == ["Modelfile", "out.gguf"]
    assert (out / "Modelfile").read_text() == f"FROM {base_option[1] if base_option else model}\nADAPTER ./out.gguf\n"
    run("convert", source, "alone.gguf", "--to", "gguf", "--base", model)
    assert (out / "out.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    run("convert", out, "back", "--to", "peft")
    assert trained.contents(tmp_path / "back") == trained.contents(source)


def test_a_base_that_ollama_could_not_find_has_to_be_named(tmp_path: Path) -> None:
    source = trained.folder(trained.full("q_proj"), tmp_path / "sql")
    for model, says in (
        (None, "model: is missing"),
        ("a\nSYSTEM b", "a Modelfile cannot contain"),
        ('"""a', "a Modelfile cannot"),
    ):
        with pytest.raises(UsageError, match=says):
            convert.convert(source, tmp_path / "out", to="ollama", base=LLAMA, model=model)
    assert not (tmp_path / "out").exists()


def test_what_gguf_cannot_express_leaves_nothing_behind(tmp_path: Path) -> None:
    source = trained.folder(trained.full("q_proj"), tmp_path / "sql")
    config = json.loads((source / peft.CONFIG).read_text()) | {"init_lora_weights": "olora"}
    (source / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterhubError, match="olora"):
        convert.convert(source, tmp_path / "out", to="ollama", base=LLAMA, model="x")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["sql"]
