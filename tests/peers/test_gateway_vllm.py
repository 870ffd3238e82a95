"""vLLM behind the gateway: each request its own version, whatever else is in the batch, and after an end of the engine."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from operator import mul
from pathlib import Path
from typing import Any

import pytest

from adapterhub.http_server.binding import free_port
from adapterhub.operations.local_registry import Registry
from tests.conftest import need_module
from tests.serve.gateway.test_api_forms import events, text_of
from tests.support import serving, vllm
from tests.support.serving import Gateway, Models, Reply

pytestmark = pytest.mark.peer
PROMPTS = [f"{word} of the day: " for word in ("word", "fox", "dog", "jug")]
COUNT = 10
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    return serving.make_models(tmp_path_factory.mktemp("models"), hidden=128, head=32)  # vLLM's smallest head on a CPU


def complete(gateway: Gateway, models: Models, model: str, prompt: str) -> Reply:
    """The likeliest tokens that do not end the answer."""
    completion: dict[str, Any] = {"model": model, "prompt": models.tokens(prompt), "max_tokens": COUNT, "temperature": 0}
    return gateway.post("/v1/completions", {**completion, "logit_bias": serving.BIAS})


def named(number: int | None) -> str:
    return "base" if number is None else f"team/a{number}:prod"


def check(models: Models, reply: Reply, prompt: str, number: int | None) -> None:
    assert reply.status == 200, reply.body
    assert reply.text == models.answer(prompt, number, COUNT)
    assert reply.version == reply.document["model"]
    assert reply.version.startswith("base" if number is None else f"team/a{number}@sha256:")


def test_it_is_started_loads_versions_and_is_started_again(models: Models, tmp_path: Path) -> None:
    serving.registry(tmp_path / "registry", models).close()
    options = ("--engine", "vllm", "--program", vllm.python(), "--max-adapters", 3, "--max-rank", 8, "--", *OPTIONS)
    pairs = [(prompt, number) for prompt in PROMPTS for number in (None, 0, None, 1, 2, None, 3)]
    environ = vllm.environ(tmp_path)
    with serving.gateway(models.base, tmp_path / "registry", tmp_path / "gateway", *options, env=environ) as gateway:
        with ThreadPoolExecutor(8) as pool:  # the base in batches with adapters, four of them on three slots
            replies = [*pool.map(lambda pair: complete(gateway, models, named(pair[1]), pair[0]), pairs * 2)]
        for (prompt, number), reply in zip(pairs * 2, replies, strict=True):
            check(models, reply, prompt, number)
        assert complete(gateway, models, "team/none", "x").status == 404
        for name in ("kv_transfer_params", "vllm_xargs"):
            refused = gateway.post("/v1/completions", {"model": "base", "prompt": "x", name: {}})
            assert (refused.status, refused.document["error"]["param"]) == (400, name)

        _answers_in_every_form(gateway)
        _counts_tokens_and_knows_requests(gateway)
        _moves_a_tag(gateway, models, tmp_path / "registry")

        [server] = gateway.children()
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        [engine] = [pid for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"VLLM::EngineCore")]
        os.kill(int(engine), signal.SIGKILL)  # its server notices, and ends
        while (lost := complete(gateway, models, "team/a0:prod", PROMPTS[0])).status == 200:
            pass
        assert lost.status in (502, 503)
        assert lost.document["error"]["message"]
        while gateway.get("/ready").status != 200:
            time.sleep(0.2)
        for number in (None, 0, 3):
            check(models, complete(gateway, models, named(number), PROMPTS[1]), PROMPTS[1], number)


def _answers_in_every_form(gateway: Gateway) -> None:
    """Responses and messages, as a whole and as streams, have the text of a chat and the name of the version."""
    turns = [{"role": "user", "content": "hi"}]
    response: dict[str, Any] = {"input": "hi", "max_output_tokens": 6, "temperature": 0}
    message: dict[str, Any] = {"messages": turns, "max_tokens": 6, "temperature": 0}
    for name in ("base", "team/a1:prod"):
        chat = gateway.post("/v1/chat/completions", {**message, "model": name})
        text = chat.document["choices"][0]["message"]["content"]
        for path, request in (("/v1/responses", response), ("/v1/messages", message)):
            whole = gateway.post(path, {**request, "model": name})
            assert (whole.status, whole.version) == (200, chat.version), whole.body
            assert (whole.document["model"], text_of(whole.document)) == (chat.version, text)
            stream = gateway.post(path, {**request, "model": name, "stream": True})
            assert (stream.status, stream.version) == (200, chat.version)
            stream_events = events(stream)
            named = [event[key] for event in stream_events for key in ("response", "message") if "model" in event.get(key, {})]
            assert {document["model"] for document in named} == {chat.version}
            assert stream_events[-1]["type"] in ("response.completed", "response.incomplete", "message_stop")
        count = gateway.post("/v1/messages/count_tokens", {"model": name, "messages": turns}).document
        assert count["input_tokens"] == chat.document["usage"]["prompt_tokens"]
        tokens = gateway.post("/tokenize", {"model": name, "prompt": "hi", "add_special_tokens": False}).document["tokens"]
        assert gateway.post("/detokenize", {"model": name, "tokens": tokens}).document["prompt"] == "hi"
    for path, request in (("/v1/score", {"text_1": "a", "text_2": "b"}), ("/v1/responses/input_tokens", {"input": "hi"})):
        missing = gateway.post(path, {**request, "model": "base"})
        assert (missing.status, missing.document["error"]["code"]) == (404, "unsupported"), missing.body
    refused = gateway.post("/v1/responses", {**response, "model": "base", "previous_response_id": "resp_1"})
    assert (refused.status, refused.document["error"]["param"]) == (400, "previous_response_id")


def _counts_tokens_and_knows_requests(gateway: Gateway) -> None:
    """The second of two equal prompts comes from vLLM's cache, whose blocks have 128 tokens on a CPU."""
    body = {"model": "team/a1:prod", "prompt": [7] * 200, "max_tokens": 3, "ignore_eos": True, "stream": True}
    for number in range(2):
        name = f"request-of-ada-{number}"
        reply = gateway.post("/v1/completions", body, x_request_id=name)
        assert reply.status == 200
        assert b"usage" not in reply.body
        assert f'"id":"cmpl-{name}"' in reply.body.decode().replace(": ", ":")
        line = ""
        while f'"id": "{name}"' not in line:
            line = next((line for line in gateway.log.read_text().splitlines() if f'"id": "{name}"' in line), "")
        fields = json.loads(line)
        counts = [fields[kind] for kind in ("prompt_tokens", "cached_tokens", "answer_tokens", "estimated")]
        assert counts == [200, 128 * number, 3, False]


def _moves_a_tag(gateway: Gateway, models: Models, registry: Path) -> None:
    """Every answer is of exactly the version that it names, while a tag moves under 50 requests."""
    digests = {}
    with Registry(registry) as opened:
        for number in (0, 1):
            opened.push(models.adapter(number), "team/moving")
            digests[f"team/moving@{opened.resolve(f'team/moving:v{number + 1}').digest}"] = number
        opened.tag("team/moving:v1", "live")
    replies: list[Reply] = []

    def ask() -> None:
        while len(replies) < 50:
            replies.append(complete(gateway, models, "team/moving:live", PROMPTS[2]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(replies) < 20:
        time.sleep(0.01)
    with Registry(registry) as opened:
        opened.tag("team/moving:v2", "live")
    after = complete(gateway, models, "team/moving:live", PROMPTS[2])
    for thread in threads:
        thread.join()
    assert digests[after.version] == 1
    for reply in replies:
        assert reply.status == 200, reply.body
        assert reply.text == models.answer(PROMPTS[2], digests[reply.version], COUNT)
    assert {digests[reply.version] for reply in replies} == {0, 1}


def test_one_that_has_the_plugin_finds_versions_itself(models: Models, tmp_path: Path) -> None:
    """The gateway names versions by their digests, and vLLM, which has another cache, resolves these on its own."""
    registry, cache = tmp_path / "registry", tmp_path / "vllm-cache"
    serving.registry(registry, models).close()
    variables = {"ADAPTERHUB_VLLM_ALLOW": "team/*", "ADAPTERHUB_REGISTRY": str(registry), "XDG_CACHE_HOME": str(cache)}
    options = ("--max-model-len", 256, "--max-num-seqs", 8, "--no-skip-tokenizer-init")
    pairs = [(prompt, number) for prompt in PROMPTS for number in (None, 0, 1, None, 2)]
    with vllm.serving(models.base, tmp_path, *options, env={**vllm.with_plugin(tmp_path / "ours"), **variables}) as server:
        engine_options = ("--engine", "vllm", "--engine-url", server.url, "--plugin")
        with serving.gateway(models.base, registry, tmp_path / "gateway", *engine_options) as gateway:
            with ThreadPoolExecutor(8) as pool:
                replies = [*pool.map(lambda pair: complete(gateway, models, named(pair[1]), pair[0]), pairs)]
            for (prompt, number), reply in zip(pairs, replies, strict=True):
                check(models, reply, prompt, number)
            _moves_a_tag(gateway, models, registry)
            assert complete(gateway, models, "team/none", "x").status == 404
    assert len([*cache.glob("adapterhub/served/sha256-*/vllm-*")]) == 3


def test_alone_it_answers_for_the_base_with_adapters(models: Models, tmp_path: Path) -> None:
    """If this fails, vLLM's CPU build is repaired (0.33), and `Vllm` needs no zeros; through the gateway it is right."""
    serving.registry(tmp_path / "registry", models).close()
    pairs = [(prompt, number) for prompt in PROMPTS for number in (None, 0, None, 1, None, 2)] * 2
    lora = [f"a{number}={models.adapter(number)}" for number in range(3)]
    # Requests to the base get the last slot, so all of them must be in use.
    options = ("--max-loras", 3, "--max-cpu-loras", 8, "--no-skip-tokenizer-init", "--lora-modules", *lora)
    environ = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with vllm.serving(models.base, tmp_path, *options, env=environ) as server:

        def alone(pair: tuple[str, int | None]) -> str:
            model = "base" if pair[1] is None else f"a{pair[1]}"
            completion = {"model": model, "prompt": pair[0], "max_tokens": COUNT, "temperature": 0}
            document = server.post("/v1/completions", {**completion, "logit_bias": serving.BIAS})
            text: str = document["choices"][0]["text"]
            return text

        def is_wrong(pair: tuple[str, int | None], text: str) -> bool:
            return pair[1] is None and text != models.answer(*pair, COUNT)

        # Which requests are in a batch together depends on the machine.
        with ThreadPoolExecutor(16) as pool:
            assert any(any(map(is_wrong, pairs, pool.map(alone, pairs))) for _ in range(20))

        engine_options = ("--engine", "vllm", "--engine-url", server.url)
        for _ in range(2):  # the second one finds what the first has told vLLM
            with (
                serving.gateway(models.base, tmp_path / "registry", tmp_path / "gateway", *engine_options) as gateway,
                ThreadPoolExecutor(8) as pool,
            ):
                replies = [*pool.map(lambda pair: complete(gateway, models, named(pair[1]), pair[0]), pairs)]
                for (prompt, number), reply in zip(pairs, replies, strict=True):
                    check(models, reply, prompt, number)


def test_a_server_of_ones_own_that_was_started_again_answers_as_before(models: Models, tmp_path: Path) -> None:
    """It has forgotten all versions by then, the zeros for its base too."""
    serving.registry(tmp_path / "registry", models, 2).close()
    pairs = [(prompt, number) for prompt in PROMPTS for number in (0, None, 1)]
    options = ("--max-loras", 3, "--max-cpu-loras", 8, "--no-skip-tokenizer-init")
    environ, port = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}, free_port()
    words = ("--engine", "vllm", "--engine-url", f"http://127.0.0.1:{port}")
    with ExitStack() as stack:
        gateway: Gateway | None = None
        for _ in range(2):
            with vllm.serving(models.base, tmp_path, *options, env=environ, port=port):
                gateway = gateway or stack.enter_context(
                    serving.gateway(models.base, tmp_path / "registry", tmp_path / "gateway", *words)
                )
                for prompt, number in pairs:
                    check(models, complete(gateway, models, named(number), prompt), prompt, number)
            assert gateway.get("/ready").status == 503


def test_embeddings_are_of_the_version_that_was_asked_for(models: Models, tmp_path: Path) -> None:
    serving.registry(tmp_path / "registry", models, 2).close()
    pooling = ("--runner", "pooling", "--pooler-config", '{"pooling_type": "MEAN"}')
    options = ("--engine", "vllm", "--program", vllm.python(), "--max-adapters", 3, "--max-rank", 8, "--", *OPTIONS, *pooling)
    pairs = [(prompt, number) for number in (None, 0, 1, None, 0) for prompt in PROMPTS]
    environ = vllm.environ(tmp_path)
    with serving.gateway(models.base, tmp_path / "registry", tmp_path / "gateway", *options, env=environ) as gateway:

        def ask(pair: tuple[str, int | None]) -> Reply:
            return gateway.post("/v1/embeddings", {"model": named(pair[1]), "input": models.tokens(pair[0])})

        with ThreadPoolExecutor(8) as pool:
            replies = [*pool.map(ask, pairs)]
        for (prompt, number), reply in zip(pairs, replies, strict=True):
            assert reply.status == 200, reply.body
            assert reply.version == reply.document["model"]
            assert reply.version.startswith("base" if number is None else f"team/a{number}@sha256:")
            assert reply.document["data"][0]["embedding"] == pytest.approx(models.embedding(prompt, number), abs=1e-4)
        _scores_by_the_embeddings_of_a_version(gateway, models)
        refused = complete(gateway, models, "base", "x")
        assert refused.status in (400, 404), refused.body


def _scores_by_the_embeddings_of_a_version(gateway: Gateway, models: Models) -> None:
    """A score is the cosine of two embeddings; of other models than those for embeddings, vLLM has scores of their own."""
    query, *texts = PROMPTS
    for number in (None, 1, 0):
        of_query, *of_texts = (models.embedding(text, number) for text in PROMPTS)
        cosines = [sum(map(mul, of_query, of_text)) for of_text in of_texts]
        scored = gateway.post("/v1/score", {"model": named(number), "text_1": query, "text_2": texts})
        ranked = gateway.post("/v1/rerank", {"model": named(number), "query": query, "documents": texts})
        for reply in (scored, ranked):
            assert (reply.status, reply.version) == (200, reply.document["model"]), reply.body
            assert reply.version.startswith("base" if number is None else f"team/a{number}@sha256:")
        assert [row["score"] for row in scored.document["data"]] == pytest.approx(cosines, abs=1e-4)
        results = ranked.document["results"]
        assert [row["relevance_score"] for row in results] == pytest.approx(sorted(cosines, reverse=True), abs=1e-4)
        assert [row["document"]["text"] for row in results] == [texts[row["index"]] for row in results]
