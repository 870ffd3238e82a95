"""Conversion of a SentencePiece vocabulary from a tokenizer.model (llama.cpp, `conversion/base.py`).

Follows `_create_vocab_sentencepiece`. The file is a protobuf message, `ModelProto` of sentencepiece_model.proto: pieces in
field 1 (text, score, type), the trainer's settings in field 2 (the kind of model in 3), the normalizer's settings in field 3
(whether a space is added before a text in 3).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_types import MetadataValue, string_value, strings_value
from adapterhub_converters.containers.open_file import read_bytes
from adapterhub_converters.errors import FormatError, LocalIOError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .byte_level import looks_special
from .special_tokens import CONTROL, NORMAL, UNUSED, USER_DEFINED, Tokenizer

NAME = "tokenizer.model"
_BPE = 2  # TrainerSpec.ModelType
_USER_DEFINED_PIECE = 4  # ModelProto.SentencePiece.Type; the other types have the same numbers in llama.cpp
_MAX = 64 << 20  # bytes; a quarter of a million pieces take 5 MB


@dataclass(frozen=True)
class Pieces:
    """The contents of a tokenizer.model: text, score and type of each piece, and whether a space is added before a text."""

    pieces: tuple[tuple[str, float, int], ...]
    prefixed: bool


def read_pieces(tokenizer: Tokenizer) -> Pieces:
    """Read the tokenizer.model in the tokenizer's folder; RefusedError if it is not a BPE model."""
    path = tokenizer.folder / NAME
    try:
        if path.stat().st_size > _MAX:
            raise FormatError(str(path), f"more than {_MAX} bytes: not a tokenizer")
        raw = read_bytes(path)
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
    pieces: list[tuple[str, float, int]] = []
    # protobuf leaves out defaults: a unigram model, and a space before a text.
    kind, prefixed = 1, True
    for field, value in _fields(raw, str(path)):
        if field == 1:
            pieces.append(_piece(value, f"{path}: piece {len(pieces)}"))
        elif field == 2:
            kind = next((number for inner, number in _fields(value, str(path)) if inner == 3), kind)
        elif field == 3:
            prefixed = bool(next((number for inner, number in _fields(value, str(path)) if inner == 3), prefixed))
    if not pieces:
        raise FormatError(str(path), "not a SentencePiece model: it has no pieces")
    if kind != _BPE:
        raise RefusedError(str(path), "a SentencePiece model of another kind than BPE, which llama.cpp would merge as BPE")
    return Pieces(tuple(pieces), prefixed)


def _piece(raw: Any, location: str) -> tuple[str, float, int]:
    fields = dict(_fields(raw, location))
    text, score, kind = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, float) or not isinstance(kind, int) or not 1 <= kind <= 6:
        raise FormatError(location, "its text, score or type is not one that SentencePiece writes")
    try:
        return text.decode(), score, NORMAL if kind == _USER_DEFINED_PIECE else kind
    except UnicodeDecodeError as error:
        raise FormatError(location, "not UTF-8 text") from error


def _fields(raw: Any, location: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each field of a message; a value is an integer, a float, or bytes."""
    if not isinstance(raw, bytes):
        raise FormatError(location, "not a SentencePiece model: a number is in place of a message")
    offset = 0
    while offset < len(raw):
        key, offset = _varint(raw, offset, location)
        wire = key & 7
        value: Any = None
        if wire == 0:
            value, offset = _varint(raw, offset, location)
        elif wire == 2:
            size, offset = _varint(raw, offset, location)
            value, offset = raw[offset : offset + size], offset + size
        # Wire types 3 and 4 (groups) do not occur in the schema: `value` stays None and is refused.
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            if offset + width <= len(raw):
                value = struct.unpack("<d" if wire == 1 else "<f", raw[offset : offset + width])[0]
            offset += width
        if value is None or offset > len(raw):
            raise FormatError(location, "truncated, or not a SentencePiece model")
        yield key >> 3, value


def _varint(raw: bytes, offset: int, location: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if offset >= len(raw):
            break
        byte = raw[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
    raise FormatError(location, "truncated, or not a SentencePiece model")


def vocabulary(tokenizer: Tokenizer, pieces: Pieces, size: int, *, phi: bool = False) -> dict[str, MetadataValue]:
    """Return tokens, scores and types for a model with `size` rows of embeddings.

    Phi-3's added tokens never become special.
    """
    tokens = [f"[PAD{number}]" for number in range(size)]
    scores, types = [-10000.0] * size, [UNUSED] * size
    for number, piece in enumerate(pieces.pieces[:size]):
        tokens[number], scores[number], types[number] = piece
    for number, text, kind in _added_tokens(tokenizer, phi=phi):
        if not 0 <= number < size:
            raise RefusedError(tokenizer.where, f"an added token {number}, but the model has {size} rows of embeddings")
        tokens[number], scores[number], types[number] = text, -1000.0, kind
    return {
        "tokenizer.ggml.model": string_value("llama"),
        "tokenizer.ggml.pre": string_value("default"),
        "tokenizer.ggml.tokens": strings_value(tokens),
        "tokenizer.ggml.scores": MetadataValue("[FLOAT32]", scores),
        "tokenizer.ggml.token_type": MetadataValue("[INT32]", types),
    }


def _added_tokens(tokenizer: Tokenizer, *, phi: bool) -> Iterator[tuple[int, str, int]]:
    path = tokenizer.folder / "added_tokens.json"
    if path.is_file():
        for text, number in json_file.read_object(path).items():
            if not json_file.is_integer(number):
                raise FormatError(str(path), f"the id of {text[:40]!r} is {str(number)[:40]!r}, not a number")
            yield number, text, USER_DEFINED
    decoder = tokenizer.config.get("added_tokens_decoder") or {}
    for number, token in decoder.items():
        yield int(number), *_kind(token, phi=phi)
    for token in (tokenizer.json.get("added_tokens") or []) if phi else []:
        yield int(token["id"]), *_kind(token, phi=True)


def _kind(token: Mapping[str, Any], *, phi: bool) -> tuple[str, int]:
    text = str(token["content"])
    if token.get("special") or (not phi and looks_special(text)):
        return text, CONTROL
    return (text if phi else text.replace("\u2581", " ")), USER_DEFINED
