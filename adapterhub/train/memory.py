"""How much memory a training will take, before it takes any: from the base's headers and the config alone."""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub_converters.base import BaseSpec, read_hf

from .config import TrainConfig
from .events import MemoryPlan

_NF4_BYTES = 4.127 / 8  # a weight: 4 bits, 8/64 for its block's magnitude, 32/(64 * 256) for that one's
_RUNTIME = 450_000_000  # bytes of Python, torch, transformers and bitsandbytes, measured at rest
_LOGIT_CHUNK = 128


def plan(config: TrainConfig) -> MemoryPlan:
    """What training with `config` will hold at its peak; reads only the headers of the base."""
    spec = read_hf(config.resolve(config.base.path))
    width = 4 if config.base.dtype == "float32" else 2
    layers = {
        name.removesuffix(".weight"): tensor.shape for name, tensor in spec.tensors.items() if _is_linear(name, tensor.shape)
    }
    linear = sum(out * into for out, into in layers.values())
    everything = sum(_count(tensor.shape) for tensor in spec.tensors.values())
    bytes_a_weight = _NF4_BYTES if config.base.quantise == "nf4" else width
    adapter = 4 * sum(config.lora.r * sum(shape) for name, shape in layers.items() if _is_target(name, config))
    return MemoryPlan(
        base=int(linear * bytes_a_weight + (everything - linear) * width),
        adapter=adapter,
        gradients=adapter,
        optimiser=2 * adapter,
        activations=_activations(config, spec.config, width),
        logits=_LOGIT_CHUNK * _vocabulary(spec) * (4 + width),
        runtime=_RUNTIME,
    )


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


def _is_target(name: str, config: TrainConfig) -> bool:
    wanted = config.lora.targets
    names = [wanted] if isinstance(wanted, str) else wanted
    return wanted == "all-linear" or any(name == target or name.endswith("." + target) for target in names)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def _vocabulary(spec: BaseSpec) -> int:
    return int(spec.config.get("vocab_size", 0))


def _activations(config: TrainConfig, numbers: Mapping[str, int], width: int) -> int:
    """What the backward pass needs of the forward pass, as a Llama-like block keeps it.

    A token and layer: about 14 vectors of the hidden size (norms keep theirs in float32), 4 of the MLP's, and a row of
    attention probabilities a head where rows are short. With checkpointing one block's, and every block's input.
    """
    hidden, layers = int(numbers.get("hidden_size", 0)), int(numbers.get("num_hidden_layers", 1))
    mlp, heads = int(numbers.get("intermediate_size", 4 * hidden)), int(numbers.get("num_attention_heads", 1))
    sequence = config.data.sequence
    tokens = (config.train.micro_rows or config.train.rows) * sequence
    block = tokens * width * (14 * hidden + 4 * mlp + heads * min(sequence, 512))
    return block + layers * tokens * width * hidden if config.train.checkpointing else layers * block
