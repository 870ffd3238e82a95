"""Deviations of other programs' PEFT files from peft's own: read as intended and noted, or refused where that is impossible.

Unsloth names a base in 4 bits; mergekit-extract-lora writes biases that the config does not mention (`lora_B.bias`);
some programs call Gemma 4's wrapped layers `….linear` and others do not; torchtune's export has DoRA's magnitudes of
q and k in another order than their rows, and permutes the rows of a Qwen2; ai-toolkit's alpha always equals the rank,
which its files do not record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterhub_converters.adapter import Adapter, targets_without_magnitude
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError

from .tensor_keys import classify

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_FOUR_BITS = "-bnb-4bit"
_LINEAR_MARK = ".linear.lora_"
# The config keys that torchtune's recipes write (`recipes/lora_finetune_single_device.py`), by which its export is recognized.
_TORCHTUNE_KEYS = {"r", "lora_alpha", "target_modules", "peft_type"}
_PERMUTED = (".q_proj", ".k_proj")

Parts = Mapping[str, Mapping[str, Any]]
"""Module to its tensors by part: `A`, `B`, `bias`, `magnitude`."""


def without_linear(files: dict[str, str], base: BaseSpec | None) -> tuple[dict[str, str], list[str]]:
    """Remove `.linear` from modules that do not have it in a known base.

    Args:
        files: peft's name of every tensor to its name in the file.
        base: The base, if it is known.

    Returns:
        The map itself, or one with the right names and a note.
    """
    plain_names = {name: name.replace(_LINEAR_MARK, ".lora_") for name in files if _LINEAR_MARK in name}
    if not plain_names:
        return files, []
    base_tensors = base.tensors if base is not None else {}
    wrong_names = {
        name
        for name, plain in plain_names.items()
        if _weight_name(name) not in base_tensors and _weight_name(plain) in base_tensors
    }
    if not base_tensors:
        return files, [
            f"{len(plain_names)} tensors belong to modules called .linear, which only some bases have: name the base"
        ]
    # A file with both forms of a name has them on purpose.
    collisions = [plain_names[name] for name in wrong_names if plain_names[name] in files]
    if not wrong_names or collisions:
        return files, []
    first = min(wrong_names)
    note = (
        f"{len(wrong_names)} tensors belong to modules called .linear, which the base does not have: "
        f"{first} is read as {plain_names[first]}"
    )
    return {plain_names[name] if name in wrong_names else name: key for name, key in files.items()}, [note]


def _weight_name(name: str) -> str:
    return f"{classify(name)[1]}.weight"


def refuse_torchtune_dora(config: Mapping[str, Any], parts: Parts, location: str) -> None:
    """Raise RefusedError for DoRA as torchtune exports it, which cannot be read correctly."""
    reordered = [target for target, part in parts.items() if "magnitude" in part and target.endswith(_PERMUTED)]
    if reordered and _is_from_torchtune(config):
        reason = f"{reordered[0]}: torchtune's export has the magnitudes of q and k in another order than their rows"
        raise RefusedError(location, reason, "Convert the adapter_model.pt next to it", code="torchtune-export")


def _is_from_torchtune(config: Mapping[str, Any]) -> bool:
    return set(config) - {"base_model_name_or_path"} == _TORCHTUNE_KEYS


def missing_magnitudes(adapter: Adapter) -> Iterator[str]:
    """Yield a note on DoRA modules without a magnitude."""
    if targets := targets_without_magnitude(adapter):
        yield f'"use_dora" is true and {len(targets)} modules have no magnitude: peft uses the norms of the base\'s rows'


def reading_notes(config: Mapping[str, Any], parts: Parts, base: BaseSpec | None) -> Iterator[str]:
    """Yield notes on an adapter that was read."""
    name = config.get("base_model_name_or_path")
    if isinstance(name, str) and name.endswith(_FOUR_BITS):
        full_precision = name.removesuffix(_FOUR_BITS).removesuffix("-unsloth")
        yield f"its base {name} is in 4 bits; {full_precision}, or the model it was made from, is the same in 16 bits"
    for part, key, description in (("bias", "lora_bias", "a lora_B.bias"), ("magnitude", "use_dora", "a magnitude")):
        targets = [target for target, tensors in parts.items() if part in tensors]
        if targets and not config.get(key):
            yield f'{len(targets)} modules have {description} and "{key}" is not true, so peft ignores it: set it to true'
    architecture = base.architecture if base is not None else ""
    qwen = architecture == "Qwen2ForCausalLM" or (base is None and isinstance(name, str) and "qwen2" in name.lower())
    if qwen and _is_from_torchtune(config) and any(target.endswith(_PERMUTED) for target in parts):
        yield (
            "if torchtune exported it, the rows of q and k are permuted, unlike in torchtune's own file of a Qwen2: "
            "convert its .pt"
        )


def alpha_is_rank(metadata: Mapping[str, str]) -> bool:
    """Return whether ai-toolkit wrote a file with peft's names: its alpha is the rank, whatever it trained with."""
    try:
        software = json_file.parse(metadata.get("software", "null"), "")
    except FormatError:
        return False
    return isinstance(software, dict) and software.get("name") == "ai-toolkit"
