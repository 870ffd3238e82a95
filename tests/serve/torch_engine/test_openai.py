"""OpenAI's documents: read strictly, answered as the openai client expects them, errors in its form."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from adapterhub.serve.torch_engine import Blend, Request, open_host  # noqa: E402
from adapterhub.serve.torch_engine.host_loop import Host  # noqa: E402
from adapterhub.serve.torch_engine.openai import ApiError, submit  # noqa: E402
from adapterhub.serve.torch_engine.request_fields import CHAT, COMPLETIONS  # noqa: E402
from tests.conftest import need_module  # noqa: E402
from tests.serve.torch_engine.conftest import Peers, with_adapters  # noqa: E402
from tests.support import tool_templates  # noqa: E402

BLEND: Blend = (("a1", 1.0),)
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def host(llama: Peers) -> Iterator[Host]:
    with with_adapters(llama, slots=4, rows=8, waiting=20) as open_engine:
        yield open_engine


def text_of(host: Host, prompt: str, count: int, **options: Any) -> str:
    ids = host.text.tokens(prompt, special=options.pop("special", True))
    return "".join(piece.text for piece in host.submit(Request(ids, BLEND, count, **options)))


def whole(host: Host, path: str, **body: Any) -> dict[str, Any]:
    return submit(host, path, body, BLEND, "team/sql").whole()


def chunks(host: Host, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = submit(host, path, {**body, "stream": True}, BLEND, "team/sql")
    assert answer.stream
    return list(answer.chunks())


def test_a_completion(host: Host) -> None:
    answer = whole(host, COMPLETIONS, prompt="abc", max_tokens=12, temperature=0)
    assert (answer["object"], answer["model"]) == ("text_completion", "team/sql")
    [choice] = answer["choices"]
    assert choice == {"index": 0, "text": text_of(host, "abc", 12), "logprobs": None, "finish_reason": "length"}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    assert len(whole(host, COMPLETIONS, prompt="abc", temperature=0)["choices"][0]["text"]) <= 16


def test_a_chat_is_the_base_s_template_and_ends_by_default_at_what_the_base_sees(host: Host, llama: Peers) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.base)
    prompt = tokenizer.apply_chat_template(HELLO["messages"], tokenize=False, add_generation_prompt=True)
    right = text_of(host, prompt, 12, special=False)
    answer = whole(host, CHAT, **HELLO)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": right, "refusal": None}
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert whole(host, CHAT, **{**HELLO, "messages": in_parts})["choices"] == answer["choices"]
    newer = {**HELLO, "max_tokens": None, "max_completion_tokens": 3}
    assert whole(host, CHAT, **newer)["usage"]["completion_tokens"] == 3
    free = whole(host, CHAT, messages=HELLO["messages"], temperature=1.9, seed=1)
    assert free["usage"]["total_tokens"] == host.longest or free["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_chunks_are_the_whole_in_parts(host: Host, path: str) -> None:
    chat = path == CHAT
    body: dict[str, Any] = {"temperature": 0.8, "seed": 4, "n": 2, "max_tokens": 15}
    body |= (
        {"logprobs": True, "top_logprobs": 2, "messages": HELLO["messages"]} if chat else {"logprobs": 2, "prompt": ["ab", "c"]}
    )
    right = whole(host, path, **body)
    parts_ = chunks(host, path, **body, stream_options={"include_usage": True})
    *parts, last = parts_
    assert last["choices"] == []
    assert last["usage"] == right["usage"]
    assert {part["object"] for part in parts} == {"chat.completion.chunk" if chat else "text_completion"}
    assert all(part["usage"] is None for part in parts)
    assert len({part["id"] for part in parts_}) == 1
    for choice in right["choices"]:
        choice_parts = [part_ for part in parts for part_ in part["choices"] if part_["index"] == choice["index"]]
        if chat:
            assert choice_parts[0]["delta"] == {"role": "assistant", "content": ""}
            choice_parts = choice_parts[1:]
            assert "".join(part_["delta"].get("content", "") for part_ in choice_parts) == choice["message"]["content"]
            assert [token for part_ in choice_parts for token in part_["logprobs"]["content"]] == choice["logprobs"]["content"]
        else:
            assert "".join(part_["text"] for part_ in choice_parts) == choice["text"]
            for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [value for part_ in choice_parts for value in part_["logprobs"][key]] == choice["logprobs"][key]
        assert [part_["finish_reason"] for part_ in choice_parts] == [None] * (len(choice_parts) - 1) + [
            choice["finish_reason"]
        ]
    texts = [json.dumps(choice.get("message", choice.get("text"))) for choice in right["choices"]]
    assert len(set(texts)) == len(texts) == (2 if chat else 4)


def test_logprobs_name_the_tokens(host: Host) -> None:
    logprobs = whole(host, COMPLETIONS, prompt="abc", max_tokens=5, temperature=0, logprobs=1)["choices"][0]["logprobs"]
    assert [len(top) for top in logprobs["top_logprobs"]] == [1] * 5
    assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"]
    first = whole(host, CHAT, **HELLO, logprobs=True)["choices"][0]["logprobs"]["content"][0]
    assert first["bytes"] == list(first["token"].encode())
    assert first["top_logprobs"] == []


def test_prompts_of_tokens_and_several_prompts(host: Host) -> None:
    ids = [host.text.tokens(text, special=True) for text in ("ab", "cd")]
    by_text, by_ids = (whole(host, COMPLETIONS, prompt=p, temperature=0, max_tokens=4) for p in (["ab", "cd"], ids))
    assert by_text["choices"] == by_ids["choices"]
    assert [choice["index"] for choice in by_text["choices"]] == [0, 1]
    assert by_text["usage"]["prompt_tokens"] == 4
    assert (
        whole(host, COMPLETIONS, prompt=ids[1], temperature=0, max_tokens=4)["choices"][0]["text"]
        == (by_text["choices"][1]["text"])
    )


def test_stop_texts(host: Host) -> None:
    right = text_of(host, "abc", 12)
    choice = whole(host, COMPLETIONS, prompt="abc", max_tokens=12, temperature=0, stop=[right[3:5]])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (right[: right.index(right[3:5])], "stop")


TOOLS = [{"type": "function", "function": {"name": "f"}}]
NAMED = {"type": "function", "function": {"name": "g"}}


def json_schema(schema: Any, *, strict: bool = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": strict}}


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, {}, "prompt", "is not a text or a list of tokens"),
    (COMPLETIONS, {"prompt": ""}, "prompt", "no token to continue"),
    (COMPLETIONS, {"prompt": []}, "prompt", "is not a text"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt", "is not a text"),
    (COMPLETIONS, {"prompt": [True]}, "prompt", "is not a text"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt", "asks for 129 answers, n to each prompt; at most 128 are"),
    (COMPLETIONS, {"prompt": ["a"] * 65, "n": 2}, "prompt", "are supported. Send fewer prompts at once"),
    (COMPLETIONS, {"prompt": [99999]}, "prompt", "not one of the 259"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of", "not supported"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
    (COMPLETIONS, {"prompt": "a", "logprobs": True}, "logprobs", "not a whole number"),
    (COMPLETIONS, {"prompt": "a", "messages": []}, "messages", "unknown parameter"),
    (COMPLETIONS, {"prompt": "a", "frequency_penalty": 2.5}, "frequency_penalty", "is not a number from -2 to 2"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": -3}, "presence_penalty", "is not a number from -2 to 2"),
    (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "is not a number from 0.01 to 100"),
    (
        COMPLETIONS,
        {"prompt": "a", "repeat_penalty": 1.1},
        "repeat_penalty",
        "unknown parameter",
    ),  # llama-server's last 64 tokens
    (COMPLETIONS, {"prompt": "a", "top_k": 2.5}, "top_k", "is not a whole number from -1"),
    (COMPLETIONS, {"prompt": "a", "min_p": 1.5}, "min_p", "is not a number from 0 to 1"),
    (COMPLETIONS, {"prompt": "a", "ignore_eos": 1}, "ignore_eos", "neither true nor false"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "a value is not a number"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "a key is not the number of a token"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias", "a token is not one of"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "from 0 to 2"),
    (COMPLETIONS, {"prompt": "a", "temperature": float("nan")}, "temperature", "from 0 to 2"),
    (COMPLETIONS, {"prompt": "a", "temperature": "1"}, "temperature", "from 0 to 2"),
    (COMPLETIONS, {"prompt": "a", "temperature": 10**400}, "temperature", "from 0 to 2"),
    (COMPLETIONS, {"prompt": "a", "top_p": 1.5}, "top_p", "from 0 to 1"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "from 1 to 128"),
    (COMPLETIONS, {"prompt": "a", "seed": 1.5}, "seed", "not a whole number"),
    (COMPLETIONS, {"prompt": "a", "seed": 10**30}, "seed", "not a whole number"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, "stop", "has 17 texts; at most 16 are supported"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x" * 257]}, "stop", "256 characters"),
    (COMPLETIONS, {"prompt": "a", "stop": [""]}, "stop", "256 characters"),
    (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream", "neither true nor false"),
    (COMPLETIONS, {"prompt": "a", "stream_options": 1}, "stream_options", "not an object"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "whole number from 1"),
    (COMPLETIONS, {"prompt": "a", "x" * 999: 1}, "x" * 80, "unknown parameter"),
    (CHAT, {"messages": []}, "messages", "not a list of messages"),
    (CHAT, {"messages": "hello"}, "messages", "not a list of messages"),
    (CHAT, {"messages": ["hello"]}, "messages", "not an object with a role"),
    (CHAT, {"messages": [{"role": 1}]}, "messages", "not an object with a role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", "not a text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "is not a text"),
    (COMPLETIONS, {"prompt": "a", "tools": TOOLS}, "tools", "not supported"),
    (CHAT, {**HELLO, "tools": TOOLS}, "tools", "knows no tools"),
    (CHAT, {**HELLO, "tools": {}}, "tools", "is not a list of at most 128 tools"),
    (CHAT, {**HELLO, "tools": [{"type": "custom"}]}, "tools", "has a tool that is not of the type function"),
    (CHAT, {**HELLO, "tools": [{"type": "function"}]}, "tools", "is not an object"),
    (
        CHAT,
        {**HELLO, "tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools",
        "has a name that is not of 1 to 64",
    ),
    (CHAT, {**HELLO, "tools": TOOLS, "tool_choice": "some"}, "tool_choice", "is not none, auto, required or a function"),
    (CHAT, {**HELLO, "tools": TOOLS, "tool_choice": NAMED}, "tool_choice", "names 'g', which is none of the tools"),
    (CHAT, {**HELLO, "tool_choice": "required"}, "tool_choice", "needs tools"),
    (CHAT, {**HELLO, "parallel_tool_calls": 1}, "parallel_tool_calls", "neither true nor false"),
    (CHAT, {**HELLO, "messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages", "are not a list of calls"),
    (CHAT, {**HELLO, "response_format": "json"}, "response_format", "one of text, json_object, json_schema"),
    (CHAT, {**HELLO, "response_format": {"type": "json_object", "schema": {}}}, "response_format", "an unknown field 'schema'"),
    (CHAT, {**HELLO, "response_format": {"type": "json_schema"}}, "response_format", "is not an object"),
    (CHAT, {**HELLO, "response_format": json_schema(None)}, "response_format", "a schema that is not an object"),
    (
        CHAT,
        {**HELLO, "response_format": json_schema({"not": {}})},
        "response_format",
        'is not supported (Unimplemented keys: ["not"',
    ),
    (CHAT, {**HELLO, "response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "cannot be combined"),
    (CHAT, {**HELLO, "reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    (CHAT, {**HELLO, "top_logprobs": 3}, "top_logprobs", "needs logprobs to be true"),
    (CHAT, {**HELLO, "prompt": "x"}, "prompt", "unknown parameter"),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"), WRONG, ids=[f"{case[2][:20]}-{at}" for at, case in enumerate(WRONG)]
)
def test_what_is_wrong_is_named(host: Host, path: str, body: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        submit(host, path, body, BLEND, "team/sql")
    assert caught.value.status == 400
    error = caught.value.document["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_what_asks_for_nothing_more_is_accepted(host: Host) -> None:
    neutral = {"echo": False, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me"}
    neutral |= {"suffix": None, "unheard_of": None, "metadata": {"a": "b"}, "stop": None, "seed": None}
    neutral |= {"repetition_penalty": 1, "top_k": -1, "min_p": 0, "ignore_eos": False}
    assert whole(host, COMPLETIONS, prompt="abc", max_tokens=2, **neutral)["choices"]
    assert whole(host, CHAT, **HELLO, tools=[], tool_choice="auto", response_format={"type": "text"})["choices"]


def no_lines(host: Host) -> dict[str, int]:
    """A bias against new lines, on which random weights spend many tokens."""
    return {str(host.text.tokens("\n", special=False)[0]): -100}


DAYS = {"type": "object", "properties": {"day": {"enum": ["Monday", "Friday"]}, "free": {"type": "boolean"}}}
DAYS |= {"required": ["day", "free"], "additionalProperties": False}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_json_schema_holds_for_every_answer_of_a_batch_and_for_no_neighbor(host: Host, path: str) -> None:
    body: dict[str, Any] = {"prompt": "abc"} if path == COMPLETIONS else {"messages": HELLO["messages"]}
    body |= {"max_tokens": 100, "temperature": 1.8, "seed": 2, "n": 4, "logit_bias": no_lines(host)}
    right = whole(host, path, **body)["choices"]
    with ThreadPoolExecutor(3) as pool:
        fields: list[dict[str, Any]] = [{"response_format": json_schema(DAYS)}, {}, {"response_format": json_schema(DAYS)}]
        answers = [answer["choices"] for answer in pool.map(lambda values: whole(host, path, **body, **values), fields)]
    assert answers[1] == right
    assert answers[0] == answers[2]
    texts = [choice.get("text") or choice["message"]["content"] for choice in answers[0]]
    assert len(set(texts)) > 1
    assert {choice["finish_reason"] for choice in answers[0]} == {"stop"}
    for document in map(json.loads, texts):
        assert document["day"] in ("Monday", "Friday")
        assert document["free"] in (True, False)


def test_a_schema_that_is_not_strict_may_have_what_the_grammar_does_not_know(host: Host) -> None:
    form = {"response_format": json_schema({**DAYS, "not": {"required": ["x"]}}, strict=False)}
    answer = whole(host, CHAT, **{**HELLO, "max_tokens": 100, "logit_bias": no_lines(host), **form})
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"day", "free"}


def test_logarithms_of_probabilities_under_a_grammar_are_those_of_the_base(host: Host) -> None:
    form = {"response_format": json_schema(DAYS), "logprobs": True, "top_logprobs": 2, "max_tokens": 60}
    first = whole(host, CHAT, **{**HELLO, **form})["choices"][0]["logprobs"]["content"][0]
    free = whole(host, CHAT, **{**HELLO, "logprobs": True, "top_logprobs": 2})["choices"][0]["logprobs"]["content"][0]
    assert first["token"] == "{"
    assert first["top_logprobs"] == free["top_logprobs"]


def test_without_the_library_of_grammars_the_extra_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ApiError, match=r"need llguidance, which is not installed. Run `pip install 'adapterhub\[train\]'`"):
        submit(host, CHAT, {**HELLO, "response_format": {"type": "json_object"}}, BLEND, "m")
    assert whole(host, CHAT, **HELLO)["choices"]


def test_templates_that_know_no_tools_or_write_them_in_another_form_are_refused(llama: Peers, tmp_path: Path) -> None:
    for file in llama.base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": tool_templates.CODER}))
    with open_host(tmp_path, slots=1, rows=1) as host:
        with pytest.raises(ApiError, match="writes calls in a form that this engine does not know. Serve it with another"):
            submit(host, CHAT, {**HELLO, "tools": TOOLS}, (), "base")
        assert submit(host, CHAT, {**HELLO, "tools": TOOLS, "tool_choice": "none"}, (), "base").whole()["choices"]


def test_more_than_the_base_sees(host: Host) -> None:
    together = r"the prompt has [\d,]+ tokens and the answer may have [\d,]+, but .* together have at most 512. Ask for fewer"
    text = r"prompt: has 9,000,000 characters, and the base sees 512 tokens at most. Shorten the text"
    for body, says in (
        ({"prompt": "a" * 600}, together),
        ({"prompt": "a" * 500, "max_tokens": 13}, together),
        ({"prompt": "a", "max_tokens": 2**31}, together),
        ({"prompt": "a" * 9_000_000}, text),
    ):
        with pytest.raises(ApiError, match=says) as caught:
            submit(host, COMPLETIONS, body, BLEND, "team/sql")
        assert (caught.value.status, caught.value.document["error"]["code"]) == (400, "context_length_exceeded")


def test_a_bug_is_an_error_of_the_server_without_a_traceback(host: Host) -> None:
    no_model: Any = None
    with pytest.raises(ApiError, match=r"^the engine failed \(TypeError\)$") as caught:
        submit(host, COMPLETIONS, {"prompt": "a"}, no_model, "team/sql")
    assert (caught.value.status, caught.value.document["error"]["type"]) == (500, "server_error")


def test_a_version_that_is_not_loaded_and_a_queue_that_is_full(host: Host) -> None:
    with pytest.raises(ApiError) as caught:
        submit(host, COMPLETIONS, {"prompt": "a"}, (("nobody", 1.0),), "nobody")
    assert (caught.value.status, caught.value.document["error"]["code"]) == (404, "not-loaded")
    with pytest.raises(ApiError) as caught:
        submit(host, COMPLETIONS, {"prompt": "a", "n": 128, "max_tokens": 400, "temperature": 1.5}, BLEND, "team/sql")
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    assert whole(host, COMPLETIONS, prompt="a", max_tokens=2)["choices"]  # those that had a place were canceled


def test_a_canceled_answer_ends_with_an_error(host: Host) -> None:
    answer = submit(
        host, COMPLETIONS, {"prompt": "a", "max_tokens": 400, "temperature": 1.9, "stream": True}, BLEND, "team/sql"
    )
    parts = answer.chunks()
    next(parts)
    answer.cancel()
    with pytest.raises(ApiError) as caught:
        list(parts)
    assert caught.value.status == 503


def test_conversations_of_many_threads_are_never_each_other_s(host: Host) -> None:
    def prompts_of(at: int) -> list[str]:
        return [host.text.conversation([{"role": "user", "content": f"{at} {turn} " + "x" * (at * 700)}]) for turn in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for at, texts in enumerate(pool.map(prompts_of, range(8))):
            assert [text.splitlines()[1].split()[:2] for text in texts] == [[str(at), str(turn)] for turn in range(20)]


def test_a_base_without_a_chat_template(llama: Peers, tmp_path: Path) -> None:
    for file in llama.base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with open_host(tmp_path, slots=1, rows=1) as host, pytest.raises(ApiError, match="no chat template"):
        submit(host, CHAT, HELLO, (), "base")


def test_the_documents_are_those_of_the_openai_client(host: Host) -> None:
    need_module("openai")
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    body = {"prompt": "abc", "max_tokens": 4, "logprobs": 2}
    Completion.model_validate(whole(host, COMPLETIONS, **body), strict=True)
    ChatCompletion.model_validate(whole(host, CHAT, **HELLO, logprobs=True, top_logprobs=2), strict=True)
    for chunk in chunks(host, CHAT, **HELLO, logprobs=True, stream_options={"include_usage": True}):
        ChatCompletionChunk.model_validate(chunk, strict=True)
