"""The memory that a training will need, from the base's headers and the config alone, without torch.

Counted from what `lora`, `attention`, `loss` and `loop` save for the backward pass, tensor by tensor, for a block like
Llama's; `tests/training/test_memory.py` compares it with the peak of real processes.
"""

from __future__ import annotations

import dataclasses
import math

from adapterhub.training.config import TrainConfig
from adapterhub.training.events import MemoryPlan
from adapterhub_converters.bases import BaseSpec

from .shapes import Shape, Target, inputs, shape_of, targets, trained

_NF4_BYTES = 4.127 / 8  # a weight: 4 bits, 8/64 for its block's magnitude, 32/(64 * 256) for that one's
_RUNTIME = 485_000_000  # bytes of Python, torch, transformers and bitsandbytes, measured: 427 at rest, 58 more at work
_ANSWERS = 60_000_000  # bytes of an evaluation with generated answers and the fragmentation they cause: 45 to 85 measured
_LOGS = 45_000_000  # bytes of TensorBoard and its imports, measured; others are as large or larger
_FRAGMENTATION = 1.15  # of activations: freed memory leaves holes (glibc; 1.1 to 1.2 measured)
_FEWEST_LOGITS, _MOST_LOGITS = 128, 1024  # rows of logits at once; with fewer, a card waits for the output layer's weight
_LOGITS_SHARE = 64  # of the memory of a card: the share that they may take
_CUDA = 600_000_000  # bytes of a CUDA context and the work space of its libraries
_SHORT = 512  # tokens in a row up to which attention saves its probabilities: `attention.LONGEST`
_BLOCK = 128  # queries at once in longer rows: `attention.BLOCK`
_DATA = 2  # bytes for a byte of text: a token has 4, and is some 3 bytes of text
_FULL = 16  # bytes a parameter of full fine-tuning in float32: the weight, its gradient, two moments of Adam


def plan(config: TrainConfig, spec: BaseSpec, *, card: int | None = None) -> MemoryPlan:
    """Return the memory of a training at its peak; `checkpointing = "auto"` counts as false (`budget.settled` chooses).

    Args:
        card: The bytes of memory of the CUDA device to plan for, in which neither data nor the interpreter are; None for a CPU.
            Only plans for a CPU were compared with measurements.
    """
    shape = shape_of(config, spec)
    bytes_a_weight = _NF4_BYTES if _dequantizes(config) else shape.width
    numbers = trained(config, shape)
    on_card = card is not None
    saved, work = _saved(config, shape, on_card=on_card), _work(config, shape, on_card=on_card)
    at_once = logits_at_once(shape.vocabulary, shape.width, card)
    logits = min(at_once, _tokens(config)) * shape.vocabulary * (4 + shape.width)
    # Logits are freed before the backward pass works, and loading is over by then: these never exist at the same time.
    activations = max(int(_FRAGMENTATION * (saved + max(0, work - logits))), _loading(config, shape) - logits)
    return MemoryPlan(
        base=int(shape.linear * bytes_a_weight + (shape.parameters - shape.linear) * shape.width) + _extra(config, shape),
        adapter=4 * numbers * (1 + (config.lora.init != "default") + config.train.keep_best),
        gradients=4 * numbers,
        optimizer=(8 if config.train.optimizer == "adamw" else 2) * numbers,
        activations=activations,
        logits=logits,
        data=0 if on_card else _data(config),
        runtime=_CUDA if on_card else _interpreter(config),
    )


def _interpreter(config: TrainConfig) -> int:
    return _RUNTIME + (_ANSWERS if config.train.samples else 0) + (_LOGS if config.train.log_to else 0)


def logits_at_once(vocabulary: int, width: int, card: int | None) -> int:
    """Return the number of tokens whose logits exist at once, a multiple of 128.

    Args:
        width: Bytes of a number of the output layer, besides float32.
        card: The bytes of memory of a CUDA device; None for a CPU, on which more are no faster.
    """
    if card is None:
        return _FEWEST_LOGITS
    fitting = card // _LOGITS_SHARE // max(1, vocabulary * (4 + width)) // _FEWEST_LOGITS * _FEWEST_LOGITS
    return max(_FEWEST_LOGITS, min(_MOST_LOGITS, fitting))


def base_sizes(config: TrainConfig, spec: BaseSpec) -> tuple[int, int]:
    """Return the bytes of the base in 16 bits, and with its linear layers in 4 bits."""
    in_16_bits = dataclasses.replace(config.base, quantize="none", dtype="bfloat16", hold="quantized")
    in_4_bits = dataclasses.replace(in_16_bits, quantize="nf4")
    whole, quarter = (plan(dataclasses.replace(config, base=base), spec).base for base in (in_16_bits, in_4_bits))
    return whole, quarter


def full_fine_tuning(config: TrainConfig, spec: BaseSpec, *, card: int | None = None) -> int:
    """Return the least memory, in bytes, of training every parameter in float32 with Adam on the same rows."""
    same = plan(config, spec, card=card)
    return _FULL * shape_of(config, spec).parameters + same.activations + same.logits + same.data + same.runtime


def flops(config: TrainConfig, spec: BaseSpec, *, tokens: int, label_tokens: int, trained: int, context: float) -> int:
    """Return the floating-point operations for `tokens` tokens, of which `label_tokens` have a loss.

    By the model's arithmetic alone, a multiplication and an addition each: forward and toward the inputs for every frozen
    weight that a token passes, and once more for the `trained` parameters (arXiv 2305.14314 trains no base weight); attention
    as in arXiv 2204.02311, appendix B, over `context` tokens, the mean length of a token's document. The reference of DPO is
    one more forward pass through what is frozen. Not counted are what checkpointing computes again, padding, and what a mask
    hides.
    """
    shape = shape_of(config, spec)
    passes = 3 if config.preference.method == "dpo" else 2  # forward, toward the inputs, and the reference
    attention = 4 * (passes + 1) * shape.layers * shape.heads * shape.head_dim * context
    head = 2 * passes * shape.vocabulary * shape.hidden
    return round(tokens * (2 * passes * shape.used + 6 * trained + attention)) + label_tokens * head


def parameters(config: TrainConfig, spec: BaseSpec) -> tuple[int, int]:
    """Return the number of parameters of the base, and of the adapter."""
    shape = shape_of(config, spec)
    return shape.parameters, trained(config, shape)


def _dequantizes(config: TrainConfig) -> bool:
    """Return whether each step dequantizes the base; `hold = "auto"` counts as true (`budget.settled` chooses)."""
    return config.base.quantize == "nf4" and config.base.hold != "dense"


def _tokens(config: TrainConfig) -> int:
    """Return the number of tokens in memory at once."""
    return (config.train.micro_rows or config.train.rows) * config.data.sequence


def _data(config: TrainConfig) -> int:
    files = [config.resolve(name) for name in (*config.data.paths, *config.data.heldout)]
    return _DATA * sum(path.stat().st_size for path in files if path.is_file())


def _extra(config: TrainConfig, shape: Shape) -> int:
    """Return bytes besides the frozen weights: |W|² of every row for DoRA; places and initial values of token rows."""
    rows = config.lora.trainable_token_indices
    squares = 4 * sum(target.out for target in targets(config, shape).values()) if config.lora.dora else 0
    return squares + (8 * shape.vocabulary + 4 * len(rows) * shape.hidden if rows else 0)


def _loading(config: TrainConfig, shape: Shape) -> int:
    """Return bytes for decomposing the largest adapted weight, where its parts are the initial factors.

    In float32: the weight, a copy and the remainder, both sides of singular vectors, and LAPACK's `gesdd` with some five
    squares of the smaller side.
    """
    if config.lora.init == "default":
        return 0
    sizes = [(target.out, target.inside) for target in targets(config, shape).values() if not target.table]
    return 4 * max((3 * out * wide + min(out, wide) * (out + wide + 5 * min(out, wide)) for out, wide in sizes), default=0)


def _saved(config: TrainConfig, shape: Shape, *, on_card: bool) -> int:
    """Return bytes that the forward pass saves for the backward pass.

    For each token and block: both norms save their input in float32; attention saves queries, keys, values, and in short rows
    its probabilities; the MLP three vectors; every adapted layer x A^T and its input, which layers with the same input
    share, unless each has its own dropout. With checkpointing: one block's, and every block's input. The last norm, and the
    states with a loss and their gradient, count once. On a card attention saves its output in place of probabilities, and there
    is no mask (`layers.varlen`).
    """
    tokens, width, sequence = _tokens(config), shape.width, config.data.sequence
    found = targets(config, shape)
    probabilities = shape.heads * sequence if sequence <= _SHORT else 0
    seen = shape.heads * (shape.head_dim + 2) if on_card else probabilities
    apart, shared = inputs(found)
    # Dropout saves its mask, too.
    read = 2 * apart if config.lora.dropout else shared
    ranks = sum(target.r for target in found.values() if not target.table and target.count == 1)
    numbers = 3 * shape.heads * shape.head_dim + seen + 3 * shape.mlp + (read + ranks) / shape.layers
    block = int(tokens * (8 * shape.hidden + width * (numbers + _routed(found, shape) / shape.layers)))
    mask = 0 if on_card else sequence  # a byte for each pair, which blocks share
    end = tokens * (shape.hidden * (4 + 3 * width) + mask)
    copies = 0 if width == 4 else width * sum(target.numbers for target in found.values())  # of factors, in the compute dtype
    if config.train.checkpointing is True:
        return block + shape.layers * tokens * width * shape.hidden + end + copies // shape.layers
    return shape.layers * block + end + copies


def _routed(found: dict[str, Target], shape: Shape) -> int:
    """Return numbers that the experts of a token save: each one's output, and where it is trained its input."""
    total = 0
    for path, stack in shape.stacks.items():
        total += 2 * stack.out if path.endswith("gate_up_proj") else stack.out
        if path in found:
            total += stack.inside + found[path].r
    return shape.chosen * total


def _work(config: TrainConfig, shape: Shape, *, on_card: bool) -> int:
    """Return bytes that the backward pass of one block needs: gradients of the MLP or of attention, and one dense weight."""
    tokens, sequence = _tokens(config), config.data.sequence
    # Long rows: three times a block's scores, and the sums for keys and values in float32.
    long = 3 * _BLOCK * shape.heads // 2 + 2 * shape.heads * shape.head_dim
    rows = 0 if on_card else shape.heads * sequence if sequence <= _SHORT else long
    experts = shape.chosen * max((stack.out for stack in shape.stacks.values()), default=0)
    vectors = max(3 * shape.mlp, 2 * experts, 2 * rows + 3 * shape.heads * shape.head_dim - 3 * shape.mlp)
    single = [stack.out * stack.inside for stack in shape.stacks.values()]
    dense = max((*map(math.prod, shape.linears.values()), *single), default=0) if _dequantizes(config) else 0
    return shape.width * (tokens * vectors + dense)
