"""Answers of engines with the name of the version in them, in place of the one by which the engine knows it.

Their tokens are counted on the way: engines say how many there are at the end, of a stream only if they are asked to.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.serve.engines import Answer
from adapterhub_converters.containers import json_file
from adapterhub_converters.display import printable
from adapterhub_converters.errors import FormatError

from .answers import engine_failed

_LONGEST = 4 << 20  # bytes of an event
_LONGEST_STREAM = 1 << 30  # bytes of all of them
_LARGEST = 64 << 20  # bytes of an answer that is no stream
_DATA, _DONE, _END = b"data:", b"[DONE]", b"data: [DONE]\n"


@dataclass
class Usage:
    """The tokens of a request and its answer.

    Attributes:
        body: What the client asks for.
        counts: Whether somebody wants to know; else nothing is changed.
        tokens: What the engine said last.
        parts: Pieces of the answer so far, about a token each.
        begun: The engine has begun to answer.
    """

    body: Mapping[str, Any]
    counts: bool = False
    tokens: int = 0
    parts: int = 0
    begun: bool = False

    def asking(self) -> Mapping[str, Any]:
        """The body for the engine."""
        options = self.body.get("stream_options") or {}
        if not self.counts or not self.body.get("stream") or not isinstance(options, dict):
            return self.body
        return {**self.body, "stream_options": {**options, "include_usage": True}}

    def see(self, document: Mapping[str, Any]) -> bool:
        """Count by an answer, or a part of one; return whether the client wants to have it."""
        usage, choices = document.get("usage"), document.get("choices")
        self.parts += bool(choices)
        if isinstance(usage, dict) and isinstance(total := usage.get("total_tokens"), int):
            self.tokens = max(self.tokens, total)
        options = self.body.get("stream_options")
        asked = isinstance(options, dict) and options.get("include_usage")
        return not self.counts or bool(asked) or choices != [] or "usage" not in document

    @property
    def total(self) -> int:
        """The tokens; an estimate, four bytes each, for an answer that somebody has ended before its end."""
        if self.tokens or not self.begun:
            return max(self.tokens, self.parts)
        return self.parts + len(json.dumps(self.body)) // 4


async def whole(pieces: AsyncIterator[bytes]) -> bytes:
    """All of an answer; ProblemError for one without an end."""
    found = bytearray()
    async for piece in pieces:
        found += piece
        if len(found) > _LARGEST:
            raise engine_failed(f"its answer has more than {_LARGEST:,} bytes")
    return bytes(found)


def renamed(document: bytes, model: str, usage: Usage, *, expected: str) -> bytes:
    """A JSON object with another `model`, if it has one; nothing for one that the client has not asked for.

    Args:
        expected: What it has as `model`; empty for anything.

    Raises:
        ProblemError: It is not a JSON object, or has another `model`.
    """
    try:
        found = json_file.parse_object(document, "its answer")
    except FormatError as error:
        raise engine_failed(str(error)) from error
    if not usage.see(found):
        return b""
    if "model" not in found:
        return document
    if expected and found["model"] != expected:
        raise engine_failed(f"its answer is by {printable(str(found['model'])[:200])!r}, and another model was asked")
    return json.dumps({**found, "model": model}, ensure_ascii=False, separators=(",", ":")).encode()


async def events(answer: Answer, model: str, usage: Usage) -> AsyncIterator[bytes]:
    """The lines of a stream of events as soon as each is complete, with another `model` in their objects.

    Raises:
        ProblemError: It is malformed, too long, by another model, or ends before its end.
    """
    rest, length, ended = b"", 0, False
    async for piece in answer.body:
        length += len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        if lines:
            found = b"".join(_line(line, model, usage, answer.model) + b"\n" for line in lines)
            ended = ended or _END in found
            yield found
        if len(rest) > _LONGEST or length > _LONGEST_STREAM:
            raise engine_failed(f"its stream has more than {_LONGEST_STREAM:,} bytes, or an event more than {_LONGEST:,}")
    if rest or not ended:
        raise engine_failed("its stream was cut off")


def _line(line: bytes, model: str, usage: Usage, expected: str) -> bytes:
    line = line.removesuffix(b"\r")
    if b"\r" in line:  # the end of a line, too; no object of JSON has one in its texts
        raise engine_failed("its stream has a line break that is none")
    if not line.startswith(_DATA):
        return line
    data = line[len(_DATA) :].strip()
    if data == b"null":  # llama-server has one before the answers to several prompts
        return b""
    found = data if data == _DONE else renamed(data, model, usage, expected=expected)
    return b"data: " + found if found else b""
