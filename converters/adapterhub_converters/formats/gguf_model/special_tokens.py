"""Conversion of special tokens and chat templates to GGUF's keys (gguf-py, `vocab.py`, `SpecialVocab`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_types import MetadataValue, bool_value, string_value, strings_value, u32_value
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Values of `token_type` (llama.h, `enum llama_token_type`)."""

# `seperator` is how GGUF spells it.
SPECIAL = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask", "eot": "eot",
    "eom": "eom",
}  # fmt: skip
"""From transformers' name of a special token to GGUF's (gguf-py, `constants.py`, `Keys.Tokenizer`)."""


def id_key(kind: str) -> str:
    """Return the key for the id of the special token that transformers calls `kind`."""
    return f"tokenizer.ggml.{SPECIAL[kind]}_token_id"


# ---- The documents of a tokenizer


_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
_ADDED = ("bos", "eos", "sep")  # with a key of their own


@dataclass(frozen=True)
class Tokenizer:
    """The documents of a tokenizer; a missing file's document is empty."""

    folder: Path
    json: Mapping[str, Any]
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    """config.json."""

    @property
    def where(self) -> str:
        """The folder, for errors."""
        return str(self.folder)


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Read the tokenizer's documents from a model's folder."""
    tokenizer, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    documents = [_read(path) if path.is_file() else {} for path in (tokenizer, settings)]
    return Tokenizer(folder, documents[0], documents[1], config)


def _read(path: Path) -> dict[str, Any]:
    document = json_file.parse_object(json_file.read_text(path, _MAX), str(path), memory=_MAX_MEMORY)
    for name, is_valid in (_JSON if path.name == "tokenizer.json" else _CONFIG).items():
        if not is_valid(document.get(name)):
            raise FormatError(str(path), f"{name} is malformed")
    return document


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _is_token(value: Any) -> bool:
    number = value.get("id", 0) if isinstance(value, dict) else None
    return isinstance(number, int) and number >= 0 and isinstance(value.get("content"), str)


def _is_model(value: Any) -> bool:
    if not isinstance(value, dict | None):
        return False
    vocabulary, merges = (value or {}).get("vocab") or {}, (value or {}).get("merges") or []
    has_ids = isinstance(vocabulary, dict) and all(isinstance(item, int) and item >= 0 for item in vocabulary.values())
    is_unigram = isinstance(vocabulary, list)  # of unigrams, which are refused by name
    has_pairs = isinstance(merges, list) and all(
        isinstance(item, str) or (isinstance(item, list) and all(isinstance(part, str) for part in item)) for item in merges
    )
    return (has_ids or is_unigram) and has_pairs


def _is_step(value: Any) -> bool:
    if value is None:
        return True
    inner = (
        [value.get(key, []) for key in ("pretokenizers", "processors", "single", "pair")] if isinstance(value, dict) else [0]
    )
    nested = all(_are_objects(item) for item in inner) and isinstance(value.get("pattern"), dict | None)
    return nested and all(_is_step(item) for key in ("pretokenizers", "processors") for item in value.get(key, []))


_JSON = {
    "model": _is_model,
    "added_tokens": lambda value: value is None or (isinstance(value, list) and all(map(_is_token, value))),
    "pre_tokenizer": _is_step,
    "post_processor": _is_step,
}
_CONFIG = {
    "added_tokens_decoder": lambda value: (
        value is None or (isinstance(value, dict) and all(key.isdecimal() and _is_token(token) for key, token in value.items()))
    ),
    "chat_template": lambda value: value is None or isinstance(value, str) or _are_objects(value),
}


# A tokenizer.json with a quarter of a million tokens takes 30 MB, and its parsed objects an estimated 200 MB.
_MAX_MEMORY = 2 * json_file.MAX_MEMORY  # of the parsed objects
_MAX = 256 << 20  # bytes of the file


@dataclass
class _Special:
    """The special tokens found so far; `texts` come from tokenizer_config.json or the template."""

    texts: dict[str, Any]
    ids: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)

    def set(self, kind: str, number: Any, count: int | None) -> None:
        """Set the id of a kind, unless it is already set."""
        is_valid = json_file.is_integer(number) and 0 <= number < (1 << 32 if count is None else count)
        if is_valid and kind not in self.ids:
            self.ids[kind] = number


def special_tokens(
    tokenizer: Tokenizer, count: int | None, default_ids: Mapping[str, int] | None = None
) -> dict[str, MetadataValue]:
    """Return the keys of special tokens, with each id below `count`; `default_ids` apply where no document has an id."""
    special = _Special(dict(tokenizer.config))
    kinds: tuple[str, ...] = _KINDS
    if tokenizer.json:
        kinds += _add_from_post_processor(tokenizer, special)
    if tokenizer.config:
        _add_configured(tokenizer, special, kinds, count)
    text = tokenizer.model.get("text_config")
    for kind in kinds:
        number = tokenizer.model.get(f"{kind}_token_id")
        if number is None and isinstance(text, dict):
            number = text.get(f"{kind}_token_id")
        special.set(kind, number, count)
    for kind, number in (default_ids or {}).items():
        special.set(kind, number, None)
    metadata = {id_key(kind): u32_value(number) for kind, number in special.ids.items()}
    metadata |= {f"tokenizer.ggml.add_{kind}_token": bool_value(special.add[kind]) for kind in _ADDED if kind in special.add}
    return metadata | _templates(tokenizer)


def _add_configured(tokenizer: Tokenizer, special: _Special, kinds: Sequence[str], count: int | None) -> None:
    added = {token.get("content"): token.get("id") for token in reversed(tokenizer.json.get("added_tokens") or [])}
    for kind in kinds:
        if isinstance(special.texts.get(f"add_{kind}_token"), bool):
            special.add.setdefault(kind, special.texts[f"add_{kind}_token"])
        entry = special.texts.get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            special.set(kind, added.get(text), count)


def _add_from_post_processor(tokenizer: Tokenizer, special: _Special) -> tuple[str, ...]:
    """Record the tokens that the post-processor of tokenizer.json adds; return the extra kinds."""
    for kind, fallback in (("bos", "cls"), ("eos", "sep")):
        if special.texts and not special.texts.get(f"{kind}_token") and special.texts.get(f"{fallback}_token"):
            special.texts[f"{kind}_token"] = special.texts[f"{fallback}_token"]
    processor = tokenizer.json.get("post_processor") or {}
    extra_kinds: tuple[str, ...] = ()
    for step in processor.get("processors", [processor] if processor else []):
        if step.get("type") == "ByteLevel":
            special.add.setdefault("bos", False)
            special.add.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing":
            extra_kinds += _add_from_template(tokenizer, step, special)
        else:
            problem = f"tokenizer.json: a post-processor {str(step.get('type'))[:40]!r}, which is not supported"
            raise RefusedError(tokenizer.where, problem)
    return extra_kinds


def _add_from_template(tokenizer: Tokenizer, processor: Mapping[str, Any], special: _Special) -> tuple[str, ...]:
    """Record the first and the last token of a template such as `<s> A </s>`; return the extra kinds."""
    single = processor.get("single", [])
    inner = [part for part in single if "Sequence" in part]
    first = _special_token(single[0]) if len(single) > 1 else None
    last = _special_token(single[-1]) if len(single) > 1 else None
    if len(inner) != 1 or len(single) != 1 + bool(first) + bool(last):
        raise RefusedError(tokenizer.where, "tokenizer.json: a template that adds more than one token before or after a text")
    extra_kinds: tuple[str, ...] = ()
    if first:
        if not _token_text(special, "bos"):
            special.texts["bos_token"] = first
        special.add["bos"] = first in (_token_text(special, "bos"), _token_text(special, "cls"))
    if last:
        if special.texts and last != _token_text(special, "eos"):
            extra_kinds = ("eot",)
            special.texts["eot_token"], special.texts["eos_token"] = special.texts.get("eos_token"), last
        special.add["eos"] = True
    if first and not special.add["bos"]:
        raise RefusedError(
            tokenizer.where, f"tokenizer.json: {first!r} is added before a text but is neither the bos nor the cls token"
        )
    _record_separator(processor, first, last, special)
    return extra_kinds


def _special_token(part: Mapping[str, Any]) -> str | None:
    """Return the special token in a part of a template; None if there is none."""
    token = part.get("SpecialToken")
    return str(token["id"]) if isinstance(token, dict) and "id" in token else None


def _record_separator(processor: Mapping[str, Any], first: str | None, last: str | None, special: _Special) -> None:
    """Record whether a token is added between two texts, if the template has anything there."""
    ids = [_special_token(part) for part in processor.get("pair", [])]
    ids = ids[bool(first and ids and ids[0] == first) : len(ids) - bool(last and ids and ids[-1] == last)]
    between = ids[1:-1]
    if between and ids[0] is None and ids[-1] is None:
        ends = [_token_text(special, "sep"), _token_text(special, "eos")]
        single_separator = between[0] in ends and not last
        special.add["sep"] = bool(single_separator or (len(between) == 2 and between[1] in ends))
        if special.add["sep"] and special.texts and not special.texts.get("sep_token"):
            special.texts["sep_token"] = special.texts.get("eos_token")


def _token_text(special: _Special, kind: str) -> Any:
    entry = special.texts.get(f"{kind}_token")
    return entry.get("content") if isinstance(entry, dict) else entry


def _templates(tokenizer: Tokenizer) -> dict[str, MetadataValue]:
    """Return the chat template, or several by name; empty without a tokenizer_config.json, as in llama.cpp."""
    if not tokenizer.config:
        return {}
    template = tokenizer.config["chat_template"] if "chat_template" in tokenizer.config else _template_file(tokenizer.folder)
    if template is None or isinstance(template, str):
        return {"tokenizer.chat_template": string_value(template)} if template is not None else {}
    if not _are_objects(template):
        raise FormatError(tokenizer.where, "the chat template is neither a text nor a list of texts")
    metadata: dict[str, MetadataValue] = {}
    template_names = []
    for entry in template:
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in str(entry.get("name", "")))
        if name and entry.get("template") is not None:
            key = "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
            metadata[key] = string_value(str(entry["template"]))
            template_names += [name] if name != "default" else []
    return metadata | ({"tokenizer.chat_templates": strings_value(template_names)} if template_names else {})


def _template_file(folder: Path) -> Any:
    jinja, document = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja.is_file():
        additional = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        text = json_file.read_text(jinja)
        if not additional:
            return text
        return [{"name": "default", "template": text}] + [
            {"name": path.stem, "template": json_file.read_text(path)} for path in additional
        ]
    return json_file.read_object(document).get("chat_template") if document.is_file() else None
