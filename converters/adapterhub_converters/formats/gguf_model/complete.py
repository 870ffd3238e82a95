"""Whether the tensors of a GGUF are those that llama.cpp loads (`src/models/*.cpp`): all there, and as large as they say."""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.errors import RefusedError

from .configured import Config

Shape = tuple[int, ...]
_BIASES = ("attn_q.", "attn_k.", "attn_v.", "attn_qkv.", "attn_output.", "ffn_")
_UNBIASED = dict.fromkeys(
    (
        "smollm3", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "olmo2", "command-r", "cohere2", "arcee", "ernie4_5",
        "falcon",
    ),
    _BIASES,
) | {"seed_oss": ("attn_output.", "ffn_"), "deepseek2": ("ffn_",)}  # fmt: skip
"""Whose biases llama.cpp has no place for (`src/models/*.cpp`), so that it doesn't load a file with them."""
_BIASED = {"starcoder2": ("attn_output.", "ffn_down.", "ffn_up."), "gpt-oss": ("attn_q.", "attn_k.", "attn_v.", "attn_output.")}
"""And those that it doesn't load without them."""
_UNTIED = ("qwen2moe", "olmo2", "stablelm", "gpt-oss", "nemotron")
"""Nor these without an output layer."""


def check_complete(architecture: Architecture, shapes: Mapping[str, Shape], config: Config) -> None:
    """RefusedError for a model that lacks a tensor, or has one that llama.cpp has no place for or of a shape of its own."""
    _check_top(architecture, shapes, config)
    _check_biases(architecture.gguf, shapes, config)
    _check_layers(architecture.gguf, shapes, config)


def _check_top(architecture: Architecture, shapes: Mapping[str, Shape], config: Config) -> None:
    table, head = shapes.get("token_embd.weight"), shapes.get("output.weight")
    missing = [stem for stem in architecture.top.values() if stem != "output" and f"{stem}.weight" not in shapes]
    untied = config.get("tie_word_embeddings") is False or architecture.gguf in _UNTIED
    if architecture.head and head is None and untied:
        missing.append("output")
    if missing:
        raise RefusedError(config.where, f"no tensor for llama.cpp's {missing[0]}.weight")
    if table is None or len(table) != 2 or table[1] != config.count("hidden_size") or head not in (None, table):
        raise RefusedError(config.where, f"embeddings {table} and an output layer {head} of other sizes than config.json says")


def _check_biases(gguf: str, shapes: Mapping[str, Shape], config: Config) -> None:
    for name in shapes:
        _, _, inner = name.removeprefix("blk.").partition(".")
        if name.endswith(".bias") and inner.startswith(_UNBIASED.get(gguf, ())):
            raise RefusedError(config.where, f"a bias {name}, and llama.cpp's {gguf} has none")
    for stem in _BIASED.get(gguf, ()):
        if f"blk.0.{stem}bias" not in shapes:
            raise RefusedError(config.where, f"no bias blk.0.{stem}bias, and llama.cpp's {gguf} needs one")


def _check_layers(gguf: str, shapes: Mapping[str, Shape], config: Config) -> None:
    count = config.count("num_hidden_layers")
    dense = min(config.count("first_k_dense_replace"), count) if gguf == "deepseek2" else 0
    layers: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if name.startswith("blk."):
            layer, _, inner = name.removeprefix("blk.").partition(".")
            layers.setdefault(layer, {})[inner] = shape
    if len(layers) != count:
        raise RefusedError(config.where, f"config.json: num_hidden_layers is {count}, and there are {len(layers)}")
    for layer, found in layers.items():
        like = layers["0" if int(layer) < dense else str(dense)]
        other = next((inner for inner in sorted({*found, *like}) if found.get(inner) != like.get(inner)), None)
        if other:
            what = f"layer {layer} has {found.get(other, 'no')} for {other}, and others {like.get(other, 'none')}"
            raise RefusedError(config.where, what)
