"""What the name of a tensor in a PEFT file says, and the name that PEFT itself would give it.

Trainers leave their wrappers in the names: a doubled `base_model.model.`, `_orig_mod.` of torch.compile, `module.` of
DistributedDataParallel, the adapter's own name. PEFT skips such a tensor without a word; here they are taken off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapterhub_converters.errors import FormatError, RefusedError

PREFIX = "base_model.model."
# Components that wrappers insert anywhere (torch.compile, FSDP, activation checkpointing).
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARTS = (
    r"lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save|trainable_tokens_delta"
    r"|hada_\w+|lokr_\w+|vera_A|vera_B|vera_lambda_[bd]"
)
_NAMED = re.compile(rf"\.({_PARTS})\.(?!weight$|bias$)([^.]+)((?:\.[^.]+)*)$")

# Suffix of a key to the part of a delta it is (FORMATS: state-dict keys; peft, `utils/save_and_load.py`).
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_B.bias": "bias",
}
# Bare names of the other kinds: AdaLoRA, LoHa, LoKr, VeRA.
_BARE = re.compile(r"\.(lora_A|lora_B|lora_E|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|vera_lambda_[bd])$")
# VeRA's projections, which all modules share and which therefore hang on no module.
SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}
_ROWS = ".token_adapter.trainable_tokens_delta"
# A copy of the base's weight under a wrapper of peft's, by the names its wrappers have for what they wrap.
_COPY = re.compile(r"^(.+?)(?:\.token_adapter)?\.(?:base_layer|original_module)\.(weight|bias)$")


def classify(key: str) -> tuple[str, str, str]:
    """What a tensor is: `pair` (module and part), `rows` (table), `replaced` or `copy` (parameter), `shared`, or `unknown`."""
    return classify_native(native(key), key)


def classify_native(full: str, key: str) -> tuple[str, str, str]:
    """`classify` for a caller that has the native name `full` of `key`."""
    if full in SHARED:
        return "shared", SHARED[full], ""
    if not full.startswith(PREFIX):
        return "unknown", key, ""
    name = full.removeprefix(PREFIX)
    if name.endswith(_ROWS):
        return "rows", name.removesuffix(_ROWS), ""
    return _pair(name) or _whole(name) or ("unknown", name, "")


def _pair(name: str) -> tuple[str, str, str] | None:
    for suffix, part in _SUFFIXES.items():
        if name.endswith(suffix):
            return "pair", name.removesuffix(suffix), part
    bare = _BARE.search(name)
    return ("pair", name[: bare.start()], bare.group(1)) if bare else None


def _whole(name: str) -> tuple[str, str, str] | None:
    if "lora_" in name or not name.endswith((".weight", ".bias")):
        return None
    copy = _COPY.match(name)
    if copy:
        # Biases are trained where they stand (bias="all"); the weight under a delta is frozen.
        return "copy" if copy.group(2) == "weight" else "replaced", f"{copy.group(1)}.{copy.group(2)}", ""
    return ("replaced", name, "") if ".base_layer." not in name else None


def native(key: str) -> str:
    """The name that peft saves this tensor by, without what trainers put around it."""
    name = key
    if "._" in key or key.startswith(("_", "module.", PREFIX * 2)):
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        while parts[:1] == ["module"]:
            parts = parts[1:]
        while parts[:4] == ["base_model", "model"] * 2:
            parts = parts[2:]
        name = ".".join(parts)
    found = _NAMED.search(name)
    if found:
        part, _, rest = found.groups()
        name = name[: found.start()] + ("" if part == "modules_to_save" else f".{part}") + rest
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def adapter_name(key: str) -> str | None:
    """The adapter's own name in a key, where there is one: `default` in `….lora_A.default.weight`."""
    found = _NAMED.search(key)
    return found.group(2) if found else None


def cleaned(keys: Mapping[str, object], where: str) -> tuple[dict[str, str], list[str]]:
    """peft's name of every tensor to its name in the file; and what is worth saying of the difference."""
    found: dict[str, str] = {}
    for key in keys:
        name = native(key)
        if name in found:
            raise FormatError(where, f"{found[name]!r} and {key!r} are the same tensor, {name!r}")
        found[name] = key
    names = sorted({name for name in map(adapter_name, keys) if name})
    if len(names) > 1:
        raise RefusedError(where, f"several adapters in one file: {', '.join(names)[:120]}", "Save one at a time")
    odd = [(name, key) for name, key in found.items() if name != key and not key.endswith(".lora_magnitude_vector.weight")]
    notes = []
    if odd:
        notes.append(f"{len(odd)} tensors have names that peft would skip: {odd[0][1]} is read as {odd[0][0]}")
    return found, notes
