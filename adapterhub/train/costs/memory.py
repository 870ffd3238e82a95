"""How much memory a training will take, before it takes any: from the base's headers and the config alone.

Counted from what `lora`, `attention`, `loss` and `loop` keep for the backward pass, tensor by tensor, for a block like
Llama's; `tests/train/test_memory.py` compares it with what processes really took. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.train.config import TrainConfig
from adapterhub.train.events import MemoryPlan
from adapterhub_converters.base import BaseSpec, read_base

_NF4_BYTES = 4.127 / 8  # a weight: 4 bits, 8/64 for its block's magnitude, 32/(64 * 256) for that one's
_RUNTIME = 485_000_000  # bytes of Python, torch, transformers and bitsandbytes, measured: 427 at rest, 58 more at work
_HOLES = 1.15  # what activations take over what they are: memory that is let go leaves holes (glibc; 1.1 to 1.2 measured)
_LOGIT_CHUNK = 128  # rows of logits at once: `loss.CHUNK`
_SHORT = 512  # tokens in a row up to which attention keeps its probabilities: `attention.LONGEST`
_DATA = 10  # bytes held a byte of text: ids, labels and positions of a token are 24, a token is some 3 bytes of text
_FULL = 16  # bytes a parameter of full fine-tuning in float32: the weight, its gradient, two moments of Adam


@dataclass(frozen=True)
class _Shape:
    """The numbers of a base that memory depends on; `linears` has `(out, in)` by path, `width` is bytes a number."""

    linears: Mapping[str, tuple[int, ...]]
    parameters: int
    hidden: int
    layers: int
    mlp: int
    heads: int
    head_dim: int
    vocabulary: int
    width: int

    @property
    def linear(self) -> int:
        """Weights in linear layers."""
        return sum(_count(shape) for shape in self.linears.values())


def plan(config: TrainConfig, spec: BaseSpec | None = None) -> MemoryPlan:
    """What training with `config` will hold at its peak; reads only the headers of the base, not even these if given."""
    shape = _shape(config, spec or read_base(config.resolve(config.base.path)))
    linear = shape.linear
    bytes_a_weight = _NF4_BYTES if config.base.quantise == "nf4" else shape.width
    adapter = 4 * _adapter_numbers(config, shape)
    kept, work = _kept(config, shape), _work(config, shape)
    logits = min(_LOGIT_CHUNK, _tokens(config)) * shape.vocabulary * (4 + shape.width)
    return MemoryPlan(
        base=int(linear * bytes_a_weight + (shape.parameters - linear) * shape.width),
        adapter=adapter,
        gradients=adapter,
        optimiser=2 * adapter,
        # The loss is done before the backward pass works: its logits and that never are at once.
        activations=int(_HOLES * (kept + max(0, work - logits))),
        logits=logits,
        data=_data(config),
        runtime=_RUNTIME,
    )


def full_fine_tuning(config: TrainConfig, spec: BaseSpec | None = None) -> int:
    """The least that training every parameter in float32 with Adam would hold with the same rows, in bytes."""
    found = spec or read_base(config.resolve(config.base.path))
    shape = _shape(config, found)
    same = plan(config, found)
    return _FULL * shape.parameters + same.activations + same.logits + same.data + same.runtime


def flops(config: TrainConfig, *, tokens: int, learnt: int, trained: int) -> int:
    """Floating-point operations that `tokens` tokens, of which `learnt` have a loss, take where `trained` numbers learn.

    By the model's arithmetic alone, a multiplication and an addition each: forward and towards the inputs for every frozen
    weight, and once more for the factors (arXiv 2305.14314 trains no base weight); attention over whole rows as in arXiv
    2204.02311, appendix B. What checkpointing computes again isn't counted.
    """
    shape = _shape(config, read_base(config.resolve(config.base.path)))
    attention = 12 * shape.layers * shape.heads * shape.head_dim * config.data.sequence
    head = 4 * shape.vocabulary * shape.hidden
    return tokens * (4 * shape.linear + 6 * trained + attention) + learnt * head


def parameters(config: TrainConfig, spec: BaseSpec | None = None) -> tuple[int, int]:
    """How many numbers the base has, and how many the adapter."""
    shape = _shape(config, spec or read_base(config.resolve(config.base.path)))
    return shape.parameters, _adapter_numbers(config, shape)


def _shape(config: TrainConfig, spec: BaseSpec) -> _Shape:
    numbers = spec.config
    hidden, heads = int(numbers.get("hidden_size") or 0), int(numbers.get("num_attention_heads") or 1)
    return _Shape(
        linears={
            name.removesuffix(".weight"): tensor.shape
            for name, tensor in spec.tensors.items()
            if _is_linear(name, tensor.shape)
        },
        parameters=sum(_count(tensor.shape) for tensor in spec.tensors.values()),
        hidden=hidden,
        layers=int(numbers.get("num_hidden_layers") or 1),
        mlp=int(numbers.get("intermediate_size") or 4 * hidden),
        heads=heads,
        head_dim=int(numbers.get("head_dim") or hidden // max(1, heads)),
        vocabulary=int(numbers.get("vocab_size") or 0),
        width=4 if config.base.dtype == "float32" else 2,
    )


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


def _is_target(name: str, config: TrainConfig) -> bool:
    wanted: Any = config.lora.targets
    names = [wanted] if isinstance(wanted, str) else wanted
    return wanted == "all-linear" or any(name == target or name.endswith("." + target) for target in names)


def _adapter_numbers(config: TrainConfig, shape: _Shape) -> int:
    return config.lora.r * sum(sum(dims) for name, dims in shape.linears.items() if _is_target(name, config))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def _tokens(config: TrainConfig) -> int:
    """Tokens in memory at once."""
    return (config.train.micro_rows or config.train.rows) * config.data.sequence


def _data(config: TrainConfig) -> int:
    files = [config.resolve(name) for name in (*config.data.train, *config.data.heldout)]
    return _DATA * sum(path.stat().st_size for path in files if path.is_file())


def _kept(config: TrainConfig, shape: _Shape) -> int:
    """Bytes that the forward pass leaves to the backward pass.

    A token and block: both norms keep their input in float32 and give the layers theirs; attention keeps queries, keys, values
    its probabilities, or where rows are long the mask, and its output layer the input; the MLP keeps four vectors; every LoRA
    layer x A^T. With checkpointing one block's, and every block's input. The last norm, and the states that have a loss with
    their gradient, come once.
    """
    tokens, width, sequence = _tokens(config), shape.width, config.data.sequence
    joined = shape.heads * shape.head_dim
    probabilities = shape.heads * sequence if sequence <= _SHORT else sequence
    targets = sum(_is_target(name, config) for name in shape.linears) / max(1, shape.layers)
    numbers = 2 * shape.hidden + 4 * joined + probabilities + 4 * shape.mlp + targets * config.lora.r
    block = tokens * int(8 * shape.hidden + width * numbers)
    end = tokens * shape.hidden * (4 + 3 * width)
    copies = 0 if width == 4 else width * _adapter_numbers(config, shape)  # of the factors, in the dtype computed in
    if config.train.checkpointing:
        return block + shape.layers * tokens * width * shape.hidden + end + copies // max(1, shape.layers)
    return shape.layers * block + end + copies


def _work(config: TrainConfig, shape: _Shape) -> int:
    """Bytes that the backward pass of one block works with: gradients of the MLP or of attention, and a weight in full."""
    tokens, sequence = _tokens(config), config.data.sequence
    rows = shape.heads * sequence if sequence <= _SHORT else 4 * shape.head_dim
    vectors = max(3 * shape.mlp, 2 * rows + 3 * shape.heads * shape.head_dim - 3 * shape.mlp)
    dense = max((_count(dims) for dims in shape.linears.values()), default=0) if config.base.quantise == "nf4" else 0
    return shape.width * (tokens * vectors + dense)
