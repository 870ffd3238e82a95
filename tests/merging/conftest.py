"""Random little models and adapters, made by the programs people make them with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need_module


@pytest.fixture(scope="session")
def torch() -> Any:
    """torch with one thread: two that wait for each other spin; the test is skipped without it, transformers or peft."""
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def llama(torch: Any, tmp_path: Path) -> Callable[..., Path]:
    """Save a random two-layer Llama with grouped queries; its dimensions are like a real one's, only smaller."""

    def build(dtype: str = "bfloat16", *, shard_size: str = "5GB", **config: Any) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                **{
                    "vocab_size": 300,
                    "hidden_size": 96,
                    "intermediate_size": 200,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 6,
                    "num_key_value_heads": 2,
                    "tie_word_embeddings": False,
                    **config,
                }
            )
        )
        folder = tmp_path / f"base-{dtype}"
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
        return folder

    return build


@pytest.fixture
def trained(torch: Any, tmp_path: Path) -> Callable[..., Path]:
    """Save an adapter of peft's on a base, with random numbers in every tensor, as if it had been trained."""

    def build(base: Path, *, name: str = "adapter", dtype: str = "float32", std: float = 0.05, **config: Any) -> Path:
        import peft
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", **config}))
        torch.manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "magnitude" in key:
                    parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
                elif parameter.requires_grad:
                    parameter.normal_(0, std)
        folder = tmp_path / name
        model.to(getattr(torch, dtype)).save_pretrained(folder, save_embedding_layers=False)
        return folder

    return build


@pytest.fixture
def merged_by_peft(torch: Any) -> Callable[..., dict[str, Any]]:
    """The state dict that peft's own merge gives, in the base's dtype."""

    def merge(base: Path, *adapters: Path) -> dict[str, Any]:
        import peft
        from transformers import AutoModelForCausalLM

        dtype = json.loads((base / "config.json").read_text())["dtype"]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        model = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
        for number, adapter in enumerate(adapters[1:], 1):
            model.load_adapter(adapter, adapter_name=str(number))
        names = [str(number) for number in range(len(adapters))]
        state = model.merge_and_unload(adapter_names=names).state_dict()
        return {name: tensor.clone() for name, tensor in state.items()}  # else mapped from a file that tests rewrite

    return merge
