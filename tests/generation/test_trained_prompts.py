"""`run` asks an adapter as it was trained, in torch and in llama.cpp, and conversions say how to ask."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.serve.engines import CHAT
from adapterhub_converters.trained_prompt import TrainedPrompt
from tests.conftest import need_module
from tests.support import by_heart
from tests.support.by_heart import OWN, PLAIN, PROMPT, TOKENS, ByHeart


@pytest.fixture(scope="module")
def heart(tmp_path_factory: pytest.TempPathFactory) -> ByHeart:
    return by_heart.learn(tmp_path_factory.mktemp("heart"))


@pytest.mark.parametrize("base", ["base", "silent", "base.gguf", "silent.gguf"])
def test_run_asks_as_the_adapter_was_trained(heart: ByHeart, base: str) -> None:
    if base.endswith(".gguf"):
        need_module("llama_cpp_py_sync")
    for question, answer in OWN.items():
        result = ah.generate(heart.own, question, base=heart.folder / base, compare=False, max_tokens=TOKENS)
        assert (result.prompt, result.text) == (PROMPT.format(question), answer)


def test_an_answer_ends_at_the_mark_of_its_template_on_a_base_that_ends_texts_otherwise(heart: ByHeart, tmp_path: Path) -> None:
    base = shutil.copytree(heart.silent, tmp_path / "base")
    for name, key, value in (("config.json", "eos_token_id", 0), ("tokenizer_config.json", "eos_token", "<|endoftext|>")):
        document = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**document, key: value}))
    (base / "generation_config.json").unlink(missing_ok=True)
    by_heart.train(tmp_path, base, "marked", PLAIN, 'chat_template = "chatml"')
    for question, answer in PLAIN.items():
        result = ah.generate(tmp_path / "marked", question, base=base, compare=False, max_tokens=TOKENS)
        assert (result.text, result.prompt) == (answer, f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    from adapterhub.serve.torch_engine import open_host
    from adapterhub.serve.torch_engine.openai_request import ApiRequest

    with open_host(base, slots=1, rows=2) as host:
        host.load("marked", tmp_path / "marked")
        prompt, blend = TrainedPrompt.read(tmp_path / "marked"), (("marked", 1.0),)
        body = {"messages": [{"role": "user", "content": "sky"}], "temperature": 0, "max_tokens": TOKENS}
        (request,) = ApiRequest.read(host, CHAT, body, blend, prompt).requests
        again = ApiRequest.read(host, CHAT, body, blend, prompt).requests
        assert again[0].ends == request.ends
        assert host.text._chat_ends_of.cache_info().misses == 1  # each costs a rendering
        pieces = list(host.submit(request))
        assert ("".join(piece.text for piece in pieces), pieces[-1].finish) == (PLAIN["sky"], "stop")


def test_a_gguf_of_the_adapter_has_its_prompt_with_nothing_beside_it(heart: ByHeart, tmp_path: Path) -> None:
    need_module("llama_cpp_py_sync")
    ah.convert(heart.own, tmp_path / "own.gguf", to="gguf", base=heart.silent_gguf)
    (tmp_path / "chat_template.jinja").write_text("of something else")
    assert TrainedPrompt.read(tmp_path / "own.gguf") == TrainedPrompt.read(heart.own)
    result = ah.generate(tmp_path / "own.gguf", "red", base=heart.silent_gguf, compare=False, max_tokens=TOKENS)
    assert (result.prompt, result.text) == (PROMPT.format("red"), OWN["red"])
    notes = ah.convert(tmp_path / "own.gguf", tmp_path / "back", to="peft", base=heart.silent_gguf).notes
    assert (tmp_path / "back/chat_template.jinja").read_text() == by_heart.TEMPLATE
    assert any("options or a date of its chat template" in note for note in notes)
    ah.convert(heart.plain, tmp_path / "plain.gguf", to="gguf", base=heart.gguf)
    assert not TrainedPrompt.read(tmp_path / "plain.gguf")


def test_ollama_s_package_notes_the_template_that_it_cannot_have(heart: ByHeart, tmp_path: Path) -> None:
    notes = ah.convert(heart.own, tmp_path / "own", to="ollama", base=heart.gguf, model="tiny").notes
    assert any("a chat template of its own (jinja), which no Modelfile can say" in note for note in notes)
    notes = ah.convert(heart.plain, tmp_path / "plain", to="ollama", base=heart.gguf, model="tiny").notes
    assert not any("template" in note for note in notes)
