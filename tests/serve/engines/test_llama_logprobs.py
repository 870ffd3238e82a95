"""Probabilities of completions by llama-server are in the form that OpenAI's clients know."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from adapterhub.serve.engines import COMPLETIONS, EngineAnswer, llama_logprobs
from tests.support.serving import Gateway, Models


def logprobs(gateway: Gateway, count: int, **more: Any) -> tuple[str, dict[str, list[Any]]]:
    """The text of an answer, and its probabilities."""
    reply = gateway.complete("team/a1", "the quick brown ", logprobs=count, **more)
    assert reply.status == 200, reply.body
    if not more.get("stream"):
        [choice] = reply.document["choices"]
        return choice["text"], choice["logprobs"]
    lines = [line[6:] for line in reply.body.decode().split("\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    joined = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    return "".join(choice["text"] for choice in choices), joined


@pytest.mark.peer
def test_each_token_has_its_probability_those_of_the_most_probable_and_its_place(gateway: Gateway, models: Models) -> None:
    text, found = logprobs(gateway, 3)
    assert text == models.answer("the quick brown ", 1)
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert "".join(found["tokens"]) == text
    assert found["text_offset"] == [len("".join(found["tokens"][:index])) for index in range(len(found["tokens"]))]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert logprob < 0
        assert top[token] == logprob
        assert len(top) in (3, 4)  # the chosen one may be another, because special tokens are forbidden
    streamed_text, streamed = logprobs(gateway, 3, stream=True)
    assert (streamed_text, streamed["tokens"], streamed["text_offset"]) == (text, found["tokens"], found["text_offset"])
    assert streamed["token_logprobs"] == pytest.approx(found["token_logprobs"], abs=1e-4)


@pytest.mark.peer
def test_none_beside_the_chosen_one_can_be_asked_for(gateway: Gateway) -> None:
    _, found = logprobs(gateway, 0)
    assert [[*top] for top in found["top_logprobs"]] == [[token] for token in found["tokens"]]


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def converted(raw: bytes, kind: str, cut: int) -> bytes:
    async def all_of() -> bytes:
        answer = EngineAnswer(200, kind, pieces(raw[:cut], raw[cut:]))
        found = llama_logprobs.in_openais_form(answer, COMPLETIONS, {"logprobs": 1})
        return b"".join([piece async for piece in found.body])

    return asyncio.run(all_of())


def test_parts_of_a_character_are_written_as_bytes_and_lines_may_be_cut_anywhere() -> None:
    entry = {
        "token": "\ufffd",
        "bytes": [226, 130],
        "logprob": -1.0,
        "top_logprobs": [{"token": "a", "bytes": [97], "logprob": -0.5}],
    }
    event = b"data: " + json.dumps({"choices": [{"index": 0, "text": "", "logprobs": {"content": [entry]}}]}).encode()
    raw = event + b"\n\ndata: [DONE]\n\n"
    whole = converted(raw, "text/event-stream", 0)
    first, _, end, *_ = whole.split(b"\n")
    found = json.loads(first[6:])["choices"][0]["logprobs"]
    assert (found["tokens"], found["token_logprobs"], found["text_offset"]) == (["bytes:\\xe2\\x82"], [-1.0], [0])
    assert found["top_logprobs"] == [{"a": -0.5, "bytes:\\xe2\\x82": -1.0}]
    assert end == b"data: [DONE]"
    assert all(converted(raw, "text/event-stream", cut) == whole for cut in range(len(raw)))


@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"choices": 1}', b'{"choices": [{"logprobs": {"content": [{}]}}]}'])
def test_what_has_another_form_is_left_as_it_is(raw: bytes) -> None:
    assert converted(raw, "application/json", 1) == raw
