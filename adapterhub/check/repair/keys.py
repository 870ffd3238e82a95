"""Names of tensors: those that peft would skip get the ones it would load."""

from __future__ import annotations

from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft import quirks
from adapterhub_converters.formats.peft.keys import PREFIX, cleaned, native

from .draft import Draft

# What the modules of a causal model begin with; a path that begins in its layers may lack more than PEFT's prefix.
_ROOTS = ("model.", "transformer.", "gpt_neox.", "lm_head.")
_CODE = "key-prefix"


def rename_tensors(state: Draft, base: BaseSpec | None) -> None:
    """Wrappers' parts and the adapter's own name go, PEFT's prefix comes where it can only have been the one missing."""
    cleaned(state.names, str(state.folder or "the file"))  # refuses two tensors of one name, and two adapters
    names, _ = quirks.unwrapped({_native(name): key for name, key in state.names.items()}, base)
    odd = [(key, name) for name, key in names.items() if name != key]
    bare = [name for name in names if not name.startswith(PREFIX)]
    prefix = _prefix(bare, base) if len(bare) == len(names) else None
    if bare and prefix is None:
        what = f"{len(bare)} names have no {PREFIX}, {bare[0]} for one, and what else they lack is not certain"
        state.proposed(_CODE, what, "Give --base, whose modules say it")
    elif prefix is not None and bare:
        names = {prefix + name: key for name, key in names.items()}
        odd = [(key, name) for name, key in names.items()]
    if odd:
        state.names = names
        state.mended(_CODE, f"{len(odd)} of {len(names)} tensors renamed: {odd[0][0]} is {odd[0][1]}")


def _native(name: str) -> str:
    """PEFT's name; a magnitude's `.weight` it takes off by itself."""
    found = native(name)
    return name if found == name.removesuffix(".weight") else found


def _prefix(bare: list[str], base: BaseSpec | None) -> str | None:
    """What to put before all names, if only one thing can be meant."""
    if not bare or any(name.startswith("base_model.") for name in bare):
        return None
    if base is not None and base.tensors:
        found = [extra for extra in ("", "model.") if all(_known(extra + name, base) for name in bare)]
        return PREFIX + found[0] if len(found) == 1 else None
    certain = all(name.startswith(_ROOTS) and not name.startswith("model.model.") for name in bare)
    return PREFIX if certain else None


def _known(name: str, base: BaseSpec) -> bool:
    kind, target, _ = peft.classify(PREFIX + name)
    return target in base.tensors or (kind in ("pair", "rows") and f"{target}.weight" in base.tensors)
