"""Answers of engines, with the name of the version in place of the name by which the engine knows it.

Tokens are counted on the way: engines report them at the end, and for a stream only if asked to.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import field
from typing import Any

from adapterhub.serve.engines import CHAT, COMPLETIONS, EngineAnswer
from adapterhub.serve.engines.line_cutter import LineCutter
from adapterhub.serve.usage.token_counts import TokenCounts
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

from . import api_forms
from .openai_errors import engine_failed

_MAX_EVENT = 4 << 20  # bytes of an event
_MAX_STREAM = 1 << 30  # bytes of all events of a stream
_MAX_ANSWER = 64 << 20  # bytes of an answer that is not a stream
_MODEL = b'"model"'
_ESCAPED_LETTER = rb"\u00"  # how the escape of a letter of `model` begins
_FIRST = -1  # in place of a choice: what a message states of its prompt before it is answered
_DATA, _DONE = b"data:", b"[DONE]"
_BEGIN, _END = b"data: ", b"\n\n"  # of an event, as most engines write it
_TEXT_KEYS = ("content", "text", "reasoning_content", "reasoning")  # of a choice or its delta; no count depends on them
_SEPARATORS = (b":", b": ")  # between a key and its value
_MAX_FRAMES = 16  # frames that are learned in one stream, so that a stream whose events all differ costs no more


@dataclass
class Usage:
    """The token usage of a request and its answer.

    Attributes:
        body: The request of the client.
        parts: Pieces of the answer so far, of about one token each.
        has_begun: Whether the engine has begun to answer.
        path: The path of the API, which decides the form of request and answer.
        has_ended: Whether a stream has come to its end.
        by_length: Whether the answer ended because it was too long; None if it says no reason.
        answer_id: The `id` of the answer; empty if it has none.
    """

    body: Mapping[str, Any]
    parts: int = 0
    has_begun: bool = False
    path: str = COMPLETIONS
    has_ended: bool = False
    by_length: bool | None = None
    answer_id: str = ""
    _reports: dict[int | None, TokenCounts] = field(default_factory=dict)  # by choice; None is for all of them

    @property
    def is_stream(self) -> bool:
        """Whether the client asked for a stream."""
        return bool(self.body.get("stream"))

    def engine_body(self) -> Mapping[str, Any]:
        """Return the body for the engine, which asks for the usage of a stream."""
        options = self.body.get("stream_options") or {}
        has_options = self.path in (COMPLETIONS, CHAT) and isinstance(options, dict)
        if not self.body.get("stream") or not has_options:
            return self.body
        return {**self.body, "stream_options": {**options, "include_usage": True}}

    def count(self, document: Mapping[str, Any]) -> bool:
        """Count the tokens of an answer, or of an event of it; return whether the client wants to receive it."""
        choices, is_stream, usage = document.get("choices"), self.is_stream, api_forms.usage_of(document)
        if is_stream:
            self.parts += bool(choices) or api_forms.is_part(document)
        elif usage is None:
            self.parts += len(json.dumps(choices or "")) // api_forms.BYTES_PER_TOKEN
        self.answer_id = self.answer_id or api_forms.id_of(document)
        if (by_length := api_forms.ends_by_length(document)) is not None:
            self.by_length = by_length or bool(self.by_length)  # one of several choices is enough
        counts = TokenCounts.from_usage(usage)
        if counts is not None and is_stream and api_forms.is_first(document):
            self._reports[_FIRST] = counts
        elif counts is not None:
            # llama-server reports each of several streamed completions by itself.
            self._reports[_index(choices) if is_stream else None] = counts.at_least(self._reports.get(_FIRST))
        if "usage" not in document:
            return True
        options = self.body.get("stream_options")
        # An event with only the usage was requested by the gateway; clients that did not ask for it may not expect it.
        return choices != [] or not is_stream or bool(isinstance(options, dict) and options.get("include_usage"))

    def count_same(self) -> None:
        """Count an event that differs in its text alone from one that was counted, with choices and without a usage."""
        self.parts += 1

    @property
    def tokens(self) -> TokenCounts:
        """The tokens as the engine reported them, or an estimate if it did not, or if its stream was cut off."""
        if None in self._reports:
            return self._reports[None]
        reported = sum(self._reports.values(), TokenCounts())
        if not self.has_begun or (self._reports and self.has_ended):
            return reported
        prompt = reported.prompt or len(json.dumps(self.body)) // api_forms.BYTES_PER_TOKEN
        return TokenCounts(prompt, reported.cached, max(reported.answer, self.parts), is_estimate=True)


def _index(choices: object) -> int | None:
    """Return the index of an event's only choice; None for any other event."""
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    index = choice.get("index") if isinstance(choice, Mapping) else None
    return index if isinstance(index, int) else None


async def read_whole(pieces: AsyncIterator[bytes]) -> bytes:
    """Return an answer as a whole; ProblemError for one that is too large."""
    content = bytearray()
    async for piece in pieces:
        content += piece
        # The engine may be somebody else's server, or broken.
        if len(content) > _MAX_ANSWER:
            raise engine_failed(f"its answer has more than {_MAX_ANSWER:,} bytes")
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
    # The only `model` is the object's own, unless that is written with an escape: this costs less than writing all of it.
    is_only = document.count(_MODEL) == 1 and _ESCAPED_LETTER not in document
    if is_only and (spelling := _spelling(document, str(members["model"]))):
        return document.replace(spelling, _member(model))
    return _compact({**members, "model": model})


def _spelling(document: bytes, name: str) -> bytes:
    """Return the member `model` of an object with this name, as it is written there; empty if it is written otherwise."""
    spellings = (_MODEL + separator + json.dumps(name, ensure_ascii=False).encode() for separator in _SEPARATORS)
    return next((spelling for spelling in spellings if name and spelling in document), b"")


def _member(model: str) -> bytes:
    return _MODEL + b":" + json.dumps(model, ensure_ascii=False).encode()


def _compact(members: Mapping[str, Any]) -> bytes:
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(slots=True)
class _Frame:
    """An event without its text: what stands before and after that, as the engine writes it and as the client gets it."""

    head: bytes
    tail: bytes
    new_head: bytes
    new_tail: bytes

    def with_text_of(self, document: bytes) -> bytes | None:
        """Return an event with the name of the version; None unless it is this one with another text.

        Bytes that end no string and escape nothing leave the document what it was but for that string.
        """
        if not (document.startswith(self.head) and document.endswith(self.tail)):
            return None
        text = document[len(self.head) : len(document) - len(self.tail)]
        # Where head and tail overlap, the event is shorter than both.
        if len(document) < len(self.head) + len(self.tail) or not _is_plain(text):
            return None
        return self.new_head + text + self.new_tail


def _is_plain(text: bytes) -> bool:
    """Return whether bytes are characters that a JSON string can have as they are; some that can are left out."""
    if b'"' in text or b"\\" in text:
        return False
    try:
        return text.decode().isprintable()
    except UnicodeDecodeError:
        return False


class _Renamer:
    """Puts the name of the version into the events of one stream.

    An engine writes all of them alike. An event that differs from an earlier one in its text alone gets what that one got, at a
    sixth of the cost of parsing it; in others, the bytes with which the engine wrote `model` in the first event are replaced,
    which costs a quarter of parsing an event with every check and writing it again, as an event that looks different is.
    """

    def __init__(self, model: str, usage: Usage, expected: str) -> None:
        self._model, self._usage, self._expected = model, usage, expected
        self._name, self._member = "", b""  # the engine's name, and `"model":"NAME"` as it writes it
        self._new_member = _member(model)
        self._frame: _Frame | None = None
        self._frames = 0  # learned so far

    def rename(self, document: bytes) -> bytes:
        """Return an event with the name of the version; empty for one that the client did not ask for."""
        if self._frame is not None and (renamed := self._frame.with_text_of(document)) is not None:
            self._usage.count_same()
            return renamed
        if self._member and (renamed := self._replace_member(document)) is not None:
            return renamed
        renamed = rename_model(document, self._model, self._usage, expected=self._expected)
        self._learn_member(document)
        return renamed

    def rename_alone(self, piece: bytes) -> bytes | None:
        """Return a piece that is one event like an earlier one, renamed; None for any other piece."""
        if self._frame is None or not (piece.startswith(_BEGIN) and piece.endswith(_END)):
            return None
        renamed = self._frame.with_text_of(piece[len(_BEGIN) : -len(_END)])
        if renamed is None:
            return None
        self._usage.count_same()
        return _BEGIN + renamed + _END

    def _replace_member(self, document: bytes) -> bytes | None:
        """Return an event with its only `model` replaced; None if its bytes do not show that it has one as before, or none."""
        count = document.count(_MODEL)
        if count > 1 or (count and self._member not in document):
            return None
        members = json_file.parse_plain_object(document)
        # The only one belongs to the event itself, not to an object inside.
        if members is None or (count and members.get("model") != self._name):
            return None
        if not self._usage.count(members):
            return b""
        if self._frames < _MAX_FRAMES:
            self._learn_frame(document, members)
        return document.replace(self._member, self._new_member)

    def _learn_member(self, document: bytes) -> None:
        """Remember how the engine writes its name, after an event that was parsed with every check."""
        self._name = self._expected or str(json_file.parse_object(document, "its answer").get("model", ""))
        self._member = _spelling(document, self._name)

    def _learn_frame(self, document: bytes, members: Mapping[str, Any]) -> None:
        """Remember what stands around the text of an event with one choice and without a usage."""
        choices = members.get("choices")
        if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict) and self._usage.is_stream):
            return
        if api_forms.usage_of(members) is not None:
            return
        delta = choices[0].get("delta")
        for key in _TEXT_KEYS:
            value = (delta if isinstance(delta, dict) else choices[0]).get(key)
            if isinstance(value, str) and _is_plain(text := value.encode("utf-8", "surrogatepass")):
                for separator in _SEPARATORS:
                    start = f'"{key}"'.encode() + separator + b'"'
                    # Quotes inside a string are escaped, so these can only be a member.
                    if document.count(member := start + text + b'"') == 1:
                        at = document.index(member) + len(start)
                        head, tail = document[:at], document[at + len(text) :]
                        renamed = (part.replace(self._member, self._new_member) for part in (head, tail))
                        self._frame = _Frame(head, tail, *renamed)
                        self._frames += 1
                        return


async def events(answer: EngineAnswer, model: str, usage: Usage) -> AsyncIterator[bytes]:
    """Yield the lines of an event stream as soon as each is complete, with another `model` in their objects.

    Raises:
        ProblemError: The stream is malformed, too long, by another model, or cut off.
    """
    cutter, length, ended, ends = LineCutter(), 0, False, api_forms.stream_ends(usage.path)
    renamer = _Renamer(model, usage, answer.model)
    async for piece in answer.body:
        length += len(piece)
        if not cutter.remainder and (event := renamer.rename_alone(piece)) is not None:
            yield event
        elif lines := cutter.cut(piece):
            complete_lines = b"".join([_rewrite_line(line, renamer) + b"\n" for line in lines])
            # Before its last event is sent on, so that its tokens can be counted before the client has all of it.
            usage.has_ended = ended = ended or any(end in complete_lines for end in ends)
            yield complete_lines
        if len(cutter.remainder) > _MAX_EVENT or length > _MAX_STREAM:
            raise engine_failed(f"its stream has more than {_MAX_STREAM:,} bytes, or an event more than {_MAX_EVENT:,}")
    if cutter.remainder or not ended:
        raise engine_failed("its stream was cut off")


def _rewrite_line(line: bytes, renamer: _Renamer) -> bytes:
    """Return a line of a stream with another `model`."""
    line = line.removesuffix(b"\r")
    if b"\r" in line:  # some clients would take it as the end of a line; JSON never has one in its strings
        raise engine_failed("its stream has a carriage return inside a line")
    if not line.startswith(_DATA):
        return line
    data = line[len(_DATA) :].strip()
    if data == b"null":  # llama-server sends one before the answers to several prompts
        return b""
    rewritten = data if data == _DONE else renamer.rename(data)
    return b"data: " + rewritten if rewritten else b""
