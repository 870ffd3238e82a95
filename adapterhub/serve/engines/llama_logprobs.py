"""Probabilities of a completion in OpenAI's form, which llama-server has for chats only (b10435)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

from . import COMPLETIONS, EngineAnswer, EngineDownError
from .line_cutter import LineCutter

_MAX_ANSWER = 64 << 20  # bytes of a whole answer, or of a line of a stream
_DATA = b"data: "


def engine_body(path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the request with a number that llama-server answers; it takes 0 for none."""
    return {**body, "logprobs": 1} if _is_for(path, body) and body["logprobs"] == 0 else body


def in_openais_form(answer: EngineAnswer, path: str, body: Mapping[str, Any]) -> EngineAnswer:
    """Return an answer with its probabilities in OpenAI's form, if the request is one for a completion that asks for them."""
    if not _is_for(path, body) or answer.status != 200:
        return answer
    converter = _Converter(body["logprobs"])
    streams = answer.media_type.startswith("text/event-stream")
    return replace(answer, body=converter.lines(answer.body) if streams else converter.whole(answer.body))


def _is_for(path: str, body: Mapping[str, Any]) -> bool:
    """Return whether a request asks for the probabilities of a completion."""
    number = body.get("logprobs")
    return path == COMPLETIONS and json_file.is_integer(number) and number >= 0


class _Converter:
    """Converts the choices of one answer, whose texts may come in pieces.

    Args:
        count: The most probable tokens to state beside the chosen one.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._lengths: dict[int, int] = {}  # characters so far, by the index of the choice

    async def whole(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield a whole answer."""
        raw = bytearray()
        async for piece in pieces:
            raw += piece
            _check_size(len(raw))
        yield self._document(bytes(raw))

    async def lines(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the lines of a stream."""
        cutter = LineCutter()
        async for piece in pieces:
            lines = cutter.cut(piece)
            _check_size(len(cutter.remainder))
            if lines:
                yield b"".join(self._line(line) + b"\n" for line in lines)
        if cutter.remainder:
            yield cutter.remainder

    def _line(self, line: bytes) -> bytes:
        return _DATA + self._document(line[len(_DATA) :]) if line.startswith(_DATA + b"{") else line

    def _document(self, raw: bytes) -> bytes:
        """Return a document with its choices converted; one that cannot be read as it is."""
        try:
            document = json_file.parse_object(raw, "answer")
            choices = [self._choice(choice) for choice in document.get("choices") or []]
        except (FormatError, KeyError, TypeError, AttributeError):
            return raw
        return json.dumps({**document, "choices": choices}, ensure_ascii=False, separators=(",", ":")).encode()

    def _choice(self, choice: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a choice, or a piece of one."""
        if not (choice.get("logprobs") or {}).get("content"):
            return choice
        index, entries = choice.get("index", 0), choice["logprobs"]["content"]
        logprobs: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token = _token_text(entry)
            likeliest = entry["top_logprobs"][: self._count]
            logprobs["tokens"].append(token)
            logprobs["token_logprobs"].append(entry["logprob"])
            # The chosen token is stated too where it is not among the most probable ones.
            logprobs["top_logprobs"].append({_token_text(top): top["logprob"] for top in likeliest} | {token: entry["logprob"]})
            logprobs["text_offset"].append(self._lengths.get(index, 0))
            self._lengths[index] = self._lengths.get(index, 0) + len(entry["token"])
        return {**choice, "logprobs": logprobs}


def _token_text(entry: Mapping[str, Any]) -> str:
    """Return a token's text, or its bytes as OpenAI writes them if they are only a part of a character."""
    raw, text = bytes(entry["bytes"]), str(entry["token"])
    return text if text.encode("utf-8", "replace") == raw else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _check_size(size: int) -> None:
    """Raise EngineDownError for an answer that is too large."""
    if size > _MAX_ANSWER:
        raise EngineDownError(f"its answer has more than {_MAX_ANSWER:,} bytes")
