"""Names of tensors in a PEFT file: parsed when reading, and chosen as PEFT chooses them when writing.

Trainers leave their wrappers in the names: a doubled `base_model.model.`, torch.compile's `_orig_mod.`,
DistributedDataParallel's `module.`, the adapter's own name. PEFT silently skips such a tensor; here the wrappers are removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from adapterhub_converters.adapter import AdaLora, Adapter, Delta, Hadamard, Kronecker, LowRankEmbedding, StackedLowRank, Vera
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.lazy_imports import np

from . import target_parameters

PREFIX = "base_model.model."
USUAL_NAME = "default"  # that peft gives an adapter if no other is asked for
# Components that wrappers insert anywhere (torch.compile, FSDP, activation checkpointing).
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARTS = {
    "lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save",
    "trainable_tokens_delta", "vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d",
}  # fmt: skip

# Suffix of a key to its part of a delta (peft, `utils/save_and_load.py`).
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_B.bias": "bias",
}
# The beginnings of a delta's parts, behind the name of the module.
_MARKS = (".lora_", ".token_adapter.", ".hada_", ".lokr_", ".vera_", ".modules_to_save")
# Names without a suffix, of the other kinds: AdaLoRA, LoHa, LoKr, VeRA.
_BARE = {
    "lora_A", "lora_B", "lora_E", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1",
    "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "vera_lambda_b", "vera_lambda_d",
}  # fmt: skip
# VeRA's projections, which all modules share.
SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}
_ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"

TensorId = tuple[str, str, str]
"""A tensor of an adapter: its kind, name and part, as `classify` returns them."""

# The names under which peft's wrappers keep what they wrap, a copy of the base's weight.
_COPIES = (".base_layer", ".original_module")


def identify(key: str) -> tuple[str, str, str, str]:
    """Return the native name of a tensor, and its kind, name and part.

    Each module and each ending is analyzed only once, as a file repeats them for thousands of tensors.
    """
    for mark in _MARKS:
        if (mark_start := key.find(mark)) > 0 and (native_module := _native_module(key[:mark_start])):
            module, name = native_module
            end, kind, part = _native_end(key[mark_start:])
            if kind and name is not None:
                return module + end, kind, name, part
            return module + end, *_classify(module + end, key)
    full = native_name(key)
    return full, *_classify(full, key)


@lru_cache(maxsize=1)  # the tensors of a module follow each other
def _native_module(module: str) -> tuple[str, str | None] | None:
    """Return the native name of a module, with and without PREFIX (None if it has none).

    Returns None if the name could depend on the rest of the key.
    """
    name = "" if _may_have_part(module) else _without_wrappers(f"{module}.x")[:-2]
    return (name, name[len(PREFIX) :] if name.startswith(PREFIX) else None) if name else None


@lru_cache(maxsize=1_000)
def _native_end(end: str) -> tuple[str, str, str]:
    """Return the end of a native name behind its module, and the kind and part that it determines; these may be empty."""
    full = native_name(f"{PREFIX}x{end}")
    kind, name, part = _classify(full, full)
    return full[len(PREFIX) + 1 :], kind if name == "x" and kind != "unknown" else "", part


def classify(key: str) -> TensorId:
    """Return the kind, name and part of a tensor.

    The kinds are `pair` (named by module), `rows` (by table), `replaced` and `copy` (by parameter), `shared`, and `unknown`.
    """
    return identify(key)[1:]


def _classify(full: str, key: str) -> TensorId:
    if full in SHARED:
        return "shared", SHARED[full], ""
    if not full.startswith(PREFIX):
        return "unknown", key, ""
    name = full.removeprefix(PREFIX)
    if name.endswith(_ROWS_SUFFIX):
        return "rows", name.removesuffix(_ROWS_SUFFIX), ""
    return _pair(name) or _whole_parameter(name) or ("unknown", name, "")


def _pair(name: str) -> TensorId | None:
    for suffix, part in _SUFFIXES.items():
        if name.endswith(suffix):
            return "pair", name.removesuffix(suffix), part
    module, dot, end = name.rpartition(".")
    return ("pair", module, end) if dot and end in _BARE else None


def _whole_parameter(name: str) -> TensorId | None:
    if "lora_" in name or not name.endswith((".weight", ".bias")):
        return None
    wrapper, _, kind = name.rpartition(".")
    if wrapper.endswith(_COPIES):
        module = wrapper.rpartition(".")[0].removesuffix(".token_adapter")
        # Biases are trained in place (bias="all"); the weight under a delta is frozen.
        return "copy" if kind == "weight" else "replaced", f"{module}.{kind}", ""
    return ("replaced", name, "") if ".base_layer." not in name else None


def native_name(key: str) -> str:
    """Return the name by which peft saves this tensor, without trainers' wrappers."""
    name = _without_wrappers(key)
    if _may_have_part(name) and (index := _adapter_name_index(parts := name.split("."))):
        # `modules_to_save.NAME` disappears as a whole; elsewhere only the name does.
        name = ".".join([*parts[: index - (parts[index - 1] == "modules_to_save")], *parts[index + 1 :]])
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def _without_wrappers(key: str) -> str:
    """Return a key without the components of trainers' wrappers."""
    if "._" in key or key.startswith(("_", "module.", PREFIX * 2)):
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        start = 0
        while parts[start : start + 1] == ["module"]:
            start += 1
        while parts[start : start + 4] == ["base_model", "model"] * 2:
            start += 2
        return ".".join(parts[start:])
    return key


def _may_have_part(name: str) -> bool:
    """Return False for a name without any part of a delta, which therefore has no adapter's own name behind it either."""
    one_of_lora = "lora_" in name or "vera_" in name or "hada_" in name or "lokr_" in name
    return one_of_lora or "trainable_tokens" in name or "modules_to_save" in name


def with_adapter_name(name: str) -> str:
    """Return peft's name of a LoRA tensor with the usual name of an adapter inside, as it is in a model's own state dict."""
    if name.endswith((".lora_embedding_A", ".lora_embedding_B")):
        return f"{name}.{USUAL_NAME}"
    if name.endswith(".lora_magnitude_vector"):
        return f"{name}.{USUAL_NAME}.weight"
    module, _, leaf = name.rpartition(".")
    return f"{module}.{USUAL_NAME}.{leaf}"


def adapter_name(key: str) -> str | None:
    """Return the adapter's own name in a key, `default` in `….lora_A.default.weight`; None if it has none."""
    parts = key.split(".")
    index = _adapter_name_index(parts)
    return parts[index] if index else None


def _adapter_name_index(parts: list[str]) -> int:
    """Return the index of the adapter's own name in a key's components, behind the part of a delta; 0 if there is none."""
    for index in range(2, len(parts)):
        if (parts[index - 1] in _PARTS or parts[index - 1].startswith(("hada_", "lokr_"))) and parts[index:] not in (
            ["weight"],
            ["bias"],
        ):
            return index if all(parts[index:]) else 0
    return 0


def identify_all(keys: Iterable[str], location: str) -> tuple[dict[str, str], list[TensorId], list[str]]:
    """Map peft's name of every tensor to its name in the file.

    Returns:
        The map, the identity of each tensor in the same order, and notes on differences.

    Raises:
        FormatError: Two keys are the same tensor.
        RefusedError: There are several adapters.
    """
    file_names: dict[str, str] = {}
    tensor_ids: list[TensorId] = []
    for key in keys:
        name, kind, module, part = identify(key)
        if name in file_names:
            raise FormatError(location, f"{file_names[name]!r} and {key!r} are the same tensor, {name!r}")
        file_names[key if name == key else name] = key  # one text in place of two equal ones
        tensor_ids.append((kind, module, part))
    names = sorted({adapter for name, key in file_names.items() if name != key and (adapter := adapter_name(key))})
    if len(names) > 1:
        raise RefusedError(location, f"several adapters in one file: {', '.join(names)[:120]}", "Save one at a time")
    unusual = [
        (name, key) for name, key in file_names.items() if name != key and not key.endswith(".lora_magnitude_vector.weight")
    ]
    notes = []
    if unusual:
        notes.append(f"{len(unusual)} tensors have names that peft would skip: {unusual[0][1]} is read as {unusual[0][0]}")
    return file_names, tensor_ids, notes


# ---- Writing


def state_dict(adapter: Adapter) -> dict[str, np.ndarray]:
    """Return the tensors under the names and in the layouts in which peft saves them."""
    names = dict(tensor_names(adapter))
    swapped = adapter.source.turned if adapter.source and adapter.source.format == "peft" else None
    return {names[tensor_id]: tensor for tensor_id, tensor in _tensors(adapter, swapped)}


# From the name of a part in `Delta.parts` to its name in `classify` and the suffix of its key.
_ENDS = {
    "lora_A": ("A", ".lora_A.weight"), "lora_B": ("B", ".lora_B.weight"),
    "magnitude": ("magnitude", ".lora_magnitude_vector"), "bias": ("bias", ".lora_B.bias"),
}  # fmt: skip
_EMBEDDING_ENDS = {
    **_ENDS, "lora_A": ("embedding_A", ".lora_embedding_A"), "lora_B": ("embedding_B", ".lora_embedding_B"),
}  # fmt: skip


def _key_end(delta: Delta, part: str) -> tuple[str, str]:
    if isinstance(delta, (AdaLora, Hadamard, Kronecker, Vera)):
        return part, f".{part}"
    return (_EMBEDDING_ENDS if isinstance(delta, LowRankEmbedding) else _ENDS)[part]


def tensor_names(adapter: Adapter) -> Iterator[tuple[TensorId, str]]:
    """Yield every tensor of an adapter with its name in a PEFT file."""
    stacks = target_parameters.wrapper_names_by_target(
        [t for t, delta in adapter.deltas.items() if isinstance(delta, StackedLowRank)]
    )
    ends_by_delta = {id(delta): [_key_end(delta, part) for part, _ in delta.parts()] for delta, _ in adapter.distinct_deltas}
    for target, delta in adapter.deltas.items():
        module = PREFIX + stacks.get(target, target)
        for label, end in ends_by_delta[id(delta)]:
            yield ("pair", target, label), module + end
    for name in adapter.replaced:
        yield ("replaced", name, ""), PREFIX + _under_delta(name, adapter)
    for name in adapter.copies:
        yield ("copy", name, ""), PREFIX + ".base_layer.".join(name.rsplit(".", 1))
    yield from ((("shared", name, ""), key) for key, name in SHARED.items() if name in adapter.shared)
    for target in adapter.rows:
        yield ("rows", target, ""), f"{PREFIX}{target}.token_adapter.trainable_tokens_delta"


def _under_delta(name: str, adapter: Adapter) -> str:
    """Return the name of a replaced parameter.

    peft saves the bias of a module that has a delta from inside the module's wrapper.
    """
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.bias" if kind == "bias" and module in adapter.deltas else name


def _tensors(adapter: Adapter, swapped: frozenset[str] | None) -> Iterator[tuple[TensorId, np.ndarray]]:
    for target, delta in adapter.deltas.items():
        if isinstance(delta, StackedLowRank):
            is_swapped = target_parameters.is_written_swapped(target, delta) if swapped is None else target in swapped
            lora_A, lora_B = target_parameters.file_factors(delta, is_swapped=is_swapped)
            yield from ((("pair", target, "A"), lora_A), (("pair", target, "B"), lora_B))
        else:
            yield from ((("pair", target, _key_end(delta, part)[0]), tensor) for part, tensor in delta.parts())
    yield from ((("shared", name, ""), tensor) for name, tensor in adapter.shared.items())
    yield from ((("replaced", name, ""), tensor) for name, tensor in adapter.replaced.items())
    yield from ((("copy", name, ""), tensor) for name, tensor in adapter.copies.items())
    yield from ((("rows", target, ""), rows.values) for target, rows in adapter.rows.items())
