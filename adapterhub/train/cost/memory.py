"""How much memory a training will take, before it takes any: from the base's headers and the config alone.

Counted from what `lora`, `attention`, `loss` and `loop` keep for the backward pass, tensor by tensor, for a block like
Llama's; `tests/train/test_memory.py` compares it with what processes really took. No torch is imported.
"""

from __future__ import annotations

import math

from adapterhub.train.config import TrainConfig
from adapterhub.train.events import MemoryPlan
from adapterhub_converters.bases import BaseSpec, read_base

from .shapes import Shape, Target, inputs, shape_of, targets, trained

_NF4_BYTES = 4.127 / 8  # a weight: 4 bits, 8/64 for its block's magnitude, 32/(64 * 256) for that one's
_RUNTIME = 485_000_000  # bytes of Python, torch, transformers and bitsandbytes, measured: 427 at rest, 58 more at work
_ANSWERS = 35_000_000  # bytes of transformers' generation, and of the holes that it leaves, measured
_LOGS = 45_000_000  # bytes of TensorBoard and what it imports, measured; others are as large or larger
_HOLES = 1.15  # what activations take over what they are: memory that is let go leaves holes (glibc; 1.1 to 1.2 measured)
_LOGIT_CHUNK = 128  # rows of logits at once: `loss.CHUNK`
_SHORT = 512  # tokens in a row up to which attention keeps its probabilities: `attention.LONGEST`
_BLOCK = 128  # queries at once where rows are longer: `blockwise.BLOCK`
_DATA = 10  # bytes held a byte of text: ids, labels and positions of a token are 24, a token is some 3 bytes of text
_FULL = 16  # bytes a parameter of full fine-tuning in float32: the weight, its gradient, two moments of Adam


def plan(config: TrainConfig, spec: BaseSpec | None = None) -> MemoryPlan:
    """What training with `config` will hold at its peak; reads only the headers of the base, not even these if given.

    `checkpointing = "auto"` counts as false: `budget.settled` chooses.
    """
    shape = _shape(config, spec)
    bytes_a_weight = _NF4_BYTES if config.base.quantize == "nf4" else shape.width
    numbers = trained(config, shape)
    kept, work = _kept(config, shape), _work(config, shape)
    logits = min(_LOGIT_CHUNK, _tokens(config)) * shape.vocabulary * (4 + shape.width)
    # The loss is done before the backward pass works: its logits and that never are at once. Nor is what loading works with.
    activations = max(int(_HOLES * (kept + max(0, work - logits))), _beginning(config, shape) - logits)
    return MemoryPlan(
        base=int(shape.linear * bytes_a_weight + (shape.parameters - shape.linear) * shape.width) + _beside(config, shape),
        adapter=4 * numbers * (1 + (config.lora.init != "default") + config.train.keep_best),
        gradients=4 * numbers,
        optimizer=(8 if config.train.optimizer == "adamw" else 2) * numbers,
        activations=activations,
        logits=logits,
        data=_data(config),
        runtime=_RUNTIME + (_ANSWERS if config.train.samples else 0) + (_LOGS if config.train.log_to else 0),
    )


def full_fine_tuning(config: TrainConfig, spec: BaseSpec | None = None) -> int:
    """The least that training every parameter in float32 with Adam would hold with the same rows, in bytes."""
    same = plan(config, spec)
    return _FULL * _shape(config, spec).parameters + same.activations + same.logits + same.data + same.runtime


def flops(config: TrainConfig, *, tokens: int, learned: int, trained: int) -> int:
    """Floating-point operations that `tokens` tokens, of which `learned` have a loss, take where `trained` numbers learn.

    By the model's arithmetic alone, a multiplication and an addition each: forward and toward the inputs for every frozen
    weight that a token meets, and once more for the factors (arXiv 2305.14314 trains no base weight); attention over whole rows
    as in arXiv 2204.02311, appendix B. What checkpointing computes again isn't counted.
    """
    shape = _shape(config, None)
    attention = 12 * shape.layers * shape.heads * shape.head_dim * config.data.sequence
    head = 4 * shape.vocabulary * shape.hidden
    return tokens * (4 * shape.used + 6 * trained + attention) + learned * head


def parameters(config: TrainConfig, spec: BaseSpec | None = None) -> tuple[int, int]:
    """How many numbers the base has, and how many the adapter."""
    shape = _shape(config, spec)
    return shape.parameters, trained(config, shape)


def _shape(config: TrainConfig, spec: BaseSpec | None) -> Shape:
    return shape_of(config, spec or read_base(config.resolve(config.base.path)))


def _tokens(config: TrainConfig) -> int:
    """Tokens in memory at once."""
    return (config.train.micro_rows or config.train.rows) * config.data.sequence


def _data(config: TrainConfig) -> int:
    files = [config.resolve(name) for name in (*config.data.train, *config.data.heldout)]
    return _DATA * sum(path.stat().st_size for path in files if path.is_file())


def _beside(config: TrainConfig, shape: Shape) -> int:
    """Bytes beside the frozen weights: |W|² of every row for DoRA; where token rows are, and what they were."""
    rows = config.lora.trainable_token_indices
    squares = 4 * sum(target.out for target in targets(config, shape).values()) if config.lora.dora else 0
    return squares + (8 * shape.vocabulary + 4 * len(rows) * shape.hidden if rows else 0)


def _beginning(config: TrainConfig, shape: Shape) -> int:
    """Bytes that decomposing the largest adapted weight works with, where the factors begin as a part of it.

    In float32: the weight, a copy and what is left of it, both sides of singular vectors, and LAPACK's `gesdd` with some five
    squares of the smaller side.
    """
    if config.lora.init == "default":
        return 0
    sizes = [(target.out, target.inside) for target in targets(config, shape).values() if not target.table]
    return 4 * max((3 * out * wide + min(out, wide) * (out + wide + 5 * min(out, wide)) for out, wide in sizes), default=0)


def _kept(config: TrainConfig, shape: Shape) -> int:
    """Bytes that the forward pass leaves to the backward pass.

    A token and block: both norms keep their input in float32; attention keeps queries, keys, values, and where rows are short
    its probabilities; the MLP three vectors; every adapted layer x A^T and its input, which those that read the same
    share, unless each drops out for itself. With checkpointing one block's, and every block's input. The last norm, and the
    states that have a loss with their gradient, come once.
    """
    tokens, width, sequence = _tokens(config), shape.width, config.data.sequence
    found = targets(config, shape)
    probabilities = shape.heads * sequence if sequence <= _SHORT else 0
    apart, shared = inputs(found)
    # Dropout keeps what it multiplied with, too.
    read = 2 * apart if config.lora.dropout else shared
    ranks = sum(target.r for target in found.values() if not target.table and target.count == 1)
    numbers = 3 * shape.heads * shape.head_dim + probabilities + 3 * shape.mlp + (read + ranks) / shape.layers
    block = int(tokens * (8 * shape.hidden + width * (numbers + _routed(found, shape) / shape.layers)))
    end = tokens * (shape.hidden * (4 + 3 * width) + sequence)  # the mask, a byte a pair, is of all blocks
    copies = 0 if width == 4 else width * sum(target.numbers for target in found.values())  # in the dtype computed in
    if config.train.checkpointing is True:
        return block + shape.layers * tokens * width * shape.hidden + end + copies // shape.layers
    return shape.layers * block + end + copies


def _routed(found: dict[str, Target], shape: Shape) -> int:
    """Numbers a token that all experts it goes through keep: what each computes, and where it learns what it read."""
    total = 0
    for path, stack in shape.stacks.items():
        total += 2 * stack.out if path.endswith("gate_up_proj") else stack.out
        if path in found:
            total += stack.inside + found[path].r
    return shape.chosen * total


def _work(config: TrainConfig, shape: Shape) -> int:
    """Bytes that the backward pass of one block works with: gradients of the MLP or of attention, and a weight in full."""
    tokens, sequence = _tokens(config), config.data.sequence
    # Long rows: three times a block's scores, and the sums for keys and values in float32.
    long = 3 * _BLOCK * shape.heads // 2 + 2 * shape.heads * shape.head_dim
    rows = shape.heads * sequence if sequence <= _SHORT else long
    experts = shape.chosen * max((stack.out for stack in shape.stacks.values()), default=0)
    vectors = max(3 * shape.mlp, 2 * experts, 2 * rows + 3 * shape.heads * shape.head_dim - 3 * shape.mlp)
    single = [stack.out * stack.inside for stack in shape.stacks.values()]
    dense = max((*map(math.prod, shape.linears.values()), *single), default=0) if config.base.quantize == "nf4" else 0
    return shape.width * (tokens * vectors + dense)
