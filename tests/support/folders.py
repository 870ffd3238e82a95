"""Tiny adapters and bases as folders, made with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from adapterhub_converters import bases as base_module
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft

Shapes = dict[str, tuple[int, ...]]


def pairs(
    layers: int, *, r: int = 2, module: str = "model.layers.{}.self_attn.q_proj", size: tuple[int, int] = (8, 8)
) -> Shapes:
    out, into = size
    names = [module.format(layer) for layer in range(layers)]
    return {f"{n}.lora_A.weight": (r, into) for n in names} | {f"{n}.lora_B.weight": (out, r) for n in names}


def adapter(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str, np.ndarray], np.ndarray] | None = None,
    /,
    **config: object,
) -> Path:
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if values:
        arrays = {name: values(name, array) for name, array in arrays.items()}
    safetensors_file.write(path / peft.WEIGHTS, {f"base_model.model.{n}": a for n, a in arrays.items()}, {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": _targets(shapes), **config}
    (path / peft.CONFIG).write_text(json.dumps(settings))
    return path


def two_adapters(folder: Path) -> None:
    """Adapters `a` and `b` of the same shapes, with different numbers."""
    random = np.random.default_rng(0)
    for name in "ab":
        adapter(folder / name, pairs(2), lambda _, array: random.normal(size=array.shape).astype(np.float32))


def vera(path: Path, modules: dict[str, int], widest: tuple[int, int], r: int = 2) -> Path:
    """A VeRA adapter of modules with so many outputs, whose projections are for a weight of the shape `widest`."""
    shapes: Shapes = {f"model.{n}.vera_lambda_b": (out,) for n, out in modules.items()}
    shapes |= {f"model.{n}.vera_lambda_d": (r,) for n in modules} | {"vera_A": (r, widest[1]), "vera_B": (widest[0], r)}
    path.mkdir()
    rng = np.random.default_rng(0)
    arrays = {f"base_model.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors_file.write(path / peft.WEIGHTS, arrays, {"format": "pt"})
    (path / peft.CONFIG).write_text(json.dumps({"peft_type": "VERA", "r": r, "target_modules": ["q_proj"]}))
    return path


def _targets(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The last names of the modules that have pairs, as peft saves them."""
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in shapes if ".lora_" in name}
    return sorted(names) or ["q_proj"]


def base(
    path: Path, layers: int = 2, *, size: int = 8, vocab: int = 12, tied: bool = True, prefix: str = "model."
) -> base_module.BaseSpec:
    path.mkdir()
    names = ("self_attn.q_proj", "self_attn.v_proj")
    shapes: Shapes = {f"{prefix}layers.{layer}.{n}.weight": (size, size) for layer in range(layers) for n in names}
    shapes |= {f"{prefix}embed_tokens.weight": (vocab, size), f"{prefix}norm.weight": (size,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, size)
    safetensors_file.write(path / "model.safetensors", {n: np.zeros(s, np.float32) for n, s in shapes.items()})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "rope_theta": 1e4}
    config |= {"hidden_size": size, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": vocab}
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    return base_module.read_hf(path)
