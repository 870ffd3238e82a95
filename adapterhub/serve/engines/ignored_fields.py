"""Fields of requests that an engine takes without a word and ignores: an answer without them is not what was asked for.

Tried with llama-server (b10435); read in vLLM (0.32.0) and SGLang (0.5.23). The hosts in this process refuse such fields
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import CHAT, COMPLETIONS
from .api_paths import MESSAGES, RERANKS, RESPONSES, TOKENIZE

_Fields = Mapping[str, tuple[object, ...]]
# Fields, with the values that ask for nothing; null always does.
_CHAT: _Fields = {
    "audio": (), "function_call": ("none", "auto"), "functions": ([],), "modalities": (["text"],), "verbosity": ("medium",),
    "web_search_options": (),
}  # fmt: skip
_TEXT = {"type": "text"}
IGNORED: Mapping[str, Mapping[str, _Fields]] = {
    "llama.cpp": {
        COMPLETIONS: {"best_of": (1,), "echo": (False,), "response_format": (_TEXT,), "suffix": ("",)},
        CHAT: _CHAT,
        RESPONSES: {"text.format": (_TEXT,)},
        MESSAGES: {"output_config.format": ()},
        TOKENIZE: {"messages": (), "prompt": ()},
        **{path: {"texts": ()} for path in RERANKS},  # answered in another form, without the name of the model
    },
    "vllm": {COMPLETIONS: {"best_of": (1,)}, CHAT: _CHAT},
    "sglang": {
        COMPLETIONS: {"best_of": (1,), "suffix": ("",)},
        CHAT: {name: values for name, values in _CHAT.items() if name != "modalities"},
    },
}


def fields_ignored(engine: str, path: str, body: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields of a request that the engine would ignore; one within another is named `text.format`."""
    for name, neutral in IGNORED.get(engine, {}).get(path, {}).items():
        value: Any = body
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and value not in neutral:
            yield name
