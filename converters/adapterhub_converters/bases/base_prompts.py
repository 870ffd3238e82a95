"""The chat template of a base and its special tokens, from the files of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import FILE

from .base_spec import BaseSpec

_TOKENIZER_CONFIG, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
_GENERATION_CONFIG = "generation_config.json"
_CONTROL = 3  # llama.h, LLAMA_TOKEN_TYPE_CONTROL
_MAX_TOKENIZER = 256 << 20  # bytes; the largest tokenizer.json known has 35 MB


@dataclass(frozen=True)
class BasePrompt:
    """The chat template of a base; None if it has none, and the texts of the special tokens that a template may write."""

    template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def of_spec(spec: BaseSpec) -> BasePrompt | None:
    """Return the prompt of a base; None if its tokenizer is not on this disk."""
    if spec.kind == "gguf":
        return of_gguf(Path(spec.source)) if Path(spec.source).is_file() else None
    has_tokenizer = spec.folder is not None and (spec.folder / _TOKENIZER_CONFIG).is_file()
    return _read_folder(spec.folder) if has_tokenizer and spec.folder is not None else None


def _read_folder(folder: Path) -> BasePrompt:
    """Return the chat template and the special tokens in a Hugging Face folder."""
    config, tokens = (_read(folder / name) for name in (_TOKENIZER_CONFIG, _SPECIAL_TOKENS))
    template: Any = config.get("chat_template")
    if isinstance(template, list):  # of named ones
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if (folder / FILE).is_file():
        template = json_file.read_text(folder / FILE)
    special = {name: _token_text(token) for name, token in {**tokens, **config}.items() if name.endswith("_token")}
    return BasePrompt(
        template if isinstance(template, str) else None, {name: text for name, text in special.items() if text is not None}
    )


def _read(path: Path) -> Mapping[str, Any]:
    return json_file.read_object(path) if path.is_file() else {}


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def of_gguf(path: Path) -> BasePrompt:
    """Return the prompt of a base in a GGUF file."""
    with GGUFFile(path) as file:
        metadata = file.header.metadata
    template, tokens = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.ggml.tokens")
    numbers = {f"{name}_token": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    special = {
        name: str(tokens[number])
        for name, number in numbers.items()
        if isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens)
    }
    return BasePrompt(template if isinstance(template, str) else None, special)


def end_tokens(spec: BaseSpec) -> tuple[Mapping[str, int], frozenset[str]]:
    """Return the ids of the special tokens of a base by their texts, and the texts at which any of its answers ends.

    Both are empty where its tokenizer is not on this disk.
    """
    if spec.kind == "gguf" and Path(spec.source).is_file():
        with GGUFFile(Path(spec.source)) as file:
            return end_tokens_of_gguf(file.header.metadata)
    if spec.folder is None:
        return {}, frozenset()
    path, config = spec.folder / "tokenizer.json", _read(spec.folder / _TOKENIZER_CONFIG)
    # Files of transformers 4 list them in tokenizer_config.json too, and those of slow tokenizers only there.
    decoder = config.get("added_tokens_decoder")
    tokens: list[Any] = [(number, token) for number, token in decoder.items()] if isinstance(decoder, dict) else []
    if path.is_file():
        document = json_file.parse_object(json_file.read_text(path, _MAX_TOKENIZER), str(path), memory=None)
        added = document.get("added_tokens")
        tokens += [(token.get("id"), token) for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids = {
        text: int(number)
        for number, token in tokens
        if isinstance(token, dict) and token.get("special") and (text := _token_text(token)) and str(number).isdecimal()
    }
    # As in vLLM: the config counts where there is no generation config.
    stops = (_read(spec.folder / _GENERATION_CONFIG) or _read(spec.folder / "config.json")).get("eos_token_id")
    numbers = stops if isinstance(stops, list) else [stops]
    ends = {text for text, number in ids.items() if number in numbers}
    return ids, frozenset({*ends, _token_text(config.get("eos_token")) or ""} - {""})


def end_tokens_of_gguf(metadata: Mapping[str, Any]) -> tuple[Mapping[str, int], frozenset[str]]:
    """Return `end_tokens` of a base by the metadata of its GGUF file."""
    tokens, types = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list | np.ndarray):
        return {}, frozenset()
    ids = {str(token): number for number, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == _CONTROL}
    stops = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return ids, frozenset(text for text, number in ids.items() if number in stops)
