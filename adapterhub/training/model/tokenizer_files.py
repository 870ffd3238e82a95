"""The files of a base's tokenizer, looked at before transformers opens them: what they could hang or fill a machine with.

tokenizers (Rust) follows a tokenizer.json without limits: forty replacements of `a` by `aa` make a terabyte of a letter, and a
word of any length is looked up piece by piece. Only what multiplies is counted; what is only wrong is left to that library.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import check_regular
from adapterhub_converters.errors import FormatError, RefusedError

_MAX_FILE = 256 << 20  # bytes; the largest tokenizer.json known has 35 MB
_MAX_GROWTH = 256  # characters that one may become; SentencePiece's own table makes 54 bytes of some
_MAX_ADDED = 10_000  # tokens that are put around a text
_MAX_WORD = 10_000  # characters of a word that WordPiece looks up, in quadratic time; its default is 100
# Characters that one becomes in the forms of Unicode; U+FDFA, a whole phrase, becomes 18.
_FORMS = {"NFKC": 18, "NFKD": 18, "NFD": 4, "NFC": 3, "Lowercase": 3, "BertNormalizer": 3, "ByteLevel": 4}


def check(folder: Path, whole: Callable[[str, int], bytes | None]) -> None:
    """Look at the files of a tokenizer.

    Args:
        folder: The base.
        whole: Reads a file of it by its name, with a limit in bytes.

    Raises:
        RefusedError: A pipe or a device, or a tokenizer that lets a text grow without a limit.
        FormatError: A file that is too large, or a tokenizer.json that is no JSON object.
    """
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(folder).as_posix()
        if not path.exists() or path.is_dir():
            continue
        found = path.stat()
        where = f"{folder}/{name}"
        check_regular(found, where)
        if path.suffix in (".json", ".jinja", ".txt") and found.st_size > _MAX_FILE:
            raise FormatError(where, f"more than {_MAX_FILE >> 20} MiB: not a file of a tokenizer")
        if path.suffix == ".json" and name.startswith("tokenizer") and name != "tokenizer_config.json":
            _check_document(json_file.parse_object(whole(name, _MAX_FILE) or b"", where, memory=None), where)


def _check_document(document: Mapping[str, Any], where: str) -> None:
    for part in ("normalizer", "decoder"):
        growth = math.prod(_growth(one) for one in _parts(document.get(part)))
        if growth > _MAX_GROWTH:
            raise RefusedError(where, f"its {part} can make {growth:,.0f} characters of one", "Use another base")
    added = sum(map(_added, _parts(document.get("post_processor"))))
    if added > _MAX_ADDED:
        raise RefusedError(where, f"its post_processor adds {added:,} tokens to every text", "Use another base")
    word = _of(document.get("model")).get("max_input_chars_per_word")
    if isinstance(word, int) and word > _MAX_WORD:
        raise RefusedError(where, f"its model looks up words of {word:,} characters", "Use another base")


def _of(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _parts(value: object) -> Iterator[Mapping[str, Any]]:
    """Yield what a normalizer, a decoder or a post-processor consists of; a sequence may contain others."""
    part = _of(value)
    inner = [found for key in ("normalizers", "decoders", "processors") if isinstance(found := part.get(key), list)]
    if part and not inner:
        yield part
    for one in (one for found in inner for one in found):
        yield from _parts(one)


def _growth(part: Mapping[str, Any]) -> float:
    """The most characters that one character becomes."""
    kind, content = part.get("type"), part.get("content")
    if kind == "Replace" and isinstance(content, str):
        literal = _of(part.get("pattern")).get("String")
        shortest = len(literal) if isinstance(literal, str) else 0  # an expression may match nothing
        return max(1.0, len(content) / shortest) if shortest else 1.0 + len(content)
    if kind == "Precompiled":
        return _longest(part.get("precompiled_charsmap"))
    return _FORMS.get(str(kind), 1)


def _longest(table: object) -> float:
    """The bytes of the longest text in a table of SentencePiece: a trie behind its length, and texts that end with NUL."""
    try:
        raw = base64.b64decode(str(table or ""), validate=True)
    except ValueError:
        return 1
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(1, *map(len, texts.split(b"\0")))


def _added(part: Mapping[str, Any]) -> int:
    """The tokens that a post-processor puts around a text or a pair of texts."""
    ids = {name: _of(one).get("ids") for name, one in _of(part.get("special_tokens")).items()}
    numbers = {name: len(found) for name, found in ids.items() if isinstance(found, list)}
    pieces = [piece for key in ("single", "pair") if isinstance(found := part.get(key), list) for piece in found]
    named = [str(_of(_of(piece).get("SpecialToken")).get("id")) for piece in pieces]
    return len(pieces) + sum(numbers.get(name, 1) for name in named)
