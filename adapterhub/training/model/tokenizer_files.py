"""Checks of a base's tokenizer files before transformers opens them, for anything that could hang or fill a machine.

tokenizers (Rust) follows a tokenizer.json without limits: forty replacements of `a` by `aa` turn one letter into a terabyte,
and a word of any length is looked up piece by piece. Only growth is checked here; other mistakes are left to that library.
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
_MAX_GROWTH = 256  # characters per character; SentencePiece's own table turns some into 54 bytes
_MAX_ADDED = 10_000  # tokens around a text
_MAX_WORD = 10_000  # characters of a word, which WordPiece looks up in quadratic time; its default is 100
# Maximum characters per character by normalizer; U+FDFA, a ligature of a whole phrase, becomes 18.
_GROWTH_BY_TYPE = {"NFKC": 18, "NFKD": 18, "NFD": 4, "NFC": 3, "Lowercase": 3, "BertNormalizer": 3, "ByteLevel": 4}


def check(folder: Path, read_file: Callable[[str, int], bytes | None]) -> None:
    """Check the files of a tokenizer.

    Args:
        folder: The folder of the base.
        read_file: Reads one of its files by name, up to a limit in bytes.

    Raises:
        RefusedError: A file is a pipe or a device, or the tokenizer lets a text grow without limit.
        FormatError: A file is too large, or tokenizer.json is not a JSON object.
    """
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(folder).as_posix()
        if not path.exists() or path.is_dir():
            continue
        status = path.stat()
        location = f"{folder}/{name}"
        check_regular(status, location)
        if path.suffix in (".json", ".jinja", ".txt") and status.st_size > _MAX_FILE:
            raise FormatError(location, f"more than {_MAX_FILE >> 20} MiB: not a file of a tokenizer")
        if path.suffix == ".json" and name.startswith("tokenizer") and name != "tokenizer_config.json":
            _check_document(json_file.parse_object(read_file(name, _MAX_FILE) or b"", location, memory=None), location)


def _check_document(document: Mapping[str, Any], location: str) -> None:
    for key in ("normalizer", "decoder"):
        growth = math.prod(_growth(component) for component in _components(document.get(key)))
        if growth > _MAX_GROWTH:
            raise RefusedError(location, f"its {key} can make {growth:,.0f} characters of one", "Use another base")
    added = sum(map(_added_tokens, _components(document.get("post_processor"))))
    if added > _MAX_ADDED:
        raise RefusedError(location, f"its post_processor adds {added:,} tokens to every text", "Use another base")
    word = _as_mapping(document.get("model")).get("max_input_chars_per_word")
    if isinstance(word, int) and word > _MAX_WORD:
        raise RefusedError(location, f"its model looks up words of {word:,} characters", "Use another base")


def _as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _components(value: object) -> Iterator[Mapping[str, Any]]:
    """Yield the components of a normalizer, a decoder or a post-processor; a sequence may contain further sequences."""
    mapping = _as_mapping(value)
    nested = [
        components for key in ("normalizers", "decoders", "processors") if isinstance(components := mapping.get(key), list)
    ]
    if mapping and not nested:
        yield mapping
    for component in (component for components in nested for component in components):
        yield from _components(component)


def _growth(component: Mapping[str, Any]) -> float:
    """Return the maximum number of characters that one character becomes."""
    component_type, content = component.get("type"), component.get("content")
    if component_type == "Replace" and isinstance(content, str):
        literal = _as_mapping(component.get("pattern")).get("String")
        shortest_match = len(literal) if isinstance(literal, str) else 0  # an expression may match an empty text
        return max(1.0, len(content) / shortest_match) if shortest_match else 1.0 + len(content)
    if component_type == "Precompiled":
        return _longest_text(component.get("precompiled_charsmap"))
    return _GROWTH_BY_TYPE.get(str(component_type), 1)


def _longest_text(table: object) -> float:
    """Return the bytes of the longest text in a SentencePiece table: a length, a trie, and texts that end with NUL."""
    try:
        raw = base64.b64decode(str(table or ""), validate=True)
    except ValueError:
        return 1
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(1, *map(len, texts.split(b"\0")))


def _added_tokens(component: Mapping[str, Any]) -> int:
    """Return the number of tokens that a post-processor adds around a text or a pair of texts."""
    ids = {
        name: _as_mapping(special_token).get("ids")
        for name, special_token in _as_mapping(component.get("special_tokens")).items()
    }
    token_counts = {name: len(token_ids) for name, token_ids in ids.items() if isinstance(token_ids, list)}
    pieces = [piece for key in ("single", "pair") if isinstance(template := component.get(key), list) for piece in template]
    special_names = [str(_as_mapping(_as_mapping(piece).get("SpecialToken")).get("id")) for piece in pieces]
    return len(pieces) + sum(token_counts.get(name, 1) for name in special_names)
