"""The memory that a training run will need, computed from the base's headers and the config alone, without torch.

It counts, tensor by tensor, what `lora`, `row_attention`, `loss` and `training_loop` save for the backward pass of a block like
Llama's; `tests/training/test_memory.py` compares it with the peak of real processes.
"""

from __future__ import annotations

import dataclasses
import math

from adapterhub.training.events import MemoryPlan
from adapterhub.training.train_config import TrainConfig
from adapterhub_converters.bases import BaseSpec

from .model_sizes import Shape, Target, input_sizes, shape_of, targets, trained_parameters

_NF4_BYTES = 4.127 / 8  # per weight: 4 bits, 8/64 for its block's magnitude, 32/(64 * 256) for the scale of magnitudes
_RUNTIME_BYTES = 525_000_000  # of Python, torch, transformers and bitsandbytes, measured: 427 at rest, 58 at work, 40 of MKL
_GENERATION_BYTES = 60_000_000  # bytes of generated answers and the fragmentation they cause: 45 to 85 measured
_TRACKER_BYTES = 45_000_000  # bytes of TensorBoard and its imports, measured; others are as large or larger
_FRAGMENTATION = 1.15  # of activations: freed memory leaves holes (glibc; 1.1 to 1.2 measured)
_COPIES_OF_16_BITS = 1.05  # of activations in 16 bits: oneDNN copies some for AMX (1 to 1.15 measured)
_MIN_LOGITS, _MAX_LOGITS = 128, 1024  # rows of logits at once; with fewer, a card waits for the output layer's weight
_CPU_LOGITS = 256  # rows of logits at once on a CPU: with AMX, twice 128 take 1.4 times as long
_LOGITS_SHARE = 64  # of the memory of a card: the share that they may take
_CUDA_BYTES = 600_000_000  # bytes of a CUDA context and the work space of its libraries
_MAX_SHORT_ROW = 512  # tokens: in rows up to this length attention saves its probabilities (`row_attention.MAX_LENGTH`)
_BLOCK = 128  # queries at once in longer rows: `row_attention.BLOCK`
_MAX_NEW_BYTES = 32 << 20  # `nf4_matrix.MAX_NEW_BYTES`
_BYTES_PER_TEXT_BYTE = 2  # a token takes 4 bytes, and is some 3 bytes of text
_FULL_FINE_TUNING = 16  # bytes per parameter in float32: the weight, its gradient, two moments of Adam


def plan(config: TrainConfig, spec: BaseSpec, *, card: int | None = None) -> MemoryPlan:
    """Return the memory of a training run at its peak.

    `checkpointing = "auto"` counts as false; `budget.resolve_auto` decides it, and whether the base is dequantized.

    Args:
        card: The memory in bytes of the CUDA device to plan for, which contains neither the data nor the interpreter; None for
            a CPU. Only plans for a CPU have been compared with measurements.
    """
    shape = shape_of(config, spec)
    bytes_a_weight = _NF4_BYTES if _dequantizes(config) else shape.width
    adapter_parameters = trained_parameters(config, shape)
    on_card = card is not None
    saved, backward = _saved_bytes(config, shape, on_card=on_card), _backward_bytes(config, shape, on_card=on_card)
    dense = _dense_bytes(config, shape)
    # A large dense weight stays in memory for the next one (`nf4_matrix.dense_for_one_product`), a small one is freed.
    reused, backward = (dense, backward) if dense > _MAX_NEW_BYTES and not on_card else (0, backward + dense)
    logit_rows = logits_at_once(shape.vocabulary, shape.width, card)
    logits = min(logit_rows, _tokens(config)) * shape.vocabulary * _logit_bytes(shape.width, on_card=on_card)
    # Logits are freed before the backward pass works, and loading is over by then: these never exist at the same time.
    overhead = _FRAGMENTATION * (_COPIES_OF_16_BITS if shape.width == 2 and not on_card else 1)
    working = int(overhead * (saved + max(0, backward - logits))) + reused
    activations = max(working, _loading_bytes(config, shape) - logits)
    return MemoryPlan(
        # Only linear layers are quantized: embeddings and norms stay in the compute dtype.
        base=int(shape.linear * bytes_a_weight + (shape.parameters - shape.linear) * shape.width) + _extra_bytes(config, shape),
        # A second copy of the parameters: the initial factors that are subtracted again, or the best parameters so far.
        adapter=4 * adapter_parameters * (1 + (config.lora.init != "default") + config.train.keep_best),
        gradients=4 * adapter_parameters,
        # Two moments per parameter, of four bytes or of one byte each.
        optimizer=(8 if config.train.optimizer == "adamw" else 2) * adapter_parameters,
        activations=activations,
        logits=logits,
        data=0 if on_card else _data_bytes(config),
        runtime=_CUDA_BYTES if on_card else _interpreter_bytes(config),
    )


def _interpreter_bytes(config: TrainConfig) -> int:
    return _RUNTIME_BYTES + (_GENERATION_BYTES if config.train.samples else 0) + (_TRACKER_BYTES if config.train.log_to else 0)


def logits_at_once(vocabulary: int, width: int, card: int | None) -> int:
    """Return the number of tokens whose logits exist at once, a multiple of 128.

    Args:
        width: Bytes per number of the output layer.
        card: The memory in bytes of a CUDA device; None for a CPU, where more logits at once are little faster.
    """
    if card is None:
        return _CPU_LOGITS
    affordable = card // _LOGITS_SHARE // max(1, vocabulary * _logit_bytes(width, on_card=True)) // _MIN_LOGITS * _MIN_LOGITS
    return max(_MIN_LOGITS, min(_MAX_LOGITS, affordable))


def _logit_bytes(width: int, *, on_card: bool) -> int:
    """Return the bytes of a logit, a product in the compute dtype; on a card, one in 16 bits is copied to float32."""
    return 4 + width if on_card and width < 4 else width


def base_sizes(config: TrainConfig, spec: BaseSpec) -> tuple[int, int]:
    """Return the bytes of the base in 16 bits, and with its linear layers in 4 bits."""
    in_16_bits = dataclasses.replace(config.base, quantize="none", dtype="bfloat16")
    in_4_bits = dataclasses.replace(in_16_bits, quantize="nf4")
    size_in_16_bits, size_in_4_bits = (
        plan(dataclasses.replace(config, base=base, dequantized=False), spec).base for base in (in_16_bits, in_4_bits)
    )
    return size_in_16_bits, size_in_4_bits


def full_fine_tuning(config: TrainConfig, spec: BaseSpec, *, card: int | None = None) -> int:
    """Return the minimum memory, in bytes, for training every parameter in float32 with Adam on the same rows."""
    rows = plan(config, spec, card=card)
    return _FULL_FINE_TUNING * shape_of(config, spec).parameters + rows.activations + rows.logits + rows.data + rows.runtime


def flops(config: TrainConfig, spec: BaseSpec, *, tokens: int, label_tokens: int, trained: int, context: float) -> int:
    """Return the floating-point operations for `tokens` tokens, of which `label_tokens` have a loss.

    Only the model's arithmetic counts, a multiplication and an addition each: the forward pass and the gradient of the inputs
    for every frozen weight that a token passes, and one pass more for the `trained` parameters (arXiv 2305.14314 trains no base
    weight). Attention is counted as in arXiv 2204.02311, appendix B, over `context` tokens, the mean length of a token's
    document. The reference of DPO is one more forward pass through the frozen weights. Recomputation by checkpointing, padding
    and masked scores do not count.
    """
    shape = shape_of(config, spec)
    passes = 3 if config.preference.method == "dpo" else 2  # forward, toward the inputs, and the reference
    attention = 4 * (passes + 1) * shape.layers * shape.heads * shape.head_dim * context
    head = 2 * passes * shape.vocabulary * shape.hidden
    return round(tokens * (2 * passes * shape.used + 6 * trained + attention)) + label_tokens * head


def parameters(config: TrainConfig, spec: BaseSpec) -> tuple[int, int]:
    """Return the number of parameters of the base, and of the adapter."""
    shape = shape_of(config, spec)
    return shape.parameters, trained_parameters(config, shape)


def _dequantizes(config: TrainConfig) -> bool:
    """Return whether each step dequantizes the base."""
    return config.base.quantize == "nf4" and not config.dequantized


def _tokens(config: TrainConfig) -> int:
    """Return the number of tokens in memory at once."""
    return (config.train.micro_rows or config.train.rows) * config.data.sequence


def _data_bytes(config: TrainConfig) -> int:
    files = [config.resolve(name) for name in (*config.data.paths, *config.data.heldout)]
    return _BYTES_PER_TEXT_BYTE * sum(path.stat().st_size for path in files if path.is_file())


def _extra_bytes(config: TrainConfig, shape: Shape) -> int:
    """Return the bytes that are needed besides the frozen weights.

    For DoRA |W|² of every row; for trained token rows their positions and initial values.
    """
    rows = config.lora.trainable_token_indices
    squares = 4 * sum(target.out for target in targets(config, shape).values()) if config.lora.dora else 0
    return squares + (8 * shape.vocabulary + 4 * len(rows) * shape.hidden if rows else 0)


def _loading_bytes(config: TrainConfig, shape: Shape) -> int:
    """Return the bytes for decomposing the largest adapted weight, if the initial factors are parts of it; else 0.

    All in float32: the weight, a copy and the remainder, both sides of singular vectors, and LAPACK's `gesdd` with about five
    squares of the smaller side.
    """
    if config.lora.init == "default":
        return 0
    sizes = [(target.out, target.inside) for target in targets(config, shape).values() if not target.table]
    return 4 * max(
        (
            3 * out * in_features + min(out, in_features) * (out + in_features + 5 * min(out, in_features))
            for out, in_features in sizes
        ),
        default=0,
    )


def _saved_bytes(config: TrainConfig, shape: Shape, *, on_card: bool) -> int:
    """Return the bytes that the forward pass saves for the backward pass.

    For each token and block: both norms save their input (`layers.rms_norm`); attention saves queries, keys, values, and in
    short rows its probabilities; the MLP saves three vectors; every adapted layer saves x A^T and its input, which layers with
    the same input share unless each has its own dropout. Checkpointing saves one block's tensors, and every block's input. The
    last norm, and the states that have a loss with their gradient, count once. On a card attention saves its output instead of
    probabilities, and there is no mask (`layers.varlen`).
    """
    tokens, width, sequence = _tokens(config), shape.width, config.data.sequence
    target_modules = targets(config, shape)
    probabilities = shape.heads * sequence if sequence <= _MAX_SHORT_ROW else 0
    attention_numbers = shape.heads * (shape.head_dim + 2) if on_card else probabilities
    separate_inputs, shared_inputs = input_sizes(target_modules)
    # Dropout saves its mask, too.
    input_numbers = 2 * separate_inputs if config.lora.dropout else shared_inputs
    ranks = sum(target.r for target in target_modules.values() if not target.table and target.count == 1)
    of_attention = 3 * shape.heads * shape.head_dim + attention_numbers
    numbers_per_token = 2 * shape.hidden + of_attention + 3 * shape.mlp + (input_numbers + ranks) / shape.layers
    block = int(tokens * width * (numbers_per_token + _expert_numbers(target_modules, shape) / shape.layers))
    mask = 0 if on_card else sequence  # a byte for each pair, which blocks share
    last_states = tokens * (4 * shape.hidden * width + mask)
    # Of factors, in the compute dtype.
    copies = 0 if width == 4 else width * sum(target.numbers for target in target_modules.values())
    if config.train.checkpointing is True:
        return block + shape.layers * tokens * width * shape.hidden + last_states + copies // shape.layers
    return shape.layers * block + last_states + copies


def _expert_numbers(target_modules: dict[str, Target], shape: Shape) -> int:
    """Return the numbers that a token's experts save: the output of each, and the input of those that are trained."""
    total = 0
    for path, stack in shape.stacks.items():
        total += 2 * stack.out if path.endswith("gate_up_proj") else stack.out
        if path in target_modules:
            total += stack.inside + target_modules[path].r
    return shape.chosen * total


def _backward_bytes(config: TrainConfig, shape: Shape, *, on_card: bool) -> int:
    """Return the bytes that the backward pass of a block needs besides a weight: gradients of the MLP or of attention."""
    tokens, sequence = _tokens(config), config.data.sequence
    # Long rows: three times a block's scores, and the sums for keys and values in float32.
    long_row_numbers = 3 * _BLOCK * shape.heads // 2 + 2 * shape.heads * shape.head_dim
    attention_numbers = 0 if on_card else shape.heads * sequence if sequence <= _MAX_SHORT_ROW else long_row_numbers
    experts = shape.chosen * max((stack.out for stack in shape.stacks.values()), default=0)
    vectors = max(3 * shape.mlp, 2 * experts, 2 * attention_numbers + 3 * shape.heads * shape.head_dim - 3 * shape.mlp)
    return shape.width * tokens * vectors


def _dense_bytes(config: TrainConfig, shape: Shape) -> int:
    """Return the bytes of the largest matrix that a step dequantizes."""
    expert_sizes = [stack.out * stack.inside for stack in shape.stacks.values()]
    sizes = (*map(math.prod, shape.linears.values()), *expert_sizes)
    return shape.width * max(sizes, default=0) if _dequantizes(config) else 0
