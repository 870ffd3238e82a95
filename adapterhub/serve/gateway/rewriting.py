"""Answers of engines, with the name of the version in place of the name by which the engine knows it.

Tokens are counted on the way: engines report them at the end, and for a stream only if asked to.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.serve.engines import CHAT, COMPLETIONS, EngineAnswer
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

from . import api_forms
from .problems import engine_failed

_LONGEST = 4 << 20  # bytes of an event
_LONGEST_STREAM = 1 << 30  # bytes of all events of a stream
_LARGEST = 64 << 20  # bytes of an answer that is not a stream
_DATA, _DONE = b"data:", b"[DONE]"


@dataclass
class Usage:
    """The token usage of a request and its answer.

    Attributes:
        body: The request of the client.
        counts: Whether tokens are counted; if not, request and answer keep their usage as they are.
        tokens: The last number that the engine reported.
        parts: Pieces of the answer so far, of about one token each.
        has_begun: Whether the engine has begun to answer.
        path: The path of the API, which decides the form of request and answer.
    """

    body: Mapping[str, Any]
    counts: bool = False
    tokens: int = 0
    parts: int = 0
    has_begun: bool = False
    path: str = COMPLETIONS
    _prompt_tokens: int = 0

    def engine_body(self) -> Mapping[str, Any]:
        """Return the body for the engine, which asks for the usage if it is counted."""
        options = self.body.get("stream_options") or {}
        has_options = self.path in (COMPLETIONS, CHAT) and isinstance(options, dict)
        if not self.counts or not self.body.get("stream") or not has_options:
            return self.body
        return {**self.body, "stream_options": {**options, "include_usage": True}}

    def count(self, document: Mapping[str, Any]) -> bool:
        """Count the tokens of an answer, or of an event of it; return whether the client wants to receive it."""
        usage, choices = document.get("usage"), document.get("choices")
        self.parts += bool(choices) or api_forms.is_part(document)
        if isinstance(usage, dict) and isinstance(total := usage.get("total_tokens"), int):
            self.tokens = max(self.tokens, total)
        else:
            prompt_tokens, answer_tokens = api_forms.token_counts(document)
            # A message states those of its prompt first, and those of its answer at the end.
            self._prompt_tokens = max(self._prompt_tokens, prompt_tokens)
            self.tokens = max(self.tokens, self._prompt_tokens + answer_tokens)
        options = self.body.get("stream_options")
        # An event with only the usage was requested by the gateway; clients that did not ask for it may not expect it.
        wants_usage = isinstance(options, dict) and options.get("include_usage")
        return not self.counts or bool(wants_usage) or choices != [] or "usage" not in document

    @property
    def total(self) -> int:
        """The number of tokens; for an answer that was cut off, an estimate of four bytes of the request each."""
        if self.tokens or not self.has_begun:
            return max(self.tokens, self.parts)
        return self.parts + len(json.dumps(self.body)) // 4


async def read_whole(pieces: AsyncIterator[bytes]) -> bytes:
    """Return an answer as a whole; ProblemError for one that is too large."""
    content = bytearray()
    async for piece in pieces:
        content += piece
        # The engine may be somebody else's server, or broken.
        if len(content) > _LARGEST:
            raise engine_failed(f"its answer has more than {_LARGEST:,} bytes")
    return bytes(content)


def rename_model(document: bytes, model: str, usage: Usage, *, expected: str) -> bytes:
    """Return a JSON object with another `model`, if it has one; empty for an event that the client did not ask for.

    Args:
        expected: The `model` that it must have; empty for any.

    Raises:
        ProblemError: It is not a JSON object, or has another `model`.
    """
    try:
        members = json_file.parse_object(document, "its answer")
    except FormatError as error:
        raise engine_failed(str(error)) from error
    if not usage.count(members):
        return b""
    if "model" not in members:
        nested = api_forms.rename_nested(members, model, expected)
        return document if nested is None else _compact(nested)
    api_forms.check_model(members, expected)
    return _compact({**members, "model": model})


def _compact(members: Mapping[str, Any]) -> bytes:
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()


async def events(answer: EngineAnswer, model: str, usage: Usage) -> AsyncIterator[bytes]:
    """Yield the lines of an event stream as soon as each is complete, with another `model` in their objects.

    Raises:
        ProblemError: The stream is malformed, too long, by another model, or cut off.
    """
    remainder, length, ended, ends = b"", 0, False, api_forms.stream_ends(usage.path)
    async for piece in answer.body:
        length += len(piece)
        *lines, remainder = (remainder + piece).split(b"\n")
        if lines:
            complete_lines = b"".join(_rewrite_line(line, model, usage, answer.model) + b"\n" for line in lines)
            ended = ended or any(end in complete_lines for end in ends)
            yield complete_lines
        if len(remainder) > _LONGEST or length > _LONGEST_STREAM:
            raise engine_failed(f"its stream has more than {_LONGEST_STREAM:,} bytes, or an event more than {_LONGEST:,}")
    if remainder or not ended:
        raise engine_failed("its stream was cut off")


def _rewrite_line(line: bytes, model: str, usage: Usage, expected: str) -> bytes:
    """Return a line of a stream with another `model`."""
    line = line.removesuffix(b"\r")
    if b"\r" in line:  # some clients would take it as the end of a line; JSON never has one in its strings
        raise engine_failed("its stream has a carriage return inside a line")
    if not line.startswith(_DATA):
        return line
    data = line[len(_DATA) :].strip()
    if data == b"null":  # llama-server sends one before the answers to several prompts
        return b""
    rewritten = data if data == _DONE else rename_model(data, model, usage, expected=expected)
    return b"data: " + rewritten if rewritten else b""
