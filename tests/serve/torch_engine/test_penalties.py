"""Penalties and filters of tokens: transformers' own processors as the oracle, and OpenAI's formula by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from adapterhub.generation.sampling import Sampler  # noqa: E402
from adapterhub.serve.torch_engine import Request  # noqa: E402
from adapterhub.serve.torch_engine.host_loop import Host  # noqa: E402
from adapterhub.serve.torch_engine.openai import submit  # noqa: E402
from adapterhub.serve.torch_engine.penalties import Penalties  # noqa: E402
from adapterhub.serve.torch_engine.request_fields import CHAT, COMPLETIONS  # noqa: E402
from tests.serve.torch_engine.conftest import Peers, assert_same, pieces, tokens, with_adapters  # noqa: E402

VOCABULARY = 50
BLEND = (("a1", 1.0),)


def logits(seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 3, VOCABULARY).astype(np.float32)


@pytest.fixture(scope="module")
def host(llama: Peers) -> Iterator[Host]:
    with with_adapters(llama, slots=4, rows=8) as open_engine:
        yield open_engine


@pytest.mark.parametrize("penalty", [0.5, 1.3, 7.0])
def test_the_repetition_penalty_is_that_of_transformers_bit_for_bit(penalty: float) -> None:
    prompt, answer = [3, 8, 8, 21], [5, 8, 40, 5]
    penalties = Penalties(Request(prompt, (), 9, repetition_penalty=penalty), VOCABULARY)
    oracle = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    for length in range(len(answer) + 1):
        penalized = logits(length)
        expected = oracle(torch.tensor([prompt + answer[:length]]), torch.tensor(penalized)[None])[0].numpy()
        penalties.apply(penalized)
        assert (penalized == expected).all()
        if length < len(answer):
            penalties.add(answer[length])


def test_presence_and_frequency_are_openai_s_formula_over_the_answer() -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, and the prompt does not count."""
    penalties = Penalties(Request([0, 1], (), 9, presence_penalty=0.5, frequency_penalty=0.25), 5)
    for token in (1, 2, 2, 3, 2):
        penalties.add(token)
    penalized = np.array([10, 10, 10, 10, 10], np.float32)
    penalties.apply(penalized)
    assert penalized.tolist() == [10, 9.25, 8.75, 9.25, 10]
    combined = Penalties(Request([0], (), 9, presence_penalty=1, repetition_penalty=2), 3)
    combined.add(1)
    penalized = np.array([8, -8, 8], np.float32)
    combined.apply(penalized)
    assert penalized.tolist() == [4, -17, 8]  # repetition first, as in vLLM


def drawn_tokens(numbers: Any, **options: Any) -> set[int]:
    """The tokens that a sampler draws in many tries."""
    sampler = Sampler(1.0, 3, **options)
    return {sampler.token(numbers) for _ in range(4000)}


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({"top_k": 4}, "TopKLogitsWarper(4)"),
        ({"top_k": 500}, "TopKLogitsWarper(500)"),
        ({"min_p": 0.2}, "MinPLogitsWarper(0.2)"),
        ({"min_p": 1.0}, "MinPLogitsWarper(1.0)"),
        ({"min_p": 0.05, "top_k": 3, "top_p": 0.7}, "MinPLogitsWarper(0.05) TopKLogitsWarper(3) TopPLogitsWarper(0.7)"),
    ],
)
def test_a_sampler_draws_from_the_tokens_that_the_warpers_of_transformers_leave(options: Any, oracle: str) -> None:
    numbers = np.array([1.5, 0.2, 2.0, 1.4, 1.3, -0.5, 0.9, 1.0], np.float32)
    scores = torch.tensor(numbers)[None]
    for call in oracle.split():
        name, value = call.rstrip(")").split("(")
        scores = getattr(transformers, name)(float(value) if "." in value else int(value))(None, scores)
    assert drawn_tokens(numbers, **options) == set(torch.isfinite(scores[0]).nonzero().flatten().tolist())


def test_top_k_keeps_what_is_as_likely_as_the_last_as_transformers_does() -> None:
    numbers = np.array([1.0, 1.0, 1.0, 0.0], np.float32)
    warped = transformers.TopKLogitsWarper(2)(None, torch.tensor(numbers)[None])[0]
    assert drawn_tokens(numbers, top_k=2) == set(torch.isfinite(warped).nonzero().flatten().tolist()) == {0, 1, 2}


def test_an_answer_with_a_repetition_penalty_is_that_of_transformers(host: Host, llama: Peers) -> None:
    prompt = [5, 80, 90, 80]
    llama.model.set_adapter("a1")
    expected = llama.model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.long), do_sample=False,
        max_new_tokens=24, pad_token_id=0, repetition_penalty=1.7,
    )[0, 4:].tolist()  # fmt: skip
    assert tokens(host, Request(prompt, BLEND, 24, repetition_penalty=1.7)) == expected
    assert expected != tokens(host, Request(prompt, BLEND, 24))


def test_a_high_presence_penalty_repeats_no_token(host: Host) -> None:
    unlike = tokens(host, Request([7], BLEND, 40, presence_penalty=2, frequency_penalty=2, repetition_penalty=100))
    assert len(set(unlike)) == len(unlike)


def test_penalties_of_a_row_change_no_neighbor_and_no_logarithm_of_its_probabilities(host: Host) -> None:
    plain = Request([7, 30], BLEND, 20, logprobs=2)
    penalized = replace(plain, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.4)
    drawn = replace(plain, temperature=0.9, seed=4, top_k=5, min_p=0.05)
    requests = [plain, penalized, drawn, replace(plain, blend=()), replace(penalized, blend=())]
    alone = [list(host.submit(request)) for request in requests]
    assert_same(host, pieces(host, requests), alone)
    assert alone[1][0].top == alone[0][0].top
    assert [piece.token for piece in alone[1]] != [piece.token for piece in alone[0]]


def test_ignore_eos_goes_on_behind_a_token_that_ends_answers(host: Host) -> None:
    end = min(host.text.ends)
    request = Request([7], BLEND, 9, bias=((end, 100.0),))
    assert [(piece.token, piece.finish) for piece in host.submit(request)] == [(end, "stop")]
    longer = list(host.submit(replace(request, ignore_eos=True)))
    assert [piece.token for piece in longer] == [end] * 9
    assert longer[-1].finish == "length"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_field_reaches_the_sampler(host: Host, path: str) -> None:
    body: dict[str, Any] = {"prompt": "ab"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "ab"}]}
    body |= {"max_tokens": 30, "temperature": 1.5, "seed": 5}

    def choice(**fields: Any) -> Any:
        [answer] = submit(host, path, {**body, **fields}, BLEND, "m").whole()["choices"]
        return answer.get("text") or answer["message"]["content"]

    plain = choice()
    assert choice(top_k=0, min_p=0.0, ignore_eos=None, presence_penalty=0, repetition_penalty=1.0) == plain
    assert choice(top_k=1) == choice(temperature=0) == choice(min_p=1.0)
    for field in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 5}, {"top_k": 1}, {"min_p": 0.9}):
        assert choice(**field) != plain
