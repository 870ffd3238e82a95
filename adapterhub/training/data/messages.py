"""Messages in the form that chat templates expect, and checks that a rendered text contains everything in an answer.

Templates want content as text and the arguments of calls as objects; OpenAI's API, and the data sets that follow it, have lists
of parts and JSON as text. A template leaves out what it does not know without an error, so its output has to be checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

Message = Mapping[str, Any]
_THOUGHT_END = "</think>"


def normalize(messages: Iterable[Any], location: str) -> list[dict[str, Any]]:
    """Return messages with text as content, objects as arguments and a weight; the content of mere calls is empty.

    Raises:
        FormatError: A message lacks its role or content, its content is not text, or its weight is neither 0 nor 1.
    """
    return [_normalize_message(message, location) for message in messages]


def _normalize_message(message: Any, location: str) -> dict[str, Any]:
    # In a Parquet table, every message has the keys of all messages; those that it lacks are null.
    fields = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    calls = fields.get("tool_calls") or []
    if not isinstance(fields.get("role"), str) or not ("content" in fields or calls):
        raise FormatError(location, 'a message needs "role" and "content"')
    fields["weight"] = _weight(fields, location)
    fields["content"] = _content_text(fields.get("content", ""), location)
    if calls and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
        raise FormatError(location, '"tool_calls" is not a list of calls')
    return with_object_arguments(fields)


def _weight(message: Message, location: str) -> int:
    """Return 0 for an answer that is not trained on: `weight` in OpenAI's fine-tuning files, `train` in axolotl's."""
    weight = message.get("weight", 1 if message.get("train", True) is not False else 0)
    if weight not in (0, 1):
        raise FormatError(location, f'the "weight" of a message is {weight!r:.40}, and not 0 or 1')
    return int(weight)


def _content_text(content: Any, location: str) -> str:
    """Return the content of a message as text; it may be a list of parts (OpenAI's API, "Chat Completions")."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    part_texts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part for part in parts]
    texts = [text for text in part_texts if isinstance(text, str)]
    if len(texts) < len(part_texts):
        raise FormatError(location, 'the "content" of a message is neither text nor parts of text')
    return "".join(texts)


def tools(value: Any, location: str) -> list[Any] | None:
    """Return tools as a list of JSON schemas; data sets may store them as JSON text."""
    if isinstance(value, str):
        try:
            value = json_file.parse(value, location)
        except FormatError as error:
            raise FormatError(location, '"tools" is text, and not JSON') from error
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise FormatError(location, '"tools" is not a list of JSON schemas')
    return value or None


# ---- Arguments of calls


def _function(call: Message) -> Message:
    """Return the object with the name and arguments of a call: OpenAI nests it as `function`, some data sets do not."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _with_arguments(call: Message, convert: Callable[[Any], Any]) -> dict[str, Any]:
    function = _function(call)
    if "arguments" not in function:
        return dict(call)
    changed = {**function, "arguments": convert(function["arguments"])}
    # A call is the function itself, or wraps it.
    return changed if function is call else {**call, "function": changed}


def _as_object(arguments: Any) -> Any:
    """Return arguments as an object if they are JSON text of one, others unchanged."""
    if isinstance(arguments, str):
        try:
            value = json_file.parse(arguments, "arguments", memory=None)
        except FormatError:
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def with_object_arguments(message: Message) -> dict[str, Any]:
    """Return a message whose calls have their arguments as objects, as most templates want them."""
    if not message.get("tool_calls"):
        return dict(message)
    return {**message, "tool_calls": [_with_arguments(call, _as_object) for call in message["tool_calls"]]}


def plain(message: Message) -> Message:
    """Return a message as `normalize` made it."""
    return message


def with_text_arguments(message: Message) -> Message:
    """Return a message whose calls have their arguments as JSON text, as DeepSeek's templates want them."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_arguments(call, _as_text) for call in message["tool_calls"]]}


def in_parts(message: Message) -> Message:
    """Return a message whose content is a list of one part, as the templates of some vision models want it."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


Form = Callable[[Message], Message]
FORMS: tuple[Form, ...] = (plain, with_text_arguments, in_parts)
"""The forms that templates may expect, the most common first."""


def has_python_notation(message: Message, text: str) -> bool:
    """Return whether a rendered conversation has the message's arguments in Python's notation: its template expects text."""
    call_arguments = [_function(call).get("arguments") for call in message.get("tool_calls", ())]
    return any(isinstance(arguments, dict) and arguments and str(arguments) in text for arguments in call_arguments)


# ---- Answers


def is_written(message: Message, text: str) -> bool:
    """Return whether `text` contains all of an answer: its content without thoughts, and the names and arguments of its calls.

    White space does not count, and neither do fractions, booleans and nulls, which have several notations.
    """
    return all(any(_contains(text, notation) for notation in notations) for notations in _answer_parts(message))


def thought_of(message: Message) -> str:
    """Return the thought of an answer, from its own field or from the content before an end mark; empty if there is none."""
    # Data sets have several names for the field; otherwise the thought is part of the content.
    separate = message.get("reasoning_content") or message.get("thinking") or message.get("reasoning")
    within, mark, _ = message["content"].rpartition(_THOUGHT_END)
    return separate if isinstance(separate, str) else within.partition("<think>")[2] if mark else ""


def writes_thought(message: Message, text: str) -> bool:
    """Return whether `text` contains the answer's thought, if it has one."""
    return _contains(text, thought_of(message))


def _answer_parts(message: Message) -> Iterator[tuple[str, ...]]:
    """Yield each part of an answer, in all notations that count as the same."""
    yield (message["content"].rpartition(_THOUGHT_END)[2],)
    for call in message.get("tool_calls", ()):
        function = _function(call)
        yield (str(function.get("name", "")),)
        for value in _json_leaves(function.get("arguments")):
            yield value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]


def _json_leaves(value: Any) -> Iterator[str]:
    """Yield the keys, texts and whole numbers of a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _json_leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _json_leaves(item)
    # Fractions, booleans and null have several notations, and a bool is an int in Python.
    elif isinstance(value, str | int) and not isinstance(value, bool):
        yield str(value)


def _contains(text: str, part: str) -> bool:
    """Return whether `text` contains `part`, apart from white space."""
    # Most templates write a part as it is; a text of many answers is not searched for white space for each of them.
    return part in text or _collapse_whitespace(part) in _collapse_whitespace(text)


def _collapse_whitespace(text: str) -> str:
    return " ".join(text.split())
