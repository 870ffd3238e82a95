"""Messages as chat templates expect them, however a data set stores them, and whether a text has all that an answer says.

Templates want content as text and the arguments of calls as objects; OpenAI's API, and the data sets that follow it, have lists
of parts and JSON as text. What a template does not know it leaves out without an error, so that its text has to be looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

Message = Mapping[str, Any]
_THOUGHT = "</think>"


def checked(messages: Iterable[Any], where: str) -> list[dict[str, Any]]:
    """Return messages with text as content, which is empty where they only call tools, objects as arguments, and a weight.

    Raises:
        FormatError: A message lacks its role or content, its content is not text, or its weight neither 0 nor 1.
    """
    return [_checked(message, where) for message in messages]


def _checked(message: Any, where: str) -> dict[str, Any]:
    # In a table every message has the keys of all, null where it has none.
    found = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    calls = found.get("tool_calls") or []
    if not isinstance(found.get("role"), str) or not ("content" in found or calls):
        raise FormatError(where, 'a message needs "role" and "content"')
    found["weight"] = _weight(found, where)
    found["content"] = _text(found.get("content", ""), where)
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise FormatError(where, '"tool_calls" is not a list of calls')
        found["tool_calls"] = [_with_arguments(call, _as_object) for call in calls]
    return found


def _weight(message: Message, where: str) -> int:
    """Return 0 for an answer that is not trained on: `weight` in OpenAI's files for fine-tuning, `train` in axolotl's."""
    weight = message.get("weight", 1 if message.get("train", True) is not False else 0)
    if weight not in (0, 1):
        raise FormatError(where, f'the "weight" of a message is {weight!r:.40}, and not 0 or 1')
    return int(weight)


def _text(content: Any, where: str) -> str:
    """Return the content of a message as text, which may be in parts (OpenAI's API, "Chat Completions")."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    found = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise FormatError(where, 'the "content" of a message is neither text nor parts of text')
    return "".join(texts)


def tools(value: Any, where: str) -> list[Any] | None:
    """Return tools as a list of JSON schemas; data sets may store them as JSON text."""
    if isinstance(value, str):
        try:
            value = json_file.parse(value, where)
        except FormatError as error:
            raise FormatError(where, '"tools" is text, and not JSON') from error
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise FormatError(where, '"tools" is not a list of JSON schemas')
    return value or None


# ---- Arguments of calls


def _function(call: Message) -> Message:
    """Return what a call calls, with its name and arguments: OpenAI wraps it, some data sets do not."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _with_arguments(call: Message, form: Callable[[Any], Any]) -> dict[str, Any]:
    function = _function(call)
    if "arguments" not in function:
        return dict(call)
    changed = {**function, "arguments": form(function["arguments"])}
    return changed if function is call else {**call, "function": changed}


def _as_object(arguments: Any) -> Any:
    """Return arguments that are the JSON of an object as the object, others unchanged."""
    if isinstance(arguments, str):
        try:
            value = json_file.parse(arguments, "arguments", memory=None)
        except FormatError:
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def plain(message: Message) -> Message:
    """Return a message as `checked` made it."""
    return message


def with_text_arguments(message: Message) -> Message:
    """Return a message whose calls have their arguments as JSON text, as DeepSeek's templates want them."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_arguments(call, _as_text) for call in message["tool_calls"]]}


def in_parts(message: Message) -> Message:
    """Return a message whose content is a list of one part, as the templates of some models with images want it."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


Form = Callable[[Message], Message]
FORMS: tuple[Form, ...] = (plain, with_text_arguments, in_parts)
"""What templates may want, the most common first."""


def has_notation_of_python(message: Message, text: str) -> bool:
    """Return whether a rendered conversation has the message's arguments as Python writes them: its template expects text."""
    found = [_function(call).get("arguments") for call in message.get("tool_calls", ())]
    return any(isinstance(arguments, dict) and arguments and str(arguments) in text for arguments in found)


# ---- Answers


def is_written(message: Message, text: str) -> bool:
    """Return whether `text` has what an answer says: its content less its thoughts, names and arguments of its calls.

    White space does not count, and neither do numbers with a fraction, booleans and nulls, which have several notations.
    """
    written = _collapsed(text)
    return all(any(_collapsed(form) in written for form in forms) for forms in _said(message))


def thought_of(message: Message) -> str:
    """Return the thought of an answer, which is apart or in its content before an end mark; empty without one."""
    apart = message.get("reasoning_content") or message.get("thinking") or message.get("reasoning")
    within, mark, _ = message["content"].rpartition(_THOUGHT)
    return apart if isinstance(apart, str) else within.partition("<think>")[2] if mark else ""


def writes_thought(message: Message, text: str) -> bool:
    """Return whether `text` has an answer's thought, if it has one."""
    return _collapsed(thought_of(message)) in _collapsed(text)


def _said(message: Message) -> Iterator[tuple[str, ...]]:
    """Yield each thing that an answer says, in all notations that count."""
    yield (message["content"].rpartition(_THOUGHT)[2],)
    for call in message.get("tool_calls", ()):
        function = _function(call)
        yield (str(function.get("name", "")),)
        for value in _leaves(function.get("arguments")):
            yield value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]


def _leaves(value: Any) -> Iterator[str]:
    """Yield keys, texts and whole numbers of a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str | int) and not isinstance(value, bool):
        yield str(value)


def _collapsed(text: str) -> str:
    return " ".join(text.split())
