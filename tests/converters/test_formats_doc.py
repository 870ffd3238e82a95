"""The matrix in docs/formats.md is what conversions do: each cell is tried."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import bases
from adapterhub_converters.adapter import Loss
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.formats.lossy import KINDS, LossAllowance
from tests.conftest import ROOT

TARGETS = ("mlx", "gguf", "torchtune", "litgpt", "megatron")
KEEPS_ALL = ("peft", "raw")
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
RNG = np.random.default_rng(0)
WORDS = {Loss.EXACT: "exact", Loss.REWRITTEN: "other form", Loss.ROUNDED: "rounded"}


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def pair(target: str = Q, r: int = 2, out: int = 16) -> dict[str, np.ndarray]:
    return {f"{target}.lora_A.weight": normal(r, 16), f"{target}.lora_B.weight": normal(out, r)}


def embedding(target: str = "model.embed_tokens") -> dict[str, np.ndarray]:
    return {f"{target}.lora_embedding_A": normal(2, 12), f"{target}.lora_embedding_B": normal(16, 2)}


Content = tuple[dict[str, np.ndarray], dict[str, Any]]
FEATURES: dict[str, Callable[[], Content]] = {
    "plain, rsLoRA, any alpha": lambda: (pair(), {"use_rslora": True, "lora_alpha": 3.5}),
    "alpha_pattern": lambda: (pair() | pair(K), {"alpha_pattern": {"k_proj": 3}}),
    "rank_pattern": lambda: (pair() | pair(K, r=3), {"rank_pattern": {"k_proj": 3}}),
    "DoRA": lambda: (pair() | {f"{Q}.lora_magnitude_vector": np.abs(normal(16)) + 1}, {"use_dora": True}),
    "lora_bias": lambda: (pair() | {f"{Q}.lora_B.bias": normal(16)}, {"lora_bias": True}),
    "modules_to_save: a weight": lambda: (pair() | {"lm_head.weight": normal(12, 16)}, {"modules_to_save": ["lm_head"]}),
    "modules_to_save: a norm": lambda: (pair() | {"model.norm.weight": normal(16)}, {"modules_to_save": ["norm"]}),
    "trainable_token_indices": lambda: (
        pair() | {"model.embed_tokens.token_adapter.trainable_tokens_delta": normal(1, 16)},
        {"trainable_token_indices": {"embed_tokens": [3]}},
    ),
    "embedding, untied": lambda: (pair() | embedding(), {}),
    "embedding, tied": lambda: (pair() | embedding(), {"tied": True}),
    "lm_head, untied": lambda: (pair() | pair("lm_head", out=12), {}),
    "lm_head, tied": lambda: (pair() | pair("lm_head", out=12), {"tied": True}),
    "PiSSA": lambda: (pair(), {"init_lora_weights": "pissa"}),
    "OLoRA, CorDA, LoftQ": lambda: (pair(), {"init_lora_weights": "olora"}),
    "LoHa": lambda: (
        {f"{Q}.hada_w{n}_{half}": normal(*shape) for n in (1, 2) for half, shape in (("a", (16, 2)), ("b", (2, 16)))},
        {"peft_type": "LOHA", "alpha": 3},
    ),
    "VeRA": lambda: (
        {f"{Q}.vera_lambda_b": normal(16), f"{Q}.vera_lambda_d": normal(2), "vera_A": normal(2, 16), "vera_B": normal(16, 2)},
        {"peft_type": "VERA"},
    ),
    "VeRA without its projections": lambda: (
        {f"{Q}.vera_lambda_b": normal(16), f"{Q}.vera_lambda_d": normal(2)},
        {"peft_type": "VERA", "save_projection": False},
    ),
    "aLoRA": lambda: (pair(), {"alora_invocation_tokens": [1, 2]}),
    "another table than the base's": lambda: (pair() | {"model.embed_tokens.base_layer.weight": normal(12, 16)}, {}),
}  # fmt: skip


def model(path: Path, *, tied: bool) -> bases.BaseSpec:
    path.mkdir()
    shapes = {Q: (16, 16), K: (16, 16), "model.embed_tokens": (12, 16)} | ({} if tied else {"lm_head": (12, 16)})
    tensors = {f"{name}.weight": normal(*shape) for name, shape in shapes.items()} | {"model.norm.weight": normal(16)}
    safetensors_file.write(path / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 12, "tie_word_embeddings": tied,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return bases.read_base(path)


def cell(source: Path, target: Path, to: str, spec: bases.BaseSpec) -> str:
    """What a conversion does by default, or with which permission it does something."""
    ways = {
        "": LossAllowance(),
        "approx": LossAllowance(approx=True),
        "drop": LossAllowance(drop=[*KINDS, "lm_head", "model.embed_tokens"]),
    }
    for n, (word, allowed) in enumerate(ways.items()):
        try:
            report = convert.convert(source, target.with_name(f"{target.name}{n}"), to=to, base=spec, allowed=allowed)
        except RefusedError:
            continue
        return f"`--allow-{word}`" if word else WORDS[report.worst]
    return "refused"


def matrix(tmp_path: Path) -> list[str]:
    """The table of what is not exact in every format."""
    specs = {tied: model(tmp_path / f"base{tied}", tied=tied) for tied in (False, True)}
    rows = ["| of a PEFT adapter | " + " | ".join(TARGETS) + " |", "| --- |" + " --- |" * len(TARGETS)]
    for n, (feature, make) in enumerate(FEATURES.items()):
        tensors, config = make()
        tied = bool(config.pop("tied", False))
        source = tmp_path / f"source{n}"
        source.mkdir()
        # VeRA's projections hang on no module.
        named = {f"base_model.{'' if name in ('vera_A', 'vera_B') else 'model.'}{name}": a for name, a in tensors.items()}
        safetensors_file.write(source / peft.WEIGHTS, named, {"format": "pt"})
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"]} | config
        (source / peft.CONFIG).write_text(json.dumps(settings))
        keeps = {cell(source, tmp_path / f"{n}{to}", to, specs[tied]) for to in KEEPS_ALL}
        assert keeps == {"refused" if feature == "VeRA without its projections" else "exact"}, feature
        cells = [cell(source, tmp_path / f"{n}{to}", to, specs[tied]) for to in TARGETS]
        rows += [f"| {feature} | " + " | ".join(cells) + " |"] * (set(cells) != {"exact"})
    return rows


def test_the_matrix_is_what_conversions_do(tmp_path: Path) -> None:
    documented = (ROOT / "docs/formats.md").read_text()
    joined = "\n".join(matrix(tmp_path))
    assert joined in documented, f"docs/formats.md should have:\n{joined}"


@pytest.mark.parametrize("loss", Loss)
def test_every_loss_is_explained(loss: Loss) -> None:
    assert f"| `{loss.name.lower()}` |" in (ROOT / "docs/formats.md").read_text()


def test_every_key_that_rides_along_is_explained(tmp_path: Path) -> None:
    text = (ROOT / "docs/formats.md").read_text()
    spec = model(tmp_path / "base", tied=False)
    tensors, config = FEATURES["rank_pattern"]()
    source = tmp_path / "a"
    source.mkdir()
    safetensors_file.write(source / peft.WEIGHTS, {f"base_model.model.{name}": array for name, array in tensors.items()})
    (source / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    for to, file in (("mlx", "adapters.safetensors"), ("raw", "")):
        convert.convert(source, tmp_path / to, to=to, base=spec)
        with safetensors_file.SafetensorsFile(tmp_path / to / file if file else tmp_path / to) as opened:
            assert all(f"`{key}`" in text for key in opened.header.metadata if key.startswith("adapterhub."))
