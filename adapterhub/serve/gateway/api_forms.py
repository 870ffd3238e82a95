"""What OpenAI's responses and Anthropic's messages have in other places than completions: names, tokens, ends and errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapterhub.serve.engines.api_paths import ANSWERED_BY_TEXT, MESSAGE_TOKENS, MESSAGES, RESPONSES, WITHOUT_MODEL
from adapterhub_converters.containers.json_file import is_integer
from adapterhub_converters.display import printable

from .openai_errors import ProblemError, engine_failed
from .rollout_plan import STICKY_FIELDS

ANTHROPIC = frozenset({MESSAGES, MESSAGE_TOKENS})
BYTES_PER_TOKEN = 4
"""For estimates."""
_MAX_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n_predict")  # names of the limit of an answer
_LONG_ANSWER = 4096  # tokens that are expected of an answer without a limit
_MAX_CONTEXT, _MAX_CHOICES = 1 << 24, 1 << 20  # tokens and answers of one request that are expected at most
_MAX_ID = 128  # characters of an answer's id
_MAX_IDENTIFIER = 1000  # characters; more do not tell clients apart
_NESTED = ("response", "message")  # the members of events that have a `model` of their own
_LAST_TYPES = ("message_stop", "error", "response.completed", "response.incomplete", "response.failed")
# Engines write events without spaces, and so do we. A text cannot look like this, because its quotes are escaped.
_LAST_EVENTS = tuple(f'"type":"{name}"'.encode() for name in _LAST_TYPES)
_DONE = (b"data: [DONE]\n",)
_BY_LENGTH = frozenset({"length", "max_tokens", "max_output_tokens"})
_WITH_REASON = frozenset({"stop_reason", "incomplete_details", "response", "delta"})  # members of messages and responses
# An engine finds these by a number that any client may guess, whatever version or key they belong to.
_STATE = ("previous_response_id", "conversation", "background", "store", "prompt")
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


# ---- requests


def check_state(path: str, body: Mapping[str, Any]) -> None:
    """Raise ProblemError for a request that needs or leaves something stored in the engine."""
    for name in _STATE if path == RESPONSES else ():
        if body.get(name):
            message = f"`{name}` needs stored responses, and none are stored here; send the whole conversation instead"
            raise ProblemError(400, message, code="unsupported", param=name)


def engine_body(path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the request for the engine, which must store nothing; `store` is true by default."""
    return {**body, "store": False} if path == RESPONSES else body


def identifiers_of(body: Mapping[str, Any]) -> dict[str, str]:
    """Return what a request says of its client, by the names of STICKY_FIELDS; `user` in OpenAI's form or in Anthropic's."""
    metadata = body.get("metadata")
    user = body.get("user") or (metadata.get("user_id") if isinstance(metadata, dict) else "")
    values = {name: body.get(name) for name in STICKY_FIELDS} | {"user": user}
    return {name: str(value)[:_MAX_IDENTIFIER] for name, value in values.items() if value}


def expected_tokens(path: str, body: Mapping[str, Any], context: int) -> int:
    """Return about how many tokens a request takes at most, its answer included.

    Args:
        context: The tokens of a conversation; 0 if they are not known.
    """
    if path in WITHOUT_MODEL:
        return 0
    prompt = len(json.dumps(body)) // BYTES_PER_TOKEN
    if path not in ANSWERED_BY_TEXT:
        return prompt
    limits = (body.get(name) for name in _MAX_TOKENS)
    tokens = next((limit for limit in limits if is_integer(limit) and limit >= 0), _LONG_ANSWER)
    counts = [value for name in ("n", "best_of") if is_integer(value := body.get(name)) and value > 0]
    texts = body.get("prompt")
    if isinstance(texts, list) and not all(map(is_integer, texts)):
        counts = [len(texts) * max(counts, default=1)]
    return prompt + min(max(counts, default=1), _MAX_CHOICES) * min(tokens, context or _MAX_CONTEXT)


# ---- answers


def rename_nested(members: Mapping[str, Any], model: str, expected: str) -> Mapping[str, Any] | None:
    """Return an event with another `model` in its response or message; None if there is none.

    Args:
        expected: The `model` that it must have; empty for any.

    Raises:
        ProblemError: It has another `model`.
    """
    for name in _NESTED:
        inner = members.get(name)
        if isinstance(inner, dict) and "model" in inner:
            check_model(inner, expected)
            return {**members, name: {**inner, "model": model}}
    return None


def check_model(members: Mapping[str, Any], expected: str) -> None:
    """Raise ProblemError unless a document's `model` is the expected one; any if that is empty."""
    if expected and members["model"] != expected:
        raise engine_failed(f"its answer is by {printable(str(members['model'])[:200])!r}, but another model was asked")


def usage_of(members: Mapping[str, Any]) -> Any:
    """Return the `usage` of an answer, or that of the response or message in an event; None if it has none."""
    if "usage" in members:
        return members["usage"]
    return next((inner["usage"] for name in _NESTED if isinstance(inner := members.get(name), dict) and "usage" in inner), None)


def id_of(members: Mapping[str, Any]) -> str:
    """Return the `id` of an answer, or of the response or message in an event; empty if it has none of a sane length."""
    inner = next((part for name in _NESTED if isinstance(part := members.get(name), dict)), members)
    ident = inner.get("id")
    return ident if isinstance(ident, str) and len(ident) <= _MAX_ID else ""


def ends_by_length(members: Mapping[str, Any]) -> bool | None:
    """Return whether an answer, or an event of it, says that it ended because it was too long; None if it says no reason."""
    choices = members.get("choices")
    reasons = (
        [choice.get("finish_reason") for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    )
    if not _WITH_REASON.isdisjoint(members):  # nearly no event of a stream has one of them
        reasons += _message_reasons(members)
    texts = [reason for reason in reasons if isinstance(reason, str)]
    return not _BY_LENGTH.isdisjoint(texts) if texts else None


def _message_reasons(members: Mapping[str, Any]) -> list[Any]:
    """Return the reasons for which a message or a response ended, as it or an event of it states them."""
    inner = next((part for name in ("response", "delta") if isinstance(part := members.get(name), dict)), {})
    details = members.get("incomplete_details") or inner.get("incomplete_details")
    return [members.get("stop_reason"), inner.get("stop_reason"), details.get("reason") if isinstance(details, dict) else None]


def is_first(members: Mapping[str, Any]) -> bool:
    """Return whether an event states the tokens of a prompt, before any of the answer."""
    return members.get("type") == "message_start"


def is_part(members: Mapping[str, Any]) -> bool:
    """Return whether an event has about one token of the answer."""
    kind = str(members.get("type"))
    return kind.endswith("delta") and kind != "message_delta"


def stream_ends(path: str) -> tuple[bytes, ...]:
    """Return what one of the last lines of a stream has; a stream without any of them was cut off."""
    return _LAST_EVENTS if path in (RESPONSES, MESSAGES) else _DONE


# ---- errors


def problem_body(problem: ProblemError, path: str, request_id: str) -> bytes:
    """Return an error in the form that clients of the path raise as their own."""
    if path.startswith("/api/"):  # Ollama's
        return _json({"error": problem.document()["error"]["message"], "code": problem.code})
    if path not in ANTHROPIC:
        return problem.body()
    members = problem.document()["error"]
    kind = _ANTHROPIC_TYPES.get(problem.status, "api_error")
    return _json({"type": "error", "error": {**members, "type": kind}, **({"request_id": request_id} if request_id else {})})


def problem_event(problem: ProblemError, path: str, request_id: str) -> bytes:
    """Return an error as the last event of a stream."""
    body = problem_body(problem, path, request_id)
    if path.startswith("/api/"):
        return body + b"\n"
    if path == RESPONSES:
        document = problem.document()
        body = _json({"type": "error", **document["error"], **document} | {"type": "error"})
    return (b"event: error\n" if path in (RESPONSES, MESSAGES) else b"") + b"data: " + body + b"\n\n"


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
