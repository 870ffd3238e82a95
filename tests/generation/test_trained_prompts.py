"""`run` asks an adapter as it was trained, in torch and in llama.cpp, and conversions say how to ask."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.serve.engines import CHAT
from adapterhub_converters.containers.gguf_file import GGUFFile
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
        result = ah.generate(heart.own_adapter, question, base=heart.folder / base, compare=False, max_tokens=TOKENS)
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
    _check_merges(base, tmp_path)
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


def test_llama_cpp_ends_an_answer_at_a_mark_that_the_template_of_the_adapter_alone_names(
    heart: ByHeart, tmp_path: Path
) -> None:
    need_module("llama_cpp_py_sync")
    base = shutil.copytree(heart.silent, tmp_path / "base")
    for path in base.glob("*.json"):  # llama.cpp knows the mark of chatml by its name
        path.write_text(path.read_text().replace("<|im_end|>", "<|fin|>"))
    for name, key, value in (("config.json", "eos_token_id", 0), ("tokenizer_config.json", "eos_token", "<|endoftext|>")):
        document = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**document, key: value}))
    (base / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "marks.jinja").write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|fin|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    by_heart.train(tmp_path, base, "marked", PLAIN, 'chat_template = "marks.jinja"')
    ah.convert_model(base, tmp_path / "base.gguf", to="gguf")
    for question, answer in PLAIN.items():
        result = ah.generate(tmp_path / "marked", question, base=tmp_path / "base.gguf", compare=False, max_tokens=TOKENS)
        assert result.text == answer


def _check_merges(base: Path, folder: Path) -> None:
    """transformers and llama.cpp stop at the mark by what is in the merged model."""
    import transformers

    ah.convert_model(base, folder / "base.gguf", to="gguf")
    for source, name in ((base, "merged"), (base, "merged.gguf"), (folder / "base.gguf", "same.gguf")):
        ah.merge_into(folder / "marked", source, folder / name)
    for name in ("merged.gguf", "same.gguf"):
        with GGUFFile(folder / name) as file:
            assert file.header.metadata["tokenizer.ggml.eot_token_id"] == 2
    assert json.loads((folder / "merged/generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [0, 2]}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    for question, answer in PLAIN.items():
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(output) == f"{answer}<|im_end|>"


def test_a_gguf_of_the_adapter_has_its_prompt_with_nothing_beside_it(heart: ByHeart, tmp_path: Path) -> None:
    need_module("llama_cpp_py_sync")
    ah.convert(heart.own_adapter, tmp_path / "own.gguf", to="gguf", base=heart.silent_gguf)
    (tmp_path / "chat_template.jinja").write_text("of something else")
    assert TrainedPrompt.read(tmp_path / "own.gguf") == TrainedPrompt.read(heart.own_adapter)
    result = ah.generate(tmp_path / "own.gguf", "red", base=heart.silent_gguf, compare=False, max_tokens=TOKENS)
    assert (result.prompt, result.text) == (PROMPT.format("red"), OWN["red"])
    notes = ah.convert(tmp_path / "own.gguf", tmp_path / "back", to="peft", base=heart.silent_gguf).notes
    assert not any("chat template" in note for note in notes)
    result = ah.generate(tmp_path / "back", "red", base=heart.silent, compare=False, max_tokens=TOKENS)
    assert (result.prompt, result.text) == (PROMPT.format("red"), OWN["red"])
    ah.convert(heart.plain, tmp_path / "plain.gguf", to="gguf", base=heart.gguf)
    assert not TrainedPrompt.read(tmp_path / "plain.gguf")


def test_ollama_s_package_notes_the_template_that_it_cannot_have(heart: ByHeart, tmp_path: Path) -> None:
    notes = ah.convert(heart.own_adapter, tmp_path / "own", to="ollama", base=heart.gguf, model="tiny").notes
    assert any("a chat template of its own (jinja), which no Modelfile can say" in note for note in notes)
    notes = ah.convert(heart.plain, tmp_path / "plain", to="ollama", base=heart.gguf, model="tiny").notes
    assert not any("template" in note for note in notes)


def test_a_merge_of_adapters_is_asked_as_they_were_trained(heart: ByHeart, tmp_path: Path) -> None:
    half = ah.merge([heart.own_adapter, heart.own_adapter], tmp_path / "half", weights=[0.5, 0.5])
    assert not any("chat template" in note for note in half.report.notes)
    result = ah.generate(tmp_path / "half", "red", base=heart.silent, compare=False, max_tokens=TOKENS)
    assert (result.prompt, result.text) == (PROMPT.format("red"), OWN["red"])
    merged = ah.merge([heart.own_adapter, heart.plain], tmp_path / "both")
    assert not (tmp_path / "both/chat_template.jinja").exists()
    assert any("trained with different chat templates" in note for note in merged.report.notes)


def test_a_model_with_an_adapter_merged_in_is_asked_as_the_adapter_was_trained(heart: ByHeart, tmp_path: Path) -> None:
    need_module("llama_cpp_py_sync")
    for base, name in ((heart.silent, "folder"), (heart.silent, "made.gguf"), (heart.gguf, "same.gguf")):
        report = ah.merge_into(heart.own_adapter, base, tmp_path / name)
        assert not any("template" in warning for warning in report.warnings)
        for question, answer in OWN.items():
            result = ah.generate(None, question, base=tmp_path / name, max_tokens=TOKENS)
            assert (result.prompt, result.text) == (PROMPT.format(question), answer), name
    report = ah.merge_into([heart.own_adapter, heart.plain], heart.base, tmp_path / "both")
    assert any("trained with different chat templates" in warning for warning in report.warnings)


def test_options_of_the_template_of_the_base_are_set_in_a_merged_model(heart: ByHeart, tmp_path: Path) -> None:
    base = shutil.copytree(heart.silent, tmp_path / "base")
    (base / "chat_template.jinja").write_text(by_heart.TEMPLATE)
    options = 'template_options = { mood = "calm;#", level = 2 }\ndate = "2026-01-31"'
    by_heart.train(tmp_path, base, "optional", {"red": "an apple"}, options)
    ah.merge_into(tmp_path / "optional", base, tmp_path / "merged")
    result = ah.generate(None, "red", base=tmp_path / "merged", max_tokens=TOKENS)
    assert (result.prompt, result.text) == (PROMPT.format("red"), "an apple")
    notes = ah.merge(tmp_path / "optional", tmp_path / "alone").report.notes
    assert any("options or a date of the base's chat template" in note for note in notes)


@pytest.mark.parametrize("base", ["silent", "silent.gguf"])
def test_an_instruction_is_asked_in_the_words_of_alpaca_that_it_was_trained_in(
    alpaca: Path, heart: ByHeart, base: str, tmp_path: Path
) -> None:
    if base.endswith(".gguf"):
        need_module("llama_cpp_py_sync")
    for question, answer in (("red", "an apple"), ("add\n\n### Input:\n2, 2", "four")):
        result = ah.generate(alpaca, question, base=heart.folder / base, compare=False, max_tokens=TOKENS)
        assert result.text == answer
        assert result.prompt.startswith("Below is an instruction that describes a task")
        assert ("paired with an input" in result.prompt) == ("Input" in question)
        assert result.prompt.endswith(f"\n\n### Instruction:\n{question}\n\n### Response:")


def test_instructions_are_evaluated_in_the_words_of_alpaca_that_they_were_trained_in(alpaca: Path, heart: ByHeart) -> None:
    record = json.loads((alpaca / "adapter.json").read_text())["training"]
    assert record["config"]["data"]["chat_template"] == "alpaca"
    result = ah.evaluate(alpaca, base=heart.silent, data=alpaca.with_suffix(".jsonl"))
    assert result.loss < 0.1
    assert result.tokens == record["metrics"]["train_tokens"] / 120


@pytest.fixture(scope="module")
def alpaca(heart: ByHeart) -> Path:
    records = [
        {"instruction": "red", "output": "an apple"},
        {"instruction": "add", "input": "2, 2", "output": "four"},
    ]
    by_heart.train(heart.folder, heart.silent, "alpaca", records, "")
    return heart.folder / "alpaca"
