"""What llama.cpp would ignore, abort on or scale wrongly, found before it is written.

From `src/llama-adapter.cpp` (what the loader checks, in order) and from what was measured when it does not check.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import dtypes
from .adapter import Adapter, LowRank, LowRankEmbedding, Pair, plain_pairs
from .base import BaseSpec
from .names import Architecture, layer_of

MAX_NAME = 63  # bytes: GGML_MAX_NAME less the terminating zero


def problems(adapter: Adapter, base: BaseSpec, architecture: Architecture) -> list[str]:
    """Every reason, one line each, why llama.cpp on this base would not compute what the adapter says."""
    return [
        *_whole(adapter),
        *(line for target, delta in sorted(plain_pairs(adapter).items()) for line in _one(target, delta, base, architecture)),
    ]


def _whole(adapter: Adapter) -> Iterator[str]:
    if not adapter.deltas:
        yield "there is no low-rank delta to write"
    if adapter.meta.init != "default":
        yield (
            f"its factors began as {adapter.meta.init}, which changed the base when training began: on the plain base "
            "the result would be wrong. Save it again with peft's path_initial_model_for_weight_conversion"
        )
    for name in sorted(adapter.replaced):
        yield f"{name}: a replaced parameter (modules_to_save, bias) cannot be said in a GGUF adapter"
    for target in sorted(adapter.rows):
        yield f"{target}: replaced rows (trainable_token_indices) cannot be said in a GGUF adapter"


def _one(target: str, delta: Pair, base: BaseSpec, architecture: Architecture) -> Iterator[str]:
    stem = architecture.stem(target)
    if stem is None:
        yield f"{target}: not a module that llama.cpp's {architecture.gguf!r} has as a tensor of its own"
        return
    yield from (f"{target}: {line}" for line in _delta(stem, delta))
    yield from (f"{target}: {line}" for line in against_base(target, delta, base))
    if architecture.is_norm(target):
        yield f"{target}: llama.cpp ignores a LoRA on a normalisation"
    heads = architecture.heads(target, base.config, base.where)
    if heads and delta.shape[0] % (2 * heads):
        yield f"{target}: {delta.shape[0]} rows are not those of {heads} heads"


def _delta(stem: str, delta: Pair) -> Iterator[str]:
    if isinstance(delta, LowRank) and delta.magnitude is not None:
        yield "DoRA cannot be said in a GGUF adapter"
    if isinstance(delta, LowRank) and delta.bias is not None:
        yield "lora_bias cannot be said in a GGUF adapter"
    if isinstance(delta, LowRankEmbedding) != (stem == "token_embd"):
        yield "an embedding delta on a module that is no embedding table, or the other way round"
    if len(f"{stem}.weight.lora_b") > MAX_NAME:
        yield f"its name in GGUF is longer than the {MAX_NAME} bytes that llama.cpp takes"
    for array in (delta.lora_A, delta.lora_B):
        if array.dtype not in (dtypes.F32, dtypes.F16, dtypes.BF16):
            yield f"llama.cpp does not multiply {array.dtype}"


def against_base(target: str, delta: Pair, base: BaseSpec) -> Iterator[str]:
    """Why a delta does not fit a base; nothing when the base has no weights to compare with."""
    if base.tied and target in ("model.embed_tokens", "lm_head"):
        yield "llama.cpp aborts on a LoRA on the embedding table or output layer of a base that ties them"
    layers, layer = base.config.get("num_hidden_layers"), layer_of(target)
    if isinstance(layers, int) and layer is not None and layer >= layers:
        yield f"the base has only {layers} layers ({base.where})"
    elif base.tensors and f"{target}.weight" not in base.tensors:
        fused = sorted(name for name in base.tensors if name.startswith(f"blk.{layer}."))
        yield f"the base has no such module ({base.where})" + (
            f", but {fused[0]}, which may fuse it with others" if fused else ""
        )
    elif base.tensors:
        shape = base.tensors[f"{target}.weight"].shape
        shape = shape[::-1] if isinstance(delta, LowRank) and delta.transposed_base else shape
        if shape != delta.shape:
            yield f"the delta is {delta.shape}, the base's weight {shape} ({base.where})"
