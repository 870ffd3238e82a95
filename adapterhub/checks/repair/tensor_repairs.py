"""Repair the tensors of an adapter: names that peft would skip, and copies of the base's weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.base_weights import BaseWeights
from adapterhub_converters.formats.peft import quirks
from adapterhub_converters.formats.peft.tensor_keys import PREFIX, identify_all, native_name, with_adapter_name

from .draft import Draft

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

# What the modules of a causal model begin with; a path that begins in its layers may lack more than PEFT's prefix.
_ROOTS = ("model.", "transformer.", "gpt_neox.", "lm_head.")


def rename_tensors(draft: Draft, base: BaseSpec | None) -> None:
    """Remove the parts that wrappers add to names, and add PEFT's prefix where nothing else can be missing.

    Raises:
        FormatError: Two tensors have the same name without their wrappers.
        RefusedError: The file has several adapters.
    """
    # Refuses two tensors that would get the same name.
    identify_all(draft.names, draft.source_name)
    names, _ = quirks.without_linear({_native(name): key for name, key in draft.names.items()}, base)
    unprefixed = [name for name in names if not name.startswith(PREFIX)]
    prefix = _prefix(unprefixed, base) if len(unprefixed) == len(names) else None
    if unprefixed and prefix is None:
        message = f"{len(unprefixed)} names have no {PREFIX}, such as {unprefixed[0]}, and may lack more than that"
        hint = (
            "Rename them by hand: the base has no such modules"
            if base
            else "Repair it with its base model, whose modules decide"
        )
        draft.propose("key-prefix", message, hint)
    elif prefix is not None:
        names = {prefix + name: key for name, key in names.items()}
    renamed = [(key, name) for name, key in names.items() if name != key]
    if renamed:
        draft.names = names
        code = "adapter-name" if all(key == with_adapter_name(name) for key, name in renamed) else "key-prefix"
        draft.record(code, f"{len(renamed)} of {len(names)} tensors renamed: {renamed[0][0]} is {renamed[0][1]}")


def _native(name: str) -> str:
    """Return PEFT's name of a tensor; PEFT itself removes the `.weight` of a magnitude."""
    peft_name = native_name(name)
    return name if peft_name == name.removesuffix(".weight") else peft_name


def _prefix(unprefixed: list[str], base: BaseSpec | None) -> str | None:
    """Return the prefix that all names lack, if only one is possible."""
    if not unprefixed or any(name.startswith("base_model.") for name in unprefixed):
        return None
    if base is not None and base.tensors:
        extras = [extra for extra in ("", "model.") if all(_is_in_base(extra + name, base) for name in unprefixed)]
        return PREFIX + extras[0] if len(extras) == 1 else None
    certain = all(name.startswith(_ROOTS) and not name.startswith("model.model.") for name in unprefixed)
    return PREFIX if certain else None


def _is_in_base(name: str, base: BaseSpec) -> bool:
    """Return whether the base has the module or parameter that a tensor changes."""
    kind, target, _ = peft.classify(PREFIX + name)
    return target in base.tensors or (kind in ("pair", "rows") and f"{target}.weight" in base.tensors)


def drop_copies(draft: Draft, base: BaseSpec | None) -> None:
    """Drop each copy of a base weight that equals it, byte for byte as training loaded it."""
    copies = {name: parameter for name in draft.names for kind, parameter, _ in (peft.classify(name),) if kind == "copy"}
    if not copies:
        return
    if base is None or base.folder is None:
        for name in copies:
            message = f"{name} is a copy of a weight of the base, which may differ from it"
            draft.propose("copy", message, "Repair it with its base model and the weights of that: an equal copy is dropped")
        return
    with BaseWeights(base.folder) as weights:
        for name, parameter in copies.items():
            _drop_copy(draft, weights, name, parameter)


def _drop_copy(draft: Draft, weights: BaseWeights, name: str, parameter: str) -> None:
    """Drop a copy that equals the base's weight; propose a choice for any other."""
    key = draft.names[name]
    copy = draft.files[key].tensor(key)
    try:
        base_weight = weights.tensor(parameter)
    except RefusedError as error:
        draft.propose("copy", f"{name} is a copy of {parameter}, {error.what}", "Use the base it was trained on")
        return
    # In the copy's dtype: training may have loaded the base in another one.
    if base_weight.shape == copy.shape and base_weight.astype(copy.dtype).tobytes() == copy.tobytes():
        del draft.names[name]
        draft.record("copy", f"{name} dropped: it equals the base's weight")
    else:
        message = f"{name} differs from the base's weight: its vocabulary was resized, or it was trained"
        draft.propose("copy", message, f"Keep it and name its module in modules_to_save, or drop it: {parameter}")


def bring_experts_forward(draft: Draft, base: BaseSpec | None) -> None:
    """Rewrite experts that an earlier peft saved in today's form, with the config that belongs to them."""
    if draft.config.get("peft_type") != "LORA" or not any(".experts" in name for name in draft.names):
        return
    text = json.dumps(draft.config, indent=2, ensure_ascii=False)
    try:
        adapter = peft.parse(text, draft.tensor_views(), draft.metadata, location=draft.source_name, base=base)
        newer = peft.upgrade_layout(adapter, base)
    except RefusedError as error:
        draft.propose("old-experts", error.what, error.hint or "Save it again with peft")
        return
    if newer is adapter:
        return
    draft.config = json_file.parse_object(newer.source.config if newer.source else "{}", peft.CONFIG)
    draft.tensors = peft.state_dict(newer)
    draft.record("old-experts", newer.notes[-1])
