"""Prompts that are part of the answer, with the probabilities of a forward pass of the model, as evaluations ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapterhub.serve.torch_engine import Request  # noqa: E402
from adapterhub.serve.torch_engine.host_loop import Host  # noqa: E402
from adapterhub.serve.torch_engine.openai import ApiError, submit  # noqa: E402
from adapterhub.serve.torch_engine.request_fields import COMPLETIONS  # noqa: E402
from tests.serve.torch_engine.conftest import Peers, assert_same, pieces, with_adapters  # noqa: E402

BLEND = (("a1", 1.0),)
LONG = [3 + at * at % 250 for at in range(300)]  # more than a chunk
HARNESS = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
"""What lm-evaluation-harness 0.4.13 sends besides `model` and `prompt` (models/openai_completions.py, `_create_payload`)."""


@pytest.fixture(scope="module")
def host(llama: Peers) -> Iterator[Host]:
    with with_adapters(llama, slots=4, rows=8) as open_engine:
        yield open_engine


def choices(host: Host, **body: Any) -> list[dict[str, Any]]:
    return submit(host, COMPLETIONS, body, BLEND, "m").whole()["choices"]  # type: ignore[no-any-return]


def test_the_harness_reads_the_probabilities_of_a_forward_pass(host: Host, llama: Peers) -> None:
    prompts = [LONG, LONG[:5], LONG[100:164]]
    for ids, choice in zip(prompts, choices(host, prompt=prompts, **HARNESS), strict=True):
        numbers = choice["logprobs"]
        expected = llama.logits("a1", ids).log_softmax(-1)
        assert numbers["token_logprobs"][0] is numbers["top_logprobs"][0] is None
        scored = numbers["token_logprobs"][1:-1]  # the last one is the answer's
        assert scored == pytest.approx([float(expected[at, ids[at + 1]]) for at in range(len(ids) - 1)], abs=2e-4)
        likeliest = [max(top.values()) for top in numbers["top_logprobs"][1:-1]]
        assert likeliest == pytest.approx(expected[:-1].max(-1).values.tolist(), abs=2e-4)
        greedy = [number == best for number, best in zip(scored, likeliest, strict=True)]
        assert greedy == [ids[at + 1] == int(expected[at].argmax()) for at in range(len(ids) - 1)]
        assert len(numbers["tokens"]) == len(numbers["text_offset"]) == len(ids) + 1


def test_no_token_after_the_prompt(host: Host) -> None:
    [choice] = choices(host, prompt=LONG, **HARNESS)
    answer = submit(host, COMPLETIONS, {"prompt": LONG, **HARNESS, "max_tokens": 0}, BLEND, "m").whole()
    [choice_without_echo] = answer["choices"]
    assert answer["usage"] == {"prompt_tokens": 300, "completion_tokens": 0, "total_tokens": 300}
    assert choice_without_echo["finish_reason"] == "length"
    assert choice_without_echo["logprobs"] == {name: values[:-1] for name, values in choice["logprobs"].items()}
    assert choice["text"].startswith(choice_without_echo["text"])
    assert choices(host, prompt="a b", echo=True, max_tokens=0) == [
        {"index": 0, "text": "a b", "logprobs": None, "finish_reason": "length"}
    ]


def test_the_answer_is_that_without_echo_behind_the_text_that_was_sent(host: Host) -> None:
    for prompt in ("naïve <|im_start|> a", [5, 90, 91]):
        body = {"prompt": prompt, "max_tokens": 9, "temperature": 1.1, "seed": 3, "n": 2, "logprobs": 2}
        plain, echoed = choices(host, **body), choices(host, **body, echo=True)
        text = prompt if isinstance(prompt, str) else "".join(map(host.text.pieces(), prompt))
        for without, choice in zip(plain, echoed, strict=True):
            assert choice["text"] == text + without["text"]
            count = len(without["logprobs"]["tokens"])
            for name in ("tokens", "token_logprobs", "top_logprobs"):
                assert choice["logprobs"][name][-count:] == without["logprobs"][name]
            offsets = choice["logprobs"]["text_offset"]
            assert offsets[-count:] == [len(text) + offset for offset in without["logprobs"]["text_offset"]]
        assert [choice["text"] for choice in choices(host, **{**body, "logprobs": None}, echo=True)] == [
            choice["text"] for choice in echoed
        ]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_chunks_are_the_whole_in_parts(host: Host, logprobs: int | None) -> None:
    body = {"prompt": ["ab", "cde"], "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": logprobs}
    right = choices(host, **body)
    parts = [part["choices"][0] for part in submit(host, COMPLETIONS, {**body, "stream": True}, BLEND, "m").chunks()]
    for choice in right:
        mine = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for part in mine for value in part["logprobs"][name]] == values


def test_prompts_with_probabilities_change_no_neighbor_and_leave_their_beginnings_for_others(host: Host) -> None:
    scored, plain = Request(LONG, BLEND, 4, logprobs=1, echo=True), Request(LONG, BLEND, 4, logprobs=1)
    alone = [list(host.submit(request)) for request in (scored, plain)]
    assert_same(host, pieces(host, [scored, plain, scored]), [*alone, alone[0]])
    assert_same(host, [alone[0][300:]], [alone[1]])
    before = host.state().cached_tokens
    list(host.submit(plain))
    assert host.state().cached_tokens > before


def test_no_tokens_without_a_prompt_to_show_are_refused(host: Host) -> None:
    with pytest.raises(ApiError, match="max_tokens: is not a whole number from 1 to"):
        choices(host, prompt="a", max_tokens=0)
    with pytest.raises(ApiError, match="max_tokens: is not a whole number from 0 to"):
        choices(host, prompt="a", max_tokens=-1, echo=True)
