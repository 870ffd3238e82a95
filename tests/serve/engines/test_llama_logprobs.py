"""Probabilities of completions by llama-server are in the form that OpenAI's clients know."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from adapterhub.serve.engines import COMPLETIONS, EngineAnswer, llama_logprobs
from tests.support.serving import Gateway, Models


def logprobs(gateway: Gateway, count: int, **fields: Any) -> tuple[str, dict[str, list[Any]]]:
    """The text of an answer, and its probabilities."""
    reply = gateway.complete("team/a1", "the quick brown ", logprobs=count, **fields)
    assert reply.status == 200, reply.body
    if not fields.get("stream"):
        [choice] = reply.document["choices"]
        return choice["text"], choice["logprobs"]
    lines = [line[6:] for line in reply.body.decode().split("\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    joined = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    return "".join(choice["text"] for choice in choices), joined


@pytest.mark.peer
def test_each_token_has_its_probability_those_of_the_most_probable_and_its_place(gateway: Gateway, models: Models) -> None:
    text, columns = logprobs(gateway, 3)
    assert text == models.answer("the quick brown ", 1)
    assert set(columns) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert "".join(columns["tokens"]) == text
    assert columns["text_offset"] == [len("".join(columns["tokens"][:index])) for index in range(len(columns["tokens"]))]
    for token, logprob, top in zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True):
        assert logprob < 0
        assert top[token] == logprob
        assert len(top) in (3, 4)  # the chosen one may be another, because special tokens are forbidden
    streamed_text, streamed = logprobs(gateway, 3, stream=True)
    assert (streamed_text, streamed["tokens"], streamed["text_offset"]) == (text, columns["tokens"], columns["text_offset"])
    assert streamed["token_logprobs"] == pytest.approx(columns["token_logprobs"], abs=1e-4)


@pytest.mark.peer
def test_none_beside_the_chosen_one_can_be_asked_for(gateway: Gateway) -> None:
    _, columns = logprobs(gateway, 0)
    assert [[*top] for top in columns["top_logprobs"]] == [[token] for token in columns["tokens"]]


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def translated_bytes(raw: bytes, kind: str, cut: int) -> bytes:
    async def all_of() -> bytes:
        answer = EngineAnswer(200, kind, pieces(raw[:cut], raw[cut:]))
        translation = llama_logprobs.in_openais_form(answer, COMPLETIONS, {"logprobs": 1})
        return b"".join([piece async for piece in translation.body])

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
    whole = translated_bytes(raw, "text/event-stream", 0)
    first, _, end, *_ = whole.split(b"\n")
    columns = json.loads(first[6:])["choices"][0]["logprobs"]
    assert (columns["tokens"], columns["token_logprobs"], columns["text_offset"]) == (["bytes:\\xe2\\x82"], [-1.0], [0])
    assert columns["top_logprobs"] == [{"a": -0.5, "bytes:\\xe2\\x82": -1.0}]
    assert end == b"data: [DONE]"
    assert all(translated_bytes(raw, "text/event-stream", cut) == whole for cut in range(len(raw)))


@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"choices": 1}', b'{"choices": [{"logprobs": {"content": [{}]}}]}'])
def test_what_has_another_form_is_left_as_it_is(raw: bytes) -> None:
    assert translated_bytes(raw, "application/json", 1) == raw
