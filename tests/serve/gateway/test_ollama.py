"""Ollama's API in front of an engine that has OpenAI's: requests translated to it, answers translated back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest

from adapterhub.serve.engines import CHAT, COMPLETIONS
from adapterhub.serve.gateway import ollama
from adapterhub.serve.gateway.ollama import CHAT_PATH, GENERATE_PATH, TranslatedReply, Translation
from adapterhub.serve.gateway.openai_errors import ProblemError
from tests.support.serving import Gateway

from .test_gateway import version

TURNS = [{"role": "user", "content": "hi"}]
OPTIONS = {"num_predict": 6, "temperature": 0}


def translation_of(path: str, engine: str = "llama.cpp", **body: Any) -> Translation:
    question = {"messages": TURNS} if path == CHAT_PATH else {"prompt": "hi"}
    return Translation(path, {"model": "team/a", **question, **body}, engine, 4096)


# ---- requests


def test_a_chat_streams_unless_it_says_otherwise() -> None:
    translation = translation_of(CHAT_PATH)
    assert (translation.path, translation.body["messages"]) == (CHAT, TURNS)
    assert (translation.body["stream"], translation.body["stream_options"]) == (True, {"include_usage": True})
    assert translation_of(CHAT_PATH, stream=False).body["stream"] is False


def test_a_generation_is_a_chat_of_one_turn_unless_it_is_raw() -> None:
    translation = translation_of(GENERATE_PATH, system="be brief")
    assert (translation.path, translation.body["messages"]) == (CHAT, [{"role": "system", "content": "be brief"}, *TURNS])
    raw = translation_of(GENERATE_PATH, raw=True)
    assert (raw.path, raw.body["prompt"]) == (COMPLETIONS, "hi")


def test_options_have_the_names_of_the_engine() -> None:
    options = {"num_predict": 3, "seed": 7, "stop": ["x"], "repeat_penalty": 1.1, "top_k": 4, "num_ctx": 4096}
    body = translation_of(CHAT_PATH, options=options).body
    expected = {"max_tokens": 3, "seed": 7, "stop": ["x"], "repeat_penalty": 1.1, "top_k": 4}
    assert {name: value for name, value in body.items() if name in expected} == expected
    assert translation_of(CHAT_PATH, "vllm", options=options).body["repetition_penalty"] == 1.1
    assert "max_tokens" not in translation_of(CHAT_PATH, options={"num_predict": -1}).body
    assert translation_of(CHAT_PATH, options={"mirostat": 1}).body["mirostat"] == 1


def test_forms_of_an_answer_are_those_of_openai() -> None:
    schema = {"type": "object"}
    assert translation_of(CHAT_PATH, format="json").body["response_format"] == {"type": "json_object"}
    assert translation_of(CHAT_PATH, format=schema).body["response_format"]["json_schema"]["schema"] == schema
    assert translation_of(CHAT_PATH, think=False).body["chat_template_kwargs"] == {"enable_thinking": False}
    assert translation_of(CHAT_PATH, think="low").body["reasoning_effort"] == "low"


def test_results_of_tools_refer_to_their_calls() -> None:
    calls = [{"function": {"name": name, "arguments": {"city": "Kyiv"}}} for name in ("weather", "time")]
    results = [{"role": "tool", "tool_name": name, "content": name} for name in ("time", "weather")]
    messages = [*TURNS, {"role": "assistant", "tool_calls": calls}, *results]
    _, called, *answered = translation_of(CHAT_PATH, messages=messages, tools=[{"type": "function"}]).body["messages"]
    assert [json.loads(call["function"]["arguments"]) for call in called["tool_calls"]] == [{"city": "Kyiv"}] * 2
    numbers = {call["function"]["name"]: call["id"] for call in called["tool_calls"]}
    assert [message["tool_call_id"] for message in answered] == [numbers["time"], numbers["weather"]]


def test_what_concerns_ollama_itself_is_noted() -> None:
    assert translation_of(CHAT_PATH, keep_alive="5m", options={"num_gpu": 1, "num_thread": 2}).ignored == [
        "keep_alive",
        "num_gpu",
        "num_thread",
    ]


@pytest.mark.parametrize(
    ("path", "extra_fields", "name"),
    [
        (CHAT_PATH, {"lora": []}, ""),
        (CHAT_PATH, {"lora": [{"id": 0}]}, "lora"),
        (CHAT_PATH, {"messages": []}, "messages"),
        (CHAT_PATH, {"messages": ["hi"]}, "messages"),
        (CHAT_PATH, {"messages": [{**TURNS[0], "images": ["aGk="]}]}, "messages"),
        (CHAT_PATH, {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        (CHAT_PATH, {"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages"),
        (CHAT_PATH, {"format": "xml"}, "format"),
        (CHAT_PATH, {"options": []}, "options"),
        (CHAT_PATH, {"options": {"num_ctx": 4097}}, "options.num_ctx"),
        (CHAT_PATH, {"options": {"penalize_newline": True}}, "options.penalize_newline"),
        (GENERATE_PATH, {"prompt": ""}, "prompt"),
        (GENERATE_PATH, {"context": [1]}, "context"),
        (GENERATE_PATH, {"template": "x"}, "template"),
        (GENERATE_PATH, {"suffix": "x"}, "suffix"),
        (GENERATE_PATH, {"raw": True, "system": "x"}, "system"),
        (GENERATE_PATH, {"raw": True, "logprobs": True}, "logprobs"),
    ],
)
def test_what_means_nothing_here_is_refused_by_name(path: str, extra_fields: Mapping[str, Any], name: str) -> None:
    if not name:
        assert translation_of(path, **extra_fields)
        return
    with pytest.raises(ProblemError) as refused:
        translation_of(path, **extra_fields)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "unsupported", name)


# ---- answers


class Sent:
    """A reply that keeps what is sent."""

    def __init__(self) -> None:
        self.status, self.raw, self.headers = 0, b"", {}

    async def send_whole(
        self, status: int, media_type: str, version: str, body: bytes, extra_headers: Mapping[str, str] | None = None
    ) -> None:
        self.status, self.raw, self.headers = status, body, dict(extra_headers or {})

    async def begin(self, version: str, media_type: str = "", extra_headers: Mapping[str, str] | None = None) -> None:
        self.status, self.headers = 200, {"content-type": media_type, **(extra_headers or {})}

    async def send_piece(self, body: bytes) -> None:
        self.raw += body

    async def end(self, body: bytes = b"") -> None:
        self.raw += body


def stream_lines(events: list[Any], *, cut: int = 0, **body: Any) -> list[dict[str, Any]]:
    """The lines for some events."""
    raw = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"

    async def send() -> Sent:
        sent = Sent()
        reply = TranslatedReply(sent, translation_of(CHAT_PATH, **body), clock=iter((1_000, 3_500)).__next__)
        await reply.begin("team/a@sha256:1")
        for piece in (raw[:cut], raw[cut:]):
            await reply.send_piece(piece)
        await reply.end()
        return sent

    return [json.loads(line) for line in asyncio.run(send()).raw.splitlines()]


def event(delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"model": "team/a@sha256:1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {"model": "team/a@sha256:1", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}


def test_a_stream_is_lines_wherever_it_is_cut() -> None:
    events = [
        event({"role": "assistant"}),
        event({"reasoning_content": "hm"}),
        event({"content": "é"}),
        event({}, "length"),
        USAGE,
    ]
    for cut in range(0, 400, 7):
        thought, word, end = stream_lines(events, cut=cut)
        assert (thought["message"]["thinking"], word["message"]["content"]) == ("hm", "é")
        assert {line["model"] for line in (thought, word, end)} == {"team/a@sha256:1"}
        assert [line["done"] for line in (thought, word, end)] == [False, False, True]
        assert (end["done_reason"], end["prompt_eval_count"], end["eval_count"], end["total_duration"]) == (
            "length",
            5,
            2,
            2_500,
        )


def test_calls_of_tools_are_whole_with_their_arguments_as_objects() -> None:
    parts = [
        {"index": 0, "id": "1", "function": {"name": "weather", "arguments": '{"ci'}},
        {"index": 0, "function": {"arguments": 'ty": 1}'}},
    ]
    calls, end = stream_lines([*(event({"tool_calls": [part]}) for part in parts), event({}, "tool_calls")])
    assert calls["message"]["tool_calls"] == [{"function": {"name": "weather", "arguments": {"city": 1}}}]
    assert (calls["done"], end["done"], end["done_reason"]) == (False, True, "stop")
    with pytest.raises(ProblemError, match="not valid JSON"):
        stream_lines([event({"tool_calls": [parts[0]]})])


def test_an_error_of_the_engine_in_a_stream_is_one_of_ollamas() -> None:
    error, _ = stream_lines([{"error": {"message": "it broke"}}])
    assert error == {"error": "it broke"}


# ---- the gateway


@pytest.mark.peer
def test_answers_are_those_of_the_engine_with_the_version(gateway: Gateway, registry: Any) -> None:
    exact = version(registry, "team/a1")
    chat_request = {"model": "team/a1", "messages": TURNS, "max_tokens": 6, "temperature": 0}
    text = gateway.post("/v1/chat/completions", chat_request).document["choices"][0]["message"]["content"]
    body = {"model": "team/a1", "options": OPTIONS, "keep_alive": 0}
    for path, question in ((CHAT_PATH, {"messages": TURNS}), (GENERATE_PATH, {"prompt": "hi"})):
        whole = gateway.post(path, {**body, **question, "stream": False})
        assert (whole.status, whole.version, whole.document["model"], whole.document["done"]) == (200, exact, exact, True)
        assert whole.headers[ollama.IGNORED_HEADER] == "keep_alive"
        stream = gateway.post(path, {**body, **question})
        assert (stream.headers["content-type"], stream.version) == ("application/x-ndjson", exact)
        lines = [json.loads(line) for line in stream.body.splitlines()]
        texts = [line["message"]["content"] if path == CHAT_PATH else line["response"] for line in [whole.document, *lines]]
        assert texts[0] == "".join(texts[1:]) == text
        assert whole.document["eval_count"] == lines[-1]["eval_count"] > 0


@pytest.mark.peer
@pytest.mark.parametrize("path", [CHAT_PATH, GENERATE_PATH])
def test_a_request_is_recorded_under_the_path_that_its_client_asked_for(gateway: Gateway, path: str) -> None:
    question = {"messages": TURNS} if path == CHAT_PATH else {"prompt": "hi"}
    body = {"model": "team/a0", **question, "options": OPTIONS, "stream": False}
    name = f"asked{path.replace('/', '-')}"
    assert gateway.post(path, body, x_request_id=name).status == 200
    # The line comes after the answer.
    while not (
        lines := [line for line in gateway.log.read_text().splitlines() if f'"id": "{name}"' in line and line[-1] == "}"]
    ):
        time.sleep(0.02)
    line = json.loads(lines[0])
    assert (line["path"], line["status"], line["answer_tokens"] > 0) == (path, 200, True)
    assert f'adapterhub_requests_total{{path="{path}",status="200"' in gateway.get("/metrics").body.decode()


def test_errors_have_ollamas_form(gateway: Gateway) -> None:
    for path, body, status in (
        (CHAT_PATH, {"model": "team/none", "messages": TURNS}, 404),
        (CHAT_PATH, {"model": "team/a0"}, 400),
        ("/api/show", {"model": "team/none"}, 404),
        ("/api/show", {}, 400),
        ("/api/pull", {"model": "team/a0"}, 404),
    ):
        reply = gateway.post(path, body)
        assert reply.status == status
        assert isinstance(reply.document["error"], str)


@pytest.mark.peer
def test_models_are_listed_with_their_digests(gateway: Gateway, registry: Any) -> None:
    listed = {model["name"]: model for model in gateway.get("/api/tags").document["models"]}
    assert listed["team/a1:prod"]["digest"] == version(registry, "team/a1").partition("@sha256:")[2]
    assert listed["base"]["digest"] == ""
    model = gateway.post("/api/show", {"model": "team/a1"})
    assert model.document["model_info"]["adapterhub.version"] == model.version == version(registry, "team/a1")
    assert gateway.get("/api/version").document["version"]
