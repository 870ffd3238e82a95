"""The name of the version in answers, wherever the engine cuts them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.serve.engines import EngineAnswer
from adapterhub.serve.gateway import rewriting
from adapterhub.serve.gateway.openai_errors import ProblemError
from adapterhub.serve.gateway.rewriting import Usage
from adapterhub.serve.usage.token_counts import TokenCounts

CHUNKS = [{"model": "engine", "choices": [{"text": text}]} for text in ("a", "é\n", "data: {", "")]
STREAM = b"".join(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" for chunk in CHUNKS)
STREAM += b": comment\n\ndata: [DONE]\n\n"


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def rewritten(*parts: bytes, usage: Usage | None = None) -> bytes:
    async def all_of() -> bytes:
        answer = EngineAnswer(200, "text/event-stream", pieces(*parts), model="engine")
        rewritten_events = rewriting.events(answer, "team/a@sha256:1", usage or Usage({}))
        return b"".join([piece async for piece in rewritten_events])

    return asyncio.run(all_of())


def test_a_stream_is_renamed_wherever_it_is_cut() -> None:
    whole = rewritten(STREAM)
    lines = [line for line in whole.decode().split("\n") if line.startswith("data: {")]
    assert [json.loads(line[6:]) for line in lines] == [{**chunk, "model": "team/a@sha256:1"} for chunk in CHUNKS]
    assert whole.endswith(b": comment\n\ndata: [DONE]\n\n")
    for at in range(len(STREAM)):
        assert rewritten(STREAM[:at], STREAM[at:]) == whole
    assert rewritten(*(STREAM[at : at + 1] for at in range(len(STREAM)))) == whole


def test_lines_may_end_and_fields_begin_as_the_standard_has_it() -> None:
    assert rewritten(b'event: x\r\ndata:{"model":"engine"}\r\n\r\ndata:[DONE]\r\n\r\n') == (
        b'event: x\ndata: {"model":"team/a@sha256:1"}\n\ndata: [DONE]\n\n'
    )


@pytest.mark.parametrize(
    "event",
    [
        b'{"model":"engine","choices":[{"model":"engine"}]}',
        b'{"choices":[{"model":"engine"}],"mod\\u0065l":"engine"}',
        b'{"choices":[{"text":"\\"model\\":\\"engine\\""}],"model":"engine"}',
        b'{"model" : "engine","choices":[]}',
        b'{"choices":[{"text":"\\u00e9"}],"model":"engine"}',
    ],
)
def test_only_the_model_of_the_event_itself_is_replaced_however_it_is_written(event: bytes) -> None:
    first = b'data: {"model":"engine","choices":[]}\n\n'
    _, second, _ = rewritten(first, b"data: " + event + b"\n\n", b"data: [DONE]\n\n").split(b"\n\n", 2)
    assert json.loads(second.removeprefix(b"data: ")) == {**json.loads(event), "model": "team/a@sha256:1"}


@pytest.mark.parametrize("separator", [b":", b": "])
def test_later_events_keep_every_byte_but_those_of_the_model(separator: bytes) -> None:
    event = b'data: {"b" : 1,  "model"%s"engine", "text":"\xc3\xa9\\n"}\n\n' % separator
    _, second, _ = rewritten(event, event, b"data: [DONE]\n\n").split(b"\n\n", 2)
    assert second + b"\n\n" == event.replace(b'"model"%s"engine"' % separator, b'"model":"team/a@sha256:1"')


@pytest.mark.parametrize(
    "event",
    [
        b'{"model":"engine"',
        b'{"model":"engine","n":NaN}',
        b'{"model":"engine","t":"\xff"}',
        b'["model","engine"]',
        b'{"model":"engine","t":"\\ud800"}',
        b'{"model":"another"}',
        b'{"model":"engine","n":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_a_later_event_is_checked_like_the_first(event: bytes) -> None:
    first = b'data: {"model":"engine","choices":[]}\n\n'
    with pytest.raises(ProblemError, match="engine_failed|its answer"):
        rewritten(first, b"data: " + event + b"\n\n", b"data: [DONE]\n\n")


TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from('"\\\n\u2028{}:,'), max_size=6)
DELTAS = st.fixed_dictionaries({}, optional={"content": TEXTS, "role": TEXTS, "reasoning_content": TEXTS, "model": TEXTS})
CHOICES = st.fixed_dictionaries(
    {"index": st.integers(0, 1)},
    optional={"delta": DELTAS, "text": TEXTS, "finish_reason": st.sampled_from([None, "stop", "length"]), "content": TEXTS},
)
EVENTS = st.fixed_dictionaries(
    {"model": st.just("engine")},
    optional={
        "choices": st.lists(CHOICES, max_size=2),
        "usage": st.sampled_from([None, {"prompt_tokens": 3, "completion_tokens": 2}]),
        "content": TEXTS,
        "id": st.sampled_from(["a", "b"]),
    },
)


@given(st.lists(EVENTS, min_size=2, max_size=6), st.booleans(), st.booleans(), st.integers(1, 4))
def test_an_event_that_differs_from_others_in_its_text_alone_is_renamed_and_counted_like_any(
    drawn: list[dict[str, Any]], has_spaces: bool, is_ascii: bool, times: int
) -> None:
    separators = (", ", ": ") if has_spaces else (",", ":")
    drawn = [event for event in drawn for _ in range(times)]
    lines = [json.dumps(event, ensure_ascii=is_ascii, separators=separators).encode() for event in drawn]
    body = {"stream": True, "stream_options": {"include_usage": True}}
    quick, slow = Usage(body), Usage(body)
    renamer = rewriting._Renamer("team/a@sha256:1", quick, "engine")
    for line in lines:
        expected = rewriting.rename_model(line, "team/a@sha256:1", slow, expected="engine")
        assert json.loads(renamer.rename(line) or b"0") == json.loads(expected or b"0")
    assert quick == slow


def test_events_that_arrive_alone_are_renamed_and_counted_as_if_they_arrived_together() -> None:
    texts = ["a", "b", "c d", "é", "x\ny", "z", 'a"', "b"]
    events = [b"data: " + json.dumps({"model": "engine", "choices": [{"text": text}]}).encode() + b"\n\n" for text in texts]
    events.append(b"data: [DONE]\n\n")
    alone, together = Usage({"stream": True}), Usage({"stream": True})
    whole = rewritten(*events, usage=alone)
    assert whole == rewritten(b"".join(events), usage=together)
    assert [json.loads(line[6:])["choices"][0]["text"] for line in whole.decode().split("\n") if "{" in line] == texts
    assert alone == together
    assert alone.parts == len(texts)


def test_the_text_of_an_event_may_not_break_out_of_its_string() -> None:
    events = [json.dumps({"model": "engine", "choices": [{"text": "abc"}]}).encode()] * 3
    renamer = rewriting._Renamer("team/a", Usage({"stream": True}), "engine")
    assert len({renamer.rename(event) for event in events}) == 1  # with one member replaced, parsed or not
    for text in (b'a"}], "b": [{"text": "c', b"a\\", b"\xff", b"\n", b"\x00"):
        event = events[0].replace(b"abc", text)
        slow = Usage({"stream": True})
        try:
            expected = rewriting.rename_model(event, "team/a", slow, expected="engine")
        except ProblemError:
            with pytest.raises(ProblemError):
                renamer.rename(event)
        else:
            assert json.loads(renamer.rename(event)) == json.loads(expected)


def test_an_event_without_anything_is_left_out() -> None:
    """llama-server begins a stream for several prompts with one."""
    assert rewritten(b'data: null\n\ndata: {"n":1}\n\ndata: [DONE]\n\n') == b'\n\ndata: {"n":1}\n\ndata: [DONE]\n\n'


def test_what_has_no_model_stays_as_it_is() -> None:
    raw = b'{"object":"list" , "data":[]}'
    assert rewriting.rename_model(raw, "x", Usage({}), expected="y") == raw
    for expected in ("y", ""):
        document = rewriting.rename_model(b'{"model":"y","n":1}', "x", Usage({}), expected=expected)
        assert json.loads(document) == {"model": "x", "n": 1}


def test_an_event_without_an_end_is_cut() -> None:
    with pytest.raises(ProblemError, match="an event more than 4,194,304"):
        rewritten(*[b"x" * (1 << 20)] * 6)


def test_tokens_are_counted_and_who_has_not_asked_for_their_number_does_not_get_it() -> None:
    reported = b'{"prompt_tokens":20,"completion_tokens":3,"total_tokens":23,"prompt_tokens_details":{"cached_tokens":16}}'
    end = b'data: {"model":"engine","choices":[],"usage":' + reported + b"}\n\ndata: [DONE]\n\n"
    for options in (None, {"include_usage": True}):
        usage = Usage({"stream": True, "stream_options": options})
        assert usage.engine_body()["stream_options"] == {"include_usage": True}
        assert (b"total_tokens" in rewritten(STREAM, end, usage=usage)) == bool(options)
        assert usage.tokens == TokenCounts(20, 16, 3)
    whole = Usage({"prompt": "x"})
    assert whole.engine_body() is whole.body
    rewriting.rename_model(b'{"choices":[{}],"usage":' + reported + b"}", "x", whole, expected="")
    assert whole.tokens == TokenCounts(20, 16, 3)


def test_the_tokens_of_several_completions_are_summed_where_each_is_reported_by_itself() -> None:
    """As llama-server does."""
    events = [
        b'data: {"choices":[{"index":%d}],"usage":{"prompt_tokens":5,"completion_tokens":%d}}\n\n' % (index, 10 + index)
        for index in (0, 1)
    ]
    usage = Usage({"stream": True}, has_begun=True)
    rewritten(*events, b"data: [DONE]\n\n", usage=usage)
    assert usage.tokens == TokenCounts(10, 0, 21)
    usage = Usage({"stream": True}, has_begun=True)
    with pytest.raises(ProblemError, match="cut off"):
        rewritten(events[0], usage=usage)
    assert usage.tokens == TokenCounts(5, 0, 10, is_estimate=True)


def test_tokens_of_an_answer_that_has_no_end_are_estimated() -> None:
    usage = Usage({"stream": True, "prompt": "x" * 4000})
    assert usage.tokens == TokenCounts()
    usage.has_begun = True
    rewritten(STREAM, usage=usage)
    assert usage.tokens.is_estimate
    assert 1000 + len(CHUNKS) <= usage.tokens.total < 1050


def test_tokens_of_a_whole_answer_without_a_report_are_estimated() -> None:
    usage = Usage({"prompt": "x" * 400}, has_begun=True)
    rewriting.rename_model(b'{"choices":[{"text":"' + b"y" * 400 + b'"}]}', "x", usage, expected="")
    assert usage.tokens.is_estimate
    assert 100 <= usage.tokens.answer < 110


@pytest.mark.parametrize(
    "reported", [b"null", b"7", b'{"prompt_tokens":-1}', b'{"prompt_tokens":"9"}', b'{"prompt_tokens":1e99}']
)
def test_an_impossible_report_counts_nothing(reported: bytes) -> None:
    usage = Usage({"stream": True})
    rewritten(b'data: {"usage":' + reported + b"}\n\ndata: [DONE]\n\n", usage=usage)
    assert usage.tokens == TokenCounts()
