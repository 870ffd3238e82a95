"""What llama.cpp would ignore, abort on or scale wrongly, found before it is written.

From `src/llama-adapter.cpp` (what the loader checks, in order) and from what was measured when it does not check.
"""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, FactorPair, LowRank, LowRankEmbedding, StackedLowRank
from adapterhub_converters.architectures.names import EMBEDDINGS, Architecture, divides, layer_of
from adapterhub_converters.bases import BaseSpec

MAX_NAME = 63  # bytes: GGML_MAX_NAME less the terminating zero


def problems(adapter: Adapter, base: BaseSpec, architecture: Architecture) -> list[str]:
    """Every reason, one line each, why llama.cpp on this base would not compute what the adapter says."""
    if unrun := list(_unrun(base, architecture)):
        return unrun
    return [
        *_whole(adapter),
        *(line for target, delta in sorted(adapter.deltas.items()) for line in _one(target, delta, base, architecture)),
    ]


def _unrun(base: BaseSpec, architecture: Architecture) -> Iterator[str]:
    """Why llama.cpp computes another model than this one (src/models/falcon.cpp: one graph for all, with RoPE, in parallel)."""
    if architecture.gguf != "falcon" or base.kind != "hf":
        return
    old = not base.config.get("new_decoder_architecture")
    if base.config.get("alibi"):
        yield f"llama.cpp runs no Falcon with ALiBi (Falcon-RW): it would rotate instead ({base.where})"
    if old and base.config.get("multi_query") is False:
        yield f"llama.cpp runs no Falcon without multi-query attention (Falcon-RW) ({base.where})"
    if old and base.config.get("parallel_attn") is False:
        yield f"llama.cpp runs no Falcon whose attention and MLP follow one another (Falcon-RW) ({base.where})"


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


def _one(target: str, delta: Delta, base: BaseSpec, architecture: Architecture) -> Iterator[str]:
    if not isinstance(delta, FactorPair):
        yield f"{target}: a delta of the kind {type(delta).__name__} cannot be said in a GGUF adapter"
        return
    stem = architecture.stem(target)
    if why := architecture.why_unseen(target):
        yield f"{target}: {why}"
        return
    if stem is None:
        yield f"{target}: not a module that llama.cpp's {architecture.gguf!r} has as a tensor of its own"
        return
    yield from (f"{target}: {line}" for line in _delta(stem, delta))
    yield from (f"{target}: {line}" for line in against_base(target, delta, base, architecture))
    if isinstance(delta, StackedLowRank) != architecture.is_stacked(target):
        yield f"{target}: a delta of all experts together on a module of one, or the other way round"
    if architecture.is_norm(target):
        yield f"{target}: llama.cpp ignores a LoRA on a normalization"
    order = architecture.order(target, base.config, base.where)
    if not divides(order, delta.shape[0]):
        yield f"{target}: {delta.shape[0]} rows are not those of {order} heads"


def _delta(stem: str, delta: FactorPair) -> Iterator[str]:
    if not isinstance(delta, StackedLowRank) and delta.magnitude is not None:
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


def experts_of(base: BaseSpec, architecture: Architecture) -> int:
    """How many experts a layer of the base has; 0 when there are none or it isn't known."""
    counts = [base.config.get(key) for key in _EXPERTS] if architecture.experts else []
    return next((count for count in counts if isinstance(count, int) and not isinstance(count, bool)), 0)


# What config.json calls the number of experts; transformers 5 has another name for some than transformers 4.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def rows_of(base: BaseSpec) -> dict[str, int]:
    """Rows of each tensor that a GGUF base has, by its stem: such a base may fuse or split what its kind mostly doesn't."""
    return {
        name.removesuffix(".weight"): tensor.shape[-2]
        for name, tensor in base.stored.items()
        if name.endswith(".weight") and len(tensor.shape) > 1
    }


def _is_transposed(module: str, architecture: Architecture) -> bool:
    return architecture.transposed and layer_of(module) is not None


def against_base(target: str, delta: FactorPair, base: BaseSpec, architecture: Architecture) -> Iterator[str]:
    """Why a delta does not fit a base; nothing when the base has no weights to compare with."""
    if base.tied and target in (*EMBEDDINGS, "lm_head"):
        yield "llama.cpp aborts on a LoRA on the embedding table or output layer of a base that ties them"
    if isinstance(delta, StackedLowRank) and delta.shape[0] != (experts := experts_of(base, architecture)):
        yield f"the delta has {delta.shape[0]} experts, the base {experts or 'an unknown number'} ({base.where})"
    layers, layer = base.config.get("num_hidden_layers"), layer_of(target)
    if isinstance(layers, int) and layer is not None and layer >= layers:
        yield f"the base has only {layers} layers ({base.where})"
    elif base.tensors and not {f"{target}.weight", target} & set(base.packed):
        yield from _against_tensors(target, delta, base, architecture)


def _against_tensors(target: str, delta: FactorPair, base: BaseSpec, architecture: Architecture) -> Iterator[str]:
    shape = _shape_in(target, delta, base, architecture)
    if shape is None:
        fused = sorted(name for name in base.tensors if name.startswith(f"blk.{layer_of(target)}."))
        yield f"the base has no such module ({base.where})" + (
            f", but {fused[0]}, which may fuse it with others" if fused else ""
        )
    elif shape[-2:] != delta.shape[-2:]:
        yield f"the delta is {delta.shape[-2:]}, the base's weight {shape[-2:]} ({base.where})"


def _shape_in(target: str, delta: FactorPair, base: BaseSpec, architecture: Architecture) -> tuple[int, ...] | None:
    """The logical shape of a module's weight; None without one."""
    if found := base.tensor(f"{target}.weight"):
        across = _is_transposed(target, architecture) or (isinstance(delta, LowRank) and delta.transposed_base)
        return found.shape[::-1] if across else found.shape
    if found := base.tensor(target):  # a parameter of all experts
        swapped = (*found.shape[:-2], found.shape[-1], found.shape[-2])
        turned = delta.transposed_base if isinstance(delta, StackedLowRank) else False
        if turned is None:  # nothing says how the base stores it: either way is one that would fit
            turned = swapped == delta.shape
        return swapped if turned else found.shape
    return None
