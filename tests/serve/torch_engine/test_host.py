"""Many adapters on one base: peft's own answers, the same alone and in a batch, and never another's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from adapterhub.serve.torch_engine import Blend, Request  # noqa: E402
from adapterhub.serve.torch_engine.host_loop import Host  # noqa: E402
from adapterhub.serve.torch_engine.streams import read_together  # noqa: E402
from adapterhub.serve.torch_engine.values import FullError  # noqa: E402
from adapterhub_converters.errors import NotFoundError, ParameterError, RefusedError, StoppedError  # noqa: E402
from tests.serve.torch_engine.conftest import Peers, assert_same, pieces, tokens, with_adapters  # noqa: E402

PROMPTS = [
    [3 + (7 * at + step * step) % 250 for step in range(length)] for at, length in enumerate((5, 1, 70, 12, 3, 140, 33, 2))
]


def single(name: str) -> Blend:
    return ((name, 1.0),)


def answers(name: str | None, prompt: list[int], count: int = 12, **options: Any) -> Request:
    return Request(prompt, single(name) if name else (), count, **options)


@pytest.fixture
def host(llama: Peers) -> Iterator[Host]:
    """A host with three slots for eight adapters."""
    with with_adapters(llama, slots=3, rows=4) as open_engine:
        yield open_engine


def test_eight_prompts_by_eight_adapters_interleaved_are_those_alone_and_those_of_peft(peers: Peers) -> None:
    requests = [
        answers(name, prompt, logprobs=3)
        for turn in range(8)
        for prompt, name in zip(PROMPTS, [*list(peers.folders)[turn:], *list(peers.folders)[:turn]], strict=True)
    ]
    requests += [answers(None, prompt, logprobs=3) for prompt in PROMPTS]
    with with_adapters(peers, slots=8, rows=16, prefixes=0) as host:
        alone = [list(host.submit(request)) for request in requests]
        together_ = pieces(host, requests)
    assert_same(host, together_, alone)  # logarithms of probabilities too
    for request, answer in zip(requests, together_, strict=True):
        name = request.blend[0][0] if request.blend else None
        assert [piece.token for piece in answer] == peers.answer(name, request.ids, 12)
    assert len({tuple(piece.token for piece in answer) for answer in together_}) > 60


def test_more_adapters_than_slots_wait_and_are_answered(host: Host, llama: Peers) -> None:
    requests = [answers(name, prompt) for name in llama.folders for prompt in PROMPTS[:3]]
    expected = [llama.answer(request.blend[0][0], request.ids, 12) for request in requests]
    answers_ = pieces(host, requests)
    assert [[piece.token for piece in answer] for answer in answers_] == expected
    state = host.state()
    assert (state.slots, state.pinned, state.rows, state.waiting) == (3, 0, 0, 0)
    assert state.adapters == 8


BLENDS: list[Blend] = [
    (("a0", 0.7), ("a1", 0.3)),
    (("a1", 0.3), ("a0", 0.7)),
    (("a2", 1.0), ("a3", -0.5)),
    (("a3", 0.25),),
    (("a1", 1.0), ("a1", 1.0)),
]


def test_a_blend_is_the_weighted_sum_of_its_deltas_as_in_peft(llama: Peers) -> None:
    requests = [Request(PROMPTS[2], blend, 8, logprobs=259) for blend in BLENDS]
    with with_adapters(llama, slots=4, rows=8) as host:
        alone = [list(host.submit(request)) for request in requests]
        mixed = pieces(host, [*requests, answers(None, PROMPTS[2], 8, logprobs=259)])
    assert_same(host, mixed[:-1], alone)
    for blend, answer in zip(BLENDS[:4], mixed, strict=False):
        names = [name for name, _ in blend]
        llama.model.add_weighted_adapter(names, [weight for _, weight in blend], "blend", combination_type="cat")
        expected = llama.logits("blend", PROMPTS[2])[-1].log_softmax(-1).numpy()
        llama.model.delete_adapter("blend")
        llama.model.set_adapter("a0")
        np.testing.assert_allclose([logprob for _, logprob in sorted(answer[0].top)], expected, atol=2e-4)


def test_logarithms_of_probabilities_are_those_of_the_reference(host: Host, llama: Peers) -> None:
    pieces_ = list(host.submit(answers("a2", PROMPTS[3], 6, logprobs=4, temperature=0.7, seed=3)))
    ids = PROMPTS[3] + [piece.token for piece in pieces_]
    expected = llama.logits("a2", ids).log_softmax(-1)[len(PROMPTS[3]) - 1 : -1]
    for piece, row in zip(pieces_, expected, strict=True):
        assert piece.logprob == pytest.approx(float(row[piece.token]), abs=2e-4)
        values, names = row.topk(4)
        assert [token for token, _ in piece.top] == names.tolist()
        assert [logprob for _, logprob in piece.top] == pytest.approx(values.tolist(), abs=2e-4)


def test_the_same_seed_draws_the_same_answer_in_any_company(host: Host) -> None:
    drawn = answers("a1", PROMPTS[0], 20, temperature=0.9, top_p=0.9, seed=5)
    alone = tokens(host, drawn)
    company = [replace(drawn, blend=single(name), seed=at) for at, name in enumerate(("a1", "a2", "a3"))]
    assert [piece.token for piece in pieces(host, [*company, drawn])[-1]] == alone
    assert tokens(host, replace(drawn, seed=6)) != alone
    assert len({tuple(tokens(host, replace(drawn, seed=None))) for _ in range(3)}) > 1


def test_a_long_prompt_does_not_keep_a_short_one_waiting(llama: Peers) -> None:
    with with_adapters(llama, slots=2, rows=2, prefixes=0) as host:
        with host._wake:  # both arrive at once
            long = host.submit(answers(None, [7] * 500, 1))
            short = host.submit(answers(None, [9], 1), beside=long)
        order = [index for index, _ in read_together([long, short])]
    assert order == [1, 0]


# ---- Prefixes


def test_the_beginning_of_a_prompt_is_found_only_behind_the_same_version_and_changes_nothing(llama: Peers) -> None:
    prompt, longer = PROMPTS[5], [*PROMPTS[5][:130], 9, 10, 11]
    with with_adapters(llama, slots=4, rows=4) as host:
        for blend in (
            single("a0"),
            single("a1"),
            (),
            (("a0", 0.5),),
            (("a0", 1.0), ("a1", 1.0)),
            (("a1", 1.0), ("a0", 1.0)),
        ):
            before = host.state().cached_tokens
            first = list(host.submit(Request(prompt, blend, 5, logprobs=2)))
            assert host.state().cached_tokens == before
            assert_same(host, [list(host.submit(Request(prompt, blend, 5, logprobs=2)))], [first])
            assert host.state().cached_tokens == before + 128
            host.submit(Request(longer, blend, 1)).cancel()
        assert tokens(host, answers("a1", longer)) == llama.answer("a1", longer, 12)
        assert 0 < host.state().prefix_bytes <= 6 * 3 * 64 * host._model.token_size


def test_a_key_that_is_loaded_again_with_other_bytes_never_gets_what_was_computed_before(llama: Peers) -> None:
    with with_adapters(llama, slots=4, rows=4) as host:
        host.load("moved", llama.folders["a0"])
        assert tokens(host, answers("moved", PROMPTS[5])) == llama.answer("a0", PROMPTS[5], 12)
        host.drop("moved")
        host.load("moved", llama.folders["a1"])
        assert tokens(host, answers("moved", PROMPTS[5])) == llama.answer("a1", PROMPTS[5], 12)


def test_prefixes_stay_within_their_bytes(llama: Peers) -> None:
    with with_adapters(llama, slots=4, rows=4, prefixes=200_000) as host:
        for start in range(12):
            tokens(host, answers("a0", [start + 3, *PROMPTS[5]], 1))
            assert host.state().prefix_bytes <= 200_000
        before = host.state().cached_tokens
        tokens(host, answers("a0", [14, *PROMPTS[5]], 1))
        assert host.state().cached_tokens == before + 128


# ---- Requests that end early, and versions that go


def test_a_canceled_request_frees_its_row_and_slot(llama: Peers) -> None:
    with with_adapters(llama, slots=1, rows=1) as host:
        running = host.submit(answers("a0", PROMPTS[0], 400, temperature=1.5, seed=0))
        waiting = host.submit(answers("a1", PROMPTS[0]))
        canceled = host.submit(answers("a2", PROMPTS[0]))
        next(iter(running))
        canceled.cancel()
        running.cancel()
        assert [piece.token for piece in waiting] == llama.answer("a1", PROMPTS[0], 12)
        for stream in (running, canceled):
            with pytest.raises(StoppedError, match="canceled"):
                list(stream)
        assert (host.state().rows, host.state().pinned, host.state().row_bytes) == (0, 0, 0)


def test_a_dropped_version_answers_those_who_asked_before_and_nobody_after(llama: Peers) -> None:
    with with_adapters(llama, slots=1, rows=1) as host:
        running, waiting = host.submit(answers("a0", PROMPTS[0])), host.submit(answers("a0", PROMPTS[3]))
        host.drop("a0")
        with pytest.raises(NotFoundError, match="a0: is not loaded"):
            host.submit(answers("a0", PROMPTS[0]))
        assert [piece.token for piece in running] == llama.answer("a0", PROMPTS[0], 12)
        assert [piece.token for piece in waiting] == llama.answer("a0", PROMPTS[3], 12)
        assert host.state().adapters == 7


def test_versions_that_are_forgotten_to_make_room_are_read_again(llama: Peers) -> None:
    with with_adapters(llama, slots=2, rows=2, adapters=0) as host:
        assert host.state().adapters == 1  # the one that was just loaded
        for name in llama.folders:
            assert tokens(host, answers(name, PROMPTS[0])) == llama.answer(name, PROMPTS[0], 12)
            assert host.state().adapters <= 1


def test_a_pinned_version_stays_in_memory_and_answers(llama: Peers) -> None:
    with with_adapters(llama, slots=1, rows=2, adapters=0) as host:
        host.pin(frozenset({"a0"}))
        for name in ("a0", "a1", "a2", "a0"):
            assert tokens(host, answers(name, PROMPTS[0])) == llama.answer(name, PROMPTS[0], 12)
        assert host.state().adapters == 1
        host.load("a1", llama.folders["a1"])
        assert host.state().adapters == 2


def test_a_closed_host_tells_those_who_wait(llama: Peers) -> None:
    with with_adapters(llama, slots=1, rows=1) as host:
        streams = [host.submit(answers("a0", PROMPTS[0], 400, temperature=1.5, seed=0)) for _ in range(3)]
    for stream in streams:
        with pytest.raises(StoppedError) as caught:
            list(stream)
        assert str(caught.value) == "the host was closed"
    with pytest.raises(StoppedError) as caught:
        host.submit(answers("a0", PROMPTS[0]))
    assert str(caught.value) == "the host is closed"


def test_requests_from_many_threads_while_versions_come_and_go(llama: Peers) -> None:
    names, texts, failures = list(llama.folders), [], []
    with with_adapters(llama, slots=2, rows=4) as host:

        def ask(at: int) -> None:
            for turn in range(4):
                name = names[(at + turn) % 4]
                texts.append((name, tokens(host, answers(name, PROMPTS[at % 4], 6))))

        def churn() -> None:
            for turn in range(20):
                host.load(f"other-{turn}", llama.folders[names[4 + turn % 4]])
                tokens(host, answers(f"other-{turn}", PROMPTS[0], 2))
                host.drop(f"other-{turn}")

        def record_failures(work: Any, *words: Any) -> None:
            try:
                work(*words)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=record_failures, args=(ask, at)) for at in range(6)]
        threads.append(threading.Thread(target=record_failures, args=(churn,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    right = {(name, tuple(llama.answer(name, prompt, 6))) for name in names[:4] for prompt in PROMPTS[:4]}
    assert {(name, tuple(answer)) for name, answer in texts} <= right
    assert len(texts) == 24


# ---- What is refused


def test_what_cannot_be_asked_for(llama: Peers) -> None:
    with with_adapters(llama, slots=1, rows=1, waiting=2) as host:
        for wrong, message in [
            (answers("a0", []), "no token"),
            (answers("a0", [259]), "not one of the 259"),
            (answers("a0", [-1]), "not one of the 259"),
            (answers("a0", [5], 0), "less than 1"),
            (answers("a0", [5] * 500, 13), "together have at most 512"),
        ]:
            with pytest.raises(ParameterError, match=message):
                host.submit(wrong)
        with pytest.raises(RefusedError, match="2 versions, but there are 1 slots"):
            host.submit(Request([5], (("a0", 0.5), ("a1", 0.5)), 3))
        with pytest.raises(NotFoundError, match="nobody: is not loaded"):
            host.submit(answers("nobody", [5]))
        running = host.submit(answers("a0", PROMPTS[0], 400, temperature=1.5, seed=0))
        next(iter(running))
        for _ in range(2):
            host.submit(answers("a0", PROMPTS[0], 2))
        with pytest.raises(FullError, match="2 requests wait already") as caught:
            host.submit(answers("a0", PROMPTS[0], 2))
        assert caught.value.code == "queue-full"
