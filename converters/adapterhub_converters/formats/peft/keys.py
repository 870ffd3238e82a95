"""Names of tensors in a PEFT file: parsed when reading, and given as PEFT gives them when writing.

Trainers leave their wrappers in the names: a doubled `base_model.model.`, `_orig_mod.` of torch.compile, `module.` of
DistributedDataParallel, the adapter's own name. PEFT silently skips such a tensor; here the wrappers are removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

from adapterhub_converters.adapter import AdaLora, Adapter, Delta, Hadamard, Kronecker, LowRankEmbedding, StackedLowRank, Vera
from adapterhub_converters.errors import FormatError, RefusedError

from . import experts

PREFIX = "base_model.model."
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
# What a part of a delta begins with, behind the name of its module.
_MARKS = (".lora_", ".token_adapter.", ".hada_", ".lokr_", ".vera_", ".modules_to_save")
# Names without a suffix, of the other kinds: AdaLoRA, LoHa, LoKr, VeRA.
_BARE = {
    "lora_A", "lora_B", "lora_E", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1",
    "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "vera_lambda_b", "vera_lambda_d",
}  # fmt: skip
# VeRA's projections, which all modules share.
SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}
_ROWS = ".token_adapter.trainable_tokens_delta"

What = tuple[str, str, str]
"""A tensor of an adapter by kind, name and part, as `classify` returns them."""

# The names that peft's wrappers have for what they wrap, a copy of the base's weight.
_COPIES = (".base_layer", ".original_module")


def identify(key: str) -> tuple[str, str, str, str]:
    """The native name of a tensor, and its kind, name and part, each module and each end of a name being looked at once."""
    for mark in _MARKS:
        if (at := key.find(mark)) > 0 and (found := _native_module(key[:at])):
            module, name = found
            end, kind, part = _native_end(key[at:])
            if kind:
                return module + end, kind, name, part
            return module + end, *_classify(module + end, key)
    full = native(key)
    return full, *_classify(full, key)


@lru_cache(maxsize=1)  # the tensors of a module follow each other
def _native_module(module: str) -> tuple[str, str] | None:
    """The native name, with and without PREFIX, of a module on which the rest of the key has no influence; None for others."""
    name = "" if _has_part(module) else _unwrapped(f"{module}.x")[:-2]
    return (name, name[len(PREFIX) :]) if name.startswith(PREFIX) else None


@lru_cache(maxsize=1_000)
def _native_end(end: str) -> tuple[str, str, str]:
    """The rest of a native name behind that of a module; the kind and the part that it tells, empty if it tells none."""
    full = native(f"{PREFIX}x{end}")
    kind, name, part = _classify(full, full)
    return full[len(PREFIX) + 1 :], kind if name == "x" and kind != "unknown" else "", part


def classify(key: str) -> What:
    """The kind, name and part of a tensor: `pair` (module and part), `rows` (table), `replaced` or `copy` (parameter),
    `shared`, or `unknown`."""
    return identify(key)[1:]


def _classify(full: str, key: str) -> What:
    if full in SHARED:
        return "shared", SHARED[full], ""
    if not full.startswith(PREFIX):
        return "unknown", key, ""
    name = full.removeprefix(PREFIX)
    if name.endswith(_ROWS):
        return "rows", name.removesuffix(_ROWS), ""
    return _pair(name) or _whole(name) or ("unknown", name, "")


def _pair(name: str) -> What | None:
    for suffix, part in _SUFFIXES.items():
        if name.endswith(suffix):
            return "pair", name.removesuffix(suffix), part
    module, dot, bare = name.rpartition(".")
    return ("pair", module, bare) if dot and bare in _BARE else None


def _whole(name: str) -> What | None:
    if "lora_" in name or not name.endswith((".weight", ".bias")):
        return None
    wrapper, _, kind = name.rpartition(".")
    if wrapper.endswith(_COPIES):
        module = wrapper.rpartition(".")[0].removesuffix(".token_adapter")
        # Biases are trained in place (bias="all"); the weight under a delta is frozen.
        return "copy" if kind == "weight" else "replaced", f"{module}.{kind}", ""
    return ("replaced", name, "") if ".base_layer." not in name else None


def native(key: str) -> str:
    """The name by which peft saves this tensor, without trainers' wrappers."""
    name = _unwrapped(key)
    if _has_part(name) and (at := _own_name(parts := name.split("."))):
        name = ".".join([*parts[: at - (parts[at - 1] == "modules_to_save")], *parts[at + 1 :]])
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def _unwrapped(key: str) -> str:
    """A key without the components of trainers' wrappers."""
    if "._" in key or key.startswith(("_", "module.", PREFIX * 2)):
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        start = 0
        while parts[start : start + 1] == ["module"]:
            start += 1
        while parts[start : start + 4] == ["base_model", "model"] * 2:
            start += 2
        return ".".join(parts[start:])
    return key


def _has_part(name: str) -> bool:
    """False for a name without any part of a delta, and so without an adapter's own name behind it."""
    one_of_lora = "lora_" in name or "vera_" in name or "hada_" in name or "lokr_" in name
    return one_of_lora or "trainable_tokens" in name or "modules_to_save" in name


def adapter_name(key: str) -> str | None:
    """The adapter's own name in a key: `default` in `….lora_A.default.weight`, None without one."""
    parts = key.split(".")
    at = _own_name(parts)
    return parts[at] if at else None


def _own_name(parts: list[str]) -> int:
    """The place of the adapter's own name among the parts of a key, behind the part of a delta; 0 without one."""
    for at in range(2, len(parts)):
        if (parts[at - 1] in _PARTS or parts[at - 1].startswith(("hada_", "lokr_"))) and parts[at:] not in (
            ["weight"],
            ["bias"],
        ):
            return at if all(parts[at:]) else 0
    return 0


def cleaned(keys: Iterable[str], where: str) -> tuple[dict[str, str], list[What], list[str]]:
    """peft's name of every tensor to its name in the file, what each of them is, and notes on the difference.

    Raises:
        FormatError: Two keys are the same tensor.
        RefusedError: There are several adapters.
    """
    found: dict[str, str] = {}
    whats: list[What] = []
    for key in keys:
        name, kind, module, part = identify(key)
        if name in found:
            raise FormatError(where, f"{found[name]!r} and {key!r} are the same tensor, {name!r}")
        found[key if name == key else name] = key  # one text in place of two equal ones
        whats.append((kind, module, part))
    names = sorted({own for name, key in found.items() if name != key and (own := adapter_name(key))})
    if len(names) > 1:
        raise RefusedError(where, f"several adapters in one file: {', '.join(names)[:120]}", "Save one at a time")
    odd = [(name, key) for name, key in found.items() if name != key and not key.endswith(".lora_magnitude_vector.weight")]
    notes = []
    if odd:
        notes.append(f"{len(odd)} tensors have names that peft would skip: {odd[0][1]} is read as {odd[0][0]}")
    return found, whats, notes


# ---- Writing


def state_dict(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors under the names and in the layouts by which peft saves them."""
    names = dict(tensor_names(adapter))
    turned = adapter.source.turned if adapter.source and adapter.source.format == "peft" else None
    return {names[what]: tensor for what, tensor in _tensors(adapter, turned)}


# The name of a part in `Delta.parts` to its name in `classify` and the suffix of its key.
_ENDS = {
    "lora_A": ("A", ".lora_A.weight"), "lora_B": ("B", ".lora_B.weight"),
    "magnitude": ("magnitude", ".lora_magnitude_vector"), "bias": ("bias", ".lora_B.bias"),
}  # fmt: skip
_EMBEDDING_ENDS = {
    **_ENDS, "lora_A": ("embedding_A", ".lora_embedding_A"), "lora_B": ("embedding_B", ".lora_embedding_B"),
}  # fmt: skip


def _end(delta: Delta, part: str) -> tuple[str, str]:
    if isinstance(delta, (AdaLora, Hadamard, Kronecker, Vera)):
        return part, f".{part}"
    return (_EMBEDDING_ENDS if isinstance(delta, LowRankEmbedding) else _ENDS)[part]


def tensor_names(adapter: Adapter) -> Iterator[tuple[What, str]]:
    """Yield every tensor of an adapter with its name in a PEFT file."""
    stacks = experts.by_module([t for t, delta in adapter.deltas.items() if isinstance(delta, StackedLowRank)])
    for target, delta in adapter.deltas.items():
        for part, _ in delta.parts():
            label, end = _end(delta, part)
            yield ("pair", target, label), PREFIX + stacks.get(target, target) + end
    for name in adapter.replaced:
        yield ("replaced", name, ""), PREFIX + _under_delta(name, adapter)
    for name in adapter.copies:
        yield ("copy", name, ""), PREFIX + ".base_layer.".join(name.rsplit(".", 1))
    yield from ((("shared", name, ""), key) for key, name in SHARED.items() if name in adapter.shared)
    for target in adapter.rows:
        yield ("rows", target, ""), f"{PREFIX}{target}.token_adapter.trainable_tokens_delta"


def _under_delta(name: str, adapter: Adapter) -> str:
    """The name of a replaced parameter: peft saves a bias of a module with a delta from inside its wrapper."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.bias" if kind == "bias" and module in adapter.deltas else name


def _tensors(adapter: Adapter, turned: frozenset[str] | None) -> Iterator[tuple[What, np.ndarray]]:
    for target, delta in adapter.deltas.items():
        if isinstance(delta, StackedLowRank):
            is_turned = experts.written_turned(target, delta) if turned is None else target in turned
            lora_A, lora_B = experts.flattened(delta, is_turned=is_turned)
            yield from ((("pair", target, "A"), lora_A), (("pair", target, "B"), lora_B))
        else:
            yield from ((("pair", target, _end(delta, part)[0]), tensor) for part, tensor in delta.parts())
    yield from ((("shared", name, ""), tensor) for name, tensor in adapter.shared.items())
    yield from ((("replaced", name, ""), tensor) for name, tensor in adapter.replaced.items())
    yield from ((("copy", name, ""), tensor) for name, tensor in adapter.copies.items())
    yield from ((("rows", target, ""), rows.values) for target, rows in adapter.rows.items())
