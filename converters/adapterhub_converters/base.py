"""What a base model is, as far as an adapter cares: names, logical shapes, and the numbers that change the function.

Read from headers alone; no weight is loaded. Names are Hugging Face's and shapes are those of the model before
quantisation, whatever the file stores, so that a base in 16 bits, in NF4 and as GGUF has one fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import json_file, safetensors_file
from .errors import FormatError, NotFoundError

# What two models of equal shapes can differ in and still compute differently (FORMATS: rope, norms, heads).
_NUMERICS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps",
    "layer_norm_eps", "layer_norm_epsilon", "hidden_act", "hidden_activation", "tie_word_embeddings",
    "num_local_experts", "num_experts", "num_experts_per_tok", "sliding_window", "attention_bias", "mlp_bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """Logical shape (numpy order) and the dtype as stored (`BF16`, `Q4_1`, …)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class BaseSpec:
    """A base model seen from its headers.

    Attributes:
        where: The folder or file it was read from.
        kind: `hf` or `gguf`.
        architecture: Hugging Face's class name, `LlamaForCausalLM`.
        model_type: Hugging Face's `model_type`, `llama`.
        config: The numbers that change the function, under their `config.json` names.
        tensors: Parameter name (`model.layers.0.mlp.up_proj.weight`) to its tensor; empty when there are no weights.
        tied: Whether the output layer is the embedding table.
        quantisation: How the weights are stored when not in floats: `nf4`, `q4_1`, …
    """

    where: str
    kind: str
    architecture: str
    model_type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, BaseTensor] = field(default_factory=dict)
    tied: bool = False
    quantisation: str | None = None
    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None
    repo: str | None = None
    revision: str | None = None

    @property
    def fingerprint(self) -> str | None:
        """Digest of names and logical shapes; None without weights. A tied output layer counts as absent."""
        if not self.tensors:
            return None
        lines = (
            f"{name}\t{','.join(map(str, tensor.shape))}\n"
            for name, tensor in sorted(self.tensors.items())
            if not (self.tied and name == "lm_head.weight")
        )
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def read_hf(folder: Path) -> BaseSpec:
    """The base in a Hugging Face folder: `config.json`, and the headers of its safetensors files if it has any."""
    config = json_file.read_object(folder / "config.json")
    text = config.get("text_config")
    merged = {**(text if isinstance(text, dict) else {}), **config}
    architectures = config.get("architectures") or [""]
    quantised = config.get("quantization_config")
    tensors = {
        name: BaseTensor(info.shape, info.dtype) for path in weight_files(folder) for name, info in _headers(path).items()
    }
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
        repo=config.get("_name_or_path") or None,
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


def _headers(path: Path) -> dict[str, safetensors_file.TensorInfo]:
    with safetensors_file.SafetensorsFile(path) as file:
        return file.tensors


def _tied(config: Mapping[str, Any], tensors: Mapping[str, BaseTensor]) -> bool:
    # transformers ties by default where the config is silent, but only stored weights settle it.
    if tensors and "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors:
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
    return "sha256:" + hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None
