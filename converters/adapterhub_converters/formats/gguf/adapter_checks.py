"""Checks for what llama.cpp would ignore, abort on or scale wrongly, made before writing.

Derived from `src/llama-adapter.cpp` (the loader's checks, in order) and from measurements of what it does not check.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, FactorPair, LowRank, LowRankEmbedding, StackedLowRank
from adapterhub_converters.architectures.architecture_lookup import EMBEDDINGS, Architecture, layer_of, order_fits
from adapterhub_converters.containers.json_file import is_integer

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

MAX_NAME = 63  # bytes: GGML_MAX_NAME less the terminating zero


def problems(adapter: Adapter, base: BaseSpec, architecture: Architecture) -> list[str]:
    """Return every reason, one line each, why llama.cpp with this base would not compute the adapter correctly."""
    if unsupported := list(_model_problems(base, architecture)):
        return unsupported
    return [
        *_adapter_problems(adapter),
        *(
            line
            for target, delta in sorted(adapter.deltas.items())
            for line in _delta_problems(target, delta, base, architecture)
        ),
    ]


def _model_problems(base: BaseSpec, architecture: Architecture) -> Iterator[str]:
    """Yield reasons why llama.cpp computes a different model.

    `src/models/falcon.cpp` has one graph for all Falcons: with RoPE, and with attention and MLP in parallel.
    """
    if base.text_type and base.text_type not in architecture.kinds:
        yield f"the text model of {base.source} is {base.text_type[:40]}, and not {architecture.gguf}"
    if architecture.gguf != "falcon" or base.kind != "hf":
        return
    is_old = not base.config.get("new_decoder_architecture")
    if base.config.get("alibi"):
        yield f"llama.cpp does not support Falcon with ALiBi (Falcon-RW): it would use RoPE ({base.source})"
    if is_old and base.config.get("multi_query") is False:
        yield f"llama.cpp does not support Falcon without multi-query attention (Falcon-RW) ({base.source})"
    if is_old and base.config.get("parallel_attn") is False:
        yield f"llama.cpp does not support Falcon with sequential attention and MLP (Falcon-RW) ({base.source})"


def _adapter_problems(adapter: Adapter) -> Iterator[str]:
    if not adapter.deltas:
        yield "there is no low-rank delta to write"
    if adapter.meta.init != "default":
        yield (
            f"its factors were initialized with {adapter.meta.init}, which changed the base: on the plain base the result "
            "would be wrong. Save it again with peft's path_initial_model_for_weight_conversion"
        )
    for name in sorted(adapter.replaced):
        yield f"{name}: a replaced parameter (modules_to_save, bias) cannot be expressed in a GGUF adapter"
    for target in sorted(adapter.rows):
        yield f"{target}: replaced rows (trainable_token_indices) cannot be expressed in a GGUF adapter"


def _delta_problems(target: str, delta: Delta, base: BaseSpec, architecture: Architecture) -> Iterator[str]:
    if not isinstance(delta, FactorPair):
        yield f"{target}: a delta of kind {type(delta).__name__} cannot be expressed in a GGUF adapter"
        return
    stem = architecture.stem(target)
    if reason := architecture.reason_ignored(target):
        yield f"{target}: {reason}"
        return
    if stem is None:
        yield f"{target}: llama.cpp's {architecture.gguf!r} has no tensor for this module"
        return
    yield from (f"{target}: {line}" for line in _factor_problems(stem, delta))
    yield from (f"{target}: {line}" for line in base_mismatches(target, delta, base, architecture))
    if isinstance(delta, StackedLowRank) != architecture.is_stacked(target):
        yield f"{target}: a delta of all experts on a module of one expert, or vice versa"
    if architecture.is_norm(target):
        yield f"{target}: llama.cpp ignores LoRA on norms"
    order = architecture.order(target, base.config, base.source)
    count = delta.shape[1 if architecture.orders_columns(target) else 0]
    if not order_fits(order, count):
        yield f"{target}: {count} rows do not match {order} heads"


def _factor_problems(stem: str, delta: FactorPair) -> Iterator[str]:
    if not isinstance(delta, StackedLowRank) and delta.magnitude is not None:
        yield "DoRA cannot be expressed in a GGUF adapter"
    if isinstance(delta, LowRank) and delta.bias is not None:
        yield "lora_bias cannot be expressed in a GGUF adapter"
    if isinstance(delta, LowRankEmbedding) != (stem == "token_embd"):
        yield "an embedding delta on a module that is not an embedding table, or vice versa"
    if len(f"{stem}.weight.lora_b") > MAX_NAME:
        yield f"its name in GGUF is longer than the {MAX_NAME} bytes that llama.cpp allows"
    for array in (delta.lora_A, delta.lora_B):
        if array.dtype not in (dtypes.F32, dtypes.F16, dtypes.BF16):
            yield f"llama.cpp does not support {array.dtype}"


def expert_count(base: BaseSpec, architecture: Architecture) -> int:
    """Return the number of experts in a layer of the base; 0 if it has none or the number is unknown."""
    counts = [base.config.get(key) for key in _EXPERT_COUNT_KEYS] if architecture.experts else []
    return next((count for count in counts if is_integer(count)), 0)


# The number of experts in config.json; transformers 5 renamed some of transformers 4's keys.
_EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def base_rows(base: BaseSpec) -> dict[str, int]:
    """Map each tensor of a GGUF base to its number of rows, by its stem.

    Such a file may fuse or split modules that other files of its architecture do not.
    """
    return {
        name.removesuffix(".weight"): tensor.shape[-2]
        for name, tensor in base.stored.items()
        if name.endswith(".weight") and len(tensor.shape) > 1
    }


def _is_transposed(module: str, architecture: Architecture) -> bool:
    return architecture.transposed and layer_of(module) is not None


def base_mismatches(target: str, delta: FactorPair, base: BaseSpec, architecture: Architecture) -> Iterator[str]:
    """Yield reasons why a delta does not fit a base; none if the base has no weights to compare with."""
    if base.tied and target in (*EMBEDDINGS, "lm_head"):
        yield "llama.cpp aborts on LoRA on the embedding table or output layer of a base that ties them"
    if isinstance(delta, StackedLowRank) and delta.shape[0] != (experts := expert_count(base, architecture)):
        yield f"the delta has {delta.shape[0]} experts, the base {experts or 'an unknown number'} ({base.source})"
    layers, layer = base.config.get("num_hidden_layers"), layer_of(target)
    # A base that is known only by its config has no tensors to compare with.
    if isinstance(layers, int) and layer is not None and layer >= layers:
        yield f"the base has only {layers} layers ({base.source})"
    elif base.tensors and not {f"{target}.weight", target} & set(base.packed):
        yield from _tensor_mismatches(target, delta, base, architecture)


def _tensor_mismatches(target: str, delta: FactorPair, base: BaseSpec, architecture: Architecture) -> Iterator[str]:
    shape = _base_shape(target, delta, base, architecture)
    if shape is None:
        fused = sorted(name for name in base.tensors if name.startswith(f"blk.{layer_of(target)}."))
        yield f"the base has no such module ({base.source})" + (
            f", but {fused[0]}, which may fuse it with others" if fused else ""
        )
    elif shape[-2:] != delta.shape[-2:]:
        yield f"the delta is {delta.shape[-2:]}, the base's weight {shape[-2:]} ({base.source})"


def _base_shape(target: str, delta: FactorPair, base: BaseSpec, architecture: Architecture) -> tuple[int, ...] | None:
    """Return the logical shape of a module's weight in the base; None if it has none."""
    if tensor := base.text_tensor(f"{target}.weight"):
        across = _is_transposed(target, architecture) or (isinstance(delta, LowRank) and delta.transposed_base)
        return tensor.shape[::-1] if across else tensor.shape
    if tensor := base.text_tensor(target):  # a parameter of all experts
        swapped = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
        is_transposed = delta.transposed_base if isinstance(delta, StackedLowRank) else False
        if is_transposed is None:  # how the base stores it is unknown: either orientation may fit
            is_transposed = swapped == delta.shape
        return swapped if is_transposed else tensor.shape
    module, _, parameter = target.rpartition(".")  # a parameter whose experts transformers saves one by one
    parts = [base.text_tensor(f"{module}.0.{part}.weight") for part in _PARAMETER_PARTS.get(parameter, ())]
    shapes = [part.shape for part in parts if part is not None]
    return (sum(shape[0] for shape in shapes), shapes[0][1]) if parts and len(shapes) == len(parts) else None


_PARAMETER_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
