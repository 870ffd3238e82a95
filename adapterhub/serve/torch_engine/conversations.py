"""The messages of a request as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub.training.data.messages import with_object_arguments
from adapterhub_converters.errors import ParameterError

from .tool_calls import form_of


def for_template(messages: object, template: str) -> list[dict[str, Any]]:
    """Return the messages for a chat template, given as the text that it has for conversations with tools.

    Raises:
        ParameterError: They are malformed, or have parts that are not text.
    """
    if not isinstance(messages, list) or not messages:
        raise ParameterError("messages", "is not a list of messages")
    # Templates that write calls as JSON want objects in them, and OpenAI's API has texts.
    convert = with_object_arguments if form_of(template) else dict
    return [convert(_message(message)) for message in messages]


def _message(message: object) -> dict[str, Any]:
    """Return a message with its content as one text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ParameterError("messages", "a message is not an object with a role")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ParameterError("messages", "the tool_calls of a message are not a list of calls")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ParameterError("messages", "a part of a message is not a text, which this engine does not support")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ParameterError("messages", "the content of a message is not a text")
    return {**message, "content": content or ""}
