"""Responses, messages and the tokenizer behind the gateway: the version in every place, and nothing of other clients."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.engines import EngineAnswer
from adapterhub.serve.engines.api_paths import (
    ALL_PATHS,
    ENGINE_PATHS,
    MESSAGE_TOKENS,
    MESSAGES,
    RESPONSES,
    answers_no_such_path,
)
from adapterhub.serve.gateway import api_forms, rewriting
from adapterhub.serve.gateway.app import engine_problem
from adapterhub.serve.gateway.openai_errors import ProblemError
from adapterhub.serve.gateway.rewriting import Usage
from tests.support import llama_server, serving
from tests.support.serving import Gateway, Models, Reply

from .test_gateway import version

TURN = {"role": "user", "content": "hi"}
REQUESTS: Mapping[str, Mapping[str, Any]] = {
    "/v1/completions": {"prompt": "hi ", "max_tokens": 6, "temperature": 0},
    "/v1/chat/completions": {"messages": [TURN], "max_tokens": 6, "temperature": 0},
    RESPONSES: {"input": "hi", "max_output_tokens": 6, "temperature": 0},
    "/v1/responses/input_tokens": {"input": "hi"},
    MESSAGES: {"messages": [TURN], "max_tokens": 6, "temperature": 0},
    MESSAGE_TOKENS: {"messages": [TURN]},
    "/tokenize": {"content": "hi"},
    "/detokenize": {"tokens": [74, 75]},
    "/v1/embeddings": {"input": "hi"},
    **{path: {"query": "hi", "documents": ["hi", "ho"]} for path in ("/v1/rerank", "/rerank")},
    **{path: {"text_1": "hi", "text_2": "ho"} for path in ("/v1/score", "/score")},
}


def events(reply: Reply) -> list[dict[str, Any]]:
    """The documents of a stream of typed events, each named before as its type says."""
    blocks = [block.split("\n") for block in reply.body.decode().strip().split("\n\n")]
    documents = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in documents]
    return documents


def text_of(document: Mapping[str, Any]) -> str:
    """The text of a completion, a chat, a response or a message."""
    if "choices" in document:
        choice = document["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    blocks = document["content"] if "content" in document else [part for item in document["output"] for part in item["content"]]
    return "".join(block["text"] for block in blocks)


# ---- the engine


@pytest.mark.peer
def test_responses_and_messages_are_of_the_version_that_was_asked_for(gateway: Gateway, registry: Path) -> None:
    for name in ("base", "team/a1:prod", "team/a2", "base"):
        exact = "base" if name == "base" else version(registry, name)
        chat = text_of(gateway.post("/v1/chat/completions", {**REQUESTS["/v1/chat/completions"], "model": name}).document)
        for path in (RESPONSES, MESSAGES):
            whole = gateway.post(path, {**REQUESTS[path], "model": name})
            assert (whole.status, whole.version, whole.document["model"]) == (200, exact, exact)
            assert text_of(whole.document) == chat
            stream = gateway.post(path, {**REQUESTS[path], "model": name, "stream": True})
            assert (stream.status, stream.version) == (200, exact)
            *deltas, end = events(stream)
            assert end["type"] == ("response.completed" if path == RESPONSES else "message_stop")
            texts = [event["delta"] for event in deltas if event["type"].endswith(("output_text.delta", "content_block_delta"))]
            assert "".join(part if isinstance(part, str) else part["text"] for part in texts) == chat
            named = [event[key] for event in [*deltas, end] for key in ("response", "message") if "model" in event.get(key, {})]
            assert {document["model"] for document in named} == {exact}


@pytest.mark.peer
def test_the_tokenizer_of_the_engine_can_be_asked(gateway: Gateway) -> None:
    tokens = gateway.post("/tokenize", {"model": "team/a0", "content": "hi"}).document["tokens"]
    assert gateway.post("/detokenize", {"model": "team/a0", "tokens": tokens}).document == {"content": "hi"}
    for path in (MESSAGE_TOKENS, "/v1/responses/input_tokens"):
        assert gateway.post(path, {**REQUESTS[path], "model": "team/a0"}).document["input_tokens"] > 2


@pytest.mark.peer
@pytest.mark.parametrize("path", sorted(ALL_PATHS))
def test_what_llama_server_has_is_answered_and_the_rest_is_refused_by_its_name(gateway: Gateway, path: str) -> None:
    reply = gateway.post(path, {**REQUESTS[path], "model": "team/a0"})
    if path in ENGINE_PATHS["llama.cpp"]:
        assert reply.status == 200, reply.body
        return
    error = reply.document["error"]
    assert (reply.status, error["code"]) == (404, "unsupported")
    assert error["message"].startswith("llama.cpp, as it was started, answers /detokenize, ")
    assert error["message"].endswith(f"not {path}")


@pytest.mark.peer
def test_torch_answers_what_it_has_and_refuses_the_rest(models: Models, registry: Path, tmp_path: Path) -> None:
    with serving.gateway(models.base, registry, tmp_path / "gateway", "--engine", "torch") as gateway:
        for path in sorted(ALL_PATHS):
            reply = gateway.post(path, {**REQUESTS[path], "model": "team/a0"})
            if path in ENGINE_PATHS["in process"]:
                assert reply.status == 200, reply.body
            else:
                assert (reply.status, reply.document["error"]["code"]) == (404, "unsupported")
                answered = "torch, as it was started, answers /v1/chat/completions and /v1/completions, "
                assert reply.document["error"]["message"] == f"{answered}not {path}"
        talk = {"model": "team/a1", "messages": [TURN], "stream": False, "options": {"num_predict": 4, "temperature": 0}}
        chat = gateway.post("/v1/chat/completions", {"model": "team/a1", "messages": [TURN], "max_tokens": 4, "temperature": 0})
        assert gateway.post("/api/chat", talk).document["message"]["content"] == text_of(chat.document)


@pytest.mark.peer
def test_one_process_refuses_messages_whose_adapter_it_would_ignore(models: Models, registry: Path, tmp_path: Path) -> None:
    options = ("--program", llama_server.program(), "--one-process")
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        for name in ("team/a0", "base", "team/a1", "team/a0"):
            chat, response = (gateway.post(path, {**REQUESTS[path], "model": name}) for path in list(REQUESTS)[1:3])
            assert text_of(response.document) == text_of(chat.document)
        refused = gateway.post(MESSAGES, {**REQUESTS[MESSAGES], "model": "team/a0"})
        assert (refused.status, refused.document["error"]["code"]) == (404, "unsupported")


@pytest.mark.peer
def test_alone_one_llama_server_ignores_the_adapters_of_messages(models: Models, tmp_path: Path) -> None:
    """If this fails, llama.cpp is repaired, and one process may answer with messages."""
    import adapterhub as ah

    ah.convert(models.adapter(0), tmp_path / "a0.gguf", to="gguf", base=models.gguf)
    with llama_server.alone(models.gguf, "--lora", tmp_path / "a0.gguf") as url:
        server = Gateway(url, None, tmp_path)  # type: ignore[arg-type]

        def ask(path: str, scale: float) -> str:
            fields = {"lora": [{"id": 0, "scale": scale}], "cache_prompt": False}
            return text_of(server.post(path, {**REQUESTS[path], **fields}).document)

        assert ask(RESPONSES, 0) == ask("/v1/chat/completions", 0) != ask(RESPONSES, 1)
        assert ask(MESSAGES, 0) == ask(MESSAGES, 1)


@pytest.mark.peer
@pytest.mark.parametrize("path", [RESPONSES, MESSAGES, MESSAGE_TOKENS, "/tokenize"])
@pytest.mark.parametrize("field", ["lora", "id_slot", "cache_prompt"])
def test_fields_that_choose_an_adapter_are_refused_on_every_path(gateway: Gateway, path: str, field: str) -> None:
    reply = gateway.post(path, {**REQUESTS[path], "model": "team/a0", field: []})
    assert (reply.status, reply.document["error"]["param"]) == (400, field)


# ---- state


@pytest.mark.peer
@pytest.mark.parametrize("field", ["previous_response_id", "conversation", "background", "store", "prompt"])
def test_what_would_be_stored_is_refused_by_name(gateway: Gateway, field: str) -> None:
    reply = gateway.post(RESPONSES, {**REQUESTS[RESPONSES], "model": "team/a0", field: "resp_1"})
    assert (reply.status, reply.document["error"]["code"], reply.document["error"]["param"]) == (400, "unsupported", field)
    assert gateway.post(RESPONSES, {**REQUESTS[RESPONSES], "model": "team/a0", field: None}).status == 200


@pytest.mark.peer
@pytest.mark.parametrize(("method", "path"), [("GET", "resp_1"), ("DELETE", "resp_1"), ("POST", "resp_1/cancel")])
def test_responses_of_others_cannot_be_read_or_ended(gateway: Gateway, method: str, path: str) -> None:
    reply = gateway.request(method, f"{RESPONSES}/{path}")
    assert (reply.status, reply.document["error"]["code"]) == (404, "unsupported")


def test_engines_are_told_to_store_nothing() -> None:
    assert api_forms.engine_body(RESPONSES, {"input": "hi"}) == {"input": "hi", "store": False}
    assert api_forms.engine_body(MESSAGES, {"messages": []}) == {"messages": []}


# ---- errors and keys


@pytest.mark.peer
def test_clients_of_anthropic_get_errors_in_their_form(gateway: Gateway) -> None:
    for path in (MESSAGES, MESSAGE_TOKENS):
        reply = gateway.post(path, {**REQUESTS[path], "model": "team/none"})
        assert (reply.status, reply.document["type"]) == (404, "error")
        assert reply.document["request_id"] == reply.headers["x-request-id"]
        error = reply.document["error"]
        assert (error["type"], error["code"]) == ("not_found_error", "model_not_found")
    incomplete = gateway.post(MESSAGES, {"model": "team/a0", "max_tokens": 3})
    assert (incomplete.status, incomplete.document["error"]["type"]) == (400, "invalid_request_error")
    assert "'messages' is required" in incomplete.document["error"]["message"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, "authentication_error"), (413, "request_too_large"), (429, "rate_limit_error"), (502, "api_error")],
)
def test_kinds_of_errors_are_those_of_anthropic(status: int, kind: str) -> None:
    document = json.loads(api_forms.problem_body(ProblemError(status, "no", code="x"), MESSAGES, "1"))
    assert (document["type"], document["error"]["type"], document["error"]["code"]) == ("error", kind, "x")


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_an_error_in_a_stream_is_an_event_of_its_form(path: str) -> None:
    name, data, *_ = api_forms.problem_event(ProblemError(502, "it broke", code="engine_failed"), path, "1").split(b"\n")
    assert name == b"event: error"
    document = json.loads(data.removeprefix(b"data: "))
    assert (document["type"], document["error"]["message"]) == ("error", "it broke")


@pytest.mark.peer
def test_keys_may_come_as_anthropics_clients_send_them_and_their_tokens_are_counted(
    models: Models, registry: Path, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"ah-secret").hexdigest()
    (tmp_path / "routes.toml").write_text(f'[keys.ada]\nsha256 = "{digest}"\ntokens = "90/3600"\n')
    options = ("--program", llama_server.program(), "--route", tmp_path / "routes.toml")
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        assert gateway.post("/tokenize", {"model": "base", "content": "hi " * 500}, x_api_key="ah-secret").status == 200
        wrong = gateway.post(MESSAGES, {**REQUESTS[MESSAGES], "model": "base"}, x_api_key="wrong")
        assert (wrong.status, wrong.document["error"]["type"]) == (401, "authentication_error")
        statuses = []
        for path, stream in ((MESSAGES, True), (RESPONSES, True), (MESSAGES, False), (RESPONSES, False)):  # 27 tokens each
            body = {**REQUESTS[path], "model": "base", "stream": stream}
            statuses.append(gateway.post(path, body, x_api_key="ah-secret").status)
        assert statuses == [200] * 4
        assert gateway.post(MESSAGES, {**REQUESTS[MESSAGES], "model": "base"}, x_api_key="ah-secret").status == 429
        assert gateway.get("/v1/responses/resp_1").status == 401


# ---- any engine


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def rewritten(path: str, raw: bytes, usage: Usage | None = None) -> bytes:
    usage = usage or Usage({}, path=path)

    async def all_of() -> bytes:
        rewritten_events = rewriting.events(
            EngineAnswer(200, "text/event-stream", pieces(raw), model="engine"), "team/a", usage
        )
        return b"".join([piece async for piece in rewritten_events])

    return asyncio.run(all_of())


STREAMS = {
    RESPONSES: [
        {"response": {"id": "1", "model": "engine"}, "sequence_number": 0, "type": "response.created"},
        {"type": "response.output_text.delta", "delta": 'a "type":"response.completed" b'},
        {"type": "response.completed", "response": {"model": "engine", "usage": {"input_tokens": 20, "output_tokens": 3}}},
    ],
    MESSAGES: [
        {"type": "message_start", "message": {"model": "engine", "usage": {"input_tokens": 4, "cache_read_input_tokens": 16}}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": '"type":"message_stop"'}},
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ],
}


def raw_stream(path: str) -> bytes:
    lines = [f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n" for event in STREAMS[path]]
    return "".join(lines).encode()


@pytest.mark.parametrize("path", sorted(STREAMS))
def test_names_in_events_are_renamed_and_tokens_are_counted(path: str) -> None:
    usage = Usage({"stream": True}, has_begun=True, path=path)
    assert usage.engine_body() == {"stream": True}  # only completions have `stream_options`
    assert rewritten(path, raw_stream(path), usage) == raw_stream(path).replace(b"engine", b"team/a")
    assert (usage.tokens.total, usage.parts) == (23, 1)
    assert not usage.tokens.is_estimate


@pytest.mark.parametrize("path", sorted(STREAMS))
def test_a_typed_stream_without_its_last_event_was_cut_off(path: str) -> None:
    for cut in (raw_stream(path).rindex(b"event: "), raw_stream(path).rindex(b"data: ")):
        with pytest.raises(ProblemError, match="cut off"):
            rewritten(path, raw_stream(path)[:cut])


@pytest.mark.parametrize("path", sorted(STREAMS))
def test_an_event_of_another_model_is_an_error(path: str) -> None:
    with pytest.raises(ProblemError, match="another model"):
        rewritten(path, raw_stream(path).replace(b'"model":"engine"', b'"model":"base"'))


@pytest.mark.parametrize(
    ("status", "document", "is_path"),
    [
        (404, {"detail": "Not Found"}, True),  # FastAPI
        (404, {"error": {"message": "Not Found", "type": "NotFoundError", "code": 404}}, True),  # vLLM
        (404, {"error": {"message": "File Not Found", "type": "not_found_error"}}, True),  # llama-server
        (405, {"detail": "Method Not Allowed"}, True),
        (501, {"error": {"message": "This server does not support reranking", "type": "not_supported_error"}}, True),
        (404, {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError"}}, False),
        (400, {"error": {"message": "model 'x' not found"}}, False),
    ],
)
def test_a_path_that_an_engine_does_not_have_is_not_taken_for_a_missing_model(
    status: int, document: Any, is_path: bool
) -> None:
    answer = EngineAnswer(status, "application/json", pieces())
    problem = engine_problem(answer, json.dumps(document).encode(), "vllm does not answer /v1/score")
    assert (problem.status, problem.code) == ((404, "unsupported") if is_path else (status, "refused"))
    assert ("vllm does not answer /v1/score" in problem.message) == is_path
    assert answers_no_such_path(404, "Not Found")


def test_users_are_known_by_either_form() -> None:
    assert (
        api_forms.identifiers_of({"user": "ada"})
        == api_forms.identifiers_of({"metadata": {"user_id": "ada"}})
        == {"user": "ada"}
    )
    assert api_forms.identifiers_of({"metadata": "ada", "safety_identifier": 7}) == {"safety_identifier": "7"}


def test_a_message_that_was_cut_off_keeps_the_tokens_of_its_prompt_and_is_marked() -> None:
    raw = raw_stream(MESSAGES)
    usage = Usage({"stream": True}, has_begun=True, path=MESSAGES)
    with pytest.raises(ProblemError, match="cut off"):
        rewritten(MESSAGES, raw[: raw.index(b"event: message_delta")], usage)
    assert (usage.tokens.prompt, usage.tokens.cached, usage.tokens.answer, usage.tokens.is_estimate) == (20, 16, 1, True)
