"""A base in a Hugging Face folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub_converters import names
from adapterhub_converters.errors import FormatError, NotFoundError
from adapterhub_converters.files import json_file, safetensors_file

from .quantised import logical
from .spec import BaseSpec, BaseTensor, completed, text_digest

# What two models of equal shapes can differ in and still compute differently (FORMATS: rope, norms, heads).
_NUMERICS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps",
    "layer_norm_eps", "layer_norm_epsilon", "hidden_act", "hidden_activation", "tie_word_embeddings",
    "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "sliding_window", "attention_bias",
    "mlp_bias", "num_kv_heads", "multi_query", "new_decoder_architecture",
)  # fmt: skip


def read_hf(folder: Path) -> BaseSpec:
    """The base in a Hugging Face folder: `config.json`, and the headers of its safetensors files if it has any."""
    config = json_file.read_object(folder / "config.json")
    text = config.get("text_config")
    merged = completed({**(text if isinstance(text, dict) else {}), **config})
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        architectures = [""]
    quantised = config.get("quantization_config")
    tensors: dict[str, BaseTensor] = {}
    for path in weight_files(folder):
        tensors |= _logical(path, quantised if isinstance(quantised, dict) else {})
    return BaseSpec(
        where=str(folder),
        kind="hf",
        architecture=str(architectures[0]),
        model_type=str(config.get("model_type", "")),
        config={key: merged[key] for key in _NUMERICS if merged.get(key) is not None},
        tensors=tensors,
        tied=_tied(merged, tensors),
        quantisation=_quantisation(quantised) if isinstance(quantised, dict) else None,
        tokenizer_digest=_file_digest(folder / "tokenizer.json"),
        chat_template_digest=_chat_template_digest(folder),
        repo=repo if isinstance(repo := config.get("_name_or_path"), str) and repo else None,
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of its index; names in the index cannot leave the folder."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json_file.read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise FormatError(str(index), "weight_map is not a map of tensor names to file names")
        for name in set(weight_map.values()):
            if Path(name).name != name or name in ("", ".", ".."):
                raise FormatError(str(index), f"shard name {name[:80]!r} is not a plain file name")
        return [folder / name for name in dict.fromkeys(weight_map.values())]
    single = folder / "model.safetensors"
    return [single] if single.exists() else []


def _logical(path: Path, quantised: Mapping[str, Any]) -> dict[str, BaseTensor]:
    with safetensors_file.SafetensorsFile(path) as file:
        found = logical(file.tensors, quantised, lambda name: file.tensor(name).tobytes(), str(path))
    # A buffer that old checkpoints saved is no weight.
    return {name: BaseTensor(*tensor) for name, tensor in found.items() if not name.endswith(".rotary_emb.inv_freq")}


def _tied(config: Mapping[str, Any], tensors: Mapping[str, BaseTensor]) -> bool:
    # transformers ties by default where the config is silent, but only stored weights settle it.
    if tensors and "lm_head.weight" not in tensors and any(f"{name}.weight" in tensors for name in names.EMBEDDINGS):
        return True
    return bool(config.get("tie_word_embeddings", not tensors))


def _quantisation(config: Mapping[str, Any]) -> str:
    method = str(config.get("quant_method", "unknown"))
    return str(config.get("bnb_4bit_quant_type", method)) if config.get("load_in_4bit") else method


def _file_digest(path: Path) -> str | None:
    try:
        return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _chat_template_digest(folder: Path) -> str | None:
    """Of the exact text: a template that differs by one newline tokenises differently."""
    if (folder / "chat_template.jinja").exists():
        return _file_digest(folder / "chat_template.jinja")
    try:
        template = json_file.read_object(folder / "tokenizer_config.json").get("chat_template")
    except NotFoundError:
        return None
    return text_digest(template)
