"""Ollama's API (ollama/docs/api.md): chats and generations translated to OpenAI's form and back, streams as lines of JSON.

A field or an option that means nothing here is refused by name. What says how Ollama itself should hold the model cannot change
an answer, so it is answered, and named in the header `x-adapterhub-ignored`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from adapterhub.serve.engines import CHAT, COMPLETIONS, error_text
from adapterhub.serve.engines.line_cutter import LineCutter
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

from .openai_errors import ProblemError, engine_failed

CHAT_PATH, GENERATE_PATH = "/api/chat", "/api/generate"
IGNORED_HEADER = "x-adapterhub-ignored"
TIME = "1970-01-01T00:00:00Z"
"""The time that is stated for all models: clients need one, and the registry's is not theirs."""
_LINES = "application/x-ndjson"
_SHARED = ("model", "stream", "options", "format", "think", "logprobs", "top_logprobs", "keep_alive", "truncate", "shift")
_FIELDS = {CHAT_PATH: {*_SHARED, "messages", "tools"}, GENERATE_PATH: {*_SHARED, "prompt", "system", "raw"}}
_IGNORED = ("keep_alive", "truncate", "shift")
_LOAD_OPTIONS = (
    "f16_kv", "low_vram", "main_gpu", "num_batch", "num_gpu", "num_thread", "numa", "use_mlock", "use_mmap", "vocab_only",
)  # fmt: skip
_SAME_NAMES = ("frequency_penalty", "min_p", "presence_penalty", "seed", "stop", "temperature", "top_k", "top_p")
_OPTIONS = {
    **dict(zip(_SAME_NAMES, _SAME_NAMES, strict=True)),
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}
_SAME_IN_LLAMA = ("mirostat", "mirostat_eta", "mirostat_tau", "repeat_last_n", "repeat_penalty", "typical_p")
_LLAMA_OPTIONS = {**dict(zip(_SAME_IN_LLAMA, _SAME_IN_LLAMA, strict=True)), "num_keep": "n_keep"}


class Reply(Protocol):
    """The reply to a client, as far as a translation needs it."""

    status: int

    async def send_whole(
        self, status: int, media_type: str, version: str, body: bytes, extra_headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a complete reply."""

    async def begin(self, version: str, media_type: str = "", extra_headers: Mapping[str, str] | None = None) -> None:
        """Begin a stream."""

    async def send_piece(self, body: bytes) -> None:
        """Send the next piece of the stream."""

    async def end(self, body: bytes = b"") -> None:
        """End the stream."""


# ---- requests


class Translation:
    """A request of Ollama's API as one of OpenAI's.

    Args:
        engine: The name of the engine, which decides the names of some options.
        context: The tokens of a conversation; 0 if they are not known.

    Attributes:
        path: The path of OpenAI's API.
        body: The document for it.
        ignored: Fields that change nothing here.

    Raises:
        ProblemError: It has a field that would be ignored, or is malformed.
    """

    def __init__(self, path: str, body: Mapping[str, Any], engine: str, context: int) -> None:
        self.is_chat, self.ignored = path == CHAT_PATH, [name for name in _IGNORED if body.get(name) is not None]
        for name, value in body.items():
            if name not in _FIELDS[path] and value not in (None, "", []):
                raise _refused(name, "is not supported here")
        self.path = COMPLETIONS if body.get("raw") else CHAT
        stream = body.get("stream") is not False
        self.body: dict[str, Any] = {"model": body.get("model"), "stream": stream}
        if stream:
            self.body["stream_options"] = {"include_usage": True}
        self._add_question(body)
        self._add_options(_object(body, "options"), engine, context)
        self._add_form(body)

    def _add_question(self, body: Mapping[str, Any]) -> None:
        """Add the prompt, or the conversation."""
        if self.is_chat:
            self.body["messages"] = _messages(body.get("messages"))
            if body.get("tools"):
                self.body["tools"] = body["tools"]
            return
        if not isinstance(body.get("prompt"), str) or not body["prompt"]:
            raise _refused("prompt", "is missing, or not a text")
        if self.path == COMPLETIONS:
            if body.get("system"):
                raise _refused("system", "has no place in a raw prompt")
            self.body["prompt"] = body["prompt"]
            return
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        self.body["messages"] = [*system, {"role": "user", "content": body["prompt"]}]

    def _add_options(self, options: Mapping[str, Any], engine: str, context: int) -> None:
        """Add the options of sampling."""
        names = {**_OPTIONS, **(_LLAMA_OPTIONS if engine == "llama.cpp" else {})}
        for name, value in options.items():
            if value is None or (name == "num_predict" and value == -1):  # as many as there is room for
                continue
            if name == "num_ctx" and isinstance(value, int) and (not context or value <= context):
                continue
            if name in _LOAD_OPTIONS:
                self.ignored.append(name)
            elif name not in names:
                too_long = f"is more than the {context:,} tokens of a conversation here"
                raise _refused(f"options.{name}", too_long if name == "num_ctx" else "is not supported by this engine")
            else:
                self.body[names[name]] = value

    def _add_form(self, body: Mapping[str, Any]) -> None:
        """Add the form of the answer: JSON, thoughts, probabilities."""
        form, think = body.get("format"), body.get("think")
        if isinstance(form, dict):
            schema = {"name": "format", "schema": form, "strict": True}
            self.body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form == "json":
            self.body["response_format"] = {"type": "json_object"}
        elif form:
            raise _refused("format", 'is neither "json" nor a schema')
        if isinstance(think, str) and think:
            self.body["reasoning_effort"] = think
        elif think is not None and think != "":
            self.body["chat_template_kwargs"] = {"enable_thinking": bool(think)}
        for name in ("logprobs", "top_logprobs"):
            if body.get(name):
                if self.path == COMPLETIONS:
                    raise _refused(name, "is not supported for a raw prompt")
                self.body[name] = body[name]


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Return a conversation in OpenAI's form, in which calls of tools have numbers, and their results refer to these."""
    if not isinstance(messages, list) or not messages:
        raise _refused("messages", "is missing, or not a list")
    pending: list[tuple[str, str]] = []  # calls without a result yet: name and number
    translated = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("images"):
            raise _refused("messages", "has images" if isinstance(message, dict) else "has an entry that is not an object")
        entry: dict[str, Any] = {"role": message.get("role"), "content": message.get("content") or ""}
        if message.get("thinking"):
            entry["reasoning_content"] = message["thinking"]
        if message.get("tool_calls"):
            entry["tool_calls"] = [_call(call, f"call_{number}_{index}") for index, call in enumerate(message["tool_calls"])]
            pending += [(call["function"]["name"], call["id"]) for call in entry["tool_calls"]]
        if message.get("role") == "tool":
            name = message.get("tool_name")
            answered = next((call for call in pending if name in (None, call[0])), None)
            if answered is None:
                raise _refused("messages", "has the result of a tool that was not called")
            pending.remove(answered)
            entry["tool_call_id"] = answered[1]
        translated.append(entry)
    return translated


def _call(call: Any, number: str) -> dict[str, Any]:
    """Return a call of a tool in OpenAI's form."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise _refused("messages", "has a call of a tool without a function")
    arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"id": number, "type": "function", "function": {"name": str(function.get("name")), "arguments": arguments}}


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise _refused(name, "is not an object")
    return value or {}


def _refused(name: str, reason: str) -> ProblemError:
    return ProblemError(400, f"`{name}` {reason}", code="unsupported", param=name)


# ---- answers


class TranslatedReply:
    """A reply that takes an answer of OpenAI's form and sends it in Ollama's."""

    def __init__(self, reply: Reply, translation: Translation, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._reply, self._translation, self._clock = reply, translation, clock
        self._started = clock()
        self._headers = {IGNORED_HEADER: ", ".join(translation.ignored)} if translation.ignored else {}
        self._end: dict[str, Any] = {"done_reason": "stop"}
        self._model, self._cutter = "", LineCutter()
        self._calls: dict[int, dict[str, str]] = {}  # of tools, by their index, put together from their pieces

    @property
    def status(self) -> int:
        """The status that was sent; 0 before."""
        return self._reply.status

    async def send_whole(self, status: int, media_type: str, version: str, body: bytes) -> None:
        """Send a complete answer."""
        document = json_file.parse_object(body, "answer")
        self._note(document)
        choice: Mapping[str, Any] = next(iter(document.get("choices") or []), {})
        message = choice.get("message") or {"content": choice.get("text")}
        self._add_calls(message)
        answer = self._document(message, choice, self._finished_calls()) | self._last()
        await self._reply.send_whole(status, media_type, version, _json(answer), self._headers)

    async def begin(self, version: str) -> None:
        """Begin a stream."""
        await self._reply.begin(version, _LINES, self._headers)

    async def send_piece(self, body: bytes) -> None:
        """Send the lines for some events."""
        events = [line.removeprefix(b"data: ") for line in self._cutter.cut(body) if line.startswith(b"data: {")]
        documents = [piece for event in events for piece in self._pieces(json_file.parse_object(event, "answer"))]
        if documents:
            await self._reply.send_piece(b"".join(_json(document) + b"\n" for document in documents))

    async def end(self) -> None:
        """Send the last line, with the calls of tools and the numbers of tokens."""
        calls = self._finished_calls()
        lines = [self._document({}, {}, calls)] if calls else []
        await self._reply.end(b"".join(_json(line) + b"\n" for line in [*lines, self._document({}, {}, []) | self._last()]))

    def _pieces(self, event: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yield the lines for an event."""
        if event.get("error"):
            yield {"error": error_text(event)}
        self._note(event)
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {"content": choice.get("text")}
            self._add_calls(delta)
            if delta.get("content") or delta.get("reasoning_content"):
                yield self._document(delta, choice, [])

    def _note(self, document: Mapping[str, Any]) -> None:
        """Note the model, why the answer ended, and the tokens."""
        self._model = str(document.get("model") or self._model)
        usage = document.get("usage")
        if isinstance(usage, dict):
            self._end |= {"prompt_eval_count": usage.get("prompt_tokens"), "eval_count": usage.get("completion_tokens")}
        for choice in document.get("choices") or []:
            if choice.get("finish_reason"):
                self._end["done_reason"] = "length" if choice["finish_reason"] == "length" else "stop"

    def _add_calls(self, message: Mapping[str, Any]) -> None:
        """Add the calls of tools in a message, or their pieces in an event."""
        for position, part in enumerate(message.get("tool_calls") or []):
            call = self._calls.setdefault(part.get("index", position), {"name": "", "arguments": ""})
            function = part.get("function") or {}
            for name in call:
                call[name] += function.get(name) or ""

    def _finished_calls(self) -> list[dict[str, Any]]:
        """Return the calls of tools, with their arguments as objects; ProblemError for arguments that are not JSON."""
        try:
            calls = [(call["name"], call["arguments"].encode() or b"{}") for _, call in sorted(self._calls.items())]
            return [{"function": {"name": name, "arguments": json_file.parse_object(raw, "tool call")}} for name, raw in calls]
        except FormatError as error:
            raise engine_failed(str(error)) from error

    def _document(self, message: Mapping[str, Any], choice: Mapping[str, Any], calls: list[Any]) -> dict[str, Any]:
        """Return an answer, or a piece of one."""
        text, thought = message.get("content") or "", message.get("reasoning_content")
        thinking, tools = {"thinking": thought} if thought else {}, {"tool_calls": calls} if calls else {}
        if self._translation.is_chat:
            content: dict[str, Any] = {"message": {"role": "assistant", "content": text, **thinking, **tools}}
        else:
            content = {"response": text, **thinking}
        probabilities = (choice.get("logprobs") or {}).get("content")
        head = {"model": self._model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"), "done": False}
        return {**head, **content, **({"logprobs": probabilities} if probabilities else {})}

    def _last(self) -> dict[str, Any]:
        """Return the members of the last document."""
        return {"done": True, "total_duration": self._clock() - self._started, **self._end}


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# ---- models


def model_entry(name: str, digest: str, base: str, precision: str) -> dict[str, Any]:
    """Return a model of the list; `digest` is empty for the base and for routes."""
    return {"name": name, "model": name, "modified_at": TIME, "size": 0, "digest": digest, "details": _details(base, precision)}


def model_details(version: str, base: str, precision: str, context: int) -> dict[str, Any]:
    """Return what is known of a model; `base` is empty for the base itself."""
    info: dict[str, Any] = {"adapterhub.version": version, "general.architecture": "adapterhub"}
    if context:
        info["adapterhub.context_length"] = context
    details = _details(base, precision)
    return {"modified_at": TIME, "details": details, "model_info": info, "capabilities": ["completion"]}


def _details(base: str, precision: str) -> dict[str, Any]:
    texts = {"parent_model": base, "quantization_level": precision}
    return {**texts, "format": "", "family": "", "families": [], "parameter_size": ""}
