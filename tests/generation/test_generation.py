"""Text with and without an adapter: peft's own logits in torch, llama.cpp's own in a GGUF, and the loop over both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import adapterhub as ah  # noqa: E402
from adapterhub.generation import Prompt, torch_engine  # noqa: E402
from adapterhub.generation.sampling import Sampler  # noqa: E402
from adapterhub.training.events import InitialAdapter  # noqa: E402
from adapterhub_converters.containers import gguf_output  # noqa: E402
from adapterhub_converters.containers.gguf_types import (  # noqa: E402
    MetadataValue,
    bool_value,
    string_value,
    strings_value,
)
from adapterhub_converters.errors import FormatError, MissingExtraError, ParameterError, RefusedError  # noqa: E402
from tests.conftest import Run, need_module, need_smollm2  # noqa: E402
from tests.support import llama_cpp, tiny  # noqa: E402
from tests.support.byte_tokenizer import write_tokenizer  # noqa: E402
from tests.support.hub_models import cached  # noqa: E402
from tests.support.images import kohya_file  # noqa: E402
from tests.training.conftest import tiny_base  # noqa: E402, F401

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "pattern": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 3}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def peft_adapter(base: Path, path: Path, **config: Any) -> Any:
    """A random adapter that peft itself saved, and peft's model."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    peft_model = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft_model.save_pretrained(path)
    return peft_model.eval()


def initial_of(path: Path) -> InitialAdapter:
    return InitialAdapter(path / "adapter_model.safetensors" if path.is_file() else path, path, "sha256:" + "0" * 64, str(path))


@pytest.fixture(scope="module")
def float_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The tiny base in float32, where differences are those of the arithmetic alone."""
    folder = tmp_path_factory.mktemp("float") / "base"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft_with_and_without_the_adapter(float_base: Path, tmp_path: Path, kind: str) -> None:
    theirs = peft_adapter(float_base, tmp_path / "sql", **KINDS[kind])
    ids = [5, 80, 90, 100, 12, 33, 47]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        with theirs.disable_adapter():
            alone = theirs(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(expected - alone).max() > 0.1
    with torch_engine.open_engine(initial_of(tmp_path / "sql"), float_base) as engine:
        for adapted, right in ((True, expected), (False, alone)):
            with engine.start_decoding(adapted=adapted, room=16) as logits_after:
                np.testing.assert_allclose(logits_after(ids[:4]), right[3], atol=2e-5)
                for at in range(4, len(ids)):  # one at a time, over the keys and values that were kept
                    np.testing.assert_allclose(logits_after([ids[at]]), right[at], atol=2e-5)


def test_the_same_seed_gives_the_same_answer_and_the_adapter_another_than_the_base(float_base: Path, tmp_path: Path) -> None:
    peft_adapter(float_base, tmp_path / "sql")
    pieces: list[tuple[bool, str]] = []
    options: dict[str, Any] = {"base": float_base, "max_tokens": 12, "temperature": 0.8, "seed": 3}
    generation = ah.generate(tmp_path / "sql", "hello", **options, on_text=lambda on, text: pieces.append((on, text)))
    again = ah.generate(tmp_path / "sql", "hello", **options, compare=False)
    assert generation.text == again.text
    assert generation.text != generation.base_text
    assert again.base_text is None
    assert "".join(text for on, text in pieces if on) == generation.text
    assert "".join(text for on, text in pieces if not on) == generation.base_text
    assert generation.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_greedy_text_is_that_of_transformers(float_base: Path, tmp_path: Path) -> None:
    theirs = peft_adapter(float_base, tmp_path / "sql")
    tokenizer = transformers.AutoTokenizer.from_pretrained(float_base)
    ids = tokenizer("abc", return_tensors="pt")
    right = theirs.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    generation = ah.generate(tmp_path / "sql", "abc", base=float_base, raw=True, compare=False, max_tokens=12)
    # A character that is still incomplete at the end is left out.
    assert tokenizer.decode(right, skip_special_tokens=True).rstrip("\ufffd") == generation.text.rstrip("\ufffd")


def test_a_conversation_needs_a_chat_template() -> None:
    earlier = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    prompt = Prompt("c", "s", earlier=earlier)
    assert [message["content"] for message in prompt.messages] == ["s", "a", "b", "c"]
    assert Prompt("c").plain_text("base") == "c"
    with pytest.raises(RefusedError, match="base: has no chat template for a conversation") as error:
        prompt.plain_text("base")
    assert error.value.code == "no-chat-template"


def test_a_prompt_that_the_model_cannot_see_whole_or_without_a_token_is_refused(float_base: Path, tmp_path: Path) -> None:
    peft_adapter(float_base, tmp_path / "sql")
    with pytest.raises(
        RefusedError, match=r"the prompt has \d+ tokens and the answer may have 100, but the model sees 256"
    ) as refused:
        ah.generate(tmp_path / "sql", "x" * 250, base=float_base, max_tokens=100)
    assert (refused.value.code, refused.value.hint) == ("too-long", "Ask for fewer tokens, or shorten the prompt")
    with pytest.raises(RefusedError, match="base: the prompt has no token to continue"):
        ah.generate(tmp_path / "sql", "", base=float_base, raw=True)


def test_an_adapter_without_low_rank_factors_is_refused(tmp_path: Path) -> None:
    peft, model = pytest.importorskip("peft"), tiny.model()
    model.save_pretrained(tmp_path / "base")
    config = peft.TrainableTokensConfig(token_indices=[5, 7], target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "rows")
    with pytest.raises(RefusedError, match="rows: has no low-rank factors, and no other kind of adapter can be run"):
        ah.generate(tmp_path / "rows", "hello", base=tmp_path / "base")


def test_a_chat_template_that_never_ends_is_stopped(float_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterhub.prompts import chat_template

    monkeypatch.setattr(chat_template, "SECONDS", 1)
    peft_adapter(float_base, tmp_path / "sql")
    config = json.loads((float_base / "tokenizer_config.json").read_text())
    endless = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
    hostile = tmp_path / "base"
    hostile.mkdir()
    for file in float_base.iterdir():
        (hostile / file.name).write_bytes(file.read_bytes())
    (hostile / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": endless}))
    with pytest.raises(ah.AdapterhubError, match="exceeds"):
        ah.generate(tmp_path / "sql", "hello", base=hostile, max_tokens=2)


def test_a_draw_follows_the_shares_of_the_tokens() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    sampler = Sampler(1.0, 0)
    drawn = np.bincount([sampler.token(logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, [0.1, 0.6, 0.3], atol=0.03)
    assert Sampler(0, 0).token(logits) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-3])
def test_the_smallest_temperatures_leave_the_likeliest_token_alone(temperature: float) -> None:
    logits = np.array([-1e4, 3, 2, -5], np.float32)
    assert {Sampler(temperature, seed, top_p).token(logits) for seed in range(20) for top_p in (0.5, 1)} == {1}


def test_a_draw_with_top_p_takes_the_fewest_likeliest_tokens_that_reach_it() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))

    def drawn(top_p: float) -> list[int]:
        sampler = Sampler(1.0, 0, top_p)
        return np.bincount([sampler.token(logits) for _ in range(2000)], minlength=3).tolist()

    assert [count > 0 for count in drawn(0.95)] == [True, True, True]
    assert [count > 0 for count in drawn(0.7)] == [False, True, True]
    np.testing.assert_allclose(np.array(drawn(0.7)) / 2000, [0, 2 / 3, 1 / 3], atol=0.04)
    for least in (0.6, 0.1, 0.0):
        assert drawn(least) == [0, 2000, 0]


# ---- llama.cpp


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """A real model: SmolLM2-135M-Instruct in a package."""
    need_module("llama_cpp_py_sync")
    return need_smollm2()


def smollm2_adapter(path: Path) -> Path:
    from tests.support.folders import adapter, pairs

    shapes = pairs(30, module="model.layers.{}.self_attn.q_proj", size=(576, 576))
    return adapter(path, shapes, lambda _, array: 0.3 * array, lora_alpha=4)


def test_a_real_model_answers_in_llama_cpp_with_and_without_the_adapter(run: Run, smollm2: Path, tmp_path: Path) -> None:
    smollm2_adapter(tmp_path / "sql")
    question = ("What is the capital of France? Answer in one word.", "--base", smollm2, "--max-tokens", 8)
    document = json.loads(run("run", "sql", *question, "--json").stdout)
    assert document["engine"] == "llama.cpp"
    assert "Paris" in document["base_text"]
    assert document["text"] != document["base_text"]
    assert document["prompt"].endswith("<|im_start|>assistant\n")
    run("convert", "sql", "sql.gguf", "--to", "gguf", "--base", smollm2)
    assert json.loads(run("run", "sql.gguf", *question, "--json", "--no-base").stdout)["text"] == document["text"]
    stdout = run("run", "sql", *question).stdout
    assert stdout == f"with the adapter:\n{document['text']}\n\nbase alone:\n{document['base_text']}\n"


def test_a_library_that_this_machine_cannot_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterhub.generation.llama_cpp import load_library

    bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings")
    monkeypatch.setattr(bindings, "_lib", None)
    monkeypatch.setattr(bindings, "_find_library", lambda: "libnone.so.1")
    with pytest.raises(MissingExtraError, match=r"but cannot be loaded \(.*libnone.so.1.*\)\. Install a build of it"):
        load_library()


def test_an_adapter_of_another_model_is_refused(run: Run, smollm2: Path, tmp_path: Path) -> None:
    from tests.support.folders import adapter, pairs

    adapter(tmp_path / "other", pairs(2))
    result = run("run", "other", "hello", "--base", smollm2, code=6)
    assert result.stderr.count("error:") == 1


SPOKEN = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]


def spoken(path: Path, *, name: str = "LlamaForCausalLM", **tokenizer: MetadataValue) -> Path:
    """A tiny GGUF of a SentencePiece vocabulary in which a space has no piece."""
    need_module("llama_cpp_py_sync")
    words: dict[str, MetadataValue] = {
        "model": string_value("llama"),
        "tokens": strings_value(SPOKEN),
        "scores": MetadataValue("[FLOAT32]", [0.0] * len(SPOKEN)),
        "token_type": MetadataValue("[INT32]", [2, 3, 3, *[6] * 256, 1]),
    }
    return tiny.write_gguf(tiny.model(name, vocab_size=len(SPOKEN)), path, **(words | tokenizer))


def test_a_prompt_may_have_more_tokens_than_bytes(tmp_path: Path) -> None:
    with llama_cpp.opened(spoken(tmp_path / "m.gguf")) as engine:
        assert len(engine.tokens(" " * 20, raw=True)) == 1 + 3 * 21


def test_a_gguf_without_a_tokenizer_or_of_an_encoder_is_refused_and_not_answered_with_nothing(tmp_path: Path) -> None:
    need_module("llama_cpp_py_sync")
    says = "mute.gguf: contains no tokenizer. Convert the model again, from a folder with tokenizer.json"
    mute = tiny.write_gguf(tiny.model(), tmp_path / "mute.gguf")
    with llama_cpp.opened(mute) as engine, pytest.raises(RefusedError, match=says):
        engine.tokens("hello", raw=True)
    gguf_output.write(
        tmp_path / "bert.gguf", {"general.architecture": string_value("bert"), "bert.attention.causal": bool_value(False)}, {}
    )
    says = "bert.gguf: is an encoder, which computes embeddings and no text. Name a model that generates text"
    with pytest.raises(RefusedError, match=says), llama_cpp.opened(tmp_path / "bert.gguf"):
        pass


def test_what_llama_cpp_cannot_load_is_one_line_with_its_reason(tmp_path: Path) -> None:
    need_module("llama_cpp_py_sync")
    gguf_output.write(tmp_path / "odd.gguf", {"general.architecture": string_value("nonsense")}, {})
    with pytest.raises(FormatError) as caught, llama_cpp.opened(tmp_path / "odd.gguf"):
        pass
    assert f"{tmp_path}/odd.gguf: llama.cpp cannot load it (" in str(caught.value)
    assert "unknown model architecture: 'nonsense'" in str(caught.value)


def test_what_llama_cpp_cannot_compute_is_one_line_with_its_reason(tmp_path: Path) -> None:
    with llama_cpp.opened(spoken(tmp_path / "m.gguf")) as engine:
        says = r"llama.cpp cannot compute the next token \(decode: failed to .+\)"
        with engine.start_decoding(adapted=False, room=8) as logits_after, pytest.raises(RefusedError, match=says):
            logits_after([len(SPOKEN)])


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited")
def test_a_context_that_needs_more_memory_than_there_is_is_refused(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with llama_cpp.opened(spoken(tmp_path / "m.gguf")) as engine:
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
        try:
            says = r"llama.cpp cannot make a context of 1,000,000,000 tokens \(.+\). Ask for fewer tokens"
            with pytest.raises(RefusedError, match=says), engine.start_decoding(adapted=False, room=10**9):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


# ---- the command


def test_a_prompt_comes_from_a_file_or_is_an_argument_and_not_both(run: Run, float_base: Path, tmp_path: Path) -> None:
    peft_adapter(float_base, tmp_path / "sql")
    (tmp_path / "question.txt").write_text("hello\n")
    shared = ("--base", float_base, "--max-tokens", 4, "--json")
    by_file = json.loads(run("run", "sql", "--prompt-file", "question.txt", *shared).stdout)
    by_argument = json.loads(run("run", "sql", "hello", *shared, "--no-base").stdout)
    assert (by_file["prompt"], by_file["text"]) == (by_argument["prompt"], by_argument["text"])
    assert by_argument["base_text"] is None
    assert "is an argument already" in run("run", "sql", "hello", "--prompt-file", "question.txt", *shared, code=2).stderr
    error = "error: --system: a raw prompt has no system message. Put it into the prompt  [invalid-parameter]\n"
    assert run("run", "sql", "hello", "--raw", "--system", "x", *shared, code=2).stderr == error


def test_without_a_base_the_one_that_the_adapter_records_is_found(run: Run, float_base: Path, tmp_path: Path) -> None:
    peft_adapter(float_base, tmp_path / "sql")
    config = json.loads((tmp_path / "sql/adapter_config.json").read_text())
    arguments, hub_env = ("run", "sql", "hello", "--max-tokens", 4, "--json"), {"HF_HUB_CACHE": str(tmp_path / "hub")}
    assert "Pass --base with its folder" in run(*arguments, env=hub_env, code=2).stderr  # a path means nothing elsewhere
    weights = ("run", "sql/adapter_model.safetensors", *arguments[2:])
    assert "Pass --base with its folder" in run(*weights, env=hub_env, code=2).stderr  # also by the file: it is no base
    (tmp_path / "sql/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/tiny"}))
    assert "org/tiny: no such file or folder" in run(*arguments, env=hub_env, code=3).stderr
    cached(tmp_path / "hub", "org/tiny", float_base)
    result = run(*arguments, env=hub_env)
    assert result.stderr.startswith("base: org/tiny, which the adapter records\n")
    by_name = json.loads(result.stdout)
    assert by_name["base"] == "org/tiny"
    assert by_name["text"] == json.loads(run(*arguments, "--base", float_base).stdout)["text"]


def test_an_adapter_of_an_image_model_is_called_one_before_a_base_is_asked_for(run: Run, tmp_path: Path) -> None:
    kohya_file(tmp_path / "style.safetensors", {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (16, 16)})
    error = run("run", "style.safetensors", "a cat", code=6).stderr
    assert "style.safetensors: is an adapter of SDXL, an image model. " in error
    assert error.endswith("  [refused]\n")


def test_a_base_alone_answers_what_it_answers_beside_an_adapter(run: Run, float_base: Path, tmp_path: Path) -> None:
    peft_adapter(float_base, tmp_path / "sql")
    shared = ("hello", "--max-tokens", 4)
    beside = json.loads(run("run", "sql", *shared, "--base", float_base, "--json").stdout)
    alone = json.loads(run("run", float_base, *shared, "--json").stdout)
    assert (alone["text"], alone["prompt"]) == (beside["base_text"], beside["prompt"])
    assert (alone["source"], alone["base"], alone["base_text"]) == (None, str(float_base), None)
    assert alone["tokens"] > 0
    assert "alone:" not in run("run", float_base, *shared).stdout
    refused = run("run", float_base, *shared, "--no-base", code=2).stderr
    assert refused == f"error: --no-base: {float_base} is a base, and no adapter is named. Leave it out  [invalid-usage]\n"
    with pytest.raises(ParameterError, match="is needed without an adapter"):
        ah.generate(None, "hello")


def test_a_base_alone_answers_in_llama_cpp(run: Run, smollm2: Path) -> None:
    question = ("What is the capital of France? Answer in one word.", "--max-tokens", 8)
    document = json.loads(run("run", smollm2, *question, "--json").stdout)
    assert (document["engine"], document["source"]) == ("llama.cpp", None)
    assert "Paris" in document["text"]
