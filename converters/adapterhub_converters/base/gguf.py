"""A base in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import names
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.files import gguf_file

from .spec import BaseSpec, BaseTensor, completed, text_digest

# Keys of `{architecture}.…` in GGUF and what config.json calls them (gguf-py, `constants.py`, `Keys`).
_GGUF_NUMBERS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
}
# Tensors that llama.cpp derives from a config and that no Hugging Face model has.
_DERIVED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def read_gguf(path: Path) -> BaseSpec:
    """The base in a GGUF file, under Hugging Face's names; a tensor that has none keeps its own."""
    with gguf_file.GGUFFile(path) as file:
        header = file.header
    where, metadata = str(path), header.metadata
    if "general.type" in metadata and header.text("general.type") != "model":
        raise FormatError(where, f"not a base model: its general.type is {header.text('general.type')[:40]!r}")
    split = metadata.get("split.count", 1)
    if isinstance(split, int) and split > 1:
        raise RefusedError(where, f"one of {split} parts of a model", "Join them with llama-gguf-split --merge")
    experts = any("_exps." in name for name in header.tensors)
    architecture = names.by_gguf(header.text("general.architecture"), where, experts=experts)
    tensors = {
        _hf_name(architecture, name): BaseTensor(_hf_shape(architecture, name, tensor.shape), tensor.type_name)
        for name, tensor in header.tensors.items()
        if name not in _DERIVED
    }
    tied = bool(tensors) and "lm_head.weight" not in tensors
    name, model_type = next(iter(architecture.classes.items()))
    return BaseSpec(
        where=where,
        kind="gguf",
        architecture=name,
        model_type=model_type,
        config=_gguf_config(header, architecture, tensors) | {"tie_word_embeddings": tied},
        tensors=tensors,
        tied=tied,
        quantisation=_dominant_type(header.tensors),
        chat_template_digest=text_digest(metadata.get("tokenizer.chat_template")),
        repo=_gguf_repo(header),
    )


def _hf_name(architecture: names.Architecture, name: str) -> str:
    stem, _, kind = name.rpartition(".")
    module = architecture.module(stem)
    return f"{module}.{kind}" if module and kind in ("weight", "bias") else name


def _hf_shape(architecture: names.Architecture, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    module = architecture.module(name.removesuffix(".weight")) if architecture.transposed else None
    return shape[::-1] if module and names.layer_of(module) is not None else shape


def _gguf_config(
    header: gguf_file.GGUFHeader, architecture: names.Architecture, tensors: Mapping[str, BaseTensor]
) -> dict[str, Any]:
    config: dict[str, Any] = {}
    arch = architecture.gguf
    for key, name in _GGUF_NUMBERS.items():
        value = header.metadata.get(f"{arch}.{key}")
        if header.kinds.get(f"{arch}.{key}") == "FLOAT32":
            config[name] = float(str(np.float32(value)))  # 1e-05 was stored as the nearest float32
        elif isinstance(value, int | float):
            config[name] = value
    if arch == "falcon" and "num_key_value_heads" in config:
        config |= {"new_decoder_architecture": True, "num_kv_heads": config["num_key_value_heads"]}
    embedding = next((tensors[f"{name}.weight"] for name in names.EMBEDDINGS if f"{name}.weight" in tensors), None)
    if embedding and len(embedding.shape) == 2:
        config.setdefault("vocab_size", embedding.shape[0])
    return completed(config)


def _dominant_type(tensors: Mapping[str, gguf_file.GGUFTensor]) -> str | None:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.size
    dominant = max(sizes, key=lambda name: sizes[name], default="F32")
    return None if dominant in ("F64", "F32", "F16", "BF16") else dominant.lower()


def _gguf_repo(header: gguf_file.GGUFHeader) -> str | None:
    hub = "https://huggingface.co/"
    for url in (header.text("general.source.repo_url"), header.text("general.repo_url")):
        if url.startswith(hub):
            return url.removeprefix(hub).strip("/") or None
    return None
