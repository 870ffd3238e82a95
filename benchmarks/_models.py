"""Shapes of models, and folders with random weights and adapters of them."""

from __future__ import annotations

import json
import os
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]
COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-05,
    "max_position_embeddings": 8192, "rope_theta": 5e5, "vocab_size": 32000, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
_TINYLLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 320,
    },
    "28M": {
        "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6,
        "num_key_value_heads": 6, "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 1e5, "tie_word_embeddings": True,
    },
    "0.66B": {**_TINYLLAMA, "num_hidden_layers": 12},
    "1.1B": {**_TINYLLAMA, "num_hidden_layers": 22},
    "4B": {**_TINYLLAMA, "num_hidden_layers": 88},
    "Llama-3-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Llama-3-70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
SHARD = 10**9


def linear(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Path in a layer to (out_features, in_features)."""
    d, ff = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff),
    }  # fmt: skip


def weights(config: dict[str, Any]) -> Shapes:
    """Every parameter of the model."""
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, d)}
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.{path}.weight": shape for path, shape in linear(config).items()}
        shapes |= {f"{stem}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
    head: Shapes = {} if config["tie_word_embeddings"] else {"lm_head.weight": (vocabulary, d)}
    return shapes | {"model.norm.weight": (d,)} | head


def write(path: Path, shapes: Shapes, *, dtype: str = "BF16", values: bool = True, seed: int = 0) -> None:
    """A safetensors file of normal numbers (standard deviation 0.02; vectors are ones), or a hole for its data.

    The header is real. `dtype` is BF16 or F32.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, width = 0, {"BF16": 2, "F32": 4}[dtype]
    for name, shape in shapes.items():
        end = position + width * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    if not values:
        os.truncate(path, 8 + len(text) + position)
        return
    import ml_dtypes
    import numpy as np

    rng, kind = np.random.default_rng(seed), {"BF16": ml_dtypes.bfloat16, "F32": np.float32}[dtype]
    with open(path, "ab") as file:
        for shape in shapes.values():
            numbers = np.ones(shape) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, np.float32)
            file.write(numbers.astype(kind).tobytes())


def base(folder: str, model: str, *, values: bool = True, half: bool = False) -> None:
    """A model in bfloat16, in shards of about 1 GB; `half`: with half the intermediate size."""
    config = COMMON | MODELS[model]
    config["intermediate_size"] //= 2 if half else 1
    (Path(folder) / "config.json").write_text(json.dumps(config))
    size, place = 0, {}
    for name, shape in weights(config).items():
        place[name] = size // SHARD
        size += 2 * prod(shape)
    shards = {number: list(names) for number, names in groupby(place, place.__getitem__)}
    files = {number: f"model-{index:05}-of-{len(shards):05}.safetensors" for index, number in enumerate(shards, 1)}
    for number, names in shards.items():
        write(Path(folder) / files[number], {name: weights(config)[name] for name in names}, values=values, seed=number)
    index = {"metadata": {"total_size": size}, "weight_map": {name: files[number] for name, number in place.items()}}
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder: str, model: str, rank: int, *, layers: int = 0, **numbers: Any) -> None:
    """A PEFT folder: an adapter on every linear module of a model, or of its first layers; `numbers` as `write` takes them."""
    config = COMMON | MODELS[model]
    shapes: Shapes = {}
    for layer in range(layers or config["num_hidden_layers"]):
        for path, (out, into) in linear(config).items():
            stem = f"base_model.model.model.layers.{layer}.{path}"
            shapes |= {f"{stem}.lora_A.weight": (rank, into), f"{stem}.lora_B.weight": (out, rank)}
    _peft(folder, shapes, rank, sorted(path.split(".")[1] for path in linear(config)), **numbers)


def adapter_of(folder: str, mib: int) -> None:
    """A PEFT folder of that size: random bfloat16, which nothing compresses or finds twice, 2 MiB a module."""
    shapes: Shapes = {}
    for layer in range(max(1, mib // 2)):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        shapes |= {f"{stem}.lora_A.weight": (64, 8192), f"{stem}.lora_B.weight": (8192, 64)}
    _peft(folder, shapes, 64, ["q_proj"])


def many_tensors(folder: str, count: int) -> None:
    """A PEFT folder of whole tensors that its config does not name, each of which is worth a warning."""
    names = [f"base_model.model.model.layers.{n % 60}.mlp.experts.{n // 60}.up_proj.weight" for n in range(count)]
    _peft(folder, dict.fromkeys(names, (2, 4)), 2, ["q_proj"], values=False)


def _peft(folder: str, shapes: Shapes, rank: int, targets: list[str], **numbers: Any) -> None:
    write(Path(folder) / "adapter_model.safetensors", shapes, **numbers)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (Path(folder) / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
