"""llama.cpp's library behind the gateway, where there is no llama-server: a context for each request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.engines import libllama
from adapterhub.serve.torch_engine import Request
from adapterhub_converters.errors import NotFoundError, RefusedError, StoppedError
from tests.conftest import Run, need_module
from tests.support import serving
from tests.support.serving import Gateway, Models, Reply

PROMPTS = [f"{word} of the day: " for word in ("word", "fox", "jug", "zebra")]
LONG = "the quick brown fox jumps over the lazy dog; " * 8  # more than a chunk


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    need_module("llama_cpp_py_sync")


@pytest.fixture(scope="module")
def gateway(models: Models, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    options = ("--engine", "llama.cpp", "--max-adapters", 3)
    with serving.gateway(models.gguf, registry, folder, *options, env={"PATH": str(folder)}) as running_gateway:
        yield running_gateway


def complete(gateway: Gateway, model: str, prompt: str, **fields: Any) -> Reply:
    return gateway.post(
        "/v1/completions",
        {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logit_bias": serving.BIAS, **fields},
    )


def test_prompts_and_versions_interleaved(gateway: Gateway, models: Models) -> None:
    """Four versions of which three are in memory; a prompt again after another version's."""
    pairs = [(prompt, number) for prompt in (*PROMPTS, LONG) for number in (None, 0, 1, None, 2, 3, 0)]

    def ask(pair: tuple[str, int | None]) -> Reply:
        return complete(gateway, "base" if pair[1] is None else f"team/a{pair[1]}:prod", pair[0])

    with ThreadPoolExecutor(6) as pool:
        for (prompt, number), reply in zip(pairs, pool.map(ask, pairs), strict=True):
            assert reply.status == 200, reply.body
            assert reply.text == models.answer(prompt, number)
            assert reply.version.startswith("base" if number is None else f"team/a{number}@sha256:")
    assert "llama-server is not installed: llama.cpp's library answers in this process" in gateway.log.read_text()
    assert gateway.children() == []


def test_what_needs_a_grammar_or_every_token_s_numbers_is_refused_by_name(gateway: Gateway) -> None:
    talk = {"model": "team/a0", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    tools = [{"type": "function", "function": {"name": "f"}}]
    for fields in ({"response_format": {"type": "json_object"}}, {"tools": tools}):
        reply = gateway.post("/v1/chat/completions", {**talk, **fields})
        assert reply.status == 400
        assert f"{next(iter(fields))}: is not supported by this engine" in reply.document["error"]["message"]
    assert gateway.post("/v1/chat/completions", {**talk, "tools": tools, "tool_choice": "none"}).status == 200
    assert "`echo` is ignored by llama.cpp" in complete(gateway, "team/a0", "x", echo=True).document["error"]["message"]


def test_a_blend_and_a_stream_and_a_conversation(gateway: Gateway, models: Models) -> None:
    [prompt, *_] = PROMPTS
    assert complete(gateway, "team/a0*1+team/a1*0", prompt).text == models.answer(prompt, 0)
    half = complete(gateway, "team/a0*0.5+team/a1*0.5", prompt)
    assert half.text not in [models.answer(prompt, number) for number in (None, 0, 1)]
    lines = complete(gateway, "team/a1", prompt, stream=True).body.decode().split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == models.answer(prompt, 1)
    talk = {"model": "team/a0", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    talk["logit_bias"] = serving.BIAS
    content = gateway.post("/v1/chat/completions", talk).document["choices"][0]["message"]["content"]
    heard = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert content == models.answer(heard, 0, 8)


@pytest.mark.parametrize(
    ("extra_fields", "status", "param"),
    [
        ({"prompt": "x" * 5000}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"logit_bias": {"10000": 3}}, 400, "logit_bias"),
        ({"prompt": [10_000]}, 400, "prompt"),
    ],
)
def test_what_it_cannot_answer_is_named(gateway: Gateway, extra_fields: dict[str, Any], status: int, param: str) -> None:
    reply = complete(gateway, "base", **{"prompt": "x", **extra_fields})
    assert (reply.status, reply.document["error"]["param"]) == (status, param)


def test_options_of_a_program_that_is_not_there_are_refused(run: Run, models: Models, registry: Path, tmp_path: Path) -> None:
    words = ("serve", models.gguf, "--registry", registry, "--engine", "llama.cpp", "--port", 0, "--", "--embeddings")
    assert "is for llama-server, which is not installed" in run(*words, code=2, env={"PATH": str(tmp_path)}).stderr


def test_a_version_that_was_dropped_stays_for_those_who_use_it(models: Models, tmp_path: Path) -> None:
    import adapterhub as ah

    ah.convert(models.adapter(0), tmp_path / "a0.gguf", to="gguf", base=models.gguf)
    with libllama.open_libllama(models.gguf, waiting=8) as host:
        host.load("a0", tmp_path / "a0.gguf")
        request = Request(models.tokens(PROMPTS[0]), (("a0", 1.0),), 12, bias=((0, -100.0), (1, -100.0), (2, -100.0)))
        streams = [host.submit(request) for _ in range(6)]
        host.drop("a0")
        with pytest.raises(NotFoundError):
            host.submit(request)
        for stream in streams:
            assert "".join(piece.text for piece in stream) == models.answer(PROMPTS[0], 0)
        with pytest.raises(RefusedError) as caught:
            host.load("a1", models.gguf)
        assert f"a1: llama.cpp cannot load it on {models.gguf} (" in str(caught.value)
        pieces = host.submit(replace(request, blend=(), max_tokens=2000))
    with pytest.raises(StoppedError) as stopped:
        list(pieces)
    assert str(stopped.value) == "the host was closed"
