"""A single safetensors file with the state dict of a LoRA: peft's keys, possibly with the adapter's name in them.

Such a file (`…q_proj.lora_A.default.weight`) does not record its alpha, on which the scale depends. The alpha comes from a
config in the header, from the `adapter_config.json` next to the file, or from the caller. It is never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapterhub_converters.adapter import Adapter, Loss, LossReport, TensorLoss, with_factored_as_pairs
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.peft_patterns import escape

from . import peft
from .candidate import Candidate

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

CONFIG_KEY, METADATA_KEY = "adapterhub.config", "adapterhub.metadata"
"""Keys of the header's metadata: the text of a PEFT config, and the metadata of the PEFT file."""
_PREFIX = "base_model.model."
# `.lora_A.default.weight`: in memory, peft's keys contain the adapter's name; saving removes it.
_LORA_A = ".lora_A.weight"
_PARTS = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a safetensors file with keys of a LoRA, whatever its file name.

    A malformed file with the suffix .safetensors counts, because reading it gives the reason.
    """
    if candidate.header is None:
        return candidate.is_file and candidate.path.suffix == ".safetensors"
    lora = any(".lora_A." in name or ".lora_embedding_A" in name for name in candidate.tensors)
    return lora or CONFIG_KEY in candidate.header.metadata


def read(path: Path | Candidate, *, base: BaseSpec | None = None, alpha: float | None = None, rslora: bool = False) -> Adapter:
    """Return the adapter in a file.

    Args:
        path: The file.
        base: The base model, where names or shapes depend on it.
        alpha: The alpha of all modules; allowed only if neither the file nor its folder has a config.
        rslora: Whether they scale by alpha / sqrt(r); allowed under the same condition.

    Raises:
        RefusedError: The scale is not known, or it was given although there is a config.
    """
    candidate = Candidate.of(path)
    path, location = candidate.path, str(candidate.path)
    with candidate.open_safetensors() as file:
        metadata = dict(file.header.metadata)
        config_text = metadata.pop(CONFIG_KEY, None)
        # A weights file that is named directly still belongs to its folder's config.
        if config_text is None and path.name == peft.WEIGHTS and peft.sniff(folder := Candidate(path.parent)):
            config_text = folder.config
        if config_text is None and alpha is None and not peft.alpha_is_rank(metadata):
            raise _missing_alpha_error(path)
        tensors = {name: file.tensor(name) for name in file.tensors}
    if config_text is not None:
        if alpha is not None or rslora:
            problem = "its config records the alpha, and whether it is rsLoRA"
            raise RefusedError(location, problem, "Leave out alpha and rslora", code="alpha-recorded")
        return peft.parse(
            config_text,
            _with_saved_keys(tensors, location)[0],
            _source_metadata(metadata, location),
            location=location,
            base=base,
        )
    if alpha is None:
        return _read_with_rank_as_alpha(tensors, location)
    state, notes = _with_saved_keys(tensors, location)
    config = {"peft_type": "LORA", "lora_alpha": alpha, "use_rslora": rslora}
    adapter = peft.parse(json.dumps(config), state, {}, location=location)
    note = f"alpha {alpha:g}{' with rsLoRA' if rslora else ''} for all modules, as given"
    return Adapter(adapter.deltas, adapter.replaced, adapter.rows, adapter.meta, None, (*adapter.notes, *notes, note))


def _missing_alpha_error(path: Path) -> RefusedError:
    location, problem = str(path), "its alpha is not recorded anywhere, and the scale depends on it"
    if path.name == peft.WEIGHTS:
        location, problem = str(path.parent / peft.CONFIG), "is missing, and nothing else records its alpha"
    return RefusedError(location, problem, "Give the alpha it was trained with", code="alpha-or-rslora-required")


def _read_with_rank_as_alpha(tensors: Mapping[str, np.ndarray], location: str) -> Adapter:
    """Return the adapter of a file in which every alpha equals the rank."""
    state, notes = _with_saved_keys(tensors, location)
    ranks = {key.removeprefix(_PREFIX).removesuffix(_LORA_A): len(a) for key, a in state.items() if key.endswith(_LORA_A)}
    patterns = {escape(target): rank for target, rank in ranks.items()}
    config = {"peft_type": "LORA", "rank_pattern": patterns, "alpha_pattern": patterns}
    adapter = peft.parse(json.dumps(config), state, {}, location=location)
    # The adapter gets no source: this config was made up here, and must not be written back as the file's own.
    note = "alpha is the rank, as always in files that ai-toolkit saves"
    return Adapter(adapter.deltas, adapter.replaced, adapter.rows, adapter.meta, None, (*adapter.notes, *notes, note))


def _with_saved_keys(tensors: Mapping[str, np.ndarray], location: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the tensors under the keys that peft saves, and notes on what was changed."""
    names = {key_and_name[1] for key in tensors if (key_and_name := _split_adapter_name(key))}
    if len(names) > 1:
        raise RefusedError(location, f"it contains {len(names)} adapters: {', '.join(sorted(names))[:80]}", "Save one of them")
    state: dict[str, np.ndarray] = {}
    for key, array in tensors.items():
        plain = key_and_name[0] if (key_and_name := _split_adapter_name(key)) else key
        plain = plain if plain.startswith(_PREFIX) or peft.classify(plain)[0] == "shared" else _PREFIX + plain
        if plain in state:
            raise FormatError(location, f"tensor {key!r} exists under two names")
        state[plain] = array
    notes = [f"{name!r} was the adapter's name in its keys" for name in names]
    if any(not key.startswith(_PREFIX) and peft.classify(key)[0] != "shared" for key in tensors):
        notes.append(f"{_PREFIX} was added to keys without it")
    return state, tuple(notes)


def _split_adapter_name(key: str) -> tuple[str, str] | None:
    """Return a key without the adapter's own name, which peft leaves out when it saves, and that name; None if it has none."""
    stem, dot, kind = key.rpartition(".")
    if kind not in ("weight", "bias"):
        stem, dot, kind = key, "", ""
    part, _, name = stem.rpartition(".")
    return (part + dot + kind, name) if name and part.endswith(_PARTS) else None


def _source_metadata(metadata: dict[str, str], location: str) -> dict[str, str]:
    text = metadata.pop(METADATA_KEY, None)
    if text is None:
        return metadata
    source = json_file.parse_object(text, f"{location}: {METADATA_KEY}")
    if not all(isinstance(value, str) for value in source.values()):
        raise FormatError(location, f"{METADATA_KEY} is not a map of text to text")
    return source


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`: the tensors of a PEFT file, with its config in the header."""
    source = adapter.source if adapter.source and adapter.source.format == "peft" else None
    written = adapter if source else with_factored_as_pairs(adapter)
    names = source.names if source else {}
    config = source.config if source else peft.config_text(written)
    tensors = {names.get(name, name): tensor for name, tensor in peft.state_dict(written).items()}
    metadata = {
        "format": "pt",
        CONFIG_KEY: config,
        METADATA_KEY: json.dumps(dict(source.metadata) if source else {"format": "pt"}, separators=(",", ":")),
    }
    safetensors_file.write(path, tensors, metadata)
    return LossReport(tuple(TensorLoss(name, Loss.EXACT) for name in sorted(tensors)), written.notes)
