"""An adapter is asked as it was trained: by its own chat template, with its options and date, wherever it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.operations.workspace import Workspace
from adapterhub.serve import resolving
from adapterhub.serve.conversation import Conversation
from adapterhub.serve.engines import Engine, in_process
from adapterhub.serve.gateway.gateway import Gateway
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub_converters import bases
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.trained_prompt import TrainedPrompt
from tests.conftest import need_module
from tests.support import by_heart, llama_server, serving
from tests.support.by_heart import OWN, PLAIN, TOKENS, ByHeart

CHAT = "/v1/chat/completions"
PAIRS = [(name, question, answer) for name, answers in (("own", OWN), ("plain", PLAIN)) for question, answer in answers.items()]


@pytest.fixture(scope="module")
def heart(tmp_path_factory: pytest.TempPathFactory) -> ByHeart:
    return by_heart.learn(tmp_path_factory.mktemp("heart"))


@pytest.fixture(scope="module")
def registry(heart: ByHeart) -> Path:
    heart.push(heart.folder / "registry")
    return heart.folder / "registry"


# ---- in the gateway's own process


def open_engine(heart: ByHeart, kind: str) -> tuple[Engine, Path]:
    base = heart.folder / kind.partition(" on ")[2]
    if base.suffix == ".gguf":
        need_module("llama_cpp_py_sync")
        return in_process.libllama(base, max_adapters=4), base
    return in_process.torch_host(base, slots=4), base


@pytest.mark.parametrize("kind", ["torch on base", "torch on silent", "llama.cpp on base.gguf", "llama.cpp on silent.gguf"])
def test_two_in_one_chat_are_each_asked_as_they_were_trained(heart: ByHeart, registry: Path, tmp_path: Path, kind: str) -> None:
    engine, base = open_engine(heart, kind)
    other_refs = ["team/plain"] if base.stem == "base" else []  # a base without a template has none for it

    async def talk(gateway: Gateway) -> None:
        for question, answer in OWN.items():
            talk = Conversation(gateway, ["team/own", *other_refs], options={"max_tokens": TOKENS, "temperature": 0.0})
            assert [reply.text for reply in await talk.ask(question)] == [answer, PLAIN[question]][: 1 + len(other_refs)]
        if other_refs:
            mixed = Conversation(gateway, ["team/own*0.5+team/plain*0.5"], options={"max_tokens": TOKENS})
            with pytest.raises(
                RefusedError, match="a blend of versions that were trained with different chat templates"
            ) as error:
                await mixed.ask("red")
            assert error.value.code == "mixed-chat-templates"
        else:
            with pytest.raises(RefusedError, match="cannot be rendered: the base has no chat template"):
                await Conversation(gateway, ["base"], options={"max_tokens": TOKENS}).ask("red")

    with asyncio.Runner() as runner:
        workspace = Workspace(registry=registry, cache=tmp_path / "cache")
        gateway = Gateway(GatewaySettings(base=bases.read_base(base), base_name="base", workspace=workspace), engine)
        try:
            runner.run(gateway.start())
            runner.run(talk(gateway))
        finally:
            runner.run(gateway.close())


# ---- over HTTP


@contextmanager
def serve(heart: ByHeart, registry: Path, folder: Path, base: Path, *options: object) -> Iterator[serving.Gateway]:
    with serving.gateway(base, registry, folder / "gateway", *options) as gateway:
        yield gateway


def ask(gateway: serving.Gateway, model: str, question: str, **fields: Any) -> serving.Reply:
    turns = [{"role": "user", "content": question}]
    return gateway.post(CHAT, {"model": model, "messages": turns, "temperature": 0, "max_tokens": TOKENS, **fields})


def content(reply: serving.Reply) -> str:
    assert reply.status == 200, reply.body
    text: str = reply.document["choices"][0]["message"]["content"]
    return text


def check_batch(gateway: serving.Gateway) -> None:
    """Requests at the same time get their own prompts."""
    with ThreadPoolExecutor(6) as pool:
        replies = [*pool.map(lambda pair: ask(gateway, f"team/{pair[0]}", pair[1]), PAIRS)]
    assert [content(reply) for reply in replies] == [answer for _, _, answer in PAIRS]


def test_torch_asks_each_version_as_it_was_trained(heart: ByHeart, registry: Path, tmp_path: Path) -> None:
    with serve(heart, registry, tmp_path, heart.base, "--engine", "torch") as gateway:
        check_batch(gateway)
        assert content(ask(gateway, "team/own", "red", chat_template_kwargs={"mood": "wild"})) != OWN["red"]
        assert content(ask(gateway, "team/own", "red", chat_template_kwargs={"mood": "calm;#"})) == OWN["red"]
        refused = ask(gateway, "team/own", "red", chat_template_kwargs=["mood"])
        assert (refused.status, refused.document["error"]["param"]) == (400, "chat_template_kwargs")


@pytest.mark.peer
def test_llama_server_asks_each_version_as_it_was_trained(heart: ByHeart, registry: Path, tmp_path: Path) -> None:
    with serve(heart, registry, tmp_path, heart.gguf, "--program", llama_server.program()) as gateway:
        check_batch(gateway)
        alone = ask(gateway, "base", "red").document["usage"]["prompt_tokens"]
        assert alone == ask(gateway, "team/plain", "red").document["usage"]["prompt_tokens"]
        assert content(ask(gateway, "team/own", "red", chat_template_kwargs={"mood": "wild"})) != OWN["red"]
        _keeps_every_feature(gateway)


def _keeps_every_feature(gateway: serving.Gateway) -> None:
    with_logprobs = ask(gateway, "team/own", "red", logprobs=True, top_logprobs=2).document["choices"][0]
    assert "".join(entry["token"] for entry in with_logprobs["logprobs"]["content"]).startswith(OWN["red"])
    stream = ask(gateway, "team/own", "red", stream=True).body.decode().splitlines()
    events = [json.loads(line[6:]) for line in stream if line.startswith("data: {")]
    deltas = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert "".join(deltas) == OWN["red"]
    shape = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {**shape, "additionalProperties": False}}}
    assert content(ask(gateway, "team/own", "red", response_format=form, max_tokens=60)).lstrip().startswith("{")
    message = gateway.post("/v1/messages", {"model": "team/own", "max_tokens": TOKENS, "temperature": 0} | _turns("sky"))
    assert [part["text"] for part in message.document["content"]] == [OWN["sky"]]
    response = gateway.post("/v1/responses", {"model": "team/own", "input": "sky", "temperature": 0})
    assert response.document["output"][-1]["content"][0]["text"] == OWN["sky"]


def _turns(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}]}


@pytest.mark.peer
@pytest.mark.parametrize("base", ["base.gguf", "silent.gguf"])
def test_one_llama_server_for_all_is_told_the_text(heart: ByHeart, registry: Path, tmp_path: Path, base: str) -> None:
    options = ("--program", llama_server.program(), "--one-process")
    with serve(heart, registry, tmp_path, heart.folder / base, *options) as gateway:
        assert content(ask(gateway, "team/plain", "red")) == PLAIN["red"]  # before another one brings its template
        tokens = ask(gateway, "team/plain", "red").document["usage"]["prompt_tokens"]
        check_batch(gateway)
        assert ask(gateway, "team/plain", "red").document["usage"]["prompt_tokens"] == tokens
        assert content(ask(gateway, "team/own", "red", chat_template_kwargs={"mood": "wild"})) != OWN["red"]
        turns = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": OWN["sky"][:3]}]
        reply = gateway.post(CHAT, {"model": "team/own", "messages": turns, "temperature": 0, "max_tokens": TOKENS})
        assert content(reply) in (OWN["sky"], OWN["sky"][3:])
        refused = ask(gateway, "team/own", "red", tools=[{"type": "function", "function": {"name": "look"}}])
        assert (refused.status, refused.document["error"]["code"]) == (400, "own-chat-template")
        assert (
            "has no `tools`. Let the gateway start llama-server with a process for each" in refused.document["error"]["message"]
        )


# ---- what a version records


def test_a_version_records_its_prompt_only_where_it_differs_from_the_base(heart: ByHeart, tmp_path: Path) -> None:
    """Trainers store the template of the base with the adapter."""
    with ah.Registry(tmp_path / "registry") as registry:
        registry.push(heart.own_adapter, "team/own")
    workspace = Workspace(registry=tmp_path / "registry", cache=tmp_path / "cache")
    resolved = resolving.resolve("team/own", runtime="llama.cpp", base=heart.gguf, workspace=workspace)
    assert resolved.prompt == TrainedPrompt(by_heart.TEMPLATE, (("mood", "calm;#"), ("level", 2)), "2026-01-31")
    again = resolving.resolve("team/own", runtime="llama.cpp", base=heart.gguf, workspace=workspace)
    assert again == resolved
    same = tmp_path / "same"
    same.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (same / name).write_bytes((heart.plain / name).read_bytes())
    template = json.loads((heart.base / "tokenizer_config.json").read_text())["chat_template"]
    (same / "chat_template.jinja").write_text(template)
    with ah.Registry(tmp_path / "registry") as registry:
        registry.push(same, "team/same")
    for base in (heart.base, heart.gguf):
        runtime: Any = "peft" if base == heart.base else "llama.cpp"
        assert not resolving.resolve("team/same", runtime=runtime, base=base, workspace=workspace).prompt
    assert resolving.resolve("team/same", runtime="peft", base=heart.silent, workspace=workspace).prompt.template == template
