"""Answers of engines with the name of the version in them, in place of the one by which the engine knows it.

Their tokens are counted on the way: engines say how many there are at the end, of a stream only if they are asked to.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.serve.engines import EngineDownError
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

_LONGEST = 4 << 20  # bytes of an event
_LARGEST = 64 << 20  # bytes of an answer that is no stream
_DATA = b"data: {"


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
    """All of an answer; EngineDownError for one without an end."""
    found = bytearray()
    async for piece in pieces:
        found += piece
        if len(found) > _LARGEST:
            raise EngineDownError(f"the answer has more than {_LARGEST} bytes")
    return bytes(found)


def renamed(document: bytes, model: str, usage: Usage) -> bytes:
    """A JSON object with another `model`, nothing for one that the client has not asked for; anything else as it is."""
    try:
        found = json_file.parse(document, "answer")
    except FormatError:
        return document
    if not isinstance(found, dict):
        return document
    if not usage.see(found):
        return b""
    if "model" not in found:
        return document
    return json.dumps({**found, "model": model}, ensure_ascii=False, separators=(",", ":")).encode()


async def events(pieces: AsyncIterator[bytes], model: str, usage: Usage) -> AsyncIterator[bytes]:
    """The lines of a stream of events as soon as each is complete, with another `model` in their objects."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if lines:
            yield b"".join(_line(line, model, usage) + b"\n" for line in lines)
        if len(rest) > _LONGEST:
            raise EngineDownError(f"an event has more than {_LONGEST} bytes")
    if rest:
        yield _line(rest, model, usage)


def _line(line: bytes, model: str, usage: Usage) -> bytes:
    if not line.startswith(_DATA):
        return line
    found = renamed(line[6:], model, usage)
    return b"data: " + found if found else b""
