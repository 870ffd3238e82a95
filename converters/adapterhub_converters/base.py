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

import numpy as np

from . import gguf_file, json_file, names, safetensors_file
from .errors import FormatError, NotFoundError, RefusedError
from .quantised import logical

# What two models of equal shapes can differ in and still compute differently (FORMATS: rope, norms, heads).
_NUMERICS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps",
    "layer_norm_eps", "layer_norm_epsilon", "hidden_act", "hidden_activation", "tie_word_embeddings",
    "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "sliding_window", "attention_bias",
    "mlp_bias", "num_kv_heads", "multi_query", "new_decoder_architecture",
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


def read_base(path: Path) -> BaseSpec:
    """The base at `path`: a folder with a `config.json` is Hugging Face's, whatever else lies in it; else a GGUF file."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return read_hf(path)
        found = sorted(item.name for item in path.glob("*.gguf"))
        hint = f"Name the file itself, {found[0]}" if found else "A base is a folder with config.json or a .gguf file"
        raise NotFoundError(str(path), "not a base model: there is no config.json", hint)
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder")
    return read_gguf(path)


def read_hf(folder: Path) -> BaseSpec:
    """The base in a Hugging Face folder: `config.json`, and the headers of its safetensors files if it has any."""
    config = json_file.read_object(folder / "config.json")
    text = config.get("text_config")
    merged = _completed({**(text if isinstance(text, dict) else {}), **config})
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


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the numbers that transformers derives where a config leaves them out."""
    for old, name in _OLD_NAMES.items():
        if old in config:
            config.setdefault(name, config[old])
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        config.setdefault("num_key_value_heads", heads)
        if isinstance(hidden, int) and config.get("head_dim") is None:
            config["head_dim"] = hidden // heads
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    return config


# What GPT-2's and BLOOM's configs call the numbers that all others call alike.
_OLD_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}


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
    return _text_digest(template)


def _text_digest(text: object) -> str | None:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else None


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
        chat_template_digest=_text_digest(metadata.get("tokenizer.chat_template")),
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
    return _completed(config)


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
