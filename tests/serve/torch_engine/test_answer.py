"""From logits to text: no part of a stop text is ever shown, and no half of a character."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st

from adapterhub.generation.hf_text import Text
from adapterhub.serve.torch_engine import Request
from adapterhub.serve.torch_engine.answer import GeneratedAnswer, StopTexts, likeliest, log_softmax
from adapterhub_converters.errors import RefusedError
from tests.serve.torch_engine.conftest import Peers, pieces, with_adapters

_SHORT = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(_SHORT, max_size=3))
def test_text_ends_before_the_first_stop_and_is_whole_without_one(parts: list[str], texts: list[str]) -> None:
    stops, shown_text, stopped = StopTexts(texts), "", False
    for at, part in enumerate(parts):
        text, stopped = stops.add(part)
        shown_text += text
        if stopped:
            break
        held_back = "".join(parts[: at + 1])[len(shown_text) :]
        assert not held_back or any(stop.startswith(held_back) for stop in texts)
    whole = "".join(parts)
    ends = [at for at in (whole.find(text) for text in texts) if at >= 0]
    if stopped:
        assert any(whole[len(shown_text) :].startswith(text) for text in texts)
        assert not any(text in shown_text for text in texts)
    else:
        assert ends == []
        assert shown_text + stops.flush() == whole


def test_the_beginning_of_a_stop_is_held_back_until_it_is_certain() -> None:
    stops = StopTexts(["</end>", "STOP"])
    assert [stops.add(text) for text in ("a<", "/e", "x</en")] == [("a", False), ("", False), ("</ex", False)]
    assert stops.add("d>more") == ("", True)
    assert StopTexts(["ab", "b"]).add("xab") == ("x", True)


def test_logarithms_of_probabilities() -> None:
    logits = np.array([0.0, 1.0, 3.0, 2.0, -1e4], np.float32)
    logprobs = log_softmax(logits)
    assert np.exp(logprobs).sum() == pytest.approx(1)
    assert logprobs[2] - logprobs[1] == pytest.approx(2)
    assert [token for token, _ in likeliest(logprobs, 3)] == [2, 3, 1]
    assert likeliest(logprobs, 0) == ()
    assert len(likeliest(logprobs, 99)) == 5
    assert likeliest(log_softmax(np.zeros(4, np.float32)), 2) == ((0, -math.log(4)), (1, -math.log(4)))  # ties by number


class Fixed:
    """Text whose tokens are given, `None` for one that ends the answer."""

    def __init__(self, *texts: str) -> None:
        self.ends = frozenset([len(texts)])
        self.texts = texts

    def pieces(self) -> Any:
        return lambda token: self.texts[token]


def answer_pieces(text: Any, *tokens: int, **options: Any) -> list[tuple[str, str | None]]:
    answer = GeneratedAnswer(Request([1], (), **{"max_tokens": 9, **options}), text)
    logits = [np.eye(8, dtype=np.float32)[token] for token in tokens]
    return [(piece.text, piece.finish) for piece in map(answer.add, logits)]


def test_an_answer_ends_by_its_length_a_stop_or_a_token() -> None:
    text = Fixed("one ", "two ", "three")
    assert answer_pieces(text, 0, 1, max_tokens=2) == [("one ", None), ("two ", "length")]
    assert answer_pieces(text, 0, 3) == [("one ", None), ("", "stop")]
    assert answer_pieces(text, 0, 1, 2, stop=("o th",)) == [("one ", None), ("tw", None), ("", "stop")]
    assert answer_pieces(text, 0, 1, 3, stop=("o th",)) == [("one ", None), ("tw", None), ("o ", "stop")]
    assert answer_pieces(text, 0, 1, stop=("o th",), max_tokens=2) == [("one ", None), ("two ", "length")]


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(RefusedError, match="NaN or Inf"):
        GeneratedAnswer(Request([1], (), 3), Fixed("a")).add(np.array([1, np.nan], np.float32))  # type: ignore[arg-type]


# ---- The text of a real tokenizer


@pytest.fixture(scope="module")
def text(llama: Peers) -> Any:
    with with_adapters(llama, slots=1, rows=1) as host:
        yield host.text


@pytest.mark.parametrize("words", ["naïve façade", "日本語と🙂emoji🙂", "a\x00b"])
def test_characters_of_several_tokens_come_whole(text: Text, words: str) -> None:
    piece_of = text.pieces()
    texts = [piece_of(token) for token in text.tokens(words, special=False)]
    assert "".join(texts) == words
    assert len(texts) == len(words.encode())
    assert not any("\ufffd" in piece for piece in texts)


def test_bytes_that_are_no_character_do_not_hold_back_the_text_for_ever(text: Text) -> None:
    [continuation] = text.tokens("é", special=False)[1:]
    piece_of, decoded = text.pieces(), ""
    for _ in range(100):
        decoded += piece_of(continuation)
    assert len(decoded) >= 80
    assert decoded == "\ufffd" * len(decoded)
    assert "".join(map(piece_of, text.tokens("xyz", special=False))).endswith("xyz")


def test_streams_are_the_text_of_the_tokens(llama: Peers) -> None:
    with with_adapters(llama, slots=4, rows=8) as host:
        requests = [Request([5 + at, 60], (("a1", 1.0),), 40, temperature=1.2, seed=at) for at in range(8)]
        decode = host.text._tokenizer.decode
        for answer in pieces(host, requests):
            whole = decode([piece.token for piece in answer], skip_special_tokens=True)
            assert "".join(piece.text for piece in answer).rstrip("\ufffd") == whole.rstrip("\ufffd")


def test_a_stop_text_is_never_shown(llama: Peers) -> None:
    with with_adapters(llama, slots=4, rows=8) as host:
        drawn: dict[str, Any] = {"temperature": 1.2, "seed": 7}
        whole = "".join(piece.text for piece in host.submit(Request([5], (("a1", 1.0),), 40, **drawn)))
        for start, length in itertools.product((3, 9), (1, 2, 5)):
            stop = whole[start : start + length]
            answer = list(host.submit(Request([5], (("a1", 1.0),), 40, stop=(stop,), **drawn)))
            assert "".join(piece.text for piece in answer) == whole[: whole.index(stop)]
            assert answer[-1].finish == "stop"
